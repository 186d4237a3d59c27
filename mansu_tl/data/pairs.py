"""Clean/corrupt prompt pairs: the contrast that every attribution in this package is taken over.

A pair is two prompts of equal token length that differ in the knowledge asked for, the answer to the clean one and
the distractors it is measured against. Prompts are right-padded; `lengths` says where each one ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mansu_tl.errors import MansuError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptPairs:
    """Token pairs with one-token answers.

    Attributes:
        clean: prompts that show the knowledge, right-padded.
        corrupt: their counterfactuals, of the same real length pair by pair.
        answers: the token that continues the clean prompt.
        distractors: tokens the answer is measured against; column 0 is the corrupt prompt's own answer.
        lengths: real tokens of each pair.
        labels: a name for each pair, used in tables and hover texts.
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answers: Int[Tensor, " pair"]
    distractors: Int[Tensor, "pair option"]
    lengths: Int[Tensor, " pair"]
    labels: tuple[str, ...] = ()

    @classmethod
    def from_tokens(
        cls,
        clean: Int[Tensor, "pair pos"],
        corrupt: Int[Tensor, "pair pos"],
        answers: Int[Tensor, " pair"],
        distractors: Int[Tensor, "pair option"] | Int[Tensor, " pair"],
        lengths: Int[Tensor, " pair"] | None = None,
        labels: Sequence[str] = (),
    ) -> PromptPairs:
        """Pairs from token ids; `lengths` defaults to the full width (no padding).

        Raises:
            MansuError: no pairs, or a length outside 1..pos, or labels of another number than the pairs.
        """
        if clean.shape[0] == 0:
            raise MansuError("prompt pairs: none given; pass at least one clean/corrupt pair")
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
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[str],
        distractors: Sequence[str] | Sequence[Sequence[str]],
        prepend_bos: bool = True,
        labels: Sequence[str] = (),
    ) -> PromptPairs:
        """Pairs from text; an answer must be one token when it continues its prompt.

        Args:
            prepend_bos: put the tokenizer's BOS token in front, where it has one.

        Raises:
            MansuError: lists of unequal length, clean and corrupt of different token lengths (both token lists are
                shown), or an answer or distractor that is not exactly one token.
        """
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
            ids_a, ids_b = encode(tokenizer, a, prepend_bos), encode(tokenizer, b, prepend_bos)
            if len(ids_a) != len(ids_b):
                raise MansuError(
                    f"pair {i}: clean has {len(ids_a)} tokens, corrupt {len(ids_b)}: "
                    f"{tokenizer.convert_ids_to_tokens(ids_a)} against {tokenizer.convert_ids_to_tokens(ids_b)}; "
                    "choose a counterfactual of equal token length"
                )
            options = [wrong] if isinstance(wrong, str) else list(wrong)
            rows.append(ids_a)
            others.append(ids_b)
            answer_ids.append(single_token(tokenizer, a, answer, f"pair {i}: answer"))
            distractor_ids.append([single_token(tokenizer, a, w, f"pair {i}: distractor") for w in options])
        widths = {len(row) for row in distractor_ids}
        if len(widths) != 1:
            raise MansuError(f"prompt pairs: pairs have {sorted(widths)} distractors; give every pair the same number")
        tokens, lengths = pad(rows, pad_id(tokenizer))
        corrupt_tokens, _ = pad(others, pad_id(tokenizer))
        return cls.from_tokens(
            tokens, corrupt_tokens, torch.tensor(answer_ids), torch.tensor(distractor_ids), lengths, labels
        )

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __getitem__(self, index: slice | list[int] | Tensor) -> PromptPairs:
        """The chosen pairs, as `PromptPairs`."""
        picked = torch.arange(len(self))[index]
        if picked.ndim == 0:
            picked = picked[None]
        values = {f.name: getattr(self, f.name)[picked] for f in fields(self) if f.name != "labels"}
        return PromptPairs(**values, labels=tuple(self.labels[i] for i in picked.tolist()) if self.labels else ())

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
            chosen.labels,
        )  # fmt: skip
        return cut, ((cut.clean == cut.clean[:1]) & (cut.corrupt == cut.clean[:1])).all(0)

    def to(self, device: str | torch.device) -> PromptPairs:
        """The same pairs with their tensors on `device`."""
        values = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "labels"}
        return PromptPairs(**values, labels=self.labels)

    def __repr__(self) -> str:
        return (
            f"PromptPairs({len(self)} pairs, {int(self.lengths.min())}-{int(self.lengths.max())} tokens, "
            f"{self.distractors.shape[1]} distractors)"
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, prepend_bos: bool = True) -> list[int]:
    """Token ids of `text`, with the tokenizer's BOS token in front if it has one and `prepend_bos` is set."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    bos = tokenizer.bos_token_id
    return [int(bos), *ids] if prepend_bos and bos is not None else ids


def single_token(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, what: str) -> int:
    """The one token by which `answer` continues `prompt`; a space joins them unless either already brings it.

    Raises:
        MansuError: `answer` continues the prompt as several tokens, or as none.
    """
    joint = prompt + answer if prompt.endswith(" ") or answer.startswith(" ") else f"{prompt} {answer}"
    before, after = encode(tokenizer, prompt, False), encode(tokenizer, joint, False)
    new = after[len(before) :]
    if after[: len(before)] != before or len(new) != 1:
        raise MansuError(
            f"{what} {answer!r} continues {prompt!r} as {len(new)} tokens {tokenizer.convert_ids_to_tokens(new)}; "
            "choose an answer that is one token"
        )
    return new[0]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills right padding: the pad token, else EOS, else 0 (never attended to under causal attention)."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def pad(rows: Sequence[Sequence[int]], fill: int) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"]]:
    """Right-pad token lists to one width; returns the tokens and the real lengths."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)
    return tokens, torch.tensor([len(row) for row in rows], dtype=torch.long)
