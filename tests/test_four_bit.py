"""Real 4-bit models against their dequantized twins, on every family; and what cannot be hooked."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path

import accelerate
import bitsandbytes as bnb
import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

import mansu_tl as mtl
from mansu_tl.circuit import Graph
from mansu_tl.errors import MansuError
from mansu_tl.models import (
    Anatomy,
    attention_weights,
    fingerprint,
    linear_weights,
    mlp_weights,
    norm_weights,
    parameters,
    placement,
    plain,
    rebuild,
)
from tests.test_attribution import random_pairs
from tests.tiny import FAMILIES, crossed, some, tiny, tiny_tokenizer


def wide(family: str, row: int = 64) -> transformers.PreTrainedModel:
    """A tiny model whose matrices have rows of 64, the block size, or of `row`."""
    sizes: dict[str, object] = {"hidden_size": row}
    if family == "gpt2":
        sizes["n_inner"] = 2 * row
    else:
        sizes["intermediate_size"] = 2 * row
    if family not in ("gpt2", "gpt_neox"):
        sizes["head_dim"] = row // 4
    return tiny(family, **sizes)


@pytest.fixture(scope="module")
def twins() -> dict[str, tuple[object, object]]:
    return {f: (mtl.load(wide(f), quantized="nf4"), mtl.quantize(mtl.load(wide(f)), "nf4")) for f in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_equals_the_dequantized_twin(family: str, twins) -> None:
    real, twin = twins[family]
    pairs = random_pairs(padded=True)
    with torch.no_grad():
        torch.testing.assert_close(real(pairs.clean), twin(pairs.clean), rtol=0, atol=1e-6)
    for options in ({}, {"method": "eap"}, {"per_position": True}):
        a, b = (mtl.edge_attribution(model, pairs, **options) for model in (real, twin))
        torch.testing.assert_close(a.tensor, b.tensor, rtol=0, atol=1e-6)
    masks = torch.rand(3, *Graph.of(real).exists.shape, generator=torch.Generator().manual_seed(0))
    a, b = (mtl.circuit.patch_edges(model, pairs, masks) for model in (real, twin))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    a, b = (mtl.patching.node_attribution(model, pairs).tensor for model in (real, twin))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    a, b = (mtl.activation_patching(model, pairs, component="z").tensor for model in (real, twin))
    # Shares of the clean-corrupt difference.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_of_a_4bit_model_equal_central_differences_of_patching_it(family: str, twins) -> None:
    model, step = twins[family][0], 0.005
    pairs, graph = random_pairs(), Graph.of(model)
    ours = mtl.edge_attribution(model, pairs, method="eap").tensor[graph.exists]
    edges = graph.exists.nonzero().tolist()
    masks = torch.ones(2 * len(edges), *graph.exists.shape)
    for i, (writer, reader) in enumerate(edges):
        masks[2 * i, writer, reader], masks[2 * i + 1, writer, reader] = 1 + step, 1 - step
    values = mtl.circuit.patch_edges(model, pairs, masks).double().mean(1)
    difference = (values[0::2] - values[1::2]) / (2 * step)
    large = difference.abs() > 0.02 * difference.abs().max()
    assert ((ours - difference).abs() / difference.abs())[large].max() <= 0.01
    assert torch.corrcoef(torch.stack([ours.double(), difference]))[0, 1] >= 0.9999


@pytest.mark.parametrize(("family", "double"), crossed(FAMILIES, [True, False]))
def test_a_4bit_checkpoint_on_disk_is_hooked_as_it_is(family: str, double: bool, tmp_path: Path) -> None:
    dense = wide(family)
    dense.save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4" if double else "nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double,
    )
    packed = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    model = mtl.load(tmp_path / "packed")
    by_hand = mtl.load(packed)
    tokens = random_pairs().clean
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), by_hand(tokens), rtol=0, atol=0)
        # Last, because it repacks its weights where the CPU has the kernel for it.
        for module in packed.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        packed.set_attn_implementation("eager")
        torch.testing.assert_close(model(tokens), packed.eval()(tokens).logits, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_folder_in_4_bits_equals_converting_the_model(family: str, tmp_path: Path, twins) -> None:
    wide(family).save_pretrained(tmp_path)
    model, real = mtl.load(tmp_path, quantized="nf4"), twins[family][0]
    mine, other = parameters(model), parameters(real)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert any(value.dtype == torch.uint8 for value in mine.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_4bit_model_generates_what_its_twin_generates(family: str) -> None:
    tokenizer = tiny_tokenizer()
    real = mtl.load(wide(family), tokenizer=tokenizer, quantized="nf4")
    twin = mtl.quantize(mtl.load(wide(family), tokenizer=tokenizer), "nf4")
    prompt = torch.tensor([[1, 5, 9, 7]])
    a, b = (
        m.generate(prompt, max_new_tokens=6, do_sample=False, return_type="tokens", verbose=False) for m in (real, twin)
    )
    assert torch.equal(a, b)
    assert a.shape[1] > 4


def test_a_4bit_model_cannot_be_edited_saved_or_quantized_again(twins, tmp_path: Path) -> None:
    model = twins["llama"][0]
    uses = (rebuild, lambda m: mtl.save(m, tmp_path / "out"), lambda m: mtl.quantize(m, "nf4"))
    for use in uses:
        with pytest.raises(MansuError, match="packed"):
            use(model)
    for use in (plain, rebuild, lambda m: mtl.save(m, tmp_path / "out")):
        with pytest.raises(MansuError, match="load the dense checkpoint"):
            use(model)
    assert not (tmp_path / "out").exists()


def test_rows_that_bitsandbytes_decodes_wrongly_on_the_cpu_are_refused() -> None:
    with pytest.raises(MansuError, match="has rows of 32, no multiple of the block size 64"):
        mtl.load(tiny("llama"), quantized="nf4")


def test_a_repacked_model_is_refused() -> None:
    model = mtl.load(wide("llama"), quantized="nf4").original_model
    packed = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    packed[0].quant_state.packing_format_for_cpu = True
    with pytest.raises(MansuError, match="support_avx512bf16_for_cpu = False"):
        mtl.load(model)


def test_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MansuError, match="quantized='int4': unknown; choose one of nf4, fp4"):
        mtl.load(wide("llama"), quantized="int4")
    wide("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for said, name in (
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
        with pytest.raises(
            MansuError, match=f"quantized with {name}, whose codes are not read here; pass the dense checkpoint"
        ):
            mtl.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_map_changes_nothing(family: str, tmp_path: Path) -> None:
    hf = tiny(family)
    hf.save_pretrained(tmp_path)
    spread = spread_of(hf)
    pairs = random_pairs()
    whole = mtl.edge_attribution(mtl.load(tmp_path), pairs)
    for device_map in ({"": "cpu"}, spread, "auto"):
        model = mtl.load(tmp_path, device_map=device_map)
        assert torch.equal(mtl.edge_attribution(model, pairs).tensor, whole.tensor)


def spread_of(hf: transformers.PreTrainedModel) -> dict[str, str | int]:
    """A device map that names every layer."""
    inner = hf.base_model_prefix
    spread: dict[str, str | int] = {"lm_head": "cpu"}
    for name, child in getattr(hf, inner).named_children():
        layers = range(len(child)) if isinstance(child, torch.nn.ModuleList) else (None,)
        spread |= {f"{inner}.{name}" if i is None else f"{inner}.{name}.{i}": "cpu" for i in layers}
    return spread


@pytest.mark.parametrize(("family", "quantized"), crossed(FAMILIES, ["nf4", None]))
def test_the_hooks_that_accelerate_puts_on_change_nothing(family: str, quantized: str | None, monkeypatch) -> None:
    hf, pairs = wide(family), random_pairs(padded=True)
    # accelerate leaves its hooks out where all is on one device, and this machine has one.
    monkeypatch.setattr(placement, "dispatch_model", functools.partial(accelerate.dispatch_model, force_hooks=True))
    hooked, whole = (mtl.load(hf, quantized=quantized, device_map=m) for m in (spread_of(hf), None))
    assert sum(hasattr(module, "_hf_hook") for module in hooked.modules()) > 20
    masks = torch.rand(2, *Graph.of(whole).exists.shape, generator=torch.Generator().manual_seed(0))
    for use in (
        lambda m: m(pairs.clean),
        lambda m: mtl.edge_attribution(m, pairs).tensor,
        lambda m: mtl.circuit.patch_edges(m, pairs, masks),
        lambda m: mtl.activation_patching(m, pairs).tensor,
    ):
        with torch.no_grad():
            assert torch.equal(use(hooked), use(whole))
    assert fingerprint(hooked) == fingerprint(whole)
    assert not any(hasattr(module, "_hf_hook") for module in hf.modules()), "the model it was given"


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("atuo", r"device_map='atuo' is unknown; use one of auto, balanced"),
        ({"model.layers.0": "cpu"}, r"leaves modules out .*model\.embed_tokens"),
        ({"": "disk"}, r"puts the model on disk, where weights have no values between forwards"),
        ({"": "meta"}, r"puts the model on meta"),
        ({"": "warp"}, r"puts the model on 'warp': not usable here"),
    ],
)
def test_device_maps_that_cannot_work_are_refused(device_map, message: str, memory: bool, tmp_path: Path) -> None:
    hf = tiny("llama")
    hf.save_pretrained(tmp_path)
    if not memory:
        (tmp_path / "model.safetensors").write_bytes(b"refused before the weights are read")
    with pytest.raises(MansuError, match=message):
        mtl.load(hf if memory else tmp_path, device_map=device_map)
    with pytest.raises(MansuError, match="device 'meta': given beside device_map"):
        mtl.load(hf, device="meta", device_map="auto")


def test_offloading_and_split_ties_are_refused() -> None:
    hf = tiny("gpt2")
    hf.hf_device_map = {"transformer.h.0": 0, "transformer.h.1": "cpu"}
    with pytest.raises(MansuError, match=r"transformer\.h\.1 would be offloaded from the GPUs \(1 modules\)"):
        placement.require_placed("m", hf)
    hf.hf_device_map = {"transformer": 0, "lm_head": 1}
    with pytest.raises(MansuError, match=r"puts transformer on 0, but its weights are tied to ones on cpu"):
        placement.require_placed("m", hf)
    del hf.hf_device_map
    hf.lm_head.to("meta")
    with pytest.raises(MansuError, match=r"was offloaded, the devices are too small"):
        placement.require_placed("m", hf)


UNSUPPORTED = [
    ("MixtralForCausalLM", "mixtral", "a mixture of experts"),
    ("Qwen3MoeForCausalLM", "qwen3_moe", "a mixture of experts"),
    ("T5ForConditionalGeneration", "t5", "an encoder beside the decoder"),
    ("MambaForCausalLM", "mamba", "state-space or recurrent layers"),
    ("Gemma3nForCausalLM", "gemma3n_text", "shares keys and values between layers"),
    ("Gemma3ForConditionalGeneration", "gemma3", "multimodal"),
]


@pytest.mark.parametrize(("architecture", "model_type", "why"), UNSUPPORTED)
def test_other_families_are_refused_by_name_before_weights_are_read(
    architecture: str, model_type: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": model_type}))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(MansuError, match=rf"{why}.*{architecture}.*is not supported.*llama.*gpt_neox.*gpt2"):
            mtl.load(tmp_path)


def test_a_tiny_mixture_of_experts_in_memory_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(num_key_value_heads=2, vocab_size=8, num_local_experts=2, **sizes)
    with pytest.raises(MansuError, match="it is a mixture of experts"):
        mtl.load(transformers.MixtralForCausalLM(config))


def stored(dense: transformers.PreTrainedModel, folder: Path, dtype=torch.float32, **options) -> Path:
    """A 4-bit checkpoint as Hugging Face writes it."""
    dense.save_pretrained(folder / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    packed = type(dense).from_pretrained(folder / "dense", quantization_config=config, dtype=dtype)
    packed.save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_map_and_cache_are_those_of_the_twin(family: str, twins) -> None:
    real, twin = twins[family]
    assert Anatomy.of(real) == Anatomy.of(twin)
    assert linear_weights(real) == linear_weights(twin)
    for layer in range(2):
        for read in (attention_weights, mlp_weights):
            a, b = vars(read(real, layer)), vars(read(twin, layer))
            assert all(b[k] is None if a[k] is None else torch.equal(a[k], b[k]) for k in a)
        a, b = (norm_weights(m, layer, "attn") for m in (real, twin))
        assert torch.equal(a.weight, b.weight)
    (_, a), (_, b) = (m.run_with_cache(random_pairs().clean) for m in (real, twin))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=2e-6, equal_nan=True)
    mark = fingerprint(real)
    assert mark != fingerprint(twin)
    again = mtl.load(real.original_model)
    assert fingerprint(again) == fingerprint(copy.deepcopy(real)) == mark
    shared = {p.data_ptr() for p in parameters(real).values()} & {p.data_ptr() for p in parameters(again).values()}
    assert not shared


@pytest.mark.parametrize("family", FAMILIES)
def test_the_packed_parameters_are_the_only_weights(family: str, twins) -> None:
    real = mtl.load(wide(family), quantized="nf4")
    tokens = random_pairs().clean
    before = real(tokens)
    for name, value in parameters(real).items():
        if name.endswith((".q_proj.weight", ".query_key_value.weight", ".c_attn.weight")):
            value.zero_()  # code 0 is -1: every weight is now minus its block's absmax
    assert not torch.allclose(real(tokens), before)
    hf_size = sum(p.numel() for p in parameters(real).values())
    assert sum({id(p): p.numel() for p in real.parameters()}.values()) == hf_size, "no second copy anywhere"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_the_graph_keeps_no_dense_matrix(family: str, twins) -> None:
    real, sizes = twins[family][0], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    start = ("blocks.0.hook_in", lambda stream, hook: stream.detach().requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), real.hooks(fwd_hooks=[start]):
        real(random_pairs().clean)
    dense = {(64, 64), (32, 64), (192, 64), (128, 64), (64, 128)}
    head = 1  # the output embedding, [64, 64] here, is dense
    assert sum(size in dense for size in sizes) <= head


@pytest.mark.parametrize("family", some(FAMILIES, ["llama", "gemma2", "gpt_neox", "gpt2"]))
def test_computing_follows_the_dtype_asked_for(family: str, tmp_path: Path) -> None:
    where = stored(wide(family), tmp_path, torch.bfloat16, bnb_4bit_compute_dtype=torch.float16)
    twin = mtl.quantize(
        mtl.load(mtl.load(tmp_path / "dense", dtype=torch.bfloat16).original_model, dtype=torch.float32)
    )
    model, pairs = mtl.load(where, dtype=torch.float32), random_pairs()
    assert {p.dtype for p in parameters(model).values()} == {torch.float32, torch.uint8}
    torch.testing.assert_close(model(pairs.clean), twin(pairs.clean), rtol=0, atol=1e-6)
    a, b = (mtl.edge_attribution(m, pairs).tensor for m in (model, twin))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    kept = mtl.load(where)
    assert kept(pairs.clean).dtype == torch.bfloat16


def test_storage_nesting_and_skipped_layers_change_no_numbers(tmp_path: Path) -> None:
    tokens, dense = random_pairs().clean, wide("llama")
    twin = mtl.quantize(mtl.load(dense))
    # Packed bytes kept in a float tensor, as for FSDP: some of them read as NaN.
    model = mtl.load(stored(dense, tmp_path / "a", bnb_4bit_quant_storage=torch.bfloat16))
    torch.testing.assert_close(model(tokens), twin(tokens), rtol=0, atol=1e-6)
    model = mtl.load(stored(dense, tmp_path / "b", llm_int8_skip_modules=["lm_head", "q_proj"]))
    q = {
        f"model.layers.{i}.self_attn.q_proj.weight": parameters(mtl.load(dense))[
            f"model.layers.{i}.self_attn.q_proj.weight"
        ]
        for i in range(2)
    }
    torch.testing.assert_close(model(tokens), rebuild(twin, q)(tokens), rtol=0, atol=1e-6)
    assert torch.equal(attention_weights(model, 0).q, attention_weights(mtl.load(dense), 0).q)
    for family in ("gpt2", "gpt_neox"):
        fused = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}[family]
        dense = wide(family)
        model = mtl.load(stored(dense, tmp_path / family, llm_int8_skip_modules=["lm_head", fused]))
        live = {n: v for n, v in parameters(mtl.load(dense)).items() if f"{fused}.weight" in n}
        wanted = rebuild(mtl.quantize(mtl.load(dense)), live)
        torch.testing.assert_close(model(tokens), wanted(tokens), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("family", "blocks"), crossed(FAMILIES, [(32, True), (128, False)]))
def test_other_block_sizes_in_memory(family: str, blocks: tuple[int, bool]) -> None:
    """Block sizes that no BitsAndBytesConfig can ask for, on the fused gpt2 and gpt_neox too; decoded one by one."""
    (block, nested), hf = blocks, wide(family, 128)
    dense = mtl.load(hf)
    converted = mtl.load(hf, quantized="nf4").original_model
    values = {}
    for name, entry in linear_weights(dense).items():
        weight = parameters(dense)[name]
        weight = (weight.T if entry.transposed else weight).contiguous()
        codes, state = bnb.functional.quantize_4bit(
            weight, blocksize=block, quant_type="nf4", compress_statistics=nested
        )
        parameter = parameters(converted)[name]
        parameter.data, parameter.quant_state = codes, state
        plainly = bnb.functional.dequantize_4bit(codes, state)
        values[name] = (plainly.T if entry.transposed else plainly).contiguous()
    model, twin, pairs = mtl.load(converted), rebuild(dense, values), random_pairs()
    assert next(p.quant_state.nested for p in parameters(model).values() if hasattr(p, "quant_state")) == nested
    torch.testing.assert_close(model(pairs.clean), twin(pairs.clean), rtol=0, atol=3e-6)
    a, b = (mtl.edge_attribution(m, pairs).tensor for m in (model, twin))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_what_a_quantized_model_is_asked_for_must_be_what_it_is(tmp_path: Path) -> None:
    where = stored(wide("llama"), tmp_path)
    for source in (where, mtl.load(where).original_model):
        mtl.load(source, quantized="nf4")
        with pytest.raises(MansuError, match=r"quantized='fp4', but model\.layers\.0\..* is stored in nf4 already"):
            mtl.load(source, quantized="fp4")


@pytest.mark.parametrize("memory", [False, True])
def test_broken_weights_are_found_through_the_codes(memory: bool, tmp_path: Path) -> None:
    hf = wide("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    hf.save_pretrained(tmp_path)
    with pytest.raises(MansuError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        mtl.load(hf if memory else tmp_path, quantized="nf4")
