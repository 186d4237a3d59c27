"""MUSE's memorization scores (Shi et al. 2024, arXiv 2407.06460, section 3.1), as its code computes them.

VerbMem: ROUGE-L F1 of 128 greedy tokens behind a passage's beginning against the first 128 tokens of how it goes on.
KnowMem: ROUGE-L F1 of 32 greedy tokens behind the examples and the question, cut where another question begins. Both
by rouge_score without a stemmer; MUSE reports means times 100. Utility is KnowMem on the retain set. PrivLeak is not
here: it is made of attacks on membership, on the texts that `read_passages` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.data.sources.muse import MuseItem, asked
from mansu_tl.data.text import TextSource, encode, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.state import require_copyable
from mansu_tl.verification.rouge import rouge_l
from mansu_tl.verification.writing import text_source_of, written_texts
from mansu_tl.verification.written import WrittenScores

PASSAGE_TOKENS, ANSWER_TOKENS = 128, 32
_NEXT_QUESTION = ("\n\n", "\nQuestion", "Question:")
_MEASURE = "ROUGE-L F1"


@torch_defaults()
def evaluate_muse(
    model: TransformerBridge | PreTrainedModel,
    sets: Mapping[str, Sequence[MuseItem]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    examples: Mapping[str, Sequence[MuseItem]] | None = None,
    title: str = "model",
    batch_size: int = 16,
    progress: bool = False,
) -> WrittenScores:
    """VerbMem of passages and KnowMem of questions, set by set.

    Args:
        sets: by name, from `read_muse`: "verbmem forget", "knowmem forget", "knowmem retain" as a rule.
        tokenizer: the model's own where not given.
        examples: answered questions in front of each set's, by the set's name (MUSE's `..._icl` parts).

    Raises:
        MansuError: an empty set, examples for none of the sets, no tokenizer, or a text that is longer than the model has
            positions.
    """
    source = text_source_of(model, tokenizer, "MUSE")
    require_copyable(model)
    shown = dict(examples or {})
    for name in shown:
        if name not in sets:
            raise MansuError(f"MUSE: examples for {name!r}, which is none of the sets {', '.join(sets)}")
    rows: list[tuple[str, MuseItem, str, str]] = []
    for name, items in sets.items():
        if not items:
            raise MansuError(f"MUSE: the set {name!r} is empty; give at least one record")
        before = "".join(f"{asked(one.prompt)} {one.wanted}\n\n" for one in shown.get(name, ()))
        for verbatim in (True, False):
            chosen = [one for one in items if one.verbatim is verbatim]
            # MUSE leaves the space in front of the answer to the prompt.
            prompts = [one.prompt if verbatim else f"{before}{asked(one.prompt)} " for one in chosen]
            names = [one.name for one in chosen]
            new_tokens = PASSAGE_TOKENS if verbatim else ANSWER_TOKENS
            said = (
                written_texts(model, source, prompts, names, new_tokens, batch_size=batch_size, progress=progress)
                if chosen
                else []
            )
            for one, text in zip(chosen, said, strict=True):
                wanted = _beginning(source, one.wanted) if verbatim else one.wanted
                rows.append((name, one, wanted, text if verbatim else _answer(text)))
    values = torch.tensor([rouge_l(wanted, text).f1 for _, _, wanted, text in rows])
    return WrittenScores(
        title=title,
        benchmark="MUSE",
        sets=tuple(name for name, _, _, _ in rows),
        measures=(_MEASURE,) * len(rows),
        names=tuple(one.name for _, one, _, _ in rows),
        wanted=tuple(wanted for _, _, wanted, _ in rows),
        said=tuple(text for _, _, _, text in rows),
        values=values,
    )


def _answer(text: str) -> str:
    """An answer up to where the model goes on with another question."""
    for mark in _NEXT_QUESTION:
        text = text.split(mark)[0]
    return text


def _beginning(source: TextSource, text: str) -> str:
    """The first tokens of how a passage goes on, a BOS token counted among them as in MUSE's code."""
    tokenizer, _ = text_source(source)
    return str(tokenizer.decode(encode(source, text)[:PASSAGE_TOKENS], skip_special_tokens=True))
