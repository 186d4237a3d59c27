"""Figures: result objects in, plotly figures and pandas tables out; nothing is computed here but where things are drawn.

Every function takes `title` (plain text, instead of its own) and `theme` ("light" or "dark").
"""

from mansu_tl.plots.budgets import relearning_budgets
from mansu_tl.plots.circuit_graph import circuit
from mansu_tl.plots.circuit_views import circuit_layers, circuit_stages
from mansu_tl.plots.curves import erasure_depth, faithfulness_curves, probes, relearning
from mansu_tl.plots.depth import cad_by_depth, cad_by_depth_draws, grafting
from mansu_tl.plots.divergences import circuit_divergence, divergence_by_layer, divergence_plane
from mansu_tl.plots.export import write_html, write_image, write_images
from mansu_tl.plots.frontier import frontier, pareto, sensitivity
from mansu_tl.plots.gaps import gap_matrix, ptq_gap
from mansu_tl.plots.heatmaps import (
    attention_patterns,
    attention_view,
    direct_logit_attribution,
    edge_matrix,
    head_scores,
    patching,
    token_scores,
)
from mansu_tl.plots.lens import logit_lens
from mansu_tl.plots.returns import comes_back
from mansu_tl.plots.ruler import ruler
from mansu_tl.plots.scatters import attribution_scatter, divergence_scatter, node_scores
from mansu_tl.plots.tables import certificate, methods_table, scorecard
from mansu_tl.plots.updates import bins, dither

__all__ = [
    "attention_patterns", "attention_view", "attribution_scatter", "bins", "cad_by_depth", "cad_by_depth_draws",
    "certificate", "circuit", "circuit_divergence", "circuit_layers", "circuit_stages", "comes_back",
    "direct_logit_attribution", "dither", "divergence_by_layer", "divergence_plane", "divergence_scatter", "edge_matrix",
    "erasure_depth", "faithfulness_curves", "frontier", "gap_matrix", "grafting", "head_scores", "logit_lens",
    "methods_table", "node_scores", "pareto", "patching", "probes", "ptq_gap", "relearning", "relearning_budgets", "ruler",
    "scorecard", "sensitivity", "token_scores", "write_html", "write_image", "write_images",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
