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

from lenvm.engines.penalties import has_penalties
from lenvm.errors import InputError
from lenvm.guidance.candidates import BLOCK, largest
from lenvm.model.device import upload

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
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken off a token's logit for each time it was generated."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken off the logits of tokens that were generated."""
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Divides the logits over 0 of tokens of the prompt and of the answer, multiplies the others'.
    As the two above it is vLLM's, and comes after every other change of the logits."""

    @property
    def truncates(self) -> bool:
        """Some tokens may not be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """The generator's logits are changed before anything else."""
        decays = self.exponential_decay_length_penalty is not None
        return bool(self.logit_bias) or decays or has_penalties(self)

    def to_json(self) -> dict[str, object]:
        """For manifests: every field, but no penalty that changes nothing, so that files of
        before there were penalties are continued."""
        neutral = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
        fields = self.model_dump().items()
        return {k: v for k, v in fields if k not in neutral or v != neutral[k]}

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
    """Logits with biases and length penalties applied; the same tensor where no row changes any,
    a copy where `penalties.Penalties` is still to change it."""
    if not any(p.changes_logits for p in params):
        return logits_RV
    logits = logits_RV.clone()
    biases = [(i, t, b) for i, p in enumerate(params) for t, b in p.logit_bias.items()]
    if biases:
        rows, ids, added = zip(*biases, strict=True)
        where = upload([rows, ids], torch.long, logits.device)
        logits[where[0], where[1]] += upload(added, logits.dtype, logits.device)
    penalties = []
    for i, p in enumerate(params):
        start, factor = p.exponential_decay_length_penalty or (math.inf, 1.0)
        if num_generated[i] > start:
            # past fp32's range the ending is certain (or impossible) all the same
            growth = math.expm1(min((num_generated[i] - start) * math.log(factor), 60.0))
            penalties += [(i, token, growth) for token in eos_token_ids]
    if penalties:
        rows, ids, growths = zip(*penalties, strict=True)
        row, token = upload([rows, ids], torch.long, logits.device)
        own = logits[row, token]
        logits[row, token] = own + own.abs() * upload(growths, logits.dtype, logits.device)
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
    nothing where no row asks for anything: then the logits come back as they are. On a GPU nothing
    here waits for the device.
    """
    if all(p.temperature in (0, 1) and not p.truncates for p in params):
        return logits_RV
    device, width = logits_RV.device, logits_RV.shape[-1]
    # as cold as 1e-6 is greedy already, and no logit overflows there
    numbers = [
        (max(p.temperature, 1e-6), math.log(p.min_p) if p.min_p else -math.inf, p.top_k, p.top_p)
        if p.temperature
        else (1.0, -math.inf, 0, 1.0)
        for p in params
    ]
    columns = upload(list(zip(*numbers, strict=True)), torch.float32, device)
    temperature, floor, top_k, top_p = columns.unsqueeze(-1)
    logits: Tensor = logits_RV.float() / temperature
    if any(row[1] > -math.inf for row in numbers):
        least = logits.amax(-1, keepdim=True) + floor
        logits = logits.masked_fill(logits < least, -torch.inf)
    top_k = torch.where(top_k > 0, top_k, width)
    few = [i for i, row in enumerate(numbers) if 0 < row[2] <= FEW]
    many = [i for i, row in enumerate(numbers) if row[2] > FEW or (not row[2] and row[3] < 1)]
    for rows in (few, many):
        most = min(width, max((int(numbers[i][2]) or width for i in rows), default=0))
        if len(rows) == len(params):
            logits = _truncate_sorted(logits, top_k, top_p, most)
        elif rows:
            index = upload(rows, torch.long, device)
            own = _truncate_sorted(logits[index], top_k[index], top_p[index], most)
            logits.index_copy_(0, index, own)
    return logits


def _truncate_sorted(logits: Tensor, top_k: Tensor, top_p: Tensor, most: int) -> Tensor:
    """top-k first, then top-p over what is left: the order of vLLM and SGLang. Where `most`, the
    largest top-k, is small, no more than that many are sorted out."""
    if most <= FEW:
        values, order = largest(logits, most)
    else:
        values, order = logits.sort(-1, descending=True)
    rank = torch.arange(values.shape[-1], device=logits.device)
    values = values.masked_fill(rank >= top_k, -torch.inf)
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs
    values = values.masked_fill((before >= top_p) & (rank > 0), -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, values)
