"""A script of TRL, as its guides show them. Tests read it and never run it."""

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

MODEL = "facebook/opt-350m"
raise SystemExit("this script must not run")

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=quantization, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = load_dataset("stanfordnlp/imdb", split="train")
trainer = SFTTrainer(
    model,
    train_dataset=dataset,
    args=SFTConfig(output_dir="out", learning_rate=2e-4, warmup_steps=5, max_steps=len(dataset), packing=True),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
