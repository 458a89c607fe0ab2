"""Floats of 4 or 8 bits with one scale to a group: MXFP4, MXFP8 (OCP Microscaling Formats 1.0) and NVFP4 (NVIDIA)."""

from __future__ import annotations

import math
from dataclasses import replace

from qlora_hal.formats import gpt_oss, mlx_affine
from qlora_hal.formats.record import CheckpointLayout, FormatRecord
from qlora_hal_oracle.codecs import MicroscalingCodec
from qlora_hal_oracle.microscaling import MicroscalingFormat

LAYOUT = replace(mlx_affine.LAYOUT, decode=None)
"""MLX's files, of which only the linear layers are decoded here."""


def _microscaling(kind: MicroscalingFormat, level: str, title: str, *further_layouts: CheckpointLayout) -> FormatRecord:
    def packed_bytes(inputs: int, outputs: int, block_size: int, double_quant: bool, compute_bytes: int) -> int:
        """The codes, and a byte of scale to a group."""
        return inputs * outputs * kind.bits // 8 + math.ceil(inputs / block_size) * outputs

    return FormatRecord(
        name=kind.value,
        title=title,
        level=level,
        bits=kind.bits,
        codec=MicroscalingCodec(kind),
        packed_bytes=packed_bytes,
        layout=LAYOUT,
        block_sizes=(kind.group_size,),
        within_rows=True,
        further_layouts=further_layouts,
    )


MXFP4 = _microscaling(
    MicroscalingFormat.MXFP4, "4bit", "4-bit floats (E2M1), one power of two to 32 of them", gpt_oss.LAYOUT
)
MICROSCALING = (
    MXFP4,
    _microscaling(MicroscalingFormat.NVFP4, "4bit", "4-bit floats (E2M1), one 8-bit float (E4M3) to 16 of them"),
    _microscaling(MicroscalingFormat.MXFP8, "8bit", "8-bit floats (E4M3), one power of two to 32 of them"),
)
