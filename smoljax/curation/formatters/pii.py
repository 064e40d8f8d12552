"""Personal addresses are replaced: of e-mail, and public ones of the Internet Protocol."""

import ipaddress
import re

from smoljax.curation.formatters.formatter import Formatter
from smoljax.errors import SmoljaxError

# What datatrove 0.10 puts in their place: two addresses of domains that are reserved for examples, and six numbers.
EMAILS = ("email@example.com", "firstname.lastname@example.org")
ADDRESSES = (
    "22.214.171.124",
    "126.96.36.199",
    "188.8.131.52",
    "184.108.40.206",
    "220.127.116.11",
    "18.104.22.168",
)

_COUNTERS = ("document", "shard")

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_NUMBER = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
# From the "@" on: a domain of two labels or more, or an address in brackets.
_DOMAIN = re.compile(
    rf"@(?:(?:{_LABEL}\.)+{_LABEL}|\[(?:{_NUMBER}\.){{3}}(?:{_NUMBER}|[A-Za-z0-9-]*[A-Za-z0-9]:)\])"
)
# Before the "@": atoms parted by single dots. They are looked for from their end, so that a long run of characters
# without "@" costs nothing, and one with it is read once.
_OUTSIDE_LOCAL = re.compile(r"[^A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]")
_START = re.compile(rf"\b{_ATOM}")
_ADDRESS = re.compile(rf"(?:{_NUMBER}\.){{3}}{_NUMBER}")
# Part of every address, and quickly found.
_MIDDLE = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")


class Pii(Formatter):
    """Replaces e-mail addresses, and IPv4 addresses of the public internet, as datatrove 0.10's PIIFormatter does.

    The replacements take turns. Counted: emails, addresses.

    Args:
      emails: replacements of e-mail addresses; () leaves those as they are.
      addresses: replacements of IPv4 addresses; () leaves those as they are.
      counter: "document" begins with the first replacement in each text, so that what becomes of a text depends on
        nothing else; "shard" goes on from text to text, as datatrove does within a task.
    """

    def __init__(
        self,
        *,
        emails: tuple[str, ...] = EMAILS,
        addresses: tuple[str, ...] = ADDRESSES,
        counter: str = "document",
    ):
        super().__init__()
        if counter not in _COUNTERS:
            raise SmoljaxError(f"pii.counter is {counter!r}: there are {', '.join(_COUNTERS)}")
        self._emails, self._addresses, self._counter = emails, addresses, counter
        self._next = {"emails": 0, "addresses": 0}

    def edit(self, text: str) -> str:
        """The text with other addresses."""
        if self._counter == "document":
            self._next = dict.fromkeys(self._next, 0)
        if self._emails and "@" in text:
            text = self._replaced(text, _emails(text), "emails", self._emails)
        if self._addresses and _MIDDLE.search(text):
            text = self._replaced(text, _public_addresses(text), "addresses", self._addresses)
        return text

    def _replaced(
        self, text: str, spans: list[tuple[int, int]], kind: str, replacements: tuple[str, ...]
    ) -> str:
        pieces, done = [], 0
        for start, end in spans:
            pieces += [text[done:start], replacements[self._next[kind] % len(replacements)]]
            self._next[kind] += 1
            done = end
        self.edits[kind] += len(spans)
        return "".join([*pieces, text[done:]])


def _emails(text: str) -> list[tuple[int, int]]:
    """(start, end) of the e-mail addresses, in order."""
    found = []
    done = 0
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at)
        start = _local_part(text, done, at) if domain else None
        if start is not None:
            found.append((start, domain.end()))
        # No later address begins before this "@", nor inside one that was found.
        done = domain.end() if start is not None else at + 1
        at = text.find("@", done)
    return found


def _local_part(text: str, done: int, at: int) -> int | None:
    """Where the atoms that end at `at`, and begin at a word's border behind `done`, begin; None if there are none."""
    first = at
    while first > done and not _OUTSIDE_LOCAL.match(text, first - 1):
        first -= 1
        if (
            text[first] == "." and text[first + 1] in ".@"
        ):  # No atom between two dots, or at the end.
            first += 1
            break
    start = _START.search(text, first, at)
    return start.start() if start else None


def _public_addresses(text: str) -> list[tuple[int, int]]:
    """(start, end) of the IPv4 addresses that are routed on the public internet, in order."""
    return [match.span() for match in _ADDRESS.finditer(text) if _is_public(match[0])]


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # A number with a leading zero.
        return False
