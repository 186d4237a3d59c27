"""What a run consists of: cells, each one edit of one base with everything measured on it; and the comparison's plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

from mansu_tl.errors import MansuError
from mansu_tl.quantization import quantizer, quantizers
from mansu_tl.registry import import_plugins
from mansu_tl.results.digest import Digested
from mansu_tl.study.names import short_names
from mansu_tl.unlearning import floored, method_flags, method_title, methods, settings_of
from mansu_tl.unlearning.search import RATES

ORIGINAL, NEVER = "original", "never"
# What stands in the table beside the methods, and how it is written.
CONTROLS: Mapping[str, str] = MappingProxyType({ORIGINAL: "un-edited", NEVER: "never trained"})
# Those of `quantizers()` that a comparison is made under unless it names others: the ones that fit matrices of any width, or
# of multiples of 32, so that the embedded models can show them.
_COMPARED = (
    "nf4", "nf4-128", "nf4-dq", "nf4-128-dq", "fp4", "int8", "int4-g64", "int4-g128", "int4-asym-g64", "int4-asym-g128",
    "int3-g64", "gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0", "gptq-int4-g64", "gptq-int4-g128",
    "awq-int4-g64", "awq-int4-g128", "awq-int4-asym-g128", "hqq-int4-g64", "torchao-int4-g64", "torchao-int8",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One row of work: a method on a base with a seed, or the base as it is ("original"), or the never-trained model.

    Attributes:
        base: the model, as the plan names it.
        place: of its files, below the base's folders.
    """

    base: str
    method: str
    seed: int
    place: str


class Plan(Digested, ABC):
    """What the runner asks of a study's config and of a comparison."""

    seed: int = 0
    task: str
    never: str
    methods: tuple[str, ...]
    quantizers: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    plugins: tuple[str, ...]
    device: str
    faithfulness: float = 0.85
    steps: int = 5
    # Only comparisons choose settings on a validation split, attack what was edited, and look for further evidence.
    validated: bool = False
    rates: tuple[float, ...] = ()
    attack_rates: tuple[float, ...] = ()
    attack_steps: int = 0
    attack_splits: int = 0
    attack_seed: int = 0
    # How errors call the plan and its bases, what it must name, and what it must name once.
    what: ClassVar[str]
    what_bases: ClassVar[str]
    filled: ClassVar[tuple[str, ...]] = ("methods", "quantizers")
    unique: ClassVar[tuple[str, ...]] = ("methods", "quantizers")

    def __post_init__(self) -> None:
        self.require_known()
        short_names(self.bases, self.what_bases)
        for key in self.filled:
            if not getattr(self, key):
                raise MansuError(f"{self.what}: {key} is empty; name at least one")
        for key in self.unique:
            values = getattr(self, key)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise MansuError(f"{self.what}: {key} names {twice[0]!r} twice; name each once")
        for name, values in self.settings.items():
            settings_of(name, dict(values))

    def require_known(self) -> None:
        """Import the plugins, and look every name up that is registered in this process.

        Raises:
            MansuError: a plugin that cannot be imported, or an unknown quantizer or method.
        """
        import_plugins(self.plugins)
        for method in (*CONTROLS, *self.methods):
            for name in self.quantizers_of(method):
                quantizer(name)
        for method in self.methods:
            self.settings_for(method)

    @property
    @abstractmethod
    def bases(self) -> tuple[str, ...]:
        """The models that know the forget set."""

    @property
    def names(self) -> dict[str, str]:
        """A short name for every base."""
        return short_names(self.bases, self.what_bases)

    @property
    @abstractmethod
    def cells(self) -> tuple[Cell, ...]:
        """Everything that is to be done, in the order in which it is begun."""

    @abstractmethod
    def folder_of(self, base: str) -> str:
        """Where a base's results lie in the results folder."""

    def quantizers_of(self, method: str) -> tuple[str, ...]:
        """What a method's models are quantized with."""
        return self.quantizers

    def settings_for(self, method: str) -> tuple[str, dict[str, Any]]:
        """The method's name in the registry, and its settings where they differ from the defaults."""
        return method_flags(method).name, dict(self.settings.get(method, {}))

    def looks_further(self, cell: Cell) -> bool:
        """Whether probes, erasure depth and damage are measured for a cell too."""
        return False

    def _controls(self, seed: int) -> list[Cell]:
        controls = (ORIGINAL, NEVER) if self.never else (ORIGINAL,)
        return [Cell(base, name, seed, name) for base in self.bases for name in controls]


@dataclass(frozen=True)
class Comparison(Plan):
    """What is compared.

    Attributes:
        bases: the models that know the forget set: embedded names, folders or hub ids.
        task: an embedded name or a file.
        never: a model that never learnt the forget facts; "" = none, then relearning has no reference.
        methods: unlearning methods, and names of `ablations()`.
        quantizers: what the models of methods that claim the floor (MANSU) are quantized with; by default those of
            committed evidence, twenty-one and the libraries' three where they are installed.
        control_quantizers: what the other methods' and ablations' models are quantized with.
        seeds: of those methods.
        control_seeds: of the other methods.
        ablation_seeds: of the ablations, which run on the first base only.
        rates: learning rates that every baseline is tried at on the validation split; () = its default.
        attack_rates: learning rates of the relearning attacks.
        attack_steps: optimizer steps of an attack.
        attack_splits: draws of the forget facts that an attacker has.
        attack_seed: of those draws; not one that settings were chosen on.
        evidence: probes, erasure depth and the damage audit, for every method's first seed.
        settings: per method, settings that differ from its defaults.
        plugins: modules that register what is used here, imported by name in every process.
        device: where the models are, "cpu" or "cuda"; on Ray each cell then gets a GPU of its own.
    """

    bases: tuple[str, ...] = ("pocket", "pocket-fp")
    task: str = "pocket"
    never: str = "pocket-never"
    methods: tuple[str, ...] = field(default_factory=lambda: (*methods(), *ablations()))
    quantizers: tuple[str, ...] = field(
        default_factory=lambda: tuple(name for name in _COMPARED if name in quantizers())
    )
    control_quantizers: tuple[str, ...] = ("nf4", "int4-g64", "gptq-int4-g64")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    control_seeds: tuple[int, ...] = (0, 1, 2)
    ablation_seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = RATES
    attack_rates: tuple[float, ...] = (3e-4, 1e-3)
    attack_steps: int = 50
    attack_splits: int = 3
    attack_seed: int = 0
    evidence: bool = True
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    device: str = "cpu"
    validated = True
    what, what_bases = "compare", "compare: bases"
    filled = ("bases", "methods", "quantizers", "seeds", "control_seeds", "ablation_seeds")
    unique = ("methods", "quantizers", "control_quantizers", "seeds", "control_seeds", "ablation_seeds")

    def __post_init__(self) -> None:
        super().__post_init__()
        for reserved in CONTROLS:
            if reserved in self.methods:
                raise MansuError(f"compare: method {reserved!r} is called like a control; register it by another name")
        if len({_place(method) for method in self.methods}) < len(self.methods):
            raise MansuError(f"compare: two of {', '.join(self.methods)} would share their files; rename one")

    def __hash__(self) -> int:
        return hash(self.digest())

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The controls, then every edit, the quickest to judge first: seed by seed."""
        changed = ablations()
        edits = [
            Cell(base, method, seed, f"{_place(method)}/seed{seed}")
            for base in self.bases
            for method in self.methods
            if method not in changed or base == self.bases[0]
            for seed in self._seeds(method)
        ]
        return (*self._controls(0), *sorted(edits, key=lambda cell: cell.seed))

    def folder_of(self, base: str) -> str:
        """Where a base's results lie in the results folder."""
        return f"bases/{self.names[base]}"

    def quantizers_of(self, method: str) -> tuple[str, ...]:
        """What a method's models are quantized with."""
        return self.quantizers if floored(method) or method == ORIGINAL else self.control_quantizers

    def settings_for(self, method: str) -> tuple[str, dict[str, Any]]:
        """The method's name in the registry, and its settings where they differ from the defaults."""
        if method in (changed := ablations()):
            whole = method.partition("/")[0]
            return whole, {**self.settings.get(whole, {}), **changed[method][1]}
        # A control differs from what it controls in its preset alone.
        shared = self.settings.get(method_flags(method).control_of, {})
        return method, {**shared, **self.settings.get(method, {})}

    def looks_further(self, cell: Cell) -> bool:
        """Whether probes, erasure depth and damage are measured for a cell too."""
        return self.evidence and cell.seed == min(self.seeds)

    def _seeds(self, method: str) -> tuple[int, ...]:
        if floored(method):
            return self.seeds
        return self.ablation_seeds if method in ablations() else self.control_seeds


def _place(method: str) -> str:
    return method.replace("/", ".")


def ablations() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Every method with one part changed: "method/ablation" -> (title, settings)."""
    return {f"{name}/{part}": what for name in methods() for part, what in method_flags(name).ablations.items()}


def title_of(method: str) -> str:
    """How a method, an ablation or a control is written in tables and figures."""
    changed = ablations()
    return CONTROLS.get(method) or (changed[method][0] if method in changed else method_title(method))


def full(**changes: Any) -> Comparison:
    """Everything: a few hours on two cores."""
    return replace(Comparison(), **changes)


def quick(**changes: Any) -> Comparison:
    """Enough to see the picture, in minutes: one base, one seed, four methods, three quantizers, no search."""
    three = ("nf4", "int4-g64", "int8")
    small = Comparison(
        bases=("pocket",), methods=("mansu", "graddiff", "npo", "suppressor"), quantizers=three, control_quantizers=three,
        seeds=(0,), control_seeds=(0,), ablation_seeds=(0,), rates=(), attack_splits=1, attack_rates=(3e-4,), evidence=False,
    )  # fmt: skip
    return replace(small, **changes)
