"""EAP-IG on a random model of Llama-3.1-8B's shape in bf16: time over plain passes, memory, the fingerprint's share.

`python -m tests.benchmarks.llama8b` needs a GPU with 60 GB; `--tiny` runs the same code on a small shape on any device.
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers

import mansu_tl as mtl
from mansu_tl.models import fingerprint
from tests.benchmarks.common import random_pairs

STEPS = 5


def main(tiny: bool, pairs: int, width: int) -> None:
    """Print one line of figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not tiny and device == "cpu":
        raise SystemExit("no GPU here; use --tiny to try the script")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes, vocab = ((256, 896, 4, 8, 2), 2000) if tiny else ((4096, 14336, 32, 32, 8), 128256)
    shape = dict(zip(names, sizes, strict=True)) | {"vocab_size": vocab}
    config = transformers.LlamaConfig(**shape, attn_implementation="eager", rope_theta=500000.0)
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        hf = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(before)
    data = random_pairs(pairs, width, vocab, (3, 7)).to(device)
    lines = torch.arange(pairs, device=device)

    def plain(batch: int = 16) -> None:
        for start in range(0, pairs, batch):
            part, rows = data[slice(start, start + batch)], lines[: min(batch, pairs - start)]
            with torch.no_grad():
                hf(part.clean)
                hf(part.corrupt)
            for _ in range(STEPS):
                embedded = hf.get_input_embeddings()(part.clean).detach().requires_grad_()
                logits = hf(inputs_embeds=embedded).logits[:, -1].float()
                value = logits[rows, part.answers] - logits[rows, part.distractors[:, 0]]
                torch.autograd.grad(value.sum(), embedded)

    plain()
    base = _seconds(plain)
    model = mtl.load(hf, device=device)
    hf = None  # the plain model's memory
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    budget = "200MB" if tiny else "40GB"
    mtl.edge_attribution(model, data, steps=STEPS, max_memory=budget)
    mine = _seconds(lambda: mtl.edge_attribution(model, data, steps=STEPS, max_memory=budget))
    once = _seconds(lambda: fingerprint(model))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    print(
        f"EAP-IG, {STEPS} steps, {sizes[2]} layers x {sizes[0]}, {pairs} x {width} tokens, bf16, {device}: "
        f"{mine:.2f} s, plain passes {base:.2f} s, ratio {mine / base:.2f}, peak memory with the model {peak:.1f} GB, "
        f"fingerprint {once:.3f} s ({once / mine:.1%} of an attribution)"
    )


def _seconds(work: object) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()  # type: ignore[operator]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args()
    main(args.tiny, args.pairs, args.width)
