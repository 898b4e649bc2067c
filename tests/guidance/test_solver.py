import pytest
import torch
from torch import Tensor

from lenvm.guidance.solver import tilt_to_mean

K = 12


def cases(kind: str, num: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, values, targets, least, greatest): masked rows, targets up to the very ends."""
    g = torch.Generator().manual_seed(seed)
    spread = 20 * torch.rand(num, 1, generator=g)
    log_probs = torch.randn(num, K, generator=g) * spread
    x = torch.rand(num, K, generator=g, dtype=torch.float64)
    if kind == "far":  # long answers: u close to 1, as gamma^n has it
        x = 1 - 10 ** (-6 * x)
    if kind == "cluster":  # candidates that hardly differ
        x = 0.5 + x * 10 ** (-6 * torch.rand(num, 1, generator=g, dtype=torch.float64))
    if kind == "ending":  # an ending token at exactly 0, the others far
        x = 0.9 + 0.1 * x
        x[:, 0] = 0
    mask = torch.rand(num, K, generator=g) < 0.7
    mask[:, :2] = True
    log_probs = log_probs.masked_fill(~mask, -torch.inf).log_softmax(-1)
    x = x.float()
    least = x.double().masked_fill(~mask, 9).amin(-1)
    greatest = x.double().masked_fill(~mask, -9).amax(-1)
    share = torch.rand(num, generator=g, dtype=torch.float64)
    near = torch.rand(num, generator=g)
    share = torch.where(near < 0.2, share**8, torch.where(near > 0.8, 1 - share**8, share))
    return log_probs, x, least + share * (greatest - least), least, greatest


def mean(log_probs: Tensor, x: Tensor) -> Tensor:
    p = log_probs.double().exp()
    return (p * x.double()).sum(-1) / p.sum(-1)


def num_misses(found: Tensor, x: Tensor, target: Tensor, span: Tensor) -> int:
    return int((((found - target).abs() / span) > 1e-6).logical_or(found.isnan()).sum())


@pytest.mark.parametrize("kind", ["uniform", "far", "cluster", "ending"])
def test_no_miss_in_25_000_random_cases_of_each_kind(kind: str):
    misses = 0
    for seed in range(5):
        log_probs, x, target, least, greatest = cases(kind, 5_000, seed)
        tilted = tilt_to_mean(log_probs, x, target)
        misses += num_misses(mean(tilted, x), x, target, greatest - least)
        assert (tilted[log_probs == -torch.inf] == -torch.inf).all()
    assert misses == 0


def test_the_cases_are_hard_newton_without_a_bracket_misses_many():
    log_probs, x, target, least, greatest = cases("uniform", 2_000)
    theta = torch.zeros(2_000, 1, dtype=torch.float64)
    for _ in range(20):
        p = (log_probs.double() + theta * x.double()).softmax(-1)
        m = (p * x).sum(-1, keepdim=True)
        variance = (p * (x - m) ** 2).sum(-1, keepdim=True)
        theta = (theta - (m - target[:, None]) / variance.clamp(min=1e-16)).clamp(-1e5, 1e5)
    newton = mean((log_probs.double() + theta * x).log_softmax(-1), x)
    assert num_misses(newton, x, target, greatest - least) > 200


def test_the_result_is_a_tilt_of_p():
    log_probs, x, target, _, _ = cases("uniform", 50)
    change = tilt_to_mean(log_probs, x, target).double() - log_probs.double()
    for row in range(50):
        real = torch.isfinite(log_probs[row])
        a, b = x[row][real].double(), change[row][real]
        slope = (b[1] - b[0]) / (a[1] - a[0])
        assert b.tolist() == pytest.approx((b[0] + slope * (a - a[0])).tolist(), rel=1e-3, abs=1e-3)


def test_targets_out_of_reach_take_the_nearest_candidate_ties_by_p():
    log_probs = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    x = torch.tensor([[0.3, 0.7, 0.1, 0.1]])
    for target, expected in ((0.0, [0, 0, 2 / 3, 1 / 3]), (0.1, [0, 0, 2 / 3, 1 / 3])):
        found = tilt_to_mean(log_probs, x, torch.tensor([target]))
        assert found.exp()[0].tolist() == pytest.approx(expected)
    for target in (0.7, 5.0):
        found = tilt_to_mean(log_probs, x, torch.tensor([target]))
        assert found.exp()[0].tolist() == [0, 1, 0, 0]


def test_nothing_to_do_gives_p_back():
    log_probs = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.2, 0.3], [1.0, 0.0, 0.0]]).log()
    x = torch.tensor([[0.3, 0.7, 0.1], [0.4, 0.4, 0.4], [0.2, 0.5, 0.6]])
    target = torch.tensor([0.32, 0.9, 0.9], dtype=torch.float64)
    target[0] = (log_probs[0].double().exp() * x[0].double()).sum()
    assert torch.allclose(tilt_to_mean(log_probs, x, target), log_probs, atol=1e-7)
