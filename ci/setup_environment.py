"""Make `.venv` with what this machine's hardware needs. Standard library only: it runs before anything is installed.

    python3 ci/setup_environment.py            what `make demo` needs
    python3 ci/setup_environment.py --tests    and what `make test` needs

NVIDIA -> cuda, AMD -> rocm, Apple silicon -> mlx, else the CPU. Nothing is done when the same was installed before.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import socket
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "qlora_hal_setup.txt"
PYTORCH_INDEX = "download.pytorch.org"


def main() -> None:
    if sys.version_info < (3, 11):
        sys.exit(f"Python {platform.python_version()} is too old: qlora_hal needs 3.11 or newer.")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", action="store_true")
    tests = parser.parse_args().tests
    if tests and sys.version_info >= (3, 14):
        sys.exit(
            f"The tests need GPTQModel, whose one NumPy has no wheel for Python {platform.python_version()}. Name an "
            "older one, 3.11 to 3.13: make test PYTHON=python3.12. `make test-matrix` tests newer ones without it."
        )
    extras = wanted_extras(hardware_extra(), tests=tests)
    wanted = fingerprint(extras)
    if STAMP.exists() and wanted in STAMP.read_text().splitlines():
        return
    print(f"Setting up {ENVIRONMENT.name} for: {', '.join(extras)}", file=sys.stderr)
    install(extras)
    with STAMP.open("a") as stamp:
        stamp.write(wanted + "\n")


def wanted_extras(hardware: str, *, tests: bool) -> list[str]:
    """The extras to install, that of the hardware first."""
    if not tests:
        return [hardware]
    return [hardware, "dev", *(["triton-interpreter"] if hardware == "cpu" else [])]


def hardware_extra() -> str:
    """The extra of pyproject.toml for the accelerator found here."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mlx"
    if Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia/version").exists() or is_wsl_with_nvidia():
        return "cuda"
    if Path("/dev/kfd").exists():
        return "rocm"
    return "cpu"


def is_wsl_with_nvidia() -> bool:
    return Path("/dev/dxg").exists() and Path("/usr/lib/wsl/lib/libcuda.so.1").exists()


def fingerprint(extras: list[str]) -> str:
    """Changes with what would be installed."""
    content = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    return f"{'+'.join(extras)} {hashlib.sha256(content).hexdigest()[:16]}"


def install(extras: list[str]) -> None:
    if not (ENVIRONMENT / "pyvenv.cfg").exists():
        venv.create(ENVIRONMENT, with_pip=True)
    python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "constraints.txt"
        file.write_text(constraints(extras[0]))
        pip += ["--constraint", str(file)]
        if extras[0] in ("cpu", "rocm", "cuda"):
            subprocess.run([*pip, "torch", *torch_index(extras[0])], check=True)
        subprocess.run([*pip, "--editable", f"{ROOT}[{','.join(extras)}]"], check=True)


def constraints(extra: str) -> str:
    """The tested versions. PyTorch's index for ROCm holds a few versions of torch, each with a Triton of its own: on an
    AMD GPU the newest there is taken."""
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    free = ("torch==", "triton==") if extra == "rocm" else ()
    return "".join(line for line in lines if not line.startswith(free))


def torch_index(extra: str) -> list[str]:
    """PyPI's torch for Linux carries CUDA: the CPU build and the ROCm build come from PyTorch's own index."""
    folder = {"cpu": "cpu", "rocm": "rocm7.2"}.get(extra)
    if folder is None or not is_reachable(PYTORCH_INDEX):
        return []
    url = f"https://{PYTORCH_INDEX}/whl/{folder}"
    return ["--extra-index-url", url] if extra == "cpu" else ["--index-url", url]


def is_reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
