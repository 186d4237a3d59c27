"""What an audit does: its formats and attacks, and how long it takes, reckoned from a small piece of the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pandas as pd
import torch

from mansu_tl.circuit import edge_attribution
from mansu_tl.data import PromptPairs, Questions, Task
from mansu_tl.errors import MansuError
from mansu_tl.models import gguf_weights, linear_weights, orient, parameters
from mansu_tl.models.tree import Model
from mansu_tl.quantization import quantizer, quantizers
from mansu_tl.quantization.quantizer import CalibratedQuantizer, Inputs
from mansu_tl.results.digest import Digested
from mansu_tl.results.result import Result, Table
from mansu_tl.runs import accuracy
from mansu_tl.verification import Subject
from mansu_tl.verification.probes import ridge

# The formats that a quick audit looks at: bitsandbytes' two, and what llama.cpp's users have.
_QUICK = ("nf4", "int8", "gguf-q4_1")
_FILE = "gguf"  # the very file that the original came in
PARTS = ("answers", "generation", "sampling", "text", "depth", "probes", "formats", "circuit", "relearning")
_ROWS = 32  # of the piece that is timed
_ATTACKER_BATCH = 32


@dataclass(frozen=True)
class AuditPlan(Digested):
    """What an audit looks at.

    Attributes:
        formats: quantizers; () = those of the plan that the original fits.
        thorough: every format, the circuit behind the facts and its divergence too.
        attack_rates: learning rates of the relearning attacks; () = none.
        attack_steps: optimizer steps of an attack.
        attack_splits: draws of the facts that an attacker has.
        attack_seed: of those draws.
        new_tokens: where an answer that is written freely is cut.
        steps: EAP-IG steps.
        faithfulness: target of the circuit.
        seed: of the intervals over facts.
        only: the parts that are looked at, of "answers", which always is, "generation", "sampling", "text", "depth",
            "probes", "formats", "circuit" and "relearning"; () = all. What is left out is not judgeable.

    Raises:
        MansuError: an unknown format or part, or a format named twice.
    """

    formats: tuple[str, ...] = ()
    thorough: bool = False
    attack_rates: tuple[float, ...] = (3e-4,)
    attack_steps: int = 50
    attack_splits: int = 1
    attack_seed: int = 0
    new_tokens: int = 12
    steps: int = 5
    faithfulness: float = 0.85
    seed: int = 0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part in self.only:
            if part not in PARTS:
                raise MansuError(f"audit: only names {part!r}; choose of {', '.join(PARTS)}")
        for name in self.formats:
            quantizer(name)
        twice = [name for name in self.formats if self.formats.count(name) > 1]
        if twice:
            raise MansuError(f"audit: formats name {twice[0]!r} twice; name each once")

    @classmethod
    def quick(cls) -> AuditPlan:
        """Minutes: three formats, one attack where there is a never-trained model to set it against."""
        return cls()

    @classmethod
    def full(cls) -> AuditPlan:
        """Every format, the attacks of `compare`, and the circuit."""
        return cls(thorough=True, attack_rates=(3e-4, 1e-3), attack_splits=3)

    def looks_at(self, stage: str) -> bool:
        """Whether a stage of this name belongs to what is looked at."""
        part = stage.partition("/")[0].partition("_")[0]
        return not self.only or part in ("answers", *self.only)

    def for_model(self, model: Model) -> AuditPlan:
        """With its formats written out: of a model that came from a GGUF file, that file's own is the first."""
        if self.formats:
            return self
        names = quantizers() if self.thorough else _QUICK
        if gguf_weights(model) is None:
            return replace(self, formats=names)
        return replace(
            self, formats=(_FILE, *(name for name in names if self.thorough or not name.startswith(f"{_FILE}-")))
        )


@dataclass(frozen=True)
class Work:
    """What a stage costs.

    Attributes:
        forward: tokens that are run forwards.
        backward: tokens that are run forwards and backwards.
        quantized: models that are quantized, by format.
        fits: linear probes that are fitted.
    """

    forward: int = 0
    backward: int = 0
    quantized: tuple[str, ...] = ()
    fits: int = 0


@dataclass(frozen=True)
class Planned(Result):
    """One stage of an audit's plan.

    Attributes:
        name: of its file.
        what: in words.
        done: the folder has it.
        seconds: how long it will take; 0 where it is done.
    """

    name: str
    what: str
    done: bool
    seconds: float

    def __repr__(self) -> str:
        return f"Planned({self.name}: {self.what}, {'done' if self.done else clock(self.seconds)})"


@dataclass(frozen=True)
class Estimate(Result):
    """An audit's stages in order, with what each takes on this machine.

    Attributes:
        title: what is audited.
        stages: all of them, those that are done too.
        forward, backward: microseconds a token, forwards, and forwards and backwards, as timed on this machine.
    """

    title: str
    stages: tuple[Planned, ...]
    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        """How long what is missing will take."""
        return sum(stage.seconds for stage in self.stages)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a stage."""
        return pd.DataFrame([stage.__dict__ for stage in self.stages])

    def lines(self) -> list[str]:
        """For a terminal: what will be done, and how long it takes."""
        missing = [stage for stage in self.stages if not stage.done]
        done = len(self.stages) - len(missing)
        there = f"; {done} of {len(self.stages)} are there already" if done else ""
        timed = f"timed here: {self.forward:.3g} us a token forwards, {self.backward:.3g} us forwards and backwards"
        head = [f"{self.title}: {len(missing)} stages to do, about {clock(self.seconds)}{there} ({timed})"]
        width = max((len(stage.name) for stage in missing), default=0)
        return head + [f"  {stage.name:<{width}}  {clock(stage.seconds):>6}  {stage.what}" for stage in missing]

    def __repr__(self) -> str:
        return f"Estimate({self.title}: {len(self.stages)} stages, about {clock(self.seconds)} to go)"

    def _tables(self) -> Sequence[Table]:
        return (Table(self.to_dataframe(), "stages", "{:.1f}".format, rows=60),)


@dataclass
class Clock:
    """Seconds a unit of work, timed when first asked for, each on a small piece of the audit's own work."""

    subject: Subject
    _known: dict[str, float] = field(default_factory=dict)

    def seconds(self, work: Work) -> float:
        """How long so much work takes."""
        total = work.forward * self.forward if work.forward else 0.0
        total += work.backward * self.backward if work.backward else 0.0
        total += work.fits * self.fit if work.fits else 0.0
        return total + sum(self.quantizing(name) for name in work.quantized)

    @property
    def forward(self) -> float:
        """A token forwards."""
        asked = self.subject.task.questions["forget"][:_ROWS]
        return self._timed("forward", tokens_of(asked), lambda: accuracy(self.subject.model, asked))

    @property
    def backward(self) -> float:
        """A token forwards and backwards."""
        pairs, steps = self.subject.task.forget_pairs[: _ROWS // 4], 2
        # Beside the steps, both ends forwards.
        work = lambda: edge_attribution(self.subject.model, pairs, steps=steps)  # noqa: E731
        return self._timed("backward", (steps + 1) * tokens_of(pairs), work)

    @property
    def fit(self) -> float:
        """A linear probe of one layer, of as many rows and features as the audit's."""
        questions, width = self.subject.task.questions, int(self.subject.model.cfg.d_model)
        rows = sum(len(questions[name]) for name in ("forget", "near") if name in questions)
        # Numbers whose values do not matter to the time, and drawn from nobody's generator.
        grid = torch.arange(rows * width, dtype=torch.float64).view(rows, width).sin()
        return self._timed("fit", 1, lambda: ridge(grid, grid, 1.0))

    def quantizing(self, name: str) -> float:
        """A whole model under a format, reckoned from one of its matrices; the file's own is not known beforehand."""
        model = self.subject.model
        linear, live = linear_weights(model), parameters(model)
        chosen = quantizer(name)
        weights = {key: live[key].numel() for key in linear}
        first = min(weights, key=lambda key: weights[key])
        matrix = orient(live[first].detach(), linear[first])
        if name in quantizers("file"):
            return 0.0
        if isinstance(chosen, CalibratedQuantizer):
            wide = matrix.shape[1]
            shown = Inputs(torch.eye(wide), torch.ones(wide), 1)
            work: Callable[[], object] = partial(chosen.roundtrip, matrix, shown)
            text = 2 * self.forward * int(self.subject.task.retain_text.lengths.sum())
        else:
            work, text = partial(chosen.roundtrip, matrix), 0.0
        return text + sum(weights.values()) * self._timed(name, weights[first], work)

    def _timed(self, what: str, units: int, work: Callable[[], object]) -> float:
        """Seconds a unit, the better of two runs: the first one warms up."""
        if what not in self._known:
            best = float("inf")
            for _ in range(2):
                started = time.perf_counter()
                work()
                best = min(best, time.perf_counter() - started)
            self._known[what] = best / units
        return self._known[what]


def tokens_of(rows: Questions | PromptPairs) -> int:
    """Tokens that are run for rows: with options of several tokens, a row for each option."""
    options = rows.options if rows.options.ndim == 3 else rows.options[..., None]
    if options.shape[2] == 1:
        return int(rows.lengths.sum())
    return int((rows.lengths[:, None] + (options >= 0).sum(2)).sum())


def asked_tokens(task: Task, sets: Sequence[str]) -> int:
    """Tokens of some question sets, those that are there."""
    return sum(tokens_of(task.questions[name]) for name in sets if name in task.questions)


def attack_work(task: Task, plan: AuditPlan) -> Work:
    """What the relearning attacks on one model cost."""
    forget, text = task.questions["forget"], task.retain_text
    lengths = [float(forget.lengths.float().mean()) + 1] * plan.attack_splits + [float(text.lengths.float().mean())]
    curves = len(plan.attack_rates)
    trained = curves * sum(plan.attack_steps * _ATTACKER_BATCH * length for length in lengths)
    # Asked before and after, the never-seen prompts too.
    asked = 2 * curves * len(lengths) * (tokens_of(forget) + int(task.unseen.lengths.sum()))
    return Work(asked, int(trained))


def clock(seconds: float) -> str:
    """Seconds for reading."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
