"""From a circuit to the weights that an edit may touch."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, component_masks
from mansu_tl.patching.neurons import neuron_attribution
from mansu_tl.unlearning.masks import Masks


def circuit_weights(model: TransformerBridge, circuit: Circuit, pairs: PromptPairs, neuron_share: float) -> Masks:
    """The linear weights of a circuit, as one mask per HF parameter.

    A head of the circuit brings its value and output slices (what it moves, not where it looks). An MLP brings the
    `neuron_share` of its neurons with the largest mean |attribution| on `pairs`: their input rows and output columns.

    Raises:
        MansuError: the circuit has no head and no MLP, or a share outside (0, 1].
    """
    _require_share(neuron_share)
    cmap = Anatomy.of(model)
    heads, mlps = _parts(circuit)
    neurons: list[str] = []
    if mlps:
        scores = neuron_attribution(model, pairs).tensor
        for node in mlps:
            top = scores[int(node[3:])].topk(_count(cmap, neuron_share)).indices.tolist()
            neurons += [f"{node}.N{i}" for i in top]
    return _masks(model, cmap, heads, neurons)


def random_weights(model: TransformerBridge, circuit: Circuit, neuron_share: float, seed: int) -> Masks:
    """As many heads and neurons as `circuit_weights` takes, drawn from the whole model: the circuit's control.

    Raises:
        MansuError: as `circuit_weights`.
    """
    _require_share(neuron_share)
    cmap, generator = Anatomy.of(model), torch.Generator().manual_seed(seed)
    heads, mlps = _parts(circuit)
    every = [f"L{i}H{h}" for i in range(cmap.n_layers) for h in range(cmap.n_heads)]
    drawn = torch.randperm(len(every), generator=generator)[: len(heads)].tolist()
    count = len(mlps) * _count(cmap, neuron_share)
    neurons = torch.randperm(cmap.n_layers * cmap.d_mlp, generator=generator)[:count].tolist()
    return _masks(model, cmap, [every[i] for i in drawn], [f"MLP{i // cmap.d_mlp}.N{i % cmap.d_mlp}" for i in neurons])


def _parts(circuit: Circuit) -> tuple[list[str], list[str]]:
    """The circuit's heads and MLPs."""
    nodes = [node for node in circuit.nodes if node != "embed"]
    if not nodes:
        raise MansuError("circuit: it has no head and no MLP, so no weight can be edited; discover a larger one")
    return [n for n in nodes if not n.startswith("MLP")], [n for n in nodes if n.startswith("MLP")]


def _require_share(neuron_share: float) -> None:
    if not 0 < neuron_share <= 1:
        raise MansuError(f"mansu: neuron_share={neuron_share}; choose a share in (0, 1]")


def _count(cmap: Anatomy, neuron_share: float) -> int:
    return max(1, round(neuron_share * cmap.d_mlp))


def _masks(model: TransformerBridge, cmap: Anatomy, heads: list[str], neurons: list[str]) -> Masks:
    """Value and output slices of the heads, rows and columns of the neurons."""
    group, names = cmap.n_heads // cmap.n_kv_heads, list(neurons)
    for node in heads:
        layer, head = (int(part) for part in node[1:].split("H"))
        names += [f"{node}.o", f"L{layer}KV{head // group}.v"]
    return component_masks(model, names)
