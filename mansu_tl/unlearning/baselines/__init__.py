"""Published unlearning methods, one file each."""

from mansu_tl.unlearning.baselines.graddiff import GradDiffSettings, graddiff
from mansu_tl.unlearning.baselines.npo import NpoSettings, npo
from mansu_tl.unlearning.baselines.quail import QuailSettings, quail

__all__ = ["GradDiffSettings", "NpoSettings", "QuailSettings", "graddiff", "npo", "quail"]
