"""Answers of a base and of its adapter, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.config import RunConfig
    from qlora_hal.data import ChatTokenizer
    from qlora_hal.guard import GuardedTrainer

SAMPLE_TOKENS = 64
Messages = Sequence[Mapping[str, str]]


def answer(
    trainer: GuardedTrainer,
    tokenizer: ChatTokenizer,
    prompt: str | Messages,
    *,
    adapter: bool,
    max_new_tokens: int = SAMPLE_TOKENS,
) -> str:
    """A greedy answer to a prompt or a conversation; a tokenizer without a chat template continues the plain text."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.template is not None:
        ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    else:
        ids = tokenizer.encode("\n".join(message["content"] for message in messages))
    tokens = trainer.generate(
        np.asarray(ids, dtype=np.int32),
        max_new_tokens=max_new_tokens,
        stop_tokens=tokenizer.stop_ids,
        adapter=adapter,
    )
    return tokenizer.decode(tokens.tolist()).strip()


@dataclass(slots=True)
class GenerationPair:
    """One loaded base with an adapter that can be switched off."""

    trainer: GuardedTrainer
    tokenizer: ChatTokenizer

    def answer(self, messages: Messages, *, max_new_tokens: int = SAMPLE_TOKENS) -> tuple[str, str]:
        """(base's answer, adapter's answer)."""
        base, tuned = (
            answer(self.trainer, self.tokenizer, messages, adapter=adapter, max_new_tokens=max_new_tokens)
            for adapter in (False, True)
        )
        return base, tuned

    def close(self) -> None:
        self.trainer.close()


def open_generation(
    *,
    run_dir: Path | None = None,
    adapter_dir: Path | None = None,
    model: str | None = None,
    backend: str = "auto",
    allow_base_mismatch: bool = False,
) -> GenerationPair:
    """Open a run's adapter, or any adapter beside a model. Raises ConfigError, AdapterError QH-C05, QH-C08."""
    from qlora_hal.adapter.fitting import check_base, check_fits
    from qlora_hal.adapter.peft_files import read_adapter, read_provenance
    from qlora_hal.backend import Compute
    from qlora_hal.data import ChatTokenizer
    from qlora_hal.discovery import open_trainer
    from qlora_hal.execution import chosen_dtype
    from qlora_hal.guard import GuardedTrainer
    from qlora_hal.hooks import Hooks
    from qlora_hal.preparation import choose_machinery
    from qlora_hal.quantizing import base_of_run
    from qlora_hal.report.console import RunConsole

    config, adapter_dir = _generation_config(run_dir, adapter_dir, model, backend)
    adapter = read_adapter(adapter_dir)
    machinery = choose_machinery(config, Hooks(), RunConsole(quiet=True))
    check_base(read_provenance(adapter_dir), machinery.source.facts, allow_mismatch=allow_base_mismatch)
    tokenizer = ChatTokenizer.from_folder(machinery.source.path, chat_template=config.data.chat_template)
    source = base_of_run(machinery, run_dir)
    trainer = GuardedTrainer(open_trainer(machinery.choice.spec))
    dtype = chosen_dtype(config.quantization.compute_dtype, trainer.proved_compute_dtypes(), machinery.choice.spec.name)
    trainer.load(source, machinery.quantization, Compute(dtype=dtype, options=config.backend.options))  # type: ignore[arg-type]
    check_fits(adapter, trainer.linear_modules(), where=str(adapter_dir))
    trainer.attach(adapter, "adamw")
    return GenerationPair(trainer, tokenizer)


def _generation_config(
    run_dir: Path | None, adapter_dir: Path | None, model: str | None, backend: str
) -> tuple[RunConfig, Path]:
    """The run's own configuration where there is one: the base is stored as it was in training."""
    from qlora_hal.config import RunConfig
    from qlora_hal.report.run_file import read_run_config

    if run_dir is not None:
        config = read_run_config(run_dir)
        adapter_dir = adapter_dir or run_dir / "adapter"
    elif adapter_dir is not None and model is not None:
        config = RunConfig.model_validate({"model": {"name_or_path": model}, "backend": {"allow_cpu": True}})
    else:
        raise ConfigError(
            "QH-U14",
            "No run folder is named, and not both an adapter and its model.",
            fix="Name a run folder (--run runs/a), or --adapter DIR and --model NAME.",
        )
    if backend != "auto":
        settings = {**config.backend.model_dump(), "name": backend}
        config = config.model_copy(update={"backend": type(config.backend).model_validate(settings)})
    return config, adapter_dir
