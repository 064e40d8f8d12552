"""Figures: they show the numbers of a real run, to every kind of eye, and fit into a page."""

import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from smoljax import report_page
from smoljax.errors import SmoljaxError
from smoljax.evaluation import plots
from smoljax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def rows(finished_run):
    return read_metrics(finished_run / "train")


@pytest.fixture(scope="module")
def evaluation(finished_run):
    return json.loads((finished_run / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def heldout(evaluation):
    return evaluation["heldout"]


@pytest.fixture(scope="module")
def stages(finished_run):
    return json.loads((finished_run / "documents" / "manifest.json").read_text())["stages"]


def draw(rows, evaluation, stages):
    return {
        "loss": plots.loss_curve(rows),
        "gradient": plots.gradient_norm(rows),
        "throughput": plots.throughput(rows),
        "heldout": plots.heldout_over_steps(rows, evaluation),
        "bars": plots.bits_per_byte_bars(evaluation["heldout"]),
        "stages": plots.documents_by_stage(stages),
    }


@pytest.fixture(scope="module")
def figures(rows, evaluation, stages):
    return draw(rows, evaluation, stages)


def line(ax, label):
    (found,) = [item for item in ax.get_lines() if item.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def test_loss_curve_shows_the_metrics(rows, figures):
    top, bottom = figures["loss"].axes
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    assert line(top, "train") == (steps, [row["loss"] for row in rows if "loss" in row])
    assert line(top, "held-out")[0] == [4, 8, 12]
    rates = list(bottom.get_lines()[0].get_ydata())
    assert rates == [row["learning_rate"] for row in rows if "loss" in row]
    assert top.get_xlim() == bottom.get_xlim()


def test_throughput_leaves_out_the_row_of_the_compilation(rows, figures):
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    assert speeds[0] < min(speeds[1:])  # It would press all others to the top.
    assert list(figures["throughput"].axes[0].get_lines()[0].get_ydata()) == speeds[1:]


def test_each_source_has_a_panel_with_its_own_baselines(heldout, figures):
    panels = {ax.get_title(loc="left"): ax for ax in figures["heldout"].axes if ax.get_visible()}
    assert list(panels) == ["all sources", "reference", "library"]
    for title, ax in panels.items():
        source = "all" if title == "all sources" else title
        assert len(line(ax, "model")[0]) == 3
        assert line(ax, "model, all text") == ([12], [heldout[source]["bits_per_byte"]])
        for key, label in (("unigram", "unigram"), ("gzip", "gzip -9"), ("xz", "xz -9")):
            assert set(line(ax, label)[1]) == {heldout[source]["baselines"][key]}


def test_bars_are_the_evaluation(heldout, figures):
    (ax,) = figures["bars"].axes
    widths = {group.get_label(): [bar.get_width() for bar in group] for group in ax.containers}
    sources = ["all", "reference", "library"]
    assert widths["model"] == [heldout[source]["bits_per_byte"] for source in sources]
    for key, label in (("unigram", "unigram"), ("gzip", "gzip -9"), ("xz", "xz -9")):
        assert widths[label] == [heldout[source]["baselines"][key] for source in sources]


def test_stages_are_the_manifest(stages, figures):
    (ax,) = figures["stages"].axes
    kept, removed = ([bar.get_width() for bar in group] for group in ax.containers)
    assert kept == [stage["kept"] for stage in stages]
    assert removed == [stage["removed"] for stage in stages]
    assert sum(removed) > 0


def test_running_mean():
    assert plots._smooth([1.0, 2.0, 3.0], share=0.05) == [1.0, 2.0, 2.5]
    np.testing.assert_allclose(plots._smooth([7.0] * 50), 7.0)
    values = list(np.random.default_rng(0).normal(size=2000))
    assert np.std(plots._smooth(values)[100:]) == pytest.approx(1 / np.sqrt(101), rel=0.3)


def test_the_same_rows_give_the_same_svg(rows, evaluation, stages):
    first, second = (
        {n: plots.svg(f, n) for n, f in draw(rows, evaluation, stages).items()} for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("name", ["loss", "gradient", "throughput", "heldout", "bars", "stages"])
def test_svg_is_self_contained(figures, name):
    text = plots.svg(figures[name], name)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    targets = re.findall(r'(?:href="|url\()([^")]*)', text)
    assert all(target.startswith(f"#{name}-") for target in targets)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(identifier.startswith(f"{name}-") for identifier in ids)
    assert {target[1:] for target in targets} <= set(ids)
    assert "var(--ink, #24292f)" in text
    assert not re.search(
        r"(fill|stroke): #(?!000000|ffffff)", text
    )  # Every colour follows the theme.


def test_png_opens(figures, tmp_path):
    figures["loss"].savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_rows_say_what_to_change(rows):
    with pytest.raises(SmoljaxError, match=r"no row with 'loss'.*config\.training\.log_every"):
        plots.loss_curve([])
    with pytest.raises(SmoljaxError, match=r"config\.training\.eval_every"):
        plots.heldout_over_steps([row for row in rows if "loss" in row], {"heldout": {}})


def test_without_matplotlib_the_extra_is_named(monkeypatch, rows):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SmoljaxError, match=r'pip install "smoljax\[report\]"'):
        plots.loss_curve(rows)


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def lab(colour: str, matrix) -> np.ndarray:
    """CIE Lab (D65) of an sRGB colour as a deficient eye sees it."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(xyz @ seen / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def closest(colours, matrix) -> float:
    points = [lab(colour, matrix) for colour in colours]
    return min(float(np.linalg.norm(a - b)) for i, a in enumerate(points) for b in points[i + 1 :])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_stay_apart_for_colour_blind_eyes(deficiency):
    matrix = DEFICIENCIES[deficiency]
    names = ("--model", "--unigram", "--gzip", "--xz")
    palettes = [[plots.MODEL, plots.UNIGRAM, plots.GZIP, plots.XZ]]
    style = report_page._STYLE
    for half in (style[: style.index("@media")], style[style.index("@media") :]):
        palettes.append([re.search(rf"{name}: (#\w+)", half)[1] for name in names])
    for palette in palettes:
        assert closest(palette, matrix) > 15
    # Red and green of equal lightness, the usual mistake, are not told apart.
    assert closest(["#b45a3c", "#7a7a3c"], DEFICIENCIES["deuteranopia"]) < 15
