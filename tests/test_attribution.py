"""Edge attribution against EAP-IG's own scores, finite differences of exact patching, and facts that must hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mansu_tl as mtl
from mansu_tl.circuit import Graph, patch_edges
from mansu_tl.circuit.scores import EdgeScores
from mansu_tl.data import PromptPairs
from mansu_tl.errors import MansuError
from mansu_tl.models import Anatomy
from mansu_tl.patching import node_attribution
from tests.tiny import FAMILIES, crossed, tiny

ORACLE = Path(__file__).parent / "oracles" / "tiny_gpt2"


def random_pairs(n: int = 4, width: int = 7, vocab: int = 40, seed: int = 0, padded: bool = False) -> PromptPairs:
    gen = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, vocab, (n, width), generator=gen)
    corrupt = clean.clone()
    corrupt[:, 1] = torch.randint(5, vocab, (n,), generator=gen)
    corrupt[:, 3] = torch.randint(5, vocab, (n,), generator=gen)
    labels = torch.stack([torch.randperm(vocab, generator=gen)[:2] for _ in range(n)])
    lengths = torch.randint(4, width + 1, (n,), generator=gen) if padded else None
    return PromptPairs.from_tokens(clean, corrupt, labels[:, 0], labels[:, 1], lengths)


def oracle_case(padded: bool) -> tuple[object, PromptPairs, dict[str, torch.Tensor]]:
    scores = load_file(ORACLE / "scores.safetensors")
    model = mtl.load(ORACLE / "model")
    lengths = scores["lengths"] if padded else None
    pairs = PromptPairs.from_tokens(
        scores["clean"], scores["corrupt"], scores["labels"][:, 0], scores["labels"][:, 1], lengths
    )
    return model, pairs, scores


@pytest.mark.parametrize(
    ("name", "padded", "options"),
    [
        ("EAP", False, {"method": "eap", "at": "clean"}),
        ("EAP_padded", True, {"method": "eap", "at": "clean"}),
        ("EAP-IG-inputs", False, {"method": "eap-ig", "steps": 5, "rule": "left"}),
        ("EAP-IG-inputs_padded", True, {"method": "eap-ig", "steps": 5, "rule": "left"}),
    ],
)
def test_equals_the_scores_of_eap_ig_own_code(name: str, padded: bool, options: dict[str, object]) -> None:
    model, pairs, scores = oracle_case(padded)
    ours = mtl.edge_attribution(model, pairs, **options)
    # Their sign is (corrupt - clean) x gradient, ours (clean - corrupt).
    assert torch.equal(ours.exists, scores["real_edges"].bool())
    torch.testing.assert_close(-ours.tensor, scores[name] * ours.exists, rtol=0, atol=5e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_single_edge_patching_equals_the_exact_scores_of_eap_ig(padded: bool) -> None:
    model, pairs, scores = oracle_case(padded)
    graph = Graph.of(model)
    edges = graph.exists.nonzero()
    masks = torch.ones(len(edges), *graph.exists.shape)
    for i, (writer, reader) in enumerate(edges.tolist()):
        masks[i, writer, reader] = 0
    full = patch_edges(model, pairs, torch.ones(1, *graph.exists.shape)).mean(1)
    effect = patch_edges(model, pairs, masks).mean(1) - full
    expected = scores["exact_padded" if padded else "exact"][edges[:, 0], edges[:, 1]]
    torch.testing.assert_close(effect, expected, rtol=0, atol=5e-6)


def test_circuits_evaluate_as_in_eap_ig_own_code() -> None:
    model, pairs, _ = oracle_case(False)
    meta = json.loads((ORACLE / "meta.json").read_text())
    for values, _, mask in meta["eval"].values():
        got = patch_edges(model, pairs, torch.tensor(mask, dtype=torch.float32)[None])[0]
        torch.testing.assert_close(got, torch.tensor(values), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("family", "at"), crossed(FAMILIES, ["clean", "corrupt"]))
def test_equals_central_differences_of_exact_patching(family: str, at: str) -> None:
    model = mtl.load(tiny(family))
    pairs = random_pairs(padded=family in ("llama", "gpt2"))
    graph = Graph.of(model)
    ours = mtl.edge_attribution(model, pairs, method="eap", at=at).tensor[graph.exists]
    # Swapping the prompts makes the corrupt run the one that is patched into.
    base = pairs if at == "clean" else swapped(pairs)
    sign = 1.0 if at == "clean" else -1.0
    step = 0.005  # the difference's own error falls with its square: .034 at .02, .002 here
    edges = graph.exists.nonzero().tolist()
    masks = torch.ones(2 * len(edges), *graph.exists.shape)
    for i, (writer, reader) in enumerate(edges):
        masks[2 * i, writer, reader] = 1 + step
        masks[2 * i + 1, writer, reader] = 1 - step
    values = patch_edges(model, base, masks).double().mean(1)
    difference = sign * (values[0::2] - values[1::2]) / (2 * step)
    large = difference.abs() > 0.02 * difference.abs().max()
    relative = ((ours - difference).abs() / difference.abs())[large]
    assert relative.max() <= 0.01
    assert torch.corrcoef(torch.stack([ours.double(), difference]))[0, 1] >= 0.9999


def swapped(pairs: PromptPairs) -> PromptPairs:
    return replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_on_is_the_clean_run_and_all_off_the_corrupt_run(family: str) -> None:
    model = mtl.load(tiny(family))
    pairs = random_pairs()
    shape = Graph.of(model).exists.shape
    values = patch_edges(model, pairs, torch.stack([torch.ones(shape), torch.zeros(shape)]))
    scores = mtl.edge_attribution(model, pairs, method="eap")
    with torch.no_grad():
        for tokens, value in zip((pairs.clean, pairs.corrupt), values, strict=True):
            logits = model(tokens)[:, -1].float()
            rows = torch.arange(len(pairs))
            direct = logits[rows, pairs.answers] - logits[rows, pairs.distractors[:, 0]]
            torch.testing.assert_close(value, direct, rtol=0, atol=2e-5)
    assert scores.metric_clean == pytest.approx(values[0].mean().item(), abs=2e-5)
    assert scores.metric_corrupt == pytest.approx(values[1].mean().item(), abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", ["clean", "corrupt"])
def test_a_node_is_the_sum_of_its_edges(family: str, at: str) -> None:
    model = mtl.load(tiny(family))
    if Anatomy.of(model).post_norms:
        pytest.skip("heads pass a post-norm together: a node's gradient is taken in front of it, an edge's behind it")
    pairs = random_pairs(padded=True)
    edges = mtl.edge_attribution(model, pairs, method="eap", at=at)
    nodes = node_attribution(model, pairs, at=at)
    torch.testing.assert_close(nodes.tensor, edges.node_scores(), rtol=0, atol=5e-6)


def test_eap_ig_is_complete_in_the_limit_of_many_steps() -> None:
    model = mtl.load(tiny("llama"))
    pairs = random_pairs()
    residuals = [mtl.edge_attribution(model, pairs, steps=n).relative_residual for n in (2, 8, 64)]
    assert residuals[2] < 1e-3
    assert residuals[2] < residuals[0]


def test_details_add_up_to_the_total() -> None:
    model = mtl.load(tiny("llama"))
    pairs = random_pairs(n=5)
    full = mtl.edge_attribution(model, pairs, per_pair=True, per_position=True, batch_size=2)
    plain = mtl.edge_attribution(model, pairs, batch_size=64)
    torch.testing.assert_close(full.tensor, plain.tensor, rtol=0, atol=2e-6)
    torch.testing.assert_close(full.per_pair.mean(0), plain.tensor, rtol=0, atol=2e-6)
    torch.testing.assert_close(full.per_position.sum(0), plain.tensor, rtol=0, atol=2e-6)
    one = mtl.edge_attribution(model, pairs[3:4])
    torch.testing.assert_close(full.per_pair[3], one.tensor, rtol=0, atol=2e-6)


def test_a_kv_reader_is_the_sum_over_its_group_of_query_heads() -> None:
    grouped = tiny("llama")
    repeated = tiny("llama", num_key_value_heads=grouped.config.num_attention_heads)
    state = grouped.state_dict()
    group = grouped.config.num_attention_heads // grouped.config.num_key_value_heads
    for name, value in list(state.items()):
        if "k_proj" in name or "v_proj" in name:
            heads = value.unflatten(0, (grouped.config.num_key_value_heads, -1))
            state[name] = heads.repeat_interleave(group, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    pairs = random_pairs()
    a = mtl.edge_attribution(mtl.load(grouped), pairs)
    b = mtl.edge_attribution(mtl.load(repeated), pairs)
    for i, reader in enumerate(a.readers):
        if "KV" in reader:
            layer, rest = reader[1:].split("KV")
            kv, kind = rest.split(".")
            members = [b.readers.index(f"L{layer}KV{int(kv) * group + j}.{kind}") for j in range(group)]
            torch.testing.assert_close(a.tensor[:, i], b.tensor[:, members].sum(1), rtol=0, atol=5e-6)
        else:
            torch.testing.assert_close(a.tensor[:, i], b.tensor[:, b.readers.index(reader)], rtol=0, atol=5e-6)


def test_scores_survive_a_round_trip_and_a_cut_file_is_refused(tmp_path: Path) -> None:
    scores = mtl.edge_attribution(mtl.load(tiny("gpt2")), random_pairs(), per_pair=True)
    path = scores.save(tmp_path / "scores.safetensors")
    again = EdgeScores.load(path)
    assert torch.equal(again.tensor, scores.tensor)
    assert torch.equal(again.per_pair, scores.per_pair)
    assert again.writers == scores.writers
    assert again.residual == scores.residual
    frame = scores.to_dataframe()
    assert len(frame) == int(scores.exists.sum())
    assert frame["score"].iloc[0] == pytest.approx(scores.tensor.flatten()[scores.tensor.abs().argmax()].item())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(MansuError, match="cut short"):
        EdgeScores.load(path)
    with pytest.raises(MansuError, match="no such file"):
        EdgeScores.load(tmp_path / "nothing.safetensors")


def test_bad_input_is_refused() -> None:
    model, pairs = mtl.load(tiny("llama")), random_pairs()
    with pytest.raises(MansuError, match="unknown method 'acdc'"):
        mtl.edge_attribution(model, pairs, method="acdc")
    with pytest.raises(MansuError, match="unknown rule 'middle'"):
        mtl.edge_attribution(model, pairs, rule="middle")
    with pytest.raises(MansuError, match="steps=0"):
        mtl.edge_attribution(model, pairs, steps=0)
    with pytest.raises(MansuError, match="shape"):
        mtl.edge_attribution(model, pairs, metric=lambda logits, pairs: logits.mean()[None])
    with pytest.raises(MansuError, match="does not depend on the logits"):
        mtl.edge_attribution(model, pairs, metric=lambda logits, pairs: torch.ones(len(pairs)))
    with pytest.raises(MansuError, match="pair 0"):
        mtl.edge_attribution(model, pairs, metric=lambda logits, pairs: logits[:, 0] * float("nan"))
    with pytest.raises(MansuError, match="vocabulary ends at"):
        mtl.edge_attribution(model, random_pairs(vocab=4000))
    model.original_model.train()
    with pytest.raises(MansuError, match="training mode"):
        mtl.edge_attribution(model, pairs)
