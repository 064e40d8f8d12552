"""The characters of a page: UTF-8 if it can be, else what it declares, else a guess from its bytes."""

from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from smoljax.curation.html.bounds import DamagedPage
from smoljax.errors import require


def declared(content: bytes) -> str:
    """As a browser reads a page that it has from a disk; characters that cannot be read become U+FFFD."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = detect_encoding(content, html5_compatible=True, from_html_meta=True) or "utf-8"
        return bytes_to_str(content, encoding)


def guessed(content: bytes) -> str:
    """As datatrove 0.10's WarcReader does it: what the page declares is not looked at.

    Raises:
      DamagedPage: "unknown_encoding", when the bytes are not all of the encoding that cchardet takes them for.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        encoding = require("cchardet", extra="data").detect(content)["encoding"]
    try:
        return content.decode(encoding or "utf-8")
    except (UnicodeDecodeError, LookupError) as error:
        raise DamagedPage("unknown_encoding") from error
