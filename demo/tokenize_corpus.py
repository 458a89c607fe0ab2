"""Turn the corpus into two arrays of 16-bit tokens, ``train`` and ``validation``, in one compressed file.

Each document is ``<|begin|> text <|end|>``. Also records how many tokens each package gave.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "qlora_hal" / "demo" / "model"
BEGIN, END = 0, 1


def tokens_of(path: Path, tokenizer: Tokenizer, most: int) -> tuple[np.ndarray[Any, Any], Counter[str]]:
    """Up to ``most`` tokens of the documents of a file, and the number of each package."""
    arrays: list[np.ndarray[Any, Any]] = []
    counts: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        while (batch := [json.loads(line) for line in islice(lines, 4000)]) and sum(counts.values()) < most:
            encodings = tokenizer.encode_batch_fast([d["text"] for d in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                arrays.append(np.array([BEGIN, *encoding.ids, END], dtype=np.uint16))
                counts[document["package"]] += len(arrays[-1])
    return np.concatenate(arrays), counts


def packages_of_rows() -> set[str]:
    """The packages the instruction data quotes, some of which may give no pretraining text."""
    lines = (MODEL.parent / "data" / "provenance.jsonl").read_text(encoding="utf-8").splitlines()
    return {package for line in lines for _, _, package in json.loads(line)["rows"]}


def main() -> None:
    """Tokenize, compress, and add the token counts to the record of the sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "build")
    parser.add_argument("--most", type=int, default=10**9, help="stop after about this many training tokens")
    arguments = parser.parse_args()
    work: Path = arguments.work
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    train, counts = tokens_of(work / "corpus.jsonl", tokenizer, arguments.most)
    validation, _ = tokens_of(work / "validation.jsonl", tokenizer, 10**9)
    print(f"{train.size} training tokens, {validation.size} validation tokens")
    packed = lzma.compress(save({"train": train, "validation": validation}), preset=2)
    (work / "tokens.safetensors.xz").write_bytes(packed)
    print(f"{len(packed) / 2**20:.1f} MiB compressed")
    asked = packages_of_rows()
    used = [
        {"package": s["package"], "version": s["version"], "licences": s["licences"], "tokens": counts[s["package"]]}
        for s in json.loads((work / "sources.json").read_text(encoding="utf-8"))
        if counts[s["package"]] or s["package"] in asked
    ]
    lines = ",\n".join(json.dumps(source) for source in used)
    (MODEL / "sources.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
