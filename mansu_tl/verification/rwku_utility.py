"""RWKU's utility beside MMLU (Jin et al. 2024, arXiv 2406.10890, section 3.4), scored as its own code does.

- Reasoning (BBH): exact match of what stands between "the answer is" and the next full stop, or of all that is written, in
  256 greedy tokens.
- Truthfulness (TruthfulQA): MC1, whether the true choice is likelier than every false one, log-probabilities summed over
  tokens; and MC2, the share of the probability that is on true choices.
- Factuality (TriviaQA): F1 and exact match of 30 greedy tokens, with every way to write the answer.
- Fluency (AlpacaEval's instructions): entropy of pairs and triples of words of 256 greedy tokens, in bits; its tables have it
  times 100.

MMLU is `evaluate_choices(model, read_rwku_utility(...), chat=True)`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.data.sources.rwku_utility import Factuality, Fluency, Reasoning, Truthfulness
from mansu_tl.data.text import TextSource, in_chat, text_source
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.state import require_copyable
from mansu_tl.verification.ngrams import Words, nltk_words, wording_entropy
from mansu_tl.verification.word_match import exact_match, word_f1
from mansu_tl.verification.writing import text_source_of, total_log_probs, written_texts
from mansu_tl.verification.written import WrittenScores

Item = Reasoning | Truthfulness | Factuality | Fluency
_NEW_TOKENS = {Reasoning: 256, Factuality: 30, Fluency: 256}
_STOP = "<|eot_id|>"
_FOUND = re.compile(r"[tT|]he answer is (.*?)\.")
_NOTHING = "NOANSWER"
# Set, measure, item, what was said, score.
_Scored = tuple[str, str, Item, str, float]


@torch_defaults()
def evaluate_rwku_utility(
    model: TransformerBridge | PreTrainedModel,
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    chat: bool = True,
    words: Words | None = None,
    new_tokens: int | None = None,
    title: str = "model",
    batch_size: int = 16,
    progress: bool = False,
) -> WrittenScores:
    """RWKU's utility beside MMLU; sets are "reasoning", "truthfulness", "truthfulness, MC2", "factuality" and so on.

    Args:
        items: from `read_rwku_reasoning`, `read_rwku_truthfulness`, `read_rwku_factuality` and `read_rwku_fluency`, in one
            list.
        tokenizer: the model's own where not given.
        chat: put requests into the tokenizer's chat template, as RWKU does; False for a model that is no chat model.
        words: splits a text into words for fluency; NLTK's where not given, as RWKU's.
        new_tokens: where an answer is cut; RWKU's 256, and 30 for facts, where not given.

    Raises:
        MansuError: no item, no tokenizer or chat template, a request that is longer than the model has positions, or fluency
            without NLTK and without `words`.
    """
    if not items:
        raise MansuError("RWKU utility: no item given; read some, e.g. with read_rwku_reasoning")
    source = text_source_of(model, tokenizer, "RWKU utility")
    require_copyable(model)
    fluent = [one for one in items if isinstance(one, Fluency)]
    split = words or (nltk_words() if fluent else str.split)
    prompts = dict(zip(items, _prompts(source, items, chat), strict=True))
    scored: list[_Scored] = []
    for kind, tokens in _NEW_TOKENS.items():
        chosen = [one for one in items if isinstance(one, kind)]
        if chosen:
            said = written_texts(
                model, source, [prompts[one] for one in chosen], [one.name for one in chosen], new_tokens or tokens,
                chat=chat, stops=() if kind is Reasoning else _stops(source), batch_size=batch_size, progress=progress,
            )  # fmt: skip
            scored += [row for one, text in zip(chosen, said, strict=True) for row in _of_text(one, text, split)]
    asked = [one for one in items if isinstance(one, Truthfulness)]
    scored += _truths(model, source, asked, prompts, chat, batch_size, progress)
    return WrittenScores(
        title=title,
        benchmark="RWKU utility",
        sets=tuple(row[0] for row in scored),
        measures=tuple(row[1] for row in scored),
        names=tuple(row[2].name for row in scored),
        wanted=tuple(row[2].answer for row in scored),
        said=tuple(row[3] for row in scored),
        values=torch.tensor([row[4] for row in scored]),
    )


def _of_text(one: Item, said: str, split: Words) -> list[_Scored]:
    """What was written to one request, scored."""
    if isinstance(one, Fluency):
        return [("fluency", "entropy of words, bits", one, said, wording_entropy(split(said)))]
    if isinstance(one, Factuality):
        both = (("", "F1", word_f1), (", exact", "exact match", exact_match))
        return [(f"factuality{end}", name, one, said, score(said, one.references)) for end, name, score in both]
    assert isinstance(one, Reasoning)
    found = _FOUND.search(said)
    answer = (found.group(1) if found else said).strip() or _NOTHING
    return [("reasoning", "exact match", one, answer, exact_match(answer, one.references))]


def _truths(
    model: TransformerBridge | PreTrainedModel,
    source: TextSource,
    asked: Sequence[Truthfulness],
    prompts: Mapping[Item, str],
    chat: bool,
    batch_size: int,
    progress: bool,
) -> list[_Scored]:
    """MC1 and MC2 of every question, by the log-probabilities of all that can be said."""
    rows = [(one, choice) for one in asked for choice in dict.fromkeys(one.more)]
    if not rows:
        return []
    found = total_log_probs(
        model, source, [(prompts[one], choice) for one, choice in rows], [one.name for one, _ in rows], chat=chat,
        batch_size=batch_size, progress=progress,
    ).double()  # fmt: skip
    likely = dict(zip(rows, found.tolist(), strict=True))
    out: list[_Scored] = []
    for one in asked:
        single = {choice: likely[one, choice] for choice in one.choices}
        false = max(single[choice] for choice, true in zip(one.choices, one.true, strict=True) if not true)
        best = max(single, key=lambda choice: single[choice])
        out.append(("truthfulness", "MC1", one, best, float(single[one.answer] > false)))
        shares = torch.tensor([likely[one, choice] for choice in one.more], dtype=torch.float64).softmax(0)
        on_true = shares[torch.tensor(one.more_true)].sum().item()
        out.append(("truthfulness, MC2", "MC2", one, best, on_true))
    return out


def _prompts(source: TextSource, items: Sequence[Item], chat: bool) -> list[str]:
    """What the model reads: each request, in the chat template or plain, and the beginning of an answer."""
    tokenizer, _ = text_source(source)
    requests = [one.request for one in items]
    texts = in_chat(tokenizer, requests, "RWKU utility") if chat else requests
    return [text + _begun(one, text, chat) for one, text in zip(items, texts, strict=True)]


def _begun(one: Item, text: str, chat: bool) -> str:
    if isinstance(one, Fluency):
        return ""
    if not chat:
        return "A:" if text.endswith("\n") else "\nA:"
    # RWKU leaves the space away before a fact.
    return "A:" if isinstance(one, Factuality) or text.endswith(("\n", " ")) else " A:"


def _stops(source: TextSource) -> Collection[int]:
    vocabulary = text_source(source)[0].get_vocab()
    return {vocabulary[_STOP]} if _STOP in vocabulary else set()
