"""The loop that every gradient baseline shares: fine-tuning until the forget set is at chance.

The same optimizer, batch sizes, schedule and stopping rule for all of them. Following open-unlearning: AdamW, weight
decay .01, warm-up, every parameter is trained. A method differs in its loss and learning rate, and may say which
weights move (`only`), through which weights the model runs (`view`) and where the change may point (`project`).

Training runs on a float32 copy; what it comes to is rounded to the model's own dtype once, at the end. Whether the forget
set is at chance is asked of the model as it would be stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from mansu_tl.data import PromptPairs, Sequences, Task
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.models import float32_copy, home, plain
from mansu_tl.results.digest import Digested
from mansu_tl.runs.metrics import kl_divergence
from mansu_tl.unlearning.batches import RetainBatches, Sampler, Values, last_token_logits, sequence_logits
from mansu_tl.unlearning.checkpoint import Checkpoint, State, optimizer_tensors, restore_optimizer
from mansu_tl.unlearning.edit import Edit

Loss = Callable[["Batch"], Tensor]
View = Callable[[Values], Values]
Project = Callable[[str, Tensor], Tensor]
# Forget prompts in a pass without gradients, and the original's logits that are kept (a quarter of a gibibyte).
_ROWS, _MOST_KEPT = 256, 2**26


@dataclass(frozen=True)
class TrainingSettings(Digested):
    """How a baseline is trained.

    Attributes:
        learning_rate: peak of AdamW.
        max_steps: steps after which it stops whatever it reached.
        forget_batch: forget prompts a step.
        retain_batch: retain sequences a step, a quarter of them near facts.
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
    warmup: int = 10
    weight_decay: float = 0.01
    stop_over_chance: float = 5.0
    check_every: int = 10

    def __post_init__(self) -> None:
        for key in ("max_steps", "forget_batch", "retain_batch", "warmup", "check_every"):
            if getattr(self, key) < 1:
                raise MansuError(f"training: {key}={getattr(self, key)}; choose at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise MansuError(f"training: learning_rate={self.learning_rate}; choose a finite number above 0")


class OriginalLogits:
    """The original model's last-token logits of forget prompts: kept where all of them fit, else computed again."""

    def __init__(self, model: PreTrainedModel, values: Values, pairs: PromptPairs) -> None:
        self._model, self._values, self._pairs = model, values, pairs
        self._kept: Tensor | None = None

    def __call__(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Those of some rows."""
        vocab = self._model.get_output_embeddings().weight.shape[0]
        if len(self._pairs) * vocab > _MOST_KEPT:
            return self._run(self._pairs[rows])
        if self._kept is None:
            self._kept = torch.cat([self._run(part) for part in _in_batches(self._pairs)])
        return self._kept[rows]

    @torch.no_grad()
    def _run(self, pairs: PromptPairs) -> Float[Tensor, "row vocab"]:
        return last_token_logits(self._model, self._values, pairs.clean, pairs.lengths)


@dataclass(frozen=True)
class Batch:
    """What a loss sees at one step.

    Attributes:
        model: the HF model, used through `values`.
        values: the parameters through which the model runs: those being trained, or a method's view of them.
        original: the parameters of the original model.
        pairs: forget pairs of this step.
        rows: their row numbers in the task.
        retain: retain sequences of this step.
        original_of: the original model's last-token logits of forget prompts, by row number.
    """

    model: PreTrainedModel
    values: Values
    original: Values
    pairs: PromptPairs
    rows: Int[Tensor, " row"]
    retain: Sequences
    original_of: Callable[[Int[Tensor, " row"]], Float[Tensor, "row vocab"]]

    @property
    def original_logits(self) -> Float[Tensor, "row vocab"]:
        """The original model's last-token logits of these forget prompts."""
        return self.original_of(self.rows)

    def forget_logits(self) -> Float[Tensor, "row vocab"]:
        """Last-token logits of the forget prompts under the current values."""
        return last_token_logits(self.model, self.values, self.pairs.clean, self.pairs.lengths)

    def answer_log_prob(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Log-probability of each forget answer."""
        return logits.log_softmax(-1).gather(1, self.pairs.answers[:, None])[:, 0]

    def retain_loss(self) -> Float[Tensor, ""]:
        """Mean next-token cross-entropy of the retain sequences."""
        found = sequence_logits(self.model, self.values, self.retain)
        return torch.nn.functional.cross_entropy(found.logits, found.targets)

    def retain_divergence(self) -> Float[Tensor, ""]:
        """Mean KL(original || model) of the next token over the retain sequences, in nats."""
        found = sequence_logits(self.model, self.values, self.retain)
        with torch.no_grad():
            before = sequence_logits(self.model, self.original, self.retain)
        return kl_divergence(found.logits, before.logits).mean()


def train(
    model: TransformerBridge,
    task: Task,
    method: str,
    loss: Loss,
    settings: TrainingSettings,
    *,
    only: Mapping[str, Bool[Tensor, ...]] | None = None,
    view: View | None = None,
    project: Project | None = None,
    facts: Mapping[str, object] | None = None,
    seed: int = 0,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Edit:
    """Fine-tune with `loss` and return the change as an edit.

    It stops at the first check at which the forget pairs are answered no better than chance (`stop_over_chance`). Where that
    check lies as far below chance already, the knowledge was turned around between two checks: the training is then run
    again to the check before, and from there on looked at after every step.

    Args:
        only: the weights that may move, as masks by parameter; parameters that are not named stay. Every weight
            where not given.
        view: turns the trained parameters into those through which the model runs, e.g. fake-quantized ones.
        project: maps a parameter's whole change since the start to the change that is allowed, after every step.
        facts: further facts for the edit.
        checkpoint: where the state is kept on the way, and taken up.

    Raises:
        MansuError: no weight may move.
        NoEditError: the loss is not finite (the learning rate is too high).
    """
    run = _Training(model, task, method, loss, settings, only, view, project, seed, checkpoint or Checkpoint())
    while not run.finished:
        run.attempt(progress)
    recorded = {"seed": seed, "settings": asdict(settings), "steps": int(run.history[-1]["step"]), **(facts or {})}
    return Edit.between(model, _rounded(run.moving, run.dtypes), method, recorded, tuple(run.history))


class _Training:
    """One training: what is fixed, and what moves."""

    def __init__(
        self,
        model: TransformerBridge,
        task: Task,
        method: str,
        loss: Loss,
        settings: TrainingSettings,
        only: Mapping[str, Bool[Tensor, ...]] | None,
        view: View | None,
        project: Project | None,
        seed: int,
        checkpoint: Checkpoint,
    ) -> None:
        self.method, self.loss, self.settings, self.seed, self.checkpoint = method, loss, settings, seed, checkpoint
        self.view: View = view or (lambda values: values)
        self.project = project
        self.stored = plain(model)
        self.dtypes = {name: value.dtype for name, value in self.stored.named_parameters()}
        self.hf = self.stored if set(self.dtypes.values()) == {torch.float32} else float32_copy(model)
        self.original = {name: value.detach() for name, value in self.hf.named_parameters()}
        device = home(self.hf)
        self.task = task.to(device)
        self.free = {name: mask.to(device) for name, mask in (only or {}).items() if bool(mask.any())}
        if only is not None and not self.free:
            raise MansuError(f"{method}: no weight may move; widen its mask")
        self.every = only is None
        self.original_logits = OriginalLogits(self.hf, self.original, self.task.forget_pairs)
        # The check from which on every step is looked at; -1 = none.
        self.fine_from, self.finished = -1, False

    def _start(self) -> None:
        """Everything that moves, as before the first step."""
        settings = self.settings
        self.values = {
            name: value.clone().requires_grad_() if self.every or name in self.free else value
            for name, value in self.original.items()
        }
        self.moving = {name: value for name, value in self.values.items() if value.requires_grad}
        self.generator = torch.Generator().manual_seed(self.seed)
        self.draw_forget = Sampler(len(self.task.forget_pairs), settings.forget_batch, self.generator)
        self.draw_retain = RetainBatches(self.task, settings.retain_batch, 0.25, self.generator)
        self.optimizer = torch.optim.AdamW(
            self.moving.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.history: list[dict[str, float]] = []

    def attempt(self, progress: bool) -> None:
        """Train from the start, or from the checkpoint, until a check ends it or sends it back."""
        self._start()
        settings, first = self.settings, self._taken_up()
        bar = tqdm(
            range(first, settings.max_steps), desc=self.method, unit="step", initial=first, total=settings.max_steps,
            disable=not progress,
        )  # fmt: skip
        with bar:
            for step in bar:
                if step % settings.check_every == 0 or -1 < self.fine_from < step:
                    score = _multiple_choice(
                        self.stored, _rounded(self.view(self.values), self.dtypes), self.task.forget_pairs
                    )
                    self.history.append({"step": float(step), "forget_mc": score})
                    bar.set_postfix(forget_mc=f"{score:.0f}")
                    if self._ended(step, score):
                        return
                self._step(step)
                self.checkpoint.offer(lambda done=step + 1: self._state(done))  # type: ignore[misc]
        self.finished = True

    def _ended(self, step: int, score: float) -> bool:
        """Whether this check ends the attempt: forgotten, or beyond it."""
        chance, over = self.task.forget_pairs.chance, self.settings.stop_over_chance
        if score > chance + over:
            return False
        inverted = over >= 0 and score < chance - over
        if inverted and self.fine_from < 0 and step and self.settings.check_every > 1:
            self.fine_from = step - self.settings.check_every
        else:
            self.finished = True
        return True

    def _step(self, step: int) -> None:
        rows, pairs, settings = self.draw_forget(), self.task.forget_pairs, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.warmup)
        batch = Batch(
            self.hf, self.view(self.values), self.original, pairs[rows], rows, self.draw_retain(), self.original_logits
        )
        value = self.loss(batch)
        if not torch.isfinite(value):
            raise NoEditError(
                f"{self.method}: the loss is {value.item()} at step {step}; lower "
                f"learning_rate={settings.learning_rate}"
            )
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, current in self.moving.items():
                start = self.original[name]
                if name in self.free and not bool(self.free[name].all()):
                    current.copy_(torch.where(self.free[name], current, start))
                if self.project:
                    current.copy_(start + self.project(name, current - start))

    @property
    def _samplers(self) -> list[Sampler]:
        return [self.draw_forget, *self.draw_retain.samplers]

    def _state(self, done: int) -> State:
        """Everything that moves, after so many steps."""
        tensors = {f"value:{name}": value for name, value in self.moving.items()}
        tensors |= {f"order:{i}": sampler.order for i, sampler in enumerate(self._samplers)}
        tensors |= optimizer_tensors(self.optimizer) | {"generator": self.generator.get_state()}
        return tensors, {"done": done, "fine_from": self.fine_from, "history": self.history}

    def _taken_up(self) -> int:
        """Put back what the checkpoint holds; gives the number of steps that are done."""
        state = self.checkpoint.read()
        # Sent back to look at every step, it starts again: what was kept lies beyond.
        if state is None or state[1]["fine_from"] < self.fine_from:
            return 0
        tensors, facts = state
        with torch.no_grad():
            for name, value in self.moving.items():
                value.copy_(tensors[f"value:{name}"])
        for i, sampler in enumerate(self._samplers):
            sampler.order = tensors[f"order:{i}"]
        restore_optimizer(self.optimizer, tensors)
        self.generator.set_state(tensors["generator"])
        self.fine_from, self.history = int(facts["fine_from"]), list(facts["history"])
        return int(facts["done"])


def _rounded(values: Values, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The values as they would be stored."""
    return {name: value.detach().to(dtypes[name]) for name, value in values.items()}


@torch.no_grad()
def _multiple_choice(hf: PreTrainedModel, values: Values, pairs: PromptPairs) -> float:
    right = []
    for part in _in_batches(pairs):
        logits = last_token_logits(hf, values, part.clean, part.lengths)
        wrong = logits.gather(1, part.distractors).max(1).values
        right.append(logits.gather(1, part.answers[:, None])[:, 0] > wrong)
    return 100 * torch.cat(right).double().mean().item()


def _in_batches(pairs: PromptPairs) -> Iterator[PromptPairs]:
    for start in range(0, len(pairs), _ROWS):
        yield pairs[slice(start, start + _ROWS)]
