"""A process that has trained with this backend is as it would be without it. Each case runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gptq_int4.gptq_checkpoints import Kind, write_checkpoint

TESTS = Path(__file__).resolve().parents[1]

SURROUNDINGS = """
import json, logging, os, sys, threading, warnings
import numpy, safetensors.torch, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from pathlib import Path
from gptq_int4.gptq_checkpoints import adapter_for, opened
from qlora_hal_backends.gptq_int4.contained import PATCHED
from trainers import random_batch

def classes_and_functions():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("accelerate", "bitsandbytes", "safetensors", "transformers"):
            for key, value in list(vars(module).items()):
                if getattr(value, "__module__", None) == name and not key.startswith("__"):
                    found[f"{name}.{key}"] = value
                    if isinstance(value, type):
                        found |= {f"{name}.{key}.{k}": v for k, v in vars(value).items() if not k.startswith("__")}
    return found

def settings():
    return {
        "environment": dict(os.environ),
        "log": [repr(logging.getLogger().handlers), logging.getLogger().level, logging.root.manager.disable],
        "warnings": [repr(entry) for entry in warnings.filters],
        "path": list(sys.path),
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "random": [str(torch.get_rng_state().sum()), str(numpy.random.get_state()[1].sum())],
        "planted": [name for name in ("causal_conv1d",) if name in sys.modules],
    }

import importlib
for name in PATCHED:
    importlib.import_module(name)
AutoModelForCausalLM.from_config  # transformers loads what it needs
folder = Path(sys.argv[1])
"""

CHANGES = (
    SURROUNDINGS
    + """
from qlora_hal_backends.gptq_int4.trainer import open_trainer
open_trainer().close()
before, objects = settings(), classes_and_functions()
trainer = opened(folder)
trainer.attach(adapter_for(trainer))
trainer.gradients([random_batch(1, vocabulary=300)])
trainer.close()
after, now = settings(), classes_and_functions()
print(json.dumps({
    "settings": [key for key in before if before[key] != after[key]],
    "objects": [name for name, value in objects.items() if name in now and now[name] is not value],
    "threads": [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()],
    "imported": "gptqmodel" in sys.modules,
}))
"""
)

BITS = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
from trainers import open_cpu_trainer, random_batch
from qlora_hal.demo import model_path

if sys.argv[2] == "after":
    from gptq_int4.gptq_checkpoints import adapter_for, opened
    trainer = opened(Path(sys.argv[1]))
    trainer.attach(adapter_for(trainer))
    trainer.gradients([random_batch(1, vocabulary=300)])
    trainer.close()
ready = open_cpu_trainer(model_path(), weight_format="nf4", dropout=0.1)
window = [random_batch(seed) for seed in (1, 2)]
stats = [ready.step(window, dropout_key=7) for _ in range(2)]
digest = hashlib.sha256()
for name, tensor in sorted(ready.trainer.export_adapter().tensors.items()):
    digest.update(name.encode() + tensor.tobytes())
digest.update(ready.trainer.logits(window[0]).tobytes())
print(json.dumps([digest.hexdigest(), [s.loss_sum for s in stats]]))
"""


def ran(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Other tests import gptqmodel unguarded (PEFT does, too), which leaves HF_HOME in this process's environment.
    cleared = {name: value for name, value in os.environ.items() if name not in ("GPTQMODEL_CPU_WORKERS", "HF_HOME")}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**cleared, "PYTHONPATH": str(TESTS), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    write_checkpoint(folder, Kind())
    return folder


def test_nothing_of_the_process_is_changed(checkpoint: Path) -> None:
    """Environment, random states, logging, warnings, and every class and function of the libraries under us."""
    child = ran(CHANGES, str(checkpoint))
    found = json.loads(child.stdout)
    assert found == {"settings": [], "objects": [], "threads": [], "imported": True}
    assert len(child.stdout.splitlines()) == 1


@pytest.mark.long
def test_cpu_torch_computes_the_same_bits_after_this_backend(checkpoint: Path) -> None:
    alone, after = (ran(BITS, str(checkpoint), when).stdout for when in ("alone", "after"))
    assert json.loads(alone) == json.loads(after)


@pytest.mark.long
def test_a_variable_of_the_users_own_is_left_alone(checkpoint: Path) -> None:
    script = "import os, sys; from pathlib import Path; from gptq_int4.gptq_checkpoints import opened\n"
    script += "opened(Path(sys.argv[1])).close(); print(os.environ['PYTORCH_ALLOC_CONF'], 'HF_HOME' in os.environ)"
    assert (
        ran(script, str(checkpoint), PYTORCH_ALLOC_CONF="max_split_size_mb:64").stdout == "max_split_size_mb:64 False\n"
    )
