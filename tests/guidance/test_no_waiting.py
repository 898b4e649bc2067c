"""A step must not wait for the device. The meta device has no data, so reading any back, a shape
that depends on data, or a CPU tensor among the others raises; transfers are watched as well."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lenvm.guidance.request import LengthControl
from lenvm.guidance.session import GuidanceSession, Guided
from lenvm.model.head import DistributionBelief, LengthBelief, LengthBins

META = torch.device("meta")
GOALS: list[dict[str, Any]] = [
    {"tilt": 3.0, "gamma": 0.9},
    {"tilt_logit": 0.5, "min_value": 0.1, "min_entropy": 0.2},
    {"expected_scale": 0.8, "expected_mode": "length_mul"},
    {"equal_to": 40, "rule": "hard"},
    {"at_most": 40, "rule": "soft", "token_temperature": {3: 2.0}},
    {"at_least": 40, "rule": "expected"},
    {"equal_to": 40, "rule": "conditional"},
]


class MetaScorer:
    """CandidateScorer's interface on the meta device."""

    gamma, has_distribution, max_candidates, vocab_size = 0.99, True, 16, 50

    def __init__(self) -> None:
        self.bins = LengthBins()

    def belief(self, *shape: int) -> LengthBelief:
        return DistributionBelief(torch.empty(*shape, len(self.bins), device=META), 0.99, self.bins)

    def encode_control(self, control: Mapping[str, object] | None) -> list[int]:
        return []

    def add(self, requests: Mapping[str, Sequence[int]]) -> LengthBelief:
        return self.belief(len(requests))

    def fork(self, parent_id: str, child_id: str) -> None: ...

    def score(
        self,
        request_ids: Sequence[str],
        candidate_ids_RK: Tensor,
        *,
        num_candidates: int | None = None,
    ) -> LengthBelief:
        assert candidate_ids_RK.device == META
        return self.belief(*candidate_ids_RK.shape)

    def commit(
        self,
        request_ids: Sequence[str],
        token_ids_R: Tensor | Sequence[int],
        *,
        peeked: bool = False,
    ) -> None: ...

    def remove(self, request_ids: Sequence[str]) -> None: ...


class Transfers(TorchDispatchMode):
    """Notes every tensor that is made from Python data or copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "lift_fresh" in name or ("_to_copy" in name and "device" in (kwargs or {})):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_steady_state_neither_reads_back_nor_transfers():
    session = GuidanceSession(MetaScorer(), eos_token_ids=[0, 7])
    names = [f"r{i}" for i in range(len(GOALS))]
    prompts = {n: Guided([1, i], LengthControl.parse(GOALS[i])) for i, n in enumerate(names)}
    session.add(prompts)
    tokens = torch.empty(len(GOALS), dtype=torch.int64, device=META)
    rows = torch.empty(len(GOALS), dtype=torch.int64, device=META)

    def step() -> None:
        logits = torch.empty(9, 64, device=META)
        candidates = session.step(names, logits[:7])
        assert candidates.log_probs.shape == (7, 15)
        session.write_back(names, candidates, logits, rows)
        session.commit(names, tokens)

    step()
    with Transfers() as transfers:
        step()
        step()
    assert transfers.found == []


def test_the_watch_sees_a_transfer():
    with Transfers() as transfers:
        torch.tensor([1.0])
        torch.zeros(2).to(META)
    assert len(transfers.found) == 2
