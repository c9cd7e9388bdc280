"""Quantization: a declarative spec, observers, fake quantization and the one-line int8 recipe."""

from graphopt.passes.quantize.correct_bias import CorrectBias
from graphopt.passes.quantize.equalize_weights import EqualizeWeights
from graphopt.passes.quantize.insert_fake_quant import InsertFakeQuant
from graphopt.passes.quantize.quantize import Quantize
from graphopt.passes.quantize.spec import ActivationSpec, Override, QuantizationSpec, WeightSpec

__all__ = [
    "ActivationSpec",
    "CorrectBias",
    "EqualizeWeights",
    "InsertFakeQuant",
    "Override",
    "QuantizationSpec",
    "Quantize",
    "WeightSpec",
]
