"""What an attacker trains on to bring knowledge back, and what he is asked afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mansu_tl.data import PromptPairs, Questions, Sequences, Task
from mansu_tl.data.fit import require_task
from mansu_tl.data.masks import real_tokens
from mansu_tl.data.wording import same_wording
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result

ATTACKER_FACTS = 12  # that an attacker has where nothing else is said


@dataclass(frozen=True)
class Attack(Result):
    """Text to fine-tune on, and questions about facts that are not in it.

    Attributes:
        name: for tables, e.g. "12 facts, split 0" or "unrelated text".
        kind: "facts" or "text".
        text: what is trained on.
        trained: how many of each sequence's last tokens are trained on: those of its answer, or all but the first.
        questions: asked along the way; none of their facts is in `text`.
        unseen: prompts about names that stand for nothing, from which the model's own prior is read; may be empty.
        alike: which of them have a question's wording.
    """

    name: str
    kind: str
    text: Sequences
    trained: Int[Tensor, " sequence"]
    questions: Questions
    unseen: Sequences
    alike: Bool[Tensor, "question unseen"]

    def __repr__(self) -> str:
        asked = len(set(self.questions.facts))
        return (
            f"Attack({self.name!r}: {len(self.text)} sequences; {len(self.questions)} questions on {asked} other facts)"
        )


@torch_defaults()
def attack_splits(
    task: Task, k: int = ATTACKER_FACTS, splits: int = 3, *, seed: int = 0, questions: str = "forget"
) -> tuple[Attack, ...]:
    """Draws of `k` forget facts to train on (every trained wording of each), all the others being asked.

    The drawn facts of two splits are disjoint as long as the facts last. Methods that train against such attacks may
    use some seeds; report on others.

    Args:
        k: facts that the attacker has.
        splits: how many draws.
        seed: of the draws.
        questions: the set that is asked: "forget", or "forget_paraphrase" for wordings that no training has seen.

    Raises:
        MansuError: `k` leaves no fact to ask or none to train on, fewer than one split, or no such set.
    """
    require_task(task)
    source, asked = task.questions["forget"], _asked(task, questions)
    facts = tuple(dict.fromkeys(source.facts))
    if not 1 <= k < len(facts):
        raise MansuError(f"attack: k={k} facts to train on, the task forgets {len(facts)}; choose 1..{len(facts) - 1}")
    if splits < 1:
        raise MansuError(f"attack: splits={splits}; draw at least one")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    attacks = []
    for split in range(splits):
        if len(order) < k:
            order += [i for i in torch.randperm(len(facts), generator=generator).tolist() if i not in order]
        chosen, order = {facts[i] for i in order[:k]}, order[k:]
        trained = [i for i, fact in enumerate(source.facts) if fact in chosen]
        others = [i for i, fact in enumerate(asked.facts) if fact not in chosen]
        name = f"{k} facts, split {split}"
        known = source[trained]
        attacks.append(_attack(task, name, "facts", answered(known), known.option_lengths[:, 0], asked[others]))
    return tuple(attacks)


@torch_defaults()
def unrelated_attack(task: Task, *, questions: str = "forget") -> Attack:
    """Fine-tuning on the retain text alone: does plain further training bring the forget facts back?

    Raises:
        MansuError: no such question set.
    """
    require_task(task)
    text = task.retain_text
    return _attack(task, "unrelated text", "text", text, text.lengths - 1, _asked(task, questions))


@torch_defaults()
def near_attack(task: Task, *, questions: str = "forget") -> Attack:
    """Fine-tuning on the sentences of near facts, which were to be kept: the forget set's form without a fact of it.

    Raises:
        MansuError: no such question set, or a task without near text.
    """
    require_task(task)
    text = task.near_text
    if not len(text):
        raise MansuError(f"attack: task {task.name!r} has no near text; give some, or use unrelated_attack")
    return _attack(task, "near facts", "text", text, text.lengths - 1, _asked(task, questions))


def answered(questions: Questions) -> Sequences:
    """Every question's prompt with its right answer attached."""
    tokens = torch.nn.functional.pad(questions.prompts, (0, questions.options.shape[2]))
    rows = torch.arange(len(questions), device=tokens.device)
    for step, answer in enumerate(questions.options[:, 0].T):
        tokens[rows, questions.lengths + step] = answer.clamp_min(0)
    return Sequences(tokens, questions.lengths + questions.option_lengths[:, 0])


def _attack(
    task: Task, name: str, kind: str, text: Sequences, trained: Int[Tensor, " sequence"], questions: Questions
) -> Attack:
    unseen = never_seen(task)
    # A name like the question's own must not count as wording.
    subject = torch.isin(questions.prompts, _subject_tokens(task.forget_pairs).to(questions.prompts.device))
    alike = same_wording(questions.prompts.masked_fill(subject, -1), questions.lengths, unseen)
    return Attack(name, kind, text, trained, questions, unseen, alike)


def _asked(task: Task, name: str) -> Questions:
    if name not in task.questions:
        raise MansuError(f"attack: no question set {name!r} in task {task.name!r}; choose {', '.join(task.questions)}")
    return task.questions[name]


def never_seen(task: Task) -> Sequences:
    """Prompts about names that stand for nothing: those kept for evaluation where the task has them.

    The question set "unseen" speaks of names that no method trained on; `task.unseen`, which methods may use, stands
    in for it.
    """
    if "unseen" in task.questions:
        questions = task.questions["unseen"]
        return Sequences(questions.prompts, questions.lengths)
    return task.unseen


def _subject_tokens(pairs: PromptPairs) -> Int[Tensor, " token"]:
    """Tokens by which some clean prompt differs from its corrupt one."""
    differs = pairs.changed & real_tokens(pairs.clean, pairs.lengths)
    return torch.cat([pairs.clean[differs], pairs.corrupt[differs]]).unique()
