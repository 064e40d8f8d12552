"""Which filters documents of a source pass, by preset. A config starts from here and may change every value.

web       Pages and feeds that nobody chose: the FineWeb chain at the thresholds that its code runs.
document  Documents that somebody chose (manuals, books, PDFs): prose with tables, lists and code in between.
          The same rules where they find broken text, none where they would punish structure.
code      Program text: the rules of Codex and The Stack, no language, no rules about prose.
"""


def defaults() -> dict[str, dict[str, dict]]:
    """preset -> {"order": its stages, stage: arguments}, as plain values for a config (see `chain`).

    Thresholds that are not named here are the filter's own.
    """
    return {
        "web": {
            "order": (
                "extract",
                "language",
                "gopher_repetition",
                "gopher_quality",
                "fineweb",
                "dedup",
            ),
            "language": {"languages": ("en",), "min_score": 0.65},
        },
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
                "max_duplicate_paragraphs": 1.0,
                "max_duplicate_paragraph_characters": 0.30,
                "max_duplicate_lines": 1.0,
                "max_duplicate_line_characters": 0.30,
                "max_duplicate_ngrams": ((5, 0.30), (7, 0.26), (10, 0.20)),
            },
            # Code samples and tables count as words without letters and as long words; "#" begins a comment, and
            # "..." a continued line in a Python session.
            "gopher_quality": {
                "min_words": 30,
                "max_words": 1_000_000,
                "max_mean_word_length": 14.0,
                "max_hash_ratio": 0.2,
                "max_ellipsis_ratio": 0.3,
                "min_alphabetic_words": 0.6,
            },
        },
        "code": {
            "order": ("extract", "length", "code_quality", "dedup"),
            # Empty packages and one-line modules teach nothing.
            "length": {"min_characters": 100, "max_characters": 1_000_000},
        },
    }
