"""What this backend will make of a model, told from config.json and the headers of the weight files."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_hal.contract.backend import ModelOutline
from qlora_hal.contract.values import LinearShape
from qlora_hal.model.linear_shapes import left_out_notes
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.loading import assemble


def outline(source: ModelSource, options: Mapping[str, object]) -> ModelOutline:
    """Raises ModelError as `assemble` does. MLX opens the weight files here and reads their headers; of a
    tied model that has a head stored, the head and the embedding."""
    assembled = assemble(source)
    here = assembled.paths()
    shapes = {name: shape for name, shape in source.facts.linear_modules.items() if name in here}
    notes = (*left_out_notes(source.facts), *_not_here(source, shapes), *assembled.notes)
    return ModelOutline(shapes, notes, assembled.rotary, assembled.window.longest_sample)


def _not_here(source: ModelSource, shapes: Mapping[str, LinearShape]) -> tuple[str, ...]:
    gone = [name for name in source.facts.linear_modules if name not in shapes]
    if not gone:
        return ()
    names = sorted({name.rpartition(".")[2] for name in gone})
    return (f"{len(gone)} linear layers ({', '.join(names)}) carry no LoRA with mlx-lm: it has no layer for them.",)
