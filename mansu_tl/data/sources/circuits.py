"""Circuit benchmarks, whose prompts come with their counterfactuals: EAP-IG's and MIB's.

Hanna et al. 2024, arXiv 2403.17806, and Mueller et al. 2025, arXiv 2504.13151.

- EAP-IG's CSV: clean, corrupted, and either correct_idx and incorrect_idx, token ids of one tokenizer, or label, a
  year of two digits ("greater-than": every later year is right).
- MIB's records: prompt, choices and answerKey (or label), and the same again in each NAME_counterfactual.

What is measured on them is in `mansu_tl.circuit`: `faithfulness`, and `faithfulness_curve` with MIB's CPR and CMD.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mansu_tl.data.pairs import PromptPairs
from mansu_tl.data.sources.records import Record, read_records, spread, title_of
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Questions, Sequences, Task
from mansu_tl.data.text import TextSource, encode, pad, pad_id, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError

EAP_IG, MIB = ("clean", "corrupted"), ("prompt", "answerKey")
COUNTERFACTUAL = "_counterfactual"
# Those that MIB's circuit track takes where a task has several.
_PREFERRED = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")
LAST_YEAR = 99


@dataclass(frozen=True)
class _Pair:
    """A pair as text, its answer and the corrupt prompt's."""

    name: str
    clean: str
    corrupt: str
    answer: str
    other: str


@torch_defaults()
def read_circuit_pairs(
    place: str | PathLike[str],
    tokenizer: TextSource,
    *,
    counterfactual: str = "",
    limit: int = 0,
    skip_unequal: bool = False,
    trust_ids: bool = False,
) -> PromptPairs:
    """The pairs of a circuit benchmark; each one is a fact of its own.

    Of "greater-than" the answer is the year behind the label, the distractor the label itself: the earliest right year and
    the latest wrong one. `mansu_tl.runs.YearDifference` makes EAP-IG's metric of them.

    Args:
        place: a CSV of EAP-IG's, or MIB's records (a file, a folder's or a hub id's part).
        tokenizer: the model's, or the hooked model itself.
        counterfactual: which of MIB's, "abc_counterfactual"; "" = the one its circuit track takes.
        limit: so many pairs, evenly spread; 0 = all.
        skip_unequal: leave out pairs whose prompts have different numbers of tokens, as MIB does; else they are an error.
        trust_ids: take EAP-IG's token ids as this tokenizer's though none of the answers is a word of its prompt.

    Raises:
        MansuError: see `read_records`; a field that is missing, an answer that is not there to be chosen, ids that are not
            this tokenizer's, a year that is no single token, or prompts of different length.
    """
    records = spread(read_records(place), limit)
    if not set(EAP_IG) & set(records[0].fields):
        return _of_texts(place, tokenizer, [_mib(record, counterfactual) for record in records], skip_unequal)
    return _of_ids(place, tokenizer, records, skip_unequal, trust_ids)


def _of_texts(
    place: str | PathLike[str], tokenizer: TextSource, pairs: Sequence[_Pair], skip_unequal: bool
) -> PromptPairs:
    """MIB's pairs."""
    model, _ = text_source(tokenizer)
    kept = [one for one in pairs if not skip_unequal or _equal(model, one.clean, one.corrupt)]
    _require_some(place, kept)
    return PromptPairs.from_text(
        tokenizer,
        [one.clean for one in kept],
        [one.corrupt for one in kept],
        [one.answer for one in kept],
        [[one.other] for one in kept],
        names=[one.name for one in kept],
        labels=[one.name.rpartition(", ")[2] for one in kept],
        facts=[one.name for one in kept],
    )


def _of_ids(
    place: str | PathLike[str], tokenizer: TextSource, records: Sequence[Record], skip_unequal: bool, trust_ids: bool
) -> PromptPairs:
    """EAP-IG's pairs, whose answers are tokens."""
    model, bos = text_source(tokenizer)
    years = year_tokens(tokenizer) if "label" in records[0].fields else ()
    kept: list[tuple[Record, list[int], list[int], int, int]] = []
    for record in records:
        clean, corrupt = (encode(model, record.text(key), bos) for key in EAP_IG)
        if len(clean) != len(corrupt):
            if skip_unequal:
                continue
            raise MansuError(
                f"{record.name}: clean has {len(clean)} tokens, corrupted {len(corrupt)}; drop the row, or pass "
                "skip_unequal=True"
            )
        if years:
            label = record.index("label", LAST_YEAR)
            right, wrong = years[label + 1], years[label]
        else:
            right, wrong = (record.index(key, len(model)) for key in ("correct_idx", "incorrect_idx"))
        kept.append((record, clean, corrupt, right, wrong))
    _require_some(place, kept)
    if not years and not trust_ids:
        _require_own_ids(model, [(row[0].text("clean"), row[3]) for row in kept])
    clean_ids, lengths = pad([row[1] for row in kept], pad_id(model))
    corrupt_ids, _ = pad([row[2] for row in kept], pad_id(model))
    answers, wrong_ones = (torch.tensor([row[i] for row in kept]) for i in (3, 4))
    names = [row[0].name for row in kept]
    labels = [name.rpartition(", ")[2] for name in names]
    return PromptPairs.from_tokens(clean_ids, corrupt_ids, answers, wrong_ones, lengths, labels, facts=names)


def year_tokens(tokenizer: TextSource) -> tuple[int, ...]:
    """The tokens of the years 00 to 99, as they follow a century.

    Raises:
        MansuError: the tokenizer writes one of them as several tokens.
    """
    model, _ = text_source(tokenizer)
    out = []
    for year in range(LAST_YEAR + 1):
        ids = encode(model, f"{year:02d}", False)
        if len(ids) != 1 or ids[0] == model.unk_token_id:
            raise MansuError(
                f"greater-than: the tokenizer writes the year {year:02d} as {model.convert_ids_to_tokens(ids)}; it needs one "
                "token of its own, as GPT-2's has"
            )
        out.append(ids[0])
    return tuple(out)


def _mib(record: Record, wanted: str) -> _Pair:
    columns = [key for key in record.fields if key.endswith(COUNTERFACTUAL) and record.fields[key] is not None]
    key = wanted or next((key for key in _PREFERRED if key in columns), columns[0] if len(columns) == 1 else "")
    if key not in columns:
        asked = f"has no {wanted!r}" if wanted else "has several counterfactuals or none"
        raise MansuError(f"{record.name}: {asked}; choose counterfactual= from {', '.join(columns) or '(none)'}")
    other = record.within(key)
    return _Pair(record.name, record.text("prompt"), other.text("prompt"), _answer(record), _answer(other))


def _answer(record: Record) -> str:
    """What is right, by `answerKey` among `choices` (texts, or labels with texts), or `label`."""
    if "choices" not in record.fields and record.fields.get("label") is not None:
        return str(record.fields["label"]).strip()
    choices: Any = record.needed("choices")
    found = record.within("choices").texts("label") if isinstance(choices, dict) else record.texts("choices")
    return found[record.index("answerKey", len(found))].strip()


def _equal(model: PreTrainedTokenizerBase, *texts: str) -> bool:
    return len({len(encode(model, text, False)) for text in texts}) == 1


def _require_some(place: str | PathLike[str], kept: Sequence[object]) -> None:
    if not kept:
        raise MansuError(f"{fspath(place)}: every pair has prompts of different length; use another tokenizer")


def _require_own_ids(model: PreTrainedTokenizerBase, rows: Sequence[tuple[str, int]]) -> None:
    """Refuse ids of which none stands for a word of its prompt: those of another tokenizer."""
    texts = [(prompt, str(model.decode([token])).strip()) for prompt, token in rows]
    if not any(word and re.search(rf"\b{re.escape(word)}\b", prompt) for prompt, word in texts):
        raise MansuError(
            f"correct_idx: token {rows[0][1]} is {texts[0][1]!r} here, and no answer is a word of its prompt: these ids are "
            "another tokenizer's; use its model, or pass trust_ids=True"
        )


def circuits_task(
    source: str | PathLike[str],
    tokenizer: TextSource,
    *,
    retain: str = "",
    counterfactual: str = "",
    limit: int = 0,
    skip_unequal: bool = False,
    trust_ids: bool = False,
) -> Task:
    """A forget/retain task of two circuit benchmarks, with their own counterfactuals; options as `read_circuit_pairs`.

    Args:
        source: the prompts to forget.
        retain: the prompts to keep, in pairs and with their answers as text.

    Raises:
        MansuError: nothing to keep, or as `read_circuit_pairs`.
    """
    if not retain:
        raise MansuError(
            f"{fspath(source)}: a circuit benchmark has nothing to keep; name another one, retain=..., or read its pairs "
            "alone: mansu_tl.data.sources.read_circuit_pairs"
        )
    forget, kept = (
        read_circuit_pairs(
            place, tokenizer, counterfactual=counterfactual, limit=limit, skip_unequal=skip_unequal, trust_ids=trust_ids
        )
        for place in (source, retain)
    )
    rows = zip(kept.clean.tolist(), kept.lengths.tolist(), kept.texts(), strict=True)
    nothing = Sequences(torch.empty(0, 1, dtype=torch.long), torch.empty(0, dtype=torch.long))
    return Task(
        name=title_of(source),
        forget_pairs=forget,
        retain_pairs=kept,
        retain_text=Sequences(*pad([[*row[:length], *options[0]] for row, length, options in rows], 0)),
        near_text=nothing,
        unseen=nothing,
        questions={"forget": Questions.of_pairs(forget), "retain": Questions.of_pairs(kept)},
    )


for _name, _about, _fields in (
    ("mib", "MIB's prompts with counterfactuals, retain=FILE", MIB),
    ("eap-ig", "EAP-IG's CSV of pairs, retain=FILE", EAP_IG),
):
    register_source(_name, _about, circuits_task, fields=_fields)
