"""Tokenizers made on the spot, written as a model folder has them, and row files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qlora_hal.config.schema import DataConfig
from qlora_hal.data import BUILT_IN_TEMPLATES, ChatTokenizer, PreparedData, prepare

TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is.",
    "Write a function that adds two numbers.\n\ndef add(a, b):\n    return a + b\n",
    "user assistant system model Below is an instruction that describes a task. Response: Instruction:",
    "one two three four five six seven eight nine ten, 1234567890",
] * 4

GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: what an earlier turn thought is left out, and the last turn always has a thinking part.
THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{% endif %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _byte_level(special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """As SentencePiece models are: a space is a sign of the text, a piece in front gets one, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(saved))


def _folder(path: Path, tokenizer: Tokenizer, config: Mapping[str, object]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def _with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Model folders by the kind of their tokenizer and template."""
    root = tmp_path_factory.mktemp("tokenizers")
    chatml = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    headers = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eos|>"]
    llama3 = {"bos_token": "<|begin|>", "eos_token": "<|eos|>", "chat_template": BUILT_IN_TEMPLATES["llama3"]}
    pieces = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "chatml": _folder(root / "chatml", chatml, {**ends, "chat_template": BUILT_IN_TEMPLATES["chatml"]}),
        "llama3": _folder(root / "llama3", _with_bos(_byte_level(headers), "<|begin|>"), llama3),
        "generation": _folder(root / "generation", chatml, {**ends, "chat_template": GENERATION}),
        "thinking": _folder(root / "thinking", chatml, {**ends, "chat_template": THINKING}),
        "metaspace": _folder(
            root / "metaspace",
            _with_bos(_metaspace(), "<s>"),
            {**pieces, "chat_template": BUILT_IN_TEMPLATES["mistral"]},
        ),
        "bare": _folder(root / "bare", _byte_level(["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}),
        "pad_is_eos": _folder(
            root / "pad_is_eos", chatml, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": "x"}
        ),
    }


@pytest.fixture(scope="session")
def chatml(folders: Mapping[str, Path]) -> ChatTokenizer:
    return ChatTokenizer.from_folder(folders["chatml"])


Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepared(tmp_path: Path, chatml: ChatTokenizer) -> Prepare:
    """Prepare rows (in memory, or the text of a file) with settings of the data group."""

    def run(
        rows: Sequence[Mapping[str, object]] | str | bytes | None,
        *,
        tokenizer: ChatTokenizer = chatml,
        name: str = "rows.jsonl",
        seed: int = 0,
        model_vocabulary_size: int | None = None,
        model_max_length: int | None = None,
        **settings: object,
    ) -> PreparedData:
        given = rows if isinstance(rows, list) else None
        if isinstance(rows, str | bytes):
            (tmp_path / name).write_bytes(rows.encode() if isinstance(rows, str) else rows)
            settings["path"] = str(tmp_path / name)
        return prepare(
            DataConfig.model_validate(settings),
            tokenizer,
            cache_dir=tmp_path / "cache",
            seed=seed,
            rows=given,
            model_vocabulary_size=model_vocabulary_size,
            model_max_length=model_max_length,
        )

    return run


def chat(*turns: str, system: str | None = None) -> dict[str, object]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for index, turn in enumerate(turns):
        messages.append({"role": "assistant" if index % 2 else "user", "content": turn})
    return {"messages": messages}


@pytest.fixture(scope="session")
def conversation() -> Callable[..., dict[str, object]]:
    """A row of messages in which user and assistant take turns."""
    return chat


@pytest.fixture(scope="session")
def trained_text() -> Callable[[PreparedData, ChatTokenizer, int], list[str]]:
    """The trained parts of one row, as text."""

    def run(data: PreparedData, tokenizer: ChatTokenizer, row: int = 0) -> list[str]:
        ids, mask = data.train.row(row)
        parts: list[list[int]] = []
        before = 0
        for number, trained in zip(ids.tolist(), mask.tolist(), strict=True):
            if trained and not before:
                parts.append([])
            if trained:
                parts[-1].append(number)
            before = trained
        return [tokenizer.decode(part, skip_special_tokens=False) for part in parts]

    return run
