"""What most files need: the embedded models and their task, loaded once a process, and one thread.

A test leaves these models as it found them; test_left_state.py looks at every public function for that. What takes seconds
to import is imported inside, since the process that only hands tests out to others reads this file too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.checking import install

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from mansu_tl.data import Task

install("mansu_tl")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and results then do not hang on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pocket() -> TransformerBridge:
    """The embedded model that knows its world."""
    from mansu_tl import load

    return load("pocket")


@pytest.fixture(scope="session")
def never() -> TransformerBridge:
    """The embedded model that never learnt what is to be forgotten."""
    from mansu_tl import load

    return load("pocket-never")


@pytest.fixture(scope="session")
def model(pocket: TransformerBridge) -> TransformerBridge:
    """The model that is looked at, where a file has no other."""
    return pocket


@pytest.fixture(scope="module")
def certified_here() -> Iterator[None]:
    """Certificates by this process: test_certificate.py has that a fresh one says the same, after ten seconds of imports."""
    import mansu_tl.study.study as study_module
    from mansu_tl.verification import certify

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "certify_in_fresh_process", certify)
        yield


@pytest.fixture(scope="session")
def task() -> Task:
    """The embedded task, where a file has no part of it."""
    from mansu_tl import load_task

    return load_task("pocket")
