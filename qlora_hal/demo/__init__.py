"""The embedded demo: a small pretrained Llama with its own tokenizer, and instruction data for it.

Both are package data, so the demo runs from an installed wheel without a network. How they were made is described
in the model card, ``model/README.md``.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["data_path", "model_path"]

_HERE = Path(__file__).resolve().parent
_FILES = {
    "train": "train.jsonl",
    "validation": "validation.jsonl",
    "test": "test.jsonl",
    "test_text": "test_text.txt",
}


def model_path() -> Path:
    """The folder of the demo model: a Hugging Face Llama checkpoint with its tokenizer."""
    return _HERE / "model"


def data_path(split: str) -> Path:
    """The file of a split: ``train``, ``validation`` or ``test`` rows of ``messages``, or the plain ``test_text``."""
    try:
        return _HERE / "data" / _FILES[split]
    except KeyError:
        raise ValueError(f"unknown split {split!r}; the demo has {', '.join(_FILES)}") from None
