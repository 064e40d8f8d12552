"""Any text dataset of TensorFlow Datasets, by random access; prepared with file_format="array_record".

--config.curation.recipe=data/tfds_text.py
--config.curation.arguments.dataset=wiki40b/en --config.curation.arguments.directory=gs://bucket/tfds
"""

from pathlib import Path

from smoljax.curation.sources import TfdsText


def sources(
    workdir: Path,
    dataset: str,
    directory: str,
    split: str = "train",
    text_field: str = "text",
    preset: str = "fast",
) -> tuple[TfdsText, ...]:
    """One source, named after the dataset.

    Args:
      workdir: of the run; not used, since nothing is fetched.
      dataset: name, with config and version where it has them ("wiki40b/en:1.3.0").
      directory: TFDS data_dir.
      split: "train", or a slice of it.
      text_field: the feature that holds the text.
      preset: which filters the documents pass.
    """
    name = dataset.partition(":")[0].replace("/", "_")
    return (
        TfdsText(name, dataset, preset, directory=directory, split=split, text_field=text_field),
    )
