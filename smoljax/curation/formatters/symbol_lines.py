"""Lines of nothing but symbols are taken out: what tables leave behind when their text is extracted."""

from smoljax.curation.formatters.formatter import Formatter
from smoljax.curation.punctuation import SYMBOLS


class SymbolLines(Formatter):
    """Takes out lines of symbols and spaces, as datatrove 0.10's SymbolLinesFormatter does. Counted: lines.

    Blank lines stay. All line ends become "\\n", and one at the end of the text is dropped.

    Args:
      symbols: characters that make a line one of symbols; () means all punctuation.
      replacement: a line that stands for each run of such lines; "" puts none.
    """

    def __init__(self, *, symbols: tuple[str, ...] = (), replacement: str = ""):
        super().__init__()
        self._characters = (frozenset(symbols) or SYMBOLS) | {" "}
        self._replacement = replacement

    def edit(self, text: str) -> str:
        """The text without such lines."""
        lines: list[str] = []
        inside, found = False, 0
        for line in text.splitlines():
            symbols = self._characters.issuperset(line) and bool(line.strip())
            if not symbols:
                lines.append(line)
            else:
                found += 1
                if not inside and self._replacement:
                    lines.append(self._replacement)
            inside = symbols
        if found:
            self.edits["lines"] += found
        return "\n".join(lines)
