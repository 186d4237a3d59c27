"""Quantization: grids, a registry of quantizers, the dequantized twin and what an update does to the codes."""

from mansu_tl.quantization.asymmetric import AsymmetricGrid
from mansu_tl.quantization.calibration import inputs_of
from mansu_tl.quantization.dither import Dither, dither
from mansu_tl.quantization.formats.awq import Awq, awq
from mansu_tl.quantization.formats.gptq import Gptq, gptq
from mansu_tl.quantization.formats.grids import doubled
from mansu_tl.quantization.grid import Encoded, Grid, grid_of
from mansu_tl.quantization.quantizer import (
    About,
    CalibratedQuantizer,
    Inputs,
    Quantizer,
    quantizer,
    quantizer_table,
    quantizers,
    register_quantizer,
)
from mansu_tl.quantization.resting import RestingGrid, find_grid
from mansu_tl.quantization.statistics import UpdateStatistics, predicted_flips, update_statistics
from mansu_tl.quantization.twin import quantize, quantized_values

__all__ = [
    "About",
    "AsymmetricGrid",
    "Awq",
    "CalibratedQuantizer",
    "Dither",
    "Encoded",
    "Gptq",
    "Grid",
    "Inputs",
    "Quantizer",
    "RestingGrid",
    "UpdateStatistics",
    "awq",
    "dither",
    "doubled",
    "find_grid",
    "gptq",
    "grid_of",
    "inputs_of",
    "predicted_flips",
    "quantize",
    "quantized_values",
    "quantizer",
    "quantizer_table",
    "quantizers",
    "register_quantizer",
    "update_statistics",
]


def __dir__() -> list[str]:
    return sorted(__all__)
