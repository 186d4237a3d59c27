"""Studies and comparisons: plans of cells, one runner, one tidy table; verdicts, pictures and report are views of it."""

from mansu_tl.study.audit_plan import AuditPlan, Estimate, Planned
from mansu_tl.study.audit_run import Audit, OpenAudit, audit
from mansu_tl.study.audit_verdicts import Answer, AuditBounds, Verdict
from mansu_tl.study.collect import collect
from mansu_tl.study.comparison import ComparisonResult
from mansu_tl.study.config import StudyConfig
from mansu_tl.study.figures import figures
from mansu_tl.study.gallery import figure_data, write_gallery
from mansu_tl.study.harness import HarnessScores, harness_scores
from mansu_tl.study.markdown import markdown
from mansu_tl.study.page import Section, write_report
from mansu_tl.study.pictures import Picture, pictures
from mansu_tl.study.plan import Comparison, full, quick
from mansu_tl.study.report import study_figures, write_study_report
from mansu_tl.study.run import compare, run_study
from mansu_tl.study.study import MethodResult, Study
from mansu_tl.study.table import properties, summary

__all__ = [
    "Answer",
    "Audit",
    "AuditBounds",
    "AuditPlan",
    "Comparison",
    "ComparisonResult",
    "Estimate",
    "HarnessScores",
    "MethodResult",
    "OpenAudit",
    "Picture",
    "Planned",
    "Section",
    "Study",
    "StudyConfig",
    "Verdict",
    "audit",
    "collect",
    "compare",
    "figure_data",
    "figures",
    "full",
    "harness_scores",
    "markdown",
    "pictures",
    "properties",
    "quick",
    "run_study",
    "study_figures",
    "summary",
    "write_gallery",
    "write_report",
    "write_study_report",
]


def __dir__() -> list[str]:
    return sorted(__all__)
