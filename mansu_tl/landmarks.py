"""A task for models that know the world, from the facts of this package: what `make demo-real` makes SmolLM2 forget."""

from __future__ import annotations

import json
from importlib import resources

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.building import BuiltTask, build_task
from mansu_tl.verification import ask

# Tokens that the model writes behind every opening.
_WRITTEN = 48


def landmarks_task(model: TransformerBridge, seed: int = 0) -> BuiltTask:
    """Landmarks and cities of countries that a model knows are to be forgotten, others of them are near, capitals are far.

    The text whose likelihood is to be kept is what the model itself writes, greedily, behind plain openings of sentences.
    """
    facts = resources.files("mansu_tl.data") / "facts"
    openings = json.loads((facts / "openings.json").read_text(encoding="utf-8"))
    written = [row[0] for row in ask(model, openings, new_tokens=_WRITTEN).answers]
    text = [f"{opening} {more}".rstrip() for opening, more in zip(openings, written, strict=True)]
    with resources.as_file(facts / "landmarks.json") as forget, resources.as_file(facts / "capitals.json") as far:
        return build_task(model, forget, [far], text=text, seed=seed)
