"""Clean/corrupt prompt pairs: the contrast that every attribution in this package is taken over.

A pair is two prompts of equal token length that differ in the knowledge asked for, the answer to the clean one and
the distractors it is measured against. Prompts are right-padded; `lengths` says where each one ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.answers import AnswerSpace, require_answer_space, seam, single_token
from mansu_tl.data.rows import (
    checked_lengths,
    require_options,
    set_fields,
    whole_numbers,
    with_values,
    without_padding,
)
from mansu_tl.data.text import (
    TextSource,
    encode,
    pad,
    pad_id,
    require_text,
    side_by_side,
    span_of,
    text_source,
    unpadded,
    with_bos,
)
from mansu_tl.defaults import moved, torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result

if TYPE_CHECKING:
    Texts = Iterable[str]
else:
    Texts = object  # anything else is told what to pass


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
    left-padded run with position ids from its attention mask computes. Whatever stands behind a prompt's length is
    replaced by token 0, which every model has.

    Attributes:
        clean: prompts that show the knowledge, right-padded.
        corrupt: their counterfactuals, of the same real length pair by pair.
        answers: the token that continues the clean prompt.
        distractors: tokens the answer is measured against; column 0 is the corrupt prompt's own answer.
        lengths: real tokens of each pair.
        labels: a name for each pair, used in tables and hover texts.
        spans: named stretches of positions, for scores gathered over them.

    Example:
        >>> model = mtl.load("pocket")
        >>> clean, corrupt = ["the catalyst of amber balm is"], ["the catalyst of hollow brew is"]
        >>> len(mtl.PromptPairs.from_text(model, clean, corrupt, ["dreamash"], [["leafsilver"]]))
        1
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answers: Int[Tensor, " pair"]
    distractors: Int[Tensor, "pair option"]
    lengths: Int[Tensor, " pair"]
    labels: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        clean, corrupt = (whole_numbers(f"prompt pairs: {key}", getattr(self, key), 2) for key in ("clean", "corrupt"))
        answers = whole_numbers("prompt pairs: answers", self.answers, 1)
        distractors = whole_numbers("prompt pairs: distractors", self.distractors, 2)
        if len(clean) == 0:
            raise MansuError("prompt pairs: none given; pass at least one clean/corrupt pair")
        _require_fitting(clean, corrupt, answers, distractors, own_mask=False)
        lengths = checked_lengths("pair", clean, self.lengths)
        labels, spans = tuple(self.labels), tuple(self.spans)
        if labels and len(labels) != len(clean):
            raise MansuError(f"prompt pairs: {len(labels)} labels for {len(clean)} pairs; give one for each or none")
        for span in spans:
            if len(span.start) != len(clean) or len(span.stop) != len(clean):
                raise MansuError(
                    f"span {span.name!r}: {len(span.start)} pieces for {len(clean)} pairs; give one for each"
                )
        require_options("pair", answers, distractors)
        set_fields(
            self,
            clean=without_padding("pair", "clean", clean, lengths),
            corrupt=without_padding("pair", "corrupt", corrupt, lengths),
            answers=answers,
            distractors=distractors,
            lengths=lengths,
            labels=labels,
            spans=spans,
        )

    @classmethod
    @torch_defaults()
    def from_tokens(
        cls,
        clean: Tensor,
        corrupt: Tensor,
        answers: Tensor,
        distractors: Tensor,
        lengths: Tensor | None = None,
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
            MansuError: no pairs, tensors that do not fit each other, ids that are not whole or negative, a length
                outside 1..pos, a mask with holes or beside `lengths`, clean and corrupt of different real lengths, an
                answer among its distractors, a distractor given twice, or labels of another number.
        """
        if isinstance(distractors, Tensor) and distractors.ndim == 1:
            distractors = distractors[:, None]
        clean, corrupt = (
            whole_numbers(f"prompt pairs: {k}", v, 2) for k, v in (("clean", clean), ("corrupt", corrupt))
        )
        answers = whole_numbers("prompt pairs: answers", answers, 1)
        distractors = whole_numbers("prompt pairs: distractors", distractors, 2)
        if len(clean) == 0:
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
        lengths = checked_lengths("pair", clean, lengths)
        if lengths.device.type != "meta":
            # Columns that hold padding only cost time, and may be more than the model has positions.
            clean, corrupt = (tokens[:, : int(lengths.max())] for tokens in (clean, corrupt))
        return cls(clean, corrupt, answers, distractors, lengths, tuple(labels))

    @classmethod
    @torch_defaults()
    def from_text(
        cls,
        tokenizer: TextSource,
        clean: Texts,
        corrupt: Texts,
        answers: Texts,
        distractors: Texts | Iterable[Texts],
        prepend_bos: bool | None = None,
        labels: Sequence[str] = (),
        spans: Mapping[str, Sequence[str | tuple[str, str]]] | None = None,
        names: Sequence[str] = (),
        *,
        answer_space: AnswerSpace | Iterable[AnswerSpace] = "auto",
    ) -> PromptPairs:
        """Pairs from text; an answer must be one token when it continues its prompt.

        The answer is what the tokenizer makes of prompt and answer as one text: " Paris" after "The capital is", "Paris"
        after a line break, an opening quote or bracket or the end of a chat template (see `answer_space`).

        Args:
            tokenizer: a tokenizer, or the hooked model itself, whose family then says whether a BOS token is wanted.
            prepend_bos: put a BOS token in front (never a second one); None = what the family does, for a bare
                tokenizer yes if it has one.
            spans: by name, per pair the piece of the prompt that it covers, or (piece of clean, piece of corrupt).
            names: what errors call each pair; "pair 0" and so on without.
            answer_space: whether a space stands between a prompt and its answers: "auto" = as a writer would put it
                (none where either brings white space), True = always, False = never; or one of these for each pair.

        Raises:
            MansuError: lists of unequal length, something else than text, an empty prompt, answer or distractor, clean
                and corrupt that are the same or of different token lengths (both token lists are shown), an answer or
                distractor that is not exactly one token, an answer among its distractors, a distractor given twice, or
                a span that is not in its prompt once, or at other positions in clean and corrupt.
        """
        tokenizer, wanted = text_source(tokenizer, prepend_bos)
        given = {"clean": clean, "corrupt": corrupt, "answers": answers, "distractors": distractors}
        columns = {key: _column(key, value) for key, value in given.items()}
        counts = {key: len(column) for key, column in columns.items()}
        if len(set(counts.values())) != 1:
            raise MansuError(f"prompt pairs: {counts} differ in number; give one of each for every pair")
        count = counts["clean"]
        if not count:
            raise MansuError("prompt pairs: none given; pass at least one clean/corrupt pair")
        if isinstance(answer_space, Iterable) and not isinstance(answer_space, str):
            spaces = list(answer_space)
        else:
            spaces = [answer_space] * count
        if len(spaces) != count:
            raise MansuError(f"prompt pairs: {len(spaces)} values of answer_space for {count} pairs; give one for each")
        made = [
            _pair(tokenizer, wanted, names[i] if names else f"pair {i}", *row)
            for i, row in enumerate(zip(*columns.values(), spaces, strict=True))
        ]
        widths = {len(pair.distractors) for pair in made}
        if len(widths) != 1:
            raise MansuError(f"prompt pairs: pairs have {sorted(widths)} distractors; give every pair the same number")
        tokens, lengths = pad([pair.clean for pair in made], pad_id(tokenizer))
        corrupt_tokens, _ = pad([pair.corrupt for pair in made], pad_id(tokenizer))
        answer_ids, wrong = torch.tensor([pair.answer for pair in made]), torch.tensor([p.distractors for p in made])
        out = cls.from_tokens(tokens, corrupt_tokens, answer_ids, wrong, lengths, labels)
        texts = columns["clean"], columns["corrupt"]
        found = [_span(tokenizer, wanted, n, pieces, *texts, lengths) for n, pieces in (spans or {}).items()]
        return replace(out, spans=tuple(found))

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> PromptPairs:
        """The chosen pairs, as `PromptPairs`."""
        picked = torch.arange(len(self), device="cpu")[index.cpu() if isinstance(index, Tensor) else index].reshape(-1)
        values = {name: getattr(self, name)[picked] for name in _TENSORS}
        labels = tuple(self.labels[i] for i in picked.tolist()) if self.labels else ()
        spans = tuple(Span(s.name, s.start[picked], s.stop[picked]) for s in self.spans)
        return with_values(self, **values, labels=labels, spans=spans)

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
        return with_values(self, **values, spans=spans)

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
    for name, value in (("corrupt", corrupt), ("answers", answers), ("distractors", distractors)):
        if value.device != clean.device:
            raise MansuError(f"prompt pairs: {name} is on {value.device}, clean on {clean.device}; put all on one")


@dataclass(frozen=True)
class _Pair:
    clean: list[int]
    corrupt: list[int]
    answer: int
    distractors: list[int]


def _pair(
    tokenizer: PreTrainedTokenizerBase,
    bos: bool,
    name: str,
    clean: Any,
    corrupt: Any,
    answer: Any,
    wrong: Any,
    answer_space: Any,
) -> _Pair:
    """One pair as tokens."""
    require_answer_space(answer_space, name)
    options = list(wrong) if isinstance(wrong, Iterable) and not isinstance(wrong, str) else [wrong]
    texts = (("clean", clean), ("corrupt", corrupt), ("answer", answer), *(("distractor", w) for w in options))
    for what, text in texts:
        require_text(text, f"{name}: {what}")
    if not options:
        raise MansuError(f"{name}: no distractor; give at least one wrong answer")
    alone = encode(tokenizer, clean, False)
    before, token = single_token(tokenizer, clean, answer, f"{name}: answer", answer_space, alone)
    seen, wrong_ids = {token: f"answer {answer!r}"}, []
    for option in options:
        start, wrong_id = single_token(tokenizer, clean, option, f"{name}: distractor", answer_space, alone)
        if wrong_id in seen:
            shown = tokenizer.convert_ids_to_tokens(wrong_id)
            raise MansuError(
                f"{name}: distractor {option!r} and {seen[wrong_id]} are the same token {shown!r}; give every option once"
            )
        if start != before:
            raise MansuError(
                f"{name}: the prompt ends elsewhere before {option!r} than before {answer!r}; end it without white space"
            )
        seen[wrong_id] = f"distractor {option!r}"
        wrong_ids.append(wrong_id)
    other = encode(tokenizer, corrupt, False)
    if corrupt[-1].isspace():
        other = seam(tokenizer, corrupt, options[0], f"{name}: distractor", answer_space, other)[0]
    rows = [with_bos(tokenizer, ids, bos) for ids in (before, other)]
    if len(rows[0]) != len(rows[1]):
        raise MansuError(
            f"{name}: clean has {len(rows[0])} tokens, corrupt {len(rows[1])}: {side_by_side(tokenizer, *rows)}; "
            "choose a counterfactual of equal token length"
        )
    if rows[0] == rows[1]:
        raise MansuError(
            f"{name}: clean {clean!r} and corrupt {corrupt!r} are the same tokens; change what the pair asks about"
        )
    return _Pair(rows[0], rows[1], token, wrong_ids)


def _column(key: str, values: object) -> list:
    """One entry a pair, from a list, a tuple or a table's column."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise MansuError(f"prompt pairs: {key} is {values!r}; give a list with one entry for each pair")
    return list(values)


def _span(
    tokenizer: PreTrainedTokenizerBase,
    bos: bool,
    name: str,
    pieces: Sequence[str | tuple[str, str]],
    clean: Sequence[str],
    corrupt: Sequence[str],
    lengths: Int[Tensor, " pair"],
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
        shift = len(encode(tokenizer, clean[i], bos)) - len(encode(tokenizer, clean[i], False))
        # White space at the prompt's end may have gone to the answer.
        found.append((where[0][0] + shift, min(where[0][1] + shift, int(lengths[i]))))
    return Span(name, torch.tensor([a for a, _ in found]), torch.tensor([b for _, b in found]))
