"""Did it really forget: CAD, the scorecard, the certificate, and evidence of structural erasure."""

from mansu_tl.verification.asking import SideBySide, ask
from mansu_tl.verification.attacks import Attack, attack_splits, near_attack, unrelated_attack
from mansu_tl.verification.behind import ask_behind
from mansu_tl.verification.budgets import Budget, BudgetPlan, RelearningBudgets, relearning_budgets
from mansu_tl.verification.cad_by_depth import CadByDepth, DepthReader
from mansu_tl.verification.certificate import Certificate, certify, certify_in_fresh_process
from mansu_tl.verification.choices import ChoiceScores, evaluate_choices
from mansu_tl.verification.circuit_stages import CircuitStages
from mansu_tl.verification.counterfact import CounterFactScores, evaluate_counterfact
from mansu_tl.verification.damage import Damage, damage
from mansu_tl.verification.depth import ErasureDepth, erasure_depth
from mansu_tl.verification.depth_verdict import DepthBounds, DepthVerdict
from mansu_tl.verification.divergence import (
    CircuitScores,
    Divergence,
    JudgedDivergence,
    circuit_divergence,
    circuit_scores,
    output_suppressor,
)
from mansu_tl.verification.extraction import Leakage, Memorisation, leak_at_k, memorisation
from mansu_tl.verification.hints import Hints, hints
from mansu_tl.verification.knowledge import require_known
from mansu_tl.verification.llama import JudgedFile, LlamaJudgement, judge_by_llama
from mansu_tl.verification.logit_lens import LogitLens, logit_lens
from mansu_tl.verification.lume import evaluate_lume, lume_aggregate
from mansu_tl.verification.measurement import Subject, measure
from mansu_tl.verification.membership import Membership, PrivLeak, membership, privleak
from mansu_tl.verification.muse import evaluate_muse
from mansu_tl.verification.probes import Probes, probe
from mansu_tl.verification.rediscovery import Rediscovery, rediscover
from mansu_tl.verification.relearning import RelearningCurve, relearn
from mansu_tl.verification.resistance import Relearning, compare_relearning
from mansu_tl.verification.rouge import RougeL, rouge_l, summary_recall
from mansu_tl.verification.rwku import evaluate_rwku
from mansu_tl.verification.rwku_utility import evaluate_rwku_utility
from mansu_tl.verification.scorecard import Scorecard, judge, scorecard
from mansu_tl.verification.soft_prompt import SoftPrompt, soft_prompt
from mansu_tl.verification.suffix import AdversarialSuffix, adversarial_suffix
from mansu_tl.verification.tofu import SetScores, TofuScores, evaluate_tofu
from mansu_tl.verification.verdicts import Bounds
from mansu_tl.verification.written import WrittenScores

__all__ = [
    "AdversarialSuffix",
    "Attack",
    "Bounds",
    "Budget",
    "BudgetPlan",
    "CadByDepth",
    "Certificate",
    "ChoiceScores",
    "CircuitScores",
    "CircuitStages",
    "CounterFactScores",
    "Damage",
    "DepthBounds",
    "DepthReader",
    "DepthVerdict",
    "Divergence",
    "ErasureDepth",
    "Hints",
    "JudgedDivergence",
    "JudgedFile",
    "Leakage",
    "LlamaJudgement",
    "LogitLens",
    "Membership",
    "Memorisation",
    "PrivLeak",
    "Probes",
    "Rediscovery",
    "Relearning",
    "RelearningBudgets",
    "RelearningCurve",
    "RougeL",
    "Scorecard",
    "SetScores",
    "SideBySide",
    "SoftPrompt",
    "Subject",
    "TofuScores",
    "WrittenScores",
    "adversarial_suffix",
    "ask",
    "ask_behind",
    "attack_splits",
    "certify",
    "certify_in_fresh_process",
    "circuit_divergence",
    "circuit_scores",
    "compare_relearning",
    "damage",
    "erasure_depth",
    "evaluate_choices",
    "evaluate_counterfact",
    "evaluate_lume",
    "evaluate_muse",
    "evaluate_rwku",
    "evaluate_rwku_utility",
    "evaluate_tofu",
    "hints",
    "judge",
    "judge_by_llama",
    "leak_at_k",
    "logit_lens",
    "lume_aggregate",
    "measure",
    "membership",
    "memorisation",
    "near_attack",
    "output_suppressor",
    "privleak",
    "probe",
    "rediscover",
    "relearn",
    "relearning_budgets",
    "require_known",
    "rouge_l",
    "scorecard",
    "soft_prompt",
    "summary_recall",
    "unrelated_attack",
]


def __dir__() -> list[str]:
    return sorted(__all__)
