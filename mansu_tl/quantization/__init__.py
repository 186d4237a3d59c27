"""Quantization: grids, a registry of quantizers, the dequantized twin and what an update does to the codes."""

from mansu_tl.quantization.grid import Encoded, Grid
from mansu_tl.quantization.registry import quantizer, quantizers
from mansu_tl.quantization.statistics import UpdateStatistics, update_statistics
from mansu_tl.quantization.twin import orient, quantize, quantized_values

__all__ = [
    "Encoded",
    "Grid",
    "UpdateStatistics",
    "orient",
    "quantize",
    "quantized_values",
    "quantizer",
    "quantizers",
    "update_statistics",
]
