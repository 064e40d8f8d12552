"""Text that was decoded in the wrong encoding is mended, by ftfy."""

import re

from smoljax.curation.formatters.formatter import Formatter

# What is broken is mended, and what is merely unusual stays: ligatures, full-width letters, curly quotes.
_MENDED = {
    "fix_latin_ligatures": False,
    "fix_character_width": False,
    "uncurl_quotes": False,
    "fix_line_breaks": False,
    "normalization": None,
    "explain": False,
}
# Characters that ftfy removes or replaces wherever they stand.
_UNWANTED = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc\ud800-\udfff]"
)


class Encoding(Formatter):
    """Mends wrongly decoded text, HTML entities and control characters, as datatrove 0.10's FTFYFormatter does.

    ftfy looks at each line for itself, and most lines have nothing that it could mend: those are not given to it.
    Entities are decoded up to the first line with a "<", behind which the text may be markup. Counted: lines.
    """

    def edit(self, text: str) -> str:
        """The text, mended."""
        if text.isascii() and "&" not in text and not _UNWANTED.search(text):
            return text
        import ftfy  # Here, for other chains do without its 3 MB.

        config = ftfy.TextFixerConfig(**_MENDED)
        lines = []
        for line in _segments(text, config.max_decode_length):
            if "<" in line:
                config = config._replace(unescape_html=False)
            if _needs(line):
                mended = ftfy.fix_text_segment(line, config)
                self.edits["lines"] += mended != line
                line = mended
            lines.append(line)
        return "".join(lines)


def _needs(line: str) -> bool:
    """Whether ftfy could change the line."""
    from ftfy.badness import is_bad

    return bool("&" in line or _UNWANTED.search(line) or (not line.isascii() and is_bad(line)))


def _segments(text: str, size: int) -> list[str]:
    """What ftfy looks at, one after the other: lines, cut where they are longer than `size`."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    return [line[at : at + size] for line in lines for at in range(0, len(line), size)]
