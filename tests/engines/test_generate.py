"""Length control inside stock generate()."""

import pytest
import torch

from lenvm.engines.generate import LengthLogitsProcessor, length_control
from lenvm.engines.sampling import SamplingParams
from lenvm.engines.transformers import Request, TransformersEngine
from lenvm.errors import ControlError, InputError
from lenvm.guidance.request import LengthControl
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_generator, tiny_pair, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


@pytest.fixture(scope="module")
def generator():
    model = tiny_generator("qwen2")
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = EOS
    return model


@pytest.fixture(scope="module")
def value_model():
    config = LenVMConfig(gamma=0.98, head="distribution")
    return LengthValueModel.build(tiny_backbone("qwen2", seed=3), config)


@pytest.fixture
def batch():
    width = max(map(len, PROMPTS))
    pads = [width - len(p) for p in PROMPTS]
    return {
        "input_ids": torch.tensor([[EOS] * n + p for n, p in zip(pads, PROMPTS, strict=True)]),
        "attention_mask": torch.tensor(
            [[0] * n + [1] * len(p) for n, p in zip(pads, PROMPTS, strict=True)]
        ),
    }


def answers(output, batch):
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def test_every_row_has_the_length_asked_for(generator, value_model, batch):
    torch.manual_seed(0)
    controls = [{"equal_to": 9}, '{"equal_to": 14}', LengthControl(at_most=5)]
    control = length_control(value_model, controls)
    output = generator.generate(**batch, do_sample=True, max_new_tokens=30, custom_generate=control)
    lengths = [len(a) for a in answers(output, batch)]
    assert lengths[:2] == [9, 14]
    assert lengths[2] <= 5


@pytest.mark.parametrize("do_sample", [True, False])
def test_rows_without_control_are_what_stock_generate_gives(
    generator, value_model, batch, do_sample
):
    options = {"do_sample": do_sample, "max_new_tokens": 12, "repetition_penalty": 1.3}
    if do_sample:
        options |= {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
    torch.manual_seed(1)
    stock = generator.generate(**batch, **options)
    torch.manual_seed(1)
    control = length_control(value_model, [None, {"equal_to": 12}, None])
    mixed = generator.generate(**batch, **options, custom_generate=control)
    width = min(stock.shape[1], mixed.shape[1])
    for row in (0, 2):
        assert stock[row, :width].tolist() == mixed[row, :width].tolist()


def test_greedy_is_the_engines_greedy(generator, value_model, batch):
    control = {"equal_to": 10, "tolerance": 0.2}
    output = generator.generate(
        **batch,
        do_sample=False,
        max_new_tokens=20,
        custom_generate=length_control(value_model, control),
    )
    engine = TransformersEngine(generator, tiny_tokenizer(), value_model, eos_token_ids=[EOS])
    sampling = SamplingParams(temperature=0, max_tokens=20)
    requests = [
        Request(str(i), tuple(p), sampling, LengthControl.parse(control))
        for i, p in enumerate(PROMPTS)
    ]
    expected = {c.request.id: c.token_ids for c in engine.generate(requests)}
    assert answers(output, batch) == [expected[str(i)] for i in range(len(PROMPTS))]


def test_num_return_sequences(generator, value_model, batch):
    torch.manual_seed(2)
    output = generator.generate(
        **batch,
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=20,
        custom_generate=length_control(value_model, [{"equal_to": n} for n in (4, 6, 8)]),
    )
    assert [len(a) for a in answers(output, batch)] == [4, 4, 6, 6, 8, 8]


def test_what_is_drawn_follows_the_guided_distribution(generator, value_model):
    """The processor's scores, after the loop's own temperature, are the session's distribution."""
    prompt = torch.tensor([PROMPTS[0]])
    scores = torch.randn(1, generator.config.vocab_size, generator=torch.Generator().manual_seed(0))
    options = {"eos_token_ids": [EOS], "max_length": 40, "temperature": 0.6, "top_k": 7}
    processor = LengthLogitsProcessor(value_model, {"tilt": 5.0}, **options)
    out = processor(prompt, scores)
    candidates = processor.session.step(["row 0"], scores)
    expected = torch.zeros(generator.config.vocab_size)
    expected[candidates.ids[0][candidates.mask[0]]] = candidates.log_probs[0].exp()[
        candidates.mask[0]
    ]
    torch.testing.assert_close((out / 0.6).softmax(-1)[0], expected, atol=1e-6, rtol=1e-5)
    assert (expected > 0).sum() == 7
    assert processor.remaining()[0] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_as_a_logits_processor_of_stock_generate(generator, value_model, batch, temperature):
    torch.manual_seed(1)
    processor = LengthLogitsProcessor(
        value_model,
        [{"equal_to": 6}, None, {"equal_to": 11}],
        eos_token_ids=[EOS],
        max_length=batch["input_ids"].shape[1] + 16,
        attention_mask=batch["attention_mask"],
        temperature=temperature,
        top_k=20,
    )
    output = generator.generate(
        **batch,
        do_sample=True,
        temperature=temperature,
        top_k=20,
        max_new_tokens=16,
        logits_processor=[processor],
    )
    lengths = [len(a) for a in answers(output, batch)]
    assert lengths[0] == 6
    assert lengths[2] == 11


def test_a_bad_control_is_refused_before_anything_runs(value_model):
    with pytest.raises(ControlError, match="equal_to"):
        length_control(value_model, {"equal_to": 0})


def test_beams_and_unknown_truncations_are_refused(generator, value_model, batch):
    control = length_control(value_model, {"equal_to": 5})
    with pytest.raises(InputError, match="beam"):
        generator.generate(**batch, num_beams=2, max_new_tokens=5, custom_generate=control)
    with pytest.raises(InputError, match="Typical"):
        generator.generate(
            **batch, do_sample=True, typical_p=0.5, max_new_tokens=5, custom_generate=control
        )


def test_a_processor_serves_one_batch(generator, value_model):
    processor = LengthLogitsProcessor(
        value_model, {"equal_to": 5}, eos_token_ids=[EOS], max_length=40
    )
    scores = torch.zeros(1, generator.config.vocab_size)
    processor(torch.tensor([PROMPTS[0]]), scores)
    with pytest.raises(InputError, match="make a new one"):
        processor(torch.tensor([PROMPTS[0]]), scores)
    with pytest.raises(InputError, match="2 controls for 3 rows"):
        LengthLogitsProcessor(value_model, [None, None], eos_token_ids=[EOS], max_length=9)(
            torch.ones(3, 2, dtype=torch.long), torch.zeros(3, generator.config.vocab_size)
        )


def test_a_guide_steers_as_it_would_alone(generator, batch):
    model = tiny_pair()
    itself = tiny_pair()
    itself.set_guide(None)
    outputs = []
    for steering in (model, model.guide, itself):
        torch.manual_seed(2)
        control = length_control(steering, {"equal_to": 9})
        options = {"do_sample": True, "max_new_tokens": 20}
        outputs.append(generator.generate(**batch, **options, custom_generate=control))
    assert outputs[0].tolist() == outputs[1].tolist() != outputs[2].tolist()
