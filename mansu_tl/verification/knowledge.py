"""What the un-edited model knows of what it is to forget: where it knows nothing, nothing can be judged."""

from __future__ import annotations

from collections.abc import Sequence

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Questions, Task
from mansu_tl.errors import MansuError
from mansu_tl.results.intervals import interval_over_facts
from mansu_tl.runs.metrics import Accuracy, accuracy

_SHOWN = 10


def unknown_facts(answers: Accuracy) -> tuple[str, ...]:
    """The facts of which a model gets no more than half of the questions right (multiple choice)."""
    right: dict[str, list[bool]] = {}
    for fact, hit in zip(answers.facts, answers.multiple_choice.tolist(), strict=True):
        right.setdefault(fact, []).append(hit)
    return tuple(fact for fact, hits in right.items() if 2 * sum(hits) <= len(hits))


def require_known(model: TransformerBridge, task: Task) -> Accuracy:
    """Refuse a model that does not know what it is to forget, before any work is done; gives its answers.

    It knows the forget set if it gets more than half of the facts right, and more than guessing would: the 95 % interval of
    its multiple-choice accuracy over facts lies above chance. Our definition.

    Raises:
        MansuError: it does not; the facts that it does not know are named.
    """
    questions = task.questions["forget"]
    answers = accuracy(model, questions)
    missing, facts = unknown_facts(answers), len(set(questions.facts))
    low, _ = interval_over_facts(answers.multiple_choice.double(), answers.facts)
    if 2 * len(missing) >= facts or 100 * low <= questions.chance:
        raise MansuError(
            f"task {task.name!r}: the model does not know what it is to forget: {answers.mc_percent:.0f} % right where "
            f"guessing gives {questions.chance:.0f} %; it does not know {_named(missing)}; use facts that it answers, or "
            "another model"
        )
    return answers


def few_facts(questions: Questions, name: str) -> str:
    """A warning where a set asks too few facts for its intervals to say much; "" where it asks ten or more."""
    count = len(set(questions.facts))
    return (
        ""
        if count >= 10
        else f"{name}: {count} {'fact' if count == 1 else 'facts'}; fewer than ten, so its intervals say little"
    )


def _named(facts: Sequence[str]) -> str:
    more = f" and {len(facts) - _SHOWN} more" if len(facts) > _SHOWN else ""
    return ", ".join(repr(fact) for fact in facts[:_SHOWN]) + more if facts else "enough of them"
