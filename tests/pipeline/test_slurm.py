"""The Slurm template with stand-ins for Slurm's commands: what machines run, and re-queueing."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm.sh"
SCONTROL = """
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >>"$RECORD/scontrol"; fi
"""
SRUN = """
trap 'kill -TERM $(jobs -p); wait; exit 143' TERM
[ "$1" = --kill-on-bad-exit=1 ] || exit 64
shift
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & done
for job in $(jobs -p); do wait "$job" || exit $?; done
"""
LENVM = """
trap 'echo ended >>"$RECORD/ended-$SLURM_NODEID"; exit 143' TERM
printf '%s\\n' "$@" >"$RECORD/lenvm-$SLURM_NODEID"
[ "$MODE" = fail ] && exit 7
[ "$MODE" = wait ] && while :; do sleep 0.05; done
exit 0
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two machines."""
    for name, body in (("scontrol", SCONTROL), ("srun", SRUN), ("lenvm", LENVM)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("#!/bin/bash" + body)
        file.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(tmp_path),
        "MODE": "end",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
    }


def test_every_machine_runs_its_part_of_the_recipe(slurm: dict[str, str], tmp_path: Path):
    subprocess.run(["bash", SCRIPT, "r.toml", "folder=/a b", "x=1"], env=slurm, check=True)
    for node in (0, 1):
        given = (tmp_path / f"lenvm-{node}").read_text().splitlines()
        meeting = ["--head", "node-a", "--port", "24711"]
        assert given == ["run", "r.toml", "folder=/a b", "x=1", "--machine", f"{node}/2", *meeting]


def test_those_are_options_of_lenvm_run(slurm: dict[str, str], tmp_path: Path):
    from lenvm.cli import main

    subprocess.run(["bash", SCRIPT, str(tmp_path / "none.toml")], env=slurm, check=True)
    given = (tmp_path / "lenvm-1").read_text().splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lenvm", *given])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 3  # the recipe is not there: the options were understood


def test_a_failing_machine_fails_the_job(slurm: dict[str, str]):
    done = subprocess.run(["bash", SCRIPT, "r.toml"], env={**slurm, "MODE": "fail"}, check=False)
    assert done.returncode == 7


def test_a_job_near_its_time_limit_ends_its_stages_and_is_queued_again(
    slurm: dict[str, str], tmp_path: Path
):
    job = subprocess.Popen(["bash", SCRIPT, "r.toml"], env={**slurm, "MODE": "wait"})
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"lenvm-{node}").exists() for node in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert all((tmp_path / f"ended-{node}").exists() for node in (0, 1))


def test_without_a_recipe_it_says_how_to_call_it(slurm: dict[str, str]):
    done = subprocess.run(["bash", SCRIPT], env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
