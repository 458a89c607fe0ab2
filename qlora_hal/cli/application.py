"""Which verbs there are. Each is registered by its import path, so that `--help` imports none of them."""

from __future__ import annotations

from collections.abc import Mapping

from cyclopts import App, Group

TRAINING = "Training"
MACHINE = "This machine"
SETTINGS = "Settings and help"

VERBS: Mapping[str, tuple[str, str]] = {
    "train": (TRAINING, "Train an adapter."),
    "resume": (TRAINING, "Resume a run that was stopped."),
    "unpickle": (TRAINING, "Convert pickled weights to safetensors, without running the code they hold."),
    "quantize": (TRAINING, "Quantize a model with calibration (int4_gptq)."),
    "runs": (TRAINING, "List the runs of a folder."),
    "compare": (TRAINING, "Compare two runs: settings that differ, figures, curves on one page."),
    "chat": (TRAINING, "Chat with the base model and the trained one, side by side."),
    "generate": (TRAINING, "Answer one prompt with and without the adapter."),
    "merge": (TRAINING, "Merge an adapter into its base, and prove that the result is the same model."),
    "push": (TRAINING, "Upload a run's adapter, or the model merged from it, to the Hugging Face hub."),
    "adapter": (TRAINING, "Convert an adapter between PEFT's layout and mlx-lm's."),
    "backends": (MACHINE, "List the backends and whether each can run here."),
    "doctor": (MACHINE, "Check the machine, and run the self-test of every ready backend."),
    "estimate": (MACHINE, "Estimate the memory of a run."),
    "advise": (MACHINE, "Advise on format, rank, rate and batch for a model, its data and a memory."),
    "conformance": (MACHINE, "Prove that a backend computes what the others compute."),
    "init": (SETTINGS, "Write a commented settings file."),
    "schema": (SETTINGS, "Print the JSON schema of the settings."),
    "explain": (SETTINGS, "Explain a fault code."),
}
"""Verb -> (panel, sentence); the verb `x` is the function `x` in `qlora_hal.cli.x`."""


def application() -> App:
    """The parser. Verbs are functions that return their exit status."""
    import qlora_hal
    from qlora_hal.cli.help_layout import help_formatter

    also = Group("Also", sort_key=9)
    app = App(
        name="qlora-hal",
        help="QLoRA fine-tuning with one call on NVIDIA, AMD, Apple and CPU.",
        version=qlora_hal.__version__,
        help_format="plaintext",
        help_formatter=help_formatter(),
        suppress_keyboard_interrupt=False,  # the entry point says what is safe, and ends with the signal's own status
        group_commands=also,
    )
    app.command(
        "qlora_hal.cli.install_completion:install_completion",
        name="--install-completion",
        help="Have the shell complete commands and flags.",
        group=also,
    )
    panels = {title: Group(title, sort_key=n) for n, title in enumerate((TRAINING, MACHINE, SETTINGS))}
    for number, (verb, (panel, sentence)) in enumerate(VERBS.items()):
        app.command(f"qlora_hal.cli.{verb}:{verb}", name=verb, help=sentence, group=panels[panel], sort_key=number)
    return app
