import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from lenvm.data.completers import parse_retry_after
from lenvm.data.pool import SampleReport, failures_path
from lenvm.data.prompts import Prompt
from lenvm.data.sampler import plan_requests, sample_from_endpoints
from lenvm.data.trajectory import read_trajectories
from lenvm.errors import DataError, EndpointError, InputError
from lenvm.files import read_json, read_jsonl
from serving import serving, tiny_engine
from stub_server import EOS, Stub, stub_server

SRC = str(Path(__file__).parents[2] / "src")
PROMPTS = [Prompt.from_text(f"Question {i}?", domain="math", split="test") for i in range(20)]
DEAD = "http://127.0.0.1:9/v1"
QUICK = {"retries": 2, "backoff_s": 0.01, "patience_s": 0.3}


def sample(path: Path, *stubs: Stub | str, **options: Any) -> SampleReport:
    values: dict[str, Any] = {
        "endpoints": [s if isinstance(s, str) else s.url for s in stubs],
        "n": 3,
        "sampling": {"temperature": 1.0, "max_tokens": 64, "top_k": 0, "seed": 5},
        "concurrency": 8,
        **QUICK,
        **options,
    }
    return sample_from_endpoints(values.pop("prompts", PROMPTS), path, **values)


def ids(path: Path) -> list[str]:
    return [t.id for t in read_trajectories(path)]


class WordEncoder:
    """The stub's own tokenization: words `w<id>`."""

    eos_token_id = EOS

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return [3 + ord(c) % 997 for c in str(prompt.conversation)]

    def encode_text(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_records_hold_the_servers_token_ids_and_all_that_made_them(tmp_path: Path, owner: str):
    path = tmp_path / "t.jsonl"
    with stub_server(owned_by=owner) as stub:
        report = sample(path, stub)
    found = list(read_trajectories(path))
    assert report.num_written == len(found) == len({t.id for t in found}) == 60
    assert report.num_mismatched == report.num_failed == 0
    first = found[0]
    assert (first.domain, first.split, first.model) == ("math", "test", "stub")
    assert [f"w{i}" for i in first.completion_token_ids[:-1]] == first.completion_text.split()
    assert first.completion_token_ids[-1] == EOS
    assert first.usage == {
        "prompt_tokens": len(first.prompt_token_ids),
        "completion_tokens": first.length,
    }
    assert first.sampling["max_tokens"] == 64
    assert first.sampling["n"] == 3
    assert "top_k" not in stub.requests[0]
    assert read_json(tmp_path / "t.jsonl.manifest.json")["kind"] == "trajectories"


def test_a_seed_gives_the_same_completions_and_different_ones_within_a_run(tmp_path: Path):
    with stub_server() as stub:
        for name in ("a", "b"):
            sample(tmp_path / f"{name}.jsonl", stub)
    texts = [
        {t.id: t.completion_text for t in read_trajectories(tmp_path / f"{name}.jsonl")}
        for name in ("a", "b")
    ]
    assert texts[0] == texts[1]
    assert len({r["seed"] for r in stub.requests}) == len(PROMPTS)


def test_a_second_run_adds_only_what_is_missing(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with stub_server() as stub:
        sample(path, stub)
        kept = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(kept[:25]) + kept[25][:40])
        report = sample(path, stub)
        assert (report.num_before, report.num_written) == (25, 35)
        asked = stub.num_requests
        assert sample(path, stub).num_written == 0
        assert stub.num_requests == asked
    assert len(set(ids(path))) == len(ids(path)) == 60


def test_truncated_completions_are_counted_and_marked(tmp_path: Path):
    with stub_server(min_length=10, max_length=10) as stub:
        report = sample(tmp_path / "t.jsonl", stub, sampling={"max_tokens": 4})
    assert report.num_truncated == 60
    found = list(read_trajectories(tmp_path / "t.jsonl"))
    assert {(t.finish_reason, t.length, t.is_complete) for t in found} == {("length", 4, False)}


def test_plain_prompts_use_the_completions_path(tmp_path: Path):
    with stub_server() as stub:
        sample(tmp_path / "t.jsonl", stub, prompts=[Prompt(prompt_text="Once")])
    assert stub.requests[0]["prompt"] == "Once"
    assert next(read_trajectories(tmp_path / "t.jsonl")).prompt_text == "Once"


def test_text_is_retokenised_and_checked_where_there_are_no_ids(tmp_path: Path):
    with stub_server(owned_by="someone", token_ids=False) as stub:
        with pytest.raises(EndpointError, match="returns no token ids; name its tokenizer"):
            sample(tmp_path / "a.jsonl", stub)
        report = sample(tmp_path / "a.jsonl", stub, encoder=WordEncoder())
        assert (report.num_written, report.num_mismatched) == (60, 0)
        stub.usage_error = 1
        report = sample(tmp_path / "b.jsonl", stub, encoder=WordEncoder())
        assert report.num_mismatched == 20
        assert "20 requests whose token ids disagree" in str(report)
        with pytest.raises(DataError, match="disagree with the server's"):
            sample(tmp_path / "c.jsonl", stub, encoder=WordEncoder(), strict=True)
    assert all(t.completion_token_ids[-1] == EOS for t in read_trajectories(tmp_path / "a.jsonl"))
    assert next(read_trajectories(tmp_path / "b.jsonl")).usage is None


def test_a_server_that_takes_no_extensions_is_asked_without_them(tmp_path: Path):
    with stub_server(owned_by="someone", reject_fields=("return_token_ids",)) as stub:
        report = sample(tmp_path / "t.jsonl", stub, encoder=WordEncoder())
    assert (report.num_written, report.num_failed) == (60, 0)
    assert "return_token_ids" not in stub.requests[-1]


def test_controls_are_cycled_in_each_servers_form(tmp_path: Path):
    controls = [{"equal_to": 5}, None]
    fields = {"vllm": "vllm_xargs", "sglang": "custom_params", "lenvm": "length"}
    for owner, field in fields.items():
        path = tmp_path / f"{owner}.jsonl"
        with stub_server(owned_by=owner) as stub:
            sample(path, stub, controls=controls, n=4, encoder=WordEncoder())
        sent = [r[field] for r in stub.requests if field in r]
        expected: Any = {"lenvm": {"equal_to": 5}} if field != "length" else {"equal_to": 5}
        if owner == "vllm":
            expected = {"lenvm": '{"equal_to": 5}'}
        assert sent == [expected] * 20
        assert all(r["n"] == 2 for r in stub.requests)
        found = [t for t in read_trajectories(path) if t.length_control == {"equal_to": 5}]
        assert sorted({t.sample_index for t in found}) == [0, 2]


def test_images_travel_as_data_urls_and_are_recorded_as_paths(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    text = {"type": "text", "text": "What is it?"}
    images = (str(tmp_path / "a.png"),)
    with stub_server() as stub:
        for name, content in {"t": "What is it?", "u": [text, {"type": "image"}]}.items():
            messages = [{"role": "user", "content": content}]
            prompt = Prompt(messages=messages, images=images)
            sample(tmp_path / f"{name}.jsonl", stub, prompts=[prompt])
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}
        sent = [r["messages"][0]["content"] for r in stub.requests]
        assert sent == [[picture, text], [text, picture]]
        record = next(read_trajectories(tmp_path / "u.jsonl"))
        assert (record.images, record.messages) == (list(images), messages)
        lost = Prompt.from_text("Where?", images=(str(tmp_path / "none.png"),))
        with pytest.raises(InputError, match=r"no image file .*none\.png"):
            sample(tmp_path / "v.jsonl", stub, prompts=[lost])


def test_failed_requests_are_retried_then_recorded_counted_and_tried_again(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with stub_server(fail_when="Question 15?") as stub:
        report = sample(path, stub, patience_s=60)
        assert (report.num_written, report.num_failed) == (57, 3)
        assert "3 completions failed" in str(report)
        assert sum("Question 15?" in str(r) for r in stub.requests) == 3
        ((_, failure),) = read_jsonl(failures_path(path))
        assert failure["sample_indices"] == [0, 1, 2]
        assert "HTTP 500: made to fail" in failure["error"]
        stub.fail_when = None
        report = sample(path, stub)
    assert (report.num_before, report.num_written, report.num_failed) == (57, 3, 0)
    assert not failures_path(path).exists()


def test_passing_faults_lose_nothing(tmp_path: Path):
    with stub_server(fail_share=0.2, fail_status=429) as stub:
        report = sample(tmp_path / "t.jsonl", stub, retries=10, backoff_s=0.001, patience_s=60)
    assert (report.num_written, report.num_failed) == (60, 0)


def test_a_server_with_few_places_completes_all_and_no_wait_is_a_failed_attempt(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with serving(tiny_engine(max_requests=4), max_waiting=2) as client:
        url = f"http://127.0.0.1:{client.base_url.port}/v1"
        options: Any = {"n": 2, "concurrency": 16, "retries": 0, "patience_s": 0.0}
        options |= {"prompts": [Prompt.from_text(f"w{i}") for i in range(7, 47)]}
        report = sample(path, url, **options, sampling={"max_tokens": 12})
        assert (report.num_written, report.num_failed) == (80, 0)
        assert report.num_busy > 0
        assert "times a server had no place" in str(report)
        assert len(set(ids(path))) == 80
        # more in one request than there are places for: no waiting helps
        options |= {"n": 8, "prompts": options["prompts"][:3]}
        report = sample(tmp_path / "u.jsonl", url, **options, sampling={"max_tokens": 12})
    assert report.num_failed == 24
    assert "n is 8; allowed: up to the server's 6 places" in str(report)
    assert "ask for fewer completions in one request (--per-request)" in str(report)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(tmp_path: Path, status: int):
    with stub_server(fail_first=3, fail_status=status, retry_after="1") as stub:
        options: Any = {"retries": 0, "patience_s": 0.0, "concurrency": 4}
        begun = time.monotonic()
        report = sample(tmp_path / "t.jsonl", stub, **options)
    assert (report.num_written, report.num_failed, report.num_busy) == (60, 0, 3)
    assert 1 <= time.monotonic() - begun < 10


def test_a_server_that_never_has_a_place_is_set_aside_in_the_end(tmp_path: Path):
    with (
        stub_server(fail_first=10**9, fail_status=429, retry_after="0") as stub,
        pytest.raises(EndpointError, match=r"no place within 0\.3 s: HTTP 429: made to fail"),
    ):
        sample(tmp_path / "t.jsonl", stub, patience_s=60, timeout_s=0.3)


def test_a_request_that_alone_finds_no_place_fails_in_the_end(tmp_path: Path):
    faults: Any = {"fail_when": "Question 15?", "fail_status": 429, "retry_after": "0"}
    with stub_server(delay_s=0.05, **faults) as stub:
        prompts = [PROMPTS[15], *(Prompt.from_text(f"Other {i}?") for i in range(50))]
        options: Any = {"timeout_s": 0.3, "prompts": prompts, "concurrency": 2}
        report = sample(tmp_path / "t.jsonl", stub, **options)
    assert (report.num_written, report.num_failed) == (150, 3)
    assert "HTTP 429: made to fail" in report.first_failure


def test_retry_after_is_seconds_or_a_date():
    assert parse_retry_after("7") == 7
    assert parse_retry_after(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert parse_retry_after(formatdate(time.time() - 30, usegmt=True)) == 0
    assert parse_retry_after("soon") is None
    assert parse_retry_after(None) is None


def test_refused_requests_are_not_repeated_and_a_refused_run_ends_early(tmp_path: Path):
    with stub_server(fail_when="Question 15?", fail_status=400) as stub:
        report = sample(tmp_path / "t.jsonl", stub)
        assert (report.num_failed, stub.num_requests) == (3, 20)
    with (
        stub_server(fail_when="Question", fail_status=422) as stub,
        pytest.raises(EndpointError, match=r"refused each of the first \d+.*made to fail"),
    ):
        sample(tmp_path / "u.jsonl", stub)


def test_a_dead_endpoint_is_named_and_the_others_go_on(tmp_path: Path):
    with stub_server() as stub:
        report = sample(tmp_path / "t.jsonl", DEAD, stub)
    assert report.num_written == 60
    assert f"set aside {DEAD}" in str(report)
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:9.*(refused|failed)"):
        sample(tmp_path / "u.jsonl", DEAD)
    assert not (tmp_path / "u.jsonl").exists()
    for wrong in ("localhost:8000", "http://127.0.0.1:8000v1", "http:///v1"):
        with pytest.raises(InputError, match=r"expected an address such as"):
            sample(tmp_path / "u.jsonl", wrong)


@pytest.mark.parametrize("fault", [{"fail_first": 10**9}, {"truncate_after": 5}])
def test_an_endpoint_that_stops_working_hands_its_requests_over(tmp_path: Path, fault: Any):
    with stub_server(**fault) as bad, stub_server(delay_s=0.02) as good:
        report = sample(tmp_path / "t.jsonl", bad, good, retries=100, backoff_s=0.02)
        assert (report.num_written, report.num_failed) == (60, 0)
        assert list(report.set_aside) == [bad.url]
        assert len(set(ids(tmp_path / "t.jsonl"))) == 60
        with pytest.raises(EndpointError, match="no endpoint"):
            sample(tmp_path / "u.jsonl", bad, retries=100)


def test_a_slow_answer_is_a_time_out(tmp_path: Path):
    with stub_server(delay_s=0.5) as stub:
        values: Any = {"timeout_s": 0.1, "retries": 1, "patience_s": 60, "prompts": PROMPTS[:1]}
        report = sample(tmp_path / "t.jsonl", stub, **values)
        assert report.num_failed == 3
        ((_, failure),) = read_jsonl(failures_path(tmp_path / "t.jsonl"))
        assert failure["error"] == "no answer within the time limit"
        assert failure["num_attempts"] == 2


@pytest.mark.parametrize(
    "answer",
    [
        b'{"error": {"message": "too warm"}}',
        b'{"object": "error", "message": "too warm"}',
        b'{"error": "too warm"}',
        b'{"detail": "too warm"}',
        b"too warm",
        b'["too warm"]',
    ],
)
def test_an_error_is_told_in_the_servers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
):
    monkeypatch.setattr(Stub, "answer", lambda *_: (422, answer))
    with (
        stub_server() as stub,
        pytest.raises(EndpointError, match=r"HTTP 422: [^\n]*too warm"),
    ):
        sample(tmp_path / "t.jsonl", stub)


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b'{"choices": [{'])
def test_what_is_no_json_object_is_tried_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
):
    monkeypatch.setattr(Stub, "_complete", lambda *_, **__: answer)
    with stub_server() as stub:
        report = sample(tmp_path / "t.jsonl", stub, prompts=PROMPTS[:1], patience_s=60)
        assert (report.num_failed, stub.num_requests) == (3, 3)
    ((_, failure),) = read_jsonl(failures_path(tmp_path / "t.jsonl"))
    assert failure["error"] == f"the answer is not a JSON object: {answer!r}"


def test_a_proxy_of_the_environment_is_used_except_where_it_says_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with stub_server() as stub:
        monkeypatch.setenv("http_proxy", f"http://{stub.host}:{stub.port}")
        with pytest.raises(EndpointError, match="no such path"):  # the stub is no proxy
            sample(tmp_path / "t.jsonl", "http://lenvm.invalid/v1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(EndpointError, match="Cannot connect to host 127"):
            sample(tmp_path / "t.jsonl", DEAD)


def test_a_key_that_no_header_can_hold_is_told(tmp_path: Path):
    with stub_server() as stub:
        with pytest.raises(EndpointError, match=r"cannot be asked: .*header"):
            sample(tmp_path / "t.jsonl", stub, api_key="secret\n")
        assert sample(tmp_path / "t.jsonl", stub, api_key="secret").num_written == 60


def test_models_are_asked_for_and_must_agree(tmp_path: Path):
    with stub_server() as one, stub_server(model="other") as two:
        with pytest.raises(InputError, match="different models"):
            sample(tmp_path / "t.jsonl", one, two)
        with pytest.raises(EndpointError, match="serves stub, not qwen"):
            sample(tmp_path / "t.jsonl", one, model="qwen")
        report = sample(tmp_path / "t.jsonl", one, two, model="other")
    assert list(report.set_aside) == [one.url]
    with stub_server(lists_models=False) as stub:
        assert sample(tmp_path / "u.jsonl", stub, model="any").num_written == 60
        with pytest.raises(EndpointError, match="HTTP 404"):
            sample(tmp_path / "v.jsonl", stub)


def test_other_settings_are_refused_with_both_shown(tmp_path: Path):
    with stub_server() as stub:
        sample(tmp_path / "t.jsonl", stub)
        with pytest.raises(InputError, match="n: 3 there, 4 now"):
            sample(tmp_path / "t.jsonl", stub, n=4)
        with pytest.raises(InputError, match="num_prompts: 20 there, 19 now"):
            sample(tmp_path / "t.jsonl", stub, prompts=PROMPTS[1:])
        (tmp_path / "mine.jsonl").write_text("{}\n")
        with pytest.raises(InputError, match=r"without mine\.jsonl\.manifest\.json"):
            sample(tmp_path / "mine.jsonl", stub)


def test_requests_are_planned_lazily_and_resume_by_index():
    done = {PROMPTS[0].prompt_hash: 0b1011}
    requests = plan_requests(
        [PROMPTS[0], PROMPTS[0], PROMPTS[1]],
        done,
        n=6,
        sampling={"seed": 1},
        controls=[None],
        per_request=4,
    )
    planned = list(requests)
    assert [r.indices for r in planned] == [(2, 4, 5), (0, 1, 2, 3), (4, 5)]
    assert len({r.sampling["seed"] for r in planned}) == 3


def test_memory_does_not_grow_with_the_records(tmp_path: Path):
    import tracemalloc

    peaks = []
    with stub_server(keep_requests=False, min_length=30, max_length=30) as stub:
        for name, n in (("warm", 8), ("small", 32), ("large", 128)):  # 32: garbage levels off
            tracemalloc.start()
            values = {"prompts": PROMPTS[:8], "n": n, "per_request": 4, "concurrency": 4}
            sample(tmp_path / f"{name}.jsonl", stub, **values)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[2] < peaks[1] + 300_000
    assert (tmp_path / "large.jsonl").stat().st_size > 600_000


SCRIPT = """
import json, sys
from pathlib import Path
from lenvm.data.prompts import Prompt
from lenvm.data.sampler import sample_from_endpoints
prompts = [Prompt.from_text(f"Question {i}?") for i in range(int(sys.argv[3]))]
sample_from_endpoints(prompts, Path(sys.argv[2]), endpoints=[sys.argv[1]], n=4, per_request=2,
                      sampling={"seed": 1}, concurrency=8)
"""


def start(stub: Stub, path: Path, prompts: int, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, stub.url, str(path), str(prompts)],
        env={**os.environ, "PYTHONPATH": SRC},
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for_growth(path: Path, child: subprocess.Popen[bytes]) -> None:
    size = path.stat().st_size if path.exists() else 0
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_size > size:
            return
        time.sleep(0.005)


def test_kill_9_at_random_moments_loses_and_duplicates_nothing(tmp_path: Path):
    path, chance, kept, num_kills = tmp_path / "t.jsonl", random.Random(0), 0, 0
    with stub_server(delay_s=0.05) as stub:
        for _ in range(30):
            child = start(stub, path, 100)
            wait_for_growth(path, child)
            time.sleep(chance.uniform(0, 0.25))
            child.send_signal(signal.SIGKILL)
            child.communicate()
            num_kills += child.returncode == -signal.SIGKILL
            found = ids(path)
            assert len(found) == len(set(found)) >= kept
            kept = len(found)
            if child.returncode == 0:
                break
    assert num_kills >= 3
    assert kept == 400


def test_ctrl_c_leaves_a_file_that_continues(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with stub_server(delay_s=0.05) as stub:
        child = start(stub, path, 100)
        wait_for_growth(path, child)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=20)
        assert child.returncode != 0
        before = len(ids(path))
        assert 0 < before < 400
        child = start(stub, path, 100)
        child.communicate(timeout=60)
    assert len(set(ids(path))) == len(ids(path)) == 400


def test_a_full_disk_ends_the_run_clearly_and_leaves_whole_lines(tmp_path: Path):
    path = tmp_path / "t.jsonl"

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    with stub_server() as stub:
        child = start(stub, path, 200, preexec_fn=limit_file_size)
        _, error = child.communicate(timeout=60)
        assert child.returncode != 0
        assert f"cannot write {path}: File too large" in error.decode()
        assert path.read_bytes().endswith(b"\n")
        found = ids(path)
        assert 0 < len(found) == len(set(found)) < 800
        child = start(stub, path, 200)
        child.communicate(timeout=60)
    assert len(set(ids(path))) == 800


def test_a_second_writer_is_refused(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    with stub_server(delay_s=0.2) as stub:
        child = start(stub, path, 50)
        wait_for_growth(path, child)
        prompts = [Prompt.from_text(f"Question {i}?") for i in range(50)]
        with pytest.raises(DataError, match="being written by another process"):
            sample(path, stub, prompts=prompts, n=4, sampling={"seed": 1})
        child.kill()
        child.communicate()


def test_an_in_process_completer_fits_the_seam(tmp_path: Path):
    from lenvm.data.completers import Sampled, SampleRequest
    from lenvm.data.sampler import run_sampling

    class Echo:
        name, num_mismatched = "echo", 0

        async def complete(self, request: SampleRequest) -> list[Sampled]:
            await asyncio.sleep(0)
            return [Sampled("a", "stop", [1], [4, EOS]) for _ in request.indices]

        async def close(self) -> None: ...

    path = tmp_path / "t.jsonl"
    report = asyncio.run(run_sampling(PROMPTS, path, [Echo()], model="echo", n=2, sampling={}))
    assert report.num_written == 40
    assert json.loads(path.read_text().splitlines()[0])["completion_token_ids"] == [4, EOS]
