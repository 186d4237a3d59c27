"""Tensors follow the model: the whole road on a second device gives, bit for bit, what it gives on the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import accelerate
import pytest
import torch
from transformers import PreTrainedModel

import mansu_tl as mtl
from mansu_tl.models import linear_weights, parameters, placement, plain
from mansu_tl.models.tree import family
from mansu_tl.quantization import grid_of
from mansu_tl.study import run_study
from mansu_tl.unlearning import MansuSettings, TrainingSettings, method_flags
from mansu_tl.unlearning import checkpoint as checkpoint_module
from mansu_tl.unlearning.checkpoint import Checkpoint
from mansu_tl.unlearning.mansu import memory
from mansu_tl.unlearning.mansu.floor import Floor
from mansu_tl.unlearning.recipes.npo import NpoSettings
from mansu_tl.unlearning.registry import settings_of
from tests.road import MANSU, STAGES, Case, Numbers, case
from tests.second_device import DEVICE, MisplacedError, SecondDevice
from tests.test_processes import CONFIG
from tests.tiny import tiny, tiny_tokenizer

# Every stage on a plain family; on the others (transposed matrices in 16 bits, post-norms, fused and parallel) what differs.
CASES = [("llama", torch.float32, name) for name in STAGES]
CASES += [
    ("gpt2", torch.bfloat16, name) for name in ("edge scores", "circuits", "MANSU", "MANSU, closed form", "certificate")
]
CASES += [
    (family, torch.float32, name) for family in ("gemma2", "gpt_neox") for name in ("edge scores", "patching sweeps")
]
CASES += [
    ("gemma2", torch.float32, "circuits"),
    ("gemma2", torch.float32, "MANSU, closed form"),
    ("gpt_neox", torch.float32, "node and neuron scores"),
]
# What takes longest of the others.
LONG = {
    ("llama", "quantizers"),
    ("llama", "baselines"),
    ("gpt2", "circuits"),
    ("gpt2", "MANSU"),
    ("gemma2", "circuits"),
    ("gemma2", "patching sweeps"),
    ("gpt_neox", "edge scores"),
    ("gemma2", "MANSU, closed form"),
    ("gpt_neox", "patching sweeps"),
    ("gemma2", "edge scores"),
    ("gpt2", "edge scores"),
    ("gpt2", "MANSU, closed form"),
}
_KEPT: dict[tuple[str, torch.dtype, bool], Case] = {}


@pytest.fixture(scope="module")
def second():
    yield SecondDevice()
    _KEPT.clear()


def _walked(family: str, dtype: torch.dtype, stage: str, second: SecondDevice | None) -> Numbers:
    key = family, dtype, second is not None
    if key not in _KEPT:
        _KEPT[key] = case(family, "cpu" if second is None else DEVICE, dtype)
    return STAGES[stage](_KEPT[key])


@pytest.mark.parametrize(
    ("family", "dtype", "stage"),
    [pytest.param(*each, marks=[pytest.mark.slow] if (each[0], each[2]) in LONG else []) for each in CASES],
    ids=[f"{family}-{str(dtype)[6:]}-{stage}" for family, dtype, stage in CASES],
)
def test_a_stage_on_the_second_device_is_the_same_stage(second, family: str, dtype: torch.dtype, stage: str) -> None:
    expected = _walked(family, dtype, stage, None)
    with second:
        found = _walked(family, dtype, stage, second)
        assert {str(value.device) for value in found.values()} == {"cpu"}
    assert found.keys() == expected.keys()
    for key, value in found.items():
        # A row that cannot be judged has no number.
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize(
    "stage",
    [
        "edge scores",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("relearning, probes, depth, damage", "circuits", "MANSU", "baselines", "quantizers")
        ),
    ],
)
def test_deterministic_algorithms_refuse_nothing_there(second, stage: str) -> None:
    expected = _walked("llama", torch.float32, stage, None)
    torch.use_deterministic_algorithms(True)
    try:
        with second:
            found = _walked("llama", torch.float32, stage, second)
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                torch.ones(3, device=DEVICE).cumsum(0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value.nan_to_num(), expected[key].nan_to_num()) for key, value in found.items())


def test_what_is_on_the_device_already_may_stay_there(second) -> None:
    """Pairs, questions and tasks of either place, and models and references of the other."""
    here = case("llama")
    with second:
        there = case("llama", DEVICE)
        moved = there.task.to(DEVICE)
        pairs = moved.forget_pairs[torch.tensor([0, 2]).to(DEVICE)]
        assert pairs.clean.device == DEVICE and len(pairs.labels) == 2
        expected = mtl.edge_attribution(here.model, here.task.forget_pairs, steps=1, per_position=True)
        for model, task in ((here.model, moved), (there.model, moved), (there.model, here.task)):
            found = mtl.edge_attribution(model, task.forget_pairs, steps=1, per_position=True)
            assert torch.equal(found.tensor, expected.tensor)
            assert mtl.accuracy(model, task.questions["forget"]).mc_percent >= 0
        mean = mtl.runs.ablation(here.model, "mean", reference=moved.retain_text)
        a, b = (
            mtl.circuit.faithfulness(model, here.circuit, moved.forget_pairs, ablation=mean)
            for model in (here.model, there.model)
        )
        assert a == b
        assert mtl.circuit_divergence(here.model, there.edited, here.circuit, moved.forget_pairs, steps=1).value > 0


def _spread(hf: PreTrainedModel) -> dict[str, str]:
    """The upper layers, the last norm and, where it is the head's own, the head on the second device."""
    kind = family(hf)
    base, tied = kind.layers.rsplit(".", 1)[0], hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
    upper = {f"{kind.layers}.1", *([] if tied else [kind.head])}
    parts = [f"{base}.{name}" for name, _ in hf.get_submodule(base).named_children()]
    upper |= {part for part in parts if part.endswith(("norm", "ln_f"))}
    below = [part for part in parts if part != kind.layers] + [f"{kind.layers}.0", kind.head]
    return {part: str(DEVICE) if part in upper else "cpu" for part in (*below, *upper)}


@pytest.fixture(scope="module")
def over_two(second):
    """A case by family whose models lie on two devices, as accelerate places them."""
    kept: dict[str, Case] = {}

    def made(family: str) -> Case:
        if family not in kept:
            whole, tokenizer = case(family), tiny_tokenizer()
            with second:
                model, never = (
                    mtl.load(hf, tokenizer=tokenizer, device_map=_spread(hf))
                    for hf in (plain(whole.model), tiny(family, seed=1))
                )
                kept[family] = replace(whole, model=model, edited=whole.edit.apply(model), never=never)
            _KEPT[family, torch.float32, False] = whole
        return kept[family]

    # Beside a real second card it would take the CPU for a place to offload to.
    split = functools.partial(accelerate.dispatch_model, main_device="cpu", force_hooks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "dispatch_model", split)
        yield made


# What works on copies of the weights, on every kind of family; the rest once.
SPREAD = [
    (family, name) for family in ("llama", "gpt2", "gemma2", "gpt_neox") for name in ("MANSU, closed form", "MANSU")
]
SPREAD += [("llama", name) for name in STAGES if not name.startswith("MANSU")]
SPREAD += [("gemma2", name) for name in ("accuracy", "edge scores", "patching sweeps", "circuits")]
AT_ONCE = {
    ("llama", "accuracy"),
    ("llama", "patching sweeps"),
    ("gemma2", "edge scores"),
    ("llama", "MANSU, closed form"),
    ("llama", "node and neuron scores"),
    ("llama", "edge scores"),
}


# What lies on the CPU beside a card counts as offloaded there.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize(
    ("family", "stage"),
    [pytest.param(*each, marks=[] if each in AT_ONCE else pytest.mark.slow) for each in SPREAD],
)
def test_a_stage_over_two_devices_is_the_same_stage(second, over_two, family: str, stage: str) -> None:
    """Scores, patching, circuits, every method's training, quantizing and what is measured of it."""
    spread = over_two(family)
    expected = _walked(family, torch.float32, stage, None)
    with second:
        assert {value.device for value in parameters(spread.edited).values()} == {torch.device("cpu"), DEVICE}
        found = STAGES[stage](spread)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value.nan_to_num(), expected[key].nan_to_num()), key


def test_memory_is_asked_for_where_it_will_be_used(second, over_two, monkeypatch) -> None:
    """A matrix's moments on its own device, the rest where tokens go in."""
    spread, asked = over_two("llama"), {}
    monkeypatch.setattr(memory, "require_room", lambda what, need, *more: asked.update(need))
    settings = settings_of("mansu", {"restrict": "none"})
    with second:
        memory.require_fit_of_mansu(spread.model, spread.task, settings)
        needs = memory.mansu_memory(spread.model, spread.task, settings)
    linear = linear_weights(spread.model)
    assert asked[DEVICE] == sum(4 * linear[name].in_features ** 2 for name in linear if ".layers.1." in name)
    assert sum(asked.values()) == pytest.approx(needs.total, abs=1)


def test_the_fault_that_the_floor_had_is_found(second) -> None:
    """Masks on the CPU, latent updates and `allowed` made there: MANSU's loop on a GPU as it was."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with second:
        there = weight.to(DEVICE)
        floor = Floor([grid_of("nf4")], {"w": there}, {"w": torch.ones(4, 64, dtype=torch.bool)})
        with pytest.raises(MisplacedError, match="expected all tensors to be on the same device"):
            floor.realise(torch.zeros(floor.size))
        with pytest.raises(MisplacedError, match="expected all tensors to be on the same device"):
            floor.realise(torch.zeros_like(floor.value), torch.ones(floor.size, dtype=torch.bool))
        stored, rounded, changed = floor.realise(torch.ones_like(floor.value))
        assert stored.device == rounded.device == changed.device == DEVICE


# --- the device itself: what it takes and what it refuses, as CUDA does --------------------------------------------------


def test_it_moves_follows_and_computes(second) -> None:
    with second:
        a, b = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (a.device, b.device) == (DEVICE, torch.device("cpu"))
        follow = [
            a + 1,
            a[:2],
            a[None].T,
            torch.zeros_like(a),
            a.new_zeros(2),
            b.to(DEVICE),
            b.to(a),
            a.double(),
            a.detach(),
        ]
        follow += [a * b.sum(), a[b > 0], torch.empty(2, device=DEVICE).zero_(), torch.nn.Parameter(a).data]
        assert {t.device for t in follow} == {DEVICE}
        assert {t.device for t in (a.cpu(), a.to("cpu", torch.float64), torch.zeros_like(a, device="cpu"))} == {
            b.device
        }
        assert not a.is_cpu and b.is_cpu
        moved = b.to(DEVICE)
        b += 1
        assert moved.tolist() == [1, 1, 1], "a move copies"
        a[b > 0], b[:2] = 2.0, a[:2]  # indices and slices from the CPU, as CUDA has it
        assert a.tolist() == [2, 2, 2] and b[2] == 2
        layer = torch.nn.Linear(3, 2).to(DEVICE)
        loss = layer(torch.ones(4, 3, device=DEVICE)).square().mean()
        loss.backward()
        torch.optim.Adam(layer.parameters()).step()
        assert {t.device for t in (loss, layer.weight, layer.weight.grad)} == {DEVICE}
    assert torch.ones(1).device.type == "cpu"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack([a.sum(), b.sum()]),
        lambda a, b: b.add_(a.sum()),
        lambda a, b: b[a > 0],
        lambda a, b: a.index_add_(0, torch.tensor([0]), torch.ones(1).to(a)),
        lambda a, b: a.gather(0, torch.tensor([0])),
        lambda a, b: torch.nn.functional.embedding(torch.tensor([0]), a[:, None]),
        lambda a, b: torch.bucketize(a, b),
        lambda a, b: torch.nn.functional.linear(a, b[None]),
        lambda a, b: torch.randn(3, generator=torch.Generator(), device=DEVICE),
        lambda a, b: a.numpy(),
    ],
)
def test_it_refuses_what_cuda_refuses(second, wrong) -> None:
    with second, pytest.raises((RuntimeError, TypeError), match="same device|on cpu|generator|numpy|device"):
        wrong(torch.ones(3, device=DEVICE), torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mansu", "npo"])
def test_an_interrupted_edit_goes_on_there(second, tmp_path, monkeypatch, method: str) -> None:
    monkeypatch.setattr(checkpoint_module, "_EVERY", 0.0)

    class Interrupted(Checkpoint):
        def offer(self, state) -> None:
            super().offer(state)
            if len(seen.append(1) or seen) == 5:
                raise KeyboardInterrupt

    seen: list[int] = []
    settings = {
        "mansu": MansuSettings(**{**MANSU, "restrict": "none", "steps": 8, "adversary_every": 1}),
        "npo": NpoSettings(training=TrainingSettings(max_steps=8, stop_over_chance=-1e3)),
    }[method]
    function = method_flags(method).run
    with second:
        there = case("llama", DEVICE)
        extra = {"circuit": there.circuit} if method == "mansu" else {}
        with pytest.raises(KeyboardInterrupt):
            function(there.model, there.task, settings, checkpoint=Interrupted(tmp_path / "state", "k"), **extra)
        goes_on = function(there.model, there.task, settings, checkpoint=Checkpoint(tmp_path / "state", "k"), **extra)
        in_one_go = function(there.model, there.task, settings, checkpoint=Checkpoint(), **extra)
    assert goes_on.history == in_one_go.history
    assert goes_on.new.keys() == in_one_go.new.keys()
    assert all(torch.equal(value, in_one_go.new[name]) for name, value in goes_on.new.items())


@pytest.mark.slow
def test_a_study_runs_there(second, tmp_path) -> None:
    with second:
        study = run_study(replace(CONFIG, also=(), device=str(DEVICE)), tmp_path, progress=False, workers=1)
    assert study.environment["device"] == str(DEVICE) and 0 <= study.summary()["forget_MC"].item() <= 100
