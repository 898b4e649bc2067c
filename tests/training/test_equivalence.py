"""Packed, padded, shared-prompt and single-sequence runs are the same computation."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lenvm.training.attention as attention
from lenvm.data.dataset import Sequences
from lenvm.data.packing import PackedBatch, Packing, pack, pad
from lenvm.errors import InputError, TrainingError
from lenvm.model.head import HeadName
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from lenvm.training.model import PackedModel, compile_layers
from lenvm.training.objective import Objective, States
from tiny import tiny_backbone
from training.test_trainer import trajectory


def family(num_prompts: int = 3, per_prompt: int = 3, seed: int = 0) -> Sequences:
    """Completions of several prompts, of mixed lengths, a few cut off."""
    random = np.random.default_rng(seed)
    rows = []
    for i, sample in itertools.product(range(num_prompts), range(per_prompt)):
        prompt = np.random.default_rng(seed + i).integers(3, 60, 2 + 5 * i).tolist()
        length = int(random.integers(1, 40))
        rows.append(
            trajectory(
                i,
                length,
                "train",
                id=f"{i:016x}-{sample}",
                sample_index=sample,
                prompt_token_ids=prompt,
                completion_token_ids=random.integers(3, 60, length).tolist(),
                finish_reason="length" if (i + sample) % 4 == 3 else "stop",
            )
        )
    return Sequences.from_trajectories(rows, censoring="one_sided")


def gradients(
    model: PackedModel, batches: list[PackedBatch], objective: Objective
) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        value_model = model.value_model
        loss = objective.sum(value_model.head, model(batch), States.of(batch), 0.95)
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(
    model: PackedModel, one: list[PackedBatch], other: list[PackedBatch], objective: Objective
) -> None:
    a, a_grads = gradients(model, one, objective)
    b, b_grads = gradients(model, other, objective)
    assert a == pytest.approx(b, rel=1e-5)
    assert len(a_grads) == len(b_grads) > 10
    for x, y in zip(a_grads, b_grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("head", ["scalar", "distribution"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_padded_shared_and_single_give_the_same_loss_and_gradients(
    kind: str, head: HeadName
):
    sequences = family()
    rows = list(range(len(sequences)))
    model = PackedModel(
        LengthValueModel.build(tiny_backbone(kind), LenVMConfig(gamma=0.95, head=head))
    )
    objective = Objective(censoring="one_sided")
    packed = [pack(sequences, rows)]
    assert_same(model, packed, [pack(sequences, [i]) for i in rows], objective)
    assert_same(model, packed, [pad(sequences, rows)], objective)
    shared = pack(sequences, rows[::-1], share_prompts=True)
    assert shared.input_ids.numel() < packed[0].input_ids.numel()
    assert_same(model, packed, [shared], objective)


def test_lambda_returns_and_bootstrap_see_one_completion_at_a_time():
    sequences = family(seed=3)
    rows = list(range(len(sequences)))
    model = PackedModel(LengthValueModel.build(tiny_backbone(), LenVMConfig(gamma=0.95)))
    for objective in (
        Objective(lambda_=0.7, censoring="bootstrap"),
        Objective(target="log_length", censoring="bootstrap"),
        Objective(lambda_=0.9, censoring="one_sided", include_eos=True),
    ):
        packed = [pack(sequences, rows)]
        assert_same(model, packed, [pack(sequences, [i]) for i in rows], objective)


TARGETS = ("discounted_return", "length", "normalized_length", "log_length")
OBJECTIVES = [
    ("scalar", {"target": t, "loss": x, "censoring": c})
    for t, x in [*itertools.product(TARGETS, ("mse", "huber")), ("discounted_return", "bce")]
    for c in ("one_sided", "bootstrap")
]
OBJECTIVES += [
    ("scalar", {"relative": True, "target": "length", "censoring": "one_sided"}),
    ("scalar", {"include_eos": True, "loss": "bce", "censoring": "one_sided"}),
    ("scalar", {"lambda_": 0.7, "censoring": "bootstrap"}),
    ("scalar", {"lambda_": 0.0, "include_eos": True, "censoring": "one_sided"}),
    *(
        (head, {"aggregation": a, "censoring": "one_sided"})
        for head in ("scalar", "distribution")
        for a in ("sequence_mean", "sequence_sum")
    ),
    ("distribution", {"smoothing": 0.1, "censoring": "one_sided"}),
]


@pytest.mark.parametrize(
    ("head", "options"), OBJECTIVES, ids=lambda o: o if isinstance(o, str) else str(o.values())
)
def test_every_objective_is_the_same_packed_padded_shared_and_single(
    head: HeadName, options: dict[str, Any]
):
    sequences = family(num_prompts=2, per_prompt=3)
    assert not sequences.complete.all()
    rows = list(range(len(sequences)))
    backbone = tiny_backbone(num_hidden_layers=1)
    model = PackedModel(LengthValueModel.build(backbone, LenVMConfig(gamma=0.95, head=head)))
    objective = Objective(**options, length_scale=40.0)
    packed = [pack(sequences, rows)]
    for other in (
        [pack(sequences, [i]) for i in rows],
        [pad(sequences, rows[:4]), pad(sequences, rows[4:])],
        [pack(sequences, rows, share_prompts=True)],
    ):
        assert_same(model, packed, other, objective)


def test_a_sliding_window_is_kept_inside_a_sequence():
    backbone = tiny_backbone(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0, num_hidden_layers=3
    )
    sequences = family()
    rows = list(range(len(sequences)))
    model = PackedModel(LengthValueModel.build(backbone, LenVMConfig(gamma=0.95)))
    ids = torch.from_numpy(sequences.tokens(7).astype(np.int64)).unsqueeze(0)
    single = pack(sequences, [7])
    with torch.no_grad():
        ours = model(single)
        backbone.config._attn_implementation = "eager"
        theirs = model.value_model(ids)[0][single.state_index]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    backbone.config._attn_implementation = attention.NAME
    many = [pack(sequences, [i]) for i in rows]
    assert_same(model, [pack(sequences, rows, share_prompts=True)], many, Objective())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_segments_attend_to_their_keys_only(data: st.DataObject):
    """Any layout of queries and keys equals one dense masked attention."""
    segments = data.draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4)
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    queries = [q for q, _ in segments]
    keys = [q + more for q, more in segments]
    num = sum(queries)
    index, mask, place = [], torch.full((num, sum(keys)), -torch.inf), 0
    for j, (q, k) in enumerate(zip(queries, keys, strict=True)):
        index += torch.randint(num, (k,)).tolist()
        for query in range(q):
            mask[sum(queries[:j]) + query, place : place + k - q + query + 1] = 0.0
        place += k
    cu = [torch.tensor([0, *np.cumsum(x)], dtype=torch.int32) for x in (queries, keys)]
    packing = Packing(cu[0], cu[1], torch.tensor(index), max(queries), max(keys))
    q = torch.randn(1, 4, num, 8)
    k, v = torch.randn(1, 2, num, 8), torch.randn(1, 2, num, 8)
    ours, _ = attention.packed_attention(None, q, k, v, None, packing=packing)
    wide = [x[:, :, index].repeat_interleave(2, 1) for x in (k, v)]
    dense = ((q @ wide[0].mT) * 8**-0.5 + mask).softmax(-1) @ wide[1]
    torch.testing.assert_close(ours, dense.transpose(1, 2), rtol=1e-4, atol=1e-5)


def sdpa_varlen(q, k, v, cu_q, cu_k, window):  # type: ignore[no-untyped-def]
    outs = []
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True
    ):
        parts = (x.transpose(0, 1).unsqueeze(0) for x in (q[a:b], k[c:d], v[c:d]))
        outs.append(attention._causal(*parts, None, window, 0.0)[0].transpose(0, 1))
    return torch.cat(outs)


def test_the_kernel_is_called_in_either_torchs_way():
    """Stand-ins with the signatures of torch 2.13 and of an older one without grouped queries."""
    q, k = torch.randn(7, 4, 8), torch.randn(7, 2, 8)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    packing = Packing(cu, cu, None, 4, 4)
    seen = {}

    def new(query, key, value, cu_q, cu_k, mq, mk, *, scale=None, window_size, enable_gqa=False):  # type: ignore[no-untyped-def]
        assert key.shape[1] == 2
        assert enable_gqa
        seen["new"] = window_size
        left = window_size[0]
        return sdpa_varlen(query, key, value, cu_q, cu_k, None if left < 0 else left + 1)

    def old(query, key, value, cu_q, cu_k, mq, mk, is_causal=False):  # type: ignore[no-untyped-def]
        assert key.shape[1] == 4
        assert is_causal
        return sdpa_varlen(query, key, value, cu_q, cu_k, None)

    args = (q, k, k, packing, 8**-0.5)
    a, b = (attention.bind_kernel(f)(*args, None) for f in (new, old))
    torch.testing.assert_close(a, b)
    assert seen["new"] == (-1, 0)
    windowed = attention.bind_kernel(new)(*args, 2)
    assert seen["new"] == (1, 0)
    assert not torch.allclose(windowed, a)
    with pytest.raises(TrainingError, match="window"):
        attention.bind_kernel(old)(*args, 2)
    with pytest.raises(TrainingError, match="neither"):
        attention.bind_kernel(lambda q: q)


def test_attention_that_is_not_computed_is_refused():
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(InputError, match="soft-capped"):
        attention.packed_attention(None, x, x, x, None, softcap=30.0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo reads .grad of every input
def test_compiled_layers_agree():
    """Traced, not code-generated; on the CPU attention breaks the graph. Any number of tokens."""
    sequences = family()
    rows = list(range(len(sequences)))
    plain, compiled = (
        PackedModel(LengthValueModel.build(tiny_backbone(), LenVMConfig(gamma=0.95)))
        for _ in range(2)
    )
    compiled.load_state_dict(plain.state_dict())
    compile_layers(compiled.value_model.backbone, backend="aot_eager")
    for chosen in (rows, rows[:3], rows[4:]):
        a, a_grads = gradients(plain, [pack(sequences, chosen)], Objective())
        b, b_grads = gradients(compiled, [pack(sequences, chosen)], Objective())
        assert a == pytest.approx(b, rel=1e-5)
        for x, y in zip(a_grads, b_grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
