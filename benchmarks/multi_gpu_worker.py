"""One engine of `multi_gpu.py serve`: as engines_worker.py, over vLLM's asynchronous engine, which
alone takes data parallelism and does so without an HTTP server between.

    python benchmarks/multi_gpu_worker.py '{"engine": "vllm", "model": ..., "options": {...}}'
"""

import asyncio
from typing import Any

import engines_worker


class AsyncWorker(engines_worker.VllmWorker):
    """All requests of a call run at once; the engine spreads them over its ranks."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        options = {"disable_log_stats": True, "max_model_len": 2048, "max_num_seqs": 256}
        arguments = AsyncEngineArgs(model=spec["model"], **options, **spec["options"])
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.num_requests = 0

        async def start() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        self.llm = self.loop.run_until_complete(start())
        parallel = self.llm.vllm_config.parallel_config
        self.facts = {
            "v2_runner": self.llm.vllm_config.use_v2_model_runner,
            "tensor_parallel": parallel.tensor_parallel_size,
            "data_parallel": parallel.data_parallel_size,
        }

    def generate(self, requests: list[dict[str, Any]]) -> list[Any]:
        return self.loop.run_until_complete(self._generate_all(requests))

    async def _generate_all(self, requests: list[dict[str, Any]]) -> list[Any]:
        return list(await asyncio.gather(*(self._generate(r) for r in requests)))

    async def _generate(self, request: dict[str, Any]) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY
        self.num_requests += 1
        try:
            params = SamplingParams(detokenize=False, output_kind=kind, **request["params"])
            prompt = {"prompt_token_ids": request["prompt"]}
            last = None
            async for output in self.llm.generate(prompt, params, f"r{self.num_requests}"):
                last = output
        except ValueError as error:
            return {"error": str(error)}
        assert last is not None
        return [
            {
                "tokens": list(o.token_ids),
                "finish_reason": o.finish_reason,
                "stop_reason": o.stop_reason,
                "first": {i: x.logprob for i, x in o.logprobs[0].items()} if o.logprobs else {},
            }
            for o in last.outputs
        ]


if __name__ == "__main__":
    engines_worker.VllmWorker = AsyncWorker  # type: ignore[misc]
    engines_worker.main()
