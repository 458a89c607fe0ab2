"""What this family will make of a model, told in a dry run (`qlora_hal.contract.backend.Outline`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from qlora_hal.contract.backend import ModelOutline
from qlora_hal.formats import gpt_oss
from qlora_hal.model.linear_shapes import sentences
from qlora_hal.model.own_dropout import dropout_note
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.architecture import Architecture, build, rotary_of


def outline(source: ModelSource, options: Mapping[str, object]) -> ModelOutline:
    """Build the architecture without memory and put its names beside those of the files. Raises ModelError."""
    architecture = build(source, options.get("attention", "auto"), torch.float32)
    notes = (*_notes(architecture), *_published_notes(source, architecture))
    return ModelOutline(architecture.shapes, notes, rotary_of(architecture.causal))


def _notes(architecture: Architecture) -> Iterator[str]:
    yield from sentences(architecture.left_out)
    if note := _experts_note(architecture):
        yield note
    if note := dropout_note(architecture.causal.config.to_dict()):
        yield note


def _published_notes(source: ModelSource, architecture: Architecture) -> Iterator[str]:
    """What of gpt-oss's folder is MXFP4, and what is not."""
    if source.facts.prequantized is not None and source.facts.prequantized.method == gpt_oss.METHOD:
        yield (
            f"the experts stay in MXFP4, as they are stored; the {len(architecture.adapted)} other linear layers stay "
            "unquantized, as they are stored"
        )


def _experts_note(architecture: Architecture) -> str:
    """Experts of a kind that is not taken apart: one weight of three dimensions, and most of a mixture's parameters.
    Small convolutions have as many dimensions."""
    linears = sum(linear.in_features * linear.out_features for linear in architecture.linears.values())
    parameters = list(architecture.causal.parameters())
    experts = [parameter.numel() for parameter in parameters if parameter.dim() == 3]
    share = sum(experts) / (linears + sum(parameter.numel() for parameter in parameters))
    if share < 0.01:
        return ""
    return (
        f"{sum(experts):,} parameters ({share:.0%} of the model) in {len(experts)} weights of three dimensions, as the "
        "experts of a mixture have them, are not quantized and carry no LoRA"
    )
