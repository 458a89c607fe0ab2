"""Where a turn of the assistant begins and ends in what a template writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from data.chat_templates.conversations import (
    ASKED,
    CALLING,
    DRY,
    END,
    RESULT,
    THINKING,
    Message,
    Prepare,
    Render,
    Trained,
    call,
    said,
)

from qlora_hal.data import ChatTokenizer
from qlora_hal.data.template.chat_template import ChatTemplate
from qlora_hal.errors import DataError

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


def test_what_a_prompt_opens_is_not_trained_where_a_content_repeats_it(
    folders: Mapping[str, Path], prepared: Prepare, trained_text: Trained, tmp_path: Path
) -> None:
    """Whatever rows came before: those without a thought have the same roles."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    (tmp_path / "template.jinja").write_text(source)
    tokenizer = ChatTokenizer.from_folder(folders["chatml"], chat_template=str(tmp_path / "template.jinja"))
    plain, thinking = (
        {"messages": [said("user", "q"), said("assistant", content)]} for content in ("a", "<think>\nb\n</think>\n\nc")
    )
    data = prepared([plain, thinking], tokenizer=tokenizer)
    assert [trained_text(data, tokenizer, row) for row in (0, 1)] == [[f"a{END}"], [f"b\n</think>\n\nc{END}"]]


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
