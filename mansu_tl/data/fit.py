"""Whether pairs, questions, text or a whole task can be put to a model: its vocabulary and its positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.task import Questions, Sequences, Task
from mansu_tl.errors import MansuError
from mansu_tl.models.limits import most_positions, vocabulary_size


@dataclass(frozen=True)
class _Part:
    """Rows that are run, and options that are looked up behind them."""

    row: str
    ids: tuple[Tensor, ...]
    lengths: Tensor
    options: Tensor | None = None


def require_fit(
    model: TransformerBridge | nn.Module, given: PromptPairs | Questions | Sequences | Task, names: Sequence[str] = ()
) -> None:
    """Refuse tokens that the model has no embedding for, and rows that are longer than it has positions.

    Args:
        names: what errors call each row; "pair 0" and so on without.

    Raises:
        MansuError: there is such a token or row.
    """
    vocabulary, positions = vocabulary_size(model), most_positions(model)
    for part in _parts(given):
        if not len(part.lengths) or part.lengths.device.type == "meta":
            continue
        for ids in (*part.ids, *(() if part.options is None else (part.options,))):
            if vocabulary is not None and int(ids.max()) >= vocabulary:
                i = int((ids >= vocabulary).reshape(len(ids), -1).any(1).nonzero()[0])
                raise MansuError(
                    f"{names[i] if names else f'{part.row} {i}'}: token {int(ids[i].max())}, the model's vocabulary ends "
                    f"at {vocabulary - 1}; use its own tokenizer"
                )
        longest = int(part.lengths.argmax())
        if positions is not None and int(part.lengths[longest]) > positions:
            raise MansuError(
                f"{names[longest] if names else f'{part.row} {longest}'}: {int(part.lengths[longest])} tokens, the model "
                f"has {positions} positions; shorten the text"
            )
        width = max(ids.shape[1] for ids in part.ids)
        if positions is not None and width > positions:
            raise MansuError(
                f"{part.row}s are padded to {width} tokens, the model has {positions} positions and the longest row "
                f"{int(part.lengths[longest])} tokens; cut the padding off (tokens[:, :{int(part.lengths[longest])}])"
            )


def _require(kind: type, word: str, value: object) -> None:
    """Refuse anything but a `kind`; the error says how to make one of it."""
    if not isinstance(value, kind):
        raise MansuError(f"{word}: got a {type(value).__name__}; {_way_to(value, word)}")


require_pairs = partial(_require, PromptPairs, "pairs")
require_questions = partial(_require, Questions, "questions")
require_sequences = partial(_require, Sequences, "text")
require_task = partial(_require, Task, "task")

_PARTS = {
    "pairs": "task.forget_pairs",
    "questions": 'task.questions["forget"]',
    "text": "task.retain_text",
    "task": "",
}


def _way_to(found: object, wanted: str) -> str:
    """How what was passed becomes what is wanted."""
    part = _PARTS[wanted]
    if isinstance(found, Task):
        return f"pass {part}"
    if isinstance(found, PromptPairs | Questions | Sequences):
        return f"pass {part or 'the task that it is a part of'}"
    if isinstance(found, Mapping) and found and all(isinstance(value, Questions) for value in found.values()):
        return f"pass one of its sets, {next(iter(found))!r} for instance"
    if isinstance(found, Tensor) and wanted == "pairs":
        return "make pairs of tensors with PromptPairs.from_tokens(clean, corrupt, answers, distractors)"
    shown = repr(fspath(found)) if isinstance(found, str | PathLike) else "it"
    then = f", then pass {part}" if part else ""
    return f"read a file, a DataFrame or a list of rows with task = mtl.load_task({shown}, tokenizer=model){then}"


def _with_answer(given: PromptPairs | Questions) -> Tensor:
    """Tokens that are run at most for each prompt: all of an option but its last one behind it."""
    return given.lengths if given.options.shape[2] == 1 else given.lengths + given.option_lengths.amax(1) - 1


def _parts(given: PromptPairs | Questions | Sequences | Task, of: str = "") -> Iterator[_Part]:
    if isinstance(given, PromptPairs):
        yield _Part(f"{of}pair", (given.clean, given.corrupt), _with_answer(given), given.options)
    elif isinstance(given, Questions):
        yield _Part(f"{of}question", (given.prompts,), _with_answer(given), given.options)
    elif isinstance(given, Sequences):
        yield _Part(f"{of}sequence", (given.tokens,), given.lengths)
    else:
        for name in ("forget_pairs", "retain_pairs", "retain_text", "near_text", "unseen"):
            yield from _parts(getattr(given, name), f"{name}, ")
        for name, questions in given.questions.items():
            yield from _parts(questions, f"{name} questions, ")
