"""The report of a small real run: complete, self-contained, escaped, the same each time."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from smoljax.errors import SmoljaxError
from smoljax.evaluation.report import write_report

ACTIVE = {"script", "img", "iframe", "link", "object", "embed", "form", "base", "image"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.source, self.tags, self.attributes, self.texts = source, [], [], []
        self.feed(source)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(finished_run, steps):
    return Page(write_report(finished_run, steps=steps).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def heldout(finished_run):
    return json.loads((finished_run / "evaluation.json").read_text())["heldout"]


def test_headline_compares_with_the_stronger_compressor(page, heldout):
    ours, xz = heldout["all"]["bits_per_byte"], heldout["all"]["baselines"]["xz"]
    assert xz < heldout["all"]["baselines"]["gzip"]
    # After a dozen steps a model is worse than xz, and the report has to say so.
    assert (
        f"{ours:.3f} bits per byte of held-out text: {ours / xz - 1:.0%} more than xz -9"
        in page.text
    )


def test_a_better_model_needs_fewer(finished_run, steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("checkpoints", "curation"))
    evaluation = json.loads((copy / "evaluation.json").read_text())
    row = evaluation["heldout"]["all"]
    row["bits_per_byte"] = 0.75 * min(row["baselines"]["gzip"], row["baselines"]["xz"])
    (copy / "evaluation.json").write_text(json.dumps(evaluation))
    text = Page(write_report(copy, steps=steps).read_text(encoding="utf-8")).text
    assert "25% fewer than xz -9 needs" in text


def test_every_section_is_there_and_can_be_reached(page):
    targets = [value[1:] for name, value in page.attributes if name == "href" and value]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(targets) <= set(ids)
    assert page.source.count("<h2") == 7
    assert page.tags.count("svg") == 6


def test_numbers_are_those_of_the_files(page, heldout, finished_run):
    for row in heldout.values():
        assert f"{row['bits_per_byte']:.3f}" in page.text
        for value in row["baselines"].values():
            assert f"{value:.3f}" in page.text
    manifest = json.loads((finished_run / "documents" / "manifest.json").read_text())
    for stage in manifest["stages"]:
        assert f"{stage['name']} {stage['kept']:,} {stage['removed']:,}" in page.text
    for sample in json.loads((finished_run / "samples.json").read_text())["samples"]:
        assert " ".join((sample["prompt"] + " " + sample["text"]).split())[:40] in page.text


def test_commands_and_times_are_shown(page, steps):
    for step in steps:
        assert step["command"] in page.text
    assert "train took 1m12s" in page.text
    assert "jaxlib" in page.text
    assert '"learning_rate": 0.003' in page.text


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(page):
    assert not ACTIVE & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for name, value in page.attributes:
        if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
            assert value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page.source))
    assert "@import" not in page.source
    assert "default-src 'none'" in page.source


def test_untrusted_text_stays_text(page):
    # A removed document, its file name, a prompt and a command were made to break out.
    for text in (
        "<script>alert('removed')</script> </pre></body>",
        "<img src=x onerror=alert(1)>.txt",
        "The <b>",
        "a <b>",
    ):
        assert text in page.text
        assert text not in page.source


def test_the_same_run_gives_the_same_bytes(finished_run, steps, page):
    assert write_report(finished_run, steps=steps).read_text(encoding="utf-8") == page.source


def test_a_failure_leaves_the_older_report(finished_run, steps, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("checkpoints", "curation"))
    before = write_report(copy, steps=steps).read_bytes()
    (copy / "samples.json").unlink()
    with pytest.raises(SmoljaxError, match=r"samples\.json"):
        write_report(copy, steps=steps)
    assert (copy / "report.html").read_bytes() == before
