"""The chat template, one file for training and for serving, and the token ids and loss mask of a chat.

The template is data, `chat_template.jinja`, with the dual-mode rules and the exact strings of SmolLM3's
supervised fine-tuning (huggingface/alignment-handbook, recipes/smollm3/sft/sft.yaml). Its `{% generation %}`
tag, an extension of the library transformers, marks what the loss is on: each assistant turn with its header.
`TEMPLATE_FOR_SERVING` is the same text without that tag, for engines that do not know it.

How template and content are told apart: the chat is rendered, then rendered again from the template in which
every `<|im_start|>`, `<|im_end|>`, ... is replaced by a character that the first rendering does not contain.
Only the template can have written such a character, so what the author of a message types, "<|im_start|>"
included, can never become a control token. The start and the end of the loss are found in the same way.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from smoljax.errors import SmoljaxError, require
from smoljax.tokens.tokenizer import Tokenizer

_START_TAG, _END_TAG = "{%- generation -%}", "{%- endgeneration -%}"
TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
TEMPLATE_FOR_SERVING = TEMPLATE.replace(_START_TAG, "").replace(_END_TAG, "")

# Only the template opens and closes a turn. The marks are also the model's to write, in an assistant's content.
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>")
_ROLES = ("system", "user", "assistant", "tool")
# Keys by which other templates carry text. This one has no place for it, and it must not vanish unseen.
_KEYS_OF_OTHER_TEMPLATES = ("tool_calls", "reasoning_content", "thinking")
# Not strftime's %B, which speaks the language of the locale.
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)

Messages = Sequence[Mapping[str, Any]]
Tools = str | Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Piece:
    """A part of a rendered chat.

    Attributes:
      text: the characters.
      is_control: whether it is a control token that the template wrote.
      in_loss: whether it is inside an assistant turn.
    """

    text: str
    is_control: bool
    in_loss: bool


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
      text: what the model reads.
      spans: (start, end) of each assistant turn in characters of `text`, from `<|im_start|>assistant` to the
        newline after `<|im_end|>`, without the prompt for a turn still to come. The loss is on these.
      pieces: `text`, cut around the template's control tokens and at the ends of the spans.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    pieces: tuple[Piece, ...]


def render(
    messages: Messages,
    *,
    enable_thinking: bool = True,
    tools: Tools | None = None,
    xml_tools: Tools | None = None,
    python_tools: Tools | None = None,
    add_generation_prompt: bool = False,
    date: datetime.date | None = None,
) -> Rendered:
    """The text of a chat and where the loss is.

    Args:
      messages: `{"role": "system" | "user" | "assistant" | "tool", "content": str}` in order; a system message
        comes first. Its flags /think and /no_think override `enable_thinking`, and /system_override makes it the
        whole system turn. An assistant's content holds its `<think>...</think>` and its calls.
      enable_thinking: reasoning mode /think, or /no_think with an empty thought before each answer.
      tools: JSON schemas of functions, the name that transformers and vLLM use for `xml_tools`.
      xml_tools: functions to call by a JSON object: a string is written as it is, a list with the instruction for
        use around it, one function a line, strings as they are and mappings as JSON.
      python_tools: functions to call by Python code: a string as it is, or a list written one a line.
      add_generation_prompt: whether an assistant turn is opened at the end.
      date: the day in the system turn; today by default, so training and tests pass one.

    Raises:
      SmoljaxError: no messages, an unknown role, a content that is not a string, a system message after the
        first, text under keys that the template does not write, tools that are not JSON, or a turn to be opened
        after an assistant turn.
    """
    context = {
        "messages": _checked_messages(messages, add_generation_prompt),
        "enable_thinking": enable_thinking,
        "add_generation_prompt": add_generation_prompt,
        "date_string": _date_string(date),
    }
    if tools and xml_tools:
        raise SmoljaxError("tools and xml_tools are two names of one thing: give one of them")
    listed = {"tools": tools, "xml_tools": xml_tools, "python_tools": python_tools}
    context |= {name: _checked_tools(name, value) for name, value in listed.items() if value}

    text = _compile(TEMPLATE_FOR_SERVING).render(context)
    literals = (_START_TAG, _END_TAG, *TURN_TOKENS, *_MARKS)
    literal_of = dict(zip(_characters_absent_from(text), literals))
    marked = _compile(_marked_template(tuple(literal_of.items()))).render(context)
    return _cut(marked, literal_of, text)


def encode(
    tokenizer: Tokenizer, messages: Messages, **options: Any
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them the loss is on.

    The control tokens that the template writes become their special ids. The marks `<think>`, `<tool_call>`,
    `<code>` and their ends do so where the tokenizer has them as special tokens, in the template's own words and
    in the assistant's content, which is what the model is to write. All else that a message holds is plain text
    to the tokenizer, so that no message can forge a turn. There is no bos: a chat begins with `<|im_start|>`.

    Args:
      tokenizer: has `<|im_start|>` and `<|im_end|>` as special tokens.
      messages: as in `render`.
      **options: the other arguments of `render`.

    Returns:
      (ids, loss_mask), of one length; loss_mask is true for the tokens of the assistant turns, the spans of
      `render`. It speaks of a token as a target, not as an input.

    Raises:
      SmoljaxError: what `render` raises, or the tokenizer lacks a control token.
    """
    id_of = {name: tokenizer.special_id(name) for name in TURN_TOKENS + _MARKS}
    missing = [name for name in TURN_TOKENS if id_of[name] is None]
    if missing:
        raise SmoljaxError(
            f"the tokenizer has no special token {' and no '.join(missing)}, so a turn cannot be told from text: "
            'use a tokenizer that has, as added tokens with "special": true in its tokenizer.json or as control '
            "symbols of its SentencePiece model"
        )
    ids: list[int] = []
    loss_mask: list[bool] = []
    for part, in_loss in _joined_parts(render(messages, **options).pieces, id_of):
        new = tokenizer.encode(part) if isinstance(part, str) else [part]
        ids += new
        loss_mask += [in_loss] * len(new)
    return ids, loss_mask


def _checked_messages(messages: Messages, add_generation_prompt: bool) -> list[dict[str, str]]:
    """Plain copies of the messages with what the template reads."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise SmoljaxError(
            f"messages is {messages!r:.60}, expected a list of at least one message: "
            '[{"role": "user", "content": "..."}]'
        )
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise SmoljaxError(
                f'message {i} is {message!r:.60}, expected {{"role": ..., "content": ...}}'
            )
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise SmoljaxError(
                f"message {i} has role {role!r:.60}, expected one of {', '.join(_ROLES)}"
            )
        for key in _KEYS_OF_OTHER_TEMPLATES:
            if message.get(key):
                raise SmoljaxError(
                    f"message {i} has {key!r}, which this template does not write: put it into the content, "
                    "as <think>...</think> or <tool_call>...</tool_call>"
                )
        if not isinstance(content, str):
            raise SmoljaxError(
                f"message {i} ({role}) has content {content!r:.60}, expected a string"
            )
        if role == "system" and i > 0:
            raise SmoljaxError(
                f"message {i} is a system message, but only message 0 may be one: join their texts in message 0"
            )
        plain.append({"role": str(role), "content": str(content)})
    if add_generation_prompt and plain[-1]["role"] == "assistant":
        raise SmoljaxError(
            "add_generation_prompt opens an assistant turn, but the last message is the assistant's already: "
            "leave one of them out"
        )
    return plain


def _checked_tools(name: str, tools: Tools) -> Tools:
    if isinstance(tools, str):
        return tools
    if not isinstance(tools, Sequence):
        raise SmoljaxError(f"{name} is {tools!r:.60}, expected a string or a list of functions")
    for i, tool in enumerate(tools):
        try:
            if not isinstance(tool, str | Mapping):
                raise TypeError("expected a mapping or a string")
            json.dumps(tool)
        except (TypeError, ValueError) as error:
            raise SmoljaxError(
                f"{name}[{i}] is {tool!r:.60}, which is not the JSON schema of a function: {error}"
            ) from error
    return list(tools)


def _date_string(date: datetime.date | None) -> str:
    date = datetime.date.today() if date is None else date
    if not isinstance(date, datetime.date):
        raise SmoljaxError(f"date is {date!r:.60}, expected a datetime.date")
    return f"{date.day:02d} {_MONTHS[date.month - 1]} {date.year}"


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    """The template as transformers compiles it."""
    jinja2 = require("jinja2", extra="export")
    sandbox = require("jinja2.sandbox", extra="export")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _raise_exception(message: str) -> NoReturn:
    raise SmoljaxError(message)


def _characters_absent_from(text: str) -> Iterator[str]:
    """Characters that are not in `text`, private ones first, which are rare and not in the template either."""
    present = set(text)
    return (character for i in range(0x10FFFD, 0, -1) if (character := chr(i)) not in present)


@functools.lru_cache(maxsize=32)
def _marked_template(literal_of: tuple[tuple[str, str], ...]) -> str:
    """The template with a character in place of each literal."""
    template = TEMPLATE
    for character, literal in literal_of:
        is_tag = literal in (_START_TAG, _END_TAG)
        template = template.replace(literal, f'{{{{- "{character}" -}}}}' if is_tag else character)
    return template


def _cut(marked: str, literal_of: Mapping[str, str], text: str) -> Rendered:
    """Pieces and spans, from the text in which characters stand for literals."""
    pieces, spans = [], []
    start, length, in_loss = 0, 0, False
    for part in re.split(f"([{''.join(map(re.escape, literal_of))}])", marked):
        literal = literal_of.get(part)
        if literal == _START_TAG:
            start, in_loss = length, True
        elif literal == _END_TAG:
            spans.append((start, length))
            in_loss = False
        elif part:
            pieces.append(Piece(literal or part, literal is not None, in_loss))
            length += len(literal or part)
    if "".join(piece.text for piece in pieces) != text:
        raise AssertionError("the template writes another text when its literals are replaced")
    return Rendered(text, tuple(spans), tuple(pieces))


def _joined_parts(
    pieces: Sequence[Piece], id_of: Mapping[str, int | None]
) -> Iterator[tuple[int | str, bool]]:
    """Ids, and the texts between them as long as can be: a mark that has no id is text like its neighbours."""
    marks = [mark for mark in _MARKS if id_of[mark] is not None]
    text, text_in_loss = "", False
    for piece in pieces:
        parts = [piece.text]
        if piece.in_loss and not piece.is_control and marks:
            parts = re.split(f"({'|'.join(map(re.escape, marks))})", piece.text)
        for i, part in enumerate(parts):
            # Every second part of a split is what it was split at.
            token = id_of[part] if piece.is_control or i % 2 else None
            if text and (token is not None or text_in_loss != piece.in_loss):
                yield text, text_in_loss
                text = ""
            if token is not None:
                yield token, piece.in_loss
            else:
                text, text_in_loss = text + part, piece.in_loss
    if text:
        yield text, text_in_loss
