"""What a comparison runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mansu_tl.errors import MansuError
from mansu_tl.names import short_names
from mansu_tl.quantization import quantizer, quantizers
from mansu_tl.results.digest import Digested
from mansu_tl.unlearning import floored, method_flags, method_title, methods, settings_of
from mansu_tl.unlearning.search import RATES

# What stands in the table beside the methods, and how it is written.
CONTROLS: Mapping[str, str] = MappingProxyType({"original": "un-edited", "never": "never trained"})
# A method with one part changed: "method/ablation" -> (title, settings).
ABLATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {f"{name}/{ablation}": changed for name in methods() for ablation, changed in method_flags(name).ablations.items()}
)


@dataclass(frozen=True)
class Comparison(Digested):
    """What is compared.

    Attributes:
        bases: the models that know the forget set: embedded names, folders or hub ids.
        task: an embedded name or a JSON-lines file.
        never: a model that never learnt the forget facts; "" = none, then relearning has no reference.
        methods: unlearning methods, and names of `ABLATIONS`.
        quantizers: what the models of methods that claim the floor (MANSU) are quantized with.
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
    """

    bases: tuple[str, ...] = ("pocket", "pocket-fp")
    task: str = "pocket"
    never: str = "pocket-never"
    methods: tuple[str, ...] = (*methods(), *ABLATIONS)
    quantizers: tuple[str, ...] = field(default_factory=lambda: quantizers())
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

    def __post_init__(self) -> None:
        for key in ("bases", "methods", "quantizers", "seeds", "control_seeds", "ablation_seeds"):
            if not getattr(self, key):
                raise MansuError(f"compare: {key} is empty; name at least one")
        for name in (*self.quantizers, *self.control_quantizers):
            quantizer(name)
        for name in self.methods:
            if name not in ABLATIONS:
                method_title(name)
        for name, values in self.settings.items():
            settings_of(name, dict(values))
        for key in ("methods", "quantizers", "control_quantizers", "seeds", "control_seeds", "ablation_seeds"):
            twice = [value for value in getattr(self, key) if getattr(self, key).count(value) > 1]
            if twice:
                raise MansuError(f"compare: {key} names {twice[0]!r} twice; name each once")
        files = [Job("", method, 0).name for method in self.methods]
        for reserved in CONTROLS:
            if reserved in self.methods:
                raise MansuError(f"compare: method {reserved!r} is called like a control; register it by another name")
        if len(set(files)) < len(files):
            raise MansuError(f"compare: two of {', '.join(self.methods)} would share their files; rename one")

    @property
    def names(self) -> dict[str, str]:
        """A short name for every base."""
        return short_names(self.bases, "compare: bases")

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Every edit, the quickest to judge first: seed by seed."""
        every = [
            Job(base, method, seed)
            for base in self.bases
            for method in self.methods
            if method not in ABLATIONS or base == self.bases[0]
            for seed in self._seeds(method)
        ]
        return tuple(sorted(every, key=lambda job: job.seed))

    def quantizers_of(self, method: str) -> tuple[str, ...]:
        """What a method's models are quantized with."""
        return self.quantizers if floored(method) else self.control_quantizers

    def settings_for(self, method: str) -> tuple[str, dict[str, Any]]:
        """The method's name in the registry, and its settings where they differ from the defaults."""
        if method in ABLATIONS:
            whole = method.partition("/")[0]
            return whole, {**self.settings.get(whole, {}), **ABLATIONS[method][1]}
        # A control differs from what it controls in its preset alone.
        shared = self.settings.get(method_flags(method).control_of, {})
        return method, {**shared, **self.settings.get(method, {})}

    def _seeds(self, method: str) -> tuple[int, ...]:
        if floored(method):
            return self.seeds
        return self.ablation_seeds if method in ABLATIONS else self.control_seeds


@dataclass(frozen=True)
class Job:
    """One edit: a method on a base with a seed."""

    base: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.method.replace('/', '.')}/seed{self.seed}"


def title_of(method: str) -> str:
    """How a method, an ablation or a control is written in tables and figures."""
    return CONTROLS.get(method) or (ABLATIONS[method][0] if method in ABLATIONS else method_title(method))


def full(**changes: Any) -> Comparison:
    """Everything: a few hours on two cores."""
    return replace(Comparison(), **changes)


def quick(**changes: Any) -> Comparison:
    """Enough to see the picture, in minutes: one base, one seed, four methods, three quantizers, no search."""
    small = Comparison(
        bases=("pocket",),
        methods=("mansu", "graddiff", "npo", "suppressor"),
        quantizers=("nf4", "int4-g64", "int8"),
        control_quantizers=("nf4", "int4-g64", "int8"),
        seeds=(0,),
        control_seeds=(0,),
        ablation_seeds=(0,),
        rates=(),
        attack_splits=1,
        attack_rates=(3e-4,),
        evidence=False,
    )
    return replace(small, **changes)
