"""GGUF: heads, blocks and grids against `gguf`'s own code, models against transformers, written files byte by byte."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

import mansu_tl as mtl
from mansu_tl.explorer import Explorer
from mansu_tl.models import linear_weights, orient, parameters, plain, rebuild
from mansu_tl.models.gguf import LAYOUTS, GgufFile, GgufWeights, gguf_weights, save_gguf
from mansu_tl.models.gguf.tokens import merges, read_tokenizer
from mansu_tl.models.gguf.write import written
from mansu_tl.models.packages import PACKAGED
from mansu_tl.quantization import find_grid, quantizer
from mansu_tl.study import bench, write_study_report
from mansu_tl.study.shipping import shipped_answers
from tests.gguf_files import write_gguf
from tests.tiny import FAMILIES, SMALL_TASK, sliced_task, tiny

PLAIN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


def awkward_matrix(rows: int = 40, columns: int = 96) -> torch.Tensor:
    """Random weights, and blocks of zeros, of one value, of ties at both ends and of whole numbers."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w[3], w[4, :32], w[5, :32], w[6] = 0, 0.5, -0.5, w[6].round()
    w[7, ::2], w[7, 1::2] = w[7].abs().max(), -w[7].abs().max()
    return w


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_are_read_as_gguf_reads_them_and_written_back(kind: str) -> None:
    layout, rng = LAYOUTS[kind], np.random.default_rng(0)
    raw = rng.integers(0, 256, (64, 2 * layout.size), dtype=np.uint8)
    blocks = layout.read(torch.from_numpy(raw))
    with np.errstate(invalid="ignore"):
        wanted = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    finite = np.isfinite(wanted)  # random bytes hold float16's infinities too
    assert finite.mean() > 0.8
    assert same_bits(blocks.values().numpy()[finite], wanted[finite])
    assert torch.equal(layout.write(torch.from_numpy(raw), blocks.codes), torch.from_numpy(raw))
    other = torch.from_numpy(rng.integers(0, layout.codes, tuple(blocks.codes.shape), dtype=np.uint8))
    changed = layout.read(layout.write(torch.from_numpy(raw), other))
    assert torch.equal(changed.codes, other)
    assert torch.equal(changed.step.nan_to_num(), blocks.step.nan_to_num())


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_grids_round_as_gguf_does(kind: str, scale: float) -> None:
    w, number = awkward_matrix() * scale, gguf.GGMLQuantizationType[kind.upper()]
    wanted = gguf.dequantize(gguf.quantize(w.numpy(), number), number)
    assert same_bits(quantizer(f"gguf-{kind}").roundtrip(w).numpy(), wanted)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_changes_codes_that_gguf_sees_and_no_others(kind: str, dtype: torch.dtype) -> None:
    w, grid, number = awkward_matrix().to(dtype), quantizer(f"gguf-{kind}"), gguf.GGMLQuantizationType[kind.upper()]
    encoded = grid.encode(w)
    direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    free = ~grid.absmax_mask(w) & (grid.width(w) > 0) & (direction > -0.5)
    target = torch.where(free, grid.neighbour(encoded.codes, direction), encoded.codes)
    edited = grid.floor_target(w, target, encoded.absmax, leave_unreachable=True)

    def raw_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = LAYOUTS[kind.upper()].read(torch.from_numpy(gguf.quantize(x.float().numpy(), number)))
        return blocks.codes, blocks.step

    (before, step), (after, step_after) = raw_codes(w), raw_codes(edited)
    moved = edited != w
    assert moved.sum() > 1000
    assert torch.equal(step, step_after)
    assert bool((before != after)[moved].all())
    assert torch.equal(before[~moved], after[~moved])


def test_a_grid_of_gguf_refuses_rows_that_no_block_fits() -> None:
    with pytest.raises(mtl.MansuError, match=r"gguf-q4_0: rows of 48 weights; GGUF blocks hold 32"):
        quantizer("gguf-q4_0").roundtrip(torch.randn(4, 48))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_comes_back_from_a_file(family: str, tmp_path: Path) -> None:
    hf = tiny(family)
    file = write_gguf(hf, family, tmp_path / "model.gguf")
    model = mtl.load(file)
    tokens = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(tokens).logits, rtol=1e-4, atol=1e-4)
    for name, value in hf.named_parameters():
        torch.testing.assert_close(parameters(model)[name], value, rtol=0, atol=2e-7, msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_an_edit_of_codes_is_all_that_a_written_file_differs_in(family: str, tmp_path: Path) -> None:
    hf = tiny(
        family, hidden_size=64, intermediate_size=64, **({} if family == "gpt_neox" else {"tie_word_embeddings": True})
    )
    model = mtl.load(
        write_gguf(hf, family, tmp_path / "model.gguf", "Q4_1", {"attn_output": "Q5_0", "token_embd": "Q8_0"})
    )
    weights = gguf_weights(model)
    assert weights is not None
    name = next(n for n, kind in weights.types.items() if kind == "Q4_1" and "layers.1" in n)
    blocks = weights.blocks(name)
    chosen = torch.rand(blocks.codes.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    codes = torch.where(chosen, (blocks.codes + 1) % 16, blocks.codes).to(torch.uint8)
    edited = rebuild(model, {name: replace(blocks, codes=codes).values()})
    out = save_gguf(edited, tmp_path / "edited.gguf")

    old, new = (np.fromfile(path, np.uint8) for path in (tmp_path / "model.gguf", out))
    stored = weights.ways[name].stored
    changed = np.flatnonzero(old != new)
    assert len(old) == len(new)
    assert changed.min() >= stored.start
    assert changed.max() < stored.start + stored.size
    # By gguf's own reader: every other tensor is the same, and of this one exactly the chosen codes moved.
    theirs = next(t for t in gguf.GGUFReader(out).tensors if t.name == stored.name)
    read = LAYOUTS["Q4_1"].read(torch.from_numpy(np.array(theirs.data)))
    assert torch.equal(weights.ways[name].arranged(read.codes), codes)
    again = mtl.load(out)
    for parameter, value in parameters(edited).items():
        assert torch.equal(parameters(again)[parameter], value), parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_kept_where_a_model_holds_their_values_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    hf = tiny("llama", hidden_size=64, intermediate_size=64)
    model = mtl.load(write_gguf(hf, "llama", tmp_path / "model.gguf", "Q4_1", {"attn_k": "Q8_0"}), dtype=dtype)
    weights = gguf_weights(model)
    assert weights is not None
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        blocks = weights.blocks(name)
        chosen = torch.rand(blocks.codes.shape, generator=torch.Generator().manual_seed(0)) < 0.1
        # Some codes of 8 bits lie closer together than bfloat16's values, so go far.
        codes = torch.where(chosen, (blocks.codes.int() + blocks.layout.codes // 2) % blocks.layout.codes, blocks.codes)
        new = replace(blocks, codes=codes.to(torch.uint8)).values().to(dtype)
        result = written(weights, name, new)
        assert result.how == "codes"
        assert torch.equal(weights.value(name, result.raw).to(dtype), new)
        read = blocks.layout.read(result.raw)
        assert torch.equal(weights.ways[name].arranged(read.codes)[~chosen], blocks.codes[~chosen])
        assert torch.equal(weights.ways[name].arranged(read.step), blocks.step)


def test_an_edit_off_the_codes_is_quantized_again_as_gguf_does(tmp_path: Path) -> None:
    model = mtl.load(
        write_gguf(tiny("llama", hidden_size=64, intermediate_size=64), "llama", tmp_path / "model.gguf", "Q4_0")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    moved = parameters(model)[name] + 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    again = mtl.load(save_gguf(rebuild(model, {name: moved}), tmp_path / "edited.gguf"))
    number = gguf.GGMLQuantizationType.Q4_0
    assert same_bits(parameters(again)[name].numpy(), gguf.dequantize(gguf.quantize(moved.numpy(), number), number))


def test_a_rewritten_model_equals_its_twin(tmp_path: Path) -> None:
    model = mtl.load(
        write_gguf(tiny("llama", hidden_size=64, intermediate_size=64), "llama", tmp_path / "model.gguf", "Q5_1")
    )
    noise = torch.Generator().manual_seed(0)
    edited = rebuild(model, {n: v + 0.01 * torch.randn(v.shape, generator=noise) for n, v in parameters(model).items()})
    again = parameters(mtl.load(save_gguf(edited, tmp_path / "edited.gguf")))
    for name, value in parameters(mtl.quantize(edited, "gguf")).items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_files_own_grid_moves_weights_onto_codes_of_the_file(family: str, tmp_path: Path) -> None:
    model = mtl.load(
        write_gguf(
            tiny(family, hidden_size=64, **{"n_inner" if family == "gpt2" else "intermediate_size": 64}),
            family,
            tmp_path / "model.gguf",
            "Q4_0",
        )
    )
    grid = quantizer("gguf").bound(model)
    live, linear = parameters(model), linear_weights(model)
    name = next(iter(linear))
    w = orient(live[name], linear[name])
    own = grid.of(name)
    encoded = own.encode(w)
    assert torch.equal(own.decode(encoded, torch.float32), w)
    direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    target = torch.where(own.width(w) > 0, own.neighbour(encoded.codes, direction), encoded.codes)
    edited = own.floor_target(w, target, encoded.absmax)
    assert bool((edited != w).all())
    new = orient(edited, linear[name]).contiguous()
    again = parameters(mtl.load(save_gguf(rebuild(model, {name: new}), tmp_path / "edited.gguf")))
    assert torch.equal(again[name], new)


def test_a_certificate_accounts_for_every_byte_of_two_files(tmp_path: Path) -> None:
    hf = tiny("llama", hidden_size=64, intermediate_size=64)
    original = write_gguf(hf, "llama", tmp_path / "model.gguf", "Q4_1")
    model = mtl.load(original)
    weights = gguf_weights(model)
    assert weights is not None
    name = "model.layers.0.self_attn.q_proj.weight"
    blocks = weights.blocks(name)
    chosen = torch.rand(blocks.codes.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    codes = torch.where(chosen, (blocks.codes + 3) % 16, blocks.codes).to(torch.uint8)
    edited = save_gguf(rebuild(model, {name: replace(blocks, codes=codes).values()}), tmp_path / "edited.gguf")
    indices = {name: chosen.flatten().nonzero()[:, 0]}
    for named in (None, indices):
        certificate = mtl.certify(original, edited, named)
        assert certificate.passed, certificate.faults
        assert certificate.quantizer == "gguf"
        assert certificate.n_edited == int(chosen.sum())
        assert certificate.edited_codes_changed_share == 1
    assert mtl.verification.certify_in_fresh_process(original, edited, indices).passed
    certificate.require_unchanged(original, edited)

    # One byte of each kind, and the certificate says where it is.
    data = edited.read_bytes()
    stored = {
        place: weights.ways[place].stored for place in (name, "model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    }
    cases = {
        "scale": (stored["model.layers.1.mlp.up_proj.weight"].start, r"up_proj.weight: 1 of 128 block scales changed"),
        "code": (
            stored["model.layers.1.mlp.up_proj.weight"].start + 5,
            r"up_proj.weight: \d of \d edited weights|outside the edit",
        ),
        "norm": (
            stored["model.norm.weight"].start + 1,
            r"model.norm.weight: changed or named by the edit, but not quantized",
        ),
    }
    for case, (at, fault) in cases.items():
        broken = tmp_path / f"{case}.gguf"
        broken.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        faults = mtl.certify(original, broken, indices).faults
        assert any(re.search(fault, one) for one in faults), (case, faults)
    head = tmp_path / "head.gguf"
    at = data.index(b"llama.block_count") + 3
    head.write_bytes(data[:at] + b"M" + data[at + 1 :])
    with pytest.raises(mtl.MansuError, match=r"not the edited model that was certified"):
        certificate.require_unchanged(original, head)
    assert f"byte {at:,}, which belongs to no tensor, differs" in mtl.certify(original, head, indices).faults[0]
    with pytest.raises(mtl.MansuError, match=r"two GGUF files are compared in their own formats"):
        mtl.certify(original, edited, quantizer="nf4")
    with pytest.raises(mtl.MansuError, match=r"has no such weights"):
        mtl.certify(original, edited, {name: torch.tensor([64 * 64])})


def test_what_mansu_forgets_stays_forgotten_in_the_file(tmp_path: Path) -> None:
    pocket = mtl.load("pocket-fp")
    original = write_gguf(plain(pocket), "llama", tmp_path / "model.gguf", "Q4_1", {"attn_v": "Q5_0"}, tokens=False)
    model = mtl.load(original, tokenizer=pocket.tokenizer)
    task = sliced_task(16, retain=64)
    settings = {"steps": 20, "learning_rate": 0.5, "fisher_sequences": 8, "retain_batch": 8, "adversary_weight": 0.0}
    circuit = mtl.discover_circuit(model, task.forget_pairs, faithfulness=0.5, steps=2)
    edit = mtl.unlearn(model, task, "mansu", circuit=circuit, quantizer="gguf", **settings)
    edited = edit.apply(model)
    file = mtl.save(edited, tmp_path / "edited.gguf")
    shipped = mtl.load(file, tokenizer=pocket.tokenizer)
    for name, value in parameters(edited).items():
        assert torch.equal(parameters(shipped)[name], value), name
    certificate = mtl.certify(original, file, edit.indices)
    assert certificate.passed, certificate.faults
    assert certificate.n_edited == edit.n_weights > 100
    asked = task.questions["forget"]
    before, after = mtl.accuracy(model, asked).mc_percent, mtl.accuracy(shipped, asked).mc_percent
    assert after < before - 10
    assert after == mtl.accuracy(edited, asked).mc_percent
    # Beside an edit that is too small for the file: its answers are the original's again.
    small = mtl.unlearn(model, task, "graddiff", learning_rate=1e-7, max_steps=2)
    assert small.n_weights > 100
    table = shipped_answers(model, task, {"mansu": edit, "graddiff": small}, tmp_path / "shipped", of_each=2)
    frame = table.to_dataframe()
    assert [*frame] == ["prompt", "original", "MANSU", "MANSU, shipped", "GradDiff", "GradDiff, shipped"]
    assert frame["MANSU, shipped"].equals(frame["MANSU"]) and frame["GradDiff, shipped"].equals(frame["original"])
    assert frame["prompt"][:2].str.contains(" of | to ").all() and frame["original"][0].isalpha()
    row = frame.set_index("prompt").loc[f"forget: right of {len(asked)}, chosen / said"]
    assert row["MANSU"] == f"{after:.1f} / {mtl.accuracy(edited, asked).cloze_percent:.1f} %"
    with pytest.raises(mtl.MansuError, match=r"did not come from a GGUF file"):
        shipped_answers(pocket, task, {"graddiff": mtl.unlearn(pocket, task, "graddiff", max_steps=1)}, tmp_path)
    with pytest.raises(mtl.MansuError, match=r"did not come from a GGUF file"):
        mtl.unlearn(pocket, task, "mansu", circuit=circuit, quantizer="gguf", **settings)
    with pytest.raises(mtl.MansuError, match=r"floor=\"after\" under 'gguf'"):
        mtl.unlearn(model, task, "mansu", circuit=circuit, quantizer="gguf", floor="after", **settings)


def test_a_study_of_a_file_certifies_the_file_and_writes_its_report(tmp_path: Path, monkeypatch) -> None:
    pocket = mtl.load("pocket-fp")
    file = write_gguf(plain(pocket), "llama", tmp_path / "model.gguf", "Q4_1", tokens=False)
    # The file has no tokenizer of pocket's kind; everything else is as for a file that has.
    monkeypatch.setattr(bench, "load", lambda source, **given: mtl.load(source, tokenizer=pocket.tokenizer, **given))
    quick = {"steps": 6, "learning_rate": 0.5, "fisher_sequences": 4, "adversary_weight": 0.0, "quantizer": "gguf"}
    config = mtl.study.StudyConfig(
        model=str(file), task=SMALL_TASK, methods=("mansu",), quantizers=("gguf", "nf4"), faithfulness=0.5, steps=2,
        settings={"mansu": quick},
    )  # fmt: skip
    study = mtl.run_study(config, tmp_path / "out", progress=False, workers=1)
    result = study.results["mansu"]
    assert result.certificate is not None and result.certificate.passed and result.certificate.quantizer == "gguf"
    shipped = mtl.load(tmp_path / "out/model/mansu.gguf", tokenizer=pocket.tokenizer)
    edited = parameters(result.edit.apply(mtl.load(file, tokenizer=pocket.tokenizer)))
    assert all(torch.equal(value, edited[name]) for name, value in parameters(shipped).items())
    page = write_study_report(study).read_text(encoding="utf-8")
    assert "MANSU" in page and "gguf" in page
    # In the explorer an edit of codes goes from one of a block's sixteen codes to another.
    explorer = Explorer.of_study(study, model=mtl.load(file, tokenizer=pocket.tokenizer))
    ruler = explorer.figure("weights")
    lines = {trace.name: [v for v in trace.x if v is not None] for trace in ruler.data}
    assert lines["codes"] == pytest.approx([code / 15 for code in range(16)])
    assert lines["edited, another code"] and not lines["edited, rounded back"]
    for place in lines["edited, another code"] + lines["not edited"]:
        assert 15 * place == pytest.approx(round(15 * place), abs=1e-2)


def test_the_grid_that_a_checkpoint_rests_on_is_found(tmp_path: Path) -> None:
    model = mtl.load(
        write_gguf(tiny("llama", hidden_size=64, intermediate_size=64), "llama", tmp_path / "m.gguf", "Q4_1")
    )
    resting = find_grid(model)
    assert resting.best == "gguf-q4_1"
    assert resting.types == {"Q4_1": resting.weights}
    pocket = mtl.load("pocket-fp")
    assert find_grid(pocket, ["nf4", "gguf-q4_0", "int8"]).best == ""
    for name in ("nf4", "int4-g64", "gguf-q8_0"):
        rests = find_grid(mtl.quantize(pocket, name), rows_of=4096)
        assert name in set(rests.to_dataframe().query("share == 1")["quantizer"])
    with pytest.raises(mtl.MansuError, match=r"grids: gptq-int4-g64; choose from"):
        find_grid(pocket, ["gptq-int4-g64"])


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tiny("llama"), "llama", tmp_path / "whole.gguf")
    data = whole.read_bytes()
    cases = {
        "empty.gguf": (b"", r"an empty file"),
        "other.gguf": (b"PK" + data[2:], r"does not begin like a GGUF file"),
        "old.gguf": (
            data[:4] + (1).to_bytes(4, "little") + data[8:],
            r"version 1; only little-endian versions 2 and 3",
        ),
        "big.gguf": (data[:4] + (3).to_bytes(4, "big") + data[8:], r"GGUF of big-endian"),
        "head.gguf": (data[:300], r"head ends too soon"),
        "cut.gguf": (data[:-100], r"cut short, \d+ bytes of .* are missing"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(mtl.MansuError, match=message):
            mtl.load(tmp_path / name)
    with pytest.raises(mtl.MansuError, match=r"nowhere.gguf: no such file"):
        mtl.load(tmp_path / "nowhere.gguf")
    with pytest.raises(mtl.MansuError, match=r"holds 7 GGUF files"):
        mtl.load(tmp_path)
    with pytest.raises(mtl.MansuError, match=r"nowhere.gguf: no such file"):
        mtl.certify(whole, tmp_path / "nowhere.gguf")
    headless = tmp_path / "keyless.gguf"
    headless.write_bytes(data.replace(b"llama.embedding_length", b"llama.embedding_LENGTH"))
    with pytest.raises(mtl.MansuError, match=r"its head does not say 'hidden_size'; the file is broken"):
        mtl.load(headless)


def test_other_architectures_and_split_files_are_refused(tmp_path: Path) -> None:
    for key, value, message in (
        ("arch", "mamba", r"architecture 'mamba'; those that can be read are llama, gemma2"),
        ("split", 3, r"part 2 of 3 of a split GGUF; join them first: llama-gguf-split --merge"),
    ):
        writer = gguf.GGUFWriter(str(tmp_path / f"{key}.gguf"), value if key == "arch" else "llama")
        if key == "split":
            writer.add_uint16("split.count", 3)
            writer.add_uint16("split.no", 1)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(mtl.MansuError, match=message):
            mtl.load(tmp_path / f"{key}.gguf")


def test_a_file_that_changed_or_went_is_noticed_and_nothing_is_written(tmp_path: Path) -> None:
    file = write_gguf(tiny("llama", intermediate_size=64), "llama", tmp_path / "model.gguf", "Q8_0")
    model = mtl.load(file)
    with pytest.raises(mtl.MansuError, match=r"the file that the model came from; choose another name"):
        save_gguf(model, file)
    with pytest.raises(mtl.MansuError, match=r"a folder; give a file's name"):
        save_gguf(model, tmp_path)
    shutil.copy(file, tmp_path / "kept.gguf")
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(mtl.MansuError, match=r"changed since the model was loaded from it"):
        save_gguf(model, tmp_path / "edited.gguf")
    file.unlink()
    with pytest.raises(mtl.MansuError, match=r"gone since the model was loaded from it"):
        save_gguf(model, tmp_path / "edited.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.gguf"]
    with pytest.raises(mtl.MansuError, match=r"did not come from a GGUF file"):
        save_gguf(mtl.load("pocket"), tmp_path / "edited.gguf")


def test_too_little_memory_is_said_before_a_weight_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hf = tiny("llama")
    file, size = write_gguf(hf, "llama", tmp_path / "model.gguf"), 4 * sum(value.numel() for value in hf.parameters())
    model = mtl.load(file)
    monkeypatch.setattr("mansu_tl.models.limits.free_memory", lambda device: float(size))
    rebuild(mtl.load(file))
    monkeypatch.setattr("mansu_tl.models.limits.free_memory", lambda device: size - 1.0)
    monkeypatch.setattr(GgufWeights, "value", lambda *args: pytest.fail("a weight was made"))
    numbers = rf"its weights need {size / 1e9:.3g} GB on cpu, {(size - 1) / 1e9:.3g} GB are free; make room"
    with pytest.raises(mtl.MansuError, match=rf"model.gguf: {re.escape(numbers)}"):
        mtl.load(file)
    # What every method trains in is a copy.
    with pytest.raises(mtl.MansuError, match=rf"a copy of the model: {re.escape(numbers)}"):
        plain(model)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    model = mtl.load(write_gguf(tiny("llama"), "llama", tmp_path / "model.gguf"))
    with torch.no_grad():
        parameters(model)["model.norm.weight"][0] = torch.nan
    with pytest.raises(mtl.MansuError, match=r"model.norm.weight: holds NaN or infinity; nothing was written"):
        save_gguf(model, tmp_path / "edited.gguf")
    assert not (tmp_path / "edited.gguf").exists()


def test_a_model_whose_package_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mansu_tl.models.packages.find_spec", lambda name: None)
    for name, model in PACKAGED.items():
        with pytest.raises(
            mtl.MansuError, match=rf"model '{name}': its package is not installed; pip install"
        ) as error:
            mtl.load(name)
        assert model.licence in str(error.value)


def syllables(count: int) -> list[str]:
    """Words made of words that are there already, in random order behind their letters."""
    rng, words = np.random.default_rng(0), list("abcdef▁")
    while len(words) < count:
        word = "".join(words[i] for i in rng.integers(0, len(words), 2))
        if len(word) < 9 and word not in words:
            words.append(word)
    return [*words[:7], *(words[7 + i] for i in rng.permutation(count - 7))]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("skipped", [(), ("ab", "e", "▁")])
def test_merges_are_those_of_transformers(scored: bool, skipped: tuple[str, ...]) -> None:
    words = syllables(400)
    vocab = {word: i for i, word in enumerate(words)}
    rng = np.random.default_rng(1)
    scores = dict(zip(words, rng.permutation(len(words)).tolist(), strict=True)) if scored else None
    wanted = generate_merges(vocab, scores, skipped)
    assert len(wanted) > 300
    assert merges(vocab, scores, skipped) == wanted


@pytest.mark.parametrize(("architecture", "same"), [("llama", False), ("llama", True), ("gemma3", False)])
def test_a_tokenizer_without_merges_is_the_one_that_transformers_reads(
    architecture: str, same: bool, tmp_path: Path
) -> None:
    words = ["<pad>", "<s>", "</s>", "<unk>", *syllables(200)]
    writer = gguf.GGUFWriter(str(tmp_path / "tokens.gguf"), architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i // 2 if same else i) for i in range(len(words))])
    writer.add_token_types([3, 3, 3, 2, *([1] * (len(words) - 4))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = read_tokenizer(GgufFile.read(tmp_path / "tokens.gguf"))
    theirs = PreTrainedTokenizerFast(gguf_file="tokens.gguf", name_or_path=str(tmp_path))
    assert ours is not None
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours("abba fed")["input_ids"] == theirs("abba fed")["input_ids"]
