"""How twenty families of models write turns and reasoning, and what is trained of each: every answer, the last one
alone, and answers without their reasoning. No generation prompt is trained in any of them.

The templates are written anew, as short as the behavior allows; benchmarks/chat_template_options.py asks the same of
the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from data.chat_templates.conversations import ASKED, DRY, RESULT, Prepare, Render, call, said

from qlora_hal.data import ChatTokenizer
from qlora_hal.data.template.reasoning import ReasoningMarks

ROWS = [said("user", "q1"), said("assistant", "a1"), said("user", "q2"), said("assistant", "a2")]
THOUGHTFUL = [said("user", "q1"), said("assistant", "a1", reasoning_content="r1"), said("user", "q2")]
THOUGHTFUL += [said("assistant", "a2", reasoning_content="r2")]


@dataclass(frozen=True)
class Family:
    """A template with its end token; what it has trained of two answers, and of two answers with reasoning: `thoughts`
    as usual, `masked` without reasoning (None where it writes none)."""

    template: str
    end: str
    answers: Sequence[str]
    thoughts: Sequence[str] | None = None
    masked: Sequence[str] | None = None


def turns(user: str, assistant: str, prompt: str, opening: str = "") -> str:
    """A template from what it writes of a user's message, of an assistant's, and as generation prompt; U, A and R in
    braces stand for their contents and the reasoning."""
    words = {"U": "' + m.content + '", "A": "' + m.content + '", "R": "' + r + '"}
    for word, code in words.items():
        user, assistant = user.replace(f"{{{word}}}", code), assistant.replace(f"{{{word}}}", code)
    return (
        f"{opening}{{% for m in messages %}}{{% set r = m.reasoning_content or '' %}}"
        f"{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{{{{ '{user}' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"
    )


def chatml(assistant: str, prompt: str = "<|im_start|>assistant\\n") -> str:
    return turns("<|im_start|>user\\n{U}<|im_end|>\\n", assistant, prompt)


IM, EOT, END_OF_TURN = "<|im_end|>", "<|eot_id|>", "<end_of_turn>"
LAST = "{% if loop.last %}"
FAMILIES = {
    "chatml": Family(chatml("{{ '<|im_start|>assistant\\n{A}<|im_end|>\\n' }}"), IM, [f"a1{IM}", f"a2{IM}"]),
    "llama 2": Family(turns("<s>[INST] {U} [/INST]", "{{ ' {A} </s>' }}", ""), "</s>", [" a1 </s>", " a2 </s>"]),
    "llama 3": Family(
        turns(
            "<|start_header_id|>user<|end_header_id|>\\n\\n{U}<|eot_id|>",
            "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n{A}<|eot_id|>' }}",
            "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
        ),
        EOT,
        [f"a1{EOT}", f"a2{EOT}"],
    ),
    "mistral": Family(turns("[INST] {U}[/INST]", "{{ ' {A}</s>' }}", ""), "</s>", [" a1</s>", " a2</s>"]),
    "magistral": Family(
        turns("[INST]{U}[/INST]", "{% if r %}{{ '[THINK]{R}[/THINK]' }}{% endif %}{{ '{A}</s>' }}", ""),
        "</s>",
        ["a1</s>", "a2</s>"],
        ["[THINK]r1[/THINK]a1</s>", "[THINK]r2[/THINK]a2</s>"],
        ["[THINK]", "[/THINK]a1</s>", "[THINK]", "[/THINK]a2</s>"],
    ),
    "gemma": Family(
        turns(
            "<start_of_turn>user\\n{U}<end_of_turn>\\n",
            "{{ '<start_of_turn>model\\n{A}<end_of_turn>\\n' }}",
            "<start_of_turn>model\\n",
        ),
        END_OF_TURN,
        [f"a1{END_OF_TURN}", f"a2{END_OF_TURN}"],
    ),
    "gemma with a channel of thought": Family(
        turns(
            "<|turn>user\\n{U}<turn|>\\n",
            "{{ '<|turn>model\\n' }}{% if r %}{{ '<|channel>thought\\n{R}\\n<channel|>' }}{% endif %}"
            "{{ '{A}<turn|>\\n' }}",
            "<|turn>model\\n",
        ),
        "<turn|>",
        ["a1<turn|>", "a2<turn|>"],
        ["<|channel>thought\nr1\n<channel|>a1<turn|>", "<|channel>thought\nr2\n<channel|>a2<turn|>"],
        ["<|channel>thought", "<channel|>a1<turn|>", "<|channel>thought", "<channel|>a2<turn|>"],
    ),
    "phi 3": Family(
        turns("<|user|>\\n{U}<|end|>\\n", "{{ '<|assistant|>\\n{A}<|end|>\\n' }}", "<|assistant|>\\n"),
        "<|end|>",
        ["a1<|end|>", "a2<|end|>"],
    ),
    "zephyr": Family(
        turns("<|user|>\\n{U}</s>\\n", "{{ '<|assistant|>\\n{A}</s>\\n' }}", "<|assistant|>\\n"),
        "</s>",
        ["a1</s>", "a2</s>"],
    ),
    "vicuna": Family(turns("USER: {U} ", "{{ 'ASSISTANT: {A}</s>' }}", "ASSISTANT:"), "</s>", [" a1</s>", " a2</s>"]),
    "command r": Family(
        turns(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{U}<|END_OF_TURN_TOKEN|>",
            "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{A}<|END_OF_TURN_TOKEN|>' }}",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        ["a1<|END_OF_TURN_TOKEN|>", "a2<|END_OF_TURN_TOKEN|>"],
    ),
    "command a": Family(
        turns(
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{U}<|END_OF_TURN_TOKEN|>",
            "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
            "{% if r %}{{ '<|START_THINKING|>{R}<|END_THINKING|>' }}{% endif %}"
            "{{ '<|START_RESPONSE|>{A}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        [f"<|START_RESPONSE|>{a}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for a in ("a1", "a2")],
        [
            f"<|START_THINKING|>{r}<|END_THINKING|><|START_RESPONSE|>{a}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
            for r, a in (("r1", "a1"), ("r2", "a2"))
        ],
        [
            part
            for a in ("a1", "a2")
            for part in (
                "<|START_THINKING|>",
                f"<|END_THINKING|><|START_RESPONSE|>{a}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            )
        ],
    ),
    "deepseek r1, whose prompt opens the thought and which forgets earlier ones": Family(
        turns(
            "<｜User｜>{U}",
            "{{ '<｜Assistant｜>' }}" + LAST + "{% if r %}{{ '<think>\\n{R}\\n</think>\\n\\n' }}{% endif %}{% endif %}"
            "{{ '{A}<｜end▁of▁sentence｜>' }}",
            "<｜Assistant｜><think>\\n",
        ),
        "<｜end▁of▁sentence｜>",
        ["a1<｜end▁of▁sentence｜>", "a2<｜end▁of▁sentence｜>"],
        ["a1<｜end▁of▁sentence｜>", "r2\n</think>\n\na2<｜end▁of▁sentence｜>"],
        ["a1<｜end▁of▁sentence｜>", "</think>\n\na2<｜end▁of▁sentence｜>"],
    ),
    "qwen 3, with an empty thought in the last answer": Family(
        chatml(
            "{{ '<|im_start|>assistant\\n' }}" + LAST + "{{ '<think>\\n{R}\\n</think>\\n\\n' }}{% endif %}"
            "{{ '{A}<|im_end|>\\n' }}"
        ),
        IM,
        [f"a1{IM}", f"<think>\n\n</think>\n\na2{IM}"],
        [f"a1{IM}", f"<think>\nr2\n</think>\n\na2{IM}"],
        [f"a1{IM}", "<think>", f"</think>\n\na2{IM}"],
    ),
    "qwen 3, with every thought": Family(
        chatml(
            "{{ '<|im_start|>assistant\\n' }}{% if r %}{{ '<think>\\n{R}\\n</think>\\n\\n' }}{% endif %}"
            "{{ '{A}<|im_end|>\\n' }}"
        ),
        IM,
        [f"a1{IM}", f"a2{IM}"],
        [f"<think>\nr1\n</think>\n\na1{IM}", f"<think>\nr2\n</think>\n\na2{IM}"],
        ["<think>", f"</think>\n\na1{IM}", "<think>", f"</think>\n\na2{IM}"],
    ),
    "glm, whose turns end where the next begins": Family(
        turns(
            "<|user|>\\n{U}",
            "{{ '<|assistant|>\\n' }}{% if r %}{{ '<think>{R}</think>\\n' }}{% endif %}{{ '{A}' }}",
            "<|assistant|>\\n",
        ),
        "<|user|>",
        ["a1<|user|>", "a2<|user|>"],
        ["<think>r1</think>\na1<|user|>", "<think>r2</think>\na2<|user|>"],
        ["<think>", "</think>\na1<|user|>", "<think>", "</think>\na2<|user|>"],
    ),
    "gpt-oss, whose thoughts end as answers do": Family(
        turns(
            "<|start|>user<|message|>{U}<|end|>",
            "{% if r %}{{ '<|start|>assistant<|channel|>analysis<|message|>{R}<|end|>' }}{% endif %}"
            "{{ '<|start|>assistant<|channel|>final<|message|>{A}' + ('<|return|>' if loop.last else '<|end|>') }}",
            "<|start|>assistant",
        ),
        "<|return|>",
        ["<|channel|>final<|message|>a1<|end|>", "<|channel|>final<|message|>a2<|return|>"],
        [
            f"<|channel|>analysis<|message|>{r}<|end|><|start|>assistant<|channel|>final<|message|>{a}{end}"
            for r, a, end in (("r1", "a1", "<|end|>"), ("r2", "a2", "<|return|>"))
        ],
        [
            part
            for a, end in (("a1", "<|end|>"), ("a2", "<|return|>"))
            for part in (
                "<|channel|>analysis<|message|>",
                f"<|end|><|start|>assistant<|channel|>final<|message|>{a}{end}",
            )
        ],
    ),
    "thoughts addressed to the model itself": Family(
        turns(
            "<|start|>user<|message|>{U}<|eot|>",
            "{% if r %}{{ '<|start|>assistant to=self<|message|>{R}<|eom|>' }}{% endif %}"
            "{{ '<|start|>assistant to=user<|message|>{A}<|eot|>' }}",
            "<|start|>assistant",
        ),
        "<|eot|>",
        [" to=user<|message|>a1<|eot|>", " to=user<|message|>a2<|eot|>"],
        [
            f" to=self<|message|>{r}<|eom|><|start|>assistant to=user<|message|>{a}<|eot|>"
            for r, a in (("r1", "a1"), ("r2", "a2"))
        ],
        [
            part
            for a in ("a1", "a2")
            for part in (" to=self<|message|>", f"<|eom|><|start|>assistant to=user<|message|>{a}<|eot|>")
        ],
    ),
    "seed": Family(
        turns(
            "<seed:bos>user\\n{U}<seed:eos>",
            "{{ '<seed:bos>assistant\\n' }}{% if r %}{{ '<seed:think>{R}</seed:think>' }}{% endif %}"
            "{{ '{A}<seed:eos>' }}",
            "<seed:bos>assistant\\n",
        ),
        "<seed:eos>",
        ["a1<seed:eos>", "a2<seed:eos>"],
        ["<seed:think>r1</seed:think>a1<seed:eos>", "<seed:think>r2</seed:think>a2<seed:eos>"],
        ["<seed:think>", "</seed:think>a1<seed:eos>", "<seed:think>", "</seed:think>a2<seed:eos>"],
    ),
    "granite": Family(
        turns(
            "<|start_of_role|>user<|end_of_role|>{U}<|end_of_text|>\\n",
            "{{ '<|start_of_role|>assistant<|end_of_role|>{A}<|end_of_text|>\\n' }}",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|end_of_text|>",
        ["a1<|end_of_text|>", "a2<|end_of_text|>"],
    ),
    "kimi": Family(
        turns(
            "<|im_user|>user<|im_middle|>{U}<|im_end|>",
            "{{ '<|im_assistant|>assistant<|im_middle|>{A}<|im_end|>' }}",
            "<|im_assistant|>assistant<|im_middle|>",
        ),
        IM,
        [f"a1{IM}", f"a2{IM}"],
    ),
    "smollm 3, with marks around what it generates": Family(
        chatml("{{ '<|im_start|>assistant\\n' }}{% generation %}{{ '{A}<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"),
        IM,
        [f"a1{IM}", f"a2{IM}"],
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_trained_whole_and_of_last_only_the_last(name: str, render: Render) -> None:
    family = FAMILIES[name]
    ends = [family.end, "<|end|>"] if family.end == "<|return|>" else [family.end]
    found = render(family.template, ROWS, eos=family.end, ends=ends)
    assert found.trained == family.answers
    assert render(family.template, ROWS, eos=family.end, ends=ends, train_on="last").trained == family.answers[1:]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.thoughts])
def test_reasoning_carries_loss_unless_it_is_masked(name: str, render: Render) -> None:
    family = FAMILIES[name]
    ends = [family.end, "<|end|>"] if family.end == "<|return|>" else [family.end]
    assert render(family.template, THOUGHTFUL, eos=family.end, ends=ends).trained == family.thoughts
    masked = render(family.template, THOUGHTFUL, eos=family.end, ends=ends, mask_reasoning=True)
    assert masked.trained == family.masked
    assert any(note.startswith("reasoning without loss") for note in masked.notes)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "<think>" not in family.answers[1]])
def test_where_nothing_is_reasoning_all_is_trained_and_that_is_told(name: str, render: Render) -> None:
    family = FAMILIES[name]
    ends = [family.end, "<|end|>"] if family.end == "<|return|>" else [family.end]
    found = render(family.template, ROWS, eos=family.end, ends=ends, mask_reasoning=True)
    assert found.trained == family.answers
    assert any("data.mask_reasoning leaves nothing out" in alert for alert in found.alerts)


def test_a_thought_that_the_prompt_opens_ends_at_its_mark_alone() -> None:
    marks = ReasoningMarks((("<|a|>", "<|b|>"),))
    thought = [("ask<|a|>", False), ("think", True), ("ing<|b|>answer<|b|>", True)]
    assert marks.left_out(thought) == (
        [("ask<|a|>", False), ("thinking", False), ("<|b|>answer<|b|>", True)],
        1,
    )
    assert marks.left_out([("ask", False), ("answer<|b|>", True)]) == ([("ask", False), ("answer<|b|>", True)], 0)
    assert marks.left_out([("one<|a|>two", True)]) == ([("one<|a|>", True), ("two", False)], 1)


def test_reasoning_between_unknown_marks_is_told_and_other_marks_do_not_hide_it(render: Render) -> None:
    written = chatml(
        "{{ '<|im_start|>assistant\\n' }}{% if r %}{{ 'Thought: {R} Answer: ' }}{% endif %}{{ '{A}<|im_end|>' }}"
    )
    rows = [*THOUGHTFUL[:3], said("assistant", "<think>r2</think>a2")]
    found = render(written, rows, mask_reasoning=True)
    assert found.trained == [f"Thought: r1 Answer: a1{IM}", "<think>", f"</think>a2{IM}"]
    assert any("reasoning between no marks that are known, and it carries loss in 1 rows" in a for a in found.alerts)
    assert not any("no marks that are known" in a for a in render(written, ROWS, mask_reasoning=True).alerts)


def calling(thought: str) -> str:
    """A template that writes thoughts before calls alone, as Gemma 4's first one does."""
    return (
        "{% for m in messages %}{{ '<|turn>' + m.role + '\n' }}"
        "{% if m.reasoning_content and m.tool_calls %}{{ '"
        + thought.replace("{R}", "' + m.reasoning_content + '")
        + "' }}{% endif %}"
        "{% for one in m.tool_calls or [] %}"
        "{{ '<|tool_call>call:' + one.function.name + '{}<tool_call|>' }}{% endfor %}"
        "{{ m.content or '' }}{{ '<turn|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>assistant\n' }}{% endif %}"
    )


CALLED = [ASKED, said("assistant", "", reasoning_content="r1", tool_calls=[call()]), RESULT, DRY]


def test_a_thought_that_is_written_before_calls_alone_is_masked(render: Render) -> None:
    written = calling("<|channel>thought\\n{R}<channel|>")
    kept = ["<|channel>thought", "<channel|><|tool_call>call:rain{}<tool_call|><turn|>", "No, it is dry.<turn|>"]
    found = render(written, CALLED, eos="<turn|>", mask_reasoning=True)
    assert found.trained == kept
    assert not any("mask_reasoning" in alert for alert in found.alerts)


def test_what_begins_a_call_is_no_mark_of_the_thought_before_it(render: Render) -> None:
    found = render(calling("Thought: {R} "), CALLED, eos="<turn|>", mask_reasoning=True)
    assert found.trained == [
        "Thought: r1 <|tool_call>call:rain{}<tool_call|><turn|>",
        "No, it is dry.<turn|>",
    ]
    assert any("reasoning between no marks that are known" in alert for alert in found.alerts)


def test_usual_marks_that_stand_empty_before_a_call_without_a_thought_are_known(render: Render) -> None:
    """They are there whether there is a thought or not, and are marks all the same."""
    written = calling("{R}").replace("m.reasoning_content and m.tool_calls", "m.tool_calls")
    written = written.replace("m.reasoning_content +", "('<think>' ~ (m.reasoning_content or '') ~ '</think>') +")
    found = render(written, CALLED, eos="<turn|>", mask_reasoning=True)
    assert found.trained == ["<think>", "</think><|tool_call>call:rain{}<tool_call|><turn|>", "No, it is dry.<turn|>"]
    assert not any("no marks that are known" in alert for alert in found.alerts)


def test_marks_of_triangles_are_marks(render: Render) -> None:
    written = chatml(
        "{{ '<|im_start|>assistant\\n' }}{% if r %}{{ '◁think▷{R}◁/think▷' }}{% endif %}{{ '{A}<|im_end|>' }}"
    )
    found = render(written, THOUGHTFUL, mask_reasoning=True)
    assert found.trained == ["◁think▷", f"◁/think▷a1{IM}", "◁think▷", f"◁/think▷a2{IM}"]


@pytest.mark.parametrize(
    ("turn", "kept"),
    [
        ("<think>one<think>two</think>three</think>answer", ["<think>", "</think>answer"]),
        ("<think>as in </think> here</think>answer", ["<think>", "</think>answer"]),
        ("<think>write <think> first</think>answer", ["<think>", "</think>answer"]),
        ("<think>one</think>a<think>two</think>b", ["<think>", "</think>a<think>", "</think>b"]),
        ("one</think>two</think>answer", ["</think>answer"]),
    ],
)
def test_a_thought_that_quotes_its_marks_is_masked_to_its_end(turn: str, kept: list[str]) -> None:
    pieces, found = ReasoningMarks((("<think>", "</think>"),)).left_out([("ask", False), (turn, True)])
    assert [text for text, trained in pieces if trained] == kept
    assert found == 1


@pytest.mark.parametrize("turn", ["<think>no end", "no beginning</think>answer", "answer<think></think>"])
def test_completions_without_a_template_have_the_usual_marks(
    turn: str, prepared: Prepare, chatml: ChatTokenizer
) -> None:
    data = prepared([{"prompt": "p", "completion": turn}], mask_reasoning=True)
    ids, mask = data.train.row(0)
    trained = chatml.decode([number for number, kept in zip(ids, mask, strict=True) if kept], False)
    assert trained.removesuffix("<|im_end|>") == turn.replace("no end", "").replace("no beginning", "")


@pytest.mark.parametrize("name", FAMILIES)
def test_no_generation_prompt_is_trained(name: str, render: Render) -> None:
    family = FAMILIES[name]
    for rows in (ROWS, THOUGHTFUL) if family.thoughts else (ROWS,):
        found = render(family.template, rows, eos=family.end, ends=[family.end], train_on="last")
        prompt = found.theirs(rows[:-1], add_generation_prompt=True, tokenize=True)
        ids, mask = found.data.train.row(0)
        if ids[: len(prompt)].tolist() == list(prompt):
            assert not mask[: len(prompt)].any()
