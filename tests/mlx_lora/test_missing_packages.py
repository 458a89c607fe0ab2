"""A module of mlx-lm that leaves, or that needs what is not installed, is refused with the name of what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import write_model
from trainers import source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import ModelError
from qlora_hal_backends.mlx_lora.outline import outline
from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer


def test_a_module_that_leaves_is_refused_with_the_package_it_misses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mlx-lm's OLMo prints a line and calls sys.exit."""
    source = source_of(write_model(tmp_path, "olmo"))
    capsys.readouterr()
    for use in (
        lambda: outline(source, {}),
        lambda: MLXLoRATrainer().load(source, Quantization(WeightFormat.NONE), Compute()),
    ):
        with pytest.raises(ModelError, match="needs the package hf_olmo, which is not installed") as caught:
            use()
        assert caught.value.code == "QH-M51"
        assert caught.value.cause == "To run olmo install ai2-olmo: pip install ai2-olmo"
        assert caught.value.context["package"] == "hf_olmo"
    assert capsys.readouterr().out == ""  # what a command prints may be read by a program


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import no_such_package.part", "needs the package no_such_package"),
        ("raise SystemExit(3)", "mlx-lm cannot build LlamaForCausalLM"),
        ("import mlx_lm.models.no_such_module", "mlx-lm cannot build LlamaForCausalLM"),
        (
            "try:\n    import no_such_package\nexcept ImportError:\n    raise SystemExit",
            "needs the package no_such_pack",
        ),
    ],
)
def test_other_ways_not_to_be_there(
    program: str, said: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the installed mlx-lm that does this when it is imported."""
    import mlx_lm.models

    (tmp_path / "llama.py").write_text(program)
    monkeypatch.setattr(mlx_lm.models, "__path__", [str(tmp_path), *mlx_lm.models.__path__])
    for name in [name for name in sys.modules if name == "mlx_lm.models.llama"]:
        monkeypatch.delitem(sys.modules, name)
    assert isinstance(mlx_lm.models, ModuleType)
    with pytest.raises(ModelError, match=said) as caught:
        outline(source_of(llama), {})
    assert caught.value.code == "QH-M51"
