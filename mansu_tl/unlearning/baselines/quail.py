"""QUAIL: GA + GDR with a hinge that asks every forget prompt's logits to move by a margin.

Source: Mishra & Mehreen 2026, arXiv 2601.15538: the logits of the unlearned model must differ from the original's by at
least half the quantization step. The paper leaves the distance open; ours is an option (`distance`): the root-mean-square
difference over the vocabulary, its mean absolute difference, its largest, or the answer's own. The step is that of a
4-bit grid over the range of the original logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.errors import MansuError
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train

_STEPS_OF_4_BIT = 15
_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms": lambda moved, answers: moved.square().mean(1).add(1e-12).sqrt(),
    "mean": lambda moved, answers: moved.abs().mean(1),
    "max": lambda moved, answers: moved.abs().amax(1),
    "answer": lambda moved, answers: moved.gather(1, answers[:, None])[:, 0].abs(),
}


@dataclass(frozen=True)
class QuailSettings(Digested):
    """Settings of QUAIL.

    Attributes:
        hinge_weight: weight of the hinge.
        margin_steps: the margin, in quantization steps of the logits; the paper's is one half.
        distance: "rms", "mean", "max" or "answer".
        retain_weight: weight of the retain loss.
        training: the shared loop.
    """

    hinge_weight: float = 1.0
    margin_steps: float = 0.5
    distance: str = "rms"
    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def quail(
    model: TransformerBridge,
    task: Task,
    settings: QuailSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with GradDiff plus QUAIL's logit hinge.

    Raises:
        MansuError: an unknown distance, or what the shared loop refuses.
    """
    if settings.distance not in _DISTANCES:
        raise MansuError(f"quail: distance={settings.distance!r}; choose one of {', '.join(_DISTANCES)}")
    measure = _DISTANCES[settings.distance]

    def loss(batch: Batch) -> Tensor:
        logits, before = batch.forget_logits(), batch.original_logits
        step = (before.amax(1) - before.amin(1)) / _STEPS_OF_4_BIT
        moved = measure(logits - before, batch.pairs.answers)
        hinge = (settings.margin_steps * step - moved).relu().mean()
        ascent = batch.answer_log_prob(logits).mean()
        return ascent + settings.hinge_weight * hinge + settings.retain_weight * batch.retain_loss()

    return train(model, task, "quail", loss, settings.training, seed=seed, progress=progress, checkpoint=checkpoint)
