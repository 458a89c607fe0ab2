"""What this family will make of a model, told in a dry run (`qlora_hal.backend.Outline`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from qlora_hal.backend import ModelOutline
from qlora_hal.model.linear_shapes import sentences
from qlora_hal.model.own_dropout import dropout_note
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.architecture import Architecture, build


def outline(source: ModelSource, options: Mapping[str, object]) -> ModelOutline:
    """Build the architecture without memory and put its names beside those of the files. Raises ModelError."""
    architecture = build(source, options.get("attention", "auto"), torch.float32)
    linears = architecture.linears
    modules = {name: (linears[name].in_features, linears[name].out_features) for name in architecture.adapted}
    return ModelOutline(modules, tuple(_notes(architecture)))


def _notes(architecture: Architecture) -> Iterator[str]:
    yield from sentences(architecture.left_out)
    experts = [parameter for parameter in architecture.causal.parameters() if parameter.dim() == 3]
    if experts:
        count = sum(parameter.numel() for parameter in experts)
        yield (
            f"{len(experts)} weights of three dimensions with {count:,} parameters (experts, convolutions) are not "
            "quantized and carry no LoRA"
        )
    if note := dropout_note(architecture.causal.config.to_dict()):
        yield note
