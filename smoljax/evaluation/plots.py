"""Figures of a run, for the report and for notebooks. Needs the extra "report"; never opens a window.

Each function takes plain rows, as smoljax.training.metrics.read_metrics gives them, and returns a matplotlib Figure:
show it in a notebook, save it with `figure.savefig("loss.png")`, or put it into a page with `svg(figure, name)`.
The colours follow Okabe and Ito (2008), with grey and green moved apart for deuteranopia; lines differ in dash
and bars in order as well.
"""

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from smoljax.errors import SmoljaxError, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#24292f", "#6b7280", "#d8dce1"
MODEL, UNIGRAM, GZIP, XZ, REMOVED = "#0072b2", "#a8a8a8", "#e69f00", "#008060", "#d55e00"
# CSS variables that a page sets for light and for dark (see report_page.py).
CSS_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--line",
    MODEL: "--model",
    UNIGRAM: "--unigram",
    GZIP: "--gzip",
    XZ: "--xz",
    REMOVED: "--removed",
}
# Name in evaluation.json, label, colour, dash pattern.
BASELINES = (
    ("unigram", "unigram", UNIGRAM, (0, (1, 1.5))),
    ("gzip", "gzip -9", GZIP, (0, (5, 2))),
    ("xz", "xz -9", XZ, (0, (7, 2, 1.5, 2))),
)
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    # Letters are not meant as formulas: the name of a source may hold a dollar sign.
    "text.parse_math": False,
}


def loss_curve(rows: Sequence[Mapping], *, heldout: str = "all") -> "Figure":
    """Training loss (nats per token) over steps, held-out loss on it, and the learning rate below.

    Args:
      rows: metrics rows.
      heldout: the source whose held-out loss is marked, where the rows hold it.
    """
    steps, losses = _column(rows, "loss")
    with _style():
        figure = _figure(8.4, 4.4)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        top.plot(steps, losses, color=MODEL, alpha=0.28, linewidth=1.1, label="train")
        top.plot(steps, _smooth(losses), color=MODEL, label="train, running mean")
        heldout_steps, heldout_losses = _column(rows, f"heldout/{heldout}/loss", least=0)
        if heldout_steps:
            top.plot(
                heldout_steps,
                heldout_losses,
                color=REMOVED,
                marker="o",
                markersize=4.5,
                linestyle=(0, (4, 2)),
                label="held-out",
            )
        top.set_ylabel("loss, nats per token")
        top.legend(loc="upper right")
        rate_steps, rates = _column(rows, "learning_rate")
        bottom.plot(rate_steps, rates, color=XZ)
        bottom.fill_between(rate_steps, rates, color=XZ, alpha=0.15, linewidth=0)
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("learning rate")
        _steps_axis(bottom)
        figure.align_ylabels()
    return figure


def gradient_norm(rows: Sequence[Mapping]) -> "Figure":
    """Global norm of the gradient before clipping, over steps, on a logarithmic axis."""
    steps, norms = _column(rows, "grad_norm")
    return _over_steps(steps, norms, ylabel="gradient norm", logarithmic=True)


def throughput(rows: Sequence[Mapping]) -> "Figure":
    """Training tokens per second, over steps; without the first row, most of whose time is compilation."""
    steps, rates = _column(rows, "tokens_per_second", least=2)
    return _over_steps(steps[1:], rates[1:], ylabel="tokens per second", logarithmic=False)


def heldout_over_steps(rows: Sequence[Mapping], evaluation: Mapping) -> "Figure":
    """Held-out bits per byte over steps, a panel for each source, with the final value and a line for each baseline.

    During training only a part of each source is scored (config.training.eval_batches): the diamond at the end, and
    the baselines, are those of all held-out text.

    Args:
      rows: metrics rows; all sources with `heldout/<source>/bits_per_byte` are drawn, "all" first.
      evaluation: what evaluation.json holds: {"step", "heldout": {source: {"bits_per_byte", "baselines": ...}}}.
    """
    sources = heldout_sources(rows)
    columns = 3 if len(sources) in (3, 5, 6, 9) else min(4, len(sources))
    lines = -(-len(sources) // columns)
    with _style():
        figure = _figure(8.4, 0.5 + 2.3 * lines)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        axes = list(itertools.chain(*grid))
        for source, ax in zip(sources, axes):
            _heldout_panel(ax, rows, source, evaluation)
        for ax in axes[len(sources) :]:
            ax.set_visible(False)
        for number, ax in enumerate(axes[: len(sources)]):
            below = number + columns < len(sources)
            ax.tick_params(labelbottom=not below)
            ax.set_xlabel("" if below else "step")
        for line in grid:
            line[0].set_ylabel("bits per byte")
        _legend_above(figure, axes[0])
    return figure


def bits_per_byte_bars(heldout: Mapping[str, Mapping]) -> "Figure":
    """Final held-out bits per byte of each source beside its baselines; shorter is better.

    Args:
      heldout: {source: {"bits_per_byte", "baselines": {"unigram", "gzip", "xz"}}}, as in evaluation.json.
    """
    sources = sorted(heldout, key=lambda source: source != "all")
    series = [("model", MODEL, [heldout[source]["bits_per_byte"] for source in sources])]
    for key, label, colour, _ in reversed(BASELINES):
        series.append((label, colour, [heldout[source]["baselines"][key] for source in sources]))
    thick = 0.8 / len(series)
    with _style():
        figure = _figure(8.4, 0.7 + 0.88 * len(sources))
        ax = figure.subplots()
        for number, (label, colour, values) in enumerate(series):
            places = [row + (number - 1.5) * thick for row in range(len(sources))]
            bars = ax.barh(places, values, height=thick * 0.86, color=colour, label=label)
            weight = "bold" if label == "model" else "normal"
            texts = [f"{value:.2f}" for value in values]
            ax.bar_label(bars, texts, padding=4, fontsize=8.5, fontweight=weight)
        ax.set_yticks(range(len(sources)), ["all sources" if s == "all" else s for s in sources])
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.margins(x=0.08)
        ax.set_xlabel("held-out bits per byte (shorter is better)")
        _legend_above(figure, ax)
    return figure


def documents_by_stage(stages: Sequence[Mapping]) -> "Figure":
    """Documents that each curation stage kept and removed.

    Args:
      stages: [{"name", "kept", "removed"}] in the order in which they ran.
    """
    kept = [stage["kept"] for stage in stages]
    removed = [stage["removed"] for stage in stages]
    widest = max((k + r for k, r in zip(kept, removed)), default=0) or 1
    with _style():
        figure = _figure(8.4, 0.9 + 0.46 * len(stages))
        ax = figure.subplots()
        rows = range(len(stages))
        ax.barh(rows, kept, height=0.62, color=MODEL, label="kept")
        ax.barh(rows, removed, left=kept, height=0.62, color=REMOVED, label="removed")
        for row, k, r in zip(rows, kept, removed):
            text = f"{k:,} kept" + (f", {r:,} removed" if r else "")
            ax.text(k + r + widest * 0.012, row, text, va="center", fontsize=8.5)
        ax.set_yticks(rows, [stage["name"] for stage in stages])
        ax.invert_yaxis()
        ax.set_xlim(0, widest * 1.34)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_xlabel("documents")
        _legend_above(figure, ax)
    return figure


def heldout_sources(rows: Sequence[Mapping]) -> list[str]:
    """Sources that the metrics rows have held-out bits per byte of: "all" first, the rest in their order."""
    names = dict.fromkeys(
        name.removeprefix("heldout/").removesuffix("/bits_per_byte")
        for row in rows
        for name in row
        if name.startswith("heldout/") and name.endswith("/bits_per_byte")
    )
    if not names:
        raise SmoljaxError(
            "train/metrics.jsonl has no held-out bits per byte: lower config.training.eval_every and train again"
        )
    return sorted(names, key=lambda name: name != "all")


def svg(figure: "Figure", name: str) -> str:
    """The figure as an <svg> element for a page: theme-aware, the same bytes for the same rows, no outside reference.

    Colours become CSS variables with the figure's own colour as the fallback; text stays text, in the page's font.

    Args:
      figure: what a function of this module returned.
      name: goes before every id, so that several figures share one page.
    """
    matplotlib = require("matplotlib", extra="report")
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    text = re.sub(r"'DejaVu Sans',[^;\"]*", "inherit, sans-serif", text)
    for colour, variable in CSS_VARIABLES.items():
        # Only inside style="...": there CSS variables hold, and no text can be mistaken for a colour.
        text = re.sub(rf"(?<=: ){colour}(?=[;\"])", f"var({variable}, {colour})", text)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)


def _column(rows: Sequence[Mapping], name: str, *, least: int = 1) -> tuple[list, list]:
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    if len(pairs) < least:
        raise SmoljaxError(
            f"train/metrics.jsonl has no row with {name!r}: train for at least two rows "
            "(config.training.log_every steps each)"
        )
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Running mean over a window of `share` of all values, centred on each; at the end only what is before it.

    At the steep start the window is narrow, so that the mean begins with the first value.
    """
    half = max(1, round(len(values) * share / 2))
    means = []
    for place in range(len(values)):
        reach = min(half, place)
        window = values[place - reach : place + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _heldout_panel(ax: "Axes", rows: Sequence[Mapping], source: str, evaluation: Mapping) -> None:
    steps, values = _column(rows, f"heldout/{source}/bits_per_byte")
    ax.plot(steps, values, color=MODEL, marker="o", markersize=3.5, label="model")
    if source in evaluation["heldout"]:
        final = evaluation["heldout"][source]
        for key, label, colour, dash in BASELINES:
            level = final["baselines"][key]
            ax.axhline(level, color=colour, linestyle=dash, linewidth=1.5, label=label)
        ax.plot(
            [evaluation["step"]],
            [final["bits_per_byte"]],
            color=REMOVED,
            marker="D",
            markersize=6,
            linestyle="none",
            label="model, all text",
            zorder=3,
        )
    ax.set_title("all sources" if source == "all" else source)
    _steps_axis(ax, most=4)


def _over_steps(steps: list, values: list, *, ylabel: str, logarithmic: bool) -> "Figure":
    with _style():
        figure = _figure(4.2, 2.5)
        ax = figure.subplots()
        ax.plot(steps, values, color=MODEL, linewidth=1.5)
        if logarithmic:
            ax.set_yscale("log")
            _plain_logarithmic(ax)
        else:
            ax.set_ylim(bottom=0)
            ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set_ylabel(ylabel)
        _steps_axis(ax, most=5)
    return figure


def _plain_logarithmic(ax: "Axes") -> None:
    """Ticks in plain digits, close enough for a gradient norm, which rarely spans more than a decade."""
    ticker = require("matplotlib.ticker", extra="report")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def _steps_axis(ax: "Axes", *, most: int = 9) -> None:
    ticker = require("matplotlib.ticker", extra="report")
    ax.set_xlabel("step")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")


def _legend_above(figure: "Figure", ax: "Axes") -> None:
    lines, labels = ax.get_legend_handles_labels()
    by_label = dict(zip(labels, lines))
    order = sorted(by_label, key=lambda label: not label.startswith("model"))
    figure.legend(
        [by_label[label] for label in order], order, loc="outside upper right", ncols=len(order)
    )


def _figure(width: float, height: float) -> "Figure":
    # Not through pyplot: it would keep every figure alive and look for a display.
    figure = require("matplotlib.figure", extra="report")
    return figure.Figure(figsize=(width, height), layout="constrained", dpi=110)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    matplotlib = require("matplotlib", extra="report")
    with matplotlib.rc_context(_STYLE):
        yield
