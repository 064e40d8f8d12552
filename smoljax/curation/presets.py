"""Which stages the documents of a source pass, by preset. A config starts from here and may change every value.

fineweb        What FineWeb's code runs on English pages of a crawl (Penedo et al. 2024): the stages in its order, its
               thresholds, near-duplicates within each source, which stands for one crawl. Pages and addresses are
               changed as in datatrove: what becomes of one depends on those before it in the shard. "url" needs
               datatrove's lists.
fineweb_paper  The same where the paper differs from the code: its bound of 0.1 on the characters of duplicate lines
               (section 3.6), no rule about lists, and duplicates before C4's and FineWeb's own filters (section 3.7).
               Each page is extracted on its own.
fineweb2       Five more languages by their own thresholds and stop words (FineWeb2, configs of October 2025), and
               English by FineWeb's: near-duplicates within each language before all filters, no C4, and the last touches
               of wrongly decoded text, addresses and tables. The scores of languages are GlotLID's: give language.model.
finepdfs       Text of PDFs (FinePDFs): languages by its thresholds, which are GlotLID's too, duplicates within each
               language; no rules about prose.
fast           Pages, for speed: the rules of FineWeb behind resiliparse's extraction, with the cheaper hash in MinHash, and
               without the lists of addresses.
document       Documents that somebody chose (manuals, books, PDFs): prose with tables, lists and code in between.
               The same rules where they find broken text, none where they would punish structure.
code           Program text: the rules of Codex and The Stack, no language, no rules about prose.
"""

_TEXT_FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")

# FineWeb2's thresholds that differ by language: the fraction of duplicate lines, of the top 2- to 4-grams and of
# the duplicate 5- to 10-grams, of lines that end a sentence, newlines per word, mean length of words, fraction of words
# with a letter, and the stop words.
_FINEWEB2 = {
    "fr": (
        0.264,
        (0.161, 0.149, 0.134),
        (0.15, 0.141, 0.131, 0.121, 0.111, 0.1),
        0.1,
        0.185,
        (2, 11),
        0.812,
        "de la le et à en l' des du les est d' un une il dans par au",
    ),
    "es": (
        0.252,
        (0.156, 0.14, 0.125),
        (0.145, 0.136, 0.127, 0.117, 0.108, 0.099),
        0.182,
        0.138,
        (3, 14),
        0.825,
        "de la en el y a que del los se por un con una las su",
    ),
    "de": (
        0.263,
        (0.169, 0.153, 0.137),
        (0.141, 0.134, 0.126, 0.117, 0.108, 0.098),
        0.0,
        0.152,
        (0, 15),
        0.774,
        "der und die in von im den des mit das er dem als wurde für",
    ),
    "it": (
        0.246,
        (0.198, 0.156, 0.133),
        (0.144, 0.136, 0.127, 0.118, 0.109, 0.1),
        0.025,
        0.2,
        (3, 21),
        0.807,
        "di e il la in a del che è della un per nel l' con da i una",
    ),
    "pt": (
        0.287,
        (0.371, 0.191, 0.163),
        (0.163, 0.153, 0.141, 0.13, 0.119, 0.108),
        0.077,
        0.186,
        (3, 13),
        0.814,
        "de a e o em do da que um no uma com para na é foi",
    ),
}


def defaults() -> dict[str, dict[str, dict]]:
    """preset -> {"order": its stages, stage: arguments}, as plain values for a config (see `chain`).

    Thresholds that are not named here are the filter's own.
    """
    return _english_pages() | _six_languages() | _chosen()


def _english_pages() -> dict[str, dict]:
    """Pages of a crawl, as FineWeb filters them."""
    return {
        "fineweb": {
            "order": ("url", "extract", "language", *_TEXT_FILTERS, "dedup", "pii"),
            "extract": {"html": "fineweb"},
            "language": {"languages": ("en",), "min_score": 0.65},
            "c4": {"terminal_lines": False},
            "dedup": {"exact": False, "minhash": "fineweb", "scope": "source"},
            "pii": {"counter": "shard"},
        },
        "fineweb_paper": {
            "order": (
                "url",
                "extract",
                "language",
                "gopher_repetition",
                "gopher_quality",
                "dedup",
                "c4",
                "fineweb",
                "pii",
            ),
            "extract": {"html": "trafilatura"},
            "language": {"languages": ("en",), "min_score": 0.65},
            "c4": {"terminal_lines": False},
            "fineweb": {"max_duplicate_line_characters": 0.1, "max_newlines_per_word": None},
            "dedup": {"exact": False, "minhash": "fineweb", "scope": "source"},
            "pii": {"counter": "shard"},
        },
        "fast": {
            "order": ("extract", "language", *_TEXT_FILTERS, "dedup", "pii"),
            "language": {"languages": ("en",), "min_score": 0.65},
            "c4": {"terminal_lines": False},
            "dedup": {"minhash": "fineweb2"},
        },
    }


def _six_languages() -> dict[str, dict]:
    """Pages as FineWeb2 filters them, and PDFs as FinePDFs does."""
    return {
        "fineweb2": {
            "order": (
                "extract",
                "language",
                "dedup",
                "gopher_repetition",
                "fineweb",
                "gopher_quality",
                "encoding",
                "pii",
                "symbol_lines",
            ),
            "extract": {"html": "trafilatura"},
            "language": {
                "languages": ("en", *_FINEWEB2),
                "min_scores": {
                    "en": 0.65,
                    "fr": 0.824,
                    "es": 0.84,
                    "de": 0.821,
                    "it": 0.817,
                    "pt": 0.799,
                },
            },
            "dedup": {"exact": False, "minhash": "fineweb2", "by_language": True},
            "gopher_repetition": {
                "max_duplicate_paragraphs": None,
                "max_duplicate_paragraph_characters": None,
                "max_duplicate_line_characters": None,
            },
            "fineweb": {"max_short_lines": None, "max_duplicate_line_characters": 0.1},
            "by_language": {code: _fineweb2(values) for code, values in _FINEWEB2.items()},
            "pii": {"counter": "shard"},
            "symbol_lines": {"symbols": ("|",), "replacement": "\n"},
        },
        "finepdfs": {
            "order": ("extract", "language", "dedup", "pii"),
            "language": {
                "languages": ("en", *_FINEWEB2),
                "min_scores": {
                    "en": 0.395,
                    "fr": 0.265,
                    "es": 0.243,
                    "de": 0.405,
                    "it": 0.399,
                    "pt": 0.972,
                },
            },
            "dedup": {"ignore_whitespace": True, "minhash": "finepdfs", "by_language": True},
        },
    }


def _chosen() -> dict[str, dict]:
    """Manuals, books and program text that somebody chose."""
    return {
        "document": {
            "order": (
                "extract",
                "length",
                "language",
                "gopher_repetition",
                "gopher_quality",
                "dedup",
            ),
            # A page with 200 characters says little; a whole manual in one file is welcome.
            "length": {"min_characters": 200, "max_characters": 5_000_000},
            # Markup, tables and names lower the score of an English manual: 0.65 would remove change logs.
            "language": {"languages": ("en",), "min_score": 0.30},
            # Manuals repeat headings, directives and closing brackets, so counts of lines and paragraphs say
            # nothing; a text of which a third of the characters is repeated is a table or a broken page.
            "gopher_repetition": {
                "max_duplicate_paragraphs": None,
                "max_duplicate_paragraph_characters": 0.30,
                "max_duplicate_lines": None,
                "max_duplicate_line_characters": 0.30,
                # Each mark of a row of "=" below a heading, or of a table, is a word: Gopher's bound on pairs of words
                # would remove 293 of the quickstart's 1,021 manuals.
                "max_top_ngrams": (),
                "max_duplicate_ngrams": ((5, 0.30), (7, 0.26), (10, 0.20)),
            },
            # Code samples and tables are half punctuation, each mark a word without letters, and long words; "#"
            # begins a comment, and "..." a continued line in a Python session.
            "gopher_quality": {
                "min_words": 30,
                "max_words": 1_000_000,
                "max_mean_word_length": 14.0,
                "max_hash_ratio": 0.2,
                "max_ellipsis_ratio": 0.3,
                "min_alphabetic_words": 0.3,
            },
        },
        "code": {
            "order": ("extract", "length", "code_quality", "dedup"),
            # Empty packages and one-line modules teach nothing.
            "length": {"min_characters": 100, "max_characters": 1_000_000},
        },
    }


def _fineweb2(values: tuple) -> dict[str, dict]:
    """Stage -> arguments of one language, from its row of the table."""
    lines, top, repeated, terminal, newlines, (shortest, longest), alphabetic, stop_words = values
    return {
        "gopher_repetition": {
            "max_duplicate_lines": lines,
            "max_top_ngrams": tuple(zip((2, 3, 4), top, strict=True)),
            "max_duplicate_ngrams": tuple(zip(range(5, 11), repeated, strict=True)),
        },
        "fineweb": {"min_terminal_lines": terminal, "max_newlines_per_word": newlines},
        "gopher_quality": {
            "min_mean_word_length": shortest,
            "max_mean_word_length": longest,
            "min_alphabetic_words": alphabetic,
            "stop_words": tuple(stop_words.split()),
        },
    }
