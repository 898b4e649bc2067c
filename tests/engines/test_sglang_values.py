"""The value model inside SGLang: every token's values, whatever the KV cache already holds.

`Machine` plays SGLang's memory: slots of a KV cache, a table of them per request, prefixes that
requests share, prompts in chunks. Its backbone is a real tiny model, run over the tokens that a
request's slots hold.
"""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lenvm.errors import CheckpointError
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from tiny import EOS, VOCAB_SIZE, tiny_backbone

STAND_IN = Path(__file__).parent / "stand_in"
SLOTS, WIDTH = 200, 64


@pytest.fixture(scope="module", autouse=True)
def sglang():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(STAND_IN))
    yield
    patch.undo()
    for name in [m for m in sys.modules if m.split(".")[0] == "sglang"]:
        del sys.modules[name]
    sys.modules.pop("lenvm.engines.sglang.values", None)


class Machine:
    """SGLang's memory and its runner."""

    def __init__(self, folder: Path, config: object) -> None:
        from sglang.srt import runtime_context
        from sglang.srt.model_executor import forward_context
        from sglang.srt.models.registry import ModelRegistry

        from lenvm.engines.sglang.values import EntryClass

        machine = self

        class Backbone(nn.Module):
            def __init__(self, config, quant_config=None, prefix=""):
                super().__init__()
                self.inner = tiny_backbone(seed=5)

            def load_weights(self, weights):
                named = {name.removeprefix("model."): w for name, w in weights}
                assert not self.inner.load_state_dict(named).missing_keys

            def model(self, input_ids, positions, forward_batch, input_embeds):
                return machine.hidden(self.inner, input_ids, forward_batch)

        ModelRegistry.models["LlamaForCausalLM"] = Backbone
        runtime_context.args.model_path = str(folder)
        self.held = torch.zeros(SLOTS, dtype=torch.long)
        self.table = torch.zeros(8, WIDTH, dtype=torch.int32)
        forward_context.pools.req_to_token = SimpleNamespace(req_to_token=self.table)
        forward_context.pools.kv = SimpleNamespace(size=SLOTS - 1, page_size=1)
        self.free = list(range(1, SLOTS))
        random.Random(0).shuffle(self.free)
        self.model = EntryClass(config)
        self.model.load_weights(load_file(folder / "model.safetensors").items())

    def run(self, parts: list[tuple[int, list[int], int]]) -> list[list[list[float]]]:
        """(row, tokens so far, how many of them are cached) -> [V, length] of all so far."""
        new = []
        for row, tokens, cached in parts:
            slots = [self.free.pop() for _ in tokens[cached:]]
            self.held[slots] = torch.tensor(tokens[cached:])
            self.table[row, cached : len(tokens)] = torch.tensor(slots, dtype=torch.int32)
            new += slots
        batch = SimpleNamespace(
            out_cache_loc=torch.tensor(new),
            req_pool_indices=torch.tensor([row for row, _, _ in parts]),
            seq_lens_cpu=torch.tensor([len(tokens) for _, tokens, _ in parts]),
            cached=[cached for _, _, cached in parts],
        )
        ids = torch.tensor([t for _, tokens, cached in parts for t in tokens[cached:]])
        return [x.tolist() for x in self.model(ids, ids, batch).embeddings]

    def hidden(self, inner, input_ids, batch):
        found = []
        rows = zip(batch.req_pool_indices, batch.seq_lens_cpu, batch.cached, strict=True)
        for row, n, cached in rows:
            tokens = self.held[self.table[row, :n].long()]
            found.append(inner(tokens[None]).last_hidden_state[0, cached:])
        return torch.cat(found)

    def share(self, source: int, row: int, count: int) -> None:
        """The radix cache: a prefix of one request becomes another's."""
        self.table[row, :count] = self.table[source, :count]


@pytest.fixture(scope="module", params=["scalar", "distribution"])
def checkpoint(request, tmp_path_factory):
    config = LenVMConfig(gamma=0.98, eos_token_ids=[EOS], head=request.param)
    model = LengthValueModel.build(tiny_backbone(seed=1), config)
    folder = tmp_path_factory.mktemp("tiny") / "value"
    model.save_pretrained(folder)
    return folder, model


@torch.inference_mode()
def full_forward(model, tokens):
    belief = model.belief(model(torch.tensor([tokens]))[0])
    return torch.stack([belief.value(), belief.length()], -1)


def test_chunks_and_shared_prefixes_give_what_one_forward_gives(checkpoint):
    folder, model = checkpoint
    machine = Machine(folder, model.backbone.config)
    draw = random.Random(1)
    a, b = ([draw.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (40, 9))
    c = [*a[:17], *b]
    first, other = machine.run([(0, a[:15], 0), (1, b, 0)])  # a in three chunks, b at once
    assert len(first) == 15
    torch.testing.assert_close(torch.tensor(other), full_forward(model, b), atol=1e-4, rtol=1e-4)
    machine.run([(0, a[:32], 15)])
    machine.share(0, 2, 17)
    whole, shared = machine.run([(0, a, 32), (2, c, 17)])
    for found, tokens in ((whole, a), (shared, c)):
        expected = full_forward(model, tokens)
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


def test_a_backbone_that_is_not_there_is_named(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(CheckpointError, match=r"SGLang .* on mamba; it can on qwen2"):
        Machine(folder, SimpleNamespace(model_type="mamba"))
