import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lenvm.data.prompts import Prompt
from lenvm.data.sampler import sample_from_endpoints
from lenvm.data.trajectory import read_trajectories
from lenvm.errors import EndpointError, InputError
from stub_server import Stub, stub_server
from tiny import tiny_tokenizer

PROMPTS = [Prompt.from_text(f"w8 w{10 + i}") for i in range(20)]


def run(stub: Stub, path: Path, **options: Any) -> str:
    values: dict[str, Any] = {
        "endpoints": [stub.url],
        "model": "m",
        "n": 3,
        "sampling": {"temperature": 1.0, "max_tokens": 9, "seed": 5},
        "concurrency": 4,
        **options,
    }
    return sample_from_endpoints(PROMPTS, path, **values)


def ids(path: Path) -> list[str]:
    return [t.id for t in read_trajectories(path)]


def test_every_completion_once_with_the_servers_token_ids(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with stub_server() as stub:
        assert "60 completions added to 0" in run(stub, path)
        assert "0 completions added to 60" in run(stub, path)
    found = list(read_trajectories(path))
    assert len({t.id for t in found}) == len(found) == 60
    assert all(t.completion_token_ids[-1] == 2 and t.is_complete for t in found)
    assert found[0].prompt_token_ids == [4, 9, 5]
    assert stub.requests[0]["return_token_ids"] is True


def test_a_server_without_token_ids_needs_the_tokenizer(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    with stub_server(token_ids=False) as stub:
        assert "60 failed" in run(stub, tmp_path / "a.jsonl")
        report = run(stub, tmp_path / "b.jsonl", tokenizer=str(tmp_path / "tok"))
    assert "60 re-tokenised" in report
    assert next(read_trajectories(tmp_path / "b.jsonl")).completion_token_ids[-1] == 2


def test_a_failed_request_is_recorded_counted_and_tried_again(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with stub_server(fail_when="w15") as stub:
        assert "57 completions added to 0; 3 failed" in run(stub, path)
        assert "made to fail" in (tmp_path / "t.jsonl.failed.jsonl").read_text()
    with stub_server() as stub:
        assert "3 completions added to 57" in run(stub, path)
    assert len(ids(path)) == 60


def test_a_dead_endpoint_is_named_and_the_others_go_on(tmp_path: Path):
    dead = "http://127.0.0.1:9/v1"
    with stub_server(delay_s=0.02) as stub:
        report = run(stub, tmp_path / "t.jsonl", endpoints=[dead, stub.url])
    assert "60 completions added" in report
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:9.*run the same command again"):
        run(stub, tmp_path / "u.jsonl", endpoints=[dead])
    with pytest.raises(InputError, match="expected a URL"):
        run(stub, tmp_path / "v.jsonl", endpoints=["localhost:80"])


def test_other_settings_are_refused_with_both_shown(tmp_path: Path):
    with stub_server() as stub:
        run(stub, tmp_path / "t.jsonl")
        with pytest.raises(InputError, match="n: 3 there, 4 now"):
            run(stub, tmp_path / "t.jsonl", n=4)


def test_controls_are_cycled_and_recorded(tmp_path: Path):
    controls = [{"equal_to": 5}, {"at_most": 7}]
    with stub_server() as stub:
        run(stub, tmp_path / "t.jsonl", controls=controls, n=4, wire="vllm")
    sent = sorted(str(r["vllm_xargs"]) for r in stub.requests)
    assert len(sent) == 80
    assert sent[0] == "{'lenvm': '{\"at_most\": 7}'}"
    found = [t.length_control for t in read_trajectories(tmp_path / "t.jsonl")]
    assert found.count({"equal_to": 5}) == found.count({"at_most": 7}) == 40


SCRIPT = """
import sys
from pathlib import Path
from lenvm.data.prompts import Prompt
from lenvm.data.sampler import sample_from_endpoints
prompts = [Prompt.from_text(f"w8 w{10 + i} x{i}") for i in range(150)]
sample_from_endpoints(prompts, Path(sys.argv[2]), endpoints=[sys.argv[1]], model="m", n=4,
                      sampling={"seed": 1}, concurrency=8)
"""


def test_kill_9_loses_no_finished_completion_and_duplicates_none(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    generator = random.Random(0)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    kept = 0
    with stub_server(delay_s=0.05) as stub:
        for _ in range(20):
            child = subprocess.Popen([sys.executable, "-c", SCRIPT, stub.url, str(path)], env=env)
            deadline = time.monotonic() + 30
            before = path.stat().st_size if path.exists() else 0
            while child.poll() is None and time.monotonic() < deadline:
                if path.exists() and path.stat().st_size > before:
                    time.sleep(generator.uniform(0, 0.3))
                    child.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.01)
            child.wait()
            found = ids(path)
            assert len(found) == len(set(found)) >= kept
            kept = len(found)
            if child.returncode == 0:
                break
    assert kept == 600
