"""One batch as a person reads it: what is trained stands out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from qlora_hal.contract.values import IGNORE_LABEL, PADDING_SEGMENT, Batch
from qlora_hal.data.tokens.tokenizer import ChatTokenizer
from qlora_hal.errors.terminal_text import visible

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def show_batch(batch: Batch, tokenizer: ChatTokenizer, *, color: bool) -> str:
    """The text of each sample, with special tokens; trained parts in green, or in ⟦ ⟧ without colour."""
    opening, closing = (_GREEN, _PLAIN) if color else ("⟦", "⟧")
    lines = [
        f"{batch.input_ids.shape[0]} sequences of {batch.input_ids.shape[1]} positions; "
        f"{batch.counted_tokens} of {batch.real_tokens} tokens are trained"
    ]
    for number, segment, ids, trained in _samples(batch):
        runs = groupby(range(len(ids)), key=lambda place, trained=trained: trained[place])  # type: ignore[misc]
        text = ""
        for is_trained, places in runs:
            # A run is decoded together: one character may be spread over several tokens.
            part = visible(tokenizer.decode([ids[place] for place in places], skip_special_tokens=False))
            text += f"{opening}{part}{closing}" if is_trained else part
        lines.append(f"--- sequence {number}, sample {segment}: {len(ids)} tokens ---\n{text}")
    padding = int(np.count_nonzero(batch.segment_ids == PADDING_SEGMENT))
    return "\n".join([*lines, f"--- padding: {padding} positions ---"])


def batch_as_json(batch: Batch, tokenizer: ChatTokenizer) -> list[dict[str, object]]:
    """Each sample with its ids, the text of each, and whether it is trained; places count from 1."""
    return [
        {
            "sequence": number,
            "sample": segment,
            "ids": ids,
            "tokens": [tokenizer.decode([token], skip_special_tokens=False) for token in ids],
            "trained": trained,
        }
        for number, segment, ids, trained in _samples(batch)
    ]


def _samples(batch: Batch) -> Iterator[tuple[int, int, list[int], list[bool]]]:
    """(sequence and sample from 1, ids, whether each is trained) of all that is not padding."""
    for number in range(batch.input_ids.shape[0]):
        segments = batch.segment_ids[number]
        for segment in range(1, int(segments.max(initial=0)) + 1):
            here = segments == segment
            trained = batch.labels[number][here] != IGNORE_LABEL
            yield number + 1, segment, batch.input_ids[number][here].tolist(), trained.tolist()
