"""What a chat template writes is the truth: the row's ids are transformers', what is trained is the whole turn of the
assistant, and what the text does not hold is told."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.data import ChatTokenizer, PreparedData
from qlora_hal.data.template.chat_template import ChatTemplate
from qlora_hal.errors import DataError, ModelError

Prepare = Callable[..., PreparedData]
Trained = Callable[..., list[str]]
Message = dict[str, Any]

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|observation|>", "[THINK]"),
    *("<|header_start|>", "<|header_end|>", "<|eot|>", "<end_of_utterance>"),
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "rain", "description": "tells rain", "parameters": {"type": "object", "properties": {}}},
    }
]
LEAVING_OUT = "not written by the template"


def call(name: str = "rain", number: int = 1, **arguments: object) -> Message:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def said(role: str, content: object = None, **more: object) -> Message:
    return {"role": role, **({} if content is None else {"content": content}), **more}


ASKED = said("user", "Is it raining in Oslo?")
RESULT = said("tool", "no", tool_call_id="c1")
DRY = said("assistant", "No, it is dry.")


@dataclass(frozen=True)
class Rendered:
    """One row as it is trained, beside what transformers writes for it."""

    data: PreparedData
    text: str
    trained: list[str]
    ids: list[int]
    theirs: Callable[..., Any]

    @property
    def alerts(self) -> list[str]:
        return list(self.data.report.alerts)

    @property
    def notes(self) -> list[str]:
        return list(self.data.report.train.notes)


Render = Callable[..., Rendered]


@pytest.fixture(scope="session")
def base(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder without a template; its special tokens are those of several families."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folders["bare"] / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def render(base: Path, tmp_path: Path, prepared: Prepare, trained_text: Trained) -> Render:
    """Prepare one row with a template (or what tokenizer_config.json holds in its place), as transformers reads it."""

    def run(
        template: object,
        messages: Sequence[Message],
        tools: Sequence[object] | None = None,
        *,
        eos: str = "<|im_end|>",
        ends: Sequence[str] = (),
        files: Mapping[str, str] | None = None,
        chosen: str | None = None,
        **settings: object,
    ) -> Rendered:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": "<|endoftext|>"}
        if template is not None:
            config["chat_template"] = template  # type: ignore[assignment]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        for name, text in (files or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        if ends:
            numbers = ChatTokenizer.from_folder(folder).special.ids
            ids = [numbers[token] for token in ends]
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        tokenizer = ChatTokenizer.from_folder(folder, chat_template=chosen)
        row = {"messages": list(messages), **({"tools": tools} if tools is not None else {})}
        data = prepared([row], tokenizer=tokenizer, **settings)
        ids = data.train.row(0)[0].tolist()

        def theirs(given: Sequence[Message] = messages, **more: object) -> Any:
            from transformers import AutoTokenizer

            loaded: Any = AutoTokenizer.from_pretrained(str(folder))
            return loaded.apply_chat_template(list(given), tools=tools, return_dict=False, **more)

        text = tokenizer.decode(ids, skip_special_tokens=False)
        return Rendered(data, text, trained_text(data, tokenizer), ids, theirs)

    return run


# whole turns ---------------------------------------------------------------------------------------------------------

# Tools, calls and results, reasoning in the last turn alone: as many families write them.
CALLING = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content or '' }}"
    "{% for one in m.tool_calls or [] %}"
    "{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<call>' + ({'name': one.function.name, 'arguments': one.function.arguments} | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3 does: the last turn has a thinking part in any case, so a turn changes when another follows.
REWRITING = CALLING.replace("and m.reasoning_content and", "and").replace("m.reasoning_content", "(m.thinking or '')")
RAIN = '<call>{"name": "rain", "arguments": {"town": "Oslo"}}</call>'
TIME = '<call>{"name": "time", "arguments": {}}</call>'
END = "<|im_end|>"


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (said("assistant", "I will check.", tool_calls=[call(town="Oslo")]), f"I will check.\n{RAIN}{END}"),
        (said("assistant", "", tool_calls=[call(town="Oslo")]), f"{RAIN}{END}"),
        (said("assistant", None, tool_calls=[call(town="Oslo")]), f"{RAIN}{END}"),
        (said("assistant", "Both.", tool_calls=[call(town="Oslo"), call("time", 2)]), f"Both.\n{RAIN}\n{TIME}{END}"),
        (said("assistant", "<call>", tool_calls=[call(town="Oslo")]), f"<call>\n{RAIN}{END}"),
        (said("assistant", "  I will check.\n", tool_calls=[call(town="Oslo")]), f"  I will check.\n\n{RAIN}{END}"),
    ],
)
@pytest.mark.parametrize(("source", "thought"), [(CALLING, ""), (REWRITING, "<think></think>")])
def test_a_turn_with_calls_is_trained_whole_and_nothing_is_put_into_the_text(
    source: str, thought: str, turn: Message, expected: str, render: Render
) -> None:
    found = render(source, [ASKED, turn, RESULT, DRY], TOOLS)
    assert found.trained == [expected, f"{thought}No, it is dry.{END}"]
    assert found.ids == found.theirs(tokenize=True)
    last = render(source, [ASKED, turn], TOOLS)
    assert last.trained == [thought + expected]
    assert last.ids == last.theirs(tokenize=True)


def test_reasoning_is_trained_where_the_template_writes_it_and_told_where_it_does_not(render: Render) -> None:
    thought = said("assistant", "Four.", reasoning_content="2+2=4")
    found = render(CALLING, [said("user", "Two and two?"), thought])
    assert found.trained == [f"<think>2+2=4</think>Four.{END}"]
    assert found.alerts == []
    found = render(CALLING, [said("user", "Two and two?"), thought, said("user", "Sure?"), said("assistant", "Yes.")])
    assert found.trained == [f"Four.{END}", f"Yes.{END}"]
    assert found.ids == found.theirs(tokenize=True)
    assert found.alerts == [f"reasoning: {LEAVING_OUT} (1 rows)"]


@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_is_one_thing_under_any_of_its_names(given: str, read: str, render: Render) -> None:
    """transformers fills one in from another too, but not every allowed release does: it is given what is read."""
    source, asked = CALLING.replace("reasoning_content", read), said("user", "Two and two?")
    found = render(source, [asked, said("assistant", "Four.", **{given: "2+2=4"})])
    assert found.trained == [f"<think>2+2=4</think>Four.{END}"]
    assert found.ids == found.theirs([asked, said("assistant", "Four.", **{read: "2+2=4"})], tokenize=True)
    assert found.alerts == []


def test_a_turn_without_loss_leaves_the_other_turns_whole(render: Render) -> None:
    turn = said("assistant", "I will check.", tool_calls=[call(town="Oslo")], weight=0)
    assert render(CALLING, [ASKED, turn, RESULT, DRY], TOOLS).trained == [f"No, it is dry.{END}"]


@pytest.mark.parametrize(
    ("reads", "given", "form"),
    [
        ("one.function.arguments.items() | list", '{"town": "Oslo"}', "objects"),
        ("one.function.arguments + ''", {"town": "Oslo"}, "text"),
    ],
)
def test_arguments_are_given_in_the_form_that_a_template_takes_with_a_note(
    reads: str, given: object, form: str, render: Render
) -> None:
    source = CALLING.replace("one.function.arguments", reads)
    turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": given}}])
    found = render(source, [ASKED, turn])
    assert "Oslo" in found.trained[0]
    assert (
        f"the arguments of calls were given to the template as {form} in 1 rows: it accepts no other form"
        in found.notes
    )


WITHOUT_QUOTES = CALLING.replace(
    "({'name': one.function.name, 'arguments': one.function.arguments} | tojson)",
    "one.function.name ~ ' ' ~ (one.function.arguments if one.function.arguments is string "
    "else one.function.arguments | tojson)",
)


@pytest.mark.parametrize("arguments", [{"town": "Oslo", "days": 2}, {"a": {"b": ['"', "\\"]}}, {}])
def test_arguments_as_text_are_trained_as_the_object_they_hold_where_they_would_be_quoted(
    arguments: dict[str, object], render: Render
) -> None:
    def calling(given: object) -> list[Message]:
        return [ASKED, said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": given}}])]

    found = render(CALLING, calling(json.dumps(arguments)))
    assert found.ids == render(CALLING, calling(arguments)).ids
    assert found.notes == [
        "the arguments of calls were given to the template as objects in 1 rows: "
        "it would write their JSON text as a string, in quotes"
    ]
    text = json.dumps(arguments, separators=(" ,", ": "))
    written = render(WITHOUT_QUOTES, calling(text))
    assert f"<call>rain {text}</call>" in written.text
    assert written.notes == []
    assert written.ids == written.theirs(tokenize=True)


def test_text_that_is_no_object_stays_the_text_that_it_is(render: Render) -> None:
    for text in ("Oslo", '{"town": NaN}', '["Oslo"]'):
        turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": text}}])
        found = render(CALLING, [ASKED, turn])
        assert json.dumps(text) in found.trained[0]
        assert found.notes == []


# where a turn begins and ends ----------------------------------------------------------------------------------------

OPENING_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_what_a_generation_prompt_holds_is_never_trained(render: Render) -> None:
    messages = [said("user", "a"), said("assistant", "<b>"), said("user", "c"), said("assistant", "d", thinking="e")]
    found = render(OPENING_THOUGHT, messages)
    assert found.trained == [f"<b>{END}", f"e\n</think>\n\nd{END}"]
    assert found.ids == found.theirs([*messages[:-1], said("assistant", "d", reasoning_content="e")], tokenize=True)


def test_a_long_conversation_is_rendered_a_bounded_number_of_times_with_the_same_result(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each turn would take time that grows with the square of its length."""
    prompted = []
    trace = ChatTemplate.trace

    def counted(self: ChatTemplate, messages: Sequence[Message], **how: Any) -> Any:
        prompted.append(bool(how.get("add_generation_prompt")))
        return trace(self, messages, **how)

    monkeypatch.setattr(ChatTemplate, "trace", counted)
    turns = [said("user", "ask") if number % 2 == 0 else said("assistant", f"answer {number}") for number in range(400)]
    found = render(CALLING, turns, max_seq_length=20_000)
    assert found.trained == [f"answer {number}{END}" for number in range(1, 400, 2)]
    assert 0 < sum(prompted) < 200


def test_an_empty_thinking_part_that_the_template_writes_is_trained_and_noted(render: Render) -> None:
    source = OPENING_THOUGHT.replace("assistant\n<think>\n' }}{% endif %}", "assistant\n' }}{% endif %}")
    asked = said("user", "Two and two?")
    found = render(source, [asked, said("assistant", "Four.")])
    assert found.trained == [f"<think>\n\n</think>\n\nFour.{END}"]
    assert any("writes an empty <think></think> into 1 answers; it is trained" in note for note in found.notes)
    for answer in (said("assistant", "Four.", reasoning="2+2"), said("assistant", "Four.", weight=0)):
        found = render(source, [asked, said("assistant", "One."), asked, answer])
        assert not any("empty <think>" in note for note in found.notes)


# As Mistral's does: no generation prompt, and no mark of the role; a call opens with a token of its own.
NO_PROMPT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[RESULT] ' + m.content + '[/RESULT]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [{\"name\": \"' + m.tool_calls[0].function.name + '\"}]' + eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# The role is written, and a thought where there is one, or in any case.
ROLE_WITHOUT_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}{{ m.content }}"
    "{% for one in m.tool_calls or [] %}{{ '<call>' + one.function.name + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
EMPTY_PROMPT = ROLE_WITHOUT_PROMPT + "{% if add_generation_prompt %}{{ '' }}{% endif %}"
ALWAYS_THINKING = ROLE_WITHOUT_PROMPT.replace("m.reasoning_content %}", "m.role == 'assistant' %}").replace(
    "'<think>\n' + m.reasoning_content", "'<think>\n' + (m.reasoning_content or '')"
)
OWN_HEADERS = ROLE_WITHOUT_PROMPT.replace("<|im_start|>' + m.role", "## ' + m.role | capitalize")


def test_the_beginning_of_a_call_is_trained_where_a_template_has_no_generation_prompt(render: Render) -> None:
    turn = said("assistant", "", tool_calls=[call()])
    found = render(NO_PROMPT, [ASKED, turn, RESULT, DRY])
    assert found.trained == ['[TOOL_CALLS] [{"name": "rain"}]<|im_end|>', f" No, it is dry.{END}"]
    assert found.ids == found.theirs(tokenize=True)


@pytest.mark.parametrize("source", [ROLE_WITHOUT_PROMPT, EMPTY_PROMPT, OWN_HEADERS])
def test_of_a_turn_only_its_role_is_not_trained_where_nothing_prompts_for_it(source: str, render: Render) -> None:
    thought, turn = said("assistant", "Look.", thinking="how?"), said("assistant", "", tool_calls=[call()])
    found = render(source, [ASKED, thought, ASKED, turn, RESULT, DRY])
    assert found.trained == [
        f"<think>\nhow?\n</think>\nLook.{END}",
        f"<call>rain</call>{END}",
        f"No, it is dry.{END}",
    ]


def test_a_thinking_part_in_every_turn_is_for_the_model_to_open_where_nothing_prompts_for_it(render: Render) -> None:
    messages = [ASKED, DRY, ASKED, said("assistant", "No.", thinking="how?")]
    found = render(ALWAYS_THINKING, messages)
    assert found.trained == [
        f"<think>\n\n</think>\nNo, it is dry.{END}",
        f"<think>\nhow?\n</think>\nNo.{END}",
    ]


@pytest.mark.parametrize("source", [NO_PROMPT, ROLE_WITHOUT_PROMPT])
def test_generation_marks_alone_decide_where_nothing_prompts_for_a_turn(source: str, render: Render) -> None:
    marked = source.replace("{{ '[TOOL", "{% generation %}{{ '[TOOL").replace(
        " }}{% else %}{{ ' ' + m.content + eos_token }}",
        " }}{% endgeneration %}{% else %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}",
    )
    if source == ROLE_WITHOUT_PROMPT:
        marked = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.role + m.content }}{% else %}"
        marked += "{% generation %}" + source.removeprefix("{% for m in messages %}").removesuffix("{% endfor %}")
        marked += "{% endgeneration %}{% endif %}{% endfor %}"
    found = render(marked, [ASKED, said("assistant", "", tool_calls=[call()]), RESULT, DRY])
    theirs = found.theirs(tokenize=True)
    assert found.ids == theirs
    begins = "<|im_start|>assistant\n" if source == ROLE_WITHOUT_PROMPT else ""
    assert [text.startswith(begins) for text in found.trained] == [True, True]
    assert found.trained[0].removeprefix(begins).startswith(("[TOOL_CALLS]", "<call>"))


# As GLM's does: a turn ends where the next message begins.
NO_END = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|observation|>' }}{% else %}{{ '<|' + m.role + '|>' }}{% endif %}"
    "{{ '\n' + (m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content) }}"
    "{% for one in m.tool_calls or [] %}{{ '<call>' + one.function.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = [
    said("user", "Hi"),
    said("assistant", "<think>one</think>Hello."),
    said("user", "Bye"),
    said("assistant", "<think>two</think>See you."),
]


def test_all_turns_end_with_the_models_end_tokens_where_the_next_message_begins_with_one(render: Render) -> None:
    ends = ("<|endoftext|>", "<|user|>", "<|observation|>")
    found = render(NO_END, THINKING, eos="<|endoftext|>", ends=ends)
    assert found.trained == ["\nHello.<|user|>", "\n<think>two</think>See you.<|user|>"]
    assert found.ids[:-1] == found.theirs(tokenize=True)
    turn = said("assistant", "", tool_calls=[call()])
    found = render(NO_END, [ASKED, turn, RESULT, DRY], eos="<|endoftext|>", ends=ends)
    assert found.trained == ["\n<call>rain<|observation|>", "\nNo, it is dry.<|user|>"]
    assert render(NO_END, [ASKED, turn], eos="<|endoftext|>", ends=ends).trained == ["\n<call>rain<|observation|>"]


def test_the_next_messages_token_ends_no_turn_where_the_model_does_not_end_with_it(render: Render) -> None:
    found = render(NO_END, THINKING, eos="<|endoftext|>")
    assert found.trained == ["\nHello.", "\n<think>two</think>See you.<|endoftext|>"]
    assert found.ids[:-1] == found.theirs(tokenize=True)
    unfinished = render(NO_END, [*THINKING, said("user", "Wait")], eos="<|endoftext|>")
    assert unfinished.ids == unfinished.theirs(tokenize=True)


def test_an_end_token_behind_the_whole_conversation_ends_no_single_turn(render: Render) -> None:
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    found = render(source, messages, eos="<|endoftext|>")
    assert found.trained == ["b<|im_end|>", "d<|im_end|>"]
    assert found.ids == found.theirs(tokenize=True)


def test_a_last_turn_that_ends_otherwise_is_trained_as_it_stands(render: Render) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '<|endoftext|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    found = render(source, messages)
    assert found.trained == ["\nb<|im_end|>", "\nd<|endoftext|>"]
    assert found.ids == found.theirs(tokenize=True)


# As Gemma 4 does: what a tool answers is written in the turn that called it, and the next turn goes on there.
WITHIN = (
    "{% for m in messages %}{% if m.role != 'tool' %}"
    "{% if not (loop.index0 and messages[loop.index0 - 1].role == 'tool') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% endif %}"
    "{% for one in m.tool_calls or [] %}{{ '<call>' + one.function.name + '<|observation|>' }}"
    "{% for answer in messages[loop.index0 + 2:loop.index0 + 3] if answer.role == 'tool' %}"
    "{{ answer.content + '|' }}{% endfor %}{% endfor %}{{ m.content }}"
    "{% if not m.tool_calls %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_tools_answer_inside_the_assistants_turn_is_not_trained(render: Render) -> None:
    turn = said("assistant", "", tool_calls=[call()])
    found = render(WITHIN, [ASKED, turn, RESULT, DRY])
    assert "<call>rain<|observation|>no|No, it is dry.<|im_end|>" in found.text
    assert found.trained == ["<call>rain<|observation|>", "No, it is dry.<|im_end|>"]
    assert found.ids == found.theirs(tokenize=True)
    with pytest.raises(DataError, match=r"QH-D12.*message 2 \(role assistant\).*place cannot be determined"):
        render(WITHIN, [ASKED, {**turn, "content": "I will check."}, RESULT, DRY])
    everything = render(WITHIN, [ASKED, {**turn, "content": "I will check."}, RESULT, DRY], train_on="all")
    assert everything.ids == everything.theirs(tokenize=True)


@pytest.mark.parametrize(
    "body",
    [
        "{% set out = namespace(text='') %}{% for m in messages %}"
        "{% set out.text = out.text + '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' %}{% endfor %}"
        "{{ out.text }}",
        "{% macro one(m) %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endmacro %}"
        "{% for number in range(messages | length) %}{{ one(messages[number]) }}{% endfor %}",
        "{% for m in messages %}{% for other in messages %}{% if other.role == 'x' %}{% break %}{% endif %}{% endfor %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% if loop.last %}{% continue %}{% endif %}"
        "{% endfor %}{% for m in messages %}{% endfor %}",
        "{% filter trim %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% endfilter %}{{ '\n' }}",
        "{% for m in messages recursive %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
        "{% set rest = messages[1:] %}{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n' }}"
        "{% for m in rest %}{{ '<|im_start|>' + m['role'] + '\n' ~ m['content'] | trim ~ '<|im_end|>\n' }}{% endfor %}",
    ],
)
def test_turns_are_found_however_a_template_goes_through_its_messages(body: str, render: Render) -> None:
    messages = [said("user", "a"), said("assistant", "b"), said("user", "b"), said("assistant", "b")]
    source = body + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    found = render(source, messages)
    assert found.trained == [f"b{END}", f"b{END}"]
    assert found.ids == found.theirs(tokenize=True)


def test_generation_marks_say_what_of_a_turn_is_trained(render: Render) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' }}{% endgeneration %}{{ '(thought)' }}"
        "{% generation %}{% for word in m.content.split() %}{{ word + ' ' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endgeneration %}{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [said("user", "a"), said("assistant", "b c"), said("user", "d"), said("assistant", "e")]
    found = render(source, messages)
    assert found.trained == [f"b c {END}", f"e {END}"]
    one = "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}"
    marked = "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
        + marked
        + "{% elif m.role == 'assistant' %}"
        "" + one + "{% else %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    found = render(source, messages)
    assert found.trained == [f"e{END}"]
    assert found.alerts == ["assistant turns that the template does not enclose in {% generation %}, without loss: 1"]


# which template, and in which form -----------------------------------------------------------------------------------

NO_TOOLS = CALLING.replace("tools", "nothing")
FORMS = {
    "list": [{"name": "default", "template": NO_TOOLS}, {"name": "tool_use", "template": CALLING}],
    "mapping": {"default": NO_TOOLS, "tool_use": CALLING},
    "list without default": [{"name": "tool_use", "template": CALLING}],
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_rows_with_tools_take_the_template_for_tools(form: str, render: Render) -> None:
    found = render(FORMS[form], [ASKED, DRY], TOOLS)
    assert "tells rain" in found.text
    assert found.ids == found.theirs(tokenize=True)
    assert found.alerts == []
    assert found.data.report.train.notes[-1] == "1 rows with tools use the tokenizer's template tool_use"


def test_templates_in_files_of_their_own_are_found(render: Render) -> None:
    files = {"chat_template.jinja": NO_TOOLS, "additional_chat_templates/tool_use.jinja": CALLING}
    found = render("of the configuration", [ASKED, DRY], TOOLS, files=files)
    assert "tells rain" in found.text
    assert found.ids == found.theirs(tokenize=True)
    assert "tells rain" not in render(None, [ASKED, DRY], files=files).text


def test_rows_without_tools_need_a_template_of_their_own(render: Render) -> None:
    with pytest.raises(DataError, match=r"QH-D12.*has the chat templates tool_use and none named") as caught:
        render(FORMS["list without default"], [ASKED, DRY])
    assert "tool_use, chatml" in caught.value.fix
    assert render(FORMS["list without default"], [ASKED, DRY], chosen="tool_use").trained == [f"No, it is dry.{END}"]
    assert "tells rain" not in render(FORMS["list"], [ASKED, DRY], TOOLS, chosen="chatml").text


@pytest.mark.parametrize(
    "source", [NO_TOOLS, CALLING.replace("{% for tool in tools %}{{ tool | tojson }}{% endfor %}", "You have tools.")]
)
def test_tools_that_no_template_writes_are_told(source: str, render: Render) -> None:
    found = render(source, [ASKED, DRY], TOOLS)
    assert found.alerts == [f"tools: {LEAVING_OUT} (1 rows)"]
    assert found.ids == found.theirs(tokenize=True)
    assert render(source, [ASKED, DRY], []).alerts == []


def test_tools_and_calls_are_missed_also_where_a_template_takes_no_words_but_its_own(render: Render) -> None:
    picky = (
        "{% for m in messages %}{% for one in m.tool_calls or [] if one.function.name not in ('rain', 'time') %}"
        "{{ raise_exception('an unknown tool') }}{% endfor %}{% endfor %}"
    )
    both = said("assistant", "", tool_calls=[call(town="Oslo"), call("time", 2)])
    found = render(picky + CALLING, [ASKED, both, said("tool", "no"), DRY], TOOLS)
    assert (found.trained[0], found.alerts) == (f"{RAIN}\n{TIME}{END}", [])
    found = render(
        picky + NO_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), [ASKED, both, DRY], TOOLS
    )
    assert found.trained == [f"No, it is dry.{END}"]
    assert found.alerts[:2] == [f"tool_calls: {LEAVING_OUT} (1 rows)", f"tools: {LEAVING_OUT} (1 rows)"]
    one = CALLING.replace("for tool in tools", "for tool in tools[:1]")
    more = [*TOOLS, {"type": "function", "function": {"name": "time", "description": "tells time", "parameters": {}}}]
    assert render(one, [ASKED, DRY], more).alerts == [f"tools: {LEAVING_OUT} (1 rows)"]


PARTS = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(("asked", "answer"), [(parts("Name a colour."), parts("Red.")), ("Name a colour.", "Red.")])
def test_a_template_that_goes_through_parts_is_given_parts(asked: object, answer: object, render: Render) -> None:
    found = render(PARTS, [said("user", asked), said("assistant", answer)])
    assert found.trained == [f" Red.{END}"]
    in_parts = [said("user", parts("Name a colour.")), said("assistant", parts("Red."))]
    assert found.ids == found.theirs(in_parts, tokenize=True)
    assert found.alerts == []


def test_the_prompt_of_a_template_that_goes_through_parts_is_the_trained_one(render: Render, tmp_path: Path) -> None:
    found = render(PARTS, [said("user", "a"), said("assistant", "b")])
    tokenizer = ChatTokenizer.from_folder(tmp_path / "model")
    prompt = tokenizer.render([said("user", "a")], add_generation_prompt=True)
    assert found.text == prompt + f" b{END}\n"
    assert tokenizer.special.ids[END] in tokenizer.stop_ids


def test_parts_stay_parts_where_the_template_takes_both(render: Render) -> None:
    both = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content | trim }}"
        "{% else %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = render(both, [said("user", "a"), said("assistant", parts("b ", " c"))])
    assert found.trained == [f"bc{END}"]
    assert found.ids == found.theirs(tokenize=True)


@pytest.mark.parametrize(
    "write",
    [
        "m.content",
        "m.content if m.content is string else ''",
        "m.content if m.content is string else m.content | tojson",
        "m.content | trim",
    ],
)
def test_parts_become_a_text_where_the_template_takes_texts(write: str, render: Render) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' ~ (" + write + ") ~ '<|im_end|>\n' }}{% endfor %}"
    )
    found = render(source, [said("user", "a"), said("assistant", parts("b ", "c"))])
    assert found.trained == [f"b c{END}"]
    assert found.alerts == []


# what is left out ----------------------------------------------------------------------------------------------------

TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_messages_that_the_template_does_not_write_are_told_by_role(
    prepared: Prepare, render: Render, tmp_path: Path
) -> None:
    looked = [said("user", "I know it rains?"), said("assistant", "Let me look."), said("tool", "no"), DRY]
    french = [said("developer", "Answer in French."), said("user", "Hello"), said("assistant", "Bonjour.")]
    found = render(TWO_ROLES, looked)
    assert found.alerts == [f"1 message is {LEAVING_OUT}: tool 1"]
    assert found.trained == ["Let me look.<|im_end|>", "No, it is dry.<|im_end|>"]
    assert found.ids == found.theirs(tokenize=True)
    rows = [{"messages": looked}, {"messages": french}, {"messages": [said("system", "Be brief."), *french[1:]]}]
    tokenizer = ChatTokenizer.from_folder(tmp_path / "model")
    assert prepared(rows, tokenizer=tokenizer).report.alerts == [
        f"3 messages are {LEAVING_OUT}: tool 1, developer 1, system 1"
    ]
    assert prepared(rows[2:], tokenizer=tokenizer).report.alerts == [f"1 message is {LEAVING_OUT}: system 1"]


def test_a_message_that_is_moved_is_not_told(render: Render) -> None:
    moved = (
        "{% set first = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|user|>' + first + ' ' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    found = render(moved, [said("system", "Be brief."), said("user", "Hello"), said("assistant", "Hi.")])
    assert found.alerts == []
    assert found.trained == ["Hi.<|im_end|>"]


def test_a_part_of_a_message_that_is_left_out_is_told(render: Render) -> None:
    source = CALLING.replace("m.content or ''", "(m.content or '').split('</think>')[-1]")
    found = render(source, THINKING)
    assert found.trained == [f"Hello.{END}", f"See you.{END}"]
    assert found.alerts == [f"parts of 2 messages are {LEAVING_OUT}: assistant 2"]
    cut = CALLING.replace("m.content or ''", "(m.content or '')[:9]")
    found = render(cut, [said("user", "Count."), said("assistant", "one\ntwo\nthree\nfour")])
    assert found.alerts == [f"parts of 1 message are {LEAVING_OUT}: assistant 1"]
    strict = CALLING.replace("m.content or ''", "m.content or '' if not m.tool_calls else ''")
    found = render(strict, [ASKED, said("assistant", "I will check.", tool_calls=[call(town="Oslo")]), RESULT, DRY])
    assert found.trained[0] == f"\n{RAIN}{END}"
    assert f"parts of 1 message are {LEAVING_OUT}: assistant 1" in found.alerts


def test_a_content_that_is_only_laid_out_anew_is_not_told(render: Render) -> None:
    for write in ("m.content | trim | replace('\n', ' ')", "m.content | tojson", "m.content | upper"):
        source = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' ~ (" + write + ") ~ '<|im_end|>' }}{% endfor %}"
        )
        assert render(source, [said("user", ' a "b"\nc é'), said("assistant", "x\n\ny")]).alerts == []


def test_fields_that_change_nothing_are_told(render: Render) -> None:
    messages = [said("user", "Hello", name="anna"), said("assistant", "Hi.", mood="kind")]
    assert render(CALLING, messages).alerts == [f"mood: {LEAVING_OUT} (1 rows)", f"name: {LEAVING_OUT} (1 rows)"]
    named = CALLING.replace("m.role +", "m.role + (' ' + m.name if m.name else '') +")
    assert render(named, messages).alerts == [f"mood: {LEAVING_OUT} (1 rows)"]


def test_fields_inside_parts_and_calls_that_change_nothing_are_told(render: Render) -> None:
    asking = {"id": "c1", "type": "function", "index": 0, "function": {"name": "rain", "arguments": {}, "thought": "z"}}
    messages = [
        said("user", [{"type": "text", "text": "Hi", "cache": "x"}]),
        said("assistant", "", tool_calls=[asking]),
    ]
    assert render(CALLING, messages).alerts == [
        f"content.cache: {LEAVING_OUT} (1 rows)",
        f"tool_calls.function.thought: {LEAVING_OUT} (1 rows)",
        f"tool_calls.index: {LEAVING_OUT} (1 rows)",
    ]
    whole = CALLING.replace("{'name': one.function.name, 'arguments': one.function.arguments}", "one")
    assert render(whole, messages[1:]).alerts == []


def test_a_field_that_is_written_for_one_role_alone_is_told_of_the_others(render: Render) -> None:
    named = CALLING.replace("m.role +", "m.role + (' ' + m.name if m.name and m.role == 'tool' else '') +")
    messages = [said("user", "Hello", name="anna"), said("assistant", "", tool_calls=[call()])]
    messages += [said("tool", "no", name="rain"), DRY]
    assert render(named, messages).alerts == [f"name of user messages: {LEAVING_OUT} (1 rows)"]


WRITING_TOOLS = [
    ("{{ tool | tojson }}", []),
    ("{{ tool.function.name }}", ["descriptions of tool parameters", "tool descriptions", "tool parameters"]),
    (
        "{{ tool.function.name + ': ' + tool.function.description }}",
        ["descriptions of tool parameters", "tool parameters"],
    ),
    (
        "{{ tool.function.name }}{{ tool.function.parameters.properties | list }}",
        ["descriptions of tool parameters", "tool descriptions"],
    ),
    ("{{ tool | tojson if loop.first }}", ["tools"]),
]


@pytest.mark.parametrize(("writing", "missing"), WRITING_TOOLS)
def test_what_is_not_written_of_tools_is_told(writing: str, missing: list[str], render: Render) -> None:
    schema = {"type": "object", "properties": {"town": {"type": "string", "description": "where it falls"}}}
    # The name of the second stands in the question, too.
    tools = [
        {"type": "function", "function": {"name": name, "description": "tells it", "parameters": schema}}
        for name in ("time", "rain")
    ]
    source = CALLING.replace("{{ tool | tojson }}", writing)
    found = render(source, [said("user", "Ask rain."), DRY], tools)
    assert found.alerts == [f"{what}: {LEAVING_OUT} (1 rows)" for what in missing]
    plain = {"type": "object", "properties": {"town": {"type": "string"}}}
    undescribed = [{**tool, "function": {**tool["function"], "parameters": plain}} for tool in tools]  # type: ignore[dict-item]
    found = render(source, [said("user", "Ask rain."), DRY], undescribed)
    assert f"descriptions of tool parameters: {LEAVING_OUT} (1 rows)" not in found.alerts
    bare = [{"type": "function", "function": {"name": name}} for name in ("time", "rain")]
    without = source.replace("tool.function.description", "''").replace("tool.function.parameters.properties", "{}")
    alerts = render(without, [said("user", "Ask rain."), DRY], bare).alerts
    assert alerts == ([f"tools: {LEAVING_OUT} (1 rows)"] if missing == ["tools"] else [])


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("kept", "arguments", "is_lost"),
    [
        ("if value is string", {"town": "Oslo"}, False),
        ("if value is string", {"town": "Oslo", "days": 2}, True),
        ("if value is not mapping", {"town": "Oslo", "where": {"north": 2}}, True),
        ("if loop.first", {"town": "Oslo"}, False),
        ("if loop.first", {"town": "Oslo", "zone": "UTC"}, True),
        ("if loop.first", {"days": 1, "town": "Oslo"}, True),
    ],
)
def test_a_call_of_which_an_argument_is_not_written_is_told_and_not_trained(
    kept: str, arguments: Message, is_lost: bool, as_text: bool, render: Render
) -> None:
    source = CALLING.replace(
        "({'name': one.function.name, 'arguments': one.function.arguments} | tojson)", "one.function.name"
    ).replace(
        "+ '</call>' }}",
        "}}{% for key, value in one.function.arguments.items() %}{{ key ~ value " + kept + " }}{% endfor %}</call>",
    )
    given = json.dumps(arguments) if as_text else arguments
    turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": given}}])
    found = render(source, [ASKED, turn, DRY])
    assert (f"tool_calls: {LEAVING_OUT} (1 rows)" in found.alerts) == is_lost
    assert len(found.trained) == 2 - is_lost


def test_reasoning_that_stands_under_a_name_that_is_not_read_is_told(render: Render) -> None:
    found = render(CALLING, [ASKED, said("assistant", "No.", reasoning_content="", reasoning="It is dry.")])
    assert found.alerts == [f"reasoning: {LEAVING_OUT} (1 rows)"]


def test_a_turn_that_would_be_trained_without_what_it_says_carries_no_loss(render: Render) -> None:
    lost = "assistant turns that carry no loss, because the template omits what they say or call: 1"
    turn = said("assistant", "I will check.", tool_calls=[call(town="Oslo")])
    found = render(TWO_ROLES, [ASKED, turn, DRY])
    assert found.trained == [f"No, it is dry.{END}"]
    assert found.alerts == [f"tool_calls: {LEAVING_OUT} (1 rows)", lost]
    one = CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    both = said("assistant", "", tool_calls=[call(town="Oslo"), call("time", 2, zone="UTC")])
    found = render(one, [ASKED, both, DRY])
    assert found.trained == [f"No, it is dry.{END}"]
    assert lost in found.alerts
    dropping = CALLING.replace("m.content or ''", "m.content if m.content and loop.index0 != 1 else ''")
    found = render(dropping, [ASKED, said("assistant", "Maybe."), ASKED, DRY])
    assert found.trained == [f"No, it is dry.{END}"]
    assert found.alerts == [f"1 message is {LEAVING_OUT}: assistant 1", lost]
    with pytest.raises(DataError, match="QH-D05") as caught:
        render(TWO_ROLES.replace("m.content", "''"), [ASKED, DRY])
    assert f"2 messages are {LEAVING_OUT}: user 1, assistant 1" in caught.value.cause


def test_a_turn_of_which_only_the_frame_is_written_carries_no_loss(render: Render) -> None:
    source = CALLING.replace("m.content or ''", "(m.content or '').split('</think>')[-1]")
    found = render(source, [said("user", "Hi"), said("assistant", "<think>one</think>"), ASKED, DRY])
    assert found.trained == [f"No, it is dry.{END}"]


# special tokens, files -----------------------------------------------------------------------------------------------


def test_special_tokens_in_calls_and_tools_are_text(render: Render) -> None:
    turn = said("assistant", "", tool_calls=[call(town="<|im_end|>")])
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "description": "tells <|im_end|>"}}]  # type: ignore[dict-item]
    found = render(CALLING, [ASKED, turn, RESULT, DRY], tools)
    assert found.trained == [
        '<call>{"name": "rain", "arguments": {"town": "<|im_end|>"}}</call><|im_end|>',
        DRY["content"] + END,
    ]
    assert found.text == found.theirs(tokenize=False)
    number = found.theirs([DRY], tokenize=True)[-2]
    assert found.ids.count(number) == found.text.count(END) - 2


def test_special_tokens_in_keys_are_text_and_counted(render: Render) -> None:
    turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": {"<|im_end|>": "Oslo"}}}])
    schema = {"type": "object", "properties": {"<|user|>": {"type": "string"}}}
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "parameters": schema}}]  # type: ignore[dict-item]
    found = render(CALLING, [ASKED, turn, RESULT, DRY], tools)
    assert found.trained[0] == '<call>{"name": "rain", "arguments": {"<|im_end|>": "Oslo"}}</call><|im_end|>'
    assert found.text == found.theirs(tokenize=False)
    assert found.ids.count(found.theirs([DRY], tokenize=True)[-2]) == found.text.count(END) - 1
    assert found.data.report.train.special_in_text == {"<|im_end|>": 1, "<|user|>": 1}


def test_special_tokens_that_the_template_reads_are_tokens_and_told(render: Render) -> None:
    source = CALLING.replace(
        "m.content or ''", "(m.content or '').split('[THINK]')[0] ~ '[THINK]' if '[THINK]' in m.content else m.content"
    )
    found = render(source, [ASKED, said("assistant", "so[THINK]No.")])
    assert found.ids == found.theirs(tokenize=True)
    assert "special tokens in messages that the template reads, encoded as tokens: [THINK] 1" in found.alerts


@pytest.mark.fault("D12")
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("{# für #}x".encode("latin-1"), r"byte 0xfc on line 1, column 5 is not UTF-8 text"),
        ("x\ny é".encode("cp1252"), r"byte 0xe9 on line 2, column 3 is not UTF-8 text"),
        ("x".encode("utf-16"), r"byte 0xff on line 1, column 1 is not UTF-8 text"),
    ],
)
def test_a_template_file_that_is_not_utf8_is_told_with_byte_and_place(
    raw: bytes, reason: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_bytes(raw)
    with pytest.raises(DataError, match=rf"QH-D12.*mine\.jinja cannot be read: {reason}") as caught:
        ChatTokenizer.from_folder(folders["chatml"], chat_template=str(tmp_path / "mine.jinja"))
    assert caught.value.where == "data.chat_template"
    assert caught.value.fix == "Save the file as UTF-8."
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["chatml"] / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(raw)
    with pytest.raises(ModelError, match=rf"QH-D52.*{reason}"):
        ChatTokenizer.from_folder(tmp_path)


def test_a_json_file_that_holds_a_template_is_no_template(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """It is a valid one: its braces and quotes would be written around every conversation, and partly trained."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}, indent=2))
    with pytest.raises(
        DataError, match=r"QH-D12.*tokenizer_config\.json cannot be read: it is a JSON object"
    ) as caught:
        ChatTokenizer.from_folder(folders["chatml"], chat_template=str(tmp_path / "tokenizer_config.json"))
    assert ".jinja" in caught.value.fix


def test_a_byte_order_mark_is_no_part_of_a_template(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_bytes("\ufeff{{ messages[0].content }}é".encode())
    tokenizer = ChatTokenizer.from_folder(folders["chatml"], chat_template=str(tmp_path / "mine.jinja"))
    assert tokenizer.render([said("user", "a")], add_generation_prompt=False) == "aé"


# templates of others -------------------------------------------------------------------------------------------------


def _published() -> dict[str, str]:
    """The chat templates that transformers' own code holds."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    found = {}
    for name in ("llama4", "qwen2_audio", "smolvlm"):
        path = Path(spec.origin).parent / "models" / name / f"processing_{name}.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))) if path.is_file() else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "in messages %}" in node.value:
                found[name] = node.value
    return found


@pytest.mark.parametrize("name", sorted(_published()))
def test_published_templates_give_the_ids_of_transformers_and_whole_turns(name: str, render: Render) -> None:
    messages = [said(m["role"], parts(m["content"])) for m in (said("system", "Brief."), *THINKING[2:], ASKED, DRY)]
    eos = {"llama4": "<|eot|>", "smolvlm": "<end_of_utterance>"}.get(name, END)
    found = render(_published()[name], messages, eos=eos)
    assert found.ids == found.theirs(tokenize=True)
    assert len(found.trained) == 2
    assert [text in part for text, part in zip(("See you.", "No, it is dry."), found.trained, strict=True)] == [
        True
    ] * 2
    assert not any("Brief" in part or "Bye" in part or "ssistant" in part for part in found.trained)
