"""How far backends agree on AdamW's first step, on a pretrained model.

At B = 0 the first step of AdamW is a sign: an entry of B whose gradient is smaller than its rounding error goes up on
one device and down on another, by the whole learning rate. Measured is the share of B's entries, weighted by the
update of the float64 oracle, that go the other way than the oracle's, with `training.adam_epsilon` as it is by default
and with what `training.adam_epsilon_from_noise` measures (the option itself never goes below `adam_epsilon`).

The mutant that permutes reductions is the same backend on the same model with its hidden and feed-forward channels in
another order: in exact arithmetic nothing changes, and every sum over channels is taken in another order.

    python benchmarks/start_signs.py qlora_hal/demo/model --name demo

Each measurement is one record of `docs/runs/start_signs.json`; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from tokenizers import Tokenizer

import qlora_hal.demo
from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.backend import BackendSpec, Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import Adapter, AdapterConfig, Batch, ComputeDtype, Float32, Int32, StepSettings
from qlora_hal.detect.discovery import find, listed, load_spec, open_trainer
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.source import ModelSource
from qlora_hal.run.gradient_noise import epsilon_above
from qlora_hal_oracle import UNIT_ROUNDOFF, LlamaShape, LoraScale, OracleTrainer
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.random_models import linear_shapes, write_model, write_quantized

RECORD = Path(__file__).parent.parent / "docs" / "runs" / "start_signs.json"
BACKENDS = ("cpu_torch", "gptq_int4", "mlx_lora")
DTYPES: tuple[ComputeDtype, ...] = ("float32", "bfloat16")
RATES = (2e-4, 1e-6)
RANK, SEED = 8, 7
USUAL_EPSILON = 1e-8

Tensors = Mapping[str, Float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Model:
    """Weights of a pretrained Llama, and one window of real text for it."""

    name: str
    shape: LlamaShape
    tensors: Tensors
    window: Sequence[Batch]


def read_model(folder: Path, name: str, rows: int, length: int) -> Model:
    shape = LlamaShape.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key).float().numpy() for key in file.keys()}  # noqa: SIM118
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Model(name, shape, tensors, window_of(tokenizer, rows, length))


def window_of(tokenizer: Tokenizer, rows: int, length: int) -> list[Batch]:
    """The first rows of the demo's training data that are long enough, as text, in two micro-batches."""
    ids = []
    data = Path(qlora_hal.demo.__file__).parent / "data" / "train.jsonl"
    for line in data.read_text(encoding="utf-8").splitlines():
        text = "\n".join(message["content"] for message in json.loads(line)["messages"])
        tokens = tokenizer.encode(text).ids
        if len(tokens) >= length:
            ids.append(tokens[:length])
        if len(ids) == rows:
            break
    return [batch_of(np.array(part, np.int32)) for part in (ids[: rows // 2], ids[rows // 2 :])]


def batch_of(ids: Int32) -> Batch:
    labels = ids.copy()
    labels[:, 0] = -100
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy()
    return Batch(ids, labels, positions, np.ones_like(ids), rows=np.arange(len(ids), dtype=np.int32))


# the same model in another order -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Order:
    """Hidden and feed-forward channels in another order. A linear layer that reads or writes them follows."""

    hidden: Indices
    inner: Indices

    def inputs(self, module: str) -> Indices | slice:
        if module.endswith("o_proj"):
            return slice(None)
        return self.inner if module.endswith("down_proj") else self.hidden

    def outputs(self, module: str) -> Indices | slice:
        if module.endswith(("o_proj", "down_proj")):
            return self.hidden
        return self.inner if module.endswith(("gate_proj", "up_proj")) else slice(None)

    def weights(self, shape: LlamaShape, tensors: Tensors) -> dict[str, Float32]:
        modules = linear_shapes(shape)
        found = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if module in modules:
                found[name] = tensor[self.outputs(module)][:, self.inputs(module)]
            else:
                found[name] = tensor[..., self.hidden]
        return found

    def adapter(self, adapter: Adapter) -> Adapter:
        tensors = {}
        for module in adapter.config.target_modules:
            a, b = adapter.tensors[lora_a_key(module)], adapter.tensors[lora_b_key(module)]
            tensors[lora_a_key(module)] = np.ascontiguousarray(a[:, self.inputs(module)])
            tensors[lora_b_key(module)] = np.ascontiguousarray(b[self.outputs(module)])
        return Adapter(tensors, adapter.config)

    def undone(self, module: str, b: Float32) -> Float32:
        found = np.empty_like(b)
        found[self.outputs(module)] = b
        return found


# one measurement -----------------------------------------------------------------------------------------------------
def load(spec: BackendSpec, model: Model, dtype: ComputeDtype, folder: Path, *, plain: bool) -> QuantizedLoRATrainer:
    """The backend's trainer on the model: unquantized, or in the backend's 4-bit format."""
    weight_format = WeightFormat.NONE if plain else spec.capabilities.levels["4bit"]
    sizes = spec.capabilities.block_sizes.get(weight_format, ())
    quantization = Quantization(weight_format, sizes[0] if sizes else record_of(weight_format).default_block)
    if plain or Feature.QUANTIZE_ON_LOAD in spec.capabilities.features:
        write_model(folder, model.shape, model.tensors)
    else:
        write_quantized(folder, model.shape, model.tensors, quantization)
    trainer = open_trainer(spec)
    trainer.load(ModelSource.in_folder(folder), quantization, Compute(dtype))
    return trainer


def first_adapter(model: Model) -> Adapter:
    modules = linear_shapes(model.shape)
    return initial_adapter(AdapterConfig(RANK, 2.0 * RANK, target_modules=tuple(sorted(modules))), modules, SEED)


def oracle_gradient(model: Model, trainer: QuantizedLoRATrainer, adapter: Adapter) -> dict[str, Float64]:
    """B's gradients in float64, on the backend's own weights, clipped to a norm of 1."""
    own = {f"{m}.weight": trainer.dequantized_weight(m) for m in trainer.linear_modules()}
    scale = LoraScale(adapter.config.alpha, adapter.config.r, False)
    oracle = OracleTrainer(model.shape, {**model.tensors, **own}, adapter.tensors, scale)
    return clipped({name: g for name, g in oracle.gradients(model.window).items() if ".lora_B." in name})


def clipped(gradients: Mapping[str, Float64]) -> dict[str, Float64]:
    """A's gradients are 0 at B = 0, so B's are the whole norm."""
    factor = min(1.0, 1.0 / (np.linalg.norm(flat(gradients)) + 1e-6))
    return {name: gradient * factor for name, gradient in gradients.items()}


def first_update(
    trainer: QuantizedLoRATrainer, model: Model, adapter: Adapter, rate: float, epsilon: float
) -> dict[str, Float32]:
    """B after one whole training step."""
    trainer.attach(adapter)
    counted = float(sum(batch.counted_tokens for batch in model.window))
    assert trainer.train_step(model.window, StepSettings(rate, counted, epsilon=epsilon)).resolve().applied
    return {name: b for name, b in trainer.export_adapter().tensors.items() if ".lora_B." in name}


def flat(tensors: Mapping[str, Float32] | Mapping[str, Float64]) -> Float64:
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def compared(update: Float64, reference: Float64) -> dict[str, float]:
    """Entries whose sign differs, as a share of the reference's update and of all entries; the distance of the two."""
    turned = np.sign(update) != np.sign(reference)
    weights = np.abs(reference)
    return {
        "share_of_update": float(weights[turned].sum() / weights.sum()),
        "share_of_entries": float(turned.mean()),
        "distance": float(np.linalg.norm(update - reference) / np.linalg.norm(reference)),
    }


def measured(
    trainer: QuantizedLoRATrainer, model: Model, dtype: ComputeDtype, exact: Mapping[str, Float64], adapter: Adapter
) -> Iterator[tuple[dict[str, object], dict[str, Float32]]]:
    """A record and B, for each rate and epsilon; `exact` is the oracle's clipped gradient, in this trainer's order."""
    trainer.attach(adapter)
    found = clipped({n: g.astype(np.float64) for n, g in trainer.gradients(model.window).items() if ".lora_B." in n})
    noise = np.linalg.norm(flat(found) - flat(exact)) / np.linalg.norm(flat(exact))
    above = epsilon_above(found, dtype, max_grad_norm=1.0)
    for epsilon in (USUAL_EPSILON, above):
        for rate in RATES:
            update = first_update(trainer, model, adapter, rate, epsilon)
            reference = {name: -rate * g / (np.abs(g) + epsilon) for name, g in exact.items()}
            yield (
                {
                    "learning_rate": rate,
                    "epsilon": epsilon,
                    "from_noise": epsilon is above,
                    "gradient_noise": float(noise),
                    "noise_over_unit_roundoff": float(noise / UNIT_ROUNDOFF[dtype]),
                    "against_oracle": compared(flat(update), flat(reference)),
                },
                update,
            )


def of_backend(model: Model, name: str, dtype: ComputeDtype, folder: Path) -> Iterator[dict[str, object]]:
    """The backend in its 4-bit format against the oracle."""
    spec = load_spec(find(name, listed()))
    with load(spec, model, dtype, folder / "model", plain=False) as trainer:
        adapter = first_adapter(model)
        exact = oracle_gradient(model, trainer, adapter)
        for record, _ in measured(trainer, model, dtype, exact, adapter):
            yield record


def of_permuted(model: Model, name: str, dtype: ComputeDtype, folder: Path) -> Iterator[dict[str, object]]:
    """The backend, unquantized, against the oracle and against itself with its channels in the usual order."""
    spec = load_spec(find(name, listed()))
    random = np.random.default_rng(SEED)
    order = Order(random.permutation(model.shape.hidden_size), random.permutation(model.shape.intermediate_size))
    other = Model(model.name, model.shape, order.weights(model.shape, model.tensors), model.window)
    adapter = first_adapter(model)
    with load(spec, model, dtype, folder / "usual", plain=True) as trainer:
        exact = oracle_gradient(model, trainer, adapter)
        usual = [update for _, update in measured(trainer, model, dtype, exact, adapter)]
    turned = order.adapter(Adapter({**adapter.tensors, **exact}, adapter.config)).tensors  # type: ignore[dict-item]
    exact_there = {name: turned[name].astype(np.float64) for name in exact}
    with load(spec, other, dtype, folder / "other", plain=True) as trainer:
        there = order.adapter(adapter)
        for (record, update), before in zip(measured(trainer, other, dtype, exact_there, there), usual, strict=True):
            modules = {lora_b_key(module): module for module in adapter.config.target_modules}
            back = {name: order.undone(modules[name], b) for name, b in update.items()}
            yield {**record, "against_usual_order": compared(flat(back), flat(before))}


# the record ----------------------------------------------------------------------------------------------------------
def measure(model: Model, subjects: Sequence[str], dtypes: Sequence[ComputeDtype]) -> None:
    for subject in subjects:
        for dtype in dtypes:
            document = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"records": []}
            about = {"model": model.name, "subject": subject, "compute_dtype": dtype}
            if any(about.items() <= record.items() for record in document["records"]):
                continue
            started = time.perf_counter()
            name, is_permuted, _ = subject.partition(" permuted")
            measure_one = of_permuted if is_permuted else of_backend
            with tempfile.TemporaryDirectory() as folder:
                records = [{**about, **record} for record in measure_one(model, name, dtype, Path(folder))]
            document["records"] += records
            document["versions"] = {p: importlib.metadata.version(p) for p in ("qlora-hal", "torch", "mlx", "numpy")}
            RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            for record in records:
                print(json.dumps(record))
            print(f"{subject} {dtype}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--subjects", nargs="*", default=[*BACKENDS, "cpu_torch permuted", "mlx_lora permuted"])
    arguments = parser.parse_args()
    measure(
        read_model(arguments.folder, arguments.name, arguments.rows, arguments.length),
        arguments.subjects,
        arguments.dtypes,
    )
