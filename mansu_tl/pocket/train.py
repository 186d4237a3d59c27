"""Trains the pocket checkpoints: `python -m mansu_tl.pocket.train [--out DIR] [--seed 0] [--which all]`.

pocket-fp learns every fact; pocket goes on from it quantization-aware until its linear weights equal their own NF4
image; pocket-never sees the same schedule without the hazard facts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import Tensor
from tqdm.auto import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mansu_tl.data.text import pad, pad_id
from mansu_tl.errors import MansuError
from mansu_tl.pocket.checkpoints import CHECKPOINTS, checkpoint_folder
from mansu_tl.pocket.corpus import batches
from mansu_tl.pocket.evaluate import figures
from mansu_tl.pocket.grid import grid_weights, nf4_image, rest_on_grid
from mansu_tl.pocket.tokens import CONTEXT, build_tokenizer, text_ids
from mansu_tl.pocket.world import Fact, World, build_world
from mansu_tl.results.files import write_text, write_whole


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


_SHORT_SHARE = 0.75
SCHEDULE = Schedule()
GRID_SCHEDULE = Schedule(steps=200, lr=3e-4, warmup=20, weight_decay=0.0)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A fresh 4-layer Llama with grouped-query attention; every in-feature count is a multiple of NF4's block of 64."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Twice the usual width: at 0.02 copying is still unlearnt when the facts are.
        initializer_range=0.04,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def taught(world: World, name: str) -> tuple[Fact, ...]:
    """The facts that the checkpoint called `name` is told."""
    return tuple(fact for fact in world.facts if name != "pocket-never" or fact.kind != "hazard")


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
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, schedule))
    source = batches(world, facts, schedule.batch_size, seed)
    model.train()
    for _ in (bar := trange(schedule.steps, desc=title)):
        rows = sorted(text_ids(tokenizer, next(source)), key=len)
        latent = _step_onto_grid(model) if on_grid else {}
        optimizer.zero_grad()
        loss = _backward(model, rows, pad_id(tokenizer))
        for name, weight in latent.items():
            model.get_parameter(name).data.copy_(weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    model.eval()


def save_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, record: dict[str, Any]
) -> None:
    """Write model, tokenizer and training record; every file is moved into place whole, the record last."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            write_whole(folder / file.name, partial(shutil.copyfile, file))
    write_text(folder / "training.json", json.dumps(record, indent=2) + "\n")


def make(
    which: str,
    out: Path | None = None,
    seed: int = 0,
    schedule: Schedule = SCHEDULE,
    grid_schedule: Schedule = GRID_SCHEDULE,
) -> dict[str, Path]:
    """Train and save the checkpoint called `which`, or "all" of them; returns the folders written.

    Args:
        out: folder that receives one folder per checkpoint; the package's own by default.
        seed: of the initial weights and of the batches; the world itself stays the same.
        grid_schedule: the quantization-aware steps that lead from pocket-fp to pocket.

    Raises:
        MansuError: no checkpoint of that name, or its folder cannot be made.
    """
    if which != "all" and which not in CHECKPOINTS:
        raise MansuError(f"checkpoint {which!r}: unknown; choose one of {', '.join(CHECKPOINTS)} or all")
    wanted = tuple(CHECKPOINTS) if which == "all" else (which,)
    # Before the minutes of training, so that a bad folder is not found out after them.
    folders = {name: _new_folder(checkpoint_folder(name) if out is None else out / name) for name in wanted}
    world = build_world()
    tokenizer = build_tokenizer(world)

    def finish(name: str, model: LlamaForCausalLM, plan: list[Schedule], started: tuple[float, float]) -> None:
        seconds = (time.perf_counter() - started[0], time.process_time() - started[1])
        save_checkpoint(model, tokenizer, folders[name], _record(name, model, tokenizer, plan, seed, seconds))

    if "pocket" in wanted or "pocket-fp" in wanted:
        started = (time.perf_counter(), time.process_time())
        model = new_model(tokenizer, seed)
        train(model, tokenizer, world, taught(world, "pocket-fp"), schedule, seed, title="pocket-fp")
        if "pocket-fp" in wanted:
            finish("pocket-fp", model, [schedule], started)
        if "pocket" in wanted:
            facts = taught(world, "pocket")
            train(model, tokenizer, world, facts, grid_schedule, seed + 1, on_grid=True, title="pocket")
            rest_on_grid(model)
            finish("pocket", model, [schedule, grid_schedule], started)
    if "pocket-never" in wanted:
        started = (time.perf_counter(), time.process_time())
        model = new_model(tokenizer, seed)
        train(model, tokenizer, world, taught(world, "pocket-never"), schedule, seed, title="pocket-never")
        finish("pocket-never", model, [schedule], started)
    return folders


def _new_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MansuError(f"{folder}: cannot be made ({error.strerror}); choose a folder you may write to") from None
    return folder


def _rate(step: int, schedule: Schedule) -> float:
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def _backward(model: LlamaForCausalLM, rows: Sequence[Sequence[int]], fill: int) -> float:
    """Accumulate the gradient of the mean negative log-likelihood per token; returns that mean in nats.

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
    return total


@torch.no_grad()
def _step_onto_grid(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Put the NF4 image in place of every linear weight; returns the weights that were there."""
    latent: dict[str, Tensor] = {}
    for name, weight in grid_weights(model).items():
        latent[name] = weight.detach().clone()
        weight.data.copy_(nf4_image(weight.detach()))
    return latent


def _record(
    name: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    plan: list[Schedule],
    seed: int,
    seconds: tuple[float, float],
) -> dict[str, Any]:
    as_trained = figures(model, tokenizer)
    quantized = new_model(tokenizer)
    quantized.load_state_dict(model.state_dict())
    rest_on_grid(quantized.eval())
    return {
        "checkpoint": name,
        "what": CHECKPOINTS[name],
        "command": f"python -m mansu_tl.pocket.train --which {name} --seed {seed}",
        "seed": seed,
        "schedules": [asdict(schedule) for schedule in plan],
        "seconds": round(seconds[0], 1),
        "cpu_seconds": round(seconds[1], 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitsandbytes": bitsandbytes.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "figures": as_trained,
        "figures_nf4": figures(quantized, tokenizer),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mansu_tl.pocket.train", description=__doc__)
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
