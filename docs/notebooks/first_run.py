# %% [markdown]
# # First run on a CPU
#
# A small model is fine-tuned on rows in memory, judged, asked, and merged. Everything here runs on a CPU in a minute
# or two and downloads nothing; on a GPU only `backend` changes.
#
# Install into the environment of this kernel: `pip install "qlora-hal[cpu] @ git+https://github.com/OWNER/qlora-hal"`.

# %%
import json

import qlora_hal
from qlora_hal.demo import data_path, model_path

for report in qlora_hal.backends():
    print(f"{report.backend:<10} {report.availability.value:<14} {report.reason}")

# %% [markdown]
# ## Rows
#
# A list of conversations, as from your own code. A file (JSONL, JSON, CSV, Parquet) or a dataset does as well.

# %%
with data_path("train").open(encoding="utf-8") as lines:
    rows = [json.loads(line) for _, line in zip(range(300), lines, strict=False)]
rows[0]

# %% [markdown]
# ## What would run
#
# `dry_run` checks settings, data and memory before any weight is read.

# %%
SETTINGS = {"backend": "cpu_torch", "max_seq_length": 128, "max_steps": 30, "validation_fraction": 0.1, "seed": 1}
plan = qlora_hal.train(model_path(), rows, output_dir="runs/first", dry_run=True, quiet=True, **SETTINGS).plan
{name: plan[name] for name in ("steps", "sequences", "sequences_per_step", "target_modules", "compute_dtype")}

# %% [markdown]
# ## Train
#
# Settings are keywords. A metric is a function of the model; it is asked at each evaluation. The display below is drawn
# anew while the run goes on. Interrupting the kernel saves the state and says which call goes on.


# %%
QUESTION = "The synopsis of pv says: pv [OPTION] [FILE]...\nHow is pv called?"


def names_pv(model: qlora_hal.LoadedModel) -> float:
    """Whether the answer holds the call that the question tells."""
    return float("pv [OPTION] [FILE]" in model.generate(QUESTION, max_new_tokens=32))


result = qlora_hal.train(
    model_path(),
    rows,
    output_dir="runs/first",
    learning_rate=2e-3,
    r=8,
    eval_steps=10,
    metrics={"names_pv": names_pv},
    **SETTINGS,
)

# %% [markdown]
# ## Look
#
# The result shows its figures and its curve; `metrics` is a table of all steps, with `to_pandas()` where pandas is
# installed, and `paths` says what was written.

# %%
result

# %%
[row for row in result.metrics if "eval_loss" in row and row["step"]][-1]

# %% [markdown]
# ## Ask
#
# The base and its adapter, opened once, are asked what no row above holds. The small base only babbles; thirty steps
# teach it to take its answer out of what the question says.

# %%
with qlora_hal.load("runs/first") as model:
    for question in (QUESTION, "If polenta is a thick mush made of cornmeal, what is polenta a kind of?"):
        base, tuned = model.answer(question, max_new_tokens=40)
        print(f"{question}\n  base:    {base!r}\n  adapter: {tuned!r}")

# %% [markdown]
# ## Steer
#
# An observer can end a run, change its learning rate, or ask for a save or an evaluation. What it asked for is part of
# the run's state.


# %%
class StopWhenGood:
    """Ends the run at the first step below a loss."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    @qlora_hal.hookimpl
    def qlora_hal_control(self, step, stats):
        return qlora_hal.Control(stop=stats is not None and stats.loss < self.loss)


short = qlora_hal.train(
    model_path(),
    rows,
    output_dir="runs/short",
    learning_rate=2e-3,
    observers=[StopWhenGood(2.5)],
    quiet=True,
    **SETTINGS,
)
short.steps, short.stopped_because

# %% [markdown]
# ## Merge
#
# Adapter and base as one model for any other tool, compared with the two before it gets its name.

# %%
merged = qlora_hal.merge("runs/first", "runs/merged", dtype="float32", quiet=True)
with qlora_hal.load(merged.path) as model:
    print(repr(model.generate(QUESTION, max_new_tokens=40)))
