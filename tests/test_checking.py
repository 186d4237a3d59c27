"""The tests' own type checker refuses what jaxtyping's hook with beartype refuses, and the package is under it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

import mansu_tl as mtl
from mansu_tl.runs.metrics import logit_difference
from tests import checking
from tests.checking import checked, install, unchecked
from tests.test_attribution import random_pairs

if TYPE_CHECKING:
    from nowhere import Unknown

BOTH = [jaxtyped(typechecker=beartype), checked]


def doubled(
    x: Float[Tensor, "pairs 3"], at: int = 0, /, *names: str, y: Float[Tensor, " pairs"] | None = None, **more: float
) -> Float[Tensor, " pairs"]:
    return x[0] if at == 2 else x.sum(1)


def counted(n: int, unknown: Unknown, *, last: str) -> Iterator[int]:
    yield from range(n)


@dataclass(frozen=True)
class First:
    value: int
    name: str = "a"


@dataclass(frozen=True)
class Second:
    value: str
    name: Float[Tensor, " n"] | None = None


x = torch.ones(2, 3)
RIGHT: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (doubled, (x,), {}),
    (doubled, (x, 1, "a", "b"), {"y": torch.ones(2), "z": 1.0}),
    (counted, (2, "any"), {"last": "z"}),
    (First, (1,), {"name": "b"}),
    (Second, ("1", torch.ones(2)), {}),
]
WRONG: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (doubled, (torch.ones(2, 4),), {}, "parameters"),
    (doubled, (x.int(),), {}, "parameters"),
    (doubled, (x, "1"), {}, "parameters"),
    (doubled, (x, 1, "a", 2), {}, "parameters"),
    (doubled, (x,), {"y": torch.ones(3)}, "parameters"),
    (doubled, (x,), {"z": "1"}, "parameters"),
    (doubled, (x, 2), {}, "return value"),
    (counted, ("2", "any"), {"last": "z"}, "parameters"),
    (counted, (2, "any"), {"last": 1}, "parameters"),
    (First, ("1",), {}, "parameters"),
    (Second, (1,), {}, "parameters"),
    (Second, ("1", torch.ones(2, 2)), {}, "parameters"),
]


def under(decorate: Callable[..., Any], value: Any) -> Any:
    """A function, or a copy of a dataclass, under a checker."""
    if not isinstance(value, type):
        return decorate(value)
    copy = type(value.__name__, (), {**vars(value), "__init__": value.__init__})
    return decorate(copy)


@pytest.mark.parametrize("decorate", BOTH, ids=["jaxtyping", "ours"])
def test_arguments_results_and_axes_are_checked_as_by_jaxtyping(decorate: Callable[..., Any]) -> None:
    for value, args, options in RIGHT:
        under(decorate, value)(*args, **options)
    for value, args, options, where in WRONG:
        with pytest.raises(TypeCheckError, match=f"checking the {where}"):
            under(decorate, value)(*args, **options)
    for args, options in (((), {}), ((x,), {"at": 1, "y": None}), ((2,), {"last": "z"})):
        with pytest.raises(TypeError):
            under(decorate, counted)(*args, **options)


def test_a_checker_is_made_once_a_piece_of_code_and_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Callable[..., Any]] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        made.append(function)
        return beartype(function)

    monkeypatch.setattr(checking, "_beartype", lambda: noted)
    monkeypatch.setattr(checking, "_checkers", {})

    def outer(held: Tensor) -> Callable[..., Any]:
        @checked
        def inner(times: int, by: Tensor = held) -> Tensor:
            return by * times

        return inner

    first, second = outer(torch.ones(2)), outer(torch.ones(3))
    assert not made, "nothing before the first call"
    assert [len(first(1)), len(second(1)), len(second(2, torch.ones(4)))] == [2, 3, 4]
    assert len(made) == 2, "one for the arguments, one for the result"
    for function in (first, second):
        with pytest.raises(TypeCheckError):
            function("1")
    held = torch.ones(2)
    gone, third = weakref.ref(held), outer(held)
    assert third(2).sum() == 4
    del held, third
    gc.collect()
    assert gone() is None


def test_the_package_is_under_it() -> None:
    """A function, one inside the package, a method, and a dataclass, with what their annotations forbid."""
    pairs = random_pairs(n=2)
    with pytest.raises(TypeCheckError, match="mansu_tl.runs.metrics.logit_difference"):
        logit_difference(torch.zeros(2, 3, 4, 5), pairs)
    with pytest.raises(TypeCheckError, match="mansu_tl.data.positions.positions"):
        mtl.data.positions(pairs, 3)
    with pytest.raises(TypeCheckError, match=r"mansu_tl.data.rows.\w+.to: .*device=3"):
        pairs.to(3)
    with pytest.raises(TypeCheckError, match="Sequences.__init__"):
        mtl.data.Sequences(pairs.clean[0], pairs.lengths)
    with unchecked(), pytest.raises(AttributeError):
        mtl.data.positions(3)
    with pytest.raises(RuntimeError, match="mansu_tl was imported before"):
        install("mansu_tl")
