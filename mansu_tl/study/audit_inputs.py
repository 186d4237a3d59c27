"""What is audited: two models that must be comparable, a task that both can be asked, and a model that never learnt it."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import Task
from mansu_tl.data.fit import require_fit
from mansu_tl.data.sources import load_task
from mansu_tl.data.sources.registry import TaskSource
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, gguf_weights, load, parameters, plain, rebuild
from mansu_tl.models.adapters import is_adapter, merged
from mansu_tl.models.four_bit import require_dense
from mansu_tl.models.gguf import remember
from mansu_tl.models.kinds import require_bridge
from mansu_tl.models.packages import PACKAGED
from mansu_tl.models.tree import hf_of
from mansu_tl.runs.metrics import Accuracy
from mansu_tl.verification import require_known

ModelSource = str | PathLike[str] | TransformerBridge | PreTrainedModel


@dataclass(frozen=True)
class Inputs:
    """What an audit compares, checked.

    Attributes:
        original, unlearned: bridges of one architecture, vocabulary and tokenizer.
        never: a model that never learnt the facts, or None.
        task: what is asked.
        known: the original's answers to the forget questions.
        names: how original, unlearned and never are called.
        marks: fingerprints of the models that are there, and the task's digest.
    """

    original: TransformerBridge
    unlearned: TransformerBridge
    never: TransformerBridge | None
    task: Task
    known: Accuracy
    names: dict[str, str]
    marks: dict[str, str]


def read_inputs(
    original: ModelSource, unlearned: ModelSource, task: Task | TaskSource, never: ModelSource | None, device: str
) -> Inputs:
    """Load what is given by name, and refuse what cannot be compared.

    Raises:
        MansuError: see `audit`.
    """
    given = {"original": original, "unlearned": unlearned, "never": never}
    names = {role: name_of(each, role) for role, each in given.items() if each is not None}
    base = _model(original, "original", device)
    other = merged(base, unlearned) if is_adapter(unlearned) else _model(unlearned, "unlearned", device)  # type: ignore[arg-type]
    reference = None if never is None else _model(never, "never", device)
    models = {"original": base, "unlearned": other} | ({} if reference is None else {"never": reference})
    for role, model in models.items():
        require_dense(model, f"audit: {role} {names[role]!r}: auditing")
    found = task if isinstance(task, Task) else load_task(task, tokenizer=base)
    _require_alike(base, other, names)
    for role, model in list(models.items())[1:]:
        _require_same_words(base, model, found, f"{role} {names[role]!r}")
        require_fit(model, found)
    marks = {role: fingerprint(model) for role, model in models.items()}
    if marks["original"] == marks["unlearned"] or _equal(base, other):
        raise MansuError(
            f"audit: unlearned {names['unlearned']!r} is the original, weight for weight: nothing was edited; pass the model "
            "that was unlearned"
        )
    known = require_known(base, found)
    other = _in_the_file_of(base, other, owned=other is not unlearned)
    return Inputs(base, other, reference, found, known, names, {**marks, "task": found.digest()})


def name_of(source: ModelSource | None, role: str) -> str:
    """How a model is called."""
    if isinstance(source, str | PathLike):
        text = fspath(source)
        return text if text in PACKAGED or not Path(text).exists() else "/".join(Path(text).resolve().parts[-2:])
    return str(getattr(getattr(source, "cfg", None), "model_name", "") or role)


def _model(source: ModelSource, role: str, device: str) -> TransformerBridge:
    if isinstance(source, str | PathLike):
        if is_adapter(source):
            raise MansuError(
                f"audit: {role} {fspath(source)!r} is an adapter, which has no base here; give a whole model (an adapter can "
                "only be UNLEARNED, and stands on ORIGINAL)"
            )
        return load(source, device=device)
    if isinstance(source, PreTrainedModel):
        return load(source, device=device)
    require_bridge(source, f"audit: {role}")
    return source


def _require_alike(original: TransformerBridge, unlearned: TransformerBridge, names: dict[str, str]) -> None:
    """One architecture: every parameter of the same name and shape, in configs of one kind."""
    what = f"audit: unlearned {names['unlearned']!r}"
    kinds = [str(plain(model).config.model_type) for model in (original, unlearned)]
    if kinds[0] != kinds[1]:
        raise MansuError(
            f"{what} is a {kinds[1]}, original {names['original']!r} a {kinds[0]}; give the model that it was made of"
        )
    sizes = [int(model.cfg.d_vocab) for model in (original, unlearned)]
    if sizes[0] != sizes[1]:
        raise MansuError(
            f"{what} has a vocabulary of {sizes[1]}, the original of {sizes[0]}; give the model that it was made of, or cut "
            f"added rows off (hf_model.resize_token_embeddings({sizes[0]}))"
        )
    shapes = [
        {name: tuple(value.shape) for name, value in parameters(model).items()} for model in (original, unlearned)
    ]
    for name in sorted(set(shapes[0]) | set(shapes[1])):
        before, after = (each.get(name) for each in shapes)
        if before != after:
            found = [f"of shape {shape}" if shape else "not there" for shape in (before, after)]
            raise MansuError(
                f"{what}: {name} is {found[1]}, in the original {found[0]}; give the model that it was made of"
            )


def _require_same_words(original: TransformerBridge, other: TransformerBridge, task: Task, what: str) -> None:
    """The task's tokens stand for the same words in both models."""
    first, second = original.tokenizer, other.tokenizer
    if first is None or second is None:
        return
    ids = sorted({i for each in _tensors(task) for i in each.unique().tolist() if i >= 0})
    words = [tokenizer.convert_ids_to_tokens(ids) for tokenizer in (first, second)]
    for token, before, after in zip(ids, *words, strict=True):
        if before != after:
            raise MansuError(
                f"audit: {what}: its tokenizer reads token {token} as {after!r}, the original's as {before!r}; the two "
                "models speak other words: give the model that it was made of, with its tokenizer"
            )


def _tensors(task: Task) -> list[Tensor]:
    rows = [task.forget_pairs.clean, task.forget_pairs.corrupt, task.forget_pairs.options, task.retain_text.tokens]
    return rows + [part for asked in task.questions.values() for part in (asked.prompts, asked.options)]


def _in_the_file_of(original: TransformerBridge, unlearned: TransformerBridge, *, owned: bool) -> TransformerBridge:
    """The unlearned model as one that would be shipped in the GGUF file that the original came in; a folder forgets that.

    Args:
        owned: it was loaded here; a model of the caller's is copied and stays as it is.
    """
    file = gguf_weights(original)
    if file is None or gguf_weights(unlearned) is not None:
        return unlearned
    other = unlearned if owned else rebuild(unlearned)
    remember(hf_of(other), file)
    return other


def _equal(original: TransformerBridge, unlearned: TransformerBridge) -> bool:
    """Whether all weights are the same numbers, stored in one dtype or in two."""
    before, after = parameters(original), parameters(unlearned)
    return all(torch.equal(value.to(after[name]), after[name]) for name, value in before.items())
