"""Every unlearning method by name; a method is registered by the file that defines it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.errors import MansuError, near
from mansu_tl.registry import Registry
from mansu_tl.unlearning.edit import Edit

Needs = Callable[[TransformerBridge, Task, Any], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: what `unlearn` knows it by.
        title: what it is called in tables and figures.
        settings: the class of its settings, a frozen dataclass.
        run: (model, task, settings, *, seed, progress, checkpoint) -> edit; with `circuit` where it takes one.
        takes_circuit: it is restricted to a circuit; the others train every parameter.
        shares: its batches can be shared out over processes; `run` takes `data_parallel` then.
        claims_floor: every edited weight changes its code, which a certificate can show.
        searched: its learning rate is searched for in comparisons, as those of published baselines are.
        preset: settings of its own that differ from the class's defaults.
        control_of: the method that it is a control of, whose settings it shares; "" = none.
        ablations: by name, the title and the settings of itself with one part changed.
        needs: (model, task, settings) -> what will stop a run ("wrong") or may ("warning"), and the way out.
        foreign: settings of its class -> why they are another method's, and the way out; "" = they are its own.
    """

    name: str
    title: str
    settings: type
    run: Callable[..., Edit]
    takes_circuit: bool = False
    shares: bool = False
    claims_floor: bool = False
    searched: bool = True
    preset: Mapping[str, Any] = field(default_factory=dict)
    control_of: str = ""
    ablations: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    needs: Needs = lambda model, task, settings: iter(())
    foreign: Callable[[Any], str] = lambda settings: ""

    def defaults(self) -> Any:
        """Its settings where nothing else is said."""
        return self.settings(**self.preset)


_METHODS = Registry[Method]("method")


def register(method: Method) -> Method:
    """Make a method known: `unlearn`, the comparison and the command line take it by its name from then on.

    Raises:
        MansuError: another method has that name.
    """
    return _METHODS.add(method.name, method)


def methods() -> tuple[str, ...]:
    """The names that `unlearn` takes.

    Example:
        >>> "mansu" in mtl.unlearning.methods()
        True
    """
    return tuple(_METHODS)


def method_flags(name: str) -> Method:
    """What is to be known of a method: its title, and whether it takes a circuit, claims the floor, is searched.

    Raises:
        MansuError: an unknown method.
    """
    return _METHODS[name]


def method_title(name: str) -> str:
    """How a method is written in tables and figures."""
    return method_flags(name).title


def floored(name: str) -> bool:
    """Whether a method's edits claim the floor and it is no control of another: what a comparison is about."""
    return name in _METHODS and _METHODS[name].claims_floor and not _METHODS[name].control_of


def headline(names: Iterable[str]) -> str:
    """The method that a report leads with: the first of `names` that is `floored`, else the first."""
    every = list(names)
    return next(filter(floored, every), every[0])


def settings_of(method: str, values: Mapping[str, Any], base: Any = None) -> Any:
    """A method's settings from plain values, e.g. of a config file; those of the shared training are named like its own.

    Args:
        base: the settings that the values change; the method's defaults where not given.

    Raises:
        MansuError: an unknown method, a key that the method does not have, or settings of another method.
    """
    chosen = method_flags(method)
    if base is None:
        base = chosen.defaults()
    elif not isinstance(base, chosen.settings):
        raise MansuError(f"{method}: settings are {type(base).__name__}; pass {chosen.settings.__name__}")
    groups = [f.name for f in fields(base) if is_dataclass(getattr(base, f.name))]
    # Setting -> the group that it lies in, "" = the method's own.
    known = {f.name: group for group in groups for f in fields(getattr(base, group))}
    known |= {f.name: "" for f in fields(base) if f.name not in groups}
    # All at once, since settings may be told off for what others beside them are.
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in known:
            names = tuple(sorted(known))
            raise MansuError(f"{method}: unknown setting {key!r}; it has {', '.join(names)}{near(key, names)}")
        group = known[key]
        holder = getattr(base, group) if group else base
        changes.setdefault(group, {})[key] = _typed(method, key, value, getattr(holder, key))
    plain = changes.pop("", {})
    final = replace(base, **plain, **{group: replace(getattr(base, group), **each) for group, each in changes.items()})
    if why := chosen.foreign(final):
        raise MansuError(f"{method}: {why}")
    return final


def _typed(method: str, key: str, value: Any, like: Any) -> Any:
    if isinstance(like, bool) != isinstance(value, bool) or isinstance(like, str) != isinstance(value, str):
        raise MansuError(f"{method}: {key}={value!r} should be a {type(like).__name__}, like {like!r}")
    if isinstance(like, int) and not isinstance(like, bool) and isinstance(value, float) and not value.is_integer():
        raise MansuError(f"{method}: {key}={value!r} should be a whole number, like {like!r}")
    try:
        return type(like)(value)
    except (TypeError, ValueError):
        raise MansuError(f"{method}: {key}={value!r} should be a {type(like).__name__}, like {like!r}") from None
