"""What a run is scored on: the section `evaluation` of a config."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvaluationConfig:
    """The benchmark files of a run.

    Attributes:
      sets: name -> path of its files, or {"files": path, "fields": keys, "context": keys}
        (`smoljax.curation.decontamination.EvaluationSet`). Curation removes the documents that share text with them.
    """

    sets: Mapping[str, object] = field(default_factory=dict)
