"""Attribution patching of MLP neurons: which neurons of an MLP carry the clean/corrupt difference to the answer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.metrics import Metric, logit_difference
from mansu_tl.models import component_map
from mansu_tl.patching.runs import Hook, check, chunks, keep, measured, run


def neuron_attribution(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    signed: bool = False,
    metric: Metric = logit_difference,
    batch_size: int = 64,
) -> Float[Tensor, "layer neuron"]:
    """First-order effect of each MLP neuron: (h(clean) - h(corrupt)) . dm/dh, gradients averaged over both ends.

    Args:
        signed: keep the sign when averaging over pairs; otherwise the mean of |score|, so that a neuron which serves
            one fact and hinders another still counts.
    """
    check(model, pairs)
    cmap = component_map(model)
    keys = {f"h{i}": f"blocks.{i}.mlp.out.hook_in" for i in range(cmap.n_layers)}
    total = torch.zeros(cmap.n_layers, cmap.d_mlp, dtype=torch.float64)
    for _, chunk in chunks(pairs, batch_size):
        values, grads = [], []
        for tokens in (chunk.clean, chunk.corrupt):
            kept: dict[str, Tensor] = {}

            def begin(stream: Tensor, hook: object) -> Tensor:
                return stream.detach().requires_grad_()

            hooks: list[Hook] = [("blocks.0.hook_in", begin), *((hook, keep(kept, key)) for key, hook in keys.items())]
            with torch.enable_grad():
                logits = run(model, tokens, chunk.lengths, hooks)
                value = measured(metric, logits.float(), chunk).sum()
                grads.append(torch.autograd.grad(value, [kept[key] for key in keys]))
            values.append([kept[key].detach() for key in keys])
        for i in range(cmap.n_layers):
            slope = (grads[0][i] + grads[1][i]) / 2
            score = ((values[0][i] - values[1][i]) * slope).sum(1).double()
            total[i] += (score if signed else score.abs()).sum(0).cpu()
    return (total / len(pairs)).float()
