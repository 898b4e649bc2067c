"""Guidance in SGLang's batch, through the hooks as SGLang applies them. The machine below plays its
scheduler: overlap (lists lag a token behind), chunks, retraction, late ends."""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.machine import Job, sample
from engines.test_vllm_guidance import (
    CONTROLS,
    FAILED,
    LOGITS,
    MARKOV,
    VOCAB,
    Faulty,
    model,
    plain_loop,
)
from guidance.oracle import EOS, GAMMA, OracleScorer
from lenvm.engines.settings import GuidanceSettings
from lenvm.errors import InputError
from lenvm.guidance.session import GuidanceSession

STAND_IN = Path(__file__).parent / "stand_in"
ARGS = {
    "enable_custom_logit_processor": True,
    "speculative_algorithm": None,
    "enable_dp_attention": False,
    "disaggregation_mode": "null",
    "max_running_requests": 64,
    "skip_tokenizer_init": True,
    "random_seed": 0,
}


@pytest.fixture(scope="module", autouse=True)
def sglang(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(STAND_IN))
    folder = tmp_path_factory.mktemp("value")
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    (folder / "lenvm.json").write_text(json.dumps({"gamma": GAMMA, "head": "distribution"}))
    patch.setenv("LENVM_MODEL", str(folder))
    from sglang.srt.plugins.hook_registry import HookRegistry

    from lenvm.engines.sglang import register

    register()
    HookRegistry.apply_hooks()
    yield
    patch.undo()
    for name in [m for m in sys.modules if m.split(".")[0] == "sglang"]:
        del sys.modules[name]
    sys.modules.pop("lenvm.engines.sglang.hooks", None)


class Req:
    """SGLang's request, as far as guidance reads it."""

    def __init__(self, number: int, sampling: dict[str, Any], named: str | None, job: Job) -> None:
        self.rid, self.job, self.named = f"r{number}", job, named
        self.origin_input_ids, self.output_ids = job.prompt, list[int]()
        custom = sampling.get("custom_params")
        greedy = sampling.get("temperature") == 0
        self.sampling_params = SimpleNamespace(
            temperature=1.0 if greedy else sampling.get("temperature", 1.0),
            top_k=1 if greedy else sampling.get("top_k", 1 << 30),
            top_p=sampling.get("top_p", 1.0),
            min_p=sampling.get("min_p", 0.0),
            stop_token_ids=set(sampling.get("stop_token_ids", ())),
            ignore_eos=False,
            sampling_seed=sampling.get("sampling_seed"),
            custom_params=None if custom is None else custom | {"__req__": self},
        )
        self.eos_token_ids, self.tokenizer = {EOS}, None
        self.is_retracted, self.to_finish, self.reason = False, None, None
        self.filled = 0

    def finished(self) -> bool:
        return self.reason is not None


class Machine:
    def __init__(self, scorer=None, *, overlap=True, seats=6, seed=0, **changes) -> None:
        from sglang.srt.managers.tokenizer_manager import TokenizerManager
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

        from lenvm.engines.sglang.hooks import Worker

        assert CustomLogitProcessor.from_str("lenvm") is CustomLogitProcessor.from_str("lenvm")
        self.scorer, self.overlap, self.seats = scorer or OracleScorer(MARKOV), overlap, seats
        args = SimpleNamespace(**{**ARGS, **changes})
        session = GuidanceSession(self.scorer, eos_token_ids=())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GuidanceSettings, "load_session", lambda self, device, tokenizer: session)
            Worker.rows = None
            self.runner = ModelRunner(args)
        self.front, self.random = TokenizerManager(args), random.Random(seed)
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.late: list[tuple[Req, int]] = []
        self.num = 0

    def submit(self, sampling, prompt, processor=None) -> Req:
        obj = SimpleNamespace(sampling_params=sampling, custom_logit_processor=processor)
        sampling, named, _ = self.front._create_tokenized_object(obj, None, prompt)
        plain = {"seed": sampling.get("sampling_seed"), "logit_bias": sampling.get("logit_bias")}
        fields = ("temperature", "top_k", "top_p", "min_p", "frequency_penalty")
        fields += ("presence_penalty", "repetition_penalty")
        plain |= {k: sampling[k] for k in fields if k in sampling}
        defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 40}
        defaults |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
        stops = list(sampling.get("stop_token_ids", ()))
        params = SimpleNamespace(**defaults | plain, stop_token_ids=stops, eos_token_id=EOS)
        self.num += 1
        req = Req(self.num, sampling, named, Job(params, prompt))
        self.waiting.append(req)
        return req

    def step(self, retract=(), chunk: int = 99) -> None:
        for place in retract:
            if self.running:
                req = self.running.pop(place % len(self.running))
                req.is_retracted, req.filled = True, 0
                self.waiting.append(req)
                self.late = [(r, t) for r, t in self.late if r is not req]
                req.job.tokens[:] = req.output_ids
                req.job.is_done = False
        while self.waiting and len(self.running) < self.seats:
            req = self.waiting.pop(0)
            req.is_retracted = False
            self.running.append(req)
        if not self.running:
            self._process()
            self._sample([], torch.zeros(0, VOCAB), [])
            return
        lengths = []
        for req in self.running:
            total = len(req.job.prompt) + len(req.job.tokens)
            req.filled = min(total, req.filled + chunk) if req.filled < total - 1 else total
            lengths.append(req.filled)
        logits = torch.stack([LOGITS[[*r.job.prompt, *r.job.tokens][-1]] for r in self.running])
        before = logits.clone()
        self._sample(self.running, logits, lengths)
        drawn = []
        for row, req in enumerate(self.running):
            if req.named is None:
                assert torch.equal(logits[row], before[row])
            if lengths[row] == len(req.job.prompt) + len(req.job.tokens):
                drawn.append((req, sample(logits[row], req.job, with_penalties=False)))
        if not self.overlap:
            self.late += drawn
            drawn = []
        self._process()
        for req, token in drawn:
            if req in self.running:
                req.job.tokens.append(token)
                self.late.append((req, token))

    def _process(self) -> None:
        """Results of the step before (overlap), or of this one: tokens arrive on the host."""
        for req, token in self.late:
            if not self.overlap:
                req.job.tokens.append(token)
            req.output_ids.append(token)
            stops = {EOS, *req.sampling_params.stop_token_ids}
            if req.to_finish is not None:
                req.reason = req.to_finish
            elif token in stops or len(req.output_ids) >= 40:
                req.reason = token
        self.late = []
        self.running = [r for r in self.running if not r.finished()]

    def _sample(self, reqs, logits, lengths) -> None:
        info = SimpleNamespace(
            has_custom_logit_processor=any(r.named for r in reqs),
            custom_params=[r.sampling_params.custom_params for r in reqs],
        )
        batch = SimpleNamespace(sampling_info=info, seq_lens_cpu=torch.tensor(lengths))
        self.runner.sample(logits, batch)

    def run(self) -> None:
        while self.waiting or self.running:
            self.step()
        self.step()


def submit_one(machine: Machine, number: int, kind: int, length: int = 1):
    sampling = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 3}][
        kind % 4
    ]
    sampling = {"sampling_seed": number, **sampling}
    control = None if kind % 5 == 4 else CONTROLS[(kind // 2) % len(CONTROLS)]
    if control is not None:
        sampling["custom_params"] = {"lenvm": control}
    prompt = [1 + (number + i) % 5 for i in range(length)]
    return machine.submit(sampling, prompt), control


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_tokens_do_not_depend_on_what_the_scheduler_does(overlap, data):
    machine, reqs = Machine(overlap=overlap), []
    for _ in range(data.draw(st.integers(5, 20), label="steps")):
        for _ in range(data.draw(st.integers(0, 2), label="new")):
            kind = data.draw(st.integers(0, 39), label="kind")
            reqs.append(submit_one(machine, len(reqs), kind, data.draw(st.integers(1, 6))))
        retract = data.draw(st.lists(st.integers(0, 9), max_size=1), label="retract")
        machine.step(retract, chunk=2)
    machine.run()
    for req, control in reqs:
        if control is not None:
            assert req.output_ids == plain_loop(req.job, control)
    assert not machine.scorer.requests


def test_a_failure_ends_one_request_with_its_reason_and_no_other():
    scorer = Faulty({("score", 4): torch.OutOfMemoryError("no memory")})
    machine = Machine(scorer)
    reqs = [submit_one(machine, number, 5 * number) for number in range(8)]
    machine.run()
    failed = [req for req, _ in reqs if hasattr(req.reason, "message")]
    assert len(failed) == 1
    assert "no memory" in failed[0].reason.message
    for req, control in reqs:
        if req not in failed and control is not None:
            assert req.output_ids == plain_loop(req.job, control)
    assert not scorer.requests


def test_a_thousand_mixed_requests_leave_nothing_behind():
    machine = Machine(seats=32)
    for number in range(1000):
        sampling: dict[str, Any] = {"temperature": 0.0}
        if number % 2:
            sampling["custom_params"] = {"lenvm": {"at_most": 1 + number % 4}}
        machine.submit(sampling, [2])
    while machine.waiting or machine.running:
        machine.step([machine.random.randrange(32)] if machine.random.random() < 0.2 else ())
    machine.step()
    assert not machine.scorer.requests


@pytest.mark.parametrize(
    ("sampling", "processor", "says"),
    [
        ({"custom_params": {"lenvm": {"equal_to": 0}}}, None, "equal_to is 0"),
        ({"custom_params": {"lenvm": "{"}}, None, "JSON object"),
        ({}, '{"callable": "8004"}', "would run their code"),
    ],
)
def test_what_cannot_be_served_is_refused_before_admission(sampling, processor, says):
    with pytest.raises(ValueError, match=says):
        Machine().submit(sampling, [1], processor)


def test_the_wire_carries_text_and_one_more_stop_token():
    req, control = submit_one(Machine(), 1, 0)
    assert json.loads(req.sampling_params.custom_params["lenvm"]) == control
    assert req.sampling_params.stop_token_ids == {FAILED}
    assert req.named == "lenvm"
    assert model([1]).shape == (VOCAB,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
        ({"enable_custom_logit_processor": False}, "enable-custom-logit-processor"),
        ({"max_running_requests": None}, "max-running-requests 256"),
        ({"disaggregation_mode": "prefill"}, "disaggregated"),
    ],
)
def test_a_server_in_which_guidance_would_be_wrong_does_not_start(changes, says):
    with pytest.raises(InputError, match=says):
        Machine(**changes)


def test_an_untested_release_ends_the_process(monkeypatch):
    from lenvm.engines import sglang

    monkeypatch.setattr(sglang, "TESTED", ("9.9",))
    with pytest.raises(SystemExit, match=r"tested: 9\.9"):
        sglang.register()
