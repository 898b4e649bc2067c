"""One engine in a process of its own: commands come as JSON lines, answers go out as `@@` lines.

    python benchmarks/engines_worker.py '{"engine": "vllm", "model": ..., "options": {...}}'

Commands: {"do": "rate", "concurrency", "num_tokens", "control", "prompts"?}, {"do": "split", the
same} (vLLM in this process, with LENVM_BENCH_TIMERS) and {"do": "generate", "requests"}; an empty
line ends it. Without `prompts` (token ids), random tokens.
Everything else on stdout is the engine's log.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = (1000, 40_000)


class VllmWorker:
    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import LLM

        if os.environ.get("LENVM_BENCH_TIMERS"):
            self.timers = Timers()
        options = {"disable_log_stats": True, "max_model_len": 2048, "max_num_seqs": 256}
        self.llm = LLM(spec["model"], **options, **spec["options"])
        config = self.llm.llm_engine.vllm_config
        self.facts = {
            "v2_runner": config.use_v2_model_runner,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
        }

    def generate(self, requests: list[dict[str, Any]]) -> list[Any]:
        """[prompt ids, SamplingParams fields] -> per request its completions, or the error."""
        from vllm import SamplingParams

        params = [SamplingParams(**{"detokenize": False, **r["params"]}) for r in requests]
        prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
        try:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        except ValueError as error:
            return [{"error": str(error)}]
        return [
            [
                {
                    "tokens": list(o.token_ids),
                    "finish_reason": o.finish_reason,
                    "stop_reason": o.stop_reason,
                    "first": {i: x.logprob for i, x in o.logprobs[0].items()} if o.logprobs else {},
                }
                for o in output.outputs
            ]
            for output in outputs
        ]

    def params(self, num_tokens: int, control: dict[str, Any] | None, seed: int) -> dict[str, Any]:
        extra = {"extra_args": {"lenvm": json.dumps(control)}} if control else {}
        return {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0, **extra}


class SglangWorker:
    def __init__(self, spec: dict[str, Any]) -> None:
        import sglang

        options = {"context_length": 2048, "max_running_requests": 256, "log_level": "warning"}
        self.engine = sglang.Engine(model_path=spec["model"], **options, **spec["options"])
        args = self.engine.server_args
        self.facts = {"overlap": not args.disable_overlap_schedule}

    def generate(self, requests: list[dict[str, Any]]) -> list[Any]:
        top = max(r["params"].pop("top_logprobs", 0) for r in requests)
        more = {"return_logprob": True, "top_logprobs_num": top} if top else {}
        try:
            outputs = self.engine.generate(
                input_ids=[r["prompt"] for r in requests],
                sampling_params=[r["params"] for r in requests],
                **more,
            )
        except Exception:  # one request's error is the whole call's: ask one by one
            return [self.generate_one(r) for r in requests]
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return [self.read(output) for output in outputs]

    def generate_one(self, request: dict[str, Any]) -> Any:
        try:
            output = self.engine.generate(
                input_ids=request["prompt"], sampling_params=request["params"]
            )
        except Exception as error:  # whatever the engine raises is the answer
            return {"error": str(error)}
        return self.read(output)

    @staticmethod
    def read(output: dict[str, Any]) -> list[dict[str, Any]]:
        about = output["meta_info"]
        first = (about.get("output_top_logprobs") or [[]])[0]
        return [
            {
                "tokens": list(output["output_ids"]),
                "finish_reason": about["finish_reason"],
                "stop_reason": None,
                "first": {int(token): log_prob for log_prob, token, *_ in first},
            }
        ]

    def params(self, num_tokens: int, control: dict[str, Any] | None, seed: int) -> dict[str, Any]:
        extra = {"custom_params": {"lenvm": control}} if control else {}
        return {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0, **extra}


class MachineWorker:
    """tests/engines/machine.py plays vLLM, with a tiny generator and lenvm's real processor."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from types import SimpleNamespace

        import torch
        from transformers import AutoModelForCausalLM

        tests = Path(__file__).parents[1] / "tests"
        others = [path for path in sys.path if Path(path).name != "benchmarks"]
        sys.path[:] = [str(tests), str(tests / "engines/stand_in"), *others]
        if os.environ.get("LENVM_BENCH_TIMERS"):
            self.timers = Timers()
        from engines.machine import V1Machine
        from lenvm.engines.vllm import register
        from lenvm.engines.vllm.guidance import LengthGuidance

        register()
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
        size = model.config.vocab_size
        parts: dict[str, dict[str, Any]] = {
            "model_config": {
                "model": spec["model"],
                "seed": 0,
                "skip_tokenizer_init": True,
                "is_multimodal_model": False,
                "logits_processors": None,
                "get_vocab_size": lambda: size,
            },
            "parallel_config": {"pipeline_parallel_size": 1, "tensor_parallel_size": 1},
            "scheduler_config": {"max_num_seqs": 64},
            "cache_config": {"kv_cache_memory_bytes": 1, "gpu_memory_utilization": 0.1},
        }
        spaces = {name: SimpleNamespace(**values) for name, values in parts.items()}
        config = SimpleNamespace(speculative_config=None, **spaces)
        with torch.device("cpu"):
            self.processor = LengthGuidance(config, torch.device("cpu"), False)
        memory: dict[tuple[int, ...], Any] = {}

        @torch.inference_mode()
        def logits(tokens: list[int]) -> Any:
            key = tuple(tokens)
            if key not in memory:
                memory[key] = model(torch.tensor([tokens])).logits[0, -1].float()
            return memory[key]

        self.machine = V1Machine(self.processor, logits, seats=64, is_async=True)
        self.facts = {"machine": True, "tokens": (10, 500)}

    def generate(self, requests: list[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        jobs = []
        try:
            for request in requests:
                params = SamplingParams(**request["params"])
                params._eos_token_id = None if params.ignore_eos else 2
                jobs.append(self.machine.submit(params, request["prompt"]))
        except ValueError as error:
            return [{"error": str(error)}]
        self.machine.run()
        ends = [None if job.stop_reason is None else "stop" for job in jobs]
        return [
            [{"tokens": job.tokens, "finish_reason": end, "stop_reason": job.stop_reason}]
            for job, end in zip(jobs, ends, strict=True)
        ]

    params = VllmWorker.params


class Timers:
    """Times of guidance's parts, each with a wait for the device before and after."""

    def __init__(self) -> None:
        from lenvm.engines.adapter import GuidedBatch
        from lenvm.guidance.scorer import CandidateScorer
        from lenvm.guidance.session import GuidanceSession

        self.is_on = False
        self.seconds: dict[str, float] = {}
        self.wrap(GuidedBatch, "settle", "batch")
        self.wrap(GuidedBatch, "step", "batch")
        self.wrap(GuidanceSession, "draw", "session")
        self.wrap(GuidanceSession, "commit", "session")
        self.wrap(GuidanceSession, "add", "prefill")
        self.wrap(CandidateScorer, "score", "scorer")
        self.wrap(CandidateScorer, "commit", "scorer")

    def wrap(self, cls: type, method: str, part: str) -> None:
        original = getattr(cls, method)

        def timed(*args: Any, **more: Any) -> Any:
            if not self.is_on:
                return original(*args, **more)
            start = clock()
            result = original(*args, **more)
            self.seconds[part] = self.seconds.get(part, 0.0) + clock() - start
            return result

        setattr(cls, method, timed)


def clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build_batch(worker: Any, command: dict[str, Any], length: int) -> list[dict[str, Any]]:
    source, (low, high) = random.Random(command["concurrency"]), worker.facts.get("tokens", TOKENS)
    prompts = command.get("prompts")
    return [
        {
            "prompt": prompts[i % len(prompts)]
            if prompts
            else [source.randrange(low, high) for _ in range(64)],
            "params": worker.params(length, command.get("control"), i),
        }
        for i in range(command["concurrency"])
    ]


def split(worker: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a step: the base model and the engine's own work, the scorer, the rules with
    candidates, bookkeeping. And the profiler's table of a few steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    timers, num_tokens = worker.timers, command["num_tokens"]
    worker.generate(build_batch(worker, command, 192 if command.get("prompts") else 24))
    timers.seconds.clear()
    timers.is_on = True
    start = clock()
    worker.generate(build_batch(worker, command, num_tokens))
    total = clock() - start
    timers.is_on = False
    found = {part: timers.seconds.get(part, 0.0) for part in ("batch", "session", "scorer")}
    prefill = timers.seconds.get("prefill", 0.0)
    start = clock()
    worker.generate(build_batch(worker, {**command, "control": None}, num_tokens))
    unguided = clock() - start
    start = clock()
    worker.generate(build_batch(worker, command, num_tokens))
    untimed = clock() - start
    parts = {
        "base": total - found["batch"],
        "scorer": found["scorer"],
        "rules": found["session"] - found["scorer"],
        "bookkeeping": found["batch"] - found["session"] - prefill,
        "prefill": prefill,
    }
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        worker.generate(build_batch(worker, command, 16))
    averages = profiler.key_averages()
    on_gpu = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    tables = [averages.table(sort_by=key, row_limit=30) for key in (on_gpu, "self_cpu_time_total")]
    return {
        "concurrency": command["concurrency"],
        "ms_per_step": {part: s / num_tokens * 1e3 for part, s in parts.items()},
        "unguided_ms_per_step": unguided / num_tokens * 1e3,
        "guided_ms_per_step_without_timers": untimed / num_tokens * 1e3,
        "table": "\n".join(tables),
    }


def measure(worker: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second and time between tokens of requests that all run at once."""
    count, num_tokens = command["concurrency"], command["num_tokens"]

    def batch(length: int) -> list[dict[str, Any]]:
        return build_batch(worker, command, length)

    worker.generate(batch(command.get("warm_up", 24)))  # shapes met for the first time
    start = time.perf_counter()
    short = worker.generate(batch(16))
    middle = time.perf_counter()
    outputs = worker.generate(batch(num_tokens))
    end = time.perf_counter()
    if "error" in outputs[0]:
        return outputs[0]
    num = sum(len(c["tokens"]) for o in outputs for c in o)
    extra = num_tokens - 16
    return {
        "tokens_per_s": num / (end - middle),
        "inter_token_ms": ((end - middle) - (middle - start)) / extra * 1e3,
        "num_tokens": num,
        "complete": num == count * num_tokens and len(short) == count,
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    start = time.perf_counter()
    kinds = {"vllm": VllmWorker, "sglang": SglangWorker, "machine": MachineWorker}
    worker = kinds[spec["engine"]](spec)

    def answer(value: Any) -> None:
        print("@@" + json.dumps(value), flush=True)

    answer({"ready": worker.facts, "startup_s": round(time.perf_counter() - start, 1)})
    for line in sys.stdin:
        if not line.strip():
            break
        command = json.loads(line)
        try:
            if command["do"] == "rate":
                answer(measure(worker, command))
            elif command["do"] == "split":
                answer(split(worker, command))
            else:
                answer(worker.generate(command["requests"]))
        except Exception as error:  # the parent goes on with the next point
            answer({"error": repr(error)})
    if hasattr(worker, "engine"):
        worker.engine.shutdown()


if __name__ == "__main__":
    main()
