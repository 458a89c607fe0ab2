"""`qlora-hal generate`: one prompt, answered by the base and by the base with its adapter."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from qlora_hal.cli.arguments import Switch, TrustOption
from qlora_hal.errors.terminal_text import show, show_json

RunOption = Annotated[Path | None, Parameter(help="A run's folder: its model, its settings, its adapter.")]
AdapterOption = Annotated[Path | None, Parameter(help="An adapter in PEFT layout; needs --model.")]
ModelOption = Annotated[
    str | None, Parameter(help="The base model of the adapter, or the new location of a run's model.")
]
BackendOption = Annotated[str, Parameter(help="A backend's name, or auto.")]
MismatchOption = Annotated[
    bool, Switch, Parameter(help="Allow a base other than the one that the adapter was trained on.")
]
LengthOption = Annotated[
    int, Parameter(help="Maximum length of an answer in tokens.", validator=validators.Number(gte=1))
]


def generate(
    *,
    prompt: Annotated[str, Parameter(help="The user's message.", allow_leading_hyphen=True)],
    run: RunOption = None,
    adapter: AdapterOption = None,
    model: ModelOption = None,
    backend: BackendOption = "auto",
    max_new_tokens: LengthOption = 128,
    allow_base_mismatch: MismatchOption = False,
    trust_remote_code: TrustOption = False,
    base_only: Annotated[bool, Switch, Parameter(help="Print only the base model's answer.")] = False,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
) -> int:
    """Answer one prompt: qlora-hal generate --run runs/first --prompt "..."."""
    from qlora_hal.cli.json_output import kept_for_json
    from qlora_hal.inference.generate import open_generation
    from qlora_hal.run.samples import PLAIN_NOTE, refuse_no_text

    refuse_no_text(prompt)
    asked = [{"role": "user", "content": prompt}]
    with kept_for_json(json):
        opened = open_generation(
            run_dir=run,
            adapter_dir=adapter,
            model=model,
            backend=backend,
            allow_base_mismatch=allow_base_mismatch,
            trust_remote_code=trust_remote_code,
            prompts=[asked],
        )
        with closing(opened) as pair:
            if pair.plain:
                show(f"note: {PLAIN_NOTE}", stream=sys.stderr)
            answers = {"base": pair.generate(asked, adapter=False, max_new_tokens=max_new_tokens)}
            if not base_only:
                answers["adapter"] = pair.generate(asked, adapter=True, max_new_tokens=max_new_tokens)
    if json:
        show_json({"prompt": prompt, **answers})
    elif base_only:
        show(answers["base"])
    else:
        show(f"base:    {answers['base']}\nadapter: {answers['adapter']}")
    return 0
