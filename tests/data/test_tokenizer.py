"""The tokenizer room: equal to transformers, what is trained, what pads and stops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_hal.data import BUILT_IN_TEMPLATES, ChatTokenizer, PreparedData
from qlora_hal.data.template.outlines import outline_of
from qlora_hal.errors import DataError, ModelError, UnsafeInputError

Trained = Callable[..., list[str]]
Conversation = Callable[..., dict[str, Any]]

TURNS = [
    ("What is the capital of France?", "Paris."),
    ("Add two numbers.", "def add(a, b):\n    return a + b", "And three?", "  Leading spaces stay.\n"),
    ("\n\nIt begins with lines.", "\n\nSo does this.", "日本語 🙂 é", "עברית \u0000 e\u0301"),
    ("", "An empty question.", "x", ""),
]


@pytest.fixture(scope="session")
def theirs(folders: Mapping[str, Path]) -> Mapping[str, Any]:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(str(path)) for name, path in folders.items()}


@pytest.mark.parametrize("kind", ["chatml", "llama3", "generation", "thinking", "metaspace"])
@pytest.mark.parametrize("turns", TURNS)
def test_ids_of_a_row_equal_those_of_transformers(
    kind: str,
    turns: tuple[str, ...],
    folders: Mapping[str, Path],
    theirs: Mapping[str, Any],
    prepared: Callable[..., PreparedData],
    conversation: Conversation,
) -> None:
    ours = ChatTokenizer.from_folder(folders[kind])
    row = conversation(*turns, system=None if kind == "metaspace" else "Be brief.")
    wanted = theirs[kind].apply_chat_template(row["messages"], tokenize=True, return_dict=False)
    data = prepared([row], tokenizer=ours)
    assert data.train.row(0)[0].tolist() == wanted
    asked = row["messages"][:-1]
    wanted = theirs[kind].apply_chat_template(asked, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert ours.encode_chat(asked) == wanted


def test_generation_marks_train_what_transformers_marks_and_the_end_token(
    folders: Mapping[str, Path],
    theirs: Mapping[str, Any],
    prepared: Callable[..., PreparedData],
    conversation: Conversation,
) -> None:
    ours = ChatTokenizer.from_folder(folders["generation"])
    row = conversation("Question?", "Answer.", "More?", "More.")
    wanted = theirs["generation"].apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = prepared([row], tokenizer=ours).train.row(0)
    marked = list(wanted["assistant_masks"])
    for place in range(1, len(marked)):
        if ids[place] == ours.eos_id and wanted["assistant_masks"][place - 1]:
            marked[place] = 1
    assert mask.tolist() == marked


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("chatml", ["one<|im_end|>", "two<|im_end|>"]),
        ("llama3", ["one<|eot_id|>", "two<|eot_id|>"]),
        ("generation", ["one<|im_end|>", "two<|im_end|>"]),
        ("metaspace", ["one</s>", "two</s>"]),
        ("thinking", ["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"]),
    ],
)
def test_loss_falls_on_every_answer_with_its_end_token(
    kind: str,
    expected: list[str],
    folders: Mapping[str, Path],
    prepared: Callable[..., PreparedData],
    conversation: Conversation,
    trained_text: Trained,
) -> None:
    tokenizer = ChatTokenizer.from_folder(folders[kind])
    data = prepared([conversation("a b", "one", "c d", "two")], tokenizer=tokenizer)
    assert trained_text(data, tokenizer) == expected
    assert data.report.train.eos_trained == "yes"


def test_template_that_rewrites_earlier_turns_trains_what_it_really_wrote(
    folders: Mapping[str, Path],
    prepared: Callable[..., PreparedData],
    conversation: Conversation,
    trained_text: Trained,
) -> None:
    tokenizer = ChatTokenizer.from_folder(folders["thinking"])
    row = conversation("a", "<think>\nhidden\n</think>\n\none", "b", "<think>\nshown\n</think>\n\ntwo")
    data = prepared([row], tokenizer=tokenizer)
    assert trained_text(data, tokenizer) == ["one<|im_end|>", "<think>\nshown\n</think>\n\ntwo<|im_end|>"]


@pytest.mark.parametrize("name", sorted(BUILT_IN_TEMPLATES))
def test_built_in_templates_train_the_answer_and_an_end_token(
    name: str,
    folders: Mapping[str, Path],
    prepared: Callable[..., PreparedData],
    conversation: Conversation,
    trained_text: Trained,
) -> None:
    for kind in ("chatml", "llama3", "metaspace"):
        tokenizer = ChatTokenizer.from_folder(folders[kind], chat_template=name)
        data = prepared([conversation("one two", "three", "four", "five", system="seven")], tokenizer=tokenizer)
        parts = trained_text(data, tokenizer)
        assert len(parts) == 2
        assert "three" in parts[0]
        assert "five" in parts[1]
        assert not any(word in part for part in parts for word in ("one", "two", "four", "seven"))
        ids, mask = data.train.row(0)
        assert int(ids[mask.nonzero()[0][-1]]) in tokenizer.stop_ids
        assert (ids == tokenizer.bos_id).sum() <= 1 or tokenizer.bos_id == tokenizer.eos_id


# U+FDD0..FDEF are no characters; rows that hold them are refused before they come here (D08).
NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters=NONCHARACTERS), max_size=12)


@settings(deadline=None, max_examples=40)
@given(contents=st.lists(words, min_size=1, max_size=5), system=st.none() | words)
def test_outline_gives_the_text_and_targets_of_a_full_rendering(
    folders: Mapping[str, Path], contents: list[str], system: str | None
) -> None:
    for kind in ("chatml", "llama3", "generation"):
        tokenizer = ChatTokenizer.from_folder(folders[kind])
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages += [
            {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(contents)
        ]
        assert tokenizer.writer is not None
        outline = outline_of(tokenizer.writer, [message["role"] for message in messages], 0)
        assert outline is not None
        texts = [message["content"] for message in messages]
        assert outline.text(texts) == tokenizer.render(messages, add_generation_prompt=False)


def test_template_that_looks_into_contents_has_no_outline(folders: Mapping[str, Path]) -> None:
    tokenizer = ChatTokenizer.from_folder(folders["thinking"])
    assert tokenizer.writer is not None
    assert outline_of(tokenizer.writer, ["user", "assistant"], 0) is None
    for look in (
        "content | length",
        "content[0]",
        "content | upper",
        "'a' in content",
        "content == ''",
        "[m] | tojson",
    ):
        source = "{% for m in messages %}{% set content = m['content'] %}{{ content ~ (" + look + ") }}{% endfor %}"
        looking = _with_source(folders["chatml"], source)
        assert looking.writer is not None
        assert outline_of(looking.writer, ["user"], 0) is None, look


def _with_source(folder: Path, source: str) -> ChatTokenizer:
    from qlora_hal.data.tokens.tokenizer_files import read_folder

    return ChatTokenizer(read_folder(folder), template=source, template_name="test")


@pytest.mark.fault("D18")
@pytest.mark.parametrize("kind", ["chatml", "llama3", "metaspace", "thinking"])
def test_special_tokens_in_a_message_are_text_and_counted(
    kind: str,
    folders: Mapping[str, Path],
    prepared: Callable[..., PreparedData],
    conversation: Conversation,
    trained_text: Trained,
) -> None:
    tokenizer = ChatTokenizer.from_folder(folders[kind])
    sign = {"llama3": "<|eot_id|>", "metaspace": "</s>"}.get(kind, "<|im_end|>")
    clean = prepared([conversation("a b", "one")], tokenizer=tokenizer)
    row = conversation(f"a {sign} b", f"one {sign} two")
    data = prepared([row], tokenizer=tokenizer)
    ids = data.train.row(0)[0].tolist()
    number = tokenizer.special.ids[sign]
    assert ids.count(number) == clean.train.row(0)[0].tolist().count(number)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert f"a {sign} b" in text
    assert trained_text(data, tokenizer)[-1].endswith(f"one {sign} two{sign}")
    assert data.report.train.special_in_text == {sign: 2}
    assert data.report.train.rows_with_special == 1
    assert any("encoded as text" in line for line in data.report.lines())
    assert tokenizer.encode_chat(row["messages"][:1]).count(number) == tokenizer.encode_chat(
        conversation("a b")["messages"]
    ).count(number)


@pytest.mark.fault("D09")
def test_pad_id_is_never_an_end_token(folders: Mapping[str, Path]) -> None:
    for kind in ("pad_is_eos", "bare", "metaspace"):
        tokenizer = ChatTokenizer.from_folder(folders[kind])
        assert tokenizer.pad_id not in tokenizer.stop_ids
        assert "eos stays trained" in tokenizer.notes[0]
    assert (
        ChatTokenizer.from_folder(folders["metaspace"])
        .notes[0]
        .startswith("the tokenizer has no pad token; id 0 (<unk>) is used for padding")
    )
    assert "also an end token" in ChatTokenizer.from_folder(folders["pad_is_eos"]).notes[0]
    assert not ChatTokenizer.from_folder(folders["chatml"]).notes


def _declaring(folder: Path, base: Path, **named: str) -> Path:
    """The model folder `base` with other named tokens, which its tokenizer.json need not have."""
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **named}), encoding="utf-8")
    return folder


@pytest.mark.fault("D09")
@pytest.mark.parametrize("more", [{}, {"unk_token": "<new unk>"}])
def test_pad_token_beyond_the_models_embeddings_counts_as_absent(
    more: dict[str, str], folders: Mapping[str, Path], tmp_path: Path
) -> None:
    own = ChatTokenizer.from_folder(folders["chatml"]).vocabulary_size
    folder = _declaring(tmp_path, folders["chatml"], pad_token="<new pad>", **more)
    exact = ChatTokenizer.from_folder(folder, model_vocabulary_size=own)
    assert exact.pad_id < own
    assert exact.pad_id not in exact.stop_ids
    assert f"and the model has {own} tokens; id {exact.pad_id} " in exact.notes[0]
    assert exact.with_template("plain").pad_id == exact.pad_id
    for padded in (own + 64, None):
        roomy = ChatTokenizer.from_folder(folder, model_vocabulary_size=padded)
        assert roomy.decode([roomy.pad_id], skip_special_tokens=False) == "<new pad>"
        assert not roomy.notes


@pytest.mark.fault("D13")
@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_named_token_beyond_the_models_embeddings_is_refused(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    own = ChatTokenizer.from_folder(folders["chatml"]).vocabulary_size
    folder = _declaring(tmp_path, folders["chatml"], **{name: "<new>"})
    with pytest.raises(DataError, match=rf"QH-D13.*{name} '<new>' has id {own}; the model has {own} tokens") as caught:
        ChatTokenizer.from_folder(folder, model_vocabulary_size=own)
    assert caught.value.exit_status == 4
    ChatTokenizer.from_folder(folder, model_vocabulary_size=own + 1)


def test_stop_ids_hold_eos_turn_end_and_the_models_own(folders: Mapping[str, Path], tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(folders["llama3"])
    assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.special.ids["<|eot_id|>"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["chatml"] / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert ChatTokenizer.from_folder(tmp_path).stop_ids == (2, 0)


def test_template_file_of_transformers_5_is_read_before_the_configuration(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["chatml"] / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    first = ChatTokenizer.from_folder(tmp_path)
    assert first.render([{"role": "user", "content": "x"}], add_generation_prompt=True) == "[x]"
    assert first.hash != ChatTokenizer.from_folder(folders["chatml"]).hash


def test_unreadable_tokenizer_names_its_file(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"QH-D52") as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in caught.value.where
    (tmp_path / "tokenizer.json").write_bytes((folders["chatml"] / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="names no eos_token"):
        ChatTokenizer.from_folder(tmp_path)


@pytest.mark.fault("D12")
def test_missing_template_lists_the_built_in_ones(
    folders: Mapping[str, Path], prepared: Callable[..., PreparedData], conversation: Conversation
) -> None:
    bare = ChatTokenizer.from_folder(folders["bare"])
    for on_bad_row in ("fail", "skip"):
        with pytest.raises(DataError, match=r"QH-D12.*no chat template") as caught:
            prepared([conversation("a", "b")], tokenizer=bare, on_bad_row=on_bad_row)
        assert caught.value.exit_status == 4
        assert all(name in caught.value.fix for name in BUILT_IN_TEMPLATES)
    with pytest.raises(DataError, match=r"QH-D12.*neither built in nor as a file"):
        ChatTokenizer.from_folder(folders["bare"], chat_template="chatlm")
    with pytest.raises(DataError, match=r"QH-D12.*not a valid Jinja template"):
        _with_source(folders["chatml"], "{% for %}")


@pytest.mark.fault("D12")
def test_refused_role_order_names_row_and_role(
    folders: Mapping[str, Path], prepared: Callable[..., PreparedData], conversation: Conversation
) -> None:
    tokenizer = ChatTokenizer.from_folder(folders["metaspace"])
    odd = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    }
    with pytest.raises(DataError, match=r"QH-D12.*refuses message 3 \(role assistant\)") as caught:
        prepared([conversation("a", "b"), odd], tokenizer=tokenizer)
    assert caught.value.context["row"] == 2
    assert caught.value.where == "data:2"
    data = prepared([conversation("a", "b"), odd], tokenizer=tokenizer, on_bad_row="skip")
    assert data.report.train.bad_row_count == 1
    typo = {"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"QH-D12.*'asistant'.*assistant"):
        prepared([typo], tokenizer=tokenizer)


@pytest.mark.fault("D12")
@pytest.mark.parametrize("place", [3, 1000, 2000])
def test_the_message_that_is_refused_is_found_in_few_renderings(
    place: int, folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ChatTokenizer.from_folder(folders["metaspace"])
    messages = [{"role": ("user", "assistant")[number % 2], "content": "a"} for number in range(2001)]
    messages.insert(place, messages[place - 1])
    template, rendered = tokenizer.template, 0
    assert template is not None
    trace = template.trace

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal rendered
        rendered += 1
        return trace(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(template, "trace", counted)
    with pytest.raises(DataError, match=rf"QH-D12.*refuses message {place + 1} ") as caught:
        tokenizer.render(messages, add_generation_prompt=False)
    assert rendered < 30
    assert len(str(caught.value)) < 1000
    assert str(messages[place]["role"]) in caught.value.cause


@pytest.mark.fault("X04")
def test_a_template_that_is_a_large_file_or_none_is_not_read_whole(folders: Mapping[str, Path], tmp_path: Path) -> None:
    large = tmp_path / "large.jinja"
    with large.open("ab") as stream:
        stream.truncate(2**40)
    with pytest.raises(UnsafeInputError, match=r"QH-X04.*large.jinja has 1099511627776 bytes"):
        ChatTokenizer.from_folder(folders["bare"], chat_template=str(large))
    folder = tmp_path / "model"
    shutil.copytree(folders["chatml"], folder)
    (folder / "additional_chat_templates").mkdir()
    more = folder / "additional_chat_templates" / "x.jinja"
    more.symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"QH-D52.*not a regular file"):
        ChatTokenizer.from_folder(folder)
    more.unlink()
    more.symlink_to(more)
    with pytest.raises(ModelError, match=r"QH-D52.*symbolic links"):
        ChatTokenizer.from_folder(folder)
    more.unlink()
    more.symlink_to(large)
    with pytest.raises(UnsafeInputError, match=r"QH-X04.*x.jinja has"):
        ChatTokenizer.from_folder(folder)


@pytest.mark.fault("D08")
def test_a_prompt_with_the_signs_of_generation_is_refused_where_they_would_be_taken_for_marks(
    folders: Mapping[str, Path],
) -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    prompt = [{"role": "user", "content": "a\ufdd3b"}]
    with pytest.raises(DataError, match="QH-D08"):
        _with_source(folders["chatml"], source).encode_chat(prompt)
    plain = _with_source(folders["chatml"], "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert plain.decode(plain.encode_chat(prompt)) == "a\ufdd3b"


@pytest.mark.fault("X04")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 1000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaa' }}{% endfor %}",
        "x" * 70_000,
    ],
)
def test_template_that_writes_or_is_too_much_is_refused(source: str, folders: Mapping[str, Path]) -> None:
    with pytest.raises(UnsafeInputError, match="QH-X04"):
        _with_source(folders["chatml"], source).render([{"role": "user", "content": "a"}], add_generation_prompt=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ (messages | attr('__class__')).__init__.__globals__ }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    ],
)
def test_template_cannot_leave_the_sandbox(source: str, folders: Mapping[str, Path]) -> None:
    with pytest.raises(DataError, match="QH-D12"):
        _with_source(folders["chatml"], source).render([{"role": "user", "content": "a"}], add_generation_prompt=False)


def test_date_in_a_template_is_fixed_and_noted(folders: Mapping[str, Path]) -> None:
    tokenizer = _with_source(folders["chatml"], "{{ strftime_now('%d %b %Y') }}")
    assert tokenizer.render([{"role": "user", "content": "a"}], add_generation_prompt=False) == "26 Jul 2024"
    assert any("fixed date" in note for note in tokenizer.notes)
