"""What the benchmarks share: a GPT-2-small-sized random model, random pairs, timing side by side, peak memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psutil
import torch
import transformers

import mansu_tl as mtl


def gpt2_small(seed: int = 0) -> transformers.PreTrainedModel:
    """A random GPT-2 of the size of "gpt2" (124 M parameters), eager attention, frozen."""
    torch.manual_seed(seed)
    return (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation="eager")).eval().requires_grad_(False)
    )


def random_pairs(n: int, width: int, vocab: int, changed: tuple[int, ...], seed: int = 0) -> mtl.data.PromptPairs:
    """Pairs of random tokens that differ at the `changed` positions."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, vocab, (n, width), generator=generator)
    corrupt = clean.clone()
    for position in changed:
        corrupt[:, position] = torch.randint(5, vocab, (n,), generator=generator)
    labels = torch.stack([torch.randperm(vocab, generator=generator)[:2] for _ in range(n)])
    return mtl.data.PromptPairs.from_tokens(clean, corrupt, labels[:, 0], labels[:, 1])


def side_by_side(first: Callable[[], object], second: Callable[[], object], repeats: int = 4) -> tuple[float, float]:
    """The least seconds of each, taken in turns so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for work, seconds in zip((first, second), times, strict=True):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def extra_peak_mb(work: Callable[[], object]) -> float:
    """How far the process's resident memory rises over its level before `work`, in MB (10^6 bytes)."""
    process, stop = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return (max(peak, process.memory_info().rss) - before) / 1e6
