"""Formatters: the text that datatrove's formatters make, on documents with planted faults and on strings of their parts."""

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove", reason="the oracle of the tests is not installed")

from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter, SymbolLinesFormatter

from smoljax.curation import chain, schema
from smoljax.curation.formatters import Encoding, Pii, SymbolLines
from smoljax.errors import SmoljaxError
from tests.curation import material

EMAILS = ("jo.doe+news@mail.example.co.uk", "o'neil@x-1.fr", "a@[192.168.0.1]", "!#$%&'*@a.b")
ADDRESSES = ("8.8.8.8", "10.0.0.1", "127.0.0.1", "172.217.16.142", "1.02.3.4", "999.1.2.3.4")
BROKEN = (
    "voilÃ  le cafÃ©",
    "â€œquotedâ€\x9d",
    "l&eacute;ger &amp; doux",
    "a\ufeff b\x07",
    "sÃ³ < &amp;",
)


def documents() -> list[str]:
    """Prose with addresses, mojibake, and the debris of tables in every third line."""
    found = []
    for number in range(40):
        lines = material.prose(number).splitlines()
        for place in range(0, len(lines), 3):
            pick = number + place
            lines[place] += (
                f" Write to {EMAILS[pick % 4]}, ({ADDRESSES[pick % 6]}); {BROKEN[pick % 5]}."
            )
            lines.insert(place, ("| | |", "|||", " ", "", "a | b")[pick % 5])
        found.append("\n".join(lines))
    return found


# Strings of what the rules are about, next to each other in every order.
PARTS = (*"@.-'{éaB9[]:_|—œ", "..", "25", "&lt;", "<b>", "\x1b[0m", "日本")
SPACES = (" ", "\n", "\r\n", "\x0b", "\u2028", "\x85", "Ã ", "\nÂ ")
pieces = st.sampled_from([*EMAILS, *ADDRESSES, *BROKEN, *PARTS, *SPACES])
strings = st.lists(pieces, max_size=30).map("".join) | st.text(max_size=60)


@settings(max_examples=400, deadline=None)
@given(strings)
@example("a@b.c@d.e f@g.h")
@example(".a..b.c@d.ef.")
@example("x-y-@a.b é-a@b.c")
@example("1.2.3.4.5.6.7.8 256.1.1.1.1")
def test_pii_is_datatroves_in_a_single_text(text):
    assert Pii().edit(text) == PIIFormatter().format(text)


@pytest.mark.parametrize("counter", ["document", "shard"])
def test_pii_in_document_order(counter):
    """With the counter of the shard, datatrove's formatter object; with that of the document, a new one for each."""
    formatter, peer = Pii(counter=counter), PIIFormatter()
    texts = documents()
    for text in texts:
        peer = PIIFormatter() if counter == "document" else peer
        assert formatter.edit(text) == peer.format(text)
    if counter == "shard":
        fresh = [PIIFormatter().format(text) for text in texts]
        assert [Pii(counter="shard").edit(text) for text in texts] == fresh
        again = Pii(counter="shard")
        assert [again.edit(text) for text in texts] != fresh


def test_pii_counts_what_it_replaced():
    formatter = Pii()
    assert formatter.edit("a@b.c, d@e.f, g@h.i; 8.8.8.8 and 10.0.0.1") == (
        "email@example.com, firstname.lastname@example.org, email@example.com; 22.214.171.124 and 10.0.0.1"
    )
    assert formatter.edits == {"emails": 3, "addresses": 1}
    assert Pii(emails=(), addresses=("0.0.0.0",)).edit("a@b.c 8.8.8.8") == "a@b.c 0.0.0.0"
    with pytest.raises(SmoljaxError, match=r"pii\.counter is 'page'"):
        Pii(counter="page")


def test_pii_reads_a_long_run_of_characters_once():
    """datatrove's expression tries every beginning in a run: this one would take it minutes."""
    run = "a-" * 100_000
    assert Pii().edit(f"{run}a@ {run}a@b.c") == f"{run}a@ email@example.com"


@settings(max_examples=400, deadline=None)
@given(strings)
@example("é\nÃ \nb")
@example("&amp;é\n<b>\n&amp;é")
def test_encoding_is_datatroves(text):
    assert Encoding().edit(text) == FTFYFormatter().format(text)


def test_encoding_of_documents_and_of_very_long_lines():
    peer = FTFYFormatter()
    for text in [*documents(), "Ã " * 500_001, "x" * 999_999 + "Ã©" + "Ã©"]:
        assert Encoding().edit(text) == peer.format(text)
    formatter = Encoding()
    assert formatter.edit("plain\nvoilÃ  le cafÃ©\n") == "plain\nvoilà le café\n"
    assert formatter.edits == {"lines": 1}


@settings(max_examples=300, deadline=None)
@given(strings, st.sampled_from([(), ("|",), ("|", "—", "a")]), st.sampled_from(["", "\n", "~"]))
def test_symbol_lines_are_datatroves(text, symbols, replacement):
    peer = SymbolLinesFormatter(list(symbols) or None, replacement)
    assert SymbolLines(symbols=symbols, replacement=replacement).edit(text) == peer.format(text)


def test_a_chain_of_formatters_keeps_the_documents_and_counts():
    """What FineWeb2's last step does, in its order."""
    preset = {
        "order": ("extract", "encoding", "pii", "symbol_lines"),
        "symbol_lines": {"symbols": ("|",), "replacement": "\n"},
    }
    chain.check("presets.p", preset)
    texts = documents()
    rows = [
        {"id": str(i), "source": "s", "path": "p", "media_type": "text/plain", "text": text}
        for i, text in enumerate(texts)
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=schema.DOCUMENT)
    steps = chain.build(preset).before_dedup
    for step in steps:
        batch, removed = step.run(batch)
        assert removed.num_rows == 0
    peers = [
        FTFYFormatter(),
        None,
        SymbolLinesFormatter(symbols_to_remove=["|"], replace_char="\n"),
    ]
    for row, text in zip(batch.to_pylist(), texts):
        for peer in peers:
            text = (peer or PIIFormatter()).format(text)
        assert row["text"] == text
    assert batch.column("id").to_pylist() == [str(i) for i in range(len(texts))]
    assert [step.edits["documents"] for step in steps] == [40, 40, 40]
    with pytest.raises(SmoljaxError, match=r"presets\.p\.symbol_lines has"):
        chain.check("presets.p", preset | {"symbol_lines": {"signs": ("|",)}})
    with pytest.raises(SmoljaxError, match=r"by_language\.fr\.pii: .pii. takes the same"):
        chain.check("presets.p", preset | {"by_language": {"fr": {"pii": {"emails": ()}}}})
