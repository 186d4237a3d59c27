"""SURE: a large learning rate, kept to the modules on which the forget loss depends most.

Source: Zhang et al. 2024, "Catastrophic failure of LLM unlearning via quantization", arXiv 2410.16454, sec. 5: modules
whose forget-gradient norm is above a quantile are updated with a large learning rate, all others stay. Theirs leaves the
module open (heads, MLPs); ours: attention heads and MLP neurons, the norm divided by the root of the module's size. The
loss is GradDiff's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, component_masks, float32_copy, home, linear_weights
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.batches import last_token_logits
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class SureSettings(Digested):
    """Settings of SURE.

    Attributes:
        share: modules that are trained, as a share of all; theirs is the top tenth.
        retain_weight: weight of the retain loss against the ascent.
        training: the shared loop, with a learning rate ten times the other baselines'.
    """

    share: float = 0.1
    retain_weight: float = 1.0
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(learning_rate=3e-4))


def sure(
    model: TransformerBridge,
    task: Task,
    settings: SureSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with GradDiff on the salient modules only.

    Raises:
        MansuError: a share outside (0, 1], or what the shared loop refuses.
    """
    if not 0 < settings.share <= 1:
        raise MansuError(f"sure: share={settings.share}; choose a share of the modules in (0, 1]")
    only = salient_weights(model, task, settings.share)

    def loss(batch: Batch) -> Tensor:
        return batch.answer_log_prob(batch.forget_logits()).mean() + settings.retain_weight * batch.retain_loss()

    return train(
        model, task, "sure", loss, settings.training, only=only, seed=seed, progress=progress, checkpoint=checkpoint
    )


def salient_weights(model: TransformerBridge, task: Task, share: float) -> dict[str, Bool[Tensor, ...]]:
    """The linear weights of the heads and neurons with the largest forget gradient, as masks by parameter.

    Args:
        share: of all heads and neurons.
    """
    cmap, hf = Anatomy.of(model), float32_copy(model)
    names = [f"L{i}H{h}" for i in range(cmap.n_layers) for h in range(cmap.n_heads)]
    names += [f"MLP{i}.N{n}" for i in range(cmap.n_layers) for n in range(cmap.d_mlp)]
    linear = linear_weights(model)
    values = {name: value.detach().clone().requires_grad_(name in linear) for name, value in hf.named_parameters()}
    pairs = task.forget_pairs.to(home(hf))
    with torch.enable_grad():
        logits = last_token_logits(hf, values, pairs.clean, pairs.lengths)
        loss = torch.nn.functional.cross_entropy(logits, pairs.answers)
        grads = dict(zip(linear, torch.autograd.grad(loss, [values[name] for name in linear]), strict=True))
    pieces = [[piece for piece in cmap.slices(name) if piece.parameter in linear] for name in names]
    scores = []
    for parts in pieces:
        grown = [grads[part.parameter].narrow(part.dim, part.start, part.stop - part.start) for part in parts]
        square = torch.stack([g.float().square().sum() for g in grown]).sum()
        scores.append(square / sum(g.numel() for g in grown))
    top = torch.stack(scores).topk(max(1, round(share * len(names)))).indices.tolist()
    return component_masks(hf, [names[i] for i in top])
