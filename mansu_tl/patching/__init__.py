"""Activation patching (exact) and attribution patching of nodes (first order)."""

from mansu_tl.patching.neurons import NeuronScores, neuron_attribution
from mansu_tl.patching.nodes import NodeScores, node_attribution
from mansu_tl.patching.sweeps import PatchingResult, activation_patching

__all__ = [
    "NeuronScores",
    "NodeScores",
    "PatchingResult",
    "activation_patching",
    "neuron_attribution",
    "node_attribution",
]


def __dir__() -> list[str]:
    return sorted(__all__)
