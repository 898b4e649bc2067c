import itertools
import math
from typing import Any

import pytest
import torch

from guidance.oracle import (
    EOS,
    GAMMA,
    Guided,
    Markov,
    OracleScorer,
    PointScorer,
    session,
    step_probs,
)
from lenvm.errors import InputError
from lenvm.evals.lifebench.metrics import length_score
from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import GuidanceSession

ALL = {"top_k": 256, "top_p": 1.0}


def sequence_probs(markov: Markov, start: int, low: int, high: int) -> dict[tuple[int, ...], float]:
    """P(sequence | low <= L <= high) of the generator, by enumeration."""
    found = {}
    tokens = range(1, markov.transition.shape[0])
    for length in range(low, high + 1):
        for body in itertools.product(tokens, repeat=length - 1):
            probability, last = 1.0, start
            for token in (*body, EOS):
                probability *= markov.transition[last, token].item()
                last = token
            found[(*body, EOS)] = probability
    total = sum(found.values())
    return {s: p / total for s, p in found.items()}


@pytest.mark.parametrize("focus", [0.4, 3.0])
def test_focus_with_an_exact_model_weighs_each_sequence_by_its_lengths_score(focus: float):
    markov = Markov(seed=9)
    control = LengthControl.parse(
        {"equal_to": 3, "tolerance": 0.7, "focus": focus, "evidence": 1, **ALL}
    )
    assert control.interval() == (1, 5)
    weight = {n: (length_score((n - 3) / 3, "equal_to") / 100) ** focus for n in range(1, 6)}
    flat = sequence_probs(markov, 1, 1, 5)
    total = sum(p * weight[len(s)] for s, p in flat.items())
    for sequence, probability in list(flat.items())[::7]:
        expected = probability * weight[len(sequence)] / total
        assert guided_prob(markov, sequence, control) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("price", [0.02, 0.5])
def test_price_with_an_exact_model_charges_each_sequence_for_its_length(price: float):
    markov = Markov(seed=4)
    control = LengthControl.parse({"price": price, "horizon": None, **ALL})
    # Z = E[exp(-price L)] after token 1, from h(s) = exp(-price) (P(end | s) + sum_x P(x | s) h(x))
    moves = markov.transition[1:, 1:].double()
    ends = markov.transition[1:, EOS].double()
    h = torch.linalg.solve(torch.eye(len(moves)) * math.exp(price) - moves, ends)
    for length in (1, 2, 4):
        probabilities = sequence_probs(markov, 1, length, length)
        sequence = list(probabilities)[-1]
        probability, last = 1.0, 1
        for token in sequence:
            probability *= markov.transition[last, token].item()
            last = token
        expected = probability * math.exp(-price * length) / h[0].item()
        assert guided_prob(markov, sequence, control) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_shortest_share_is_the_distribution_below_that_quantile(share: float):
    markov = Markov(seed=8, end=0.35)
    scorer = OracleScorer(markov, "distribution")
    limit = int(scorer.add({"probe": [1]}).quantile(share)[0])
    assert 1 <= limit <= 6
    control = LengthControl.parse({"shortest": share, "horizon": None, **ALL})
    expected = sequence_probs(markov, 1, 1, limit)
    for sequence, probability in list(expected.items())[::3]:
        assert guided_prob(markov, sequence, control) == pytest.approx(probability, rel=1e-4)


def test_a_resumed_request_keeps_the_limit_of_its_prompt():
    markov = Markov(seed=8)
    guidance = session(markov)
    control = LengthControl.parse({"shortest": 0.6, "horizon": None, **ALL})
    guidance.add({"r": Guided([1], control)})
    step_probs(guidance, markov, "r", 1)
    guidance.commit(["r"], [2])
    onward = step_probs(guidance, markov, "r", 2)
    guidance.remove(["r"])
    guidance.add({"r": Guided([1], control, generated_token_ids=[2])})
    assert step_probs(guidance, markov, "r", 2) == pytest.approx(onward, rel=1e-5)


def test_price_within_bounds():
    markov = Markov(seed=6)
    control = LengthControl.parse({"price": 0.3, "at_least": 2, "at_most": 4, **ALL})
    flat = sequence_probs(markov, 1, 2, 4)
    total = sum(p * math.exp(-0.3 * len(s)) for s, p in flat.items())
    for sequence, probability in list(flat.items())[::5]:
        expected = probability * math.exp(-0.3 * len(sequence)) / total
        assert guided_prob(markov, sequence, control) == pytest.approx(expected, rel=1e-4)


def guided_prob(markov: Markov, sequence: tuple[int, ...], control: LengthControl) -> float:
    """Probability that guidance writes `sequence` after token 1."""
    guidance = session(markov)
    guidance.add({"r": Guided([1], control)})
    probability, last = 1.0, 1
    for token in sequence:
        probability *= step_probs(guidance, markov, "r", last).get(token, 0.0)
        guidance.commit(["r"], [token])
        last = token
    return probability


@pytest.mark.parametrize(("low", "high"), [(3, 3), (2, 4), (1, 3)])
def test_conditional_with_an_exact_model_is_the_conditional_distribution(low: int, high: int):
    markov = Markov(seed=low)
    control = LengthControl.parse({"at_least": low, "at_most": high, **ALL})
    if low == high:
        control = LengthControl.parse({"equal_to": low, "evidence": 1, **ALL})
    expected = sequence_probs(markov, 1, low, high)
    for sequence, probability in expected.items():
        assert guided_prob(markov, sequence, control) == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("goal", [{"at_most": 30, "evidence": 0.0}, {"tilt": 0.0}])
def test_no_evidence_is_the_generator(goal: dict[str, float]):
    markov = Markov()
    guidance = session(markov)
    guidance.add({"r": Guided([1], LengthControl.parse({**goal, **ALL}))})
    for token, probability in step_probs(guidance, markov, "r", 1).items():
        assert probability == pytest.approx(markov.transition[1, token].item(), rel=1e-5)


@pytest.mark.parametrize("scale", [-4.0, 3.0])
def test_tilt_is_the_stated_distribution(scale: float):
    markov = Markov(seed=5)
    scorer = OracleScorer(markov, "scalar")
    guidance = GuidanceSession(scorer, eos_token_ids=[EOS])
    guidance.add({"r": Guided([2], LengthControl.parse({"tilt": scale, **ALL}))})
    found = step_probs(guidance, markov, "r", 2)
    u = torch.sigmoid(scorer.raw(torch.arange(4))).squeeze(-1).double()
    u[EOS] = 0.0
    weights = markov.transition[2] * torch.exp(-scale * u)
    expected = (weights / weights.sum()).tolist()
    assert [found[t] for t in range(4)] == pytest.approx(expected, rel=1e-4)


def generate(
    guidance: GuidanceSession, markov: Markov, goal: dict[str, Any], limit: int = 100
) -> list[int]:
    """One completion after token 1, drawn from torch's global generator."""
    guidance.add({"r": Guided([1], LengthControl.parse({**goal, **ALL}))})
    tokens = [1]
    while (tokens[-1] != EOS or len(tokens) == 1) and len(tokens) <= limit:
        probs = step_probs(guidance, markov, "r", tokens[-1])
        drawn = torch.multinomial(torch.tensor(list(probs.values())), 1).item()
        tokens.append(list(probs)[int(drawn)])
        guidance.commit(["r"], [tokens[-1]])
    guidance.remove(["r"])
    return tokens[1:]


@pytest.mark.parametrize("target", [1, 2, 7, 30])
@pytest.mark.parametrize("rule", ["conditional", "soft", "expected", "hard"])
@pytest.mark.parametrize("head", ["distribution", "scalar"])
def test_equal_to_gives_exactly_that_many_tokens(rule: str, head: str, target: int):
    if (rule, head) == ("conditional", "scalar"):
        rule = "soft"  # conditional is refused, tested below
    guidance = session(Markov(seed=2), head)
    torch.manual_seed(0)
    goal = {"equal_to": target, "rule": rule, "strict": True}
    assert len(generate(guidance, Markov(seed=2), goal)) == target


@pytest.mark.parametrize("target", [1, 2, 7, 30])
def test_the_hard_rule_with_an_oracle_needs_no_promise(target: int):
    """Token k means that exactly k more follow, and every token is possible at every step."""
    guidance = GuidanceSession(PointScorer(Markov(), "scalar"), eos_token_ids=[EOS])
    guidance.add(
        {"r": Guided([1], LengthControl.parse({"equal_to": target, "rule": "hard", **ALL}))}
    )
    tokens: list[int] = []
    while EOS not in tokens:
        found = guidance.step(["r"], torch.zeros(1, 50))
        tokens.append(int(found.ids[0, found.log_probs[0].argmax()]))
        guidance.commit(["r"], tokens[-1:])
    assert tokens == list(range(target - 1, -1, -1))


@pytest.mark.parametrize("rule", ["conditional", "soft", "expected", "hard"])
def test_at_most_and_at_least_keep_their_promise(rule: str):
    markov = Markov(seed=3)
    guidance = session(markov)
    torch.manual_seed(1)
    goals = (
        ({"at_most": 3}, 1, 3),
        ({"at_least": 12}, 12, 999),
        ({"at_least": 4, "at_most": 6}, 4, 6),
        ({"equal_to": 10, "tolerance": 0.2}, 8, 12),
    )
    for goal, low, high in goals:
        for _ in range(10):
            tokens = generate(guidance, markov, {**goal, "rule": rule, "strict": True}, 999)
            assert low <= len(tokens) <= high


def test_a_certain_end_is_held_back_until_it_is_allowed():
    """The generator gives the end all but 1e-6, and top_p would leave nothing else."""
    guidance = session(Markov())
    control = LengthControl.parse({"at_least": 4, "rule": "soft"})
    guidance.add({"r": Guided([1], control)})
    logits = torch.tensor([[14.0, 0.3, 0.2, 0.1]])
    for step in range(4):
        found = guidance.step(["r"], logits)
        assert (EOS in found.ids[0].tolist()) == (step == 3)
        guidance.commit(["r"], [1])


def test_a_row_does_not_depend_on_its_batch_mates():
    markov = Markov(seed=4)
    goals = [
        {"equal_to": 5},
        {"tilt": 3.0, "top_k": 2},
        {"at_most": 4, "rule": "soft"},
        {"at_least": 9, "rule": "hard"},
        {"equal_to": 50, "min_entropy": 9.0},
        {"tilt": 1.0, "top_k": 1},
    ]
    together = session(markov)
    names = [f"r{i}" for i in range(len(goals))]
    together.add(
        {
            n: Guided([1 + i % 3], LengthControl.parse(g))
            for i, (n, g) in enumerate(zip(names, goals, strict=True))
        }
    )
    logits = torch.stack([markov.logits(1 + i % 3) for i in range(len(goals))])
    batch = together.step(names, logits)
    for i, goal in enumerate(goals):
        alone = session(markov)
        alone.add({"r": Guided([1 + i % 3], LengthControl.parse(goal))})
        expected = step_probs(alone, markov, "r", 1 + i % 3)
        row = zip(batch.ids[i].tolist(), batch.log_probs[i].exp().tolist(), strict=True)
        found = {t: p for t, p in row if t >= 0}
        assert found == pytest.approx(expected, rel=1e-5)


def test_mean_length_falls_with_the_tilt():
    markov = Markov(seed=6)
    means = []
    for scale in (-10.0, -3.0, 0.0, 3.0, 10.0):
        guidance = session(markov)
        guidance.add({"r": Guided([1], LengthControl.parse({"tilt": scale, **ALL}))})
        probs = step_probs(guidance, markov, "r", 1)
        n = torch.arange(1, 201, dtype=torch.float64)
        length = {t: (markov.after[:, t] * n).sum().item() if t else 0.0 for t in probs}
        u = {t: -math.expm1(length[t] * math.log(GAMMA)) if t else 0.0 for t in probs}
        means.append(sum(p * u[t] for t, p in probs.items()))
    assert means == sorted(means, reverse=True)


def test_tracking_reports_what_is_left():
    markov = Markov()
    guidance = session(markov)
    guidance.add({"r": Guided([1])})
    assert guidance.remaining(["r"])[0] == guidance.prediction("r") > 0
    guidance.commit(["r"], [2])
    assert guidance.remaining(["r"])[0] > 0
    guidance.commit(["r"], [EOS])
    assert guidance.remaining(["r"]) == [0.0]
    with pytest.raises(InputError, match="only tracked"):
        guidance.step(["r"], markov.logits(1).unsqueeze(0))


def test_tilted_samples_follow_the_stated_distribution():
    """Chi-square over 20,000 draws, 99.9% quantile of 3 degrees of freedom."""
    markov, num = Markov(seed=5), 20_000
    scorer = OracleScorer(markov, "scalar")
    guidance = GuidanceSession(scorer, eos_token_ids=[EOS])
    guidance.add({"r": Guided([2], LengthControl.parse({"tilt": 4.0, **ALL}))})
    found = guidance.step(["r"], markov.logits(2).unsqueeze(0))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(found.log_probs[0].exp(), num, True, generator=generator)
    counts = torch.bincount(found.ids[0][drawn], minlength=4)
    u = torch.sigmoid(scorer.raw(torch.arange(4))).squeeze(-1).double()
    u[EOS] = 0.0
    weights = markov.transition[2] * torch.exp(-4.0 * u)
    expected = num * weights / weights.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27
    untilted = num * markov.transition[2]
    assert float(((counts - untilted) ** 2 / untilted).sum()) > 100


def test_sampled_lengths_follow_the_generator_given_the_interval():
    markov = Markov(seed=8)
    guidance = session(markov)
    torch.manual_seed(3)
    control = LengthControl.parse({"at_least": 2, "at_most": 5, **ALL})
    last = {f"r{i}": 1 for i in range(1500)}
    guidance.add({r: Guided([1], control) for r in last})
    lengths = []
    for length in range(1, 6):
        found = guidance.step(list(last), torch.stack([markov.logits(t) for t in last.values()]))
        drawn = torch.multinomial(found.log_probs.exp(), 1)
        tokens = found.ids.gather(-1, drawn).squeeze(-1)
        guidance.commit(list(last), tokens)
        last = dict(zip(last, tokens.tolist(), strict=True))
        ended = [r for r, token in last.items() if token == EOS]
        guidance.remove(ended)
        last = {r: token for r, token in last.items() if token != EOS}
        lengths += [length] * len(ended)
    mass = markov.after[1:5, 1]
    expected = 1500 * mass / mass.sum()
    counts = torch.tensor([lengths.count(n) for n in range(2, 6)])
    assert counts.sum() == 1500
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27


def test_a_resumed_request_goes_on_as_if_it_had_never_stopped():
    markov, goal = Markov(seed=1), LengthControl.parse({"equal_to": 6, **ALL})
    whole, resumed = session(markov), session(markov)
    whole.add({"r": Guided([1], goal)})
    for token in (2, 3):
        whole.step(["r"], markov.logits(1).unsqueeze(0))
        whole.commit(["r"], [token])
    resumed.add({"r": Guided([1], goal, generated_token_ids=[2, 3])})
    assert step_probs(resumed, markov, "r", 3) == step_probs(whole, markov, "r", 3)
    assert resumed.remaining(["r"]) == whole.remaining(["r"])


def test_samples_of_one_prompt_share_a_prefill():
    guidance = session(Markov())
    control = LengthControl.parse({"tilt": 1.0})
    guidance.add({f"r{i}": Guided([1, 2], control) for i in range(5)} | {"x": Guided([3])})
    scorer = guidance.scorer
    assert isinstance(scorer, OracleScorer)
    assert scorer.num_prefilled == 2
    assert scorer.requests["r4"] == [1, 2]
    assert len(set(guidance.values(["r0", "r4"]))) == 1
    assert guidance.values(["r0"]) != guidance.values(["x"])


def test_the_scorer_sees_every_token_whatever_the_gates_and_the_order():
    """Random histories: joins, leaves, gates, tracked rows, partial and shuffled commits."""
    markov = Markov(seed=7)
    guidance = session(markov)
    scorer = guidance.scorer
    assert isinstance(scorer, OracleScorer)
    goals = [
        None,
        {"tilt": 2.0},
        {"tilt": 0.0},
        {"equal_to": 50, "min_entropy": 9.0},
        {"at_least": 90, "min_entropy": 1.0},
        {"at_most": 90, "top_k": 1},
        {"equal_to": 40, "rule": "hard"},
    ]
    random = torch.Generator().manual_seed(0)

    def choose(n: int) -> int:
        return int(torch.randint(n, (1,), generator=random))

    history: dict[str, list[int]] = {}
    for step in range(120):
        if len(history) < 3 or choose(4) == 0:
            goal, name = goals[choose(len(goals))], f"r{step}"
            control = None if goal is None else LengthControl.parse(goal)
            guidance.add({name: Guided([1 + choose(3)], control)})
            history[name] = list(scorer.requests[name])
        if len(history) > 5:
            name = list(history)[choose(len(history))]
            guidance.remove([name])
            del history[name]
        guided = [r for r in history if guidance._states[r].guided.control is not None]
        order = torch.randperm(len(history), generator=random).tolist()
        names = [list(history)[i] for i in order]
        drawn = {r: 1 + choose(3) for r in names}
        if guided:
            logits = torch.stack([markov.logits(history[r][-1]) for r in guided])
            found = guidance.step(guided, logits)
            for row, r in enumerate(guided):
                probs = found.log_probs[row].exp()
                pick = int(torch.multinomial(probs, 1, generator=random))
                drawn[r] = int(found.ids[row, pick])
        cut = choose(len(names) + 1)
        for part in (names[:cut], names[cut:]):
            guidance.commit(part, [drawn[r] for r in part])
        for r in names:
            history[r].append(drawn[r])
        assert scorer.requests == history
        assert guidance.remaining([r for r in names if drawn[r] == EOS]) == [0.0] * sum(
            drawn[r] == EOS for r in names
        )
        for r in [r for r in names if drawn[r] == EOS]:
            guidance.remove([r])
            del history[r]


def test_what_cannot_change_anything_is_not_scored():
    def num_scored(goal: dict[str, Any]) -> int:
        guidance = session(Markov())
        scorer = guidance.scorer
        assert isinstance(scorer, OracleScorer)
        guidance.add({"r": Guided([1], LengthControl.parse(goal))})
        guidance.step(["r"], Markov().logits(1).unsqueeze(0))
        return scorer.num_scored

    assert num_scored({"tilt": 1.0, **ALL}) == 4
    for goal in ({"tilt": 0.0}, {"tilt": 1.0, "min_entropy": 9.0}, {"tilt": 1.0, "top_k": 1}):
        assert num_scored({**ALL, **goal}) == 1


def test_greedy_rows_are_guided_at_temperature_1():
    markov = Markov()
    guidance = session(markov)
    control = LengthControl.parse({"tilt": 3.0, **ALL})
    guidance.add({"cold": Guided([1], control, temperature=0.0), "warm": Guided([1], control)})
    found = guidance.step(["cold", "warm"], markov.logits(1).expand(2, -1))
    assert torch.equal(found.log_probs[0], found.log_probs[1])


def test_truncation_of_the_request_and_of_the_control_both_apply():
    markov = Markov(size=9)
    for mine, theirs in ((3, 0), (0, 3), (3, 5), (5, 3)):
        guidance = session(markov)
        control = LengthControl.parse({"tilt": 1.0, **ALL, "top_k": theirs or 15})
        guidance.add({"r": Guided([1], control, top_k=mine)})
        assert len(step_probs(guidance, markov, "r", 1)) == 3


def test_ending_tokens_are_the_requests_own():
    markov = Markov(seed=3)
    guidance = session(markov)
    control = LengthControl.parse({"at_least": 5, **ALL})
    guidance.add(
        {
            "eos": Guided([1], control),
            "stop": Guided([1], control, stop_token_ids=[2]),
            "ignored": Guided([1], control, stop_token_ids=[3], ignore_eos=True),
        }
    )
    found = guidance.step(["eos", "stop", "ignored"], markov.logits(1).expand(3, -1))
    tokens = [{t for t in row if t >= 0} for row in found.ids.tolist()]
    assert tokens == [{1, 2, 3}, {1, 3}, {0, 1, 2}]
    guidance.commit(["eos", "stop", "ignored"], [2, 2, 2])
    assert [n == 0 for n in guidance.remaining(["eos", "stop", "ignored"])] == [False, True, False]


def test_tokens_that_the_value_model_does_not_know_are_no_candidates():
    guidance = session(Markov())
    guidance.add({"r": Guided([1], LengthControl.parse({"tilt": 1.0}))})
    logits = torch.full((1, 1100), -9.0)
    logits[0, 1050] = 30.0
    assert guidance.step(["r"], logits).ids.max() < 1000


def test_write_back_guides_an_engine_that_samples_from_logits():
    markov = Markov()
    guidance = session(markov)
    guidance.add({"r": Guided([1], LengthControl.parse({"tilt": 3.0, **ALL}), temperature=0.7)})
    logits = torch.stack([markov.logits(2), markov.logits(1), markov.logits(3)])
    before = logits.clone()
    found = guidance.step(["r"], logits[1:2])
    guidance.write_back(["r"], found, logits, torch.tensor([1]))
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    drawn_from = (logits[1] / 0.7).softmax(-1)
    for token, p in zip(found.ids[0].tolist(), found.log_probs[0].exp().tolist(), strict=True):
        assert drawn_from[token].item() == pytest.approx(p, rel=1e-4)
