"""What MANSU holds in memory beside the model, counted from shapes before anything of it is made. Our definition.

Counted is what is there at the same time in the fullest moment. Temporary tensors of a pass come on top.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Sequences, Task
from mansu_tl.models import Anatomy, home, linear_weights, parameters
from mansu_tl.models.limits import require_room
from mansu_tl.models.tree import family
from mansu_tl.quantization import grid_of
from mansu_tl.unlearning.mansu.candidates import parts_of
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.retain_statistics import MOST_LOGITS

# Bytes a candidate: where it is, value and width; scale and code under a grid; the updates with gradient and Adam's memory,
# and what their way to the weights keeps; all that the search for moves holds of one matrix's candidates, and in every view.
_FLAT, _GRID, _TRAINED, _SEARCHED, _VIEWED = 16, 5, 40, 40, 68
# Tokens of the longest opening that is put in front of a prompt, about.
_OPENING = 6
# Numbers that a layer keeps of a token for the pass back, in widths of the stream and of the MLP.
_STREAMS, _MLPS = 16, 4


@dataclass(frozen=True)
class Needs:
    """Bytes by what they are for."""

    embeddings: float  # in float32, of a model in 16 bits
    candidates: float
    moments: float
    work: float  # of the fullest stage: a pass with its gradients, the moves of a matrix, logits

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def require_fit_of_mansu(
    model: TransformerBridge, task: Task, settings: MansuSettings, circuit: Circuit | None = None
) -> None:
    """Refuse a run that finds no room, before anything of it is made.

    Args:
        circuit: as `mansu_memory`.

    Raises:
        MansuError: it needs more than is free; it says how much, for what, and what to lower.
    """
    needs = mansu_memory(model, task, settings, circuit)
    parts = ", ".join(f"{what} {size / 1e9:.3g}" for what, size in sorted(vars(needs).items(), key=lambda kv: -kv[1]))
    lower = f"lower neuron_share (now {settings.neuron_share})"
    lower += f" or layers (now {settings.layers})" if settings.solver == "closed" else ', or choose solver="closed"'
    # A matrix's moments live where it does, the rest where tokens go in.
    need = Counter({home(model): int(needs.total - needs.moments)}) + _moments(model, circuit, settings)
    bytes_at = {place: float(size) for place, size in need.items()}
    require_room("mansu: beside the model it needs", bytes_at, f"{lower}, or make room", f" ({parts})")


def mansu_memory(
    model: TransformerBridge, task: Task, settings: MansuSettings, circuit: Circuit | None = None
) -> Needs:
    """What a run holds beside the model.

    Args:
        circuit: None = of every head and MLP.
    """
    linear, live, anatomy = linear_weights(model), parameters(model), Anatomy.of(model)
    closed, grids = settings.solver == "closed", len(settings.quantizers)
    sizes = {name: weight.in_features * weight.out_features for name, weight in linear.items()}
    counts = _candidates(model, circuit, settings)
    count, dense = sum(counts.values()), 4.0 * sum(sizes[name] for name in counts)
    # A head of its own is a matrix like the others; one that is the embedding too goes by the embedding's name.
    shared = {*linear, f"{family(model).head}.weight"}
    narrow = (value for name, value in live.items() if name not in shared and value.element_size() < 4)
    moments = float(_moments(model, circuit, settings).total())
    text, vocab = task.retain_text, model.cfg.d_vocab
    prompts = min(settings.forget_batch, len(task.forget_pairs) * (1 + settings.contexts))
    width = task.forget_pairs.clean.shape[1] + _OPENING * (settings.contexts > 0)
    logits = 12.0 * min(MOST_LOGITS, int(text.lengths.sum()) * vocab)
    if closed:
        views = 1 + sum(not grid_of(name).given_scales for name in settings.quantizers)
        search = (_SEARCHED + _VIEWED * views) * max(counts.values(), default=0) + dense
        stages = [_graph(anatomy, prompts, width) + 16.0 * prompts * vocab, search, logits]
        stages += [moments] * bool(len(task.near_text))
    else:
        rows = settings.retain_batch * (1 + bool(len(task.near_text)))
        step = _graph(anatomy, prompts, width) + _graph(anatomy, rows, _mean_length(text))
        step += 16.0 * (prompts + rows * _mean_length(text)) * vocab + _TRAINED * count + dense
        step += 2 * dense * bool(settings.null_space) + 24.0 * sum(sizes.values()) * bool(settings.adversary_weight)
        stages = [step + 4.0 * grids * sum(sizes.values()) * (settings.floor == "loop"), logits]
    per_weight = _FLAT + _GRID * grids + 4 * settings.fisher + 5 * closed
    return Needs(4.0 * sum(value.numel() for value in narrow), float(per_weight * count), moments, max(stages))


def _moments(model: TransformerBridge, circuit: Circuit | None, settings: MansuSettings) -> Counter[torch.device]:
    """What the second moments of the candidates' matrices' inputs take, by device."""
    linear, live, sizes = linear_weights(model), parameters(model), Counter[torch.device]()
    if settings.null_space or settings.projector:
        for name in _candidates(model, circuit, settings):
            sizes[live[name].device] += 4 * linear[name].in_features ** 2
    return sizes


def _candidates(model: TransformerBridge, circuit: Circuit | None, settings: MansuSettings) -> Counter[str]:
    """How many weights of each matrix may be edited, those that carry their block's scale included."""
    linear, anatomy, live = linear_weights(model), Anatomy.of(model), parameters(model)
    counts: Counter[str] = Counter()
    if settings.restrict == "none":
        counts.update({name: weight.in_features * weight.out_features for name, weight in linear.items()})
    else:
        heads, mlps, neurons = parts_of(
            model, anatomy.writers if circuit is None else circuit.nodes, settings.neuron_share
        )
        shares = {f"{head}.o": 1.0 for head in heads} | dict.fromkeys(mlps, neurons / anatomy.d_mlp)
        for head in heads:
            layer, number = (int(part) for part in head[1:].split("H"))
            shares[f"L{layer}KV{number * anatomy.n_kv_heads // anatomy.n_heads}.v"] = 1.0
        for component, share in shares.items():
            for piece in (piece for piece in anatomy.slices(component) if piece.parameter in linear):
                shape = live[piece.parameter].shape
                counts[piece.parameter] += int(share * (piece.stop - piece.start) * shape.numel() / shape[piece.dim])
    if settings.solver != "closed":
        return counts
    written = {piece.parameter for i in anatomy.layers for piece in anatomy.slices(f"MLP{i}.N0")[-1:]}
    outputs = [(name, counts[name]) for name in counts if name in written]
    return Counter(dict(sorted(outputs, key=lambda each: -each[1])[: settings.layers]))


def _graph(anatomy: Anatomy, rows: int, width: int) -> float:
    """What a pass keeps for its way back."""
    token = _STREAMS * anatomy.d_model + _MLPS * anatomy.d_mlp + 2 * anatomy.n_heads * width
    return 4.0 * rows * width * anatomy.n_layers * token


def _mean_length(text: Sequences) -> int:
    return -(-int(text.lengths.sum()) // len(text))
