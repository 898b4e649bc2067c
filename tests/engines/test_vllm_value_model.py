"""The processor with a real (tiny) value model in the worker, loaded as a server loads it."""

import math

import pytest
import torch

from engines.machine import V1Machine
from engines.test_vllm_guidance import config, params
from engines.test_vllm_guidance import vllm as vllm
from lenvm.errors import CheckpointError
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, VOCAB_SIZE, tiny_backbone, tiny_generator

GENERATOR = tiny_generator(seed=2)


@torch.inference_mode()
def generate(tokens):
    logits = GENERATOR(torch.tensor([tokens])).logits[0, -1].float()
    logits[EOS] = -20.0
    return logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = LengthValueModel.build(
        tiny_backbone(seed=1), LenVMConfig(gamma=0.98, eos_token_ids=[EOS])
    )
    with torch.no_grad():
        model.head.summary.weight.mul_(20)
    folder = tmp_path_factory.mktemp("tiny") / "value"
    model.save_pretrained(folder)
    return folder, model


def build(folder, monkeypatch, **changes):
    from lenvm.engines.vllm.guidance import LengthGuidance

    monkeypatch.setenv("LENVM_MODEL", str(folder))
    made = config(**changes)
    made.model_config.get_vocab_size = lambda: VOCAB_SIZE
    return LengthGuidance(made, torch.device("cpu"), False)


def test_the_hard_rule_takes_the_candidate_whose_value_a_full_forward_says(checkpoint, monkeypatch):
    folder, model = checkpoint
    guidance = build(folder, monkeypatch)
    machine = V1Machine(guidance, generate, seats=4)
    target, prompts = 12, [[4, 9, 17], [5, 6], [7, 8, 9, 10, 11]]
    control = {"equal_to": target, "rule": "hard", "top_k": 5, "top_p": 1.0}
    jobs = [machine.submit(params(control, eos=EOS, temperature=0.0), p) for p in prompts]
    for _ in range(4):
        machine.step([0])  # preempted again and again, and still the same
    machine.run()
    for job in jobs:
        for t, token in enumerate(job.tokens[: target - 1]):
            prefix = [*job.prompt, *job.tokens[:t]]
            candidates = generate(prefix).topk(5).indices.tolist()
            goal = math.expm1((target - t - 1) * math.log(0.98))
            with torch.inference_mode():
                raw = model(torch.tensor([[*prefix, x] for x in candidates]))[:, -1]
                distance = (model.belief(raw).value() - goal).abs()
            assert float(distance[candidates.index(token)]) <= float(distance.min()) + 1e-5
    assert guidance._rows.batch.session.scorer.decoder.num_tokens == 0


def test_a_strict_goal_is_kept_to_the_token(checkpoint, monkeypatch):
    guidance = build(checkpoint[0], monkeypatch)

    def ready_to_end(tokens):
        return generate(tokens).index_fill(0, torch.tensor(EOS), 0.0)

    machine = V1Machine(guidance, ready_to_end, seats=8)
    lengths = range(1, 33)
    jobs = [
        machine.submit(params({"equal_to": n, "rule": "soft", "top_k": 8}, eos=EOS), [4, n], 2)
        for n in lengths
    ]
    machine.run()
    assert [len(job.tokens) for job in jobs] == list(lengths)
    assert all(job.tokens[-1] == EOS for job in jobs)


def test_a_folder_without_a_checkpoint_does_not_start(monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        build(tmp_path, monkeypatch)
