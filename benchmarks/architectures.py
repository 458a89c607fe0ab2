"""Every causal language model of transformers, small and random: does this family compute what transformers computes?

    python benchmarks/architectures.py [--only llama,qwen3] [--draws 3] [--out docs/runs/architectures_torch.json]
    python benchmarks/architectures.py --table docs/models.md     write the table from the records

For each architecture and each draw of its settings: the model is saved as transformers saves it, opened as a run would
(outline, load, attach; float32, not quantized), and its logits, first loss and first gradient are put beside those of
transformers and PEFT on the same folder. A refusal must be typed, and come from the outline: before data are read.
One process to an architecture; an existing record is gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "runs" / "architectures_torch.json"
SECONDS, BYTES = 200, 10 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        from architecture_table import write_table

        write_table(arguments.table)
        return
    from against_transformers import TOLERANCE
    from drawn_models import model_types

    only = [name for name in arguments.only.split(",") if name]
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"architectures": {}}
    record |= {"backend": "cpu_torch", "draws": arguments.draws, "tolerance": TOLERANCE, "versions": _versions()}
    _import_once()
    for model_type in only or [name for name in model_types() if name not in record["architectures"]]:
        found = in_child(model_type, arguments.draws)
        record["architectures"][model_type] = found
        record["architectures"] = dict(sorted(record["architectures"].items()))
        print(model_type, found["result"], found.get("why", ""), found.get("apart", ""), sep=" | ", flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def in_child(model_type: str, draws: int) -> dict[str, Any]:
    """`tried` in a process of its own: an architecture may take all memory, or not come to an end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        folder = Path(tempfile.mkdtemp())
        try:
            found = tried(model_type, draws, folder)
        except BaseException as error:  # whatever it is, it belongs into the record
            found = {"result": "failed", "why": f"{type(error).__name__}: {_first_line(error)}"}
        shutil.rmtree(folder, ignore_errors=True)
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return dict(json.loads(answer))
    return {"result": "failed", "why": f"the process ended with signal {status & 127}"}


def tried(model_type: str, draws: int, folder: Path) -> dict[str, Any]:
    """What became of an architecture: `equal`, `refused`, `different`, `failed`, or `not built` by transformers."""
    from against_transformers import reference_of, refusal_of
    from drawn_models import drawn_settings, write_drawn_model

    compared: list[dict[str, Any]] = []
    unbuilt = ""
    for seed in range(3 * draws):
        if len(compared) == draws:
            break
        place = folder / str(seed)
        try:
            settings = drawn_settings(model_type, seed)
            write_drawn_model(place, model_type, settings, seed)
            found = refusal_of(place)
            expected = None if found else reference_of(place, seed)
        except TimeoutError as error:
            return {"result": "not built", "why": str(error)}
        except Exception as error:  # settings that do not go together, sizes that do not fit
            unbuilt = unbuilt or f"{type(error).__name__}: {_first_line(error)}"
            continue
        if expected is not None:
            found = _compared(place, expected)
        assert found is not None
        compared.append({"settings": settings, **found})
        shutil.rmtree(place)
        if found["result"] in ("refused", "failed") and seed == 0:
            break
    if not compared:
        return {"result": "not built", "why": unbuilt}
    worst = max(compared, key=lambda found: ("equal", "refused", "different", "failed").index(found["result"]))
    of_all = {"draws": len(compared), "apart": max((found.get("apart", 0.0) for found in compared), default=0.0)}
    kept = {key: value for key, value in worst.items() if key != "settings" or worst["result"] != "equal"}
    return {**kept, **of_all}


def _out_of_time(signal_number: int, frame: object) -> None:
    raise TimeoutError(f"transformers' own forward pass took more than {SECONDS} s")


def _compared(folder: Path, expected: Any) -> dict[str, Any]:
    from against_transformers import compare

    try:
        return compare(folder, expected)
    except Exception as error:  # untyped: a fault of ours
        return {"result": "failed", "why": f"{type(error).__name__}: {_first_line(error)}"}


def _import_once() -> None:
    """Before the children are forked, so that each need not: PEFT imports every quantization library it finds."""
    import transformers
    from peft import LoraConfig, get_peft_model

    import qlora_hal_backends.cpu_torch.trainer  # noqa: F401
    from qlora_hal_backends.torch_family.transformers_versions import optional_libraries_unheard

    transformers.logging.set_verbosity_error()
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    with optional_libraries_unheard():
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft")}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]


if __name__ == "__main__":
    main()
