"""RMU: push the forget prompts' hidden states towards a random direction, hold those of the retain text.

Source: Li et al. 2024 (WMDP), arXiv 2403.03218, sec. 4: E |h(forget) - c u|^2 + alpha E |h(retain) - h0(retain)|^2 over all
tokens, h after layer l, u a random unit vector from [0, 1)^d, only layers l-2..l being trained. Theirs: l = 7 of 32
layers, alpha = 1200, c = 6.5 absolute, the MLPs' down matrices only. Ours: c in units of the mean norm of h, as
adaptive RMU scales it (Huu-Tien et al. 2024, arXiv 2408.06223); l is a share of the depth; all MLP matrices, for at a
depth of four layers the down matrices of two alone do not forget; and the mean square is taken over d_model too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.forced import Forced, forced
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, component_masks, float32_copy, home
from mansu_tl.runs.values import Values, stream_into
from mansu_tl.unlearning.batches import Batch
from mansu_tl.unlearning.objectives import Objective
from mansu_tl.unlearning.training import Recipe, RetainSettings, Start, trained


@dataclass(frozen=True)
class RmuSettings(RetainSettings):
    """Settings of RMU, beside the shared `training`.

    Attributes:
        retain_weight: alpha.
        depth: where h is read, as a share of the layers.
        steering: c, in units of the mean norm of h on the forget prompts.
    """

    retain_weight: float = 10.0
    depth: float = 0.5
    steering: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.depth <= 1:
            raise MansuError(f"rmu: depth={self.depth}; choose a share of the layers in (0, 1]")


@trained("rmu", "RMU", RmuSettings)
def rmu(settings: RmuSettings, start: Start) -> Recipe:
    """Misdirection of the forget prompts' states, the retain text's held."""
    parts, hf = Anatomy.of(start.model), float32_copy(start.model)
    layer = max(1, round(settings.depth * parts.n_layers))
    original = dict(hf.named_parameters())
    mapping = start.model.adapter.component_mapping or {}
    behind = f"{mapping['blocks'].name}.{layer}" if layer < parts.n_layers else str(mapping["ln_final"].name)
    prompts = _prompts(forced(start.task.forget_pairs.to(home(hf)), 1))
    with torch.no_grad():
        norm = _hidden(hf, original, prompts, behind).norm(dim=-1).mean()
    direction = torch.rand(parts.d_model, generator=torch.Generator().manual_seed(start.seed)).to(norm.device)
    target = settings.steering * norm * direction / direction.norm()

    def away(batch: Batch) -> Float[Tensor, ""]:
        return (_hidden(batch.model, batch.values, _prompts(batch.forget), behind) - target).square().mean()

    def held(batch: Batch) -> Float[Tensor, ""]:
        kept = _hidden(batch.model, batch.values, batch.retain, behind)
        with torch.no_grad():
            before = _hidden(hf, original, batch.retain, behind)
        return (kept - before).square().mean()

    only = component_masks(start.model, [f"MLP{i}" for i in range(max(0, layer - 3), layer)])
    return Recipe(Objective(away, held, settings.retain_weight), only, facts={"layer": layer - 1})


def _prompts(pairs: Forced[PromptPairs]) -> Sequences:
    return Sequences(pairs.clean, pairs.lengths)


def _hidden(hf: PreTrainedModel, values: Values, text: Sequences, behind: str) -> Float[Tensor, "token d_model"]:
    """The residual stream that enters a module, at every real token."""
    return stream_into(hf, values, text.tokens, behind)[text.real].float()
