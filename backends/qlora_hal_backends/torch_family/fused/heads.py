"""From the product of a layer's first group to queries, keys and values as attention reads them, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_hal_backends.torch_family.attention.causal import Gradients, HeadCounts
from qlora_hal_backends.torch_family.fused.layer_weights import JointNorm, LayerWeights
from qlora_hal_backends.torch_family.fused.operations import Operations, Rotary


@dataclass(frozen=True, slots=True)
class Heads:
    """One object serves all layers of a model. `projected` is `[M, (h + 2 kv) d]`: queries, keys, values."""

    counts: HeadCounts
    operations: Operations

    @property
    def _queries(self) -> slice:
        return slice(0, self.counts.query_columns)

    @property
    def _keys(self) -> slice:
        return slice(self.counts.query_columns, self.counts.query_columns + self.counts.key_columns)

    @property
    def _values(self) -> slice:
        return slice(self._keys.stop, self._keys.stop + self.counts.key_columns)

    def split(self, layer: LayerWeights, projected: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: views `[M, heads, d]`.

        Rotation is linear and works in place; a norm before it is not, so its input is left standing for backward.
        """
        source, rotated, values = projected, projected, projected[:, self._values]
        if layer.head_norm is not None or layer.joint_norm is not None:
            rotated = projected.new_empty(projected.shape[0], self._keys.stop)
        if layer.joint_norm is not None:
            values = self._normed_jointly(layer.joint_norm, projected, rotated)
            source = rotated
        self.operations.rotate(source, rotated, self.counts, rotary, layer.head_norm)
        parts = (rotated[:, self._queries], rotated[:, self._keys], values)
        query, key, value = (part.unflatten(1, (-1, self.counts.size)) for part in parts)
        return query, key, value

    def backward(
        self, layer: LayerWeights, gradients: Gradients, projected: Tensor, rotary: Rotary, out: Tensor
    ) -> None:
        """The gradient of `projected` into a strided `out`."""
        query, key, value = gradients
        for gradient, columns, is_key in ((query, self._queries, False), (key, self._keys, True)):
            self.operations.rotate_backward(
                gradient, out[:, columns], rotary, layer.head_norm, projected[:, columns], is_key
            )
        self.operations.copy_rows(value.transpose(1, 2).flatten(0, 1).flatten(1), out[:, self._values])
        if layer.joint_norm is not None:
            self._joint_norm_backward(layer.joint_norm, projected, out)

    def _normed_jointly(self, norm: JointNorm, projected: Tensor, out: Tensor) -> Tensor:
        """Queries and keys into `out`; gives the values."""
        for columns, weight in ((self._queries, norm.query), (self._keys, norm.key)):
            self.operations.add_norm(projected[:, columns], None, weight, norm.epsilon, out[:, columns])
        values = projected[:, self._values]
        if norm.limit is None:
            return values
        out.clamp_(-norm.limit, norm.limit)
        return values.clamp(-norm.limit, norm.limit)

    def _joint_norm_backward(self, norm: JointNorm, projected: Tensor, gradient: Tensor) -> None:
        """In place."""
        for columns, weight in ((self._queries, norm.query), (self._keys, norm.key)):
            x, of_x = projected[:, columns], gradient[:, columns]
            if norm.limit is not None:
                normed = x.new_empty(x.shape)
                self.operations.add_norm(x, None, weight, norm.epsilon, normed)
                of_x.masked_fill_(normed.abs() > norm.limit, 0.0)
            self.operations.norm_backward(of_x, x, weight, norm.epsilon, None, of_x, None, None)
        if norm.limit is not None:
            gradient[:, self._values].masked_fill_(projected[:, self._values].abs() > norm.limit, 0.0)
