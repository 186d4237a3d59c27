"""Every unlearning method by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from os import PathLike
from types import MappingProxyType
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.circuit import Circuit
from mansu_tl.data import Task
from mansu_tl.data.fit import require_task
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, require_ready
from mansu_tl.models.kinds import require_bridge
from mansu_tl.results.digest import digest
from mansu_tl.results.result import bars
from mansu_tl.unlearning import baselines as b
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.mansu import mansu
from mansu_tl.unlearning.mansu_needs import mansu_needs
from mansu_tl.unlearning.mansu_settings import MansuSettings

Needs = Callable[[TransformerBridge, Task, Any], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: what it is called in tables and figures.
        settings: the class of its settings.
        run: the function.
        takes_circuit: it is restricted to a circuit; the others train every parameter.
        claims_floor: every edited weight changes its code, which a certificate can show.
        searched: its learning rate is searched for in comparisons, as those of published baselines are.
        preset: settings of its own that differ from the class's defaults.
        control_of: the method that it is a control of, whose settings it shares; "" = none.
        ablations: by name, the title and the settings of itself with one part changed.
        needs: (model, task, settings) -> what will stop a run ("wrong") or may ("warning"), and the way out.
    """

    title: str
    settings: type
    run: Callable[..., Edit]
    takes_circuit: bool = False
    claims_floor: bool = False
    searched: bool = True
    preset: Mapping[str, Any] = field(default_factory=dict)
    control_of: str = ""
    ablations: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    needs: Needs = lambda model, task, settings: iter(())

    def defaults(self) -> Any:
        """Its settings where nothing else is said."""
        return self.settings(**self.preset)


_ABLATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "no-circuit": ("MANSU, no circuit", {"restrict": "none"}),
        "no-null-space": ("MANSU, no null space", {"null_space": 0.0}),
        "no-fisher": ("MANSU, no Fisher", {"fisher": False, "fisher_budget": 0.0}),
        "no-floor": ("MANSU, no floor", {"floor": "none"}),
        "floor-after": ("MANSU, floor after the fact", {"floor": "after"}),
        "no-adversary": ("MANSU, no adversary", {"adversary_weight": 0.0}),
        "one-percent": ("MANSU, 1 % of the weights", {"budget": 0.0099}),
    }
)
_METHODS = {
    "mansu": Method(
        "MANSU",
        MansuSettings,
        mansu,
        takes_circuit=True,
        claims_floor=True,
        searched=False,
        ablations=_ABLATIONS,
        needs=mansu_needs,
    ),
    "ga": Method("GA", b.GaSettings, b.ga),
    "ga-kl": Method("GA + KL", b.GaKlSettings, b.ga_kl),
    "graddiff": Method("GradDiff", b.GradDiffSettings, b.graddiff),
    "npo": Method("NPO + GDR", b.NpoSettings, b.npo),
    "simnpo": Method("SimNPO + GDR", b.SimNpoSettings, b.simnpo),
    "rmu": Method("RMU", b.RmuSettings, b.rmu),
    "sure": Method("SURE", b.SureSettings, b.sure),
    "quail": Method("QUAIL", b.QuailSettings, b.quail),
    "ste": Method("Straight-through", b.SteSettings, b.ste),
    "null-space": Method("Null space only", b.NullSpaceSettings, b.null_space),
    "random-circuit": Method(
        "Random-circuit MANSU",
        MansuSettings,
        mansu,
        takes_circuit=True,
        claims_floor=True,
        searched=False,
        preset={"restrict": "random"},
        control_of="mansu",
        needs=mansu_needs,
    ),
    "suppressor": Method("Output suppressor", b.SuppressorSettings, b.suppressor),
}


def methods() -> tuple[str, ...]:
    """The names that `unlearn` takes.

    Example:
        >>> "mansu" in mtl.methods()
        True
    """
    return tuple(_METHODS)


def floored(name: str) -> bool:
    """Whether a method's edits claim the floor and it is no control of another: what a comparison is about."""
    return name in _METHODS and _METHODS[name].claims_floor and not _METHODS[name].control_of


def headline(names: Iterable[str]) -> str:
    """The method that a report leads with: the first of `names` that is `floored`, else the first."""
    every = list(names)
    return next(filter(floored, every), every[0])


def method_title(name: str) -> str:
    """How a method is written in tables and figures."""
    return _method(name).title


def method_flags(name: str) -> Method:
    """What is to be known of a method: its title, and whether it takes a circuit, claims the floor, is searched.

    Raises:
        MansuError: an unknown method.
    """
    return _method(name)


@torch_defaults()
def unlearn(
    model: TransformerBridge,
    task: Task,
    method: str = "mansu",
    *,
    circuit: Circuit | None = None,
    settings: Any | None = None,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **overrides: Any,
) -> Edit:
    """Unlearn the task's forget set and return the change as an edit; the model is untouched.

    Args:
        method: one of `methods()`.
        circuit: restricts methods that take one (MANSU); the others train every parameter.
        settings: the method's settings; its defaults where not given.
        seed: of every random choice; the same seed gives the same edit.
        progress: show a progress bar; None = in notebooks.
        checkpoint: a file in which the state is kept every twenty seconds. The same call goes on from there after an
            interruption, to the same edit; the file is deleted at the end.
        overrides: single settings by name, e.g. `budget=0.01`; those of the shared training loop too.

    Raises:
        MansuError: an unknown method or setting, no hooked model, no task, or a model that `require_ready` refuses.

    Example:
        >>> model, task = mtl.load("pocket"), mtl.load_task("pocket")
        >>> edit = mtl.unlearn(model, task, "graddiff", seed=0, max_steps=2)
        >>> edited = edit.apply(model)
    """
    chosen = _method(method)
    require_bridge(model)
    require_task(task)
    require_ready(model, task.forget_pairs.clean, copied=True)
    base = settings if settings is not None else chosen.defaults()
    if not isinstance(base, chosen.settings):
        raise MansuError(f"{method}: settings are {type(base).__name__}; pass {chosen.settings.__name__}")
    final = _override(method, base, overrides)
    extra = {"circuit": circuit} if chosen.takes_circuit else {}
    kept = Checkpoint(checkpoint, "" if checkpoint is None else _key(model, task, method, final, extra, seed))
    edit = chosen.run(model, task, final, seed=seed, progress=bars(progress), checkpoint=kept, **extra)
    kept.done()
    return replace(edit, method=method)


def _key(model: TransformerBridge, task: Task, method: str, settings: Any, extra: Mapping[str, Any], seed: int) -> str:
    read = {"model": fingerprint(model), "task": task, "settings": settings, "circuit": extra.get("circuit")}
    return digest({**read, "method": method, "seed": seed, "version": version("mansu-tl")})


def settings_of(method: str, values: dict[str, Any]) -> Any:
    """A method's settings from plain values, e.g. of a config file.

    Raises:
        MansuError: an unknown method, or a key that the method does not have.
    """
    return _override(method, _method(method).defaults(), values)


def _method(name: str) -> Method:
    if name not in _METHODS:
        raise MansuError(f"unknown method {name!r}; choose one of {', '.join(_METHODS)}{_near(name, tuple(_METHODS))}")
    return _METHODS[name]


def _override(method: str, base: Any, values: dict[str, Any]) -> Any:
    out, nested = base, {f.name for f in fields(base) if is_dataclass(getattr(base, f.name))}
    known = {f.name for f in fields(base)} - nested
    inner = {f.name: group for group in nested for f in fields(getattr(base, group))}
    for key, value in values.items():
        if key in known:
            out = replace(out, **{key: _typed(method, key, value, getattr(base, key))})
        elif key in inner:
            group = getattr(out, inner[key])
            typed = _typed(method, key, value, getattr(group, key))
            out = replace(out, **{inner[key]: replace(group, **{key: typed})})
        else:
            names = tuple(sorted(known | set(inner)))
            raise MansuError(f"{method}: unknown setting {key!r}; it has {', '.join(names)}{_near(key, names)}")
    return out


def _typed(method: str, key: str, value: Any, like: Any) -> Any:
    if isinstance(like, bool) != isinstance(value, bool) or isinstance(like, str) != isinstance(value, str):
        raise MansuError(f"{method}: {key}={value!r} should be a {type(like).__name__}, like {like!r}")
    if isinstance(like, int) and not isinstance(like, bool) and isinstance(value, float) and not value.is_integer():
        raise MansuError(f"{method}: {key}={value!r} should be a whole number, like {like!r}")
    return type(like)(value)


def _near(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
