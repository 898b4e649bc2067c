"""The loss against arithmetic done by hand, state by state."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm import returns
from lenvm.errors import InputError
from lenvm.model.head import DistributionHead, LengthBins, ValueHead
from lenvm.training.objective import (
    Objective,
    States,
    distribution_terms,
    log_tail,
    packed_lambda_returns,
)

GAMMA = 0.9


def states(
    lengths: list[int], complete: list[bool] | None = None, loops: list[bool] | None = None
) -> States:
    complete = complete or [True] * len(lengths)
    completion = torch.tensor([c for c, n in enumerate(lengths) for _ in range(n + 1)])
    steps = torch.tensor([t for n in lengths for t in range(n + 1)])
    last = torch.tensor([n + 1 for n in lengths]).cumsum(0) - 1
    return States(
        completion,
        steps,
        torch.tensor(lengths),
        torch.tensor(complete),
        torch.tensor(loops or [False] * len(lengths)),
        last,
        max(lengths),
        not all(complete),
    )


def mean(objective: Objective, logit: torch.Tensor, where: States) -> float:
    total = objective.sum(ValueHead(4), logit.unsqueeze(-1), where, GAMMA)
    return total.item() / objective.denominator(where.lengths, where.complete)


def by_hand(objective: Objective, logit: list[float], lengths: list[int]) -> list[float]:
    """Loss of each state s_0 .. s_{L-1} of complete completions."""
    terms, place = [], 0
    for length in lengths:
        for t in range(length):
            z, n = logit[place + t], length - t
            u, length_hat = 1 / (1 + math.exp(-z)), math.log1p(math.exp(z)) / -math.log(GAMMA)
            y, y_hat = {
                "discounted_return": (-(1 - GAMMA**n), -u),
                "length": (n, length_hat),
                "normalized_length": (n / 50, length_hat / 50),
                "log_length": (math.log(n), math.log(length_hat)),
            }[objective.target]
            error = (y_hat - y) / (abs(y) if objective.relative else 1)
            if objective.loss == "mse":
                terms.append(error**2)
            elif objective.loss == "huber":
                d = objective.huber_delta
                terms.append(error**2 / 2 if abs(error) <= d else d * (abs(error) - d / 2))
            else:
                p = 1 - GAMMA**n
                terms.append(-p * math.log(u) - (1 - p) * math.log(1 - u))
        place += length + 1
    return terms


TARGETS = ("discounted_return", "length", "normalized_length", "log_length")
FITTING = [
    (target, loss, relative)
    for target, loss, relative in itertools.product(TARGETS, ("mse", "huber", "bce"), (False, True))
    if not (loss == "bce" and (target != "discounted_return" or relative))
    and not (relative and target == "log_length")
]


@pytest.mark.parametrize(("target", "loss", "relative"), FITTING)
def test_targets_and_losses_by_hand(target: str, loss: str, relative: bool):
    objective = Objective(target=target, loss=loss, relative=relative, length_scale=50.0)  # type: ignore[arg-type]
    objective.check("scalar")
    torch.manual_seed(0)
    lengths = [3, 1, 7]
    where = states(lengths)
    logit = torch.randn(len(where.steps))
    terms = by_hand(objective, logit.tolist(), lengths)
    assert mean(objective, logit, where) == pytest.approx(sum(terms) / 11, rel=1e-4)


def test_sequence_means_weigh_each_completion_alike():
    torch.manual_seed(0)
    lengths = [3, 1, 7]
    where = states(lengths)
    logit = torch.randn(len(where.steps))
    terms = by_hand(Objective(), logit.tolist(), lengths)
    sums = [sum(terms[:3]), terms[3], sum(terms[4:])]
    means = [s / n for s, n in zip(sums, lengths, strict=True)]
    found = [
        mean(Objective(aggregation=a), logit, where) for a in ("sequence_mean", "sequence_sum")
    ]
    assert found == pytest.approx([sum(means) / 3, sum(sums) / 3], rel=1e-4)


def test_the_end_of_the_prompt_counts_as_many_states():
    where, logit = states([4, 2]), torch.linspace(-2, 3, 8)
    terms = by_hand(Objective(), logit.tolist(), [4, 2])
    weights = [5, 1, 1, 1, 5, 1]
    by_weight = sum(w * x for w, x in zip(weights, terms, strict=True)) / sum(weights)
    assert mean(Objective(prompt_weight=5), logit, where) == pytest.approx(by_weight, rel=1e-5)


def test_eos_in_the_mask_adds_the_terminal_state():
    where = states([2])
    logit = torch.tensor([0.3, -1.0, 0.7])
    inside = mean(Objective(include_eos=True), logit, where)
    terms = [*by_hand(Objective(), logit.tolist(), [2]), torch.sigmoid(logit[2]).item() ** 2]
    assert inside == pytest.approx(sum(terms) / 3, rel=1e-5)
    cut = states([2], [False])  # its last state is not terminal
    assert Objective(include_eos=True).denominator(cut.lengths, cut.complete) == 2


@pytest.mark.parametrize(("target", "loss"), [(t, x) for t, x, relative in FITTING if not relative])
def test_a_censored_state_is_penalised_for_predicting_less_only(target: str, loss: str):
    objective = Objective(target=target, loss=loss, censoring="one_sided")  # type: ignore[arg-type]
    where = states([10], [False])
    longer = returns.length_to_logit(torch.full((11,), 30.0), GAMMA)
    shorter = returns.length_to_logit(torch.full((11,), 0.5), GAMMA)
    assert mean(objective, longer, where) == 0.0
    assert mean(objective, shorter, where) > 0.0
    least = returns.length_to_logit(torch.arange(11, 0, -1).float(), GAMMA)
    if loss != "bce":  # exactly the bound
        assert mean(objective, least, where) == pytest.approx(0.0, abs=1e-6)


def test_bootstrapping_goes_on_with_the_models_own_estimate():
    objective = Objective(target="length", censoring="bootstrap")
    where = states([4], [False])
    truth = returns.length_to_logit(torch.tensor([9.0, 8, 7, 6, 5]), GAMMA)  # 5 to come at the end
    assert mean(objective, truth, where) == pytest.approx(0.0, abs=1e-6)
    truth[-1] = returns.length_to_logit(torch.tensor([7.0]), GAMMA)[0]
    assert mean(objective, truth, where) == pytest.approx(4.0, rel=1e-3)
    logit = truth.clone().requires_grad_()
    objective.sum(ValueHead(4), logit.unsqueeze(-1), where, GAMMA).backward()
    assert logit.grad is not None
    assert logit.grad[-1] == 0  # the target is no path for gradients


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
def test_packed_lambda_returns_are_those_of_each_completion(
    lengths: list[int], lambda_: float, seed: int
):
    where = states(lengths)
    torch.manual_seed(seed)
    values = -torch.rand(len(where.steps))
    found = packed_lambda_returns(values, where, GAMMA, lambda_)
    place = 0
    for length in lengths:
        own = returns.compute_lambda_returns(values[place : place + length], GAMMA, lambda_)
        torch.testing.assert_close(found[place : place + length], own, rtol=1e-4, atol=1e-5)
        place += length + 1


def test_the_tail_of_the_distribution_is_the_sum_of_longer_lengths():
    head = DistributionHead(8, LengthBins(8, 1.5))
    torch.manual_seed(0)
    log_probs = torch.randn(1, len(head.bins)).log_softmax(-1)
    bins = head.bins
    per_length = {}
    for k in range(8):
        for n in range(int(bins.lower[k]), int(bins.upper[k]) + 1):
            per_length[n] = log_probs[0, k].exp().item() / int(bins.width[k])
    seen = torch.arange(0, 8)
    found = log_tail(log_probs.expand(8, -1), seen, head).exp()
    for n in range(8):
        assert found[n].item() == pytest.approx(
            1 - sum(p for m, p in per_length.items() if m <= n), abs=1e-5
        )


def test_a_loop_is_an_answer_that_never_ends():
    """Whatever was seen of it: the last bin of the distribution, u = 1 of the scalar head."""
    head = DistributionHead(8, LengthBins(loops=True))
    where = states([5, 3], [False, True], [True, False])
    raw = torch.randn(10, len(head.bins))
    terms = distribution_terms(head, raw, where, 0.0)
    torch.testing.assert_close(terms[:5], -raw.log_softmax(-1)[:5, -1])
    torch.testing.assert_close(terms[6], -raw.log_softmax(-1)[6, 2])
    low, high = torch.full((10,), -2.0), torch.full((10,), 12.0)
    one_sided = Objective(censoring="one_sided")
    found = [one_sided.scalar_terms(z, where, GAMMA)[:5].sum().item() for z in (low, high)]
    assert found[0] > 1 > 1e-4 > found[1]


def test_distribution_terms_smooth_to_the_neighbours_and_censor():
    head = DistributionHead(8, LengthBins())
    where = states([5], [True])
    raw = torch.randn(6, len(head.bins))
    lp = raw.log_softmax(-1)
    terms = distribution_terms(head, raw, where, 0.2)
    index = 5 - 1 - 2  # state 2: three tokens left, third bin
    expected = -(0.8 * lp[2, index] + 0.1 * lp[2, index - 1] + 0.1 * lp[2, index + 1])
    torch.testing.assert_close(terms[2], expected)
    far, near = (torch.full((11, len(head.bins)), -9.0) for _ in range(2))
    far[:, 20:], near[:, :1] = 9.0, 9.0
    cut = states([10], [False])
    losses = [Objective().sum(head, raw, cut, GAMMA).item() for raw in (far, near)]
    assert losses[0] < 0.01 < losses[1]


@pytest.mark.parametrize(
    ("head", "options", "name"),
    [
        ("distribution", {"target": "length"}, "target"),
        ("distribution", {"loss": "bce"}, "loss"),
        ("distribution", {"relative": True}, "relative"),
        ("distribution", {"lambda_": 0.5}, "lambda_"),
        ("distribution", {"censoring": "bootstrap"}, "censoring"),
        ("distribution", {"include_eos": True}, "include_eos"),
        ("scalar", {"smoothing": 0.1}, "smoothing"),
        ("scalar", {"prompt_weight": 2, "aggregation": "sequence_mean"}, "prompt_weight"),
        ("scalar", {"loss": "bce", "target": "length"}, "bce"),
        ("scalar", {"lambda_": 0.5, "target": "length"}, "lambda_"),
        ("scalar", {"include_eos": True, "relative": True}, "include_eos"),
        ("scalar", {"relative": True, "target": "log_length"}, "relative"),
    ],
)
def test_options_that_do_not_fit_are_refused(head: str, options: dict[str, object], name: str):
    with pytest.raises(InputError, match=name):
        Objective(**options).check(head)  # type: ignore[arg-type]


def test_the_likelihood_is_a_proper_score_with_and_without_censoring():
    """What minimises the loss of data drawn from a distribution is that distribution; where answers
    are cut at 6 tokens, up to there, and the rest of the mass lies beyond."""
    head = DistributionHead(8, LengthBins(6, 1.5))
    true = {1: 0.05, 2: 0.3, 3: 0.1, 5: 0.25, 6: 0.1, 9: 0.2}
    for cut in (None, 6):
        lengths = [n if cut is None else min(n, cut) for n in true]
        complete = [cut is None or n <= cut for n in true]
        where = states(lengths, complete)
        weights = torch.tensor(list(true.values()))[where.completion] * (where.steps == 0)
        logits = torch.zeros(len(head.bins), requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe")

        def loss(optimizer=optimizer, logits=logits, where=where, weights=weights) -> torch.Tensor:
            optimizer.zero_grad()
            raw = logits.expand(len(where.steps), -1)
            total = distribution_terms(head, raw, where, 0.0) @ weights
            total.backward()
            return total

        optimizer.step(loss)
        found = logits.detach().softmax(-1)
        expected = torch.tensor([0.05, 0.3, 0.1, 0.0, 0.25, 0.1])
        torch.testing.assert_close(found[:6], expected, atol=2e-3, rtol=0)
        assert found[6:].sum().item() == pytest.approx(0.2, abs=2e-3)
