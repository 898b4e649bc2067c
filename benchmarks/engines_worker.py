"""One engine in a process of its own: commands come as JSON lines, answers go out as `@@` lines.

    python benchmarks/engines_worker.py '{"engine": "vllm", "model": ..., "options": {...}}'

Commands: {"do": "rate", "concurrency", "num_tokens", "control"} and {"do": "generate", "requests"};
an empty line ends it. Everything else on stdout is the engine's log.
"""

import json
import random
import sys
import time
from typing import Any


class VllmWorker:
    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import LLM

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
        try:
            outputs = self.engine.generate(
                input_ids=[r["prompt"] for r in requests],
                sampling_params=[r["params"] for r in requests],
            )
        except Exception as error:  # whatever the engine raises is the answer
            return [{"error": str(error)}]
        outputs = outputs if isinstance(outputs, list) else [outputs]
        return [
            [
                {
                    "tokens": list(o["output_ids"]),
                    "finish_reason": o["meta_info"]["finish_reason"],
                    "stop_reason": None,
                }
            ]
            for o in outputs
        ]

    def params(self, num_tokens: int, control: dict[str, Any] | None, seed: int) -> dict[str, Any]:
        extra = {"custom_params": {"lenvm": control}} if control else {}
        return {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0, **extra}


def measure(worker: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second and time between tokens of requests that all run at once."""
    count, num_tokens = command["concurrency"], command["num_tokens"]
    source = random.Random(count)

    def batch(length: int) -> list[dict[str, Any]]:
        return [
            {
                "prompt": [source.randrange(1000, 40_000) for _ in range(64)],
                "params": worker.params(length, command.get("control"), i),
            }
            for i in range(count)
        ]

    worker.generate(batch(24))  # shapes met for the first time
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
    worker = {"vllm": VllmWorker, "sglang": SglangWorker}[spec["engine"]](spec)

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
            else:
                answer(worker.generate(command["requests"]))
        except Exception as error:  # the parent goes on with the next point
            answer({"error": repr(error)})
    if hasattr(worker, "engine"):
        worker.engine.shutdown()


if __name__ == "__main__":
    main()
