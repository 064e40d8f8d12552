"""Work items on Apache Beam, and so on Dataflow, Flink or Spark, when one machine is outgrown.

Beam only hands the items out: what is sorted and merged lies in files of the items themselves, so the outputs are
the same bytes as those of the process pool. The folder must be one that every worker can write to (gs://...); with
no options the items run inside this process.
"""

import json
import pickle
import time
from collections.abc import Iterator, Sequence

from smoljax.curation import items, storage
from smoljax.curation.items import WorkItem
from smoljax.errors import SmoljaxError, require

_IN_PROCESS = ("--runner=FnApiRunner",)
_LOCAL_RUNNERS = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner")


def run(
    todo: Sequence[WorkItem], directory: str, options: Sequence[str]
) -> Iterator[tuple[WorkItem, dict]]:
    """Runs `todo` and yields each item with its manifest.

    Args:
      todo: items that are not finished.
      directory: of their folders.
      options: Beam's flags ("--runner=DataflowRunner", "--project=..."); () runs in this process.

    Raises:
      SmoljaxError: an item failed (the first one's message), an option is not Beam's, `directory` is local while the
        workers are not, or Apache Beam is not installed.
    """
    beam = require("apache_beam", extra="beam")
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    from apache_beam.runners.runner import PipelineState

    given = PipelineOptions([*(options or _IN_PROCESS)])
    _refuse_unknown(given)
    runner = given.view_as(StandardOptions).runner or ""
    if runner not in _LOCAL_RUNNERS and not storage.is_remote(directory):
        raise SmoljaxError(
            f"config.curation.directory is {directory!r}, a local folder, while Beam's runner {runner} works on "
            "other machines: set it to a folder of an object store, such as gs://bucket/curation"
        )
    if runner == "DataflowRunner":
        require("apitools", extra="dataflow")
    pipeline = beam.Pipeline(options=given)
    _ = (
        pipeline
        | "Items" >> beam.Create([pickle.dumps(item) for item in todo])
        | "Spread" >> beam.Reshuffle()
        | "Run" >> beam.Map(_run, directory)
    )
    result = pipeline.run()
    waiting = list(todo)
    try:
        while True:
            running = not PipelineState.is_terminal(result.state)
            for item in list(waiting):
                manifest = items.finished(item, directory)
                if manifest is not None:
                    waiting.remove(item)
                    yield item, manifest
            if not running:
                break
            time.sleep(10)
        result.wait_until_finish()
    except BaseException:
        if not PipelineState.is_terminal(result.state):
            result.cancel()
        raise
    for item in waiting:
        raise SmoljaxError(_why(item, directory))


def _refuse_unknown(given) -> None:
    """Beam would run without the options that it does not know: with fewer machines, or in another place."""
    known = given.get_all_options(drop_default=True)
    unknown = given.get_all_options(drop_default=True, retain_unknown_options=True).keys() - known
    if unknown:
        raise SmoljaxError(
            f"config.curation.beam_options has {', '.join(sorted(unknown))}, which Beam does not know: see its "
            "documentation of the runner's options"
        )


def _run(pickled: bytes, directory: str) -> None:
    """On a worker. A SmoljaxError is written down, since Beam would try the same again and bury it."""
    item: WorkItem = pickle.loads(pickled)
    try:
        items.run_item(item, directory)
    except SmoljaxError as error:
        storage.write_bytes(_error_path(item, directory), json.dumps(str(error)).encode())


def _why(item: WorkItem, directory: str) -> str:
    path = _error_path(item, directory)
    try:
        message = json.loads(storage.read_bytes(path))
    except OSError:
        return f"Beam ended without {item.label}: its log says why; what was finished is kept, so the same command goes on"
    storage.remove(path)
    return message


def _error_path(item: WorkItem, directory: str) -> str:
    return f"{directory}/{item.name}.error.json"
