"""The float64 NumPy oracle: weight formats, a small Llama with LoRA, its gradients, AdamW, and error scales.

It imports NumPy alone, so that no backend is judged by the library it is made of, and nothing of the product that it
judges. Start with `trainer.py` for the computation and with `four_bit.py` for a weight format. `random_models.py`
writes small models to try all this on; it alone knows the contract's names and the catalogue of formats.
"""

from .arithmetic import EXACT, Arithmetic, ErrorScale, ExactArithmetic, MagnitudeRecorder, RandomRounding
from .arrays import IGNORE_LABEL, TokenBatch
from .codebooks import FP4, NF4, FourBitFormat, dynamic_8bit
from .codecs import (
    Codec,
    FourBitCodec,
    GptqCodec,
    Int8Codec,
    MicroscalingCodec,
    MlxAffineCodec,
    StoredTensors,
    UnquantizedCodec,
)
from .config_reading import read_shape
from .double_quantization import (
    QuantizedAbsmax,
    absmax_error_bound,
    dequantize_absmax,
    quantize_absmax,
)
from .envelope import LossCurveEnvelope, Spread, loss_curve_envelope, spread
from .four_bit import FourBitLayout, FourBitWeight, dequantize_four_bit, four_bit_error_bound, quantize_four_bit
from .fp8 import Fp8Products
from .gptq import (
    GptqGrid,
    GptqWeight,
    ZeroPointConvention,
    dequantize_gptq,
    gptq_codes,
    gptq_error_bound,
    min_max_grid,
    pack_gptq,
    round_to_grid,
)
from .int8 import dequantize_int8_rows, int8_error_bound, quantize_int8_rows
from .llama import DropoutMasks, OracleLlama
from .lora import LoraScale, adapted_modules, lora_a_name, lora_b_name
from .microscaling import (
    MicroscalingFormat,
    MicroscalingWeight,
    dequantize_microscaling,
    microscaling_error_bound,
    quantize_microscaling,
)
from .mlx_affine import MlxAffineWeight, dequantize_mlx_affine, mlx_affine_error_bound, quantize_mlx_affine
from .roundoff import UNIT_ROUNDOFF, round_to_bfloat16
from .routing import Routing
from .shape import LlamaShape, MixtureShape
from .trainer import OracleStep, OracleTrainer, WindowGradients

__all__ = [
    "EXACT",
    "FP4",
    "IGNORE_LABEL",
    "NF4",
    "UNIT_ROUNDOFF",
    "Arithmetic",
    "Codec",
    "DropoutMasks",
    "ErrorScale",
    "ExactArithmetic",
    "FourBitCodec",
    "FourBitFormat",
    "FourBitLayout",
    "FourBitWeight",
    "Fp8Products",
    "GptqCodec",
    "GptqGrid",
    "GptqWeight",
    "Int8Codec",
    "LlamaShape",
    "LoraScale",
    "LossCurveEnvelope",
    "MagnitudeRecorder",
    "MicroscalingCodec",
    "MicroscalingFormat",
    "MicroscalingWeight",
    "MixtureShape",
    "MlxAffineCodec",
    "MlxAffineWeight",
    "OracleLlama",
    "OracleStep",
    "OracleTrainer",
    "QuantizedAbsmax",
    "RandomRounding",
    "Routing",
    "Spread",
    "StoredTensors",
    "TokenBatch",
    "UnquantizedCodec",
    "WindowGradients",
    "ZeroPointConvention",
    "absmax_error_bound",
    "adapted_modules",
    "dequantize_absmax",
    "dequantize_four_bit",
    "dequantize_gptq",
    "dequantize_int8_rows",
    "dequantize_microscaling",
    "dequantize_mlx_affine",
    "dynamic_8bit",
    "four_bit_error_bound",
    "gptq_codes",
    "gptq_error_bound",
    "int8_error_bound",
    "lora_a_name",
    "lora_b_name",
    "loss_curve_envelope",
    "microscaling_error_bound",
    "min_max_grid",
    "mlx_affine_error_bound",
    "pack_gptq",
    "quantize_absmax",
    "quantize_four_bit",
    "quantize_int8_rows",
    "quantize_microscaling",
    "quantize_mlx_affine",
    "read_shape",
    "round_to_bfloat16",
    "round_to_grid",
    "spread",
]
