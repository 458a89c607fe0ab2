"""Which template a row takes, and the form in which it is given its messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.chat_templates.conversations import (
    ASKED,
    CALLING,
    DRY,
    END,
    LEAVING_OUT,
    RAIN,
    RESULT,
    TIME,
    TOOLS,
    Render,
    call,
    parts,
    said,
)

from qlora_hal.data import ChatTokenizer
from qlora_hal.errors import DataError

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


@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["absent", "null"])
def test_a_call_without_content_has_an_empty_one_where_the_template_fails_without(
    content: dict[str, None], render: Render
) -> None:
    """As OpenAI writes calls, and as DeepSeek's templates do not read them."""
    calls = {"role": "assistant", "tool_calls": [call(town="Oslo")], **content}
    found = render(CALLING.replace("m.content or ''", "m['content'] + ''"), [ASKED, calls, RESULT, DRY], TOOLS)
    assert found.trained == [RAIN + END, f"No, it is dry.{END}"]
    asked = CALLING.replace("m.content or ''", "m.content if m.content is defined else 'none'")
    assert render(asked, [ASKED, calls, RESULT, DRY], TOOLS).trained[0].startswith("none")


def test_tools_that_a_template_refuses_are_blamed_and_no_message(render: Render) -> None:
    """Tools without the object around them, as some data sets have them."""
    written = CALLING.replace("tool | tojson", "tool.function.name | tojson")
    with pytest.raises(DataError, match=r"QH-D12.*refuses the tools of the row: 'dict object' has no attr") as caught:
        render(written, [ASKED, DRY], [TOOLS[0]["function"]])
    assert '"type": "function"' in caught.value.fix


def test_a_message_that_a_template_refuses_is_blamed_though_the_row_has_tools(render: Render) -> None:
    written = CALLING.replace("m.content or ''", "m.content + m.name[0:]")
    rows = [said("user", "one", name="a"), said("assistant", "two", name="b"), said("user", "three")]
    with pytest.raises(DataError, match=r"QH-D12.*refuses message 3 \(role user\)"):
        render(written, [*rows, said("assistant", "four", name="d")], TOOLS)


def test_a_message_is_blamed_in_the_form_in_which_the_template_is_given_it(render: Render) -> None:
    """A content in parts is not at fault where it was joined to a text."""
    written = "{% for m in messages %}{{ m.role + m.content + m.name[0:] + '<|im_end|>' }}{% endfor %}"
    cached = [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}]
    rows = [said("user", cached, name="a"), said("assistant", "two", name="b"), said("user", "three")]
    with pytest.raises(DataError, match=r"QH-D12.*refuses message 3 \(role user\)"):
        render(written, [*rows, said("assistant", "four", name="c")])
