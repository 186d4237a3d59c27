"""Models in 16 bits: edits are made in float32 and stored in the model's dtype, where floor and certificate hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import functional_call

import mansu_tl as mtl
from mansu_tl.circuit import Circuit
from mansu_tl.errors import MansuError, NoEditError
from mansu_tl.models import float32_copy, linear_weights, orient, parameters, plain, rebuild
from mansu_tl.models.copies import cast
from mansu_tl.models.widened import widened
from mansu_tl.quantization import grid_of, inputs_of
from mansu_tl.runs.values import lent
from mansu_tl.unlearning import Edit
from mansu_tl.unlearning.mansu.floor import Floor
from mansu_tl.verification import certify, damage, probe, relearn
from mansu_tl.verification.attacks import attack_splits
from tests.road import BASELINES, MANSU, Case, case
from tests.tiny import FAMILIES, sliced_task, tiny, tiny_tokenizer

HALVES = (torch.bfloat16, torch.float16)
# Nothing here hangs on a circuit that 16-bit scores chose: every linear weight may be edited.
EVERYWHERE = {**MANSU, "restrict": "none", "discover_near": 0.0}


@pytest.fixture(scope="module", params=HALVES, ids=["bfloat16", "float16"])
def half(request) -> Case:
    return case("llama", dtype=request.param)


def wide(c: Case) -> Case:
    """The same weights in float32."""
    model = mtl.load(cast(plain(c.model), torch.float32), tokenizer=c.model.tokenizer)
    assert all(
        torch.equal(a.float(), b) for a, b in zip(parameters(c.model).values(), parameters(model).values(), strict=True)
    )
    return dataclasses.replace(c, model=model)


def dtype_of(c: Case) -> torch.dtype:
    return next(iter(parameters(c.model).values())).dtype


def certified(model, edit: Edit, folder, quantizer: str):
    """The certificate of an edit, recomputed by bitsandbytes from the folders that it was saved to."""
    before, after = mtl.save(model, folder / "before"), mtl.save(edit.apply(model), folder / "after")
    return certify(before, after, edit.indices, quantizer)


# --- float32 without a copy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_widened_model_computes_what_its_float32_copy_does_on_the_models_own_matrices(family, dtype) -> None:
    model = mtl.load(tiny(family), tokenizer=tiny_tokenizer(), dtype=dtype)
    wide, copied, tokens = widened(model), float32_copy(model), torch.arange(3, 19).view(2, 8)
    live, own = parameters(model), dict(wide.named_parameters())
    assert all(own[name].data_ptr() == live[name].data_ptr() for name in linear_weights(model))
    found = []
    for hf in (wide, copied):
        start = hf.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = hf(inputs_embeds=start, use_cache=False).logits
        found.append((logits, *torch.autograd.grad(logits.square().sum(), start)))
    assert found[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # Values in float32 in the place of some matrices, as MANSU's view gives them, take gradients.
    name = next(iter(linear_weights(model)))
    value = (own[name].detach().float() + 0.1).requires_grad_()
    slopes = []
    for hf in (wide, copied):
        logits = functional_call(hf, {**dict(hf.named_parameters()), name: value}, (tokens,)).logits
        slopes.append(torch.autograd.grad(logits.square().sum(), value)[0])
    assert torch.equal(*slopes) and slopes[0].any()
    with lent(wide, [name], lambda key: own[key].detach().float() + 0.1), torch.no_grad():
        assert torch.equal(wide(tokens).logits, logits)
    assert dict(wide.named_parameters())[name] is own[name]


# --- MANSU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gpt2", torch.float16),
        pytest.param("llama", torch.float16, marks=pytest.mark.slow),
        pytest.param("gpt2", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_mansu_in_16_bits_is_certified_by_bitsandbytes(tmp_path, family: str, dtype: torch.dtype) -> None:
    c = case(family, dtype=dtype)
    edit = mtl.unlearn(c.model, c.task, "mansu", circuit=c.circuit, **{**MANSU, "quantizer": "nf4+fp4"})
    assert edit.n_weights > 20
    assert {value.dtype for value in (*edit.new.values(), *edit.old.values())} == {dtype}
    for quantizer in ("nf4", "fp4"):
        found = certified(c.model, edit, tmp_path / quantizer, quantizer)
        assert found.passed, found.faults
        assert found.edited_codes_changed_share == 1 and found.n_edited == edit.n_weights
        assert found.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.slow
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], indirect=True)
def test_mansu_in_16_bits_edits_what_it_edits_in_float32_and_to_the_same_codes(half) -> None:
    """Cells depend on the weights alone, and the loop runs in float32: the dtype decides where in its cell a weight lands."""
    narrow, same = (mtl.unlearn(c.model, c.task, "mansu", circuit=c.circuit, **EVERYWHERE) for c in (half, wide(half)))
    assert narrow.history == same.history
    assert narrow.indices.keys() == same.indices.keys()
    for grid in map(grid_of, ("nf4", "int4-g64")):
        for name, index in narrow.indices.items():
            assert torch.equal(index, same.indices[name])
            linear = linear_weights(half.model)[name]
            a, b = (grid.encode(orient(parameters(e.apply(c.model))[name].detach(), linear)).codes
                    for e, c in ((narrow, half), (same, wide(half))))  # fmt: skip
            old = grid.encode(orient(parameters(half.model)[name].detach(), linear)).codes
            assert torch.equal(a, b) and int((a != old).sum()) == len(index)
    assert narrow.facts["retain_increase_measured"] == pytest.approx(same.facts["retain_increase_measured"], rel=0.1)


@pytest.mark.parametrize("floor", ["after", "none"])
def test_the_other_floors_store_the_models_dtype_too(half, floor: str) -> None:
    settings = {**EVERYWHERE, "quantizer": "nf4", "floor": floor, "retain_budget": 0.0}
    edit = mtl.unlearn(half.model, half.task, "mansu", circuit=half.circuit, **settings)
    assert edit.n_weights and {value.dtype for value in edit.new.values()} == {dtype_of(half)}


def test_a_weight_whose_target_cell_holds_no_value_of_the_dtype_keeps_its_own() -> None:
    """Between neighbouring float16 subnormals, 6e-8 apart, lie whole cells of a block whose absmax is 3e-7."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.cat(
        [3e-7 * (2 * torch.rand(1, 64, generator=generator) - 1), torch.randn(1, 64, generator=generator)]
    )
    weight = weight.half()
    grid = grid_of("nf4")
    floor = Floor([grid], {"w": weight}, {"w": torch.ones(2, 64, dtype=torch.bool)})
    latent = torch.where(torch.rand(floor.size, generator=generator) < 0.5, -1.0, 1.0)
    everywhere = torch.ones(floor.size, dtype=torch.bool)
    new = floor.final("w", latent, everywhere)
    before, after = grid.encode(weight), grid.encode(new)
    changed = before.codes != after.codes
    assert torch.equal(changed, weight != new) and torch.equal(before.absmax, after.absmax)
    wanted = floor.target(latent) != floor.code
    reached = changed.flatten()[floor.where["w"]]
    rows = floor.where["w"] // 64
    assert not reached[wanted & (rows == 0)].all(), "some cells of the small block cannot be reached"
    assert reached[wanted & (rows == 1)].all()
    codes = before.codes.clone()
    codes.view(-1)[floor.where["w"]] = floor.target(latent).to(torch.uint8)
    with pytest.raises(MansuError, match="target cells of nf4 hold no torch.float16 value"):
        grid.floor_target(weight, codes, before.absmax)
    assert torch.equal(grid.floor_target(weight, codes, before.absmax, leave_unreachable=True), new)


# --- baselines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("half", "method"),
    [
        pytest.param(
            dtype, name, marks=[pytest.mark.slow] if dtype == torch.float16 and name not in ("ste", "npo") else []
        )
        for dtype in HALVES
        for name in BASELINES
    ],
    indirect=["half"],
)
def test_a_baseline_in_16_bits_is_the_one_in_float32_rounded_once(half, method: str) -> None:
    """Twelve steps of 2e-5 each: in bfloat16 a single one would be lost on any weight above .01."""
    settings = {"max_steps": 12, "learning_rate": 2e-5, "stop_over_chance": -1e3, "warmup": 1}
    settings |= {"leak": 0.3} if method == "null-space" else {"share": 0.3} if method == "sure" else {}
    narrow, same = (mtl.unlearn(c.model, c.task, method, **settings) for c in (half, wide(half)))
    if method == "ste":
        # Its quantizer sees the weights as they would be stored, and so another straight-through shift.
        assert narrow.n_weights and {value.dtype for value in narrow.new.values()} == {dtype_of(half)}
        return
    moved, old = parameters(same.apply(wide(half).model)), parameters(half.model)
    for name, value in parameters(narrow.apply(half.model)).items():
        assert torch.equal(value, moved[name].to(value.dtype)), name
        assert torch.isfinite(value).all()
    count = sum(int((moved[name].to(value.dtype) != value).sum()) for name, value in old.items())
    assert narrow.n_weights == count > 0


@pytest.mark.slow
def test_npo_in_bfloat16_forgets_as_much_as_in_float32() -> None:
    """As the issue has it: updates of 3e-5 round away in bfloat16 unless they are gathered in float32."""
    task, fallen = sliced_task(48, retain=64), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = mtl.load("pocket-fp", dtype=dtype)
        edit = mtl.unlearn(model, task, "npo", max_steps=40, learning_rate=3e-5, check_every=50)
        before, after = (mtl.accuracy(m, task.questions["forget"]).log_odds.mean() for m in (model, edit.apply(model)))
        fallen[dtype] = (before - after).item()
    assert fallen[torch.float32] > 1
    assert fallen[torch.bfloat16] == pytest.approx(fallen[torch.float32], rel=0.1)


def test_the_stop_rule_asks_the_model_as_it_would_be_stored(half) -> None:
    """A rate that moves no stored weight forgets nothing, whatever the float32 copy has learnt."""
    edit = mtl.unlearn(half.model, half.task, "ga", max_steps=3, learning_rate=1e-9, warmup=1, check_every=1)
    assert edit.n_weights < 10
    assert len({row["forget_mc"] for row in edit.history}) == 1


# --- what trains, adds up or averages ------------------------------------------------------------------------------------


def test_scores_in_16_bits_add_up_in_float32(half) -> None:
    pairs, same = half.task.forget_pairs, wide(half)
    near = {"rtol": 0, "atol": 0.03 if dtype_of(half) == torch.bfloat16 else 0.005}
    for scores in (
        lambda c: mtl.edge_attribution(c.model, pairs, steps=3).tensor,
        lambda c: mtl.patching.node_attribution(c.model, pairs, qkv=True).tensor,
        lambda c: mtl.patching.neuron_attribution(c.model, pairs).tensor,
        lambda c: mtl.activation_patching(c.model, pairs, component="z").tensor,
    ):
        found, expected = scores(half), scores(same)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), **near)


def test_a_node_score_is_the_float32_sum_over_positions() -> None:
    """Many positions: sums kept in bfloat16 (8 bits) would be off by more than the products that they add."""
    model = mtl.load(tiny("llama", max_position_embeddings=256), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(3, 60, (2, 200), generator=generator) for _ in range(2))
    pairs = mtl.data.PromptPairs.from_tokens(clean, corrupt, torch.tensor([5, 6]), torch.tensor([7, 8]))
    nodes = mtl.patching.node_attribution(model, pairs, per_position=True, qkv=True)
    torch.testing.assert_close(nodes.per_position.double().sum(0), nodes.tensor.double(), rtol=1e-4, atol=1e-5)
    neurons = mtl.patching.neuron_attribution(model, pairs, signed=True, per_position=True)
    torch.testing.assert_close(neurons.per_position.double().sum(0), neurons.tensor.double(), rtol=1e-4, atol=1e-5)


def test_relearning_and_probes_of_a_16_bit_model_are_those_of_its_weights(half) -> None:
    attack, same = attack_splits(half.task, 1, 1)[0], wide(half)
    ours, expected = (relearn(c.model, attack, steps=3, learning_rate=1e-5, batch_size=2) for c in (half, same))
    assert torch.equal(ours.values, expected.values) and torch.equal(ours.loss, expected.loss)
    assert ours.loss[-1] < ours.loss[0]
    read = probe(half.model, half.task.questions["forget"], folds=2, shuffles=1)
    assert read.shuffled.dtype == torch.float32


def test_moments_and_calibration_add_up_in_float32(half) -> None:
    name = next(iter(linear_weights(half.model)))
    found, expected = (inputs_of(plain(c.model), [name], c.task.retain_text)[name] for c in (half, wide(half)))
    assert found.moment.dtype == found.magnitude.dtype == torch.float32
    torch.testing.assert_close(found.moment, expected.moment, rtol=0, atol=0.01 * float(expected.moment.max()))
    for quantizer in ("gptq-int4-g64", "awq-int4-g64"):
        twin = mtl.quantize(half.model, quantizer, half.task.retain_text)
        assert {value.dtype for value in parameters(twin).values()} == {dtype_of(half)}


# --- what is no number is an error ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing() -> Case:
    """A float16 model whose MLPs leave float16's range, the same weights being fine in float32."""
    c = case("llama", dtype=torch.float16)
    large = {
        name: value.detach() * 2000
        for name, value in parameters(c.model).items()
        if name.endswith(("up_proj.weight", "down_proj.weight"))
    }
    return dataclasses.replace(c, model=rebuild(c.model, large), edited=rebuild(c.edited, large))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda c: mtl.accuracy(c.model, c.task.questions["forget"]), "not finite"),
        (lambda c: mtl.edge_attribution(c.model, c.task.forget_pairs), "metric 'logit_difference' is nan"),
        (
            lambda c: mtl.circuit.patch_edges(c.model, c.task.forget_pairs, c.circuit.mask[None].float()),
            "is nan for pair",
        ),
        (lambda c: mtl.activation_patching(c.model, c.task.forget_pairs), "is nan for pair"),
        (lambda c: probe(c.model, c.task.questions["forget"], folds=2, shuffles=1), "streams are not finite"),
        (lambda c: damage(c.model, c.edited, {"retain": c.task.retain_text}), "the loss on 'retain' is nan before"),
        (lambda c: mtl.quantize(c.model, "gptq-int4-g64", c.task.retain_text), "inputs of .* are not finite"),
    ],
)
def test_overflow_is_an_error_and_never_a_number(overflowing, run, message: str) -> None:
    with pytest.raises(MansuError, match=message):
        run(overflowing)


def test_what_overflows_in_float16_can_still_be_edited_and_relearned(overflowing) -> None:
    """Training runs in float32, where nothing overflows; what is stored is float16 again."""
    edit = mtl.unlearn(overflowing.model, overflowing.task, "rmu", max_steps=2, learning_rate=1e-2, check_every=5)
    assert all(torch.isfinite(value).all() for value in edit.new.values())
    assert torch.isfinite(
        relearn(wide(overflowing).model, attack_splits(overflowing.task, 1, 1)[0], steps=1).loss
    ).all()


def test_gradients_that_overflow_are_an_error() -> None:
    """The metric is finite and its gradient is not: a square root at zero."""
    model, pairs = mtl.load(tiny("llama"), tokenizer=tiny_tokenizer()), case("llama").task.forget_pairs

    def rooted(logits: torch.Tensor, pairs: mtl.data.PromptPairs) -> torch.Tensor:
        return (logits[:, 0] - logits[:, 0]).sqrt() + logits[:, 1]

    for what, run in {
        "edge scores": lambda: mtl.edge_attribution(model, pairs, steps=1, metric=rooted),
        "node scores": lambda: mtl.patching.node_attribution(model, pairs, metric=rooted),
        "neuron scores": lambda: mtl.patching.neuron_attribution(model, pairs, metric=rooted),
    }.items():
        with pytest.raises(MansuError, match=rf"{what}: .* are not finite, .*dtype=torch.float32"):
            run()


def test_a_loss_that_is_not_finite_ends_mansu_with_an_error(half) -> None:
    with pytest.raises(NoEditError, match=r"mansu: the loss is (nan|inf) at step \d+; lower learning_rate"):
        mtl.unlearn(half.model, half.task, "mansu", circuit=half.circuit, **{**EVERYWHERE, "retain_weight": 1e39})


def test_circuits_of_16_bit_models_are_plain_results(half) -> None:
    circuit = mtl.discover_circuit(half.model, half.task.forget_pairs, faithfulness=0.3, steps=1)
    assert isinstance(circuit, Circuit) and circuit.scores.dtype == torch.float32
