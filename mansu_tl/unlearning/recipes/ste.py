"""Straight-through quantization-aware unlearning: GradDiff seen through the fake-quantized weights.

Source: the idea of DurableUn-SAF (arXiv 2605.02196): straight-through gradients through 4-bit rounding, so that what is
forgotten is forgotten by the quantized model. Theirs trains LoRA adapters with a sharpness-aware step; ours trains every
weight, without that step, through `quantizer`'s roundtrip. The scales move with the weights, no weight is held back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mansu_tl.models import linear_weights, orient, parameters
from mansu_tl.quantization import grid_of
from mansu_tl.runs.values import Values
from mansu_tl.unlearning.objectives import Objective, ascent, likelihood
from mansu_tl.unlearning.training import Recipe, RetainSettings, Start, trained


@dataclass(frozen=True)
class SteSettings(RetainSettings):
    """Settings of straight-through unlearning, beside `retain_weight` and the shared `training`.

    Attributes:
        quantizer: the grid that the model is seen through.
    """

    quantizer: str = "nf4"


@trained("ste", "Straight-through", SteSettings)
def ste(settings: SteSettings, start: Start) -> Recipe:
    """GradDiff through the fake-quantized weights."""
    grid, linear = grid_of(settings.quantizer).bound(start.model), linear_weights(start.model)
    dtypes = {name: value.dtype for name, value in parameters(start.model).items()}

    def view(values: Values) -> Values:
        out = dict(values)
        for name, weight in linear.items():
            with torch.no_grad():
                # What a quantizer would be given: the weights in the dtype in which they are stored.
                stored = values[name].detach().to(dtypes[name])
                shift = orient(grid.of(name).roundtrip(orient(stored, weight)), weight) - values[name]
            out[name] = values[name] + shift
        return out

    return Recipe(Objective(ascent, likelihood, settings.retain_weight), view=view)
