"""What earlier cells left behind: hooks are refused and named, PyTorch's switches change no number, nothing of ours stays."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

import mansu_tl as mtl
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models import fingerprint, parameters, require_ready
from mansu_tl.models.copies import boot
from tests.checking import unchecked
from tests.road import FUNCTIONS, OF_WEIGHTS, STAGES, TOLERANCE, Case, case, largest_difference
from tests.tiny import tiny, tiny_tokenizer

ROOMS = ("circuit", "data", "models", "patching", "quantization", "runs", "unlearning", "verification")
# Public functions that are in neither table: they neither run a model nor make a tensor from which a number is taken.
WITHOUT_MODEL = {
    *("conflict", "node_scores_from_transformer_lens", "node_scores_to_transformer_lens"),  # results to results
    *(
        "answer_log_prob",
        "choice_log_odds",
        "kl_divergence",
        "logit_difference",
        "output_suppressor",
    ),  # logits to numbers
    *(
        "component_masks",
        "flat_indices",
        "linear_weights",
        "attention_weights",
        "mlp_weights",
        "norm_weights",
        "parameters",
    ),
    *(
        "awq",
        "doubled",
        "gptq",
        "grid_of",
        "orient",
        "register_family",
        "quantizer",
        "quantizer_table",
        "quantizers",
        "register_quantizer",
    ),
    *("floored", "headline", "method_flags", "method_title", "methods", "register", "settings_of", "trained"),
    *("corruptions", "counterfactuals", "forced", "register_corruption"),  # prompts to prompts
    *("rouge_l", "summary_recall", "lume_aggregate"),  # texts and scores to numbers
    *("judge", "privleak"),  # a table to a scorecard, scores to a ratio
    *("audit", "explore", "run_study"),  # made of the others
    *("save", "save_gguf", "gguf_weights"),  # inside "certify"; the others of files
    *("ask", "build_task", "judge_by_llama"),  # a copy that writes; asked as "accuracy" asks; files
    "certify_in_fresh_process",  # a process of its own
    *("home", "require_copyable", "require_ready"),
    "last_logits",  # for those who hook on purpose
    "require_known",  # accuracy
}


@pytest.fixture(scope="module")
def usual() -> Case:
    return case("llama")


@pytest.fixture(scope="module")
def expected(usual) -> dict[str, list[Any]]:
    """What every function gives where nothing was switched."""
    return {name: numbers(function(usual)) for name, function in (FUNCTIONS | OF_WEIGHTS).items()}


def numbers(value: Any) -> list[Any]:
    """Everything in a result, flat; models by their fingerprint."""
    if isinstance(value, Tensor):
        return [value.dtype, value.shape, value.detach().clone()]
    if isinstance(value, TransformerBridge | PreTrainedModel):
        return [fingerprint(value)]
    if isinstance(value, pd.DataFrame):
        return numbers(value.to_dict("list"))
    if dataclasses.is_dataclass(value):
        return numbers({key: part for key, part in value.__dict__.items() if not key.startswith("_")})
    if isinstance(value, Mapping):
        return [part for key in value for part in (key, *numbers(value[key]))]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [part for one in value for part in numbers(one)]
    return [value]


def same(found: list[Any], wanted: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a.nan_to_num(nan=7.5), b.nan_to_num(nan=7.5))
        return a == b or (a != a and b != b)

    return len(found) == len(wanted) and all(equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_every_public_function_is_looked_at() -> None:
    public = set()
    for room in ("", *(f".{name}" for name in ROOMS)):
        module = importlib.import_module(f"mansu_tl{room}")
        public |= {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    tables = {name.partition(":")[0] for name in FUNCTIONS | OF_WEIGHTS}
    assert public - tables - WITHOUT_MODEL == set()
    assert WITHOUT_MODEL & tables == set()


# --- hooks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_hook_that_was_left_is_refused_and_named(usual, expected, name: str) -> None:
    usual.model.add_hook("blocks.1.hook_out", lambda value, hook: 0.5 * value)
    try:
        with pytest.raises(
            MansuError, match=r"^model: a hook is left on blocks.1.hook_out and would change the numbers; "
        ):
            FUNCTIONS[name](usual)
    finally:
        usual.model.reset_hooks()
    assert same(numbers(FUNCTIONS[name](usual)), expected[name])


@contextmanager
def left(model: TransformerBridge, kind: str) -> Iterator[None]:
    """One way or another of leaving something on a model."""
    hf: Any = model.original_model

    def half(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[-1]
        return (
            tuple(0.5 * t if t.is_floating_point() else t for t in first) if isinstance(first, tuple) else 0.5 * first
        )

    handle = None
    if kind == "permanent":
        model.add_perma_hook("hook_embed", half)
    elif kind == "backward":
        model.add_hook("blocks.0.mlp.hook_out", lambda grad, hook: (2 * grad,), dir="bwd")
    elif kind == "on the point":
        model.blocks[0].hook_out.add_hook(half)
    elif kind == "kept after its context":
        with model.hooks([("blocks.0.hook_in", half)], reset_hooks_end=False):
            pass
    elif kind == "forward of PyTorch":
        handle = hf.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 0.5 * out)
    elif kind == "pre-forward of PyTorch":
        handle = hf.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    elif kind == "of PyTorch on a hook point":
        handle = model.blocks[0].hook_out.register_forward_hook(lambda module, args, out: 0.5 * out)
    else:
        handle = hf.model.layers[0].mlp.register_full_backward_hook(lambda module, grads, out: (2 * grads[0],))
    try:
        yield
    finally:
        model.reset_hooks(including_permanent=True)
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("permanent", r"a hook is left on embed.hook_out .*reset_hooks\(including_permanent=True\)"),
        ("backward", r"a hook is left on blocks.0.mlp.hook_out .*reset_hooks\(including_permanent=True\)"),
        ("on the point", r"a hook is left on blocks.0.hook_out .*reset_hooks\(including_permanent=True\)"),
        ("kept after its context", r"a hook is left on blocks.0.hook_in .*reset_hooks\(including_permanent=True\)"),
        ("forward of PyTorch", r"a forward hook of PyTorch on blocks.1.mlp\S* changes its logits; .*\.remove\(\)"),
        ("pre-forward of PyTorch", r"a forward hook of PyTorch on blocks.0.mlp\S* changes its logits; .*\.remove\(\)"),
        ("of PyTorch on a hook point", r"a forward hook of PyTorch on blocks.0.hook_out changes its logits"),
        ("backward of PyTorch", r"a backward hook of PyTorch is left on blocks.0.mlp\S*, .*\.remove\(\)"),
    ],
)
@pytest.mark.parametrize("name", ["accuracy", "edge_attribution", "activation_patching", "patch_edges", "unlearn: npo"])
def test_every_kind_of_hook_is_refused_and_named(usual, expected, name: str, kind: str, message: str) -> None:
    with left(usual.model, kind), pytest.raises(MansuError, match=message):
        FUNCTIONS[name](usual)
    assert same(numbers(FUNCTIONS[name](usual)), expected[name])


def test_several_hooks_are_counted_and_named(usual) -> None:
    try:
        for layer in (0, 1):
            usual.model.add_hook(f"blocks.{layer}.hook_out", lambda value, hook: None)
            usual.model.add_hook(f"blocks.{layer}.hook_in", lambda value, hook: None)
        with pytest.raises(
            MansuError, match=r"4 hooks are left on blocks.0.\S+, blocks.0.\S+, blocks.1.\S+ and 1 more "
        ):
            mtl.accuracy(usual.model, usual.task.questions["forget"])
    finally:
        usual.model.reset_hooks()


@pytest.mark.parametrize("name", ["erasure_depth", "damage"])
def test_a_hook_on_the_other_model_is_refused_too(usual, name: str) -> None:
    usual.edited.add_hook("blocks.0.hook_out", lambda value, hook: 0.5 * value)
    try:
        with pytest.raises(MansuError, match="a hook is left on blocks.0.hook_out"):
            FUNCTIONS[name](usual)
    finally:
        usual.edited.reset_hooks()


@pytest.mark.parametrize("name", ["accuracy", "edge_attribution", "activation_patching", "patch_edges", "relearn"])
def test_a_forward_hook_of_pytorch_that_only_looks_may_stay(usual, expected, name: str) -> None:
    seen: list[int] = []
    hf: Any = usual.model.original_model
    handle = hf.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(1))
    try:
        assert same(numbers(FUNCTIONS[name](usual)), expected[name])
    finally:
        handle.remove()
    assert seen


def test_hooks_of_an_open_context_are_there_on_purpose(usual) -> None:
    questions, name = usual.task.questions["forget"], "blocks.1.hook_out"
    plainly = mtl.accuracy(usual.model, questions)
    with usual.model.hooks([(name, lambda value, hook: 0.5 * value)]):
        steered = mtl.accuracy(usual.model, questions)
        with pytest.raises(MansuError, match="a hook is left on"):
            mtl.unlearn(
                usual.model, usual.task, "npo", max_steps=1
            )  # its weights are trained in a copy, without the hook
    assert not torch.equal(steered.log_odds, plainly.log_odds)
    assert torch.equal(mtl.accuracy(usual.model, questions).log_odds, plainly.log_odds)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_hooks_do_not_enter_what_looks_at_weights(usual, expected, name: str) -> None:
    usual.model.add_hook("blocks.1.hook_out", lambda value, hook: 0.5 * value)
    try:
        assert same(numbers(OF_WEIGHTS[name](usual)), expected[name])
    finally:
        usual.model.reset_hooks()


# --- training mode, flags, gradients on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_training_mode_is_refused(usual, name: str) -> None:
    usual.model.original_model.train()
    try:
        with pytest.raises(MansuError, match=r"in training mode, .* call model.eval\(\) first"):
            FUNCTIONS[name](usual)
    finally:
        usual.model.original_model.eval()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_that_ask_for_gradients_do_not_matter_and_get_none(usual, expected, name: str) -> None:
    live = parameters(usual.model).values()
    for value in live:
        value.requires_grad_(True)
    try:
        assert same(numbers(FUNCTIONS[name](usual)), expected[name])
        assert all(value.grad is None for value in live)
    finally:
        for value in live:
            value.requires_grad_(False)


def test_flags_of_the_bridge_change_no_score() -> None:
    flagged, pairs = case("llama"), case("llama").task.forget_pairs
    before = mtl.edge_attribution(flagged.model, pairs, steps=1).tensor
    flagged.model.set_use_attn_result(True)
    flagged.model.set_use_split_qkv_input(True)
    flagged.model.set_use_hook_mlp_in(True)
    torch.testing.assert_close(mtl.edge_attribution(flagged.model, pairs, steps=1).tensor, before, rtol=0, atol=1e-5)


def test_a_model_whose_weights_were_cast_below_the_bridge_is_taken_as_it_is() -> None:
    """`model.original_model.half()` leaves the bridge's config behind."""
    told, below = case("llama", dtype=torch.bfloat16), mtl.load(tiny("llama"))
    below.original_model.to(torch.bfloat16)
    assert below.cfg.dtype == torch.float32
    for stage in ("accuracy", "edge scores", "patching sweeps", "circuits"):
        found = STAGES[stage](dataclasses.replace(told, model=below))
        # Its rotary frequencies were cast too, so that the numbers are not quite those of a model loaded in bfloat16.
        worst, where = largest_difference(found, STAGES[stage](told))
        assert worst < TOLERANCE[torch.bfloat16], where


def test_weights_made_under_inference_mode_are_refused_or_copied(usual) -> None:
    with torch.inference_mode():
        hf = tiny("llama")
    assert same(numbers(mtl.load(hf)), numbers(mtl.load(tiny("llama"))))
    with (
        torch_defaults(),
        pytest.raises(MansuError, match=r"made under torch.inference_mode\(\).*load it with mansu_tl.load"),
    ):
        require_ready(hf)
    with torch.inference_mode():
        pairs = mtl.data.PromptPairs(
            **{f.name: getattr(usual.task.forget_pairs, f.name) for f in dataclasses.fields(mtl.data.PromptPairs)}
        )
        pairs = dataclasses.replace(pairs, clean=pairs.clean + 0, options=pairs.options + 0, lengths=pairs.lengths + 0)
    task = dataclasses.replace(usual.task, forget_pairs=pairs)
    assert pairs.clean.is_inference()
    assert mtl.unlearn(usual.model, task, "npo", max_steps=1, stop_over_chance=-1e3).n_weights


# --- PyTorch's switches --------------------------------------------------------------------------------------------------


@contextmanager
def _switched(setter: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(back)


# The default device "meta" holds no values: a tensor that is made on it by mistake cannot be taken for another.
SWITCHES: Mapping[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "gradients off": lambda: _switched(torch.set_grad_enabled, False, True),
    "inference_mode": torch.inference_mode,
    "float64": lambda: _switched(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: _switched(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "another default device": lambda: _switched(torch.set_default_device, "meta", None),
    "a device context": lambda: torch.device("meta"),
    "deterministic": lambda: _switched(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


# All of them at once for every function, and each by itself for one that scores, trains, measures and draws.
TOGETHER = (
    ("gradients off", "float64", "another default device"),
    ("inference_mode", "bfloat16", "deterministic", "autocast"),
)
FEW = ("accuracy", "edge_attribution", "unlearn: npo", "relearn", "minimality", "quantize: calibrated", "attack_splits")


@pytest.mark.parametrize(
    ("names", "switches"),
    [((name,), TOGETHER[i]) for name in FUNCTIONS | OF_WEIGHTS for i in (0, 1)] + [(FEW, (name,)) for name in SWITCHES],
    ids=lambda value: "+".join(value) if len(value) < len(FEW) else "few",
)
def test_no_switch_of_pytorch_changes_a_number(
    usual, expected, names: tuple[str, ...], switches: tuple[str, ...]
) -> None:
    before = _switches()
    for name in names:
        with ExitStack() as stack:
            for switch in switches:
                stack.enter_context(SWITCHES[switch]())
            inside = _switches()
            found = (FUNCTIONS | OF_WEIGHTS)[name](usual)
            assert _switches() == inside, f"{name} left another setting behind"
        assert same(numbers(found), expected[name]), name
    assert _switches() == before


@pytest.fixture(scope="module")
def scores_of_few() -> mtl.circuit.EdgeScores:
    return mtl.edge_attribution(mtl.load("pocket"), mtl.load_task("pocket").forget_pairs[:6], steps=1)


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_made_under_a_switch_is_used_without_it(scores_of_few, switch: str) -> None:
    """Model, pairs, circuit and edit of one cell, used in the next."""
    with SWITCHES[switch]():
        made = mtl.load("pocket")
        task = mtl.load_task("pocket")
        pairs = task.forget_pairs[:6]
    assert {str(v.dtype) for v in parameters(made).values()} == {"torch.float32"}
    scores = mtl.edge_attribution(made, pairs, steps=1)
    assert torch.equal(scores.tensor, scores_of_few.tensor)
    with SWITCHES[switch]():
        circuit = mtl.circuit.Circuit.top(scores, 40)
        names = mtl.circuit.Graph.of(made).mask(circuit.edges)
    assert torch.equal(circuit.mask, mtl.circuit.Circuit.top(scores, 40).mask) and torch.equal(names, circuit.mask)


def _switches() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        str(torch.get_default_device()), torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), torch.get_num_threads(),
    )  # fmt: skip


def test_an_error_puts_the_settings_back_too(usual) -> None:
    with torch.no_grad(), _switched(torch.set_default_dtype, torch.float64, torch.float32):
        with pytest.raises(MansuError):
            mtl.edge_attribution(usual.model, usual.task.forget_pairs, method="nonsense")
        assert not torch.is_grad_enabled() and torch.get_default_dtype() == torch.float64


def test_no_function_draws_from_the_global_random_state(usual) -> None:
    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    with unchecked():
        for name, function in (FUNCTIONS | OF_WEIGHTS).items():
            before = state()
            function(usual)
            assert state() == before, name


def test_booting_leaves_the_random_state_alone() -> None:
    for family in ("gpt2", "gpt_neox"):  # TransformerLens initializes the parts of fused projections
        before = torch.get_rng_state()
        boot(tiny(family), tiny_tokenizer(), "model")
        assert torch.equal(before, torch.get_rng_state())
