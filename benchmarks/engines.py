"""Figures of guided decoding inside stock vLLM or SGLang: truth first, then speed.

    python benchmarks/engines.py vllm --real ~/kit/models/smollm2.gguf --out engines_h200.json

Truth runs on a real small generator (`--real`: a folder or a GGUF file). Speed runs on shapes
(Qwen2.5's 0.5B, 1.5B, 7B) with made-up weights: the work of a step does not depend on them. All
engines of a part start at once and then work one at a time. The JSON is written after each point.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import engines_checks as checks  # noqa: E402
import engines_setup as setup  # noqa: E402

CONTROL = {"equal_to": 512, "rule": "soft", "strict": False, "top_k": 15, "top_p": 1.0}
PROCESSOR = "lenvm.engines.vllm.guidance:LengthGuidance"
PAIRS = [("1.5b", "0.5b"), ("7b", "1.5b"), ("0.5b", "0.5b")]
KV_GIB = {"0.5b": 3, "1.5b": 5, "7b": 9, "real": 1}
SHARE = {"0.5b": 0.035, "1.5b": 0.065, "real": 0.02}
"""Of the GPU's memory, for the value model and its KV: several engines share the GPU here."""


class Engine:
    """A worker process (engines_worker.py), or whatever prints its lines."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log.open("w")
        self.child = subprocess.Popen(
            argv,
            env={**os.environ, **env},
            text=True,
            errors="replace",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.answers: list[Any] = []
        self.ready = threading.Event()
        self.arrived = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.log.write(line)
            self.log.flush()
            if line.startswith("@@"):
                self._put(json.loads(line[2:]))
            elif line.startswith("ready: http"):
                self._put({"ready": line.strip()})
        self._put({"error": "the process ended; its log says why", "ended": True})

    def _put(self, value: Any) -> None:
        with self.arrived:
            self.answers.append(value)
            self.arrived.notify_all()

    def wait(self, timeout_s: float) -> Any:
        with self.arrived:
            if not self.arrived.wait_for(lambda: self.answers, timeout=max(1.0, timeout_s)):
                return {"error": f"no answer in {timeout_s:.0f} s", "ended": True}
            return self.answers.pop(0)

    def ask(self, command: dict[str, Any], timeout_s: float = 120.0) -> Any:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(command) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process is gone", "ended": True}
        return self.wait(timeout_s)

    def generate(self, requests: list[dict[str, Any]]) -> list[Any]:
        answer = self.ask({"do": "generate", "requests": requests})
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return list(answer)

    def stop(self) -> int | None:
        with contextlib.suppress(BrokenPipeError, OSError):
            if self.child.stdin is not None:
                self.child.stdin.write("\n")
                self.child.stdin.close()
        try:
            return self.child.wait(timeout=15.0)
        except subprocess.TimeoutExpired:
            self.child.send_signal(signal.SIGTERM)
        try:
            return self.child.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self.child.kill()
            return None


class Run:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.engine, self.arguments = arguments.engine, arguments
        self.work = Path(arguments.work)
        self.logs = Path(arguments.out).parent / f"{self.engine}_logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + arguments.budget_s
        self.site = setup.write_site(self.work)
        self.pending: dict[str, Engine] = {}
        self.results: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "commit": arguments.commit,
            "engine": self.engine,
            "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "host": platform.node(),
            "versions": setup.versions(),
            "headline": {},
            "checks": {},
            "engines": {},
            "points": [],
        }

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        setup.write_json(Path(self.arguments.out), self.results)

    def say(self, text: str) -> None:
        print(f"[{self.arguments.budget_s - self.left_s:5.0f} s] {text}", flush=True)

    # -- engines ----------------------------------------------------------------------------------

    def start(
        self, name: str, model: Path, value: Path | None, size: str, share: float, **more: Any
    ) -> Engine:
        env = self.env(value, share)
        options: dict[str, Any] = dict(more)
        if self.engine == "vllm":
            options |= {"kv_cache_memory_bytes": KV_GIB[size] << 30, "gpu_memory_utilization": 0.1}
            if value is not None:
                options["logits_processors"] = [PROCESSOR]
        else:
            options |= {
                "attention_backend": "triton",
                "sampling_backend": "pytorch",
                "max_total_tokens": 160_000,
                "disable_custom_all_reduce": True,
            }
            options |= {"enable_custom_logit_processor": True} if value is not None else {}
        if size != "real":
            options |= {"load_format": "dummy", "skip_tokenizer_init": True}
        spec = {"engine": self.engine, "model": str(model), "options": options}
        argv = [sys.executable, str(ROOT / "benchmarks/engines_worker.py"), json.dumps(spec)]
        return Engine(argv, env, self.logs / f"{name}.log")

    def env(self, value: Path | None, share: float = 0.05) -> dict[str, str]:
        path = [str(ROOT / "src"), str(self.site), os.environ.get("PYTHONPATH", "")]
        env = {
            "PYTHONPATH": ":".join(path),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "LENVM_GPU_MEMORY": str(share),
            "TOKENIZERS_PARALLELISM": "false",
        }
        return env | ({"LENVM_MODEL": str(value)} if value is not None else {})

    def await_ready(self, engines: dict[str, Engine], timeout_s: float) -> dict[str, Engine]:
        end = time.monotonic() + min(timeout_s, self.left_s)
        good = {}
        for name, engine in engines.items():
            answer = engine.wait(end - time.monotonic())
            self.results["engines"][name] = answer
            self.say(f"{name}: {answer}")
            if "ready" in answer:
                good[name] = engine
            else:
                engine.stop()
                log = (self.logs / f"{name}.log").read_text().splitlines()
                print("\n".join(log[-40:]), flush=True)
        self.save()
        return good

    def attempt(self, name: str, call: Callable[[], dict[str, Any]]) -> None:
        start = time.monotonic()
        try:
            record = call()
        except Exception as error:  # one check that breaks must not hide the others
            where = traceback.format_exc().splitlines()[-5:]
            record = {"ok": False, "error": repr(error), "where": where}
        record["seconds"] = round(time.monotonic() - start, 1)
        self.results["checks"][name] = record
        self.say(f"check {name}: {json.dumps(record)[:900]}")
        self.save()

    # -- parts ------------------------------------------------------------------------------------

    def start_truth(self) -> tuple[Path, Path, dict[str, Engine]]:
        from lenvm.model.bundled import resolve_model

        real = Path(resolve_model(self.arguments.real))
        value = setup.write_value_model("real", self.work, str(real))
        small = {"num_gpu_blocks_override": 420} if self.engine == "vllm" else {}
        engines = {
            "real_plugin": self.start("real_plugin", real, value, "real", SHARE["real"], **small),
            "real_stock": self.start("real_stock", real, None, "real", 0.02),
        }
        if self.engine == "vllm":
            engines["http"] = self.start_http(real, value)
            engines["values"] = self.start_values(value)
        return real, value, engines

    def start_http(self, real: Path, value: Path) -> Engine:
        code = (
            "import sys; from lenvm.engines.launch import serve; sys.exit(serve("
            f"'vllm', {str(real)!r}, {str(value)!r}, port=8071, gpu_memory=0.02, max_requests=64, "
            "extra=['--max-model-len', '2048', '--kv-cache-memory-bytes', '1073741824', "
            "'--gpu-memory-utilization', '0.1', '--served-model-name', 'real'], "
            "echo=lambda line: print(line, flush=True)))"
        )
        return Engine([sys.executable, "-c", code], self.env(None), self.logs / "http.log")

    def start_values(self, value: Path) -> Engine:
        code = (
            "import sys; from lenvm.engines.launch import build_values_command, run_server; "
            f"argv, env = build_values_command('vllm', {str(value)!r}, port=8072, extra=["
            "'--max-model-len', '2048', '--max-num-batched-tokens', '256', "
            "'--kv-cache-memory-bytes', '1073741824', '--gpu-memory-utilization', '0.1', "
            "'--enable-prefix-caching', '--enable-chunked-prefill', "
            "'--served-model-name', 'value']); sys.exit(run_server(argv, env, "
            "'http://127.0.0.1:8072', echo=lambda line: print(line, flush=True)))"
        )
        return Engine([sys.executable, "-c", code], self.env(None), self.logs / "values.log")

    def truth(self, real: Path, value: Path, engines: dict[str, Engine]) -> None:
        from transformers import AutoModelForCausalLM

        from lenvm.guidance.scorer import CandidateScorer
        from lenvm.guidance.session import GuidanceSession
        from lenvm.model.value_model import LengthValueModel

        dialect = checks.Dialect(self.engine)
        generator = AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16).to("cuda")
        ours = LengthValueModel.from_pretrained(value, dtype=torch.bfloat16, device="cuda")
        scorer = CandidateScorer(ours, max_tokens=8192, max_requests=4)
        session = GuidanceSession(scorer, eos_token_ids=())
        if "real_plugin" in engines:
            ask = engines["real_plugin"].generate
            self.attempt("lengths", lambda: checks.check_lengths(ask, dialect))
            self.attempt("faults", lambda: checks.check_faults(ask, dialect))
            self.attempt("rule", lambda: checks.check_rule(ask, dialect, generator, session))
            self.attempt(
                "distribution",
                lambda: checks.check_distribution(ask, dialect, generator, session),
            )
            if "real_stock" in engines:
                stock = engines["real_stock"].generate
                self.attempt("untouched", lambda: checks.check_untouched(ask, stock, dialect))
        if "http" in engines:
            self.attempt("http", self.check_http)
        if "values" in engines:
            self.attempt("values", lambda: self.check_values(ours))

    def check_http(self) -> dict[str, Any]:
        def post(body: dict[str, Any]) -> tuple[int, Any]:
            return call("http://127.0.0.1:8071/v1/completions", {"model": "real", **body})

        control = json.dumps({"equal_to": 40, "rule": "soft", "top_k": 8})
        base = {"prompt": "Tell me a story.", "max_tokens": 100, "temperature": 1.0}
        good = post({**base, "n": 3, "logprobs": 2, "vllm_xargs": {"lenvm": control}})
        bad = post({**base, "vllm_xargs": {"lenvm": '{"equal_to": 0}'}})
        used = good[1].get("usage", {}).get("completion_tokens")
        return {
            "ok": good[0] == 200 and used == 120 and 400 <= bad[0] < 500,
            "completion_tokens": used,
            "bad": bad,
            "good_status": good[0],
        }

    def check_values(self, ours: Any) -> dict[str, Any]:
        worst, rows = 0.0, 0
        for ids in checks.prompts(3, 7, 30, 200) + checks.prompts(1, 8, 700, 701) * 2:
            body = {"model": "value", "input": ids, "task": "token_classify"}
            status, answer = call("http://127.0.0.1:8072/pooling", body)
            if status != 200:
                return {"ok": False, "status": status, "answer": str(answer)[:500]}
            got = torch.tensor(answer["data"][0]["data"])
            want = ours.belief(ours.read([ids])[0].to("cuda")).value().cpu()
            if len(got) != len(want):
                return {"ok": False, "got": len(got), "want": len(want)}
            worst = max(worst, float((got[:, 0] - want).abs().max()))
            rows += len(got)
        return {"ok": worst < 0.05, "worst_value_error": worst, "tokens": rows}

    def speed(self, pairs: list[tuple[str, str]]) -> None:
        engines = {}
        for generator, value in pairs:
            folder = setup.write_generator(generator, self.work)
            checkpoint = setup.write_value_model(value, self.work)
            torch.cuda.empty_cache()
            pair = f"{generator}_{value}"
            engines[f"{pair}_stock"] = self.start(f"{pair}_stock", folder, None, generator, 0.05)
            engines[f"{pair}_plugin"] = self.start(
                f"{pair}_plugin", folder, checkpoint, generator, SHARE[value]
            )
        self.pending |= engines

    def measure(self, pairs: list[tuple[str, str]]) -> None:
        engines = self.await_ready(self.pending, 240.0)
        for concurrency in (64, 16, 1, 256):
            for generator, value in pairs:
                pair = f"{generator}_{value}"
                for kind, name, control in (
                    ("stock", f"{pair}_stock", None),
                    ("unguided", f"{pair}_plugin", None),
                    ("guided", f"{pair}_plugin", CONTROL),
                ):
                    if name in engines and self.left_s > 25:
                        self.point(engines[name], pair, kind, concurrency, control)
        for engine in engines.values():
            engine.stop()

    def point(self, engine: Engine, pair: str, kind: str, concurrency: int, control: Any) -> None:
        command = {"do": "rate", "concurrency": concurrency, "num_tokens": 512, "control": control}
        answer = engine.ask(command, min(60.0, self.left_s))
        point = {"pair": pair, "kind": kind, "concurrency": concurrency, **answer}
        self.results["points"].append(point)
        self.say(json.dumps(point))
        self.headline()
        self.save()

    def headline(self) -> None:
        rate = {
            (p["pair"], p["kind"]): p["tokens_per_s"]
            for p in self.results["points"]
            if p["concurrency"] == 64 and "tokens_per_s" in p
        }

        def ratio(pair: str, kind: str) -> float | None:
            top, bottom = rate.get((pair, kind)), rate.get((pair, "stock"))
            return round(top / bottom, 3) if top and bottom else None

        self.results["headline"] = {
            f"{self.engine}_ratio_1p5b_0p5b": ratio("1.5b_0.5b", "guided"),
            f"{self.engine}_ratio_7b_1p5b": ratio("7b_1.5b", "guided"),
            f"{self.engine}_ratio_0p5b_0p5b": ratio("0.5b_0.5b", "guided"),
            f"{self.engine}_unguided_ratio": ratio("1.5b_0.5b", "unguided"),
        }


def call(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()[:500]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument("--real", required=True, help="a real small generator: folder or GGUF")
    parser.add_argument("--out", default="benchmarks/results/engines_h200.json")
    parser.add_argument("--work", default="/dev/shm/engines")
    parser.add_argument("--budget-s", type=float, default=400.0)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--parts", nargs="*", default=["truth", "speed"])
    parser.add_argument("--pairs", nargs="*", default=["1.5b_0.5b", "7b_1.5b", "0.5b_0.5b"])
    arguments = parser.parse_args()
    run = Run(arguments)
    pairs = [p for p in PAIRS if "_".join(p) in arguments.pairs]
    truth = run.start_truth() if "truth" in arguments.parts else None
    if "speed" in arguments.parts:
        run.speed(pairs[:2])
    if truth is not None:
        real, value, engines = truth
        good = run.await_ready(engines, 200.0)
        run.truth(real, value, good)
        for engine in good.values():
            engine.stop()
        torch.cuda.empty_cache()
    if "speed" in arguments.parts:
        run.speed(pairs[2:])
        run.measure(pairs)
    run.save()
    run.say(json.dumps(run.results["headline"]))


if __name__ == "__main__":
    main()
