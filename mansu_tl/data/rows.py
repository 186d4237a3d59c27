"""Rows of token ids: what is checked of them once, when they are made, and how rows are taken from checked ones."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mansu_tl.data.masks import real_tokens
from mansu_tl.defaults import moved
from mansu_tl.errors import MansuError
from mansu_tl.results.result import Result

T = TypeVar("T")
R = TypeVar("R", bound="Rows")


class Rows(Result):
    """A dataclass of rows: every tensor and every tuple in it has one entry a row, a tuple of `Rows` one in each."""

    def __len__(self) -> int:
        first: Tensor = next(value for value in vars(self).values() if isinstance(value, Tensor))
        return first.shape[0]

    def __getitem__(self: R, index: int | slice | list[int] | Tensor) -> R:
        """The chosen rows, of the same class."""
        chosen = torch.arange(len(self), device="cpu")[index.cpu() if isinstance(index, Tensor) else index].reshape(-1)
        return with_values(self, **{f.name: _rows(getattr(self, f.name), chosen) for f in fields(self)})  # type: ignore[arg-type]

    def to(self: R, device: str | torch.device) -> R:
        """The same on `device`."""
        return with_values(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})  # type: ignore[arg-type]


def _rows(value: Any, chosen: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[chosen]
    if isinstance(value, tuple) and value:
        return (
            tuple(one[chosen] for one in value)
            if isinstance(value[0], Rows)
            else tuple(value[i] for i in chosen.tolist())
        )
    return value


def _moved(value: Any, device: str | torch.device) -> Any:
    if isinstance(value, Tensor):
        return moved(value, device)
    return (
        tuple(one.to(device) if isinstance(one, Rows) else one for one in value) if isinstance(value, tuple) else value
    )


class Asked(Rows):
    """Prompts with the options that may continue them: [row, option, token], -1 behind an option's last token.

    Option 0 is the answer. Whatever can only take options of one token reads them from `choices`, `answers` or
    `distractors`, which refuse longer ones; the others read `options` and `option_lengths`.
    """

    options: Int[Tensor, "row option *token"]
    lengths: Int[Tensor, " row"]
    facts: tuple[str, ...]

    @property
    def choices(self) -> Int[Tensor, "row option"]:
        """The options' tokens, the answer in column 0.

        Raises:
            MansuError: options of several tokens.
        """
        if self.options.shape[2] != 1:
            raise MansuError(
                f"{type(self).__name__}: answers of up to {self.options.shape[2]} tokens, and this measures one; choose "
                "answers that are one token each"
            )
        return self.options[..., 0]

    @property
    def answers(self) -> Int[Tensor, " row"]:
        """The token that is the answer.

        Raises:
            MansuError: options of several tokens.
        """
        return self.choices[:, 0]

    @property
    def distractors(self) -> Int[Tensor, "row option"]:
        """The tokens that the answer is measured against; those of pairs begin with the corrupt prompt's own answer.

        Raises:
            MansuError: options of several tokens.
        """
        return self.choices[:, 1:]

    @property
    def option_lengths(self) -> Int[Tensor, "row option"]:
        """How many tokens every option has."""
        return (self.options >= 0).sum(-1)

    def texts(self) -> list[list[tuple[int, ...]]]:
        """The options' tokens row by row, without padding."""
        return [[tuple(token for token in text if token >= 0) for text in row] for row in self.options.tolist()]

    @property
    def asked(self) -> Int[Tensor, " row"]:
        """The position whose logits give an option's first token: the prompt's last real one."""
        return self.lengths - 1

    @property
    def chance(self) -> float:
        """Multiple choice between the options by guessing, in percent."""
        return 100 / self.options.shape[1]


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


def require_options(row: str, options: Tensor) -> None:
    """Refuse options [row, option, token] that are negative (but for -1 behind an option's end) or there twice.

    Raises:
        MansuError: there is such an option, or none but the right one, which is option 0.
    """
    if options.shape[1] < 2:
        raise MansuError(f"{row}s: no distractor; give each at least one wrong option")
    if options.device.type == "meta":
        return
    ended = (options == -1).cummax(-1).values
    negative = ((options < 0) & ~((options == -1) & ended)) | (options[..., :1] < 0) | (ended & (options >= 0))
    if negative.any():
        i, option, at = negative.nonzero()[0].tolist()
        value = int(options[i, option, at])
        what = f"option {value} is negative" if value < 0 else f"option {value} stands behind the padding"
        raise MansuError(f"{row} {i}: {what}; token ids count from 0, and -1 only follows them")
    doubled = (options[:, :, None] == options[:, None]).all(-1).triu(1).nonzero()
    if len(doubled):
        i, first, second = doubled[0].tolist()
        tokens = options[i, second][options[i, second] >= 0].tolist()
        shown = f"token {tokens[0]}" if len(tokens) == 1 else f"tokens {tokens}"
        if first == 0:
            raise MansuError(f"{row} {i}: {shown} is the answer and a distractor; drop it from the distractors")
        raise MansuError(f"{row} {i}: {shown} is a distractor twice; give each wrong option once")


def set_fields(instance: object, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is made."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def with_values(instance: T, **values: Any) -> T:
    """A copy with other values that come from checked ones (rows taken, another device), so nothing is checked again."""
    copy = object.__new__(type(instance))
    copy.__dict__.update({**instance.__dict__, **values})
    return copy
