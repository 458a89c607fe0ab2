"""Chat templates: the built-in ones, and the sandbox that renders any of them.

A template comes with a model from strangers, so it runs in Jinja's immutable sandbox, with a cap on its own size and on
its output (CVE-2024-34359 was a chat template). What a template may call is what `transformers` lets it call, so that
both render the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from qlora_hal.errors import DataError, UnsafeInputError

MAX_TEMPLATE_BYTES = 64 * 2**10
MAX_OUTPUT_FACTOR, MAX_OUTPUT_FLOOR = 16, 2**16
"""A template may write 16 times what it was given, and 64 Ki characters in any case."""

TEMPLATE_DATE = date(2024, 7, 26)
"""What `strftime_now` tells: one fixed day (the one that Llama 3.2's template falls back to), for a run that renders
the date of its preparation cannot be repeated."""

GENERATION_START, GENERATION_END = "\ufdd3", "\ufdd4"
"""Unicode noncharacters around what a template encloses in `{% generation %}`."""

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


class TemplateFault(Exception):
    """A template refused or failed on these messages."""


class ChatTemplate:
    """One compiled template. `source` is its text, `name` what a message calls it."""

    def __init__(self, source: str, name: str, variables: Mapping[str, object]) -> None:
        """Raises DataError (QH-D12) when the template is no Jinja, UnsafeInputError (QH-X04) when it is too large."""
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise UnsafeInputError(
                "QH-X04",
                f"The chat template {name} has {len(source)} characters; the limit is {MAX_TEMPLATE_BYTES} bytes.",
                where="data.chat_template",
                fix=f"Name a built-in template in data.chat_template: {', '.join(BUILT_IN)}.",
            )
        self.source, self.name = source, name
        self._variables = dict(variables)
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(
                "QH-D12",
                f"The chat template {name} is no Jinja template ({error}).",
                where="data.chat_template",
                fix=f"Correct it, or name a built-in one: {', '.join(BUILT_IN)}.",
            ) from error

    @property
    def marks_generation(self) -> bool:
        """Whether the template encloses what the assistant says in `{% generation %}`."""
        return "endgeneration" in self.source

    @property
    def offers_prompt(self) -> bool:
        """Whether the template can open the assistant's turn for generation."""
        return "add_generation_prompt" in self.source

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
        """The text, with generation marks where the template sets them. Raises TemplateFault, UnsafeInputError."""
        budget = MAX_OUTPUT_FLOOR + MAX_OUTPUT_FACTOR * _size(messages, tools)
        pieces: list[str] = []
        try:
            for piece in self._compiled.generate(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                pieces.append(piece)
                budget -= len(piece)
                if budget < 0:
                    raise _too_much(self.name)
        except _OutputLimit as error:
            raise _too_much(self.name) from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise TemplateFault(str(error) or type(error).__name__) from error
        return "".join(pieces)


def _size(messages: Sequence[Mapping[str, object]], tools: Sequence[object] | None) -> int:
    known = sum(str.__len__(value) for message in messages for value in message.values() if isinstance(value, str))
    nested = any(not isinstance(value, str) for message in messages for value in message.values())
    return known + (len(json.dumps([*messages, tools], default=str)) if nested or tools else 0)


def _too_much(name: str) -> UnsafeInputError:
    return UnsafeInputError(
        "QH-X04",
        f"The chat template {name} writes more than {MAX_OUTPUT_FACTOR} times its input.",
        where="data.chat_template",
        fix=f"Name a built-in template in data.chat_template: {', '.join(BUILT_IN)}.",
    )


class _OutputLimit(Exception):
    """One expression made more text than any row has."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with the operators that can blow up a string bounded."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and any(len(run) > 4 for run in _digit_runs(left)):
            raise _OutputLimit
        if operator == "*" and (_is_long(left, right) or _is_long(right, left)):
            raise _OutputLimit
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise _OutputLimit
        return super().call_binop(context, operator, left, right)


def _digit_runs(text: str) -> list[str]:
    return "".join(sign if sign.isdigit() else " " for sign in text).split()


def _is_long(sequence: object, times: object) -> bool:
    return isinstance(sequence, str | list | tuple) and isinstance(times, int) and len(sequence) * times > 2**16


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what stands inside is enclosed in marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: jinja2.runtime.Macro) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class _Namespace(jinja2.utils.Namespace):
    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not store {name!r}")
        super().__setitem__(name, value)


def _environment() -> jinja2.Environment:
    # trim_blocks, lstrip_blocks and the loop controls are what transformers renders with.
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
    environment.globals["namespace"] = _Namespace
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML signs, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
