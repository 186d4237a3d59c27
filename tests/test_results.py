"""Every result on disk: read back as it was saved, and refused when anything of it was cut, changed or swapped.

The results are found by walking the package, so that a new one is looked at without being named here. An instance is made
from the types of its fields, or by hand where its fields have to fit each other.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import pkgutil
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from jaxtyping import AbstractArray
from safetensors import safe_open
from torch import Tensor

import mansu_tl as mtl
from mansu_tl.circuit import Circuit, Conflict, EdgeScores, FaithfulnessCurve, Minimality, PathEffects
from mansu_tl.data import PromptPairs, Questions, Sequences, Task
from mansu_tl.errors import MansuError
from mansu_tl.results import MismatchError, Result
from mansu_tl.results.files import read_packed, write_packed
from mansu_tl.verification import (
    Attack,
    Budget,
    Certificate,
    CircuitStages,
    Divergence,
    Relearning,
    RelearningBudgets,
    RelearningCurve,
    Scorecard,
)
from tests.tiny_study import tiny_case

# What lies on disk as a folder, or is made anew from one.
FOLDERS = {"Study", "MethodResult", "ComparisonResult", "Check"}
# Text and numbers that a careless writer loses.
TEXTS = ('plain, "quoted"', "L0H0\n<b>", "Łódź → 東京", "", "tensor:x", "NaN")
FLOATS = (0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3)


def every_result() -> Iterator[type[Result]]:
    for module in pkgutil.walk_packages(mtl.__path__, "mansu_tl."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    waiting: list[type[Result]] = [Result]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            ours = kind.__module__.startswith("mansu_tl.") and dataclasses.is_dataclass(kind)
            if ours and kind.__name__ not in FOLDERS:
                yield kind


RESULTS = sorted(every_result(), key=lambda kind: kind.__name__)
by_name = pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)


class Maker:
    """Values of given types; one axis name has one length, and no two have the same."""

    def __init__(self) -> None:
        lengths = itertools.count(2)
        self.axes: dict[str, int] = defaultdict(lambda: next(lengths))
        self.texts, self.floats, self.numbers = itertools.cycle(TEXTS), itertools.cycle(FLOATS), itertools.count(-1)
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, hint: Any) -> Tensor:
        shape = [int(name) if name.isdigit() else self.axes[name] for name in hint.dim_str.split()]
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        name = next(name for name in ("float32", "float64", "int64", "bool") if name in hint.dtypes)
        return (numbers > 0) if name == "bool" else (100 * numbers).to(getattr(torch, name))

    def value(self, hint: Any) -> Any:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if hint is Tensor:
            return torch.randn(3, generator=self.generator).bfloat16()
        if isinstance(hint, type) and issubclass(hint, AbstractArray):
            return self.tensor(hint)
        if origin in (typing.Union, types.UnionType):
            return self.value(inner[0])
        if origin is typing.Literal:
            return inner[-1]
        if dataclasses.is_dataclass(hint):
            return made(hint)
        if hint is pd.DataFrame:
            return pd.DataFrame(
                {"text": TEXTS[:3], "value": FLOATS[:3], "count": [1, 2, 3], "right": [True, False, True]}
            )
        if origin is tuple:
            return tuple(self.value(one) for one in (inner[:1] * 2 if inner[-1] is ... else inner))
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {self.value(inner[0]): self.value(inner[1]), "second": self.value(inner[1])}
        if hint is Path:
            return Path(next(self.texts).replace("/", "_") or "folder")
        plain = {str: self.texts, float: self.floats, int: self.numbers}
        if hint in plain:
            return next(plain[hint])
        return True if hint is bool else {"any": [1, None, "x"]}


def edge_scores() -> EdgeScores:
    writers, readers = ("embed", "L0H0", "MLP0"), ("L0H0.q", "L0KV0.k", "L0KV0.v", "MLP0.in", "logits")
    exists = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    tensor = torch.arange(15).reshape(3, 5).float() * exists / 8
    return EdgeScores(
        tensor, writers, readers, exists, "eap-ig", "midpoint", 5, "logit_difference", 2.5, -1.5, 0.25, "f" * 64,
        per_pair=torch.stack([tensor, tensor / 3]),
    )  # fmt: skip


def circuit() -> Circuit:
    return Circuit.top(edge_scores(), 6, 0.875)


def circuit_stages() -> CircuitStages:
    c = circuit()
    names = tuple(zip(*c.edges, strict=True))
    b = torch.tensor(c.to_dataframe()["score"].to_numpy(float)).float()
    found = Divergence(0.5, (0.4, 0.6), 0.5, (0.4, 0.6), b, b / 2, *names, "half")
    return CircuitStages.of(c, {"GradDiff": {"edited": found}, "MANSU": {"edited": found, "nf4": found}}, 3)


def minimality() -> Minimality:
    c = circuit()
    return Minimality(
        c.scores, torch.ones(2), c.mask, ("L0H0", "MLP0"), c.writers, c.readers, 0.5, "logit_difference", "corrupt"
    )


def curve(label: str = "a") -> RelearningCurve:
    values = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0))
    return RelearningCurve(label, "b", "facts", 1e-3, 0, (0, 5), values, values / 2, torch.ones(2), tuple("abcd"))


@cache
def task() -> Task:
    return tiny_case()[1]


BY_HAND: dict[type, Callable[[], Any]] = {
    EdgeScores: edge_scores,
    Circuit: circuit,
    Minimality: minimality,
    Conflict: lambda: Conflict(circuit(), circuit()),
    FaithfulnessCurve: lambda: FaithfulnessCurve(
        torch.tensor([0.1, 0.9]), torch.zeros(3, 2), (1, 2), (0.5, 1.0), (1, 2), 8, "eap", "m", "corrupt"
    ),
    CircuitStages: circuit_stages,
    PathEffects: lambda: PathEffects(torch.ones(1, 4), (("embed", "logits"),) * 2, True, "x", "m", 1.0, 0.0, "corrupt"),
    PromptPairs: lambda: task().forget_pairs,
    Sequences: lambda: task().retain_text,
    Questions: lambda: task().questions["forget"],
    Task: task,
    RelearningCurve: curve,
    Relearning: lambda: Relearning((curve(), curve("never")), "never"),
    RelearningBudgets: lambda: RelearningBudgets(2 * (made(Budget),), (curve(), curve("never")), "never"),
}


def made(kind: type) -> Any:
    if kind in BY_HAND:
        return BY_HAND[kind]()
    maker, hints = Maker(), typing.get_type_hints(kind)
    return kind(**{f.name: maker.value(hints[f.name]) for f in dataclasses.fields(kind) if f.init})


def same(a: Any, b: Any) -> bool:
    """Equal in type, in every field, and in every bit of a number or tensor."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [tensor.contiguous().view(torch.uint8) for tensor in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, pd.DataFrame):
        return bool(a.equals(b)) and list(a.columns) == list(b.columns)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def saved(result: Result, folder: Path) -> Path:
    return result.save(folder / f"result{result.suffix}")


def test_the_walk_finds_the_results() -> None:
    names = {kind.__name__ for kind in RESULTS}
    assert {
        "EdgeScores",
        "Circuit",
        "Edit",
        "Certificate",
        "Scorecard",
        "Probes",
        "Dither",
        "Task",
        "Accuracy",
    } <= names
    assert len(names) == len(RESULTS) >= 30


@by_name
def test_what_is_saved_is_what_is_loaded(kind: type[Result], tmp_path: Path) -> None:
    result = made(kind)
    path = saved(result, tmp_path)
    again = kind.load(path)
    assert same(again, result)
    assert again.digest() == result.digest()
    assert list(tmp_path.iterdir()) == [path]


@by_name
def test_a_cut_or_changed_file_is_refused(kind: type[Result], tmp_path: Path) -> None:
    result = made(kind)
    path = saved(result, tmp_path)
    whole = path.read_bytes()
    for share in (0.0, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(MansuError, match="cut"):
            kind.load(path)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    places = torch.randint(len(whole), (24,), generator=generator).tolist()
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            again = kind.load(path)
        except MansuError:
            refused += 1
        else:  # white space of the header, or the name of a key that no reader asks for
            assert same(again, result), place
    assert refused > 18


@by_name
def test_a_file_of_another_kind_is_refused(kind: type[Result], tmp_path: Path) -> None:
    other = made(Scorecard if kind is not Scorecard else Certificate)
    path = other.save(tmp_path / "other.json") if kind.suffix == ".json" else saved(other, tmp_path)
    with pytest.raises(
        MansuError, match=rf"holds '{type(other).__name__}', not a {kind.__name__}; pass the right file"
    ):
        kind.load(path)
    with pytest.raises(MansuError, match=f"no such file; save a {kind.__name__} there first"):
        kind.load(tmp_path / "nothing")


def rewritten(kind: type[Result], path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """The file with its tensors and fields changed by somebody who knows the format."""
    tensors, header = read_packed(path, kind.__name__)
    change(tensors, header["fields"])
    return write_packed(path, kind.__name__, tensors, header)


@by_name
def test_missing_and_unknown_fields_are_named(kind: type[Result], tmp_path: Path) -> None:
    needed = [
        f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING and f.init
    ]
    for name in needed[:1] + needed[-1:]:
        path = rewritten(kind, saved(made(kind), tmp_path), lambda _, fields, name=name: fields.pop(name))
        with pytest.raises(
            MansuError, match=f"'{name}' is missing in this {kind.__name__}; the file was cut or changed"
        ):
            kind.load(path)
    path = rewritten(kind, saved(made(kind), tmp_path), lambda _, fields: fields.update(luck=1))
    with pytest.raises(MansuError, match=f"'luck' is unknown in this {kind.__name__}"):
        kind.load(path)
    if kind.suffix != ".json":
        path = rewritten(kind, saved(made(kind), tmp_path), lambda tensors, _: tensors.update(luck=torch.ones(1)))
        with pytest.raises(MansuError, match="'luck' is unknown"):
            kind.load(path)


def typed_tensors(kind: type[Result]) -> dict[str, Any]:
    """The tensors of a class whose axes its types name."""
    hints = typing.get_type_hints(kind)
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(kind)
        if isinstance(hints[f.name], type) and issubclass(hints[f.name], AbstractArray)
    }


TENSORS = [(kind, name) for kind in RESULTS for name in typed_tensors(kind)]


@pytest.mark.parametrize(("kind", "name"), TENSORS, ids=lambda value: getattr(value, "__name__", value))
def test_a_tensor_of_another_dtype_or_shape_is_refused(kind: type[Result], name: str, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "dtype": lambda value: value.to(torch.complex64),
        "shape": lambda value: value[None],
    }
    # An axis that another tensor of the result has too: one of them longer than the other.
    axes = [hint.dim_str.split() for other, hint in typed_tensors(kind).items() if other != name]
    mine = typed_tensors(kind)[name].dim_str.split()
    if mine and any(mine[0] in others for others in axes):
        changes["length"] = lambda value: torch.cat([value, value[:1]])
    for what, change in changes.items():
        path = saved(made(kind), tmp_path)
        rewritten(kind, path, lambda tensors, _, change=change: tensors.update({name: change(tensors[name])}))
        with pytest.raises(MansuError) as refused:
            kind.load(path)
        assert "the file was cut or changed" in str(refused.value), what
        assert "its numbers are not" not in str(refused.value), f"{what}: only the digest noticed"


@pytest.mark.parametrize("kind", [EdgeScores, Circuit])
def test_numbers_that_are_not_finite_are_refused(kind: type[Result], tmp_path: Path) -> None:
    name = "tensor" if kind is EdgeScores else "scores"
    broken = getattr(made(kind), name).clone()
    broken[0, 0] = float("nan")
    path = saved(dataclasses.replace(made(kind), **{name: broken}), tmp_path)
    with pytest.raises(MansuError, match=f"'{name}' holds numbers that are not finite; compute it again"):
        kind.load(path)


def test_numbers_of_one_type_are_not_read_as_another(tmp_path: Path) -> None:
    for name, value, said in (("value", True, "'value' is True, not float"), ("label", 3, "'label' is 3, not str")):
        path = saved(made(Divergence), tmp_path)
        rewritten(Divergence, path, lambda _, fields, new={name: value}: fields.update(new))
        with pytest.raises(MansuError, match=said):
            Divergence.load(path)
    path = saved(made(Divergence), tmp_path)
    rewritten(Divergence, path, lambda _, fields: fields["interval"].append(1.0))
    with pytest.raises(MansuError, match="'interval' has 3 items, not 2"):
        Divergence.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(passed=True),
        lambda record: record.update(faults=[]),
        lambda record: record.update(claims=dict.fromkeys(record["claims"], True)),
        lambda record: record["fields"]["rows"][0].update(edited_codes_changed=10**6),
        lambda record: record["fields"].update(quantizer="int8"),
        lambda record: record.update(digest="0" * 64),
    ],
)  # fmt: skip
def test_a_certificate_that_was_edited_by_hand_is_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    certificate = made(Certificate)
    assert not certificate.passed
    path = saved(certificate, tmp_path)
    assert Certificate.load(path) == certificate
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["passed"] is False and record["faults"] == list(certificate.faults)
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(MansuError, match=r"its (numbers are not those that were saved|verdict does not follow)"):
        Certificate.load(path)


def test_a_format_of_another_version_is_refused(tmp_path: Path) -> None:
    path = saved(made(Certificate), tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | {"format": "1"}), encoding="utf-8")
    with pytest.raises(MansuError, match="format '1' is unknown here; save it again with this version"):
        Certificate.load(path)


def test_tensors_lie_in_the_file_under_their_fields_names(tmp_path: Path) -> None:
    attack = made(Attack)
    with safe_open(saved(attack, tmp_path), framework="pt") as file:
        names = set(file.keys())
        assert {"alike", "text.tokens", "questions.options"} <= names
        assert torch.equal(file.get_tensor("questions.options"), attack.questions.options)
        assert json.loads(file.metadata()["record"])["fields"]["kind"] == attack.kind


def test_what_cannot_be_written_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Holder(Result):
        model: Any

    with pytest.raises(MansuError, match="Holder: model: a Linear cannot be saved; save what it was computed from"):
        Holder(torch.nn.Linear(1, 1)).save(tmp_path / "x.safetensors")
    with pytest.raises(MansuError, match="holds tensors; give a name that ends in .safetensors"):
        edge_scores().save(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())
    assert issubclass(MismatchError, MansuError)
