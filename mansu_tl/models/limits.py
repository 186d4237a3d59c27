"""What a model can be given: how many tokens it knows, how many positions it has, and whether its weights find room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.errors import MansuError


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


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken on a device; infinite where it does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # PyTorch's own, to be used again
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return float(psutil.virtual_memory().available) if device.type == "cpu" else math.inf


def require_memory(
    what: str, weights: Iterable[Tensor], *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Refuse to make weights that find no room, before the first of them is made.

    Args:
        what: what errors call it.
        weights: tensors of their shapes.
        device: where they are to be; None = where those are.
        dtype: what they are to be; None = what those are.

    Raises:
        MansuError: they alone need more than is free; it says how much.
    """
    need: dict[torch.device, float] = {}
    for weight in weights:
        place = device or weight.device
        need[place] = need.get(place, 0.0) + weight.numel() * (dtype or weight.dtype).itemsize
    require_room(f"{what}: its weights need", need, "make room, or take another device or a smaller model")


def require_room(what: str, need: Mapping[torch.device, float], way_out: str, parts: str = "") -> None:
    """Refuse what finds no room.

    Args:
        what: what errors call it, up to "need".
        need: bytes, by device.
        way_out: what errors tell to do.
        parts: what they say of the number.

    Raises:
        MansuError: more is needed than is free; it says how much.
    """
    for place, size in need.items():
        free = free_memory(place) if place.type != "meta" else math.inf
        if size > free:
            raise MansuError(f"{what} {size / 1e9:.3g} GB on {place}{parts}, {free / 1e9:.3g} GB are free; {way_out}")
