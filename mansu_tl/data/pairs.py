"""Clean/corrupt prompt pairs: the contrast that every attribution in this package is taken over.

A pair is two prompts of equal token length that differ in the knowledge asked for, the answer to the clean one and
the distractors it is measured against. Prompts are right-padded; `lengths` says where each one ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.text import (
    TextSource,
    encode,
    pad,
    pad_id,
    side_by_side,
    single_token,
    span_of,
    text_source,
    unpadded,
)
from mansu_tl.defaults import moved, torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.notebook import Result


@dataclass(frozen=True)
class Span(Result):
    """A named stretch of positions in every pair, from `start` up to but not including `stop`."""

    name: str
    start: Int[Tensor, " pair"]
    stop: Int[Tensor, " pair"]


@dataclass(frozen=True)
class PromptPairs(Result):
    """Token pairs with one-token answers.

    Inside, prompts are always right-padded and positions count from each prompt's first token; that is what a
    left-padded run with position ids from its attention mask computes.

    Attributes:
        clean: prompts that show the knowledge, right-padded.
        corrupt: their counterfactuals, of the same real length pair by pair.
        answers: the token that continues the clean prompt.
        distractors: tokens the answer is measured against; column 0 is the corrupt prompt's own answer.
        lengths: real tokens of each pair.
        labels: a name for each pair, used in tables and hover texts.
        spans: named stretches of positions, for scores gathered over them.
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answers: Int[Tensor, " pair"]
    distractors: Int[Tensor, "pair option"]
    lengths: Int[Tensor, " pair"]
    labels: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()

    @classmethod
    @torch_defaults()
    def from_tokens(
        cls,
        clean: Tensor,
        corrupt: Tensor,
        answers: Tensor,
        distractors: Tensor,
        lengths: Int[Tensor, " pair"] | None = None,
        labels: Sequence[str] = (),
        *,
        attention_mask: Tensor | None = None,
        corrupt_mask: Tensor | None = None,
    ) -> PromptPairs:
        """Pairs from token ids; without `lengths` and masks there is no padding.

        Args:
            clean: [pair, pos].
            corrupt: [pair, pos].
            answers: [pair].
            distractors: [pair, option] or [pair].
            lengths: real tokens of each pair.
            labels: a name for each pair.
            attention_mask: 1 on real tokens of the clean prompts, padded on the left or on the right.
            corrupt_mask: the same for the corrupt prompts, where it differs.

        Raises:
            MansuError: no pairs, tensors that do not fit each other, a length outside 1..pos, a mask with holes or
                beside `lengths`, clean and corrupt of different real lengths, or labels of another number.
        """
        if clean.shape[0] == 0:
            raise MansuError("prompt pairs: none given; pass at least one clean/corrupt pair")
        _require_fitting(clean, corrupt, answers, distractors, corrupt_mask is not None)
        if corrupt_mask is not None and attention_mask is None:
            raise MansuError("prompt pairs: corrupt_mask without attention_mask; give both")
        if attention_mask is not None:
            if lengths is not None:
                raise MansuError(
                    "prompt pairs: both lengths and attention_mask given; the mask says it all, drop lengths"
                )
            other_mask = attention_mask if corrupt_mask is None else corrupt_mask
            before = clean, corrupt
            clean, lengths = unpadded(clean, attention_mask, "clean")
            corrupt, other = unpadded(corrupt, other_mask, "corrupt")
            for i, (a, b) in enumerate(zip(lengths.tolist(), other.tolist(), strict=True)):
                if a != b:
                    shown = [
                        t[i][m[i].bool()].tolist() for t, m in zip(before, (attention_mask, other_mask), strict=True)
                    ]
                    raise MansuError(
                        f"pair {i}: clean has {a} tokens, corrupt {b}: {shown[0]} against {shown[1]}; choose a "
                        "counterfactual of equal token length"
                    )
        if lengths is None:
            lengths = torch.full((clean.shape[0],), clean.shape[1], dtype=torch.long, device=clean.device)
        for i, length in enumerate(lengths.tolist()):
            if not 1 <= length <= clean.shape[1]:
                raise MansuError(f"pair {i}: length {length} is outside 1..{clean.shape[1]}, the width of the tokens")
        if labels and len(labels) != clean.shape[0]:
            raise MansuError(
                f"prompt pairs: {len(labels)} labels for {clean.shape[0]} pairs; give one for each or none"
            )
        if distractors.ndim == 1:
            distractors = distractors[:, None]
        return cls(clean, corrupt, answers, distractors, lengths, tuple(labels))

    @classmethod
    @torch_defaults()
    def from_text(
        cls,
        tokenizer: TextSource,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[str],
        distractors: Sequence[str] | Sequence[Sequence[str]],
        prepend_bos: bool | None = None,
        labels: Sequence[str] = (),
        spans: Mapping[str, Sequence[str | tuple[str, str]]] | None = None,
        names: Sequence[str] = (),
    ) -> PromptPairs:
        """Pairs from text; an answer must be one token when it continues its prompt.

        Args:
            tokenizer: a tokenizer, or the hooked model itself, whose family then says whether a BOS token is wanted.
            prepend_bos: put a BOS token in front (never a second one); None = what the family does, for a bare
                tokenizer yes if it has one.
            spans: by name, per pair the piece of the prompt that it covers, or (piece of clean, piece of corrupt).
            names: what errors call each pair; "pair 0" and so on without.

        Raises:
            MansuError: lists of unequal length, clean and corrupt of different token lengths (both token lists are
                shown), an answer or distractor that is not exactly one token, or a span that is not in its prompt
                once, or at other positions in clean and corrupt.
        """
        tokenizer, wanted = text_source(tokenizer, prepend_bos)
        counts = {
            "clean": len(clean),
            "corrupt": len(corrupt),
            "answers": len(answers),
            "distractors": len(distractors),
        }
        if len(set(counts.values())) != 1:
            raise MansuError(f"prompt pairs: {counts} differ in number; give one of each for every pair")
        if not clean:
            raise MansuError("prompt pairs: none given; pass at least one clean/corrupt pair")
        rows: list[list[int]] = []
        others: list[list[int]] = []
        answer_ids: list[int] = []
        distractor_ids: list[list[int]] = []
        for i, (a, b, answer, wrong) in enumerate(zip(clean, corrupt, answers, distractors, strict=True)):
            name = names[i] if names else f"pair {i}"
            ids_a, ids_b = encode(tokenizer, a, wanted), encode(tokenizer, b, wanted)
            if len(ids_a) != len(ids_b):
                raise MansuError(
                    f"{name}: clean has {len(ids_a)} tokens, corrupt {len(ids_b)}: "
                    f"{side_by_side(tokenizer, ids_a, ids_b)}; "
                    "choose a counterfactual of equal token length"
                )
            options = [wrong] if isinstance(wrong, str) else list(wrong)
            rows.append(ids_a)
            others.append(ids_b)
            answer_ids.append(single_token(tokenizer, a, answer, f"{name}: answer"))
            distractor_ids.append([single_token(tokenizer, a, w, f"{name}: distractor") for w in options])
        widths = {len(row) for row in distractor_ids}
        if len(widths) != 1:
            raise MansuError(f"prompt pairs: pairs have {sorted(widths)} distractors; give every pair the same number")
        tokens, lengths = pad(rows, pad_id(tokenizer))
        corrupt_tokens, _ = pad(others, pad_id(tokenizer))
        out = cls.from_tokens(
            tokens, corrupt_tokens, torch.tensor(answer_ids), torch.tensor(distractor_ids), lengths, labels
        )
        found = [_span(tokenizer, n, pieces, clean, corrupt, rows) for n, pieces in (spans or {}).items()]
        return replace(out, spans=tuple(found))

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __getitem__(self, index: slice | list[int] | Tensor) -> PromptPairs:
        """The chosen pairs, as `PromptPairs`."""
        picked = torch.arange(len(self), device="cpu")[index.cpu() if isinstance(index, Tensor) else index]
        if picked.ndim == 0:
            picked = picked[None]
        values = {name: getattr(self, name)[picked] for name in _TENSORS}
        labels = tuple(self.labels[i] for i in picked.tolist()) if self.labels else ()
        spans = tuple(Span(s.name, s.start[picked], s.stop[picked]) for s in self.spans)
        return PromptPairs(**values, labels=labels, spans=spans)

    @property
    def facts(self) -> tuple[str, ...]:
        """The fact behind each pair: its label without the wording after " / "; without labels every pair is its own."""
        if not self.labels:
            return tuple(str(i) for i in range(len(self)))
        return tuple(label.rsplit(" / ", 1)[0] for label in self.labels)

    @property
    def chance(self) -> float:
        """Multiple choice between answer and distractors by guessing, in percent."""
        return 100 / (1 + self.distractors.shape[1])

    @torch_defaults()
    def fact_numbers(self) -> Int[Tensor, " pair"]:
        """The facts as numbers from 0 up, in order of appearance."""
        order = {fact: i for i, fact in enumerate(dict.fromkeys(self.facts))}
        return torch.tensor([order[fact] for fact in self.facts])

    @torch_defaults()
    def one_wording(self) -> tuple[PromptPairs, Bool[Tensor, " pos"]]:
        """The largest group of pairs in the same words, cut to their length, and the positions that are the same in all.

        Two pairs are in the same words if they have one length and agree wherever neither differs from its own corrupt
        prompt: what is left over is the subject. Figures over positions need this, since a position means nothing
        across different wordings.
        """
        constant = self.clean == self.corrupt
        same_length = self.lengths[:, None] == self.lengths[None]
        agree = (self.clean[:, None] == self.clean[None]) | ~constant[:, None] | ~constant[None]
        alike = agree.all(-1) & same_length
        members = alike[int(alike.sum(1).argmax())].nonzero()[:, 0]
        chosen, length = self[members], int(self.lengths[members[0]])
        cut = PromptPairs(
            chosen.clean[:, :length], chosen.corrupt[:, :length], chosen.answers, chosen.distractors, chosen.lengths,
            chosen.labels, chosen.spans,
        )  # fmt: skip
        return cut, ((cut.clean == cut.clean[:1]) & (cut.corrupt == cut.clean[:1])).all(0)

    def to(self, device: str | torch.device) -> PromptPairs:
        """The same pairs with their tensors on `device`."""
        values = {name: moved(getattr(self, name), device) for name in _TENSORS}
        spans = tuple(Span(s.name, moved(s.start, device), moved(s.stop, device)) for s in self.spans)
        return PromptPairs(**values, labels=self.labels, spans=spans)

    def __repr__(self) -> str:
        return (
            f"PromptPairs({len(self)} pairs, {int(self.lengths.min())}-{int(self.lengths.max())} tokens, "
            f"{self.distractors.shape[1]} distractors)"
        )


_TENSORS = ("clean", "corrupt", "answers", "distractors", "lengths")


def _require_fitting(clean: Tensor, corrupt: Tensor, answers: Tensor, distractors: Tensor, own_mask: bool) -> None:
    if corrupt.shape[0] != clean.shape[0] or (corrupt.shape != clean.shape and not own_mask):
        raise MansuError(
            f"prompt pairs: clean is {tuple(clean.shape)}, corrupt {tuple(corrupt.shape)}; give tokens of one shape, or "
            "a mask for each"
        )
    for name, value in (("answers", answers), ("distractors", distractors)):
        if value.shape[0] != clean.shape[0]:
            raise MansuError(f"prompt pairs: {value.shape[0]} {name} for {clean.shape[0]} pairs; give one of each")
    for name, value in (("clean", clean), ("corrupt", corrupt), ("answers", answers), ("distractors", distractors)):
        if value.is_floating_point():
            raise MansuError(f"prompt pairs: {name} holds {value.dtype}; token ids are whole numbers")
        if value.device != clean.device:
            raise MansuError(f"prompt pairs: {name} is on {value.device}, clean on {clean.device}; put all on one")


def _span(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    pieces: Sequence[str | tuple[str, str]],
    clean: Sequence[str],
    corrupt: Sequence[str],
    rows: list[list[int]],
) -> Span:
    if len(pieces) != len(clean):
        raise MansuError(f"span {name!r}: {len(pieces)} pieces for {len(clean)} pairs; give one for each")
    found = []
    for i, piece in enumerate(pieces):
        a, b = (piece, piece) if isinstance(piece, str) else piece
        where = [span_of(tokenizer, t, p, f"pair {i}: span {name!r}:") for t, p in ((clean[i], a), (corrupt[i], b))]
        if where[0] != where[1]:
            raise MansuError(
                f"pair {i}: span {name!r} covers tokens {where[0][0]}..{where[0][1] - 1} of clean ({a!r}) and "
                f"{where[1][0]}..{where[1][1] - 1} of corrupt ({b!r}); it must cover the same in both"
            )
        shift = len(rows[i]) - len(encode(tokenizer, clean[i], False))
        found.append((where[0][0] + shift, where[0][1] + shift))
    return Span(name, torch.tensor([a for a, _ in found]), torch.tensor([b for _, b in found]))
