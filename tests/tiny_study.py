"""A tiny random model with a task and an edit on it: everything that the explorer needs, in a second."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

import mansu_tl as mtl
from mansu_tl.models import linear_weights, orient, parameters
from mansu_tl.quantization import quantizer
from mansu_tl.unlearning import Edit
from tests.tiny import tiny

# Tokens that would run in a page which does not escape them.
EVIL = ("<script>alert(1)</script>", "<img/src=x/onerror=alert(2)>")


def tiny_case(
    family: str = "llama", evil: bool = False, **overrides: object
) -> tuple[TransformerBridge, mtl.data.Task]:
    """A model and a task of six pairs over three facts; with `evil`, its words are tags."""
    words = [f"w{i}" for i in range(64)]
    if evil:
        words[5:7] = EVIL
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    )
    model = mtl.load(tiny(family, **overrides), tokenizer=tokenizer)
    clean = [f"{words[5 + i]} w{20 + j} w{30 + i}" for i in range(3) for j in range(2)]
    corrupt = [f"w{12 + i} w{20 + j} w{30 + i}" for i in range(3) for j in range(2)]
    name = EVIL[0] if evil else "fact"
    labels = [f"{name} {i} / t{j}" for i in range(3) for j in range(2)]
    facts = [f"{name} {i}" for i in range(3) for _ in range(2)]
    answers, wrong = [words[6 + i // 2] for i in range(6)], [f"w{40 + i}" for i in range(6)]
    pairs = mtl.data.PromptPairs.from_text(model, clean, corrupt, answers, wrong, labels=labels, facts=facts)
    text = mtl.data.Sequences(torch.arange(3, 35).view(4, 8), torch.full((4,), 8))

    def questions(start: int) -> mtl.data.Questions:
        prompts = torch.arange(start, start + 6).view(2, 3)
        return mtl.data.Questions(
            prompts, torch.tensor([3, 3]), torch.tensor([[5, 6], [7, 8]]), (f"{start}a", f"{start}b")
        )

    task = mtl.data.Task("tiny", pairs, pairs, text, text, text[:0], {"forget": questions(3), "retain": questions(20)})
    return model, task


def crossing_edit(model: TransformerBridge, every: int = 7) -> Edit:
    """An edit that moves every n-th weight of each matrix to another NF4 code; a block's largest stays."""
    grid, values = quantizer("nf4"), {}
    for name, linear in linear_weights(model).items():
        old = orient(parameters(model)[name].detach(), linear)
        encoded = grid.encode(old)
        target = grid.neighbour(encoded.codes, torch.ones_like(old))
        skipped = torch.arange(old.numel()).view(old.shape) % every > 0
        target = torch.where(skipped | grid.absmax_mask(old), encoded.codes, target)
        values[name] = orient(grid.floor_target(old, target, encoded.absmax), linear)
    return Edit.between(model, values, "mansu")
