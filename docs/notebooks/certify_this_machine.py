# %% [markdown]
# # Certify this machine
#
# The conformance suite computes what each backend should, in float64 from first principles, and compares. A run that
# passes leaves a certificate, which is a row of the support table. On a free GPU (a T4 of a notebook service) the whole
# suite runs here; nothing is downloaded, its models are small and drawn at random.
#
# Install into the environment of this kernel, then restart it:
# `pip install "qlora-hal[cuda,conformance] @ git+https://github.com/OWNER/qlora-hal"`, with `rocm` or `mlx` in the
# place of `cuda` elsewhere ([page](../certify_your_machine.md)).

# %%
import json
import subprocess
import sys
from pathlib import Path

import qlora_hal

ready = [report for report in qlora_hal.backends() if report.ready]
for report in ready:
    print(f"{report.backend}: {', '.join(report.devices)}")

# %% [markdown]
# The first ready backend is certified; put another name here.

# %%
BACKEND = next(
    (report.backend for report in ready if report.backend in ("cuda_bnb", "rocm_bnb", "mps_bnb")), "cpu_torch"
)
WHOLE_SUITE = BACKEND != "cpu_torch"
if not WHOLE_SUITE:
    print("No GPU is ready here: one section of the suite runs on the CPU, and no certificate can come of it.")

# %% [markdown]
# ## Ask the doctor
#
# Each ready backend proves its numbers on a tiny model. If something fails, do what it says under `fix` first.


# %%
def ran(*arguments: str) -> int:
    """A command of this environment, its last lines shown; its exit status."""
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    print("\n".join((done.stdout + done.stderr).strip().splitlines()[-25:]))
    return done.returncode


ran("qlora_hal", "doctor", "--backend", BACKEND)

# %% [markdown]
# ## Run the suite
#
# Let the machine do nothing else meanwhile. Exit status 0 means conformant; 20 means not conformant, or a run of some
# sections.

# %%
OUT = Path("conformance") / BACKEND
sections = [] if WHOLE_SUITE else ["--section", "40"]
ran("qlora_hal_conformance", "--backend", BACKEND, "--out", str(OUT), *sections)

# %% [markdown]
# ## The certificate
#
# Verify it, then send `certificate.json` as the page says. A run of one section leaves none that counts.

# %%
certificate = OUT / "certificate.json"
if WHOLE_SUITE:
    ran("qlora_hal_conformance", "--verify", str(certificate))
if certificate.is_file():
    held = json.loads(certificate.read_text())
    print(f"conformant: {held['conformant']}; {held['totals']}")
else:
    print("no certificate: the suite was not run whole")
