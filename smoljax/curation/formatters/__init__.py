"""Stages that edit texts and remove none: `Formatter(**arguments)(batch) -> batch`, one object for each shard."""

from smoljax.curation.formatters.encoding import Encoding
from smoljax.curation.formatters.formatter import Formatter
from smoljax.curation.formatters.pii import Pii
from smoljax.curation.formatters.symbol_lines import SymbolLines

__all__ = ["Encoding", "Formatter", "Pii", "SymbolLines"]
