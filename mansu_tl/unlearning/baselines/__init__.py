"""Published unlearning methods and controls, one file each."""

from mansu_tl.unlearning.baselines.ga import GaKlSettings, GaSettings, ga, ga_kl
from mansu_tl.unlearning.baselines.graddiff import GradDiffSettings, graddiff
from mansu_tl.unlearning.baselines.npo import NpoSettings, npo
from mansu_tl.unlearning.baselines.null_space import NullSpaceSettings, null_space
from mansu_tl.unlearning.baselines.quail import QuailSettings, quail
from mansu_tl.unlearning.baselines.rmu import RmuSettings, rmu
from mansu_tl.unlearning.baselines.simnpo import SimNpoSettings, simnpo
from mansu_tl.unlearning.baselines.ste import SteSettings, ste
from mansu_tl.unlearning.baselines.suppressor import SuppressorSettings, suppressor
from mansu_tl.unlearning.baselines.sure import SureSettings, sure

__all__ = [
    "GaKlSettings",
    "GaSettings",
    "GradDiffSettings",
    "NpoSettings",
    "NullSpaceSettings",
    "QuailSettings",
    "RmuSettings",
    "SimNpoSettings",
    "SteSettings",
    "SuppressorSettings",
    "SureSettings",
    "ga",
    "ga_kl",
    "graddiff",
    "npo",
    "null_space",
    "quail",
    "rmu",
    "simnpo",
    "ste",
    "suppressor",
    "sure",
]


def __dir__() -> list[str]:
    return sorted(__all__)
