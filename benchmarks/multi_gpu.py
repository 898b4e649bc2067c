"""Two GPUs against one: training under the shipped layouts, guided vLLM, sampling.

    python benchmarks/multi_gpu.py train  --model model.gguf --data gsm8k/train.jsonl
    python benchmarks/multi_gpu.py profile --model ... --data ...    (five layouts, 20 s each)
    python benchmarks/multi_gpu.py resume --model ... --data ...     (after train)
    python benchmarks/multi_gpu.py serve  --model ...
    python benchmarks/multi_gpu.py sample --model ...

Each part is a call of its own and writes its part of --out after each point. `train` runs `lenvm
train` on one GPU, then on two under configs/*.yaml, with the same global batches.
`resume` kills an FSDP2 run at its first checkpoint, goes on under DDP, and loads the outcome
plainly. `serve` compares vLLM on one GPU, with tensor parallel 2 and data parallel 2; the value
model stands on rank 0 of a tensor-parallel group, and on each rank of a data-parallel one. `sample`
gives `lenvm sample` one endpoint, then two. `--dry-run` plays all of it on a CPU with tiny models.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import engines_checks as checks  # noqa: E402
import engines_setup as setup  # noqa: E402
from engines_process import Engine  # noqa: E402
from lenvm.files import read_json, read_jsonl, write_json  # noqa: E402

NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
}
"""It can put the host's GPUs out of service."""
ZERO3 = {
    "zero3": {},
    "zero3_at_end": {"reduce_bucket_size": 10**9},
    "zero3_hooks": {"stage3_max_live_parameters": 10**8},
}
"""The shipped ZeRO-3; with its gradients in one bucket, reduced when the last backward has ended;
and its weights shared out and fetched module by module, as those of models that do not fit are."""
LAYOUTS = ("ddp", "fsdp2_one_unit", "fsdp2_kept", "fsdp2")
"""On two GPUs, where a step's time is compared. FSDP2 gathers weights 1, 25 and 98 times a step of
two micro batches of 24 layers."""
CONTROL = {"equal_to": 512, "rule": "soft", "strict": False, "top_k": 15, "top_p": 1.0}


class Call:
    """One part: its options, its clock, its place in the result file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.part, self.is_dry = arguments, arguments.part, arguments.dry_run
        self.work, self.out = Path(arguments.work), Path(arguments.out)
        self.work.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        on_gpu = torch.cuda.is_available()
        self.found: dict[str, Any] = {
            "is_dry_run": self.is_dry,
            "command": " ".join(["python", *sys.argv]),
            "commit": arguments.commit,
            "hardware": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
            if on_gpu
            else platform.processor() or "CPU",
            "versions": setup.versions() | find_versions("accelerate", "deepspeed"),
        }

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def save(self) -> None:
        whole = read_json(self.out) if self.out.exists() else {"schema": "lenvm.multi_gpu/1"}
        write_json(self.out, {**whole, self.part: self.found})

    def env(self, gpus: str = "0,1") -> dict[str, str]:
        path = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": ":".join(path), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        own["CUDA_VISIBLE_DEVICES"] = "" if self.is_dry else gpus
        own["OMP_NUM_THREADS"] = "1" if self.is_dry else "8"
        return {**os.environ, **NO_MULTICAST, **own}

    def model(self) -> Path:
        """The generator's folder."""
        from lenvm.model.bundled import resolve_model

        if not self.is_dry:
            return Path(resolve_model(self.arguments.model))
        sys.path.append(str(ROOT / "tests"))
        from tiny import tiny_generator, tiny_tokenizer

        folder = self.work / "tiny"
        if not folder.exists():
            tiny_generator(num_hidden_layers=2).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return folder

    def wait_for(self, url: str, child: subprocess.Popen[bytes], timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and child.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/models", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1.0)
        raise RuntimeError(f"{url} did not come up; its log says why")


def find_versions(*names: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# -- training -------------------------------------------------------------------------------------


def write_trajectories(model: Path, source: Path | None, path: Path, num_tokens: int) -> None:
    """Questions with their given answers as completions, until there are `num_tokens` to train on.

    source: JSON lines with `question` and `answer` (GSM8K); None makes some up.
    """
    from lenvm.model.tokenization import encode_prompt, find_eos_token_ids, load_tokenizer

    tokenizer = load_tokenizer(str(model))
    end = find_eos_token_ids(str(model), tokenizer)[0]
    rows = [
        {  # in words of the tests' tokenizer
            "question": " ".join(f"w{10 + int(digit)}" for digit in str(i)),
            "answer": " ".join(f"w{20 + n}" for n in range(1 + i % 40)),
        }
        for i in range(1, 400)
    ]
    if source is not None:
        rows = [row for _, row in read_jsonl(source)]
    total, lines = 0, []
    for number, row in enumerate(rows):
        is_held_out = number % 20 == 0
        messages = [{"role": "user", "content": row["question"]}]
        prompt = encode_prompt(tokenizer, messages)
        answer = [*tokenizer(row["answer"], add_special_tokens=False).input_ids, end]
        key = hashlib.sha256(row["question"].encode()).hexdigest()[:16]
        lines.append(
            {
                "schema": "lenvm.trajectory/1",
                "id": f"{key}-0",
                "prompt_hash": key,
                "sample_index": 0,
                "domain": "math",
                "split": "validation" if is_held_out else "train",
                "messages": messages,
                "prompt_token_ids": prompt,
                "completion_token_ids": answer,
                "completion_text": row["answer"],
                "finish_reason": "stop",
                "model": "given answers",
            }
        )
        total += 0 if is_held_out else len(prompt) + len(answer)
        if total >= num_tokens:
            break
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def prepare_training(call: Call) -> dict[str, Any]:
    """The settings of every run: about `--steps` optimizer steps, where they are of 4 micro
    batches."""
    options = call.arguments
    model, data = call.model(), call.work / "train.jsonl"
    micro = 512 if call.is_dry else options.batch_tokens
    if not data.exists():
        wanted = math.ceil(options.steps * 4 * micro / options.epochs)  # one file for all runs
        write_trajectories(model, options.data, data, wanted)
    return {
        "data": [str(data)],
        "backbone": str(model),
        "batch_tokens": micro,
        "accumulation": options.accumulation,
        "epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "precision": "bf16",
        "compile": options.compile,
    }


def start_training(
    call: Call,
    name: str,
    settings: dict[str, Any],
    layout: str | None,
    profile: Path | None = None,
) -> tuple[subprocess.Popen[bytes], Path]:
    """`lenvm train` in processes of its own, under a shipped layout where one is named; `profile`:
    looked at for a few steps, then ended."""
    log = call.work / f"{name}.log"
    settings = {**settings, "output": str(call.work / name)}
    config = call.work / f"{name}.json"
    write_json(config, settings)
    what = ["-m", "lenvm", "train"]
    for key, value in settings.items():
        what += ["--set", f"{key}={json.dumps(value)}"]
    if call.is_dry:  # accelerate knows FSDP on GPUs alone; the tests' script lets it have CPUs
        what = [str(ROOT / "tests/training/run_training.py"), str(config)]
    if profile is not None:
        what = [str(ROOT / "benchmarks/multi_gpu_profile.py"), str(config), str(profile)]
    launcher = []
    if layout is not None:
        port = str(20_000 + os.getpid() % 20_000 + len(name))
        launcher = ["-m", "accelerate.commands.launch", "--main_process_port", port]
        launcher += ["--config_file", find_layout(call, layout), "--num_processes", "2"]
    env = call.env("0,1" if layout else "0")
    with log.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, *launcher, *what],
            env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return child, log


def find_layout(call: Call, name: str) -> str:
    """The shipped file. `fsdp2_kept`: fsdp2.yaml with the weights kept gathered during a step;
    `ZERO3`: zero3.yaml with other settings of DeepSpeed."""
    path = call.work / f"{name}.yaml"
    if own := ZERO3.get(name):
        settings = read_json(ROOT / "configs/zero3.json")
        settings["zero_optimization"] |= own
        write_json(path.with_suffix(".zero.json"), settings)
        text = (ROOT / "configs/zero3.yaml").read_text()
        path.write_text(text.replace("configs/zero3.json", str(path.with_suffix(".zero.json"))))
        return str(path)
    if name != "fsdp2_kept":
        return f"configs/{name}.yaml"
    key = "fsdp_reshard_after_forward"
    text = (ROOT / "configs/fsdp2.yaml").read_text()
    assert f"{key}: true" in text
    path.write_text(text.replace(f"{key}: true", f"{key}: false"))
    return str(path)


def finish_training(child: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    try:
        code = child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
    if code:
        text = log.read_text(errors="replace")
        errors = [line for line in text.splitlines() if "rror" in line][-8:]
        raise RuntimeError(f"exit {code}: " + " | ".join(errors) + "\n" + text[-3000:])


def read_losses(call: Call, name: str) -> dict[str, list[float]]:
    rows = [row for _, row in read_jsonl(call.work / f"{name}.metrics.jsonl")]
    return {
        "loss": [row["loss"] for row in rows if "loss" in row],
        "eval_loss": [row["eval_loss"] for row in rows if "eval_loss" in row],
    }


def relative_differences(left: list[float], right: list[float]) -> list[float]:
    """Of two runs' losses, step by step."""
    return [(b - a) / abs(a) for a, b in zip(left, right, strict=True)]


def worst_difference(left: list[float], right: list[float]) -> float:
    return max(map(abs, relative_differences(left, right)))


def train(call: Call) -> None:
    settings = {**prepare_training(call), "evals": 1}
    otherwise = {
        "batch_tokens": settings["batch_tokens"] // 2,
        "accumulation": 2 * settings["accumulation"],
    }
    runs: dict[str, tuple[str | None, dict[str, Any]]] = {
        "one": (None, {}),
        "one_otherwise": (None, otherwise),  # how far one GPU is from itself: other micro batches
        **{name: (name, {}) for name in (*LAYOUTS, *ZERO3)},
    }
    usual = [n for n in runs if n not in ZERO3 or (n == "zero3" and not call.is_dry)]
    runs = {name: run for name, run in runs.items() if name in (call.arguments.runs or usual)}
    call.found |= {"settings": settings, "runs": {}}
    one: dict[str, Any] = {}
    for name, (layout, own) in runs.items():
        began = time.monotonic()
        try:
            started = start_training(call, name, settings | own, layout)
            finish_training(*started, timeout_s=240.0)
        except RuntimeError as error:  # one layout that breaks must not hide the others
            call.found["runs"][name] = {"error": str(error)[-4000:]}
            call.say(f"{name}: {error}")
            call.save()
            continue
        result = read_json(call.work / f"{name}.result.json")
        run = {
            **read_losses(call, name),
            "tokens_per_s": result["tokens_per_s"],
            "num_processes": 2 if layout else 1,
            "seconds_with_start": time.monotonic() - began,
        }
        if name == "one":
            one = run
        elif one:
            run["per_gpu_ratio"] = run["tokens_per_s"] / run["num_processes"] / one["tokens_per_s"]
            run["worst_eval_difference"] = worst_difference(one["eval_loss"], run["eval_loss"])
            if len(run["loss"]) == len(one["loss"]):  # else the steps held other sequences
                run["worst_loss_difference"] = worst_difference(one["loss"], run["loss"])
                differences = relative_differences(one["loss"], run["loss"])
                run["mean_loss_difference"] = sum(differences) / len(differences)
        call.found["runs"][name] = run
        call.say(f"{name}: " + json.dumps({k: v for k, v in run.items() if k != "loss"}))
        call.save()


def profile(call: Call) -> None:
    """Where a step's time goes on one GPU, under DDP and under FSDP2 (three ways); ZeRO-3 where
    `--runs` names it."""
    settings = {**prepare_training(call), "evals": 1}
    call.found |= {"settings": settings, "runs": {}}
    wanted = call.arguments.runs or ["one", *LAYOUTS]
    for layout in (None, *LAYOUTS, *ZERO3):
        if (layout or "one") not in wanted:
            continue
        name = f"profile_{layout or 'one'}"
        out = call.work / f"{name}_steps.json"
        try:
            started = start_training(call, name, settings, layout, profile=out)
            finish_training(*started, timeout_s=150.0)
            found = read_json(out)
        except (RuntimeError, OSError) as error:
            found = {"error": str(error)[-2000:]}
        call.found["runs"][layout or "one"] = found
        call.say(f"{name}: " + json.dumps(found)[:1500])
        call.save()


def resume(call: Call) -> None:
    """FSDP2, killed at its first checkpoint, then DDP to the end."""
    from lenvm.model.value_model import LengthValueModel

    settings = {**prepare_training(call), "evals": 2}
    name = "mixed"
    child, log = start_training(call, name, settings, "fsdp2")
    end = time.monotonic() + 180.0
    state = call.work / f"{name}.state"
    while not (found := list(state.glob("checkpoint-*/complete"))):
        if child.poll() is not None or time.monotonic() > end:
            finish_training(child, log, 0.1)
            raise RuntimeError("no checkpoint was written")
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    step = read_json(found[0])["step"]
    call.say(f"FSDP2 killed after the checkpoint of step {step}")
    finish_training(*start_training(call, name, settings, "ddp"), timeout_s=240.0)
    mixed = read_losses(call, name)
    call.found |= {"settings": settings, "killed_after_step": step, **mixed}
    device = setup.device()
    models = {
        n: LengthValueModel.from_pretrained(call.work / n, dtype=torch.float32, device=device)
        for n in ("one", name, "fsdp2", "zero3")
        if (call.work / n).exists()
    }
    rows = [row for _, row in read_jsonl(call.work / "train.jsonl")][:64]
    sequences = [row["prompt_token_ids"] + row["completion_token_ids"] for row in rows]
    values = {n: [m.belief(r).value() for r in m.read(sequences)] for n, m in models.items()}
    if "one" in values:
        one = read_losses(call, "one")
        call.found["worst_loss_difference"] = worst_difference(one["loss"], mixed["loss"])
        whole = {n: torch.cat(v) for n, v in values.items()}
        call.found["mean_value_difference"] = {
            n: float((v - whole["one"]).abs().mean()) for n, v in whole.items()
        }
        call.found["mean_value"] = float(whole["one"].mean())
    call.say(json.dumps({k: v for k, v in call.found.items() if k != "loss"}))
    call.save()


# -- serving --------------------------------------------------------------------------------------


def serve(call: Call) -> None:
    from transformers import AutoModelForCausalLM

    from lenvm.guidance.scorer import CandidateScorer
    from lenvm.guidance.session import GuidanceSession
    from lenvm.model.value_model import LengthValueModel

    options = call.arguments
    real = setup.write_tiny_generator(call.work) if call.is_dry else call.model()
    value = setup.write_value_model("real", call.work, str(real))
    logs = call.work / "logs"
    logs.mkdir(exist_ok=True)
    site = setup.write_site(call.work)
    layouts = {"tp1": ("0", {}), "tp2": ("0,1", {"tensor_parallel_size": 2})}
    layouts["dp2"] = ("0,1", {"data_parallel_size": 2})
    engines: dict[str, Engine] = {}
    for layout, (gpus, parallel) in layouts.items():
        if layout not in options.layouts:
            continue
        for kind in ("stock", "plugin"):
            common = {
                "kv_cache_memory_bytes": 6 << 30,
                "gpu_memory_utilization": 0.1,
                "disable_custom_all_reduce": not options.custom_all_reduce,
                "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
            }
            spec = {"engine": "machine" if call.is_dry else "vllm", "model": str(real)}
            spec |= {"options": {} if call.is_dry else {**common, **parallel}}
            env = call.env(gpus)
            env |= {"LENVM_GPU_MEMORY": "0.08", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
            env |= {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
            if kind == "plugin" or call.is_dry:
                env["LENVM_MODEL"] = str(value)
                env["PYTHONPATH"] = f"{site}:{env['PYTHONPATH']}"
            argv = [sys.executable, str(ROOT / "benchmarks/multi_gpu_worker.py"), json.dumps(spec)]
            engines[f"{layout}_{kind}"] = Engine(argv, env, logs / f"{layout}_{kind}.log")
    call.found |= {"engines": {}, "checks": {}, "points": []}
    good: dict[str, Engine] = {}
    for name, engine in engines.items():
        answer = call.found["engines"][name] = engine.wait(options.budget_s - 120.0)
        call.say(f"{name}: {answer}")
        if "ready" in answer:
            good[name] = engine
        else:
            engine.stop()
            print("\n".join((logs / f"{name}.log").read_text().splitlines()[-30:]), flush=True)
        call.save()
    for concurrency in options.concurrency:
        for name, engine in good.items():
            layout, _, kind = name.partition("_")
            for guided in (False, True) if kind == "plugin" else (False,):
                command = {
                    "do": "rate",
                    "concurrency": concurrency,
                    "num_tokens": options.num_tokens,
                }
                answer = engine.ask({**command, "control": CONTROL if guided else None}, 90.0)
                kinds = {"stock": "stock", "plugin": "guided" if guided else "unguided"}
                point = {"layout": layout, "kind": kinds[kind], "concurrency": concurrency}
                call.found["points"].append({**point, **answer})
                call.say(json.dumps(call.found["points"][-1]))
                call.found["headline"] = summarise(call.found["points"])
                call.save()
    device = setup.device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = AutoModelForCausalLM.from_pretrained(real, dtype=dtype).to(device)
    checks.use_vocabulary(generator.config.vocab_size)
    ours = LengthValueModel.from_pretrained(value, dtype=dtype, device=device)
    scorer = CandidateScorer(ours, max_tokens=8192, max_requests=4)
    session = GuidanceSession(scorer, eos_token_ids=())
    rules = ("hard", "soft", "conditional") if scorer.has_distribution else ("hard", "soft")
    dialect = checks.Dialect("vllm")
    answers: dict[str, Any] = {}
    for layout in layouts:
        ask = good[f"{layout}_plugin"].generate if f"{layout}_plugin" in good else None
        if ask is None:
            continue
        record: dict[str, Any] = {}
        call.found["checks"][layout] = record
        try:
            record["lengths"] = checks.check_lengths(ask, dialect, rules)
            record["rule"] = checks.check_rule(ask, dialect, generator, session)
            record["distribution"] = checks.check_distribution(ask, dialect, generator, session)
            for kind, control in (("greedy", None), ("hard", HARD)):
                answers[f"{layout}_{kind}"] = greedy(ask, dialect, control)
                record[f"{kind}_against_one"] = compare(
                    answers.get(f"tp1_{kind}"), answers[f"{layout}_{kind}"]
                )
        except Exception as error:  # the next layout is still to be seen
            record["error"] = repr(error)[:1000]
        call.say(f"{layout}: {json.dumps(record)[:1500]}")
        call.save()
    for engine in good.values():
        engine.stop()


HARD = {"equal_to": 200, "rule": "hard", "top_k": 8}


def greedy(ask: checks.Ask, dialect: Any, control: dict[str, Any] | None) -> list[list[int]]:
    params = dialect.params(checks.GENERATED, control, ignore_eos=True)
    requests = [{"prompt": p, "params": params} for p in checks.prompts(16, 11)]
    return [answer[0]["tokens"] for answer in ask(requests)]


def compare(one: list[list[int]] | None, other: list[list[int]]) -> dict[str, float] | None:
    """How far greedy answers go together: they part where bf16 sums in another order reorder two
    logits, unguided ones (`greedy`) as well as guided ones (`hard`)."""
    if one is None:
        return None
    together = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(one, other, strict=True)
    ]
    length = len(one[0])
    return {
        "identical": sum(n == length for n in together) / len(one),
        "mean_tokens_together": sum(together) / len(one),
    }


def summarise(points: list[dict[str, Any]]) -> dict[str, float]:
    rate = {
        (p["layout"], p["kind"], p["concurrency"]): p["tokens_per_s"]
        for p in points
        if "tokens_per_s" in p
    }
    found = {}
    for (layout, kind, concurrency), value in rate.items():
        if kind == "guided":
            for base in ("unguided", "stock"):
                if other := rate.get((layout, base, concurrency)):
                    found[f"{layout}_{concurrency}_guided_over_{base}"] = value / other
        if layout != "tp1" and (one := rate.get(("tp1", kind, concurrency))):
            found[f"{layout}_{concurrency}_{kind}_over_one_gpu"] = value / one
    return found


# -- sampling -------------------------------------------------------------------------------------


def sample(call: Call) -> None:
    options = call.arguments
    prompts = call.work / "prompts.jsonl"
    count = 60 if call.is_dry else options.num_prompts
    rows = [{"prompt": f"Write a function that adds {i} to its argument."} for i in range(count)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    children, urls = [], []
    try:
        for gpu in ("0", "1"):
            port = 8081 + int(gpu)
            argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(call.model())]
            argv += ["--port", str(port), "--max-model-len", "2048", "--max-num-seqs", "512"]
            argv += ["--gpu-memory-utilization", "0.6", "--served-model-name", "generator"]
            if call.is_dry:
                argv = [sys.executable, str(ROOT / "tests/stub_server.py"), "--port", str(port)]
                argv += ["--delay", "0.25"]
            log = (call.work / f"server{gpu}.log").open("w")
            env = call.env(gpu) | {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
            child = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT)
            children.append(child)
            urls.append(f"http://127.0.0.1:{port}/v1")
        for url, child in zip(urls, children, strict=True):
            call.wait_for(url, child, 200.0)
        call.say("both servers are up")
        call.found["points"] = []
        for number, endpoints in enumerate((urls[1:], urls[:1], urls, urls[:1], urls)):
            limit = ["--limit", "48"] if number == 0 else []
            point = run_sampler(call, prompts, endpoints, f"samples{number}", limit)
            point["is_warm_up"] = number == 0  # the second server's; the first point's is its own
            call.found["points"].append(point)
            call.say(json.dumps(point))
            call.save()
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait(timeout=30)
    counted = [p for p in call.found["points"] if not p["is_warm_up"]][-2:]
    one, two = (p["tokens_per_s"] for p in counted)
    call.found["headline"] = {"two_endpoints_over_one": two / one}
    call.say(json.dumps(call.found["headline"]))
    call.save()


def run_sampler(
    call: Call, prompts: Path, endpoints: list[str], name: str, more: list[str]
) -> dict[str, Any]:
    """`lenvm sample`, timed by its own report: without imports. Its requests are a multiple of
    those in flight, so that no last wave is half empty."""
    output = call.work / f"{name}.jsonl"
    for old in call.work.glob(f"{name}.*"):
        old.unlink()
    per_endpoint = 8 if call.is_dry else call.arguments.per_endpoint
    argv = ["-m", "lenvm", "sample", str(prompts), "--output", str(output), "--n", "8"]
    argv += ["--max-tokens", "64" if call.is_dry else "256", "--per-request", "4"]
    argv += [*more, "--concurrency", str(per_endpoint * len(endpoints))]
    for url in endpoints:
        argv += ["--endpoint", url]
    if not call.is_dry:
        argv += ["--extra", '{"ignore_eos": true}']
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *argv], env=call.env(""), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lengths = [len(row["completion_token_ids"]) for _, row in read_jsonl(output)]
    summary = done.stderr.strip().splitlines()[-1]
    inside = len(lengths) / float(summary.rpartition("truncated, ")[2].split()[0])
    return {
        "endpoints": len(endpoints),
        "completions": len(lengths),
        "num_tokens": sum(lengths),
        "seconds": inside,
        "seconds_with_start": seconds,
        "tokens_per_s": sum(lengths) / inside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"train": train, "profile": profile, "resume": resume, "serve": serve, "sample": sample}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--model", default="smollm2", help="generator and backbone")
    parser.add_argument("--data", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--out", default=ROOT / "benchmarks/results/multi_gpu.json")
    parser.add_argument("--work", default="/dev/shm/multi_gpu")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument(
        "--runs",
        nargs="*",
        help=f"of `train`, `profile`: one, one_otherwise, {', '.join((*LAYOUTS, *ZERO3))}",
    )
    parser.add_argument("--steps", type=int, default=52)
    parser.add_argument("--accumulation", type=int, default=4, help="micro batches of a step")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--layouts", nargs="*", default=["tp1", "tp2", "dp2"])
    parser.add_argument("--concurrency", nargs="*", type=int, default=[64, 256])
    parser.add_argument("--num-tokens", type=int, default=512)
    parser.add_argument("--custom-all-reduce", action="store_true")
    parser.add_argument("--num-prompts", type=int, default=384)
    parser.add_argument("--per-endpoint", type=int, default=96, help="requests in flight of each")
    parser.add_argument("--budget-s", type=float, default=420.0)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    call = Call(arguments)
    parts[arguments.part](call)
    call.found["seconds"] = round(time.monotonic() - call.began, 1)
    call.save()
    call.say("done")


if __name__ == "__main__":
    main()
