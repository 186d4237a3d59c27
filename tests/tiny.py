"""Small things to test with: random HF models, one of each supported family, and slices of the embedded task."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mansu_tl import load_task
from mansu_tl.data import Task

# 30 facts to forget, 8 near and 20 far ones to keep, each in one wording and a held-out one: what runs use that go all the
# way. Lines of the embedded task, so that its models know them.
SMALL_TASK = str(Path(__file__).parent / "data" / "small_pocket.jsonl")

FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2")

_CLASSES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "mistral": ("MistralForCausalLM", "MistralConfig"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config"),
}


def tiny(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model: 2 layers, d_model 32, 4 heads of 8 (2 KV heads where the family has them), vocabulary 64.

    Norm weights and biases are random too, so that mixing them up shows. The global random state is left alone.
    """
    options: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gpt2":
        options["n_inner"] = 48
    else:
        options["intermediate_size"] = 48
    if family not in ("gpt2", "gpt_neox"):
        options |= {"num_key_value_heads": 2, "head_dim": 8}
    if family.startswith("gemma"):
        options["query_pre_attn_scalar"] = 8
    model_class, config_class = (getattr(transformers, name) for name in _CLASSES[family])
    config = config_class(**(options | overrides))
    config.architectures = [model_class.__name__]  # as saved checkpoints have it; TransformerLens asks for it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(vocab_size: int = 64) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the words w0, w1, ...: w0 pads and stands for the unknown, w1 begins, w2 ends."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    )


def lettered_tokenizer() -> PreTrainedTokenizerFast:
    """The same with A, B, C and D in the places of w60 to w63."""
    inner = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(60)} | dict(zip("ABCD", range(60, 64), strict=True)), "w0")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    )


@functools.cache
def embedded_task() -> Task:
    """The embedded task, read once a process."""
    return load_task("pocket")


def crossed(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Each of `first` with each of `second`: beyond the first of `second`, all but two of `first` in make slow."""
    return [
        pytest.param(a, b, marks=[] if j == 0 or i in (0, len(first) - 1) else pytest.mark.slow)
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
    ]


def some(values: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """All of them, those that are not kept in make slow."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def sliced_task(pairs: int, *, retain: int | None = None, questions: int = 24) -> Task:
    """The first rows of the embedded task: enough to run every line, not enough to judge a method by.

    `pairs` forget pairs and as many near sequences, `retain` retain sequences; without `retain` all text stays.
    """
    full = embedded_task()
    text = {} if retain is None else {"retain_text": full.retain_text[:retain], "near_text": full.near_text[:pairs]}
    return replace(
        full,
        forget_pairs=full.forget_pairs[:pairs],
        questions={name: asked[:questions] for name, asked in full.questions.items()},
        **text,
    )
