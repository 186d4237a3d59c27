"""One edit, measured in every way, as tidy rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, discover_circuit
from mansu_tl.comparison.plan import Comparison
from mansu_tl.data import Task
from mansu_tl.data.sources import load_task
from mansu_tl.data.split import split_questions
from mansu_tl.models import load
from mansu_tl.quantization import quantize, quantizers, update_statistics
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.runs.metrics import Accuracy, accuracy
from mansu_tl.unlearning import Edit, floored
from mansu_tl.verification import (
    Attack,
    CircuitScores,
    Relearning,
    RelearningCurve,
    attack_splits,
    circuit_divergence,
    circuit_scores,
    compare_relearning,
    damage,
    erasure_depth,
    probe,
    unrelated_attack,
)

COLUMNS = ("quantizer", "measure", "value", "low", "high", "control")
_SETS = ("forget", "forget_paraphrase", "retain", "retain_paraphrase", "near", "near_paraphrase")
_KINDS = ("MC", "cloze", "log-odds")
NEVER = "never"
NAN = float("nan")


class Ground:
    """What all edits of one base are measured against; computed once, when first needed.

    Args:
        plan: the comparison.
        base: the model's name.
    """

    def __init__(self, plan: Comparison, base: str) -> None:
        self.plan, self.base = plan, base
        self.model: TransformerBridge = load(base)
        task = load_task(plan.task, tokenizer=self.model)
        self.validation, self.task = split_questions(task)
        self._quantized: dict[str, dict[str, Accuracy]] = {}
        self._noise: dict[str, float] = {}

    @cached_property
    def circuit(self) -> Circuit:
        """The forget circuit."""
        return discover_circuit(self.model, self.task.forget_pairs)

    @cached_property
    def scores(self) -> CircuitScores:
        """The base's own circuit scores."""
        return circuit_scores(self.model, self.circuit, self.task.forget_pairs)

    @cached_property
    def never(self) -> TransformerBridge:
        """The model that never learnt the forget facts."""
        return load(self.plan.never)

    @cached_property
    def attacks(self) -> tuple[Attack, ...]:
        """What attackers have: few forget facts, or unrelated text."""
        few = attack_splits(self.task, splits=self.plan.attack_splits, seed=self.plan.attack_seed)
        return (*few, unrelated_attack(self.task))

    @cached_property
    def reference(self) -> tuple[RelearningCurve, ...]:
        """The never-trained model under those attacks."""
        return self.attacked(self.never, NEVER)

    def attacked(self, model: TransformerBridge, label: str) -> tuple[RelearningCurve, ...]:
        """A model's relearning curves."""
        return compare_relearning(
            {label: model}, self.attacks, learning_rates=self.plan.attack_rates, steps=self.plan.attack_steps,
            ask_at=(0, self.plan.attack_steps),
        ).curves  # fmt: skip

    def answers(self, name: str) -> dict[str, Accuracy]:
        """The base's answers under a quantizer ("" = full precision)."""
        if name not in self._quantized:
            self._quantized[name] = answers(self.deployed(self.model, name), self.task)
        return self._quantized[name]

    def noise(self, name: str) -> float:
        """CAD of the un-edited base under a quantizer."""
        if name not in self._noise:
            other = self.deployed(self.model, name)
            pairs = self.task.forget_pairs
            self._noise[name] = circuit_divergence(self.scores, other, self.circuit, pairs).value
        return self._noise[name]

    def deployed(self, model: TransformerBridge, name: str) -> TransformerBridge:
        """The model under a quantizer."""
        return quantize(model, name, self.task.retain_text) if name else model


def answers(model: TransformerBridge, task: Task) -> dict[str, Accuracy]:
    """The model's answers to the question sets that are reported."""
    return {name: accuracy(model, task.questions[name]) for name in _SETS if name in task.questions}


def measure(ground: Ground, edit: Edit, names: Sequence[str], *, evidence: bool) -> pd.DataFrame:
    """Everything about one edit.

    Args:
        names: quantizers.
        evidence: also probes, depth and damage.
    """
    edited = edit.apply(ground.model)
    rows = list(_size(ground, edit))
    after = answers(edited, ground.task)
    rows += _accuracies(ground.answers(""), after, "")
    for name in names:
        deployed = ground.deployed(edited, name)
        q_after = answers(deployed, ground.task)
        rows += _accuracies(ground.answers(name), q_after, name)
        rows += _gaps(after, q_after, ground.answers(""), ground.answers(name), name)
        cad = circuit_divergence(ground.scores, deployed, ground.circuit, ground.task.forget_pairs)
        rows.append((name, "CAD", cad.value, *cad.interval, ground.noise(name)))
        rows.append((name, "mass loss", cad.mass_loss, *cad.mass_interval, NAN))
        if name in quantizers("grid"):
            rows += _statistics(ground.model, edited, name)
    plain = circuit_divergence(ground.scores, edited, ground.circuit, ground.task.forget_pairs)
    rows.append(("", "CAD", plain.value, *plain.interval, 0.0))
    if ground.plan.never:
        rows += _relearning(ground, edited, "")
        if floored(edit.method):
            rows += _relearning(ground, ground.deployed(edited, names[0]), names[0])
        if evidence:
            rows += _evidence(ground, edited)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measure_base(ground: Ground, names: Sequence[str]) -> pd.DataFrame:
    """The un-edited base, as the method "original": what every number starts from."""
    rows: list[tuple[object, ...]] = []
    for name in ("forget", "forget_paraphrase"):
        if name in ground.task.questions:
            rows.append(("", f"{_words(name)} MC, chance", ground.task.questions[name].chance, NAN, NAN, NAN))
    for name in ("", *names):
        rows += _accuracies(ground.answers(""), ground.answers(name), name)
        if name:
            rows += _gaps(ground.answers(""), ground.answers(name), ground.answers(""), ground.answers(name), name)
            rows.append((name, "CAD", ground.noise(name), NAN, NAN, 0.0))
    if ground.plan.never:
        rows += _relearning(ground, ground.model, "")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measure_never(ground: Ground) -> pd.DataFrame:
    """The never-trained model, as the method "never"."""
    rows = list(_accuracies(ground.answers(""), answers(ground.never, ground.task), ""))
    cad = circuit_divergence(ground.scores, ground.never, ground.circuit, ground.task.forget_pairs)
    rows.append(("", "CAD", cad.value, *cad.interval, 0.0))
    table = Relearning(ground.reference)
    for kind, word in (("multiple_choice", "MC"), ("cloze", "cloze")):
        for row in table.summary(kind).itertuples():
            name = f"relearning {word}, {row.kind}, lr {row.learning_rate:g}"
            over = (row.excess, row.excess_low, row.excess_high)
            rows += [("", f"{name}, excess over prior", *over, NAN), ("", name, row.value, NAN, NAN, NAN)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _accuracies(
    before: dict[str, Accuracy], after: dict[str, Accuracy], quantizer: str
) -> Iterator[tuple[object, ...]]:
    for name in after:
        for kind in _KINDS:
            hits, base = _hits(after[name], kind), _hits(before[name], kind)
            row = _mean(hits, after[name].facts)
            yield (quantizer, f"{_words(name)} {kind}", *row, base.mean().item())
            if not name.startswith("forget"):
                yield (quantizer, f"{_words(name)} {kind} drop", *_mean(base - hits, after[name].facts), 0.0)


def _gaps(
    before: dict[str, Accuracy], after: dict[str, Accuracy], base_before: dict[str, Accuracy],
    base_after: dict[str, Accuracy], quantizer: str,
) -> Iterator[tuple[object, ...]]:  # fmt: skip
    for name in ("forget", "forget_paraphrase"):
        if name in after:
            for kind in _KINDS:
                gap = _hits(after[name], kind) - _hits(before[name], kind)
                base = _hits(base_after[name], kind) - _hits(base_before[name], kind)
                label = f"PTQ gap, {_words(name)} {kind}"
                yield (quantizer, label, *_mean(gap, after[name].facts), base.mean().item())


def _size(ground: Ground, edit: Edit) -> Iterator[tuple[object, ...]]:
    yield ("", "edited linear weights, %", 100 * edit.linear_share(ground.model), NAN, NAN, NAN)
    for key in ("retain_increase_measured", "retain_increase_fisher", "retain_increase_bound"):
        if key in edit.facts:
            yield ("", f"{key.replace('_', ' ')}, nats", edit.facts[key], NAN, NAN, NAN)


def _statistics(model: TransformerBridge, edited: TransformerBridge, name: str) -> Iterator[tuple[object, ...]]:
    total = update_statistics(model, edited, name).to_dataframe().iloc[-1]
    flipped = total.codes_changed + total.untouched_codes_changed
    yield (name, "codes changed, % of all", 100 * flipped / total.weights, NAN, NAN, NAN)
    yield (name, "codes changed, % of edited", 100 * total.share, NAN, NAN, 100 * total.predicted_share)
    yield (name, "bin width / update, median", total.median_ratio, NAN, NAN, NAN)
    yield (name, "fidelity cos(dQ, d)", total.cosine, NAN, NAN, NAN)
    yield (name, "projection <dQ, d> / <d, d>", total.projection, NAN, NAN, NAN)


def _relearning(ground: Ground, model: TransformerBridge, quantizer: str) -> Iterator[tuple[object, ...]]:
    mine = ground.attacked(model, "edited")
    table = Relearning((*mine, *ground.reference), NEVER)
    for kind in ("multiple_choice", "cloze"):
        frame = table.summary(kind)
        for row in frame[frame["label"] == "edited"].itertuples():
            name = f"relearning {'MC' if kind == 'multiple_choice' else 'cloze'}, {row.kind}, lr {row.learning_rate:g}"
            over = (row.over_reference, row.over_reference_low, row.over_reference_high)
            yield (quantizer, f"{name}, excess over never", *over, row.reference_excess)
            yield (quantizer, f"{name}, excess over prior", row.excess, row.excess_low, row.excess_high, NAN)
            yield (quantizer, name, row.value, NAN, NAN, NAN)


def _evidence(ground: Ground, edited: TransformerBridge) -> Iterator[tuple[object, ...]]:
    task = ground.task
    near = task.questions.get("near")
    found = probe(edited, task.questions["forget"], also_train=near)
    base = probe(ground.never, task.questions["forget"], also_train=near)
    for i, layer in enumerate(found.layers):
        hits, control = found.right[i].double(), base.right[i].double()
        row = _mean(100 * hits, found.facts)
        yield ("", f"probe MC at {layer}", *row, 100 * control.mean().item())
    depth = erasure_depth(ground.model, edited, ground.never, task.forget_pairs)
    yield ("", "erasure depth", depth.value, *depth.interval, 1.0)
    audit = damage(ground.model, edited, {"retain": task.retain_text})
    for row in audit.loss.itertuples():
        yield ("", f"loss rise, {row.text} text, nats", row.rise, row.rise_low, row.rise_high, 0.0)


def _hits(found: Accuracy, kind: str) -> Float[Tensor, " question"]:
    if kind == "log-odds":
        return found.log_odds.double()
    return 100 * (found.multiple_choice if kind == "MC" else found.cloze).double()


def _mean(values: Tensor, facts: tuple[str, ...]) -> tuple[float, float, float]:
    return (values.double().mean().item(), *interval_over_facts(values.double(), facts))


def _words(name: str) -> str:
    return name.replace("forget_paraphrase", "forget held-out").replace("_paraphrase", " held-out")
