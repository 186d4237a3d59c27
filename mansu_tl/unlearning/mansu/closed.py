"""MANSU in closed form: what the facts' subjects are to be turned into, and the code moves that do it, layer by layer.

Below the layer that reads the subject, MLPs write what is known of it onto the subject's own tokens. A shift of the stream
there is sought under which the model answers as for a subject it never saw; that is the only part that takes gradients of
the model. Then the output matrices of the MLPs below take turns: each is to write its part of what is still missing, for
the inputs it has on those tokens, and the same as before for the retain text's inputs. That is least squares in whole
steps across the floor's boundaries, solved by `best_moves`. After MEMIT (arXiv 2210.07229), with the retain moments in
its place, on a quantizer's codes; our definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs
from mansu_tl.models.tree import family, submodule
from mansu_tl.patching.reading import subject_tokens
from mansu_tl.runs import distributed
from mansu_tl.runs.values import Values, last_token_logits, watched
from mansu_tl.unlearning.batches import Batch
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.loop import Solver, run
from mansu_tl.unlearning.mansu.floor import Floor
from mansu_tl.unlearning.mansu.moves import best_moves
from mansu_tl.unlearning.mansu.plan import Plan
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.mansu.terms import objective

# How many bins a weight may move in either direction.
_LEVELS = 3


@dataclass(frozen=True)
class _Spots:
    """The subject's tokens of all forget prompts, one after another."""

    rows: Int[Tensor, " spot"]
    places: Int[Tensor, " spot"]

    def of(self, rows: Int[Tensor, " row"]) -> tuple[Int[Tensor, " _"], Int[Tensor, " _"], Int[Tensor, " _"]]:
        """Which of the spots lie in these prompts, in which of them, and where."""
        spot, row = (self.rows[:, None] == rows[None]).nonzero(as_tuple=True)
        return spot, row, self.places[spot]


def closed_form(
    fixed: Plan, settings: MansuSettings, seed: int, checkpoint: Checkpoint, *, progress: bool = False
) -> tuple[Float[Tensor, " weight"], list[dict[str, float]]]:
    """The updates of the candidates, in bins, and a row for every logged step and every layer.

    Raises:
        NoEditError: the loss is not finite.
    """
    rows, places = subject_tokens(fixed.source.pairs).nonzero(as_tuple=True)
    kind = family(fixed.hf)
    # Only layers of which the circuit has the MLP.
    names = {layer: f"{kind.layers}.{layer}.{kind.down}.weight" for layer in fixed.layers}
    layers = [layer for layer, name in names.items() if name in fixed.floor.spans]
    spots = _Spots(rows, places)
    shift = _Shift(fixed, settings, seed, spots, layers[-1])
    run(shift, checkpoint, progress=progress)
    history = list(shift.history)
    latent, values, moved = torch.zeros_like(fixed.floor.value), dict(fixed.source.original), 0
    wanted = shift.base + shift.shift.detach()
    for i, layer in enumerate(tqdm(layers, "moves", unit="layer", disable=not progress)):
        name = names[layer]
        seen = _seen(fixed.hf, values, fixed.source.pairs, spots, name, layers[-1])
        missing = (wanted - seen.stream) / (len(layers) - i)
        if kind.mlp_post_norm is not None:
            missing = missing / seen.through
        # One matrix at a time: what is known of all candidates' levels is many times the model.
        part, span = fixed.floor.part(name), fixed.floor.spans[name]
        levels, most = _Levels.of(part), (fixed.budget - moved) // (len(layers) - i)
        levels_moved, row = _solved(fixed, settings, levels, name, seen.inputs, missing, most)
        latent[span] = levels.latents(levels_moved)
        change, _ = part.change(latent[span], torch.ones_like(latent[span], dtype=torch.bool), None)
        values[name], moved = fixed.view.moved(name, change), moved + int((latent[span] != 0).sum())
        history.append({"layer": float(layer), **row})
    return latent, history


class _Shift(Solver):
    """What is added to the stream on the subject's tokens, so that the answers become those of ignorance."""

    method = "mansu"

    def __init__(self, fixed: Plan, settings: MansuSettings, seed: int, spots: _Spots, layer: int) -> None:
        self.fixed, self.settings, self.seed, self.spots = fixed, settings, seed, spots
        self.steps, self.learning_rate = settings.steps, settings.learning_rate
        self.block = submodule(fixed.hf, f"{family(fixed.hf).layers}.{layer}")
        self.forget = objective(settings, fixed.unknown).forget
        with torch.no_grad():
            self.base = _stream(fixed.hf, fixed.source.original, fixed.source.pairs, spots, self.block)
        self.size = self.base.norm(dim=-1).mean()

    def restart(self) -> None:
        shift = torch.zeros_like(self.base, requires_grad=True)
        self.start(self.seed, {"shift": shift}, torch.optim.Adam([shift]))
        self.samplers = ()

    @property
    def shift(self) -> Float[Tensor, "spot d_model"]:
        """The shift."""
        return self.trained["shift"]

    def rate(self, step: int) -> float:
        # In shares of a typical entry of the stream.
        return self.learning_rate * float(self.size) / self.base.shape[1] ** 0.5

    def loss(self, step: int) -> Float[Tensor, ""]:
        source, none, shared = self.fixed.source, torch.empty(0, dtype=torch.long), self.fixed.data_parallel
        every, shift = torch.arange(len(source.pairs), device=self.shift.device), self.shift
        own, total, count = every, shift.new_zeros(()), len(source.places(every))
        if shared:
            # A process without a prompt takes part in the gradient too.
            shift = distributed.of_all(shift)
            own, total = every[distributed.share(len(every))], 0 * shift.sum()
        for rows in own.split(self.settings.forget_batch) if len(own) else ():
            spot, row, place = self.spots.of(rows)
            with _added(self.block, row, place, shift[spot]):
                part = self.forget(Batch(source, source.original, rows, none, 0))
            total = total + part * len(source.places(rows)) / count
        total = distributed.over_all(total) if shared else total
        norm = (self.shift.norm(dim=-1) / self.size).square().mean()
        if step % 10 == 0 or step == self.steps - 1:
            self.history.append({"step": float(step), "forget": total.item(), "shift": norm.sqrt().item()})
        return total + self.settings.shift_weight * norm


@dataclass(frozen=True)
class _Seen:
    """What passes on the subject's tokens."""

    inputs: Float[Tensor, "spot d_in"]  # of the matrix
    through: Float[Tensor, "spot d_model"]  # what a norm behind it multiplies its output by; 1 without one
    stream: Float[Tensor, "spot d_model"]  # behind the last edited layer


@contextmanager
def _added(
    block: nn.Module, rows: Int[Tensor, " spot"], places: Int[Tensor, " spot"], shift: Float[Tensor, "spot d_model"]
) -> Iterator[None]:
    """Inside, a shift is added to what a block gives out at some tokens."""

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        stream = stream.index_put((rows, places), shift.to(stream.dtype), accumulate=True)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    with block.register_forward_hook(add):
        yield


def _stream(
    hf: PreTrainedModel, values: Values, pairs: PromptPairs, spots: _Spots, block: nn.Module
) -> Float[Tensor, "spot d_model"]:
    """What a block gives out on the subject's tokens."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        kept.append(stream[spots.rows, spots.places].float())

    with block.register_forward_hook(keep):
        last_token_logits(hf, values, pairs.clean, pairs.lengths)
    return kept[0]


@torch.no_grad()
def _seen(hf: PreTrainedModel, values: Values, pairs: PromptPairs, spots: _Spots, name: str, last: int) -> _Seen:
    kind, kept = family(hf), dict[str, Tensor]()
    layer, path = name.removesuffix(f".{kind.down}.weight"), kind.mlp_post_norm

    def see(key: str, entered: Tensor, left: Tensor) -> None:
        kept[f"{key} in"], kept[f"{key} out"] = (each[spots.rows, spots.places].float() for each in (entered, left))

    norm = f"{layer}.{path}.weight" if path else None
    with watched(hf, [name, *([norm] if norm else [])], see):
        stream = _stream(hf, values, pairs, spots, submodule(hf, f"{kind.layers}.{last}"))
    through = torch.ones_like(stream)
    if norm is not None:
        scale = values[norm].float() + kind.norm_offset
        bare = kept[f"{norm} in"] * scale
        through = scale * kept[f"{norm} out"].norm(dim=-1, keepdim=True) / bare.norm(dim=-1, keepdim=True)
        # An output that the norm all but mutes is not asked for what it cannot give.
        through = through.sign() * through.abs().clamp_min(0.05 * through.abs().mean())
    return _Seen(kept[f"{name} in"], through, stream)


@dataclass(frozen=True)
class _Levels:
    """How far a matrix's candidate moves, as stored and as deployed in the mean, when it is sent some bins up or down."""

    steps: Float[Tensor, "level weight"]
    bins: Int[Tensor, "level weight"]

    @classmethod
    def of(cls, floor: Floor) -> _Levels:
        """A level that would not change every grid's code goes on to the next one that does."""
        steps, bins = [], []
        for bin_ in range(-_LEVELS, _LEVELS + 1):
            latent = torch.full_like(floor.value, float(bin_))
            felt = [floor.realise(latent, under=i) for i in range(len(floor.grids))]
            steps.append(torch.stack([(stored + rounded) / 2 for stored, rounded, _ in felt]).mean(0))
            bins.append(torch.full_like(floor.code, bin_, dtype=torch.int8))
        for side in (1, -1):
            for at in range(_LEVELS - 1, 0, -1):
                here, beyond = _LEVELS + side * at, _LEVELS + side * (at + 1)
                idle = steps[here] == 0
                steps[here] = torch.where(idle, steps[beyond], steps[here])
                bins[here] = torch.where(idle, bins[beyond], bins[here])
        return cls(torch.stack(steps), torch.stack(bins))

    def latents(self, levels: Int[Tensor, " weight"]) -> Float[Tensor, " weight"]:
        """The updates, in bins, of candidates at these levels."""
        return self.bins.gather(0, levels[None] + _LEVELS)[0].float()


def _solved(
    fixed: Plan,
    settings: MansuSettings,
    levels: _Levels,
    name: str,
    inputs: Float[Tensor, "spot d_in"],
    missing: Float[Tensor, "spot d_out"],
    most: int,
) -> tuple[Int[Tensor, " _"], dict[str, float]]:
    """The levels of one matrix's candidates, and what they come to."""
    floor, moment = fixed.floor, fixed.moments.get(name)
    (rows, width), where, span = floor.matrices[name].shape, floor.where[name], floor.spans[name]
    columns, column = (where % width).unique(return_inverse=True)
    at = (where // width) * len(columns) + column

    def dense(flat: Float[Tensor, "*level weight"]) -> Float[Tensor, "*level d_out d_in"]:
        out = flat.new_zeros((*flat.shape[:-1], rows * len(columns)))
        return out.index_copy(-1, at, flat).unflatten(-1, (rows, len(columns)))

    x = inputs[:, columns]
    curvature = x.T @ x / len(x)
    if moment is not None:
        curvature = curvature + settings.null_space * moment[columns][:, columns]
    worth = None
    if fixed.importance is not None:
        # A move costs half of F d^2; those that cost as much as is typical of the matrix are worth half.
        cost = (fixed.importance[span] * levels.steps[_LEVELS + 1].square()).sqrt()
        worth = dense(1 / (1 + cost / cost.mean().clamp_min(1e-30)))
    steps = dense(levels.steps)
    moves = best_moves(
        steps,
        curvature,
        missing.T @ x / len(x),
        settings.least_gain * float(missing.square().mean()),
        worth,
        most,
    )
    change = steps.gather(0, (moves + _LEVELS)[None])[0]
    row = {
        "edited": float((moves != 0).sum()),
        "missing": float((x @ change.T - missing).square().sum() / missing.square().sum()),
    }
    if moment is not None:
        before = floor.matrices[name].float()
        leak = ((change @ moment[columns][:, columns]) * change).sum() / ((before @ moment) * before).sum()
        row["leak"] = float(leak)
    return moves.flatten()[at], row
