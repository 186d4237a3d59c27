"""What MANSU fixes before the first step: candidates and their floor, budgets, references, retain statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.circuit import Circuit
from mansu_tl.data import Sequences, Task
from mansu_tl.data.contexts import behind_words
from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight, home, linear_weights, orient, parameters
from mansu_tl.models.tree import family, layer_of
from mansu_tl.models.widened import widened
from mansu_tl.patching.reading import read_layer, subject_share
from mansu_tl.quantization import grid_of
from mansu_tl.runs.values import Values, lent
from mansu_tl.unlearning.batches import Batch, Source
from mansu_tl.unlearning.mansu.candidates import circuit_weights, random_weights
from mansu_tl.unlearning.mansu.floor import Floor
from mansu_tl.unlearning.mansu.memory import require_fit_of_mansu
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.mansu.terms import Ignorance, ignorance, objective
from mansu_tl.unlearning.masks import Masks, every_weight
from mansu_tl.unlearning.retain_statistics import (
    diagonal_fisher,
    mixed_moments,
    near_neighbours,
    null_projector,
    sequence_loss,
    spread_out,
)


class View:
    """All parameters of the model under a change of its candidates."""

    def __init__(self, hf: PreTrainedModel, values: Values, linear: Mapping[str, LinearWeight], floor: Floor) -> None:
        self.hf, self.values, self.linear, self.floor = hf, values, linear, floor
        self._rounded: dict[tuple[str, int], Tensor] = {}

    def __call__(self, change: Float[Tensor, " weight"], under: int | None) -> Values:
        """As stored (None), or with every linear weight dequantized under one grid."""
        out, pieces = dict(self.values), self.floor.pieces(change)
        for name in self.linear if under is not None else pieces:
            if under is not None and (name, under) not in self._rounded:
                self._rounded[name, under] = self.rounded(name, under)
            base = None if under is None else self._rounded[name, under]
            out[name] = self.moved(name, pieces.get(name), base)
        return out

    def moved(
        self, name: str, piece: Float[Tensor, " _"] | None, base: Float[Tensor, "out in"] | None = None
    ) -> Float[Tensor, "rows columns"]:
        """One matrix, as the model has it, under a change of its candidates.

        Args:
            base: what is changed, as [out, in]; the matrix as stored where not given.
        """
        base = orient(self.values[name], self.linear[name]) if base is None else base
        return orient(base if piece is None else base + self.floor.spread(piece, name), self.linear[name])

    def rounded(self, name: str, under: int) -> Float[Tensor, "out in"]:
        """One matrix dequantized under one grid."""
        return self.floor.grids[under].of(name).roundtrip(orient(self.values[name], self.linear[name]).float())

    @contextmanager
    def deployed(self, change: Float[Tensor, " weight"], under: int) -> Iterator[None]:
        """Inside, passes of a model without gradients see what `view(change, under)` gives, a matrix at a time."""
        pieces = self.floor.pieces(change)
        with lent(self.hf, self.linear, lambda name: self.moved(name, pieces.get(name), self.rounded(name, under))):
            yield


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step."""

    hf: PreTrainedModel  # on the model's own matrices, in float32; used through `view`
    floor: Floor  # the weights that may be edited, and the rule under which they are
    view: View
    budget: int  # how many of them may be edited
    unknown: Ignorance
    facts: Int[Tensor, " pair"]  # the fact that each forget pair is about
    source: Source
    near_rows: list[int]  # rows of the retain text that count as near because the model finds them so
    sample: Sequences  # what the Fisher information and the retain bound are taken on
    moments: dict[str, Float[Tensor, "_ _"]]  # of the candidates' matrices' inputs
    projectors: dict[str, Float[Tensor, "_ _"]]  # onto the null spaces of those inputs
    importance: Float[Tensor, " weight"] | None  # diagonal Fisher information of each candidate
    layers: tuple[int, ...]  # whose MLPs take turns in the closed form
    data_parallel: bool  # whether text and forget prompts are shared out over processes

    @property
    def deployed_view(self) -> int | None:
        """The grid under which the model is looked at as deployed: what a file's own grid gives is what is stored (None)."""
        return None if self.floor.rule == "none" or self.floor.grids[0].given_scales else 0

    def between(self, change: Float[Tensor, " weight"]) -> Callable[[float], AbstractContextManager[Values]]:
        """The deployed model on the way from the original, at 0, to what a change makes of it, at 1; without gradients."""
        under = self.deployed_view

        @contextmanager
        def at(scale: float) -> Iterator[Values]:
            with nullcontext() if under is None else self.view.deployed(scale * change, under):
                yield self.view(scale * change, None) if under is None else {}

        return at


def plan(
    model: TransformerBridge,
    task: Task,
    settings: MansuSettings,
    circuit: Circuit,
    seed: int,
    *,
    data_parallel: bool = False,
    progress: bool,
) -> Plan:
    """Everything that an optimisation of MANSU reads.

    Args:
        data_parallel: share what is taken on retain text out over the processes of `torch.distributed`.

    Raises:
        MansuError: a budget that leaves nothing to edit, a circuit with no editable weight, never-seen prompts without
            spread, an attacker who leaves nothing to defend, or a retain text too small for its null space.
    """
    hf, linear, stored = widened(model), linear_weights(model), parameters(model)
    values = {name: value.detach() for name, value in hf.named_parameters()}
    task = task.to(home(hf))
    pairs = task.forget_pairs
    text = task.retain_text
    near = task.near_text
    facts = pairs.fact_numbers()
    settings.attacked_facts(int(facts.max()) + 1)  # refuses an attacker who leaves none to defend
    layers = closed_layers(subject_share(model, pairs), settings) if settings.solver == "closed" else ()
    names = _outputs(hf, layers) if layers else _within(hf, linear, settings.depth)
    choose: dict[str, Callable[[], Masks]] = {
        "circuit": lambda: circuit_weights(model, circuit, pairs, settings.neuron_share, names),
        "random": lambda: random_weights(model, circuit, settings.neuron_share, seed, names),
        "matched": lambda: random_weights(model, circuit, settings.neuron_share, seed, names, matched=True),
        "none": lambda: every_weight(model, names),
    }
    masks = choose[settings.restrict]()
    if layers and not masks:
        raise MansuError(
            f"circuit: none of its MLPs lies in layers {layers[0]} to {layers[-1]}, where the closed form edits; give a "
            'larger circuit, or solver="gradient"'
        )
    # Cells and codes are those of the weights as stored; the loop itself runs in float32.
    grids = [grid_of(name).bound(model) for name in settings.quantizers]
    matrices = {name: orient(stored[name].detach(), linear[name]).contiguous() for name in masks}
    oriented = {name: orient(mask, linear[name]) for name, mask in masks.items()}
    floor = Floor(grids, matrices, oriented, settings.floor, home(hf))
    budget = budget_of(linear, settings)
    # Without never-seen prompts the corrupt ones stand in, which are no longer there behind other words.
    corrupt = Sequences(pairs.corrupt, pairs.lengths) if pairs.corruption is None else task.unseen
    unseen = task.unseen if len(task.unseen) or not settings.contexts else corrupt
    if settings.contexts:
        pairs = behind_words(model, pairs, settings.contexts)
        facts = pairs.fact_numbers()
    unknown = ignorance(hf, pairs, unseen)
    if settings.representation_weight and not bool((unknown.spread > 0).all()):
        raise MansuError(
            f"unseen: {len(task.unseen)} never-seen prompts have no spread to measure distances in; give two, or "
            "representation_weight=0"
        )
    sample = spread_out(text.joined(near), settings.fisher_sequences)
    near_rows: list[int] = []
    if settings.discover_near and not len(near):
        near_rows = near_neighbours(hf, pairs, text, settings.discover_near).tolist()
        near = text[near_rows]
    _require_near(settings, bool(len(near)))
    # The closed form compares nothing with what the original says of a text.
    asked = 0 if layers else settings.steps * settings.retain_batch * (1 + bool(len(near)))
    source = Source(hf, values, pairs, text, near, asked)
    if 0 < settings.candidates * budget < floor.size:
        chosen = _most_wanted(
            View(hf, values, linear, floor), source, unknown, settings, round(settings.candidates * budget)
        )
        floor = Floor(grids, matrices, chosen, settings.floor, home(hf))
        masks = {name: orient(mask, linear[name]) for name, mask in chosen.items()}
    moments = {}
    if settings.null_space or settings.projector:
        moments = mixed_moments(
            hf, masks, text, near, settings.near_weight, behind_norms=bool(layers), data_parallel=data_parallel
        )
    projected = moments if settings.projector else {}
    projectors = {name: null_projector(each, settings.leak, name) for name, each in projected.items()}
    importance = None
    if settings.fisher:
        fisher = diagonal_fisher(hf, masks, sample, data_parallel=data_parallel, progress=progress)
        importance = floor.gathered({name: orient(value, linear[name]) for name, value in fisher.items()})
    return Plan(
        hf=hf,
        floor=floor,
        view=View(hf, values, linear, floor),
        budget=budget,
        unknown=unknown,
        facts=facts,
        source=source,
        near_rows=near_rows,
        sample=sample,
        moments=moments,
        projectors=projectors,
        importance=importance,
        layers=layers,
        data_parallel=data_parallel,
    )


def closed_layers(share: Float[Tensor, " layer"], settings: MansuSettings) -> tuple[int, ...]:
    """The layers whose MLPs take turns: up to a share of the way to the layer that reads the subject."""
    last = int(settings.until * read_layer(share))
    return tuple(range(max(0, last - settings.layers + 1), last + 1))


def _within(hf: PreTrainedModel, linear: Mapping[str, LinearWeight], depth: float) -> tuple[str, ...]:
    """The linear weights of the first layers, as a share of all."""
    layers = {name: layer_of(hf, name) for name in linear}
    end = max(1, round(depth * (1 + max(layer for layer in layers.values() if layer is not None))))
    return tuple(name for name, layer in layers.items() if layer is not None and layer < end)


def _outputs(hf: PreTrainedModel, layers: Sequence[int]) -> tuple[str, ...]:
    """The output matrices of the MLPs of some layers."""
    kind = family(hf)
    return tuple(f"{kind.layers}.{layer}.{kind.down}.weight" for layer in layers)


def _most_wanted(
    view: View, source: Source, unknown: Ignorance, settings: MansuSettings, count: int
) -> dict[str, Bool[Tensor, "out in"]]:
    """The candidates whose move by one bin changes the forget loss most at the start, to first order, and the near text's
    likelihood least (`contrast`)."""
    floor, forget = view.floor, objective(settings, unknown).forget
    latent = torch.zeros(floor.size, requires_grad=True, device=floor.value.device)
    everywhere = torch.ones_like(latent, dtype=torch.bool)
    slope = torch.zeros_like(latent)
    for rows in torch.arange(len(source.pairs)).split(settings.forget_batch):
        change, _ = floor.change(latent, everywhere, None)
        loss = forget(Batch(source, view(change, None), rows, torch.empty(0, dtype=torch.long), 0))
        (part,) = torch.autograd.grad(loss, latent)
        slope += part * len(rows)
    wanted = slope.abs() / slope.abs().mean()
    if settings.contrast:
        near = source.text.text[source.n_far if source.n_near else 0 :]
        felt = torch.zeros_like(latent)
        for batch in torch.arange(len(near)).split(settings.forget_batch):
            change, _ = floor.change(latent, everywhere, None)
            loss = sequence_loss(source.model, view(change, None), near[batch])
            (part,) = torch.autograd.grad(loss, latent)
            felt += part * len(batch)
        wanted = wanted - settings.contrast * felt.abs() / felt.abs().mean()
    kept = torch.zeros_like(everywhere)
    kept[wanted.topk(count).indices] = True
    masks = {}
    for name, piece in floor.pieces(kept).items():
        matrix = floor.matrices[name]
        flags = torch.zeros(matrix.numel(), dtype=torch.bool, device=matrix.device)
        flags[floor.where[name][piece.to(matrix.device)]] = True
        if piece.any():
            masks[name] = flags.view(matrix.shape)
    return masks


def mansu_needs(model: TransformerBridge, task: Task, settings: MansuSettings) -> Iterator[tuple[str, str]]:
    """What will stop a run ("wrong"), or may ("warning"), and the way out."""
    linear = linear_weights(model)
    for require in (
        lambda: [grid_of(name).bound(model) for name in settings.quantizers],
        lambda: budget_of(linear, settings),
        lambda: settings.attacked_facts(len(set(task.forget_pairs.facts))),
        lambda: _require_near(settings, bool(len(task.near_text)) or settings.discover_near > 0),
        lambda: behind_words(model, task.forget_pairs, settings.contexts) if settings.contexts else None,
    ):
        try:
            require()
        except MansuError as error:
            yield "wrong", str(error)
    try:
        require_fit_of_mansu(model, task, settings)
    except MansuError as error:
        yield "warning", f"{error}; a circuit of few parts needs less"
    rows = zip(task.unseen.tokens.tolist(), task.unseen.lengths.tolist(), strict=True)
    if settings.representation_weight and len({tuple(row[:length]) for row, length in rows}) == 1:
        yield (
            "wrong",
            "unseen: one never-seen prompt has no spread to measure distances in; give two, or representation_weight=0",
        )
    tokens, widths = int(task.retain_text.lengths.sum()), [weight.in_features for weight in linear.values()]
    if (settings.null_space or settings.projector) and tokens < max(widths):
        yield (
            "wrong" if tokens < min(widths) else "warning",
            f"retain text: {tokens} tokens, the widest matrix has {max(widths)} inputs; give at least as many tokens, or "
            "switch the null space off (null_space=0, projector=False)",
        )


def _require_near(settings: MansuSettings, there: bool) -> None:
    """Refuse an attacker on near text where there is none."""
    if settings.adversary_weight and "near" in settings.attackers and not there:
        raise MansuError(
            'mansu: adversary_kinds has "near", and there is no near text; give the task some, raise discover_near, or leave '
            "the kind out"
        )


def budget_of(linear: Mapping[str, LinearWeight], settings: MansuSettings) -> int:
    """How many weights may be edited; refused where it is none."""
    total = sum(weight.in_features * weight.out_features for weight in linear.values())
    budget = int(settings.budget * total)
    if budget < 1:
        raise MansuError(f"mansu: budget={settings.budget} of {total} weights leaves nothing to edit; raise it")
    return budget
