"""mlx-lm's own `train`, called for one window at a time, on its own model and LoRA layers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx.nn.losses import cross_entropy
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.tuner import trainer as mlx_trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers
from mlx_lm.utils import load_model, quantize_model

from benchmarks.rivals import MLX_LM, MLX_LM_SUMMED
from qlora_hal.adapter import check_fits, lora_a_key, lora_b_key
from qlora_hal.contract import toolkit
from qlora_hal.contract.backend import BackendSpec, Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    Adapter,
    Batch,
    Float32,
    Int32,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    StepSettings,
)
from qlora_hal.errors import ModelError
from qlora_hal.model.source import ModelSource

MODES = {
    WeightFormat.MXFP4: ("mxfp4", 4),
    WeightFormat.NVFP4: ("nvfp4", 4),
    WeightFormat.MXFP8: ("mxfp8", 8),
    **{WeightFormat(f"int{bits}_affine"): ("affine", bits) for bits in (2, 3, 4, 5, 6, 8)},
}
_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
_PACKAGES = ("mlx", "mlx-lm", "transformers")

memory_named = partial(toolkit.memory_named, "MLX", words=("out of memory", "unable to allocate", "bad_alloc"))

Loss = Callable[[Any, mx.array, mx.array], tuple[mx.array, mx.array]]


class ClippedAdamW(optim.AdamW):
    """MLX's AdamW after MLX's `clip_grad_norm`: mlx-lm's trainer itself never clips."""

    max_norm = float("inf")
    norm: mx.array

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        clipped, self.norm = optim.clip_grad_norm(gradients, self.max_norm)  # type: ignore[no-untyped-call]
        return super().apply_gradients(clipped, parameters)


class Looking(optim.SGD):
    """Keeps the gradient that the trainer would step with, and moves nothing."""

    gradients: Any

    def update(self, model: Module, gradients: Any) -> None:
        self.gradients = gradients


@dataclass
class Reported(TrainingCallback):
    """The loss that the trainer prints."""

    loss: float = float("nan")

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.loss = float(train_info["train_loss"])


class MlxLmTrainer(QuantizedLoRATrainer):
    spec: ClassVar[BackendSpec] = MLX_LM

    # life ------------------------------------------------------------------------------------------------------------
    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return ("float32", "bfloat16")

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        toolkit.check_served(self.spec, quantization, compute, prequantized=source.facts.prequantized is not None)
        self.close()
        # Every call of `train` compiles its step again, which takes a C++ compiler on a CPU minutes for a suite.
        mx.disable_compile()
        with memory_named("load"), contextlib.redirect_stdout(io.StringIO()):
            try:
                self.model: Any = self.load_model(source, quantization, compute)
            except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
                raise ModelError("QH-RIV2", f"It does not load: {error}", where=source.name, fix="Get it again.") from (
                    error
                )
        self.model.freeze()
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, (Linear, QuantizedLinear)) and name != "lm_head"
        }

    def load_model(self, source: ModelSource, quantization: Quantization, compute: Compute) -> Any:
        """The base as `mlx_lm.convert` makes it, but for embeddings and head, which the contract leaves as they are."""
        model, config = load_model(Path(source.path))
        dtype = getattr(mx, compute.dtype)
        # Scales of a packed weight are floats too, and are cast with the rest, as convert does.
        model.update(tree_map_with_path(lambda _, v: cast(v, dtype), model.parameters()))
        if source.facts.prequantized is None and quantization.weight_format is not WeightFormat.NONE:
            mode, bits = MODES[quantization.weight_format]
            model, _ = quantize_model(
                model,
                config,
                quantization.block_size,
                bits,
                mode=mode,
                quant_predicate=lambda path, _: path.startswith("model.layers."),
            )
        return model

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return {name: shape_of(linear) for name, linear in self.linears.items()}

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        toolkit.check_attached(self.spec, adapter.config, optimizer)
        with memory_named("attach"):
            check_fits(adapter, self.linear_modules(), where="attach")
            remove_lora_layers(self.model)
            config = adapter.config
            keys = set(config.target_modules)
            linear_to_lora_layers(
                self.model, 0, {"rank": config.r, "scale": config.scale, "dropout": 0.0, "keys": keys}
            )
            self.config = config
            self.model.load_weights(
                [mlx_tensor(name, tensor) for name, tensor in adapter.tensors.items()], strict=False
            )
            mx.eval(self.model.parameters())
            self.optimizer = ClippedAdamW(learning_rate=0.0, bias_correction=True)
            self.optimizer.init(self.model.trainable_parameters())

    def device_facts(self) -> DeviceFacts:
        versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
        return DeviceFacts(
            str(mx.default_device()), versions, kernel_path="mlx-lm LoRALinear, mlx_lm.tuner.trainer.train"
        )

    def close(self) -> None:
        self.__dict__.clear()

    def __getattr__(self, name: str) -> Any:
        """Only for what is not there: `load` and `attach` set it, `close` takes it away."""
        if name in ("model", "linears", "config", "optimizer"):
            raise toolkit.out_of_order("load" if name in ("model", "linears") else "attach")
        raise AttributeError(name)

    # training --------------------------------------------------------------------------------------------------------
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> toolkit.Done:
        optimizer = self.optimizer
        optimizer.learning_rate = settings.learning_rate
        optimizer.betas = [settings.beta1, settings.beta2]
        optimizer.eps, optimizer.weight_decay = settings.epsilon, settings.weight_decay
        optimizer.max_norm = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
        loss_sum = self.train(window, optimizer) * toolkit.counted_tokens(window)
        return toolkit.Done(toolkit.step_stats(window, loss_sum, loss_sum, float(optimizer.norm), applied=True))

    def train(self, window: Sequence[Batch], optimizer: Any) -> float:
        """`mlx_lm.tuner.trainer.train` for as many iterations as the window has micro-batches; the loss it reports."""
        reported = Reported()
        with (
            tempfile.TemporaryDirectory() as folder,
            memory_named("train_step"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            toolkit.check_batches(self.spec, window)
            mlx_trainer.train(
                self.model,
                optimizer,
                window,
                args=mlx_trainer.TrainingArgs(
                    iters=len(window),
                    grad_accumulation_steps=len(window),
                    steps_per_report=len(window),
                    steps_per_save=len(window) + 1,
                    adapter_file=str(Path(folder) / "adapters.safetensors"),
                ),
                loss=self.loss_for(window),
                iterate_batches=self.iterate_batches,
                training_callback=reported,
            )
        return reported.loss

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        _ = self.optimizer
        with memory_named("evaluate"):
            toolkit.check_batches(self.spec, batches)
            loss = mlx_trainer.evaluate(
                self.model,
                batches,
                1,
                len(batches),
                loss=self.loss_for(batches),
                iterate_batches=self.iterate_batches,
            )
        total = float(loss) * toolkit.counted_tokens(batches)
        return toolkit.evaluated(batches, total, total)

    def iterate_batches(
        self, dataset: Sequence[Batch], *_: object, **__: object
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """The rows of each batch with what mlx-lm's own `iterate_batches` gives of them: where the prompt ends and how
        long the row is; where labels are no such span, the labels themselves."""
        as_spans = all(is_one_span(batch) for batch in dataset)
        for batch in dataset:
            yield mx.array(batch.input_ids), mx.array(spans(batch) if as_spans else batch.labels)

    def loss_for(self, window: Sequence[Batch]) -> Loss:
        default: Loss = mlx_trainer.default_loss
        return default if all(is_one_span(batch) for batch in window) else loss_of_labels

    # state -----------------------------------------------------------------------------------------------------------
    def export_adapter(self) -> Adapter:
        _ = self.optimizer
        return Adapter(dict(peft_tensors(self.model.trainable_parameters())), self.config)

    def export_optimizer(self) -> OptimizerSnapshot:
        state = dict(tree_flatten(self.optimizer.state))
        moments = {}
        for name, array in state.items():
            path, _, letter = name.rpartition(".")
            if letter in _MOMENTS and path:
                key, tensor = peft_tensor(path, array)
                moments[f"{key}.{_MOMENTS[letter]}"] = tensor
        return OptimizerSnapshot(int(state["step"]), moments)

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        adapter = self.export_adapter()
        toolkit.check_moments(snapshot, {name: tensor.shape for name, tensor in adapter.tensors.items()})
        arrays: list[tuple[str, mx.array]] = [("step", mx.array(snapshot.step, mx.uint64))]
        for name in adapter.tensors:
            for letter, kind in _MOMENTS.items():
                path, array = mlx_tensor(name, snapshot.moments[f"{name}.{kind}"])
                arrays.append((f"{path}.{letter}", array))
        self.optimizer.state = {**tree_unflatten(arrays), "learning_rate": self.optimizer.learning_rate}

    # views -----------------------------------------------------------------------------------------------------------
    def logits(self, batch: Batch) -> Float32:
        toolkit.check_batches(self.spec, [batch])
        self.model.eval()
        return to_host(self.model(mx.array(batch.input_ids)))

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        _ = self.optimizer
        looking = Looking(learning_rate=0.0)
        self.train(window, looking)
        return dict(peft_tensors(looking.gradients))

    def dequantized_weight(self, module: str) -> Float32:
        if module not in self.linears:
            raise toolkit.unknown_module(module, self.linears)
        linear = self.linears[module]
        if not isinstance(linear, QuantizedLinear):
            return to_host(linear.weight)
        return to_host(
            mx.dequantize(
                linear.weight,
                linear.scales,
                linear.get("biases"),
                group_size=linear.group_size,
                bits=linear.bits,
                mode=linear.mode,
            )
        )

    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        self.model.eval()
        new: list[int] = []
        with self.switched(on=adapter):
            for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=max_new_tokens):
                if int(token) in stop_tokens:
                    break
                new.append(int(token))
        return np.asarray(new, dtype=np.int32)

    @contextlib.contextmanager
    def switched(self, *, on: bool) -> Iterator[None]:
        """mlx-lm has no switch of an adapter; a scale of 0 is one."""
        layers = [] if on else [m for _, m in self.model.named_modules() if isinstance(m, LoRALinear)]
        scales = [layer.scale for layer in layers]
        for layer in layers:
            layer.scale = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scale = scale


class SummedTrainer(MlxLmTrainer):
    """The same with a loss of ours, by the `loss` that `train` takes: which part of a difference is mlx-lm's loss?"""

    spec: ClassVar[BackendSpec] = MLX_LM_SUMMED

    def iterate_batches(
        self, dataset: Sequence[Batch], *_: object, **__: object
    ) -> Iterator[tuple[mx.array, mx.array]]:
        return ((mx.array(batch.input_ids), mx.array(batch.labels)) for batch in dataset)

    def loss_for(self, window: Sequence[Batch]) -> Loss:
        """The sum of the counted tokens' losses over the count of the window, times the number of micro-batches, by
        which `train` divides; `evaluate` weighs by the count that is returned."""
        share = max(toolkit.counted_tokens(window), 1) / len(window)

        def loss(model: Any, batch: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
            mean, count = loss_of_labels(model, batch, labels)
            return mx.where(count > 0, mean * count, 0.0) / share, mx.array(share)

        return loss


# batches -------------------------------------------------------------------------------------------------------------
def loss_of_labels(model: Any, batch: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """`default_loss` with another mask, by the `loss` that `train` takes: mlx-lm counts one span to a row."""
    logits = model(batch[:, :-1])
    mask = labels[:, 1:] != IGNORE_LABEL
    losses = cross_entropy(logits, batch[:, 1:]) * mask
    count = mask.sum()
    return losses.astype(mx.float32).sum() / count, count


def spans(batch: Batch) -> Int32:
    """`[batch, 2]`: the first counted token of each row and the row's length."""
    counted = batch.labels != IGNORE_LABEL
    lengths = np.count_nonzero(batch.segment_ids, axis=1)
    return np.stack([np.where(counted.any(1), counted.argmax(1), batch.labels.shape[1] + 1), lengths], 1).astype(
        np.int32
    )


def is_one_span(batch: Batch) -> bool:
    """Whether each row counts everything from some token to its last."""
    places = np.arange(batch.labels.shape[1])
    starts, ends = (column[:, None] for column in spans(batch).T)
    expected = (places >= starts) & (places < ends)
    return bool((expected == (batch.labels != IGNORE_LABEL)).all())


# tensors -------------------------------------------------------------------------------------------------------------
def cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def shape_of(linear: Any) -> LinearShape:
    outputs, inputs = linear.weight.shape
    return LinearShape(inputs * 32 // linear.bits if isinstance(linear, QuantizedLinear) else inputs, outputs)


def mlx_tensor(name: str, tensor: Float32) -> tuple[str, mx.array]:
    """A tensor of PEFT's under mlx-lm's name, transposed as mlx-lm keeps it."""
    module, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return f"{module}.{half.lower()}", mx.array(np.ascontiguousarray(tensor.T))


def peft_tensor(path: str, array: mx.array) -> tuple[str, Float32]:
    module, _, half = path.rpartition(".")
    name = lora_a_key(module) if half == "lora_a" else lora_b_key(module)
    return name, np.ascontiguousarray(to_host(array).T)


def peft_tensors(tree: Any) -> Iterator[tuple[str, Float32]]:
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    return (peft_tensor(path, arrays[path]) for path in sorted(arrays))


def to_host(array: mx.array) -> Float32:
    found: Float32 = np.array(array.astype(mx.float32))
    return found
