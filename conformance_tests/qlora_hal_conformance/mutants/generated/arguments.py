"""What is to be said of each change that the suite let through: why it changes nothing, or what a case must try.

An argument belongs to a change by its words, not its line: it stays with the code as lines move.
"""

from __future__ import annotations

from collections.abc import Mapping

NOT_YET = "not looked at yet"

ARGUMENTS: Mapping[tuple[str, str, str], str] = {
    (
        "round_to_bfloat16",
        "lowest_kept_bit = pattern >> np.uint32(16) & np.uint32(1)",
        "lowest_kept_bit = pattern >> np.uint32(17) & np.uint32(1)",
    ): "Equal but for ties, one value in 2^16, which go to the other of two bfloat16 that are equally far: no further "
    "than bfloat16's own roundoff.",
    (
        "_relu",
        "return (np.maximum(x, 0.0), (x > 0.0).astype(np.float64))",
        "return (np.maximum(x, 0.0), (x >= 0.0).astype(np.float64))",
    ): "The derivative at exactly 0, which no product of drawn weights gives.",
    (
        "kept",
        "return words >> np.uint32(1) >= drop_below(rate)",
        "return words >> np.uint32(1) > drop_below(rate)",
    ): "One hash in 2^31 lies exactly on the limit.",
    (
        "_one_row",
        "return Batch(input_ids, np.full_like(input_ids, IGNORE_LABEL), positions, np.ones_like(input_ids))",
        "return Batch(input_ids, np.full_like(input_ids, IGNORE_LABEL), positions, np.zeros_like(input_ids))",
    ): "A prompt alone in its row; the oracle masks by order there and asks no segment.",
    (
        "ReferenceTrainer.evaluate",
        "counted = [self.rooms.read_batch(batch) for batch in batches if batch.counted_tokens]",
        "counted = [self.rooms.read_batch(batch) for batch in batches]",
    ): "A batch without a counted token adds 0 to the sum.",
    (
        "_float32_linspace",
        "return np.where(rank < count // 2, rising, falling).astype(np.float32)",
        "return np.where(rank < count * 2, rising, falling).astype(np.float32)",
    ): "Both halves of the table are the same numbers in float32: `rising` is exact there.",
    (
        "dynamic_8bit",
        ("positive = (np.float32(10.0 ** exponent) * ((edges[:-1] + edges[1:]) / np.float32(2.0))).astype(np.float32)"),
        "positive = np.float32(10.0 ** exponent) * ((edges[:-1] + edges[1:]) / np.float32(2.0))",
    ): "The product is float32 already.",
    (
        "_one_row",
        "input_ids = np.array([tokens], dtype=np.int32)",
        "input_ids = np.array([tokens])",
    ): "Token ids as 64-bit integers are the same ids.",
    (
        "token_losses",
        (
            "chosen = np.take_along_axis(_log_softmax(logits[:, :-1]), np.where(counts, targets, 0)[..., None], "
            "axis=-1)[..., 0]"
        ),
        (
            "chosen = np.take_along_axis(_log_softmax(logits[:, :-1]), np.where(counts, targets, -1)[..., None], "
            "axis=-1)[..., 0]"
        ),
    ): "What is gathered where nothing counts is replaced by 0 behind it.",
    (
        "quantize_absmax",
        "if through_cpu_table:",
        "if not through_cpu_table:",
    ): "The two tables are two devices' rounding of the same code; either is within the bound of the format.",
    (
        "ReferenceTrainer.gradient_of",
        "read = [self.rooms.read_batch(batch) for batch in window]",
        "read = [batch for batch in window]",
    ): "`read_batch` gives back what it was given, until a mutant or a test puts something in its place.",
    (
        "BackwardRun.add",
        "self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient",
        "self.gradients[name] = self.gradients[name] if name in self.gradients else gradient",
    ): "Each module is used once in a pass, so nothing is there to be added to; windows are added elsewhere.",
    (
        "_log_softmax",
        "shifted = logits - logits.max(axis=-1, keepdims=True)",
        "shifted = logits - logits.max(keepdims=True)",
    ): "Any shift gives the same softmax as long as no exponential overflows, in float64 up to 700.",
    (
        "ReferenceTrainer._scaled_gradient",
        ("found = self.rooms.window_gradient(self.attached.model, window, divisor / scale, masks_of, self.arithmetic)"),
        ("found = self.rooms.window_gradient(self.attached.model, window, divisor * scale, masks_of, self.arithmetic)"),
    ): (
        "The reference backend declares float32 and bfloat16 alone; this is reached with a loss scale only, in float16."
    ),
    (
        "ReferenceTrainer.gradient_of",
        "if scale == 1.0 or math.isfinite(global_norm(found.gradients)):",
        "if scale == 1.0:",
    ): (
        "The reference backend declares float32 and bfloat16 alone; this is reached with a loss scale only, in float16."
    ),
    (
        "_take_packed",
        "if record is None or layout is None or module + layout.marks[0] not in tensors:",
        "if record is None or layout is None or layout.marks[0] not in tensors:",
    ): (
        "No drawn checkpoint has a tensor whose whole name is a layout's mark, so nothing is packed twice; a "
        "checkpoint that is packed would fail at its first plain module, and the suite's are packed "
        "throughout."
    ),
    (
        "",
        "FIRST_LOSS_SCALE, LOSS_SCALE_FALL = (2.0 ** 16, 2.0 ** 4)",
        "FIRST_LOSS_SCALE, LOSS_SCALE_FALL = (2.0 ** 16, 2.0 ** 3)",
    ): (
        "The reference backend declares float32 and bfloat16 alone; this is reached with a loss scale only, in float16."
    ),
    (
        "AdaptedLinear.forward",
        "if self.lora_a is None or self.lora_b is None:",
        "if self.lora_a is None and self.lora_b is None:",
    ): "An adapter has both of its matrices or neither; a file with one is refused before.",
    (
        "load_base",
        "linear_modules, packed = (dict(source.facts.linear_modules), source.facts.prequantized)",
        "linear_modules, packed = (source.facts.linear_modules, source.facts.prequantized)",
    ): "The mapping is read and never written to.",
    (
        "",
        "FIRST_LOSS_SCALE, LOSS_SCALE_FALL = (2.0 ** 16, 2.0 ** 4)",
        "FIRST_LOSS_SCALE, LOSS_SCALE_FALL = (2.0 ** 16, 2.0)",
    ): (
        "The reference backend declares float32 and bfloat16 alone; this is reached with a loss scale only, in float16."
    ),
    (
        "refuse_load",
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source "
            "and quantization.weight_format is not WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not "
            "plain_source, Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing}"
        ),
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source "
            "and quantization.weight_format is WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not plain_source, "
            "Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing}"
        ),
    ): "The reference backend declares all of these features, so none of them is ever missing.",
    (
        "refuse_load",
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source "
            "and quantization.weight_format is not WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not "
            "plain_source, Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing}"
        ),
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source, "
            "Feature.LOAD_PREQUANTIZED: not plain_source, Feature.GRADIENT_CHECKPOINTING: "
            "compute.gradient_checkpointing}"
        ),
    ): "The reference backend declares all of these features, so none of them is ever missing.",
    (
        "OracleLlama._check_names",
        "if missing or unknown or stray:",
        "if missing and unknown and stray:",
    ): "A check of the oracle's caller: the suite hands it whole models only.",
    (
        "quantize_four_bit",
        "flat = np.asarray(weight, dtype=np.float32).reshape(-1)",
        "flat = np.asarray(weight).reshape(-1)",
    ): "The weights come as float32.",
    (
        "",
        (
            "UNIT_ROUNDOFF = MappingProxyType({'float32': 2.0 ** (-24), 'float16': 2.0 ** (-11), 'bfloat16': 2.0 "
            "** (-8)})"
        ),
        "UNIT_ROUNDOFF = MappingProxyType({'float32': 2.0 ** (-24), 'float16': -11, 'bfloat16': 2.0 ** (-8)})",
    ): (
        "The reference backend declares float32 and bfloat16 alone; this is reached with a loss scale only, in float16."
    ),
    (
        "",
        (
            "UNIT_ROUNDOFF = MappingProxyType({'float32': 2.0 ** (-24), 'float16': 2.0 ** (-11), 'bfloat16': 2.0 "
            "** (-8)})"
        ),
        (
            "UNIT_ROUNDOFF = MappingProxyType({'float32': 2.0 ** (-24), 'float16': 2.0 ** (-11), 'bfloat16': 4.0 "
            "** (-8)})"
        ),
    ): "A backend that rounds less than its dtype is closer to the oracle: no defect.",
    (
        "quantize_absmax",
        (
            "def quantize_absmax(absmax: Float32, *, offset: np.float32 | None=None, through_cpu_table: bool=False) "
            "-> QuantizedAbsmax:"
        ),
        (
            "def quantize_absmax(absmax: Float32, *, offset: np.float32 | None=None, through_cpu_table: bool=True) ->"
            " QuantizedAbsmax:"
        ),
    ): "The two tables are two devices' rounding of the same code; either is within the bound of the format.",
    (
        "refuse_load",
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source and "
            "quantization.weight_format is not WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not plain_source, "
            "Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing, Feature.DATA_PARALLEL: "
            "compute.world.size > 1, Feature.SHARDED_BASE: compute.shard_base, Feature.FP8_PRODUCTS: "
            "compute.fp8_products, Feature.EXPERTS: any((linear.experts > 1 for linear in "
            "source.facts.linear_modules.values()))}"
        ),
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source and "
            "quantization.weight_format is WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not plain_source, "
            "Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing, Feature.DATA_PARALLEL: "
            "compute.world.size > 1, Feature.SHARDED_BASE: compute.shard_base, Feature.FP8_PRODUCTS: "
            "compute.fp8_products, Feature.EXPERTS: any((linear.experts > 1 for linear in "
            "source.facts.linear_modules.values()))}"
        ),
    ): "The reference can quantize while it loads, so that no load asks for a feature it has not.",
    (
        "MixtureShape.__post_init__",
        "if not 0 < self.experts_per_token <= self.experts * self.groups_chosen // self.groups:",
        "if not 1 < self.experts_per_token <= self.experts * self.groups_chosen // self.groups:",
    ): "The suite draws no mixture that sends a token to one expert; a backend that refuses one would not be seen.",
    (
        "ReferenceTrainer.proved_compute_dtypes",
        "return tuple((dtype for dtype in ROUNDINGS if dtype in self.spec.capabilities.compute_dtypes))",
        "return tuple((dtype for dtype in ROUNDINGS))",
    ): "The reference declares every dtype that it rounds to.",
    (
        "MixtureShape.__post_init__",
        "if not 0 < self.experts_per_token <= self.experts * self.groups_chosen // self.groups:",
        "if not 0 < self.experts_per_token <= self.experts * self.groups_chosen * self.groups:",
    ): "A check of the shape's maker: the suite draws shapes whose tokens find enough experts.",
    (
        "refuse_untargeted",
        "used = {key(module) for module in adapter.config.target_modules for key in (lora_a_key, lora_b_key)}",
        "used = {key(module) for module in adapter.config.target_modules for key in (lora_b_key, lora_a_key)}",
    ): "A set of the same keys.",
    (
        "round_to_bfloat16",
        "lowest_kept_bit = pattern >> np.uint32(16) & np.uint32(1)",
        "lowest_kept_bit = pattern << np.uint32(16) & np.uint32(1)",
    ): (
        "Equal but for ties, one value in 2^16, which go to the other of two bfloat16 that are equally far: no "
        "further than bfloat16's own roundoff."
    ),
    (
        "idle_experts",
        (
            "still: dict[str, Bool] = {name: np.asarray(~gradient.any(axis=(-2, -1), keepdims=True)) for name, "
            "gradient in gradients.items() if gradient.ndim == STACK_AXES}"
        ),
        (
            "still: dict[str, Bool] = {name: np.asarray(~gradient.any(axis=(-1, -2), keepdims=True)) for name, "
            "gradient in gradients.items() if gradient.ndim == STACK_AXES}"
        ),
    ): "The same two axes.",
    (
        "load_base",
        "record = record_of(packed.weight_format) if packed is not None else None",
        "record = None",
    ): (
        "The reference declares bitsandbytes' formats alone, whose packed tensors describe themselves; the layouts of"
        " the others are judged on backends that declare them."
    ),
    (
        "load_base.read",
        "if not any((module + suffix in tensors for suffix in _weight_suffixes(record))):",
        "if not all((module + suffix in tensors for suffix in _weight_suffixes(record))):",
    ): "The formats that the reference declares have one suffix.",
    (
        "_log_softmax",
        "shifted = logits - logits.max(axis=-1, keepdims=True)",
        "shifted = logits",
    ): "Any shift gives the same softmax as long as no exponential overflows, in float64 up to 700.",
    (
        "refuse_load",
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source and "
            "quantization.weight_format is not WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not plain_source, "
            "Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing, Feature.DATA_PARALLEL: "
            "compute.world.size > 1, Feature.SHARDED_BASE: compute.shard_base, Feature.FP8_PRODUCTS: "
            "compute.fp8_products, Feature.EXPERTS: any((linear.experts > 1 for linear in "
            "source.facts.linear_modules.values()))}"
        ),
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source and "
            "quantization.weight_format is not WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not plain_source, "
            "Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing, Feature.DATA_PARALLEL: "
            "compute.world.size > 1, Feature.SHARDED_BASE: compute.shard_base, Feature.FP8_PRODUCTS: "
            "compute.fp8_products, Feature.EXPERTS: any((linear.experts < 1 for linear in "
            "source.facts.linear_modules.values()))}"
        ),
    ): (
        "The reference declares experts, so that no mixture is refused for want of them; backends that do not are "
        "judged by their own certificates. No case asks for a mixture's products in 8-bit floats."
    ),
    (
        "refuse_load",
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source and "
            "quantization.weight_format is not WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not plain_source, "
            "Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing, Feature.DATA_PARALLEL: "
            "compute.world.size > 1, Feature.SHARDED_BASE: compute.shard_base, Feature.FP8_PRODUCTS: "
            "compute.fp8_products, Feature.EXPERTS: any((linear.experts > 1 for linear in "
            "source.facts.linear_modules.values()))}"
        ),
        (
            "wanted = {Feature.DOUBLE_QUANT: quantization.double_quant, Feature.QUANTIZE_ON_LOAD: plain_source and "
            "quantization.weight_format is not WeightFormat.NONE, Feature.LOAD_PREQUANTIZED: not plain_source, "
            "Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing, Feature.DATA_PARALLEL: "
            "compute.world.size > 1, Feature.SHARDED_BASE: compute.shard_base, Feature.FP8_PRODUCTS: "
            "compute.fp8_products, Feature.EXPERTS: all((linear.experts > 1 for linear in "
            "source.facts.linear_modules.values()))}"
        ),
    ): "As if no mixture had experts, for each has dense layers too: the reference declares experts and refuses none.",
    (
        "ReferenceTrainer.gradient_of",
        "if scale == 1.0 or math.isfinite(global_norm(found.gradients)):",
        "if True:",
    ): "Reached with a loss scale only, in float16, which the reference backend does not declare.",
    (
        "_float32_linspace",
        "return np.where(rank < count // 2, rising, falling).astype(np.float32)",
        "return np.where(rank < count, rising, falling).astype(np.float32)",
    ): "Both halves of the table are the same numbers in float32: `rising` is exact there.",
    (
        "_float32_linspace",
        "return np.where(rank < count // 2, rising, falling).astype(np.float32)",
        "return np.where(rank > count // 2, rising, falling).astype(np.float32)",
    ): "Both halves of the table are the same numbers in float32.",
    (
        "",
        "CPU_TABLE_SIZE = 65536",
        "CPU_TABLE_SIZE = 65535",
    ): (
        "The size of the table by which bitsandbytes rounds on a CPU, one in 65536 off: within the bound of the "
        "format, which holds either device's rounding."
    ),
    (
        "_normalize_blocks",
        "blocks = flat[:whole].reshape(-1, block_size)",
        "blocks = flat[:whole].reshape(-2, block_size)",
    ): "NumPy takes any negative number for the side to be found.",
    (
        "_four_bit",
        "return BlockwiseFourBit(FourBitWeight(packed.reshape(-1), np.zeros(0, np.float32), layout), nested)",
        "return BlockwiseFourBit(FourBitWeight(packed.reshape(-2), np.zeros(0, np.float32), layout), nested)",
    ): "NumPy takes any negative number for the side to be found.",
    (
        "refuse_load",
        "if compute.fp8_products and wanted[Feature.EXPERTS]:",
        "if compute.fp8_products:",
    ): (
        "A backend may refuse on this device what it declares for others: section 34 is then refused, 18 cases, and "
        "the certificate says so; nothing is computed wrong."
    ),
    (
        "LoraScale",
        "rank_stabilized: bool = False",
        "rank_stabilized: bool = True",
    ): "A default that every caller overrides.",
    (
        "",
        "UNIT_ROUNDOFF = MappingProxyType({'float32': 2.0 ** (-24), 'float16': 2.0 ** (-11), 'bfloat16': 2.0 ** (-8)})",
        "UNIT_ROUNDOFF = MappingProxyType({'float32': 2.0 ** (-24), 'float16': 2.0 ** (-11), 'bfloat16': 2.0 ** (-9)})",
    ): "A backend that rounds less than its dtype is closer to the oracle: no defect.",
    (
        "token_loss_sum",
        "chosen = np.take_along_axis(log_probabilities, np.where(counts, targets, 0)[..., None], axis=-1)[..., 0]",
        "chosen = np.take_along_axis(log_probabilities, np.where(counts, targets, 0)[..., None])[..., 0]",
    ): "The last axis is NumPy's default (2.3 and later).",
    (
        "",
        "_NO_ADAPTER = AdapterConfig(r=1, alpha=1.0)",
        "_NO_ADAPTER = AdapterConfig(r=1, alpha=2.0)",
    ): "Stands where no adapter is; nothing is multiplied by its alpha.",
}
"""(function, what stood there, what stands there now) -> the argument."""


def argument_for(within: str, was: str, becomes: str) -> str:
    return ARGUMENTS.get((within, was, becomes), NOT_YET)
