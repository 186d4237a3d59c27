"""Digests: whatever a stage reads changes them, and nothing else does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.data import PromptPairs, Questions, Sequences, Span, Task
from mansu_tl.results.digest import digest
from mansu_tl.study import full
from mansu_tl.study.config import StudyConfig
from mansu_tl.unlearning import methods, settings_of
from tests.test_attribution import random_pairs
from tests.tiny import tiny


def small_task() -> Task:
    pairs = replace(random_pairs(n=3), facts=tuple("aab"), labels=("a / 1", "a / 2", "b / 1"))
    pairs = replace(pairs, spans=(Span("subject", torch.tensor([1, 1, 2]), torch.tensor([2, 2, 3])),))
    text = Sequences(pairs.clean, pairs.lengths)
    asked = Questions(
        pairs.clean, pairs.lengths, torch.cat([pairs.answers[:, None], pairs.distractors], 1), tuple("xyz")
    )
    kept = replace(asked, facts=tuple("uvw"))
    return Task("small", pairs, pairs, text, text, text, {"forget": asked, "retain": kept})


def changed(value: Any) -> Any:
    """The same kind of value, another one."""
    if isinstance(value, torch.Tensor):
        out = value.clone()
        # Less by one: a length may not pass the width of the tokens.
        out.view(-1)[-1] = ~out.view(-1)[-1] if value.dtype == torch.bool else out.view(-1)[-1] - 1
        return out
    if value is None:
        return "new"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "'"
    if isinstance(value, tuple):
        return (*value[:-1], changed(value[-1])) if value else ("new",)
    if isinstance(value, dict):
        key = next(iter(value), None)
        return {"new": 1} if key is None else value | {key: changed(value[key])}
    name = [f.name for f in fields(value) if getattr(value, f.name) is not None and f.name != "spans"][-1]
    return replace(value, **{name: changed(getattr(value, name))})


def circuit() -> mtl.circuit.Circuit:
    return mtl.circuit.Circuit.top(mtl.edge_attribution(mtl.load(tiny("llama")), random_pairs(n=2), steps=1), 8, 0.5)


@pytest.mark.parametrize(
    "make", [small_task, lambda: small_task().forget_pairs, circuit], ids=["task", "pairs", "circuit"]
)
def test_every_field_counts(make: Any) -> None:
    value = make()
    found = {"": value.digest()}
    for field in fields(value):
        other = object.__new__(type(value))
        object.__setattr__(other, "__dict__", value.__dict__ | {field.name: changed(getattr(value, field.name))})
        found[field.name] = other.digest()
    assert len(set(found.values())) == len(found), "a field that does not count"
    assert make().digest() == found[""]


def test_every_field_of_a_tasks_parts_counts() -> None:
    task = small_task()
    seen = {task.digest()}
    for name in ("forget_pairs", "retain_pairs", "retain_text", "near_text", "unseen"):
        part = getattr(task, name)
        for field in fields(part):
            if field.name == "corruption":
                continue  # fits no pairs that have corrupt prompts; the test above has it
            other = replace(task, **{name: replace(part, **{field.name: changed(getattr(part, field.name))})})
            assert other.digest() not in seen, f"{name}.{field.name}"
            seen.add(other.digest())
    for field in fields(Questions):
        asked = task.questions["forget"]
        other = replace(
            task,
            questions={**task.questions, "forget": replace(asked, **{field.name: changed(getattr(asked, field.name))})},
        )
        assert other.digest() not in seen, f"questions.{field.name}"
        seen.add(other.digest())


@pytest.mark.parametrize("method", methods())
def test_every_setting_counts(method: str) -> None:
    settings = settings_of(method, {})
    seen = {settings.digest()}
    for field in fields(settings):
        other = object.__new__(type(settings))
        other.__dict__.update(settings.__dict__ | {field.name: changed(getattr(settings, field.name))})
        assert other.digest() not in seen, field.name
        seen.add(other.digest())


def test_a_settings_digest_is_that_of_its_values_however_they_were_given() -> None:
    assert settings_of("mansu", {"steps": 50.0}).digest() == settings_of("mansu", {"steps": 50}).digest()
    assert settings_of("npo", {"learning_rate": 1}).digest() == settings_of("npo", {"learning_rate": 1.0}).digest()
    for plan in (StudyConfig(), full()):
        assert plan.digest() == replace(plan).digest() != replace(plan, task="other").digest()


def test_values_that_look_alike_differ() -> None:
    alike = [
        50, 50.0, "50", b"50", True, 1, None, "None", (), {}, "", (50,), ((50,),), ("a", "b"), ("ab",), ("a", ("b",)),
        {"a": "b"}, {"b": "a"}, torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]]),
        torch.tensor([1, 2]).int(), Path("50"), frozenset({50}), pd.DataFrame({"a": [1, 2]}),
        pd.DataFrame({"a": [1.0, 2.0]}), pd.DataFrame({"b": [1, 2]}), pd.DataFrame({"a": [1, 2]}, index=[1, 0]),
        0.1, 0.1 + 2**-56, float("nan"), float("inf"),
    ]  # fmt: skip
    assert len({digest(value) for value in alike}) == len(alike)


def test_order_of_mappings_and_place_of_tensors_do_not_count() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    rows = torch.arange(12).view(3, 4)
    assert digest(rows.T) == digest(rows.T.contiguous()) != digest(rows)
    assert digest([np.float64(0.1), np.int64(3), np.bool_(True)]) == digest([0.1, 3, True])
    with pytest.raises(TypeError, match="object has no content"):
        digest(object())


def test_a_digest_is_the_same_in_another_process() -> None:
    code = "import mansu_tl as m; print(m.load_task('pocket').digest(), m.unlearning.MansuSettings().digest())"
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [mtl.load_task("pocket").digest(), mtl.unlearning.MansuSettings().digest()]


def test_pairs_keep_their_digest_through_slicing_all_of_them() -> None:
    pairs: PromptPairs = random_pairs(n=4)
    assert pairs[:].digest() == pairs.digest() != pairs[:3].digest()
