"""How EAP-IG grows with the model: `python -m tests.benchmarks.growth`; random Llamas, one thread, best of three."""

from __future__ import annotations

import time
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mansu_tl as mtl
from tests.benchmarks.common import random_pairs

SHAPES, STEPS, PAIRS, TOKENS, VOCAB = ((8, 288), (15, 432), (30, 576), (30, 864)), 5, 24, 12, 8192


def main() -> None:
    """Print one line a size: EAP-IG, the bare passes that it is made of, and the ratio."""
    torch.set_num_threads(1)
    for layers, width in SHAPES:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, head_dim=width // 9, vocab_size=VOCAB, tie_word_embeddings=True,
        )  # fmt: skip
        hf = LlamaForCausalLM(config).eval()
        count = sum(p.numel() for p in hf.parameters()) - VOCAB * width
        model, pairs = mtl.load(hf), random_pairs(PAIRS, TOKENS, VOCAB, (1, 2))

        def bare(hf: LlamaForCausalLM = hf, pairs: mtl.data.PromptPairs = pairs) -> None:
            with torch.no_grad():
                hf(pairs.clean)
                hf(pairs.corrupt)
            for _ in range(STEPS):
                inside = hf.get_input_embeddings()(pairs.clean).detach().requires_grad_()
                torch.autograd.grad(hf(inputs_embeds=inside).logits[:, -1].sum(), inside)

        ours = partial(mtl.edge_attribution, model, pairs, steps=STEPS)
        ours()
        bare()
        taken: list[list[float]] = [[], []]
        for _ in range(3):
            for kept, run in zip(taken, (ours, bare), strict=True):
                start = time.perf_counter()
                run()
                kept.append(time.perf_counter() - start)
        a, b = map(min, taken)
        print(
            f"{count / 1e6:.1f} M weights, {layers} x {width}: {a:.2f} s, bare passes {b:.2f} s, {a / b:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
