"""Opening a trainer on a tiny model, and the oracle that knows the backend's own weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.dropout import kept, rows_of
from qlora_hal.contract.values import Adapter, Batch, Float32, OptimizerSnapshot, StepSettings, StepStats
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.random_inputs import draw_wide_rows, stream, total_tokens
from qlora_hal_conformance.subject import Subject
from qlora_hal_oracle import Arithmetic, Fp8Products, LlamaShape, LoraScale, OracleStep, OracleTrainer
from qlora_hal_oracle.arithmetic import EXACT
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.random_models import (
    DEEP_SHAPE,
    LONG_SHAPE,
    SHAPES,
    UNEVEN_SHAPE,
    Config,
    TinyModel,
    draw_tensors,
    tied,
    write_model,
    write_quantized,
)

PLAIN = "llama"
"""The family of models that most cases draw."""


@dataclass(slots=True, eq=False)
class Opened:
    """A loaded trainer, with an adapter once one is attached."""

    trainer: QuantizedLoRATrainer
    model: TinyModel
    quantization: Quantization
    dtype: str
    adapter: Adapter | None = None
    compute: Compute = field(default_factory=Compute)

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        self.trainer.attach(adapter, optimizer)
        self.adapter = adapter

    def step(self, window: Sequence[Batch], learning_rate: float, **settings: object) -> StepStats:
        """One resolved step over the whole window."""
        given = {"denominator": float(total_tokens(window)), **settings}
        window = placed(window)
        return self.trainer.train_step(window, StepSettings(learning_rate, **given)).resolve()  # type: ignore[arg-type]

    def trained_gradient(self, window: Sequence[Batch], **settings: object) -> dict[str, Float32]:
        """The gradient that a *training step* used, unclipped: with beta1 = 0 the first moment is the gradient, and
        with a learning rate of 0 the step leaves the adapter alone. The moments of an expert without tokens stay as
        they are, so where there are experts all begin as zeros."""
        assert self.adapter is not None
        if any(tensor.ndim == 3 for tensor in self.adapter.tensors.values()):
            held = self.trainer.export_optimizer()
            nothing = {name: np.zeros_like(moment) for name, moment in held.moments.items()}
            self.trainer.import_optimizer(OptimizerSnapshot(held.step, nothing))
        stats = self.step(window, 0.0, beta1=0.0, max_grad_norm=None, **settings)
        assert stats.applied, "an ordinary step was not applied"
        moments = self.trainer.export_optimizer().moments
        return {n.removesuffix(".exp_avg"): m for n, m in moments.items() if n.endswith(".exp_avg")}

    def masks(self, batch: Batch, key: int) -> dict[str, Float64]:
        """What the adapter's inputs are multiplied with in a step of this key, by the contract; `[batch, time, in]` by
        module, nothing without dropout."""
        assert self.adapter is not None
        config, shapes = self.adapter.config, self.trainer.linear_modules()
        if config.dropout == 0.0:
            return {}
        rows, time, rate = rows_of(batch), batch.input_ids.shape[1], config.dropout
        return {
            module: kept(key, module, rows, time, shapes[module].inputs, rate) / (1.0 - rate)
            for module in config.target_modules
        }

    def own_base(self) -> dict[str, Float32]:
        """The weights as the backend's products see them; what is never quantized, as stored."""
        own = {f"{m}.weight": self.trainer.dequantized_weight(m) for m in self.trainer.linear_modules()}
        return {**self.model.tensors, **own}

    def oracle(self, adapter: Adapter | None = None) -> OracleTrainer:
        """The float64 reference on the backend's own weights, so that format error and arithmetic error stay apart."""
        given = adapter or self.adapter
        assert given is not None
        fp8 = Fp8Products() if self.compute.fp8_products else None
        return make_oracle(self.model.shape, self.own_base(), given, fp8=fp8)


def placed(window: Sequence[Batch]) -> list[Batch]:
    """The micro-batches with the places of their rows, one after the other, where they have none yet."""
    first, found = 0, []
    for batch in window:
        rows = np.arange(first, first + len(batch.input_ids), dtype=np.int32)
        found.append(batch if batch.rows is not None else replace(batch, rows=rows))
        first += len(rows)
    return found


def make_oracle(
    shape: LlamaShape,
    base: Mapping[str, Float32],
    adapter: Adapter,
    arithmetic: Arithmetic = EXACT,
    *,
    fp8: Fp8Products | None = None,
) -> OracleTrainer:
    scale = LoraScale(adapter.config.alpha, adapter.config.r, adapter.config.use_rslora)
    return OracleTrainer(shape, base, adapter.tensors, scale, arithmetic, fp8)


def oracle_step(oracle: OracleTrainer, window: Sequence[Batch], learning_rate: float, **settings: object) -> OracleStep:
    """The oracle's step with the names of `StepSettings`."""
    given = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, **settings}
    return oracle.train_step(
        window,
        learning_rate=learning_rate,
        betas=(given.pop("beta1"), given.pop("beta2")),  # type: ignore[arg-type]
        eps=given.pop("epsilon"),  # type: ignore[arg-type]
        **given,  # type: ignore[arg-type]
    )


@dataclass(slots=True)
class Models:
    """Tiny models of one run, each drawn from its name and written once for each way of storing it."""

    folder: Path
    seed: int
    _drawn: dict[str, tuple[LlamaShape, dict[str, Float32]]] = field(default_factory=dict)
    _written: dict[str, TinyModel] = field(default_factory=dict)
    _configs: dict[str, Config] = field(default_factory=dict)

    def drawn(self, name: str) -> tuple[LlamaShape, dict[str, Float32]]:
        """Shape and weights. `deep` has `DEEP_SHAPE`; a name with `tied` has a tied head, one with `uneven` widths that
        blocks do not divide, one with `one layer` no second, one with `wide` rows that differ widely in size;
        `long` has `LONG_SHAPE`."""
        if name not in self._drawn:
            random = stream(self.seed, f"model/{name}")
            shape = UNEVEN_SHAPE if "uneven" in name else SHAPES[int(random.integers(len(SHAPES)))]
            shape = LONG_SHAPE if name == "long" else shape
            shape = DEEP_SHAPE if name == "deep" else tied(shape) if "tied" in name else shape
            shape = replace(shape, num_hidden_layers=1) if "one layer" in name else shape
            wide = "wide" in name
            self._drawn[name] = draw_wide_rows(random, shape) if wide else (shape, draw_tensors(shape, random))
        return self._drawn[name]

    def define(self, name: str, shape: LlamaShape, tensors: dict[str, Float32], config: Config | None = None) -> None:
        """Give a name to weights that a case made itself, with the config.json of one that is no plain Llama; what was
        written under it before is forgotten."""
        self._drawn[name] = shape, tensors
        if config is not None:
            self._configs[name] = config
        self._written = {key: model for key, model in self._written.items() if not key.startswith(f"{name}-")}

    def plain(self, name: str, *, stored_dtype: str = "float32", files: int = 1) -> TinyModel:
        key = f"{name}-{stored_dtype}-{files}"
        if key not in self._written:
            shape, tensors = self.drawn(name)
            self._written[key] = write_model(
                self._place(key),
                shape,
                tensors,
                stored_dtype=stored_dtype,
                files=files,
                config=self._configs.get(name),
            )
        return self._written[key]

    def quantized(
        self, name: str, quantization: Quantization, *, stored_dtype: str = "float32", files: int = 1
    ) -> TinyModel:
        """`stored_dtype` is that of what is not packed."""
        double = "-double" if quantization.double_quant else ""
        key = f"{name}-{quantization.weight_format.value}-{quantization.block_size}{double}-{stored_dtype}-{files}"
        if key not in self._written:
            shape, tensors = self.drawn(name)
            self._written[key] = write_quantized(
                self._place(key),
                shape,
                tensors,
                quantization,
                stored_dtype=stored_dtype,
                files=files,
                config=self._configs.get(name),
            )
        return self._written[key]

    def _place(self, key: str) -> Path:
        """A folder whose name says nothing: a backend sees it, and has no business with what is in store for it."""
        return self.folder / hashlib.sha256(f"{self.seed}/{key}".encode()).hexdigest()[:12]


@dataclass(slots=True)
class Opener:
    """Opens trainers for one case and closes them after it; notes what was run."""

    subject: Subject
    models: Models
    main_dtype: str
    note_device: Callable[[QuantizedLoRATrainer], None]
    ran: set[str] = field(default_factory=set)
    _open: list[QuantizedLoRATrainer] = field(default_factory=list)

    def __call__(
        self,
        model: TinyModel | str = "main",
        *,
        weight_format: WeightFormat | None = None,
        block_size: int | None = None,
        double_quant: bool | None = None,
        dtype: str | None = None,
        checkpointing: bool | None = None,
        fp8_products: bool | None = None,
        adapter: Adapter | None = None,
        optimizer: str = "adamw",
        prequantized: bool | None = None,
    ) -> Opened:
        """Load a model by name or as written, and attach the adapter if one is given.

        A backend that does not quantize on load gets the model in the layout of the format, already quantized. What is
        not given is as in the run that is judged, where one is.
        """
        chosen, run = weight_format or self.subject.main_format, self.subject.combination
        if double_quant is None:
            double_quant = run is not None and chosen is run.stored_as and run.double_quant
        quantization = Quantization(chosen, block_size or self.default_block(chosen), double_quant)
        dtype = dtype or self.main_dtype
        if checkpointing is None:
            checkpointing = run is not None and run.gradient_checkpointing
        if fp8_products is None:
            fp8_products = run is not None and run.fp8_products
        options = run.options if run is not None else {}
        compute = Compute(dtype, checkpointing, options, fp8_products=fp8_products)  # type: ignore[arg-type]
        if prequantized is None:
            on_load = self.subject.declares(Feature.QUANTIZE_ON_LOAD)
            prequantized = chosen is not WeightFormat.NONE and not on_load
        if isinstance(model, str):
            model = self.models.quantized(model, quantization) if prequantized else self.models.plain(model)
        trainer, source = self.trainer(), ModelSource.in_folder(model.folder)
        trainer.load(source, quantization, compute)
        block = f"/{quantization.block_size}" if quantization.block_size else ""
        family = "" if source.facts.model_type == PLAIN else f" of {source.facts.model_type}"
        named = "fp8" if fp8_products else dtype
        self.ran.add(f"{chosen.value}{block}{'+double_quant' if double_quant else ''} in {named}{family}")
        opened = Opened(trainer, model, quantization, dtype, compute=compute)
        if adapter is not None:
            opened.attach(adapter, optimizer)
            self.note_device(trainer)  # only now is it known which kernels will multiply
        return opened

    def written(self, folder: Path, shape: LlamaShape, tensors: Mapping[str, Float32]) -> TinyModel:
        """A model of a case's own, in the way that a backend gets it: packed where it does not quantize on load."""
        main = self.subject.main_format
        if main is WeightFormat.NONE or self.subject.declares(Feature.QUANTIZE_ON_LOAD):
            return write_model(folder, shape, tensors)
        return write_quantized(folder, shape, tensors, Quantization(main, self.default_block(main)))

    def trainer(self) -> QuantizedLoRATrainer:
        """An opened trainer without a base."""
        trainer = self.subject.open()
        self._open.append(trainer)
        return trainer

    def default_block(self, weight_format: WeightFormat) -> int | None:
        """As `Subject.default_block` says."""
        return self.subject.default_block(weight_format)

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


def difference(found: Mapping[str, Float32], expected: Mapping[str, Float64 | Float32], name: str) -> Float64:
    """|found - expected| of one tensor in float64."""
    apart: Float64 = np.abs(found[name].astype(np.float64) - np.asarray(expected[name], dtype=np.float64))
    return apart
