"""A plain HF model run at given values of its parameters: asked positions, every target of sequences, its matrices.

Every pass over text goes through `predicted`, and every look at what enters and leaves a matrix through `watched`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from mansu_tl.data import Sequences
from mansu_tl.data.forced import Asked, places_of
from mansu_tl.runs.passes import last_token_only

Values = Mapping[str, Tensor]
# Sequences are run in two groups if that leaves this share of the padded tokens, of batches that are worth a second pass.
_WORTH, _LEAST_TOKENS = 0.85, 512


def last_token_logits(
    model: PreTrainedModel, values: Values, tokens: Int[Tensor, "row pos"], asked: Asked
) -> Float[Tensor, "place vocab"]:
    """Differentiable logits at some positions, of rows' lengths the last ones, with `values` in place of the parameters.

    Only these are unembedded.
    """
    return with_streams(model, values, tokens, asked, kept=False)[0]


def last_token_states(
    model: PreTrainedModel, values: Values, tokens: Int[Tensor, "row pos"], asked: Asked
) -> tuple[Float[Tensor, "place vocab"], Float[Tensor, "place layer d_model"]]:
    """`last_token_logits`, and the residual stream behind every layer at the same positions."""
    logits, streams = with_streams(model, values, tokens, asked)
    at = places_of(asked).on(tokens.device)
    return logits, torch.stack([stream[at].float() for stream in streams[1:]], 1)


def with_streams(
    model: PreTrainedModel,
    values: Values,
    tokens: Int[Tensor, "row pos"],
    asked: Asked,
    *,
    kept: bool = True,
) -> tuple[Float[Tensor, "place vocab"], tuple[Float[Tensor, "row pos d_model"], ...]]:
    """`last_token_logits` and, unless they are not kept, the residual streams: of the embedding, then behind every layer."""
    with last_token_only(model, asked):
        out = functional_call(model, dict(values), (tokens,), {"use_cache": False, "output_hidden_states": kept})
    return out.logits[:, 0].float(), out.hidden_states if kept else ()


class _Reached(Exception):  # noqa: N818 - no error
    """The stream that was asked for is there; what lies behind it is not run."""


def stream_into(
    model: PreTrainedModel, values: Values, tokens: Int[Tensor, "row pos"], module: str
) -> Float[Tensor, "row pos d_model"]:
    """Differentiable residual stream that enters a module, by the module's path; nothing behind it is run."""
    found: list[Tensor] = []

    def reached(_: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        found.append(inputs[0] if inputs else named["hidden_states"])
        raise _Reached

    with model.get_submodule(module).register_forward_pre_hook(reached, with_kwargs=True), suppress(_Reached):
        functional_call(model, dict(values), (tokens,), {"use_cache": False})
    return found[0]


@dataclass(frozen=True)
class Predicted:
    """What a model says of the next token at every real position of some sequences, in no particular order."""

    logits: Float[Tensor, "token vocab"]
    targets: Int[Tensor, " token"]
    rows: Int[Tensor, " token"]  # the sequence that each belongs to
    places: Int[Tensor, " token"]  # the position in front of the target


def predicted(model: PreTrainedModel, values: Values, batch: Sequences) -> Predicted:
    """Next-token logits and targets of every real position, row by row, in one pass; no values = the model's own."""
    logits = functional_call(model, dict(values), (batch.tokens,), {"use_cache": False}).logits
    rows, places = batch.real[:, 1:].nonzero(as_tuple=True)
    return Predicted(logits[rows, places].float(), batch.tokens[rows, places + 1], rows, places)


def sequence_logits(model: PreTrainedModel, values: Values, batch: Sequences) -> Predicted:
    """`predicted`, but short and long sequences are run apart, to pad less."""
    parts = []
    for rows in by_length(batch.lengths):
        part = predicted(model, values, batch[rows].trimmed())
        parts.append((part.logits, part.targets, rows.to(batch.tokens.device)[part.rows], part.places))
    if len(parts) == 1:
        return Predicted(*parts[0])
    return Predicted(*(torch.cat(each) for each in zip(*parts, strict=True)))


def by_length(lengths: Int[Tensor, " row"]) -> list[Int[Tensor, " _"]]:
    """Row numbers, in two groups where running the shorter ones apart saves a good part of the padding; else in one."""
    order = lengths.cpu().argsort(stable=True)
    ordered, count = lengths.cpu()[order], len(order)
    whole = count * int(ordered[-1])
    first = torch.arange(1, count)
    cost = first * ordered[:-1] + (count - first) * ordered[-1]
    if whole < _LEAST_TOKENS or not len(cost) or int(cost.min()) > _WORTH * whole:
        return [torch.arange(count)]
    cut = int(cost.argmin()) + 1
    return [order[:cut].sort().values, order[cut:].sort().values]


@contextmanager
def watched(
    model: PreTrainedModel, names: Iterable[str], see: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Inside, every pass shows what enters and what leaves some matrices.

    Args:
        names: of the matrices' parameters.
        see: is given a name, the input and the output; what it returns, if anything, goes on in the output's place.
    """

    def hook(name: str) -> Callable[..., Tensor | None]:
        return lambda module, inputs, output: see(name, inputs[0], output)

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            hooks.enter_context(module.register_forward_hook(hook(name)))
        yield


@contextmanager
def lent(model: PreTrainedModel, names: Iterable[str], make: Callable[[str], Tensor]) -> Iterator[None]:
    """Inside, some matrices are made anew whenever their layer runs and dropped behind it: for passes without gradients.

    Args:
        names: of the matrices' parameters.
        make: gives a matrix by its name.
    """
    kept: dict[nn.Module, Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        def put(module: nn.Module, inputs: object) -> None:
            kept[module] = module._parameters["weight"]  # type: ignore[assignment]
            module._parameters["weight"] = nn.Parameter(make(name), requires_grad=False)

        return put

    def behind(module: nn.Module, inputs: object, output: object) -> None:
        module._parameters["weight"] = kept.pop(module)  # type: ignore[assignment]

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            hooks.enter_context(module.register_forward_pre_hook(before(name)))
            hooks.enter_context(module.register_forward_hook(behind))
        yield
