"""The two pretrained models that pip installs, against transformers' own reader and gguf's own numbers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoTokenizer

import mansu_tl as mtl
from mansu_tl.building import Relation
from mansu_tl.landmarks import landmarks_task
from mansu_tl.models import parameters
from mansu_tl.models.gguf import gguf_weights, save_gguf
from mansu_tl.models.packages import PACKAGED, packaged_file
from mansu_tl.quantization import find_grid

_TEXTS = (
    "The capital of France is",
    " Rome!\nIt's 12,345 km — away.",
    "def f(x):\n    return x",
    "Überraschung 東京 🙂",
)
_ANSWERS = {"smollm2-135m": " Paris", "gemma3-270m": " the"}


@pytest.fixture(scope="module", params=PACKAGED)
def named(request: pytest.FixtureRequest) -> str:
    if find_spec(PACKAGED[request.param].module) is None:
        pytest.skip(f"needs {PACKAGED[request.param].install}")
    return request.param


@pytest.fixture(scope="module")
def model(named: str) -> TransformerBridge:
    return mtl.load(named)


def test_every_weight_is_what_gguf_dequantizes(named: str, model: TransformerBridge) -> None:
    weights = gguf_weights(model)
    assert weights is not None
    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(weights.file.path, "r").tensors}
    live = parameters(model)
    for name in [*list(weights.ways)[:14], *list(weights.ways)[-4:]]:
        way = weights.ways[name]
        theirs = by_name[way.stored.name]
        wanted = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type).copy()).view(way.stored.shape)
        assert torch.equal(way.back(live[name]), wanted - way.offset), name


def test_config_and_tokenizer_are_those_of_transformers(named: str, model: TransformerBridge) -> None:
    file = packaged_file(named)
    theirs = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    ours = model.original_model.config.to_dict()
    skipped = {
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "quantization_config",
        "transformers_version",
        "name_or_path",
    }
    different = {
        key: (theirs[key], ours.get(key))
        for key in theirs.keys() - skipped
        if theirs[key] != ours.get(key) and theirs[key] is not None
    }
    assert not different
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in _TEXTS:
        assert model.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert model.tokenizer.chat_template == tokenizer.chat_template


def test_it_speaks(named: str, model: TransformerBridge) -> None:
    tokens = torch.tensor([model.tokenizer(_TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert model.tokenizer.decode(model(tokens)[0, -1].argmax()) == _ANSWERS[named]


def test_the_grid_that_it_rests_on(named: str, model: TransformerBridge) -> None:
    resting = find_grid(model, rows_of=2**12)
    assert resting.best == {"smollm2-135m": "gguf-q4_1", "gemma3-270m": ""}[named]


def test_a_file_is_written_back_code_by_code(named: str, model: TransformerBridge, tmp_path: Path) -> None:
    weights = gguf_weights(model)
    assert weights is not None
    name = "model.layers.3.mlp.down_proj.weight"
    own = mtl.quantization.quantizer("gguf").bound(model).of(name)
    w = parameters(model)[name]
    encoded = own.encode(w)
    direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    chosen = direction.abs() > 2
    target = torch.where(chosen, own.neighbour(encoded.codes, direction), encoded.codes)
    edited = own.floor_target(w, target, encoded.absmax)
    out = save_gguf(mtl.models.rebuild(model, {name: edited}), tmp_path / "edited.gguf")
    old, new = (np.memmap(path, np.uint8, "r") for path in (weights.file.path, out))
    changed = np.flatnonzero(old != new)
    stored = weights.ways[name].stored
    assert stored.start <= changed.min()
    assert changed.max() < stored.start + stored.size
    theirs = next(tensor for tensor in gguf.GGUFReader(out, "r").tensors if tensor.name == stored.name)
    assert torch.equal(torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type).copy()), edited)
    assert torch.equal(edited != w, chosen)


def test_a_task_for_a_chat_model_is_what_its_template_makes(named: str, model: TransformerBridge) -> None:
    if not model.tokenizer.chat_template:
        pytest.skip(f"{named} is no chat model")
    wordings = ("What is the capital of {}?", "Name the capital of {}.")
    cities = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Poland": "Warsaw"}
    capitals = Relation("capitals", wordings, tuple(cities.items()))
    tongues = {"France": "French", "Italy": "Italian"}
    asked = Relation("languages", ("What is spoken in {}?", "Say the language of {}."), tuple(tongues.items()))
    built = mtl.build_task(model, capitals, [asked], facts=1, unseen=1, options=2, chat=True)
    assert "has no chat" not in str(built.reason)
    task = built.task(model)
    pairs = task.forget_pairs
    row = built.rows()[0]
    country, city = row["fact"].split(": ")[1], row["answer"]
    talk = [{"role": "user", "content": wordings[0].format(country)}]
    wanted = model.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert pairs.clean[0, : pairs.lengths[0]].tolist() == wanted
    # Behind a line break a name has no space in front.
    assert city == cities[country]
    assert model.tokenizer.decode(pairs.answers[0]) == city
    for name, questions in task.questions.items():
        assert mtl.accuracy(model, questions).mc_percent == 100, name
    assert mtl.ask(model, wordings[0].format("France"), new_tokens=8, chat=True).answers[0][0].count("Paris")


@pytest.mark.slow
def test_the_landmarks_that_the_demo_makes_it_forget(named: str, model: TransformerBridge) -> None:
    if named != "smollm2-135m":
        pytest.skip("the demo's model is smollm2-135m")
    task = landmarks_task(model).task(model)
    assert len(task.forget_pairs) == 24 and len(set(task.near_text.tokens[:, :4].flatten().tolist())) > 20
    # The null space of the widest matrix asks for as many tokens as it has inputs.
    assert int(task.retain_text.lengths.sum()) > 1536
    for name in ("forget", "near", "retain"):
        assert mtl.accuracy(model, task.questions[name]).mc_percent == 100.0
