"""Decisions, reasons and texts of the text filters, and the words they count, are datatrove's on 5,000 English documents.

About 75 s of one core, nearly all of it for datatrove.
"""

import pytest

from tests.curation import corpora
from tests.curation.filters import oracle

# Documents are cut behind so many characters: twice as many take twice as long.
SIZE = 2000


@pytest.mark.network
@pytest.mark.parametrize("part", range(5))
def test_a_thousand_documents(part):
    texts = corpora.texts("en", 5000)[part * 1000 : part * 1000 + 1000]
    reasons = oracle.assert_same([text[:SIZE] for text in texts], "en", oracle.FINEWEB)
    # The documents are told apart by many rules, or the comparison would say little.
    assert len(reasons) >= 15
