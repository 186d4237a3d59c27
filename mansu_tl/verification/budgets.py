"""Relearning as budget curves: what comes back for how many facts, steps, which rate, which text and which parameters.

One rate and one number of facts say little: an edit may withstand the attack that it was made against and no other. A plan
crosses facts, text, rates and full or low-rank training; steps are read along each curve, which serves every shorter budget,
since the rate is constant. The *strongest* attack of a budget is the one whose rate, and whose step up to that number, give
the most right answers beyond the model's own prior; the never-trained model's is chosen in the same way, from its own
curves, so that choosing the largest of several favours neither (our definition). Intervals are of the chosen attack; they do
not know that it was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.data.fit import require_task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table, bars
from mansu_tl.results.store import Store
from mansu_tl.verification.attacks import Attack, attack_splits, near_attack, unrelated_attack
from mansu_tl.verification.relearning import RelearningCurve, measure_index, relearn, scale_of

TEXTS = ("near facts", "unrelated text")


@dataclass(frozen=True)
class BudgetPlan:
    """Which attacks to run; every combination is one curve a model.

    Attributes:
        facts: numbers of forget facts that the attacker has.
        texts: what he has instead of any: of `TEXTS`.
        learning_rates: of AdamW.
        steps: budgets, in optimizer steps; the longest is trained, the others are read on the way.
        ranks: of adapters (LoRA); 0 = every parameter is trained.
        splits: draws of the facts; their questions are taken together.
        questions: the set that is asked, see `attack_splits`.
        seed: of draws, batches and adapters.

    Raises:
        MansuError: nothing to run, a number that is not positive (0 is a rank), or no such text.
    """

    facts: tuple[int, ...] = (4, 12, 24, 36)
    texts: tuple[str, ...] = TEXTS
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    steps: tuple[int, ...] = (10, 25, 50, 100, 200, 400)
    ranks: tuple[int, ...] = (0, 8)
    splits: int = 1
    questions: str = "forget"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [text for text in self.texts if text not in TEXTS]
        if unknown:
            raise MansuError(f"budgets: no text {unknown[0]!r}; choose of {', '.join(TEXTS)}")
        if not (self.facts or self.texts) or not all((self.learning_rates, self.steps, self.ranks)):
            raise MansuError("budgets: there is nothing to run; give facts or texts, and rates, steps and ranks")
        for name, least in {"facts": 1, "steps": 1, "ranks": 0}.items():
            if min(getattr(self, name), default=least) < least:
                raise MansuError(f"budgets: {name}={getattr(self, name)}; each has to be {least} or more")

    def attacks(self, task: Task) -> Iterator[tuple[str, int, Attack]]:
        """What is trained on: its name, the facts in it, and the attack."""
        for k in self.facts:
            for attack in attack_splits(task, k, self.splits, seed=self.seed, questions=self.questions):
                yield "forget facts", k, attack
        makers = dict(zip(TEXTS, (near_attack, unrelated_attack), strict=True))
        for text in self.texts:
            yield text, 0, makers[text](task, questions=self.questions)


@dataclass(frozen=True)
class Budget:
    """One attack of a plan.

    Attributes:
        text: "forget facts", or of `TEXTS`.
        facts: forget facts among what is trained on.
        learning_rate: of AdamW.
        rank: of the adapters; 0 = every parameter is trained.
    """

    text: str
    facts: int
    learning_rate: float
    rank: int

    @property
    def kind(self) -> tuple[str, int, int]:
        """What stays when the attacker chooses his rate: text, facts and rank."""
        return self.text, self.facts, self.rank


@dataclass(frozen=True)
class RelearningBudgets(Result):
    """Curves of several models under a plan's attacks.

    Attributes:
        budgets: the attack behind each curve; the splits of one number of facts share theirs.
        curves: one a model, attack and split.
        reference: the label of the never-trained model; "" = there is none.
    """

    budgets: tuple[Budget, ...]
    curves: tuple[RelearningCurve, ...]
    reference: str = ""

    def __post_init__(self) -> None:
        if not self.curves or len(self.curves) != len(self.budgets):
            raise MansuError(f"budgets: {len(self.curves)} curves for {len(self.budgets)} budgets; give one for each")
        if self.reference and self.reference not in self.labels:
            raise MansuError(f"budgets: reference {self.reference!r} is none of {', '.join(self.labels)}; run it too")
        if any(curve.steps != self.curves[0].steps for curve in self.curves):
            raise MansuError("budgets: the curves were asked at different steps; run them with one plan")

    @property
    def labels(self) -> tuple[str, ...]:
        """The models."""
        return tuple(dict.fromkeys(curve.label for curve in self.curves))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which every model was asked."""
        return self.curves[0].steps

    def to_dataframe(self, measure: str = "multiple_choice") -> pd.DataFrame:
        """One row a model, attack and step, splits taken together: value, excess over the model's own prior, and that minus
        the reference's under the same attack, each with its 95 % interval over facts; in percent (log-odds in nats).

        Raises:
            MansuError: no such measure, or an attack that the reference has not undergone.
        """
        rows = []
        for (label, budget), curves in self._groups().items():
            for step in self.steps:
                row: dict[str, Any] = {"label": label, **vars(budget), "step": step, "measure": measure}
                rows.append(row | self._cells(curves, self._of_reference(budget), measure, step, step))
        return pd.DataFrame(rows)

    def strongest(self, measure: str = "multiple_choice") -> pd.DataFrame:
        """One row a model, text, number of facts, rank and budget of steps: the strongest attack up to that many steps.

        Columns as in `to_dataframe`; `learning_rate` and `at_step` are those that the attacker chose.

        Raises:
            MansuError: no such measure, or an attack that the reference has not undergone.
        """
        rows = []
        kinds = dict.fromkeys(budget.kind for budget in self.budgets)
        for label, (text, facts, rank), step in product(self.labels, kinds, self.steps):
            if (chosen := self._choice(label, (text, facts, rank), measure, step)) is None:
                continue
            rate, at, curves = chosen
            row = {"label": label, "text": text, "facts": facts, "rank": rank, "step": step, "measure": measure}
            row |= {"learning_rate": rate, "at_step": at}
            other = self._choice(self.reference, (text, facts, rank), measure, step) if self.reference else None
            if self.reference and other is None:
                raise MansuError(f"budgets: {self.reference!r} has not undergone {text}, {facts} facts, rank {rank}")
            base, base_step = ([], 0) if other is None else (other[2], other[1])
            rows.append(row | self._cells(curves, base, measure, at, base_step))
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        kinds = len({(b.kind, b.learning_rate) for b in self.budgets})
        return (
            f"RelearningBudgets({len(self.curves)} curves: {', '.join(self.labels)}; {kinds} attacks of up to "
            f"{self.steps[-1]} steps; reference {self.reference or 'none'})"
        )

    def _tables(self) -> Sequence[Table]:
        frame = self.strongest()
        last = frame[frame.step == self.steps[-1]].drop(columns=["step", "measure"])
        return (Table(last, f"the strongest attack of up to {self.steps[-1]} steps, MC", "{:.3g}".format, rows=40),)

    def _groups(self) -> dict[tuple[str, Budget], list[RelearningCurve]]:
        groups: dict[tuple[str, Budget], list[RelearningCurve]] = {}
        for budget, curve in zip(self.budgets, self.curves, strict=True):
            groups.setdefault((curve.label, budget), []).append(curve)
        return groups

    def _of_reference(self, budget: Budget) -> list[RelearningCurve]:
        """The never-trained model's curves under an attack; none where there is no such model."""
        if not self.reference:
            return []
        found = self._groups().get((self.reference, budget))
        if found is None:
            raise MansuError(f"budgets: {self.reference!r} has not undergone {budget}; run it too")
        return found

    def _choice(
        self, label: str, kind: tuple[str, int, int], measure: str, step: int
    ) -> tuple[float, int, list[RelearningCurve]] | None:
        """Rate, step and curves with the most excess within a budget of steps; None where a model has no such attack."""
        best: tuple[float, float, int, list[RelearningCurve]] | None = None
        for (name, budget), curves in self._groups().items():
            if (name, budget.kind) != (label, kind):
                continue
            for at in (each for each in self.steps if each <= step):
                found = _together(curves, "excess", measure, at)
                # Without never-seen names there is no prior to subtract.
                if found.isnan().all():
                    found = _together(curves, "values", measure, at)
                if best is None or found.mean().item() > best[0]:
                    best = found.mean().item(), budget.learning_rate, at, curves
        return None if best is None else best[1:]

    @staticmethod
    def _cells(
        curves: Sequence[RelearningCurve], base: Sequence[RelearningCurve], measure: str, step: int, base_step: int
    ) -> dict[str, float]:
        scale, facts = scale_of(measure), [fact for curve in curves for fact in curve.facts]
        value, excess = (_together(curves, source, measure, step) for source in ("values", "excess"))
        cells = with_interval("value", value, facts, scale=scale) | with_interval("excess", excess, facts, scale=scale)
        if base:
            over = excess - _together(base, "excess", measure, base_step)
            cells |= with_interval("over_reference", over, facts, scale=scale)
        return cells


@torch_defaults()
def relearning_budgets(
    models: Mapping[str, TransformerBridge],
    task: Task,
    plan: BudgetPlan | None = None,
    *,
    reference: str | None = None,
    batch_size: int = 32,
    folder: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> RelearningBudgets:
    """Run every attack of a plan on every model.

    Args:
        models: by label, e.g. {"edited": ..., "edited, nf4": quantize(edited), "never trained": ...}.
        reference: the label of the never-trained model.
        batch_size: sequences a step.
        folder: where each curve is kept as it is made; a run that was interrupted goes on from there.
        progress: show a progress bar over the curves; None = in notebooks.

    Raises:
        MansuError: as `relearn` and `attack_splits`, no model, or a reference that is none of them.
    """
    require_task(task)
    plan = plan or BudgetPlan()
    if not models:
        raise MansuError("budgets: no model; give at least one by its label")
    if reference is not None and reference not in models:
        raise MansuError(f"budgets: reference {reference!r} is none of {', '.join(models)}; add it to the models")
    attacks = list(plan.attacks(task))
    jobs = list(product(models, attacks, plan.ranks, plan.learning_rates))
    store = None if folder is None else Store(Path(folder))
    prints = {} if store is None else {label: fingerprint(model) for label, model in models.items()}
    options: dict[str, Any] = {"steps": max(plan.steps), "batch_size": batch_size, "ask_at": (0, *plan.steps)}
    budgets, curves = [], []
    for label, (text, facts, attack), rank, rate in tqdm(
        jobs, desc="budgets", unit="curve", disable=not bars(progress)
    ):
        how = {**options, "learning_rate": rate, "rank": rank, "seed": plan.seed, "label": label}

        def make(label: str = label, attack: Attack = attack, how: dict[str, Any] = how) -> RelearningCurve:
            return relearn(models[label], attack, **how)

        if store is None:
            curve = make()
        else:
            place = _file(f"{label}-{attack.name}-rank{rank}-{rate:g}")
            key = {"model": prints[label], "attack": attack.digest(), **how, "ask_at": list(how["ask_at"])}
            curve = store.result(place, RelearningCurve, key, make)
        budgets.append(Budget(text, facts, float(rate), rank))
        curves.append(curve)
    return RelearningBudgets(tuple(budgets), tuple(curves), reference or "")


def _file(name: str) -> str:
    """A file's name made of any text."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)


def _together(curves: Sequence[RelearningCurve], source: str, measure: str, step: int) -> Float[Tensor, " question"]:
    return torch.cat([getattr(c, source)[measure_index(measure), c.index_of(step)].double().cpu() for c in curves])
