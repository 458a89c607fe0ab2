"""What a choice costs in time, by what was measured on an NVIDIA H200 (8B shape, NF4, r = 16 on all linear layers).

The unit is a token that passes a model whose activations are all kept, in a pass of very many tokens. On other cards
the products take longer and so do the copies; the order of the choices is what these figures are used for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qlora_hal.memory.placement import FULL, HEAD, LAYERS, NONE, OFFLOAD, SELECTIVE

RECOMPUTED: Mapping[str, float] = {NONE: 1.0, SELECTIVE: 1.24, FULL: 1.33, OFFLOAD: 1.33}
"""Time of a token (docs/runs/h200_memory_steps.json, `alone_on_the_gpu`; `offload` was `full` within the noise)."""
PASS_TOKENS = 271
"""What each pass takes whatever its tokens, decoding weights above all: 131.86 ms for 2048 tokens, 481.23 for 8192
(docs/runs/h200_step_8b.json, `ours`)."""
STREAMED = 1.09
"""Time of a token whose layers' copies hide behind the computation (docs/runs/h200_memory_steps.json)."""
LAYERS_TOKENS = 2360
"""Layers in 4 bits cross in both directions in the time in which so many tokens are computed: 67 ms each way."""
LINK_RATE = 3.35 * 2**30 / 0.067
"""Bytes per second of those copies."""
DISK_RATE = 3 * 2**30
"""Bytes per second of layers that rest on the disk: stated, not measured. Data sheets of NVMe drives on four lanes of
PCIe 3.0 say 3.5 GB/s, and the file is read through the host's memory. What of it stays there is read faster."""
HEAD_TOKENS = 690
"""The same of a 16-bit head of 128,256 x 4096, which crosses twice; its logits are computed twice, too."""
HEAD_AGAIN = 0.03
"""Of a token's time: that head has 1/15 of the weights, and a third product beside forward's and backward's."""
MEASURED_BITS = 4.0
MIXTURE_TOKEN = 1.8
"""Time of a token of a mixture, in units of what the weights that it meets take in a dense model: the layers of
Qwen3-30B-A3B's shape cross both ways while 13,800 to 14,700 tokens are computed, which meet an eleventh of the weights
each (docs/runs/h200_moe.json, docs/runs/h200_moe_streamed.json)."""


@dataclass(frozen=True, slots=True)
class PassChoice:
    """What decides about the time of a pass: its tokens, what is recomputed, the parts of the base on the host, the
    bits of one of its weights, and how many weights there are `to_each` that a token meets: of a mixture all experts
    cross. `readers` are the ranks that read the layers from their host's disk at a time; none where its memory has
    them."""

    tokens: int
    recompute: str = NONE
    base_offload: Collection[str] = ()
    bits: float = MEASURED_BITS
    to_each: float = 1.0
    readers: int = 0

    @property
    def crosses_whole(self) -> bool:
        """Whether parts of the base are copied whole in each pass, which takes what the machine's link takes."""
        return LAYERS in self.base_offload or HEAD in self.base_offload

    @property
    def time(self) -> float:
        """Of a token, in units of one that passes with the fastest choice among very many."""
        again = HEAD_AGAIN if HEAD in self.base_offload else 0.0
        computing = self.tokens * (RECOMPUTED[self.recompute] + again) + PASS_TOKENS
        if not self.crosses_whole:
            return computing / self.tokens
        layers = LAYERS_TOKENS * max(1.0, self.to_each / MIXTURE_TOKEN) * self.bits / MEASURED_BITS
        layers *= max(1.0, self.readers * LINK_RATE / DISK_RATE)
        crossing = layers if LAYERS in self.base_offload else 0.0
        crossing += HEAD_TOKENS if HEAD in self.base_offload else 0.0
        return max(computing * STREAMED, crossing) / self.tokens
