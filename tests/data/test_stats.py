import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.data.stats import compute_percentile, compute_stats, downsample
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.errors import DataError, InputError


def make(prompt: str, index: int, length: int, **fields: Any) -> Trajectory:
    values = {
        "schema": "lenvm.trajectory/1",
        "id": f"{prompt}-{index}",
        "prompt_hash": prompt,
        "sample_index": index,
        "prompt_token_ids": [1, 2, 3],
        "completion_token_ids": [5] * length,
        "completion_text": "x",
        "finish_reason": "stop",
        "model": "m",
    }
    return Trajectory(**{**values, **fields})


def write(path: Path, trajectories: list[Trajectory]) -> Path:
    path.write_bytes(b"".join(t.to_json_line() + b"\n" for t in trajectories))
    return path


def test_counts_percentiles_and_truncation_by_domain_and_split():
    rows = [make(f"p{i // 4}", i % 4, i + 1, domain="math") for i in range(100)]
    rows.append(make("q", 0, 50, domain="code", split="test", finish_reason="length"))
    found = compute_stats(rows)
    assert [(g.domain, g.split) for g in found.groups] == [
        ("code", "test"),
        ("math", "train"),
        ("all", "all"),
    ]
    code, math_, whole = found.groups
    assert (code.num_truncated, code.truncated_share) == (1, 1.0)
    assert (math_.num_prompts, math_.num_completions, math_.num_truncated) == (25, 100, 0)
    assert math_.percentiles == {1: 1, 5: 5, 25: 25, 50: 50, 75: 75, 95: 95, 99: 99}
    assert (math_.mean, math_.max, math_.num_tokens) == (50.5, 100, 5050)
    assert (whole.num_prompts, whole.num_tokens) == (26, 5100)
    assert found.completions_per_prompt == (1, 101 / 26, 4)
    assert found.num_prompt_tokens == 303
    assert found.finish_reasons == {"stop": 100, "length": 1}
    assert found.gamma is not None
    assert math.isclose(1 - found.gamma**100, 0.99, abs_tol=1e-9)


def test_no_gamma_without_a_complete_completion():
    assert compute_stats([make("p", 0, 9, finish_reason="length")]).gamma is None
    with pytest.raises(DataError, match="no trajectories"):
        compute_stats([])


@given(st.lists(st.integers(1, 1000), min_size=1), st.floats(0, 100))
def test_a_percentile_is_the_least_length_that_so_many_do_not_exceed(
    lengths: list[int], percent: float
):
    ordered = sorted(lengths)
    found = compute_percentile(ordered, percent)
    share = sum(x <= found for x in ordered) / len(ordered)
    assert share >= percent / 100 - 1e-9
    assert found == ordered[0] or sum(x < found for x in ordered) < percent / 100 * len(ordered)


def test_downsampling_keeps_chosen_prompts_and_completions_nested(tmp_path: Path):
    source = write(tmp_path / "t.jsonl", [make(f"p{i // 8}", i % 8, 5) for i in range(160)])
    ids: dict[tuple[int, int], set[str]] = {}
    for prompts, each in ((5, 2), (5, 4), (10, 4)):
        path = tmp_path / f"{prompts}-{each}.jsonl"
        counts = downsample([source], path, prompts=prompts, per_prompt=each, seed=3)
        assert (counts["prompts"], counts["completions"]) == (prompts, prompts * each)
        assert (counts["prompts_before"], counts["completions_before"]) == (20, 160)
        rows = list(read_trajectories(path))
        assert len({t.prompt_hash for t in rows}) == prompts
        ids[prompts, each] = {t.id for t in rows}
    assert ids[5, 2] < ids[5, 4] < ids[10, 4]
    other = tmp_path / "other.jsonl"
    downsample([source], other, prompts=5, per_prompt=4, seed=4)
    assert {t.id for t in read_trajectories(other)} != ids[5, 4]


def test_downsampling_refuses_what_it_cannot_do(tmp_path: Path):
    source = write(tmp_path / "t.jsonl", [make("p", 0, 5)])
    with pytest.raises(InputError, match="asked for 2 prompts, but there are 1"):
        downsample([source], tmp_path / "o.jsonl", prompts=2)
    with pytest.raises(InputError, match="asked for 3 completions a prompt, but p has 1"):
        downsample([source], tmp_path / "o.jsonl", per_prompt=3)
    with pytest.raises(InputError, match="at least 1"):
        downsample([source], tmp_path / "o.jsonl", prompts=0)
    downsample([source], tmp_path / "o.jsonl", prompts=1)
    assert downsample([source], tmp_path / "o.jsonl", prompts=1)["completions"] == 1
    with pytest.raises(InputError, match="other settings"):
        downsample([source], tmp_path / "o.jsonl", prompts=1, seed=9)
