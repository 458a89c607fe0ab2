"""From a conversation to text in pieces, each with loss or without.

What the assistant says is found by rendering, never by searching for marker words: the template is run on the messages
before a turn (with its generation prompt) and after it, and the text between is what the model has to write. Where a
template rewrites earlier turns, so that these texts are no beginnings of the whole, a stand-in for the turn's content
shows its place. `{% generation %}` marks, when a template has them, decide instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.data.special_text import SpecialText
from qlora_hal.data.template_sandbox import GENERATION_END, GENERATION_START, shown
from qlora_hal.data.templates import TemplateFault

if TYPE_CHECKING:
    from qlora_hal.data.templates import ChatTemplate

Piece = tuple[str, bool]
"""Text, and whether it is trained."""

Message = Mapping[str, object]

STAND_IN = "\ufdd9"
_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")


class TurnNotFound(Exception):
    """The place of an assistant turn in the rendered text cannot be told. `turn` counts messages from 0."""

    def __init__(self, turn: int) -> None:
        super().__init__(f"message {turn + 1}")
        self.turn = turn


@dataclass(frozen=True, slots=True)
class Target:
    """What one assistant turn contributes: characters `start` to `stop`, and whether a special token ends them."""

    start: int
    stop: int
    closed: bool


@dataclass(frozen=True, slots=True)
class Written:
    """A rendered conversation. `eos_added` says that the template ends some turn without a special token."""

    pieces: list[Piece]
    eos_added: bool

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


class ConversationWriter:
    """Renders conversations of one template and finds what is trained in them."""

    def __init__(self, template: ChatTemplate, special: SpecialText, eos_token: str) -> None:
        self._template, self._special, self._eos_token = template, special, eos_token

    def write(
        self,
        messages: Sequence[Message],
        first_target: int = 0,
        tools: Sequence[object] | None = None,
        stand_in: str = STAND_IN,
        untrained: Collection[int] = (),
    ) -> Written:
        """Pieces whose text together is the template's own output, with the eos put in after a trained turn that has no
        end token; assistant turns before `first_target` and those `untrained` carry no loss.

        Raises TemplateFault, TurnNotFound, UnsafeInputError.
        """
        marked = self._template.render(messages, tools=tools)
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [i for i in assistant if i >= first_target and i not in untrained]
        text = _MARKS.sub("", marked)
        of_all = self._marked_targets(marked, text, len(assistant))
        if of_all is not None:
            targets = [target for i, target in zip(assistant, of_all, strict=True) if i in turns]
        else:
            targets = [self._target(text, messages, turn, tools, stand_in) for turn in turns]
        return self._cut(text, targets, turns)

    def _marked_targets(self, marked: str, text: str, assistant_turns: int) -> list[Target] | None:
        """Targets from generation marks; None when there are not as many as assistant turns."""
        if not self._template.marks_generation:
            return None
        targets: list[Target] = []
        position = 0
        for before, inside in re.findall(f"([^{GENERATION_START}]*){GENERATION_START}([^{GENERATION_END}]*).", marked):
            start = position + len(before)
            stop = start + len(inside)
            position = stop
            end = self._special.end_of_last(inside)
            if end is not None:
                targets.append(Target(start, start + end, closed=True))
            elif (after := self._special.end_after(text, stop)) is not None:
                # The mark closes before the end token; a model that never learns to stop would never stop.
                targets.append(Target(start, after, closed=True))
            else:
                targets.append(Target(start, start + len(inside.rstrip()), closed=False))
        return targets if len(targets) == assistant_turns else None

    def _target(
        self, text: str, messages: Sequence[Message], turn: int, tools: Sequence[object] | None, stand_in: str
    ) -> Target:
        opened = self._rendered(messages[:turn], tools, prompt=True)
        closed = text if turn == len(messages) - 1 else self._rendered(messages[: turn + 1], tools)
        if opened is None or closed is None or not text.startswith(closed) or not closed.startswith(opened):
            content = self._by_stand_in(text, messages, turn, tools, stand_in)
            if content is None:
                raise TurnNotFound(turn)
            end = self._special.end_after(text, content[1])
            return Target(content[0], end or content[1], closed=end is not None)
        start = len(opened)
        if not self._template.offers_prompt:
            # The template may write a heading before what the assistant says; it is not for the model to write.
            content = self._by_stand_in(text, messages, turn, tools, stand_in)
            if content is not None and text[start : content[0]].strip():
                start = content[0]
        region = text[start : len(closed)]
        end = self._special.end_of_last(region)
        return Target(start, start + (end or len(region.rstrip())), closed=end is not None)

    def _by_stand_in(
        self, text: str, messages: Sequence[Message], turn: int, tools: Sequence[object] | None, stand_in: str
    ) -> tuple[int, int] | None:
        """Where the content of a turn stands, from what changes when another content takes its place."""
        changed = [*messages[:turn], {**messages[turn], "content": stand_in}, *messages[turn + 1 :]]
        other = self._rendered(changed, tools)
        forms = [form for form in (shown(stand_in), shown(stand_in.strip())) if other and other.count(form) == 1]
        if other is None or not forms:
            return None
        before, _, after = other.partition(forms[0])
        fits = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
        return (len(before), len(text) - len(after)) if fits else None

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[object] | None, *, prompt: bool = False
    ) -> str | None:
        try:
            return _MARKS.sub("", self._template.render(messages, add_generation_prompt=prompt, tools=tools))
        except TemplateFault:
            return None

    def _cut(self, text: str, targets: Sequence[Target], turns: Sequence[int]) -> Written:
        pieces: list[Piece] = []
        at = 0
        for target, turn in zip(targets, turns, strict=True):
            if target.start < at:
                raise TurnNotFound(turn)
            pieces += [(text[at : target.start], False), (text[target.start : target.stop], True)]
            if not target.closed:
                pieces.append((self._eos_token, True))
            at = target.stop
        pieces.append((text[at:], False))
        return Written([piece for piece in pieces if piece[0]], any(not target.closed for target in targets))
