"""The rules: candidate log-probabilities and beliefs -> guided log-probabilities. Pure tensors.

t tokens are generated; a candidate's state has t + 1. For a goal of [low, high] tokens in total the
candidate should leave between low - t - 1 and high - t - 1 tokens to come; v* = -u*, the value of
that. With u = -V in [0, 1), p the generator's distribution over the candidates:

* conditional:    p(x) P(low - t - 1 <= remaining <= high - t - 1 | s + x)^evidence: Bayes' rule.
                  With `focus` or `price`, P is E[w(length)], w as below inside the interval, 0
                  outside.
* soft:           p(x) exp(-strength d(x)), d = distance of u(x) from [u(low), u(high)].
* expected:       tilt by u until E[u] lies in [u(low), u(high)]; nothing where it does already.
* hard:           the paper's. Both bounds: argmin d; at_most: argmin u; at_least: argmax u while
                  the target is unmet, then the generator. The likelier candidate wins a tie.
* tilt:           p(x) exp(-s u(x)); s > 0 shortens. tilt_logit: the same with z = logit(u).
* expected_scale: tilt by u until E[u] is what `expected_mode` makes of it.

The promise of a goal (no end before low, an end at high) is kept in `candidates`; rules see only
what it allows. A rule is row-wise: a row's result depends on that row alone, so rows of every rule
share a batch. A user's own rule is one more function of the same signature (entry point group
`lenvm.rules`).

Horizon of the conditional rule. One token of n that are left tells about 2/n of what the belief
still has to learn (in variance, in units of the belief's own spread); a value model's noise between
siblings does not shrink with n. The best estimate of a candidate's true log-evidence, relative to
its siblings, is therefore the model's times about 1 / (1 + n / h), h = 2 / noise variance. We take
min(1, h / n): exactly Bayes' rule within h tokens, weakened beyond. n is the distance to the end
that is asked for or, if nearer, expected: a text about to end is told apart at any distance.

Focus of the conditional rule. Of all distributions q over answers whose score S has a given mean,
the one nearest to the generator, in KL(q | generator), is proportional to p(y) exp(S(y) / lambda):
the best trade of score against text. Decoding under E[w(length) | s + x] samples p(y) w(y) exactly,
for any weight w (tested by enumeration), so w should come from a score. LIFEBench's, over 100, is
exp(5 LD) short of the target and exp(-2 LD) past it, LD = length / target - 1; w is that to the
power of `focus`: exp(S / lambda) to first order, and a geometric sum over a bin, so exact. An
interval of the same mean score has an edge at which answers are cut; this has none before the
tolerance's, which can then be wide.

Price. By the same argument, of all distributions of a given mean length the one nearest to the
generator is proportional to p(y) exp(-price |y|): w = exp(-price length), over all lengths or
within bounds. It is the best trade of text against length without a target; a tilt by u weighs
every step anew, far more near the end, and follows no distribution of whole answers.

Shape legend: R rows, K candidates.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lenvm import returns
from lenvm.errors import InputError
from lenvm.guidance.candidates import Candidates, entropy
from lenvm.guidance.params import RuleParams
from lenvm.guidance.request import BUILT_IN_RULES, installed_rules
from lenvm.guidance.solver import tilt_to_mean, value_range
from lenvm.model.head import LengthBelief

Rule = Callable[[Candidates, LengthBelief, RuleParams], Tensor]
"""(candidates [R, K], belief over [R, K], params [R]) -> log-probabilities [R, K], unnormalised.

The belief has ending tokens at exactly 0; what it says of masked candidates means nothing, and
what a rule returns there is ignored. Rows of other rules are passed too and their results dropped.
A NaN counts as impossible. No host synchronisation is needed or wanted."""


class RuleFailure(InputError):
    """A user's own rule raised, or returned something else than [R, K]. `rule` names it."""

    def __init__(self, rule: str, reason: object) -> None:
        super().__init__(f"rule {rule!r} failed: {reason}")
        self.rule = rule


@functools.cache
def find_rule(name: str) -> Rule:
    """A rule by name. InputError where an installed one cannot be loaded."""
    if name in RULES:
        return RULES[name]
    try:
        rule: Rule = installed_rules()[name].load()
    except Exception as error:  # whatever the import of a user's module raises
        raise InputError(
            f"rule {name!r} is installed (entry point {installed_rules()[name].value!r}) and "
            f"cannot be loaded: {error!r}; repair that module, or uninstall its package"
        ) from error
    if not callable(rule):
        raise InputError(f"rule {name!r} is not a function of (candidates, belief, params)")
    return rule


def apply_rules(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """Guided log-probabilities [R, K] fp32, normalised over each row's candidates; never NaN.

    belief: over [R, K], with ending tokens at exactly 0 (`with_terminal`). Where a rule leaves a
    row nothing possible (every candidate at probability 0), the generator decides.
    """
    base = candidates.log_probs
    guided = base
    for code, name in enumerate(params.rules):
        ruled = _call(name, candidates, belief, params)
        ruled = torch.where(ruled.isnan() | ~candidates.mask, -torch.inf, ruled.float())
        guided = torch.where((params.code == code).unsqueeze(-1), ruled.clamp(max=1e30), guided)
    impossible = (guided == -torch.inf).all(-1)
    closed = impossible | params.neutral | (entropy(base) < params.min_entropy)
    if params.has_value_gate:
        closed |= _mean(base, compute_u(candidates, belief, params)) < params.min_value
    return torch.where(closed.unsqueeze(-1), base, guided).log_softmax(-1)


def compute_u(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """u = -V of each candidate at its row's gamma: [R, K] fp32, 0 where masked."""
    u = -belief.value(params.gammas[0])
    for index, gamma in enumerate(params.gammas[1:], 1):
        u = torch.where((params.gamma_index == index).unsqueeze(-1), -belief.value(gamma), u)
    return u.masked_fill(~candidates.mask, 0.0)


def target_u(params: RuleParams) -> tuple[Tensor, Tensor]:
    """u of the least and the most that should be left: [R, 1] each; 0 and 1 where open."""
    rates = [returns.log_discount(gamma) for gamma in params.gammas]
    rate = torch.full_like(params.low, rates[0])
    for index, other in enumerate(rates[1:], 1):
        rate = rate.masked_fill(params.gamma_index == index, other)
    low, high = (-torch.expm1(-rate.unsqueeze(-1) * n.clamp(min=0)) for n in params.rest())
    return low, high


# -- the built-in rules ---------------------------------------------------------------------------


def tilt(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """p(x) exp(-s u(x))."""
    return candidates.log_probs - params.scale.unsqueeze(-1) * compute_u(candidates, belief, params)


def tilt_logit(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """p(x) exp(-s z(x)), z the logit of the predicted length's u. An ending counts half a token:
    its own z is -inf, which would end every answer, or none."""
    length = belief.length().clamp(min=0.5)
    z = returns.length_to_logit(length, params.gammas[0])
    for index, gamma in enumerate(params.gammas[1:], 1):
        other = returns.length_to_logit(length, gamma)
        z = torch.where((params.gamma_index == index).unsqueeze(-1), other, z)
    return candidates.log_probs - params.scale.unsqueeze(-1) * z


def soft(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """p(x) exp(-strength d(x)): only the side that violates the goal is penalised."""
    distance = _distance(compute_u(candidates, belief, params), *target_u(params))
    return candidates.log_probs - params.scale.unsqueeze(-1) * distance


def expected(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """Tilt by u until E[u] lies in the goal; a goal out of reach takes the nearest candidate."""
    u = compute_u(candidates, belief, params)
    low, high = (bound.squeeze(-1).double() for bound in target_u(params))
    mean = _mean(candidates.log_probs, u, torch.float64)
    return tilt_to_mean(candidates.log_probs, u, torch.maximum(torch.minimum(mean, high), low))


def expected_scale(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """Tilt by u until E[u] is m' = f(m), s the scale, [a, b] the candidates' range:

    mul: s m. linear: b - (2 - s)(b - m) for s >= 1, a + s (m - a) below. exp: the same way with
    b - (b - a) ((b - m) / (b - a))^s. length_mul: 1 - (1 - m)^s, that is s times the length.
    """
    u, base = compute_u(candidates, belief, params), candidates.log_probs
    least, greatest = (x.squeeze(-1) for x in value_range(u, candidates.mask))
    s, mean = params.scale.double(), _mean(base, u, torch.float64)
    span = (greatest - least).clamp(min=1e-300)
    linear = mean + (s - 1) * torch.where(s >= 1, greatest - mean, mean - least)
    exponential = greatest - span * ((greatest - mean) / span).clamp(0, 1) ** s
    by_length = -torch.expm1(s * torch.log1p(-mean))
    targets = torch.stack([s * mean, linear, exponential, by_length])
    target = targets.gather(0, params.mode.unsqueeze(0)).squeeze(0)
    return tilt_to_mean(base, u, target)


def conditional(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """Bayes' rule on the length, weakened beyond the horizon. Log space: any tiny probability is
    told from any other; a candidate that cannot meet the goal (P = 0) is impossible."""
    low, high = params.rest()
    evidence = belief.log_interval(low, high, params.peak() if params.has_peak else None)
    expected = _mean(candidates.log_probs, belief.length())
    asked = torch.where(low > 0, low, high.clamp(min=0)).squeeze(-1)
    distance = torch.minimum(expected, asked).clamp(min=1)
    weight = params.scale * (params.horizon / distance).clamp(max=1)
    weight = weight.unsqueeze(-1)
    return candidates.log_probs + torch.where(weight > 0, weight * evidence, 0.0)


def hard(candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    """The paper's argmin / argmax as log-probabilities: 0 at the choice, -inf elsewhere."""
    base, u = candidates.log_probs, compute_u(candidates, belief, params)
    only_high, only_low = (params.low == -torch.inf)[:, None], (params.high == torch.inf)[:, None]
    cost = torch.where(only_low, -u, torch.where(only_high, u, _distance(u, *target_u(params))))
    cost = cost.masked_fill(~candidates.mask, torch.inf)
    tied = base.masked_fill(cost > cost.amin(-1, keepdim=True), -torch.inf)
    choice = torch.zeros_like(candidates.mask).scatter(-1, tied.argmax(-1, keepdim=True), True)
    met = only_low & (params.rest()[0] <= 0) & params.is_total[:, None]
    return torch.where(met, base, torch.zeros_like(base).masked_fill(~choice, -torch.inf))


RULES: dict[str, Rule] = {
    "conditional": conditional,
    "soft": soft,
    "expected": expected,
    "hard": hard,
    "tilt": tilt,
    "tilt_logit": tilt_logit,
    "expected_scale": expected_scale,
}
assert set(BUILT_IN_RULES) < set(RULES)

# -- inside ---------------------------------------------------------------------------------------


def _call(name: str, candidates: Candidates, belief: LengthBelief, params: RuleParams) -> Tensor:
    if name in RULES:
        return RULES[name](candidates, belief, params)
    try:
        ruled = find_rule(name)(candidates, belief, params)
    except Exception as error:  # whatever a user's function raises is laid on its requests
        raise RuleFailure(name, repr(error)) from error
    if not isinstance(ruled, Tensor) or ruled.shape != candidates.ids.shape:
        shape = list(ruled.shape) if isinstance(ruled, Tensor) else type(ruled).__name__
        raise RuleFailure(name, f"it returned {shape}, not [R, K] {list(candidates.ids.shape)}")
    return ruled


def _mean(log_probs_RK: Tensor, x_RK: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E[x] under each row's distribution: [R]."""
    probs = log_probs_RK.to(dtype).exp()
    mean: Tensor = torch.where(probs > 0, probs * x_RK.to(dtype), 0.0).sum(-1)
    return mean


def _distance(u: Tensor, u_low: Tensor, u_high: Tensor) -> Tensor:
    """How far u lies outside [u_low, u_high]: >= 0."""
    return (u_low - u).clamp(min=0) + (u - u_high).clamp(min=0)
