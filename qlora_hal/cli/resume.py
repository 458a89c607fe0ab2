"""`qlora-hal resume`: go on from the newest checkpoint that is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import DevicesOption, RestartsOption, Switch, TrustOption, as_devices
from qlora_hal.cli.train import result_as_json
from qlora_hal.errors.terminal_text import show_json


def resume(
    run_dir: Annotated[Path, Parameter(help="The folder of the run.")],
    /,
    *,
    backend: Annotated[
        str | None, Parameter(help="Continue on another backend; what is then no longer exact is reported.")
    ] = None,
    transfer: Annotated[
        bool, Switch, Parameter(help="Allow another weight format or optimizer; the divergence is measured first.")
    ] = False,
    model: Annotated[str | None, Parameter(help="Path of the same model on this machine.")] = None,
    data: Annotated[str | None, Parameter(help="Path of the same data on this machine.")] = None,
    validation_data: Annotated[str | None, Parameter(help="Path of the same validation data on this machine.")] = None,
    force_unlock: Annotated[
        bool, Switch, Parameter(help="Take over the lock of a run on another host that has ended.")
    ] = False,
    verify: Annotated[
        bool, Switch, Parameter(help="Hash every byte of the model's files, and compare them at each resume.")
    ] = False,
    trust_remote_code: TrustOption = False,
    devices: DevicesOption = None,
    max_restarts: RestartsOption = 0,
    quiet: Annotated[bool, Switch, Parameter(help="Print only notes and errors.")] = False,
    json: Annotated[bool, Switch, Parameter(help="Print the result as JSON.")] = False,
) -> int:
    """Go on with a run that was stopped, as if it had never stopped."""
    from qlora_hal import api
    from qlora_hal.cli.json_output import kept_for_json
    from qlora_hal.report.console import RunConsole

    with kept_for_json(json):
        result = api.resume(
            run_dir,
            backend=backend,
            transfer=transfer,
            model=model,
            data=data,
            validation_data=validation_data,
            force_unlock=force_unlock,
            verify=verify,
            trust_remote_code=trust_remote_code,
            devices=as_devices(devices),
            max_restarts=max_restarts,
            console=RunConsole(quiet=quiet, json=json),
        )
    if json:
        show_json(result_as_json(result))
    return 0
