"""Relearning of several models side by side: what comes back beyond what the never-trained model learns as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.intervals import with_interval
from mansu_tl.results.result import Result, Table, bars
from mansu_tl.verification.attacks import Attack
from mansu_tl.verification.relearning import MEASURES, RelearningCurve, measure_index, relearn, scale_of


@dataclass(frozen=True)
class Relearning(Result):
    """Curves of several models under the same attacks.

    Attributes:
        curves: one a model, attack and learning rate.
        reference: the label of the never-trained model; "" = there is none.
    """

    curves: tuple[RelearningCurve, ...]
    reference: str = ""

    def __post_init__(self) -> None:
        if not self.curves:
            raise MansuError("relearning: no curves; run at least one attack on one model")
        labels = tuple(dict.fromkeys(curve.label for curve in self.curves))
        if self.reference and self.reference not in labels:
            raise MansuError(f"relearning: reference {self.reference!r} is none of {', '.join(labels)}; run it too")
        facts: dict[str, tuple[str, ...]] = {}
        seen: set[tuple[str, str, float]] = set()
        for curve in self.curves:
            if facts.setdefault(curve.attack, curve.facts) != curve.facts:
                raise MansuError(f"relearning: two attacks called {curve.attack!r} ask different questions; rename one")
            if _place(curve) in seen:
                raise MansuError(f"relearning: {curve.label!r} has two curves for {_place(curve)[1:]}; drop one")
            seen.add(_place(curve))

    def summary(self, measure: str = "multiple_choice", step: int = -1) -> pd.DataFrame:
        """One row a model, kind of attack and learning rate, its splits taken together.

        In percent (log-odds in nats): `value`; `prior`; `excess` = value - prior; `over_reference` = the excess minus
        the reference's under the same attacks, question by question. Each with a 95 % interval over facts, the excess
        with its lowest and highest split beside.

        Args:
            step: one of the curves' steps, or -1 for the last.

        Raises:
            MansuError: no such measure or step, or an attack that the reference has not undergone.
        """
        groups = _grouped(self.curves, "label", "kind", "learning_rate")
        return pd.DataFrame([self._row(key, curves, measure, step) for key, curves in groups.items()])

    def by_step(self, measure: str, kind: str = "facts", *, excess: bool = False) -> pd.DataFrame:
        """One row a model, learning rate and step at which every curve was asked, the attack's splits taken together.

        Columns label, learning_rate, step, and mean, low and high of the 95 % interval over facts; in percent (log-odds
        in nats).

        Args:
            kind: attacks on "facts" or with unrelated "text".
            excess: above each model's own prior.

        Raises:
            MansuError: no curve of this kind, no such measure, or curves without a common step.
        """
        curves = [curve for curve in self.curves if curve.kind == kind]
        if not curves:
            kinds = ", ".join(dict.fromkeys(curve.kind for curve in self.curves))
            raise MansuError(f"relearning: no curve of kind {kind!r}; it has {kinds}")
        steps = sorted(set(curves[0].steps).intersection(*(curve.steps for curve in curves)))
        if not steps:
            raise MansuError("relearning: the curves share no step; ask every model at the same steps")
        rows = []
        for (label, rate), parts in _grouped(curves, "label", "learning_rate").items():
            facts = [fact for curve in parts for fact in curve.facts]
            for step in steps:
                values = _together(parts, "excess" if excess else "values", measure, step)
                mean = with_interval("mean", values, facts, scale=scale_of(measure))
                rows.append((label, rate, step, *mean.values()))
        return pd.DataFrame(rows, columns=["label", "learning_rate", "step", "mean", "low", "high"])

    def _row(self, key: tuple[Any, ...], curves: list[RelearningCurve], measure: str, step: int) -> dict[str, object]:
        scale, facts = scale_of(measure), [fact for curve in curves for fact in curve.facts]
        value, excess = (_together(curves, source, measure, step) for source in ("values", "excess"))
        means = [curve.at(measure, step, excess=True) for curve in curves]
        row: dict[str, object] = dict(zip(("label", "kind", "learning_rate"), key, strict=True))
        row |= {"measure": measure, "step": curves[0].steps[curves[0].index_of(step)], "splits": len(curves)}
        row |= {"value": scale * value.mean().item(), "prior": scale * (value - excess).mean().item()}
        row |= with_interval("excess", excess, facts, scale=scale)
        row |= {"lowest_split": min(means), "highest_split": max(means)}
        if self.reference:
            base = _together([self._reference_of(curve) for curve in curves], "excess", measure, step)
            row["reference_excess"] = scale * base.mean().item()
            row |= with_interval("over_reference", excess - base, facts, scale=scale)
        return row

    def _reference_of(self, curve: RelearningCurve) -> RelearningCurve:
        """The never-trained model's curve under the same attack."""
        for other in self.curves:
            if _place(other) == (self.reference, *_place(curve)[1:]):
                return other
        raise MansuError(
            f"relearning: {self.reference!r} has no curve for {curve.attack!r} at lr {curve.learning_rate:g}; run it too"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Every curve's rows, see `RelearningCurve.to_dataframe`."""
        return pd.concat([curve.to_dataframe() for curve in self.curves], ignore_index=True)

    def __repr__(self) -> str:
        labels = dict.fromkeys(curve.label for curve in self.curves)
        rates = dict.fromkeys(f"{curve.learning_rate:g}" for curve in self.curves)
        attacks = len({curve.attack for curve in self.curves})
        return (
            f"Relearning({len(self.curves)} curves: {', '.join(labels)}; {attacks} attacks at lr {', '.join(rates)}; "
            f"reference {self.reference or 'none'})"
        )

    def _tables(self) -> Sequence[Table]:
        return [Table(self.summary(measure), measure, "{:.2f}".format, rows=24) for measure in MEASURES[:2]]


@torch_defaults()
def compare_relearning(
    models: Mapping[str, TransformerBridge],
    attacks: Sequence[Attack],
    *,
    reference: str | None = None,
    learning_rates: Sequence[float] = (3e-4, 1e-3),
    steps: int = 50,
    batch_size: int = 32,
    ask_at: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Relearning:
    """Run every attack on every model at every learning rate.

    Args:
        models: by label, e.g. {"edited": ..., "edited, nf4": quantize(edited), "never trained": ...}.
        attacks: from `attack_splits` and `unrelated_attack`.
        reference: the label of the never-trained model, against which the others' excess is set.
        progress: show a progress bar over the curves; None = in notebooks.

    Raises:
        MansuError: as `relearn`, or a reference that is none of the models.
    """
    if reference is not None and reference not in models:
        raise MansuError(f"relearning: reference {reference!r} is none of {', '.join(models)}; add it to the models")
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "ask_at": ask_at, "seed": seed}
    jobs = [(label, attack, rate) for label in models for attack in attacks for rate in learning_rates]
    curves = [
        relearn(models[label], attack, learning_rate=rate, label=label, **options)
        for label, attack, rate in tqdm(jobs, desc="relearning", unit="curve", disable=not bars(progress))
    ]
    return Relearning(tuple(curves), reference or "")


def _place(curve: RelearningCurve) -> tuple[str, str, float]:
    return curve.label, curve.attack, curve.learning_rate


def _grouped(curves: Sequence[RelearningCurve], *keys: str) -> dict[tuple[Any, ...], list[RelearningCurve]]:
    """The curves that agree in some of their fields, in order of appearance."""
    groups: dict[tuple[Any, ...], list[RelearningCurve]] = {}
    for curve in curves:
        groups.setdefault(tuple(getattr(curve, key) for key in keys), []).append(curve)
    return groups


def _together(curves: Sequence[RelearningCurve], source: str, measure: str, step: int) -> Float[Tensor, " question"]:
    """A measure's "values" or "excess" after a step, question by question, of several curves."""
    return torch.cat([getattr(c, source)[measure_index(measure), c.index_of(step)].double().cpu() for c in curves])
