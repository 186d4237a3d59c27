"""What a model says of every token of a text that it is told: logits position by position, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.data.fit import require_fit
from mansu_tl.data.forced import Places
from mansu_tl.errors import MansuError
from mansu_tl.models import home, require_ready
from mansu_tl.runs.metrics import asked_logits


@dataclass(frozen=True)
class Told:
    """Some tokens of a text, each behind those before it.

    Attributes:
        logits: of the position that predicts each token.
        targets: the tokens.
        rows: the text that each belongs to, counted over all texts; ascending, and in order within a text.
    """

    logits: Float[Tensor, "token vocab"]
    targets: Int[Tensor, " token"]
    rows: Int[Tensor, " token"]

    def log_probs(self) -> Float[Tensor, " token"]:
        """Each token's log-probability, in nats."""
        return self.logits.log_softmax(-1).gather(1, self.targets[:, None])[:, 0]


def told(
    model: TransformerBridge | PreTrainedModel,
    text: Sequences,
    first: Int[Tensor, " text"],
    what: str,
    batch_size: int = 32,
) -> Iterator[Told]:
    """The tokens of some texts from each one's `first` on, teacher-forced; everything on the CPU.

    Args:
        first: the position of the first token that is looked at, 1 or later.
        what: what errors call whoever asks.

    Raises:
        MansuError: no text, text that does not fit the model, or logits that are not finite.
    """
    if len(text) == 0:
        raise MansuError(f"{what}: there is no text; give at least one")
    require_fit(model, text)
    require_ready(model, text.tokens)
    for start in range(0, len(text), batch_size):
        batch = text[slice(start, start + batch_size)].trimmed()
        begins = first[start : start + batch_size].cpu()
        at = torch.arange(batch.tokens.shape[1])[None]
        rows, positions = ((at >= begins[:, None]) & batch.real.cpu()).nonzero(as_tuple=True)
        device = home(model)
        places = Places(rows.to(device), (positions - 1).to(device))
        logits = asked_logits(model, batch.tokens.to(device), places).cpu()
        if not torch.isfinite(logits).all():
            bad = start + int(rows[(~torch.isfinite(logits).all(-1)).nonzero()[0]])
            raise MansuError(f"{what}: logits of text {bad} are not finite; check the weights")
        yield Told(logits, batch.tokens.cpu()[rows, positions], rows + start)
