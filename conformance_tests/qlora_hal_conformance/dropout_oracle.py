"""The oracle of a training step with dropout: gradients and bounds are taken with the masks of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_hal.contract.dropout import kept, rows_of
from qlora_hal.contract.values import AdapterConfig, Batch, LinearShape
from qlora_hal_conformance.fixtures import Opened
from qlora_hal_oracle import Arithmetic, DropoutMasks, LoraScale, OracleTrainer
from qlora_hal_oracle.arrays import Float64, TokenBatch
from qlora_hal_oracle.trainer import WindowGradients

Shapes = Mapping[str, LinearShape]


def masks_of(config: AdapterConfig, shapes: Shapes, batch: Batch, key: int) -> dict[str, Float64]:
    """Module path -> what its adapter's input `[batch, time, in]` is multiplied with in a step of this key."""
    rate = config.dropout
    if rate == 0.0:
        return {}
    rows, time = rows_of(batch), batch.input_ids.shape[1]
    return {
        module: kept(key, module, rows, time, shapes[module].inputs, rate) / (1.0 - rate)
        for module in config.target_modules
    }


class DropoutOracle(OracleTrainer):
    """The oracle in a step of one dropout key. Its error scales are those of the masked products, so bounds need no
    allowance for what dropout enlarges."""

    key: int
    adapter_config: AdapterConfig
    shapes: Shapes

    @classmethod
    def at_state_of(cls, ready: Opened, key: int) -> DropoutOracle:
        """On the backend's own weights, with its adapter and moments as they stand."""
        exported, snapshot = ready.trainer.export_adapter(), ready.trainer.export_optimizer()
        config = exported.config
        scale = LoraScale(config.alpha, config.r, config.use_rslora)
        oracle = cls(ready.model.shape, ready.own_base(), exported.tensors, scale)
        oracle.key, oracle.adapter_config, oracle.shapes = key, config, ready.trainer.linear_modules()
        oracle.import_optimizer(snapshot.step, snapshot.moments)
        return oracle

    def window_gradients(
        self,
        window: Sequence[TokenBatch],
        *,
        masks: Sequence[DropoutMasks] | None = None,
        denominator: float | None = None,
        with_base: bool = False,
        arithmetic: Arithmetic | None = None,
    ) -> WindowGradients:
        drawn = masks or [masks_of(self.adapter_config, self.shapes, batch, self.key) for batch in window]  # type: ignore[arg-type]
        return super().window_gradients(
            window, masks=drawn, denominator=denominator, with_base=with_base, arithmetic=arithmetic
        )
