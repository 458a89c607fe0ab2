"""What `train --demo` sets below the user's file and flags: the small model and rows of the package, on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qlora_hal.demo import data_path, model_path

_SETTINGS: Mapping[str, object] = {
    "output_dir": "runs/demo",
    "backend.allow_cpu": True,
    "lora.r": 16,
    "lora.alpha": 32.0,
    "data.max_seq_length": 256,
    "training.learning_rate": 1e-3,
    "training.per_device_train_batch_size": 16,
    "training.max_steps": 200,
    "training.eval_steps": 50,
    "training.logging_steps": 10,
    "training.lr_scheduler_type": "cosine",
    # Held-out rows of the kinds that are learned best; each was answered right by every run that was scored
    # (demo/score_answers.py, docs/runs/demo_answers.json).
    "training.sample_prompts": (
        "echo - display a line of text\nThe description begins like this: Echo the STRING(s) to standard output.\n"
        "Sum it up in one line.",
        "The synopsis of pv says: pv [OPTION] [FILE]...\nHow is pv called?",
        "-x: Use encryption when writing files.\n-: The file to edit is read from stdin.\n"
        "-nb: Become an editor server for NetBeans.\n"
        "These are options of vim. Which one do I need for this: become an editor server for NetBeans?",
        "If polenta is a thick mush made of cornmeal boiled in stock or water, what is polenta a kind of?",
    ),
}


def demo_settings() -> Mapping[str, object]:
    """Dotted key -> value, with the places of the demo's model and rows."""
    return {
        **_SETTINGS,
        "model.name_or_path": str(model_path()),
        "data.path": str(data_path("train")),
        "data.validation_path": str(data_path("validation")),
    }


def in_the_way(values: Mapping[str, object], given: Collection[str]) -> set[str]:
    """The demo's settings that would keep what was `given` from having its meaning: a length in steps beside one in
    epochs, the demo's held-out rows and its questions beside other rows, evaluation on no rows."""
    yielding = set()
    if "training.num_train_epochs" in given:
        yielding.add("training.max_steps")
    if "data.sources" in given:
        yielding.add("data.path")
    if not {"data.path", "data.sources"}.isdisjoint(given):
        yielding.add("training.sample_prompts")
    held_out = values.get("data.validation_path")
    other_rows = {"data.path", "data.sources", "data.validation_fraction"}
    if "data.validation_path" not in given and not other_rows.isdisjoint(given):
        yielding.add("data.validation_path")
        held_out = None
    if not (held_out or values.get("data.validation_fraction")):
        yielding.add("training.eval_steps")
    return yielding
