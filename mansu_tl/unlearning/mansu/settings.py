"""What MANSU can be told; every part can be switched off on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from mansu_tl.errors import MansuError, near
from mansu_tl.results.digest import Digested

RESTRICTIONS = ("circuit", "random", "matched", "none")
FLOORS = ("loop", "after", "none")
SOLVERS = ("gradient", "closed")
ADVERSARIES = ("weights", "adapters", "near")
_COUNTS = (
    "steps", "forget_batch", "retain_batch", "fisher_sequences", "select_every", "adversary_every", "adversary_steps",
    "layers",
)  # fmt: skip
# What only the gradient's solver can do, and the value that switches it off.
_NOT_CLOSED = (
    ("floor", "loop"), ("adversary_weight", 0.0), ("projector", False), ("gradual", 0.0), ("retain_budget", 0.0),
    ("place_weight", 0.0), ("depth", 1.0),
)  # fmt: skip
# Where the closed form differs from the defaults.
CLOSED: Mapping[str, Any] = MappingProxyType(
    {"solver": "closed", "steps": 20, "margin": 0.1, "band_weight": 0.05, "representation_weight": 0.0, "place_weight": 0.0,
     "adversary_weight": 0.0, "null_space": 50.0, "near_weight": 5.0, "fisher": False, "contexts": 3,
     "neuron_share": 1.0, "fisher_sequences": 64}
)  # fmt: skip
# What edits where a fact is written.
EARLY: Mapping[str, Any] = MappingProxyType(
    {"depth": 0.5, "budget": 0.05, "place_weight": 1.0, "odds_weight": 0.1, "representation_weight": 4.0, "margin": -1.0,
     "adversary_weight": 3.0, "fisher": False}
)  # fmt: skip
_LIGHT: Mapping[str, Any] = MappingProxyType(
    {"steps": 200, "margin": 0.1, "band_weight": 0.05, "adversary_every": 10, "representation_weight": 0.0,
     "retain_weight": 20.0, "adversary_weight": 0.0}
)  # fmt: skip


@dataclass(frozen=True)
class MansuSettings(Digested):
    """Settings of MANSU; the defaults were chosen on `pocket`, seed 0, on a validation split of the questions.

    Attributes:
        quantizer: the grid whose codes every edited weight must change; names joined by "+" for a set of them, each of
            which every edited weight must satisfy, e.g. "nf4+int4-g64".
        solver: "gradient" = Adam on every candidate's update, through the whole model; "closed" = the closed form (see
            `closed.py`), which edits the output matrices of MLPs below the layer that reads the subject.
        restrict: which weights may be edited: those of the "circuit", as many of "random" heads and neurons, "matched" = as
            many drawn in every layer of the circuit, or "none" = every linear weight.
        floor: "loop" = the grid is in the optimisation; "after" = a plain one, each weight of its support pushed across
            a boundary at the end; "none" = a plain one, stored as it is.
        budget: edited weights as a share of all linear weights.
        depth: the share of the layers, from the first on, whose weights may be edited: what is edited late can only keep a
            fact from being said, not from being known.
        candidates: how many weights may be moved at all, as a multiple of the budget: those whose move by one bin lowers or
            raises the forget loss most at the start; 0 = every weight of the circuit.
        contrast: how much, in that choice, what a move does to the near text's likelihood counts against it, each in units of
            its mean over candidates; 0 = not.
        neuron_share: share of each circuit MLP's neurons that may be edited.
        steps: optimisation steps; of the closed form: of the shift that its moves are solved for.
        learning_rate: peak step of Adam on the latent updates, in bins; of the closed form: on the shift, in shares of a
            typical entry of the stream.
        layers: closed form: how many MLPs share the change.
        until: closed form: where the last of them lies, as a share of the way to the layer that reads the subject.
        shift_weight: closed form: weight of the shift's mean squared length, in units of the stream's.
        least_gain: closed form: what a move must gain, as a share of a row's mean squared change.
        contexts: how many openings each forget prompt is also put behind, so that its subject is not only met where a text
            begins; 0 = none.
        forget_batch: forget prompts a step.
        retain_batch: retain sequences a step, as many near ones again where there is near text.
        divergence_weight: weight of the divergence of forget prompts from what never-seen ones give.
        margin: nats that an answer is pushed below what never-seen prompts give it; negative = how far above it may stay.
        margin_weight: weight of that hinge.
        band: half-width in nats of the quadratic part of the pool's flattening.
        band_weight: weight of the flattening.
        representation_weight: weight of the hidden states' distance from those of never-seen prompts.
        place_weight: weight of the forget term at the place: the edited stream behind a layer, read by the original's layers
            behind it, has to say what never-seen prompts say, and of retain text what it said; layers with candidates take
            turns, all but the last of them, behind which nothing is edited (one layer alone has no place). 0 = off.
        retain_weight: weight of the retain term against the forget term.
        near_weight: weight of a near token against another retain token.
        discover_near: where the task names no near text, the share of the retain text that counts as near: what the
            model represents most like the forget prompts. 0 = none.
        likelihood: weight of the cross-entropy inside the retain term (the rest is a divergence to the original).
        odds_weight: weight, inside the retain term, of the log-odds that tokens lose of which the original is sure: a
            divergence does not feel a margin go from twelve nats to five. 0 = off.
        null_space: weight of the change of the circuit matrices' outputs on retain inputs (0 = off); of the closed form:
            against that on the forget prompts' inputs.
        projector: project the update itself into the null space of the retain inputs after every step.
        leak: share of the retain inputs' energy that the projector's null space may hold.
        fisher: whether the diagonal Fisher information enters the choice of weights.
        retain_budget: nats a token that the edit may move the model away from the original on a sample of the retain text,
            measured: of the changed weights, the most wanted stay until it is spent. 0 = no budget.
        fisher_sequences: retain sequences of that sample, which is the Fisher information's too.
        gradual: share of the steps over which the number of weights that may cross a boundary grows to the budget, those of
            largest update first; 0 = they cross as they come.
        select_from: share of the steps after which the support is cut to the budgets every `select_every` steps.
        freeze_at: share of the steps after which the support is frozen and the step size decays.
        select_every: steps between cuts.
        adversary_weight: weight of the forget term under attack (0 = off).
        adversary_every: steps between attacks.
        adversary_steps: Adam steps of an attack.
        adversary_facts: forget facts that the attacker trains on; 0 = a quarter of them.
        adversary_rate: the attacker's learning rate.
        adversary_spread: by what factor, up or down, an attack's facts, steps and rate are drawn around those above, even in
            the logarithm; it grows from 1 to this until the support is frozen. 1 = every attack is alike.
        adversary_kinds: what attacks there are, each as often as another, joined by "+": "weights" trains every linear weight
            on forget facts, "adapters" low-rank ones in their place (LoRA of rank 8, at ten times the rate), "near" every
            linear weight on near text, so that all forget facts are to be defended.
    """

    quantizer: str = "nf4"
    solver: str = "gradient"
    restrict: str = "circuit"
    floor: str = "loop"
    budget: float = 0.0195
    depth: float = 1.0
    candidates: float = 0.0
    contrast: float = 0.0
    neuron_share: float = 0.25
    steps: int = 300
    learning_rate: float = 0.1
    layers: int = 8
    until: float = 0.45
    shift_weight: float = 0.05
    least_gain: float = 3e-4
    contexts: int = 0
    forget_batch: int = 96
    retain_batch: int = 32
    divergence_weight: float = 1.0
    margin: float = -0.4
    margin_weight: float = 1.0
    band: float = 0.5
    band_weight: float = 0.2
    representation_weight: float = 2.0
    place_weight: float = 0.0
    retain_weight: float = 180.0
    near_weight: float = 10.0
    discover_near: float = 0.2
    likelihood: float = 0.1
    odds_weight: float = 0.0
    null_space: float = 4.0
    projector: bool = False
    leak: float = 0.02
    fisher: bool = True
    retain_budget: float = 0.0
    fisher_sequences: int = 256
    gradual: float = 0.0
    select_from: float = 0.2
    freeze_at: float = 0.6
    select_every: int = 10
    adversary_weight: float = 6.0
    adversary_every: int = 5
    adversary_steps: int = 24
    adversary_facts: int = 0
    adversary_rate: float = 3e-4
    adversary_spread: float = 1.0
    adversary_kinds: str = "weights"

    def __post_init__(self) -> None:
        for each in fields(self):
            value, like = getattr(self, each.name), each.default
            kinds = {float: Real, int: Integral}.get(type(like), type(like))
            fine = isinstance(value, kinds) and isinstance(value, bool) == isinstance(like, bool)
            self._require(each.name, fine, f"choose a {type(like).__name__}, like {like!r}")
        for key, known in (("restrict", RESTRICTIONS), ("floor", FLOORS), ("solver", SOLVERS)):
            self._require(key, getattr(self, key) in known, f"choose one of {', '.join(known)}")
        for key in _COUNTS:
            self._require(key, getattr(self, key) >= 1, "choose at least 1")
        for key, value in vars(self).items():
            self._require(key, not isinstance(value, float) or math.isfinite(value), "choose a finite number")
        self._require("learning_rate", self.learning_rate > 0, "choose one above 0", " bins")
        self._require(
            "budget", 0 < self.budget <= 1, "choose a share of the linear weights, above 0 and at most 1: 0.01 is 1 %"
        )
        self._require("depth", 0 < self.depth <= 1, "choose a share of the layers, above 0 and at most 1")
        everything = self.candidates == 0
        self._require("contrast", self.contrast >= 0, "choose 0 (none) or more")
        if self.contrast and everything:
            raise MansuError(
                f"mansu: contrast={self.contrast} chooses among candidates; set candidates to 1 budget or more, or contrast=0"
            )
        self._require("candidates", everything or self.candidates >= 1, "choose 0 (all) or at least 1 budget")
        self._require("gradual", 0 <= self.gradual <= 1, "choose a share of the steps, at most 1")
        self._require("until", 0 <= self.until < 1, "choose a share in [0, 1)")
        self._require("contexts", self.contexts >= 0, "choose 0 (none) or more")
        self._require("least_gain", self.least_gain >= 0, "choose 0 (any gain) or more")
        if self.solver == "closed":
            for key, value in _NOT_CLOSED:
                self._require(key, getattr(self, key) == value, f"the closed form has none of it; choose {value!r}")
        self._require("adversary_spread", self.adversary_spread >= 1, "choose 1 (none) or more")
        fine = set(self.attackers) <= set(ADVERSARIES) and len(set(self.attackers)) == len(self.attackers)
        self._require("adversary_kinds", fine, f"join some of {', '.join(ADVERSARIES)} by '+', each once")
        self._require("discover_near", 0 <= self.discover_near < 1, "choose a share in [0, 1)")
        self._require("adversary_facts", self.adversary_facts >= 0, "choose 0 (a quarter) or more")
        self._require("odds_weight", self.odds_weight >= 0, "choose 0 (off) or more")
        self._require("retain_budget", self.retain_budget >= 0, "choose 0 (none) or more", " nats")

    def _require(self, key: str, fine: bool, way_out: str, unit: str = "") -> None:
        if not fine:
            raise MansuError(f"mansu: {key}={getattr(self, key)!r}{unit}; {way_out}")

    @classmethod
    def light(cls, **changes: Any) -> MansuSettings:
        """Without the attacker in the loop and what pays for it: a third of the time, no defence against relearning.

        Args:
            changes: further settings.
        """
        return cls._changed(_LIGHT, changes)

    @classmethod
    def early(cls, **changes: Any) -> MansuSettings:
        """Edits in the first half of the layers alone, each of which has to have forgotten by itself; what is kept keeps its
        odds.

        Args:
            changes: further settings.
        """
        return cls._changed(EARLY, changes)

    @classmethod
    def closed(cls, **changes: Any) -> MansuSettings:
        """The closed form: minutes where the gradient takes an hour, for models of many layers.

        Args:
            changes: further settings.
        """
        return cls._changed(CLOSED, changes)

    @classmethod
    def _changed(cls, preset: Mapping[str, Any], changes: Mapping[str, Any]) -> MansuSettings:
        known = [each.name for each in fields(cls)]
        for key in changes:
            if key not in known:
                raise MansuError(f"mansu: unknown setting {key!r}; it has {', '.join(sorted(known))}{near(key, known)}")
        return cls(**{**preset, **changes})

    def attacked_facts(self, known: int) -> int:
        """How many of the forget facts the attacker in the loop trains on.

        Raises:
            MansuError: it leaves none to defend.
        """
        count = self.adversary_facts or max(1, known // 4)
        if self.adversary_weight and count >= known:
            raise MansuError(
                f"mansu: adversary_facts={self.adversary_facts} of {known} forget facts leaves none to defend; lower it, "
                "or switch the attacker off with adversary_weight=0"
            )
        return count

    @property
    def quantizers(self) -> tuple[str, ...]:
        """The grids that every edited weight must satisfy; the first is the one that it is optimised on."""
        return tuple(self.quantizer.split("+"))

    @property
    def attackers(self) -> tuple[str, ...]:
        """The kinds of attack in the loop."""
        return tuple(self.adversary_kinds.split("+"))
