"""MANSU in closed form on a random model of Llama-3.1-8B's shape in bf16: seconds and peak memory of every stage.

`python -m tests.benchmarks.mansu8b` needs a GPU with 80 GB; `--small` takes SmolLM2-135M's shape in float32, `--tiny` a shape
that runs anywhere.
Facts, text and weights are random, so nothing is said about forgetting, and the eight layers that take turns are given;
at the end bitsandbytes' codes of all edited matrices are compared with the original's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
import transformers

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.data import Questions, Sequences, Task
from mansu_tl.models import linear_weights, parameters
from mansu_tl.unlearning import MansuSettings
from mansu_tl.unlearning.mansu import closed, plan, solver
from mansu_tl.unlearning.mansu.floor import Floor
from mansu_tl.unlearning.mansu.memory import mansu_memory
from mansu_tl.verification.library_codes import library_codes, library_quantizer
from tests.benchmarks.common import random_pairs
from tests.tiny import tiny_tokenizer

GPU = torch.cuda.is_available()
SEEN: dict[str, list[float]] = {}  # seconds, most memory and calls of every stage
OPEN: list[str] = []
# Where a model of 32 layers is edited that reads its subject in the last one.
LAYERS = tuple(range(6, 14))


def main(args: argparse.Namespace) -> None:
    """Print a line a stage."""
    device = "cuda" if GPU else "cpu"
    if not (args.tiny or args.small or GPU):
        raise SystemExit("no GPU here; use --tiny to try the script")
    print(
        f"# {torch.cuda.get_device_name() if GPU else 'CPU'}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    started = time.perf_counter()
    with stage("load"):
        model, vocab = random_model(args, device)
    task = random_task(vocab, args.facts, args.tokens, args.near)
    with stage("circuit"):
        if args.discover:
            circuit = mtl.discover_circuit(model, task.forget_pairs)
        else:
            scores = mtl.edge_attribution(model, task.forget_pairs, steps=5)
            share = args.edges or (0.5 if args.tiny else 0.02)
            circuit = Circuit.top(scores, int(share * int(scores.exists.sum())))
    nodes = [node for node in circuit.nodes if node.startswith("MLP")]
    print(f"# circuit: {circuit.n_edges} edges, {len(nodes)} MLPs")
    # The parts of the method, timed where they are called.
    for module, name, label in (
        (plan, "subject_share", "plan: where the subject is read"), (plan, "circuit_weights", "plan: circuit's weights"),
        (plan, "Floor", "plan: floor"), (plan, "ignorance", "plan: never seen"),
        (plan, "mixed_moments", "moments"), (closed, "run", "shift"), (closed, "_seen", "inputs of the matrices"),
        (closed, "best_moves", "moves: search"), (closed, "_solved", "moves: with what surrounds them"),
        (solver, "plan", "plan in all"), (solver, "closed_form", "shift and moves in all"),
        (Floor, "stored", "values in their cells"), (solver, "_retain_increase", "retain loss before and after"),
    ):  # fmt: skip
        timed(module, name, label)
    if not args.tiny:
        plan.closed_layers = lambda share, settings: LAYERS  # type: ignore[assignment]
    settings: dict[str, Any] = {
        "contexts": 0,  # random words have no openings
        "null_space": args.null_space, "least_gain": args.least_gain, "steps": args.steps,
        "fisher_sequences": args.sequences,
    }  # fmt: skip
    held = torch.cuda.memory_allocated() / 1e9 if GPU else 0.0
    needs = mansu_memory(model, task, MansuSettings.closed(neuron_share=args.neuron_share, **settings), circuit)
    parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in vars(needs).items())
    print(f"# said before: {needs.total / 1e9:.2f} GB beside the model ({parts}); held now: {held:.2f} GB", flush=True)
    with stage("unlearn in all"):
        edit = mtl.unlearn(
            model, task, "mansu-closed", circuit=circuit, neuron_share=args.neuron_share, quantizer=args.quantizer,
            **settings,
        )  # fmt: skip
    with stage("apply"):
        edited = edit.apply(model)
    for row in edit.history:
        print("# " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    for label, (seconds, peak, calls) in SEEN.items():
        print(f"{label:34s} {seconds:8.1f} s  peak {peak:5.1f} GB  {int(calls)} x")
    print(f"# {edit.n_weights} of {edit.facts['candidates']} candidates edited, layers {edit.facts['layers']}")
    with stage("check"):
        check(model, edited, edit, args.quantizer.split("+")[0])
    print(f"# {time.perf_counter() - started:.0f} s in all, most memory {max(row[1] for row in SEEN.values()):.1f} GB")


def random_model(args: argparse.Namespace, device: str) -> tuple[Any, int]:
    """The bridge and its vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes, vocab = (4096, 14336, 32, 32, 8), 128256
    if args.tiny or args.small:
        sizes, vocab = ((128, 384, 6, 8, 2), 2000) if args.tiny else ((576, 1536, 30, 9, 3), 49152)
    shape = dict(zip(names, sizes, strict=True)) | {"vocab_size": vocab}
    config = transformers.LlamaConfig(**shape, attn_implementation="eager", rope_theta=500000.0)
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if args.small else torch.bfloat16)
    with torch.device(device):
        hf = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(before)
    model = mtl.load(hf, tokenizer=tiny_tokenizer(vocab), device=device)
    del hf
    if GPU:
        torch.cuda.empty_cache()
    return model, vocab


def random_task(vocab: int, facts: int, tokens: int, near: int) -> Task:
    """Random facts of twelve tokens with a subject of two, and random text of rows of 64."""
    generator = torch.Generator().manual_seed(1)

    def text(rows: int, width: int) -> Sequences:
        return Sequences(torch.randint(5, vocab, (rows, width), generator=generator), torch.full((rows,), width))

    pairs = random_pairs(facts, 12, vocab, (3, 4))
    far = replace(random_pairs(facts, 12, vocab, (3, 4), seed=7), facts=tuple(f"far {i}" for i in range(facts)))
    questions = {name: Questions.of_pairs(part) for name, part in (("forget", pairs), ("retain", far))}
    return Task("random", pairs, far, text(-(-tokens // 64), 64), text(near, 12), text(16, 12), questions)


def check(model: Any, edited: Any, edit: Any, quantizer: str) -> None:
    """Every edited weight has another code of bitsandbytes', no other has, no scale has moved, nothing else differs."""
    library, linear = library_quantizer(quantizer), linear_weights(model)
    before, after = parameters(model), parameters(edited)
    for name, value in before.items():
        if name not in edit.indices:
            assert torch.equal(value, after[name]), name
            continue
        (codes, scales), (new, grown) = (
            library_codes(values[name].detach(), linear[name], library) for values in (before, after)
        )
        assert torch.equal((codes != new).flatten().nonzero()[:, 0].cpu(), edit.indices[name]), name
        assert torch.equal(scales, grown), name
    print(f"# floor: {edit.n_weights} edited weights, {edit.n_weights} other codes of {quantizer}, 0 others, 0 scales")


@contextmanager
def stage(label: str) -> Iterator[None]:
    """What is done inside counts to a stage; stages may lie in one another."""
    _look()
    OPEN.append(label)
    SEEN.setdefault(label, [0.0, 0.0, 0])
    start = time.perf_counter()
    yield
    if GPU:
        torch.cuda.synchronize()
    SEEN[label][0] += time.perf_counter() - start
    SEEN[label][2] += 1
    _look()
    OPEN.remove(label)
    print(f"#{'  ' * len(OPEN)} {label}: {SEEN[label][0]:.1f} s so far, peak {SEEN[label][1]:.1f} GB", flush=True)


def _look() -> None:
    """The most memory since the last look, for every open stage: of the GPU; of a CPU what the process holds now."""
    most = torch.cuda.max_memory_allocated() / 1e9 if GPU else psutil.Process().memory_info().rss / 1e9
    for label in OPEN:
        SEEN[label][1] = max(SEEN[label][1], most)
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def timed(owner: Any, name: str, label: str) -> None:
    """Let every call of a function count to a stage."""
    inner = getattr(owner, name)

    def called(*given: Any, **named: Any) -> Any:
        with stage(label):
            return inner(*given, **named)

    setattr(owner, name, called)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--discover", action="store_true", help="find the circuit at .85 instead of the strongest edges"
    )
    parser.add_argument("--edges", type=float, help="share of the edges that is the circuit, 0.02 by default")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=20480, help="of the retain text")
    parser.add_argument("--near", type=int, default=120, help="rows of near text")
    parser.add_argument("--neuron-share", type=float, default=0.25)
    parser.add_argument("--sequences", type=int, default=256, help="on which the retain loss is taken in the end")
    parser.add_argument("--quantizer", default="nf4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--null-space", type=float, default=1.0)
    parser.add_argument("--least-gain", type=float, default=1e-5)
    main(parser.parse_args())
