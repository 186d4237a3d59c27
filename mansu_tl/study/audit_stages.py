"""An audit's stages: each is a file of tidy rows, made by the study's measures, and a key of what they were made from.

`KINDS` is all of them, in the order in which they are run. A further one is a function that yields `Stage`s, and an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit, discover_circuit
from mansu_tl.errors import MansuError
from mansu_tl.models import parameters
from mansu_tl.quantization import quantizers
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.results.store import Store
from mansu_tl.study.audit_inputs import Inputs
from mansu_tl.study.audit_plan import AuditPlan, Work, asked_tokens, attack_work, tokens_of
from mansu_tl.study.measures import (
    attack_curves,
    chance_rows,
    code_rows,
    depth_rows,
    prior_rows,
    probe_rows,
    probes_of,
    relearning_rows,
    size_rows,
    text_rows,
)
from mansu_tl.study.plan import NEVER, ORIGINAL
from mansu_tl.unlearning import Edit
from mansu_tl.verification import (
    CadByDepth,
    ErasureDepth,
    Probes,
    Relearning,
    RelearningCurve,
    Subject,
    damage,
    erasure_depth,
)
from mansu_tl.verification.extraction import leak_at_k
from mansu_tl.verification.generation import Written, written
from mansu_tl.verification.measurement import (
    COLUMNS,
    DEPTH_ROWS,
    SETS,
    Measured,
    answer_rows,
    circuit_rows,
    percent,
    structure_rows,
)
from mansu_tl.verification.probes import FITS

UNLEARNED, OVER_NEVER = "unlearned", " over never trained"
# Whose rows these are, and the rows.
Rows = Iterable[tuple[str, Measured]]


SAMPLES = 32
LEAKED = f"leak@{SAMPLES} above a wrong option"


@dataclass(frozen=True)
class Stage:
    """One file of an audit.

    Attributes:
        name: of the file, below `stages/`.
        what: in words, for the plan.
        make: gives its rows.
        work: what they cost.
        key: what they are made from beside the models and the task.
    """

    name: str
    what: str
    make: Callable[[], Rows]
    work: Work
    key: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class Bench:
    """Two models and a task with what several stages read; everything is made when it is first asked for.

    Args:
        inputs: what is compared.
        plan: what is looked at.
        folder: where it is kept.
    """

    def __init__(self, inputs: Inputs, plan: AuditPlan, folder: Path) -> None:
        self.inputs, self.plan, self.task, self.seed = inputs, plan, inputs.task, plan.seed
        self.store = Store(folder)
        self.never = inputs.never
        self.marks = {role: mark for role, mark in inputs.marks.items() if role != "never"}

    @cached_property
    def original(self) -> Subject:
        """The original, in full precision and under every format."""
        return Subject(self.inputs.original, self.task, None, steps=self.plan.steps)

    @cached_property
    def unlearned(self) -> Subject:
        """The model that was unlearned, likewise."""
        return Subject(self.inputs.unlearned, self.task, None, steps=self.plan.steps)

    @cached_property
    def edit(self) -> Edit:
        """What was changed."""
        return Edit.between(self.inputs.original, dict(parameters(self.inputs.unlearned)), UNLEARNED)

    @cached_property
    def circuit(self) -> Circuit:
        """The forget circuit of the original."""
        model, plan = self.inputs.original, self.plan
        key = {"model": self.marks["original"], "task": self.marks["task"], "steps": plan.steps}
        return self.store.result(
            "circuit", Circuit, {**key, "faithfulness": plan.faithfulness},
            lambda: discover_circuit(
                model, self.task.forget_pairs, faithfulness=plan.faithfulness, steps=plan.steps
            ),
        )  # fmt: skip

    def on_circuit(self) -> tuple[Subject, Subject]:
        """Original and unlearned model with the circuit whose edges are scored; discovered only where it is needed."""
        self.original.circuit = self.unlearned.circuit = self.circuit
        return self.original, self.unlearned

    @cached_property
    def cad(self) -> CadByDepth:
        """The unlearned model's states, read by the original's gradients; the control is near facts."""

        def make() -> CadByDepth:
            found = self.unlearned.depth(self.original, label=UNLEARNED)
            if found is None:
                raise MansuError(
                    "the task asks about no near fact that the original knows and that has a counterpart, a question of as "
                    "many tokens with another answer, so that erased cannot be told from damaged"
                )
            return found

        return self.store.result("cad_by_depth", CadByDepth, {**self.marks, "steps": self.plan.steps}, make)

    @cached_property
    def depth(self) -> ErasureDepth:
        """Erasure depth against the never-trained model."""
        pairs = self.task.forget_pairs

        def make() -> ErasureDepth:
            return erasure_depth(self.inputs.original, self.inputs.unlearned, self.reference, pairs, label=UNLEARNED)

        return self.store.result("erasure_depth", ErasureDepth, {**self.marks, NEVER: self.mark(NEVER)}, make)

    @property
    def reference(self) -> TransformerBridge:
        """The never-trained model, which must be there."""
        assert self.never is not None
        return self.never

    def model(self, who: str) -> TransformerBridge:
        """A model by its role."""
        models = {ORIGINAL: self.inputs.original, UNLEARNED: self.inputs.unlearned, NEVER: self.never}
        found = models[who]
        assert found is not None
        return found

    def mark(self, who: str) -> str:
        """A model's fingerprint."""
        return self.inputs.marks[who]

    def probes(self, who: str) -> Probes:
        """What probes read from a model."""
        key = {"model": self.mark(who), "task": self.marks["task"]}
        return self.store.result(f"probes/{who}", Probes, key, lambda: probes_of(self.model(who), self.task, who))

    def curves(self, who: str) -> tuple[RelearningCurve, ...]:
        """A model under the plan's attacks; the label is the one that the rows look for."""
        plan, label = self.plan, NEVER if who == NEVER else "edited"
        key = {"model": self.mark(who), "task": self.marks["task"], "attack": _attack(plan)}
        return self.store.result(
            f"relearning/{who}", Relearning, key,
            lambda: Relearning(attack_curves(self.model(who), self.task, plan, label)),
        ).curves  # fmt: skip

    def written(self, who: str, asked: str) -> Written:
        """What a model writes behind a set of questions."""
        key = {"model": self.mark(who), "task": self.marks["task"], "tokens": self.plan.new_tokens}
        return self.store.result(
            f"written/{who}_{asked}", Written, key,
            lambda: written(self.model(who), self.task.questions[asked], new_tokens=self.plan.new_tokens),
        )  # fmt: skip


def stages(bench: Bench) -> list[Stage]:
    """Every stage of an audit that its plan looks at, in order."""
    return [stage for kind in KINDS for stage in kind(bench) if bench.plan.looks_at(stage.name)]


def rows_of(bench: Bench, stage: Stage) -> pd.DataFrame:
    """A stage's rows, made where they are not there: column method, and those of the tidy table."""

    def make() -> pd.DataFrame:
        rows = [(who, *row) for who, row in stage.make()]
        return pd.DataFrame(rows, columns=["method", *COLUMNS])

    return bench.store.table(f"stages/{stage.name}", _key(bench, stage), make)


def is_done(bench: Bench, stage: Stage) -> bool:
    """Whether the folder has a stage."""
    return bench.store.done(f"stages/{stage.name}.parquet", _key(bench, stage))


def _key(bench: Bench, stage: Stage) -> dict[str, Any]:
    return {**bench.marks, "seed": bench.seed, **stage.key}


def _attack(plan: AuditPlan) -> list[Any]:
    return [plan.attack_rates, plan.attack_steps, plan.attack_splits, plan.attack_seed]


def _answers(bench: Bench) -> Iterator[Stage]:
    original, unlearned, task = bench.original, bench.unlearned, bench.task

    def make() -> Rows:
        yield from ((ORIGINAL, row) for row in chance_rows(task))
        yield from ((ORIGINAL, row) for row in answer_rows(original, original, "", "", bench.seed))
        yield from ((UNLEARNED, row) for row in answer_rows(original, unlearned, "", "", bench.seed))
        yield from ((UNLEARNED, row) for row in size_rows(original.model, bench.edit))

    yield Stage("answers", "chosen and said, every question set", make, Work(2 * asked_tokens(task, SETS)))
    if bench.never is not None:
        other = Subject(bench.reference, task, None)

        def make_never() -> Rows:
            yield from ((NEVER, row) for row in answer_rows(original, other, "", "", bench.seed))
            yield from ((UNLEARNED, row) for row in _beside_never(unlearned, other, bench.seed))

        what, work = "the same of the never-trained model", Work(2 * asked_tokens(task, SETS))
        yield Stage("answers_never", what, make_never, work, {NEVER: bench.mark(NEVER)})


def _beside_never(unlearned: Subject, never: Subject, seed: int) -> Iterator[Measured]:
    """Question by question, how much more often forget facts are right than by the never-trained model, in points."""
    for asked, own in unlearned.answers().items():
        for kind in ("MC", "cloze") if asked.startswith("forget") else ():
            reference = percent(never.answers()[asked], kind)
            over = percent(own, kind) - reference
            ends = interval_over_facts(over, own.facts, seed)
            yield "", asked, f"{kind}{OVER_NEVER}", over.mean().item(), *ends, reference.mean().item()


def _generation(bench: Bench) -> Iterator[Stage]:
    sets = [name for name in ("forget", "forget_paraphrase") if name in bench.task.questions]

    def make() -> Rows:
        for asked in sets:
            found = {who: bench.written(who, asked) for who in (ORIGINAL, UNLEARNED)}
            before = 100 * found[ORIGINAL].right.double().mean().item()
            for who, each in found.items():
                wrong = 100 * each.wrong.double()
                for name, hits, control in (
                    ("generation", 100 * each.right.double(), before),
                    ("generation, a wrong option", wrong, float("nan")),
                ):
                    ends = interval_over_facts(hits, each.facts, bench.seed)
                    yield who, ("", asked, name, hits.mean().item(), *ends, control)

    tokens = sum(
        asked_tokens(bench.task, [name]) + bench.plan.new_tokens * len(bench.task.questions[name]) for name in sets
    )
    what = f"written freely, up to {bench.plan.new_tokens} tokens"
    yield Stage("generation", what, make, Work(2 * tokens), {"tokens": bench.plan.new_tokens})


def _sampling(bench: Bench) -> Iterator[Stage]:
    asked, models = bench.task.questions["forget"], {ORIGINAL: bench.original, UNLEARNED: bench.unlearned}

    def make() -> Rows:
        for who, subject in models.items():
            found = leak_at_k(subject.model, asked, samples=SAMPLES, seed=bench.seed, label=who)
            over = 100 * (found.at(SAMPLES) - found.control(SAMPLES))
            ends = interval_over_facts(over, found.facts, bench.seed)
            yield who, ("", "forget", LEAKED, over.mean().item(), *ends, 100 * found.at(SAMPLES).mean().item())

    longest = int(asked.option_lengths.max())
    # A sample goes on only where an option still can come up.
    work = Work(2 * tokens_of(asked) * (1 + (longest - 1) * asked.options.shape[1]))
    yield Stage("sampling", f"{SAMPLES} samples of every answer", make, work, {"samples": SAMPLES})


def _text(bench: Bench) -> Iterator[Stage]:
    text = bench.task.retain_text

    def make() -> Rows:
        found = damage(bench.inputs.original, bench.inputs.unlearned, {"retain": text})
        return ((UNLEARNED, row) for row in text_rows(found))

    yield Stage("text", "loss on the retain text", make, Work(2 * int(text.lengths.sum())))


def _depth(bench: Bench) -> Iterator[Stage]:
    task, steps = bench.task, bench.plan.steps

    def make() -> Rows:
        found = bench.cad
        for i, layer in enumerate(found.layers):
            row = found.to_dataframe().iloc[i]
            for name in ("cad", "near_cad", "specificity"):
                ends = (row[f"{name}_low"], row[f"{name}_high"])
                what = {"cad": "CAD", "near_cad": "near CAD", "specificity": "specificity"}[name]
                yield UNLEARNED, ("", "", f"{what} at {layer}", row[name], *ends, 0.0)
            grafted = row["grafted_percent"]
            yield UNLEARNED, ("", "forget", f"grafted at {layer}", grafted, *[float("nan")] * 3)
        for who, subject in ((UNLEARNED, bench.unlearned), (ORIGINAL, bench.original)):
            yield from ((who, row) for row in structure_rows(bench.original, subject, ""))

    near = task.questions.get("near")
    forget, beside = (_read_by_depth(each) for each in (task.forget_pairs, near))
    pairs, layers = forget + beside, int(bench.inputs.original.cfg.n_layers)
    # Put back, the original's layers behind each are half of all, on average.
    forward = 8 * pairs + layers * forget // 2
    # The path is read twice: for the gradients, and for the layer that reads the fact.
    yield Stage(
        "depth", "where in depth the knowledge is gone", make, Work(forward, (steps + 1) * pairs), {"steps": steps}
    )


def _read_by_depth(rows: Any) -> int:
    """Tokens of what is read by depth of a set: a part, where it is large."""
    if rows is None:
        return 0
    return tokens_of(rows) * min(len(rows), DEPTH_ROWS) // len(rows)


def _probes(bench: Bench) -> Iterator[Stage]:
    if bench.never is None:
        return

    def make() -> Rows:
        found = {who: bench.probes(who) for who in (ORIGINAL, UNLEARNED, NEVER)}
        for who in (ORIGINAL, UNLEARNED):
            yield from ((who, row) for row in probe_rows(found[who], found[NEVER]))
        # The layer is chosen by the original, so that the unlearned model has no best of many.
        own, control = found[ORIGINAL].right.double(), found[NEVER].right.double()
        layer = int((own.mean(1) - control.mean(1)).argmax())
        for who in (ORIGINAL, UNLEARNED):
            over = 100 * (found[who].right.double()[layer] - control[layer])
            ends = interval_over_facts(over, found[who].facts, bench.seed)
            name = f"probe MC at {found[who].layers[layer]}, excess over never"
            yield who, ("", "forget", name, over.mean().item(), *ends, 100 * control[layer].mean().item())
        yield from ((UNLEARNED, row) for row in depth_rows(bench.depth))

    task = bench.task
    sets = asked_tokens(task, ("forget", "near"))
    layers = int(bench.inputs.original.cfg.n_layers)
    depth = (3 + 2 * layers) * tokens_of(task.forget_pairs)
    work = Work(3 * sets + depth, fits=3 * FITS * (layers + 1))
    yield Stage("probes", "probes of every layer, and erasure depth", make, work, {NEVER: bench.mark(NEVER)})


def _formats(bench: Bench) -> Iterator[Stage]:
    original, unlearned, task, plan = bench.original, bench.unlearned, bench.task, bench.plan

    def answers(name: str) -> Stage:
        def make() -> Rows:
            yield from ((ORIGINAL, row) for row in answer_rows(original, original, name, "", bench.seed))
            yield from ((UNLEARNED, row) for row in answer_rows(original, unlearned, name, name, bench.seed))

        work = Work(2 * asked_tokens(task, SETS), quantized=(name, name))
        return Stage(f"formats/{name}", f"the same answers as {name}", make, work, {"format": name})

    def circuit(name: str) -> Stage:
        def make() -> Rows:
            before, after = bench.on_circuit()
            for who, subject in ((UNLEARNED, after), (ORIGINAL, before)):
                yield from ((who, row) for row in circuit_rows(before, subject, name, bench.seed))
                # In full precision these are the depth stage's.
                yield from ((who, row) for row in (structure_rows(before, subject, name) if name else ()))
            if name in quantizers("grid"):
                yield from ((UNLEARNED, row) for row in code_rows(before.model, after.model, name))

        pairs = tokens_of(task.forget_pairs)
        work = Work(4 * pairs, 2 * plan.steps * pairs)
        key = {"format": name, "steps": plan.steps, "faithfulness": plan.faithfulness}
        what = f"the circuit's divergence{f' as {name}' if name else ''}"
        return Stage(f"circuit/{name or 'full'}", what, make, work, key)

    # One format after the other, so that each is quantized once.
    for name in ("", *plan.formats):
        if name:
            yield answers(name)
        if plan.thorough:
            yield circuit(name)


def _relearning(bench: Bench) -> Iterator[Stage]:
    plan = bench.plan
    # Without a reference nothing can be judged; a thorough audit gives the numbers all the same.
    if not plan.attack_rates or (bench.never is None and not plan.thorough):
        return
    reference = {} if bench.never is None else {NEVER: bench.mark(NEVER)}
    key, work = {"attack": _attack(plan), **reference}, attack_work(bench.task, plan)
    if bench.never is not None:
        yield Stage(
            "relearning_never", "the attacks on the never-trained model",
            lambda: ((NEVER, row) for row in prior_rows(bench.curves(NEVER))), work, key,
        )  # fmt: skip

    def stage(who: str) -> Stage:
        def make() -> Rows:
            against = bench.curves(NEVER) if bench.never is not None else ()
            return ((who, row) for row in relearning_rows(bench.curves(who), against, ""))

        return Stage(f"relearning_{who}", f"the attacks on the {who} model", make, work, key)

    yield from map(stage, (ORIGINAL, UNLEARNED))


KINDS: tuple[Callable[[Bench], Iterator[Stage]], ...] = (
    _answers,
    _generation,
    _sampling,
    _text,
    _depth,
    _probes,
    _formats,
    _relearning,
)
