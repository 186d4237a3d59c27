"""A validation split of a task's questions, so that settings are never chosen on what is reported."""

from __future__ import annotations

from dataclasses import replace

import torch

from mansu_tl.data.task import Questions, Task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError


@torch_defaults()
def split_questions(task: Task, share: float = 1 / 3, *, seed: int = 0) -> tuple[Task, Task]:
    """The task twice, with the questions of some facts in the first (validation) and of all others in the second (test).

    Only questions are split: every forget fact has to be unlearned, so both keep the same training text. All wordings
    of a fact fall on the same side. Our definition.

    Args:
        share: of each set's facts that go to the validation side.
        seed: of the draw.

    Raises:
        MansuError: a share outside (0, 1), or a set with fewer than two facts.
    """
    if not 0 < share < 1:
        raise MansuError(f"split: share={share}; choose one in (0, 1)")
    drawn: dict[str, frozenset[str]] = {}
    sides: tuple[dict[str, Questions], dict[str, Questions]] = ({}, {})
    for name, questions in task.questions.items():
        family = name.removesuffix("_paraphrase")
        if family not in drawn:
            drawn[family] = _drawn(family, questions, share, seed)
        chosen = [fact in drawn[family] for fact in questions.facts]
        for side, keep in zip(sides, (True, False), strict=True):
            rows = [i for i, inside in enumerate(chosen) if inside is keep]
            if not rows:
                where = "validation" if keep else "test"
                raise MansuError(
                    f"split: no fact of the {name} set falls on the {where} side; it asks other facts than {family}"
                )
            side[name] = questions[rows]
    validation, test = (replace(task, questions=side) for side in sides)
    return validation, test


def _drawn(name: str, questions: Questions, share: float, seed: int) -> frozenset[str]:
    facts = tuple(dict.fromkeys(questions.facts))
    if len(facts) < 2:
        raise MansuError(f"split: the {name} set asks {len(facts)} fact(s); two are the least that can be split")
    count = min(max(1, round(share * len(facts))), len(facts) - 1)
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed)).tolist()
    return frozenset(facts[i] for i in order[:count])
