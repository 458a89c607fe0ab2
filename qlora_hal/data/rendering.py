"""From a row to its text, with what is trained in it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qlora_hal.data.chat import Piece, TurnNotFound, trained_turns
from qlora_hal.data.contents import ArgumentsAs
from qlora_hal.data.source.columns import shape_of_columns
from qlora_hal.data.source.row_formats import (
    USED_COLUMNS,
    Conversation,
    Shape,
    Writing,
    example_of,
)
from qlora_hal.data.source.rows import Row
from qlora_hal.data.template.chat_template import REASONING_FIELDS, ChatTemplate, TemplateFault
from qlora_hal.data.template.conversation_text import ConversationRenderer, ConversationText, says_anything
from qlora_hal.data.template.message_fields import names_of_other_fields
from qlora_hal.data.template.omissions import OmissionCounts
from qlora_hal.data.template.reasoning import ReasoningMarks, reasoning_marks
from qlora_hal.data.tokens.encoding import RenderedRow, RowEncoder
from qlora_hal.data.tokens.tokenizer import ChatTokenizer, template_refused
from qlora_hal.errors import DataError

_BLANKS = " \t\r\n"
_LONGEST_NAME, _MOST_NAMES = 80, 10_000
"""Of unused columns: a file can name others in every row, of any length."""


@dataclass(slots=True)
class RenderingCounts:
    """What rendering met, for the report."""

    shapes: Counter[Shape] = field(default_factory=Counter)
    unused_columns: set[str] = field(default_factory=set)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    end_added_rows: int = 0
    special_in_text: Counter[str] = field(default_factory=Counter)
    rows_with_special: int = 0
    empty_rows: int = 0
    empty_turns: int = 0
    excluded_by: Counter[str] = field(default_factory=Counter)
    unused_fields: Counter[str] = field(default_factory=Counter)
    omissions: OmissionCounts = field(default_factory=OmissionCounts)
    special_read: Counter[str] = field(default_factory=Counter)
    arguments_as: Counter[ArgumentsAs] = field(default_factory=Counter)
    unmarked_turns: int = 0
    empty_thoughts: int = 0
    masked_thoughts: int = 0
    unmasked_rows: int = 0
    rows_with_tool_template: int = 0
    plain_rows: int = 0

    def add(self, found: ConversationText) -> None:
        """Count what rendering one conversation met."""
        written = found.written
        self.end_added_rows += written.end_added
        self.empty_turns += len(written.silent)
        self.unmarked_turns += len(written.unmarked)
        self.empty_thoughts += found.empty_thoughts
        self.omissions.add(found.omissions, found.messages, found.lost_turns)
        self.arguments_as.update([found.arguments_as] if found.arguments_as else [])
        if found.special_is_read:
            self.special_read.update(found.special)
        elif found.special:
            self.special_in_text.update(found.special)
            self.rows_with_special += 1

    def note_columns(self, shape: Shape, names: Iterable[object]) -> None:
        """Keep the columns that nothing is read from in rows of this shape."""
        for name in names:
            if name not in USED_COLUMNS[shape] and len(self.unused_columns) < _MOST_NAMES:
                text = str(name)
                self.unused_columns.add(text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}...")


class RowRenderer:
    """Renders rows of any shape for one tokenizer. Rows in Alpaca's shape have a text form of their own, which is used
    when the tokenizer has no template."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        encoder: RowEncoder,
        shape: Shape | None,
        *,
        last_turn_alone: bool = False,
        masks_reasoning: bool = False,
    ) -> None:
        self._tokenizer, self._encoder, self._shape = tokenizer, encoder, shape
        self._last_turn_alone, self._masks_reasoning = last_turn_alone, masks_reasoning
        self._marks: dict[ChatTokenizer, ReasoningMarks] = {}
        self._alpaca = tokenizer if tokenizer.template is not None else tokenizer.with_template("alpaca")
        self._input_heading = "### Input:\n" if self._alpaca.template_name == "alpaca" else ""
        self.counts = RenderingCounts()

    def render(self, row: Row) -> RenderedRow | None:
        """The row as text, or None where nothing is to be learnt from it: what it is to write is empty.

        Raises DataError: QH-D03 (field), QH-D08 (characters), QH-D12 (template, roles).
        """
        value = row.value
        if isinstance(value, DataError):
            raise value
        named = row.columns
        row, shape = shape_of_columns(row, value, self._shape)
        example = example_of(row, shape, self._input_heading)
        rendered: RenderedRow | None = None
        if isinstance(example, Conversation):
            rendered = self._conversation(row, example, self._alpaca if shape == "alpaca" else self._tokenizer)
        elif example.target.strip(_BLANKS):
            rendered = self._written(row, example)
        else:
            self.counts.empty_rows += 1
        self.counts.shapes[shape] += 1
        if row.columns is not named:
            self.counts.pairs[row.columns["instruction"], row.columns["output"]] += 1
        assert isinstance(row.value, Mapping)
        self.counts.note_columns(shape, row.value)
        return rendered

    def _conversation(self, row: Row, example: Conversation, tokenizer: ChatTokenizer) -> RenderedRow:
        tokenizer = tokenizer.for_rows(with_tools=True) if example.tools else tokenizer
        if tokenizer.outlines is None or tokenizer.template is None:
            raise tokenizer.no_template("rows of messages", row.where)
        if not example.plain:
            self.counts.rows_with_tool_template += tokenizer is not self._tokenizer and bool(example.tools)
            self.counts.excluded_by.update(example.flags)
            example = _in_form(example, tokenizer)
        if self._last_turn_alone:
            example = _last_turn_alone(example)
        example = self._without_empty_turns(example, tokenizer.template)
        if example.plain and (rendered := self._by_outline(row, example, tokenizer)) is not None:
            return rendered
        return self._by_template(row, example, tokenizer)

    def _without_empty_turns(self, example: Conversation, template: ChatTemplate) -> Conversation:
        """The conversation with loss only where the assistant says something: from any other turn a model would learn
        to end at once."""
        if self._encoder.train_on_all:
            self.counts.unused_fields.update(example.flags)
            return example
        if example.plain and all([message["content"].strip(_BLANKS) for message in example.messages]):  # type: ignore[attr-defined]
            return example
        turns = trained_turns(example.messages, example.first_target, example.untrained)
        empty = {number for number in turns if not says_anything(example.messages[number], template)}
        if not empty:
            return example
        self.counts.empty_turns += len(empty)
        return replace(example, untrained=example.untrained | empty, plain=False)

    def _by_outline(self, row: Row, example: Conversation, tokenizer: ChatTokenizer) -> RenderedRow | None:
        assert tokenizer.outlines is not None
        outline = tokenizer.outlines.of(example.messages, example.first_target)
        if outline is None:
            return None
        contents = [message["content"] for message in example.messages]
        text = outline.text(contents)  # type: ignore[arg-type]
        if text is None or (self._masks_reasoning and self._marks_of(tokenizer).occur_in(text)):
            return None
        if not outline.anchored:
            self._encoder.prepare_outline(outline)
        self.counts.end_added_rows += outline.end_added
        self.counts.empty_thoughts += outline.empty_thoughts
        return RenderedRow(row.number, row.where, text, _digest(row, text), outline, contents)  # type: ignore[arg-type]

    def _by_template(self, row: Row, example: Conversation, tokenizer: ChatTokenizer) -> RenderedRow:
        assert tokenizer.template is not None
        assert tokenizer.writer is not None
        renderer = ConversationRenderer(
            tokenizer.template, tokenizer.writer, tokenizer.special, train_on_all=self._encoder.train_on_all
        )
        try:
            found = renderer.render(example)
        except TemplateFault as fault:
            raise template_refused(tokenizer, example.messages, fault, row.where, row.number, example.tools) from fault
        except TurnNotFound as fault:
            raise _turn_not_found(row, fault) from fault
        except DataError as error:
            error.where = error.where or row.where
            raise
        self.counts.add(found)
        if self._masks_reasoning and self._marks_of(tokenizer).unknown:
            self.counts.unmasked_rows += any(
                message.get(name) for message in example.messages for name in REASONING_FIELDS
            )
        is_text = bool(found.special) and not found.special_is_read
        restored = tokenizer.special.restore if is_text else str
        written = self._without_reasoning(found.written.pieces, tokenizer)
        pieces = [(restored(text), trained, False) for text, trained in written]
        text = "".join(text for text, _, _ in pieces)
        return RenderedRow(row.number, row.where, text, _digest(row, text), pieces=pieces, protected=is_text)

    def _written(self, row: Row, example: Writing) -> RenderedRow:
        self.counts.plain_rows += 1
        pieces = [(example.prompt, False, True)] if example.prompt else []
        target = self._without_reasoning([(example.target, True)], self._tokenizer)
        pieces += [(text, trained, True) for text, trained in target]
        text = example.prompt + example.target
        return RenderedRow(row.number, row.where, text, _digest(row, text), pieces=pieces, is_writing=True)

    def _without_reasoning(self, pieces: list[Piece], tokenizer: ChatTokenizer) -> list[Piece]:
        if not self._masks_reasoning:
            return pieces
        kept, found = self._marks_of(tokenizer).left_out(pieces)
        self.counts.masked_thoughts += found
        return kept

    def _marks_of(self, tokenizer: ChatTokenizer) -> ReasoningMarks:
        if tokenizer not in self._marks:
            self._marks[tokenizer] = reasoning_marks(tokenizer.template)
        return self._marks[tokenizer]


def _last_turn_alone(example: Conversation) -> Conversation:
    answers = (number for number, message in enumerate(example.messages) if message["role"] == "assistant")
    return replace(example, first_target=max(example.first_target, *answers, 0))


def _in_form(example: Conversation, tokenizer: ChatTokenizer) -> Conversation:
    """The conversation with contents in the form that the template takes, plain where that makes it so; as it is where
    that would lose what parts hold beside their text, which is told where the row is rendered."""
    if example.plain or tokenizer.writer is None or all(isinstance(m.get("content"), str) for m in example.messages):
        return example
    messages = tokenizer.writer.contents.fitted(example.messages, example.tools)
    if names_of_other_fields(example.messages, without=messages):
        return example
    only_texts = all(m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in messages)
    return replace(example, messages=messages, plain=only_texts and not example.tools and not example.untrained)


def _digest(row: Row, text: str) -> bytes:
    """8 bytes that tell equal texts. Raises DataError (QH-D08) for text that has no UTF-8 form."""
    try:
        return hashlib.blake2b(text.encode(), digest_size=8).digest()
    except UnicodeEncodeError as error:
        raise DataError(
            "QH-D08",
            f"The text holds the lone surrogate U+{ord(text[error.start]):04X}, half of a character.",
            where=row.where,
            cause="It has no UTF-8 form; half of an emoji is left when a text is cut by UTF-16 code units.",
            fix="Correct the row, or set data.on_bad_row to skip, which skips such rows and counts them.",
            context={"row": row.number},
        ) from error


def _turn_not_found(row: Row, fault: TurnNotFound) -> DataError:
    return DataError(
        "QH-D12",
        f"The chat template rewrites message {fault.turn + 1} (role assistant) so that its place cannot be determined.",
        where=row.where,
        cause="Where the answer appears in the rendered text decides what is trained.",
        fix="Use a template with {% generation %} marks, or name a built-in one in data.chat_template.",
        context={"row": row.number, "message": fault.turn + 1},
    )
