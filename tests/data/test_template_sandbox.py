"""A chat template is stopped at a limit of size and of time, and what real ones do stays untouched."""

from __future__ import annotations

import time

import pytest

from qlora_hal.data.chat import ConversationWriter, TurnNotFound
from qlora_hal.data.template.chat_template import ChatTemplate, TemplateFault
from qlora_hal.data.template.outlines import Outlines, outline_of
from qlora_hal.data.template.sandbox import size_of
from qlora_hal.data.tokens.special_text import SpecialText
from qlora_hal.errors import DataError, UnsafeInputError

ASKED = [{"role": "user", "content": "a"}]
LARGE = "{% set large = 'a' * 9999999 %}"
STATE = "{% set n = namespace(x='aaaaaaaa', l=[], i=3) %}"


def rendered(source: str, messages: list[dict[str, object]] | None = None) -> str:
    return ChatTemplate(source, "test", {}).render(messages or ASKED)


@pytest.mark.fault("X04")
@pytest.mark.parametrize(
    "source",
    [
        # Texts and collections that double.
        STATE + "{% for i in range(22) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}",
        STATE + "{% for i in range(22) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | length }}",
        STATE + "{% for i in range(22) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        STATE + "{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
        STATE + "{% for i in range(40) %}{% set n.l = {1: n.l, 2: n.l} %}{% endfor %}{{ n.l | tojson }}",
        STATE + "{% for i in range(40) %}{% set n.i = n.i * n.i %}{% endfor %}",
        # Loops and calls without end, whether they write or not.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99) recursive %}{{ loop(range(99)) if loop.depth < 60 }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x %}{% for i in range(99999) %}" + "y" * 50_000 + "{% endfor %}{% endset %}",
        # One step that makes much out of little.
        LARGE + "{{ large ~ large ~ large }}",
        LARGE + "{% set a = large[1:] %}{% set b = large[1:] %}",
        "{{ ['a' * 60000] * 60000 }}",
        "{{ ('a' * 60000).replace('a', 'a' * 60000) }}",
        "{{ ('a' * 60000) | replace('a', 'a' * 60000) }}",
        "{{ ('b' * 60000).join('a' * 1000) }}",
        "{{ range(9999) | map('string') | join('b' * 60000) }}",
        "{{ '%s%s%s' % (('a' * 9999999,) * 3) }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ 'a\\n' | indent(1000000000) }}",
        "{{ 3.5 | round(1000000000, 'ceil') }}",
        "{{ 9 ** 1000000000 }}",
    ],
)
def test_template_that_makes_or_does_too_much_is_stopped(source: str) -> None:
    with pytest.raises(UnsafeInputError, match="QH-X04"):
        rendered(source)


@pytest.mark.fault("X04")
def test_template_that_makes_little_in_a_long_time_is_stopped() -> None:
    slow = "{% set r = range(99999) %}{% for i in range(9999) %}{% if r | sum %}{% endif %}{% endfor %}"
    with pytest.raises(UnsafeInputError, match=r"QH-X04.*runs longer than 1.75 seconds"):
        rendered(slow)


@pytest.mark.fault("X04")
@pytest.mark.parametrize("source", ["{{ 'a'.center(1000000000) }}", "{{ (1).to_bytes(1000000000) }}"])
def test_method_that_only_makes_much_is_out_of_reach(source: str) -> None:
    with pytest.raises(TemplateFault, match="unsafe"):
        rendered(source)


@pytest.mark.parametrize(
    "source", ["{{ 'a' | center(9) }}", "{{ " + "(" * 20_000, "{% for a in 'x' %}" * 25 + "{% endfor %}" * 25]
)
def test_template_that_cannot_be_compiled_is_a_data_error(source: str) -> None:
    with pytest.raises(DataError, match=r"QH-D12.*not a valid Jinja template"):
        rendered(source)


@pytest.mark.parametrize("turns", [2, pytest.param(1000, marks=pytest.mark.long)])
def test_template_that_looks_through_all_messages_at_each_is_within_the_limits(turns: int) -> None:
    source = (
        "{% macro shown(text) %}{{ text | trim }}{% endmacro %}{% set n = namespace(all='') %}"
        "{% for m in messages %}"
        "{% set earlier = messages[:loop.index0] | selectattr('role', 'equalto', 'user') | list %}"
        "{% for other in messages if other.role == 'system' %}{{ other.content }}{% endfor %}"
        "{% set n.all = n.all + m.role ~ ': ' ~ shown(m.content).replace('\\n', ' ') + '\\n' %}"
        "{{ '%d of %s' % (earlier | length, m.role) }} {{ shown(m.content) }}\n"
        "{% endfor %}"
    )
    messages: list[dict[str, object]] = [
        {"role": "assistant" if turn % 2 else "user", "content": f" text {turn} "} for turn in range(turns)
    ]
    lines = rendered(source, messages).splitlines()
    assert lines[-1] == f"{turns // 2} of assistant text {turns - 1}"


def test_one_long_message_is_within_the_limits() -> None:
    text = "word\n" * 400_000
    source = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') | replace('\\n', ' ') }}{% endfor %}"
    )
    assert rendered(source, [{"role": "user", "content": text}]) == text.replace("\n", " ")


def test_each_rendering_has_the_whole_of_the_limits() -> None:
    template = ChatTemplate("{% set x = 'a' * 9999999 %}{{ x | length }}", "test", {})
    assert [template.render(ASKED) for _ in range(3)] == ["9999999"] * 3


def test_json_is_what_json_gives_with_any_layout() -> None:
    value = "{'b': [1, 2.5, none, 'é'], 'a': {}}"
    assert rendered("{{ " + value + " | tojson }}") == '{"b": [1, 2.5, null, "é"], "a": {}}'
    assert rendered("{{ " + value + " | tojson(separators=(',', ':')) }}") == '{"b":[1,2.5,null,"é"],"a":{}}'
    assert rendered("{{ [{'a': 1}] | tojson(indent=2) }}") == '[\n  {\n    "a": 1\n  }\n]'


def test_size_counts_an_entry_as_often_as_it_would_be_written() -> None:
    text = "a" * 100
    assert size_of(text) == 100
    assert size_of([text, text]) == 2 * 116
    assert size_of({"k": [text]}) == 16 + 1 + 116
    assert size_of({"k": text}.values()) == 116
    assert size_of(range(10)) == 160
    assert size_of(2**70) == 71


CONTENT = "{% for m in messages %}{% set content = m['content'] %}"


def outlined(source: str, content: str) -> tuple[str | None, str]:
    """(the text by the outline, or None without one; the text by the template itself)."""
    writer = ConversationWriter(ChatTemplate(source, "test", {}), SpecialText({"<e>": 1}), "<e>")
    outline = outline_of(writer, ["user"], 0)
    written = writer.write([{"role": "user", "content": content}]).text
    return None if outline is None else outline.text([content]), written


@pytest.mark.parametrize(
    "used",
    [
        "{{ content ~ '|' }}",
        "{{ shown(content) + '|' }}",
        "{{ shown(content) | trim }}",
        "{% set kept %}{{ content }}{% endset %}{{ kept | trim }}",
        "{% generation %}{{ content }}{% endgeneration %}",
    ],
)
def test_content_that_passes_through_macros_and_blocks_keeps_its_outline(used: str) -> None:
    source = "{% macro shown(text) %}{{ text }}{% endmacro %}" + CONTENT + used + "{% endfor %}"
    by_outline, written = outlined(source, " a ")
    assert by_outline == written


@pytest.mark.parametrize(
    "used",
    [
        "{{ shown(content) | length }}",
        "{{ shown(content).split('a') }}",
        "{{ (content ~ '') | upper }}",
        "{{ content | replace('a', 'b') }}",
        "{{ content | e }}",
        "{% filter upper %}{{ content }}{% endfilter %}",
        "{% set kept %}{{ content }}{% endset %}{{ kept | length }}",
        "{{ [content] }}",
        "{{ [content] | tojson(ensure_ascii=true) }}",
    ],
)
def test_content_that_is_looked_at_after_a_detour_has_no_outline(used: str) -> None:
    source = "{% macro shown(text) %}{{ text }}{% endmacro %}" + CONTENT + used + "{% endfor %}"
    assert outlined(source, " a<")[0] is None


LOOP = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<e>{% endfor %}"
LOOP += "{% if add_generation_prompt %}<assistant>{% endif %}"
NO_PROMPT = LOOP.partition("{% if add_generation_prompt")[0]
MARKED = LOOP.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")


@pytest.mark.slow
@pytest.mark.parametrize("source", [LOOP, MARKED, NO_PROMPT], ids=["loop", "marked", "no prompt"])
def test_a_conversation_of_very_many_turns_takes_time_in_proportion(source: str) -> None:
    """20,000 turns are 600 kB of a row, whose limit is 32 MiB; each looked up among all others took minutes."""
    writer = ConversationWriter(ChatTemplate(source, "test", {}), SpecialText({"<e>": 1}), "<e>")
    messages = [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(20_000)]
    began = time.process_time()
    assert Outlines(writer).of(messages, 0) is None
    written = writer.write(messages)
    assert time.process_time() - began < 20
    assert sum(trained for _, trained in written.pieces) == 10_000
    if source == NO_PROMPT:
        assert {text for text, trained in written.pieces if trained} == {"a<e>"}, "the role is not the model's"


@pytest.mark.slow
def test_a_turn_that_only_rendering_finds_is_refused_far_into_a_conversation() -> None:
    """Each such turn costs as much as all before it. The template writes the whole at once, behind its loop."""
    joined = "{% set all = namespace(text='') %}{% for m in messages %}"
    joined += "{% set all.text = all.text ~ '<' ~ m['role'] ~ '>' ~ m['content'] ~ '<e>' %}{% endfor %}{{ all.text }}"
    writer = ConversationWriter(ChatTemplate(joined, "test", {}), SpecialText({"<e>": 1}), "<e>")
    messages = [{"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(1200)]
    assert writer.write(messages[:200])
    with pytest.raises(TurnNotFound, match="message 1026"):
        writer.write(messages)
