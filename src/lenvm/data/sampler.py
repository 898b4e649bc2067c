"""Trajectories from OpenAI-compatible servers: n completions per prompt, appended as they arrive.

Several endpoints work in parallel on one queue; one that stops answering is set aside and named. A
request that keeps failing is written to `OUTPUT.failed.jsonl`, counted, and tried again by the next
run. What is in the file already is never asked for twice.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import Trajectory
from lenvm.errors import DataError, EndpointError, InputError
from lenvm.files import JsonlWriter, claim, read_jsonl
from lenvm.model.tokenization import encode_prompt, load_tokenizer

Wire = Literal["lenvm", "vllm", "sglang"]
Progress = Callable[[str, int, int], None]
GIVE_UP_AFTER = 3
"""Failures in a row after which an endpoint is set aside."""


def sample_from_endpoints(
    prompts: Sequence[Prompt],
    output: Path,
    *,
    endpoints: Sequence[str],
    model: str,
    n: int = 1,
    sampling: dict[str, Any],
    tokenizer: str | None = None,
    concurrency: int = 64,
    controls: Sequence[dict[str, Any]] = (),
    wire: Wire = "lenvm",
    api_key: str = "none",
    timeout_s: float = 600.0,
    progress: Progress = lambda *_: None,
) -> str:
    """Append the missing completions to `output`; returns one line about what happened.

    sampling: temperature, top_p, top_k, min_p, seed, max_tokens. tokenizer: needed for servers that
    return no token ids. Raises InputError where `output` holds a run with other settings, and
    EndpointError when no endpoint is left.
    """
    run = _Run(prompts, output, endpoints, model, n, sampling, tokenizer, controls, wire, progress)
    asyncio.run(run.work(concurrency, api_key, timeout_s))
    return run.report()


def count_done(path: Path) -> Counter[str]:
    """Finished completions per prompt hash, in one pass, without keeping the records."""
    done: Counter[str] = Counter()
    if path.exists():
        done.update(str(row.get("prompt_hash")) for _, row in read_jsonl(path))
    return done


class _Run:
    def __init__(
        self,
        prompts: Sequence[Prompt],
        output: Path,
        endpoints: Sequence[str],
        model: str,
        n: int,
        sampling: dict[str, Any],
        tokenizer: str | None,
        controls: Sequence[dict[str, Any]],
        wire: Wire,
        progress: Progress,
    ) -> None:
        for url in endpoints:
            if not url.startswith(("http://", "https://")):
                raise InputError(f"endpoint {url!r}: expected a URL such as http://HOST:PORT/v1")
        config: dict[str, Any] = {
            "model": model,
            "n": n,
            "sampling": {k: v for k, v in sampling.items() if v is not None},
            "controls": list(controls),
        }
        claim(output, "trajectories", config)
        self.output, self.model, self.n, self.controls = output, model, n, list(controls)
        self.sampling, self.wire, self.progress = config["sampling"], wire, progress
        self.endpoints = list(endpoints)
        self.tokenizer = load_tokenizer(tokenizer) if tokenizer else None
        done = count_done(output)
        self.queue = [(p, done[p.prompt_hash]) for p in prompts if done[p.prompt_hash] < n]
        self.queue.reverse()
        self.pending = len(self.queue)
        self.total = len(prompts) * n
        self.finished = self.before = sum(min(n, done[p.prompt_hash]) for p in prompts)
        self.counts: Counter[str] = Counter()
        self.set_aside: dict[str, str] = {}

    async def work(self, concurrency: int, api_key: str, timeout_s: float) -> None:
        from openai import AsyncOpenAI

        failed_path = self.output.with_name(self.output.name + ".failed.jsonl")
        with JsonlWriter(self.output) as writer, JsonlWriter(failed_path) as failed:
            async with AsyncExitStack() as clients, asyncio.TaskGroup() as tasks:
                for url in self.endpoints:
                    client = await clients.enter_async_context(
                        AsyncOpenAI(base_url=url, api_key=api_key, timeout=timeout_s, max_retries=2)
                    )
                    for _ in range(max(1, concurrency // len(self.endpoints))):
                        tasks.create_task(self._worker(url, client, writer, failed))
        if not failed_path.stat().st_size:
            failed_path.unlink()
        if self.pending:
            raise EndpointError(
                "no endpoint answers: "
                + "; ".join(f"{url}: {why}" for url, why in self.set_aside.items())
                + f". {self.finished} of {self.total} completions are kept in {self.output}; "
                "start the server and run the same command again"
            )

    async def _worker(
        self, url: str, client: Any, writer: JsonlWriter, failed: JsonlWriter
    ) -> None:
        from openai import APIConnectionError, OpenAIError

        in_a_row = 0
        while self.pending and url not in self.set_aside:
            if not self.queue:  # what others hold may come back, when their endpoint fails
                await asyncio.sleep(0.02)
                continue
            prompt, first = self.queue.pop()
            try:
                rows = await self._complete(client, prompt, first)
            except APIConnectionError as error:
                in_a_row += 1
                self.queue.append((prompt, first))
                if in_a_row >= GIVE_UP_AFTER:
                    self.set_aside[url] = str(error.__cause__ or error)
                await asyncio.sleep(0.1 * in_a_row)
            except (OpenAIError, DataError) as error:
                self.pending -= 1
                self.counts["failed"] += self.n - first
                failed.write({"prompt_hash": prompt.prompt_hash, "error": str(error)})
            else:
                in_a_row = 0
                self.pending -= 1
                writer.write_lines(rows)
                self.finished += len(rows)
                self.progress("sample completions", self.finished, self.total)

    async def _complete(self, client: Any, prompt: Prompt, first: int) -> list[bytes]:
        """JSON lines of the missing completions of a prompt, from one request."""
        control = self.controls[first % len(self.controls)] if self.controls else None
        wanted = 1 if self.controls else self.n - first
        fields: dict[str, Any] = {
            key: self.sampling[key]
            for key in ("temperature", "top_p", "max_tokens")
            if key in self.sampling
        }
        if "seed" in self.sampling:
            fields["seed"] = self.sampling["seed"] + first
        extra = {k: self.sampling[k] for k in ("top_k", "min_p") if self.sampling.get(k)}
        fields["extra_body"] = {
            **extra,
            "return_token_ids": True,
            **(_control_field(control, self.wire) if control else {}),
        }
        if isinstance(prompt.conversation, str):
            made = await client.completions.create(
                model=self.model, prompt=prompt.conversation, n=wanted, **fields
            )
        else:
            made = await client.chat.completions.create(
                model=self.model, messages=prompt.conversation, n=wanted, **fields
            )
        rows = [
            self._to_line(prompt, made, choice, first + i, control)
            for i, choice in enumerate(made.choices)
        ]
        if self.controls and first + 1 < self.n:
            self.queue.append((prompt, first + 1))
            self.pending += 1
        return rows

    def _to_line(
        self, prompt: Prompt, made: Any, choice: Any, index: int, control: dict[str, Any] | None
    ) -> bytes:
        message = getattr(choice, "message", None)
        text = (message.content if message is not None else choice.text) or ""
        usage = made.usage.model_dump() if made.usage else {}
        prompt_ids, ids = self._token_ids(prompt, made, choice, text, usage)
        trajectory = Trajectory(
            schema="lenvm.trajectory/1",
            id=f"{prompt.prompt_hash}-{index}",
            prompt_hash=prompt.prompt_hash,
            sample_index=index,
            domain=prompt.domain,
            split=prompt.split,
            messages=prompt.messages,
            prompt_text=prompt.prompt_text,
            prompt_token_ids=prompt_ids,
            completion_token_ids=ids,
            completion_text=text,
            finish_reason=str(choice.finish_reason),
            usage={"prompt_tokens": len(prompt_ids), "completion_tokens": len(ids)},
            sampling=self.sampling,
            length_control=control,
            model=self.model,
            images=list(prompt.images),
            metadata=prompt.metadata,
        )
        return json.dumps(trajectory.to_json(), ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )

    def _token_ids(
        self, prompt: Prompt, made: Any, choice: Any, text: str, usage: dict[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Token ids as the server saw them; re-tokenised where it keeps them to itself."""
        extra = choice.model_extra or {}
        ids = extra.get("token_ids")
        prompt_ids = extra.get("prompt_token_ids") or (made.model_extra or {}).get(
            "prompt_token_ids"
        )
        if ids and prompt_ids:
            return prompt_ids, ids
        if self.tokenizer is None:
            raise DataError(
                "the server returns no token ids; name the model's tokenizer with --tokenizer"
            )
        self.counts["re-tokenised"] += 1
        prompt_ids = prompt_ids or encode_prompt(self.tokenizer, prompt.conversation)
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        if choice.finish_reason == "stop":
            ids.append(self.tokenizer.eos_token_id)
        if len(made.choices) == 1 and usage.get("completion_tokens") not in (None, len(ids)):
            self.counts["of another length than usage says"] += 1
        return prompt_ids, ids

    def report(self) -> str:
        parts = [f"{self.output}: {self.finished - self.before} completions added to {self.before}"]
        parts += [f"{count} {what}" for what, count in self.counts.items()]
        parts += [f"set aside {url} ({why})" for url, why in self.set_aside.items()]
        return "; ".join(parts)


def _control_field(control: dict[str, Any], wire: Wire) -> dict[str, Any]:
    """The control as the server takes it."""
    if wire == "vllm":
        return {"vllm_xargs": {"lenvm": json.dumps(control)}}
    if wire == "sglang":
        return {"custom_params": {"lenvm": control}}
    return {"length": control}
