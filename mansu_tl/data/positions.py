"""How the positions of prompts are gathered into the rows of a per-position result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mansu_tl.data.forced import Forced, forced
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError


@dataclass(frozen=True)
class Positions:
    """Rows of a per-position result.

    Attributes:
        names: of the rows.
        index: row of every token that is run; -1 = padding, left out.
        owner: the pair behind each row of tokens.
    """

    names: tuple[str, ...]
    index: Int[Tensor, "run pos"]
    owner: Int[Tensor, " run"]

    def of(self, pairs: slice | Int[Tensor, " pair"]) -> Int[Tensor, "run pos"]:
        """The index of the tokens that are run for some pairs, pair by pair."""
        chosen = range(pairs.start, pairs.stop) if isinstance(pairs, slice) else pairs.tolist()
        owner = self.owner.cpu()
        first, count = torch.searchsorted(owner, torch.tensor([*chosen])), torch.bincount(owner).tolist()
        return torch.cat([self.index[i : i + count[pair]] for i, pair in zip(first.tolist(), chosen, strict=True)])

    def add(self, total: Tensor, piece: slice, values: Tensor) -> None:
        """Add the values [run, pos, ...] of some pairs to their rows of `total`, which is in float64 on the CPU."""
        index = self.of(piece).flatten().cpu()
        total.index_add_(0, index[index >= 0], values.flatten(0, 1).double().cpu()[index >= 0])


@torch_defaults()
def positions(pairs: PromptPairs | Forced[PromptPairs], align: str = "start") -> Positions:
    """Rows for the positions of some pairs.

    Where an option has several tokens, those behind the prompt have positions too.

    Args:
        align: "start" counts from the first token ("0", "1", ...), "end" from the prompt's last real one ("-1" = last; "+1",
            ... are the answer's tokens behind it), "span" gathers the pairs' named spans, the answer's tokens as "answer",
            and all other positions as "rest".

    Raises:
        MansuError: an unknown alignment, no spans, or spans that share a position.
    """
    run = pairs if isinstance(pairs, Forced) else forced(pairs)
    pairs, width = run.given, run.clean.shape[1]
    place = torch.arange(width, device=run.clean.device)[None].expand(len(run.clean), width)
    behind = max(0, int(run.steps[run.real].max()) + 1) if run.targets is not None else 0
    if align == "start":
        names, index = tuple(str(i) for i in range(width)), place
    elif align == "end":
        most = pairs.clean.shape[1]
        names = (*(str(i) for i in range(-most, 0)), *(f"+{i + 1}" for i in range(behind)))
        index = place + (most - pairs.lengths)[run.owner][:, None]
    elif align == "span":
        if not pairs.spans:
            raise MansuError("positions: align='span', but the pairs have no spans; name them in PromptPairs.from_text")
        names = (*(span.name for span in pairs.spans), *(["answer"] if behind else []), "rest")
        index = torch.full_like(place, len(names) - 1)
        for i, span in enumerate(pairs.spans):
            inside = (place >= span.start[run.owner][:, None]) & (place < span.stop[run.owner][:, None])
            shared = inside & (index != len(names) - 1)
            if shared.any():
                row, where = shared.nonzero()[0].tolist()
                pair, other = int(run.owner[row]), pairs.spans[int(index[row, where])].name
                raise MansuError(
                    f"pair {pair}: spans {other!r} and {span.name!r} share position {where}; scores over both would "
                    "count it twice"
                )
            index = torch.where(inside, i, index)
        if behind:
            index = torch.where(run.steps >= 0, len(pairs.spans), index)
    else:
        raise MansuError(f"positions: unknown alignment {align!r}; choose start, end or span")
    return Positions(names, torch.where(run.real, index, -1), run.owner)
