"""Figures: result objects in, plotly figures out; nothing is computed here but where things are drawn."""

from mansu_tl.plots.attention import attention_patterns, attention_view
from mansu_tl.plots.circuit_graph import circuit
from mansu_tl.plots.circuit_layers import circuit_layers
from mansu_tl.plots.circuit_stages import circuit_stages
from mansu_tl.plots.curves import faithfulness_curves
from mansu_tl.plots.dither import dither
from mansu_tl.plots.divergences import circuit_divergence, divergence_scatter
from mansu_tl.plots.dumbbells import gap_matrix, ptq_gaps
from mansu_tl.plots.export import write_html, write_image, write_images, write_png
from mansu_tl.plots.frontier import frontier, pareto, sensitivity
from mansu_tl.plots.gaps import ptq_gap
from mansu_tl.plots.heatmaps import edge_matrix, patching
from mansu_tl.plots.histograms import bins
from mansu_tl.plots.layers import erasure_depth, probes
from mansu_tl.plots.methods import methods_table
from mansu_tl.plots.nodes import attribution_scatter, head_scores, node_scores, token_scores
from mansu_tl.plots.planes import divergence_by_layer, divergence_plane
from mansu_tl.plots.relearning import relearning
from mansu_tl.plots.ruler import ruler
from mansu_tl.plots.tables import certificate, scorecard

__all__ = [
    "attention_patterns",
    "attention_view",
    "attribution_scatter",
    "bins",
    "certificate",
    "circuit",
    "circuit_divergence",
    "circuit_layers",
    "circuit_stages",
    "dither",
    "divergence_by_layer",
    "divergence_plane",
    "divergence_scatter",
    "edge_matrix",
    "erasure_depth",
    "faithfulness_curves",
    "frontier",
    "gap_matrix",
    "head_scores",
    "methods_table",
    "node_scores",
    "pareto",
    "patching",
    "probes",
    "ptq_gap",
    "ptq_gaps",
    "relearning",
    "ruler",
    "scorecard",
    "sensitivity",
    "token_scores",
    "write_html",
    "write_image",
    "write_images",
    "write_png",
]


def __dir__() -> list[str]:
    return sorted(__all__)
