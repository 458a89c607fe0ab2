"""Try the newest and the oldest versions of all dependencies that pyproject.toml allows, on each Python found here.

    python3 ci/version_matrix.py                      every environment; `make test-matrix`
    python3 ci/version_matrix.py --corners            oldest on the oldest Python found, newest on the newest
    python3 ci/version_matrix.py --corners --part core --versions newest      the short form in `make test`
    python3 ci/version_matrix.py --out docs/runs/version_matrix.json          and keep a record; of environments that
                                                      were not tried this time, the record keeps what it had

Part `core` has no tensor library: tests of the core, and one section of the suite against its reference backend. Part
`backends` has torch and MLX: the quick tests, the demo cut to a few steps, and one section of the suite on each.
GPTQModel is left out: it allows one release of NumPy alone.

A Python is taken from the variable PYTHONS (paths, separated by spaces), PATH, or pyenv. One that is not found is
named and left out; none at all is a failure. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from setup_environment import PYTORCH_INDEX, ROOT, is_reachable

ENVIRONMENTS = ROOT / ".venv-matrix"
PYTHONS = ("3.11", "3.12", "3.14")
RESOLUTION = {"newest": "highest", "oldest": "lowest-direct"}
EXTRAS = {"core": "tests", "backends": "cpu,mlx-cpu,data,tests,comparisons"}
# All of the core, with what it asks of transformers, PEFT, pyarrow and datasets.
QUICK_TESTS = ("core", "data", "cli", "model", "adapter", "checkpoint", "report")
# What of it needs no other library than the core's own.
CORE_TESTS = (
    "core/test_typed_fields.py",
    "core/test_guard.py",
    "cli/test_settings.py",
    "data/test_sampling.py",
    "data/test_token_store_integrity.py",
    "adapter/test_safe_tensors_file.py",
    "adapter/test_peft_files.py",
    "checkpoint/test_saving_and_loading.py",
    "report",
)
SELECTED = "not slow and not long and not needs_triton and not needs_cuda and not needs_gptqmodel"
DEMO = ("train", "--demo", "--overwrite", "--training.max_steps", "4")
SECTION = "40"
SECONDS_OF_A_CASE = "900"  # a busy machine is no finding
REFERENCE = "qlora_hal_conformance.reference_backend:SPEC"


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
    commit: str = ""

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
    unproved = unproved_bounds(results)
    report(results, unproved)
    if given.out:
        keep(results, given.out)
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
    result = Result(interpreter.version, versions, part, commit=commit())
    environment = ENVIRONMENTS / f"{interpreter.version}-{versions}-{part}"
    for name, step in steps(interpreter, environment, versions, part):
        print(f"\n== Python {interpreter.version}, {versions}, {part}: {name}", flush=True)
        started = time.monotonic()
        passed = step()
        result.steps[name] = {"passed": passed, "seconds": round(time.monotonic() - started, 1)}
        if name == "install" and not passed:
            return result  # nothing else can be tried
    result.bounds = bounds(environment, part)
    return result


def steps(
    interpreter: Interpreter, environment: Path, versions: str, part: str
) -> Iterator[tuple[str, Callable[[], bool]]]:
    python = str(environment / "bin" / "python")
    run = partial(succeeds, environment)
    section = partial(section_passes, environment)
    pytest = [python, "-m", "pytest", "-q", "-n", os.environ.get("WORKERS", "2"), "-m", SELECTED]
    venv = [uv(), "venv", "--quiet", "--clear", "--no-python-downloads", "--python", interpreter.path]
    yield "make", lambda: run([*venv, str(environment)])
    yield "install", lambda: run(install(python, versions, part))
    if part == "core":
        yield "tests", lambda: run([*pytest, *(f"tests/{name}" for name in CORE_TESTS)])
        yield "section", lambda: section("--spec", REFERENCE)
    else:
        yield "tests", lambda: run([*pytest, *(f"tests/{name}" for name in QUICK_TESTS)])
        yield (
            "demo",
            lambda: run([python, "-m", "qlora_hal.cli", *DEMO, "--output_dir", str(kept(environment) / "demo")]),
        )
        yield "section on cpu_torch", lambda: section("--backend", "cpu_torch")
        yield "section on mlx_lora", lambda: section("--backend", "mlx_lora")


def succeeds(environment: Path, command: Sequence[str]) -> bool:
    return subprocess.run(command, cwd=ROOT, env=surroundings(environment), check=False).returncode == 0


def section_passes(environment: Path, kind: str, subject: str) -> bool:
    """By its cases: the suite's own exit status is of a certificate, which one section never is."""
    out = kept(environment) / subject.partition(".")[0]
    shutil.rmtree(out, ignore_errors=True)
    python = str(environment / "bin" / "python")
    suite = [python, "-m", "qlora_hal_conformance", "--section", SECTION, "--timeout", SECONDS_OF_A_CASE]
    succeeds(environment, [*suite, "--out", str(out), kind, subject])
    results = out / "results.json"
    verdicts = [case["verdict"] for case in json.loads(results.read_text())["cases"]] if results.exists() else []
    return "passed" in verdicts and set(verdicts) <= {"passed", "refused"}


def kept(environment: Path) -> Path:
    return ROOT / "runs" / "version_matrix" / environment.name


def install(python: str, versions: str, part: str) -> list[str]:
    command = [uv(), "pip", "install", "--quiet", "--python", python, "--resolution", RESOLUTION[versions]]
    if part == "backends" and not is_reachable(PYTORCH_INDEX):
        command += ["--no-sources"]  # PyPI's torch, which for Linux carries CUDA
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
    foreign = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")  # uv leaves it to Python to keep bytecode
    own = {name: value for name, value in os.environ.items() if name not in foreign}
    path = f"{environment / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**own, "PATH": path, "TMPDIR": str(scratch), "HF_HUB_OFFLINE": "1"}


def bounds(environment: Path, part: str) -> dict[str, tuple[str, str]]:
    command = [str(environment / "bin" / "python"), "ci/lower_bounds.py", *EXTRAS[part].split(",")]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def unproved_bounds(results: Sequence[Result]) -> list[str]:
    """Lower bounds that no environment of oldest versions was made with. A bound may be lower than what the backends'
    libraries ask for: the core alone then proves it; so a Python is judged where both parts were tried."""
    oldest = [result for result in results if result.versions == "oldest" and result.bounds]
    said = []
    for python in dict.fromkeys(result.python for result in oldest):
        if {result.part for result in oldest if result.python == python} != set(EXTRAS):
            continue
        here = [result.bounds for result in oldest if result.python == python]
        for name in dict.fromkeys(name for found in here for name in found):
            seen = [found[name] for found in here if name in found]
            if not any(bound == installed for bound, installed in seen):
                bound, installed = seen[0]
                said.append(f"{name}>={bound} on Python {python}: {installed} is the oldest that could be installed")
    return said


def report(results: Sequence[Result], unproved: Sequence[str]) -> None:
    print()
    for result in results:
        steps = ", ".join(
            f"{name} {'passed' if step['passed'] else 'FAILED'} ({step['seconds']} s)"
            for name, step in result.steps.items()
        )
        print(f"Python {result.python}, {result.versions}, {result.part}: {steps}")
    for line in unproved:
        print(f"FAILED: a lower bound that was not run: {line}")


def keep(results: Sequence[Result], out: Path) -> None:
    """The record with these results in the place of what it held of their environments."""
    kept = [Result(**entry) for entry in json.loads(out.read_text())["environments"]] if out.exists() else []
    tried = {(result.python, result.versions, result.part) for result in results}
    kept = [result for result in kept if (result.python, result.versions, result.part) not in tried]
    every = sorted([*kept, *results], key=lambda result: (result.versions, result.python, result.part))
    unproved = unproved_bounds(every)
    record = {
        "command": "python3 ci/version_matrix.py --out docs/runs/version_matrix.json",
        "passed": all(result.passed for result in every) and not unproved,
        "unproved_bounds": unproved,
        "environments": [asdict(result) for result in every],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


def commit() -> str:
    """Of the code that is tried; empty outside a checkout."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
