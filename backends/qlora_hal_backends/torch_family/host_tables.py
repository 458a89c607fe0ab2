"""The token embeddings and the output head of a base in the host's memory.

Of the embeddings a batch needs a row a token: they are looked up on the host and copied. The head is needed whole, so
it crosses in pieces of its vocabulary, the next one while the present one computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.memory.placement import HEAD_PIECE_BYTES
from qlora_hal_backends.torch_family.copy_queue import Copy, CopyQueue, host_memory
from qlora_hal_backends.torch_family.device import has_queue
from qlora_hal_backends.torch_family.lora_linear import product_in_float32

PIECE_BYTES = HEAD_PIECE_BYTES
"""Of a piece of the head: a millisecond on its way, and two of them are on the device."""


class HostEmbedding(nn.Module):
    """`nn.Embedding` whose table stays on the host; its rows are multiplied by `scale` where there is one (Gemma)."""

    def __init__(self, table: Tensor, device: torch.device, scale: Tensor | None = None) -> None:
        super().__init__()
        self._scale = scale
        self._held = [table]  # in a list: a module's own tensors are moved to the device with it
        self._device = device
        self._announced: tuple[Tensor, Tensor] | None = None

    def announce(self, on_device: Tensor, ids: np.ndarray[Any, Any]) -> None:
        """Look up a batch while its ids are still at hand, so that nobody waits for them to come back from the device.
        `on_device` are the same ids, which `forward` will be given."""
        self._announced = (on_device, self._looked_up(torch.from_numpy(np.ascontiguousarray(ids)).long()))

    def forward(self, ids: Tensor) -> Tensor:
        announced, self._announced = self._announced, None
        if announced is not None and announced[0] is ids:
            return announced[1]
        return self._looked_up(ids.cpu())

    def _looked_up(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self._held[0])
        if self._scale is not None:
            rows = rows * self._scale
        return rows.pin_memory().to(self._device, non_blocking=True) if has_queue(self._device) else rows


class StreamedMatrix:
    """A matrix `[rows, columns]` on the host that is read a piece of its rows at a time."""

    def __init__(self, matrix: Tensor, device: torch.device) -> None:
        memory = host_memory(matrix.numel() * matrix.element_size(), device)
        self.on_host = memory.view(matrix.dtype).view(matrix.shape).copy_(matrix)
        self._queue = CopyQueue(device)
        rows = max(1, min(matrix.shape[0], PIECE_BYTES // (matrix.shape[1] * matrix.element_size())))
        self._pieces = [slice(start, min(start + rows, matrix.shape[0])) for start in range(0, matrix.shape[0], rows)]
        self._slots = [
            torch.empty(rows, matrix.shape[1], dtype=matrix.dtype, device=device)
            for _ in range(min(2, len(self._pieces)))
        ]

    @property
    def shape(self) -> torch.Size:
        return self.on_host.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.on_host.dtype

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and these on the device until the next piece is asked for. One reader at a time."""
        coming = self._bring(0)
        for number, rows in enumerate(self._pieces):
            self._queue.arrived(coming)
            if number + 1 < len(self._pieces):
                # Into the slot of the piece before: all that reads it was asked for before.
                coming = self._bring(number + 1)
            yield rows, self._slots[number % 2][: rows.stop - rows.start]

    def _bring(self, number: int) -> Copy:
        rows = self._pieces[number]
        return self._queue.copy(self._slots[number % 2][: rows.stop - rows.start], self.on_host[rows])


class StreamedLinear(nn.Module):
    """`nn.Linear` whose weight is a `StreamedMatrix`, for who calls the architecture's own head."""

    bias: Tensor | None

    def __init__(self, weight: StreamedMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _StreamedProduct.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _StreamedProduct(torch.autograd.Function):
    """x W^T. A piece is overwritten by the one after the next, so autograd may keep none: backward reads them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StreamedMatrix) -> Tensor:
        ctx.weight = weight
        return torch.cat([nn.functional.linear(x, piece) for _, piece in weight.pieces()], dim=-1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        rows = dy.reshape(-1, dy.shape[-1])
        dx = torch.zeros(rows.shape[0], ctx.weight.shape[1], dtype=torch.float32, device=dy.device)
        for vocabulary, piece in ctx.weight.pieces():
            dx += product_in_float32(rows[:, vocabulary], piece)
        return dx.to(dy.dtype).view(*dy.shape[:-1], -1), None


@dataclass(frozen=True, slots=True)
class Tables:
    """Which of a model's tables go to the host: names of parameters, of modules, and what is said of it.

    Where embeddings and head are one table, it goes where the head goes, for the device needs all of it there.
    """

    embeddings: str = ""
    head: str = ""
    names: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, causal: Any, asked: Collection[str]) -> Tables:
        """Raises UnsupportedFeatureError QH-B01 for tables of a kind that is not known here."""
        wanted = {part for part in ("embeddings", "head") if part in asked}
        if not wanted:
            return cls()
        layers = {"embeddings": causal.get_input_embeddings(), "head": causal.get_output_embeddings()}
        notes: tuple[str, ...] = ()
        if len(wanted) == 1 and _are_tied(causal):
            goes = "head" in wanted
            where = "goes to the host's memory" if goes else "stays on the device, where the head needs it"
            notes = (f"embeddings and head are one table in this model: it {where}",)
            wanted = {"embeddings", "head"} if goes else set()
        paths = {id(module): path for path, module in causal.named_modules()}
        found = {part: _path_of(part, layers[part], paths) for part in wanted}
        names = {f"{path}.{kind}" for path in found.values() for kind in ("weight", "bias")}
        return cls(found.get("embeddings", ""), found.get("head", ""), frozenset(names), notes)

    def move_to_host(self, causal: Any, device: torch.device) -> HostEmbedding | None:
        """Put modules that read the host's memory in the place of the architecture's, whose weights were filled.
        Raises UnsupportedFeatureError QH-B01 for embeddings that are more than a table and a factor."""
        table, scale = None, None
        if self.embeddings:
            layer = causal.get_submodule(self.embeddings)
            table, scale = layer.weight, _scale_of(layer)
        if self.head:
            layer = causal.get_submodule(self.head)
            bias = None if layer.bias is None else layer.bias.detach().to(device)
            matrix = StreamedMatrix(layer.weight.detach(), device)
            table = matrix.on_host if layer.weight is table else table
            causal.set_submodule(self.head, StreamedLinear(matrix, bias))
        if table is None:
            return None
        embedding = HostEmbedding(table.detach(), device, scale)
        causal.set_submodule(self.embeddings, embedding)
        return embedding


_KINDS = {"embeddings": nn.Embedding, "head": nn.Linear}


def _path_of(part: str, layer: Any, paths: dict[int, str]) -> str:
    kind = _KINDS[part]
    if not isinstance(layer, kind) or (part == "head" and type(layer) is not kind):
        raise _not_on_host(part, layer)
    return paths[id(layer)]


def _scale_of(layer: Any) -> Tensor | None:
    """What the rows of an embedding are multiplied by, found by trying."""
    ids = torch.arange(min(8, layer.weight.shape[0]))
    rows, found = nn.functional.embedding(ids, layer.weight), layer(ids)
    if torch.equal(found, rows):
        return None
    scale = getattr(layer, "embed_scale", None)
    if isinstance(scale, Tensor) and torch.equal(found, rows * scale.to(rows.dtype)):
        return scale.to(rows.dtype)
    raise _not_on_host("embeddings", layer)


def _not_on_host(part: str, layer: Any) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        "QH-B01",
        f"The {part} of this model ({type(layer).__name__}) cannot be kept in the host's memory.",
        where="training.base_offload",
        fix=f"Take {part} out of training.base_offload.",
    )


def _are_tied(causal: Any) -> bool:
    embeddings, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    return head is not None and bool(causal.config.get_text_config().tie_word_embeddings) and embeddings is not None
