"""What a step of any method draws and looks at: forget prompts, retain text, and what the original says of both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.forced import Forced, forced
from mansu_tl.runs.metrics import option_scores
from mansu_tl.runs.passes import chunks
from mansu_tl.runs.values import Predicted, Values, last_token_logits, sequence_logits

# Forget prompts and sequences in a pass without gradients, and the original's logits of one kind that are kept (a
# quarter of a gibibyte).
_ROWS, _TABLE_ROWS, _MOST_KEPT = 256, 128, 2**26


class Sampler:
    """Endless seeded batches of row numbers, every row once per round.

    Attributes:
        order: the rows that are left of this round; with the generator's state, all that it remembers.
    """

    def __init__(self, size: int, batch: int, generator: torch.Generator) -> None:
        self._size, self._batch, self._generator = size, min(batch, size), generator
        self.order = torch.empty(0, dtype=torch.long)

    def __call__(self) -> Int[Tensor, " row"]:
        """The next batch."""
        while self.order.numel() < self._batch:
            self.order = torch.cat([self.order, torch.randperm(self._size, generator=self._generator)])
        picked, self.order = self.order[: self._batch], self.order[self._batch :]
        return picked


@dataclass(frozen=True)
class Batch:
    """What an objective sees at one step."""

    source: Source
    values: Values  # those being trained, or a method's view of them
    rows: Int[Tensor, " row"]  # of the forget pairs
    retain_rows: Int[Tensor, " retain"]  # of the whole retain text, near ones behind the far ones
    n_far: int
    cut: bool = False  # whether forget prompts are run without the columns that are padding in all of them

    @property
    def model(self) -> PreTrainedModel:
        """The model, to be run at `values`."""
        return self.source.model

    @cached_property
    def pairs(self) -> PromptPairs:
        """The forget pairs."""
        return self.source.pairs[self.rows]

    @cached_property
    def retain(self) -> Sequences:
        """The retain sequences."""
        return self.source.text.text[self.retain_rows]

    @cached_property
    def forget(self) -> Forced[PromptPairs]:
        """The forget prompts as they are run for their answers."""
        asked = forced(self.pairs, 1)
        return asked.trimmed() if self.cut else asked

    @property
    def places(self) -> Int[Tensor, " place"]:
        """Their asked positions, counted over those of all forget pairs."""
        return self.source.places(self.rows)

    @cached_property
    def forget_logits(self) -> Float[Tensor, "place vocab"]:
        """Logits at the asked positions of the forget prompts under the current values."""
        return last_token_logits(self.model, self.values, self.forget.clean, self.forget.places)

    @cached_property
    def original_logits(self) -> Float[Tensor, "place vocab"]:
        """The same of the original model."""
        return self.source.original_answers(self.rows)

    def answer_log_prob(self, logits: Float[Tensor, "place vocab"]) -> Float[Tensor, " row"]:
        """Log-probability of each forget answer, summed over its tokens."""
        return self.forget.log_probs(logits)[:, 0]

    @cached_property
    def retained(self) -> Predicted:
        """What the model says of the retain sequences."""
        return sequence_logits(self.model, self.values, self.retain)

    @cached_property
    def retained_before(self) -> Float[Tensor, "token vocab"]:
        """What the original model says in the same places."""
        return self.source.text(self.retain_rows, self.retained)


class OriginalText:
    """What the original model says at every position of a text: looked up where it fits, else computed when asked for.

    Args:
        asked: how many sequences will be asked for in all; a table is only made if that is more than the text holds.
    """

    def __init__(self, model: PreTrainedModel, values: Values, text: Sequences, asked: int) -> None:
        self.model, self.values, self.text = model, values, text
        self._starts = (text.lengths - 1).cumsum(0) - (text.lengths - 1)
        self._table: Tensor | None = None
        vocab = model.get_output_embeddings().weight.shape[0]
        if asked > len(text) and int((text.lengths - 1).sum()) * vocab <= _MOST_KEPT:
            self._table = self._filled(vocab)

    @torch.no_grad()
    def _filled(self, vocab: int) -> Float[Tensor, "token vocab"]:
        table = torch.empty(int((self.text.lengths - 1).sum()), vocab, device=self.text.tokens.device)
        for start in range(0, len(self.text), _TABLE_ROWS):
            predictions = sequence_logits(self.model, self.values, self.text[slice(start, start + _TABLE_ROWS)])
            table[self._starts[predictions.rows + start] + predictions.places] = predictions.logits
        return table

    @torch.no_grad()
    def __call__(self, rows: Int[Tensor, " row"], predictions: Predicted) -> Float[Tensor, "token vocab"]:
        """The original's logits at the tokens that another model predicted, in some rows of the text."""
        if self._table is not None:
            return self._table[self._starts[rows.to(self._starts.device)[predictions.rows]] + predictions.places]
        return sequence_logits(self.model, self.values, self.text[rows]).logits


class Source:
    """Where the batches of one training come from: forget pairs, far and near retain text, the original's parameters.

    Args:
        asked: how many retain sequences will be compared with the original in all; see `OriginalText`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: Values,
        pairs: PromptPairs,
        far: Sequences,
        near: Sequences,
        asked: int = 0,
    ) -> None:
        self.model, self.original, self.pairs = model, original, pairs
        self.n_far, self.n_near = len(far), len(near)
        self.text = OriginalText(model, original, far.joined(near), asked)
        self._answers: Tensor | None = None

    @property
    def near(self) -> Sequences:
        """The near text."""
        return self.text.text[slice(self.n_far, None)]

    def samplers(self, forget: int, far: int, near: int, generator: torch.Generator) -> tuple[Sampler, ...]:
        """What draws the rows of a batch: forget pairs, far text and, where there is any, near text."""
        sizes = [(len(self.pairs), forget), (self.n_far, far), *([(self.n_near, near)] if self.n_near else [])]
        return tuple(Sampler(size, batch, generator) for size, batch in sizes)

    def draw(self, samplers: tuple[Sampler, ...], values: Values) -> Batch:
        """The next batch, for a model of given values."""
        rows, far, *near = (draw() for draw in samplers)
        return Batch(self, values, rows, torch.cat([far, *(each + self.n_far for each in near)]), len(far))

    def places(self, rows: Int[Tensor, " row"]) -> Int[Tensor, " place"]:
        """The asked positions of some forget prompts, counted over those of all."""
        if self.pairs.options.shape[2] == 1:
            return rows
        counts = self.pairs.option_lengths[:, 0].cpu()
        ends = counts.cumsum(0)
        return torch.cat([torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in rows.tolist()])

    def original_answers(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "place vocab"]:
        """The original model's logits at the asked positions of some forget prompts: kept where all fit, else computed
        again."""
        vocab = self.model.get_output_embeddings().weight.shape[0]
        if int(self.pairs.option_lengths[:, 0].sum()) * vocab > _MOST_KEPT:
            return answers(self.model, self.original, self.pairs[rows])
        if self._answers is None:
            self._answers = answers(self.model, self.original, self.pairs)
        return self._answers[self.places(rows)]


@torch.no_grad()
def answers(model: PreTrainedModel, values: Values, pairs: PromptPairs) -> Float[Tensor, "place vocab"]:
    """Logits at the asked positions of forget prompts, without gradients."""
    parts = (part for _, part in chunks(forced(pairs, 1), _ROWS))
    return torch.cat([last_token_logits(model, values, part.clean, part.places) for part in parts])


@torch.no_grad()
def choices(model: PreTrainedModel, values: Values, asked: Forced[PromptPairs]) -> Float[Tensor, "pair option"]:
    """What the options of forget prompts are compared by, without gradients."""
    parts = (part for _, part in chunks(asked, max(1, _ROWS * len(asked) // len(asked.clean))))
    return torch.cat([option_scores(p, last_token_logits(model, values, p.clean, p.places)) for p in parts])
