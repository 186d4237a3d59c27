"""MANSU in closed form: what the facts' subjects are to be turned into, and the code moves that do it, layer by layer.

Below the layer that reads the subject, MLPs write what is known of it onto the subject's own tokens. A shift of the stream
there is sought under which the model answers as for a subject it never saw; that is the only part that takes gradients of
the model. Then the output matrices of the MLPs below take turns: each is to write its part of what is still missing, for
the inputs it has on those tokens, and the same as before for the retain text's inputs. That is least squares in whole
steps across the floor's boundaries, solved by `best_moves`. After MEMIT (arXiv 2210.07229), with the retain moments in
its place, on a quantizer's codes; our definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from mansu_tl.runs.depth import Known, above, known
from mansu_tl.runs.norms import norm_factor, norm_weight
from mansu_tl.runs.values import Values, by_length, watched
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

    def on(self, values: Float[Tensor, "row pos _"]) -> Float[Tensor, "spot _"]:
        """What stands there, in float32 and where the tokens live, wherever the layer does."""
        at = self.rows.to(values.device), self.places.to(values.device)
        return values[at].float().to(self.rows.device)


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
    # What enters the layer whose turn it is, in every view: no later turn changes it, so layers below are not run again.
    below: dict[int | None, Known] = {}
    for i, layer in enumerate(tqdm(layers, "moves", unit="layer", disable=not progress)):
        name = names[layer]
        # One matrix at a time: what is known of all candidates' levels is many times the model.
        part, span = fixed.floor.part(name), fixed.floor.spans[name]
        levels, most = _Levels.of(part), (fixed.budget - moved) // (len(layers) - i)
        seen = [_seen_in(fixed, view, latent, values, spots, name, (layer, layers[-1]), below) for view in levels.views]
        # Every view asks for what it still misses, so what rounding does to the weights that stay is made up for too.
        missing = torch.stack([(wanted - each.stream) / (len(layers) - i) for each in seen])
        levels_moved, row = _solved(fixed, settings, levels, name, seen, missing, most)
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
            self.base = _stream(fixed.hf, fixed.source.original, fixed.source.pairs, spots, layer)
        self.own = torch.arange(len(fixed.source.pairs), device=self.base.device)
        if fixed.data_parallel:
            self.own = self.own[distributed.share(len(self.own))]
        groups = by_length(fixed.source.pairs.lengths[self.own]) if len(self.own) else []
        # The layers below see no shift: they are run once.
        self.parts = [
            self._begun(self.own[part], layer)
            for group in groups
            for part in group.to(self.own.device).split(settings.forget_batch)
        ]
        self.size = self.base.norm(dim=-1).mean()

    @torch.no_grad()
    def _begun(self, rows: Int[Tensor, " row"], layer: int) -> tuple[Batch, Known]:
        """Some prompts, and what the model makes of them below the shift."""
        none, source = torch.empty(0, dtype=torch.long), self.fixed.source
        batch = Batch(source, source.original, rows, none, 0, cut=True)
        return batch, known(source.model, source.original, batch.forget.clean, layer)

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
        source, shared, shift = self.fixed.source, self.fixed.data_parallel, self.shift
        total, count = shift.new_zeros(()), len(source.places(torch.arange(len(source.pairs))))
        if shared:
            # A process without a prompt takes part in the gradient too.
            shift = distributed.of_all(shift)
            total = 0 * shift.sum()
        for batch, below in self.parts:
            spot, row, place = self.spots.of(batch.rows)
            with above(source.model, below), _added(self.block, row, place, shift[spot]):
                # A batch keeps what it has found; this one is run again at every step.
                part = self.forget(replace(batch))
            total = total + part * len(source.places(batch.rows)) / count
        total = distributed.over_all(total) if shared else total
        norm = (self.shift.norm(dim=-1) / self.size).square().mean()
        if step % 10 == 0 or step == self.steps - 1:
            self.history.append({"step": float(step), "forget": total.item(), "shift": norm.sqrt().item()})
        return total + self.settings.shift_weight * norm


@dataclass(frozen=True)
class _Seen:
    """What passes on the subject's tokens."""

    # Of the matrix, each multiplied by the share of `typical` that a norm behind the matrix multiplies its output by.
    inputs: Float[Tensor, "spot d_in"]
    typical: float  # that of these tokens; 1 without a norm
    scale: Float[Tensor, " d_model"]  # what a unit of its output is in the stream at a typical token
    stream: Float[Tensor, "spot d_model"]  # behind the last edited layer


@contextmanager
def _added(
    block: nn.Module, rows: Int[Tensor, " spot"], places: Int[Tensor, " spot"], shift: Float[Tensor, "spot d_model"]
) -> Iterator[None]:
    """Inside, a shift is added to what a block gives out at some tokens."""

    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        at = rows.to(stream.device), places.to(stream.device)
        stream = stream.index_put(at, shift.to(stream), accumulate=True)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    with block.register_forward_hook(add):
        yield


def _stream(
    hf: PreTrainedModel, values: Values, pairs: PromptPairs, spots: _Spots, layer: int
) -> Float[Tensor, "spot d_model"]:
    """What a layer gives out on the subject's tokens."""
    return spots.on(known(hf, values, pairs.clean, layer).stream)


def _seen_in(
    fixed: Plan,
    view: int | None,
    latent: Float[Tensor, " weight"],
    values: Values,
    spots: _Spots,
    name: str,
    layers: tuple[int, int],
    below: dict[int | None, Known],
) -> _Seen:
    """What passes as stored (None) or under one grid, where some candidates have moved.

    Args:
        layers: the one whose turn it is, and the last.
        below: what enters the layer of the turn before, by view; brought up to this one.
    """
    hf, pairs = fixed.hf, fixed.source.pairs
    with ExitStack() as inside, torch.no_grad():
        if view is not None:
            change, _ = fixed.floor.change(latent, torch.ones_like(latent, dtype=torch.bool), view)
            inside.enter_context(fixed.view.deployed(change, view))
            values = fixed.source.original
        if layers[0]:
            with above(hf, below[view]) if view in below else nullcontext():
                below[view] = known(hf, values, pairs.clean, layers[0] - 1)
            inside.enter_context(above(hf, below[view]))
        return _seen(hf, values, pairs, spots, name, layers[1])


def _seen(hf: PreTrainedModel, values: Values, pairs: PromptPairs, spots: _Spots, name: str, last: int) -> _Seen:
    kept, norm, factor = list[Tensor](), norm_weight(hf, name), norm_factor(hf, name)

    def see(key: str, entered: Tensor, left: Tensor) -> None:
        kept.extend(spots.on(each) for each in (entered, left))

    with watched(hf, [name], see):
        stream = _stream(hf, values, pairs, spots, last)
    inputs, left = kept
    if norm is None or factor is None:
        return _Seen(inputs, 1.0, torch.ones_like(stream[0]), stream)
    by = factor(left)
    typical = float(by.square().mean().sqrt())
    scale = (values[norm].float().to(stream.device) + family(hf).norm_offset) * typical
    return _Seen(inputs * (by / typical), typical, scale, stream)


@dataclass(frozen=True)
class _Levels:
    """How far a matrix's candidate moves in every view when it is sent some bins up or down.

    A view is the model as stored (None) or under one of the grids; a file's own grid gives what is stored.
    """

    views: tuple[int | None, ...]
    steps: Float[Tensor, "view level weight"]
    bins: Int[Tensor, "level weight"]

    @classmethod
    def of(cls, floor: Floor) -> _Levels:
        """A level that would not change every grid's code goes on to the next one that does."""
        views = [None, *(i for i, grid in enumerate(floor.grids) if not grid.given_scales)]
        steps, bins = [], []
        every = torch.ones_like(floor.value, dtype=torch.bool)
        for bin_ in range(-_LEVELS, _LEVELS + 1):
            latent = torch.full_like(floor.value, float(bin_))
            steps.append(torch.stack([floor.change(latent, every, view)[0] for view in views]))
            bins.append(torch.full_like(floor.code, bin_, dtype=torch.int8))
        for side in (1, -1):
            for at in range(_LEVELS - 1, 0, -1):
                here, beyond = _LEVELS + side * at, _LEVELS + side * (at + 1)
                idle = (steps[here] == 0).all(0)
                steps[here] = torch.where(idle, steps[beyond], steps[here])
                bins[here] = torch.where(idle, bins[beyond], bins[here])
        return cls(tuple(views), torch.stack(steps, 1), torch.stack(bins))

    def latents(self, levels: Int[Tensor, " weight"]) -> Float[Tensor, " weight"]:
        """The updates, in bins, of candidates at these levels."""
        return self.bins.gather(0, levels[None] + _LEVELS)[0].float()


def _solved(
    fixed: Plan,
    settings: MansuSettings,
    levels: _Levels,
    name: str,
    seen: Sequence[_Seen],
    missing: Float[Tensor, "view spot d_out"],
    most: int,
) -> tuple[Int[Tensor, " _"], dict[str, float]]:
    """The levels of one matrix's candidates, and what they come to.

    Gains and what is held are counted in the stream: an output that a norm behind the matrix mutes is not asked for what it
    cannot give, and a token whose output the norm multiplies by much is held by as much.

    Args:
        seen: what passes on the subject's tokens, in every view.
    """
    floor, moment = fixed.floor, fixed.moments.get(name)
    before, span = floor.matrices[name], floor.spans[name]
    rows, width = before.shape
    # Solved where the flat vectors live, whatever layer it is.
    where = floor.where[name].to(floor.device)
    moment = None if moment is None else moment.to(floor.device)
    columns, column = (where % width).unique(return_inverse=True)
    at = (where // width) * len(columns) + column

    def dense(flat: Float[Tensor, "*any weight"]) -> Float[Tensor, "*any d_out d_in"]:
        out = flat.new_zeros((*flat.shape[:-1], rows * len(columns)))
        return out.index_copy(-1, at, flat).unflatten(-1, (rows, len(columns)))

    x = torch.stack([each.inputs for each in seen])[..., columns]
    curvature = x.mT @ x / x.shape[1]
    if moment is not None:
        held = moment[columns][:, columns]
        for own, each in zip(curvature, seen, strict=True):
            own.add_(settings.null_space / each.typical**2 * held)
    worth, steps = None, dense(levels.steps)
    steps.mul_(torch.stack([each.scale for each in seen])[:, None, :, None])
    if fixed.importance is not None:
        # A move costs half of F d^2; those that cost as much as is typical of the matrix are worth half.
        cost = (fixed.importance[span] * levels.steps[0, _LEVELS + 1].square()).sqrt()
        worth = dense(1 / (1 + cost / cost.mean().clamp_min(1e-30)))
    wanted, least = missing.mT @ x / x.shape[1], settings.least_gain * float(missing.square().mean())
    moves = best_moves(steps, curvature, wanted, least, worth, most)
    change = steps.gather(1, (moves + _LEVELS).expand(len(steps), 1, -1, -1))[:, 0]
    row = {
        "edited": float((moves != 0).sum()),
        "missing": float((x @ change.mT - missing).square().sum() / missing.square().sum()),
    }
    if moment is not None:
        before = before.float().to(floor.device)
        # The move itself, not what a norm makes of it.
        reached = (moves.flatten()[at] + _LEVELS).expand(len(steps), 1, -1)
        change = dense(levels.steps.gather(1, reached)[:, 0])
        leak = ((change @ moment[columns][:, columns]) * change).sum() / len(change)
        row["leak"] = float(leak / ((before @ moment) * before).sum())
    return moves.flatten()[at], row
