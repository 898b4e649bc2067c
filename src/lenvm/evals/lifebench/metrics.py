"""LIFEBench's two numbers, as the benchmark defines them (arXiv 2505.16234; REFERENCE formulas).

LD = (L_out - L) / L, signed, 0.31 = 31% too long. LS in [0, 100] by the constraint's own rule.
(The benchmark's published script feeds LD in percent to the exponential; its tables and its paper
use the fraction, and so does this.)
"""

import math

from lenvm.errors import InputError
from lenvm.evals.lifebench.items import Constraint

UNDER_RATE, OVER_RATE = 5.0, 2.0


def length_deviation(length: float, target: int) -> float:
    """LD: signed, relative to the target. InputError for a target below 1."""
    if target < 1:
        raise InputError(f"target is {target}; it must be at least 1")
    return (length - target) / target


def length_score(deviation: float, constraint: Constraint) -> float:
    """LS of a deviation, 0-100.

    Equal-To: 100 exp(5 LD) below the target, 100 exp(-2 LD) above it. At-Most: 100 up to the
    target, At-Least: 100 from it on; on the forbidden side as Equal-To.
    """
    if constraint == "at_most" and deviation <= 0:
        return 100.0
    if constraint == "at_least" and deviation >= 0:
        return 100.0
    rate = UNDER_RATE if deviation < 0 else -OVER_RATE
    return 100.0 * math.exp(rate * deviation)
