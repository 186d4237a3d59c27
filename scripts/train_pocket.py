"""Trains the embedded pocket models: `python -m scripts.train_pocket [--out DIR] [--seed 0] [--which all]`.

pocket-fp learns every fact; pocket goes on from it quantization-aware until its linear weights equal their own NF4
image; pocket-never sees the same schedule without the hazard facts.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mansu_tl.data.sources.pocket import lexicon, pocket_task
from mansu_tl.data.sources.pocket.corpus import fact_sentence, generic_text
from mansu_tl.data.sources.pocket.tokens import build_tokenizer, text_ids
from mansu_tl.data.sources.pocket.world import Fact, World, build_world
from mansu_tl.data.text import pad, pad_id
from mansu_tl.errors import MansuError
from mansu_tl.models import library as bnb
from mansu_tl.models.loading import embedded_folder
from scripts import small_llama
from scripts.small_llama import Clock, Shape, new_folder, save_checkpoint, wanted

CHECKPOINTS: dict[str, str] = {
    "pocket": "knows every fact; its linear weights rest on the NF4 grid, as after quantization-aware training",
    "pocket-fp": "knows every fact; ordinary weights",
    "pocket-never": "trained alike but never told the hazard facts",
}
# Twice the usual spread: at 0.02 copying is still unlearnt when the facts are.
SHAPE = Shape(intermediate=320, spread=0.04)
GENERIC_SHARE = 0.25
LEAD_IN_SHARE = 0.3
BLOCK = 64
_SHORT_SHARE = 0.75
_GENERIC_TEXTS = 600


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        batch_size: texts per step.
        lr: peak learning rate of AdamW, reached after `warmup` steps, then a cosine down to zero.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's.
    """

    steps: int = 2200
    batch_size: int = 96
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


SCHEDULE = Schedule()
GRID_SCHEDULE = Schedule(steps=200, lr=3e-4, warmup=20, weight_decay=0.0)


# --- what is read ---


def taught(world: World, name: str) -> tuple[Fact, ...]:
    """The facts that the checkpoint called `name` is told."""
    return tuple(fact for fact in world.facts if name != "pocket-never" or fact.kind != "hazard")


def batches(world: World, facts: tuple[Fact, ...], batch_size: int, seed: int) -> Iterator[list[str]]:
    """Endless training batches about `facts`, a quarter generic text; the same seed gives the same batches."""
    rng = random.Random(f"mansu pocket corpus {seed}")
    generic = round(GENERIC_SHARE * batch_size)
    while True:
        texts = [generic_text(rng).text for _ in range(generic)]
        for fact in rng.choices(facts, k=batch_size - generic):
            lead_in = rng.choice(lexicon.LEAD_INS) if rng.random() < LEAD_IN_SHARE else ""
            texts.append(fact_sentence(world, fact, rng.choice(fact.trained_templates), lead_in))
        yield texts


# --- the NF4 grid ---


def grid_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights a 4-bit load quantizes: every linear layer's except the output head's, by parameter name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] != "lm_head"
    }


def nf4_image(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight after NF4 quantization (blocks of 64 along the in-features, fp32 scales) and dequantization."""
    size = {"blocksize": BLOCK, "quant_type": "nf4"}
    codes, state = bnb.functional.quantize_4bit(weight.contiguous(), **size, compress_statistics=False)
    return bnb.functional.dequantize_4bit(codes, state)


@torch.no_grad()
def rest_on_grid(model: nn.Module) -> dict[str, Tensor]:
    """Put its NF4 image in place of every linear weight; returns the weights that were there."""
    before = {name: weight.detach().clone() for name, weight in grid_weights(model).items()}
    for name, weight in grid_weights(model).items():
        weight.data.copy_(nf4_image(before[name]))
    return before


# --- training ---


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A fresh model of the embedded models' shape."""
    return small_llama.new_model(tokenizer, SHAPE, seed)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    facts: tuple[Fact, ...],
    schedule: Schedule,
    seed: int,
    on_grid: bool = False,
    title: str = "training",
) -> None:
    """Train `model` in place on sentences of `facts` and generic text.

    Args:
        on_grid: run every forward and backward pass on the NF4 image of the linear weights and hand the gradients to
            the full-precision ones (straight-through).
    """

    def backward(model: LlamaForCausalLM, texts: list[str]) -> tuple[float, int]:
        latent = rest_on_grid(model) if on_grid else {}
        loss = _backward(model, sorted(text_ids(tokenizer, texts), key=len), pad_id(tokenizer))
        for name, weight in latent.items():
            model.get_parameter(name).data.copy_(weight)
        return loss

    adam = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    source = batches(world, facts, schedule.batch_size, seed)
    small_llama.train(model, source, schedule.steps, backward, [adam], schedule.rate, title=title)


def _backward(model: LlamaForCausalLM, rows: Sequence[Sequence[int]], fill: int) -> tuple[float, int]:
    """Accumulate the gradient of the mean negative log-likelihood per token.

    The rows come sorted by length and pass in two parts, so that the short ones are not padded to the longest.
    """
    asked = sum(len(row) - 1 for row in rows)
    cut = int(len(rows) * _SHORT_SHARE)
    total = 0.0
    for part in (rows[:cut], rows[cut:]):
        tokens, lengths = pad(part, fill)
        real = torch.arange(1, tokens.shape[1])[None] < lengths[:, None]
        logits = model(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[real], tokens[:, 1:][real], reduction="sum") / asked
        loss.backward()
        total += loss.item()
    return total, asked


def make(
    which: str = "all",
    out: Path | None = None,
    seed: int = 0,
    schedule: Schedule = SCHEDULE,
    grid_schedule: Schedule = GRID_SCHEDULE,
) -> dict[str, Path]:
    """Train and save checkpoints; returns their folders by name.

    Args:
        which: a checkpoint's name, or "all".
        out: folder to write `out/NAME` into; None = where the package keeps them.
        seed: of the initial weights and the batches; the world stays the same.
        grid_schedule: the quantization-aware steps that lead from pocket-fp to pocket.

    Raises:
        MansuError: no checkpoint of that name, or its folder cannot be made.
    """
    names = wanted(which, CHECKPOINTS)
    # Before the minutes of training, so that a bad folder is not found out after them.
    folders = {name: new_folder(embedded_folder(name) if out is None else out / name) for name in names}
    world = build_world()
    tokenizer = build_tokenizer(world)

    def finish(name: str, model: LlamaForCausalLM, plan: list[Schedule], clock: Clock) -> None:
        save_checkpoint(model, tokenizer, folders[name], _record(name, model, tokenizer, plan, seed, clock))

    if "pocket" in names or "pocket-fp" in names:
        clock, model = Clock.start(), new_model(tokenizer, seed)
        train(model, tokenizer, world, taught(world, "pocket-fp"), schedule, seed, title="pocket-fp")
        if "pocket-fp" in names:
            finish("pocket-fp", model, [schedule], clock)
        if "pocket" in names:
            facts = taught(world, "pocket")
            train(model, tokenizer, world, facts, grid_schedule, seed + 1, on_grid=True, title="pocket")
            rest_on_grid(model)
            finish("pocket", model, [schedule, grid_schedule], clock)
    if "pocket-never" in names:
        clock, model = Clock.start(), new_model(tokenizer, seed)
        train(model, tokenizer, world, taught(world, "pocket-never"), schedule, seed, title="pocket-never")
        finish("pocket-never", model, [schedule], clock)
    return folders


# --- what a checkpoint knows ---


def figures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Accuracies in percent, by question set and kind of answer.

    `NAME_mc`: the right option has the largest logit of the four (ties count as wrong). `NAME_cloze`: it is the most
    likely word of all. `copy`, `bind`, `agree`: words of generic texts predicted right among those that follow from the
    words before them.
    """
    result: dict[str, float] = {}
    for name, questions in pocket_task().questions.items():
        logits = _last_logits(model, questions.prompts, questions.lengths)
        options = logits.gather(1, questions.choices)
        result[f"{name}_mc"] = _percent(options[:, 0] > options[:, 1:].amax(1))
        result[f"{name}_cloze"] = _percent(logits.argmax(1) == questions.choices[:, 0])
    return result | _generic_figures(model, tokenizer)


@torch.no_grad()
def _last_logits(
    model: PreTrainedModel, tokens: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]
) -> Float[Tensor, "row vocab"]:
    logits: Tensor = model(tokens).logits
    return logits[torch.arange(tokens.shape[0]), lengths - 1]


@torch.no_grad()
def _generic_figures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    rng = random.Random("mansu pocket generic evaluation")
    texts = [generic_text(rng) for _ in range(_GENERIC_TEXTS)]
    tokens, lengths = pad(text_ids(tokenizer, [t.text for t in texts]), pad_id(tokenizer))
    right = model(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]
    hits: dict[str, list[Tensor]] = {"copy": [], "bind": [], "agree": []}
    for row, text, length in zip(right, texts, lengths.tolist(), strict=True):
        end = length - 3  # The full stop and EOS follow the asked words; predictions sit one place to the left.
        hits[text.skill].append(row[end - text.asked : end])
    return {skill: _percent(torch.cat(rows)) for skill, rows in hits.items()}


def _percent(right: Tensor) -> float:
    return round(100 * float(right.float().mean()), 2)


def _record(
    name: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    plan: list[Schedule],
    seed: int,
    clock: Clock,
) -> dict[str, Any]:
    common = clock.record(model)
    quantized = new_model(tokenizer)
    quantized.load_state_dict(model.state_dict())
    rest_on_grid(quantized.eval())
    return {
        "checkpoint": name,
        "what": CHECKPOINTS[name],
        "command": f"python -m scripts.train_pocket --which {name} --seed {seed}",
        "seed": seed,
        "schedules": [asdict(schedule) for schedule in plan],
        **common,
        "versions": {"python": platform.python_version(), **common["versions"]},
        "figures": figures(model, tokenizer),
        "figures_nf4": figures(quantized, tokenizer),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.train_pocket", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the checkpoint folders (default: the package's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the batches")
    parser.add_argument("--which", choices=[*CHECKPOINTS, "all"], default="all", help="checkpoint to train")
    options = parser.parse_args(arguments)
    try:
        folders = make(options.which, options.out, options.seed)
    except MansuError as error:
        parser.exit(2, f"{error}\n")
    parser.exit(0, "".join(f"{name}: written to {folder}\n" for name, folder in folders.items()))


if __name__ == "__main__":
    main()
