"""What a model writes where a benchmark asks it, answer by answer, with a score of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.results.result import Result, Table
from mansu_tl.results.serialise import MismatchError


@dataclass(frozen=True)
class WrittenScores(Result):
    """A model's answers to a benchmark's questions.

    Attributes:
        title: the model's name in tables.
        benchmark: whose questions and scores these are.
        sets: the set of every question, as the benchmark reports them.
        measures: what each answer's score is.
        names: the file and line of every question.
        wanted: what was to be written.
        said: what the model wrote.
        values: the scores, in [0, 1]; entropies in bits.
    """

    title: str
    benchmark: str
    sets: tuple[str, ...]
    measures: tuple[str, ...]
    names: tuple[str, ...]
    wanted: tuple[str, ...]
    said: tuple[str, ...]
    values: Float[Tensor, " question"]

    def mean(self, name: str) -> float:
        """The mean score of a set, in the unit of `values`; NaN where nothing was asked of it."""
        chosen = [value for value, each in zip(self.values.tolist(), self.sets, strict=True) if each == name]
        return sum(chosen) / len(chosen) if chosen else float("nan")

    def summary(self) -> pd.DataFrame:
        """One row a set: its measure, the mean with a 95 % interval over questions, and how many there are."""
        rows = []
        for name in dict.fromkeys(self.sets):
            at = [i for i, each in enumerate(self.sets) if each == name]
            low, high = interval_over_facts(self.values[torch.tensor(at)], [str(i) for i in at])
            rows.append((name, self.measures[at[0]], self.mean(name), low, high, len(at)))
        return pd.DataFrame(rows, columns=["set", "measure", "mean", "mean_low", "mean_high", "questions"])

    def to_dataframe(self) -> pd.DataFrame:
        """One row a question, with what was wanted, what was said and its score."""
        names = ("sets", "measures", "names", "wanted", "said")
        columns = ("set", "measure", "name", "wanted", "said")
        frame = pd.DataFrame({column: getattr(self, name) for column, name in zip(columns, names, strict=True)})
        return frame.assign(value=self.values.tolist())

    def _check(self) -> None:
        counts = {len(getattr(self, name)) for name in ("sets", "measures", "names", "wanted", "said", "values")}
        if len(counts) > 1:
            raise MismatchError("its sets, measures, names, answers and values differ in number")

    def __repr__(self) -> str:
        means = ", ".join(f"{row.set} {row.mean:.3f}" for row in self.summary().itertuples())
        return f"WrittenScores({self.title} on {self.benchmark}: {means})"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.summary(), form="{:.3f}".format, rows=24),)
