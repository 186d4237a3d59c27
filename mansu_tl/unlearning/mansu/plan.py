"""What MANSU fixes before the first step: candidates and their floor, budgets, references, retain statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.circuit import Circuit
from mansu_tl.data import Sequences, Task
from mansu_tl.errors import MansuError
from mansu_tl.models import LinearWeight, float32_copy, home, linear_weights, orient, parameters
from mansu_tl.quantization import grid_of
from mansu_tl.unlearning.batches import Source
from mansu_tl.unlearning.forward import Values, joined
from mansu_tl.unlearning.mansu.adversary import require_defended
from mansu_tl.unlearning.mansu.candidates import circuit_weights, random_weights
from mansu_tl.unlearning.mansu.floor import Floor
from mansu_tl.unlearning.mansu.settings import MansuSettings
from mansu_tl.unlearning.mansu.terms import Ignorance, ignorance
from mansu_tl.unlearning.masks import Masks, every_weight
from mansu_tl.unlearning.retain_statistics import (
    diagonal_fisher,
    input_moments,
    near_neighbours,
    null_projector,
    require_null_space,
)


class View:
    """All parameters of the model under a change of its candidates."""

    def __init__(self, values: Values, linear: Mapping[str, LinearWeight], floor: Floor) -> None:
        self.values, self.linear, self.floor = values, linear, floor
        self._rounded: dict[tuple[str, int], Tensor] = {}

    def __call__(self, change: Float[Tensor, " weight"], under: int | None) -> Values:
        """As stored (None), or with every linear weight dequantized under one grid."""
        out, spans = dict(self.values), self.floor.spans
        for name in self.linear if under is not None else spans:
            base = self._deployed(name, under)
            full = base + self.floor.spread(change, name) if name in spans else base
            out[name] = orient(full, self.linear[name])
        return out

    def _deployed(self, name: str, under: int | None) -> Float[Tensor, "out in"]:
        """The matrix before the change."""
        if under is None:
            return orient(self.values[name], self.linear[name])
        if (name, under) not in self._rounded:
            self._rounded[name, under] = self.floor.grids[under].roundtrip(self.floor.matrices[name].float())
        return self._rounded[name, under]


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first step."""

    hf: PreTrainedModel  # a float32 copy, used through `view`
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


def plan(
    model: TransformerBridge, task: Task, settings: MansuSettings, circuit: Circuit, seed: int, *, progress: bool
) -> Plan:
    """Everything that an optimisation of MANSU reads.

    Raises:
        MansuError: a budget that leaves nothing to edit, a circuit with no editable weight, never-seen prompts without
            spread, an attacker who leaves nothing to defend, or a retain text too small for its null space.
    """
    hf, linear, stored = float32_copy(model), linear_weights(model), parameters(model)
    task, values = task.to(home(hf)), {name: value.detach() for name, value in hf.named_parameters()}
    masks = _candidates(model, task, settings, circuit, seed)
    # Cells and codes are those of the weights as stored; the loop itself runs in float32.
    floor = Floor(
        [grid_of(name) for name in settings.quantizers],
        {name: orient(stored[name].detach(), weight).contiguous() for name, weight in linear.items()},
        {name: orient(mask, linear[name]) for name, mask in masks.items()},
        settings.floor,
    )
    budget = budget_of(linear, settings)
    unknown = ignorance(hf, task)
    if settings.representation_weight and not bool((unknown.spread > 0).all()):
        raise MansuError(
            f"unseen: {len(task.unseen)} never-seen prompts have no spread to measure distances in; give two, or "
            "representation_weight=0"
        )
    facts = require_defended(task, settings)
    near, near_rows = _near(hf, task, settings)
    asked = settings.steps * settings.retain_batch * (1 + bool(len(near)))
    source = Source(hf, values, task.forget_pairs, task.retain_text, near, asked)
    moments = _moments(hf, masks, task.retain_text, near, settings) if settings.null_space or settings.projector else {}
    projected = moments if settings.projector else {}
    projectors = {name: null_projector(each, settings.leak, name) for name, each in projected.items()}
    sample = _spread_out(joined(task.retain_text, task.near_text), settings.fisher_sequences)
    importance = None
    if settings.fisher:
        fisher = diagonal_fisher(hf, masks, sample, progress=progress)
        importance = floor.gathered({name: orient(value, linear[name]) for name, value in fisher.items()})
    return Plan(
        hf=hf,
        floor=floor,
        view=View(values, linear, floor),
        budget=budget,
        unknown=unknown,
        facts=facts,
        source=source,
        near_rows=near_rows,
        sample=sample,
        moments=moments,
        projectors=projectors,
        importance=importance,
    )


def _candidates(model: TransformerBridge, task: Task, settings: MansuSettings, circuit: Circuit, seed: int) -> Masks:
    choose: dict[str, Callable[[], Masks]] = {
        "circuit": lambda: circuit_weights(model, circuit, task.forget_pairs, settings.neuron_share),
        "random": lambda: random_weights(model, circuit, settings.neuron_share, seed),
        "none": lambda: every_weight(model),
    }
    return choose[settings.restrict]()


def _near(hf: PreTrainedModel, task: Task, settings: MansuSettings) -> tuple[Sequences, list[int]]:
    """The near text: the task's, or what the model finds near in the retain text, and those rows."""
    if len(task.near_text) or not settings.discover_near:
        return task.near_text, []
    rows = near_neighbours(hf, task.forget_pairs, task.retain_text, settings.discover_near)
    return task.retain_text[rows], rows.tolist()


def _moments(
    hf: PreTrainedModel, names: Masks, text: Sequences, near: Sequences, settings: MansuSettings
) -> dict[str, Float[Tensor, "_ _"]]:
    far_moments = input_moments(hf, names, text)
    require_null_space(text, far_moments)
    if not len(near):
        return far_moments
    near_moments, weight = input_moments(hf, names, near), settings.near_weight
    return {name: (far + weight * near_moments[name]) / (1 + weight) for name, far in far_moments.items()}


def _spread_out(text: Sequences, most: int) -> Sequences:
    count = min(most, len(text))
    return text[[i * len(text) // count for i in range(count)]]


def mansu_needs(model: TransformerBridge, task: Task, settings: MansuSettings) -> Iterator[tuple[str, str]]:
    """What will stop a run ("wrong"), or may ("warning"), and the way out."""
    linear = linear_weights(model)
    for require in (
        lambda: [grid_of(name) for name in settings.quantizers],
        lambda: budget_of(linear, settings),
        lambda: require_defended(task, settings),
    ):
        try:
            require()
        except MansuError as error:
            yield "wrong", str(error)
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


def budget_of(linear: Mapping[str, LinearWeight], settings: MansuSettings) -> int:
    """How many weights may be edited; refused where it is none."""
    total = sum(weight.in_features * weight.out_features for weight in linear.values())
    budget = int(settings.budget * total)
    if budget < 1:
        raise MansuError(f"mansu: budget={settings.budget} of {total} weights leaves nothing to edit; raise it")
    return budget
