"""A first task and config to run and to change: some of the embedded model's facts, as a user would write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mansu_tl.data import PromptPairs, Sequences
from mansu_tl.data.sources import load_task
from mansu_tl.errors import MansuError
from mansu_tl.models import load
from mansu_tl.results.files import write_text

_FORGET, _NEAR, _RETAIN, _TEXTS, _UNSEEN = 12, 12, 24, 60, 16
_CONFIG = """\
# Run with: mansu-tl run config.toml --out results      (mansu-tl check config.toml first tells what is wrong)
model = "pocket"            # a folder in Hugging Face format, a hub id, or an embedded name
task = "task.jsonl"         # beside this file
methods = ["mansu", "graddiff"]
quantizers = ["nf4"]        # mansu_tl.quantizers() lists them
never = "pocket-never"      # a model that never learnt the facts, as a reference; "" = none
seed = 0

[mansu]                     # any setting of the method; these are a quick first run's
steps = 60
adversary_weight = 0.0      # no attacker in the loop
representation_weight = 0.0
retain_weight = 20.0
margin = 0.1

[graddiff]
max_steps = 100
"""


def write_starter(folder: Path) -> tuple[Path, Path]:
    """Write `task.jsonl` and `config.toml` into a folder; together they run as they stand.

    The task asks facts of the embedded model "pocket": twelve to forget in two wordings and a held-out one, neighbours and
    far facts to keep, text whose likelihood is to be kept, and prompts about things that the model never met.

    Returns:
        The config and the task.

    Raises:
        MansuError: one of the files is there already, or the folder cannot be written to.
    """
    paths = folder / "config.toml", folder / "task.jsonl"
    for path in paths:
        if path.exists():
            raise MansuError(f"{path}: is there already; give another folder, or move it away")
    write_text(paths[1], "".join(json.dumps(row) + "\n" for row in _rows()))
    write_text(paths[0], _CONFIG)
    return paths


def _rows() -> Iterator[dict[str, Any]]:
    model = load("pocket")
    task = load_task("pocket")

    def decoded(tokens: torch.Tensor, length: int | torch.Tensor) -> str:
        return str(model.tokenizer.decode(tokens[: int(length)], skip_special_tokens=True))

    def of_pairs(kind: str, pairs: PromptPairs, facts: list[str], wordings: int) -> Iterator[dict[str, Any]]:
        for fact in facts:
            rows = [i for i, name in enumerate(pairs.facts) if name == fact][: wordings + 1]
            for number, i in enumerate(rows):
                held_out = wordings > 1 and number == wordings
                if number == wordings and not held_out:
                    break
                yield {
                    "set": kind,
                    "clean": decoded(pairs.clean[i], pairs.lengths[i]),
                    "corrupt": decoded(pairs.corrupt[i], pairs.lengths[i]),
                    "answer": decoded(pairs.answers[i : i + 1], 1),
                    "distractors": [decoded(pairs.distractors[i, j : j + 1], 1) for j in range(3)],
                    "fact": fact,
                } | ({"held_out": True} if held_out else {})

    def of_text(kind: str, texts: Sequences, count: int, end: int) -> Iterator[dict[str, Any]]:
        for i in torch.linspace(0, len(texts) - 1, count).long().tolist():
            yield {"set": kind, "text": decoded(texts.tokens[i], texts.lengths[i] - end)}

    yield from of_pairs("forget", task.forget_pairs, _first(task.forget_pairs, _FORGET), 2)
    kept = task.retain_pairs
    near = [label.endswith(("catalyst", "antidote")) for label in kept.facts]
    for kind, flag, count in (("near", True, _NEAR), ("retain", False, _RETAIN)):
        chosen = kept[[i for i, is_near in enumerate(near) if is_near is flag]]
        yield from of_pairs(kind, chosen, _first(chosen, count), 1)
    yield from of_text("text", task.retain_text, _TEXTS, 1)
    yield from of_text("unseen", task.unseen, _UNSEEN, 0)


def _first(pairs: PromptPairs, count: int) -> list[str]:
    """So many facts, evenly spread."""
    facts = list(dict.fromkeys(pairs.facts))
    return [facts[i] for i in torch.linspace(0, len(facts) - 1, count).long().tolist()]
