"""The report's sections, top to bottom: each takes what the run left behind and returns one part of the page."""

import json
import statistics
from collections.abc import Sequence
from importlib import metadata
from platform import platform, python_version

from smoljax import configuration
from smoljax import report_page as html
from smoljax.evaluation import plots
from smoljax.evaluation.report_inputs import Document, Inputs
from smoljax.progress import duration
from smoljax.report_page import Html
from smoljax.tokens.tokenizer import Tokenizer

EXAMPLES_PER_REASON = 3
EXAMPLE_CHARACTERS = 700
PACKAGES = (
    "smoljax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array-record",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "pyarrow",
    "trafilatura",
    "resiliparse",
    "pypdfium2",
)


def headline(inputs: Inputs, steps: Sequence[dict]) -> Html:
    """The one result, beside gzip and xz, and the size of the run."""
    result = inputs.evaluation["heldout"]["all"]
    ours, baselines = result["bits_per_byte"], result["baselines"]
    strongest = min(("gzip", "xz"), key=lambda name: baselines[name])
    difference = 1 - ours / baselines[strongest]
    word = "fewer" if difference >= 0 else "more"
    left = html.tag(
        "div",
        html.tag("div", f"{ours:.3f}", css="figure"),
        html.paragraph(
            "bits per byte of held-out text: ",
            html.tag("b", f"{abs(difference):.0%} {word}"),
            f" than {strongest} -9 needs.",
        ),
    )
    chart = html.bars(
        [
            ("model", ours, "--model"),
            ("xz -9", baselines["xz"], "--xz"),
            ("gzip -9", baselines["gzip"], "--gzip"),
            ("unigram", baselines["unigram"], "--unigram"),
        ]
    )
    return html.join([html.tag("div", left, chart, css="headline"), _run_cards(inputs, steps)])


def documents(inputs: Inputs) -> Html:
    """What went in, what was removed and why, with examples of both."""
    manifest = inputs.documents
    stages = manifest["stages"]
    sources = [
        (
            name,
            row["train"]["documents"],
            row["train"]["bytes"] / 1e6,
            row["heldout"]["documents"],
            row["heldout"]["bytes"] / 1e6,
            row["removed"],
        )
        for name, row in manifest["sources"].items()
    ]
    return html.section(
        "documents",
        "What went in",
        html.paragraph(
            "Documents that passed every stage, split into training and held-out text by the hash of their content."
        ),
        html.table(
            ("source", "train", "train MB", "held-out", "held-out MB", "removed"),
            [_total(sources), *sources],
            total=True,
        ),
        html.tag("h3", "Kept and removed by stage"),
        html.figure(
            plots.svg(plots.documents_by_stage(stages), "stages"),
            "A stage sees the documents of those sources whose preset names it, so program text is not asked for its "
            "language and a stage may see fewer documents than the one before it kept.",
        ),
        html.table(("stage", "kept", "removed", "why"), [_stage_row(s) for s in stages]),
        html.tag("h3", "Removed documents"),
        html.paragraph(
            "Every removed document is kept with its reason. These were drawn by the hash of their id, not picked."
        ),
        *_removed_by_stage(inputs),
        html.tag("h3", "Kept documents, by source"),
        *(
            html.folded(source, f"{len(examples)} shown", *map(_example, examples))
            for source, examples in inputs.kept_examples(2).items()
            if examples
        ),
    )


def tokenizer(inputs: Inputs) -> Html:
    """Vocabulary, how much text a token holds, a text cut into tokens, and what the shards hold."""
    loaded = inputs.tokenizer
    rows = [_shard_row(source, manifest) for source, manifest in inputs.shards.items()]
    train_tokens, heldout_tokens = (sum(row[column] for row in rows) for column in (1, 2))
    text_bytes, text_tokens = (sum(row[column] for row in rows) for column in (3, 4))
    facts = [
        (f"{loaded.vocab_size:,}", "tokens in the vocabulary"),
        (f"{text_bytes / text_tokens:.2f}", "bytes of text per token"),
        (_millions(train_tokens), "tokens to train on"),
        (_millions(heldout_tokens), "tokens held out"),
    ]
    parts = [html.cards(facts)]
    if loaded.lossy:
        parts.append(html.paragraph(html.tag("b", "Not exact: "), loaded.lossy))
    example = inputs.heldout_example()
    if example is not None:
        pieces = _pieces(loaded, example.text[:420])
        parts += [
            html.paragraph(
                f"The beginning of a held-out document, cut into {len(pieces)} pieces ",
                f"(tokenizer: {inputs.tokenizer_kind}). ",
                f"It is {example.path} of {example.source}.",
                css="origin",
            ),
            html.preformatted(*(html.tag("span", piece, css="token") for piece in pieces)),
        ]
    table = html.table(
        ("source", "train tokens", "held-out tokens", "bytes per token"),
        [(source, train, held, size / count) for source, train, held, size, count in rows],
    )
    return html.section("tokenizer", "Tokenizer and shards", *parts, table)


def training(inputs: Inputs) -> Html:
    """Loss, learning rate, gradient norm and throughput."""
    rows = inputs.metrics
    speeds = [row["mfu"] for row in rows if "mfu" in row]
    tokens = [row["tokens"] for row in rows if "tokens" in row][-1]
    data = inputs.config["data"]
    return html.section(
        "training",
        "Training",
        html.paragraph(
            f"{inputs.evaluation['step']:,} steps of {data['batch_size']} sequences of {data['seq_len']} tokens: "
            f"{tokens:,} tokens, with the optimizer {inputs.config['optimizer'].get('name', 'of the config')}."
        ),
        html.figure(
            plots.svg(plots.loss_curve(rows), "loss"),
            "Training loss of each logged step and its running mean; held-out loss over all sources, on the part "
            "that is scored during training. Below, the learning rate.",
        ),
        html.tag(
            "div",
            html.figure(
                plots.svg(plots.gradient_norm(rows), "gradient"),
                "Global norm of the gradient, before clipping.",
            ),
            html.figure(
                plots.svg(plots.throughput(rows), "throughput"),
                "Speed of training, without the time of compilation and evaluation"
                + (
                    f"; model FLOPs utilisation {statistics.median(speeds):.0%} (median)."
                    if speeds
                    else "."
                ),
            ),
            css="pair",
        ),
    )


def heldout(inputs: Inputs) -> Html:
    """Bits per byte of each source beside the baselines, at the end and over steps."""
    results = inputs.evaluation["heldout"]
    names = sorted(results, key=lambda name: name != "all")
    rows = [
        (
            "all sources" if name == "all" else name,
            results[name]["bits_per_byte"],
            results[name]["baselines"]["xz"],
            results[name]["baselines"]["gzip"],
            results[name]["baselines"]["unigram"],
            results[name]["loss"],
            results[name]["documents"],
            results[name]["bytes"],
        )
        for name in names
    ]
    columns = (
        "source",
        "model",
        "xz -9",
        "gzip -9",
        "unigram",
        "nats per token",
        "documents",
        "bytes",
    )
    return html.section(
        "heldout",
        "Held-out text",
        html.paragraph(
            "Bits per byte: how many bits the model needs, on average, to say what the next byte of unseen text is. "
            "Lower is better, and it compares models with different tokenizers. gzip -9 and xz -9 compress the same "
            "text; the unigram model knows how often each token occurs in the training text and nothing else. The "
            "model's own size is not counted: this measures prediction, not an archive."
        ),
        html.table(columns, rows, total=True),
        html.figure(plots.svg(plots.bits_per_byte_bars(results), "bars")),
        html.figure(
            plots.svg(plots.heldout_over_steps(inputs.metrics, inputs.evaluation), "heldout"),
            "During training the model is scored on the beginning of each source only. The diamond and the baselines "
            "are of all held-out text.",
        ),
    )


def samples(inputs: Inputs) -> Html:
    """Prompts, and how the model goes on."""
    rows = inputs.samples["samples"]
    parts = [
        html.preformatted(
            html.tag("span", row["prompt"], css="prompt"), html.cut(row["text"], 2000)
        )
        for row in rows
    ]
    temperatures = sorted({row["temperature"] for row in rows})
    note = ", ".join(f"{value:g}" for value in temperatures)
    return html.section(
        "samples",
        "Samples",
        html.paragraph(
            f"The model of step {inputs.samples['step']:,} continues each coloured prompt (temperature {note})."
        ),
        *parts,
    )


def model(inputs: Inputs) -> Html:
    """Parameters and shape."""
    from smoljax.model import ModelConfig

    config = configuration.build(ModelConfig, inputs.config["model"], "model")
    seq_len = inputs.config["data"]["seq_len"]
    facts = [
        (f"{config.num_params:,}", "parameters"),
        (f"{config.num_params_without_embedding:,}", "without embedding"),
        (
            f"{config.flops_per_token(seq_len, attention='causal') / 1e6:,.1f} M",
            f"training FLOPs per token at length {seq_len}",
        ),
    ]
    head = "tied to the embedding" if config.tie_embeddings else "its own matrix"
    interval = config.no_rope_layer_interval
    shape = [
        ("layers", f"{config.num_layers}"),
        ("width", f"{config.hidden_size}"),
        ("feed-forward (SwiGLU)", f"{config.intermediate_size}"),
        (
            "attention",
            f"{config.num_heads} query heads on {config.num_kv_heads} key-value heads of width {config.head_dim}",
        ),
        (
            "positions",
            f"RoPE with theta {config.rope_theta:,.0f}"
            + (f", none in every {interval}th layer" if interval else ""),
        ),
        ("vocabulary", f"{config.vocab_size:,}; the output head is {head}"),
        ("compute", config.compute_dtype),
    ]
    return html.section("model", "Model", html.cards(facts), html.table(("part", "size"), shape))


def repeat(inputs: Inputs, steps: Sequence[dict]) -> Html:
    """The exact commands, the config and the versions."""
    commands = []
    for step in steps:
        commands += [
            html.paragraph(
                html.tag("b", step["name"]), f" took {duration(step['seconds'])}", css="origin"
            ),
            html.preformatted(step["command"]),
        ]
    versions = [("Python", python_version()), ("platform", platform(terse=True))]
    for name in PACKAGES:
        try:
            versions.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return html.section(
        "repeat",
        "Repeat it",
        html.paragraph(
            "Each step by itself, from the folder of the project. The same seed gives the same data order, and on "
            "the same machine the same losses."
        ),
        *commands,
        html.folded(
            "The whole config",
            "as it was trained",
            html.preformatted(json.dumps(inputs.config, indent=2, ensure_ascii=False)),
        ),
        html.folded(
            "Versions", "of this report's machine", html.table(("package", "version"), versions)
        ),
    )


def _run_cards(inputs: Inputs, steps: Sequence[dict]) -> Html:
    from smoljax.model import ModelConfig

    config = configuration.build(ModelConfig, inputs.config["model"], "model")
    tokens = [row["tokens"] for row in inputs.metrics if "tokens" in row][-1]
    sources = inputs.documents["sources"].values()
    kept = sum(row["train"]["documents"] + row["heldout"]["documents"] for row in sources)
    seconds = {step["name"]: step["seconds"] for step in steps}
    facts = [
        (_millions(config.num_params), "parameters"),
        (f"{kept:,}", "documents kept"),
        (_millions(tokens), "tokens trained on"),
    ]
    if "train" in seconds:
        facts.append((duration(seconds["train"]), "training"))
    facts.append((duration(sum(seconds.values())), "all steps"))
    return html.cards(facts)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def _total(rows: Sequence[tuple]) -> tuple:
    return ("all sources", *(sum(column) for column in list(zip(*rows))[1:]))


def _shard_row(source: str, manifest: dict) -> tuple[str, int, int, int, int]:
    """Source, train tokens, held-out tokens, bytes of text, and tokens of text (without bos and eos)."""
    splits = manifest["splits"]
    return (
        source,
        splits["train"]["tokens"],
        splits["heldout"]["tokens"],
        sum(split["text_bytes"] for split in splits.values()),
        sum(split["tokens"] - 2 * split["documents"] for split in splits.values()),
    )


def _stage_row(stage: dict) -> tuple:
    reasons = sorted(stage["removed_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    why = ", ".join(f"{reason.removeprefix(stage['name'] + ':')} {n:,}" for reason, n in reasons)
    return (stage["name"], stage["kept"], stage["removed"], why)


def _removed_by_stage(inputs: Inputs) -> list[Html]:
    """A fold for each stage that removed something, with examples of each of its reasons."""
    removed = inputs.removed_examples(EXAMPLES_PER_REASON)
    folds = []
    for stage in inputs.documents["stages"]:
        reasons = {
            reason: entry
            for reason, entry in removed.items()
            if reason in stage["removed_by_reason"]
        }
        parts = []
        for reason, (number, examples) in reasons.items():
            rule = reason.removeprefix(stage["name"] + ":")
            parts.append(
                html.tag("h3", f"{rule} ", html.tag("span", f"{number:,} removed", css="faint"))
            )
            parts += map(_example, examples)
        if parts:
            folds.append(html.folded(stage["name"], f"{stage['removed']:,} removed", *parts))
    return folds


def _example(document: Document) -> Html:
    origin = f"{document.source}: {document.path}"
    if document.language:
        origin += f" (language: {document.language})"
    if not document.text.strip():
        return html.paragraph(f"{origin}: no text", css="origin")
    body = html.preformatted(html.cut(document.text, EXAMPLE_CHARACTERS))
    return html.join([html.paragraph(origin, css="origin"), body])


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """Tokens as text; bytes that only together make a character are one piece."""
    pieces: list[str] = []
    pending: list[int] = []
    for token in tokenizer.encode(text):
        pending.append(token)
        piece = tokenizer.decode(pending)
        # A character has at most four bytes: after that, what does not decode is shown as it is.
        if "\ufffd" not in piece or len(pending) >= 4:
            pieces.append(piece.replace("\n", "⏎\n"))
            pending = []
    return pieces + ([tokenizer.decode(pending)] if pending else [])
