"""What the explorer's page asks: every answer is that of the library's function, and every mistake is one line."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit import Circuit, Graph, patched_logits
from mansu_tl.errors import MansuError
from mansu_tl.explorer import Explorer, ExplorerServer, ExplorerView, Switched, view
from mansu_tl.explorer.page_file import render
from mansu_tl.explorer.requests import answer, answered
from mansu_tl.runs.metrics import answer_log_prob, logit_difference
from tests.tiny_study import EVIL, crossing_edit, tiny_case

OFF = ["L0H1", "MLP0 → L1H2.q"]


@pytest.fixture(scope="module")
def case():
    model, task = tiny_case()
    edit = crossing_edit(model)
    return model, task, edit, Explorer(model, task, {"mansu": edit}, steps=2)


@pytest.fixture(scope="module")
def models(case):
    model, _, edit, _ = case
    edited = edit.apply(model)
    return model, edited, mtl.quantize(edited, "nf4")


def masks(model, circuit: Circuit | None, off) -> torch.Tensor:
    graph = Graph.of(model)
    live = (graph.exists if circuit is None else circuit.mask).float()
    less = live.clone()
    for name in off:
        if "→" in name:
            less[graph.at(*name.split(" → "))] = 0
        else:
            less[graph.writers.index(name)] = 0
    return torch.stack([live, less])


@pytest.mark.parametrize("kind", ["corrupt", "zero", "mean"])
@pytest.mark.parametrize("inside", ["model", "circuit"])
def test_what_is_switched_off_is_edge_patchings(case, models, inside, kind) -> None:
    _, task, _, explorer = case
    size = explorer.selection.size
    found = answer(explorer.results, ["switch", "mansu", "nf4", size, OFF, 3, inside, kind, ""])["rows"]
    pairs = task.forget_pairs
    for row, each in zip(found, models, strict=True):
        how = mtl.runs.ablation(each, kind, reference=pairs if kind == "mean" else None)
        on_off = masks(each, explorer.results.circuit(size) if inside == "circuit" else None, OFF)
        for key, metric in (("difference", logit_difference), ("probability", answer_log_prob)):
            want = mtl.circuit.patch_edges(each, pairs, on_off, ablation=how, metric=metric)[:, 3]
            want = want.exp() if key == "probability" else want
            assert row[key] == pytest.approx(want.tolist(), rel=1e-4, abs=1e-6)


def test_a_head_that_carries_zero_is_transformer_lenss_ablation(case, models) -> None:
    _, task, _, explorer = case
    found = answer(
        explorer.results, ["switch", "mansu", "nf4", explorer.selection.size, ["L0H1"], 2, "model", "zero", ""]
    )

    def silent(z, hook):
        heads = z if z.ndim == 4 else z.unflatten(-1, (4, -1))
        heads = heads.clone()
        heads[:, :, 1] = 0
        return heads.view_as(z)

    pairs = task.forget_pairs
    tokens = pairs.clean[[2], : int(pairs.lengths[2])]
    for row, each in zip(found["rows"], models, strict=True):
        with each.hooks(fwd_hooks=[("blocks.0.attn.hook_z", silent)]):
            logits = each(tokens, return_type="logits")[0, -1]
        chances, best = logits.softmax(-1).topk(5)
        assert [chance for _, chance in row["likely"][1]] == pytest.approx(chances.tolist(), rel=1e-3)
        assert row["says"][1] == each.tokenizer.decode([int(best[0])])
        assert row["probability"][1] == pytest.approx(logits.softmax(-1)[pairs.answers[2]].item(), rel=1e-3)


def test_logits_under_masks_are_the_models_and_the_corrupt_ones(case) -> None:
    model, task, _, _ = case
    pairs, exists = task.forget_pairs, Graph.of(model).exists.float()
    on, off = patched_logits(model, pairs, torch.stack([exists, 0 * exists]))
    for found, tokens in ((on, pairs.clean), (off, pairs.corrupt)):
        want = torch.stack(
            [model(tokens[[i], : int(n)], return_type="logits")[0, -1] for i, n in enumerate(pairs.lengths)]
        )
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_answers_of_two_tokens_are_written_on(case, tmp_path) -> None:
    model, task, edit, _ = case
    pairs = task.forget_pairs
    behind = torch.full((len(pairs), pairs.options.shape[1], 1), 9)
    two = replace(task, forget_pairs=replace(pairs, options=torch.cat([pairs.options, behind], 2)))
    explorer = Explorer(model, two, {"mansu": edit}, steps=1)
    found = explorer.switch_off("L0H1")
    on_off = masks(model, None, ["L0H1"])
    for column, metric in ((found.probability.log(), answer_log_prob), (found.difference, logit_difference)):
        want = mtl.circuit.patch_edges(model, two.forget_pairs[[0]], on_off, metric=metric)[:, 0]
        torch.testing.assert_close(column[0], want, atol=1e-4, rtol=1e-4)
    prompt = pairs.clean[0, : int(pairs.lengths[0])].tolist()
    first = int(model(torch.tensor([prompt]), return_type="logits")[0, -1].argmax())
    second = int(model(torch.tensor([[*prompt, first]]), return_type="logits")[0, -1].argmax())
    assert found.says[0][0] == model.tokenizer.decode([first, second])
    assert list(found.to_dataframe()["model"]) == ["original", "MANSU", "MANSU, nf4"]
    assert Switched.load(found.save(tmp_path / "switched.safetensors")).digest() == found.digest()


def test_a_typed_prompt_is_asked_as_ask_asks(case, models) -> None:
    _, _, _, explorer = case
    found = answer(explorer.results, ["ask", "mansu", "nf4", "w5 w20 w30", 4])["rows"]
    want = mtl.ask(dict(zip(("original", "MANSU", "MANSU, nf4"), models, strict=True)), "w5 w20 w30", new_tokens=4)
    assert [row["model"] for row in found] == list(want.models)
    assert [row["says"] for row in found] == list(want.answers[0])
    for row, each in zip(found, models, strict=True):
        tokens = torch.tensor([each.tokenizer("w5 w20 w30")["input_ids"]])
        chances = each(tokens, return_type="logits")[0, -1].softmax(-1)
        assert [chance for _, chance in row["likely"]] == pytest.approx(chances.topk(5).values.tolist(), rel=1e-3)
    assert explorer.ask("w5 w20 w30", 4).answers == want.answers


def test_a_typed_prompt_with_parts_off(case) -> None:
    model, task, _, explorer = case
    pairs = task.forget_pairs
    clean, corrupt = (
        model.tokenizer.decode(tokens[0, : int(pairs.lengths[0])]) for tokens in (pairs.clean, pairs.corrupt)
    )
    found = explorer.switch_off("L0H1", prompt=clean, counterfactual=corrupt)
    same = explorer.switch_off("L0H1")
    assert found.says == same.says
    assert found.likely == same.likely
    assert torch.isnan(found.probability).all()
    silent = explorer.switch_off("embed", prompt=clean, kind="zero")
    assert silent.likely[0][0] != silent.likely[0][1]


def test_scores_and_cad_of_the_edges_are_the_librarys(case, models) -> None:
    model, task, _, explorer = case
    size, pairs = explorer.selection.size, task.forget_pairs
    circuit = explorer.results.circuit(size)
    for pair, asked in ((None, pairs), (2, pairs[[2]])):
        for stage, each in zip((("", ""), ("mansu", ""), ("mansu", "nf4")), models, strict=True):
            found = answer(explorer.results, ["scores", *stage, size, pair])
            scores = mtl.edge_attribution(each, asked, steps=2)
            assert found["scores"] == pytest.approx([scores[edge] for edge in circuit.edges], abs=1e-4)
            if stage[0]:
                want = mtl.circuit_divergence(model, each, circuit, asked, steps=2)
                assert found["cad"][0] == pytest.approx(want.value, abs=1e-4)
    at = answer(explorer.results, ["circuit", size])
    names = [(circuit.writers[w], circuit.readers[r]) for w, r in zip(at["writers"], at["readers"], strict=True)]
    assert names == circuit.edges
    assert answer(explorer.results, ["faithfulness", size])["faithfulness"] == pytest.approx(
        mtl.circuit.faithfulness(model, circuit, pairs), rel=1e-3
    )


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (["ask", "mansu", "nf4", "  ", 3], "the prompt is empty"),
        (["ask", "mansu", "nf4", "w5 " * 2000, 3], "2000 tokens and 3 more"),
        (["ask", "mansu", "nf4", "w5", 0], "choose 1..50"),
        (["ask", "npo", "nf4", "w5", 3], "method 'npo'"),
        (["ask", "mansu", "nf4", 5, 3], "takes method, quantizer, prompt, tokens"),
        (["switch", "mansu", "nf4", 1, [], 0, "model", "zero", ""], "nothing is switched off"),
        (["switch", "mansu", "nf4", 1, ["L9H9"], 0, "model", "zero", ""], "no node 'L9H9'"),
        (["switch", "mansu", "nf4", 1, ["L1H0 → L0H0.q"], 0, "model", "zero", ""], "runs backwards"),
        (["switch", "mansu", "nf4", 1, ["logits"], 0, "model", "zero", ""], "no node 'logits'"),
        (["switch", "mansu", "nf4", 1, ["a → b → c"], 0, "model", "zero", ""], "name a node"),
        (["switch", "mansu", "nf4", 1, ["L0H1"], 99, "model", "zero", ""], r"pair 99; choose 0\.\.5"),
        (["switch", "mansu", "nf4", 1, ["L0H1"], 0, "moon", "zero", ""], "inside='moon'"),
        (["switch", "mansu", "nf4", 1, ["L0H1"], 0, "model", "noise", ""], "ablation 'noise'"),
        (["switch", "mansu", "nf4", 1, ["L0H1"], "w5 w6", "model", "corrupt", ""], "no counterfactual"),
        (["switch", "mansu", "nf4", 1, ["L0H1"], "w5 w6", "model", "corrupt", "w5"], "2 tokens, its counterfactual 1"),
        (["circuit", -3], "size -3"),
        (["pattern", "", "", 0, "MLP0"], "no attention pattern"),
        (["values", "", "", "L9H9"], "no node 'L9H9'"),
        (["ruler", "mansu", "nf4", "nothing"], "no weights are called 'nothing'"),
        (["dance"], "begins with one of"),
        ({"what": "dance"}, "begins with one of"),
    ],
)
def test_mistakes_are_one_line(case, request_, words) -> None:
    results = case[3].results
    with pytest.raises(MansuError, match=words):
        answer(results, request_)
    found = answered(results, request_)
    assert list(found) == ["error"]
    assert "\n" not in found["error"]


def fetch(address: str, body: object = None, **headers: str) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(address, data=data, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as problem:
        return problem.code, ""


def test_the_server_answers_whoever_has_its_token_and_ends(case) -> None:
    explorer = case[3]
    with ExplorerServer(explorer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        root = server.address.partition("?")[0]
        asked = ["circuit", explorer.selection.size]
        assert server.server_address[0] == "127.0.0.1"
        status, page = fetch(server.address)
        assert status == 200
        assert page.startswith("<!doctype html>")
        status, found = fetch(f"{root}answer", asked, **{"X-Explorer-Token": server.token})
        assert (status, json.loads(found)) == (200, answer(explorer.results, asked))
        assert fetch(root)[0] == 403
        assert fetch(f"{root}?token=wrong")[0] == 403
        assert fetch(f"{root}answer", asked)[0] == 403
        # A name that another site has pointed at this machine.
        assert fetch(server.address, Host="evil.example")[0] == 403
        assert fetch(f"{root}elsewhere")[0] == 404
        large = http.client.HTTPConnection(*server.server_address, timeout=60)
        large.request("POST", "/answer", headers={"X-Explorer-Token": server.token, "Content-Length": "200000"})
        assert large.getresponse().status == 413
        large.close()
        with pytest.raises(MansuError, match="cannot be used"):
            ExplorerServer(explorer, server.server_address[1])
        server.shutdown()
        thread.join(timeout=20)
        assert not thread.is_alive()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(server.server_address, timeout=5)


def test_in_a_notebook_the_page_asks_the_kernel(case) -> None:
    explorer = case[3]
    shown = ExplorerView(explorer)
    page = shown.answer({"page": True})["page"]
    assert page == render(explorer.results, explorer.selection, explorer.depth, {"kind": "frame"})
    asked = ["answers", "mansu", "nf4"]
    assert shown.answer({"number": 4, "request": asked}) == {"number": 4, "answer": answer(explorer.results, asked)}
    assert "no node" in shown.answer({"number": 5, "request": ["values", "", "", "L9H9"]})["answer"]["error"]
    before = explorer.selection
    assert shown.answer({"chosen": {"item": "MLP0", "pair": 2}}) is None
    assert (explorer.selection.item, explorer.selection.pair) == ("MLP0", 2)
    assert shown.answer({"chosen": {"item": "L9H9"}}) is None
    assert shown.answer("nothing") is None
    explorer.select(item=before.item, pair=before.pair)


def test_the_widget_passes_messages_both_ways(case) -> None:
    pytest.importorskip("anywidget", reason="pip install 'mansu-tl[explore]'")
    shown = ExplorerView(case[3])
    bundle, _ = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert all(name in bundle["text/plain"] for name in ("jupyterlab_widgets", "save_html"))
    widget, sent = shown._widgets[0], []
    widget.send = sent.append
    widget._handle_custom_msg({"number": 1, "request": ["circuit", case[3].selection.size]}, [])
    assert sent[-1] == {"number": 1, "answer": answer(case[3].results, ["circuit", case[3].selection.size])}
    shown.select(pair=1)
    assert sent[-1]["choose"]["pair"] == 1
    shown.select(pair=0)


def test_without_anywidget_the_page_stands_in_the_cell(case, monkeypatch) -> None:
    model, task, edit, _ = case
    small = Explorer(model, task, {EVIL[0]: edit}, steps=1)
    monkeypatch.setattr(view, "find_spec", lambda name: None)
    bundle = ExplorerView(small)._repr_mimebundle_()
    assert bundle["text/html"].startswith('<iframe sandbox="allow-scripts')
    assert EVIL[0] not in bundle["text/html"]
