"""Sign flips and Holm's correction, against hand-computed cases and scipy."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from mansu_tl.errors import MansuError
from mansu_tl.results.significance import holm, sign_flip


def test_sign_flips_of_few_terms_are_counted_by_hand() -> None:
    # Of eight flips of (1, 2, 3) two reach |6|; of (1, 2, -3) all do, since its own sum is 0.
    assert sign_flip(torch.tensor([1.0, 2.0, 3.0])) == 2 / 8
    assert sign_flip(torch.tensor([1.0, 2.0, -3.0])) == 1.0
    # (1, 2, 4): |7| twice; (-1, 2, 4): |5| or more are +-5 and +-7.
    assert sign_flip(torch.tensor([-1.0, 2.0, 4.0])) == 4 / 8


def test_sign_flips_of_many_terms_agree_with_scipy() -> None:
    terms = 0.4 + torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    for shift in (0.0, -0.2, -0.35):
        moved = terms + shift
        theirs = stats.permutation_test(
            (moved.numpy(),), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=20_000, random_state=2,
        ).pvalue  # fmt: skip
        assert sign_flip(moved) == pytest.approx(theirs, abs=0.015)
    assert sign_flip(terms) == sign_flip(terms)


def test_sign_flips_are_even_where_there_is_no_difference() -> None:
    draws = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
    found = torch.tensor([sign_flip(row) for row in draws])
    assert stats.kstest(found.numpy(), "uniform").pvalue > 0.01


def test_holm_by_hand() -> None:
    # Sorted .01, .02, .03, .04 become .04, .06, .06, .06: no later one may be smaller.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_cannot_be_tested_is_named() -> None:
    with pytest.raises(MansuError, match="no difference to test"):
        sign_flip(torch.empty(0))
    with pytest.raises(MansuError, match=r"p=1\.2; give probabilities"):
        holm([0.1, 1.2])
