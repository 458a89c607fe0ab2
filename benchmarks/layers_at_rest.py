"""Memory and time of a step on a CPU with the layers of the base resident, in the host's memory, and on its disk.

On a CPU the host's memory is the device's, so `host` saves nothing there; what `disk` leaves in memory is what it
leaves beside any device.

python benchmarks/layers_at_rest.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.memory.drawn_model import layers_of
from qlora_hal.model.described_weights import described_header
from qlora_hal.model.facts import read_facts
from qlora_hal.run.memory_probe import measured_peak

SHAPE = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
CHOICES = {
    "resident": {},
    "host": {"training.base_offload": ["layers"], "backend.options": {"offloaded_layers": "host"}},
    "disk": {"training.base_offload": ["layers"], "backend.options": {"offloaded_layers": "disk"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    asked = parser.parse_args()
    config = {**SHAPE, "num_hidden_layers": asked.layers}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        facts = read_facts(Path(folder), [described_header(config, Path(folder))])
    for name, choice in CHOICES.items():
        keywords = {
            "model": "drawn", "backend": "cpu_torch", "data.max_seq_length": 32, "lora.r": 4,
            "quantization.weight_format": "none", "lora.target_modules": ["q_proj"],
            "training.per_device_train_batch_size": 1, "training.recompute": "full", **choice,
        }  # fmt: skip
        began = time.perf_counter()
        found = measured_peak(
            resolve_settings(None, keywords=keywords, environ={}).config,
            facts,
            layers_of(facts),
            model=None,
            on_host=True,
        )
        assert found.resident is not None
        print(
            f"{name:<9} loaded {found.resident / 1e6:7.0f} MB   peak of two steps {found.peak / 1e6:7.0f} MB   "
            f"{time.perf_counter() - began:6.1f} s in all"
        )


if __name__ == "__main__":
    main()
