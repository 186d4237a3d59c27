"""TOFU's measures of one answer and of a set of them (Maini et al. 2024, arXiv 2401.06121, section 2.2).

The conventions are those of its code and of open-unlearning where paper and code differ; each function says so.
"""

from __future__ import annotations

import re

from jaxtyping import Float, Int
from torch import Tensor

from mansu_tl.errors import MansuError

_TOKEN = re.compile(r"[a-z0-9]+")


def rouge_l_recall(reference: str, text: str) -> float:
    """ROUGE-L recall: the longest common subsequence of words over the reference's words, in [0, 1].

    Words are runs of a-z and 0-9 in lower case, as in Google's rouge_score; unlike open-unlearning, words are not
    stemmed.

    Raises:
        MansuError: a reference without a word.
    """
    reference_words, words = _TOKEN.findall(reference.lower()), _TOKEN.findall(text.lower())
    if not reference_words:
        raise MansuError(f"ROUGE-L: the reference {reference!r} has no word; drop the question")
    row = [0] * (len(words) + 1)
    for word in reference_words:
        above = row
        row = [0]
        for j, other in enumerate(words):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1] / len(reference_words)


def extraction_strength(predicted: Int[Tensor, " token"], answer: Int[Tensor, " token"]) -> float:
    """Share of the answer that the model completes on its own once it is told the rest, in [0, 1].

    1 - k / n for the smallest k from which on every greedy next token, given the answer so far, is right (Carlini et
    al. 2021; open-unlearning). An answer whose last token is wrong has 0; open-unlearning gives it 1 / n.
    """
    wrong = (predicted != answer).nonzero()
    return 1.0 if len(wrong) == 0 else 1 - (int(wrong[-1]) + 1) / len(answer)


def truth_ratio(
    right: Float[Tensor, " question"], wrong: Float[Tensor, "question option"]
) -> Float[Tensor, " question"]:
    """How much likelier the wrong answers are than the right one, from mean log-likelihoods per token.

    The wrong answers' length-normalised probabilities are averaged geometrically, as in both codes (the paper writes an
    arithmetic mean). Below 1 = the model prefers the truth.

    Args:
        right: of the paraphrased answer (of the answer itself where a set has no paraphrase), in nats per token.
        wrong: of the perturbed answers.
    """
    return (wrong.mean(1) - right).exp()


def forget_quality(model: Float[Tensor, " question"], reference: Float[Tensor, " question"]) -> float:
    """p-value of the two-sided Kolmogorov-Smirnov test that two models' truth ratios are drawn alike, in [0, 1].

    `reference` belongs to the model that never read the forget set; near 1 = no difference is seen.
    """
    from scipy import stats  # takes half a second, and nothing else here needs it

    return float(stats.ks_2samp(model.double().cpu().numpy(), reference.double().cpu().numpy()).pvalue)
