"""The models room: loading, saving, copies, names, component slices, and the hook facts that other rooms build on."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.activations import ACT2FN

from mansu_tl import models
from mansu_tl.errors import MansuError
from mansu_tl.models import (
    Anatomy,
    attention_weights,
    fingerprint,
    flat_indices,
    linear_weights,
    load,
    loading,
    mlp_weights,
    norm_weights,
    parameters,
    plain,
    rebuild,
    save,
)
from mansu_tl.models.families import families
from tests.tiny import FAMILIES, tiny, tiny_tokenizer

TOKENS = torch.tensor([[1, 5, 17, 40, 9, 63, 22], [1, 33, 8, 8, 51, 12, 60]])

VARIANTS = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 1, "sliding_window": 3}),
    ("gemma3", {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "n_inner": None}),
]
IDS = [f"{family}-{'-'.join(options)}" for family, options in VARIANTS]
EVERY = [(family, {}) for family in FAMILIES] + VARIANTS
EVERY_ID = [*FAMILIES, *IDS]


def logits(model: PreTrainedModel | TransformerBridge) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS) if isinstance(model, TransformerBridge) else model(TOKENS).logits


@functools.cache
def shared(case: int) -> TransformerBridge:
    """A loaded model for tests that only look at it."""
    family, options = EVERY[case]
    return load(tiny(family, **options))


def eager(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    return model


def capture(
    model: TransformerBridge, *names: str, edits: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """What passes the named hooks; `edits` replace what passes others."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(tensor: torch.Tensor, hook: object) -> None:
            seen[name] = tensor.detach().clone()

        return hook

    swaps = [(name, lambda tensor, hook, value=value: value) for name, value in (edits or {}).items()]
    with torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=[*swaps, *((name, keep(name)) for name in names)])
    return seen


def perturbed(model: TransformerBridge, *components: str, fill: float | None = None) -> TransformerBridge:
    """The model with some components' weights shifted, or set to `fill`."""
    live = parameters(model)
    values: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(7)
    for piece in (piece for component in components for piece in Anatomy.of(model).slices(component)):
        value = values.setdefault(piece.parameter, live[piece.parameter].detach().clone())
        index = flat_indices(piece, value.shape)
        noise = 0.5 + torch.rand(index.shape, generator=generator)
        value.view(-1)[index] = value.view(-1)[index] + noise if fill is None else torch.full(index.shape, fill)
    return rebuild(model, values)


def normalized(x: torch.Tensor, norm: models.NormWeights) -> torch.Tensor:
    if norm.kind == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(len(EVERY)), ids=EVERY_ID)
def test_load_gives_the_logits_of_hf_eager(case):
    family, options = EVERY[case]
    hf, bridge = eager(tiny(family, **options)), shared(case)
    torch.testing.assert_close(logits(bridge), logits(hf), rtol=0, atol=3e-6 if family == "gpt2" else 0)
    assert bridge.tokenizer is None
    assert not bridge.training
    assert not bridge.original_model.training
    assert not any(p.requires_grad for p in bridge.original_model.parameters())
    assert not any(p.requires_grad for p in bridge.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_load_never_changes_the_model_it_is_given(family):
    hf, twin = tiny(family).train(), tiny(family)
    config, state = hf.config.to_dict(), torch.get_rng_state()
    bridge = load(hf)
    with torch.no_grad():
        for parameter in parameters(bridge).values():
            parameter.zero_()
    assert [n for n, _ in hf.named_modules()] == [n for n, _ in twin.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(hf.parameters(), twin.parameters(), strict=True))
    assert all(p.requires_grad for p in hf.parameters())
    assert hf.training
    assert hf.config.to_dict() == config
    assert hf.config._attn_implementation == twin.config._attn_implementation
    assert torch.equal(torch.get_rng_state(), state), "loading drew random numbers"


def test_load_copies_and_keeps_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    bridge = load(tiny("llama"), tokenizer=tokenizer)
    assert bridge.tokenizer is not tokenizer
    assert "add_bos_token" not in tokenizer.init_kwargs
    assert bridge.to_tokens("w5 w6").tolist() == [[1, 5, 6]]
    save(bridge, tmp_path / "m")
    again = load(tmp_path / "m")
    for loaded in (again.tokenizer, rebuild(again).tokenizer, AutoTokenizer.from_pretrained(tmp_path / "m")):
        assert loaded("w5 extra w6").input_ids == [5, 64, 6]


def test_embedded_names_win_over_folders(tmp_path, monkeypatch):
    save(tiny("llama", seed=1), tmp_path / "package" / "embedded" / "pocket")
    save(tiny("llama", seed=2), tmp_path / "here" / "pocket")
    monkeypatch.setattr(loading, "resources", SimpleNamespace(files=lambda name: tmp_path / "package"))
    monkeypatch.chdir(tmp_path / "here")
    assert fingerprint(load("pocket")) == fingerprint(tiny("llama", seed=1))
    assert fingerprint(load("./pocket")) == fingerprint(tiny("llama", seed=2)) == fingerprint(load(Path("pocket")))
    with pytest.raises(MansuError, match=r"pocket-never.*missing from this installation"):
        load("pocket-never")


def broken(tmp_path: Path, what: str) -> str:
    """A folder with one thing wrong."""
    folder = save(tiny("llama"), tmp_path / what)
    config, weights = folder / "config.json", folder / "model.safetensors"
    facts, tensors = json.loads(config.read_text()), load_file(weights)
    key = "model.layers.1.mlp.up_proj.weight"
    if what == "no config":
        config.unlink()
    elif what == "bad config":
        config.write_text("{")
    elif what == "bad field":
        config.write_text(json.dumps(facts | {"hidden_size": "many"}))
    elif what == "no weights":
        weights.unlink()
    elif what == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "missing":
        save_file({k: v for k, v in tensors.items() if k != key}, weights, metadata={"format": "pt"})
    elif what == "unexpected":
        save_file(tensors | {"model.layers.9.extra": torch.zeros(2)}, weights, metadata={"format": "pt"})
    elif what == "shape":
        save_file(tensors | {key: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    elif what == "nan":
        tensors[key][2, 3] = math.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "inf":
        tensors[key][2, 3] = math.inf
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "quantized":
        config.write_text(json.dumps(facts | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    elif what == "bad tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif what == "head":
        config.write_text(json.dumps(facts | {"architectures": ["LlamaForSequenceClassification"]}))
    return str(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "no config.json"),
        ("bad config", "config.json cannot be read"),
        ("bad field", "config.json cannot be read"),
        ("no weights", "no .safetensors file"),
        ("pickle only", "no .safetensors file"),
        ("truncated", "weights cannot be read"),
        ("missing", r"missing weight model\.layers\.1\.mlp\.up_proj\.weight;"),
        ("unexpected", r"unexpected weight model\.layers\.9\.extra;"),
        ("shape", r"(weights cannot be read|mismatched weight)"),
        ("nan", r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
        ("inf", r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
        ("quantized", "says that it is quantized with gptq, and holds no matrix in codes"),
        ("bad tokenizer", "tokenizer cannot be read"),
        ("head", r"LlamaForSequenceClassification.*not supported; use one of llama \(LlamaForCausalLM\), mistral"),
    ],
)
def test_load_refuses_a_broken_folder_in_one_line(tmp_path, what, message, capfd):
    folder = broken(tmp_path, what)
    capfd.readouterr()
    with pytest.raises(MansuError, match=message) as caught:
        load(folder)
    assert folder in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "chatter"


def test_load_refuses_what_it_cannot_take(tmp_path, monkeypatch):
    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").touch()  # never opened: the architecture is refused first
    with pytest.raises(MansuError, match=r"model type 't5' is not supported; use one of .*gemma3 .*gpt2"):
        load(tmp_path / "t5")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    mixtral = AutoModelForCausalLM.from_config(MixtralConfig(num_key_value_heads=2, **sizes))
    for use in (load, Anatomy.of, parameters):
        with pytest.raises(MansuError, match="MixtralForCausalLM of model type 'mixtral' is not supported"):
            use(mixtral)
    for source in ("./nowhere", "/nowhere/at/all", "a/b/c", ".hidden", Path("nowhere")):
        with pytest.raises(MansuError, match="no such folder"):
            load(source)
    (tmp_path / "file").touch()
    with pytest.raises(MansuError, match="this is a file"):
        load(tmp_path / "file")
    for source, what in ((3, "got a int"), (load(tiny("llama")), "it is hooked already; use it as it is")):
        with pytest.raises((MansuError, TypeError), match=rf"{what}|source"):  # TypeError: jaxtyping
            load(source)
    with pytest.raises(MansuError, match="device 'warp'"):
        load(tiny("llama"), device="warp")
    with pytest.raises(MansuError, match=r"torch\.int8"):
        load(tiny("llama"), dtype=torch.int8)
    with pytest.raises(MansuError, match="scale_attn_weights=False"):
        load(tiny("gpt2", scale_attn_weights=False))
    with pytest.raises(MansuError, match="attention_bias=False"):
        load(tiny("gpt_neox", attention_bias=False))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MansuError, match="somebody/something: no such folder, and not to be had from the hub"):
        load("somebody/something")
    with pytest.raises(MansuError, match="gpt2-small: no such folder, and not to be had from the hub as gpt2"):
        load("gpt2-small")


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gpt2", {"transformer.h.{}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
                  "transformer.h.{}.attn.masked_bias": torch.tensor(-1e4)}),
        ("gpt_neox", {"gpt_neox.layers.{}.attention.bias": torch.ones(1, 1, 8, 8).tril(),
                      "gpt_neox.layers.{}.attention.masked_bias": torch.tensor(-1e9),
                      "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": torch.ones(1)}),
        *((family, {"model.layers.{}.self_attn.rotary_emb.inv_freq": torch.ones(4),
                    "model.layers.{}.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 8)})
          for family in ("llama", "mistral", "qwen3", "gemma2", "gemma3")),
    ],
    ids=["gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3"],
)  # fmt: skip
def test_buffers_of_old_checkpoints_are_passed_over_and_weights_are_not(tmp_path, family, buffers):
    folder = save(tiny(family), tmp_path / "m")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    old = {name.format(i): value.clone() for name, value in buffers.items() for i in range(2)}
    save_file(tensors | old, weights, metadata={"format": "pt"})
    bridge = load(folder)
    assert fingerprint(bridge) == fingerprint(tiny(family))
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(TOKENS).logits
        torch.testing.assert_close(bridge(TOKENS, return_type="logits"), reference, rtol=0, atol=2e-6)
    assert sorted(load_file(save(bridge, tmp_path / "again") / "model.safetensors")) == sorted(tensors)
    name = next(iter(old)).rpartition(".")[0] + ".extra.weight"
    save_file(tensors | old | {name: torch.zeros(2)}, weights, metadata={"format": "pt"})
    with pytest.raises(MansuError, match=rf"unexpected weight {name.replace('.', '[.]')};"):
        load(folder)


def test_adapters_and_gguf_files_are_told_the_way(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (adapter / "adapter_model.safetensors").touch()
    way = (
        r"adapter of some/base, no model; merge it first: peft.PeftModel.from_pretrained\(AutoModelForCausalLM."
        r"from_pretrained\('some/base'\), '.*/adapter'\).merge_and_unload\(\), and pass what that gives"
    )
    with pytest.raises(MansuError, match=way):
        load(adapter)
    # transformers loads such a folder with its adapter in place where peft is installed, and without it elsewhere
    both = save(tiny("llama"), tmp_path / "both")
    (both / "adapter_config.json").write_text("{")
    with pytest.raises(MansuError, match="this folder holds an adapter of BASE, no model; merge it first"):
        load(both)
    file = tmp_path / "gguf" / "tiny-Q4_K_M.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    for source in (file, file.parent):
        with pytest.raises(MansuError, match=r"tiny-Q4_K_M.gguf: its head ends too soon; copy the file again"):
            load(source)


def test_a_model_unpacked_from_gguf_is_saved_as_the_dense_one_it_is(tmp_path):
    """transformers leaves the file's format in the config; a folder that says so is refused by everyone."""
    hf = tiny("llama")
    hf.config.quantization_config = {"quant_method": "gguf"}
    folders = save(load(hf), tmp_path / "bridge"), save(hf, tmp_path / "plain")
    for folder in folders:
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert fingerprint(load(folder)) == fingerprint(tiny("llama"))
    assert hf.config.quantization_config  # the user's own model is never changed


# ---- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "dtype"),
    [
        *((family, options, torch.float32) for family, options in EVERY),
        *((family, {}, torch.bfloat16) for family in FAMILIES),
    ],
    ids=[*EVERY_ID, *(f"{family}-bf16" for family in FAMILIES)],
)
def test_save_and_load_are_bit_exact(tmp_path, family, options, dtype, capfd):
    bridge = load(tiny(family, **options), dtype=dtype)
    assert save(bridge, tmp_path / "m") == tmp_path / "m"
    again = load(tmp_path / "m")
    assert capfd.readouterr() == ("", ""), "chatter"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    before, after, live = parameters(bridge), parameters(again), dict(reference.named_parameters())
    assert list(before) == list(after) == list(live)
    for name, value in before.items():
        assert value.dtype == after[name].dtype == live[name].dtype == dtype
        assert torch.equal(value, after[name])
        assert torch.equal(value, live[name])
    assert torch.equal(logits(bridge), logits(again))
    if family != "gpt2":
        assert torch.equal(logits(again), logits(reference))
    tied = bridge.original_model.config.tie_word_embeddings
    on_disk = (
        "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
    )  # transformers keeps neox's old name on disk
    assert (on_disk in load_file(tmp_path / "m" / "model.safetensors")) != tied
    head, embedding = reference.get_output_embeddings().weight, reference.get_input_embeddings().weight
    assert (head is embedding) == tied
    assert {entry.name for entry in (tmp_path / "m").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_save_casts(tmp_path):
    bridge = load(tiny("gemma3"))
    save(bridge, tmp_path / "m", dtype=torch.bfloat16)
    assert fingerprint(load(tmp_path / "m")) == fingerprint(tiny("gemma3").to(torch.bfloat16))
    assert fingerprint(load(tmp_path / "m", dtype=torch.float32)) == fingerprint(tiny("gemma3").bfloat16().float())
    assert fingerprint(bridge) == fingerprint(tiny("gemma3")), "saving changed the model"
    big = tiny("llama")
    with torch.no_grad():
        big.model.norm.weight[3] = 1e6
    with pytest.raises(MansuError, match=r"model\.norm\.weight: does not fit torch\.float16"):
        save(big, tmp_path / "big", dtype=torch.float16)
    big.model.norm.to(torch.bfloat16)
    with pytest.raises(MansuError, match=r"several dtypes \(torch\.bfloat16, torch\.float32\)"):
        save(big, tmp_path / "big")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_save_replaces_models_and_nothing_else(tmp_path, monkeypatch):
    one, two = load(tiny("llama", seed=1), tokenizer=tiny_tokenizer()), load(tiny("llama", seed=2))
    folder = save(one, tmp_path / "deep" / "m")
    save(two, folder)
    assert fingerprint(load(folder)) == fingerprint(two)
    assert load(folder).tokenizer is None
    (folder / "notes.md").write_text("mine")
    with pytest.raises(MansuError, match=r"would delete notes\.md"):
        save(one, folder)
    (folder / "notes.md").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.json").write_text("{}")
    with pytest.raises(MansuError, match="no model folder"):
        save(one, tmp_path / "other")
    with pytest.raises(MansuError, match="this is a file"):
        save(one, folder / "config.json")
    with pytest.raises(MansuError, match="cannot write there"):
        save(one, folder / "config.json" / "inside")
    (tmp_path / "empty").mkdir()
    save(one, tmp_path / "empty")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(one.tokenizer), "save_pretrained", full)
    with pytest.raises(MansuError, match=r"cannot write there \(No space left on device\)"):
        save(one, folder)
    assert fingerprint(load(folder)) == fingerprint(two)
    assert sorted(entry.name for entry in tmp_path.rglob(".*")) == []


# ---- names and copies ----------------------------------------------------------------------------------------------


def booted(family: str, **options: object) -> TransformerBridge:
    """A bridge as a user boots it, without this package."""
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {"name_or_path": "none", "add_bos_token": True}
    hf = tiny(family, **options)
    return TransformerBridge.boot_transformers("none", hf_model=hf, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize(("family", "options"), EVERY, ids=EVERY_ID)
def test_parameters_of_any_bridge_are_those_of_hf(family, options):
    bridge, twin = booted(family, **options), dict(tiny(family, **options).named_parameters())
    live = parameters(bridge)
    assert list(live) == list(twin)
    assert all(torch.equal(live[name], twin[name]) for name in twin)
    assert {id(p) for p in live.values()} <= {id(p) for p in bridge.original_model.parameters()}
    copied = plain(bridge)
    assert not isinstance(copied, TransformerBridge)
    assert type(copied) is type(tiny(family))
    assert [n for n, _ in copied.named_modules()] == [n for n, _ in tiny(family, **options).named_modules()]
    torch.testing.assert_close(logits(copied), logits(bridge), rtol=0, atol=3e-6 if family == "gpt2" else 0)
    assert fingerprint(copied) == fingerprint(bridge) == fingerprint(load(copied))
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in live.values()}
    assert copied.config._attn_implementation == "eager"
    assert not copied.training
    assert not any(p.requires_grad for p in copied.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_weights_are_refused(family):
    bridge = booted(family)
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert fingerprint(bridge) == fingerprint(tiny(family)), "nothing folded yet"
    bridge.process_weights(center_unembed=False)
    for use in (parameters, plain, rebuild, fingerprint):
        with pytest.raises(MansuError, match=r"weights were folded.*load it with mansu_tl\.load"):
            use(bridge)


def test_lost_and_untied_parameters_are_named():
    bridge = load(tiny("gemma2"))
    bridge.original_model.lm_head._original_component.weight = torch.nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(MansuError, match=r"lm_head\.weight: no longer tied to model\.embed_tokens\.weight"):
        parameters(bridge)
    bridge = load(tiny("llama"))
    bridge.original_model.lm_head._original_component.weight = None
    with pytest.raises(MansuError, match=r"lm_head\.weight: not found"):
        parameters(bridge)


@pytest.mark.parametrize("edited", ["fused", "split"])
def test_a_neox_bridge_edited_in_place_is_refused(edited, tmp_path):
    bridge = load(tiny("gpt_neox"))
    fused = parameters(bridge)["gpt_neox.layers.1.attention.query_key_value.weight"]
    with torch.no_grad():
        (fused if edited == "fused" else bridge.blocks[1].attn.k.original_component.weight)[9] += 1
    for use in (plain, rebuild, fingerprint, lambda model: save(model, tmp_path / "m")):
        with pytest.raises(MansuError, match=r"layers\.1\.attention\.query_key_value\.weight: differs .* its k rows"):
            use(bridge)


@pytest.mark.parametrize("family", FAMILIES)
def test_rebuild_changes_what_it_is_told_and_nothing_else(family):
    bridge = load(tiny(family), tokenizer=tiny_tokenizer())
    before = fingerprint(bridge)
    name = next(n for n in parameters(bridge) if n.endswith(("o_proj.weight", "dense.weight", "c_proj.weight")))
    value = parameters(bridge)[name] * 2
    changed = rebuild(bridge, {name: value})
    assert fingerprint(bridge) == before
    assert changed.tokenizer is bridge.tokenizer
    expected = tiny(family)
    with torch.no_grad():
        dict(expected.named_parameters())[name].mul_(2)
    assert fingerprint(changed) == fingerprint(expected)
    torch.testing.assert_close(logits(changed), logits(eager(expected)), rtol=0, atol=3e-6 if family == "gpt2" else 0)
    assert not torch.equal(logits(changed), logits(bridge))
    value.zero_()
    assert fingerprint(changed) == fingerprint(expected), "the new bridge shares storage with the values"


def test_rebuild_refuses_values_that_do_not_fit():
    bridge = load(tiny("gemma2"), dtype=torch.bfloat16)
    name = "model.norm.weight"
    value = parameters(bridge)[name].float()
    assert fingerprint(rebuild(bridge, {name: value})) == fingerprint(bridge)
    refused = [
        ({"model.nrom.weight": value}, "no such parameter"),
        ({"lm_head.weight": torch.zeros(64, 32)}, r"tied to model\.embed_tokens\.weight"),
        ({name: value[:-1]}, r"shape \(31,\), the parameter \(32,\)"),
        ({name: value + 1e-4}, "would be rounded"),
        ({name: value * math.nan}, "NaN or infinity"),
        ({name: value.double() * 0 + 1e300}, "NaN or infinity"),
    ]
    for values, message in refused:
        with pytest.raises(MansuError, match=message):
            rebuild(bridge, values)


def words_of(p: torch.Tensor) -> list[int]:
    """A bfloat16 tensor's bytes as signed 32-bit integers, by struct alone."""
    halves = [value & 0xFFFF for value in (p.detach().float().flatten().view(torch.int32) >> 16).tolist()]
    raw = struct.pack(f"<{len(halves)}H", *halves)
    raw += bytes(-len(raw) % 4)
    return list(struct.unpack(f"<{len(raw) // 4}i", raw))


def projected(words: list[int], weights: list[list[int]]) -> list[int]:
    """Blocks of 4096 words times eight columns of weights, in Python's own integers."""
    out = []
    for start in range(0, len(words), 4096):
        block = words[start : start + 4096]
        out += [sum(w * row[c] for w, row in zip(block, weights, strict=False)) for c in range(8)]
    if len(out) <= 4096:
        return out
    raw = struct.pack(f"<{len(out)}q", *out)
    return projected(list(struct.unpack(f"<{len(raw) // 4}i", raw)), weights)


@pytest.mark.parametrize("options", [{}, {"vocab_size": 513, "hidden_size": 36}])
def test_fingerprint_is_the_hash_it_says_it_is(options):
    hf = tiny("gpt2", **options).bfloat16()
    weights = torch.randint(-256, 257, (4096, 8), generator=torch.Generator().manual_seed(0)).tolist()
    digest = hashlib.sha256()
    for name, p in sorted(hf.named_parameters()):
        digest.update(f"{name}|torch.bfloat16|{tuple(p.shape)}|".encode())
    for _, p in sorted(hf.named_parameters()):
        values = projected(words_of(p), weights)
        digest.update(struct.pack(f"<{len(values)}q", *values))
    assert fingerprint(hf) == digest.hexdigest()
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.weight[3, 4] *= -1
    assert fingerprint(hf) != digest.hexdigest()


def test_a_tensor_of_many_blocks_is_projected_again():
    from mansu_tl.models.fingerprint import _projected, _weights

    weights = _weights()
    words = torch.randint(-(2**31), 2**31, (4096 * 600 + 77,), generator=torch.Generator().manual_seed(1)).int()
    assert _projected(words, weights).tolist() == projected(words.tolist(), weights.long().tolist())


def test_fingerprint_sees_every_change_that_people_make():
    hf = tiny("llama", intermediate_size=47, dtype=torch.float32)
    name, seen = "model.layers.1.mlp.up_proj.weight", [fingerprint(hf)]
    weight = hf.get_parameter(name)
    assert weight.numel() % 2 == 0

    def swap(a, b):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)

    for change in (
        lambda w: w.neg_(),  # an even number of sign bits, all the same bit
        lambda w: w[2].neg_(),
        lambda w: swap(w[3], w[4]),
        lambda w: swap(w[0, :1], w[1, :1]),
        lambda w: w.view(torch.int32)[0, 0].bitwise_xor_(1),
        lambda w: w.view(torch.int32)[-1, -1].bitwise_xor_(1),
        lambda w: w.add_(0.25).sub_(0.125),
        lambda w: w.data.mul_(2),  # autograd's version counter does not see this
    ):
        with torch.no_grad():
            change(weight.data)
        seen.append(fingerprint(hf))
    assert len(set(seen)) == len(seen)
    odd = tiny("llama", intermediate_size=47).bfloat16()
    before = fingerprint(odd)
    odd.model.layers[0].mlp.down_proj.weight.data[-1, -1] *= 2
    assert fingerprint(odd) != before


# ---- components ----------------------------------------------------------------------------------------------------


def test_anatomy_of_llama_and_neox():
    cmap = Anatomy.of(load(tiny("llama")))
    assert (cmap.n_layers, cmap.n_heads, cmap.n_kv_heads, cmap.d_head, cmap.d_model, cmap.d_mlp) == (2, 4, 2, 8, 32, 48)
    assert (cmap.family, cmap.parallel, cmap.post_norms) == ("llama", False, False)
    assert cmap.writers == ("embed", "L0H0", "L0H1", "L0H2", "L0H3", "MLP0", "L1H0", "L1H1", "L1H2", "L1H3", "MLP1")
    first = ("L0H0.q", "L0H1.q", "L0H2.q", "L0H3.q", "L0KV0.k", "L0KV1.k", "L0KV0.v", "L0KV1.v", "MLP0.in")
    assert cmap.readers == (*first, *(name.replace("L0", "L1").replace("MLP0", "MLP1") for name in first), "logits")
    assert Anatomy.of(tiny("gpt_neox")).parallel
    assert not Anatomy.of(tiny("gpt_neox", use_parallel_residual=False)).parallel
    assert Anatomy.of(tiny("gemma3")).post_norms
    assert Anatomy.of(tiny("gpt2", n_inner=None)).d_mlp == 128
    assert {Anatomy.of(tiny(f)).family for f in FAMILIES} == {f.name for f in families()} == set(FAMILIES)


@pytest.mark.parametrize(("family", "options"), EVERY, ids=EVERY_ID)
def test_components_cover_every_linear_weight_exactly_once(family, options):
    model = tiny(family, **options)
    cmap, live = Anatomy.of(model), dict(model.named_parameters())
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in live.items()}
    heads = [f"L{i}H{h}" for i in range(2) for h in range(4)]
    kv = [f"L{i}KV{h}.{part}" for i in range(2) for h in range(cmap.n_kv_heads) for part in "kv"]
    for component in [*heads, *kv, "MLP0", "MLP1"]:
        for piece in cmap.slices(component):
            counts[piece.parameter].view(-1)[flat_indices(piece, counts[piece.parameter].shape)] += 1
    linear = linear_weights(model)
    bias_of_out = {f"{f.layers}.{i}.{f.o}.bias" for f in families() for i in range(2)}
    for name, count in counts.items():
        owned = name in linear or (name.removesuffix("bias") + "weight" in linear and name not in bias_of_out)
        assert (count == int(owned)).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_make_up_their_mlp(family):
    model = tiny(family)
    cmap, live = Anatomy.of(model), dict(model.named_parameters())
    whole = {p.parameter for p in cmap.slices("MLP1")}
    found = {name: [] for name in whole}
    for neuron in range(cmap.d_mlp):
        for piece in cmap.slices(f"MLP1.N{neuron}"):
            found[piece.parameter].append(flat_indices(piece, live[piece.parameter].shape))
    for name, parts in found.items():
        index = torch.cat(parts).sort().values if parts else torch.empty(0)
        if name.endswith(".bias") and live[name].shape[0] == cmap.d_model:
            assert not parts, "an output bias belongs to no neuron"
        else:
            assert torch.equal(index, torch.arange(live[name].numel()))


def test_unknown_components_are_refused():
    cmap = Anatomy.of(tiny("llama"))
    unknown = [
        "embed",
        "logits",
        "L0",
        "L2H0",
        "L0H4",
        "L0H0.k",
        "L0KV0",
        "L0KV2.k",
        "L0KV0.q",
        "MLP2",
        "MLP0.N48",
        "MLP0.in",
    ]
    for name in [*unknown, "", "L0H0 ", "l0h0", "MLP0.", "L-1H0"]:
        with pytest.raises(MansuError, match=r"unknown; names are .*2 layers, 4 heads, 2 KV heads, 48 neurons"):
            cmap.slices(name)


@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 0, 5), (0, 1, 2), (1, 0, 7), (1, 3, 6), (2, 1, 3), (1, 2, 2)])
def test_flat_indices_are_those_of_narrow(dim, start, stop):
    piece = models.WeightSlice("w", dim, start, stop)
    expected = torch.arange(5 * 7 * 3).view(5, 7, 3).narrow(dim, start, stop - start).flatten()
    assert torch.equal(flat_indices(piece, (5, 7, 3)), expected)
    for shape in ((5,), (1, 2, 2)):
        if not (len(shape) > dim and stop <= shape[dim]):
            with pytest.raises(MansuError, match=r"w: .* does not fit shape"):
                flat_indices(piece, shape)


@pytest.mark.parametrize("case", range(len(EVERY)), ids=EVERY_ID)
def test_zeroing_an_o_slice_removes_exactly_that_head(case):
    bridge, head = shared(case), 1 + case % 3
    o_in, o_out = "blocks.0.attn.o.hook_in", "blocks.0.attn.o.hook_out"
    before, after = (capture(m, o_in, o_out) for m in (bridge, perturbed(bridge, f"L0H{head}.o", fill=0.0)))
    assert torch.equal(after[o_in], before[o_in])
    gone = before[o_in].reshape(2, 7, 4, -1)[:, :, head] @ attention_weights(bridge, 0).o[head].T
    assert gone.abs().max() > 0.1
    torch.testing.assert_close(before[o_out] - after[o_out], gone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", range(len(EVERY)), ids=EVERY_ID)
def test_qkv_slices_change_only_their_head(case):
    bridge = shared(case)
    last = Anatomy.of(bridge).n_kv_heads - 1
    changed = perturbed(bridge, "L1H2.q", "L1KV0.k", f"L1KV{last}.v")
    names = {part: f"blocks.1.attn.hook_{part}" for part in "qkv"}
    before, after = (capture(model, *names.values()) for model in (bridge, changed))
    for part, head in (("q", 2), ("k", 0), ("v", last)):
        same = (after[names[part]] == before[names[part]]).all(-1).all(0).all(0)
        assert same.tolist() == [h != head for h in range(same.shape[0])], part


@pytest.mark.parametrize("case", range(len(EVERY)), ids=EVERY_ID)
def test_zeroing_a_neuron_removes_exactly_that_neuron(case):
    bridge, inside, out = shared(case), "blocks.0.mlp.out.hook_in", "blocks.0.mlp.hook_out"
    before, after = (capture(m, inside, out) for m in (bridge, perturbed(bridge, "MLP0.N17", fill=0.0)))
    assert ((before[inside] == after[inside]).all(0).all(0)).tolist() == [
        n != 17 for n in range(before[inside].shape[-1])
    ]
    assert not after[inside][..., 17].any(), "act(0) is 0 in every family"
    gone = before[inside][..., 17, None] * mlp_weights(bridge, 0).down[:, 17]
    torch.testing.assert_close(before[out] - after[out], gone, rtol=0, atol=5e-6)


def _act(bridge: TransformerBridge) -> str:
    config = bridge.original_model.config
    return config.hidden_act if hasattr(config, "hidden_act") else config.activation_function


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(len(EVERY)), ids=EVERY_ID)
def test_weights_reproduce_what_the_layers_compute(case):
    bridge, family = shared(case), EVERY[case][0]
    cmap, act = (
        Anatomy.of(bridge),
        ACT2FN[getattr(bridge.original_model.config, "hidden_activation", None) or _act(bridge)],
    )
    for layer in range(2):
        at = f"blocks.{layer}"
        seen = capture(
            bridge,
            *(f"{at}.{n}" for n in ("ln1.hook_in", "ln2.hook_in", "attn.hook_q", "attn.hook_k", "attn.hook_v")),
            *(f"{at}.{n}" for n in ("attn.hook_z", "attn.o.hook_out", "mlp.hook_out")),
            *((f"{at}.ln1_post.hook_out", f"{at}.ln2_post.hook_out") if cmap.post_norms else ()),
        )
        weights, mlp = attention_weights(bridge, layer), mlp_weights(bridge, layer)
        x = normalized(seen[f"{at}.ln1.hook_in"], norm_weights(bridge, layer, "attn"))
        for part in "qkv":
            bias = getattr(weights, f"{part}_bias")
            out = torch.einsum("bsd,hed->bshe", x, getattr(weights, part)) + (0 if bias is None else bias)
            # before any q/k norm and before the rotary embedding
            torch.testing.assert_close(out, seen[f"{at}.attn.hook_{part}"], rtol=0, atol=5e-6)
        z = seen[f"{at}.attn.hook_z"]
        assert z.shape == (2, 7, cmap.n_heads, cmap.d_head)
        out = torch.einsum("bshe,hde->bsd", z, weights.o) + (0 if weights.o_bias is None else weights.o_bias)
        torch.testing.assert_close(out, seen[f"{at}.attn.o.hook_out"], rtol=0, atol=5e-6)
        x = normalized(seen[f"{at}.ln2.hook_in"], norm_weights(bridge, layer, "mlp"))
        linear = torch.nn.functional.linear
        hidden = linear(x, mlp.up, mlp.up_bias)
        hidden = act(hidden) if mlp.gate is None else act(linear(x, mlp.gate, mlp.gate_bias)) * hidden
        torch.testing.assert_close(
            linear(hidden, mlp.down, mlp.down_bias), seen[f"{at}.mlp.hook_out"], rtol=0, atol=2e-5
        )
        for which, raw, post in (("attn_post", "attn.o", "ln1_post"), ("mlp_post", "mlp", "ln2_post")):
            if cmap.post_norms:
                out = normalized(seen[f"{at}.{raw}.hook_out"], norm_weights(bridge, layer, which))
                torch.testing.assert_close(out, seen[f"{at}.{post}.hook_out"], rtol=0, atol=5e-6)
            else:
                with pytest.raises(MansuError, match=rf"norm '{which}': {family} has attn, mlp, final"):
                    norm_weights(bridge, layer, which)
    seen = capture(bridge, "ln_final.hook_in", "unembed.hook_in")
    out = normalized(seen["ln_final.hook_in"], norm_weights(bridge, None, "final"))
    torch.testing.assert_close(out, seen["unembed.hook_in"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_views_of_the_parameters(family):
    bridge = load(tiny(family))
    storages = {p.untyped_storage().data_ptr() for p in parameters(bridge).values()}
    weights, mlp = attention_weights(bridge, 1), mlp_weights(bridge, 1)
    for value in [*vars(weights).values(), *vars(mlp).values()]:
        assert value is None or value.untyped_storage().data_ptr() in storages


def test_bfloat16_norms_come_in_float32():
    weight = norm_weights(load(tiny("gemma3"), dtype=torch.bfloat16), 0, "attn").weight
    stored = tiny("gemma3").model.layers[0].input_layernorm.weight.detach().bfloat16()
    assert torch.equal(weight, 1 + stored.float())
    assert not torch.equal(weight, (1 + stored).float())


def test_layers_and_norms_out_of_range_are_refused():
    bridge = load(tiny("llama"))
    for use in (attention_weights, mlp_weights, lambda m, i: norm_weights(m, i, "attn")):
        for layer in (-1, 2):
            with pytest.raises(MansuError, match=rf"layer {layer}: this model has layers 0\.\.1"):
                use(bridge, layer)
    with pytest.raises(MansuError, match="say which layer"):
        norm_weights(bridge, None, "mlp")


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_weights_are_those_that_bitsandbytes_quantizes(tmp_path, family):
    import bitsandbytes as bnb

    save(tiny(family), tmp_path / "m")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config, device_map="cpu")
    live = dict(tiny(family).named_parameters())
    found = linear_weights(load(tmp_path / "m"))
    replaced = {f"{n}.weight" for n, m in quantized.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert set(found) == replaced
    assert found == linear_weights(tiny(family))
    for name, entry in found.items():
        assert entry.name == name
        assert entry.transposed == (family == "gpt2")
        shape = (entry.in_features, entry.out_features) if entry.transposed else (entry.out_features, entry.in_features)
        assert tuple(live[name].shape) == shape


def test_a_4bit_bridge_gives_dequantized_weights_and_is_never_edited(tmp_path):
    import bitsandbytes as bnb

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    dense = load(tiny("llama", **sizes))
    save(dense, tmp_path / "m")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=config, device_map="cpu")
    for module in hf.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs |= {"name_or_path": "none", "add_bos_token": True}
    bridge = TransformerBridge.boot_transformers("none", hf_model=hf.eval(), tokenizer=tokenizer, device="cpu")
    mark = fingerprint(bridge)
    logits(bridge)
    assert fingerprint(bridge) == mark != fingerprint(dense)
    assert Anatomy.of(bridge) == Anatomy.of(dense)
    assert linear_weights(bridge) == linear_weights(dense)
    for name, mine in (
        ("self_attn.q_proj", attention_weights(bridge, 1).q.flatten(0, 1)),
        ("mlp.up_proj", mlp_weights(bridge, 1).up),
    ):
        codes, state = bnb.functional.quantize_4bit(
            parameters(dense)[f"model.layers.1.{name}.weight"], quant_type="nf4"
        )
        assert torch.equal(mine, bnb.functional.dequantize_4bit(codes, state))
    for use in (plain, rebuild, lambda m: save(m, tmp_path / "n")):
        with pytest.raises(MansuError, match=r"packed torch\.uint8 weights"):
            use(bridge)
    assert fingerprint(load(bridge.original_model)) == mark, "taken from under its bridge with its packed bytes"
    next(m for m in hf.modules() if isinstance(m, bnb.nn.Linear4bit)).weight.quant_state.packing_format_for_cpu = True
    for use in (fingerprint, lambda m: attention_weights(m, 0)):
        with pytest.raises(MansuError, match="support_avx512bf16_for_cpu = False"):
            use(bridge)


# ---- facts about hooks that other rooms build on -------------------------------------------------------------------


@pytest.mark.parametrize("case", range(len(EVERY)), ids=EVERY_ID)
def test_hook_in_replaces_the_stream_and_ln2_reaches_the_mlp_only(case):
    bridge = shared(case)
    post = Anatomy.of(bridge).post_norms
    attn, mlp = ("ln1_post", "ln2_post") if post else ("attn.o", "mlp")
    attn, mlp, out = f"blocks.0.{attn}.hook_out", f"blocks.0.{mlp}.hook_out", "blocks.0.hook_out"
    stream = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    for name in ("blocks.0.hook_in", "blocks.0.hook_resid_pre"):
        seen = capture(bridge, attn, mlp, out, edits={name: stream})
        torch.testing.assert_close(seen[out], stream + seen[attn] + seen[mlp], rtol=0, atol=5e-6)
    before = capture(bridge, attn, mlp, out)
    after = capture(bridge, attn, mlp, out, edits={"blocks.0.ln2.hook_in": stream})
    assert torch.equal(after[attn], before[attn])
    assert not torch.equal(after[mlp], before[mlp])
    torch.testing.assert_close(after[out] - after[mlp], before[out] - before[mlp], rtol=0, atol=5e-6)
