"""Which of many texts a model finds likeliest behind prompts, without running all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Sequences
from mansu_tl.data.fit import require_fit
from mansu_tl.data.forced import Places
from mansu_tl.data.text import pad
from mansu_tl.models.state import home
from mansu_tl.runs.metrics import asked_logits, last_logits

# Prompts that are run at a time.
_BATCH = 64


def likeliest_of(
    model: TransformerBridge,
    prompts: Sequence[list[int]],
    answers: Sequence[tuple[int, ...]],
    pool: Sequence[tuple[int, ...]],
) -> list[bool]:
    """Whether each answer has the highest mean log-probability per token of a pool of texts behind its prompt.

    A text's mean is at most its first token's log-probability over its length, so most of the pool need not be run.
    """
    if not prompts:
        return []
    first = _first_log_probs(model, prompts, [text[0] for text in pool])
    lengths = torch.tensor([len(text) for text in pool], dtype=torch.float64)
    own = _per_token(model, list(zip(prompts, answers, strict=True)))
    rivals = (first.double() / lengths >= own[:, None]).nonzero().tolist()
    asked = [(i, j) for i, j in rivals if pool[j] != answers[i]]
    theirs = _per_token(model, [(prompts[i], pool[j]) for i, j in asked]).tolist()
    beaten = {i for (i, _), value in zip(asked, theirs, strict=True) if value >= own[i]}
    return [i not in beaten for i in range(len(prompts))]


def _first_log_probs(
    model: TransformerBridge, prompts: Sequence[list[int]], tokens: list[int]
) -> Float[Tensor, "prompt token"]:
    """Log-probabilities of some tokens behind each prompt."""
    parts = []
    for start in range(0, len(prompts), _BATCH):
        rows = pad(prompts[start : start + _BATCH], 0)
        parts.append(last_logits(model, *rows).log_softmax(-1)[:, tokens].cpu())
    return torch.cat(parts)


def _per_token(model: TransformerBridge, asked: Sequence[tuple[list[int], tuple[int, ...]]]) -> Float[Tensor, " text"]:
    """The mean log-probability per token of each text behind its prompt."""
    out = torch.zeros(len(asked), dtype=torch.float64)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]) + len(asked[i][1]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        rows = Sequences(*pad([[*asked[i][0], *asked[i][1][:-1]] for i in chosen], 0)).to(home(model))
        require_fit(model, rows)
        row = torch.tensor([at for at, i in enumerate(chosen) for _ in asked[i][1]])
        position = torch.tensor([len(asked[i][0]) - 1 + step for i in chosen for step in range(len(asked[i][1]))])
        token = torch.tensor([each for i in chosen for each in asked[i][1]])
        logits = asked_logits(model, rows.tokens, Places(row, position)).cpu()
        found = logits.log_softmax(-1).gather(1, token[:, None])[:, 0].double()
        sums = torch.zeros(len(chosen), dtype=torch.float64).index_add(0, row, found)
        out[chosen] = sums / torch.tensor([len(asked[i][1]) for i in chosen])
    return out
