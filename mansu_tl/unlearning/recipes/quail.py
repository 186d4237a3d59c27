"""QUAIL: GA + GDR with a hinge that asks every forget prompt's logits to move by a margin.

Source: Mishra & Mehreen 2026, arXiv 2601.15538: the logits of the unlearned model must differ from the original's by at
least half the quantization step. The paper leaves the distance open; ours is an option (`distance`): the root-mean-square
difference over the vocabulary, its mean absolute difference, its largest, or the answer's own. The step is that of a
4-bit grid over the range of the original logits. Where an answer has several tokens, the logits in front of each count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError
from mansu_tl.unlearning.batches import Batch
from mansu_tl.unlearning.objectives import Objective, ascent, likelihood
from mansu_tl.unlearning.training import Recipe, RetainSettings, Start, trained

_STEPS_OF_4_BIT = 15
_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms": lambda moved, answers: moved.square().mean(1).add(1e-12).sqrt(),
    "mean": lambda moved, answers: moved.abs().mean(1),
    "max": lambda moved, answers: moved.abs().amax(1),
    "answer": lambda moved, answers: moved.gather(1, answers[:, None])[:, 0].abs(),
}


@dataclass(frozen=True)
class QuailSettings(RetainSettings):
    """Settings of QUAIL, beside `retain_weight` and the shared `training`.

    Attributes:
        hinge_weight: weight of the hinge.
        margin_steps: the margin, in quantization steps of the logits; the paper's is one half.
        distance: "rms", "mean", "max" or "answer".
    """

    hinge_weight: float = 1.0
    margin_steps: float = 0.5
    distance: str = "rms"

    def __post_init__(self) -> None:
        if self.distance not in _DISTANCES:
            raise MansuError(f"quail: distance={self.distance!r}; choose one of {', '.join(_DISTANCES)}")


@trained("quail", "QUAIL", QuailSettings)
def quail(settings: QuailSettings, start: Start) -> Recipe:
    """GradDiff plus the logit hinge."""
    measure = _DISTANCES[settings.distance]

    def forget(batch: Batch) -> Float[Tensor, ""]:
        before = batch.original_logits
        step = (before.amax(1) - before.amin(1)) / _STEPS_OF_4_BIT
        moved = measure(batch.forget_logits - before, batch.forget.answer_tokens)
        return ascent(batch) + settings.hinge_weight * (settings.margin_steps * step - moved).relu().mean()

    return Recipe(Objective(forget, likelihood, settings.retain_weight))
