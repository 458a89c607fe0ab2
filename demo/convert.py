"""Write the trained tensors as a Hugging Face Llama, with configuration, loss log and loss curve.

The chat roles never occur in pretraining, so their embeddings were only ever pushed away from the text; left alone
the three would be nearly one vector, and fine-tuning with a frozen embedding could not tell them apart. Each is
set to the mean of the embeddings of words that say what the role is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "qlora_hal" / "demo" / "model"
EMBEDDING = "model.embed_tokens.weight"
ROLE_WORDS = {
    "<|system|>": "The general description of the program",
    "<|user|>": "Question: what is this?",
    "<|assistant|>": "Answer: This is the meaning",
}


def name_roles(tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Give the role tokens the mean embedding of their words."""
    embedding = tensors[EMBEDDING]
    for token, words in ROLE_WORDS.items():
        ids = tokenizer.encode(words, add_special_tokens=False).ids
        embedding[tokenizer.token_to_id(token)] = embedding[ids].float().mean(dim=0).to(embedding.dtype)


def configuration(shape: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` for the architecture the trainer recorded."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "dtype": "bfloat16",
        "head_dim": shape["head_dim"],
        "hidden_act": "silu",
        "hidden_size": shape["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": shape["intermediate"],
        "max_position_embeddings": shape["context"],
        "mlp_bias": False,
        "num_attention_heads": shape["heads"],
        "num_hidden_layers": shape["layers"],
        "num_key_value_heads": shape["kv_heads"],
        "rms_norm_eps": shape["norm_eps"],
        "rope_parameters": {"rope_theta": shape["rope_theta"], "rope_type": "default"},
        "rope_theta": shape["rope_theta"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape["vocabulary"],
    }


def write_json(name: str, content: dict[str, Any]) -> None:
    """Write one JSON file of the model."""
    (MODEL / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_log(record: dict[str, Any]) -> None:
    """Write the losses, one line an entry."""
    head = json.dumps({key: value for key, value in record.items() if key != "log"}, indent=1)
    entries = ",\n".join("  " + json.dumps(entry) for entry in record["log"])
    (MODEL / "pretraining.json").write_text(f'{head[:-2]},\n "log": [\n{entries}\n ]\n}}\n', encoding="utf-8")


def draw_losses(log: list[dict[str, Any]], path: Path) -> None:
    """Draw both losses over the tokens seen."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "demo"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    tokens = [entry["tokens"] / 1e6 for entry in log]
    axes.plot(tokens, [entry["train_loss"] for entry in log], label="training text (mean since the last point)")
    axes.plot(tokens, [entry["validation_loss"] for entry in log], label="validation text")
    axes.set(xlabel="million tokens seen", ylabel="loss in nats a token", ylim=(2.0, 3.2))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Convert one training run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=HERE / "build" / "run", help="what pretrain.py wrote")
    run: Path = parser.parse_args().run
    tensors = load_file(run / "weights.safetensors")
    name_roles(tensors, Tokenizer.from_file(str(MODEL / "tokenizer.json")))
    save_file(tensors, MODEL / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((run / "pretraining.json").read_text(encoding="utf-8"))
    write_json("config.json", configuration(record["shape"]))
    greedy = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    write_json("generation_config.json", greedy)
    write_log(record)
    draw_losses(record["log"], HERE / "pretraining.svg")
    print(sum(tensor.numel() for tensor in tensors.values()), "parameters,", str(torch.bfloat16))


if __name__ == "__main__":
    main()
