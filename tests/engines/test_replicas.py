"""Several engines in processes of their own: the same answers as one."""

import pytest
import torch

from engines.test_transformers import request
from lenvm.engines.replicas import EngineReplicas, EngineSpec
from lenvm.errors import LenVMError
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, tiny_backbone, tiny_generator, tiny_tokenizer


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> EngineSpec:
    folder = tmp_path_factory.mktemp("models")
    tiny_generator().save_pretrained(folder / "generator")
    tiny_tokenizer().save_pretrained(folder / "generator")
    value_model = LengthValueModel.build(
        tiny_backbone(seed=1), LenVMConfig(gamma=0.98, eos_token_ids=[EOS])
    )
    value_model.save_pretrained(folder / "value")
    options = {"max_requests": 3, "max_tokens": 1024}
    source = {"folder": str(folder / "value")}
    return EngineSpec(str(folder / "generator"), source, torch.float32, options)


def test_replicas_answer_as_one_engine_does(spec: EngineSpec):
    control = {"equal_to": 12, "rule": "soft"}
    requests = [
        request(f"{p}-{i}", prompt=(4, 9, 17 + p), index=i, control=control if i else None)
        for p in range(4)
        for i in range(3)
    ]
    alone = {c.request.id: c.token_ids for c in spec.load("cpu").generate(requests)}
    replicas = EngineReplicas(spec, ["cpu", "cpu"])
    try:
        assert replicas.head == "scalar"
        drawn = []
        together = {}
        for completion in replicas.generate(drawn.append(r) or r for r in requests):
            if not together:  # no more are drawn than there is room for
                assert len(drawn) <= 2 * spec.options["max_requests"]
            together[completion.request.id] = completion.token_ids
        assert together == alone
        assert replicas.guidance_s > 0
    finally:
        replicas.close()


def test_a_request_that_can_never_run_is_named(spec: EngineSpec):
    replicas = EngineReplicas(spec, ["cpu"])
    with pytest.raises(LenVMError, match="request long"):
        list(replicas.generate([request("long", max_tokens=5000)]))
    assert all(not p.is_alive() for p in replicas._processes)


def test_a_replica_that_dies_is_noticed(spec: EngineSpec):
    replicas = EngineReplicas(spec, ["cpu"])
    answers = replicas.generate([request("a", max_tokens=500)])
    replicas._processes[0].kill()
    with pytest.raises(LenVMError, match="ended"):
        list(answers)
