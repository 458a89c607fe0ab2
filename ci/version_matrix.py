"""Try the newest and the oldest versions of all dependencies that pyproject.toml allows, on each Python found here.

    python3 ci/version_matrix.py                      every environment; `make test-matrix`
    python3 ci/version_matrix.py --corners            oldest on the oldest Python found, newest on the newest
    python3 ci/version_matrix.py --corners --part core --versions newest      the short form in `make test`
    python3 ci/version_matrix.py --out docs/runs/version_matrix.json          and keep a record

Part `core` has no tensor library: tests of the core, and one section of the suite against its reference backend. Part
`backends` has torch and MLX: the quick tests, the demo cut to a few steps, and one section of the suite on each.
GPTQModel is left out: it allows one release of NumPy alone. Standard library only: it runs before anything is installed.

A Python is taken from the variable PYTHONS (paths, separated by spaces), PATH, or pyenv. One that is not found is named
and left out; none at all is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from setup_environment import PYTORCH_INDEX, ROOT, is_reachable

ENVIRONMENTS = ROOT / ".venv-matrix"
PYTHONS = ("3.11", "3.12", "3.14")
RESOLUTION = {"newest": "highest", "oldest": "lowest-direct"}
EXTRAS = {"core": "conformance", "backends": "cpu,mlx-cpu,tests"}
QUICK_TESTS = ("tests/core", "tests/data")
CORE_TESTS = ("tests/core/test_typed_fields.py", "tests/core/test_guard.py")
DEMO = ("train", "--demo", "--overwrite", "--training.max_steps", "4")
SECTION = "40"


@dataclass(frozen=True)
class Interpreter:
    version: str
    path: str


@dataclass
class Result:
    """What one environment showed. `bounds` holds, for each dependency, its lower bound and what was installed."""

    python: str
    versions: str
    part: str
    steps: dict[str, dict[str, object]] = field(default_factory=dict)
    bounds: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(step["passed"] for step in self.steps.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="X.Y")
    parser.add_argument("--versions", nargs="+", choices=RESOLUTION, default=list(RESOLUTION))
    parser.add_argument("--part", nargs="+", choices=EXTRAS, default=list(EXTRAS))
    parser.add_argument("--corners", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = list(interpreters(given.python))
    if not found:
        print(f"None of Python {', '.join(given.python)} is here: nothing was tried.", file=sys.stderr)
        return 1
    results = [
        tried(interpreter, versions, part)
        for versions in given.versions
        for interpreter in (corner(found, versions) if given.corners else found)
        for part in given.part
    ]
    unproved = unproved_bounds(results, given.part)
    report(results, unproved, given.out)
    return 0 if all(result.passed for result in results) and not unproved else 1


def interpreters(wanted: Sequence[str]) -> Iterator[Interpreter]:
    for version in wanted:
        path = next((path for path in candidates(version) if version_of(path) == version), None)
        if path:
            yield Interpreter(version, path)
        else:
            print(f"LEFT OUT: Python {version} is not here (PATH, pyenv, PYTHONS).", flush=True)


def candidates(version: str) -> Iterator[str]:
    yield from os.environ.get("PYTHONS", "").split()
    yield sys.executable
    yield f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}")))


def version_of(path: str) -> str:
    """`3.12`, or nothing for what does not run: pyenv puts names on PATH that lead nowhere."""
    ask = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def corner(found: Sequence[Interpreter], versions: str) -> list[Interpreter]:
    return [found[-1] if versions == "newest" else found[0]]


def tried(interpreter: Interpreter, versions: str, part: str) -> Result:
    result = Result(interpreter.version, versions, part)
    environment = ENVIRONMENTS / f"{interpreter.version}-{versions}-{part}"
    for name, command in steps(interpreter, environment, versions, part):
        print(f"\n== Python {interpreter.version}, {versions}, {part}: {name}", flush=True)
        started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=surroundings(environment), check=False).returncode
        result.steps[name] = {"passed": status == 0, "seconds": round(time.monotonic() - started, 1)}
        if status and name == "install":
            return result  # nothing else can be tried
    result.bounds = bounds(environment, part)
    return result


def steps(interpreter: Interpreter, environment: Path, versions: str, part: str) -> Iterator[tuple[str, list[str]]]:
    python = str(environment / "bin" / "python")
    suite = [python, "-m", "qlora_hal_conformance", "--quiet", "--section", SECTION, "--out"]
    kept = ROOT / "runs" / "version_matrix" / environment.name
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    yield "make", [uv(), "venv", "--quiet", "--clear", "--no-python-downloads", "-p", interpreter.path, str(environment)]
    yield "install", install(python, versions, part)
    if part == "core":
        yield "tests", [*pytest, *CORE_TESTS]
        reference = "qlora_hal_conformance.reference_backend:SPEC"
        yield "section", [*suite, str(kept / "reference"), "--spec", reference]
        return
    yield "tests", [*pytest, "-n", os.environ.get("WORKERS", "2"), "-m", "not long and not needs_triton", *QUICK_TESTS]
    yield "demo", [python, "-m", "qlora_hal.cli", *DEMO, "--output_dir", str(kept / "demo")]
    for backend in ("cpu_torch", "mlx_lora"):
        yield f"section on {backend}", [*suite, str(kept / backend), "--backend", backend]


def install(python: str, versions: str, part: str) -> list[str]:
    command = [uv(), "pip", "install", "--quiet", "--python", python, "--resolution", RESOLUTION[versions]]
    if part == "backends" and sys.platform == "linux" and is_reachable(PYTORCH_INDEX):
        command += ["--torch-backend", "cpu"]  # PyPI's torch for Linux carries CUDA
    return [*command, "--editable", f"{ROOT}[{EXTRAS[part]}]"]


def uv() -> str:
    """It resolves to the oldest versions, which pip cannot; installed here unless there is one."""
    if found := shutil.which("uv"):
        return found
    home = ENVIRONMENTS / "uv"
    if not (home / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "--quiet", "uv>=0.9"], check=True)
    return str(home / "bin" / "uv")


def surroundings(environment: Path) -> dict[str, str]:
    """No path of another environment, and a folder for what is temporary."""
    scratch = ROOT / ".tmp"
    scratch.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**kept, "PATH": path, "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}


def bounds(environment: Path, part: str) -> dict[str, tuple[str, str]]:
    command = [str(environment / "bin" / "python"), "ci/lower_bounds.py", *EXTRAS[part].split(",")]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def unproved_bounds(results: Sequence[Result], parts: Sequence[str]) -> list[str]:
    """Lower bounds that no environment of oldest versions was made with. A bound may be lower than what the backends'
    libraries ask for: the core alone then proves it."""
    oldest = [result for result in results if result.versions == "oldest" and result.bounds]
    said = []
    for python in dict.fromkeys(result.python for result in oldest):
        here = [result.bounds for result in oldest if result.python == python]
        for name in dict.fromkeys(name for found in here for name in found):
            seen = [found[name] for found in here if name in found]
            if not any(bound == installed for bound, installed in seen) and set(parts) == set(EXTRAS):
                bound, installed = seen[0]
                said.append(f"{name}>={bound} on Python {python}: {installed} is the oldest that could be installed")
    return said


def report(results: Sequence[Result], unproved: Sequence[str], out: Path | None) -> None:
    print()
    for result in results:
        steps = ", ".join(
            f"{name} {'passed' if step['passed'] else 'FAILED'} ({step['seconds']} s)"
            for name, step in result.steps.items()
        )
        print(f"Python {result.python}, {result.versions}, {result.part}: {steps}")
    for line in unproved:
        print(f"FAILED: a lower bound that was not run: {line}")
    if out:
        record = {
            "command": " ".join(["python3", *sys.argv]),
            "passed": all(result.passed for result in results) and not unproved,
            "unproved_bounds": list(unproved),
            "environments": [
                {**asdict(result), "bounds": {name: installed for name, (_, installed) in result.bounds.items()}}
                for result in results
            ],
        }
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
