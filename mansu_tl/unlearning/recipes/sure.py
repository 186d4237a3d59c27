"""SURE: a large learning rate, kept to the modules on which the forget loss depends most.

Source: Zhang et al. 2024, "Catastrophic failure of LLM unlearning via quantization", arXiv 2410.16454, sec. 5: modules
whose forget-gradient norm is above a quantile are updated with a large learning rate, all others stay. Theirs leaves the
module open (heads, MLPs); ours: attention heads and MLP neurons, the norm divided by the root of the module's size. The
loss is GradDiff's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.data.forced import forced
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, component_masks, float32_copy, home, linear_weights
from mansu_tl.runs.values import last_token_logits
from mansu_tl.unlearning.masks import Masks
from mansu_tl.unlearning.objectives import Objective, ascent, likelihood
from mansu_tl.unlearning.training import LARGE, Recipe, RetainSettings, Start, TrainingSettings, trained


@dataclass(frozen=True)
class SureSettings(RetainSettings):
    """Settings of SURE, beside `retain_weight`.

    Attributes:
        training: the shared loop, with a learning rate ten times the other baselines'.
        share: modules that are trained, as a share of all; theirs is the top tenth.
    """

    training: TrainingSettings = LARGE
    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise MansuError(f"sure: share={self.share}; choose a share of the modules in (0, 1]")


@trained("sure", "SURE", SureSettings)
def sure(settings: SureSettings, start: Start) -> Recipe:
    """GradDiff on the salient modules only."""
    objective = Objective(ascent, likelihood, settings.retain_weight)
    return Recipe(objective, salient_weights(start.model, start.task, settings.share))


def salient_weights(model: TransformerBridge, task: Task, share: float) -> Masks:
    """The linear weights of the heads and neurons with the largest forget gradient, as masks by parameter.

    Args:
        share: of all heads and neurons.
    """
    parts, hf = Anatomy.of(model), float32_copy(model)
    names = [f"L{i}H{h}" for i in range(parts.n_layers) for h in range(parts.n_heads)]
    names += [f"MLP{i}.N{n}" for i in range(parts.n_layers) for n in range(parts.d_mlp)]
    linear = linear_weights(model)
    values = {name: value.detach().clone().requires_grad_(name in linear) for name, value in hf.named_parameters()}
    pairs = forced(task.forget_pairs.to(home(hf)), 1)
    with torch.enable_grad():
        logits = last_token_logits(hf, values, pairs.clean, pairs.places)
        loss = torch.nn.functional.cross_entropy(logits, pairs.answer_tokens)
        grads = dict(zip(linear, torch.autograd.grad(loss, [values[name] for name in linear]), strict=True))
    pieces = [[piece for piece in parts.slices(name) if piece.parameter in linear] for name in names]
    scores = []
    for slices in pieces:
        grown = [grads[piece.parameter].narrow(piece.dim, piece.start, piece.stop - piece.start) for piece in slices]
        square = torch.stack([g.float().square().sum().to(loss.device) for g in grown]).sum()
        scores.append(square / sum(g.numel() for g in grown))
    top = torch.stack(scores).topk(max(1, round(share * len(names)))).indices.tolist()
    return component_masks(model, [names[i] for i in top])
