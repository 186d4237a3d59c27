"""Fine-tuning until the forget set is at chance: what the published methods share.

The same optimizer, batch sizes, schedule and stopping rule for all of them, after open-unlearning: AdamW, weight decay
.01, warm-up, every parameter is trained. A method differs in its objective and learning rate, and may say which weights
move (`only`), through which weights the model runs (`view`), where the change may point (`project`) and what is trained in
the parameters' place (`instead`).

Training runs on a float32 copy; what it comes to is rounded to the model's own dtype once, at the end. Whether the forget
set is at chance is asked of the model as it would be stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import Task
from mansu_tl.data.forced import forced
from mansu_tl.errors import MansuError
from mansu_tl.models import float32_copy, home, plain
from mansu_tl.results.digest import Digested
from mansu_tl.runs.metrics import first_is_best
from mansu_tl.runs.values import Values
from mansu_tl.unlearning.batches import Source, choices
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.edit import Edit
from mansu_tl.unlearning.loop import Solver, Verdict, run
from mansu_tl.unlearning.masks import Masks
from mansu_tl.unlearning.objectives import Objective
from mansu_tl.unlearning.registry import Method, register


@dataclass(frozen=True)
class TrainingSettings(Digested):
    """How a method is trained.

    Attributes:
        learning_rate: peak of AdamW.
        max_steps: steps after which it stops whatever it reached.
        forget_batch: forget prompts a step.
        retain_batch: retain sequences a step.
        near_share: share of them that is near text, where the task has some.
        warmup: steps of linear warm-up.
        weight_decay: of AdamW (decoupled).
        stop_over_chance: it stops once multiple-choice accuracy on the forget pairs is no more than so many percentage points
            above chance (100 / options); checked every `check_every` steps. "Forgotten in full precision" is the state
            that the literature then quantizes.
        check_every: steps between checks.
    """

    learning_rate: float = 3e-5
    max_steps: int = 400
    forget_batch: int = 32
    retain_batch: int = 32
    near_share: float = 0.25
    warmup: int = 10
    weight_decay: float = 0.01
    stop_over_chance: float = 5.0
    check_every: int = 10

    def __post_init__(self) -> None:
        for key in ("max_steps", "forget_batch", "retain_batch", "warmup", "check_every"):
            if getattr(self, key) < 1:
                raise MansuError(f"training: {key}={getattr(self, key)}; choose at least 1")
        if not 0 <= self.near_share < 1:
            raise MansuError(f"training: near_share={self.near_share}; choose a share of the retain batch in [0, 1)")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise MansuError(f"training: learning_rate={self.learning_rate}; choose a finite number above 0")


# For methods that move few weights.
LARGE = TrainingSettings(learning_rate=3e-4)


@dataclass(frozen=True)
class TrainedSettings(Digested):
    """Settings of a trained method that has none of its own.

    Attributes:
        training: the shared loop.
    """

    training: TrainingSettings = TrainingSettings()


@dataclass(frozen=True)
class RetainSettings(TrainedSettings):
    """Settings of a trained method that weighs its retain term.

    Attributes:
        retain_weight: weight of the retain term against the forget term.
    """

    retain_weight: float = 1.0


@dataclass(frozen=True)
class StandIns:
    """Tensors that are trained instead of the parameters, e.g. low-rank factors.

    Attributes:
        begin: by name, as they are before the first step, in float32.
        parameters: (the original's parameters, these tensors) -> the parameters that follow, those that may change.
    """

    begin: Values
    parameters: Callable[[Values, Values], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """What a method does in the shared training.

    Attributes:
        objective: what it minimises.
        only: the weights that may move, as masks by parameter; parameters that are not named stay. None = every weight.
        view: turns the trained parameters into those through which the model runs, e.g. fake-quantized ones.
        project: maps a parameter's whole change since the start to the change that is allowed, after every step.
        instead: what is trained in the parameters' place; excludes `only` and `project`, which speak of parameters.
        facts: further facts for the edit.
    """

    objective: Objective
    only: Masks | None = None
    view: Callable[[Values], Values] = lambda values: values
    project: Callable[[str, Tensor], Tensor] | None = None
    instead: StandIns | None = None
    facts: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.instead is not None and (self.only is not None or self.project is not None):
            raise MansuError(
                "recipe: instead goes with neither only nor project; let its parameters() do what they would"
            )


@dataclass(frozen=True)
class Start:
    """What a recipe may look at: the model, the task and the seed of one run."""

    model: TransformerBridge
    task: Task
    seed: int


MakeRecipe = Callable[[Any, Start], Recipe]


def trained(name: str, title: str, settings: type[TrainedSettings], **flags: Any) -> Callable[[MakeRecipe], MakeRecipe]:
    """Register a method of the shared training by the function (settings, start) that gives its recipe; see `Method`.

    Raises:
        MansuError: a name that is taken.
    """

    def registered(recipe: MakeRecipe) -> MakeRecipe:
        def make(model: TransformerBridge, task: Task, chosen: Any, *, seed: int = 0, **run: Any) -> Edit:
            made = recipe(chosen, Start(model, task, seed))
            return train(model, task, name, made, chosen.training, seed=seed, **run)

        register(Method(name, title, settings, make, **flags))
        return recipe

    return registered


def train(
    model: TransformerBridge,
    task: Task,
    method: str,
    recipe: Recipe,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Fine-tune after a recipe and return the change as an edit.

    It stops at the first check at which the forget pairs are answered no better than chance (`stop_over_chance`). Where that
    check lies as far below chance already, the knowledge was turned around between two checks: the training is then run
    again to the check before, and from there on looked at after every step.

    Raises:
        MansuError: no weight may move.
        NoEditError: the loss is not finite (the learning rate is too high).
    """
    solver = _Training(model, task, method, recipe, settings, seed)
    run(solver, checkpoint or Checkpoint(), progress=progress)
    values, history = solver.rounded(solver.changed()), tuple(solver.history)
    del solver  # gradients and Adam's moments, three times the model, while the edit is made
    facts = {"seed": seed, "settings": asdict(settings), "steps": int(history[-1]["step"]), **recipe.facts}
    return Edit.between(model, values, method, facts, history)


class _Training(Solver):
    """One training: what is fixed, and what moves."""

    def __init__(
        self, model: TransformerBridge, task: Task, method: str, recipe: Recipe, settings: TrainingSettings, seed: int
    ) -> None:
        self.method, self.recipe, self.settings, self.seed = method, recipe, settings, seed
        self.steps, self.learning_rate = settings.max_steps, settings.learning_rate
        self.check_every = settings.check_every
        self.stored = plain(model)
        self.dtypes = {name: value.dtype for name, value in self.stored.named_parameters()}
        hf = self.stored if set(self.dtypes.values()) == {torch.float32} else float32_copy(model)
        self.original = {name: value.detach() for name, value in hf.named_parameters()}
        device = home(hf)
        only = {name: mask for name, mask in (recipe.only or {}).items() if bool(mask.any())}
        self.free = {name: mask.to(self.original[name].device) for name, mask in only.items()}
        if recipe.only is not None and not self.free:
            raise MansuError(f"{method}: no weight may move; widen its mask")
        there = task.to(device)
        self.near = round(settings.retain_batch * settings.near_share) if len(there.near_text) else 0
        near_text = there.near_text if self.near else there.near_text[:0]
        self.source = Source(hf, self.original, there.forget_pairs, there.retain_text, near_text)
        self.asked = forced(there.forget_pairs)

    def restart(self) -> None:
        settings, every, instead = self.settings, self.recipe.only is None, self.recipe.instead
        free = self.original if instead is None else instead.begin
        moving = {
            name: value.detach().clone().requires_grad_() for name, value in free.items() if every or name in self.free
        }
        adam = torch.optim.AdamW(
            moving.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.start(self.seed, moving, adam)
        self.samplers = self.source.samplers(
            settings.forget_batch, settings.retain_batch - self.near, self.near, self.generator
        )

    def rate(self, step: int) -> float:
        return self.learning_rate * min(1.0, (step + 1) / self.settings.warmup)

    def check(self, step: int) -> Verdict:
        pairs, over = self.source.pairs, self.settings.stop_over_chance
        scores = choices(self.stored, self.rounded(self.recipe.view(self.values())), self.asked)
        score = 100 * first_is_best(scores).double().mean().item()
        self.history.append({"step": float(step), "forget_mc": score})
        if score > pairs.chance + over:
            return "on"
        return "beyond" if over >= 0 and score < pairs.chance - over else "done"

    def loss(self, step: int) -> Float[Tensor, ""]:
        return self.recipe.objective(self.source.draw(self.samplers, self.recipe.view(self.values())))

    def values(self) -> Values:
        """All parameters, as functions of what is trained."""
        return {**self.original, **self.changed()}

    def changed(self) -> Mapping[str, Tensor]:
        """Those that what is trained may have changed."""
        instead = self.recipe.instead
        return self.trained if instead is None else instead.parameters(self.original, self.trained)

    @torch.no_grad()
    def after(self, step: int) -> None:
        if self.recipe.instead is not None:
            return
        for name, current in self.trained.items():
            start = self.original[name]
            if name in self.free and not bool(self.free[name].all()):
                current.copy_(torch.where(self.free[name], current, start))
            if self.recipe.project:
                current.copy_(start + self.recipe.project(name, current - start))

    def rounded(self, values: Values) -> dict[str, Tensor]:
        """The values as they would be stored."""
        return {name: value.detach().to(self.dtypes[name]) for name, value in values.items()}
