"""Did it really forget: CAD, the scorecard, the certificate."""

from mansu_tl.verification.certificate import Certificate, certify, certify_in_fresh_process
from mansu_tl.verification.divergence import (
    CircuitScores,
    Divergence,
    circuit_divergence,
    circuit_scores,
    output_suppressor,
)
from mansu_tl.verification.scorecard import Bounds, Scorecard, scorecard

__all__ = [
    "Bounds",
    "Certificate",
    "CircuitScores",
    "Divergence",
    "Scorecard",
    "certify",
    "certify_in_fresh_process",
    "circuit_divergence",
    "circuit_scores",
    "output_suppressor",
    "scorecard",
]
