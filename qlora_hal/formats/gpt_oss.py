"""Where gpt-oss has its MXFP4: the experts of a block in two tensors of bytes to each of their two projections.

`<block>.gate_up_proj_blocks` uint8 [experts, 2 * inner, hidden / 32, 16], gate and up in turns, and `_scales` [experts,
2 * inner, hidden / 32]; `down_proj_*` likewise. All else is stored in 16 bits. Source: openai/gpt-oss-20b, and
transformers 5.23, `integrations/mxfp4.py`.
"""

from __future__ import annotations

from qlora_hal.contract.values import LinearShape
from qlora_hal.formats.record import CheckpointLayout, Packing, StoredCheckpoint, UnreadableFormatError
from qlora_hal.model.expert_stacks import INTERLEAVED, is_joined
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_oracle.microscaling import MicroscalingFormat

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = MicroscalingFormat.MXFP4.group_size


def _recognizes(checkpoint: StoredCheckpoint) -> bool:
    return checkpoint.quant_method == METHOD


def _read(checkpoint: StoredCheckpoint) -> Packing:
    model_type = str(checkpoint.config.get("model_type", ""))[:40]
    if model_type not in INTERLEAVED:
        raise UnreadableFormatError(
            f"quantized to MXFP4 as model_type {model_type!r}, whose layout is not known",
            cause="In which order gate and up projection lie in such bytes is known of gpt-oss alone.",
        )
    modules = checkpoint.modules_with(BLOCKS)
    if not modules:
        raise UnreadableFormatError(
            "described as MXFP4 (quantization_config), and no tensor of it ends in _blocks, as gpt-oss has them",
            fix="Take quantization_config out of config.json if the weights are in 16 bits; else get the model as "
            "it was published.",
        )
    shapes = {module: _shape(checkpoint, module) for module in modules}
    settings = {"quant_method": METHOD}
    return Packing(Prequantized(METHOD, MicroscalingFormat.MXFP4.value, GROUP, False, settings), shapes)


def _shape(checkpoint: StoredCheckpoint, module: str) -> LinearShape:
    if not is_joined(module):
        raise UnreadableFormatError(f"quantized to MXFP4 with {module}{BLOCKS}, which is of no routed experts")
    sides = checkpoint.shape(module + BLOCKS)
    if len(sides) != 4 or 2 * sides[3] != GROUP:
        raise UnreadableFormatError(
            f"quantized to MXFP4 with {module}{BLOCKS} of shape {list(sides)}; [experts, out, in / {GROUP}, "
            f"{GROUP // 2}] is known"
        )
    if checkpoint.shape(module + SCALES) != sides[:3]:
        found = list(checkpoint.shape(module + SCALES))
        raise checkpoint.contradiction(f"{module}{SCALES} has shape {found}, {list(sides[:3])} are due")
    for part in (BLOCKS, SCALES):
        if (dtype := checkpoint.tensors[module + part].dtype) != "U8":
            raise checkpoint.contradiction(f"{module}{part} is stored as {dtype}; MXFP4 is bytes (U8)")
    if module in checkpoint.tensors:
        raise checkpoint.contradiction(f"{module} is stored twice, packed and in 16 bits")
    return LinearShape(sides[2] * GROUP, sides[1], sides[0])


LAYOUT = CheckpointLayout(METHOD, _recognizes, _read, marks=(SCALES,), weight=BLOCKS)
