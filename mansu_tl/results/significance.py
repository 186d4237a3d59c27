"""How often chance alone would give a difference as large, and what is left of it where several are looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.errors import MansuError

_FLIPS = 20_000
# Below so many terms every flip is looked at.
_FEW = 14


def sign_flip(terms: Float[Tensor, " term"], seed: int = 0) -> float:
    """Two-sided p of a sum whose terms would be as likely of either sign if there were no difference.

    All flips of up to 14 terms; of more, 20,000 random ones and the observed one. After Fisher's randomization test (1935).

    Args:
        terms: a fact's difference each, weighted as it counts in the whole.
        seed: of the flips.

    Raises:
        MansuError: no term.
    """
    if not len(terms):
        raise MansuError("significance: no difference to test; give one for each fact")
    values = terms.detach().double().cpu()
    if len(values) <= _FEW:
        numbers = torch.arange(2 ** len(values))[:, None]
        signs = 1.0 - 2.0 * ((numbers >> torch.arange(len(values))) & 1)
    else:
        draws = torch.randint(2, (_FLIPS, len(values)), generator=torch.Generator().manual_seed(seed))
        signs = torch.cat([torch.ones(1, len(values)), 1.0 - 2.0 * draws])
    found = (signs.double() @ values).abs()
    # What is the same sum in another order differs in its last bits.
    return float((found >= found[0] * (1 - 1e-9)).double().mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p after Holm's correction for having looked at all of them (Holm 1979), in the order given.

    Raises:
        MansuError: a p that is no probability.
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise MansuError(f"significance: p={wrong[0]}; give probabilities, between 0 and 1")
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    out, highest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        out[i] = highest
    return out
