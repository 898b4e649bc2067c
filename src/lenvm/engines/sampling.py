"""How one completion is sampled, and the draw itself: logits and one uniform number a row -> token.

A row's token depends only on its own logits, parameters and random stream, never on its
batch-mates: the stream is seeded per request, one number a step, and the draw inverts the CDF.

Shape legend: R rows, V vocabulary, K candidates.
"""

import math
import random
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lenvm.errors import InputError
from lenvm.guidance.candidates import BLOCK, largest

FEW = 256
"""Up to this many candidates are found without sorting the vocabulary."""


class SamplingParams(BaseModel):
    """The usual parameters of a completion request, checked when made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 = no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_tokens: Annotated[int, Field(ge=1, le=131_072)] = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of its text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024
    )
    """Added to the logits of these tokens at every step."""
    exponential_decay_length_penalty: (
        tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, le=100)]] | None
    ) = None
    """(start, factor): after `start` generated tokens the ending token's logit z becomes
    z + |z| (factor^(t - start) - 1), as `ExponentialDecayLengthPenalty` of transformers."""

    @property
    def truncates(self) -> bool:
        """Some tokens may not be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """The generator's logits are changed before anything else."""
        return bool(self.logit_bias) or self.exponential_decay_length_penalty is not None

    @classmethod
    def parse(cls, values: dict[str, object]) -> "SamplingParams":
        """From a dict; InputError names field, value and allowed range."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{where} is {first['input']!r}: {first['msg']}") from None

    def random_stream(self, index: int = 0) -> random.Random:
        """The request's own random numbers; `index` tells n completions of one seed apart."""
        return random.Random() if self.seed is None else random.Random(f"{self.seed}/{index}")


def adjust(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    num_generated: Sequence[int],
    eos_token_ids: Sequence[int],
) -> Tensor:
    """Logits with biases and length penalties applied; the same tensor where no row has any."""
    changed = [i for i, p in enumerate(params) if p.changes_logits]
    if not changed:
        return logits_RV
    logits = logits_RV.clone()
    eos = torch.tensor(eos_token_ids, device=logits.device)
    for i in changed:
        if bias := params[i].logit_bias:
            ids = torch.tensor(list(bias), device=logits.device)
            logits[i, ids] += torch.tensor(list(bias.values()), device=logits.device)
        start, factor = params[i].exponential_decay_length_penalty or (math.inf, 1.0)
        if num_generated[i] > start:
            # past fp32's range the ending is certain (or impossible) all the same
            growth = min((num_generated[i] - start) * math.log(factor), 60.0)
            logits[i, eos] += logits[i, eos].abs() * math.expm1(growth)
    return logits


def draw(log_probs_RK: Tensor, uniform_R: Tensor, *, greedy_R: Tensor | None = None) -> Tensor:
    """Index of the drawn column by inverting each row's CDF: [R] int64.

    log_probs_RK: any shape of support, -inf where impossible, need not be normalised. uniform_R in
    [0, 1). Rows in `greedy_R` take the most likely column.
    """
    probs = log_probs_RK.float().softmax(-1)
    if probs.shape[-1] > 4 * BLOCK:
        index = _draw_by_block(probs, uniform_R)
    else:
        index, _ = _invert(probs, uniform_R)
    if greedy_R is not None:
        index = torch.where(greedy_R, log_probs_RK.argmax(-1), index)
    return index


def _draw_by_block(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """`_invert` over the vocabulary: first a block, then a token of it. One long cumulative sum
    would take as long as a small model's layers."""
    rows, width = probs_RV.shape
    padded = F.pad(probs_RV, (0, -width % BLOCK)).view(rows, -1, BLOCK)
    block, rest = _invert(padded.sum(-1), uniform_R)
    own = padded[torch.arange(rows, device=block.device), block]
    index, _ = _invert(own, rest)
    return block * BLOCK + index


def _invert(weights_RK: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """(column whose share of the row's total holds `uniform`, where in that share it lies in
    [0, 1)): [R] each. A column of weight 0 is never chosen."""
    cdf = weights_RK.cumsum(-1)
    total = cdf[:, -1:]
    # below the total, so that rounding never picks a column past the last possible one
    target = torch.minimum(uniform_R.unsqueeze(-1) * total, torch.nextafter(total, total - 1))
    index = torch.searchsorted(cdf, target, right=True)
    own = weights_RK.gather(-1, index)
    place = (target - (cdf.gather(-1, index) - own)) / own
    return index.squeeze(-1), place.squeeze(-1).clamp(0, 1 - 2**-24)


def truncate(logits_RV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Logits over temperature with top-k, top-p and min-p applied (-inf outside), row by row.

    Greedy rows are left alone. The sort is paid only by rows that ask for top-k or top-p, and
    nothing where no row asks for anything: then the logits come back as they are.
    """
    if all(p.temperature in (0, 1) and not p.truncates for p in params):
        return logits_RV
    device = logits_RV.device
    temperature = torch.tensor([p.temperature or 1.0 for p in params], device=device)
    # as cold as 1e-6 is greedy already, and no logit overflows there
    logits = logits_RV.float() / temperature.clamp(min=1e-6).unsqueeze(-1)
    floor = [i for i, p in enumerate(params) if p.min_p > 0 and p.temperature > 0]
    if floor:
        min_p = torch.tensor([params[i].min_p for i in floor], device=device).log()
        part = logits[floor]
        least = part.max(-1, keepdim=True).values + min_p.unsqueeze(-1)
        logits[floor] = part.masked_fill(part < least, -torch.inf)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    few = [i for i in drawn if 0 < params[i].top_k <= FEW]
    many = [
        i for i in drawn if params[i].top_k > FEW or (not params[i].top_k and params[i].top_p < 1)
    ]
    for rows in (few, many):
        if rows:
            logits[rows] = _truncate_sorted(logits[rows], [params[i] for i in rows])
    return logits


def _truncate_sorted(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """top-k first, then top-p over what is left: the order of vLLM and SGLang. Where every row has
    a small top-k, no more than that many are sorted out."""
    device, width = logits.device, logits.shape[-1]
    top_k = torch.tensor([p.top_k or width for p in params], device=device).unsqueeze(-1)
    top_p = torch.tensor([p.top_p for p in params], device=device).unsqueeze(-1)
    most = min(width, max(p.top_k or width for p in params))
    if most <= FEW:
        values, order = largest(logits, most)
    else:
        values, order = logits.sort(-1, descending=True)
    rank = torch.arange(values.shape[-1], device=device)
    values = values.masked_fill(rank >= top_k, -torch.inf)
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs
    values = values.masked_fill((before >= top_p) & (rank > 0), -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, values)
