"""How fast a million chat rows become token stores, against the tokenizer's own speed in the same process.

The tokenizer is a byte-level BPE trained here on the same kind of text (32 768 tokens, ChatML template), so nothing is
downloaded. `own_tokens_per_second` is what a bare `encode_batch` reaches on the very texts that are prepared, already
rendered and in memory: on the first half of the rows before the preparation and on the rest after it, so that a change
in the machine's load meets both. The ratio of processor time says the same where other work shares the cores.

Prints JSON. Run: python benchmarks/data_preparation.py --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qlora_hal.config.schema import DataConfig
from qlora_hal.data import ChatTokenizer, prepare
from qlora_hal.data.source.reading import open_source
from qlora_hal.data.template.chat_template import BUILT_IN

CHUNK = 1024


def write_rows(path: Path, count: int) -> None:
    """Chat rows of one to three exchanges, about 150 tokens each, words by Zipf's law over a made-up vocabulary."""
    draw = random.Random(7)
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "t")]
    words = list({"".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 3)))) for _ in range(60_000)})
    weights = [1 / (rank + 10) for rank in range(len(words))]
    pool = draw.choices(words, weights, k=2_000_000)

    def sentence(length: int) -> str:
        at = draw.randrange(len(pool) - length)
        return " ".join(pool[at : at + length]).capitalize() + draw.choice(".?!")

    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            messages = [{"role": "system", "content": "You answer briefly."}] if draw.random() < 0.3 else []
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                messages.append({"role": "user", "content": sentence(draw.randint(5, 40))})
                answer = "\n".join(sentence(draw.randint(8, 40)) for _ in range(draw.randint(1, 3)))
                messages.append({"role": "assistant", "content": answer})
            out.write(json.dumps({"messages": messages}) + "\n")


def make_tokenizer(folder: Path, rows: Path) -> None:
    """A folder as a model has it: tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        with rows.open(encoding="utf-8") as lines:
            for line, _ in zip(lines, range(20_000), strict=False):
                yield from (message["content"] for message in json.loads(line)["messages"])

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_768, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": BUILT_IN["chatml"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def own_speed(tokenizer: ChatTokenizer, rows: Path, first: int, last: int) -> tuple[int, float, float]:
    """(tokens, seconds, processor seconds) of a bare `encode_batch` over rendered rows `first` < number <= `last`;
    reading and rendering are not timed."""
    tokens, seconds, processor = 0, 0.0, 0.0
    texts: list[str] = []
    source = open_source(str(rows))

    def encode() -> None:
        nonlocal tokens, seconds, processor
        start, start_processor = time.perf_counter(), time.process_time()
        encodings = tokenizer.encode_batch(texts)
        tokens += sum(map(len, encodings))
        del encodings
        seconds += time.perf_counter() - start
        processor += time.process_time() - start_processor
        texts.clear()

    for row in islice(source.rows(), first, last):
        texts.append(tokenizer.render(row.value["messages"], add_generation_prompt=False))  # type: ignore[index,arg-type]
        if len(texts) == CHUNK:
            encode()
    if texts:
        encode()
    return tokens, seconds, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        write_rows(rows, count)
        make_tokenizer(folder, rows)
        tokenizer = ChatTokenizer.from_folder(folder)
        config = DataConfig(path=str(rows), max_seq_length=2048)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        half = own_speed(tokenizer, rows, 0, count // 2)
        start, start_processor = time.perf_counter(), time.process_time()
        prepared = prepare(config, tokenizer, cache_dir=folder / "cache", seed=1)
        seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        prepare(config, tokenizer, cache_dir=folder / "cache", seed=1)
        reuse_seconds = time.perf_counter() - start
        tokens = int(prepared.train.lengths.sum())
        rest = own_speed(tokenizer, rows, count // 2, count)
        own_tokens, own_seconds, own_processor = (a + b for a, b in zip(half, rest, strict=True))
        megabyte = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, KiB elsewhere
        figures = {
            "rows": count,
            "tokens": tokens,
            "source_megabytes": round(rows.stat().st_size / 2**20, 1),
            "seconds": round(seconds, 2),
            "rows_per_second": round(count / seconds),
            "tokens_per_second": round(tokens / seconds),
            "own_tokens_per_second": round(own_tokens / own_seconds),
            "ratio": round((tokens / seconds) / (own_tokens / own_seconds), 3),
            "processor_ratio": round((tokens / processor) / (own_tokens / own_processor), 3),
            "same_token_count": own_tokens == tokens,
            "reuse_seconds": round(reuse_seconds, 2),
            "peak_rss_megabytes": round(peak / megabyte),
            "rss_megabytes_before": round(before / megabyte),
        }
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
