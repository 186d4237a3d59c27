"""TOFU's files: questions and answers about 200 authors that do not exist (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mansu_tl.data.answers import joined
from mansu_tl.errors import MansuError
from mansu_tl.results.files import lines_of, local, read_text
from mansu_tl.results.result import Result

PER_AUTHOR = 20
_FILES = ("forget10", "retain90", "forget10_perturbed", "retain_perturbed")
_ELSEWHERE = ("real_authors_perturbed", "world_facts_perturbed")


@dataclass(frozen=True)
class Item:
    """One question with what TOFU gives beside it.

    Attributes:
        question: the question.
        answer: its answer, as in training.
        paraphrased_question: the same question in other words; "" where there is none.
        paraphrased_answer: the same answer in other words; "" where there is none.
        perturbed_answers: wrong answers in the form of the paraphrased one (of the answer where there is none).
    """

    question: str
    answer: str
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Question and answer as the models read them."""
        return f"{prompt(self.question)} {self.answer}"


@dataclass(frozen=True)
class Tofu(Result):
    """The files of one folder.

    Attributes:
        forget: forget10, 20 authors of 20 questions.
        retain: retain90, 180 authors.
        forget_perturbed: forget10 with paraphrased and wrong answers.
        retain_perturbed: 400 questions of retain90 with the same.
        real_authors: questions about authors who do exist; empty where the file is absent.
        world_facts: questions about the world; empty where the file is absent.
    """

    forget: tuple[Item, ...]
    retain: tuple[Item, ...]
    forget_perturbed: tuple[Item, ...]
    retain_perturbed: tuple[Item, ...]
    real_authors: tuple[Item, ...] = ()
    world_facts: tuple[Item, ...] = ()

    def __repr__(self) -> str:
        return f"Tofu({len(self.forget)} questions to forget, {len(self.retain)} to keep)"


def prompt(question: str) -> str:
    """The question as the models read it; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, end: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt (BOS in front where the tokenizer has one) and of the answer that follows it.

    Args:
        end: close the answer with the end-of-sequence token, as in training.
    """
    before = tokenizer.encode(prompt, add_special_tokens=False)
    joint = tokenizer.encode(joined(tokenizer, prompt, f" {answer}"), add_special_tokens=False)
    # A tokenizer that merges across the seam leaves the longest common start as the prompt.
    shared = next((i for i, (a, b) in enumerate(zip(before, joint, strict=False)) if a != b), len(before))
    head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    tail = [int(tokenizer.eos_token_id)] if end and tokenizer.eos_token_id is not None else []
    return [*head, *joint[:shared]], [*joint[shared:], *tail]


def text_of(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> str:
    """The text of token ids, special tokens left out."""
    return str(tokenizer.decode(list(row), skip_special_tokens=True))


def read_tofu(folder: str | PathLike[str]) -> Tofu:
    """Read TOFU's JSON-lines files (forget10, retain90 and the perturbed sets) from a folder.

    Raises:
        MansuError: no such folder, a file is missing (real_authors and world_facts may be), a line is no JSON object
            with a question and an answer, or a retain question is in the forget set.
    """
    root = local(folder)
    if not root.is_dir():
        raise MansuError(f"{root}: no such folder; pass the one that holds TOFU's forget10.json")
    parts = {name: _read(root / f"{name}.json", needed=True) for name in _FILES}
    rest = {name: _read(root / f"{name}.json", needed=False) for name in _ELSEWHERE}
    shared = {item.question for item in parts["forget10"]} & {item.question for item in parts["retain90"]}
    if shared:
        raise MansuError(f"{root}: forget10 and retain90 share {len(shared)} questions, e.g. {min(shared)!r}")
    return Tofu(
        parts["forget10"],
        parts["retain90"],
        parts["forget10_perturbed"],
        parts["retain_perturbed"],
        rest["real_authors_perturbed"],
        rest["world_facts_perturbed"],
    )


def _read(path: Path, needed: bool) -> tuple[Item, ...]:
    if not path.is_file():
        if needed:
            raise MansuError(f"{path}: no such file; download locuslab/TOFU into this folder")
        return ()
    lines = lines_of(read_text(path))
    items = tuple(_item(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip())
    if not items:
        raise MansuError(f"{path}: holds no question; download it again")
    return items


def _item(line: str, where: str) -> Item:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise MansuError(f"{where}: no JSON ({error.msg}); download the file again") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise MansuError(f"{where}: no question with an answer; this is not one of TOFU's files")
    wrong = row.get("perturbed_answer", [])
    return Item(
        row["question"],
        row["answer"],
        row.get("paraphrased_question", ""),
        row.get("paraphrased_answer", ""),
        (wrong,) if isinstance(wrong, str) else tuple(wrong),
    )
