"""Where in depth a fact leaves its subject: how much of the answer's evidence still lies on the subject's own tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.data.masks import real_tokens
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.runs.metrics import Metric, logit_difference, options_read
from mansu_tl.runs.passes import chunks, prepared
from mansu_tl.runs.points import CLEAN, CORRUPT, Path


def subject_tokens(pairs: PromptPairs) -> Bool[Tensor, "pair pos"]:
    """The tokens in which a clean prompt differs from its corrupt one, or whose embeddings its corruption changes.

    Raises:
        MansuError: a pair whose prompts are the same.
    """
    subject = pairs.changed & real_tokens(pairs.clean, pairs.lengths)
    same = (~subject.any(1)).nonzero()[:, 0].tolist()
    if same:
        raise MansuError(f"pair {same[0]}: clean and corrupt prompt are the same, so no token is the subject's")
    return subject


def subject_share(
    model: TransformerBridge, pairs: PromptPairs, *, metric: Metric = logit_difference, batch_size: int = 64
) -> Float[Tensor, " layer"]:
    """The share of the answer's evidence that lies on the subject's tokens, behind every layer.

    Evidence at a token: (h(clean) - h(corrupt)) . dm/dh of the residual stream there, the gradient averaged over both ends,
    summed over pairs; the share is of its absolute value, so that what cancels between tokens still counts. It is 1 at the
    embedding and falls where attention moves the fact to the token that answers. Our definition, after causal tracing
    (Meng et al., arXiv 2202.05262).
    """
    subject_tokens(pairs)  # refuses a pair without
    run = prepared(model, pairs, options_read(metric))
    streams = Anatomy.of(model).hooks("stream")
    total = torch.zeros(2, len(streams), dtype=torch.float64)
    for _, chunk in chunks(run, batch_size):
        path = Path(model, chunk, metric, at_ends=streams, slopes=streams)
        slopes, subject = path.mean_gradients((CLEAN, CORRUPT)), chunk.changed.cpu()
        for i, key in enumerate(streams):
            clean, corrupt = (path.ends[end].values[key].float() for end in (CLEAN, CORRUPT))
            evidence = ((clean - corrupt) * slopes[key].to(clean.device)).sum(-1).double().cpu()
            for side, counted in enumerate((subject, ~subject)):
                total[side, i] += chunk.by_pair((evidence * counted).sum(1)).abs().sum()
    return (total[0] / total.sum(0).clamp_min(1e-30)).float()[1:]


def read_layer(share: Float[Tensor, " layer"]) -> int:
    """The first layer behind which less than half of the evidence lies on the subject's tokens; the last where none is."""
    below = (share < 0.5).nonzero()[:, 0].tolist()
    return below[0] if below else len(share) - 1
