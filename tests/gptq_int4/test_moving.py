"""A base that comes quantized has no other weights: a run on it moves to no other format."""

from __future__ import annotations

from pathlib import Path

import pytest
from gptq_int4.gptq_checkpoints import Kind, write_checkpoint

from qlora_hal.config.schema import RunConfig
from qlora_hal.errors import CheckpointError
from qlora_hal.run.resumption import refuse_to_store_anew

CHANGES = ("weight format was int4_gptq in blocks of 64, becomes int4_affine",)


@pytest.mark.fault("C12")
def test_a_stored_base_is_refused_in_another_format_without_advice_that_cannot_work(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", Kind())
    config = RunConfig.model_validate({"model": {"name_or_path": str(tmp_path / "model")}})
    with pytest.raises(CheckpointError, match="the base comes quantized to int4_gptq") as caught:
        refuse_to_store_anew(3, config, CHANGES)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C12", 9)
    assert "not even with --transfer" in caught.value.cause
    assert "transfer" not in caught.value.fix
    refuse_to_store_anew(3, config, ("optimizer adamw_8bit is adamw",))


def test_a_16_bit_base_may_be_stored_anew() -> None:
    from qlora_hal.demo import model_path

    config = RunConfig.model_validate({"model": {"name_or_path": str(model_path())}})
    refuse_to_store_anew(3, config, CHANGES)
