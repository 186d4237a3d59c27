"""Figures: result objects in, plotly figures out; nothing is computed here but where things are drawn."""

from mansu_tl.plots.circuit_graph import circuit
from mansu_tl.plots.divergences import circuit_divergence, divergence_scatter
from mansu_tl.plots.export import write_html, write_image, write_images, write_png
from mansu_tl.plots.gaps import ptq_gap
from mansu_tl.plots.heatmaps import edge_matrix, patching
from mansu_tl.plots.histograms import bins
from mansu_tl.plots.tables import certificate, scorecard

__all__ = [
    "bins",
    "certificate",
    "circuit",
    "circuit_divergence",
    "divergence_scatter",
    "edge_matrix",
    "patching",
    "ptq_gap",
    "scorecard",
    "write_html",
    "write_image",
    "write_images",
    "write_png",
]
