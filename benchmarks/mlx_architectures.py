"""Every architecture that mlx-lm and transformers both have, tiny and random, in float32: `mlx_lora`'s logits, and
those with an adapter, against transformers', for each key of config.json that can be changed.

    python benchmarks/mlx_architectures.py [--only llama,phi3] [--keys] [--drawn 3] [--out FILE]
    python benchmarks/mlx_architectures.py --keys --write-findings

Without `--keys` one model of each kind. An existing record is gone on with. An outcome is `equal` (1e-4 of the largest
logit; differences seen are below 1e-5), the code of a refusal that comes before data are read, `differs`, or what
transformers says where it cannot run the model. `--write-findings` compares without what was found before, and writes
what is left out to `mlx_lora/compared.json`; a key that only some rows show (a window) is shown by rows of 20 tokens,
longer than it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_architectures import VOCABULARY, model_types, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from drawn_models import drawn_settings, write_drawn_model

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.adapter.naming import lora_a_key, lora_b_key, module_of
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Batch
from qlora_hal.errors import QloraHalError
from qlora_hal.model.facts import read_facts, text_config
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora import compared
from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

TOLERANCE = 1e-4
ROW = np.random.default_rng(20).integers(3, VOCABULARY, (1, 20))
FINDINGS = Path(compared.__file__).with_name("compared.json")

NO_FORWARD = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "n_positions",
    "n_ctx", "n_embd", "n_head", "n_layer", "dtype", "torch_dtype", "architectures", "model_type",
    "transformers_version", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "pretraining_tp", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder",
    "output_router_logits", "num_labels", "pad_vocab_size_multiple", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "rope_parameters",
)  # fmt: skip
NO_FORWARD_PARTS = ("dropout", "pdrop", "initializer", "aux_loss", "_token_id", "token_index")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
SIZES = ("_size", "_dim", "_rank", "_heads", "_experts", "d_state", "d_head", "d_ssm", "expand", "n_inner", "d_conv")
"""What these change stands in the shapes of tensors, which are compared anyway."""
FOR_NOTHING: tuple[tuple[tuple[str, ...], tuple[Any, ...]], ...] = (
    (("softcap", "soft_cap"), (3.0,)),
    (("clip",), (0.3,)),
    (("head_dim",), ()),
    (("",), (True, 0.5, 2, 8)),
)
"""What to set a key to that holds nothing, by parts of its name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="model types, with commas between")
    parser.add_argument("--keys", action="store_true", help="change each key of config.json, too")
    parser.add_argument("--drawn", type=int, default=0, help="models with settings drawn at random, to each kind")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write-findings", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    gc.freeze()  # the libraries' own objects: the trainer collects at each load
    if arguments.write_findings:
        # Nothing is known beforehand.
        compared.findings = lambda: {}  # type: ignore[assignment]
    packages = {name: version(name) for name in ("mlx", "mlx-lm", "transformers", "torch")}
    outcomes: dict[str, dict[str, str]] = {}
    if arguments.out and arguments.out.exists():
        outcomes = json.loads(arguments.out.read_text())["models"]
    wanted = arguments.only.split(",") if arguments.only else model_types()
    for model_type in [name for name in wanted if name not in outcomes]:
        found = {}
        both = outcomes_of(model_type, with_keys=arguments.keys), drawn_outcomes(model_type, arguments.drawn)
        for name, outcome in chain(*both):
            found[name] = outcome
            print(f"{model_type:20} {name:40} {outcome}", flush=True)
        outcomes[model_type] = found
        if arguments.out:
            arguments.out.write_text(json.dumps({"versions": packages, "models": outcomes}, indent=1) + "\n")
    if arguments.write_findings:
        models = {name: finding(found) for name, found in outcomes.items() if found["as it is"] in ("equal", "differs")}
        FINDINGS.write_text(json.dumps({"versions": packages, "models": models}, indent=1) + "\n")


def finding(outcomes: dict[str, str]) -> dict[str, Any]:
    if outcomes["as it is"] == "differs":
        return {"differs": "its logits are others"}
    wrong = sorted({name.partition(" = ")[0] for name, outcome in outcomes.items() if outcome == "differs"})
    left_out = [name for name in wrong if not name.startswith("rope_type")]
    kinds = sorted({name.split()[2] for name, found in outcomes.items() if "rope_type" in name and found == "differs"})
    return {key: value for key, value in (("left_out", left_out), ("rope_types", kinds)) if value}


def outcomes_of(model_type: str, *, with_keys: bool) -> Iterator[tuple[str, str]]:
    try:
        model = tiny_model(model_type)
        transformers_logits(model)
    except Exception as error:
        yield "as it is", f"transformers: {type(error).__name__}: {error}".splitlines()[0][:120]
        return
    as_it_is = outcome_of(model)
    yield "as it is", as_it_is
    keys = changed_keys(text_config(model.config.to_dict())) if with_keys and as_it_is == "equal" else ()
    for name, changes in keys:
        try:
            changed = tiny_model(model_type, **changes)
            transformers_logits(changed)
        except Exception:  # transformers refuses this value, or cannot run it
            continue
        yield name, outcome_of(changed)


def drawn_outcomes(model_type: str, draws: int) -> Iterator[tuple[str, str]]:
    """Of models that somebody else shrank, whose settings are drawn together."""
    for seed in range(draws):
        settings = drawn_settings(model_type, seed)
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = write_drawn_model(Path(folder), model_type, settings, seed)
            transformers_logits(model)
        except Exception:  # settings that do not go together
            continue
        yield f"drawn {seed}: {json.dumps(settings)}", outcome_of(model)


def outcome_of(model: Any) -> str:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        model.save_pretrained(folder)
        source = ModelSource(str(folder), folder, read_facts(folder))
        try:
            with MLXLoRATrainer() as trainer:
                trainer.load(source, Quantization(WeightFormat.NONE), Compute(options={"compile": "off"}))
                apart = max(distances(trainer, model))
        except QloraHalError as refusal:
            return refusal.code
        except Exception as error:  # untyped: a fault
            return f"failed: {type(error).__name__}: {error}".splitlines()[0][:120]
    return "equal" if apart <= TOLERANCE else "differs"


def distances(trainer: MLXLoRATrainer, model: Any) -> Iterator[float]:
    """Of the base, and of the base with an adapter on all linear layers that both have, from transformers' logits."""
    here, there = trainer.linear_modules(), dict(model.named_modules())
    targets = tuple(name for name in here if isinstance(there.get(name), torch.nn.Linear))
    config = AdapterConfig(4, 8.0, 0.0, False, targets or tuple(here)[:1])
    adapter = initial_adapter(config, here, seed=0)
    trainer.attach(adapter)
    yield distance(trainer, model)
    draw = np.random.default_rng(0)
    for name, tensor in adapter.tensors.items():
        tensor[:] = draw.normal(0.0, 0.1, tensor.shape) * (module_of(name)[0] in targets)
    trainer.attach(adapter)
    with torch.no_grad():
        for name in targets:
            a, b = (torch.from_numpy(adapter.tensors[key(name)]) for key in (lora_a_key, lora_b_key))
            there[name].weight += config.scale * b @ a
    yield distance(trainer, model)


def distance(trainer: MLXLoRATrainer, model: Any) -> float:
    expected = transformers_logits(model)
    tokens = ROW.astype(np.int32)
    batch = Batch(tokens, tokens, np.arange(tokens.size, dtype=np.int32)[None], np.ones_like(tokens))
    return float(np.abs(trainer.logits(batch) - expected).max() / np.abs(expected).max())


def transformers_logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(ROW).long(), use_cache=False).logits.float().numpy()


def changed_keys(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in config.items():
        if key in NO_FORWARD or key.startswith("_") or any(part in key for part in NO_FORWARD_PARTS):
            continue
        for other in other_values(key, value):
            yield f"{key} = {json.dumps(other)}", {key: other}
    yield from changed_rotations(config)


def other_values(key: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        is_activation = "act" in key.split("_") or "activation" in key
        return [name for name in ACTIVATIONS if is_activation and name != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [] if key.endswith(SIZES) else [value * 2 or 1]
    if isinstance(value, float):
        return [value * 1.7 + 0.05]
    if value is None:
        return list(next(values for parts, values in FOR_NOTHING if any(part in key for part in parts)))
    if isinstance(value, list | tuple) and value and not isinstance(value[0], dict | list):
        return other_lists(list(value))
    return []


def other_lists(value: list[Any]) -> list[Any]:
    others = [value[::-1], value[1:] + value[:1]]
    if isinstance(value[0], bool | int):
        others.append([type(one)(not one) for one in value])
    elif isinstance(value[0], float):
        others.append([one * 1.5 + 0.1 for one in value])
    elif {"full_attention", "sliding_attention"} & set(value):
        others = [value[::-1], ["full_attention"] * len(value)]
    return [other for other in others if other != value]


def changed_rotations(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    kinds = {kind for kind, part in rope.items() if isinstance(part, dict)}
    share = None if kinds else rope.get("partial_rotary_factor")
    own = {} if share is None else {"partial_rotary_factor": share}
    for name, settings in scalings(int(rotated_size(config) * (share or 1.0)) // 2).items():
        one = {"rope_theta": 77.0, **own, **settings}
        # Beyond the longest row is where dynamic scaling begins.
        length = {"max_position_embeddings": 16} if "dynamic" in name else {}
        yield name, {"rope_parameters": {kind: dict(one) for kind in kinds} if kinds else one, **length}
    if kinds:
        mixed = {k: {**part, "rope_theta": 77.0 * (n + 1)} for n, (k, part) in enumerate(rope.items()) if k in kinds}
        yield "rope_theta by kind of layer", {"rope_parameters": mixed}
    else:
        part = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.25 if share == 0.5 else 0.5}
        yield "partial_rotary_factor = 0.5", {"rope_parameters": part}


def rotated_size(config: Any) -> int:
    own = config.get("qk_rope_head_dim") or config.get("head_dim")
    return int(own or config.get("hidden_size", 64) // (config.get("num_attention_heads") or 4))


def scalings(pairs: int) -> dict[str, dict[str, Any]]:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return {
        "rope_theta = 77": {"rope_type": "default"},
        "rope_type = linear": {"rope_type": "linear", "factor": 3.0},
        "rope_type = dynamic": {"rope_type": "dynamic", "factor": 3.0},
        "rope_type = yarn": {**yarn, "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0},
        "rope_type = yarn with attention_factor": {**yarn, "attention_factor": 1.5, "truncate": False},
        "rope_type = llama3": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "rope_type = longrope": {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [2.0 + 0.3 * pair for pair in range(pairs)],
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
