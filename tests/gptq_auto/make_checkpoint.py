"""Quantize a tiny random model with the library itself, for tests/gptq_auto/data. See the README there.

    python tests/gptq_auto/make_checkpoint.py auto_gptq    in the environment that ci/run_auto_gptq.sh builds
    python tests/gptq_auto/make_checkpoint.py gptqmodel    in the ordinary one

The folders hold what the library saved. Beside each stands `.expected.safetensors`: token ids, and the logits that the
library computes for them from its own files, in float32. Nothing of this project's engines is used.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).resolve().parent / "data"
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,  # logits spread like a trained model's
    "attn_implementation": "eager",
}
GROUPS_IN_ORDER = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
ACT_ORDER = {"bits": 4, "group_size": 32, "sym": False, "desc_act": True}


def main() -> None:
    make = {"auto_gptq": with_auto_gptq, "gptqmodel": with_gptqmodel}[sys.argv[1]]
    for kind, settings in (("in_order", GROUPS_IN_ORDER), ("act_order", ACT_ORDER)):
        folder = DATA / f"{sys.argv[1]}-{kind}"
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, settings)


def drawn_model() -> Any:
    torch.manual_seed(11)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).half().eval()


def drawn_rows() -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(12)
    rows = [torch.randint(3, SHAPE["vocab_size"], (1, 48), generator=random) for _ in range(32)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def with_auto_gptq(folder: Path, settings: dict[str, Any]) -> None:
    """The library insists on CUDA: its device constants and its wait for the device are replaced."""
    import auto_gptq.modeling._base as base
    import auto_gptq.modeling._utils as utils
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    from auto_gptq.modeling.llama import LlamaGPTQForCausalLM

    cpu = torch.device("cpu")
    with (
        patch.object(base, "CUDA_0", cpu),
        patch.object(utils, "CUDA_0", cpu),
        patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        model = LlamaGPTQForCausalLM(drawn_model(), False, BaseQuantizeConfig(**settings))
        model.quantize(drawn_rows())
        model.save_quantized(str(folder))
    loaded = AutoGPTQForCausalLM.from_quantized(
        str(folder),
        device="cpu",
        torch_dtype=torch.float32,
        trainable=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        disable_exllama=True,
        disable_exllamav2=True,
    )
    save_expected(folder, loaded.model)


def with_gptqmodel(folder: Path, settings: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoModelForCausalLM, GPTQConfig

    # It writes a log where it stands.
    with tempfile.TemporaryDirectory() as plain, contextlib.chdir(plain):
        drawn_model().save_pretrained(plain)
        save_tokenizer(Path(plain))
        config = QuantizeConfig(**settings, device="cpu", offload_to_disk=False)
        model = GPTQModel.load(plain, config)
        rows = [{name: tensor[0].tolist() for name, tensor in row.items()} for row in drawn_rows()]
        model.quantize(rows, batch_size=1, calibration_data_min_length=1)
        model.save(str(folder))
    for name in ("quant_log.csv", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    # Its fastest kernel for this CPU works in less than float32, and its torch one in the dtype of the scales.
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=GPTQConfig(bits=4, backend="torch")
    )
    for module in loaded.modules():
        if hasattr(module, "qweight"):
            module.scales = module.scales.float()
    save_expected(folder, loaded)


def save_tokenizer(folder: Path) -> None:
    """gptqmodel opens no model without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2").save_pretrained(folder)


def save_expected(folder: Path, model: Any) -> None:
    ids = torch.randint(3, SHAPE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(13))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float().contiguous()
    save_file({"input_ids": ids, "logits": logits}, folder.with_suffix(".expected.safetensors"))


if __name__ == "__main__":
    main()
