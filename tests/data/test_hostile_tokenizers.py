"""tokenizer.json of strangers: what would take memory or time is refused before the library reads it, and whatever the
library raises has a type."""

from __future__ import annotations

import base64
import json
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.data.tokens.guarded_tokenizer import read_tokenizer
from qlora_hal.data.tokens.tokenizer import ChatTokenizer
from qlora_hal.data.tokens.tokenizer_checks import MAX_ID
from qlora_hal.errors import ModelError, QloraHalError, UnsafeInputError

Change = Callable[[dict[str, Any]], object]


def sound() -> dict[str, Any]:
    """A byte pair encoding of the printable signs of ASCII."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    letters = {chr(code): number for number, code in enumerate(range(33, 127), start=2)}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<unk>", **special}, {"id": 1, "content": "</s>", **special}],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": {"<unk>": 0, "</s>": 1, **letters}, "merges": []},
    }


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def doubling(count: int) -> list[dict[str, Any]]:
    return [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * count


def charsmap(replacement: str) -> dict[str, Any]:
    """SentencePiece's normalizer with a table that puts `replacement` in the place of every z."""
    trie = [0] * 512
    trie[0], trie[378] = 256 << 10, (368 << 10) | (1 << 8) | ord("z")
    raw = (2048).to_bytes(4, "little") + struct.pack("<512I", *trie) + replacement.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def word_piece(longest_word: int) -> dict[str, Any]:
    return {
        "type": "WordPiece",
        "unk_token": "<unk>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": longest_word,
        "vocab": {"<unk>": 0, "</s>": 1, "a": 2, "##a": 3},
    }


def added(*contents: str, normalized: bool = False) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": True}
    return [{"id": 100 + number, "content": content, **flags} for number, content in enumerate(contents)]


def template(*pieces: dict[str, Any], ids: int = 1) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["a"] * ids}},
    }


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BEGIN = {"SpecialToken": {"id": "<s>", "type_id": 0}}


def written(folder: Path, change: Change) -> Path:
    content = sound()
    change(content)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_a_sound_tokenizer_is_read(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(written(tmp_path, lambda content: None))
    assert tokenizer.decode(tokenizer.encode("abc", add_special_tokens=False).ids) == "a b c"


@pytest.mark.fault("X15")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"]["vocab"].update(zz=2**30), "id 1073741824"),
        (lambda c: c["model"]["vocab"].update(zz=2**32 - 1), "id 4294967295"),
        (lambda c: c["model"]["vocab"].update(zz=MAX_ID + 1), f"largest that is read is {MAX_ID}"),
        (lambda c: c["model"]["vocab"].update(zz=-1), "id -1"),
        (lambda c: c["model"]["vocab"].update(zz=10**50), "id of 167 bits"),
        (lambda c: c["added_tokens"].append({**c["added_tokens"][0], "content": "<x>", "id": 2**31}), "id 2147483648"),
        (lambda c: c.update(model={"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}), "id 2147483648"),
        (lambda c: c.update(normalizer={"type": "Sequence", "normalizers": doubling(24)}), "normalizer makes up to"),
        (lambda c: c.update(decoder={"type": "Sequence", "decoders": doubling(24)}), "decoder makes up to"),
        (lambda c: c.update(normalizer={"type": "Prepend", "prepend": "a" * 65}), "normalizer makes up to 65"),
        (
            lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 31}),
            "pre_tokenizer makes up to",
        ),
        (lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}), "64 parts"),
        (lambda c: c.update(decoder={"type": "Strip", "content": "a", "start": 2**62, "stop": 0}), "strips start"),
        (lambda c: c.update(pre_tokenizer=split("a" * 9000)), "regular expression of more than"),
        (lambda c: c.update(pre_tokenizer=split(r"(a*)\1")), "refers to itself"),
        (lambda c: c.update(pre_tokenizer=split(r"(?<x>a\g<x>?b)")), "refers to itself"),
        (lambda c: c["model"].update(continuing_subword_prefix="a" * 10_000), "has 10000 characters"),
        (lambda c: c.update(normalizer=charsmap("y" * 20_000)), "normalizer makes up to 2e"),
        (
            lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [charsmap("y" * 20)] * 2}),
            "makes up to 400",
        ),
        (
            lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "A" * 5_000_000}),
            "table of replacements",
        ),
        (lambda c: c.update(model=word_piece(10**9)), "max_input_chars_per_word is 1000000000"),
        (lambda c: c.update(model=word_piece(10**50)), "max_input_chars_per_word is of 167 bits"),
        (
            lambda c: c.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a" * 999, -1.0]]}),
            "a piece of 999 characters",
        ),
        (lambda c: c["added_tokens"].extend(added("q" * 20_000_000)), "a token of 20000000 characters"),
        (lambda c: c["added_tokens"].extend(added(*map(str, range(150_000)))), "holds 150002 tokens"),
        (lambda c: c["added_tokens"].extend(added(*[f"{n:05}" * 20 for n in range(4_000)])), "tokens of 3"),
        (
            lambda c: (
                c["added_tokens"].extend(added(*[f"{n:04}" * 9 for n in range(999)], normalized=True)),
                c.update(normalizer=charsmap("y" * 60)),
            ),
            "tokens of 1984688",
        ),
        (lambda c: c.update(post_processor=template(*[TEXT] * 65)), "post_processor makes up to 65"),
        (lambda c: c.update(post_processor=template(*[BEGIN] * 64, TEXT, ids=99)), "adds 6336 ids"),
    ],
)
def test_a_tokenizer_that_takes_memory_or_time_is_refused_at_once(tmp_path: Path, change: Change, words: str) -> None:
    path = written(tmp_path, change)
    started, peak = time.process_time(), peak_bytes()
    with pytest.raises(UnsafeInputError, match=words) as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert (caught.value.code, caught.value.where) == ("QH-X15", str(path))
    assert time.process_time() - started < 2.0
    assert peak_bytes() - peak < 300 * 10**6


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(normalizer=charsmap("صلى الله عليه وسلم")),  # the longest of NFKC
        lambda c: c.update(model=word_piece(200)),
        lambda c: c["added_tokens"].extend(added(*[f"<|s_{number}|>" for number in range(65_536)])),
        lambda c: c["added_tokens"].extend(added(*["<" + "x" * number + ">" for number in range(600)])),
        lambda c: c.update(post_processor=template(BEGIN, TEXT, BEGIN)),
    ],
)
def test_the_largest_of_what_honest_tokenizers_hold_is_read(tmp_path: Path, change: Change) -> None:
    assert read_tokenizer(written(tmp_path, change)).encode("a").ids


@pytest.mark.fault("X15")
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("vocab.json", '{"</s>": 0, "a": 4000000000}', "vocab.json holds the id 4000000000"),
        ("added_tokens.json", '{"</s>": 4000000000}', "added_tokens.json holds the id 4000000000"),
    ],
)
def test_an_id_in_a_folder_without_tokenizer_json_is_refused_before_it_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, words: str
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    write_for_gpt2(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UnsafeInputError, match=words) as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert (caught.value.code, caught.value.where) == ("QH-X15", str(tmp_path / name))


def test_a_file_that_is_too_large_or_none_is_refused_before_it_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    write_for_gpt2(tmp_path)
    with (tmp_path / "merges.txt").open("ab") as stream:
        stream.truncate(2**40)
    with pytest.raises(ModelError, match="1099511627776 bytes, at most") as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert (caught.value.code, caught.value.where) == ("QH-D52", str(tmp_path / "merges.txt"))
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "merges.txt").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"QH-D52.*not a regular file"):
        ChatTokenizer.from_folder(tmp_path)


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # of transformers 5.10's own conversion
@pytest.mark.fault("X15")
def test_a_converted_tokenizer_is_checked_like_any_other(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_for_gpt2(tmp_path)
    assert ChatTokenizer.from_folder(tmp_path).encode("ab")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "sep_token": "</s>", "eos_token": "</s>"})
    )
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n</s>\n[PAD]\n[MASK]\na\n")
    assert ChatTokenizer.from_folder(tmp_path).encode("a")


def write_for_gpt2(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "vocab.json").write_text(json.dumps({"</s>": 0, "a": 1, "b": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.fault("X15")
def test_tokens_that_are_declared_beside_tokenizer_json_are_bounded_too(tmp_path: Path) -> None:
    path = written(tmp_path, lambda content: None)
    many = [f"{number:05}" * 20 for number in range(4_000)]
    for name, declared in {
        "tokenizer_config.json": {"eos_token": "</s>", "additional_special_tokens": many},
        "added_tokens.json": {"</s>": 1, **{text: 100 + number for number, text in enumerate(many)}},
    }.items():
        (path.parent / name).write_text(json.dumps(declared))
        with pytest.raises(UnsafeInputError, match=r"QH-X15.*tokens of 3\d{5} characters"):
            ChatTokenizer.from_folder(tmp_path)
        (path.parent / name).write_text(json.dumps({"eos_token": "</s>"}) if "config" in name else "{}")


@pytest.mark.fault("X15")
@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(a|ab)(c|bcd)*(a*)*$", "(.*?,){30}P", "a*a*a*a*a*a*a*b", "(\\s+)+\\S\\z"]
)
def test_a_regular_expression_that_never_ends_is_found_when_the_tokenizer_is_read(tmp_path: Path, pattern: str) -> None:
    written(tmp_path, lambda content: content.update(pre_tokenizer=split(pattern)))
    started = time.process_time()
    with pytest.raises(QloraHalError, match=r"QH-D52|QH-X15"):
        ChatTokenizer.from_folder(tmp_path)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    "pattern",
    [
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
        r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}|\s+",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\p{N}]+",
    ],
)
def test_the_expressions_of_published_tokenizers_are_taken(tmp_path: Path, pattern: str) -> None:
    written(tmp_path, lambda content: content.update(pre_tokenizer=split(pattern)))
    assert ChatTokenizer.from_folder(tmp_path).encode("abc")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAP////////8="}),
        lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAA="}),
        lambda c: c.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
        lambda c: c.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {},
            }
        ),
        lambda c: c["model"].update(continuing_subword_prefix="é", merges=[["a", "b"]]),
        lambda c: c["model"].update(merges=[["a", "b"]]),
        lambda c: c.update(pre_tokenizer=split("(?<=a{0,9999}b")),
        lambda c: c.update(model={"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}),
        lambda c: c.update(model=5),
        lambda c: c.clear(),
    ],
)
def test_what_the_library_raises_or_panics_at_has_a_type(
    tmp_path: Path, change: Change, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing of the library's own stands before it in the terminal."""
    path = written(tmp_path, change)
    with pytest.raises(ModelError, match="QH-D52") as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert caught.value.where == str(path)
    assert capfd.readouterr().err == ""


def test_a_panic_while_rows_are_encoded_has_a_type(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # It takes long on no text of its own signs, which are classes here.
    written(tmp_path, lambda content: content.update(pre_tokenizer=split("(?:[x-z][p-r]|[x-z][p-r])*[!-.]")))
    tokenizer = ChatTokenizer.from_folder(tmp_path)
    text = "yq" * 40 + "? !"
    for call in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_batch([text]),
        lambda: tokenizer.encode_batch([text, "a"], offsets=False),
        lambda: tokenizer.encode_protected(text),
    ):
        with pytest.raises(ModelError, match="QH-D52"):
            call()
    assert capfd.readouterr().err == ""


def test_json_that_is_deep_large_or_wrong_is_no_tokenizer(tmp_path: Path) -> None:
    written(tmp_path, lambda content: None)
    for text in (
        "[" * 100_000,
        '{"model":' * 5_000,
        '{"model": {"vocab": {"a": ' + "9" * 5_000 + "}}}",
        "[" + "[]," * 3_000_000,
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        started, peak = time.process_time(), peak_bytes()
        with pytest.raises(ModelError, match="QH-D52"):
            ChatTokenizer.from_folder(tmp_path)
        assert time.process_time() - started < 2.0
        assert peak_bytes() - peak < 300 * 10**6


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_the_files_beside_it_are_bounded_too(tmp_path: Path, name: str) -> None:
    for text in (
        "[" * 100_000,
        '{"a":' * 5_000,
        '{"a": ' + "9" * 5_000 + "}",
        "{" + '"a":[],' * 1_500_000 + '"b":1}',
        "5",
    ):
        written(tmp_path, lambda content: None)
        (tmp_path / name).write_text(text)
        with pytest.raises(ModelError, match="QH-D52"):
            ChatTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", {"pad_token": "\ud800"}),
        ("tokenizer_config.json", {"extra_special_tokens": ["a", "\udfff"]}),
        ("tokenizer_config.json", {"eos_token": {"content": "x\ud800"}}),
    ],
)
def test_a_declared_token_that_is_no_unicode_text_is_refused(tmp_path: Path, name: str, content: object) -> None:
    written(tmp_path, lambda content: None)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="not Unicode text") as refusal:
        ChatTokenizer.from_folder(tmp_path)
    assert refusal.value.code == "QH-D52"


def test_thousands_of_special_tokens_are_declared_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, lambda content: None)
    more = [f"<|extra_{number}|>" for number in range(5_000)]
    (path.parent / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "additional_special_tokens": more})
    )
    started = time.process_time()
    tokenizer = ChatTokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode(more[-1])) == 1
    assert time.process_time() - started < 5.0
