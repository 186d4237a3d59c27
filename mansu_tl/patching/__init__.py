"""Activation patching (exact) and attribution patching of nodes (first order)."""

from mansu_tl.patching.nodes import NodeScores, node_attribution
from mansu_tl.patching.sweeps import PatchingResult, activation_patching

__all__ = ["NodeScores", "PatchingResult", "activation_patching", "node_attribution"]
