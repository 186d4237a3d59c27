"""What others deprecate is theirs to mend and no error; what this package deprecates, or calls that is deprecated, is one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def warn_from(module: str, category: type[Warning]) -> None:
    """Warn as a line in `module` would."""
    warnings.warn_explicit("`this` is deprecated", category, f"{module}.py", 1, module=module, registry={})


@pytest.mark.parametrize("category", DEPRECATIONS)
@pytest.mark.parametrize(
    "module", ["torch.nn.modules.module", "transformers", "transformer_lens.utilities", "pandas.core"]
)
def test_a_deprecation_by_others_is_no_error(module: str, category: type[Warning]) -> None:
    warn_from(module, category)


@pytest.mark.parametrize("category", DEPRECATIONS)
@pytest.mark.parametrize("module", ["mansu_tl", "mansu_tl.circuit.attribution", "tests.tiny", "torch_like.other"])
def test_a_deprecation_by_us_is_an_error(module: str, category: type[Warning]) -> None:
    with pytest.raises(category, match="is deprecated"):
        warn_from(module, category)


def test_other_warnings_of_others_stay_errors() -> None:
    # TransformerLens says like this that a hook had no effect or that positions were not encoded.
    with pytest.raises(UserWarning):
        warn_from("transformer_lens.model_bridge.generalized_components.attention", UserWarning)


USE = """
import functools
import warnings
import transformers
import mansu_tl as mtl

forward = transformers.LlamaForCausalLM.forward
if {deprecated}:
    @functools.wraps(forward)
    def warned(self, *args, **kwargs):
        warnings.warn("`cache` is deprecated and will be removed", FutureWarning)
        return forward(self, *args, **kwargs)
    transformers.LlamaForCausalLM.forward = warned

model, task = mtl.load("pocket"), mtl.load_task("pocket")
pairs = task.forget_pairs[:4]
scores = mtl.edge_attribution(model, pairs, steps=2)
sweep = mtl.activation_patching(model, pairs)
answers = mtl.accuracy(mtl.quantize(model, "nf4"), task.questions["forget"][:4])
"""


def use(deprecated: bool, *options: str) -> subprocess.CompletedProcess[str]:
    """What a user's own script would do, in a process with Python's own filters."""
    return subprocess.run(
        [sys.executable, *options, "-c", USE.format(deprecated=deprecated)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_user_sees_no_warning() -> None:
    done = use(False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_deprecation_by_others_does_not_stop_a_user() -> None:
    done = use(True)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning: `cache` is deprecated" in done.stderr
