"""Chat templates: the built-in ones, and the sandbox that renders any of them.

A template comes with a model from strangers, so it runs in Jinja's immutable sandbox, with a cap on its own size and on
its output (CVE-2024-34359 was a chat template), and in a process of its own that is ended when it takes too much
(process.py); the built-in ones run here. What a template may call is what `transformers` lets it call, less
what makes much out of little (sandbox.py), so that both render the same text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_hal.data.template.compiled import MAX_OUTPUT_FACTOR, MAX_OUTPUT_FLOOR, CompiledTemplate
from qlora_hal.data.template.process import StrangersTemplate
from qlora_hal.data.template.sandbox import TemplateFault, TooMuch, encloses_generation
from qlora_hal.data.template.turn_marks import Rendering
from qlora_hal.errors import DataError, UnsafeInputError
from qlora_hal.files.opening import read_stored

MAX_TEMPLATE_BYTES = 64 * 2**10

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The names of a message's reasoning, in the order in which transformers looks for it."""

BUILT_IN: Mapping[str, str] = {
    "chatml": (
        "{% if tokenizer_adds_bos %}{{ bos_token }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% set turns = messages %}{% set opening = '' %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set turns = messages[1:] %}{% set opening = messages[0]['content'] + '\\n\\n' %}"
        "{% endif %}"
        "{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must take turns, the user first') }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + (opening if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant may speak after the system message') }}"
        "{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}"
        "{% set turns = messages %}{% set opening = '' %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set turns = messages[1:] %}{% set opening = messages[0]['content'] + '\\n\\n' %}"
        "{% endif %}"
        "{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must take turns, the user first') }}"
        "{% endif %}"
        "{% set speaker = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + speaker + '\\n' + (opening if loop.first else '') }}"
        "{{ message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "phi3": (
        "{% if tokenizer_adds_bos %}{{ bos_token }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% if tokenizer_adds_bos %}{{ bos_token }}{% endif %}"
        "{% set turns = messages %}"
        "{% if messages[0]['role'] == 'system' %}"
        "{% set turns = messages[1:] %}{{ messages[0]['content'] + '\\n\\n' }}"
        "{% else %}"
        "{{ 'Below is an instruction that describes a task. Write a response that completes it.\\n\\n' }}"
        "{% endif %}"
        "{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must take turns, the user first') }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "plain": (
        "{% if tokenizer_adds_bos %}{{ bos_token }}{% endif %}"
        "{% for message in messages %}"
        "{{ message['role'] + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
}
"""Templates by name, for a tokenizer that has none."""


__all__ = ["BUILT_IN", "MAX_TEMPLATE_BYTES", "ChatTemplate", "TemplateFault", "read_template"]


class ChatTemplate:
    """One compiled template. `source` is its text, `name` what a message calls it."""

    def __init__(self, source: str, name: str, variables: Mapping[str, object]) -> None:
        """Raises DataError (QH-D12) when the template is no Jinja, UnsafeInputError (QH-X04) when it is too large."""
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise _too_large(name, f"has {len(source)} characters")
        self.source, self.name = source, name
        self._variables = dict(variables)
        try:
            self._compiled = (CompiledTemplate if source in BUILT_IN.values() else StrangersTemplate)(source)
        except TooMuch as error:
            raise _too_much(name, error) from error
        except TemplateFault as error:
            raise DataError(
                "QH-D12",
                f"The chat template {name} is not a valid Jinja template ({error}).",
                where="data.chat_template",
                fix=f"Correct it, or name a built-in one: {', '.join(BUILT_IN)}.",
            ) from error

    @property
    def marks_generation(self) -> bool:
        """Whether the template encloses what the assistant says in `{% generation %}`."""
        return encloses_generation(self.source)

    @property
    def offers_prompt(self) -> bool:
        """Whether the template can open the assistant's turn for generation."""
        return "add_generation_prompt" in self.source

    def mentions(self, name: str) -> bool:
        """Whether the template's text has this word, without which it cannot write the field of that name."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    @property
    def tells_date(self) -> bool:
        return "strftime_now" in self.source

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode("utf-8", "replace")).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[object] | None = None,
    ) -> str:
        """The text. Raises TemplateFault, UnsafeInputError."""
        return self.trace(messages, add_generation_prompt=add_generation_prompt, tools=tools).text

    def trace(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[object] | None = None,
    ) -> Rendering:
        """The text, and where each message stands in it. Raises TemplateFault, UnsafeInputError."""
        messages = [with_reasoning_named(message) for message in messages]
        variables = {
            **self._variables,
            "messages": messages,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        most = MAX_OUTPUT_FLOOR + MAX_OUTPUT_FACTOR * _characters(messages, tools)
        try:
            return self._compiled.render(variables, turns=len(messages), most=most)
        except TooMuch as error:
            raise _too_much(self.name, error) from error


def read_template(path: Path) -> bytes:
    """The bytes of a template's file. Raises UnsafeInputError (QH-X04) when they are too many, OSError."""
    raw = read_stored(path, MAX_TEMPLATE_BYTES)
    if len(raw) > MAX_TEMPLATE_BYTES:
        raise _too_large(path.name, f"has {path.stat().st_size} bytes")
    return raw


def _too_large(name: str, size: str) -> UnsafeInputError:
    return UnsafeInputError(
        "QH-X04",
        f"The chat template {name} {size}; the limit is {MAX_TEMPLATE_BYTES} bytes.",
        where="data.chat_template",
        fix=f"Name a built-in template in data.chat_template: {', '.join(BUILT_IN)}.",
    )


def with_reasoning_named(message: Mapping[str, object]) -> dict[str, object]:
    """A copy of the message in which `reasoning_content` and `thinking` are filled from whichever of these and
    `reasoning` is there, as transformers does: one thing, and each family of templates reads it by another name."""
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _characters(messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None) -> int:
    known = sum(str.__len__(value) for message in messages for value in message.values() if isinstance(value, str))
    nested = any(not isinstance(value, str) for message in messages for value in message.values())
    return known + (len(json.dumps([*messages, tools], default=str)) if nested or tools else 0)


def _too_much(name: str, reason: TooMuch) -> UnsafeInputError:
    return UnsafeInputError(
        "QH-X04",
        f"The chat template {name} {reason}.",
        where="data.chat_template",
        fix=f"Name a built-in template in data.chat_template: {', '.join(BUILT_IN)}.",
    )
