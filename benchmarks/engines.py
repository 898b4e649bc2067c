"""Figures of guided decoding inside stock vLLM or SGLang: truth first, then speed, then where the
time of a step goes.

    python benchmarks/engines.py vllm truth   --real ~/kit/models/smollm2.gguf --out truth.json
    python benchmarks/engines.py vllm speed   --pairs 1.5b_0.5b 7b_1.5b --out speed.json
    python benchmarks/engines.py vllm speed   --generator coder-1.5b.gguf \\
        --value checkpoints/qwen2.5-coder-1.5b@coder-0.5b.gguf --questions gsm8k/train.jsonl \\
        --pairs 1.5b_0.5b --out trained.json
    python benchmarks/engines.py vllm profile --pairs 1.5b_0.5b --out profile.json
    python benchmarks/engines.py merge truth.json speed.json --out results/engines_h200.json

Truth runs on a real small generator (`--real`: a folder or a GGUF file). Speed runs on shapes
(Qwen2.5's 0.5B, 1.5B, 7B) with made-up weights, under which all 15 candidates of every token are
real: the most that a step can cost (`--top-k 6`: also with as many as trained models leave). Or on
trained models (`--generator`, `--value`), whose text has fewer. All engines of a call start at once
and then work one at a time. The JSON is written after each point.

What is compared (`kind`): `stock`, the engine alone with its default settings; `stock_v1`, vLLM
alone with its V1 model runner, which it falls back to where a logits processor is installed;
`unguided`, lenvm's plugin loaded and no request with a control; `guided`, every request with one;
`guided_counted`, the same with LENVM_COUNT_CANDIDATES; `guided_half` and `guided_NAME`, the same
with another value model (`--half`, a further `--value`).

`--dry-run` plays it all on a CPU with tiny models and tests/engines/machine.py for an engine.
"""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import engines_checks as checks  # noqa: E402
import engines_setup as setup  # noqa: E402
from engines_process import Engine, call, stream  # noqa: E402
from engines_results import headline, merge  # noqa: E402

CONTROL = {"equal_to": 512, "rule": "soft", "strict": False, "top_k": 15, "top_p": 1.0}
TRAINED_CONTROL = {"equal_to": 512, "tolerance": 0.05, "evidence": 2.0, "strict": False}
"""For trained models: the candidates are those of real text."""
PAIRS = [("1.5b", "0.5b"), ("7b", "1.5b"), ("0.5b", "0.5b")]
KV_GIB = {"0.5b": 3, "1.5b": 5, "7b": 4, "real": 1}
VALUE_GIB = {"0.5b": 5.0, "1.5b": 7.5, "real": 3.0}
"""For the value model and its KV: several engines share the GPU here."""

PORTS = {"vllm": (8071, 8072), "sglang": (8081, 8082)}
"""Of the guided server and of the values' server: both engines may be checked at once."""
VLLM_SMALL = ["--kv-cache-memory-bytes", "1073741824", "--gpu-memory-utilization", "0.1"]
SGLANG_SMALL = ["--max-total-tokens", "40000", "--attention-backend", "triton",
                "--sampling-backend", "pytorch", "--disable-custom-all-reduce"]  # fmt: skip
"""Servers that share the GPU with others."""


def share_of(name: str) -> float:
    """VALUE_GIB as a part of this GPU's memory."""
    if not torch.cuda.is_available():
        return 0.05
    return VALUE_GIB[name] * 2**30 / torch.cuda.get_device_properties(0).total_memory


class Run:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.engine, self.arguments = arguments.engine, arguments
        self.part, self.is_dry = arguments.part, arguments.dry_run
        self.work = Path(arguments.work)
        self.logs = Path(arguments.out).parent / f"{self.engine}_logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + arguments.budget_s
        self.site = setup.write_site(self.work)
        self.prompts: list[list[int]] | None = None
        self.control = TRAINED_CONTROL if arguments.generator else CONTROL
        self.results: dict[str, Any] = {
            "is_dry_run": self.is_dry,
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
        self, name: str, model: Path, value: Path | str | None, size: str, share: float, **more: Any
    ) -> Engine:
        """`more`: engine options, and `env` for its environment."""
        env = self.env(value, share) | more.pop("env", {})
        options: dict[str, Any] = dict(more)
        if self.engine == "vllm":
            options |= {"kv_cache_memory_bytes": KV_GIB[size] << 30, "gpu_memory_utilization": 0.1}
        else:
            options |= {
                "attention_backend": "triton",
                "sampling_backend": "pytorch",
                "max_total_tokens": 160_000,
                "disable_custom_all_reduce": True,
            }
            options |= {"enable_custom_logit_processor": True} if value is not None else {}
        if size != "real" and not self.arguments.generator:
            options |= {"load_format": "dummy", "skip_tokenizer_init": True}
        kind = "machine" if self.is_dry else self.engine
        spec = {"engine": kind, "model": str(model), "options": options}
        argv = [sys.executable, str(ROOT / "benchmarks/engines_worker.py"), json.dumps(spec)]
        return Engine(argv, env, self.logs / f"{name}.log")

    def env(self, value: Path | str | None, share: float = 0.05) -> dict[str, str]:
        """Only an engine with a value model sees lenvm's entry points: stock is stock."""
        site = [str(self.site)] if value is not None else []
        path = [str(ROOT / "src"), *site, os.environ.get("PYTHONPATH", "")]
        env = {
            "PYTHONPATH": ":".join(path),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "LENVM_GPU_MEMORY": str(share),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if value is None:
            return env
        runner = self.v1()["env"] if self.arguments.runner == "v1" else {}
        return env | {"LENVM_MODEL": str(value)} | runner

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

        if self.is_dry:
            real = setup.write_tiny_generator(self.work)
        else:
            real = Path(resolve_model(self.arguments.real))
        value = setup.write_real_value_model(self.work, real, is_tiny=self.is_dry)
        small = {"num_gpu_blocks_override": 420} if self.engine == "vllm" else {}
        share = share_of("real")
        same = self.v1() if self.engine == "vllm" and self.arguments.runner == "v1" else {}
        engines = {
            "real_plugin": self.start("real_plugin", real, value, "real", share, **small),
            "real_stock": self.start("real_stock", real, None, "real", 0.05, **same),
        }
        if not self.is_dry:
            engines["http"] = self.start_http(real, value)
            engines["values"] = self.start_values(value)
        return real, value, engines

    @staticmethod
    def v1() -> dict[str, Any]:
        """vLLM's V1 model runner: other kernels, other rounding."""
        return {"env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}

    def start_http(self, real: Path, value: Path) -> Engine:
        own = {
            "vllm": ["--max-model-len", "2048", *VLLM_SMALL],
            "sglang": ["--context-length", "2048", *SGLANG_SMALL],
        }
        code = (
            "import sys; from lenvm.engines.launch import serve; sys.exit(serve("
            f"{self.engine!r}, {str(real)!r}, {str(value)!r}, port={PORTS[self.engine][0]}, "
            f"gpu_memory={share_of('real'):.3f}, max_requests=64, "
            f"extra={[*own[self.engine], '--served-model-name', 'real']!r}, "
            "echo=lambda line: print(line, flush=True)))"
        )
        return Engine([sys.executable, "-c", code], self.env(value), self.logs / "http.log")

    def start_values(self, value: Path) -> Engine:
        """With a prefix cache, and prompts in chunks of 256."""
        own = {
            "vllm": ["--max-model-len", "2048", "--max-num-batched-tokens", "256", *VLLM_SMALL,
                     "--enable-prefix-caching", "--enable-chunked-prefill"],
            "sglang": ["--context-length", "2048", "--chunked-prefill-size", "256", *SGLANG_SMALL],
        }  # fmt: skip
        code = (
            "import sys; from lenvm.engines.launch import build_values_command, run_server; "
            f"argv, env = build_values_command({self.engine!r}, {str(value)!r}, "
            f"port={PORTS[self.engine][1]}, "
            f"extra={[*own[self.engine], '--served-model-name', 'value']!r}); "
            f"sys.exit(run_server(argv, env, 'http://127.0.0.1:{PORTS[self.engine][1]}', "
            "echo=lambda line: print(line, flush=True)))"
        )
        env = {k: v for k, v in self.env(value).items() if k != "LENVM_MODEL"}
        return Engine([sys.executable, "-c", code], env, self.logs / "values.log")

    def truth(self, real: Path, value: Path, engines: dict[str, Engine]) -> None:
        from transformers import AutoModelForCausalLM

        from lenvm.guidance.scorer import CandidateScorer
        from lenvm.guidance.session import GuidanceSession
        from lenvm.model.value_model import LengthValueModel

        dialect = checks.Dialect(self.engine)
        device = setup.device()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = AutoModelForCausalLM.from_pretrained(real, dtype=dtype).to(device)
        checks.use_vocabulary(generator.config.vocab_size)
        ours = LengthValueModel.from_pretrained(value, dtype=dtype, device=device)
        scorer = CandidateScorer(ours, max_tokens=8192, max_requests=4)
        session = GuidanceSession(scorer, eos_token_ids=())
        if "real_plugin" in engines:
            ask = engines["real_plugin"].generate
            rules = ("hard", "soft", "conditional") if scorer.has_distribution else ("hard", "soft")
            self.attempt("lengths", lambda: checks.check_lengths(ask, dialect, rules))
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
        """A control over HTTP: whole, refused, streamed, ended by a stop string, left behind."""
        url = f"http://127.0.0.1:{PORTS[self.engine][0]}/v1/completions"

        def body(control: dict[str, Any], **more: Any) -> dict[str, Any]:
            own: dict[str, Any] = {"custom_params": {"lenvm": control}}
            if self.engine == "vllm":
                own = {"vllm_xargs": {"lenvm": json.dumps(control)}}
            base = {"model": "real", "prompt": "Tell me a story.", "max_tokens": 100}
            return {**base, "temperature": 1.0, **own, **more}

        control = {"equal_to": 40, "rule": "soft", "top_k": 8}
        good = call(url, body(control, n=3))
        used = good[1].get("usage", {}).get("completion_tokens") if good[0] == 200 else None
        bad = call(url, body({"equal_to": 0}))
        options = {"stream_options": {"include_usage": True}}
        streamed = stream(url, body(control, **options))
        stream_used = (streamed[-1].get("usage") or {}).get("completion_tokens")
        stopped = call(url, body({**control, "equal_to": 90}, stop=["a", "e"]))
        choice = stopped[1]["choices"][0] if stopped[0] == 200 else {}
        for _ in range(5):
            stream(url, body({"equal_to": 90, "rule": "soft", "top_k": 8}), leave_after=3)
        after = call(url, body(control))
        after_used = after[1].get("usage", {}).get("completion_tokens") if after[0] == 200 else None
        stop_ok = not set("ae") & set(choice.get("text", "a")) and choice["finish_reason"] == "stop"
        return {
            "ok": (used, stream_used, after_used) == (120, 40, 40)
            and 400 <= bad[0] < 500
            and stop_ok,
            "completion_tokens": used,
            "streamed": {"chunks": len(streamed), "completion_tokens": stream_used},
            "stop_string": {"ok": stop_ok, "choice": choice},
            "after_clients_left": after_used,
            "bad": bad,
            "good": good if good[0] != 200 else 200,
        }

    def check_values(self, ours: Any) -> dict[str, Any]:
        errors, rows = [], 0
        for ids in checks.prompts(3, 7, 30, 200) + checks.prompts(1, 8, 700, 701) * 2:
            status, answer = self.ask_values(ids)
            if status != 200:
                return {"ok": False, "status": status, "answer": str(answer)[:500]}
            is_vllm = self.engine == "vllm"
            got = torch.tensor(answer["data"][0]["data"] if is_vllm else answer["embedding"])
            with torch.inference_mode():
                raw = ours(torch.tensor([ids], device=setup.device()))[0]
                want = ours.belief(raw).value().float().cpu()
            if len(got) != len(want):
                return {"ok": False, "got": len(got), "want": len(want)}
            errors.append((got[:, 0] - want).abs())
            rows += len(got)
        error = torch.cat(errors)
        found = {"worst_value_error": float(error.max()), "mean_value_error": float(error.mean())}
        worst_at = [int(e.argmax()) for e in errors]
        return {"ok": found["worst_value_error"] < 0.05, **found, "tokens": rows, "at": worst_at}

    def ask_values(self, ids: list[int]) -> tuple[int, Any]:
        if self.engine == "vllm":
            body = {"model": "value", "input": ids, "task": "token_classify"}
            return call(f"http://127.0.0.1:{PORTS['vllm'][1]}/pooling", body)
        return call(f"http://127.0.0.1:{PORTS['sglang'][1]}/encode", {"input_ids": ids})

    def find_pair(self, generator: str, value: str) -> tuple[Path, dict[str, Path | str]]:
        """A generator and its value models by kind: the trained ones that are named, or made up."""
        from lenvm.model.bundled import resolve_model

        first, *more = self.arguments.value or [None]
        if self.arguments.generator:
            others = {f"guided_{Path(v.partition('@')[0]).name}": v for v in more}
            return Path(resolve_model(self.arguments.generator)), {"guided": first, **others}
        folder = setup.write_generator(generator, self.work, is_tiny=self.is_dry)
        models: dict[str, Path | str] = {
            kind: setup.write_value_model(value, self.work, is_tiny=self.is_dry, share=share)
            for kind, share in (("guided", 1.0), ("guided_half", 0.5))
            if share == 1.0 or self.arguments.half
        }
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return folder, models

    def read_prompts(self, generator: Path) -> list[list[int]] | None:
        """Questions of a file as chat prompts; None where none are named."""
        if self.arguments.questions is None:
            return None
        from lenvm.files import read_jsonl
        from lenvm.model.tokenization import encode_prompt, load_tokenizer

        tokenizer = load_tokenizer(str(generator))
        rows = [row["question"] for _, row in read_jsonl(self.arguments.questions)][:256]
        return [encode_prompt(tokenizer, [{"role": "user", "content": r}]) for r in rows]

    def start_speed(self, pairs: list[tuple[str, str]]) -> dict[str, Engine]:
        engines: dict[str, Engine] = {}
        for generator, value in pairs:
            folder, models = self.find_pair(generator, value)
            kinds: list[tuple[str, Path | str | None, dict[str, Any]]] = [("stock", None, {})]
            kinds += [(kind, model, {}) for kind, model in models.items()]
            if self.arguments.counted:
                env = {"LENVM_COUNT_CANDIDATES": "1"}
                kinds.append(("guided_counted", models["guided"], {"env": env}))
            self.prompts = self.read_prompts(folder)
            if self.engine == "vllm" and self.arguments.with_v1:
                kinds.append(("stock_v1", None, self.v1()))
            for kind, model, more in kinds:
                name = f"{generator}_{value}_{kind}"
                engines[name] = self.start(name, folder, model, generator, share_of(value), **more)
        return engines

    def speed(self, pairs: list[tuple[str, str]]) -> None:
        engines = self.await_ready(self.start_speed(pairs), 330.0)
        for concurrency in self.arguments.concurrency:
            for generator, value in pairs:
                pair = f"{generator}_{value}"
                own = [name for name in engines if name.startswith(f"{pair}_")]
                todo: list[tuple[str, str, dict[str, int]]] = []
                for name in own:
                    kind = name.removeprefix(f"{pair}_")
                    todo.append((name, kind, {}))
                    if kind.startswith("guided"):
                        todo += [(name, kind, {"top_k": k}) for k in self.arguments.top_k]
                if f"{pair}_guided" in own:
                    todo.append((f"{pair}_guided", "unguided", {}))
                for name, kind, top_k in todo:
                    control = self.control | top_k if kind.startswith("guided") else None
                    told = {"pair": pair, "kind": kind, "concurrency": concurrency, **top_k}
                    if (
                        name in engines
                        and self.left_s > 15
                        and not self.point(engines[name], told, control)
                    ):
                        del engines[name]
        for engine in engines.values():
            engine.stop()

    def profile(self, pairs: list[tuple[str, str]]) -> None:
        """vLLM's worker inside the process that times it; its steps wait for the device, so the
        parts are right and their sum is above a step's time in `speed`."""
        engines = {}
        for generator, value in pairs:
            folder, models = self.find_pair(generator, value)
            self.prompts, checkpoint = self.read_prompts(folder), models["guided"]
            inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LENVM_BENCH_TIMERS": "1"}
            name = f"{generator}_{value}_profile"
            engines[name] = self.start(
                name, folder, checkpoint, generator, share_of(value), env=inside
            )
        for name, engine in self.await_ready(engines, 330.0).items():
            pair = name.removesuffix("_profile")
            concurrency = self.arguments.concurrency[0]
            command: dict[str, Any] = {"do": "split", "concurrency": concurrency}
            command["control"] = self.control
            if self.prompts:
                command["prompts"] = self.prompts
            command["num_tokens"] = min(128, self.arguments.num_tokens)
            answer = engine.ask(command, min(120.0, self.left_s))
            table = answer.pop("table", "")
            (self.logs / f"{name}.txt").write_text(table)
            told = {"pair": pair, "trained": bool(self.prompts)}
            self.results.setdefault("splits", []).append({**told, **answer})
            self.say(json.dumps(answer))
            self.say(table[:6000])
            self.save()
            engine.stop()

    def point(self, engine: Engine, told: dict[str, Any], control: Any) -> bool:
        """Measure one point; False where the engine gave no answer (it is stopped)."""
        command = {
            "do": "rate",
            "concurrency": told["concurrency"],
            "num_tokens": self.arguments.num_tokens,
            "control": control,
        }
        if self.prompts:
            command |= {"prompts": self.prompts, "warm_up": 8 if self.is_dry else 192}
        answer = engine.ask(command, min(60.0, self.left_s))
        point = {**told, "trained": bool(self.prompts), **answer}
        self.results["points"].append(point)
        self.say(json.dumps(point))
        self.headline()
        self.save()
        if answer.get("ended"):
            engine.stop()
        return not answer.get("ended")

    def headline(self) -> None:
        self.results["headline"] = headline(self.engine, self.results["points"])


def main() -> None:
    if sys.argv[1:2] == ["merge"]:
        *paths, flag, out = sys.argv[2:]
        assert flag == "--out", "merge FILE ... --out FILE"
        return merge(paths, out)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument("part", choices=["truth", "speed", "profile"])
    parser.add_argument("--generator", help="speed of a trained generator instead of made-up ones")
    parser.add_argument("--value", nargs="+", help="its value models, FOLDER or FOLDER@BASE each")
    parser.add_argument(
        "--half", action="store_true", help="made-up value models of half the layers, too"
    )
    parser.add_argument("--runner", default="v2", choices=["v1", "v2"], help="vLLM's model runner")
    parser.add_argument("--counted", action="store_true", help="LENVM_COUNT_CANDIDATES, too")
    parser.add_argument("--questions", type=Path, help="JSON lines with `question`: its prompts")
    parser.add_argument("--real", default="smollm2", help="a real small generator")
    parser.add_argument("--out", required=True)
    parser.add_argument("--work", default="/dev/shm/engines")
    parser.add_argument("--budget-s", type=float, default=500.0)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--pairs", nargs="*", default=["1.5b_0.5b", "7b_1.5b", "0.5b_0.5b"])
    parser.add_argument("--concurrency", nargs="*", type=int, default=[64, 16, 1, 256])
    parser.add_argument("--num-tokens", type=int, default=512)
    parser.add_argument(
        "--top-k", nargs="*", type=int, default=[], help="guided with so many candidates, too"
    )
    parser.add_argument("--with-v1", action="store_true", help="vLLM alone with its V1 runner, too")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    run = Run(arguments)
    pairs = [p for p in PAIRS if "_".join(p) in arguments.pairs]
    if arguments.part == "truth":
        real, value, engines = run.start_truth()
        good = run.await_ready(engines, 330.0)
        run.truth(real, value, good)
        for engine in good.values():
            engine.stop()
    elif arguments.part == "speed":
        run.speed(pairs)
    else:
        run.profile(pairs)
    run.save()
    run.say(json.dumps(run.results["headline"]))


if __name__ == "__main__":
    main()
