"""Check on the CPU, with transformers, that the published model is the trained one.

The loss on the validation tokens must be the trainer's; a chat must be rendered and end as the template says; the
loss on the demo's test text and test rows is printed for the model card.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "qlora_hal" / "demo" / "model"
DATA = MODEL.parent / "data"
TOLERANCE = 0.01


@torch.no_grad()
def mean_loss(model: Any, tokens: Tensor, length: int, rows: int = 4) -> float:
    """The mean loss over consecutive windows, as the trainer measures it."""
    count = (tokens.numel() - 1) // length // 16 * 16
    inputs, targets = tokens[: count * length].view(count, length), tokens[1 : count * length + 1].view(count, length)
    losses = []
    for start in range(0, count, rows):
        logits = model(input_ids=inputs[start : start + rows]).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[start : start + rows].flatten()))
    return float(torch.stack(losses).mean())


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, most: int) -> float:
    """The mean loss of the assistant tokens of single-turn test rows, before any fine-tuning."""
    total, count = 0.0, 0
    for line in (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()[:most]:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        whole = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])
        logits = model(input_ids=whole).logits.float()[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, whole[0, len(prompt) :], reduction="sum"))
        count += whole.size(1) - len(prompt)
    return total / count


def check_chat(tokenizer: Any) -> None:
    """The template ends each turn with the token that stops generation, and padding is another token."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|begin|><|system|>s<|end|><|user|>q<|end|><|assistant|>", prompt
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "a"}], tokenize=False)
    assert whole == prompt + "a<|end|>", whole
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.decode(tokenizer.encode("naïve\n  x", add_special_tokens=False)) == "naïve\n  x"


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path, default=HERE / "build" / "tokens.safetensors.xz")
    tokens: Tensor = load(lzma.decompress(parser.parse_args().tokens.read_bytes()))["validation"].long()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    check_chat(tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    record = json.loads((MODEL / "pretraining.json").read_text(encoding="utf-8"))
    expected = record["validation_loss_of_bfloat16_weights"]
    measured = mean_loss(model, tokens, record["shape"]["context"])
    print(f"validation: {measured:.4f} nats (perplexity {math.exp(measured):.2f}); the trainer measured {expected:.4f}")
    text = (DATA / "test_text.txt").read_text(encoding="utf-8")
    test = mean_loss(model, torch.tensor(tokenizer.backend_tokenizer.encode(text).ids), 512)
    print(f"test text: {test:.4f} nats (perplexity {math.exp(test):.2f})")
    print(f"answers of the first 200 test rows, untuned: {answer_loss(model, tokenizer, 200):.4f} nats")
    if abs(measured - expected) > TOLERANCE:
        raise SystemExit("the published model is not the trained one")


if __name__ == "__main__":
    main()
