"""Features that a backend declares and a device may lack: asked with a drawn model of one layer."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.subject import Subject
from qlora_hal_oracle.random_models import SHAPES, draw_tensors, write_model, write_quantized


def with_device_features(subject: Subject) -> Subject:
    """The subject, told which of its declared features this device lacks. One is: products in 8-bit floats."""
    asked = {Feature.FP8_PRODUCTS: Compute("bfloat16", fp8_products=True)}
    declared = [feature for feature in asked if subject.declares(feature)]
    return replace(subject, lacking=frozenset(f for f in declared if not _loads(subject, asked[f])))


def _loads(subject: Subject, compute: Compute) -> bool:
    """False where loading is refused by an UnsupportedFeatureError. Another error is no answer: it counts as served."""
    shape = replace(SHAPES[0], num_hidden_layers=1)
    tensors = draw_tensors(shape, np.random.default_rng(0))
    stored_as = subject.main_format
    quantization = Quantization(stored_as, subject.default_block(stored_as))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder) / "model"
        if stored_as is WeightFormat.NONE or subject.declares(Feature.QUANTIZE_ON_LOAD):
            model = write_model(place, shape, tensors)
        else:
            model = write_quantized(place, shape, tensors, quantization)
        trainer = subject.open()
        try:
            trainer.load(ModelSource.in_folder(model.folder), quantization, compute)
        except UnsupportedFeatureError:
            return False
        except Exception:
            return True
        finally:
            trainer.close()
    return True
