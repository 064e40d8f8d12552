"""The report of whole runs: its numbers against the manifest, against closed forms, and against the documents."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smoljax import report_page
from smoljax.curation import CurationConfig, curate, presets, read_documents, report
from smoljax.curation.report import inputs, page, rules
from smoljax.errors import SmoljaxError
from tests.curation import material
from tests.test_report_page import HOSTILE, Parsed

# 201 texts of 50 to 250 characters.
LENGTHS = range(50, 251)
BY_LENGTH = {
    "order": ("extract", "length", "dedup"),
    "length": {"min_characters": 100, "max_characters": 200},
}
# Menus: lines without a full stop, all shorter than 30 characters, and one in three that ends a sentence.
LINES = {
    "order": ("extract", "symbol_lines", "fineweb", "gopher_quality"),
    "fineweb": {"max_duplicate_line_characters": None},
    "gopher_quality": {"min_words": 8},
    "by_language": {},
}


def write_rows(folder: Path, texts: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"Files('rows', '{path}', 'p')"


def run(
    folder: Path, texts: list[str], preset: dict, *, evaluation_sets: dict | None = None, **changes
) -> dict:
    """Curates the texts with one preset in folder/run, and returns the numbers of the report."""
    recipe = material.write_recipe(folder, write_rows(folder / "in", texts))
    values = {"presets": {"p": preset}, "heldout_fraction": 0.1} | changes
    config = CurationConfig(recipe, **values)
    curate(config, folder / "run", evaluation_sets=evaluation_sets, workers=1)
    return written(folder / "run")


def written(workdir: Path) -> dict:
    report.write(workdir)
    return json.loads((workdir / report.NUMBERS).read_text())


def stage(numbers: dict, name: str) -> dict:
    return next(s for s in numbers["presets"]["p"]["stages"] if s["name"] == name)


def rule(numbers: dict, name: str, rule_name: str) -> dict:
    (found,) = [r for r in stage(numbers, name)["rules"] if r["rule"] == rule_name]
    return found


@pytest.fixture(scope="module")
def by_length(tmp_path_factory):
    """201 texts of all LENGTHS, ten of which come twice."""
    texts = ["a" * n for n in LENGTHS] + ["a" * n for n in range(120, 130)]
    return run(tmp_path_factory.mktemp("lengths"), texts, BY_LENGTH)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A run over pages, code and damaged files, with the presets that the package has."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "html").mkdir()
    (folder / "code").mkdir()
    for i in range(12):
        (folder / "html" / f"{i:02d}.html").write_text(material.page(i))
    (folder / "html" / "copy.html").write_text(material.page(3))
    (folder / "html" / "empty.html").touch()
    (folder / "html" / "short.html").write_text("<p>Too short to say much.</p>")
    (folder / "html" / "list.html").write_text(
        "<ul>" + "<li>the and of menu entry</li>" * 40 + "</ul>"
    )
    repeated = "".join(f"<p>{line}</p>" for line in material.prose(50).splitlines()[:3]) * 20
    (folder / "html" / "repeated.html").write_text(f"<main>{repeated}</main>")
    (folder / "code" / "a.py").write_text(
        "def area(width, height):\n    return width * height\n" * 3
    )
    (folder / "code" / "latin.py").write_bytes(b"# caf\xe9\n" * 30)
    recipe = material.write_recipe(
        folder,
        f"Files('web', '{folder}/html/*', 'fast')",
        f"Files('again', '{folder}/html/*', 'document')",
        f"Files('code', '{folder}/code/*', 'code')",
    )
    config = CurationConfig(recipe, shard_bytes=8_000, heldout_fraction=0.2)
    manifest = curate(config, folder / "run", workers=1)
    return folder / "run", manifest, written(folder / "run")


def test_counts_are_those_of_the_manifest(mixed):
    _, manifest, numbers = mixed
    assert numbers["sources"] == manifest["sources"]
    assert [s["name"] for s in numbers["stages"]] == [s["name"] for s in manifest["stages"]]
    for found, expected in zip(numbers["stages"], manifest["stages"]):
        assert found["out"]["documents"] == expected["kept"]
        assert found["removed"] == expected["removed"]
        assert found["in"]["documents"] == expected["kept"] + expected["removed"]
        assert found["removed_by_reason"] == expected["removed_by_reason"]
        if found["in"]["bytes"] is not None:
            assert found["in"]["bytes"] == expected["read_bytes"]
            assert found["out"]["bytes"] == expected["kept_bytes"]


def test_tokens_of_a_whole_sample_are_the_words_of_the_documents(mixed):
    """Where no stage edits texts: tokens are estimated from what was extracted."""
    workdir, _, numbers = mixed
    words = sum(
        len(text.split())
        for part in ("train", "heldout")
        for batch in read_documents(workdir, "again", part=part)
        for text in batch.column("text").to_pylist()
    )
    assert numbers["tokens"] == "words"
    assert numbers["presets"]["document"]["stages"][-1]["out"]["tokens"] == words > 0


def test_each_rule_sees_the_documents_that_reach_its_stage(mixed):
    """The whole corpus is the sample here, so that the sample's counts are exact."""
    _, _, numbers = mixed
    checked = 0
    for preset in numbers["presets"].values():
        assert preset["sample"]["documents"] == preset["extracted"]
        for found in preset["stages"]:
            for one in found["rules"]:
                histogram = one["histogram"]
                assert sum(histogram["documents"]) == one["measured"] <= found["reached"]
                assert one["decides"]["documents"] == one["corpus"]["removed"]
                at = histogram["edges"].index(one["bound"])
                beyond = (
                    histogram["documents"][:at]
                    if one["removes"] == "below"
                    else histogram["documents"][at:]
                )
                assert sum(beyond) == one["beyond"]["documents"]
                checked += 1
    assert checked > 40


def test_shares_and_quantiles_in_closed_form(by_length):
    short, long = rule(by_length, "length", "too_short"), rule(by_length, "length", "too_long")
    # 211 documents: lengths 50 to 99 are too short, 201 to 250 too long, 120 to 129 come twice.
    assert (short["measured"], short["beyond"]["documents"], long["beyond"]["documents"]) == (
        211,
        50,
        50,
    )
    assert short["alone"] == short["beyond"] == short["decides"]
    assert short["beyond"]["share"] == short["beyond"]["low"] == 50 / 211
    assert short["corpus"] == {"reached": 211, "removed": 50}
    # The 106th of 211 values is the median: of the 10 doubled lengths, 120 to 129, all come before it.
    assert short["quantiles"]["0.5"] == 50 + 105 - 10
    # A bound below which at most 10 % lie: 21 documents, of 50 to 70 characters.
    assert {row["share"]: row["bound"] for row in short["bounds"]}[0.1] == 71
    assert {row["share"]: row["bound"] for row in long["bounds"]}[0.1] == 250 - 21
    assert stage(by_length, "dedup")["removed_by_reason"] == {"dedup:exact": 10}
    assert stage(by_length, "length")["in"]["bytes"] == sum(LENGTHS) + sum(range(120, 130))


def test_nearest_documents_are_the_nearest(by_length):
    short, long = rule(by_length, "length", "too_short"), rule(by_length, "length", "too_long")

    def values(one: dict, side: str) -> list[float]:
        return [document["value"] for document in one["nearest"][side]]

    assert (values(short, "kept"), values(short, "removed")) == ([100, 101, 102], [99, 98, 97])
    assert (values(long, "kept"), values(long, "removed")) == ([200, 199, 198], [201, 202, 203])
    assert short["nearest"]["removed"][0]["excerpt"] == "a" * 99


def test_removals_are_drawn_by_reason_with_their_value(by_length):
    drawn = stage(by_length, "length")["drawn"]
    assert sorted(drawn) == ["length:too_long", "length:too_short"]
    for document in drawn["length:too_short"]:
        assert document["value"] == document["characters"] < document["bound"] == 100
    ids = [document["id"] for document in drawn["length:too_short"]]
    assert len(ids) == 5
    assert ids == sorted(ids)
    assert [
        document["value"] for document in stage(by_length, "dedup")["drawn"]["dedup:exact"]
    ] == [None] * 5


def test_rules_are_told_apart_where_several_fail(tmp_path):
    """Of one text each: prose, a menu (fails both rules), and lines of 31 characters (without full stops only)."""
    long = "\n".join(f"line number {i} of no short lines" for i in range(10, 20))
    texts = [material.prose(1), "\n".join(f"the entry {i}" for i in range(40)), long]
    preset = LINES | {"fineweb": LINES["fineweb"] | {"max_newlines_per_word": None}}
    numbers = run(tmp_path, texts, preset)
    terminal, short = (
        rule(numbers, "fineweb", name) for name in ("few_terminal_lines", "short_lines")
    )
    assert [terminal[name]["documents"] for name in ("beyond", "decides", "alone")] == [2, 2, 1]
    assert [short[name]["documents"] for name in ("beyond", "decides", "alone")] == [1, 0, 0]
    assert sum(terminal["histogram"]["passed"]) == 2
    also = [d["also_removed_by"] for d in terminal["nearest"]["removed"]]
    assert sorted(also) == [[], ["short_lines"]]
    assert short["nearest"]["removed"][0]["also_removed_by"] == ["few_terminal_lines"]


def test_statistics_are_of_the_text_that_the_stage_saw(tmp_path):
    """Lines of symbols are gone when words are counted: the share of words with letters is that of the rest."""
    text = "The keeper of the lighthouse and the captain have a plan.\n"
    numbers = run(tmp_path, [text + "*** *** *** ***\n" * 3], LINES)
    # The full stop is a word of its own.
    assert rule(numbers, "gopher_quality", "few_alphabetic_words")["quantiles"]["0.5"] == 11 / 12
    assert rule(numbers, "fineweb", "few_terminal_lines")["quantiles"]["0.5"] == 1.0
    assert stage(numbers, "symbol_lines")["edits"]["documents"] == 1


def test_a_filter_that_edits_is_followed_too(tmp_path):
    """C4 takes a line out; the filter behind it sees the rest, stripped."""
    text = material.prose(1, sentences=6)
    preset = BY_LENGTH | {
        "order": ("extract", "c4", "length"),
        "length": {"min_characters": 0, "max_characters": 9999},
    }
    numbers = run(tmp_path, [text + "Please turn on javascript in the browser.\n"], preset)
    assert rule(numbers, "c4", "few_sentences")["quantiles"]["0.5"] == 6
    assert rule(numbers, "length", "too_short")["quantiles"]["0.5"] == len(text.strip())


@pytest.mark.parametrize(
    "order", [("extract", "length", "dedup"), ("extract", "decontamination", "length")]
)
def test_decontamination_stands_where_it_ran(tmp_path, order):
    """Before "dedup" where the preset does not name it; its hits are in the report."""
    line = material.prose(1).splitlines()[0]
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": line}) + "\n")
    preset = BY_LENGTH | {"order": order, "length": {"min_characters": 0, "max_characters": 9999}}
    preset = {name: preset[name] for name in ("order", *order) if name in preset}
    texts = [material.prose(1), *(f"{n} of no exam" * 9 for n in range(5))]
    numbers = run(tmp_path, texts, preset, evaluation_sets={"exam": f"{tmp_path}/exam.jsonl"})
    names = [s["name"] for s in numbers["presets"]["p"]["stages"]]
    assert (
        names
        == {
            "dedup": ["read", "extract", "length", "decontamination", "dedup"],
            "length": ["read", "extract", "decontamination", "length"],
        }[order[-1]]
    )
    found = stage(numbers, "decontamination")
    assert found["removed_by_reason"] == {"decontamination:exam": 1}
    assert found["drawn"]["decontamination:exam"][0]["excerpt"].startswith(line)
    assert numbers["decontamination"]["sets"]["exam"]["items_hit"] == 1
    assert rule(numbers, "length", "too_short")["measured"] == (6 if order[-1] == "dedup" else 5)
    assert "Decontamination" in "".join(Parsed((tmp_path / "run" / report.PAGE).read_text()).texts)


def test_thresholds_by_language_are_drawn_apart(tmp_path):
    french = (
        "Le gardien du phare et le capitaine du navire ont regardé la tempête pendant toute la nuit. "
        "Au matin, les habitants du village sont venus avec des lampes et du pain. "
    )
    preset = {
        "order": ("extract", "language", "gopher_quality"),
        "language": {"languages": ("en", "fr"), "min_score": 0.3, "min_scores": {"fr": 0.4}},
        "gopher_quality": {"min_words": 20, "min_stop_words": 0},
        "by_language": {"fr": {"gopher_quality": {"min_words": 10}}},
    }
    numbers = run(tmp_path, [material.prose(1), french * 2, french * 3], preset)
    scores = stage(numbers, "language")["rules"]
    assert [(r["languages"], r["bound"], r["measured"]) for r in scores] == [
        (["en"], 0.3, 1),
        (["fr"], 0.4, 2),
    ]
    words = [r for r in stage(numbers, "gopher_quality")["rules"] if r["rule"] == "few_words"]
    assert [(r["languages"], r["bound"]) for r in words] == [(["en"], 20), (["fr"], 10)]
    rest = [r for r in stage(numbers, "gopher_quality")["rules"] if r["rule"] == "long_words"]
    assert [(r["languages"], r["measured"]) for r in rest] == [([], 3)]


def test_checks_decide_as_the_pipeline_did(mixed):
    workdir, manifest, _ = mixed
    removed = 0
    for preset in inputs.read_presets(workdir, str(workdir / "curation"), manifest):
        for found in rules.stages(preset):
            failed: dict[str, set[str]] = {}
            for one in found.rules:
                for measured in one.sample:
                    if measured.fails:
                        failed.setdefault(measured.document.id, set()).add(
                            f"{found.name}:{one.name}"
                        )
            kept = {document.id for document in found.kept}
            for document in found.reached:
                if found.rules and (document.reason or "").partition(":")[2] != "other":
                    assert (document.id in kept) == (document.id not in failed)
                if document.id in failed:
                    assert document.reason in failed[document.id]
                    removed += 1
    assert removed == 4


def test_wilson_interval():
    """10 of 100: 5.52 % to 17.44 %, as the tables of Newcombe (1998) have it."""
    from smoljax.curation.report.numbers import _share

    found = _share(10, 100, exact=False)
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.0552, 0.1744)
    assert _share(10, 100, exact=True)["low"] == 0.1


def test_a_sample_is_the_same_however_the_input_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "DOCUMENTS", 40)
    texts = ["a" * n for n in LENGTHS]
    found = [
        run(tmp_path / str(size), texts, BY_LENGTH, shard_bytes=size) for size in (3000, 1 << 20)
    ]
    assert found[0]["presets"]["p"]["work_items"] > 5
    for numbers in found:
        assert numbers["presets"]["p"]["sample"]["documents"] == 40
        assert rule(numbers, "length", "too_short")["corpus"] == {"reached": 201, "removed": 50}
        assert rule(numbers, "length", "too_short")["beyond"]["low"] < 50 / 201
    assert found[0]["presets"]["p"]["stages"] == found[1]["presets"]["p"]["stages"]


def test_the_same_run_gives_the_same_bytes(mixed, tmp_path):
    workdir, _, _ = mixed
    before = [(workdir / name).read_bytes() for name in (report.PAGE, report.NUMBERS)]
    copy = tmp_path / workdir.name
    shutil.copytree(workdir, copy)
    for name in (report.PAGE, report.NUMBERS):
        (copy / name).unlink()
    report.write(copy)
    assert [(copy / name).read_bytes() for name in (report.PAGE, report.NUMBERS)] == before


def test_the_page_is_a_function_of_the_numbers(mixed):
    workdir, _, numbers = mixed
    assert page.render(numbers, "Curation: run") == (workdir / report.PAGE).read_text()


@pytest.mark.parametrize("place", ["text", "path"])
def test_documents_cannot_speak_html(tmp_path, place):
    hostile = [
        *HOSTILE,
        "'\"><svg onload=alert(1)>",
        "\u202egnp.exe\x07\x1b[2J\x7f",
        "</title>&amp;",
    ]
    if place == "text":
        texts = [text + " and more of this" * 8 for text in hostile] + hostile
        run(tmp_path, texts, BY_LENGTH | {"order": ("extract", "symbol_lines", "length", "dedup")})
    else:
        (tmp_path / "in").mkdir()
        for number, name in enumerate(hostile):
            name = name.replace("/", "∕")
            (tmp_path / "in" / f"{number} {name}.txt").write_text("too short")
            (tmp_path / "in" / f"{number} {name} long.txt").write_text(f"{number}" * 150)
        recipe = material.write_recipe(tmp_path, f"Files('rows', '{tmp_path}/in/*', 'p')")
        curate(CurationConfig(recipe, presets={"p": BY_LENGTH}), tmp_path / "run", workers=1)
        written(tmp_path / "run")
    source = (tmp_path / "run" / report.PAGE).read_text()
    parsed = Parsed(source)
    assert not {"script", "img", "iframe"} & set(parsed.tags)
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert not report_page._UNSAFE.search(source)
    assert "alert(1)" in "".join(parsed.texts)
    links = [value for _, name, value in parsed.attributes if name in ("href", "src")]
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= {v for _, name, v in parsed.attributes if name == "id"}


def test_nothing_is_removed_and_nothing_is_filtered(tmp_path):
    numbers = run(tmp_path, [material.prose(i) for i in range(3)], {"order": ("extract",)})
    assert [s["name"] for s in numbers["stages"]] == ["read", "extract"]
    assert numbers["stages"][-1]["removed"] == 0
    assert Parsed((tmp_path / "run" / report.PAGE).read_text()).tags


def test_a_preset_that_keeps_nothing(tmp_path):
    """All of one source is damaged or too short; what is left to train on comes from another."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.py").write_bytes(b"\xff\xfe\xfa" * 50)
    recipe = material.write_recipe(
        tmp_path,
        f"Files('bad', '{tmp_path}/in/*', 'code')",
        write_rows(tmp_path, [material.prose(1)]),
    )
    chains = {"code": presets.defaults()["code"], "p": {"order": ("extract",)}}
    curate(CurationConfig(recipe, presets=chains), tmp_path / "run", workers=1)
    found = written(tmp_path / "run")["presets"]["code"]["stages"]
    assert [s["name"] for s in found] == ["read", "extract", "length", "code_quality", "dedup"]
    assert found[1]["removed_by_reason"] == {"extract:invalid_utf8": 1}
    assert [s["in"]["tokens"] for s in found[2:]] == [0, 0, 0]


def test_it_is_not_made_again_while_it_is_up_to_date(mixed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(mixed[0], workdir)
    (workdir / report.PAGE).write_text("seen")
    report.write(workdir)
    assert (workdir / report.PAGE).read_text() == "seen"
    manifest = json.loads((workdir / "documents/manifest.json").read_text())
    (workdir / "documents/manifest.json").write_text(
        json.dumps(manifest | {"inputs_hash": "other"})
    )
    report.write(workdir)
    assert (workdir / report.PAGE).read_text() != "seen"


def test_what_is_missing_is_named(mixed, tmp_path):
    with pytest.raises(SmoljaxError, match=r"run smoljax\.curate with --only=documents"):
        report.write(tmp_path)
    workdir = tmp_path / "run"
    shutil.copytree(mixed[0], workdir)
    (workdir / report.PAGE).unlink()
    damaged = workdir / "curation/extract/00000/kept.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(SmoljaxError, match=r"extract/00000/kept\.parquet is damaged"):
        report.write(workdir)
    shutil.rmtree(workdir / "curation/finish/00000")
    with pytest.raises(SmoljaxError, match=r"work item .*finish/00000 is missing"):
        report.write(workdir)


def test_work_items_of_another_run_are_refused(tmp_path):
    run(tmp_path / "a", ["a" * 150], BY_LENGTH)
    run(tmp_path / "b", ["b" * 150, "c" * 160], BY_LENGTH)
    (tmp_path / "a/run" / report.PAGE).unlink()
    with pytest.raises(SmoljaxError, match=r"in the work items .* but not in"):
        report.write(tmp_path / "a/run", directory=str(tmp_path / "b/run/curation"))


def test_the_verb_writes_it(mixed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(mixed[0], workdir)
    before = (workdir / report.PAGE).read_bytes()
    (workdir / report.PAGE).unlink()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "smoljax.curate",
            "--only=report",
            "--config=tests/tiny_config.py",
            f"--workdir={workdir}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"report: {workdir / report.PAGE}\n"
    assert (workdir / report.PAGE).read_bytes() == before
