"""From a circuit to the weights that an edit may touch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, component_masks
from mansu_tl.patching.neurons import mean_effects
from mansu_tl.unlearning.masks import Masks


def circuit_weights(
    model: TransformerBridge,
    circuit: Circuit,
    pairs: PromptPairs,
    neuron_share: float,
    names: Collection[str] | None = None,
) -> Masks:
    """The linear weights of a circuit, as one mask per HF parameter.

    A head of the circuit brings its value and output slices (what it moves, not where it looks). An MLP brings the
    `neuron_share` of its neurons with the largest mean |attribution| on `pairs`: their input rows and output columns.

    Args:
        names: the parameters that are asked for; None = all.

    Raises:
        MansuError: the circuit has no head and no MLP, or a share outside (0, 1].
    """
    heads, mlps, count = parts_of(model, circuit.nodes, neuron_share)
    if names is not None:
        # Naming the neurons of every MLP takes longer than scoring them.
        slices = Anatomy.of(model).slices
        mlps = [node for node in mlps if any(piece.parameter in names for piece in slices(node))]
    scores = mean_effects(model, pairs)[0] if mlps else torch.empty(0)
    neurons = [f"{node}.N{i}" for node in mlps for i in scores[int(node[3:])].topk(count).indices.tolist()]
    return _masks(model, heads, neurons, names)


def random_weights(
    model: TransformerBridge,
    circuit: Circuit,
    neuron_share: float,
    seed: int,
    names: Collection[str] | None = None,
    *,
    matched: bool = False,
) -> Masks:
    """As many heads and neurons as `circuit_weights` takes, drawn from the whole model: the circuit's control.

    Args:
        names: as `circuit_weights`.
        matched: draw as many in every layer as it takes there, so that only the choice within a layer differs.

    Raises:
        MansuError: as `circuit_weights`.
    """
    heads, mlps, count = parts_of(model, circuit.nodes, neuron_share)
    sizes, generator = Anatomy.of(model), torch.Generator().manual_seed(seed)

    def drawn(whole: list[str], number: int) -> list[str]:
        return [whole[i] for i in torch.randperm(len(whole), generator=generator)[:number].tolist()]

    every = {i: [f"L{i}H{h}" for h in range(sizes.n_heads)] for i in range(sizes.n_layers)}
    neurons = {f"MLP{i}": [f"MLP{i}.N{n}" for n in range(sizes.d_mlp)] for i in range(sizes.n_layers)}
    if not matched:
        chosen = drawn(list(chain(*every.values())), len(heads))
        return _masks(model, chosen, drawn(list(chain(*neurons.values())), len(mlps) * count), names)
    per_layer = Counter(int(node[1:].partition("H")[0]) for node in heads)
    chosen = [node for layer, number in per_layer.items() for node in drawn(every[layer], number)]
    return _masks(model, chosen, [node for mlp in mlps for node in drawn(neurons[mlp], count)], names)


def parts_of(model: TransformerBridge, nodes: Sequence[str], neuron_share: float) -> tuple[list[str], list[str], int]:
    """A circuit's heads and MLPs, and how many neurons an MLP brings."""
    if not 0 < neuron_share <= 1:
        raise MansuError(f"mansu: neuron_share={neuron_share}; choose a share in (0, 1]")
    nodes = [node for node in nodes if node != "embed"]
    if not nodes:
        raise MansuError("circuit: it has no head and no MLP, so no weight can be edited; discover a larger one")
    heads, mlps = ([n for n in nodes if n.startswith("MLP") == mlp] for mlp in (False, True))
    return heads, mlps, max(1, round(neuron_share * Anatomy.of(model).d_mlp))


def _masks(model: TransformerBridge, heads: list[str], neurons: list[str], names: Collection[str] | None) -> Masks:
    """Value and output slices of the heads, rows and columns of the neurons."""
    sizes, parts = Anatomy.of(model), list(neurons)
    for node in heads:
        layer, head = (int(part) for part in node[1:].split("H"))
        parts += [f"{node}.o", f"L{layer}KV{head * sizes.n_kv_heads // sizes.n_heads}.v"]
    return component_masks(model, parts, names)
