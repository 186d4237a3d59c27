"""Rows of token ids: what is checked of them once, when they are made, and how rows are taken from checked ones."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from mansu_tl.data.masks import real_tokens
from mansu_tl.errors import MansuError

T = TypeVar("T")


def whole_numbers(what: str, value: object, ndim: int) -> Tensor:
    """A tensor of token ids or lengths as int64.

    Raises:
        MansuError: no tensor, another number of dimensions, or numbers that are not whole.
    """
    if not isinstance(value, Tensor):
        raise MansuError(f"{what}: got a {type(value).__name__}; pass a tensor of token ids (torch.tensor(...))")
    if value.ndim != ndim:
        raise MansuError(f"{what}: shape {tuple(value.shape)} has {value.ndim} dimensions; give {ndim}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise MansuError(f"{what} holds {value.dtype}; token ids are whole numbers")
    return value.long()


def checked_lengths(row: str, tokens: Tensor, lengths: object) -> Tensor:
    """The real lengths of right-padded rows.

    Args:
        row: what a row is called in errors.

    Raises:
        MansuError: another number of lengths than rows, or one outside 1..width.
    """
    checked = whole_numbers(f"{row} lengths", lengths, 1)
    count, width = tokens.shape
    if len(checked) != count:
        raise MansuError(f"{row} lengths: {len(checked)} for {count} rows of tokens; give one for each")
    if checked.device != tokens.device:
        raise MansuError(f"{row} lengths: on {checked.device}, the tokens on {tokens.device}; put all on one")
    # A tensor on "meta" has a shape and no values.
    if checked.device.type != "meta":
        outside = ((checked < 1) | (checked > width)).nonzero()
        if len(outside):
            i = int(outside[0])
            raise MansuError(
                f"{row} {i}: length {int(checked[i])} is outside 1..{width}, the width of the tokens; lengths count "
                "real tokens"
            )
    return checked


def without_padding(row: str, what: str, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The rows with token 0 wherever a row has ended, so that what stood there reaches no model and no result.

    Raises:
        MansuError: a negative id inside a row.
    """
    real = real_tokens(tokens, lengths)
    if tokens.device.type != "meta":
        negative = (real & (tokens < 0)).nonzero()
        if len(negative):
            i, position = negative[0].tolist()
            raise MansuError(
                f"{row} {i}: {what} has id {int(tokens[i, position])} at position {position}; ids count from 0, and "
                "padding lies behind each row's length"
            )
    return torch.where(real, tokens, 0)


def require_options(row: str, right: Tensor, wrong: Tensor) -> None:
    """Refuse options that are negative, or among which the right one or a wrong one stands twice.

    Raises:
        MansuError: there is such a row.
    """
    if wrong.shape[1] < 1:
        raise MansuError(f"{row}s: no distractor; give each at least one wrong option")
    if right.device.type == "meta":
        return
    options = torch.cat([right[:, None], wrong], 1)
    negative = (options < 0).nonzero()
    if len(negative):
        i = int(negative[0, 0])
        raise MansuError(f"{row} {i}: option {int(options[tuple(negative[0])])} is negative; token ids count from 0")
    both = (wrong == right[:, None]).any(1).nonzero()
    if len(both):
        i = int(both[0])
        raise MansuError(
            f"{row} {i}: token {int(right[i])} is the answer and a distractor; drop it from the distractors"
        )
    ordered = wrong.sort(1).values
    doubled = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(doubled):
        i, at = doubled[0].tolist()
        raise MansuError(f"{row} {i}: token {int(ordered[i, at])} is a distractor twice; give each wrong option once")


def set_fields(instance: object, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is made."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def with_values(instance: T, **values: Any) -> T:
    """A copy with other values that come from checked ones (rows taken, another device), so nothing is checked again."""
    copy = object.__new__(type(instance))
    copy.__dict__.update({**instance.__dict__, **values})
    return copy
