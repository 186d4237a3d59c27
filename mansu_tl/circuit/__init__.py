"""Edges: attribution, selection, exact edge patching, evaluation of circuits."""

from mansu_tl.circuit.attribution import edge_attribution
from mansu_tl.circuit.circuit import Circuit
from mansu_tl.circuit.curve import FaithfulnessCurve, faithfulness_curve
from mansu_tl.circuit.discovery import discover_circuit
from mansu_tl.circuit.evaluation import Minimality, completeness, faithfulness, minimality, random_faithfulness
from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.intervention import patch_edges, patched_logits
from mansu_tl.circuit.overlap import Conflict, conflict
from mansu_tl.circuit.paths import PathEffects, path_patching
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.circuit.selection import random_mask
from mansu_tl.circuit.transformer_lens_io import node_scores_from_transformer_lens, node_scores_to_transformer_lens

__all__ = [
    "Circuit",
    "Conflict",
    "EdgeScores",
    "FaithfulnessCurve",
    "Graph",
    "Minimality",
    "PathEffects",
    "completeness",
    "conflict",
    "discover_circuit",
    "edge_attribution",
    "faithfulness",
    "faithfulness_curve",
    "minimality",
    "node_scores_from_transformer_lens",
    "node_scores_to_transformer_lens",
    "patch_edges",
    "patched_logits",
    "path_patching",
    "random_faithfulness",
    "random_mask",
]


def __dir__() -> list[str]:
    return sorted(__all__)
