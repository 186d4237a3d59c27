"""How many pairs and tokens fit: batch sizes from a memory budget.

What autograd keeps for the backward pass is counted, not guessed: a forward pass over one pair, with every saved tensor's
storage added up. What this package keeps beside it is known from the shapes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mansu_tl.data import PromptPairs
from mansu_tl.data.forced import Forced
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.models.state import computing_dtype, home
from mansu_tl.runs.passes import run

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Pairs in a batch and tokens in a contraction when memory is no concern: more gain nothing.
MOST_PAIRS = 64
MOST_TOKENS, MOST_TOKENS_ON_GPU = 32, 256
# Layers whose readers share a product, so that a GPU does not wait for what is written to be read again for each.
_LAYERS_ON_GPU = 4
# What a device could multiply while a layer's forward and backward are set up, per parameter of the layer and by whether it
# is a GPU (measured on a CPU: a pass through SmolLM2 costs what 45 of its tokens cost).
_PASS_WORK = {False: 1.6e8, True: 2e11}
# Without a budget: this share of what is free. Allocators and temporary tensors need the rest.
_SHARE_OF_FREE = 0.5
# What passes through forward and backward beside what is counted: measured 1.4-1.55 of it on CPUs (llama, gemma3, gpt2),
# 1.15 on an H100 (llama of 8 B in bf16), where logits and norms' copies are small beside the rest; by whether it is a GPU.
_PASSING = {False: 1.6, True: 1.25}


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        pairs: pairs in a batch.
        tokens: tokens in a contraction.
        pass_tokens: how many tokens cost what a pass costs whatever is in it.
        layers: layers whose readers are contracted at one time.
        together: points of the path in a pass.
        dtype: of the contraction's operands: bfloat16 where a model computes in it on a GPU, else float32.
    """

    pairs: int
    tokens: int
    pass_tokens: float = 0.0
    layers: int = 1
    dtype: torch.dtype = torch.float32
    together: int = 1


def plan(
    model: TransformerBridge,
    pairs: Forced[PromptPairs],
    steps: int,
    *,
    max_memory: str | int | None = None,
    batch_size: int | None = None,
) -> Plan:
    """How to cut the work so that it stays within `max_memory` beside the model.

    Args:
        max_memory: "4GB", "500MB", "2GiB" or bytes; None = half of what is free on the model's device.
        batch_size: pairs in a batch, if you would rather say it yourself.
    """
    # Tokens of all the rows that are run for a pair.
    anatomy, width = Anatomy.of(model), pairs.clean.shape[1] * -(-len(pairs.clean) // len(pairs))
    most = min(MOST_PAIRS if batch_size is None else batch_size, len(pairs))
    if most < 1:
        raise MansuError(f"batch_size={batch_size}: at least one pair has to fit in a batch")
    budget = _bytes(max_memory) if max_memory is not None else _SHARE_OF_FREE * free_bytes(model)
    on_gpu, dtype = home(model).type == "cuda", computing_dtype(model)
    layers, most_tokens = (_LAYERS_ON_GPU, MOST_TOKENS_ON_GPU) if on_gpu else (1, MOST_TOKENS)
    operand = dtype if on_gpu and dtype is torch.bfloat16 else torch.float32
    pass_tokens = _PASS_WORK[on_gpu] / _layer_parameters(anatomy)

    def cut(count: int, tokens: int) -> Plan:
        """The plan where so many pairs fit."""
        taken = min(most, count)
        together = max(1, min(steps, count // taken, int(pass_tokens / (taken * width))))
        return Plan(taken, tokens, pass_tokens, layers, operand, together)

    if max_memory is None and _rough(anatomy, width) * most < budget / 4:
        return cut(int(budget / 4 / _rough(anatomy, width)), most_tokens)
    kept = width * _kept_bytes(anatomy, steps, dtype.itemsize, operand.itemsize)
    per_pair = _PASSING[on_gpu] * (_saved(model, pairs[:1]) + kept)
    per_token = _contraction_bytes(anatomy, layers, operand.itemsize)
    # One layer's projections, as float32 and once more laid out for a product.
    fixed = 8.0 * (anatomy.n_heads + anatomy.n_attention_readers) * anatomy.d_head * anatomy.d_model
    least = fixed + per_pair + per_token
    if least > budget:
        raise MansuError(
            f"max_memory={max_memory if max_memory is not None else _text(budget)}: one pair of {width} tokens needs "
            f"{_text(least)} beside the model; raise it to that, or shorten the prompts"
        )
    # The gathered sums stay while the contraction runs, the graph does not; on a CPU taking both at once leaves a margin.
    tokens = max(1, min(most_tokens, int(budget / 4 / per_token)))
    count = (budget - fixed - tokens * per_token) // per_pair
    if on_gpu:
        count = min((budget - fixed) // per_pair, (budget - fixed - tokens * per_token) // (_PASSING[True] * kept))
    count = max(1, int(count))
    return cut(count, tokens)


def _kept_bytes(anatomy: Anatomy, steps: int, wide: int = 4, operand: int = 4) -> float:
    """Per token: both ends of the writers, the readers' sums over the steps, and the gradients of one.

    Args:
        wide: bytes of a number in the model.
        operand: bytes of a number in the contraction.
    """
    readers = anatomy.n_attention_readers
    parts = 1 if not anatomy.post_norms else steps
    ends = 2 * (anatomy.n_heads * anatomy.d_head + anatomy.d_model) + readers * anatomy.d_head + 2 * anatomy.d_model
    sums = 4 * (readers * anatomy.d_head + anatomy.d_model) + (steps // parts) * (
        operand * anatomy.d_model + 4 * readers
    )
    raw = 4 * anatomy.d_model if anatomy.post_norms else 0
    return float(anatomy.n_layers * (wide * ends + parts * (sums + raw)))


def _contraction_bytes(anatomy: Anatomy, layers: int = 1, operand: int = 4) -> float:
    """Per token: every writer's change, some layers' gradients, and as much again for the product's operands."""
    return 2.0 * operand * (len(anatomy.writers) + layers * (anatomy.n_attention_readers + 1) + 1) * anatomy.d_model


def _layer_parameters(anatomy: Anatomy) -> int:
    heads = anatomy.n_attention_readers + anatomy.n_heads
    return anatomy.d_model * (heads * anatomy.d_head + 3 * anatomy.d_mlp)


def _rough(anatomy: Anatomy, width: int) -> float:
    """An upper estimate per pair, only to see when there is nothing to count."""
    layer = 60 * anatomy.d_model + 20 * anatomy.d_mlp + 8 * anatomy.n_heads * width
    return 4.0 * width * anatomy.n_layers * layer + width * (_kept_bytes(anatomy, 8) + _contraction_bytes(anatomy))


def _saved(model: TransformerBridge, pairs: Forced[PromptPairs]) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.original_model.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def start(stream: Tensor, hook: object) -> Tensor:
        return stream.detach().requires_grad_()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # The logits hold the graph, so no storage is freed and counted twice while it is built.
        logits = run(model, pairs.clean, pairs.places, [(Anatomy.of(model).hook("stream", 0), start)])
        del logits
    return sum(sizes.values())


def free_bytes(model: TransformerBridge) -> float:
    """What is free on the model's device."""
    device = next(model.original_model.parameters()).device
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def _bytes(value: str | int) -> float:
    amount = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(value))
    if amount is None or amount[2].upper() not in _UNITS or float(amount[1]) <= 0:
        raise MansuError(f'max_memory={value!r}: cannot be read; write "4GB", "500MB", "2GiB" or a number of bytes')
    return float(amount[1]) * _UNITS[amount[2].upper()]


def _text(amount: float) -> str:
    unit = max((u for u in ("B", "KB", "MB", "GB", "TB") if _UNITS[u] <= max(amount, 1)), key=lambda u: _UNITS[u])
    shown = math.ceil(10 * amount / _UNITS[unit]) / 10
    return f"{shown:g}{unit}"
