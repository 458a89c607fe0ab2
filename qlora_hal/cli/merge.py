"""`qlora-hal merge`: adapter and base as one model, written only when it is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch, TrustOption
from qlora_hal.cli.generate import MismatchOption
from qlora_hal.errors.terminal_text import show, show_json


def merge(
    target: Annotated[Path, Parameter(name="RUN_OR_ADAPTER", help="A run's folder, or an adapter in PEFT layout.")],
    out: Annotated[Path, Parameter(name="OUT", help="A new folder for the merged model.")],
    /,
    *,
    model: Annotated[str | None, Parameter(help="The base model; default: the one the adapter names.")] = None,
    base: Annotated[
        Literal["auto", "dequantized", "original"],
        Parameter(help="Which weights to merge into; auto measures both and keeps the closer one."),
    ] = "auto",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], Parameter(help="Data type of the merged weights.")
    ] = "bfloat16",
    requantize: Annotated[
        Literal["nf4", "int4_gptq"] | None,
        Parameter(help="Write the merged model in this format as well, in a folder of that name inside OUT."),
    ] = None,
    max_kl: Annotated[
        float | None,
        Parameter(help="Maximum KL divergence between adapter and merged model in nats per token; default: derived."),
    ] = None,
    min_top1: Annotated[
        float | None, Parameter(help="Minimum share of tokens on which both must agree; default: derived.")
    ] = None,
    rows: Annotated[
        str | None, Parameter(help="Data to compare on; default: the run's validation rows, else its last rows.")
    ] = None,
    row_limit: Annotated[int, Parameter(help="Maximum number of rows to compare.")] = 64,
    weight_format: Annotated[
        str | None, Parameter(help="How the base was stored in training, if the adapter does not record it.")
    ] = None,
    double_quant: Annotated[
        bool | None, Parameter(help="Whether its scales were quantized too, with --weight-format nf4 or fp4.")
    ] = None,
    backend: Annotated[str, Parameter(help="A backend's name; auto: the one that trained the adapter.")] = "auto",
    allow_base_mismatch: MismatchOption = False,
    trust_remote_code: TrustOption = False,
    quiet: Annotated[bool, Switch, Parameter(help="Print only notes and errors.")] = False,
    json: Annotated[bool, Switch, Parameter(help="Print the content of merge.json.")] = False,
) -> int:
    """Merge an adapter into its base: qlora-hal merge runs/first merged."""
    from qlora_hal import api
    from qlora_hal.cli.json_output import kept_for_json
    from qlora_hal.export.recording import report_rows
    from qlora_hal.report.console import RunConsole

    with kept_for_json(json):
        result = api.merge(
            target,
            out,
            model=model,
            base=base,
            dtype=dtype,
            requantize=requantize,
            max_kl=max_kl,
            min_top1=min_top1,
            rows=rows,
            row_limit=row_limit,
            weight_format=weight_format,
            double_quant=double_quant,
            backend=backend,
            allow_base_mismatch=allow_base_mismatch,
            trust_remote_code=trust_remote_code,
            console=RunConsole(quiet=quiet, json=json),
        )
    if json:
        show_json(dict(result.record))
    else:
        for name, value in report_rows(result.record):
            show(f"{name + ':':<19}{value}")
        show(f"{'merged model:':<19}{result.path}")
    return 0
