"""The session over a real value model: what it reports is what a plain forward says."""

from typing import Any

import pytest
import torch

from lenvm.guidance.request import LengthControl
from lenvm.guidance.scorer import CandidateScorer
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.head import HeadName
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, VOCAB_SIZE, tiny_backbone

GOALS: list[dict[str, Any] | None] = [
    {"tilt": 20.0},
    {"equal_to": 9, "rule": "soft"},
    {"at_least": 6, "rule": "hard", "min_entropy": 3.0},
    None,
    {"at_most": 5, "top_k": 1},
]


@pytest.mark.parametrize("head", ["scalar", "distribution"])
def test_values_are_those_of_a_plain_forward(head: HeadName):
    model = build(head)
    session = GuidanceSession(CandidateScorer(model), eos_token_ids=[EOS])
    prompts = {f"r{i}": [3 + i, 7, 11] for i in range(len(GOALS))}
    session.add(
        {
            r: Guided(ids, goal and LengthControl.parse(goal), generated_token_ids=[5] * (i % 2))
            for i, ((r, ids), goal) in enumerate(zip(prompts.items(), GOALS, strict=True))
        }
    )
    tokens = {r: [*ids, *[5] * (i % 2)] for i, (r, ids) in enumerate(prompts.items())}
    generator = torch.Generator().manual_seed(0)
    guided = [r for r, goal in zip(prompts, GOALS, strict=True) if goal]
    for _ in range(4):
        logits = torch.randn(len(guided), VOCAB_SIZE, generator=generator)
        logits[:, EOS] = -20.0
        found = session.step(guided, logits)
        drawn = {r: int(found.ids[i, found.log_probs[i].argmax()]) for i, r in enumerate(guided)}
        drawn["r3"] = 9
        session.commit(list(tokens), [drawn[r] for r in tokens])
        for r in tokens:
            tokens[r].append(drawn[r])
        scored = ["r0", "r1", "r3", "r4"]  # r2's gate is shut: its reading is a sibling's
        for r, value, length in zip(
            scored, session.values(scored), session.remaining(scored), strict=True
        ):
            if tokens[r][-1] == EOS:
                assert (value, length) == (0.0, 0.0)
                continue
            with torch.inference_mode():
                belief = model.belief(model(torch.tensor([tokens[r]])))
            assert value == pytest.approx(belief.value()[0, -1].item(), abs=1e-5)
            assert length == pytest.approx(belief.length()[0, -1].item(), rel=1e-3, abs=1)


def build(head: HeadName) -> LengthValueModel:
    torch.manual_seed(1)
    config = LenVMConfig(gamma=0.98, head=head, eos_token_ids=[EOS])
    return LengthValueModel.build(tiny_backbone(), config).eval()
