"""Candidates: the few next tokens that guidance chooses among, per row.

Truncation of softmax(logits / temperature) by top-k, top-p and min-p. Rows with a length goal also
carry their ending tokens with their true probability: a rule must always be able to end the answer.

Shape legend: R rows, V vocabulary, K candidates, E ending tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Candidates:
    """ids [R, K] int64 (-1 where `mask` is False); log_probs [R, K] fp32, normalised over the
    candidates, -inf where masked; is_ending [R, K]: generating it ends the completion."""

    ids: Tensor
    log_probs: Tensor
    mask: Tensor
    is_ending: Tensor


def build_candidates(
    logits_RV: Tensor,
    *,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    ending_ids_RE: Tensor,
    keep_endings_R: Tensor,
    max_candidates: int,
) -> Candidates:
    """Candidates of each row, most likely first, then ending tokens that truncation left out.

    top_k_R in 1 .. max_candidates; temperature 0 is read as 1 (greedy rows choose among the
    guided distribution at temperature 1); ending_ids_RE is padded with -1.
    """
    temperature = torch.where(temperature_R > 0, temperature_R, 1.0).unsqueeze(-1)
    log_probs_RV = (logits_RV.float() / temperature).log_softmax(-1)
    top, ids = log_probs_RV.topk(min(max_candidates, log_probs_RV.shape[-1]), dim=-1)
    rank = torch.arange(top.shape[-1], device=top.device)
    mass = top.exp()
    keep = (rank < top_k_R.unsqueeze(-1)) & (mass.cumsum(-1) - mass < top_p_R.unsqueeze(-1))
    keep &= mass >= min_p_R.unsqueeze(-1) * mass[:, :1]
    keep = (keep | (rank == 0)) & (top > -torch.inf)
    is_end = ending_ids_RE >= 0
    ending = ending_ids_RE.clamp(min=0)
    present = ((ids.unsqueeze(-1) == ending.unsqueeze(1)) & keep.unsqueeze(-1)).any(1)
    ending_log_probs = log_probs_RV.gather(-1, ending)
    extra = is_end & ~present & keep_endings_R.unsqueeze(-1) & (ending_log_probs > -torch.inf)
    ids = torch.cat([ids, ending], -1)
    mask = torch.cat([keep, extra], -1)
    log_probs = torch.cat([top, ending_log_probs], -1).masked_fill(~mask, -torch.inf)
    found = (ids.unsqueeze(-1) == ending.unsqueeze(1)) & is_end.unsqueeze(1)
    return Candidates(
        ids=ids.masked_fill(~mask, -1),
        log_probs=log_probs.log_softmax(-1),
        mask=mask,
        is_ending=found.any(-1) & mask,
    )
