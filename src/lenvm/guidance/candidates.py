"""Candidates: the few next tokens that guidance chooses among, per row, and the way back to logits.

Candidates pass top-k, top-p and min-p of softmax(logits / temperature). A goal in tokens adds two
states to that: where the answer may not end yet, its ending tokens (EOS and stop tokens) are taken
out before the truncation, so that something else is always left to choose; where it must end now,
nothing but its ending tokens is left, each with its true probability, however small. In between an
ending is a candidate like any other token. (Were it always one, a penalty on every longer candidate
would end an answer at a token that the generator gives a chance of one in a billion.)

All of it is tensor code without a host synchronisation or a data-dependent shape. A row's
candidates depend on that row alone. `search` reads the vocabulary (on a GPU `search_kernels` does
the same in one read of the logits), `truncate` the few tokens that it found.

Shape legend: R guided rows, B rows of an engine's batch, V vocabulary, K candidates, E ending
tokens, M tokens with a temperature factor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Tokens of a block of a long row: a divisor of the usual vocabularies' sizes."""
BANNED = -1e28
"""Logit of an ending token where the answer may not end: chosen only if nothing else can be."""


@dataclass
class Candidates:
    """ids [R, K] int64, most likely first, -1 where `mask` [R, K] is False; log_probs [R, K] fp32,
    normalised over the row, -inf where masked; is_ending [R, K]: the token ends the completion."""

    ids: Tensor
    log_probs: Tensor
    mask: Tensor
    is_ending: Tensor


@dataclass
class Truncation:
    """Per-row sampling parameters, [R] each, and the ending tokens.

    temperature 0 (greedy) is read as 1: the rule sees the generator's own distribution, and the
    sampler takes the most likely guided candidate.
    """

    temperature: Tensor
    top_k: Tensor
    """1 .. max_candidates."""
    top_p: Tensor
    min_p: Tensor
    ending_ids: Tensor
    """[R, E] int64, padded with -1 at the end of a row; E >= 1."""
    max_candidates: int
    """Largest top_k of the rows: the static K."""
    factor_ids: Tensor | None = None
    """[R, M] tokens with a temperature factor of their own, -1 pads. None: no row has any."""
    factors: Tensor | None = None
    """[R, M]: p(x) becomes p(x)^(1 / factor), so a factor above 1 makes the token likelier."""


def search(
    logits_RV: Tensor, truncation: Truncation, *, may_end_R: Tensor, must_end_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, most likely first: (log-probabilities [R, K] fp32 under all
    of the row that is allowed, ids [R, K] int64).

    may_end_R, must_end_R: bool. A ban on ending is void where nothing else has a finite logit, an
    order to end where no ending token has one. A row of -inf, or with a NaN, has no
    log-probabilities: what comes back there is -inf or NaN.
    """
    restricted = _restrict(logits_RV.float(), truncation.ending_ids, may_end_R, must_end_R)
    temperature = torch.where(truncation.temperature > 0, truncation.temperature, 1.0)
    # as cold as 1e-6 is greedy already, and no logit overflows there
    log_probs_RV = restricted.div_(temperature.clamp(min=1e-6).unsqueeze(-1)).log_softmax(-1)
    return largest(log_probs_RV, min(truncation.max_candidates, restricted.shape[-1]))


def truncate(top: Tensor, ids: Tensor, truncation: Truncation) -> Candidates:
    """Candidates of what `search` found, [R, K] each. A row keeps at least one, whatever the
    parameters."""
    top = top.nan_to_num(nan=-torch.inf)  # a row of -inf: whatever comes first is certain
    top = torch.cat([top[:, :1].clamp(min=-1e30), top[:, 1:]], -1)
    mask = _keep(top, truncation)
    log_probs = _apply_factors(top, ids, truncation).masked_fill(~mask, -torch.inf)
    return Candidates(
        ids=ids.masked_fill(~mask, -1),
        log_probs=log_probs.log_softmax(-1),
        mask=mask,
        is_ending=find_endings(ids, truncation) & mask,
    )


def find_endings(ids_RK: Tensor, truncation: Truncation) -> Tensor:
    """Which ids end the completion: bool [R, K]."""
    return (ids_RK.unsqueeze(-1) == truncation.ending_ids.unsqueeze(1)).any(-1)


def write_back(
    candidates: Candidates, logits_BV: Tensor, *, rows_R: Tensor, temperature_R: Tensor
) -> None:
    """Put guided log-probabilities into an engine's logits, in place; -inf outside the candidates.

    Other rows stay as they are, bit for bit. The engine divides by `temperature_R` afterwards, so
    what is written is multiplied by it; 0 (the engine takes the largest) counts as 1.
    """
    temperature = torch.where(temperature_R > 0, temperature_R, 1.0).unsqueeze(-1)
    scaled = (candidates.log_probs * temperature).to(logits_BV.dtype)
    # pads repeat the first candidate, which is always real
    ids = torch.where(candidates.mask, candidates.ids, candidates.ids[:, :1])
    scaled = torch.where(candidates.mask, scaled, scaled[:, :1])
    guided = logits_BV.new_full((len(ids), logits_BV.shape[-1]), -torch.inf)
    logits_BV.index_copy_(0, rows_R, guided.scatter_(-1, ids, scaled))


def largest(x_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, largest first, and their columns: `topk` that reads the row once.
    They lie in those k blocks whose maxima are the largest."""
    rows, width = x_RV.shape
    if width % BLOCK or width < 4 * k * BLOCK:
        values, columns = x_RV.topk(k, -1)
        return values, columns
    blocks = x_RV.reshape(rows, -1, BLOCK)
    chosen = blocks.amax(-1).topk(k, -1).indices
    own = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    values, place = own.topk(k, -1)
    return values, chosen.gather(-1, place // BLOCK) * BLOCK + place % BLOCK


def entropy(log_probs_RK: Tensor) -> Tensor:
    """Entropy of each row in nats: [R]."""
    total: Tensor = torch.special.entr(log_probs_RK.exp()).sum(-1)
    return total


def _restrict(
    logits_RV: Tensor, ending_ids_RE: Tensor, may_end_R: Tensor, must_end_R: Tensor
) -> Tensor:
    """Logits with the ending tokens at BANNED, or everything else at -inf, where a row asks for
    it. A new tensor."""
    is_ending = ending_ids_RE >= 0
    # pads write what the row's first ending writes; a row without one writes token 0 unchanged
    index = torch.where(is_ending, ending_ids_RE, ending_ids_RE[:, :1].clamp(min=0))
    own = logits_RV.gather(-1, index)
    can_end = ((own > -torch.inf) & is_ending).any(-1)
    must_end = (must_end_R & can_end).unsqueeze(-1)
    banned = is_ending[:, :1] & ~may_end_R.unsqueeze(-1) & ~must_end
    restricted = logits_RV.masked_fill(must_end, -torch.inf)
    return restricted.scatter_(-1, index, torch.where(banned, own.clamp(max=BANNED), own))


def _keep(log_probs_RK: Tensor, truncation: Truncation) -> Tensor:
    """Which of the sorted candidates pass all three tests, and are possible at all: bool [R, K]."""
    rank = torch.arange(log_probs_RK.shape[-1], device=log_probs_RK.device)
    mass = log_probs_RK.exp()
    before = mass.cumsum(-1) - mass
    top_p = truncation.top_p.unsqueeze(-1)
    keep = rank < truncation.top_k.unsqueeze(-1)
    keep &= (before < top_p) | (top_p >= 1.0)  # rounding must not cut where nothing is to be cut
    keep &= mass >= truncation.min_p.unsqueeze(-1) * mass[:, :1]
    # real ones are far above, BANNED over any temperature far below
    return (keep & (log_probs_RK > -1e20)) | (rank == 0)


def _apply_factors(log_probs_RK: Tensor, ids_RK: Tensor, truncation: Truncation) -> Tensor:
    if truncation.factor_ids is None or truncation.factors is None:
        return log_probs_RK
    match = ids_RK.unsqueeze(-1) == truncation.factor_ids.unsqueeze(1)
    # at most one entry a token matches
    factor = torch.where(match, truncation.factors.unsqueeze(1) - 1.0, 0.0).sum(-1) + 1.0
    return log_probs_RK / factor.clamp(min=1e-6)  # a certain token over 0 would be no number
