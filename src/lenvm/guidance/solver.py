"""How far to tilt: the exponential tilt of a distribution whose mean meets a target. Pure tensors.

E[x] under p(i) exp(theta y_i), y the candidates' values scaled to [0, 1], grows with theta from the
least value to the greatest, so the root is bracketed and unique. Newton's method alone loses it
(flat tails; the published one missed 427 of 2,000 random targets). Here every round evaluates a
grid of points inside the bracket at once and keeps the cell that holds the root: a fixed number of
rounds, few kernels, and an error bound that does not depend on the case. theta is searched on a
scale (asinh) that is linear near 0 and logarithmic far out, because close values need huge tilts.

Shape legend: R rows, K candidates, G grid points.
"""

import torch
from torch import Tensor

NUM_POINTS = 15
NUM_ROUNDS = 10
MAX_ASINH = 32.0
"""|theta| up to 4e13: values that differ by one fp32 rounding are still told apart."""


def tilt_to_mean(log_probs_RK: Tensor, x_RK: Tensor, target_R: Tensor) -> Tensor:
    """log p'(i), p'(i) ~ p(i) exp(theta x_i), with theta such that E'[x] = target: fp32 [R, K].

    log_probs_RK: normalised, -inf where a candidate is masked (x is not read there). A target at or
    beyond the least or greatest candidate gives that candidate (the likeliest share a tie by p).
    Where the target is the mean already, or all values are equal, p comes back unchanged.
    Computed in float64; |E'[x] - target| is below 1e-6 of the row's range of values.
    """
    possible = log_probs_RK > -torch.inf
    log_p = log_probs_RK.double()
    least, greatest = value_range(x_RK, possible)
    span = (greatest - least).clamp(min=1e-300)
    y = torch.where(possible, (x_RK.double() - least) / span, 0.0)
    goal = ((target_R.double().unsqueeze(-1) - least) / span).squeeze(-1)

    low = torch.full_like(goal, -MAX_ASINH)
    high = torch.full_like(goal, MAX_ASINH)
    steps = torch.arange(1, NUM_POINTS + 1, device=goal.device, dtype=torch.float64)
    for _ in range(NUM_ROUNDS):
        width = (high - low) / (NUM_POINTS + 1)
        points = low + steps.unsqueeze(-1) * width  # [G, R]
        below = _mean(log_p, y, points.sinh()) < goal
        low = low + below.sum(0) * width
        high = low + width
    tilted = log_p + ((low + high) / 2).sinh().unsqueeze(-1) * y

    goal = goal.unsqueeze(-1)
    tilted = torch.where(goal <= 0, log_p.masked_fill(y > 0, -torch.inf), tilted)
    tilted = torch.where(goal >= 1, log_p.masked_fill(y < 1, -torch.inf), tilted)
    mean = _mean(log_p, y, torch.zeros_like(low)).unsqueeze(-1)
    same = (greatest <= least) | ((goal - mean).abs() <= 1e-12)
    return torch.where(same, log_p, tilted).log_softmax(-1).float()


def value_range(x_RK: Tensor, possible_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest x of the possible candidates: float64 [R, 1] each."""
    x = x_RK.double()
    least = x.masked_fill(~possible_RK, torch.inf).amin(-1, keepdim=True)
    greatest = x.masked_fill(~possible_RK, -torch.inf).amax(-1, keepdim=True)
    return least, greatest


def _mean(log_p_RK: Tensor, y_RK: Tensor, theta: Tensor) -> Tensor:
    """E[y] under p exp(theta y): theta [..., R] -> [..., R]."""
    weights = (log_p_RK + theta.unsqueeze(-1) * y_RK).softmax(-1)
    mean: Tensor = (weights * y_RK).sum(-1)
    return mean
