"""RMU: push the forget prompts' hidden states towards a random direction, hold those of the retain text.

Source: Li et al. 2024 (WMDP), arXiv 2403.03218, sec. 4: E |h(forget) - c u|^2 + alpha E |h(retain) - h0(retain)|^2 over all
tokens, h after layer l, u a random unit vector from [0, 1)^d, only layers l-2..l being trained. Theirs: l = 7 of 32
layers, alpha = 1200, c = 6.5 absolute, the MLPs' down matrices only. Ours: c in units of the mean norm of h, as
adaptive RMU scales it (Huu-Tien et al. 2024, arXiv 2408.06223); l is a share of the depth; all MLP matrices, for at a
depth of four layers the down matrices of two alone do not forget; and the mean square is taken over d_model too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Sequences, Task
from mansu_tl.data.masks import real_tokens
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, component_masks, float32_copy, home
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning.batches import Values, run_values
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.training import Batch, TrainingSettings, train


@dataclass(frozen=True)
class RmuSettings(Digested):
    """Settings of RMU.

    Attributes:
        depth: where h is read, as a share of the layers.
        steering: c, in units of the mean norm of h on the forget prompts.
        retain_weight: alpha.
        training: the shared loop.
    """

    depth: float = 0.5
    steering: float = 2.0
    retain_weight: float = 10.0
    training: TrainingSettings = field(default_factory=TrainingSettings)


def rmu(
    model: TransformerBridge,
    task: Task,
    settings: RmuSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Unlearn with representation misdirection.

    Raises:
        MansuError: a depth outside (0, 1], or what the shared loop refuses.
    """
    if not 0 < settings.depth <= 1:
        raise MansuError(f"rmu: depth={settings.depth}; choose a share of the layers in (0, 1]")
    cmap, hf = Anatomy.of(model), float32_copy(model)
    layer = max(1, round(settings.depth * cmap.n_layers))
    only = component_masks(model, [f"MLP{i}" for i in range(max(0, layer - 3), layer)])
    pairs = task.forget_pairs.to(home(hf))
    forget = Sequences(pairs.clean, pairs.lengths)
    start = dict(hf.named_parameters())
    with torch.no_grad():
        norm = _hidden(hf, start, forget, layer).norm(dim=-1).mean()
    direction = torch.rand(cmap.d_model, generator=torch.Generator().manual_seed(seed)).to(norm.device)
    target = settings.steering * norm * direction / direction.norm()

    def loss(batch: Batch) -> Tensor:
        steered = _hidden(batch.model, batch.values, Sequences(batch.pairs.clean, batch.pairs.lengths), layer)
        kept = _hidden(batch.model, batch.values, batch.retain, layer)
        with torch.no_grad():
            before = _hidden(batch.model, batch.original, batch.retain, layer)
        away, held = (steered - target).square().mean(), (kept - before).square().mean()
        return away + settings.retain_weight * held

    return train(
        model,
        task,
        "rmu",
        loss,
        settings.training,
        only=only,
        facts={"layer": layer - 1},
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
    )


def _hidden(hf: PreTrainedModel, values: Values, text: Sequences, layer: int) -> Float[Tensor, "token d_model"]:
    """The residual stream after `layer` layers, at every real token."""
    _, states = run_values(hf, values, text.tokens, text.lengths, states=True)
    return states[layer][real_tokens(text.tokens, text.lengths)].float()
