"""How documents are compared: the arguments of the stage "dedup"."""

import dataclasses
from collections.abc import Mapping

from smoljax import configuration
from smoljax.curation.dedup.minhash import FINEPDFS, FINEWEB, FINEWEB2, HASHES, MinHashConfig
from smoljax.errors import SmoljaxError

_MINHASH = {
    "fineweb": FINEWEB,
    "fineweb2": FINEWEB2,
    "finepdfs": FINEPDFS,
}
_CHOICES = {
    "exact": (True, False),
    "ignore_whitespace": (True, False),
    "scope": ("all", "source"),
    "by_language": (True, False),
}


@dataclasses.dataclass(frozen=True)
class DedupConfig:
    """Which documents are duplicates of each other.

    A document is compared with those whose preset gives "dedup" the same arguments, and with no others.

    Attributes:
      exact: of documents with equal texts the first stays.
      ignore_whitespace: texts are equal if they are without their whitespace (FinePDFs).
      minhash: of near-duplicates among what is left the first stays: "fineweb", "fineweb2", "finepdfs", or the fields
        of a MinHashConfig.
      scope: compare documents of "all" sources, or of one "source" (FineWeb: of one crawl).
      by_language: compare documents of one language only (FineWeb2, FinePDFs).
    """

    exact: bool = True
    ignore_whitespace: bool = False
    minhash: MinHashConfig | None = None
    scope: str = "all"
    by_language: bool = False


def build(field: str, arguments: Mapping) -> DedupConfig:
    """The configuration that a preset's arguments give, `field` being their name in errors.

    Raises:
      SmoljaxError: an argument is unknown or has a value that it cannot have, or nothing would be compared.
    """
    section = field.removeprefix("config.")
    config = configuration.build(DedupConfig, arguments, section)
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise SmoljaxError(f"{field}.{name} is {value!r}: it can be {_listed(choices)}")
    if not config.exact and config.minhash is None:
        raise SmoljaxError(
            f'{field} compares nothing: set its exact or its minhash, or take "dedup" out of the order'
        )
    if config.ignore_whitespace and not config.exact:
        raise SmoljaxError(f"{field}.ignore_whitespace changes nothing without {field}.exact")
    if isinstance(config.minhash, Mapping):
        fields = configuration.build(MinHashConfig, config.minhash, f"{section}.minhash")
        _check_minhash(f"{field}.minhash", fields)
        return dataclasses.replace(config, minhash=fields)
    if config.minhash is not None and config.minhash not in _MINHASH:
        choices = _listed((*_MINHASH, None))
        raise SmoljaxError(
            f"{field}.minhash is {config.minhash!r}: it can be {choices}, or the fields of a MinHashConfig"
        )
    return dataclasses.replace(config, minhash=_MINHASH.get(config.minhash))


def _check_minhash(field: str, config: MinHashConfig) -> None:
    for name in ("buckets", "hashes_per_bucket", "ngram", "seed", "max_characters"):
        value, least = getattr(config, name), 0 if name == "seed" else 1
        if value is None and name == "max_characters":
            continue
        if type(value) is not int or not least <= value < 1 << 32:
            raise SmoljaxError(
                f"{field}.{name} is {value!r}: it must be a whole number from {least} to 2^32 - 1"
            )
    if config.hash not in HASHES:
        raise SmoljaxError(f"{field}.hash is {config.hash!r}: it can be {_listed(HASHES)}")


def _listed(choices) -> str:
    return ", ".join(repr(choice) for choice in choices)
