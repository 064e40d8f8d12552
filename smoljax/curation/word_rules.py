"""spaCy's rules of a language for cutting words, followed without spaCy's objects.

The algorithm is that of spaCy 3.8 (https://spacy.io/usage/linguistic-features#how-tokenizer-works), and so are the
rules, taken from its blank pipeline: between whitespace a chunk loses prefixes and suffixes until a special case or
nothing is left, and what is left is cut at infixes; then special cases are looked for in the row of words that this
gave. Where the form of a chunk tells that a rule cannot match, it is not tried: half of spaCy's time goes into searching
for suffixes.
"""

import itertools
import re
from collections.abc import Sequence

from smoljax.curation import spacy_tables

# The languages whose rules were compared with what `Rules` leaves out.
LANGUAGES = ("en", "fr", "es", "de", "it", "pt")

# Marks that are a suffix for themselves, and the end of no longer one.
_MARKS = frozenset(',:;!?()[]{}<>_#*&"')
# A prefix for themselves, and the beginning of no longer one; and the beginning of none.
_PREFIXES = frozenset('!"#$%&()*,:;<=>?[]{}“”‘’…—–')
_NO_PREFIXES = frozenset("-/@\\^|~")
# No suffix is longer, but for a row of stops.
_LONGEST_SUFFIX = 5
# Of these languages no infix begins with a letter, a digit or "_", and none is empty.
_VISIBLE_INFIXES = ("en", "es", "de")
_VISIBLE = re.compile(r"\W").finditer
# Only before one of these a prefix can begin with a letter: currencies, and what elides in French and Italian.
_BEHIND_LETTERS = frozenset("$'’")
# Only behind one of these a suffix can end with a letter: "'s", units, and the pronouns of French.
_BEFORE_LETTERS = re.compile("[0-9'’°\\-–—‐‑]")


class Rules:
    """How one of LANGUAGES cuts chunks of text, which hold no whitespace, into words."""

    def __init__(self, language: str):
        tables = spacy_tables.tables(language)
        self._prefix = re.compile(tables["prefix"]).search
        self._suffix = re.compile(tables["suffix"]).search
        self._infixes = re.compile(tables["infix"]).finditer
        self._infix = re.compile(tables["infix"]).match
        self._visible_infixes = language in _VISIBLE_INFIXES
        self._whole = re.compile(tables["whole"]).match if tables["whole"] else lambda chunk: None
        self._url = re.compile(tables["url"]).match
        cases = tables["cases"]
        self._cases: dict[str, list[str]] = {}
        rows = {case: self._row(case) for case in cases if self._is_cut(case)}
        self._cases = cases
        self._rows: dict[str, set[tuple[str, ...]]] = {}
        for row in rows.values():
            self._rows.setdefault(row[0], set()).add(row)
        self._pairs = {row[:2] for row in rows.values()}
        self._alone = {
            row[0] for case, row in rows.items() if len(row) == 1 and cases[case] != list(row)
        }
        # "EE. UU." in Spanish: cases that look across whitespace.
        self.spaced = [case for case in rows if " " in case]

    def cut(self, chunk: str) -> list[str]:
        """The words of a chunk, before special cases are looked for among them."""
        cases, whole = self._cases, self._whole
        if chunk.isalpha() and chunk not in cases:
            return [chunk]
        before, behind = [], []
        while chunk and chunk not in cases and not chunk.isalpha() and not whole(chunk):
            start = self._prefix_size(chunk)
            rest = chunk[start:]
            if start and rest in cases:
                before.append(chunk[:start])
                chunk = rest
                break
            size = self._suffix_size(rest)
            if size and chunk[:-size] in cases:
                behind.append(chunk[-size:])
                chunk = chunk[:-size]
                break
            if start:
                before.append(chunk[:start])
            if size:
                behind.append(chunk[-size:])
            elif not start:
                break
            chunk = chunk[start : len(chunk) - size]
        if chunk in cases:
            before += cases[chunk]
        elif chunk:
            self._cut_infixes(chunk, before)
        behind.reverse()
        return before + behind

    def has_cases(self, tokens: list[str]) -> bool:
        """Whether special cases among the words of a chunk would change them."""
        if self._alone.isdisjoint(tokens) and self._pairs.isdisjoint(itertools.pairwise(tokens)):
            return False
        return self.merge(tokens, [False] * len(tokens)) != tokens

    def merge(self, tokens: list[str], spaces: Sequence[bool]) -> list[str]:
        """Words of chunks in which special cases are found: the longest first, then the leftmost.

        Args:
          tokens: the words of chunks that are parted by single spaces.
          spaces: of each, whether a space follows.
        """
        spans = [
            (-len(row), start)
            for start, token in enumerate(tokens)
            for row in self._rows.get(token, ())
            if tuple(tokens[start : start + len(row)]) == row
        ]
        seen: set[int] = set()
        changes = {}
        for size, start in sorted(spans):
            end = start - size
            if start not in seen and end - 1 not in seen:
                parts = [t + " " * s for t, s in zip(tokens[start:end], spaces[start : end - 1])]
                case = "".join([*parts, tokens[end - 1]])
                # Two words of a case with a space between them are no case, but hide what they overlap.
                if case in self._cases:
                    changes[start] = end, self._cases[case]
            seen.update(range(start, end))
        merged, at = [], 0
        for start, (end, case) in sorted(changes.items()):
            merged += [*tokens[at:start], *case]
            at = end
        return merged + tokens[at:]

    def _prefix_size(self, chunk: str) -> int:
        first = chunk[0]
        if first in _PREFIXES:
            return 1
        if first in _NO_PREFIXES or (first.isalpha() and _BEHIND_LETTERS.isdisjoint(chunk)):
            return 0
        match = self._prefix(chunk)
        return match.end() if match else 0

    def _suffix_size(self, chunk: str) -> int:
        if not chunk:
            return 0
        last = chunk[-1]
        if last in _MARKS:
            return 1
        if last in "0123456789" or (last.isalpha() and not _BEFORE_LETTERS.search(chunk)):
            return 0
        # A suffix that ends with a stop begins with one.
        start = len(chunk.rstrip(".")) if last == "." else max(0, len(chunk) - _LONGEST_SUFFIX)
        match = self._suffix(chunk, start)
        return match.end() - match.start() if match else 0

    def _cut_infixes(self, chunk: str, tokens: list[str]) -> None:
        """Appends the parts of a chunk without prefixes and suffixes to `tokens`."""
        spans = () if chunk.replace("_", "").isalnum() else self._infix_spans(chunk)
        if not spans or self._whole(chunk) or ("." in chunk and self._url(chunk)):
            tokens.append(chunk)
            return
        at = 0
        for start, end in spans:
            tokens += filter(None, (chunk[at:start], chunk[start:end]))
            at = end
        if at < len(chunk):
            tokens.append(chunk[at:])

    def _infix_spans(self, chunk: str) -> list[tuple[int, int]]:
        """(start, end) of the infixes; as in spaCy, what stands at the beginning is none."""
        if not self._visible_infixes:
            return [span for match in self._infixes(chunk) if (span := match.span())[0]]
        spans, done = [], 0
        for place in _VISIBLE(chunk):
            start = place.start()
            match = self._infix(chunk, start) if start >= done else None
            if match:
                done = match.end()
                if start:
                    spans.append((start, done))
        return spans

    def _is_cut(self, case: str) -> bool:
        """Whether a special case would be cut if it were none, so that it has to be looked for among words."""
        return bool(
            " " in case
            or self._prefix(case)
            or self._suffix(case)
            or next(self._infixes(case), None)
        )

    def _row(self, case: str) -> tuple[str, ...]:
        return tuple(token for chunk in case.split(" ") for token in self.cut(chunk))
