"""A session over a value model with a guide: it scores and follows, the model foretells."""

from typing import Any

import pytest
import torch

from lenvm.errors import InputError, RequestError
from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.value_model import LengthValueModel
from tiny import EOS, VOCAB_SIZE, tiny_pair

PROMPT, OTHER = [3, 7, 11], [4, 8]
TARGET = LengthControl.parse({"equal_to": 9, "tolerance": 0.3})
SHORTEST = LengthControl.parse({"shortest": 0.4})


@pytest.fixture
def model() -> LengthValueModel:
    return tiny_pair()


@pytest.fixture
def guidance(model: LengthValueModel) -> GuidanceSession:
    return GuidanceSession.build(model, eos_token_ids=[EOS])


@pytest.fixture
def read(guidance: GuidanceSession, monkeypatch) -> list[list[tuple[int, ...]]]:
    """The prompts of each of the model's own forwards."""
    calls: list[list[tuple[int, ...]]] = []
    plain = guidance.predictor.read_ends

    def counting(sequences: Any) -> Any:
        calls.append([tuple(ids) for ids in sequences])
        return plain(sequences)

    monkeypatch.setattr(guidance.predictor, "read_ends", counting)
    return calls


def belief_of(model: LengthValueModel, ids: list[int]) -> Any:
    with torch.inference_mode():
        return model.belief(model(torch.tensor([ids]))[0, -1])


def test_candidates_and_what_follows_are_the_guides(model, guidance, read):
    guidance.add({"r": Guided(PROMPT, TARGET)})
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    logits[:, EOS] = -20.0
    found = guidance.step(["r"], logits)
    ids = [int(i) for i, p in zip(found.ids[0], found.log_probs[0], strict=True) if p > -1e30]
    scored = guidance.scorer.score_raw(["r"], torch.tensor([ids]))[0]
    for token, raw in zip(ids, scored, strict=True):
        with torch.inference_mode():
            plain, own = (m(torch.tensor([[*PROMPT, token]]))[0, -1] for m in (model.guide, model))
        torch.testing.assert_close(raw, plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(raw, own, rtol=1e-2, atol=1e-3)
    tokens = list(PROMPT)
    for token in (ids[0], 9, 12):
        guidance.commit(["r"], [token])
        tokens.append(token)
        belief = belief_of(model.guide, tokens)
        assert guidance.values(["r"])[0] == pytest.approx(belief.value().item(), abs=1e-5)
        assert guidance.remaining(["r"])[0] == pytest.approx(belief.length().item(), rel=1e-3)
    assert read == []


def test_predictions_are_the_models_read_together_once_and_when_asked(model, guidance, read):
    guidance.add({"a": Guided(PROMPT, TARGET), "b": Guided(OTHER), "c": Guided(PROMPT)})
    assert read == []
    found = guidance.predictions(["a", "b", "c"])
    assert read == [[tuple(PROMPT), tuple(OTHER)]]
    own = [belief_of(model, ids).length().item() for ids in (PROMPT, OTHER, PROMPT)]
    assert found == pytest.approx(own, rel=1e-4)
    others = [belief_of(model.guide, ids).length().item() for ids in (PROMPT, OTHER, PROMPT)]
    assert found != pytest.approx(others, rel=1e-2)
    guidance.commit(["b"], [9])
    assert guidance.predictions(["c", "b"]) == [found[2], found[1]]
    assert guidance.prediction("a") == found[0]
    assert len(read) == 1


@pytest.mark.parametrize("generated", [[], [9, 12]])
def test_a_resumed_request_is_predicted_and_limited_at_its_prompt(
    model, guidance, read, generated: list[int]
):
    guidance.add(
        {
            "a": Guided(PROMPT, SHORTEST, generated_token_ids=generated),
            "b": Guided(OTHER, SHORTEST, generated_token_ids=generated),
            "free": Guided([6], generated_token_ids=generated),
        }
    )
    assert read == [[tuple(PROMPT), tuple(OTHER)]]
    for name, prompt in (("a", PROMPT), ("b", OTHER)):
        belief = belief_of(model, prompt)
        limit = guidance._state(name).guided.control
        assert limit == SHORTEST.resolve(float(belief.quantile(0.4)))
        assert limit != SHORTEST.resolve(float(belief_of(model.guide, prompt).quantile(0.4)))
        assert guidance.prediction(name) == pytest.approx(belief.length().item(), rel=1e-4)
    assert len(read) == 1  # what was read for the limit serves the prediction
    assert guidance.prediction("free") == pytest.approx(
        belief_of(model, [6]).length().item(), rel=1e-4
    )
    value = belief_of(model.guide, [*PROMPT, *generated]).value().item()
    assert guidance.values(["a"])[0] == pytest.approx(value, abs=1e-5)


def test_a_prompt_that_the_model_cannot_read_is_named(guidance, monkeypatch):
    plain = guidance.predictor.read_ends

    def failing(sequences: Any) -> Any:
        if (4, 8) in [tuple(ids) for ids in sequences]:
            raise InputError("cannot be read")
        return plain(sequences)

    monkeypatch.setattr(guidance.predictor, "read_ends", failing)
    with pytest.raises(RequestError, match="cannot be read") as caught:
        guidance.add({"a": Guided(PROMPT, SHORTEST), "b": Guided(OTHER, SHORTEST)})
    assert caught.value.request_ids == ("b",)
    assert guidance.scorer.decoder.num_tokens == 0
    guidance.add({"a": Guided(PROMPT), "b": Guided(OTHER)})
    with pytest.raises(RequestError, match="cannot be read") as caught:
        guidance.predictions(["a", "b"])
    assert caught.value.request_ids == ("b",)
    assert guidance.prediction("a") > 0
