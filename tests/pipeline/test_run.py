import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lenvm.data.trajectory import read_trajectories
from lenvm.errors import DataError, EndpointError, InputError, StageError
from lenvm.files import read_json
from lenvm.pipeline.config import PipelineConfig
from lenvm.pipeline.plan import Node
from lenvm.pipeline.run import run_pipeline
from tiny import tiny_generator, tiny_tokenizer

ROOT = Path(__file__).parents[2]
STUB = str(ROOT / "tests" / "stub_server.py")


@pytest.fixture(autouse=True)
def children_find_lenvm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def server(*arguments: str, **fields: Any) -> dict[str, Any]:
    command = [sys.executable, STUB, "--port", "{port}", *arguments]
    return {"engine": "command", "command": command, "gpus": 0, "ready_timeout_s": 60, **fields}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "folder": str(folder / "run"),
        "servers": {"stub": server()},
        "sample": [{"name": "a", "prompts": "bundled", "server": "stub", "limit": 8, "n": 2}],
        **changes,
    }


def config(folder: Path, **changes: Any) -> PipelineConfig:
    return PipelineConfig.model_validate(values(folder, **changes))


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_servers_come_up_are_asked_and_go_and_a_second_run_does_nothing(tmp_path: Path):
    said: list[str] = []
    before = children_of(os.getpid())  # another test's helper process, say
    two = config(tmp_path, servers={"stub": server(replicas=2)})
    (result,) = run_pipeline(two, say=said.append)
    assert not result.was_done
    path = tmp_path / "run" / "trajectories" / "a.jsonl"
    assert len(list(read_trajectories(path))) == 16
    assert sum("ready after" in line for line in said) == 1
    assert any("stopping" in line for line in said)
    mark = read_json(tmp_path / "run" / "stages" / "sample-a.done.json")
    assert mark["command"].count("--endpoint http://127.0.0.1:") == 2
    assert children_of(os.getpid()) == before
    said.clear()
    (again,) = run_pipeline(config(tmp_path), say=said.append)
    assert again.was_done
    assert said == ["sample-a: done"]


def test_changed_settings_are_refused_before_anything_starts(tmp_path: Path):
    run_pipeline(config(tmp_path))
    sample = {"name": "a", "prompts": "bundled", "server": "stub", "limit": 8, "n": 2}
    said: list[str] = []
    for change, message in (
        ({"n": 3}, r"n: 2 there, 3 now"),
        ({"temperature": 0.5}, r"temperature: null there, 0\.5 now"),
    ):
        with pytest.raises(InputError, match=message):
            run_pipeline(config(tmp_path, sample=[{**sample, **change}]), say=said.append)
    assert not said
    run_pipeline(config(tmp_path, sample=[{**sample, "concurrency": 3}]))
    (tmp_path / "run" / "trajectories" / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"marked as done, but .*a\.jsonl is gone"):
        run_pipeline(config(tmp_path))


def test_a_server_that_does_not_come_up_is_named_with_its_log(tmp_path: Path):
    before = children_of(os.getpid())
    bad = {"engine": "command", "gpus": 0}
    python = [sys.executable, "-c"]
    dies = {**bad, "command": [*python, "print('no such weights'); raise SystemExit(3)"]}
    with pytest.raises(EndpointError, match=r"exit code 3 before it answered:\n.*no such weights"):
        run_pipeline(config(tmp_path, servers={"stub": dies}))
    hangs = {**bad, "command": [*python, "import time; time.sleep(60)"], "ready_timeout_s": 0.5}
    with pytest.raises(EndpointError, match="did not answer within"):
        run_pipeline(config(tmp_path, servers={"stub": hangs}))
    assert children_of(os.getpid()) == before
    with pytest.raises(InputError, match="server stub needs no-such-program"):
        run_pipeline(config(tmp_path, servers={"stub": {**bad, "command": ["no-such-program"]}}))
    run_pipeline(config(tmp_path))  # with a good one it goes on


def test_a_failing_stage_ends_the_run_and_what_was_done_stays(tmp_path: Path):
    good = values(tmp_path)["sample"][0]
    prompts = tmp_path / "p.jsonl"
    bad = {"name": "b", "prompts": str(prompts), "server": "stub"}
    said: list[str] = []
    with pytest.raises(DataError, match=r"not there:\n  sample-b: .*p\.jsonl"):
        run_pipeline(config(tmp_path, sample=[good, bad]), say=said.append)
    assert not said
    prompts.write_text("no JSON")
    with pytest.raises(StageError, match="sample-b failed with exit code 3"):
        run_pipeline(config(tmp_path, sample=[good, bad]))
    assert (tmp_path / "run" / "stages" / "sample-a.done.json").exists()
    prompts.write_text('{"prompt": "mended"}\n')
    with pytest.raises(InputError, match="prompt_files"):
        run_pipeline(config(tmp_path, sample=[good, bad]))


def test_failed_completions_end_the_run_beyond_what_is_allowed(tmp_path: Path):
    prompts = tmp_path / "p.jsonl"
    texts = ["fine", "better", "cursed", "best"]
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    stub = server("--fail-when", "cursed")
    sample = {"name": "a", "prompts": str(prompts), "server": "stub", "n": 1, "retries": 0}
    with pytest.raises(StageError, match=r"1 of 4 completions failed, more than max_failed = 0"):
        run_pipeline(config(tmp_path, servers={"stub": stub}, sample=[sample]))
    sample["max_failed"] = 0.25
    run_pipeline(config(tmp_path, servers={"stub": stub}, sample=[sample]))
    assert read_json(tmp_path / "run" / "stages" / "sample-a.done.json")["num_failed"] == 1


def test_one_run_at_a_time(tmp_path: Path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".run.0.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being run by another process"):
            run_pipeline(config(tmp_path))


def start_slow(tmp_path: Path) -> tuple["subprocess.Popen[bytes]", Path]:
    """A run whose server takes its time, in a process of its own."""
    slow = server("--delay", "0.25")
    sample = {**values(tmp_path)["sample"][0], "limit": 16, "concurrency": 2, "n": 1}
    lines = [
        f'folder = "{tmp_path / "run"}"',
        f"[servers.stub]\nengine = 'command'\ngpus = 0\ncommand = {json.dumps(slow['command'])}",
        "[[sample]]",
        *(f"{key} = {json.dumps(value)}" for key, value in sample.items()),
    ]
    (tmp_path / "p.toml").write_text("\n".join(lines))
    argv = [sys.executable, "-m", "lenvm", "run", str(tmp_path / "p.toml")]
    return subprocess.Popen(argv, stderr=subprocess.PIPE), tmp_path / "run"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_process_and_continues(tmp_path: Path, how: signal.Signals):
    run, folder = start_slow(tmp_path)
    path = folder / "trajectories" / "a.jsonl"
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") >= 3)
    children = children_of(run.pid)
    assert len(children) == 2  # the server and the stage
    run.send_signal(how)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == (-9 if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert b"interrupted; what was finished is kept" in errors
    wait_for(lambda: not any(is_alive(pid) for pid in children))
    before = [line for line in path.read_bytes().split(b"\n") if line.endswith(b"}")]
    assert 3 <= len(before) < 16
    again, _ = start_slow(tmp_path)
    assert again.wait(120) == 0
    again.communicate()
    after = path.read_bytes().split(b"\n")
    assert after[: len(before)] == before
    assert len({t.id for t in read_trajectories(path)}) == 16


def test_two_machines_share_a_run(tmp_path: Path):
    """Machine 1 samples its shard first; machine 0 its own, and alone what is one machine's."""
    sample = values(tmp_path)["sample"]
    both = config(tmp_path, sample=sample)
    second = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, json; from lenvm.pipeline.config import PipelineConfig as P;"
            "from lenvm.pipeline.plan import Node; from lenvm.pipeline.run import run_pipeline;"
            "run_pipeline(P.model_validate(json.loads(sys.argv[1])), node=Node(1, 2))",
            json.dumps(values(tmp_path, sample=sample)),
        ]
    )
    run_pipeline(both, node=Node(0, 2))
    assert second.wait(60) == 0
    folder = tmp_path / "run" / "trajectories"
    parts = [folder / f"a.{i}-of-2.jsonl" for i in range(2)]
    ids = [{t.id for t in read_trajectories(part)} for part in parts]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 16
    with pytest.raises(InputError, match="machines: 2 there, 1 now"):
        run_pipeline(both)


def test_the_tiny_recipe_runs_from_prompts_to_a_report(tmp_path: Path):
    tiny_generator(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = [f"folder={tmp_path / 'run'}", f"generator={tmp_path / 'model'}"]
    settings += ["sample.bundled.limit=40", "sample.bundled.n=2", "train.epochs=1"]
    recipe = PipelineConfig.load(ROOT / "recipes" / "tiny.toml", settings)
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate[:1]})  # one is enough here
    results = run_pipeline(recipe)
    assert not any(result.was_done for result in results)
    folder = tmp_path / "run"
    assert (folder / "model" / "value_head.safetensors").exists()
    summary = read_json(folder / "evaluations" / "prediction" / "summary.json")
    assert summary["num_prompts"] > 0
    assert "A tiny run" in (folder / "report.html").read_text()
    assert all(result.was_done for result in run_pipeline(recipe))
    for path in (folder / "stages").glob("sample-bundled.*"):  # sampled anew: what follows is stale
        path.unlink()
    (folder / "stages" / "sample-bundled.done.json").write_text(
        json.dumps({"schema": "lenvm.stage/1", "product_id": "another"})
    )
    with pytest.raises(InputError, match="product of sample-bundled"):
        run_pipeline(recipe)
