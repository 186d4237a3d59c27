"""A short search over learning rates, the same for every method, on a validation split of the questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.results.result import Result, Table
from mansu_tl.runs.metrics import accuracy
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.registry import method_title
from mansu_tl.unlearning.unlearn import unlearn

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
_KEPT = ("retain", "retain_paraphrase", "near", "near_paraphrase")


@dataclass(frozen=True)
class Trial:
    """One learning rate on the validation split."""

    rate: float
    forget: float  # multiple-choice accuracy on the forget questions, in percent
    target: float  # what that may be at most
    drop: float  # cloze points lost on the kept sets, their mean
    note: str = ""  # why it gave no edit
    inverted: bool = False  # below chance by as much, with the whole interval over facts: that is no forgetting

    @property
    def reached(self) -> bool:
        """Whether it forgot."""
        return self.forget <= self.target and not self.inverted


@dataclass(frozen=True)
class Search(Result):
    """What a search found: one trial a rate, in the order tried."""

    method: str
    trials: tuple[Trial, ...]
    seed: int

    @property
    def best(self) -> Trial:
        """The trial that forgot and lost least; where none forgot, the one that forgot most.

        Raises:
            MansuError: no rate gave an edit.
        """
        made = [trial for trial in self.trials if not trial.note]
        if not made:
            raise MansuError(f"search: no learning rate of {self.method} gave an edit ({self.trials[0].note})")
        reached = [trial for trial in made if trial.reached]
        if reached:
            return min(reached, key=lambda trial: (trial.drop, trial.forget, trial.rate))
        return min(made, key=lambda trial: (trial.forget, trial.drop, trial.rate))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a rate."""
        made = any(not trial.note for trial in self.trials)
        rows = [
            {"method": self.method, "seed": self.seed, **trial.__dict__, "reached": trial.reached,
             "chosen": made and trial == self.best}
            for trial in self.trials
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        best = self.best
        state = "reached" if best.reached else "did not reach"
        return (
            f"Search({self.method}: rate {best.rate:g} of {len(self.trials)} {state} forget MC <= {best.target:g} % "
            f"({best.forget:.1f}), kept sets {-best.drop:+.1f} points)"
        )

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "by learning rate"),)


@torch_defaults()
def search(
    model: TransformerBridge,
    validation: Task,
    method: str,
    *,
    rates: Sequence[float] = RATES,
    circuit: Circuit | None = None,
    over_chance: float = 5.0,
    seed: int = 0,
    progress: bool = False,
    **settings: Any,
) -> Search:
    """Try a method at several learning rates and rank them on a validation split, in full precision.

    The rule is the same for every method: a rate has to bring multiple-choice accuracy on the validation forget questions
    down to chance plus `over_chance`, and not clearly as far below chance (its interval over facts has to reach up to
    there); among those that do, the one that loses fewest cloze points on the kept sets is best. Quantization plays no
    part in it. Our definition.

    Args:
        validation: from `split_questions`; its test half is for reporting.
        rates: learning rates, in the method's own unit (MANSU's is bins).
        over_chance: percentage points.

    Raises:
        MansuError: no rates, or an unknown method or setting.
    """
    if not rates:
        raise MansuError("search: no rates; give at least one learning rate")
    method_title(method)
    trials = []
    for rate in tqdm(rates, desc=f"search {method}", unit="rate", disable=not progress):
        edit: Edit | NoEditError
        given = {**settings, "learning_rate": float(rate), "circuit": circuit, "seed": seed, "progress": False}
        try:
            edit = unlearn(model, validation, method, **given)
        except NoEditError as error:
            edit = error
        trials.append(judge(model, validation, edit, float(rate), over_chance=over_chance))
    return Search(method, tuple(trials), seed)


@torch_defaults()
def judge(
    model: TransformerBridge, validation: Task, edit: Edit | NoEditError, rate: float, *, over_chance: float = 5.0
) -> Trial:
    """What `search` makes of one learning rate's edit, or of the error with which the method gave none.

    Raises:
        MansuError: an edit of another model.
    """
    chance = validation.questions["forget"].chance
    target = chance + over_chance
    if isinstance(edit, NoEditError):
        return Trial(rate, float("inf"), target, float("inf"), str(edit))
    edited = edit.apply(model)
    kept, lost = [name for name in _KEPT if name in validation.questions], []
    try:
        answers = accuracy(edited, validation.questions["forget"])
        for name in kept:
            before, after = (accuracy(one, validation.questions[name]).cloze_percent for one in (model, edited))
            lost.append(before - after)
    except MansuError as error:  # a model that gives no finite logits any more
        return Trial(rate, float("inf"), target, float("inf"), str(error))
    _, high = interval_over_facts(answers.multiple_choice.double(), answers.facts)
    return Trial(rate, answers.mc_percent, target, sum(lost) / len(lost), inverted=100 * high < chance - over_chance)
