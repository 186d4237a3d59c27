"""What the two demonstrations run."""

from __future__ import annotations

from dataclasses import asdict

from mansu_tl.study.config import StudyConfig
from mansu_tl.unlearning import MansuSettings

# The light settings: a third of the time, no defence against relearning.
DEMO = StudyConfig(
    model="pocket",
    never="pocket-never",
    also=("pocket-fp",),
    settings={"mansu": asdict(MansuSettings.light())},
)

DEMO_REAL = StudyConfig(
    model="smollm2-135m",
    methods=("mansu-closed", "graddiff"),
    quantizers=("gguf", "nf4"),
    settings={
        "mansu-closed": {"quantizer": "gguf"},
        "graddiff": {"learning_rate": 3e-5, "retain_batch": 12, "check_every": 1},
    },
)
