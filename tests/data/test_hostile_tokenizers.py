"""tokenizer.json of strangers: what would take memory or time is refused before the library reads it, and whatever the
library raises has a type."""

from __future__ import annotations

import json
import resource
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
def test_what_the_library_raises_or_panics_at_has_a_type(tmp_path: Path, change: Change) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ModelError, match="QH-D52") as caught:
        ChatTokenizer.from_folder(tmp_path)
    assert caught.value.where == str(path)


def test_a_panic_while_rows_are_encoded_has_a_type(tmp_path: Path) -> None:
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
