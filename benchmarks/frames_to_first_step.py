"""How far a reader walks from `train()` to the optimizer's update: frames on the stack, and files entered on the way.

    python benchmarks/frames_to_first_step.py [--list]

Bound of the project: 9 frames of ours on the stack, `train` and the update among them. The demo is trained for one step
on a CPU in this process; counted are functions (no module level, no comprehension) of this repository's packages.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType

from qlora_hal import train
from qlora_hal.demo import data_path, model_path
from qlora_hal_backends.torch_family.optimizer import FlatAdamW

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(f"{ROOT / source}{os.sep}" for source in ("qlora_hal", "backends", "conformance_tests", "oracle"))
FIRST, LAST = inspect.unwrap(train).__code__, inspect.unwrap(FlatAdamW.update).__code__


class Walk:
    """A profile function: it stops at the first update."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.stack: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not is_ours(frame.f_code):
            return
        self.files.add(frame.f_code.co_filename)
        if frame.f_code is LAST:
            sys.setprofile(None)
            self.stack = [described(code) for code in reversed(codes(frame))]


def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(OURS) and not code.co_name.startswith("<")


def codes(frame: FrameType | None) -> list[CodeType]:
    """Our frames from `frame` down to `train`."""
    found = []
    while frame is not None and FIRST not in found:
        found += [frame.f_code] if is_ours(frame.f_code) else []
        frame = frame.f_back
    return found


def described(code: CodeType) -> str:
    return f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_qualname}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the files, too")
    given = parser.parse_args()
    walk = Walk()
    with tempfile.TemporaryDirectory() as folder:
        sys.setprofile(walk)
        try:
            train(
                {
                    "model": {"name_or_path": str(model_path())},
                    "data": {"path": str(data_path("train"))},
                    "output_dir": f"{folder}/run",
                    "backend": {"name": "cpu_torch"},
                    "training": {"max_steps": 1},
                }
            )
        finally:
            sys.setprofile(None)
    files = sorted(str(Path(name).relative_to(ROOT)) for name in walk.files)
    report: dict[str, object] = {"frames": len(walk.stack), "stack": walk.stack, "files": len(files)}
    print(json.dumps(report | ({"names": files} if given.list else {}), indent=1))


if __name__ == "__main__":
    main()
