"""The tokenizer of a base model with its chat template, on the Rust `tokenizers` library alone.

Nothing here adds special tokens by itself: a chat template writes all of its own, and plain text gets its bos and eos
where rows are prepared. So a bos can never appear twice by two parties adding it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.data.chat import ConversationWriter, TurnNotFound
from qlora_hal.data.template.chat_template import BUILT_IN, ChatTemplate, TemplateFault, read_template
from qlora_hal.data.template.conversation_text import masked_messages
from qlora_hal.data.template.outlines import Outlines
from qlora_hal.data.tokens.guarded_tokenizer import broken
from qlora_hal.data.tokens.special_text import ProtectedTokenizer, SpecialText, refuse_noncharacters
from qlora_hal.data.tokens.tokenizer_files import TokenizerFiles, not_utf8, read_folder
from qlora_hal.errors import DataError
from qlora_hal.files.refused_paths import named_path

if TYPE_CHECKING:
    from tokenizers import Encoding

    from qlora_hal.data.chat import Message

TOOL_TEMPLATE = "tool_use"
"""The name of the template that a tokenizer has for conversations with tools, if it has one of its own."""

_ENCODING_VERSION = "2"
_ROLES_SHOWN, _LONGEST_ROLE = 10, 40
"""Before and behind the message that a template refuses."""


class ChatTokenizer:
    """Text to ids and back, conversations to text, and which tokens open, close and pad a row.

    `stop_ids` end generation: the eos ids of the model and the token with which the template ends a turn. `pad_id` is
    never an end token; padding is told by segment ids, so the pad token's own meaning never matters. `hash` changes
    with anything that could change a row's tokens. `model_vocabulary_size` is the number of the model's embeddings,
    None where it is not known; no id is taken from beyond it. `opening_ids` open a text that no template writes.
    """

    def __init__(
        self,
        files: TokenizerFiles,
        *,
        template: str | None,
        template_name: str,
        model_vocabulary_size: int | None = None,
        named_templates: Mapping[str, str] | None = None,
    ) -> None:
        """`named_templates` are the tokenizer's others: tool_use is used for rows with tools, as transformers does.

        Raises DataError (QH-D12, QH-D13), UnsafeInputError (QH-X04), ModelError (QH-D52).
        """
        self._rust = files.tokenizer
        self._model_vocabulary_size = model_vocabulary_size
        self.vocabulary_size: int = self._rust.get_vocab_size(with_added_tokens=True)
        self.special = SpecialText(
            {token.content: number for number, token in self._rust.get_added_tokens_decoder().items() if token.special}
        )
        self._named = dict(files.named)
        self.eos_id = self._eos(files)
        self.bos_id = self._within_model("bos_token", self._id_of("bos_token", self.eos_id))
        self.opening_ids = self._opening()
        self.adds_bos = "bos_token" in self._named and self.bos_id in self.opening_ids
        notes = list(files.notes)
        self.pad_id = self._pad(files, notes)
        self.template_name = template_name if template is not None else "none"
        self.template = None if template is None else ChatTemplate(template, template_name, self._variables())
        self._ends = {token for token in map(self._rust.id_to_token, (self.eos_id, *files.eos_ids)) if token}
        self.writer = (
            None
            if self.template is None
            else ConversationWriter(self.template, self.special, self._eos_text(), self._ends)
        )
        self.outlines = None if self.writer is None else Outlines(self.writer)
        self._named_templates = dict(named_templates or {})
        self._for_tools = self._with_tool_template(files)
        self._protected: ProtectedTokenizer | None = None
        self.stop_ids = self._stops(files)
        if self.template is not None and self.template.tells_date:
            notes.append("the chat template writes today's date; a fixed date is used, so that runs are reproducible")
        if template_name in BUILT_IN and (unknown := self._markers_spelled_out(BUILT_IN[template_name])):
            notes.append(f"{unknown} of the template {template_name} are not tokens here; they are encoded as text")
        self.notes = tuple(notes)
        self.hash = self._hash(template, self._named_templates.get(TOOL_TEMPLATE))

    @classmethod
    def from_folder(
        cls, folder: Path, *, chat_template: str | None = None, model_vocabulary_size: int | None = None
    ) -> ChatTokenizer:
        """The tokenizer of a model folder; `chat_template` is a built-in name or a Jinja file that replaces its own.

        Raises ModelError (QH-D52), DataError (QH-D12, QH-D13), UnsafeInputError (QH-X04).
        """
        files = read_folder(Path(folder))
        template, name = files.template, "of the tokenizer"
        named: Mapping[str, str] = files.named_templates
        if chat_template is not None:
            template, name = chosen_template(chat_template, named)
            named = {}
        return cls(
            files,
            template=template,
            template_name=name,
            model_vocabulary_size=model_vocabulary_size,
            named_templates=named,
        )

    def with_template(self, name: str) -> ChatTokenizer:
        """The same tokenizer with a built-in template."""
        files = TokenizerFiles(self._rust, self._named, None, tuple(self.stop_ids))
        size = self._model_vocabulary_size
        return ChatTokenizer(files, template=BUILT_IN[name], template_name=name, model_vocabulary_size=size)

    def for_rows(self, *, with_tools: bool) -> ChatTokenizer:
        """The same tokenizer with the template that it has for rows with tools, or without."""
        return self._for_tools if with_tools and self._for_tools is not None else self

    def _with_tool_template(self, files: TokenizerFiles) -> ChatTokenizer | None:
        template = self._named_templates.get(TOOL_TEMPLATE)
        if template is None:
            return None
        name, size = f"{TOOL_TEMPLATE} of the tokenizer", self._model_vocabulary_size
        return ChatTokenizer(files, template=template, template_name=name, model_vocabulary_size=size)

    # text ----------------------------------------------------------------------------------------------------------
    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it become tokens, none is added."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, offsets: bool = True) -> list[Encoding]:
        """Encodings of many texts on all cores; without offsets it is faster. The ids are the same."""
        encode = self._rust.encode_batch if offsets else self._rust.encode_batch_fast
        encodings: list[Encoding] = encode(list(texts), add_special_tokens=False)
        return encodings

    def encode_protected(self, text: str) -> tuple[list[int], Encoding]:
        """Ids of a text in which `special.alias` and `special.restore` marked what is a special token."""
        if self._protected is None:
            self._protected = ProtectedTokenizer(self._rust, self.special)
        return self._protected.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        text: str = self._rust.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)
        return text

    # conversations -------------------------------------------------------------------------------------------------
    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text. Raises DataError (QH-D12) without a template or when it refuses the messages."""
        if self.template is None or self.writer is None:
            raise self.no_template("these messages")
        try:
            fitted = self.writer.contents.fitted(messages, None)
            return self.template.render(fitted, add_generation_prompt=add_generation_prompt)
        except TemplateFault as fault:
            raise template_refused(self, messages, fault, "") from fault

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation, for generation. Special tokens inside contents are text; a bos never stands twice.

        Raises as `render` does, and DataError (QH-D08) for signs that would be taken for marks."""
        contents = [content for message in messages if isinstance(content := message.get("content"), str)]
        if self.template is not None and self.template.marks_generation:
            refuse_noncharacters(contents)  # two of them are its marks
        if not self.special.found_in(contents):
            ids = self.encode(self.render(messages, add_generation_prompt=add_generation_prompt))
        else:
            masked = masked_messages(self.special, messages)
            text = self.render(masked, add_generation_prompt=add_generation_prompt)
            ids, _ = self.encode_protected(self.special.restore(text))
        return ids[1:] if ids[:2] == [self.bos_id] * 2 and self.bos_id != self.eos_id else ids

    # what the folder says ------------------------------------------------------------------------------------------
    def no_template(self, what: str, where: str = "") -> DataError:
        """The error when a conversation has to be rendered and the tokenizer has no template for it (QH-D12)."""
        names, found = [*self._named_templates, *BUILT_IN], "has no chat template"
        if self._named_templates:
            found = f"has the chat templates {', '.join(self._named_templates)} and none named default"
        return DataError(
            "QH-D12",
            f"The tokenizer {found}, and {what} need one.",
            where=where,
            cause="Every model family has its own way to write turns; a wrong guess would train without an error.",
            fix=f"Set data.chat_template to one of {', '.join(names)}, or to a Jinja file.",
            context={"built_in_templates": list(BUILT_IN)},
        )

    def _id_of(self, name: str, otherwise: int) -> int:
        number = self._rust.token_to_id(self._named[name]) if name in self._named else None
        return otherwise if number is None else int(number)

    def _eos(self, files: TokenizerFiles) -> int:
        number = self._id_of("eos_token", files.eos_ids[0] if files.eos_ids else -1)
        if not 0 <= number < self.vocabulary_size:
            raise broken(Path("tokenizer_config.json"), "it names no eos_token, and a row must end with one")
        return self._within_model("eos_token", number)

    def _within_model(self, name: str, number: int) -> int:
        if not self._is_beyond_model(number):
            return number
        raise DataError(
            "QH-D13",
            f"The {name} {self._rust.id_to_token(number)!r} has id {number}; "
            f"the model has {self._model_vocabulary_size} tokens.",
            where="tokenizer_config.json",
            cause="The tokenizer has more tokens than the model's embedding.",
            fix="Use the tokenizer that belongs to the model.",
            context={"token": number},
        )

    def _is_beyond_model(self, number: int) -> bool:
        return self._model_vocabulary_size is not None and number >= self._model_vocabulary_size

    def _opening(self) -> tuple[int, ...]:
        """The ids that tokenizer.json's post-processor puts before a text: the bos, with some models more."""
        bare, whole = (self._rust.encode("a", add_special_tokens=adds).ids for adds in (False, True))
        places = range(len(whole) - len(bare) + 1)
        return tuple(whole[: next((place for place in places if whole[place : place + len(bare)] == bare), 0)])

    def _pad(self, files: TokenizerFiles, notes: list[str]) -> int:
        ends = {self.eos_id, *files.eos_ids}
        declared = self._id_of("pad_token", -1)
        if declared < 0:
            why = "the tokenizer has no pad token"
        elif declared in ends:
            why = "the tokenizer's pad token is also an end token"
        elif self._is_beyond_model(declared):
            why = f"the tokenizer's pad token has id {declared}, and the model has {self._model_vocabulary_size} tokens"
        else:
            return declared
        fallback = self._id_of("unk_token", -1)
        if fallback < 0 or fallback in ends or self._is_beyond_model(fallback):
            fallback = next(number for number in range(self.vocabulary_size) if number not in ends)
        text = self._rust.id_to_token(fallback)
        notes.append(f"{why}; id {fallback} ({text}) is used for padding, and the eos stays trained")
        return fallback

    def _variables(self) -> Mapping[str, object]:
        return {"bos_token": "", **self._named, "tokenizer_adds_bos": self.adds_bos, "eos_token": self._eos_text()}

    def _eos_text(self) -> str:
        return str(self._rust.id_to_token(self.eos_id))

    def _markers_spelled_out(self, source: str) -> str:
        """The markers of a built-in template that the tokenizer has no token for."""
        markers = dict.fromkeys(re.findall(r"<[|\w]+>", source))
        return ", ".join(marker for marker in markers if self._rust.token_to_id(marker) is None)

    def _stops(self, files: TokenizerFiles) -> tuple[int, ...]:
        stops = [self.eos_id, *files.eos_ids]
        if self.writer is not None:
            try:
                written = self.writer.write([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
            except (TemplateFault, TurnNotFound):
                return tuple(dict.fromkeys(stops))  # what the template does not take, the first row will say
            target = "".join(text for text, trained in written.pieces if trained)
            stops += [self.special.ids[token] for token in self.special.pattern.findall(target)[-1:]]
        return tuple(dict.fromkeys([*stops, *(self._for_tools.stop_ids if self._for_tools is not None else ())]))

    def _hash(self, template: str | None, tool_template: str | None) -> str:
        digest = hashlib.sha256(self._rust.to_str().encode("utf-8", "replace"))
        more = [self.opening_ids] if self.opening_ids not in ((), (self.bos_id,)) else []
        for part in (
            template or "",
            tool_template or "",
            sorted(self._ends),
            self.bos_id,
            self.eos_id,
            self.adds_bos,
            _ENCODING_VERSION,
            *more,
        ):
            digest.update(f"\0{part}".encode("utf-8", "replace"))
        return digest.hexdigest()


def chosen_template(chosen: str, named: Mapping[str, str]) -> tuple[str, str]:
    """(text, name) of a built-in template, one that the tokenizer has under a name, or a file."""
    for templates in (BUILT_IN, named):
        if chosen in templates:
            return templates[chosen], chosen
    path = named_path(chosen)
    names = ", ".join([*BUILT_IN, *named])
    if not path.is_file():
        raise DataError(
            "QH-D12",
            f"There is no chat template {chosen!r}, neither built in nor as a file.",
            where="data.chat_template",
            fix=f"Name one of {names}, or a Jinja file.",
        )
    try:
        template = read_template(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason, fix = not_utf8(error), "Save the file as UTF-8."
        raise _unreadable_template(path, reason, fix) from error
    except OSError as error:
        raise _unreadable_template(
            path, error.strerror or str(error), f"Name one of {names}, or another file."
        ) from error
    if _is_json_object(template):
        fix = "Write the template itself, what stands under chat_template, into a file that ends in .jinja."
        raise _unreadable_template(path, "it is a JSON object, which would be written around each conversation", fix)
    return template, path.name


def _is_json_object(text: str) -> bool:
    """Whether a text is one, as tokenizer_config.json and chat_template.json are; as a template it writes itself."""
    try:
        return text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _unreadable_template(path: Path, reason: str, fix: str) -> DataError:
    return DataError(
        "QH-D12",
        f"The chat template {path.name} cannot be read: {reason}.",
        where="data.chat_template",
        fix=fix,
        context={"path": str(path)},
    )


def template_refused(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    fault: Exception,
    where: str,
    row: int | None = None,
    tools: Sequence[object] | None = None,
) -> DataError:
    """The error when a template fails on a conversation (QH-D12): which row, and at which message it began to fail, or
    that its tools are at fault."""
    forms = _forms(tokenizer, messages, tools)
    if tools and _takes(tokenizer, forms, None):
        return DataError(
            "QH-D12",
            f"The chat template {tokenizer.template_name} refuses the tools of the row: {fault}.",
            where=where,
            cause="It takes the messages without them.",
            fix='Describe each tool as {"type": "function", "function": {"name": ..., "description": ..., '
            '"parameters": {...}}}, or set data.chat_template to a template that accepts them.',
            context={"row": row},
        )
    turn = _first_refused(tokenizer, forms, tools)
    roles = _roles_around(messages, turn)
    which = f"message {turn + 1} (role {messages[turn].get('role')})" if messages else "a conversation without messages"
    return DataError(
        "QH-D12",
        f"The chat template {tokenizer.template_name} refuses {which}: {fault}.",
        where=where,
        cause=f"The roles of the row are: {roles}.",
        fix="Correct the roles or the fields of the row, or set data.chat_template to a template that accepts them.",
        context={"row": row, "message": turn + 1, "roles": roles},
    )


def _forms(
    tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[object] | None
) -> list[Sequence[Message]]:
    """The messages in each form in which a template is given a row."""
    assert tokenizer.writer is not None
    contents = tokenizer.writer.contents
    return [contents.fitted(given, tools) for _, given in contents.forms_of_arguments(messages, tools)]


def _takes(tokenizer: ChatTokenizer, forms: Sequence[Sequence[Message]], tools: Sequence[object] | None) -> bool:
    """Whether the template renders the messages in one of their forms."""
    assert tokenizer.template is not None
    for messages in forms:
        with suppress(TemplateFault):
            tokenizer.template.render(messages, tools=tools)
            return True
    return False


def _first_refused(tokenizer: ChatTokenizer, forms: Sequence[Sequence[Message]], tools: Sequence[object] | None) -> int:
    """The message at which the template begins to refuse the conversation.

    What a template refuses in a beginning it refuses in what goes on from there, as it reads one message after the
    other; a template that looks at the end first may have the message told that ends the longest beginning it takes.
    """
    taken, refused = 0, len(forms[0])
    while refused - taken > 1:
        count = (taken + refused) // 2
        is_taken = _takes(tokenizer, [messages[:count] for messages in forms], tools)
        taken, refused = (count, refused) if is_taken else (taken, count)
    return max(0, refused - 1)


def _roles_around(messages: Sequence[Message], turn: int) -> str:
    """The roles of a conversation; of a long one, those about the message `turn`."""
    first, last = max(0, turn - _ROLES_SHOWN), turn + _ROLES_SHOWN + 1
    roles = [str(message.get("role"))[:_LONGEST_ROLE] for message in messages[first:last]]
    return " ".join([*(["..."] if first else []), *roles, *(["..."] if last < len(messages) else [])])
