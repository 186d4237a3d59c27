"""Edge attribution: time against the plain passes it needs and against TransformerLens, peak memory, growth.

`python -m tests.benchmarks.attribution` (three minutes on one core; with `--transformer-lens` as well, twenty more).
"""

from __future__ import annotations

import functools
import subprocess
import sys

import torch
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

import mansu_tl as mtl
from tests.benchmarks.common import gpt2_small, random_pairs, side_by_side

STEPS, PAIRS, WIDTH, VOCAB = 5, 8, 16, 50_000


def rows(transformer_lens: bool = False) -> list[dict[str, object]]:
    """One row a measurement: what, measured, target."""
    torch.set_num_threads(1)
    hf = gpt2_small()
    model, pairs = mtl.load(hf), random_pairs(PAIRS, WIDTH, VOCAB, (3, 7))
    lines = torch.arange(PAIRS)

    def plain() -> None:
        with torch.no_grad():
            hf(pairs.clean)
            hf(pairs.corrupt)
        for _ in range(STEPS):
            embedded = hf.transformer.wte(pairs.clean).detach().requires_grad_()
            logits = hf(inputs_embeds=embedded).logits[:, -1]
            value = logits[lines, pairs.answers] - logits[lines, pairs.distractors[:, 0]]
            torch.autograd.grad(value.sum(), embedded)

    def ours(**options: object) -> mtl.circuit.EdgeScores:
        return mtl.edge_attribution(model, pairs, steps=STEPS, **options)

    out: list[dict[str, object]] = []

    def row(what: str, measured: str, target: str) -> None:
        out.append({"what": what, "measured": measured, "target": target})

    what = f"EAP-IG, {STEPS} steps, GPT-2-small size, {PAIRS} x {WIDTH} tokens, 1 thread"
    base, mine = side_by_side(plain, ours)
    row(
        f"{what}: time / (2 forwards + {STEPS} forward+backward of the HF model, {base:.2f} s)",
        f"{mine / base:.2f}",
        "<= 1.0",
    )
    base, mine = side_by_side(plain, lambda: ours(rule="left"))
    row("  the same with the left rule", f"{mine / base:.2f}", "")
    base, mine = side_by_side(plain, lambda: ours(per_position=True, per_pair=True))
    row("  the same (midpoint), kept per pair and per position too", f"{mine / base:.2f}", "")
    row("  extra peak memory over the model, fresh process", f"{_peak():.0f} MB", "<= 300 MB")
    one = None
    for factor in (1, 4, 16):
        many = random_pairs(PAIRS * factor, WIDTH, VOCAB, (3, 7))
        work = functools.partial(mtl.edge_attribution, model, many, batch_size=PAIRS)
        seconds, _ = side_by_side(work, lambda: None, 1)
        one = seconds if one is None else one
        what = f"  {factor:>2} x the pairs in batches of {PAIRS}: time over 1 x; extra peak memory, fresh process"
        row(what, f"{seconds / one:.1f}; {_peak(factor):.0f} MB", f"{factor}")
    if transformer_lens:
        out += _against_transformer_lens(hf, pairs)
    return out


def _against_transformer_lens(hf: torch.nn.Module, pairs: mtl.data.PromptPairs) -> list[dict[str, object]]:
    """Their edge attribution scores one pair at a time with one gradient at the corrupt end; ours the same."""
    model = mtl.load(hf)
    model.requires_grad_(True)  # theirs differentiates with respect to them
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    plain = mtl.load(hf)
    lines = torch.arange(len(pairs))

    def theirs() -> None:
        for i in range(len(pairs)):
            attribution_patch(
                model,
                pairs.clean[i : i + 1],
                pairs.corrupt[i : i + 1],
                lambda logits, i=i: logits[0, -1, pairs.answers[i]] - logits[0, -1, pairs.distractors[i, 0]],
                EdgeAttributionConfig(granularity="edge"),
            )

    def passes() -> None:
        with torch.no_grad():
            hf(pairs.clean)
        embedded = hf.transformer.wte(pairs.corrupt).detach().requires_grad_()
        logits = hf(inputs_embeds=embedded).logits[:, -1]
        value = logits[lines, pairs.answers] - logits[lines, pairs.distractors[:, 0]]
        torch.autograd.grad(value.sum(), embedded)

    def ours(**options: object) -> object:
        return mtl.edge_attribution(plain, pairs, method="eap", at="corrupt", **options)

    base, mine = side_by_side(theirs, ours, 1)
    bare, detailed = side_by_side(passes, lambda: ours(per_position=True), 2)
    what = f"TransformerLens attribution_patch(edge) over ours, the same pairs ({base:.0f} s, {mine:.2f} s)"
    out = [{"what": what, "measured": f"{base / mine:.0f}", "target": ">= 100"}]
    what = f"  the same, ours by position as theirs ({detailed:.2f} s)"
    out.append({"what": what, "measured": f"{base / detailed:.0f}", "target": ""})
    what = f"  the same against the bare passes, forward + forward+backward of the HF model ({bare:.2f} s)"
    out.append({"what": what, "measured": f"{base / bare:.0f}", "target": ""})
    return out


def _peak(factor: int = 1) -> float:
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "import mansu_tl as mtl\n"
        "from tests.benchmarks.common import *\n"
        f"model, pairs = mtl.load(gpt2_small()), random_pairs({PAIRS * factor}, {WIDTH}, {VOCAB}, (3, 7))\n"
        f"print(extra_peak_mb(lambda: mtl.edge_attribution(model, pairs, steps={STEPS}, batch_size={PAIRS})))"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    for line in rows("--transformer-lens" in sys.argv):
        print(f"{line['what']:<110} {line['measured']:>14}  {line['target']}")
