"""L4: what users get wrong ends as one of our errors with a fix, and the trainer works afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.backend import Compute
from qlora_hal.contract.values import Adapter, Batch, StepSettings
from qlora_hal.errors import AdapterError, ModelError, OutOfMemoryError, QloraHalError
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_logits, must_refuse
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch
from qlora_hal_oracle.random_models import TinyModel, linear_shapes

RATE = 1e-3
ENDLESS = 2**44
"""As many rows of anything are more than an address space holds: every allocator fails, none is put under pressure."""
MODULE = "model.layers.1.mlp.down_proj"
ELSEWHERE = "model.layers.9.mlp.down_proj"


@pytest.mark.parametrize(
    "name", [f"{MODULE}.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_missing_tensor(name: str, opened: Opener, scratch: Path, seeded: np.random.Generator, judging: Judge) -> None:
    shape, tensors = opened.models.drawn("main")
    left = {key: tensor for key, tensor in tensors.items() if key != name}
    _check_load(opened.written(scratch / "model", shape, left), opened, seeded, judging, ModelError)


@pytest.mark.parametrize("name", [f"{MODULE}.weight", "model.norm.weight"])
def test_tensor_of_another_shape(
    name: str, opened: Opener, scratch: Path, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, tensors = opened.models.drawn("main")
    wrong = {**tensors, name: np.ascontiguousarray(tensors[name][:-32])}
    _check_load(opened.written(scratch / "model", shape, wrong), opened, seeded, judging, ModelError)


def test_configuration_of_another_model(
    opened: Opener, scratch: Path, seeded: np.random.Generator, judging: Judge
) -> None:
    """Weights of two layers under a config.json with three."""
    shape, tensors = opened.models.drawn("main")
    model = opened.written(scratch / "model", shape, tensors)
    _edit_config(model, num_hidden_layers=3)
    _check_load(model, opened, seeded, judging, ModelError)


def test_left_over_tensors(opened: Opener, scratch: Path, seeded: np.random.Generator, judging: Judge) -> None:
    """Weights of two layers under a config.json with one: silently dropping a layer is no way to load."""
    shape, tensors = opened.models.drawn("main")
    model = opened.written(scratch / "model", shape, tensors)
    _edit_config(model, num_hidden_layers=1)
    _check_load(model, opened, seeded, judging, ModelError)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}'], ids=["torn", "list", "empty"])
def test_broken_configuration(
    text: str, opened: Opener, scratch: Path, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, tensors = opened.models.drawn("main")
    model = opened.written(scratch / "model", shape, tensors)
    (model.folder / "config.json").write_text(text, encoding="utf-8")
    _check_load(model, opened, seeded, judging, QloraHalError)


def test_truncated_weights(opened: Opener, scratch: Path, seeded: np.random.Generator, judging: Judge) -> None:
    shape, tensors = opened.models.drawn("main")
    model = opened.written(scratch / "model", shape, tensors)
    path = model.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])
    _check_load(model, opened, seeded, judging, QloraHalError)


def test_unknown_target_module(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape, targets=[MODULE])
    renamed = {name.replace(MODULE, ELSEWHERE): tensor for name, tensor in adapter.tensors.items()}
    _check_attach(Adapter(renamed, replace(adapter.config, target_modules=(ELSEWHERE,))), opened, seeded, judging)


@pytest.mark.parametrize("half", ["A", "B"])
def test_missing_adapter_tensor(half: str, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    key = lora_a_key(MODULE) if half == "A" else lora_b_key(MODULE)
    left = {name: tensor for name, tensor in adapter.tensors.items() if name != key}
    _check_attach(Adapter(left, adapter.config), opened, seeded, judging)


@pytest.mark.parametrize("half", ["A", "B"])
def test_adapter_tensor_of_another_shape(
    half: str, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Also where the number of values is right: a transposed tensor."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape, rank=4)
    key = lora_a_key(MODULE) if half == "A" else lora_b_key(MODULE)
    wrong = {**adapter.tensors, key: np.ascontiguousarray(adapter.tensors[key].T)}
    _check_attach(Adapter(wrong, adapter.config), opened, seeded, judging)


def test_adapter_tensor_too_many(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A tensor that no target uses would be trained on paper only."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    fewer = tuple(module for module in adapter.config.target_modules if module != MODULE)
    _check_attach(Adapter(adapter.tensors, replace(adapter.config, target_modules=fewer)), opened, seeded, judging)


def test_unknown_optimizer(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """An optimizer that does not exist must not become another one."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    ready = opened(adapter=adapter)
    must_refuse(lambda: ready.trainer.attach(adapter, "sgd_of_nobody"), "an unknown optimizer")
    _check_works(ready, seeded, judging)


def test_unknown_module_is_named(opened: Opener) -> None:
    """Asking for the weight of a module that is not there."""
    ready = opened()
    must_refuse(lambda: ready.trainer.dequantized_weight(ELSEWHERE), f"the weight of {ELSEWHERE}")


def test_adapter_that_no_memory_holds(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A rank of 2^44: a real failure of a real allocator, with arrays that take no memory themselves."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    endless = {
        name: np.broadcast_to(np.float32(1.0), (ENDLESS, t.shape[1]) if "lora_A" in name else (t.shape[0], ENDLESS))
        for name, t in adapter.tensors.items()
    }
    huge = Adapter(endless, replace(adapter.config, r=ENDLESS))
    ready = opened(adapter=adapter)
    must_refuse(lambda: ready.trainer.attach(huge), "an adapter of rank 2^44", OutOfMemoryError)
    ready.attach(adapter)
    _check_works(ready, seeded, judging)


def test_window_that_no_memory_holds(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    token = np.broadcast_to(np.int32(5), (ENDLESS, 16))
    huge = [Batch(token, token, token, token)]
    must_refuse(lambda: ready.trainer.train_step(huge, StepSettings(RATE, 1)).resolve(), "2^44 rows", OutOfMemoryError)
    _check_works(ready, seeded, judging)


def _edit_config(model: TinyModel, **changes: object) -> None:
    path = model.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def _check_load(
    model: TinyModel, opened: Opener, seeded: np.random.Generator, judging: Judge, kind: type[QloraHalError]
) -> None:
    """Loading as the core does it, facts first, fails as it should; then the same trainer loads a good model."""
    ready = opened()
    ready.trainer.close()

    def load(which: TinyModel) -> None:
        ready.trainer.load(ModelSource.in_folder(which.folder), ready.quantization, Compute(ready.dtype))  # type: ignore[arg-type]

    must_refuse(lambda: load(model), "loading", kind)
    load(ready.model)
    _check_works(ready, seeded, judging)


def _check_attach(adapter: Adapter, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    ready = opened()
    must_refuse(lambda: ready.trainer.attach(adapter), "attaching", (AdapterError, ModelError))
    _check_works(ready, seeded, judging)


def _check_works(ready: Opened, seeded: np.random.Generator, judging: Judge) -> None:
    """The trainer gives right logits with a good adapter."""
    shape = ready.model.shape
    assert set(ready.trainer.linear_modules()) == set(linear_shapes(shape))
    ready.attach(draw_adapter(seeded, shape))
    judge_logits(ready, ready.oracle(), draw_batch(seeded, shape), judging)
