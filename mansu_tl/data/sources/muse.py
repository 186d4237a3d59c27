"""MUSE (Shi et al. 2024, arXiv 2407.06460): News and Books, a folder with a part for each of its evaluations.

Parts as in muse-bench/MUSE-News: `verbmem/forget` (prompt, gt), `knowmem/forget_qa` and `knowmem/retain_qa` (question,
answer) with `knowmem/forget_qa_icl` and `knowmem/retain_qa_icl` as their examples, `privleak/forget`, `retain` and
`holdout`, and `raw/...` (text).
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath

from mansu_tl.data.answers import joined
from mansu_tl.data.sources.contrast import Asked, contrast_task
from mansu_tl.data.sources.records import read_records, spread, title_of
from mansu_tl.data.sources.registry import register_source
from mansu_tl.data.task import Task
from mansu_tl.data.text import TextSource, text_source
from mansu_tl.errors import MansuError

VERBMEM, KNOWMEM = ("prompt", "gt"), ("question", "answer")


@dataclass(frozen=True)
class MuseItem:
    """A passage to go on with, or a question to answer.

    Attributes:
        name: the file and line that it comes from.
        prompt: the passage's beginning, or the question.
        wanted: how it goes on, or the answer.
        verbatim: a passage.
    """

    name: str
    prompt: str
    wanted: str
    verbatim: bool = False


def read_muse(place: str | PathLike[str]) -> tuple[MuseItem, ...]:
    """The records of a part: passages where they have prompt and gt, questions where they have question and answer.

    Args:
        place: a file, or a folder or hub id with the part behind "#": "MUSE-News#knowmem/forget_qa".

    Raises:
        MansuError: see `read_records`; a field that is missing.
    """
    out = []
    for record in read_records(place):
        verbatim = bool(set(VERBMEM) & set(record.fields))
        prompt, wanted = (record.text(key) for key in (VERBMEM if verbatim else KNOWMEM))
        out.append(MuseItem(record.name, prompt, wanted, verbatim))
    return tuple(out)


def read_passages(place: str | PathLike[str], *, field: str = "text") -> tuple[str, ...]:
    """The texts of `raw` and `privleak` parts, and of other benchmarks' members and non-members.

    Args:
        field: where a record has its text; LUME's members have it in "document".

    Raises:
        MansuError: see `read_records`; a record without a text.
    """
    return tuple(record.text(field) for record in read_records(place))


def asked(question: str) -> str:
    """A question as MUSE puts it; the answer follows."""
    return f"Question: {question}\nAnswer:"


def muse_task(
    source: str | PathLike[str], tokenizer: TextSource, *, retain: str = "", text: str = "", limit: int = 0
) -> Task:
    """A forget/retain task of MUSE's questions.

    Args:
        source: MUSE's folder or hub id (its parts are found), or the file of the questions to forget.
        retain: the questions to keep; "" = the folder's own.
        text: passages whose likelihood is to be kept, "MUSE-News#raw/retain1" as a rule.
        limit: so many questions of each, and so many passages, evenly spread; 0 = all.

    Raises:
        MansuError: as `read_muse`, passages where questions are asked for, nothing to keep, or no question with a
            counterfactual of as many tokens.
    """
    place = fspath(source)
    whole = "#" not in place and not place.lower().removesuffix(".gz").endswith((".json", ".jsonl", ".csv", ".parquet"))
    places = {
        "forget": f"{place}#knowmem/forget_qa" if whole else place,
        "retain": retain or (f"{place}#knowmem/retain_qa" if whole else ""),
    }
    if not places["retain"]:
        raise MansuError(f"{place}: nothing to keep; name the file of the other questions: retain=...")
    model, _ = text_source(tokenizer)
    sets = {}
    for kind, where in places.items():
        found = read_muse(where)
        if any(one.verbatim for one in found):
            raise MansuError(f"{where}: passages (prompt, gt), and a task needs questions; give MUSE's knowmem part")
        sets[kind] = [
            Asked(
                one.name,
                asked(one.prompt),
                joined(model, asked(one.prompt), one.wanted)[len(asked(one.prompt)) :],
                one.prompt,
            )
            for one in spread(found, limit)
        ]
    kept = spread(read_passages(text), limit) if text else ()
    return contrast_task(sets, tokenizer, name=title_of(source), where=place, text=kept)


register_source("muse", "MUSE's folder, or its knowmem questions, retain=FILE", muse_task)
