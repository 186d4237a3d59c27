"""A model on TOFU: its measures set by set, model utility and forget quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import harmonic_mean

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mansu_tl.data.sources.tofu.files import Item, Tofu, answer_ids, prompt, text_of
from mansu_tl.data.text import pad_id
from mansu_tl.defaults import torch_defaults
from mansu_tl.errors import MansuError
from mansu_tl.models.state import require_copyable
from mansu_tl.results.result import Result, Table
from mansu_tl.verification.tofu_measures import extraction_strength, forget_quality, rouge_l_recall, truth_ratio
from mansu_tl.verification.writing import answer_likelihoods, greedy_answers, writing_copy

SETS = ("forget", "retain", "real_authors", "world_facts")
_UTILITY = SETS[1:]
_NEW_TOKENS = 128


@dataclass(frozen=True)
class SetScores:
    """One question set, question by question; all in [0, 1] but the truth ratio.

    Attributes:
        probability: the answer's length-normalised probability, exp of its mean log-likelihood per token.
        choice: that probability over the sum of it and those of the wrong answers.
        rouge: ROUGE-L recall of the greedy answer.
        truth_ratio: wrong answers against the right one (see `metrics.truth_ratio`).
        extraction: extraction strength of the answer.
    """

    probability: Float[Tensor, " question"]
    choice: Float[Tensor, " question"]
    rouge: Float[Tensor, " question"]
    truth_ratio: Float[Tensor, " question"]
    extraction: Float[Tensor, " question"]


@dataclass(frozen=True)
class TofuScores(Result):
    """What TOFU says about a model.

    Attributes:
        title: the model's name in tables.
        sets: scores by set: "forget", "retain" and, where the files are there, "real_authors" and "world_facts".
    """

    title: str
    sets: Mapping[str, SetScores]

    def utility_parts(self) -> dict[str, float]:
        """The values behind model utility, three a set: probability, ROUGE-L recall, and max(0, 1 - truth ratio).

        The probability is the plain one on the retain set and the one among the options on the two sets of real facts.
        """
        parts = {}
        for name in _UTILITY:
            if name in self.sets:
                scores = self.sets[name]
                chance = scores.probability if name == "retain" else scores.choice
                parts[f"{name} probability"] = chance.mean().item()
                parts[f"{name} ROUGE-L"] = scores.rouge.mean().item()
                parts[f"{name} truth"] = (1 - scores.truth_ratio).clamp(min=0).mean().item()
        return parts

    @property
    def model_utility(self) -> float:
        """Harmonic mean of `utility_parts`: TOFU's own where all three sets are there.

        A model that never read about real authors and the world has a utility near 0 on them whatever was done to it:
        read `retain_utility` beside it.
        """
        return float(harmonic_mean(self.utility_parts().values()))

    @property
    def retain_utility(self) -> float:
        """Harmonic mean of the retain set's three values; our addition, for models trained on TOFU alone."""
        return float(harmonic_mean(v for name, v in self.utility_parts().items() if name.startswith("retain")))

    def forget_quality(self, reference: TofuScores) -> float:
        """p-value of the KS test between the two models' truth ratios on the forget set.

        Args:
            reference: the scores of a model that never read the forget set.
        """
        return forget_quality(self.sets["forget"].truth_ratio, reference.sets["forget"].truth_ratio)

    def to_dataframe(self, reference: TofuScores | None = None) -> pd.DataFrame:
        """Tidy rows set, measure, value: every set's means, and the aggregates with set "all".

        Args:
            reference: the retain model's scores; with it, forget quality is a row.
        """
        rows = []
        for name, scores in self.sets.items():
            means = {f.name: getattr(scores, f.name).mean().item() for f in fields(scores)}
            # Few questions with a tiny denominator rule a mean of ratios.
            means["truth_ratio_median"] = scores.truth_ratio.median().item()
            rows += [(name, measure.replace("_", " "), value) for measure, value in means.items()]
        rows += [("all", "model utility", self.model_utility), ("all", "retain utility", self.retain_utility)]
        if reference is not None:
            rows.append(("all", "forget quality", self.forget_quality(reference)))
        return pd.DataFrame(rows, columns=["set", "measure", "value"])

    def __repr__(self) -> str:
        forget = self.sets["forget"]
        return (
            f"TofuScores({self.title}: forget probability {forget.probability.mean():.3f}, ROUGE-L "
            f"{forget.rouge.mean():.3f}; retain utility {self.retain_utility:.3f})"
        )

    def _tables(self) -> Sequence[Table]:
        frame = self.to_dataframe().pivot(index="set", columns="measure", values="value")
        return (Table(frame, form="{:.3f}".format, index=True),)


@torch_defaults()
def evaluate_tofu(
    model: TransformerBridge | PreTrainedModel,
    tofu: Tofu,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    title: str = "model",
    sets: Sequence[str] = SETS,
    limit: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> TofuScores:
    """TOFU's measures of a model, greedy and deterministic.

    The forget and retain sets are forget10_perturbed and retain_perturbed (400 questions each).

    Args:
        tokenizer: the model's own where not given.
        sets: which to ask; "forget" and "retain" must be among them, the others are left out where their file is absent.
        limit: ask at most so many questions of every set, evenly spread; 0 = all.

    Raises:
        MansuError: no tokenizer, an unknown set, one of the two missing, a question without wrong answers, or a model that
            `require_copyable` refuses.
    """
    unknown = [name for name in sets if name not in SETS]
    if unknown or not {"forget", "retain"} <= set(sets):
        raise MansuError(f"TOFU: sets={list(sets)}; name forget and retain, and otherwise only {', '.join(SETS[2:])}")
    if tokenizer is None:
        tokenizer = model.tokenizer if isinstance(model, TransformerBridge) else None
        if tokenizer is None:
            raise MansuError("TOFU: this model has no tokenizer; pass tokenizer=")
    require_copyable(model)
    hf = writing_copy(model, title)
    files = {
        "forget": tofu.forget_perturbed,
        "retain": tofu.retain_perturbed,
        "real_authors": tofu.real_authors,
        "world_facts": tofu.world_facts,
    }
    asked = {name: _spread(files[name], limit) for name in SETS if name in sets and files[name]}
    bar = tqdm(asked.items(), desc="TOFU", unit="set", disable=not progress)
    return TofuScores(title, {name: _score(hf, tokenizer, items, name, batch_size) for name, items in bar})


def _spread(items: tuple[Item, ...], limit: int) -> tuple[Item, ...]:
    if not limit or limit >= len(items):
        return items
    return tuple(items[i * len(items) // limit] for i in range(limit))


def _score(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], name: str, batch_size: int
) -> SetScores:
    for item in items:
        if not item.perturbed_answers:
            raise MansuError(
                f"TOFU: {name} question {item.question!r} has no perturbed answers; take the perturbed file"
            )
    fill = pad_id(tokenizer)

    def asked(answers: Sequence[tuple[Item, str]]) -> list[tuple[list[int], list[int]]]:
        return [answer_ids(tokenizer, prompt(item.question), answer) for item, answer in answers]

    rows = asked([(item, item.answer) for item in items])
    right, predicted = answer_likelihoods(hf, rows, fill, batch_size)
    paraphrased = asked([(item, item.paraphrased_answer or item.answer) for item in items])
    fair, _ = answer_likelihoods(hf, paraphrased, fill, batch_size)
    counts = [len(item.perturbed_answers) for item in items]
    options = asked([(item, wrong) for item in items for wrong in item.perturbed_answers])
    wrong = answer_likelihoods(hf, options, fill, batch_size)[0].split(counts)
    end = tokenizer.eos_token_id
    prompts = [before for before, _ in rows]
    texts = [text_of(tokenizer, row) for row in greedy_answers(hf, prompts, fill, end, _NEW_TOKENS, 2 * batch_size)]
    ended = 0 if end is None else 1
    extraction = [
        extraction_strength(guess[: len(answer) - ended], torch.tensor(answer[: len(answer) - ended]))
        for guess, (_, answer) in zip(predicted, rows, strict=True)
    ]
    probability = right.exp()
    return SetScores(
        probability=probability,
        choice=torch.stack([p / (p + w.exp().sum()) for p, w in zip(probability, wrong, strict=True)]),
        rouge=torch.tensor([rouge_l_recall(item.answer, text) for item, text in zip(items, texts, strict=True)]),
        truth_ratio=torch.cat([truth_ratio(f[None], w[None]) for f, w in zip(fair, wrong, strict=True)]),
        extraction=torch.tensor(extraction),
    )
