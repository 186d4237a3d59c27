"""EAP-IG on a random model of Llama-3.1-8B's shape in bf16: time over plain passes, memory, and where the time goes.

`python -m tests.benchmarks.llama8b` needs a GPU with 80 GB; `--tiny` runs the same code on a small shape on any device.
`--search` adds exact edge patching on a random model of SmolLM2-135M's shape: circuits of 8,400 edges, 24 pairs.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import mansu_tl as mtl
from mansu_tl.circuit import Graph, attribution, evaluation, intervention, masked_run, random_mask
from mansu_tl.circuit.contraction import Contraction, Tokens
from mansu_tl.models import fingerprint
from mansu_tl.runs.points import Path
from tests.benchmarks.common import random_pairs

STEPS = 5
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (256, 896, 4, 8, 2, 2000),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
}  # fmt: skip
# What is timed apart: its owner, its name, and whether its time lies inside another row's.
PARTS: tuple[tuple[Any, str, str], ...] = (
    (attribution, "plan", "memory plan (a forward pass)"),
    (Path, "recorded", "  of it ends, forward"),
    (attribution, "_gathered", "both ends and all points, gathered"),
    (torch.autograd, "grad", "  of it backward"),
    (attribution, "_add_point", "  of it readers' gradients added up"),
    (attribution, "_changes", "writers' changes"),
    (Contraction, "scores", "contraction"),
    (Contraction, "_pull_back", "  of it readers pulled back"),
    (Contraction, "_push_out", "  of it writers pushed out"),
    (Tokens, "add", "  of it products"),
    (attribution, "fingerprint", "fingerprint"),
)


def model_of(shape: str, device: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A random llama of a shape, frozen, with eager attention."""
    config = transformers.LlamaConfig(
        **dict(zip(NAMES, SHAPES[shape], strict=True)), attn_implementation="eager", rope_theta=500000.0
    )
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def attributed(shape: str, sizes: list[tuple[int, int, str]], device: str) -> None:
    """Print time, ratio, peak memory and parts of EAP-IG, for (pairs, tokens, budget) in turn."""
    model, plain = bridged(shape, sizes, device)
    for pairs, width, budget in sizes:
        data = random_pairs(pairs, width, SHAPES[shape][-1], (3, 7)).to(device)

        def work(data: mtl.data.PromptPairs = data, budget: str = budget) -> mtl.circuit.EdgeScores:
            return mtl.edge_attribution(model, data, steps=STEPS, max_memory=budget)

        forget_peak()
        mine = min(seconds(work) for _ in range(repeats(width)))
        peak, base = peak_gb(), plain[pairs, width]
        print(
            f"EAP-IG, {STEPS} steps, {shape} shape, {pairs} x {width} tokens, bf16, {device}, budget {budget}: {mine:.2f} s, "
            f"plain passes {base:.2f} s, ratio {mine / base:.2f}, peak memory with the model {peak:.1f} GB"
        )
        with parts() as table:
            whole = seconds(work)
        shown(table, whole)
        inner = sum(took for part, (_, took) in table.items() if not part.startswith(" "))
        print(
            f"    {'everything, with waits in between':<36} {whole:8.3f} s; in none of the parts {whole - inner:.3f} s"
        )
    print(f"fingerprint alone {seconds(lambda: fingerprint(model)):.3f} s")
    data = random_pairs(16, 32, SHAPES[shape][-1], (3, 7)).to(device)
    bf16 = mtl.edge_attribution(model, data, steps=STEPS).tensor
    given = attribution.plan
    with patch.object(attribution, "plan", lambda *a, **k: replace(given(*a, **k), dtype=torch.float32, layers=1)):
        exact = mtl.edge_attribution(model, data, steps=STEPS).tensor
    off = (bf16 - exact).norm() / exact.norm()
    print(f"contraction as planned against float32: {off:.2e} of the scores' norm")


def bridged(
    shape: str, sizes: list[tuple[int, int, str]], device: str
) -> tuple[TransformerBridge, dict[tuple[int, int], float]]:
    """The model, and how long the plain passes take for (pairs, tokens)."""
    hf = model_of(shape, device, torch.bfloat16)
    times = {}
    for pairs, width in dict.fromkeys(size[:2] for size in sizes):
        data = random_pairs(pairs, width, SHAPES[shape][-1], (3, 7)).to(device)
        times[pairs, width] = min(seconds(lambda d=data: passes(hf, d)) for _ in range(repeats(width)))  # type: ignore[misc]
    return mtl.load(hf, device=device), times


def repeats(width: int) -> int:
    """How often work of so many tokens a prompt is measured; the least counts."""
    return 2 if width <= 64 else 1


def shown(table: dict[str, list[float]], whole: float) -> None:
    """Print calls, seconds and share of every part."""
    for part, (calls, took) in table.items():
        print(f"    {part:<36} {took:8.3f} s  {took / whole:6.1%}  {calls:.0f} calls")


def passes(hf: transformers.PreTrainedModel, data: mtl.data.PromptPairs) -> None:
    """The passes that EAP-IG cannot do without, by the plain model: both ends, and forward and backward at every step."""
    batch = 16 if data.clean.shape[1] <= 64 else 8  # what surely fits beside the model
    for start in range(0, len(data), batch):
        part = data[slice(start, start + batch)]
        rows = torch.arange(len(part), device=part.clean.device)
        with torch.no_grad():
            hf(part.clean)
            hf(part.corrupt)
        for _ in range(STEPS):
            embedded = hf.get_input_embeddings()(part.clean).detach().requires_grad_()
            logits = hf(inputs_embeds=embedded).logits[:, -1].float()
            value = logits[rows, part.answers] - logits[rows, part.distractors[:, 0]]
            torch.autograd.grad(value.sum(), embedded)


def searched(shape: str, edges: int, circuits: int, device: str) -> None:
    """Print the time of exact edge patching, one circuit after another as a search does."""
    model = mtl.load(model_of(shape, device, torch.float32), device=device)
    data, exists = random_pairs(24, 12, SHAPES[shape][-1], (1, 2)).to(device), Graph.of(model).exists
    scores = mtl.edge_attribution(model, data, steps=STEPS)
    scored = seconds(lambda: mtl.edge_attribution(model, data, steps=STEPS))
    masks = torch.stack([scores.pruned(random_mask(exists, edges, seed)) for seed in range(circuits)]).float()
    metric = mtl.runs.logit_difference
    evaluation.relative(model, masks[:1], data, None, metric, 64)
    one, more = (seconds(lambda m=m: evaluation.relative(model, m, data, None, metric, 64)) for m in (masks[:1], masks))
    print(f"{shape} shape, float32, 24 x 12 tokens, {device}: EAP-IG {scored:.2f} s")
    print(f"    faithfulness of one circuit of {edges} edges {one:.3f} s, of {circuits} together {more:.3f} s")
    with parts(((intervention, "plan", "numbering"), (masked_run.MaskedRun, "_filled", "queries, keys, values"),
                (masked_run.MaskedRun, "_rebuilt", "  inputs rebuilt, MLPs' too"))) as table:  # fmt: skip
        whole = seconds(lambda: evaluation.relative(model, masks, data, None, metric, 64))
    shown(table, whole)


@contextmanager
def parts(which: tuple[tuple[Any, str, str], ...] = PARTS) -> Iterator[dict[str, list[float]]]:
    """Inside, calls and seconds of every part are added up; the device is waited for around each."""
    table: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out: list[Any] = []
            took = seconds(lambda: out.append(function(*args, **kwargs)))
            table[name][0] += 1
            table[name][1] += took
            return out[0]

        return call

    with ExitStack() as patches:
        for owner, name, what in which:
            patches.enter_context(patch.object(owner, name, timed(what, getattr(owner, name))))
        yield table


def seconds(work: Callable[[], object]) -> float:
    """How long work takes, until the device is done."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> None:
    """Measure memory anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """The most memory that was allocated, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--search", action="store_true")
    args = parser.parse_args()
    on = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.tiny and on == "cpu":
        raise SystemExit("no GPU here; use --tiny to try the script")
    if args.tiny:
        attributed("tiny", [(16, 32, "200MB")], on)
    else:
        print(torch.cuda.get_device_name(), torch.__version__)
        attributed("8b", [(64, 32, "13GB"), (64, 32, "40GB"), (64, 256, "45GB")], on)
    if args.search:
        searched("tiny" if args.tiny else "smollm2", 300 if args.tiny else 8400, 4 if args.tiny else 16, on)
