import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidance.test_no_waiting import Transfers
from lenvm.engines.sampling import BLOCK, SamplingParams, adjust, draw, truncate
from lenvm.errors import InputError


@given(st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_possible_and_independent_of_batch_mates(seed: int, uniform: float):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 9, generator=generator) * 5
    logits[torch.rand(4, 9, generator=generator) < 0.5] = -torch.inf
    logits[:, 3] = 0.0
    u = torch.full((4,), uniform)
    drawn = draw(logits, u)
    assert (logits.gather(-1, drawn[:, None]) > -torch.inf).all()
    for row in range(4):
        assert draw(logits[row : row + 1], u[:1]) == drawn[row]


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(3000, -1)
    u = (torch.arange(3000) + 0.5) / 3000
    counts = torch.bincount(draw(logits, u), minlength=3)
    assert counts.tolist() == pytest.approx([300, 600, 2100], abs=1)


def test_a_draw_from_a_large_vocabulary_follows_the_distribution_token_by_token():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1000, generator=generator) * 3  # over four blocks: drawn block by block
    logits[torch.rand(1000, generator=generator) < 0.3] = -torch.inf
    logits[:BLOCK] = -torch.inf
    num = 20_000
    u = (torch.arange(num) + 0.5) / num
    drawn = torch.cat([draw(logits.expand(len(part), -1), part) for part in u.split(2000)])
    assert (drawn.diff() >= 0).all()  # the CDF inverted: in order of the tokens
    counts = torch.bincount(drawn, minlength=1000)
    assert (counts - num * logits.softmax(-1)).abs().max() < 1.5
    assert counts[logits == -torch.inf].sum() == 0


def test_truncation_is_per_row():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(5, -1).clone()
    params = [
        SamplingParams(),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.75),
        SamplingParams(min_p=0.5),
        SamplingParams(temperature=0, top_k=1),
    ]
    kept = (truncate(logits, params) > -torch.inf).int().tolist()
    assert kept == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_the_same_seed_gives_the_same_stream_and_other_indices_another():
    params = SamplingParams(seed=3)
    assert params.random_stream().random() == params.random_stream().random()
    assert params.random_stream(0).random() != params.random_stream(1).random()


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"min_p": 2}, {"temprature": 1.0}],
)
def test_bad_parameters_are_named(values: dict[str, object]):
    with pytest.raises(InputError, match=next(iter(values))):
        SamplingParams.parse(values)


def test_a_small_top_k_keeps_what_a_sort_of_the_vocabulary_keeps():
    logits = torch.randn(3, 900, generator=torch.Generator().manual_seed(0)) * 3
    few = [SamplingParams(top_k=15, top_p=p) for p in (0.5, 0.9, 1.0)]
    whole = [SamplingParams(top_k=700), SamplingParams(top_p=0.999), few[2]]
    kept = truncate(logits, few)
    for row, params in enumerate(few):
        ranked = logits[row].sort(descending=True)
        probs = ranked.values[:15].softmax(-1)
        count = int(((probs.cumsum(-1) - probs) < params.top_p).sum())
        assert set(kept[row].isfinite().nonzero().flatten().tolist()) == set(
            ranked.indices[:count].tolist()
        )
    mixed = truncate(logits, whole)
    assert mixed.isfinite().sum(-1).tolist()[0] == 700
    assert torch.equal(mixed[2], kept[2])


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-9])
def test_next_to_no_temperature_takes_the_likeliest_and_no_logit_overflows(temperature: float):
    logits = torch.tensor([[1.0, 3e27, -60000.0, 3.0], [1.0, 2.0, 2.5, -torch.inf]])
    params = [SamplingParams(temperature=temperature, top_p=p, min_p=0.1) for p in (1.0, 0.9)]
    cold = truncate(logits, params)
    assert not cold.isnan().any()
    assert draw(cold, torch.tensor([0.999, 0.999])).tolist() == [1, 2]


@pytest.mark.parametrize("vocab_size", [50, 128 * 1024])
def test_nothing_waits_for_the_device_and_more_rows_are_no_more_transfers(vocab_size: int):
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(top_k=3, min_p=0.1),
        SamplingParams(top_p=0.5, logit_bias={3: 1.0, 5: -2.0}),
        SamplingParams(exponential_decay_length_penalty=(2, 1.1)),
    ]
    counts = []
    for repeats in (1, 5):
        params = kinds * repeats
        logits = torch.empty(len(params), vocab_size, device="meta")
        with Transfers() as transfers:
            adjusted = adjust(logits, params, [9] * len(params), [0, 1])
            truncated = truncate(adjusted, params)
        assert truncated.shape == logits.shape
        counts.append(len(transfers.found))
    assert counts[0] == counts[1] <= 14
