"""Inputs of the wrong kind: what people pass where a hooked model, pairs, questions or a task is wanted.

Run in a process of its own, because the type checker of the test run would answer in the package's place.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import json, sys
import pandas as pd, torch
import mansu_tl as mtl
from mansu_tl.data import Task
from mansu_tl.verification import *
from tests.tiny import tiny, tiny_tokenizer

class PeftModelForCausalLM(torch.nn.Module):
    __module__ = "peft.peft_model"
    def merge_and_unload(self): ...
class PromptTuned(torch.nn.Module):
    __module__ = "peft.peft_model"
class LoraLinear(torch.nn.Module):
    __module__ = "peft.tuners.lora.layer"
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
    def forward(self, x):
        return self.base_layer(x)

hf = tiny("llama")
carrying = tiny("llama")
attention = carrying.model.layers[1].self_attn
attention.q_proj = LoraLinear(attention.q_proj)
class Trainer: model = hf
model = mtl.load(hf, tokenizer=tiny_tokenizer())
tokens = torch.tensor([[5, 6, 7], [5, 9, 7]])
pairs = mtl.data.PromptPairs.from_tokens(tokens, tokens + 20, torch.tensor([9, 10]), torch.tensor([10, 11]))
asked = mtl.data.Questions(tokens, pairs.lengths, torch.tensor([[9, 10], [10, 11]]), ("a", "b"))
text = mtl.data.Sequences(tokens, pairs.lengths)
others = mtl.data.Questions(tokens + 1, pairs.lengths, asked.choices, ("c", "d"))
task = Task("t", pairs, pairs, text, text, text, {"forget": asked, "retain": others})
scores = mtl.edge_attribution(model, pairs, steps=1)
circuit = mtl.circuit.Circuit.top(scores, 40)
with_model_and_pairs = {
    "edge_attribution": lambda m, p: mtl.edge_attribution(m, p, steps=1),
    "activation_patching": lambda m, p: mtl.activation_patching(m, p),
    "discover_circuit": lambda m, p: mtl.discover_circuit(m, p),
    "discover_circuit, scored": lambda m, p: mtl.discover_circuit(m, p, scores=scores),
    "node_attribution": lambda m, p: mtl.patching.node_attribution(m, p),
    "neuron_attribution": lambda m, p: mtl.patching.neuron_attribution(m, p),
    "patch_edges": lambda m, p: mtl.circuit.patch_edges(m, p, circuit.mask[None].float()),
    "path_patching": lambda m, p: mtl.circuit.path_patching(m, p, [("embed", "logits")]),
    "faithfulness": lambda m, p: mtl.circuit.faithfulness(m, circuit, p),
    "faithfulness_curve": lambda m, p: mtl.circuit.faithfulness_curve(m, scores, p),
    "random_faithfulness": lambda m, p: mtl.circuit.random_faithfulness(m, circuit, p),
    "minimality": lambda m, p: mtl.circuit.minimality(m, circuit, p),
    "completeness": lambda m, p: mtl.circuit.completeness(m, circuit, p),
    "circuit_divergence": lambda m, p: mtl.circuit_divergence(m, m, circuit, p),
    "rediscover": lambda m, p: rediscover(m, m, circuit, p),
    "erasure_depth": lambda m, p: erasure_depth(m, m, m, p),
}
with_model = {
    **{name: (lambda call: lambda m: call(m, pairs))(call) for name, call in with_model_and_pairs.items()},
    "scorecard": lambda m: mtl.scorecard(m, model, task, circuit),
    "scorecard, edited": lambda m: mtl.scorecard(model, m, task, circuit),
    "unlearn": lambda m: mtl.unlearn(m, task, "npo", max_steps=1),
    "unlearn, mansu": lambda m: mtl.unlearn(m, task, "mansu", circuit=circuit, steps=1),
    "probe": lambda m: probe(m, asked, folds=2),
    "damage": lambda m: damage(model, m, {"x": text}),
    "ablation": lambda m: mtl.runs.ablation(m, "mean", reference=text),
    "explore": lambda m: mtl.explore(m, task, {}),
}
any_model = {
    "update_statistics": lambda m: mtl.quantization.update_statistics(model, m),
    "accuracy": lambda m: mtl.accuracy(m, asked),
    "quantize": lambda m: mtl.quantize(m),
    "save": lambda m: mtl.save(m, sys.argv[1]),
    "relearn": lambda m: relearn(m, attack_splits(task, 1, 1)[0], steps=1),
    "fingerprint": lambda m: mtl.models.fingerprint(m),
}
with_task = {
    "scorecard": lambda t: mtl.scorecard(model, model, t, circuit),
    "unlearn": lambda t: mtl.unlearn(model, t, "npo", max_steps=1),
    "attack_splits": lambda t: attack_splits(t, 1, 1),
    "unrelated_attack": lambda t: unrelated_attack(t),
    "explore": lambda t: mtl.explore(model, t, {}),
}
with_questions = {"accuracy": lambda q: mtl.accuracy(model, q), "probe": lambda q: probe(model, q, folds=2)}
with_text = {
    "quantize": lambda s: mtl.quantize(model, "awq-int4-g64", s),
    "damage": lambda s: damage(model, model, {"x": s}),
    "ablation": lambda s: mtl.runs.ablation(model, "mean", reference=s),
}
models = {"plain": hf, "name": "pocket", "nothing": None, "tokenizer": tiny_tokenizer(), "class": type(hf),
          "compiled": torch.compile(hf), "trainer": Trainer(), "peft": PeftModelForCausalLM(),
          "prompt tuned": PromptTuned(), "carrying": carrying}
frame, rows = pd.DataFrame({"clean": ["w3"]}), [{"set": "forget"}]

def answer(call, *given):
    try:
        call(*given)
        return "worked"
    except mtl.MansuError as error:
        return str(error)
    except Exception as error:
        return f"BUG {type(error).__name__}: {error}"

out = []
for kind, found in models.items():
    for table, name in ((with_model, "hooked"), (any_model, "any")):
        out += [(f"model/{name}/{kind}", call, answer(do, found)) for call, do in table.items()]
    out.append((f"load/{kind}", "load", answer(mtl.load, found)))
for part, table, kinds in (
    ("pairs", {n: (lambda c: lambda p: c(model, p))(c) for n, c in with_model_and_pairs.items()},
     {"frame": frame, "rows": rows, "task": task, "questions": asked, "path": "x.jsonl", "tensor": tokens, "nothing": None}),
    ("task", with_task, {"frame": frame, "rows": rows, "pairs": pairs, "path": "x.jsonl", "nothing": None}),
    ("questions", with_questions, {"frame": frame, "task": task, "sets": task.questions, "pairs": pairs}),
    ("text", with_text, {"frame": frame, "task": task, "texts": ["a text"]}),
):
    for kind, found in kinds.items():
        if (part, kind) == ("task", "nothing"):
            table = {k: v for k, v in table.items() if k != "explore"}
        out += [(f"{part}/{kind}", call, answer(do, found)) for call, do in table.items()]
for name, call in {
    "part": lambda: Task("t", pairs, pairs, ["a text"], text, text, task.questions),
    "questions": lambda: Task("t", pairs, pairs, text, text, text, {**task.questions, "near": pairs}),
    "tokens": lambda: mtl.data.PromptPairs.from_tokens(tokens.tolist(), tokens, tokens[:, 0], tokens[:, 1]),
    "tokenizer": lambda: mtl.data.PromptPairs.from_text("gpt2", ["w3"], ["w4"], ["w5"], ["w6"]),
}.items():
    out.append((f"made/{name}", name, answer(call)))
print(json.dumps(out))
"""

MERGE = r"merge it into the weights first, model = mtl.load\(peft_model.merge_and_unload\(\)\)"
LAYER = r"model\.layers\.1\.self_attn\.q_proj"
LOAD = r"read a file, a DataFrame or a list of rows with task = mtl.load_task\({}, tokenizer=model\)"
WAYS = {
    "model/hooked/plain": r"a plain LlamaForCausalLM has no hooks; wrap it, model = mtl.load\(hf_model\)",
    "model/any/plain": "worked",  # natural: no hook is needed
    "load/plain": "worked",
    "load/name": "worked",
    "model/.*name": r"'pocket' is a name or a path; load it, model = mtl.load\('pocket'\)",
    "(model|load)/.*nothing": "got a NoneType; pass a model from mtl.load",
    "(model|load)/.*tokenizer": r"got the tokenizer \(TokenizersBackend\); pass the model that mtl.load gave",
    "(model|load)/.*class": r"LlamaForCausalLM is a class; make a model of it first, .*from_pretrained\(folder\)",
    "(model|load)/.*compiled": r"a OptimizedModule is wrapped around the model; pass mtl.load\(it._orig_mod\)",
    "(model|load)/.*trainer": r"a Trainer is wrapped around the model; pass mtl.load\(it.model\)",
    "(model|load)/.*peft": f"a PeftModelForCausalLM carries an adapter; {MERGE}",
    "(model|load)/.*prompt tuned": "a PromptTuned carries an adapter that is no part of the weights and cannot be merged",
    "(model|load)/.*carrying": rf"this LlamaForCausalLM carries an adapter of peft \({LAYER}\); {MERGE}",
    "pairs/(frame|rows)": rf"pairs: got a (DataFrame|list); {LOAD.format('it')}, then pass task.forget_pairs",
    "pairs/path": rf"pairs: got a str; {LOAD.format(chr(39) + 'x.jsonl' + chr(39))}, then pass task.forget_pairs",
    "pairs/(task|questions)": r"pairs: got a (Task|Questions); pass task.forget_pairs",
    "pairs/tensor": r"pairs: got a Tensor; make pairs of tensors with PromptPairs.from_tokens",
    "pairs/nothing": "pairs: got a NoneType; read a file",
    "task/(frame|rows|path|nothing)": r"task: got a (DataFrame|list|str|NoneType); read a file, .*mtl.load_task",
    "task/pairs": "task: got a PromptPairs; pass the task that it is a part of",
    "questions/frame": rf"questions: got a DataFrame; {LOAD.format('it')}, then pass task.questions\[\"forget\"\]",
    "questions/(task|pairs)": r"questions: got a (Task|PromptPairs); pass task.questions\[\"forget\"\]",
    "questions/sets": "questions: got a dict; pass one of its sets, 'forget' for instance",
    "text/frame": rf"text: got a DataFrame; {LOAD.format('it')}, then pass task.retain_text",
    "text/task": "text: got a Task; pass task.retain_text",
    "text/texts": "text: got a list; read a file",
    "made/part": "task 't': retain_text is a list; give Sequences, or use load_task",
    "made/questions": r"task 't': questions\['near'\] is a PromptPairs; give Questions",
    "made/tokens": r"prompt pairs: clean: got a list; pass a tensor of token ids \(torch.tensor\(...\)\)",
    "made/tokenizer": "text: got a str; pass a tokenizer or a model loaded with one",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[list[str]]:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path_factory.mktemp("saved") / "model")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_call_names_the_way(answers: list[list[str]]) -> None:
    assert len(answers) > 400
    wrong = []
    for kind, call, answer in answers:
        # A plain model that carries an adapter, or a wrapper that hands logits on, answers questions as it is.
        if call == "accuracy" and kind in ("model/any/carrying", "model/any/compiled", "model/any/plain"):
            wrong += [] if answer == "worked" else [(kind, call, answer)]
            continue
        ways = [way for pattern, way in WAYS.items() if re.fullmatch(pattern, kind)]
        assert len(ways) == 1, (kind, ways)
        if not re.search(ways[0], answer) or "\n" in answer:
            wrong.append((kind, call, answer))
    assert not wrong, "\n".join(map(str, wrong[:20]))
