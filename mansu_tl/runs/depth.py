"""Passes over some of a model's layers: up to one, and from one on where what it gives out is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mansu_tl.models.tree import family, submodule
from mansu_tl.runs.values import Values, last_token_logits


@dataclass(frozen=True)
class Known:
    """What a layer gives out for some tokens.

    Attributes:
        layer: its number.
        stream: the residual stream behind it.
        in_tuple: whether the model's layers hand it on as the first of several things.
    """

    layer: int
    stream: Float[Tensor, "row pos d_model"]
    in_tuple: bool


def known(model: PreTrainedModel, values: Values, tokens: Int[Tensor, "row pos"], layer: int) -> Known:
    """What a layer of a plain HF model gives out at given values of its parameters; layers above it are not run."""
    seen: list[Any] = []
    blocks = _blocks(model)

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output)

    def hand_on(stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (stream,) if isinstance(seen[0], tuple) else stream

    with blocks[layer].register_forward_hook(see), _instead(blocks[layer + 1 :], hand_on):
        last_token_logits(model, values, tokens, torch.ones(len(tokens), dtype=torch.long, device=tokens.device))
    in_tuple = isinstance(seen[0], tuple)
    return Known(layer, seen[0][0] if in_tuple else seen[0], in_tuple)


@contextmanager
def above(model: PreTrainedModel, below: Known) -> Iterator[None]:
    """Inside, passes over the same tokens begin behind a layer, with what is known of it. Hooks on it still see that."""
    blocks = _blocks(model)

    def hand_on(stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (stream,) if below.in_tuple else stream

    def give(stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hand_on(below.stream)

    with _instead(blocks[: below.layer], hand_on), _instead(blocks[below.layer : below.layer + 1], give):
        yield


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return list(submodule(model, family(model).layers).children())


@contextmanager
def _instead(blocks: list[nn.Module], forward: Any) -> Iterator[None]:
    """Inside, blocks do something else."""

    def back(block: nn.Module, own: Any) -> None:
        if own is None:
            del block.forward
        else:
            block.forward = own

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(back, block, block.__dict__.get("forward"))
            block.forward = forward
        yield
