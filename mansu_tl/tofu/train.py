"""Trains the small TOFU models: `python -m mansu_tl.tofu.train --data DIR --out DIR [--which full] [--seed 0]`.

tofu-full reads forget10 and retain90; tofu-retain reads retain90 alone, on the same schedule and from the same start.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mansu_tl.data.text import pad, pad_id
from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text, write_whole
from mansu_tl.tofu.data import Item, Tofu, read_tofu
from mansu_tl.tofu.tokens import CONTEXT, train_tokenizer

CHECKPOINTS = ("tofu-full", "tofu-retain")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the text.
        batch_size: texts a step, of similar length.
        muon_rate: peak learning rate of Muon, which trains the linear layers (it learns TOFU by heart in about half
            of AdamW's passes); linear warm-up, then linearly down to a twentieth.
        adam_rate: the same of AdamW, which trains embeddings and norms.
        warmup: steps of linear warm-up.
        bfloat16: run the matrix products in bfloat16; the weights stay fp32.
    """

    epochs: int = 12
    batch_size: int = 16
    muon_rate: float = 0.03
    adam_rate: float = 6e-3
    warmup: int = 40
    bfloat16: bool = True


@dataclass(frozen=True)
class Shape:
    """Sizes of the Llama; every in-feature count must be a multiple of NF4's block of 64."""

    hidden: int = 128
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2


SCHEDULE = Schedule()
SHAPE = Shape()


def new_model(tokenizer: PreTrainedTokenizerFast, shape: Shape = SHAPE, seed: int = 0) -> LlamaForCausalLM:
    """A fresh small Llama with grouped-query attention; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def text_ids(tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> list[list[int]]:
    """Token ids of question and answer, between BOS and EOS as in training."""
    rows = tokenizer([item.text for item in items], add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    schedule: Schedule = SCHEDULE,
    *,
    seed: int = 0,
    title: str = "training",
    progress: bool = True,
) -> list[float]:
    """Train `model` in place on questions and answers; returns the mean loss of every epoch in nats per token."""
    rows = text_ids(tokenizer, items)
    linear = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(linear, lr=schedule.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=schedule.adam_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    steps = schedule.epochs * math.ceil(len(rows) / schedule.batch_size)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: _rate(s, steps, schedule.warmup)) for o in optimizers]
    rng = random.Random(f"mansu tofu {seed}")
    losses = []
    model.train()
    with tqdm(total=steps, desc=title, unit="step", disable=not progress) as bar:
        for _ in range(schedule.epochs):
            total = asked = 0.0
            for batch in _batches(rows, schedule.batch_size, rng):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss, count = _loss(model, batch, pad_id(tokenizer), schedule.bfloat16)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                    optimizer.step()
                    scheduler.step()
                total, asked = total + loss.item() * count, asked + count
                bar.update()
            losses.append(total / asked)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


def train_tofu(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    which: str = "all",
    *,
    seed: int = 0,
    schedule: Schedule = SCHEDULE,
    shape: Shape = SHAPE,
    progress: bool = True,
) -> dict[str, Path]:
    """Train and save the small TOFU models as ordinary Hugging Face folders, which `mansu_tl.load` reads.

    Both share one tokenizer, trained on all the text, so that their answers can be compared token by token.

    Args:
        folder: TOFU's files.
        out: receives one folder per model.
        which: "tofu-full", "tofu-retain" or "all".
        seed: of the initial weights and the batches; the same seed gives the same model on the same machine.

    Returns:
        The folders written, by name.

    Raises:
        MansuError: no model of that name, TOFU's files are incomplete, or `out` cannot be made.
    """
    if which != "all" and which not in CHECKPOINTS:
        raise MansuError(f"TOFU model {which!r}: unknown; choose one of {', '.join(CHECKPOINTS)} or all")
    tofu = read_tofu(folder)
    folders = {name: _new_folder(Path(out) / name) for name in (CHECKPOINTS if which == "all" else (which,))}
    tokenizer = train_tokenizer([item.text for item in (*tofu.forget, *tofu.retain)])
    for name, target in folders.items():
        started = time.perf_counter(), time.process_time()
        model = new_model(tokenizer, shape, seed)
        losses = train(model, tokenizer, _read_by(tofu, name), schedule, seed=seed, title=name, progress=progress)
        record = {
            "checkpoint": name,
            "seed": seed,
            "schedule": asdict(schedule),
            "shape": asdict(shape),
            "parameters": sum(p.numel() for p in model.parameters()),
            "losses": [round(loss, 4) for loss in losses],
            "seconds": round(time.perf_counter() - started[0], 1),
            "cpu_seconds": round(time.process_time() - started[1], 1),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        _save(model, tokenizer, target, record)
    return folders


def _read_by(tofu: Tofu, name: str) -> tuple[Item, ...]:
    return tofu.retain if name == "tofu-retain" else (*tofu.forget, *tofu.retain)


def _batches(rows: Sequence[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    """One epoch in batches of similar length, in random order: hardly any padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + 8 * rng.random())
    batches = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def _loss(
    model: LlamaForCausalLM, rows: Sequence[Sequence[int]], fill: int, bfloat16: bool
) -> tuple[torch.Tensor, int]:
    tokens, lengths = pad(rows, fill)
    tokens, lengths = tokens.to(model.device), lengths.to(model.device)
    real = torch.arange(1, tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[real].float(), tokens[:, 1:][real])
    return loss, int(real.sum())


def _rate(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.95 * (step - warmup) / max(1, steps - warmup)


def _new_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MansuError(f"{folder}: cannot be made ({error.strerror}); choose a folder you may write to") from None
    return folder


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, record: dict[str, Any]) -> None:
    """Write model, tokenizer and training record; every file is moved into place whole, the record last."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            write_whole(folder / file.name, partial(shutil.copyfile, file))
    write_text(folder / "training.json", json.dumps(record, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mansu_tl.tofu.train", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model folders")
    parser.add_argument("--which", choices=[*CHECKPOINTS, "all"], default="all", help="model to train")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the batches")
    parser.add_argument("--epochs", type=int, default=SCHEDULE.epochs, help="passes over the text")
    options = parser.parse_args(arguments)
    try:
        schedule = Schedule(epochs=options.epochs)
        folders = train_tofu(options.data, options.out, options.which, seed=options.seed, schedule=schedule)
    except MansuError as error:
        parser.exit(2, f"{error}\n")
    parser.exit(0, "".join(f"{name}: written to {folder}\n" for name, folder in folders.items()))


if __name__ == "__main__":
    main()
