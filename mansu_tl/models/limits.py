"""What a model can be given: how many tokens it knows, and how many positions it has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge


def vocabulary_size(model: TransformerBridge | nn.Module) -> int | None:
    """Rows of the input embedding; None for a module that does not say."""
    if isinstance(model, TransformerBridge):
        return int(model.cfg.d_vocab)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def most_positions(model: TransformerBridge | nn.Module) -> int | None:
    """The longest sequence that a model was made for, scaled rotary embeddings counted; None where its config does not
    say."""
    inside: Any = model.original_model if isinstance(model, TransformerBridge) else model
    config = getattr(inside, "config", None)
    if config is None:
        return None
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some families have one setting for each kind of layer.
    settings = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    scaled = [(s.get("original_max_position_embeddings") or most) * (s.get("factor") or 1) for s in settings]
    return int(max([most, *scaled]))
