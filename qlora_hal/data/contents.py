"""The contents and calls of messages in the form that a template takes.

Some templates take a content as a text, some as a list of parts, many as both. Some take the arguments of a call as an
object, some as its JSON text. Which of these a template takes is found by trying, never guessed from its source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_hal.data.template.message_fields import CALLS, CONTENT
from qlora_hal.data.template.trial_words import Form, form_of, object_in, text_of_part

if TYPE_CHECKING:
    from qlora_hal.data.template.message_fields import Message
    from qlora_hal.data.template.trial import Trials

OBJECTS = "objects"
ArgumentsAs = tuple[str, str]
"""What the arguments of calls were given to a template as, and why."""

_SIGN, _SIGN_IN_QUOTES = '{"key": "text"}', r"{\"key\""
_FORMS_KEPT = 4096


class Contents:
    """Brings contents into the form that one template takes."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._as_parts: dict[Form, bool] = {}
        self._asking: dict[Form, bool] = {}
        self._quoting: dict[Form, bool] = {}

    def fitted(self, messages: Sequence[Message], tools: Sequence[object] | None) -> Sequence[Message]:
        """The messages as they are where the template writes them so; with texts instead of parts, or the other way
        round, where it writes more of them in that form. One without a content, a call most often, gets an empty one
        where the template fails without."""
        if self._asks_for_contents(messages, tools):
            messages = [*map(_with_content, messages)]
        if not self._takes_parts(messages, tools):
            return [_with_text(message) for message in messages] if any(map(_has_parts, messages)) else messages
        return messages if any(map(_has_parts, messages)) else [_with_parts(message) for message in messages]

    def forms_of_arguments(
        self, messages: Sequence[Message], tools: Sequence[object] | None
    ) -> Iterator[tuple[ArgumentsAs | None, Sequence[Message]]]:
        """What may be given to the template, best first, and what the arguments of calls became, None where they are
        as they were: objects where it would write their JSON text as a string; else as given; else the other form."""
        changed = {form: messages_in_form for form, messages_in_form in _with_other_arguments(messages)}
        if OBJECTS in changed and self._quotes_text(messages, tools):
            yield (OBJECTS, "it would write their JSON text as a string, in quotes"), changed[OBJECTS]
        yield None, messages
        for form, messages_in_form in changed.items():
            yield (form, "it accepts no other form"), messages_in_form

    def _quotes_text(self, messages: Sequence[Message], tools: Sequence[object] | None) -> bool:
        form = form_of(messages, tools)
        if form not in self._quoting:
            tried = [_with_arguments(message, _as_sign) for message in messages]
            found = self._trials.is_written(_SIGN_IN_QUOTES, self.fitted(tried, tools), tools)
            if len(self._quoting) >= _FORMS_KEPT:
                return found
            self._quoting[form] = found
        return self._quoting[form]

    def _asks_for_contents(self, messages: Sequence[Message], tools: Sequence[object] | None) -> bool:
        if all(CONTENT in message for message in messages):
            return False
        form = form_of(messages, tools)
        if form not in self._asking:
            filled = [*map(_with_content, messages)]
            found = self._trials.of(messages, tools) is None and self._trials.of(filled, tools) is not None
            if len(self._asking) >= _FORMS_KEPT:
                return found
            self._asking[form] = found
        return self._asking[form]

    def _takes_parts(self, messages: Sequence[Message], tools: Sequence[object] | None) -> bool:
        form = form_of(messages, tools)
        if form not in self._as_parts:
            found = self._found(messages, tools)
            if len(self._as_parts) >= _FORMS_KEPT:
                return found
            self._as_parts[form] = found
        return self._as_parts[form]

    def _found(self, messages: Sequence[Message], tools: Sequence[object] | None) -> bool:
        given_parts = any(map(_has_parts, messages))
        texts = self._trials.of([_with_text(message) for message in messages], tools)
        if texts is not None and not texts.contents_unwritten and not given_parts:
            return False
        parts = self._trials.of(messages if given_parts else [_with_parts(message) for message in messages], tools)
        if parts is None or texts is None:
            return texts is None and parts is not None and not parts.contents_unwritten
        if given_parts:
            return parts.contents_unwritten <= texts.contents_unwritten
        return parts.contents_unwritten < texts.contents_unwritten


def _with_content(message: Message) -> Message:
    return message if CONTENT in message else {**message, CONTENT: ""}


def _has_parts(message: Message) -> bool:
    return isinstance(message.get(CONTENT), list | tuple)


def _with_text(message: Message) -> Message:
    content = message.get(CONTENT)
    if not isinstance(content, list | tuple):
        return message
    return {**message, CONTENT: "".join(map(text_of_part, content))}


def _with_parts(message: Message) -> Message:
    content = message.get(CONTENT)
    return {**message, CONTENT: [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_other_arguments(messages: Sequence[Message]) -> Iterator[tuple[str, list[Message]]]:
    """(what the arguments of calls became: objects or text, the messages with them), for what differs from what is."""
    for name, form in ((OBJECTS, _as_object), ("text", _as_text)):
        changed = [_with_arguments(message, form) for message in messages]
        if changed != list(messages):
            yield name, changed


def _as_object(arguments: object) -> object:
    found = object_in(arguments)
    return arguments if found is None else found


def _as_text(arguments: object) -> object:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments


def _as_sign(arguments: object) -> object:
    return _SIGN if isinstance(arguments, str) and object_in(arguments) is not None else arguments


def _with_arguments(message: Message, form: Callable[[object], object]) -> Message:
    calls = message.get(CALLS)
    if not isinstance(calls, list | tuple):
        return message
    return {**message, CALLS: [_call_with_arguments(call, form) for call in calls]}


def _call_with_arguments(call: object, form: Callable[[object], object]) -> object:
    if not isinstance(call, Mapping):
        return call
    if isinstance(inner := call.get("function"), Mapping):
        return {**call, "function": _call_with_arguments(inner, form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call
