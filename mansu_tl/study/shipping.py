"""Edits in the file that their model came in: written back, read again, asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Questions, Task
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, load, save_gguf
from mansu_tl.runs import accuracy
from mansu_tl.study.plan import title_of
from mansu_tl.unlearning import Edit
from mansu_tl.verification import SideBySide, ask

# Question sets of the table, those that are there.
_SETS = ("forget", "forget_paraphrase", "near", "near_paraphrase", "retain")


def ship(edit: Edit, model: TransformerBridge, path: Path) -> Path:
    """Write an edited model into a file of the types and, where nothing needs others, of the scales that the model came with.

    What the file cannot hold is rounded to it, as whoever ships the model would; a floor on "gguf" leaves nothing to round.

    Raises:
        MansuError: a model that came from no GGUF file, or another model than the edit's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_gguf(edit.apply(model), path)


def shipped_answers(
    model: TransformerBridge,
    task: Task,
    edits: Mapping[str, Edit],
    folder: Path,
    *,
    of_each: int = 3,
    new_tokens: int = 1,
) -> SideBySide:
    """What a model and every edit of it say, as they are and once more from the file that they are shipped in.

    The first prompts of the forget and of the near questions with their answers, one of every fact, and below them how many
    of each set are right: by multiple choice and by the likeliest continuation.

    Args:
        edits: by method.
        folder: where the files are written, METHOD.gguf each.
        of_each: prompts of each set.
        new_tokens: where an answer is cut.

    Raises:
        MansuError: a model that came from no GGUF file or has no tokenizer.
    """
    sets = [name for name in _SETS if name in task.questions]
    texts = [text for name in ("forget", "near") for text in first_texts(model, task.questions.get(name), of_each)]

    known: dict[str, list[str]] = {}

    def column(one: TransformerBridge) -> list[str]:
        # What is the same bit for bit, as a floored edit in its file, says the same.
        mark = fingerprint(one)
        if mark not in known:
            said = [row[0] for row in ask({"": one}, texts, new_tokens=new_tokens).answers]
            scores = [accuracy(one, task.questions[name]) for name in sets]
            known[mark] = [*said, *(f"{score.mc_percent:.1f} / {score.cloze_percent:.1f} %" for score in scores)]
        return known[mark]

    columns = {"original": column(model)}
    for method, edit in edits.items():
        columns[title_of(method)] = column(edit.apply(model))
        file = ship(edit, model, folder / f"{method}.gguf")
        columns[f"{title_of(method)}, shipped"] = column(load(file, tokenizer=model.tokenizer))
    counts = [f"{name}: right of {len(task.questions[name])}, chosen / said" for name in sets]
    return SideBySide((*texts, *counts), tuple(columns), tuple(zip(*columns.values(), strict=True)))


def first_texts(model: TransformerBridge, questions: Questions | None, count: int) -> Sequence[str]:
    """The first prompts of so many facts, as text."""
    if questions is None:
        return []
    if model.tokenizer is None:
        raise MansuError("shipped answers: the model has no tokenizer, so nothing can be asked")
    first = {fact: i for i, fact in reversed(list(enumerate(questions.facts)))}
    rows = sorted(first.values())[:count]
    prompts = [questions.prompts[i, : int(questions.lengths[i])] for i in rows]
    return list(model.tokenizer.batch_decode(prompts, skip_special_tokens=True))
