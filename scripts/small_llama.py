"""What the trainers of small Llamas share: the model, one loop, the folder it is saved to."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import bitsandbytes
import torch
import transformers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mansu_tl.errors import MansuError
from mansu_tl.results.files import write_text, write_whole

B = TypeVar("B")


@dataclass(frozen=True)
class Shape:
    """Sizes of the Llama; every in-feature count must be a multiple of NF4's block of 64."""

    hidden: int = 128
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    spread: float = 0.02  # of the initial weights


def new_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int = 0) -> LlamaForCausalLM:
    """A fresh small Llama with grouped-query attention; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=shape.spread,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    batches: Iterable[B],
    steps: int,
    backward: Callable[[LlamaForCausalLM, B], tuple[float, int]],
    optimizers: Sequence[torch.optim.Optimizer],
    rate: Callable[[int], float],
    *,
    title: str = "training",
    progress: bool = True,
) -> list[tuple[float, int]]:
    """Train `model` in place, a batch a step; returns every step's mean loss in nats and the tokens that it is over.

    Args:
        backward: accumulates a batch's gradient and returns its loss and tokens.
        rate: the share of the peak learning rate at a step.
    """
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    losses = []
    model.train()
    with tqdm(total=steps, desc=title, unit="step", disable=not progress) as bar:
        for _, batch in zip(range(steps), batches, strict=False):
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.append(backward(model, batch))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            bar.update()
            bar.set_postfix(loss=f"{losses[-1][0]:.3f}", refresh=False)
    model.eval()
    return losses


def wanted(which: str, known: Iterable[str]) -> tuple[str, ...]:
    """The models to train: one, or "all".

    Raises:
        MansuError: no model of that name.
    """
    known = tuple(known)
    if which != "all" and which not in known:
        raise MansuError(f"checkpoint {which!r}: unknown; choose one of {', '.join(known)} or all")
    return known if which == "all" else (which,)


def new_folder(folder: Path) -> Path:
    """The folder, made.

    Raises:
        MansuError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MansuError(f"{folder}: cannot be made ({error.strerror}); choose a folder you may write to") from None
    return folder


@dataclass(frozen=True)
class Clock:
    """When training began, by the wall and by the CPU."""

    wall: float
    cpu: float

    @classmethod
    def start(cls) -> Clock:
        """Now."""
        return cls(time.perf_counter(), time.process_time())

    def record(self, model: LlamaForCausalLM) -> dict[str, Any]:
        """What every training record says of size, time and versions."""
        return {
            "seconds": round(time.perf_counter() - self.wall, 1),
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, bitsandbytes)},
        }


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
