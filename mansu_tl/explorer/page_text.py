"""Prompts and answers as HTML; whatever comes from outside is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import pandas as pd

from mansu_tl.plots.theme import fixed

if TYPE_CHECKING:
    from mansu_tl.explorer.explorer import Explorer


def prompts_table(explorer: Explorer) -> str:
    """The chosen pair's prompts, tokens that differ in bold, with the answer and its rival."""
    results, pair = explorer.results, explorer.selection.pair
    clean, corrupt = results.tokens(pair), results.tokens(pair, corrupt=True)
    rows = []
    for name, mine, other, answer in (
        ("clean", clean, corrupt, int(results.pairs.answers[pair])),
        ("corrupt", corrupt, clean, int(results.pairs.distractors[pair, 0])),
    ):
        shown = " ".join(
            f"<b>{escape(a.strip() or a)}</b>" if a != b else escape(a.strip() or a)
            for a, b in zip(mine, other, strict=True)
        )
        rows.append(f"<tr><th>{name}</th><td>{shown} → <b>{escape(results.token(answer).strip())}</b></td></tr>")
    return f"<table>{''.join(rows)}</table>"


def answers_table(answers: pd.DataFrame) -> str:
    """How the models answer, numbers to two decimals."""
    head = "".join(f"<th>{escape(name)}</th>" for name in answers.columns)
    rows = (
        "".join(f"<td>{escape(fixed(v, 2) if isinstance(v, float) else str(v))}</td>" for v in row)
        for row in answers.itertuples(index=False)
    )
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
