"""The real documents that the curation tests share: how many, how varied, and fetched once by runs that start together."""

import os
import subprocess
import sys

import pytest

from tests.curation import corpora


@pytest.mark.network
def test_texts_are_many_distinct_and_a_prefix_is_mixed():
    english = corpora.texts("en", 5000)
    assert len(set(english)) == 5000
    assert corpora.texts("en", 50) == english[:50]
    for language in corpora.LANGUAGES:
        assert len(set(corpora.texts(language, 500))) == 500
    names = [name for name, _ in corpora.pages("en", 40)]
    assert len({name.split("/")[0] for name in names}) >= 8


@pytest.mark.network
def test_texts_are_in_their_languages():
    # The stop words of each language, among all words of its texts; English in German manuals is the exception.
    commonest = {"en": "the", "fr": "de", "es": "de", "de": "die", "it": "di", "pt": "de"}
    own = {"en": "with", "fr": "vous", "es": "los", "de": "und", "it": "della", "pt": "não"}
    for language in corpora.LANGUAGES:
        words = " ".join(corpora.texts(language, 500)).split()
        assert words.count(commonest[language]) > 0.01 * len(words)
        others = [words.count(word) for code, word in own.items() if code != language]
        assert words.count(own[language]) > 2 * max(others)


@pytest.mark.network
def test_two_processes_fetch_once(tmp_path):
    corpora.pages("web", 1)  # Skips where there is no index.
    program = "from tests.curation import corpora; print(len(corpora.pages('web', 29)))"
    environment = os.environ | {"SMOLJAX_TEST_CORPORA": str(tmp_path / "corpora")}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate() for process in both]
    assert [out for out, _ in results] == ["29\n", "29\n"]
    assert sum("fetching newspaper4k" in err for _, err in results) == 1
