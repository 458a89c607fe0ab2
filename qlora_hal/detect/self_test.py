"""The third depth of detection: a backend proves its arithmetic on a tiny model, in a child process with a time limit.

Finding a package is not enough: kernels that write nothing, read the wrong block or lose gradients pass every
`is_available`. A crash of the child is an answer, not a crash of ours.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import IGNORE_LABEL, Adapter, AdapterConfig, Batch, StepSettings
from qlora_hal.detect import discovery
from qlora_hal.errors import OutOfMemoryError, QloraHalError
from qlora_hal.files.safetensors_file import file_chunks
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.source import ModelSource
from qlora_hal.processes.subprocess_call import SubprocessCallError, answer_stream, ask, one_line
from qlora_hal_oracle import LoraScale, OracleTrainer, read_shape
from qlora_hal_oracle.random_models import write_quantized

if TYPE_CHECKING:
    from qlora_hal.contract.backend import BackendSpec, QuantizedLoRATrainer
    from qlora_hal.contract.values import Float32

HIDDEN, FEED_FORWARD, VOCABULARY, TIME = 64, 128, 96, 12
LEARNING_RATE, STEPS = 1e-2, 8
SIGKILL = 9  # `signal` has it not on every system


def self_test(backend: str, *, timeout_seconds: float = 120.0) -> Mapping[str, object]:
    """`{"verdict": "pass" | "fail", "reason", "fix", "checks": [{"name", "verdict", "detail"}]}`. Never raises."""
    try:
        return ask("qlora_hal.detect.self_test", backend, seconds=timeout_seconds)
    except SubprocessCallError as silence:
        if silence.waited is not None:
            return _failed(f"not verified: the self-test process {silence}", fix=_more_time(backend, silence.waited))
        if silence.signal == SIGKILL:
            return _failed(f"not verified: the self-test process {silence}", fix=_more_memory(backend))
        return _failed(f"the self-test process {silence}")


def _failed(reason: str, *, fix: str = "Update the driver and the backend's packages.") -> Mapping[str, object]:
    return {"verdict": "fail", "reason": reason, "fix": fix, "checks": []}


def _more_time(backend: str, seconds: float) -> str:
    """A process that is only slow says nothing of drivers or packages."""
    return (
        f"Run it when the machine is idle, or with a longer time limit: qlora-hal doctor --backend {backend} "
        f"--timeout {4 * seconds:.0f}"
    )


def _more_memory(backend: str) -> str:
    """No fault of a driver ends a process with SIGKILL: the system does when memory runs out, or somebody does."""
    return (
        f"Memory ran out, most likely: close what else runs here, then run qlora-hal doctor --backend {backend} again"
    )


class _SelfTest:
    """The checks, in order; each is a sentence that a user understands."""

    def __init__(self, spec: BackendSpec, folder: Path) -> None:
        self.spec = spec
        self.weights = write_tiny_model(folder)
        self.folder = folder
        self.trainer: QuantizedLoRATrainer = discovery.open_trainer(spec)
        self.batch = _batch()
        self.checks: list[dict[str, str]] = []
        self.fix = (
            f"Do not train with {spec.name} here; update the driver and its packages, then run qlora-hal doctor again."
        )

    def run(self) -> Mapping[str, object]:
        for name, check in (
            ("compute dtypes", self.dtypes),
            ("loads and quantizes", self.loads),
            ("quantization error", self.quantizes),
            ("logits against a float64 reference", self.forward),
            ("gradients against a float64 reference", self.backward),
            ("loss falls over 8 steps", self.learns),
        ):
            if not self._passes(name, check):
                return {
                    "verdict": "fail",
                    "reason": f"{name}: {self.checks[-1]['detail']}",
                    "fix": self.fix,
                    "checks": self.checks,
                }
        return {"verdict": "pass", "reason": "computes what the reference computes", "fix": "", "checks": self.checks}

    def _passes(self, name: str, check: Callable[[], tuple[bool, str]]) -> bool:
        try:
            passed, detail = check()
        except OutOfMemoryError as error:
            passed, detail, self.fix = False, one_line(error.message), _more_memory(self.spec.name)
        except (Exception, SystemExit) as error:
            passed, detail = False, one_line(f"{type(error).__name__}: {error}")
        self.checks.append({"name": name, "verdict": "pass" if passed else "fail", "detail": detail})
        return passed

    def dtypes(self) -> tuple[bool, str]:
        proved = list(self.trainer.proved_compute_dtypes())
        return "float32" in proved, ", ".join(proved)

    def loads(self) -> tuple[bool, str]:
        capabilities = self.spec.capabilities
        stored = capabilities.levels.get("4bit") or sorted(capabilities.weight_formats)[0]
        sizes = capabilities.block_sizes.get(stored, (None,))
        double_quant = record_of(stored).double_quant and Feature.DOUBLE_QUANT in capabilities.features
        storage = Quantization(stored, sizes[0], double_quant)
        on_load = stored is WeightFormat.NONE or Feature.QUANTIZE_ON_LOAD in capabilities.features
        folder = self.folder if on_load else self._packed(storage)
        self.trainer.load(ModelSource.in_folder(folder), storage, Compute("float32"))
        modules = self.trainer.linear_modules()
        config = AdapterConfig(4, 8.0, 0.0, False, tuple(sorted(modules)))
        start = initial_adapter(config, modules, 0)
        generator = np.random.default_rng(1)
        moved = {
            n: t if t.any() else generator.normal(0, 0.05, t.shape).astype(np.float32) for n, t in start.tensors.items()
        }
        self.adapter: Adapter = Adapter(moved, config)
        self.trainer.attach(self.adapter, "adamw")
        return True, f"{stored.value} in blocks of {sizes[0]}"

    def _packed(self, storage: Quantization) -> Path:
        """The same weights, stored as a backend gets them that does not quantize while loading."""
        shape = read_shape(TINY_CONFIG)
        return write_quantized(self.folder / "packed", shape, self.weights, storage).folder

    def quantizes(self) -> tuple[bool, str]:
        errors = []
        for module in self.trainer.linear_modules():
            exact, found = self.weights[f"{module}.weight"], self.trainer.dequantized_weight(module)
            errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
        # 4-bit formats lose 0.08 to 0.13 of a normal weight's norm; a wrong nibble, scale or block loses all of it.
        return max(errors) < 0.25, f"at most {max(errors):.3f} of a weight's norm"

    def forward(self) -> tuple[bool, str]:
        oracle = self._oracle()
        scale = oracle.error_scales([self.batch])["lm_head"]
        found, exact = self.trainer.logits(self.batch), oracle.logits(self.batch)
        ratio = float((np.abs(found - exact) / scale.bound(2.0**-24, constant=8.0)).max())
        return ratio <= 1.0, f"{ratio:.3f} of the bound for float32"

    def backward(self) -> tuple[bool, str]:
        oracle = self._oracle()
        scales, exact = oracle.error_scales([self.batch]), oracle.gradients([self.batch])
        found = self.trainer.gradients([self.batch])
        ratio = max(float((np.abs(found[n] - exact[n]) / scales[n].bound(2.0**-24, constant=8.0)).max()) for n in exact)
        return ratio <= 1.0, f"{ratio:.3f} of the bound for float32"

    def learns(self) -> tuple[bool, str]:
        settings = StepSettings(LEARNING_RATE, self.batch.counted_tokens)
        losses = [self.trainer.train_step([self.batch], settings).resolve().loss for _ in range(STEPS)]
        return losses[-1] < losses[0], f"{losses[0]:.3f} -> {losses[-1]:.3f}"

    def _oracle(self) -> OracleTrainer:
        """Float64, on the weights as this backend stored them: format error is not arithmetic error."""
        base: dict[str, Float32] = dict(self.weights)
        for module in self.trainer.linear_modules():
            base[f"{module}.weight"] = self.trainer.dequantized_weight(module)
        config = self.adapter.config
        shape = read_shape(json.loads((self.folder / "config.json").read_text()))
        return OracleTrainer(shape, base, self.adapter.tensors, LoraScale(config.alpha, config.r))


def write_tiny_model(folder: Path) -> dict[str, Float32]:
    """A one-layer Llama with grouped-query attention, as a hub would hold it; returns its tensors."""
    generator = np.random.default_rng(0)
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    layer = "model.layers.0."
    tensors = {f"{layer}self_attn.{name}.weight": _normal(generator, shape) for name, shape in shapes.items()}
    for name, shape in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128))):
        tensors[f"{layer}mlp.{name}.weight"] = _normal(generator, shape)
    for name in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"):
        tensors[f"{name}.weight"] = np.ones(HIDDEN, np.float32)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = _normal(generator, (VOCABULARY, HIDDEN))
    with (folder / "model.safetensors").open("wb") as file:
        file.writelines(file_chunks(tensors, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return tensors


TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _normal(generator: np.random.Generator, shape: tuple[int, int]) -> Float32:
    return generator.normal(0, shape[1] ** -0.5, shape).astype(np.float32)


def _batch() -> Batch:
    generator = np.random.default_rng(2)
    input_ids = generator.integers(3, VOCABULARY, (2, TIME)).astype(np.int32)
    labels = input_ids.copy()
    labels[:, :3] = IGNORE_LABEL
    positions = np.tile(np.arange(TIME, dtype=np.int32), (2, 1))
    return Batch(input_ids, labels, positions, np.ones_like(input_ids))


if __name__ == "__main__":
    with answer_stream() as stream, tempfile.TemporaryDirectory() as scratch:
        try:
            spec = discovery.load_spec(discovery.find(sys.argv[1], discovery.listed()))
            answer = _SelfTest(spec, Path(scratch)).run()
        except QloraHalError as error:
            answer = _failed(error.message, fix=error.fix)
        json.dump(answer, stream)
