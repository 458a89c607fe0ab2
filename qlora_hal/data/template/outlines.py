"""What a template does with messages of given roles, found once and then filled in row by row.

The template is run with contents that it can join and strip but not look at. If it did nothing else with them, its
output for every other content is known without running it again: the same literal text with other contents in the same
places. A template that looks (splits off a thinking part, counts, compares) is run on every row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NoReturn, cast

from qlora_hal.data.chat import EMPTY_THOUGHT, ConversationWriter, Piece, TurnNotFound, trained_turns
from qlora_hal.data.template.chat_template import TemplateFault
from qlora_hal.data.template.sandbox import Looked, StandIn, shown
from qlora_hal.data.template.turn_marks import LoopMark
from qlora_hal.data.tokens.special_text import NONCHARACTERS

if TYPE_CHECKING:
    from qlora_hal.data.tokens.loss_spans import Anchors

_POISON = "\ufdd2"
_POISON_ESCAPED = "\\ufdd2"
"""As the sign stands in a printed list and in JSON that is ASCII alone."""
_SLOT = re.compile("\ufdd0(\\d{1,7})(-?)\ufdd1")

_LONGEST = 1024
"""Messages. Stand-ins are joined anew with each text that is added, so a longer conversation is quicker rendered; and
hardly two of that length have the same roles."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the content of message `index` goes; `stripped` of white space at both ends, if the template does so."""

    index: int
    stripped: bool


@dataclass(slots=True)
class Outline:
    """The literal text and the slots of conversations with the same roles, and what of it is trained.

    `needs_content` says that the template asked whether a content is empty, so that the outline holds for contents
    that are not; `empty_thoughts` counts the empty thinking parts that the template itself writes into what is trained.
    `anchors` are added by the encoder, once (`anchored`), if the targets lie between special tokens.
    """

    parts: tuple[tuple[str | Slot, bool], ...]
    end_added: bool
    needs_content: bool
    empty_thoughts: int = 0
    anchors: Anchors | None = None
    anchored: bool = False
    _filled: list[str] = field(default_factory=list)
    _slots: list[tuple[int, int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._filled = [part if isinstance(part, str) else "" for part, _ in self.parts]
        self._slots = [
            (place, part.index, part.stripped) for place, (part, _) in enumerate(self.parts) if isinstance(part, Slot)
        ]

    def text(self, contents: Sequence[str]) -> str | None:
        """The rendered conversation; None when the outline does not hold for these contents."""
        if self.needs_content and not all(map(str.strip, contents)):
            return None
        filled = self._filled
        for place, index, stripped in self._slots:
            filled[place] = contents[index].strip() if stripped else contents[index]
        return "".join(filled)

    def pieces(self, contents: Sequence[str]) -> list[tuple[str, bool, bool]]:
        """(text, trained, whether a person wrote it) of each part."""
        found: list[tuple[str, bool, bool]] = []
        for part, trained in self.parts:
            if isinstance(part, str):
                found.append((part, trained, False))
            else:
                content = contents[part.index]
                found.append((content.strip() if part.stripped else content, trained, True))
        return found


def outline_of(writer: ConversationWriter, roles: Sequence[str], first_target: int) -> Outline | None:
    """The outline of conversations with these roles, or None when the template looks into contents, leaves one out, or
    refuses."""
    watch = Watch()
    messages = [{"role": role, "content": Unread(f"\ufdd0{i}\ufdd1", watch)} for i, role in enumerate(roles)]
    trial = writer.trials.of([{"role": role, "content": "text"} for role in roles], None)
    try:
        turns = trained_turns(messages, first_target, ())
        written = writer.cut(writer.trace(messages), messages, turns, None, trial)
    except (Looked, TemplateFault, TurnNotFound):
        return None
    text = written.text
    if watch.looked or _POISON in text or _POISON_ESCAPED in text or written.silent or written.unmarked:
        return None
    parts = tuple(part for piece in written.pieces for part in _parts_of(piece))
    if {part.index for part, _ in parts if isinstance(part, Slot)} != set(range(len(roles))):
        return None
    thoughts = sum(len(EMPTY_THOUGHT.findall(part)) for part, trained in parts if trained and isinstance(part, str))
    return Outline(parts, written.end_added, watch.asked_for_content, thoughts)


def _parts_of(piece: Piece) -> list[tuple[str | Slot, bool]]:
    text, trained = piece
    parts: list[tuple[str | Slot, bool]] = []
    at = 0
    for match in _SLOT.finditer(text):
        if match.start() > at:
            parts.append((text[at : match.start()], trained))
        parts.append((Slot(int(match.group(1)), stripped=bool(match.group(2))), trained))
        at = match.end()
    if at < len(text):
        parts.append((text[at:], trained))
    return parts


@dataclass(slots=True)
class Watch:
    """What was done with stand-ins."""

    looked: bool = False
    asked_for_content: bool = False


class Unread(StandIn):
    """A content whose characters stay unknown to the template.

    Its own characters are a poison sign: if that reaches the output, compiled code read them past these methods. It
    stays what it is through `str()`, macros and captured blocks, so that what is done with it later shows, too.
    """

    _watch: Watch

    def __new__(cls, shown: str, watch: Watch) -> Unread:
        self = super().__new__(cls, _POISON)
        self._shown, self._watch = shown, watch
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Unread:
        return Unread(self._shown + _text_of(self, other), self._watch)

    def __radd__(self, other: Any) -> Unread:
        return Unread(_text_of(self, other) + self._shown, self._watch)

    def __bool__(self) -> bool:
        self._watch.asked_for_content = True
        return True

    def strip(self, characters: str | None = None, /) -> Unread:
        match = _SLOT.fullmatch(self._shown)
        if match is None or characters is not None:
            _look(self)
        return Unread(f"\ufdd0{match.group(1)}-\ufdd1", self._watch)


def _text_of(unread: Unread, other: object) -> str:
    if type(other) in (str, Unread, LoopMark):
        return shown(cast("str", other))
    _look(unread)


def _look(unread: Unread, *_: object, **__: object) -> NoReturn:
    unread._watch.looked = True
    raise Looked


_OWN = frozenset(vars(Unread)) | frozenset(dir(object)) - {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
for _name in dir(str):
    if _name not in _OWN - {"__hash__"}:
        setattr(Unread, _name, _look)
setattr(Unread, "__rmod__", _look)  # noqa: B010


class Outlines:
    """The outlines of one template, each found when its roles are first met and held against a true rendering."""

    def __init__(self, writer: ConversationWriter) -> None:
        self._writer = writer
        self._known: dict[tuple[object, ...], Outline | None] = {}

    def of(self, messages: Sequence[Mapping[str, object]], first_target: int) -> Outline | None:
        if len(messages) > _LONGEST or self._opens_like_the_prompt(messages):
            return None
        key = (first_target, *[message["role"] for message in messages])
        try:
            return self._known[key]
        except KeyError:
            outline = outline_of(self._writer, [str(role) for role in key[1:]], first_target)
            if outline is not None and not self._is_right(outline, messages, first_target):
                outline = None
            # Each length of conversation has its own outline; beyond some thousands the rest is rendered.
            if len(self._known) < 4096:
                self._known[key] = outline
            return outline

    def _opens_like_the_prompt(self, messages: Sequence[Mapping[str, object]]) -> bool:
        """Whether an answer begins with the tag that the generation prompt ends with: that is part of the prompt there,
        and trained nowhere, which no outline of other contents tells."""
        tag = self._writer.prompt_tag
        return bool(tag) and any(
            str(message["content"]).lstrip().startswith(tag) for message in messages if message["role"] == "assistant"
        )

    def _is_right(self, outline: Outline, messages: Sequence[Mapping[str, object]], first_target: int) -> bool:
        contents = [str(message["content"]) for message in messages]
        # Noncharacters are signs where a template runs; what is empty is left out before it comes here.
        if any(map(NONCHARACTERS.search, contents)) or not all(map(str.strip, contents)):
            return True
        by_outline = [(text, trained) for text, trained, _ in outline.pieces(contents)]
        return _runs(by_outline) == _runs(self._writer.write(messages, first_target).pieces)


def _runs(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with neighbours of the same kind joined."""
    grouped = groupby(pieces, key=itemgetter(1))
    return [(text, trained) for trained, group in grouped if (text := "".join(part for part, _ in group))]
