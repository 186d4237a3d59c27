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

from mansu_tl.data.answers import AnswerSpace
from mansu_tl.data.corruption import (
    EMBEDDED,
    EmbeddingCorruption,
    Subject,
    counterfactuals,
    measured_against,
    require_corruption,
)
from mansu_tl.data.pair_text import read_pairs, read_span
from mansu_tl.data.rows import (
    Asked,
    Rows,
    checked_lengths,
    require_options,
    set_fields,
    whole_numbers,
    with_values,
    without_padding,
)
from mansu_tl.data.text import TextSource, encode, pad, pad_id, text_source, unpadded
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError

if TYPE_CHECKING:
    Texts = Iterable[str]
else:
    Texts = object  # anything else is told what to pass


# The span whose embeddings a corruption changes.
SUBJECT = "subject"


@dataclass(frozen=True)
class Span(Rows):
    """A named stretch of positions in every pair, from `start` up to but not including `stop`."""

    name: str
    start: Int[Tensor, " pair"]
    stop: Int[Tensor, " pair"]


@dataclass(frozen=True)
class PromptPairs(Asked):
    """Token pairs with an answer and its distractors.

    Inside, prompts are always right-padded and positions count from each prompt's first token; that is what a
    left-padded run with position ids from its attention mask computes. Whatever stands behind a prompt's length is
    replaced by token 0, which every model has.

    Attributes:
        clean: prompts that show the knowledge, right-padded.
        corrupt: their counterfactuals, of the same real length pair by pair.
        options: the token sequences that may continue a prompt, padded with -1: option 0 is the answer, option 1 the corrupt
            prompt's own answer, the others are further distractors. Where each is one token, `answers` and `distractors`.
        lengths: real tokens of each pair.
        facts: the fact behind each pair, so that its wordings count once; without them every pair is its own.
        labels: a name for each pair, used in tables and hover texts.
        spans: named stretches of positions, for scores gathered over them.
        corruption: what is done to the embeddings of the span "subject" where there is no corrupt prompt; `corrupt` then
            holds the clean tokens.

    Example:
        >>> model = mtl.load("pocket")
        >>> clean, corrupt = ["the catalyst of amber balm is"], ["the catalyst of hollow brew is"]
        >>> len(mtl.data.PromptPairs.from_text(model, clean, corrupt, ["dreamash"], [["leafsilver"]]))
        1
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    options: Int[Tensor, "pair option token"]
    lengths: Int[Tensor, " pair"]
    facts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    corruption: EmbeddingCorruption | None = None

    def __post_init__(self) -> None:
        clean, corrupt = (whole_numbers(f"prompt pairs: {key}", getattr(self, key), 2) for key in ("clean", "corrupt"))
        options = whole_numbers("prompt pairs: options", self.options, 3)
        _require_alike(clean, corrupt=corrupt, options=options)
        _require_one_shape(clean, corrupt)
        lengths = checked_lengths("pair", clean, self.lengths)
        facts, labels, spans = tuple(self.facts), tuple(self.labels), tuple(self.spans)
        for what, names in (("facts", facts), ("labels", labels)):
            if names and len(names) != len(clean):
                raise MansuError(f"prompt pairs: {len(names)} {what} for {len(clean)} pairs; give one for each or none")
        for span in spans:
            if len(span) != len(clean) or len(span.stop) != len(clean):
                raise MansuError(f"span {span.name!r}: {len(span)} pieces for {len(clean)} pairs; give one for each")
        require_options("pair", options)
        if self.corruption is not None and (SUBJECT not in {span.name for span in spans} or not clean.equal(corrupt)):
            raise MansuError(
                f"prompt pairs: {self.corruption.kind} corrupts the span {SUBJECT!r} of the clean prompts; name "
                "that span, and give the clean prompts as the corrupt ones"
            )
        set_fields(
            self,
            clean=without_padding("pair", "clean", clean, lengths),
            corrupt=without_padding("pair", "corrupt", corrupt, lengths),
            options=options,
            lengths=lengths,
            facts=facts or tuple(str(i) for i in range(len(clean))),
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
        facts: Sequence[str] = (),
        attention_mask: Tensor | None = None,
        corrupt_mask: Tensor | None = None,
    ) -> PromptPairs:
        """Pairs with one-token answers from token ids; without `lengths` and masks there is no padding.

        Args:
            clean: [pair, pos].
            corrupt: [pair, pos].
            answers: [pair].
            distractors: [pair, option] or [pair].
            lengths: real tokens of each pair.
            labels: a name for each pair.
            facts: the fact behind each pair.
            attention_mask: 1 on real tokens of the clean prompts, padded on the left or on the right.
            corrupt_mask: the same for the corrupt prompts, where it differs.

        Raises:
            MansuError: no pairs, tensors that do not fit each other, ids that are not whole or negative, a length
                outside 1..pos, a mask with holes or beside `lengths`, clean and corrupt of different real lengths, an
                answer among its distractors, a distractor given twice, or facts or labels of another number.
        """
        if isinstance(distractors, Tensor) and distractors.ndim == 1:
            distractors = distractors[:, None]
        clean, corrupt, answers, distractors = (
            whole_numbers(f"prompt pairs: {name}", value, ndim)
            for name, value, ndim in (
                ("clean", clean, 2), ("corrupt", corrupt, 2), ("answers", answers, 1), ("distractors", distractors, 2),
            )
        )  # fmt: skip
        _require_alike(clean, corrupt=corrupt, answers=answers, distractors=distractors)
        if corrupt_mask is not None and attention_mask is None:
            raise MansuError("prompt pairs: corrupt_mask without attention_mask; give both")
        if attention_mask is not None:
            if lengths is not None:
                raise MansuError(
                    "prompt pairs: both lengths and attention_mask given; the mask says it all, drop lengths"
                )
            masks = attention_mask, attention_mask if corrupt_mask is None else corrupt_mask
            given = clean, corrupt
            clean, lengths = unpadded(clean, masks[0], "clean")
            corrupt, other = unpadded(corrupt, masks[1], "corrupt")
            for i in (lengths != other).nonzero()[:1, 0].tolist():
                shown = [tokens[i][mask[i].bool()].tolist() for tokens, mask in zip(given, masks, strict=True)]
                raise MansuError(
                    f"pair {i}: clean has {lengths[i]} tokens, corrupt {other[i]}: {shown[0]} against {shown[1]}; choose a "
                    "counterfactual of equal token length"
                )
        _require_one_shape(clean, corrupt)
        if lengths is None:
            lengths = torch.full((len(clean),), clean.shape[1], dtype=torch.long, device=clean.device)
        lengths = checked_lengths("pair", clean, lengths)
        if lengths.device.type != "meta":
            # Columns that hold padding only cost time, and may be more than the model has positions.
            clean, corrupt = (tokens[:, : int(lengths.max())] for tokens in (clean, corrupt))
        options = torch.cat([answers[:, None], distractors], 1)[..., None]
        return cls(clean, corrupt, options, lengths, tuple(facts), tuple(labels))

    @classmethod
    @torch_defaults()
    def from_text(
        cls,
        tokenizer: TextSource,
        clean: Texts,
        corrupt: Texts | None,
        answers: Texts,
        distractors: Texts | Iterable[Texts],
        prepend_bos: bool | None = None,
        labels: Sequence[str] = (),
        spans: Mapping[str, Sequence[str | tuple[str, str]]] | None = None,
        names: Sequence[str] = (),
        *,
        facts: Sequence[str] = (),
        answer_space: AnswerSpace | Iterable[AnswerSpace] = "auto",
        subjects: Texts | None = None,
        corruption: str = "swap",
        seed: int = 0,
    ) -> PromptPairs:
        """Pairs from text.

        The answer is what the tokenizer makes of prompt and answer as one text: " Paris" after "The capital is", "Paris"
        after a line break, an opening quote or bracket or the end of a chat template (see `answer_space`).

        Args:
            tokenizer: a tokenizer, or the hooked model itself, whose family then says whether a BOS token is wanted.
            corrupt: the counterfactuals; None = they are made, which takes `subjects`.
            answers: of one or several tokens.
            distractors: of one or several tokens; the first one is the corrupt prompt's answer.
            prepend_bos: put a BOS token in front (never a second one); None = what the family does, for a bare
                tokenizer yes if it has one.
            spans: by name, per pair the piece of the prompt that it covers, or (piece of clean, piece of corrupt).
            names: what errors call each pair; "pair 0" and so on without.
            facts: the fact behind each pair.
            answer_space: whether a space stands between a prompt and its answers: "auto" = as a writer would put it
                (none where either brings white space), True = always, False = never; or one of these for each pair.
            subjects: the piece of each clean prompt that names what is asked about, where `corrupt` is None.
            corruption: how counterfactuals are made: "swap" (another of the subjects in the same words; its answer becomes
                the first distractor), "unseen" (an invented name), "noise", "zero" or "mean" (the clean tokens, with
                other embeddings at the subject's; see `EmbeddingCorruption`).
            seed: of what is drawn.

        Raises:
            MansuError: lists of unequal length, something else than text, an empty prompt, answer or distractor, clean
                and corrupt that are the same or of different token lengths (both token lists are shown), an answer or
                distractor of no token, an answer among its distractors, a distractor given twice, a span that is not in
                its prompt once, or at other positions in clean and corrupt, no corrupt prompts and no subjects, or an
                unknown corruption.
        """
        tokenizer, bos = text_source(tokenizer, prepend_bos)
        given: dict[str, Any] = {"clean": clean, "answers": answers, "distractors": distractors}
        given |= {"corrupt": corrupt} if corrupt is not None else {"subjects": subjects}
        if corrupt is None and subjects is None:
            raise MansuError("prompt pairs: neither corrupt prompts nor subjects; give one of them for each pair")
        columns = {key: _column(key, value) for key, value in given.items()}
        counts = {key: len(column) for key, column in columns.items()}
        if len(set(counts.values())) != 1:
            raise MansuError(f"prompt pairs: {counts} differ in number; give one of each for every pair")
        if isinstance(answer_space, Iterable) and not isinstance(answer_space, str):
            spaces = list(answer_space)
        else:
            spaces = [answer_space] * counts["clean"]
        if len(spaces) != counts["clean"]:
            raise MansuError(
                f"prompt pairs: {len(spaces)} values of answer_space for {counts['clean']} pairs; give one for each"
            )
        embedded = corrupt is None and corruption in EMBEDDED
        if corrupt is None:
            require_corruption(corruption)
            columns |= _corrupted(tokenizer, names, columns, corruption, seed)
        rows = (columns[key] for key in ("clean", "corrupt", "answers", "distractors"))
        tokens = read_pairs(tokenizer, bos, names, list(zip(*rows, spaces, strict=True)))
        (clean_ids, lengths), (corrupt_ids, _) = (
            pad([getattr(pair, key) for pair in tokens], pad_id(tokenizer)) for key in ("clean", "corrupt")
        )
        widest = max(len(option) for pair in tokens for option in pair.options)
        options = torch.tensor([[[*o, *[-1] * (widest - len(o))] for o in pair.options] for pair in tokens])
        pairs = cls(clean_ids, corrupt_ids, options, lengths, tuple(facts), tuple(labels))
        made = []
        pieces_of = dict(spans or {}) | ({SUBJECT: columns["subjects"]} if embedded else {})
        for name, pieces in pieces_of.items():
            other = columns["clean"] if embedded else columns["corrupt"]
            places = read_span(tokenizer, bos, name, pieces, columns["clean"], other, lengths.tolist())
            made.append(Span(name, *torch.tensor(places).unbind(1)))
        if not embedded:
            return replace(pairs, spans=tuple(made))
        subject = EmbeddingCorruption(corruption, tuple(_inside(clean_ids, made[-1])), seed)
        return replace(pairs, spans=tuple(made), corruption=subject)

    @property
    def changed(self) -> Bool[Tensor, "pair pos"]:
        """Where the two ends differ: in their tokens, or in the embeddings of the subject's."""
        if self.corruption is None:
            return self.clean != self.corrupt
        span = next(span for span in self.spans if span.name == SUBJECT)
        place = torch.arange(self.clean.shape[1], device=self.clean.device)
        return (place >= span.start[:, None]) & (place < span.stop[:, None])

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
        constant = ~self.changed
        same_length = self.lengths[:, None] == self.lengths[None]
        agree = (self.clean[:, None] == self.clean[None]) | ~constant[:, None] | ~constant[None]
        alike = agree.all(-1) & same_length
        members = alike[int(alike.sum(1).argmax())].nonzero()[:, 0]
        chosen, length = self[members], int(self.lengths[members[0]])
        cut = with_values(chosen, clean=chosen.clean[:, :length], corrupt=chosen.corrupt[:, :length])
        return cut, ((cut.clean == cut.clean[:1]) & ~cut.changed).all(0)

    def __repr__(self) -> str:
        return (
            f"PromptPairs({len(self)} pairs, {int(self.lengths.min())}-{int(self.lengths.max())} tokens, "
            f"{self.options.shape[1] - 1} distractors)"
        )


def _require_alike(clean: Tensor, **others: Tensor) -> None:
    """Refuse no pairs, and tensors of another number of pairs or on another device than the clean prompts."""
    if len(clean) == 0:
        raise MansuError("prompt pairs: none given; pass at least one clean/corrupt pair")
    for name, value in others.items():
        if len(value) != len(clean):
            raise MansuError(f"prompt pairs: {len(value)} {name} for {len(clean)} pairs; give one of each")
    for name, value in others.items():
        if value.device != clean.device:
            raise MansuError(f"prompt pairs: {name} is on {value.device}, clean on {clean.device}; put all on one")


def _require_one_shape(clean: Tensor, corrupt: Tensor) -> None:
    if corrupt.shape != clean.shape:
        raise MansuError(
            f"prompt pairs: clean is {tuple(clean.shape)}, corrupt {tuple(corrupt.shape)}; give tokens of one shape, or a "
            "mask for each"
        )


def _inside(tokens: Int[Tensor, "pair pos"], span: Span) -> list[int]:
    """The tokens of every pair's span, one after another."""
    rows = zip(tokens.tolist(), span.start.tolist(), span.stop.tolist(), strict=True)
    return [token for row, start, stop in rows for token in row[start:stop]]


def _corrupted(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], columns: Mapping[str, list], kind: str, seed: int
) -> dict[str, list]:
    """The corrupt prompts that are made, and the distractors that go with them."""
    if kind in EMBEDDED:
        return {"corrupt": [None] * len(columns["clean"])}
    called = names or [f"pair {i}" for i in range(len(columns["clean"]))]
    rows = zip(called, *(columns[key] for key in ("clean", "subjects", "answers")), strict=True)
    subjects = [Subject(*row) for row in rows]
    made = counterfactuals(subjects, lambda text: len(encode(tokenizer, text, False)), kind, seed)
    given = ([one] if isinstance(one, str) else list(one) for one in columns["distractors"])
    return {
        "corrupt": [one.prompt for one in made],
        "distractors": [measured_against(texts, one) for texts, one in zip(given, made, strict=True)],
    }


def _column(key: str, values: object) -> list:
    """One entry a pair, from a list, a tuple or a table's column."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise MansuError(f"prompt pairs: {key} is {values!r}; give a list with one entry for each pair")
    return list(values)
