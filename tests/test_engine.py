"""The attribution engine: other methods and rules, positions, memory budgets, several processes, and bad input."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mansu_tl as mtl
from mansu_tl.circuit import Graph, attribution, memory
from mansu_tl.circuit.graph import layer_of, reader_kind
from mansu_tl.circuit.masked_run import normed
from mansu_tl.circuit.memory import Plan, plan
from mansu_tl.data.forced import forced
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy, attention_weights, norm_weights
from mansu_tl.runs.ablation import ablation
from mansu_tl.runs.passes import by_length, record, run
from tests.test_attribution import oracle_case, random_pairs
from tests.tiny import FAMILIES, some, tiny


@pytest.mark.parametrize(
    ("name", "options"), [("clean-corrupted", {"method": "clean-corrupted"}), ("EAP-zero", {"method": "eap"})]
)
def test_equals_eap_ig_own_code_for_both_ends_and_for_zero_ablation(name: str, options: dict[str, object]) -> None:
    model, pairs, scores = oracle_case(False)
    if name == "EAP-zero":
        options = options | {"ablation": ablation(model, "zero")}
    ours = mtl.edge_attribution(model, pairs, **options)
    torch.testing.assert_close(-ours.tensor, scores[name] * ours.exists, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mean_over_the_corrupt_prompt_itself_is_the_corrupt_ablation(family: str) -> None:
    model = mtl.load(tiny(family))
    pairs = random_pairs(n=1)
    swapped = mtl.data.PromptPairs.from_tokens(pairs.corrupt, pairs.clean, pairs.answers, pairs.distractors)
    mean = ablation(model, "mean", reference=swapped, per_position=True)
    corrupt = mtl.edge_attribution(model, pairs, method="eap")
    by_mean = mtl.edge_attribution(model, pairs, method="eap", ablation=mean)
    torch.testing.assert_close(by_mean.tensor, corrupt.tensor, rtol=0, atol=5e-6)
    assert by_mean.metric_corrupt == pytest.approx(corrupt.metric_corrupt, abs=1e-5)


@pytest.mark.parametrize("family", some(FAMILIES, ["llama", "gemma3", "gpt_neox", "gpt2"]))
def test_scores_at_a_position_equal_central_differences_of_patching_there(family: str) -> None:
    model, step = mtl.load(tiny(family)), 0.04
    pairs = random_pairs(n=2, seed=3)
    scores = mtl.edge_attribution(model, pairs, method="eap", per_position=True)
    graph, cmap = Graph.of(model), Anatomy.of(model)
    clean, corrupt = record(model, pairs.clean, pairs.lengths), record(model, pairs.corrupt, pairs.lengths)

    def delta(writer: str, amount: float) -> torch.Tensor:
        if writer == "embed":
            return amount * (clean.value("stream", 0) - corrupt.value("stream", 0))
        layer = layer_of(writer)
        if writer.startswith("MLP"):
            return amount * (clean.value("mlp_out", layer) - corrupt.value("mlp_out", layer))
        head = int(writer.split("H")[1])
        part = (clean.value("z", layer) - corrupt.value("z", layer))[:, :, head] @ attention_weights(model, layer).o[
            head
        ].T
        if not cmap.post_norms:
            return amount * part
        norm = norm_weights(model, layer, "attn_post")
        return normed(clean.value("attn_raw", layer) + amount * part, norm) - normed(
            clean.value("attn_raw", layer), norm
        )

    def metric_with(writer: str, reader: str, position: int, amount: float) -> float:
        layer, kind = layer_of(reader), reader_kind(reader)

        def moved(stream: torch.Tensor) -> torch.Tensor:
            out = stream.clone()
            out[:, position] += delta(writer, amount)[:, position]
            return out

        def add(stream: torch.Tensor, hook: object) -> torch.Tensor:
            return moved(stream)

        def project(value: torch.Tensor, hook: object) -> torch.Tensor:
            weights, norm = attention_weights(model, layer), norm_weights(model, layer, "attn")
            head = int(reader.split(".")[0].split("KV" if kind != "q" else "H")[1])
            matrix, bias = getattr(weights, kind), getattr(weights, f"{kind}_bias")
            new = normed(moved(clean.value("stream", layer)), norm) @ matrix[head].T
            out = value.clone().reshape(*value.shape[:2], matrix.shape[0], -1)
            out[:, :, head] = new if bias is None else new + bias[head]
            return out.reshape(value.shape)

        where = {"logits": "ln_final.hook_in", "mlp": f"blocks.{layer}.ln2.hook_in"}
        hook = (where[kind], add) if kind in where else (f"blocks.{layer}.attn.{kind}.hook_out", project)
        with torch.no_grad():
            logits = run(model, pairs.clean, pairs.lengths, [hook]).double()
        return mtl.runs.logit_difference(logits, pairs).mean().item()

    generator = torch.Generator().manual_seed(1)
    edges = graph.exists.nonzero()
    last, found = pairs.clean.shape[1] - 1, []
    for w, r in edges[torch.randperm(len(edges), generator=generator)[:14]].tolist():
        for position in (1, 3, last):
            names = graph.writers[w], graph.readers[r], position
            # Two steps, extrapolated: a long step keeps float32's rounding out, the shorter one its own error.
            wide, short = ((metric_with(*names, h) - metric_with(*names, -h)) / (2 * h) for h in (step, step / 2))
            found.append((scores.per_position[position, w, r].item(), (4 * short - wide) / 3))
    ours, exact = torch.tensor(found).double().T
    large = exact.abs() > 0.02 * exact.abs().max()
    assert large.sum() >= 5
    assert ((ours - exact).abs() / exact.abs())[large].max() <= 0.01
    assert (ours - exact).abs().max() <= 0.01 * exact.abs().max()


def test_positions_counted_from_the_end_are_the_same_scores_in_other_rows() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs(n=5, padded=True)
    start = mtl.edge_attribution(model, pairs, per_position="start", per_pair=True)
    end = mtl.edge_attribution(model, pairs, per_position="end")
    torch.testing.assert_close(end.per_position.sum(0), start.tensor, rtol=0, atol=2e-6)
    assert end.positions[-1] == "-1"
    # One pair at a time, position p from the start is length - p from the end.
    total = torch.zeros_like(end.per_position)
    for i, length in enumerate(pairs.lengths.tolist()):
        alone = mtl.edge_attribution(model, pairs[i : i + 1], per_position=True).per_position
        total[len(total) - length :] += alone[:length]
    torch.testing.assert_close(end.per_position, total / len(pairs), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_steps_double_until_the_residual_is_small() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    for tolerance in (0.05, 0.001):
        auto = mtl.edge_attribution(model, pairs, steps="auto", tolerance=tolerance)
        assert auto.relative_residual <= tolerance
        half = mtl.edge_attribution(model, pairs, steps=max(1, auto.steps // 2))
        assert auto.steps == 5 or half.relative_residual > tolerance
    with pytest.raises(MansuError, match="after 320 steps the residual is still"):
        mtl.edge_attribution(
            mtl.load(tiny("gpt2", num_hidden_layers=1)), pairs[:1], steps="auto", rule="left", tolerance=1e-9
        )
    with pytest.raises(MansuError, match="tolerance=0"):
        mtl.edge_attribution(model, pairs, steps="auto", tolerance=0.0)


class Peak(TorchDispatchMode):
    """The largest sum of bytes of all storages made and alive at one time while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "gpt2"))]
)
def test_work_stays_within_its_memory_budget_and_the_scores_do_not_change(family: str) -> None:
    model = mtl.load(tiny(family, num_hidden_layers=3, hidden_size=64))
    pairs = random_pairs(n=24, width=20)
    free = mtl.edge_attribution(model, pairs)
    sizes = []
    for budget in ("2MB", "4MB", "8MB"):
        with Peak() as peak:
            tight = mtl.edge_attribution(model, pairs, max_memory=budget)
        torch.testing.assert_close(tight.tensor, free.tensor, rtol=0, atol=2e-6)
        assert peak.most <= float(budget[:-2]) * 1e6
        sizes.append(plan(model, forced(pairs), 5, max_memory=budget).pairs)
    assert sizes[0] < sizes[1] < sizes[2]
    # The budget is used, not just kept.
    assert peak.most > 0.2 * 8e6


def test_batches_by_length_cost_least() -> None:
    """Against every way to cut a sorted list; padding and passes are counted in tokens."""
    lengths, rng = [], random.Random(0)
    for most, pass_tokens in ((3, 0.0), (4, 2.5), (7, 9.0), (7, 1e9)):
        lengths = [rng.randint(1, 9) for _ in range(7)]

        def cost(batches: list[list[int]], pass_tokens: float = pass_tokens) -> float:
            return sum(len(batch) * max(batch) + pass_tokens for batch in batches)

        found = by_length(torch.tensor(lengths), most, pass_tokens)
        assert sorted(torch.cat(found).tolist()) == list(range(7)) and max(map(len, found)) <= most
        ordered, every = sorted(lengths), []
        for cuts in itertools.product((False, True), repeat=6):
            at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 7]
            batches = [ordered[a:b] for a, b in itertools.pairwise(at)]
            if max(map(len, batches)) <= most:
                every.append(cost(batches))
        assert cost([[lengths[i] for i in batch.tolist()] for batch in found]) == min(every)


@pytest.mark.parametrize("padding", [0.0, 1e9])
def test_pairs_of_unequal_length_get_the_scores_that_each_has_alone(padding: float, monkeypatch) -> None:
    """In batches of their own length and in one, per pair and per position from either side."""
    model, pairs = mtl.load(tiny("llama")), random_pairs(n=4, padded=True)
    monkeypatch.setattr(memory, "_PASS_WORK", {False: padding, True: padding})
    assert len(set(pairs.lengths.tolist())) > 1
    for align in ("start", "end"):
        scores = mtl.edge_attribution(model, pairs, steps=2, per_pair=True, per_position=align)
        alone = [mtl.edge_attribution(model, pairs[[i]], steps=2, per_position=align) for i in range(4)]
        torch.testing.assert_close(scores.per_pair, torch.stack([one.tensor for one in alone]), rtol=0, atol=2e-6)
        by_position = sum(one.per_position for one in alone) / 4
        torch.testing.assert_close(scores.per_position, by_position, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_cut_of_a_contraction_changes_nothing_but_its_rounding(family: str, monkeypatch) -> None:
    """As on a GPU: several points a pass, several layers a product, products in pieces, operands of 16 bits."""
    model, pairs = mtl.load(tiny(family, num_hidden_layers=3)), random_pairs(n=4, padded=True)
    options = {"steps": 3, "per_pair": True}
    one = mtl.edge_attribution(model, pairs, **options)

    def cut(tokens: int, layers: int, dtype: torch.dtype = torch.float32) -> mtl.circuit.EdgeScores:
        one_cut = Plan(3, tokens, 0.0, layers, dtype, together=2)
        monkeypatch.setattr(attribution, "plan", lambda *args, **kwargs: one_cut)
        return mtl.edge_attribution(model, pairs, **options)

    for tokens, layers in ((2, 2), (16, 3)):
        other = cut(tokens, layers)
        for name in ("tensor", "per_pair"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=0, atol=2e-6)
    rounded = cut(16, 2, torch.bfloat16)
    for name in ("tensor", "per_pair"):
        got, want = getattr(rounded, name), getattr(one, name)
        assert 1e-5 < (got - want).norm() / want.norm() < 0.01


@pytest.mark.parametrize("budget", ["10KB", 10_000])
def test_a_budget_smaller_than_one_pair_is_refused_with_the_size_needed(budget: str | int) -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    with pytest.raises(MansuError, match=r"one pair of 7 tokens needs [0-9.]+[KM]B beside the model"):
        mtl.edge_attribution(model, pairs, max_memory=budget)


@pytest.mark.parametrize("budget", ["4 apples", "much", -3, "0GB"])
def test_a_budget_that_cannot_be_read_is_refused(budget: str | int) -> None:
    with pytest.raises(MansuError, match="cannot be read"):
        mtl.edge_attribution(mtl.load(tiny("llama")), random_pairs(), max_memory=budget)


def test_an_interrupted_run_leaves_the_model_as_it_was() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    before = mtl.edge_attribution(model, pairs)
    calls = 0

    def interrupted(logits: torch.Tensor, pairs: mtl.data.PromptPairs) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return mtl.runs.logit_difference(logits, pairs)

    with pytest.raises(KeyboardInterrupt):
        mtl.edge_attribution(model, pairs, metric=interrupted)
    assert torch.equal(mtl.edge_attribution(model, pairs).tensor, before.tensor)
    assert all(parameter.grad is None for parameter in model.original_model.parameters())


_SHARED = """
import sys, torch, torch.distributed as dist
import mansu_tl as mtl
from tests.test_attribution import random_pairs
from tests.tiny import tiny
dist.init_process_group("gloo")
pairs = random_pairs(n=int(sys.argv[2]), padded=True)
scores = mtl.edge_attribution(
    mtl.load(tiny("llama")), pairs, per_pair=True, per_position="end", data_parallel=True
)
scores.save(f"{sys.argv[1]}/rank{dist.get_rank()}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("n", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_give_the_scores_of_one(tmp_path: Path, n: int) -> None:
    script = tmp_path / "shared.py"
    script.write_text(_SHARED)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path), str(n)],
        cwd=root,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = mtl.edge_attribution(
        mtl.load(tiny("llama")), random_pairs(n=n, padded=True), per_pair=True, per_position="end"
    )
    for rank in (0, 1):
        shared = mtl.circuit.EdgeScores.load(tmp_path / f"rank{rank}.safetensors")
        for name in ("tensor", "per_pair", "per_position"):
            torch.testing.assert_close(getattr(shared, name), getattr(alone, name), rtol=0, atol=2e-6)
        assert shared.metric_clean == pytest.approx(alone.metric_clean, abs=1e-6)
        assert shared.residual == pytest.approx(alone.residual, abs=1e-5)


def test_bad_input_is_refused() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    zero = ablation(model, "zero")
    with pytest.raises(MansuError, match="zero ablation has no corrupt end"):
        mtl.edge_attribution(model, pairs, ablation=zero)
    with pytest.raises(MansuError, match="unknown kind 'noise'"):
        ablation(model, "noise")
    with pytest.raises(MansuError, match="needs a reference"):
        ablation(model, "mean")
    with pytest.raises(MansuError, match="uses no reference"):
        ablation(model, "zero", reference=pairs)
    short = ablation(model, "mean", reference=random_pairs(width=4), per_position=True)
    with pytest.raises(MansuError, match="pairs have 7 positions, the means were taken over 4"):
        mtl.edge_attribution(model, pairs, method="eap", ablation=short)
    with pytest.raises(MansuError, match="no process group"):
        mtl.edge_attribution(model, pairs, data_parallel=True)
    with pytest.raises(MansuError, match="batch_size=0"):
        mtl.edge_attribution(model, pairs, batch_size=0)
    with pytest.raises(MansuError, match="steps='many'|steps=many"):
        mtl.edge_attribution(model, pairs, steps="many")
