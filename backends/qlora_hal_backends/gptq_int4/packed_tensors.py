"""The stored tensors of a GPTQ layer, read and checked before any engine sees them.

An engine's kernel indexes groups by what the file says, without a guard: a damaged or hostile `g_idx` would read
outside its buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from qlora_hal.errors import ModelError
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal_backends.gptq_int4.engines import WORD_BITS, GptqSettings, PackedLinear
from qlora_hal_backends.torch_family.loading import Checkpoint

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_settings(prequantized: Prequantized) -> GptqSettings:
    """The settings of a checkpoint as `read_facts` found and checked them; old configurations lack some keys. Without
    `sym`, nothing is taken for granted of the zero points."""
    stored = prequantized.settings
    group_size = stored.get("group_size", -1)
    return GptqSettings(
        group_size=group_size if isinstance(group_size, int) and group_size > 0 else None,
        symmetric=bool(stored.get("sym", False)),
        act_order=bool(stored.get("desc_act", False)),
        checkpoint_format="gptq_v2" if stored.get("checkpoint_format") == "gptq_v2" else "gptq",
        quantizer=str(stored.get("quantizer", "")),
        bits=int(str(stored["bits"])),
    )


def read_packed(checkpoint: Checkpoint, name: str, settings: GptqSettings, device: torch.device) -> PackedLinear:
    """One layer's tensors. Raises ModelError QH-C73 naming everything in them that contradicts the rest."""
    absent = [part for part in PARTS if not checkpoint.has(f"{name}.{part}")]
    if absent:
        raise contradiction(
            checkpoint.where,
            f"{name} is missing {', '.join(absent)}",
            "Both GPTQ libraries write qweight, qzeros, scales and g_idx for each layer.",
        )
    tensors = {part: checkpoint.take(f"{name}.{part}", device) for part in PARTS}
    wrong = list(_wrong(tensors, settings))
    if wrong:
        raise contradiction(checkpoint.where, f"{name}: {'; '.join(wrong)}")
    return PackedLinear(name, tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"])


def _wrong(tensors: Mapping[str, Tensor], settings: GptqSettings) -> Iterator[str]:
    qweight, qzeros, scales, g_idx = (tensors[part] for part in PARTS)
    for part in ("qweight", "qzeros", "g_idx"):
        if tensors[part].dtype != torch.int32:
            yield f"{part} is {str(tensors[part].dtype).removeprefix('torch.')}, int32 is expected"
    if not scales.dtype.is_floating_point:
        yield f"scales are {str(scales.dtype).removeprefix('torch.')}, floating point is expected"
        return
    groups, outputs = scales.shape
    words = -(-outputs // settings.codes_per_word)
    if qweight.shape != (g_idx.shape[0] // settings.codes_per_word, outputs):
        yield f"qweight has shape {list(qweight.shape)}, g_idx {list(g_idx.shape)} and scales {list(scales.shape)}"
    if qzeros.shape != (groups, words):
        yield f"qzeros have shape {list(qzeros.shape)}, [{groups}, {words}] is expected"
    elif settings.symmetric and qzeros.dtype == torch.int32:
        yield from _other_zeros(fields_of(qzeros, settings)[:, :outputs], settings)
    if not bool(torch.isfinite(scales).all()):
        yield "scales hold NaN or infinity"
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= groups:
        yield f"g_idx holds groups {lowest} to {highest} of {groups}"
    elif settings.group_size is not None:
        yield from _other_groups(g_idx, settings.group_size, in_order=not settings.act_order)


def _other_zeros(fields: Tensor, settings: GptqSettings) -> Iterator[str]:
    """What speaks against symmetric groups in this format: v1 stores a zero point less one, so that a wrong or missing
    `checkpoint_format` decodes every weight one step off."""
    stored_less, middle = int(settings.checkpoint_format == "gptq"), settings.middle
    zeros = fields + stored_less
    others = zeros[zeros != middle]
    if not others.numel():
        return
    other_format = "gptq_v2" if stored_less else "gptq"
    fits_other = bool((fields + (1 - stored_less) == middle).all())
    yield (
        f"with sym: true every zero point is {middle}, and its qzeros hold {int(others[0])} as checkpoint_format "
        f"{settings.checkpoint_format}" + (f"; as {other_format} they would hold {middle}" if fits_other else "")
    )


def fields_of(qzeros: Tensor, settings: GptqSettings) -> Tensor:
    """int32 words `[groups, words]` -> their fields `[groups, fields]`, the lowest bits first."""
    shifts = torch.arange(0, WORD_BITS, settings.bits, device=qzeros.device, dtype=torch.int32)
    return ((qzeros[..., None] >> shifts) & settings.largest_code).flatten(1)


def _other_groups(g_idx: Tensor, group_size: int, *, in_order: bool) -> Iterator[str]:
    """What speaks against groups of `group_size` inputs each; `desc_act` puts them in another order, and into no other
    number. A `g_idx` of zeros, as a tool that did not fill it leaves it, decodes every weight with the first scale."""
    expected = torch.arange(g_idx.shape[0], device=g_idx.device) // group_size
    if in_order and not bool((g_idx == expected).all()):
        yield "g_idx is not in order, but desc_act is false"
    elif not torch.equal(g_idx.sort().values, expected.to(g_idx.dtype)):
        sizes = torch.bincount(g_idx)
        yield f"g_idx puts {int(sizes.max())} inputs into one group, group_size is {group_size}"


def has_undefined_zeros(packed: PackedLinear, settings: GptqSettings) -> bool:
    """Whether v1 stores a zero point of 0, as -1: libraries disagree whether it borrows from the field beside it."""
    if settings.checkpoint_format != "gptq" or settings.symmetric:
        return False
    return bool((fields_of(packed.qzeros, settings) == settings.largest_code).any())


def contradiction(where: str, what: str, cause: str = "") -> ModelError:
    return ModelError(
        "QH-C73",
        f"The checkpoint contradicts its own description: {what}.",
        where=where,
        cause=cause,
        fix="Get the model again from its source, all files from one revision.",
    )
