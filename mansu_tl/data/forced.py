"""Prompts as they are run: where an option has several tokens, all but its last one stand behind the prompt.

An option's log-probability is teacher-forced: that of each of its tokens behind the prompt and the tokens before it, summed.
The positions that are read are the prompt's last one and those of the tokens behind it. Options that begin alike share
rows and positions, so options of one token need nothing but the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mansu_tl.data.masks import real_tokens
from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.task import Questions

G = TypeVar("G", PromptPairs, Questions)


@dataclass(frozen=True)
class Places:
    """Positions of some rows, one entry each."""

    rows: Int[Tensor, " place"]
    positions: Int[Tensor, " place"]

    @classmethod
    def last(cls, lengths: Int[Tensor, " row"]) -> Places:
        """Every row's last real token."""
        return cls(torch.arange(len(lengths), device=lengths.device), lengths - 1)

    def repeated(self, times: int, rows: int) -> Places:
        """The same positions in every of some copies, of so many rows each, one below another."""
        first = rows * torch.arange(times, device=self.rows.device).repeat_interleave(len(self.rows))
        return Places(first + self.rows.repeat(times), self.positions.repeat(times))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The index of these positions in a tensor [row, pos, ...] there."""
        return self.rows.to(device), self.positions.to(device)


Asked = Int[Tensor, " row"] | Places


def places_of(asked: Asked) -> Places:
    """Positions as they are, or of rows' lengths the last ones."""
    return asked if isinstance(asked, Places) else Places.last(asked)


@dataclass(frozen=True)
class Targets:
    """The tokens whose log-probabilities add up to the options'.

    Attributes:
        place: the position that predicts each.
        token: the token.
        slot: the option that it belongs to, counted over all prompts.
    """

    place: Int[Tensor, " target"]
    token: Int[Tensor, " target"]
    slot: Int[Tensor, " target"]


@dataclass(frozen=True)
class Forced(Generic[G]):
    """Pairs or questions with the rows that have to be run to know their first `count` options' log-probabilities.

    Its length and its indices are those of the pairs. Metrics are given this in place of pairs where options have several
    tokens, with the logits at `places`.

    Attributes:
        given: the pairs or questions.
        count: how many options are read, the answer first.
        clean: the rows, right-padded.
        corrupt: the same tokens behind the corrupt prompts (of questions the clean rows again).
        lengths: real tokens of each row.
        owner: the pair behind each row, ascending.
        places: the positions that are read, pair by pair.
        targets: what is read there; None where each of the options is one token, so that the rows are the prompts.
        swapped: the two ends have changed places.
        lowered: nats taken from the log-probability of each of the answer's tokens.
    """

    given: G
    count: int
    clean: Int[Tensor, "row pos"]
    corrupt: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    owner: Int[Tensor, " row"]
    places: Places
    targets: Targets | None
    swapped: bool = False
    lowered: float = 0.0

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Forced[G]:
        """The chosen pairs, their rows as wide as before."""
        part = forced(self.given[index], self.count, self.clean.shape[1])
        part = replace(part, lowered=self.lowered)
        return part.exchanged() if self.swapped else part

    def trimmed(self) -> Forced[G]:
        """The same without the columns that are padding in every row."""
        width = int(self.lengths.max())
        return replace(self, clean=self.clean[:, :width], corrupt=self.corrupt[:, :width])

    def exchanged(self) -> Forced[G]:
        """The same with clean and corrupt rows exchanged."""
        return replace(self, clean=self.corrupt, corrupt=self.clean, swapped=not self.swapped)

    @property
    def told(self) -> G | Forced[G]:
        """What a metric is given: the pairs where all of their options are one token, else this."""
        return self.given if self.given.options.shape[2] == 1 else self

    @property
    def longest(self) -> Int[Tensor, " pair"]:
        """The real tokens of each pair's longest row, on the CPU."""
        lengths = self.lengths.cpu()
        return lengths.new_zeros(len(self)).scatter_reduce(0, self.owner.cpu(), lengths, "amax")

    @property
    def real(self) -> Bool[Tensor, "row pos"]:
        """Which tokens lie inside their row."""
        return real_tokens(self.clean, self.lengths)

    @property
    def changed(self) -> Bool[Tensor, "row pos"]:
        """Where the two ends differ in what enters the model."""
        if not isinstance(self.given, PromptPairs):
            return torch.zeros_like(self.real)
        changed = _widened(self.given.changed, self.clean.shape[1])
        return changed if self.targets is None else changed[self.owner] & (self.steps < 0)

    @property
    def steps(self) -> Int[Tensor, "row pos"]:
        """At every position the number of its token among the answer's, from 0; below 0 in the prompt."""
        return torch.arange(self.clean.shape[1], device=self.clean.device) - self.given.lengths[self.owner][:, None]

    @property
    def answer_tokens(self) -> Int[Tensor, " place"]:
        """The answer's token that each position predicts, of rows that are run for the answer alone."""
        return self.given.options[:, 0, 0] if self.targets is None else self.targets.token

    def log_probs(self, logits: Float[Tensor, "place vocab"]) -> Float[Tensor, "pair option"]:
        """The log-probability of each option, summed over its tokens, in nats."""
        each = logits.log_softmax(-1)
        if self.targets is None:
            found = each.gather(1, self.given.options[:, : self.count, 0].to(logits.device))
        else:
            place, token, slot = (part.to(logits.device) for part in vars(self.targets).values())
            found = each.new_zeros(len(self) * self.count).index_add(0, slot, each[place, token])
            found = found.view(len(self), self.count)
        if self.lowered:
            lengths = self.given.option_lengths[:, 0].to(logits.device)
            found = torch.cat([found[:, :1] - self.lowered * lengths[:, None], found[:, 1:]], 1)
        return found

    def per_token(self, logits: Float[Tensor, "place vocab"]) -> Float[Tensor, "pair option"]:
        """The mean log-probability of each option's tokens, by which options are compared."""
        return self.log_probs(logits) / self.given.option_lengths[:, : self.count].to(logits.device)

    def greedy(self, logits: Float[Tensor, "place vocab"]) -> Bool[Tensor, " pair"]:
        """Whether the answer is what greedy decoding writes: each of its tokens the likeliest behind those before it."""
        best = logits.argmax(-1)
        if self.targets is None:
            return best == self.given.options[:, 0, 0].to(logits.device)
        place, token, slot = (part.to(logits.device) for part in vars(self.targets).values())
        wrong = (best[place] != token) & (slot % self.count == 0)
        missed = torch.zeros(len(self), device=logits.device).index_add(0, slot // self.count, wrong.float())
        return missed == 0

    def by_pair(self, values: Float[Tensor, "row ..."]) -> Float[Tensor, "pair ..."]:
        """Rows' values added up pair by pair."""
        if self.targets is None:
            return values
        return values.new_zeros(len(self), *values.shape[1:]).index_add(0, self.owner.to(values.device), values)


def forced(given: G, count: int | None = None, width: int = 0) -> Forced[G]:
    """The rows that have to be run for the options of pairs or questions.

    Args:
        count: the options that are read, the answer first; None = all.
        width: the least width of the rows.
    """
    prompts = given.clean if isinstance(given, PromptPairs) else given.prompts
    other = given.corrupt if isinstance(given, PromptPairs) else prompts
    count, device = given.options.shape[1] if count is None else count, prompts.device
    options = given.options[:, :count]
    if options.shape[2] == 1 or not bool((options[..., 1:] >= 0).any()):
        every = torch.arange(len(given), device=device)
        if width > prompts.shape[1]:
            prompts, other = _widened(prompts, width), _widened(other, width)
        return Forced(given, count, prompts, other, given.lengths, every, Places(every, given.asked), None)
    owner: list[int] = []
    behind: list[list[int]] = []
    places: list[tuple[int, int]] = []
    targets: list[tuple[int, int, int]] = []
    for i, (length, texts) in enumerate(zip(given.lengths.tolist(), given.texts(), strict=True)):
        answers = texts[:count]
        wanted = sorted({text[:-1] for text in answers})
        # A row also serves what its beginning is asked for.
        rows = [
            one for at, one in enumerate(wanted) if not any(_begins(other, one) for other in wanted[at + 1 : at + 2])
        ]
        first = len(owner)
        owner += [i] * len(rows)
        behind += [list(row) for row in rows]
        known: dict[tuple[int, ...], int] = {}
        for option, text in enumerate(answers):
            for step, token in enumerate(text):
                before = text[:step]
                if before not in known:
                    known[before] = len(places)
                    row = next(j for j, one in enumerate(rows) if one[:step] == before)
                    places.append((first + row, length - 1 + step))
                targets.append((known[before], token, i * count + option))
    rows_of = torch.tensor(owner, device=device)
    added = torch.tensor([len(tokens) for tokens in behind], device=device)
    lengths = given.lengths[rows_of] + added
    width = max(width, int(lengths.max()))
    place, target = (torch.tensor(each, device=device).T for each in (places, targets))
    clean, corrupt = (_extended(tokens[rows_of], given.lengths[rows_of], behind, width) for tokens in (prompts, other))
    return Forced(given, count, clean, corrupt, lengths, rows_of, Places(place[0], place[1]), Targets(*target))


def _begins(text: tuple[int, ...], start: tuple[int, ...]) -> bool:
    return text[: len(start)] == start


def _widened(rows: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, max(0, width - rows.shape[1])))[:, :width]


def _extended(
    prompts: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], behind: list[list[int]], width: int
) -> Int[Tensor, "row pos2"]:
    """The rows with some tokens behind each."""
    out = _widened(prompts, width).clone()
    for row, (length, tokens) in enumerate(zip(lengths.tolist(), behind, strict=True)):
        out[row, length : length + len(tokens)] = torch.tensor(tokens, dtype=out.dtype, device=out.device)
    return out
