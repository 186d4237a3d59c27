"""Quantization: grids, a registry of quantizers, the dequantized twin and what an update does to the codes."""

from mansu_tl.quantization.asymmetric import AsymmetricGrid
from mansu_tl.quantization.awq import Awq, awq
from mansu_tl.quantization.base import CalibratedQuantizer, Inputs, Quantizer
from mansu_tl.quantization.calibration import inputs_of
from mansu_tl.quantization.dither import Dither, dither
from mansu_tl.quantization.double import doubled
from mansu_tl.quantization.flips import predicted_flips
from mansu_tl.quantization.gptq import Gptq, gptq
from mansu_tl.quantization.grid import Encoded, Grid
from mansu_tl.quantization.registry import grid_of, quantizer, quantizers
from mansu_tl.quantization.statistics import UpdateStatistics, update_statistics
from mansu_tl.quantization.twin import quantize, quantized_values

__all__ = [
    "AsymmetricGrid",
    "Awq",
    "CalibratedQuantizer",
    "Dither",
    "Encoded",
    "Gptq",
    "Grid",
    "Inputs",
    "Quantizer",
    "UpdateStatistics",
    "awq",
    "dither",
    "doubled",
    "gptq",
    "grid_of",
    "inputs_of",
    "predicted_flips",
    "quantize",
    "quantized_values",
    "quantizer",
    "quantizers",
    "update_statistics",
]


def __dir__() -> list[str]:
    return sorted(__all__)
