"""Straight-through quantization-aware unlearning: GradDiff seen through the fake-quantized weights.

Source: the idea of DurableUn-SAF (arXiv 2605.02196): straight-through gradients through 4-bit rounding, so that what is
forgotten is forgotten by the quantized model. Theirs trains LoRA adapters with a sharpness-aware step; ours trains every
weight, without that step, through `quantizer`'s roundtrip. The scales move with the weights, no weight is held back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.models import linear_weights, orient, parameters
from mansu_tl.quantization import grid_of
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.batches import Values
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class SteSettings(Digested):
    """Settings of straight-through unlearning.

    Attributes:
        quantizer: the grid that the model is seen through.
        retain_weight: weight of the retain loss against the ascent.
        training: the shared loop.
    """

    quantizer: str = "nf4"
    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def ste(
    model: TransformerBridge,
    task: Task,
    settings: SteSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with GradDiff through the fake-quantized weights."""
    grid, linear = grid_of(settings.quantizer), linear_weights(model)
    dtypes = {name: value.dtype for name, value in parameters(model).items()}

    def view(values: Values) -> Values:
        out = dict(values)
        for name, weight in linear.items():
            with torch.no_grad():
                # What a quantizer would be given: the weights in the dtype in which they are stored.
                stored = values[name].detach().to(dtypes[name])
                shift = orient(grid.roundtrip(orient(stored, weight)), weight) - values[name]
            out[name] = values[name] + shift
        return out

    def loss(batch: Batch) -> Tensor:
        return batch.answer_log_prob(batch.forget_logits()).mean() + settings.retain_weight * batch.retain_loss()

    return train(
        model, task, "ste", loss, settings.training, view=view, seed=seed, progress=progress, checkpoint=checkpoint
    )
