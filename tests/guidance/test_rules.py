import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lenvm.guidance.candidates import Candidates
from lenvm.guidance.params import Asked, RuleParams
from lenvm.guidance.request import LengthControl
from lenvm.guidance.rules import apply_rules
from lenvm.model.head import DistributionBelief, LengthBelief, LengthBins, ScalarBelief
from lenvm.returns import length_to_logit

GAMMA = 0.99
BINS = LengthBins(num_single=64, growth=1.3)


def candidates_of(*rows: list[float], ending: int | None = None) -> Candidates:
    """Rows of probabilities; 0 = not a candidate. `ending`: the column of the ending token."""
    probs = torch.tensor(rows)
    mask = probs > 0
    ids = torch.arange(probs.shape[1]).expand_as(mask).masked_fill(~mask, -1)
    is_ending = (ids == ending) if ending is not None else torch.zeros_like(mask)
    return Candidates(ids, probs.log().log_softmax(-1), mask, is_ending)


def lengths(*rows: list[float]) -> ScalarBelief:
    """A scalar head that is sure of these remaining lengths."""
    return ScalarBelief(length_to_logit(torch.tensor(rows), GAMMA), GAMMA)


def params_of(*goals: dict[str, Any] | None, t: int | list[int] = 0, **options: Any) -> RuleParams:
    controls = [g and LengthControl.parse(g) for g in goals]
    done = t if isinstance(t, list) else [t] * len(goals)
    options = {"has_distribution": False, "gamma": GAMMA, **options}
    return RuleParams.build([Asked.read(c, **options) for c in controls], done)


def guided(
    candidates: Candidates, belief: LengthBelief, params: RuleParams, row: int = 0
) -> list[float]:
    belief = belief.with_terminal(candidates.is_ending)
    found: list[float] = apply_rules(candidates, belief, params)[row].exp().tolist()
    return found


def u_of(n: float, gamma: float = GAMMA) -> float:
    return -math.expm1(n * math.log(gamma))


def normalised(weights: list[float]) -> Any:
    return pytest.approx([w / sum(weights) for w in weights], rel=1e-4, abs=1e-9)


P = [0.5, 0.3, 0.2]
N = [10.0, 50.0, 200.0]


# -- one rule at a time ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-30.0, -2.0, 0.0, 2.0, 30.0])
def test_tilt(scale: float):
    found = guided(candidates_of(P), lengths(N), params_of({"tilt": scale}))
    weights = [p * math.exp(-scale * u_of(n)) for p, n in zip(P, N, strict=True)]
    assert found == normalised(weights)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5])
def test_tilt_by_logit_and_an_ending_counts_half_a_token(scale: float):
    found = guided(candidates_of(P, ending=0), lengths(N), params_of({"tilt_logit": scale}))
    u = [u_of(n) for n in (0.5, 50.0, 200.0)]
    weights = [p * (x / (1 - x)) ** -scale for p, x in zip(P, u, strict=True)]
    assert found == normalised(weights)


@pytest.mark.parametrize(
    ("goal", "targets"),
    [
        ({"equal_to": 61}, (50, 50)),
        ({"equal_to": 61, "tolerance": 0.1}, (44, 56)),
        ({"at_most": 61}, (0, 50)),
        ({"at_least": 61}, (50, math.inf)),
        ({"at_least": 21, "at_most": 111}, (10, 100)),
        ({"equal_to": 50, "remaining": True}, (50, 50)),
        ({"value_equal_to": u_of(50)}, (50, 50)),
        ({"value_at_most": u_of(50)}, (0, 50)),
        ({"value_at_least": u_of(50)}, (50, math.inf)),
    ],
)
def test_soft_penalises_the_side_that_violates(goal: dict[str, Any], targets: tuple[float, float]):
    params = params_of({**goal, "rule": "soft", "strength": 7.0}, t=10)
    found = guided(candidates_of(P), lengths(N), params)
    low, high = (1.0 if n == math.inf else u_of(n) for n in targets)
    low = 0.0 if targets[0] == 0 else low
    distance = [max(low - u_of(n), 0) + max(u_of(n) - high, 0) for n in N]
    assert found == normalised([p * math.exp(-7 * d) for p, d in zip(P, distance, strict=True)])


def test_soft_past_its_target_wants_the_shortest():
    params = params_of({"equal_to": 5, "rule": "soft", "strength": 7.0}, t=40)
    found = guided(candidates_of(P), lengths(N), params)
    assert found == normalised([p * math.exp(-7 * u_of(n)) for p, n in zip(P, N, strict=True)])


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ({"equal_to": 61}, u_of(50)),
        ({"at_most": 31}, u_of(20)),
        ({"at_most": 151}, None),
        ({"at_least": 31}, None),
        ({"at_least": 151}, u_of(140)),
        ({"equal_to": 9}, u_of(10)),  # out of reach: the nearest
        ({"equal_to": 900}, u_of(200)),
    ],
)
def test_expected_tilts_until_the_mean_meets_the_goal(goal: dict[str, Any], expected: float | None):
    params = params_of({**goal, "rule": "expected"}, t=10)
    found = guided(candidates_of(P), lengths(N), params)
    mean = sum(p * u_of(n) for p, n in zip(found, N, strict=True))
    if expected is None:
        assert found == pytest.approx(P, rel=1e-5)
    else:
        assert mean == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["mul", "linear", "exp", "length_mul"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 0.9, 1.0, 1.1, 1.7, 9.0])
def test_expected_scale(mode: str, scale: float):
    goal = {"expected_scale": scale, "expected_mode": mode}
    found = guided(candidates_of(P), lengths(N), params_of(goal))
    u = [u_of(n) for n in N]
    m = sum(p * x for p, x in zip(P, u, strict=True))
    a, b = min(u), max(u)
    target = {
        "mul": m * scale,
        "linear": m + (scale - 1) * ((b - m) if scale >= 1 else (m - a)),
        "exp": a + (1 - (1 - (m - a) / (b - a)) ** scale) * (b - a),
        "length_mul": u_of(scale * math.log(1 - m) / math.log(GAMMA)),
    }[mode]
    mean = sum(p * x for p, x in zip(found, u, strict=True))
    assert mean == pytest.approx(min(max(target, a), b), abs=1e-5)
    if scale == 1.0:
        assert found == pytest.approx(P, rel=1e-6)


@pytest.mark.parametrize(
    ("goal", "t", "choice"),
    [
        ({"equal_to": 60}, 10, 1),
        ({"equal_to": 20}, 10, 0),
        ({"equal_to": 500}, 10, 2),
        ({"equal_to": 5}, 10, 0),  # passed: the shortest
        ({"equal_to": 100, "tolerance": 0.95}, 0, 0),  # both within: the likelier
        ({"at_most": 300}, 0, 0),
        ({"at_least": 300}, 0, 2),
        ({"at_least": 30, "at_most": 70}, 0, 1),
        ({"equal_to": 50, "remaining": True}, 900, 1),
        ({"at_least": 5, "remaining": True}, 900, 2),
    ],
)
def test_hard_is_argmin_or_argmax(goal: dict[str, Any], t: int, choice: int):
    params = params_of({**goal, "rule": "hard"}, t=t)
    found = guided(candidates_of(P), lengths(N), params)
    assert found == [1.0 if i == choice else 0.0 for i in range(3)]


def test_hard_at_least_leaves_the_text_alone_once_met():
    params = params_of({"at_least": 30, "rule": "hard"}, t=29)
    assert guided(candidates_of(P), lengths(N), params) == pytest.approx(P)


def test_the_likelier_candidate_wins_a_tie():
    params = params_of({"equal_to": 60, "rule": "hard"})
    found = guided(candidates_of([0.2, 0.0, 0.3, 0.5]), lengths([50, 50, 50, 900.0]), params)
    assert found == [0, 0, 1, 0]


# -- conditional ----------------------------------------------------------------------------------


def bayes(log_p_bins: Tensor, **goal: Any) -> list[float]:
    t = goal.pop("t", 0)
    params = params_of({"evidence": 1.0, **goal}, t=t, has_distribution=True)
    return guided(candidates_of(P), DistributionBelief(log_p_bins, GAMMA, BINS), params)


def spike_logits(*ns: int, floor: float = -30.0) -> Tensor:
    """Bin logits [1, K, bins], nearly all mass on one length each."""
    logits = torch.full((1, len(ns), len(BINS)), floor)
    for column, n in enumerate(ns):
        logits[0, column, BINS.index(torch.tensor(n))] = 0.0
    return logits


def test_conditional_is_bayes_rule():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, len(BINS), generator=generator) * 3
    belief = DistributionBelief(logits, GAMMA, BINS)
    inside = belief.log_interval(torch.tensor([[17]]), torch.tensor([[37]])).exp()[0].tolist()
    for evidence in (0.5, 1.0, 3.0):
        found = bayes(logits, at_least=20, at_most=40, t=2, evidence=evidence)
        weights = [p * q**evidence for p, q in zip(P, inside, strict=True)]
        assert found == normalised(weights)


@pytest.mark.parametrize(
    ("goal", "evidence"),
    [({"equal_to": 9}, 2.0), ({"at_most": 9}, 1.0), ({"at_least": 9}, 1.0), ({"price": 0.1}, 1.0)],
)
def test_the_evidence_that_goes_without_saying(goal: dict[str, float], evidence: float):
    found, said = (
        params_of(control, has_distribution=True).scale
        for control in (goal, {**goal, "evidence": evidence})
    )
    assert float(found) == float(said) == evidence


def test_evidence_0_is_the_generator_bit_for_bit():
    candidates = candidates_of(P)
    belief = DistributionBelief(spike_logits(3, 9, 40), GAMMA, BINS)
    params = params_of({"equal_to": 10, "evidence": 0.0}, has_distribution=True)
    assert torch.equal(
        apply_rules(candidates, belief, params), candidates.log_probs.log_softmax(-1)
    )


def test_tiny_probabilities_are_still_told_apart():
    logits = spike_logits(3, 9, 40, floor=-20_000.0)
    logits[0, :, 49] = torch.tensor([-9000.0, -9001.0, -9002.0])
    found = bayes(logits, equal_to=51, horizon=None)
    # fp32 holds -9000 to within 5e-4
    assert found == pytest.approx([0.7844, 0.1731, 0.0425], rel=2e-3)


def test_where_nothing_can_meet_the_goal_the_generator_decides():
    logits = spike_logits(3, 9, 40, floor=-torch.inf)
    assert bayes(logits, equal_to=20) == pytest.approx(P)
    assert bayes(logits, equal_to=5, t=9) == pytest.approx(P)  # passed already
    assert bayes(logits, equal_to=10) == [0, 1, 0]


def test_beyond_the_horizon_evidence_is_weakened_by_the_distance():
    generator = torch.Generator().manual_seed(1)
    logits = torch.full((1, 3, len(BINS)), -20.0)
    far = BINS.index(torch.tensor(3000))
    logits[..., far - 2 : far + 3] = torch.randn(1, 3, 5, generator=generator)
    inside = [
        q.exp().item()
        for q in DistributionBelief(logits, GAMMA, BINS).log_interval(
            torch.tensor([[2000]]), torch.tensor([[2999]])
        )[0]
    ]
    expected = sum(
        p * n
        for p, n in zip(
            P, DistributionBelief(logits, GAMMA, BINS).length()[0].tolist(), strict=True
        )
    )
    goal = {"at_least": 2001, "at_most": 3000}
    for horizon, distance in ((100.0, 2000), (1000.0, 2000), (5000.0, None), (None, None)):
        weight = 1.0 if distance is None or horizon is None else horizon / min(distance, expected)
        found = bayes(logits, **goal, horizon=horizon)
        assert found == normalised([p * q**weight for p, q in zip(P, inside, strict=True)])


def test_within_the_horizon_of_the_expected_end_bayes_rule_is_whole():
    """The target is far, but the text is about to end: it must be told apart now."""
    logits = spike_logits(5, 6, 7, floor=-20.0)
    logits[0, 1, BINS.index(torch.tensor(3000))] = -1.0
    weak = bayes(logits, at_least=2500, horizon=300.0)
    assert weak == pytest.approx(bayes(logits, at_least=2500, horizon=None), rel=1e-4)
    assert weak[1] > 0.99


# -- gates, gammas, rows ---------------------------------------------------------------------------


def test_gates_leave_the_generator_alone():
    flat, sharp = [0.5, 0.3, 0.2], [0.98, 0.01, 0.01]
    goal = {"tilt": 9.0, "min_entropy": 0.5}
    candidates, belief = candidates_of(flat, sharp), lengths(N, N)
    found = apply_rules(candidates, belief, params_of(goal, goal)).exp()
    assert found[0].tolist() != pytest.approx(flat, rel=0.01)
    assert found[1].tolist() == pytest.approx(sharp)
    mean = sum(p * u_of(n) for p, n in zip(P, N, strict=True))
    for value, acts in ((mean - 0.01, True), (mean + 0.01, False)):
        found = guided(candidates_of(P), lengths(N), params_of({"tilt": 9.0, "min_value": value}))
        assert (found != pytest.approx(P, rel=1e-3)) == acts


def test_each_row_has_its_own_gamma():
    candidates = candidates_of(P, P, P)
    logits = spike_logits(10, 50, 62).expand(3, -1, -1)
    goals = [{"tilt": 5.0, "gamma": g} if g else {"tilt": 5.0} for g in (0.9, None, 0.999)]
    params = params_of(*goals, has_distribution=True)
    belief = DistributionBelief(logits, GAMMA, BINS)
    for row, gamma in enumerate((0.9, GAMMA, 0.999)):
        u = [u_of(n, gamma) for n in (10, 50, 62)]
        weights = [p * math.exp(-5 * x) for p, x in zip(P, u, strict=True)]
        assert guided(candidates, belief, params, row) == normalised(weights)


def test_rows_of_every_rule_share_a_batch():
    goals = [
        None,
        {"tilt": 3.0},
        {"tilt_logit": 0.5},
        {"expected_scale": 0.8},
        {"equal_to": 40, "rule": "hard"},
        {"equal_to": 40, "rule": "soft"},
        {"equal_to": 40, "rule": "expected"},
        {"equal_to": 40, "rule": "conditional"},
    ]
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(len(goals), 3, len(BINS), generator=generator) * 2
    candidates = candidates_of(*[P] * len(goals))
    together = apply_rules(
        candidates,
        DistributionBelief(logits, GAMMA, BINS),
        params_of(*goals, t=list(range(8)), has_distribution=True),
    )
    for row, goal in enumerate(goals):
        alone = guided(
            candidates_of(P),
            DistributionBelief(logits[row : row + 1], GAMMA, BINS),
            params_of(goal, t=row, has_distribution=True),
        )
        assert together[row].exp().tolist() == pytest.approx(alone, rel=1e-5, abs=1e-9)
    assert len({tuple(round(p, 4) for p in row) for row in together.exp().tolist()}) == len(goals)


positive = st.integers(1, 400)
goal_strategy = st.one_of(
    st.none(),
    st.builds(lambda s: {"tilt": s}, st.floats(-10_000, 10_000)),
    st.builds(lambda s: {"tilt_logit": s}, st.floats(-1000, 1000)),
    st.builds(
        lambda s, m: {"expected_scale": s, "expected_mode": m},
        st.floats(0, 100),
        st.sampled_from(["mul", "linear", "exp", "length_mul"]),
    ),
    st.builds(
        lambda kind, n, rule, push, horizon, entropy, value: {
            kind: n,
            "rule": rule,
            "strength": push,
            "evidence": push / 100,
            "horizon": horizon,
            "min_entropy": entropy,
            "min_value": value,
        },
        st.sampled_from(["equal_to", "at_most", "at_least"]),
        positive,
        st.sampled_from(["conditional", "soft", "expected", "hard"]),
        st.floats(0, 10_000),
        st.sampled_from([None, 1.0, 256.0]),
        st.sampled_from([0.0, 0.7]),
        st.sampled_from([0.0, 0.5]),
    ),
)


@given(
    rows=st.lists(st.tuples(goal_strategy, st.integers(0, 500)), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.1, 5.0, 200.0]),
)
@settings(deadline=None, max_examples=150)
def test_always_a_distribution_over_the_candidates_and_each_row_by_itself(
    rows: list[tuple[dict[str, Any] | None, int]], seed: int, spread: float
):
    g = torch.Generator().manual_seed(seed)
    goals, t = [r[0] for r in rows], [r[1] for r in rows]
    num, width = len(rows), 6
    mask = torch.rand(num, width, generator=g) < 0.6
    mask[:, 0] = True
    log_probs = torch.randn(num, width, generator=g) * spread
    log_probs = log_probs.masked_fill(~mask, -torch.inf).log_softmax(-1)
    ids = torch.arange(width).expand(num, -1).masked_fill(~mask, -1)
    candidates = Candidates(
        ids, log_probs, mask, mask & (torch.rand(num, width, generator=g) < 0.2)
    )
    logits = torch.randn(num, width, len(BINS), generator=g) * spread
    logits[torch.rand(logits.shape, generator=g) < 0.3] = -torch.inf
    logits[..., 0] = 0.0

    def run(pick: slice) -> Tensor:
        belief = DistributionBelief(logits[pick], GAMMA, BINS)
        part = Candidates(ids[pick], log_probs[pick], mask[pick], candidates.is_ending[pick])
        params = params_of(*goals[pick], t=t[pick], has_distribution=True)
        return apply_rules(part, belief.with_terminal(part.is_ending), params)

    found = run(slice(None))
    assert not found.isnan().any()
    assert (found[~mask] == -torch.inf).all()
    assert found.exp().sum(-1).tolist() == pytest.approx([1.0] * num, abs=1e-5)
    for row in range(num):
        alone = run(slice(row, row + 1))[0].exp()
        assert torch.allclose(alone, found[row].exp(), atol=1e-5)


@given(seed=st.integers(0, 10_000), a=st.floats(-500, 500), b=st.floats(-500, 500))
@settings(deadline=None)
def test_more_tilt_is_shorter(seed: int, a: float, b: float):
    g = torch.Generator().manual_seed(seed)
    candidates = candidates_of((torch.rand(8, generator=g) + 1e-3).tolist())
    belief = lengths((torch.rand(8, generator=g) * 500).tolist())
    means = []
    for goal in ({"tilt": min(a, b)}, {"tilt": max(a, b)}):
        found = apply_rules(candidates, belief, params_of(goal)).double().exp()
        means.append(float((found * -belief.value().double()).sum()))
    assert means[1] <= means[0] + 1e-6


@given(seed=st.integers(0, 10_000), target=st.integers(2, 600))
@settings(deadline=None)
def test_more_strength_is_closer(seed: int, target: int):
    g = torch.Generator().manual_seed(seed)
    candidates = candidates_of((torch.rand(8, generator=g) + 1e-3).tolist())
    belief = lengths((torch.rand(8, generator=g) * 500).tolist())
    distance = (-belief.value()[0] - u_of(target - 1)).abs()
    found = []
    for strength in (0.0, 3.0, 30.0, 300.0):
        goal = {"equal_to": target, "rule": "soft", "strength": strength}
        found.append(
            sum(
                p * d
                for p, d in zip(
                    guided(candidates, belief, params_of(goal)), distance.tolist(), strict=True
                )
            )
        )
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(found))
