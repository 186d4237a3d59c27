"""Edges: attribution, selection, exact edge patching, faithfulness."""

from mansu_tl.circuit.attribution import edge_attribution
from mansu_tl.circuit.circuit import Circuit, random_mask
from mansu_tl.circuit.discovery import discover_circuit, faithfulness, random_faithfulness
from mansu_tl.circuit.graph import Graph
from mansu_tl.circuit.intervention import patch_edges
from mansu_tl.circuit.scores import EdgeScores

__all__ = [
    "Circuit",
    "EdgeScores",
    "Graph",
    "discover_circuit",
    "edge_attribution",
    "faithfulness",
    "patch_edges",
    "random_faithfulness",
    "random_mask",
]
