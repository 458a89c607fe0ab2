"""Ids of a folder are those that transformers gives, whatever files its tokens are declared in; where tokenizer.json is
read otherwise than transformers 5 would, that is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlora_hal.data import ChatTokenizer, PreparedData
from qlora_hal.data.tokens.rebuilt_tokenizers import _PIPELINES
from qlora_hal.errors import ModelError

TEXT = ["The quick brown fox jumps over the lazy dog.", "one two three, it's 123 [INST] a [/INST]"] * 8
SPECIAL = ["<unk>", "<s>", "</s>"]
GENERIC = "PreTrainedTokenizerFast"


def _trained(model: Any, trainer: Any, **pipeline: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in pipeline.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXT, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def _bytes(pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline = {"normalizer": normalizer} if normalizer else {}
    return _trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizer, decoder=decoders.ByteLevel(), **pipeline)


def _pieces(**pipeline: Any) -> Tokenizer:
    fallback = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=fallback, show_progress=False)
    trained = _trained(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True), trainer, **pipeline)
    saved = json.loads(trained.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(saved))


def _prepending() -> Tokenizer:
    """As Llama 2 has it: a normalizer puts the sign of a space before each stretch of text."""
    return _pieces(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def _metaspace(scheme: str) -> Tokenizer:
    return _pieces(pre_tokenizer=pre_tokenizers.Metaspace("▁", scheme, split=False))


def _unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return _trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace("▁", "first"))


def _word_pieces() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )


MADE: Mapping[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": _bytes,
    "BPE with a prepending normalizer": _prepending,
    "BPE with Metaspace": lambda: _metaspace("first"),
    "Unigram": _unigram,
    "WordPiece": _word_pieces,
}
made = cache(lambda kind: MADE[kind]())

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def folder_of(path: Path, tokenizer: Tokenizer, files: Mapping[str, object] | None = None, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    written = {"tokenizer_config.json": {"tokenizer_class": GENERIC, **NAMED, **config}, **(files or {})}
    for name, content in written.items():
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path


def of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _token(content: str, **flags: bool) -> dict[str, object]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def _declarations(size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """How a folder may declare tokens beside tokenizer.json: (name, arguments of folder_of)."""
    yield "none", {}
    two = {str(size): _token("<|zz_start|>"), str(size + 1): _token("<|zz_end|>", special=False)}
    yield "added_tokens_decoder", {"added_tokens_decoder": two}
    flags = {str(size): _token("<|zz_start|>", lstrip=True), "2": _token("</s>", rstrip=True)}
    yield "added_tokens_decoder with flags", {"added_tokens_decoder": flags}
    yield "additional_special_tokens", {"additional_special_tokens": ["<|zz_start|>", "<|zz_end|>"]}
    yield "extra_special_tokens by name", {"extra_special_tokens": {"start_token": "<|zz_start|>"}}
    yield "a token of the model", {"image_token": "<|zz_start|>", "pad_token": "<|zz_end|>"}
    added = {"added_tokens.json": {"<|zz_end|>": size + 1, "<|zz_start|>": size}}
    yield "added_tokens.json", {"files": added}
    special_map = {"pad_token": _token("<|zz_start|>", lstrip=True), "eos_token": "</s>"}
    yield "special_tokens_map.json", {"files": {"special_tokens_map.json": special_map}}
    both = {**added, "special_tokens_map.json": {"additional_special_tokens": ["<|zz_end|>"], "bos_token": "<s>"}}
    yield "added_tokens.json with a map", {"files": both}


FOLDERS = [(kind, name) for kind in MADE for name, _ in _declarations(0)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[ChatTokenizer, Any]]:
    """(our tokenizer, transformers') of a made folder."""
    root = tmp_path_factory.mktemp("folders")

    @cache
    def pair(kind: str, name: str) -> tuple[ChatTokenizer, Any]:
        tokenizer = made(kind)
        given = dict(_declarations(tokenizer.get_vocab_size()))[name]
        folder = folder_of(root / kind / name, tokenizer, **given)
        return ChatTokenizer.from_folder(folder), of_transformers(folder)

    return pair


words = st.sampled_from(
    ["The quick", " fox", "it's", "123", "\n", "  ", " ", "[INST]", "日本 é", "e\u0301", "🙂", "<s>", "</s>", "<unk>",
     "<|zz_start|>", "<|zz_end|>", "<|zz", "ÀB"]
)  # fmt: skip
texts = st.lists(words, max_size=8).map("".join) | st.text(st.characters(codec="utf-8"), max_size=12)


@pytest.mark.parametrize(("kind", "name"), FOLDERS, ids=lambda part: str(part).replace(" ", "_"))
@settings(deadline=None, max_examples=25)
@given(text=texts)
def test_ids_equal_those_of_transformers(
    kind: str, name: str, text: str, pairs: Callable[[str, str], tuple[ChatTokenizer, Any]]
) -> None:
    ours, theirs = pairs(kind, name)
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert [*ours.opening_ids, *ours.encode(text)] == theirs(text).input_ids
    assert not [note for note in ours.notes if "pad" not in note]


def test_a_declared_token_is_one_token_with_its_declared_id(
    pairs: Callable[[str, str], tuple[ChatTokenizer, Any]],
) -> None:
    for kind in ("byte-level BPE", "Unigram"):
        size = made(kind).get_vocab_size()
        for name in ("added_tokens_decoder", "added_tokens.json"):
            ours, _ = pairs(kind, name)
            assert ours.encode("<|zz_start|><|zz_end|>") == [size, size + 1]
            assert ours.vocabulary_size == size + 2


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"9000": _token("<|zz|>")}, "declares the token '<|zz|>' with id 9000; tokenizer.json does not have it"),
        ({"one": _token("<|zz|>")}, "'one'"),
        ({"301": "<|zz|>"}, "'<|zz|>'"),
        ({"301": {"id": 3}}, "{'id': 3}"),
    ],
)
def test_a_token_that_cannot_have_its_declared_id_is_refused_by_name(
    declared: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, _bytes(), added_tokens_decoder=declared)
    with pytest.raises(ModelError, match="QH-D52") as caught:
        ChatTokenizer.from_folder(folder)
    assert said in caught.value.message
    assert caught.value.where.endswith("tokenizer_config.json")


def test_an_id_that_tokenizer_json_gives_otherwise_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, _bytes(), added_tokens_decoder={"7": _token("<s>")})
    ours = ChatTokenizer.from_folder(folder)
    assert ours.encode("<s>") == of_transformers(folder)("<s>", add_special_tokens=False).input_ids == [1]
    assert any("gives '<s>' the id 7; tokenizer.json has 1, which is used" in note for note in ours.notes)


def test_a_named_token_that_two_files_name_otherwise_is_transformers_choice(tmp_path: Path) -> None:
    files = {"special_tokens_map.json": {"eos_token": "<unk>"}}
    folder = folder_of(tmp_path / "a", _bytes(), files)
    ours = ChatTokenizer.from_folder(folder)
    assert ours.eos_id == of_transformers(folder).eos_token_id == 0
    assert any("special_tokens_map.json names the eos_token '<unk>', which is used" in note for note in ours.notes)
    folder = folder_of(tmp_path / "b", _bytes(), files, added_tokens_decoder={"2": _token("</s>")})
    assert ChatTokenizer.from_folder(folder).eos_id == of_transformers(folder).eos_token_id == 2


@pytest.mark.parametrize("kind", ["dangling link", "pipe", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    ],
)
def test_a_file_that_is_there_and_cannot_be_read_is_not_taken_for_absent(tmp_path: Path, name: str, kind: str) -> None:
    """In a cache that was cleaned, links to files that are gone stay: without its template, or its tokens, a model
    would be trained on another text."""
    folder = folder_of(tmp_path / "folder", _bytes())
    (folder / name).unlink(missing_ok=True)
    if kind == "dangling link":
        (folder / name).symlink_to(tmp_path / "gone")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(ModelError, match="QH-D52") as refused:
        ChatTokenizer.from_folder(folder)
    assert refused.value.where.endswith(name)


def test_split_special_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"QH-D52.*split_special_tokens"):
        ChatTokenizer.from_folder(folder_of(tmp_path, _bytes(), split_special_tokens=True))


def test_merges_dropped_at_random_are_turned_off_and_told(tmp_path: Path) -> None:
    tokenizer = _bytes()
    tokenizer.model.dropout = 0.9
    ours = ChatTokenizer.from_folder(folder_of(tmp_path, tokenizer))
    assert len({tuple(ours.encode("The quick brown fox")) for _ in range(20)}) == 1
    assert any("dropout" in note for note in ours.notes)


# what opens a text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says", [True, False, None])
@pytest.mark.parametrize("opening", ["<s>", "", "<unk> <s>", "<unk>"])
def test_a_row_of_text_opens_as_transformers_opens_it(
    opening: str, says: bool | None, tmp_path: Path, prepared: Callable[..., PreparedData]
) -> None:
    tokenizer = _bytes()
    ids = [(token, tokenizer.token_to_id(token)) for token in opening.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{opening} $A".strip(), special_tokens=ids)
    folder = folder_of(tmp_path / "folder", tokenizer, None, **({} if says is None else {"add_bos_token": says}))
    ours, theirs = ChatTokenizer.from_folder(folder), of_transformers(folder)
    row = prepared([{"text": "one two"}], tokenizer=ours).train.row(0)[0].tolist()
    assert row == [*theirs("one two").input_ids, ours.eos_id]
    told = [note for note in ours.notes if "add_bos_token" in note]
    assert bool(told) == (says is not None and says != ("<s>" in opening))


# classes that transformers builds anew -------------------------------------------------------------------------------

_DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
REBUILT: Mapping[str, tuple[Callable[[], Tokenizer], str, dict[str, object], str]] = {
    "Llama 2": (_prepending, "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, "'<s>a'"),
    "Llama 2, legacy": (_prepending, "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True}, "'<s> a'"),
    "Llama 2 without a prefix": (
        _prepending, "llama", {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}, "'a b'",
    ),
    "Llama with Metaspace": (lambda: _metaspace("first"), "llama", {"tokenizer_class": "LlamaTokenizerFast"}, ""),
    "Llama with bytes": (_bytes, "llama", {"tokenizer_class": "LlamaTokenizer"}, ""),
    "Mistral": (_prepending, "mistral", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, ""),
    "Phi 3": (_prepending, "phi3", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, ""),
    "Llama, generic": (_prepending, "llama", {"tokenizer_class": GENERIC}, ""),
    "GPT-2": (_bytes, "gpt2", {"tokenizer_class": "GPT2Tokenizer"}, ""),
    "GPT-2 with a prefix": (_bytes, "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "'a b'"),
    "GPT-2 with digits": (lambda: _bytes(_DIGITS), "gpt2", {"tokenizer_class": "GPT2Tokenizer"}, '"it\'s 123'),
    "digits, generic": (lambda: _bytes(_DIGITS), "gpt2", {"tokenizer_class": GENERIC}, ""),
    "GPT-NeoX": (
        lambda: _bytes(None, normalizers.NFC()), "gpt_neox", {"tokenizer_class": "GPTNeoXTokenizerFast"}, "",
    ),
    "Qwen 3 of the class": (
        lambda: _bytes(_PIPELINES["Qwen2Tokenizer"]({})[1], normalizers.NFC()),
        "qwen3", {"tokenizer_class": "Qwen2Tokenizer"}, "",
    ),
    "Qwen 2 with another cut": (_bytes, "qwen2", {"tokenizer_class": GENERIC}, "'"),
    "Gemma": (
        lambda: _pieces(normalizer=normalizers.Replace(" ", "▁")), "gemma", {"tokenizer_class": "GemmaTokenizer"}, "",
    ),
    "Gemma that prepends": (_prepending, "gemma", {"tokenizer_class": "GemmaTokenizer"}, "'a b'"),
}  # fmt: skip


TRANSFORMERS = tuple(map(int, version("transformers").split(".")[:2]))
NOT_AS_NOW = ("Llama with bytes",) if TRANSFORMERS < (5, 23) else ()
"""What an earlier release rebuilds otherwise than transformers 5.23, which the notes are about."""


@pytest.mark.parametrize("kind", REBUILT)
def test_where_transformers_builds_a_tokenizer_anew_ids_are_equal_or_the_difference_is_told(
    kind: str, tmp_path: Path
) -> None:
    make, family, config, probe = REBUILT[kind]
    folder = folder_of(tmp_path, make(), {"config.json": {"model_type": family}}, **config)
    ours, theirs = ChatTokenizer.from_folder(folder), of_transformers(folder)
    assert ours.encode("<s>[INST] a") == make().encode("<s>[INST] a", add_special_tokens=False).ids
    told = [note for note in ours.notes if "builds" in note]
    differing = [
        text
        for text in ("a b", "<s>a", "<s>[INST] a", "<s> a", " a", "a\n\nb", "it's 123, A.b!", "e\u0301")
        if ours.encode(text) != theirs(text, add_special_tokens=False).input_ids
    ]
    assert bool(told) == bool(probe)
    # A cut that no merge of this vocabulary crosses is told, too: in other texts it may be crossed.
    assert bool(differing) == bool(probe) or kind in ("GPT-2 with digits", *NOT_AS_NOW)
    if probe:
        assert f"splits {probe}" in told[0]
        assert config["tokenizer_class"] == GENERIC or str(config["tokenizer_class"]).removesuffix("Fast") in told[0]


def test_the_remedy_that_is_told_makes_transformers_give_the_same_ids(tmp_path: Path) -> None:
    make, family, config, _ = REBUILT["Llama 2"]
    folder = folder_of(tmp_path, make(), {"config.json": {"model_type": family}}, **config)
    before = ChatTokenizer.from_folder(folder)
    assert before.encode("<s>[INST] a") != of_transformers(folder)("<s>[INST] a", add_special_tokens=False).input_ids
    folder_of(tmp_path, make(), None, **{**config, "tokenizer_class": GENERIC})
    after = of_transformers(folder)
    assert before.encode("<s>[INST] a") == after("<s>[INST] a", add_special_tokens=False).input_ids
    assert not [note for note in ChatTokenizer.from_folder(folder).notes if "builds" in note]


@pytest.mark.parametrize("name", _PIPELINES)
def test_the_pipelines_told_of_are_those_that_transformers_builds(name: str, tmp_path: Path) -> None:
    make = _prepending if name in ("LlamaTokenizer", "GemmaTokenizer") else _bytes
    for options in ({}, {"add_prefix_space": True}, {"add_prefix_space": False}, {"legacy": True}):
        folder = folder_of(tmp_path, make(), None, tokenizer_class=name, **options)
        theirs = of_transformers(folder).backend_tokenizer
        for ours, part in zip(_PIPELINES[name](options), (theirs.normalizer, theirs.pre_tokenizer), strict=True):
            assert (ours is None) == (part is None)
            assert ours is None or json.loads(ours.__getstate__()) == json.loads(part.__getstate__())
