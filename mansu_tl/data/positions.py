"""How the positions of prompts are gathered into the rows of a per-position result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mansu_tl.data.masks import real_tokens
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError


@dataclass(frozen=True)
class Positions:
    """Rows of a per-position result.

    Attributes:
        names: of the rows.
        index: row of every token; -1 = padding, left out.
    """

    names: tuple[str, ...]
    index: Int[Tensor, "pair pos"]

    def add(self, total: Tensor, piece: slice, values: Tensor) -> None:
        """Add the values [pair, pos, ...] of some pairs to their rows of `total`, which is in float64 on the CPU."""
        index = self.index[piece].flatten().cpu()
        total.index_add_(0, index[index >= 0], values.flatten(0, 1).double().cpu()[index >= 0])


@torch_defaults()
def positions(pairs: PromptPairs, align: str = "start") -> Positions:
    """Rows for the positions of some pairs.

    Args:
        align: "start" counts from the first token ("0", "1", ...), "end" from the last real one ("-1" = last), "span"
            gathers the pairs' named spans, and all other positions as "rest".

    Raises:
        MansuError: an unknown alignment, no spans, or spans that share a position.
    """
    width = pairs.clean.shape[1]
    place = torch.arange(width, device=pairs.clean.device)[None].expand(len(pairs), width)
    real = real_tokens(pairs.clean, pairs.lengths)
    if align == "start":
        names, index = tuple(str(i) for i in range(width)), place
    elif align == "end":
        names = tuple(str(i) for i in range(-width, 0))
        index = place + (width - pairs.lengths)[:, None]
    elif align == "span":
        if not pairs.spans:
            raise MansuError("positions: align='span', but the pairs have no spans; name them in PromptPairs.from_text")
        names = (*(span.name for span in pairs.spans), "rest")
        index = torch.full_like(place, len(pairs.spans))
        for i, span in enumerate(pairs.spans):
            inside = (place >= span.start[:, None]) & (place < span.stop[:, None])
            shared = inside & (index != len(pairs.spans))
            if shared.any():
                pair, where = shared.nonzero()[0].tolist()
                other = pairs.spans[int(index[pair, where])].name
                raise MansuError(
                    f"pair {pair}: spans {other!r} and {span.name!r} share position {where}; scores over both would "
                    "count it twice"
                )
            index = torch.where(inside, i, index)
    else:
        raise MansuError(f"positions: unknown alignment {align!r}; choose start, end or span")
    return Positions(names, torch.where(real, index, -1))
