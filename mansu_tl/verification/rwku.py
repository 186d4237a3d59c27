"""RWKU's recall by level (Jin et al. 2024, arXiv 2406.10890, section 3.4).

As its eval_forget.py and eval_neighbor.py: 30 greedy tokens behind the request in the model's chat template and
"Answer:" (not behind an affirmative suffix), up to a token that is a line break or ends the turn; nothing said counts
as "NOANSWER". The score is the package rouge's ROUGE-L recall (`rouge.summary_recall`), which tells upper from lower
case. Lower is better on forget probes, higher on the neighbours'. Utility on MMLU: `evaluate_choices(model,
read_rwku_utility(...), chat=True)`; its other utility sets: `evaluate_rwku_utility`. Membership inference is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.data.sources.rwku import Probe
from mansu_tl.data.text import in_chat, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.state import require_copyable
from mansu_tl.verification.rouge import summary_recall
from mansu_tl.verification.writing import text_source_of, written_texts
from mansu_tl.verification.written import WrittenScores

_NEW_TOKENS = 30
_NOTHING = "NOANSWER"
# Where a tokenizer has them as tokens of their own.
_STOPS = ("<|eot_id|>", " \n", "\n")
_MEASURE = "ROUGE-L recall"


@torch_defaults()
def evaluate_rwku(
    model: TransformerBridge | PreTrainedModel,
    sets: Mapping[str, Sequence[Probe]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    chat: bool = True,
    title: str = "model",
    batch_size: int = 32,
    progress: bool = False,
) -> WrittenScores:
    """Recall by set and level; sets are "forget level 1", "neighbour level 2" and so on.

    Args:
        sets: probes by name, from `read_rwku`: "forget" and "neighbour" as a rule.
        tokenizer: the model's own where not given.
        chat: put requests into the tokenizer's chat template, as RWKU does; False for a model that is no chat model.

    Raises:
        MansuError: an empty set, no tokenizer or chat template, or a probe that is longer than the model has positions.
    """
    source = text_source_of(model, tokenizer, "RWKU")
    require_copyable(model)
    for name, probes in sets.items():
        if not probes:
            raise MansuError(f"RWKU: the set {name!r} is empty; give at least one probe")
    asked = [(f"{name} level {probe.level}", probe) for name, probes in sets.items() for probe in probes]
    plain, _ = text_source(source)
    if chat:
        requests = in_chat(plain, [probe.request for _, probe in asked], "RWKU")
        prompts = [text + ("" if one.prefixed else "Answer:") for text, (_, one) in zip(requests, asked, strict=True)]
    else:
        prompts = [probe.prompt for _, probe in asked]
    names = [probe.name for _, probe in asked]
    vocabulary = plain.get_vocab()
    stops = {vocabulary[token] for token in _STOPS if token in vocabulary}
    written = written_texts(
        model, source, prompts, names, _NEW_TOKENS, chat=chat, stops=stops, batch_size=batch_size, progress=progress
    )
    said = [text.strip() or _NOTHING for text in written]
    values = [summary_recall(one.answer, text) for (_, one), text in zip(asked, said, strict=True)]
    return WrittenScores(
        title=title,
        benchmark="RWKU",
        sets=tuple(name for name, _ in asked),
        measures=(_MEASURE,) * len(asked),
        names=tuple(names),
        wanted=tuple(probe.answer for _, probe in asked),
        said=tuple(said),
        values=torch.tensor(values),
    )
