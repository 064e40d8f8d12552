"""Your own files: HTML, WARC, PDF, JSONL, Parquet, text and archives of them, from any path or glob.

    --config.curation.recipe=data/files.py
    --config.curation.arguments.patterns.crawl='gs://bucket/crawl/*.warc.gz'

Local paths and every protocol that fsspec has a package for. What a file holds is told from its ending.
"""

from collections.abc import Mapping
from pathlib import Path

from smoljax.curation.sources import Files
from smoljax.errors import SmoljaxError


def sources(
    workdir: Path,
    patterns: Mapping[str, str],
    preset: str = "fast",
    presets: Mapping[str, str] | None = None,
    text_field: str = "text",
) -> tuple[Files, ...]:
    """One source per pattern.

    Args:
      workdir: of the run; not used, since nothing is fetched.
      patterns: source name -> path, folder or glob.
      preset: which filters the documents pass, unless `presets` says otherwise for a source.
      presets: source name -> preset.
      text_field: key or column of the text in JSONL and Parquet files.
    """
    if not patterns:
        raise SmoljaxError(
            "config.curation.arguments.patterns names no input: give each source a path or a glob"
        )
    return tuple(
        Files(name, pattern, (presets or {}).get(name, preset), text_field=text_field)
        for name, pattern in sorted(patterns.items())
    )
