"""Every record says of its format what its codec does, and one name is one object wherever it comes from."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Capabilities, WeightFormat
from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import BackendNotFoundError, ModelError
from qlora_hal.formats.catalogue import BUILT_IN, formats_of_level, record_of, wrong_claims
from qlora_hal.formats.checking import contradictions
from qlora_hal.formats.record import FormatRecord
from qlora_hal_oracle.codecs import FourBitCodec

NF4 = record_of("nf4")


@pytest.mark.parametrize("record", BUILT_IN, ids=lambda record: record.name)
def test_a_record_is_what_its_codec_does(record: FormatRecord) -> None:
    assert contradictions(record) == []
    assert record_of(record.name) is record
    assert getattr(WeightFormat, record.name.upper()) is record.weight_format


def test_the_largest_block_that_divides_the_rows_is_named() -> None:
    """The fewest scales; none is named where none divides them."""
    record = record_of("int4_affine")
    for inputs, way in ((192, "Set quantization.block_size to 64, or"), (48, "Set quantization.weight_format")):
        with pytest.raises(ModelError, match="QH-M53") as caught:
            record.require_whole_blocks("down_proj", inputs, 128, "here")
        assert caught.value.fix.startswith(way)
    record.require_whole_blocks("down_proj", 256, 128, "here")


def test_a_format_of_a_name_is_one_object() -> None:
    ours = WeightFormat("int4_rowwise")
    assert WeightFormat("int4_rowwise") is ours
    assert copy.deepcopy(ours) is pickle.loads(pickle.dumps(ours)) is ours  # noqa: S301
    assert WeightFormat("nf4") is WeightFormat.NF4
    assert (type(ours.value), f"{ours}", json.dumps([ours])) == (str, "int4_rowwise", '["int4_rowwise"]')
    assert {ours: 1}["int4_rowwise"] == 1
    assert sorted([WeightFormat.NF4, WeightFormat.FP4]) == ["fp4", "nf4"]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(BackendNotFoundError, match="no weight format 'nf5'; known are none, int8, nf4,") as caught:
        record_of("nf5")
    assert caught.value.code == "QH-E82"
    assert caught.value.fix == "Did you mean nf4?"


def test_levels_are_those_of_the_records() -> None:
    assert formats_of_level("4bit") == {"nf4", "fp4", "int4_gptq", "int4_affine", "mxfp4", "nvfp4"}
    assert formats_of_level("8bit") == {"int8", "int8_gptq", "int8_affine", "mxfp8"}
    assert formats_of_level("auto") == set()
    held = {record.name: record.holding_level for record in BUILT_IN}
    assert held["none"] == "none"
    assert {name for name, level in held.items() if level == "8bit"} == {
        "int8", "int8_gptq", "int5_affine", "int6_affine", "int8_affine", "mxfp8",
    }  # fmt: skip


def test_a_stack_of_experts_costs_what_its_layers_cost() -> None:
    assert NF4.bytes_of(LinearShape(128, 64, experts=3)) == 3 * NF4.bytes_of(LinearShape(128, 64))


class ScaledTwice(FourBitCodec):
    """Decodes to twice the weight."""

    def dequantize(self, stored):  # type: ignore[no-untyped-def]
        return 2 * super().dequantize(stored)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (replace(NF4, bits=8), "bits is 8, but its codec packs 2048 weights into 1024 bytes"),
        (replace(NF4, packed_bytes=record_of("fp4").packed_bytes, double_quant=False), ""),
        (replace(NF4, packed_bytes=record_of("int8").packed_bytes), "packed_bytes counts 2112 bytes"),
        (replace(NF4, codec=ScaledTwice(NF4.codec.kind)), "outside its own error bound"),  # type: ignore[attr-defined]
        (replace(NF4, codec=record_of("fp4").codec), "its layout reads what its codec stores as fp4"),
        (replace(NF4, layout=record_of("int8").layout), "its layout has .SCB"),
        (replace(NF4, level="5bit"), "level '5bit' is none of none, 8bit, 4bit"),
        (replace(NF4, name="NF 4"), "is not made of lower case letters"),
        (replace(NF4, block_sizes=(64, 64)), "are not different positive numbers"),
        (replace(NF4, block_sizes=[64]), "block_sizes is a list"),  # type: ignore[arg-type]
        (replace(NF4, codec=7), "codec is a int (7), Codec is expected"),  # type: ignore[arg-type]
    ],
)
def test_a_record_that_contradicts_its_codec_is_told_so(wrong: FormatRecord, said: str) -> None:
    found = contradictions(wrong)
    assert any(said in phrase for phrase in found) if said else found == []


def claims(**changed: object) -> Capabilities:
    formats = frozenset({WeightFormat.NF4, WeightFormat.INT8})
    return replace(Capabilities(formats, frozenset({"float32"}), frozenset()), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("claimed", "said"),
    [
        (claims(), []),
        (claims(weight_formats=frozenset({WeightFormat("nf5")})), ["There is no weight format 'nf5'; known are"]),
        (claims(block_sizes={WeightFormat.NF4: (64, 48)}), ["it declares blocks of 48 for nf4, which has 64, 32"]),
        (claims(block_sizes={WeightFormat.INT8: (64,)}), ["it declares blocks of 64 for int8, which has none"]),
        (claims(levels={"8bit": WeightFormat.NF4}), ["it maps the level 8bit to nf4, whose level is 4bit"]),
    ],
)
def test_a_backend_may_not_declare_a_format_otherwise(claimed: Capabilities, said: list[str]) -> None:
    found = wrong_claims(claimed)
    assert len(found) == len(said)
    assert all(phrase.startswith(start) for phrase, start in zip(found, said, strict=True))


def test_what_every_backend_here_declares_is_in_the_catalogue() -> None:
    from qlora_hal.detect.discovery import listed, load_spec

    for entry in listed():
        assert wrong_claims(load_spec(entry).capabilities) == []


def test_a_codec_decodes_what_it_stores_of_a_weight_of_zeros() -> None:
    for record in BUILT_IN:
        stored = record.codec.quantize(np.zeros((16, 128), np.float32), record.default_block)
        assert not record.codec.dequantize(stored).any(), record.name
