"""What is read of spaCy by another process, beside spaCy in this one."""

import re
import subprocess
import sys

import pytest
import spacy

from smoljax.curation import spacy_tables
from smoljax.errors import SmoljaxError

read = spacy_tables.tables.__wrapped__  # As a process does it that has read nothing.


@pytest.mark.parametrize("language", ["de", "pt"])
def test_tables_are_spacys(tmp_path, monkeypatch, language):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = read(language)
    tokenizer = spacy.blank(language).tokenizer
    for name, search in {
        "prefix": tokenizer.prefix_search,
        "suffix": tokenizer.suffix_search,
        "infix": tokenizer.infix_finditer,
        "url": tokenizer.url_match,
    }.items():
        theirs = search.__self__
        ours = re.compile(found[name])
        assert (ours.pattern, ours.flags) == (theirs.pattern, theirs.flags)
    assert found["whole"] is tokenizer.token_match is None
    cases = {
        case: [token.text for token in tokenizer(case)]
        for case in tokenizer.rules
        if not case.isspace()
    }
    assert found["cases"] == cases
    assert {".", "!", "。"} < set(found["marks"])
    (file,) = (tmp_path / "smoljax").iterdir()
    assert language in file.name
    file.write_text('{"prefix": "kept"}')
    assert read(language) == {"prefix": "kept"}


def test_a_folder_that_cannot_be_written_to_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read("pt")["cases"]["Sr."] == ["Sr."]


def test_a_language_that_spacy_does_not_know_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SmoljaxError, match="language 'qq' could not be read"):
        read("qq")
    assert not list(tmp_path.glob("*/*"))


def test_words_are_cut_without_spacy_in_the_process():
    script = (
        "import sys\nfrom smoljax.curation import sentences, words\n"
        "print(words.words(\"It's here.\", 'en'), sentences.count('One. Two.', 'en'))\n"
        "print(sorted({'spacy', 'thinc', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["['It', \"'s\", 'here', '.'] 2", "[]"]
