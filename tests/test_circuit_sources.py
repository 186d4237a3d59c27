"""MIB's records and EAP-IG's CSV: the pairs they hold, the metric of greater-than, and the areas taken over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mansu_tl as mtl
from mansu_tl.circuit import faithfulness_curve
from mansu_tl.data.sources import read_circuit_pairs
from mansu_tl.data.sources.circuits import year_tokens
from mansu_tl.errors import MansuError
from mansu_tl.runs import YearDifference
from tests.spelled import spelling_tokenizer
from tests.tiny import tiny

CIRCUITS = Path(__file__).parents[2] / "shared" / "data" / "circuits"
needs_circuits = pytest.mark.skipif(not CIRCUITS.is_dir(), reason=f"EAP-IG's files are not in {CIRCUITS}")
TOKENIZER = spelling_tokenizer(("Ann", "Bob", "Cyd", "Dov"))


def mib(prompt: str, choices: Any, key: int, **counterfactuals: Any) -> dict[str, Any]:
    made = {f"{name}_counterfactual": each for name, each in counterfactuals.items()}
    return {"prompt": prompt, "choices": choices, "answerKey": key, **made}


def ioi(first: str, second: str) -> dict[str, Any]:
    flipped = {"prompt": f"{second} and {first} sat. {first} gave it to", "choices": [second, first], "answerKey": 0}
    other = {"prompt": f"{first} and {second} sat. Dov gave it to", "choices": [first, second], "answerKey": 1}
    return mib(f"{first} and {second} sat. {second} gave it to", [first, second], 0, s2_io_flip=flipped, abc=other)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def text(ids: torch.Tensor, length: int) -> str:
    return TOKENIZER.decode(ids[1:length])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_mibs_records_give_its_pairs(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"ioi.{ending}", [ioi("Ann", "Bob"), ioi("Cyd", "Ann")])
    pairs = read_circuit_pairs(path, TOKENIZER)
    assert text(pairs.clean[0], int(pairs.lengths[0])) == "Ann and Bob sat. Bob gave it to"
    assert text(pairs.corrupt[0], int(pairs.lengths[0])) == "Bob and Ann sat. Ann gave it to"
    assert [TOKENIZER.decode([t]) for t in (*pairs.answers, *pairs.distractors[:, 0])] == [
        " Ann",
        " Cyd",
        " Bob",
        " Ann",
    ]
    other = read_circuit_pairs(path, TOKENIZER, counterfactual="abc_counterfactual")
    assert "Dov gave" in text(other.corrupt[0], int(other.lengths[0]))
    assert len(read_circuit_pairs(path, TOKENIZER, limit=1)) == 1
    with pytest.raises(
        MansuError, match="has no 'x_counterfactual'; choose counterfactual= from s2_io_flip_counterfactual"
    ):
        read_circuit_pairs(path, TOKENIZER, counterfactual="x_counterfactual")


def test_labels_and_sums_are_answers_too(tmp_path: Path) -> None:
    labels = {"label": ["A", "B"], "text": ["red", "blue"]}
    symbols = {
        "prompt": "Q\nC. red\nD. blue\nAnswer:",
        "choices": {"label": ["C", "D"], "text": ["red", "blue"]},
        "answerKey": 1,
    }
    pairs = read_circuit_pairs(
        written(tmp_path / "mcqa.jsonl", [mib("Q\nA. red\nB. blue\nAnswer:", labels, 1, symbol=symbols)]), TOKENIZER
    )
    assert [TOKENIZER.decode(option) for option in pairs.texts()[0]] == [" B", " D"]
    sums = {
        "prompt": "1 + 2 =",
        "label": 3,
        "operator": "+",
        "random_counterfactual": {"prompt": "4 + 5 =", "label": 9},
    }
    pairs = read_circuit_pairs(written(tmp_path / "sums.jsonl", [sums]), TOKENIZER)
    assert [TOKENIZER.decode(option) for option in pairs.texts()[0]] == [" 3", " 9"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            mib("p", ["a", "b"], 2, abc={"prompt": "q", "choices": ["a", "b"], "answerKey": 1}),
            "answerKey is 2, and there are 2",
        ),
        (
            mib("p", ["a", "b"], 0, abc={"prompt": "q", "answerKey": 1}),
            "abc_counterfactual: field 'choices' is missing",
        ),
        (mib("p", ["a", "b"], 0), "has several counterfactuals or none; choose counterfactual= from .none."),
        (mib("p", [], 0, abc={"prompt": "q", "choices": ["a"], "answerKey": 0}), "choices has 0 of at least 1"),
        ({"answerKey": 0, "prompt": "", "choices": ["a"], "x_counterfactual": {"prompt": "q"}}, "prompt is ''"),
    ],
)
def test_bad_records_are_refused_in_one_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(MansuError, match=message) as found:
        read_circuit_pairs(written(tmp_path / "mib.jsonl", [row]), TOKENIZER)
    assert "\n" not in str(found.value)


def test_prompts_of_other_length_are_named_or_skipped(tmp_path: Path) -> None:
    long = ioi("Ann", "Bob")
    long["s2_io_flip_counterfactual"]["prompt"] += " me"
    path = written(tmp_path / "ioi.jsonl", [long, ioi("Cyd", "Ann")])
    with pytest.raises(MansuError, match="line 1: clean has"):
        read_circuit_pairs(path, TOKENIZER)
    assert len(read_circuit_pairs(path, TOKENIZER, skip_unequal=True)) == 1
    with pytest.raises(MansuError, match="every pair has prompts of different length"):
        read_circuit_pairs(written(tmp_path / "all.jsonl", [long]), TOKENIZER, skip_unequal=True)


def eap(first: str, second: str) -> dict[str, Any]:
    ids = [TOKENIZER.encode(f"x {name}", add_special_tokens=False)[-1] for name in (first, second)]
    asked = f"{first} and {second} sat. {second} gave it to"
    return {
        "clean": asked,
        "corrupted": asked.replace(f". {second}", ". Cyd"),
        "correct_idx": ids[0],
        "incorrect_idx": ids[1],
    }


def test_eap_igs_ids(tmp_path: Path) -> None:
    rows = [eap("Ann", "Bob"), eap("Bob", "Ann")]
    pairs = read_circuit_pairs(written(tmp_path / "ioi.csv", rows), TOKENIZER)
    assert [TOKENIZER.decode([t]) for t in (*pairs.answers, *pairs.distractors[:, 0])] == [
        " Ann",
        " Bob",
        " Bob",
        " Ann",
    ]
    assert text(pairs.corrupt[0], int(pairs.lengths[0])) == "Ann and Bob sat. Cyd gave it to"
    foreign = [row | {"correct_idx": 70 + i} for i, row in enumerate(rows)]
    with pytest.raises(MansuError, match="correct_idx: token 70 is .* these ids are another tokenizer's"):
        read_circuit_pairs(written(tmp_path / "foreign.csv", foreign), TOKENIZER)
    assert len(read_circuit_pairs(tmp_path / "foreign.csv", TOKENIZER, trust_ids=True)) == 2
    for change, message in (
        ({"correct_idx": 10**6}, "correct_idx is 1000000, and there are"),
        ({"incorrect_idx": "Bob"}, "incorrect_idx is 'Bob'; it must be a whole number"),
        ({"corrupted": ""}, "field 'corrupted' is missing"),
        ({"corrupted": "Ann"}, "clean has .* tokens, corrupted .*; drop the row"),
    ):
        with pytest.raises(MansuError, match=message) as found:
            read_circuit_pairs(written(tmp_path / "bad.csv", [rows[0], rows[1] | change]), TOKENIZER)
        assert "\n" not in str(found.value)


def years_tokenizer() -> Any:
    tokenizer = spelling_tokenizer()
    tokenizer.add_tokens([f"{year:02d}" for year in range(100)])
    return tokenizer


def test_greater_than_and_its_metric_by_hand(tmp_path: Path) -> None:
    tokenizer = years_tokenizer()
    rows = [
        {
            "clean": f"from the year 17{label} to the year 17",
            "corrupted": "from the year 1701 to the year 17",
            "label": label,
        }
        for label in (52, 97)
    ]
    path = written(tmp_path / "years.csv", rows)
    pairs, years = read_circuit_pairs(path, tokenizer), year_tokens(tokenizer)
    assert [tokenizer.decode([t]) for t in (*pairs.answers, *pairs.distractors[:, 0])] == ["53", "98", "52", "97"]
    logits = torch.full((2, len(tokenizer)), -30.0)
    # Half on 60, a quarter each on 52 and 10; all on 97.
    logits[0, [years[60], years[52], years[10]]] = torch.tensor([0.5, 0.25, 0.25]).log()
    logits[1, years[97]] = 0.0
    metric = YearDifference.of(tokenizer)
    assert metric == YearDifference(years)
    assert metric(logits, pairs).tolist() == pytest.approx([0, -1], abs=1e-6)
    logits[0, years[60]] += 10
    assert metric(logits, pairs)[0].item() == pytest.approx(1, abs=1e-3)
    model = mtl.load(tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=64), tokenizer=tokenizer)
    scores = mtl.edge_attribution(model, pairs, metric=metric, steps=2)
    assert torch.isfinite(scores.tensor).all()
    with pytest.raises(MansuError, match="first distractor is none of the years"):
        metric(
            logits,
            pairs[:1].__class__.from_tokens(
                pairs.clean, pairs.corrupt, pairs.answers, pairs.lengths * 0 + 3, pairs.lengths
            ),
        )
    with pytest.raises(MansuError, match="writes the year 00 as"):
        read_circuit_pairs(path, TOKENIZER)
    bad = written(tmp_path / "bad.csv", [rows[0] | {"label": 99}])
    with pytest.raises(MansuError, match="label is 99, and there are 99"):
        read_circuit_pairs(bad, tokenizer)


def test_cpr_cmd_and_its_signed_form_over_these_pairs(tmp_path: Path) -> None:
    """MIB's areas by numpy's trapezoids from the curve's own faithfulness."""
    model = mtl.load(tiny("llama", vocab_size=len(TOKENIZER), max_position_embeddings=64), tokenizer=TOKENIZER)
    pairs = read_circuit_pairs(written(tmp_path / "ioi.csv", [eap("Ann", "Bob"), eap("Bob", "Ann")]), model)
    curve = faithfulness_curve(model, mtl.edge_attribution(model, pairs, steps=2), pairs, sizes=[0.1, 0.3, 1.0])
    height, shares = curve.faithfulness.double().numpy(), np.array(curve.shares)
    widths = np.diff(shares)

    def area(values: np.ndarray) -> float:
        return float((widths * (values[1:] + values[:-1]) / 2).sum())

    assert curve.cpr == pytest.approx(area(height))
    assert curve.cmd == pytest.approx(area(np.abs(1 - height)))
    assert curve.cmd_signed == pytest.approx(area(1 - height))
    assert curve.faithfulness[-1].item() == pytest.approx(1, abs=1e-4)


def test_a_task_of_mib(tmp_path: Path) -> None:
    names = ("Ann", "Bob", "Cyd")
    rows = [ioi(a, b) for a in names for b in names if a != b]
    forget, retain = written(tmp_path / "f.jsonl", rows[:4]), written(tmp_path / "r.jsonl", rows[4:])
    task = mtl.load_task(forget, tokenizer=TOKENIZER, retain=str(retain))
    assert (len(task.forget_pairs), len(task.retain_pairs)) == (4, 2)
    assert torch.equal(task.forget_pairs.clean, read_circuit_pairs(forget, TOKENIZER).clean)
    assert torch.equal(task.forget_pairs.corrupt, read_circuit_pairs(forget, TOKENIZER).corrupt)
    # EAP-IG's too.
    csv = [written(tmp_path / f"{i}.csv", [eap(*row)]) for i, row in enumerate((("Ann", "Bob"), ("Cyd", "Ann")))]
    task = mtl.load_task(csv[0], tokenizer=TOKENIZER, retain=str(csv[1]))
    assert len(task.retain_text) == len(task.forget_pairs) == 1
    assert TOKENIZER.decode(task.retain_text.tokens[0, 1:]) == "Cyd and Ann sat. Ann gave it to Cyd"
    with pytest.raises(MansuError, match="nothing to keep; name another one, .*read_circuit_pairs"):
        mtl.load_task(forget, tokenizer=TOKENIZER)


@needs_circuits
def test_eap_igs_own_files() -> None:
    tokenizer = years_tokenizer()
    pairs = read_circuit_pairs(CIRCUITS / "greater_than_data.csv", tokenizer)
    frame = pd.read_csv(CIRCUITS / "greater_than_data.csv")
    assert len(pairs) == len(frame) == 1000
    labels = [int(tokenizer.decode([token])) for token in pairs.distractors[:, 0]]
    assert labels == frame["label"].tolist()
    changed = pairs.clean != pairs.corrupt
    assert changed.sum(1).max() == 1  # the year of two digits alone
    # Llama's ids are no other tokenizer's.
    with pytest.raises(MansuError, match="correct_idx is .*, and there are|another tokenizer's"):
        read_circuit_pairs(CIRCUITS / "ioi_llama.csv", tokenizer, skip_unequal=True)
