"""Predictions as numbers: what `lenvm predict`, `lenvm values` and a server return."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lenvm.errors import InputError
from lenvm.model.head import DistributionBelief
from lenvm.model.value_model import LengthValueModel

QUANTILES = (0.1, 0.5, 0.9)


def predict_lengths(
    model: LengthValueModel,
    prompts: Sequence[Sequence[int]],
    *,
    images: Sequence[Sequence[str]] | None = None,
    budget: int | None = None,
    batch_tokens: int = 4096,
) -> list[dict[str, float]]:
    """Length of each prompt's answer before a token of it is written.

    prompts: token ids, chat template applied; images: the image files of each. Returns for each:
    `value` (V at the prompt boundary) and `length` (tokens); a distribution head adds `mean`,
    `geometric_mean` (least wrong in proportion), `p10`, `p50`, `p90` and, for a `budget`,
    `p_within_budget` = P(length <= budget).
    """
    import torch

    if model.images is not None and images is not None:
        pairs = zip(prompts, images, strict=True)
        prompts = [model.images.expand(ids, files) for ids, files in pairs]
    found = model.read(prompts, images=images, batch_tokens=batch_tokens)
    last = [raw[-1] for raw in found]
    return belief_numbers(model, torch.stack(last), budget=budget) if last else []


def belief_numbers(
    model: LengthValueModel, raw: Tensor, *, budget: int | Sequence[int] | None = None
) -> list[dict[str, float]]:
    """The numbers of a belief, one dict per state. raw: [N, D]; budget: tokens that may still come,
    for all states or one each. InputError where the head knows no P(length <= budget)."""
    import torch

    belief = model.belief(raw)
    columns = {"value": belief.value(), "length": belief.length()}
    if isinstance(belief, DistributionBelief):
        columns |= {"mean": belief.mean(), "geometric_mean": belief.geometric_mean()}
        for q in QUANTILES:
            columns[f"p{round(q * 100)}"] = belief.quantile(q)
        if budget is not None:
            low, high = torch.tensor(1), torch.tensor(budget)
            columns["p_within_budget"] = belief.log_interval(low, high).exp()
    elif budget is not None:
        raise InputError(
            f"budget is {budget}, but the scalar head knows no P(length <= budget): leave it out, "
            "or train with head = 'distribution'"
        )
    names = list(columns)
    table = torch.stack([columns[name].float() for name in names], -1).tolist()
    return [dict(zip(names, row, strict=True)) for row in table]


def trace_values(
    model: LengthValueModel,
    prompt_token_ids: Sequence[int],
    completion_token_ids: Sequence[int],
    *,
    images: Sequence[str] = (),
    complete: bool = True,
    budget: int | None = None,
) -> list[dict[str, Any]]:
    """Beliefs at every state of a completion: one dict per state s_0 .. s_L.

    Each holds `step` t, the `belief_numbers`, and `remaining_true` = L - t (None when the
    completion was cut off). The terminal state of a complete one has value 0 exactly. images: the
    prompt's image files, for a VLM. budget: of the whole answer, `p_within_budget` of each state.
    """
    if model.images is not None:
        prompt_token_ids = model.images.expand(prompt_token_ids, images)
    sequence = [*prompt_token_ids, *completion_token_ids]
    (raw,) = model.read([sequence], images=[images])
    length = len(completion_token_ids)
    left = None if budget is None else [budget - t for t in range(length + 1)]
    states = raw[len(prompt_token_ids) - 1 :]
    rows: list[dict[str, Any]] = list(belief_numbers(model, states, budget=left))
    if complete:
        rows[-1] = dict.fromkeys(rows[-1], 0.0)
        if budget is not None:
            rows[-1]["p_within_budget"] = float(length <= budget)
    return [
        {"step": t, **row, "remaining_true": length - t if complete else None}
        for t, row in enumerate(rows)
    ]
