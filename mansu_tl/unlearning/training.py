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
from mansu_tl.digest import Digested
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.metrics import kl_divergence
from mansu_tl.models import float32_copy, home, plain
from mansu_tl.unlearning.batches import Sampler, Values, last_token_logits, retain_batches, sequence_logits
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
        logits, targets = sequence_logits(self.model, self.values, self.retain)
        return torch.nn.functional.cross_entropy(logits, targets)

    def retain_divergence(self) -> Float[Tensor, ""]:
        """Mean KL(original || model) of the next token over the retain sequences, in nats."""
        logits, _ = sequence_logits(self.model, self.values, self.retain)
        with torch.no_grad():
            before, _ = sequence_logits(self.model, self.original, self.retain)
        return kl_divergence(logits, before).mean()


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
) -> Edit:
    """Fine-tune with `loss` and return the change as an edit.

    Args:
        only: the weights that may move, as masks by parameter; parameters that are not named stay. Every weight
            where not given.
        view: turns the trained parameters into those through which the model runs, e.g. fake-quantized ones.
        project: maps a parameter's whole change since the start to the change that is allowed, after every step.
        facts: further facts for the edit.

    Raises:
        MansuError: no weight may move.
        NoEditError: the loss is not finite (the learning rate is too high).
    """
    stored = plain(model)
    dtypes = {name: value.dtype for name, value in stored.named_parameters()}
    hf = stored if set(dtypes.values()) == {torch.float32} else float32_copy(model)
    original_values = {name: value.detach() for name, value in hf.named_parameters()}
    device = home(hf)
    free = {name: mask.to(device) for name, mask in (only or {}).items() if bool(mask.any())}
    if only is not None and not free:
        raise MansuError(f"{method}: no weight may move; widen its mask")
    values = {
        name: value.clone().requires_grad_() if only is None or name in free else value
        for name, value in original_values.items()
    }
    moving = {name: value for name, value in values.items() if value.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    task = task.to(device)
    draw_forget = Sampler(len(task.forget_pairs), settings.forget_batch, generator)
    draw_retain = retain_batches(task, settings.retain_batch, 0.25, generator)
    original = OriginalLogits(hf, original_values, task.forget_pairs)
    optimizer = torch.optim.AdamW(moving.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / settings.warmup))
    history: list[dict[str, float]] = []
    bar = tqdm(range(settings.max_steps), desc=method, unit="step", disable=not progress)
    for step in bar:
        if step % settings.check_every == 0:
            seen = view(values) if view else values
            score = _multiple_choice(stored, _rounded(seen, dtypes), task.forget_pairs)
            history.append({"step": float(step), "forget_mc": score})
            bar.set_postfix(forget_mc=f"{score:.0f}")
            if score <= task.forget_pairs.chance + settings.stop_over_chance:
                bar.close()
                break
        rows = draw_forget()
        seen = view(values) if view else values
        batch = Batch(hf, seen, original_values, task.forget_pairs[rows], rows, draw_retain(), original)
        value = loss(batch)
        if not torch.isfinite(value):
            raise NoEditError(
                f"{method}: the loss is {value.item()} at step {step}; lower learning_rate={settings.learning_rate}"
            )
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, current in moving.items():
                start = original_values[name]
                if name in free and not bool(free[name].all()):
                    current.copy_(torch.where(free[name], current, start))
                if project:
                    current.copy_(start + project(name, current - start))
    recorded = {"seed": seed, "settings": asdict(settings), "steps": int(history[-1]["step"]), **(facts or {})}
    return Edit.between(model, _rounded(moving, dtypes), method, recorded, tuple(history))


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
