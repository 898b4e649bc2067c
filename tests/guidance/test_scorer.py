"""CandidateScorer: beliefs of a value model's candidates, both heads, against the model itself."""

import pytest
import torch

from lenvm.errors import InputError
from lenvm.guidance.scorer import CandidateScorer
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from model.families import build

PROMPTS = {"a": [1, 2, 3, 4], "b": [5], "c": list(range(40))}


@pytest.fixture(params=["scalar", "distribution"])
def model(request):
    torch.manual_seed(3)
    config = LenVMConfig(gamma=0.99, head=request.param)
    return LengthValueModel.build(build("qwen2"), config).eval()


@pytest.fixture
def scorer(model):
    return CandidateScorer(model, max_tokens=400, max_requests=8, max_candidates=4)


def plain_value(model, tokens):
    return model.belief(model.read([tokens])[0][-1]).value()


def test_beliefs_equal_the_models_own(model, scorer):
    boundary = scorer.add(PROMPTS).value()
    for value, prompt in zip(boundary, PROMPTS.values(), strict=True):
        torch.testing.assert_close(value, plain_value(model, prompt), atol=1e-4, rtol=0)
    candidates = [[7, 8, 9], [10, -1, -1], [11, 12, -1]]
    values = scorer.score(list(PROMPTS), torch.tensor(candidates)).value()
    for row, (prompt, tokens) in enumerate(zip(PROMPTS.values(), candidates, strict=True)):
        for column, token in enumerate(tokens):
            if token >= 0:
                expected = plain_value(model, [*prompt, token])
                torch.testing.assert_close(values[row, column], expected, atol=1e-4, rtol=0)


def test_committed_extended_forked_and_stepped_prefixes(model, scorer):
    scorer.add(PROMPTS)
    scorer.score(["a", "b"], [[7, 8], [9, 10]])
    scorer.commit(["a", "b"], [8, 9])
    scorer.fork("a", "d")
    after = scorer.extend({"d": [20, 21], "b": [22]}).value()
    stepped = scorer.step(["a"], [30]).value()
    for value, tokens in (
        (after[0], [1, 2, 3, 4, 8, 20, 21]),
        (after[1], [5, 9, 22]),
        (stepped[0], [1, 2, 3, 4, 8, 30]),
    ):
        torch.testing.assert_close(value, plain_value(model, tokens), atol=1e-4, rtol=0)
    scorer.remove(["a"])
    with pytest.raises(InputError, match="no request 'a'"):
        scorer.score(["a"], [[1]])
