"""A conversation rendered, with an account of what of it the text holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_hal.data.chat import EMPTY_THOUGHT, TurnNotFound, Written, trained_turns
from qlora_hal.data.template.chat_template import REASONING_FIELDS, TemplateFault
from qlora_hal.data.template.message_fields import CALLS, CONTENT, names_of_other_fields
from qlora_hal.data.template.omissions import Omissions, omissions_of
from qlora_hal.data.template.trial_words import text_of_part
from qlora_hal.data.tokens.special_text import masked

if TYPE_CHECKING:
    from qlora_hal.data.chat import ConversationWriter, Message
    from qlora_hal.data.contents import ArgumentsAs
    from qlora_hal.data.source.row_formats import Conversation
    from qlora_hal.data.template.chat_template import ChatTemplate
    from qlora_hal.data.tokens.special_text import SpecialText

_BLANKS = " \t\r\n"
_NAMING_FIELDS = frozenset({"role", "name", "tool_call_id", "id", "type"})
"""Fields by which a message alone says nothing."""


@dataclass(frozen=True, slots=True)
class ConversationText:
    """A rendered conversation; `messages` are what the template was given.

    `special` counts the special tokens that stand in its messages. They are text, and masked in the pieces, unless the
    template reads them (`special_is_read`). `arguments_as` says what the arguments of calls were made for a template
    that does not take them as they are, and why. `lost_turns` counts assistant turns that carry no loss because the
    template leaves out what they say.
    """

    messages: Sequence[Message]
    written: Written
    omissions: Omissions
    lost_turns: int
    special: Counter[str]
    special_is_read: bool
    arguments_as: ArgumentsAs | None = None

    @property
    def empty_thoughts(self) -> int:
        """How many empty thinking parts the template itself wrote into what is trained."""
        found = sum(len(EMPTY_THOUGHT.findall(text)) for text, trained in self.written.pieces if trained)
        given = sum(len(EMPTY_THOUGHT.findall(text)) for text in strings_in(list(self.messages)))
        return max(0, found - given)


class ConversationRenderer:
    """Renders conversations of one template. With `train_on_all`, no turn is asked for what it says."""

    def __init__(
        self, template: ChatTemplate, writer: ConversationWriter, special: SpecialText, *, train_on_all: bool
    ) -> None:
        self._template, self._writer, self._special = template, writer, special
        self._train_on_all = train_on_all

    def render(self, example: Conversation) -> ConversationText:
        """The conversation in pieces. Raises TemplateFault, TurnNotFound, UnsafeInputError, DataError (QH-D08)."""
        faults: list[TemplateFault] = []
        for arguments_as, messages in self._writer.contents.forms_of_arguments(example.messages, example.tools):
            try:
                return self._rendered(messages, example, arguments_as)
            except TemplateFault as fault:
                faults.append(fault)
        raise faults[0]

    def _rendered(
        self, given: Sequence[Message], example: Conversation, arguments_as: ArgumentsAs | None
    ) -> ConversationText:
        messages = self._writer.contents.fitted(given, example.tools)
        met = self._special.found_in(strings_in([list(messages), example.tools]))
        safe: Sequence[Message] = masked_messages(self._special, messages)
        tools = masked(self._special, example.tools)
        rendering, is_read = self._writer.trace(safe, tools), False
        if met:
            plain = self._writer.trace(messages, example.tools)
            if plain.text != self._special.unmask(rendering.text):
                safe, tools, rendering, is_read = messages, example.tools, plain, True
        trial = self._writer.trials.of(safe, tools)
        omissions = omissions_of(safe, tools, rendering, trial, self._template)
        # Parts that became a text have lost what else they held.
        omissions = replace(omissions, fields=omissions.fields | names_of_other_fields(given, without=messages))
        turns = trained_turns(safe, example.first_target, example.untrained)
        kept = turns if self._train_on_all else [turn for turn in turns if turn not in omissions.lost]
        try:
            written = self._writer.cut(rendering, safe, kept, tools, trial)
        except TurnNotFound:
            if not self._train_on_all:
                raise
            written = self._writer.cut(rendering, safe, (), tools, trial)
        return ConversationText(safe, written, omissions, len(turns) - len(kept), met, is_read, arguments_as)


def says_anything(message: Message, template: ChatTemplate) -> bool:
    """Whether a message holds something for the template to write beside its role and names."""
    if message.get(CALLS) or any(_has_text(message.get(name)) for name in (CONTENT, *REASONING_FIELDS)):
        return True
    others = message.keys() - _NAMING_FIELDS - {CONTENT, CALLS, *REASONING_FIELDS}
    return any(message[name] and template.mentions(name) for name in others)


def _has_text(value: object) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return any(text_of_part(part).strip(_BLANKS) for part in parts)


def masked_messages(special: SpecialText, messages: Sequence[Message]) -> list[Message]:
    """Messages in which the special tokens of every string but the role are masked; `special.unmask` undoes it.

    Raises DataError (QH-D08) when a text holds the signs that masks are made of.
    """
    return [{**masked(special, message), "role": message["role"]} for message in messages]


def strings_in(value: object) -> list[str]:
    """All strings that a value holds, keys among them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in strings_in(item)] if isinstance(value, list | tuple) else []
