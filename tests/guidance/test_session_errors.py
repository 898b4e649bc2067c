"""What a session refuses, whom it names, and that the others go on."""

from typing import Any

import pytest
import torch

from guidance.oracle import EOS, Guided, Markov, OracleScorer, session
from lenvm.errors import CapacityError, InputError, RequestError
from lenvm.guidance import request, rules
from lenvm.guidance.candidates import Candidates
from lenvm.guidance.params import RuleParams
from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import GuidanceSession
from lenvm.model.head import LengthBelief

TILT = LengthControl.parse({"tilt": 1.0})
LOGITS = Markov().logits(1).unsqueeze(0)


@pytest.mark.parametrize(
    ("goal", "head", "message"),
    [
        ({"equal_to": 5, "rule": "conditional"}, "scalar", "distribution head"),
        ({"tilt": 1.0, "gamma": 0.5}, "scalar", "gamma 0.5"),
        ({"tilt": 1.0, "token_temperature": {"1000": 2.0}}, "scalar", "token 1000"),
    ],
)
def test_a_control_that_the_value_model_cannot_serve(goal: dict[str, Any], head: str, message: str):
    guidance = session(Markov(), head)
    with pytest.raises(RequestError, match=message) as caught:
        guidance.add({"good": Guided([1], TILT), "bad": Guided([1], LengthControl.parse(goal))})
    assert caught.value.request_ids == ("bad",)
    assert guidance.scorer.requests == {}  # type: ignore[attr-defined]
    guidance.add({"good": Guided([1], TILT)})


def test_more_candidates_than_the_scorer_takes():
    guidance = session(Markov())
    guidance.scorer.max_candidates = 10  # type: ignore[misc]
    with pytest.raises(RequestError, match="top_k 15 is over the 10"):
        guidance.add({"r": Guided([1], TILT)})
    guidance.add({"r": Guided([1], TILT, top_k=10)})


def test_unknown_twice_and_tracked_requests_are_named():
    guidance = session(Markov())
    guidance.add({"r": Guided([1], TILT), "tracked": Guided([1])})
    with pytest.raises(RequestError, match="'ghost'"):
        guidance.remove(["ghost"])
    with pytest.raises(RequestError, match="'ghost'"):
        guidance.step(["r", "ghost"], LOGITS.expand(2, -1))
    with pytest.raises(RequestError, match="'ghost'"):
        guidance.commit(["r", "ghost"], [1, 1])
    with pytest.raises(RequestError, match="already there") as caught:
        guidance.add({"r": Guided([1], TILT)})
    assert caught.value.request_ids == ("r",)
    with pytest.raises(RequestError, match="only tracked") as caught:
        guidance.step(["r", "tracked"], LOGITS.expand(2, -1))
    assert caught.value.request_ids == ("tracked",)
    with pytest.raises(InputError, match="twice"):
        guidance.step(["r", "r"], LOGITS.expand(2, -1))
    with pytest.raises(InputError, match="1 requests, but 2 rows"):
        guidance.step(["r"], LOGITS.expand(2, -1))
    guidance.step(["r"], LOGITS)


class FullScorer(OracleScorer):
    """Has no room for a request named "big"."""

    def score(self, request_ids: Any, *args: Any, **options: Any) -> LengthBelief:
        if "big" in request_ids:
            raise CapacityError("no room")
        return super().score(request_ids, *args, **options)


def test_a_failing_scorer_is_laid_on_the_request_that_fails_alone():
    guidance = GuidanceSession(FullScorer(Markov()), eos_token_ids=[EOS])
    names = ["a", "big", "b"]
    guidance.add({r: Guided([1], TILT) for r in names})
    with pytest.raises(RequestError, match="no room") as caught:
        guidance.step(names, LOGITS.expand(3, -1))
    assert caught.value.request_ids == ("big",)
    assert isinstance(caught.value.cause, CapacityError)
    guidance.remove(["big"])
    guidance.step(["a", "b"], LOGITS.expand(2, -1))
    guidance.commit(["a", "b"], [1, 2])


def test_a_prompt_that_cannot_be_added_leaves_nothing_behind():
    guidance = session(Markov())
    with pytest.raises(RequestError, match="empty") as caught:
        guidance.add({"a": Guided([1], TILT), "b": Guided([], TILT)})
    assert caught.value.request_ids == ("b",)
    guidance.add({"a": Guided([1], TILT)})


# -- a user's own rule ----------------------------------------------------------------------------


class Entry:
    """An entry point as importlib.metadata has it."""

    value = "their.module:rule"

    def __init__(self, function: Any) -> None:
        self.function = function

    def load(self) -> Any:
        if isinstance(self.function, Exception):
            raise self.function
        return self.function


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    def install(function: Any) -> None:
        for module in (request, rules):
            monkeypatch.setattr(module, "installed_rules", lambda: {"mine": Entry(function)})
        rules.find_rule.cache_clear()

    yield install
    rules.find_rule.cache_clear()


def mine() -> LengthControl:
    return LengthControl.parse({"equal_to": 9, "rule": "mine", "strength": 2.0})


def test_a_users_rule_has_the_same_tensors_and_its_own_rows_only(install: Any):
    def rule(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> torch.Tensor:
        assert belief.value().shape == candidates.log_probs.shape == candidates.mask.shape
        return candidates.log_probs - params.scale.unsqueeze(-1) * candidates.ids.float()

    install(rule)
    guidance = session(Markov())
    guidance.add({"a": Guided([1], mine()), "b": Guided([1], TILT)})
    found = guidance.step(["a", "b"], LOGITS.expand(2, -1))
    p = Markov().transition[1].clone()
    p[EOS] = 0  # not before the ninth token
    expected = p * torch.exp(-2.0 * torch.arange(4))
    expected /= expected.sum()
    got = dict(zip(found.ids[0].tolist(), found.log_probs[0].exp().tolist(), strict=True))
    assert [got[t] for t in (1, 2, 3)] == pytest.approx(expected[1:].tolist(), rel=1e-4)
    alone = session(Markov())
    alone.add({"b": Guided([1], TILT)})
    assert torch.allclose(alone.step(["b"], LOGITS).log_probs[0], found.log_probs[1])


def test_a_nan_of_a_users_rule_is_impossible_and_only_nan_is_the_generator(install: Any):
    install(lambda c, belief, params: torch.where(c.ids == 1, torch.nan, c.log_probs))
    guidance = session(Markov())
    guidance.add({"a": Guided([1], mine())})
    found = guidance.step(["a"], LOGITS)
    assert found.log_probs[0][found.ids[0] == 1].exp().tolist() == [0.0]
    assert not found.log_probs.isnan().any()
    install(lambda c, belief, params: c.log_probs * torch.nan)
    found = guidance.step(["a"], LOGITS)
    p = Markov().transition[1].float()
    best = found.ids[0][found.log_probs[0].argmax()]
    assert best == p[1:].argmax() + 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda c, belief, params: 1 / 0, "ZeroDivisionError"),
        (lambda c, belief, params: c.log_probs[:, :1], "not \\[R, K\\]"),
        (lambda c, belief, params: None, "NoneType"),
    ],
)
def test_a_failing_rule_is_laid_on_the_requests_that_named_it(
    install: Any, function: Any, message: str
):
    install(function)
    guidance = session(Markov())
    guidance.add({"a": Guided([1], TILT), "b": Guided([1], mine()), "c": Guided([1], mine())})
    with pytest.raises(RequestError, match=message) as caught:
        guidance.step(["a", "b", "c"], LOGITS.expand(3, -1))
    assert caught.value.request_ids == ("b", "c")
    guidance.remove(["b", "c"])
    guidance.step(["a"], LOGITS)


@pytest.mark.parametrize("broken", [ImportError("no module"), 5])
def test_a_rule_that_does_not_load_is_refused_at_admission(install: Any, broken: Any):
    install(broken)
    with pytest.raises(RequestError, match="mine"):
        session(Markov()).add({"r": Guided([1], mine())})
