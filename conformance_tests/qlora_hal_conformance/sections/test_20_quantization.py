"""L1: the stored base. Format error is judged here against the codec, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients, judge_logits, must_refuse, unless_refused
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import (
    FORMATS,
    FOUR_BIT_FORMATS,
    PACKED_FORMATS,
    each_block_size,
    each_format,
    in_each_dtype,
)
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch
from qlora_hal_conformance.stored_weights import in_dtype, judge_format_error, judge_stored, weight_to_store
from qlora_hal_conformance.subject import Subject
from qlora_hal_conformance.tolerances import (
    Bound,
    codebook_distance,
    decoded_exactly,
    grid_spacing,
    nearest_entry,
    stored_rounding,
)
from qlora_hal_oracle import (
    FourBitFormat,
    FourBitLayout,
    FourBitWeight,
    GptqCodec,
    MicroscalingCodec,
    MlxAffineCodec,
    ZeroPointConvention,
    absmax_error_bound,
    quantize_absmax,
    quantize_four_bit,
    quantize_microscaling,
    quantize_mlx_affine,
)
from qlora_hal_oracle.arrays import Float32, Float64
from qlora_hal_oracle.codebooks import FOUR_BIT_CODEBOOKS
from qlora_hal_oracle.random_models import linear_shapes, write_model, write_quantized

WRONG_BLOCK_SIZE = 48
"""No format here has it."""

PREQUANTIZED = (
    (WeightFormat.NF4, 64, False),
    (WeightFormat.NF4, 128, False),
    (WeightFormat.NF4, 64, True),
    (WeightFormat.FP4, 64, False),
    (WeightFormat.INT8, None, False),
    (WeightFormat.INT4_GPTQ, 128, False),
    (WeightFormat.INT4_GPTQ, 32, False),
    (WeightFormat.INT8_GPTQ, 128, False),
    (WeightFormat.INT4_AFFINE, 64, False),
    (WeightFormat.INT8_AFFINE, 64, False),
    (WeightFormat.INT3_AFFINE, 64, False),
    (WeightFormat.INT6_AFFINE, 32, False),
    (WeightFormat.MXFP4, 32, False),
    (WeightFormat.NVFP4, 16, False),
    (WeightFormat.MXFP8, 32, False),
)


@pytest.mark.parametrize("weight_format", each_format(*FOUR_BIT_FORMATS))
def test_codebook_is_exact(weight_format: WeightFormat, opened: Opener, judging: Judge) -> None:
    """In every block, decoded values divided by the largest are entries of the published codebook."""
    ready = opened(weight_format=weight_format)
    codebook = FOUR_BIT_CODEBOOKS[FourBitFormat(weight_format.value)].astype(np.float64)
    size = ready.quantization.block_size or 0
    for module in linear_shapes(ready.model.shape):
        blocks = ready.trainer.dequantized_weight(module).astype(np.float64).reshape(-1, size)
        ratios = blocks / np.abs(blocks).max(axis=1, keepdims=True)
        nearest = codebook[np.abs(ratios[..., None] - codebook).argmin(axis=-1)]
        judging.within(f"entries of {module}", ratios, nearest, codebook_distance(ready.dtype))


@pytest.mark.parametrize("weight_format", each_format())
def test_every_weight_is_within_the_bound_of_its_format(
    weight_format: WeightFormat, opened: Opener, judging: Judge
) -> None:
    ready = opened(weight_format=weight_format)
    for module in linear_shapes(ready.model.shape):
        judge_format_error(module, ready, judging)


@pytest.mark.parametrize("weight_format", each_format())
def test_every_layer_of_a_deep_model_is_stored_so(weight_format: WeightFormat, opened: Opener, judging: Judge) -> None:
    """Within the bound, and not closer to the original than the format allows: a layer left out would be."""
    ready = opened("deep", weight_format=weight_format)
    for module in linear_shapes(ready.model.shape):
        judge_format_error(module, ready, judging)
        if weight_format is not WeightFormat.NONE:
            weight, decoded = weight_to_store(module, ready), ready.trainer.dequantized_weight(module)
            assert not np.array_equal(decoded, weight), f"{module} is not quantized"


@pytest.mark.parametrize(("weight_format", "size"), each_block_size())
def test_blocks_have_the_size_that_was_asked_for(
    weight_format: WeightFormat, size: int, opened: Opener, judging: Judge
) -> None:
    """Every decoded weight lies on the grid of its own block, and on the nearest point of it."""
    ready = opened(weight_format=weight_format, block_size=size)
    for module in linear_shapes(ready.model.shape):
        weight, decoded = (
            weight_to_store(module, ready),
            ready.trainer.dequantized_weight(module).astype(np.float64),
        )
        match record_of(weight_format).codec:
            case MlxAffineCodec() as codec:
                _judge_affine_grid(module, ready, codec, decoded, judging)
            case MicroscalingCodec() as codec:
                _judge_microscaling_grid(module, ready, codec, decoded, judging)
            case _:
                _judge_four_bit_grid(module, ready, weight, decoded, judging)


@in_each_dtype
def test_products_in_every_block_size(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """In every declared block size of every declared format, and back too in the main one: a kernel may know but one
    of them."""
    for weight_format, sizes in _declared_blocks(opened):
        for size in sizes:
            ready = opened(weight_format=weight_format, block_size=size)
            if weight_format is opened.subject.main_format:
                _judge_products(ready, seeded, judging)
            else:
                ready.attach(draw_adapter(seeded, ready.model.shape))
                judge_logits(ready, ready.oracle(), draw_batch(seeded, ready.model.shape, lengths=(11,)), judging)


def _declared_blocks(opened: Opener) -> list[tuple[WeightFormat, tuple[int | None, ...]]]:
    """A backend without blocks has its main format as it is."""
    declared = opened.subject.capabilities.block_sizes
    return [(f, declared[f]) for f in sorted(declared)] or [(opened.subject.main_format, (None,))]


@pytest.mark.needs(Feature.DOUBLE_QUANT)
@pytest.mark.parametrize("weight_format", each_format(*FOUR_BIT_FORMATS))
@in_each_dtype
def test_double_quantization_keeps_its_bound(
    weight_format: WeightFormat, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """The absmax of each block is an 8-bit code around a mean: off by at most the codec's bound, and really coded. The
    products are those of the weights it gives."""
    ready = opened(weight_format=weight_format, double_quant=True)
    coded = 0
    for module in linear_shapes(ready.model.shape):
        judge_format_error(module, ready, judging)
        decoded = ready.trainer.dequantized_weight(module).astype(np.float64)
        found = np.abs(decoded.reshape(-1, ready.quantization.block_size or 0)).max(axis=1)
        stored, read = _absmax_by_reading(module, ready)
        allowed = (
            _absmax_bound(read) + decoded_exactly(found, ready.dtype).value + stored_rounding(read, ready.dtype) / 2
        )
        judging.within(f"absmax of {module}", found, read, Bound(allowed, "bound of the 8-bit codec + 2 u |a|"))
        coded += min(_count_apart(found, in_dtype(absmax, ready.dtype)) for absmax in (stored, read))
    assert coded, "every absmax is exact: double quantization was ignored"
    _judge_products(ready, seeded, judging)


@pytest.mark.needs(Feature.LOAD_PREQUANTIZED)
@pytest.mark.parametrize(
    ("weight_format", "size", "double"),
    [
        pytest.param(f, size, double, id=f"{f.value}-{size}{'-double' if double else ''}", marks=pytest.mark.needs(f))
        for f, size, double in PREQUANTIZED
    ],
)
def test_quantized_checkpoint_is_taken_as_it_is(
    weight_format: WeightFormat,
    size: int | None,
    double: bool,
    opened: Opener,
    seeded: np.random.Generator,
    judging: Judge,
) -> None:
    """The weights are those that the stored codes decode to, not those of a second quantization, and the products are
    theirs."""
    ready = opened(weight_format=weight_format, block_size=size, double_quant=double, prequantized=True)
    judge_stored(ready, judging)
    _judge_products(ready, seeded, judging)


@pytest.mark.needs(Feature.LOAD_PREQUANTIZED)
@in_each_dtype
def test_quantized_checkpoint_in_several_files(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Of every declared format three files and an index, as large models come: the codes of a layer lie in one, its
    scales in another, and what is not packed is bfloat16. Embedding, norms and head are used as they are stored."""
    packed = set(PACKED_FORMATS) & opened.subject.capabilities.weight_formats
    for weight_format in sorted(packed or PACKED_FORMATS[:1]):
        storage = Quantization(weight_format, opened.default_block(weight_format))
        model = opened.models.quantized("main", storage, stored_dtype="bfloat16", files=3)
        ready = opened(model, weight_format=weight_format, block_size=storage.block_size, prequantized=True)
        judge_stored(ready, judging)
        _judge_products(ready, seeded, judging)


@pytest.mark.needs(Feature.LOAD_PREQUANTIZED)
@pytest.mark.needs(WeightFormat.INT4_GPTQ)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(GptqCodec(convention=ZeroPointConvention.V2), id="v2"),
        pytest.param(GptqCodec(symmetric=False, convention=ZeroPointConvention.V2), id="v2-asymmetric"),
        pytest.param(GptqCodec(act_order=True), id="v1-act_order"),
        pytest.param(GptqCodec(False, True, ZeroPointConvention.V2), id="v2-asymmetric-act_order"),
    ],
)
@in_each_dtype
def test_gptq_checkpoint_is_read_in_its_own_convention(
    kind: GptqCodec, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Zero points as they are or less one, one for each group or one for all, groups in order or scattered by g_idx:
    read by another rule, each gives weights of the right size that are wrong."""
    shape, tensors = opened.models.drawn("main")
    storage = Quantization(WeightFormat.INT4_GPTQ, opened.default_block(WeightFormat.INT4_GPTQ))
    name = f"gptq-{kind.convention.value}-{kind.symmetric}-{kind.act_order}"
    model = write_quantized(opened.models.folder / name, shape, tensors, storage, codec=kind)
    ready = opened(model, weight_format=storage.weight_format, block_size=storage.block_size, prequantized=True)
    judge_stored(ready, judging)
    _judge_products(ready, seeded, judging)


@pytest.mark.needs(Feature.QUANTIZE_ON_LOAD)
@pytest.mark.parametrize("files", [1, 3], ids=["one_file", "three_files"])
@pytest.mark.parametrize("stored_dtype", ["float16", "bfloat16"])
@in_each_dtype
def test_checkpoint_in_half_precision_is_quantized_from_its_own_values(
    stored_dtype: str, files: int, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """In one file and in three with an index, all of which are quantized; embedding, norms and head are used as they
    are stored."""
    declared = opened.subject.capabilities.weight_formats
    chosen = next((f for f in FORMATS if f in declared and f is not WeightFormat.NONE), opened.subject.main_format)
    ready = opened(opened.models.plain("main", stored_dtype=stored_dtype, files=files), weight_format=chosen)
    for module in linear_shapes(ready.model.shape):
        judge_format_error(module, ready, judging)
        kept = np.array_equal(ready.trainer.dequantized_weight(module), weight_to_store(module, ready))
        assert chosen is WeightFormat.NONE or not kept, f"{module} is not quantized"
    _judge_products(ready, seeded, judging)


@pytest.mark.parametrize("weight_format", each_format())
def test_weights_of_zero_stay_zero(weight_format: WeightFormat, opened: Opener, judging: Judge) -> None:
    """A block, a row and a whole matrix of zeros: no 0/0, no offset."""
    shape, tensors = opened.models.drawn("main")
    names = list(linear_shapes(shape))
    zeroed = {name: tensor.copy() for name, tensor in tensors.items()}
    zeroed[f"{names[0]}.weight"][:] = 0.0
    zeroed[f"{names[1]}.weight"][0] = 0.0
    opened.models.define("zeros", shape, zeroed)
    ready = opened("zeros", weight_format=weight_format)
    nothing = Bound(0.0, "zero is kept exactly")
    whole, row = (ready.trainer.dequantized_weight(name) for name in names[:2])
    judging.within("matrix of zeros", whole, np.zeros_like(whole), nothing)
    judging.within("row of zeros", row[0], np.zeros_like(row[0]), nothing)


@pytest.mark.parametrize("weight_format", each_format())
def test_rows_without_a_whole_number_of_blocks(weight_format: WeightFormat, opened: Opener, judging: Judge) -> None:
    """Blocks run over the ends of rows in NF4 and FP4, and the last may be short; a format whose groups lie within
    rows may refuse such a model, by our error."""
    if not record_of(weight_format).within_rows:
        ready: Opened | None = opened("uneven", weight_format=weight_format)
    else:
        # Not packed by the oracle: its codecs refuse such rows themselves.
        shape, tensors = opened.models.drawn("uneven")
        plain = write_model(opened.models.folder / f"uneven-{weight_format.value}", shape, tensors)
        open_plain = partial(opened, plain, weight_format=weight_format)
        ready = unless_refused(open_plain) if opened.subject.declares(weight_format) else open_plain()
    if ready is None:
        return
    for module in linear_shapes(ready.model.shape):
        judge_format_error(module, ready, judging)


def test_format_of_another_distribution_is_its_codec(opened: Opener, judging: Judge) -> None:
    """Every declared format that this distribution does not have is judged by the codec of its record: quantized while
    loading, within the codec's bound in each declared block size; stored already, exactly what the codec decodes."""
    for weight_format, size, double in _storages_of_others(opened.subject):
        of_format = partial(opened, weight_format=weight_format, block_size=size, double_quant=double)
        if opened.subject.declares(Feature.QUANTIZE_ON_LOAD):
            ready = of_format(prequantized=False)
            for module in linear_shapes(ready.model.shape):
                judge_format_error(module, ready, judging)
                assert not np.array_equal(ready.trainer.dequantized_weight(module), weight_to_store(module, ready)), (
                    module
                )
        if opened.subject.declares(Feature.LOAD_PREQUANTIZED):
            judge_stored(of_format(prequantized=True), judging)


def _storages_of_others(subject: Subject) -> Iterator[tuple[WeightFormat, int | None, bool]]:
    capabilities = subject.capabilities
    for weight_format in sorted(capabilities.weight_formats - set(FORMATS)):
        can_double = record_of(weight_format).double_quant and subject.declares(Feature.DOUBLE_QUANT)
        for size in capabilities.block_sizes.get(weight_format, (None,)):
            yield from ((weight_format, size, double) for double in ((False, True) if can_double else (False,)))


def test_unknown_block_size_is_refused(opened: Opener) -> None:
    """For every declared format with blocks: 48 is nobody's block size, and must not become another one silently."""
    model = opened.models.plain("main")
    sizes = {f: record_of(f).block_sizes for f in opened.subject.capabilities.weight_formats}
    for weight_format in sorted(f for f, known in sizes.items() if known and WRONG_BLOCK_SIZE not in known):
        quantization = Quantization(weight_format, WRONG_BLOCK_SIZE)
        compute = Compute(opened.subject.main_dtype)  # type: ignore[arg-type]
        load = partial(opened.trainer().load, ModelSource.in_folder(model.folder), quantization, compute)
        must_refuse(load, f"{weight_format.value} with block size {WRONG_BLOCK_SIZE}")


def test_same_weights_are_stored_the_same_way_twice(opened: Opener) -> None:
    first, second = opened(), opened()
    for module in linear_shapes(first.model.shape):
        one, two = (ready.trainer.dequantized_weight(module) for ready in (first, second))
        assert np.array_equal(one, two), f"{module} was quantized to other numbers the second time"


def _judge_products(ready: Opened, seeded: np.random.Generator, judging: Judge) -> None:
    """What is multiplied, forward and back, is what `dequantized_weight` shows and what the files hold of the rest."""
    shape = ready.model.shape
    ready.attach(draw_adapter(seeded, shape))
    reference, window = ready.oracle(), [draw_batch(seeded, shape, lengths=(14, 9))]
    judge_logits(ready, reference, window[0], judging)
    judge_gradients(ready.trained_gradient(window), reference, window, ready, judging)


# the formats ----------------------------------------------------------------------------------------------------------
def _four_bit(module: str, ready: Opened) -> FourBitWeight:
    kind = FourBitFormat(ready.quantization.weight_format.value)
    size = ready.quantization.block_size or 0
    return quantize_four_bit(weight_to_store(module, ready), weight_format=kind, block_size=size)


def _absmax_by_reading(module: str, ready: Opened) -> tuple[Float32, Float32]:
    """The absmax of each block of the weight as it is stored, and as the compute dtype has it: a backend may quantize
    the one or the other."""
    kind = FourBitFormat(ready.quantization.weight_format.value)
    stored, read = (
        quantize_four_bit(weight, weight_format=kind, block_size=ready.quantization.block_size or 0).absmax
        for weight in (ready.model.tensors[f"{module}.weight"], weight_to_store(module, ready))
    )
    return stored, read


def _count_apart(found: Float64, absmax: Float32) -> int:
    return int(np.count_nonzero(np.abs(found - absmax) > decoded_exactly(found, "float32").value))


def _absmax_bound(absmax: Float32) -> Float64:
    nested = quantize_absmax(absmax)
    return absmax_error_bound(nested.nested_absmax, nested.offset, absmax.size)


def _judge_four_bit_grid(module: str, ready: Opened, weight: Float32, decoded: Float64, judging: Judge) -> None:
    stored = _four_bit(module, ready)
    codebook = FOUR_BIT_CODEBOOKS[stored.layout.weight_format].astype(np.float64)
    absmax = _per_value(stored.absmax, stored.layout)
    ratios = decoded / absmax
    chosen = codebook[np.abs(ratios[..., None] - codebook).argmin(axis=-1)]
    judging.within(f"entries of {module}", ratios, chosen, codebook_distance(ready.dtype))
    best = np.abs(weight[..., None] / absmax[..., None] - codebook).min(axis=-1) * absmax
    further = np.maximum(np.abs(weight - decoded) - best, 0.0)
    judging.within(f"distance of {module}", further, np.zeros_like(further), nearest_entry(absmax, weight, ready.dtype))


def _per_value(absmax: Float32, layout: FourBitLayout) -> Float64:
    spread = np.repeat(absmax.astype(np.float64), layout.block_size)
    return spread[: layout.count].reshape(layout.shape)


def _judge_affine_grid(module: str, ready: Opened, codec: MlxAffineCodec, decoded: Float64, judging: Judge) -> None:
    size = ready.quantization.block_size or 0
    stored = quantize_mlx_affine(weight_to_store(module, ready), bits=codec.bits, group_size=size)
    scale, bias = (np.repeat(v.astype(np.float64), stored.group_size, axis=1) for v in (stored.scales, stored.biases))
    codes = (decoded - bias) / scale
    spacing = grid_spacing(np.ones_like(codes), ready.dtype)
    judging.within(f"codes of {module}", codes, np.rint(codes), spacing)
    judge_format_error(module, ready, judging)


def _judge_microscaling_grid(
    module: str, ready: Opened, codec: MicroscalingCodec, decoded: Float64, judging: Judge
) -> None:
    """Every decoded weight is an element of the format times the scale of its own group."""
    stored = quantize_microscaling(weight_to_store(module, ready), codec.kind)
    elements = stored.weight_format.elements
    elements = elements[~np.isnan(elements)]
    ratios = decoded / np.repeat(stored.scales, stored.weight_format.group_size, axis=1)
    chosen = elements[np.abs(ratios[..., None] - elements).argmin(axis=-1)]
    judging.within(f"elements of {module}", ratios, chosen, codebook_distance(ready.dtype))
    judge_format_error(module, ready, judging)
