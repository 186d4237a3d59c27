"""EAP-IG's metric on "greater-than": how much likelier later years are than earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mansu_tl.data.sources.circuits import year_tokens
from mansu_tl.data.text import TextSource
from mansu_tl.errors import MansuError


@dataclass(frozen=True)
class YearDifference:
    """The probability of all years after the label minus that of the label and all years before it, in [-1, 1].

    Hanna et al. 2023 (arXiv 2305.00586), section 2; `prob_diff` in EAP-IG. The label is the pairs' first distractor.

    Attributes:
        tokens: of the years 00 to 99.
    """

    tokens: tuple[int, ...]
    options_read = 2
    __name__ = "year_difference"

    @classmethod
    def of(cls, tokenizer: TextSource) -> YearDifference:
        """The metric for a model, or its tokenizer.

        Raises:
            MansuError: the tokenizer writes a year of two digits as several tokens.
        """
        return cls(year_tokens(tokenizer))

    def __call__(self, logits: Float[Tensor, "place vocab"], pairs: Any) -> Float[Tensor, " pair"]:
        """The metric of every pair.

        Raises:
            MansuError: a pair whose distractor is no year.
        """
        tokens = torch.tensor(self.tokens, device=logits.device)
        found = pairs.distractors[:, :1].to(logits.device) == tokens
        if not found.any(1).all():
            raise MansuError(
                "year difference: a pair's first distractor is none of the years; read them from greater-than"
            )
        later = torch.arange(len(tokens), device=logits.device) > found.int().argmax(1)[:, None]
        chances = logits.softmax(-1)[:, tokens]
        return (torch.where(later, chances, -chances)).sum(1)
