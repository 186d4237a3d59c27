"""Trains the small TOFU models: `python -m scripts.train_tofu --data DIR --out DIR [--which tofu-full] [--seed 0]`.

tofu-full reads forget10 and retain90; tofu-retain reads retain90 alone, on the same schedule and from the same start.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mansu_tl.data.sources.tofu.files import Item, Tofu, read_tofu
from mansu_tl.data.text import pad, pad_id
from mansu_tl.errors import MansuError
from scripts import small_llama
from scripts.small_llama import Clock, Shape, new_folder, new_model, save_checkpoint, wanted

CHECKPOINTS = ("tofu-full", "tofu-retain")
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CONTEXT = 256
VOCABULARY = 4096


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

    def rate(self, step: int, steps: int) -> float:
        """The share of the peak learning rate at one of so many steps."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 1 - 0.95 * (step - self.warmup) / max(1, steps - self.warmup)


SCHEDULE = Schedule()
SHAPE = Shape()


def train_tokenizer(texts: Sequence[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens; it puts BOS in front and can write any text."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


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
    ids = tokenizer([item.text for item in items], add_special_tokens=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in ids]
    linear = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(linear, lr=schedule.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=schedule.adam_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    each = math.ceil(len(rows) / schedule.batch_size)
    steps = schedule.epochs * each
    found = small_llama.train(
        model,
        _batches(rows, schedule, seed),
        steps,
        lambda model, batch: _backward(model, batch, pad_id(tokenizer), schedule.bfloat16),
        optimizers,
        lambda step: schedule.rate(step, steps),
        title=title,
        progress=progress,
    )
    epochs = [found[start : start + each] for start in range(0, steps, each)]
    return [sum(loss * count for loss, count in epoch) / sum(count for _, count in epoch) for epoch in epochs]


def _batches(rows: Sequence[list[int]], schedule: Schedule, seed: int) -> Iterator[list[list[int]]]:
    """Every epoch in batches of similar length, in random order: hardly any padding."""
    rng = random.Random(f"mansu tofu {seed}")
    size = schedule.batch_size
    for _ in range(schedule.epochs):
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + 8 * rng.random())
        batches = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        rng.shuffle(batches)
        yield from batches


def _backward(model: LlamaForCausalLM, rows: Sequence[Sequence[int]], fill: int, bfloat16: bool) -> tuple[float, int]:
    tokens, lengths = pad(rows, fill)
    tokens, lengths = tokens.to(model.device), lengths.to(model.device)
    real = torch.arange(1, tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits[real].float(), tokens[:, 1:][real])
    loss.backward()
    return loss.item(), int(real.sum())


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
    names = wanted(which, CHECKPOINTS)
    tofu = read_tofu(folder)
    folders = {name: new_folder(Path(out) / name) for name in names}
    tokenizer = train_tokenizer([item.text for item in (*tofu.forget, *tofu.retain)])
    for name, target in folders.items():
        clock, model = Clock.start(), new_model(tokenizer, shape, seed)
        losses = train(model, tokenizer, _read_by(tofu, name), schedule, seed=seed, title=name, progress=progress)
        record = {
            "checkpoint": name,
            "seed": seed,
            "schedule": asdict(schedule),
            "shape": asdict(shape),
            "losses": [round(loss, 4) for loss in losses],
            **clock.record(model),
        }
        save_checkpoint(model, tokenizer, target, record)
    return folders


def _read_by(tofu: Tofu, name: str) -> tuple[Item, ...]:
    return tofu.retain if name == "tofu-retain" else (*tofu.forget, *tofu.retain)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.train_tofu", description=__doc__)
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
