"""What a model folder may not ask of us: unpickling, and running its own Python files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from qlora_hal.errors import UnsafeInputError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
NO_WEIGHTS = frozenset(
    {
        "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt",
        "rng_state.pth", "random_states_0.pkl",
    }
)  # fmt: skip
"""Pickles that trainers leave beside a model."""


def refuse_pickle_only(file_names: Iterable[str], where: str, *, on_hub: bool = False) -> None:
    """Raise UnsafeInputError QH-C17 when the only weights among `file_names` are pickle files; `where` they lie is a
    folder, or with `on_hub` a repository."""
    names = [PurePosixPath(name) for name in file_names]
    if any(name.suffix == ".safetensors" for name in names):
        return
    pickles = [n.name for n in names if n.suffix in PICKLE_SUFFIXES and n.name not in NO_WEIGHTS]
    if pickles:
        raise UnsafeInputError(
            "QH-C17",
            f"The model's weights are pickle files only ({', '.join(pickles[:4])}); safetensors are expected.",
            where=where,
            cause="Unpickling runs any code that the file holds, so this process never does it.",
            fix=f"Choose a version with safetensors, or convert them once: {conversion_command(where, on_hub=on_hub)}",
            context={"files": pickles},
        )


def conversion_command(where: str, *, on_hub: bool = False) -> str:
    """The command that turns pickled weights into safetensors without running what they hold."""
    if on_hub:
        return f"hf download {shlex.quote(where)} --local-dir pickled, then qlora-hal unpickle pickled converted"
    return f"qlora-hal unpickle {shlex.quote(where)} {shlex.quote(where.rstrip('/') + '-safetensors')}"


def refuse_remote_code(
    config: Mapping[str, object], *, where: str, revision: str | None, trust_remote_code: bool
) -> None:
    """Raise UnsafeInputError QH-E14 when config.json names Python files of the model and nobody allowed them."""
    files = named_python_files(config)
    if not files or trust_remote_code:
        return
    raise UnsafeInputError(
        "QH-E14",
        f"The model wants to run its own Python files: {', '.join(files)} (revision {revision or 'of this folder'}).",
        where=where,
        cause="config.json names them in auto_map or model_file; they would run with your rights.",
        fix="Read these files, then set model.trust_remote_code: true and model.revision to the 40-digit commit "
        "you read (for a finished run: --trust-remote-code); or, where the model library knows the architecture "
        "itself, drop auto_map from a local copy.",
        context={"files": list(files), "revision": revision},
    )


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit: 40 hexadecimal digits."""
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def unpinned_code(repository: str, revision: str | None) -> UnsafeInputError:
    """The error for trusting code under a name that may mean other code tomorrow."""
    return UnsafeInputError(
        "QH-E14",
        f"trust_remote_code was set for {repository} at revision {revision or 'main'}, which can change.",
        where=repository,
        cause="Code that was read today need not be the code that runs tomorrow.",
        fix="Set model.revision to the 40-digit commit whose files you read.",
        context={"revision": revision},
    )


def named_python_files(config: Mapping[str, object]) -> tuple[str, ...]:
    """The Python files that config.json asks a library to import: `auto_map` (transformers), `model_file` (mlx-lm)."""
    files: set[str] = set()
    auto_map = config.get("auto_map")
    targets = auto_map.values() if isinstance(auto_map, dict) else [auto_map] if auto_map else []
    for target in targets:
        for reference in target if isinstance(target, (list, tuple)) else [target]:
            if isinstance(reference, str):
                module = reference.rsplit("--", 1)[-1].rsplit(".", 1)[0]
                repository = reference.rpartition("--")[0]
                files.add(f"{repository}/{module}.py" if repository else f"{module}.py")
    if config.get("model_file"):
        files.add(str(config["model_file"]))
    return tuple(sorted(files))
