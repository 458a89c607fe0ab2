"""What a LoRA dropout mask costs: `python benchmarks/dropout_masks.py`. On a CPU, or on the GPU that torch sees.

Three ways for 8192 tokens of 4096 channels in bfloat16: the contract's masks in torch's operations, the same in one
kernel (with a GPU and Triton), and torch's own generator, which draws others on each device.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from qlora_hal.contract.dropout import channel_words, kept, token_words
from qlora_hal_backends.torch_family.lora_linear import kept_inputs, plain_mask, words_on

ROWS, TIME, CHANNELS, RATE = 4, 2048, 4096, 0.05


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(23):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times[3:]), 4)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = np.arange(ROWS, dtype=np.int32)
    tokens = words_on(token_words(2**62 + 11, rows, TIME).reshape(-1), device)
    channels = words_on(channel_words("model.layers.0.mlp.up_proj", CHANNELS), device)
    expected = kept(2**62 + 11, "model.layers.0.mlp.up_proj", rows, TIME, CHANNELS, RATE).reshape(-1, CHANNELS)
    assert np.array_equal(kept_inputs(tokens, channels, RATE).cpu().numpy(), expected), "the masks differ from NumPy's"
    generator, dtype = torch.Generator(device=device), torch.bfloat16
    ways: dict[str, Callable[[], object]] = {
        "operations": lambda: plain_mask(tokens, channels, RATE, dtype),
        "generator": lambda: (torch.rand((ROWS * TIME, CHANNELS), generator=generator, device=device) >= RATE).to(
            dtype
        ),
    }
    if device.type == "cuda" and find_spec("triton") is not None:
        from qlora_hal_backends.torch_family import dropout_kernel

        assert np.array_equal((dropout_kernel.mask(tokens, channels, RATE, dtype) > 0).cpu().numpy(), expected)
        ways["kernel"] = lambda: dropout_kernel.mask(tokens, channels, RATE, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps({"device": name, **{way: milliseconds(work, device) for way, work in ways.items()}}))


if __name__ == "__main__":
    main()
