"""Near questions as pairs, by hand and on the embedded task."""

from __future__ import annotations

import torch

from mansu_tl.data import Questions
from mansu_tl.data.counterparts import counterparts, facts_first


def asked(prompts: list[list[int]], options: list[list[int]], facts: list[str]) -> Questions:
    width = max(map(len, prompts))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in prompts])
    return Questions(tokens, torch.tensor([len(row) for row in prompts]), torch.tensor(options), tuple(facts))


def test_by_hand() -> None:
    questions = asked(
        [[5, 6, 7], [5, 9, 7], [5, 8, 7], [5, 6, 4], [1, 2]],
        [[20, 21, 22], [20, 22, 23], [21, 20, 22], [24, 20, 21], [30, 31, 32]],
        ["a", "b", "c", "a", "d"],
    )
    pairs = counterparts(questions)
    assert pairs is not None
    # The last has no other of its length. The first and the second answer alike, so neither stands beside the other.
    assert pairs.clean.tolist() == [[5, 6, 7], [5, 9, 7], [5, 8, 7], [5, 6, 4]]
    # Two of its three tokens: the third question, and the fourth; of equals the next one is taken.
    assert pairs.corrupt.tolist() == [[5, 8, 7], [5, 8, 7], [5, 6, 7], [5, 6, 7]]
    assert pairs.options[..., 0].tolist() == [[20, 21, 22], [20, 21, 22], [21, 20, 22], [24, 20, 21]]
    assert pairs.facts == ("a", "b", "c", "a")
    first = counterparts(questions, 3)
    assert first is not None and first.facts == ("a", "b", "c")
    assert counterparts(questions[:2]) is None
    assert facts_first(["a", "a", "b", "a", "b"]) == [0, 2, 1, 4, 3]


def test_on_the_embedded_task(task) -> None:
    questions = task.questions["near"]
    pairs = counterparts(questions)
    assert pairs is not None and len(pairs) == len(questions)
    known = {
        tuple(prompt.tolist()): int(options[0, 0])
        for prompt, options in zip(questions.prompts, questions.options, strict=True)
    }
    for i in range(0, len(pairs), 7):
        assert known[tuple(pairs.corrupt[i].tolist())] == int(pairs.options[i, 1, 0]) != int(pairs.options[i, 0, 0])
        assert known[tuple(pairs.clean[i].tolist())] == int(pairs.options[i, 0, 0])
        assert len(set(pairs.options[i, :, 0].tolist())) == pairs.options.shape[1]
        others = (questions.lengths == questions.lengths[i]) & (questions.choices[:, 0] != questions.choices[i, 0])
        shared = (questions.prompts[others] == questions.prompts[i]).sum(1)
        assert int((pairs.clean[i] == pairs.corrupt[i]).sum()) == int(shared.max())
