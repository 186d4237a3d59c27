"""An HF model run at given values of its parameters: last tokens of prompts, every token of sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.data.masks import real_tokens

Values = Mapping[str, Tensor]
# Sequences are run in two groups if that leaves this share of the padded tokens, of batches that are worth a second pass.
_WORTH, _LEAST_TOKENS = 0.85, 512
# Sequences in a pass that fills a table.
_TABLE_ROWS = 128
# Numbers of one kind (logits, compared tokens) that exist at one time.
_MOST_NUMBERS = 2**26


def last_token_logits(
    model: PreTrainedModel, values: Values, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]
) -> Float[Tensor, "row vocab"]:
    """Differentiable logits at the last real token, with `values` in place of the model's parameters.

    Only that token is unembedded.
    """
    return run_values(model, values, tokens, lengths)[0]


def last_token_states(
    model: PreTrainedModel, values: Values, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "row vocab"], Float[Tensor, "row layer d_model"]]:
    """`last_token_logits`, and the residual stream behind every layer at the same token."""
    logits, hidden = run_values(model, values, tokens, lengths, states=True)
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    return logits, torch.stack([state[rows, lengths - 1].float() for state in hidden[1:]], 1)


def run_values(
    model: PreTrainedModel,
    values: Values,
    tokens: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
    *,
    states: bool = False,
) -> tuple[Float[Tensor, "row vocab"], tuple[Float[Tensor, "row pos d_model"], ...]]:
    """Logits at the last real token and, if asked for, the residual streams: of the embedding, then behind every layer."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)

    def cut(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        # Contiguous on purpose: a strided slice turns the unembedding into one product per row.
        return (inputs[0][rows, lengths - 1][:, None].contiguous(),)

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        out = functional_call(model, dict(values), (tokens,), {"use_cache": False, "output_hidden_states": states})
    finally:
        handle.remove()
    return out.logits[:, 0].float(), out.hidden_states if states else ()


@dataclass(frozen=True)
class Predicted:
    """What a model says of the next token at every real position of some sequences, in no particular order."""

    logits: Float[Tensor, "token vocab"]
    targets: Int[Tensor, " token"]
    rows: Int[Tensor, " token"]  # the sequence that each belongs to
    places: Int[Tensor, " token"]  # the position in front of the target


def sequence_logits(model: PreTrainedModel, values: Values, batch: Sequences) -> Predicted:
    """Next-token logits and targets of every real position; short and long sequences are run apart, to pad less."""
    parts = []
    for rows in by_length(batch.lengths):
        there = rows.to(batch.tokens.device)
        part = batch[rows]
        part = Sequences(part.tokens[:, : int(part.lengths.max())], part.lengths)
        logits = functional_call(model, dict(values), (part.tokens,), {"use_cache": False}).logits
        row, place = real_targets(part).nonzero(as_tuple=True)
        parts.append((logits[row, place].float(), part.tokens[row, place + 1], there[row], place))
    if len(parts) == 1:
        return Predicted(*parts[0])
    return Predicted(*(torch.cat(each) for each in zip(*parts, strict=True)))


def by_length(lengths: Int[Tensor, " row"]) -> list[Int[Tensor, " _"]]:
    """Row numbers, in two groups where running the shorter ones apart saves a good part of the padding; else in one."""
    order = lengths.cpu().argsort(stable=True)
    ordered, count = lengths.cpu()[order], len(order)
    whole = count * int(ordered[-1])
    first = torch.arange(1, count)
    cost = first * ordered[:-1] + (count - first) * ordered[-1]
    if whole < _LEAST_TOKENS or not len(cost) or int(cost.min()) > _WORTH * whole:
        return [torch.arange(count)]
    cut = int(cost.argmin()) + 1
    return [order[:cut].sort().values, order[cut:].sort().values]


def real_targets(batch: Sequences) -> Bool[Tensor, "row target"]:
    """Which next-token targets lie inside each sequence."""
    return real_tokens(batch.tokens, batch.lengths)[:, 1:]


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
        if asked > len(text) and int((text.lengths - 1).sum()) * vocab <= _MOST_NUMBERS:
            self._table = self._filled(vocab)

    @torch.no_grad()
    def _filled(self, vocab: int) -> Float[Tensor, "token vocab"]:
        table = torch.empty(int((self.text.lengths - 1).sum()), vocab, device=self.text.tokens.device)
        for start in range(0, len(self.text), _TABLE_ROWS):
            found = sequence_logits(self.model, self.values, self.text[slice(start, start + _TABLE_ROWS)])
            table[self._starts[found.rows + start] + found.places] = found.logits
        return table

    @torch.no_grad()
    def __call__(self, rows: Int[Tensor, " row"], found: Predicted) -> Float[Tensor, "token vocab"]:
        """The original's logits where another model's were found, in some rows of the text."""
        if self._table is not None:
            return self._table[self._starts[rows.to(self._starts.device)[found.rows]] + found.places]
        return sequence_logits(self.model, self.values, self.text[rows]).logits


def joined(a: Sequences, b: Sequences) -> Sequences:
    """The rows of both, padded to one width (padding repeats the pad id already there, or 0)."""
    width = max(a.tokens.shape[1], b.tokens.shape[1])
    rows = [torch.nn.functional.pad(s.tokens, (0, width - s.tokens.shape[1])) for s in (a, b)]
    return Sequences(torch.cat(rows), torch.cat([a.lengths, b.lengths]))
