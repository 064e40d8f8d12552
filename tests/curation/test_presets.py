"""The presets are chains that can run, in the orders and with the thresholds that are published."""

import pytest

from smoljax.curation import chain, presets

PRESETS = presets.defaults()
FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_chain(name):
    chain.check(f"config.curation.presets.{name}", PRESETS[name])
    built = chain.build(PRESETS[name])
    steps = (*built.pages, built.extract, *built.before_dedup, *built.after_dedup)
    assert {step.name for step in steps} == set(PRESETS[name]["order"]) - {"dedup"}
    assert built.dedup is not None


def test_orders():
    # FineWeb: datatrove's examples/fineweb.py; FineWeb2: fineweb-2-pipeline.py; FinePDFs: run_finepdfs_pipeline.py.
    orders = {name: preset["order"] for name, preset in PRESETS.items()}
    assert orders["fineweb"] == ("url", "extract", "language", *FILTERS, "dedup", "pii")
    assert orders["fast"] == ("extract", "language", *FILTERS, "dedup", "pii")
    paper = list(orders["fineweb_paper"])
    assert paper.index("gopher_quality") < paper.index("dedup") < paper.index("c4")
    assert orders["fineweb2"] == (
        *("extract", "language", "dedup", "gopher_repetition", "fineweb", "gopher_quality"),
        *("encoding", "pii", "symbol_lines"),
    )
    assert orders["finepdfs"] == ("extract", "language", "dedup", "pii")


def test_a_bound_on_duplicate_lines_is_where_code_and_paper_differ():
    name = "max_duplicate_line_characters"
    bounds = {p: PRESETS[p].get("fineweb", {}).get(name, 0.01) for p in ("fineweb", "fast")}
    assert bounds == {"fineweb": 0.01, "fast": 0.01}
    assert PRESETS["fineweb_paper"]["fineweb"][name] == PRESETS["fineweb2"]["fineweb"][name] == 0.1


def test_fineweb2_by_language():
    # The sums over configs/*_Latn.yml of FineWeb2: of the n-grams' bounds, and the number of stop words.
    preset = PRESETS["fineweb2"]["by_language"]
    sums = {"fr": 1.198, "es": 1.153, "de": 1.183, "it": 1.221, "pt": 1.539}
    counts = {"fr": 18, "es": 16, "de": 15, "it": 18, "pt": 16}
    for code, arguments in preset.items():
        ngrams = arguments["gopher_repetition"]
        bounds = [b for rule in ("max_top_ngrams", "max_duplicate_ngrams") for _, b in ngrams[rule]]
        assert sum(bounds) == pytest.approx(sums[code])
        assert len(set(arguments["gopher_quality"]["stop_words"])) == counts[code]
