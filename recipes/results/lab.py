"""The lab: a folder of what has been made, the models, and the time that is left.

    lab/steps/NAME.json      what a step did: options, seconds, figures, hardware, versions
    lab/tokens/NAME/         sampled completions as token ids (tokens.py)
    lab/data/NAME.jsonl      the same as trajectories, made where a step needs them
    lab/models/NAME/         value models
    lab/answers/NAME/        records of LIFEBench and of the trade-off
    lab/prediction/, lab/grids/, lab/length_tokens/

Everything but `data` travels between machines (`travel.py`).
"""

import gc
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipes.results.tokens import TokenFolder

from lenvm import __version__
from lenvm.engines.replicas import EngineReplicas, EngineSpec
from lenvm.engines.transformers import TransformersEngine
from lenvm.errors import InputError
from lenvm.model.bundled import resolve_model
from lenvm.model.device import has_fast_bf16
from lenvm.model.tokenization import load_tokenizer
from lenvm.model.value_model import LengthValueModel

Options = Mapping[str, Any]
"""What the plan says of a step."""
Found = tuple[dict[str, Any], bool]
"""(figures, whether the step is finished)."""
MEAN_PROMPT = 300
"""More than the mean of every set: what a request's prompt takes of the KV budget."""


class OutOfTime(Exception):
    """The time of a step or a call is over; what is done is kept, and another call goes on."""


@dataclass
class Lab:
    """Where the steps work. `generators`: name -> folder, GGUF file or hub id."""

    folder: Path
    data: Path
    generators: dict[str, str]
    device: str = "cpu"
    deadline: float = float("inf")
    """time.monotonic() at which nothing new is begun."""
    about: dict[str, Any] = field(default_factory=dict)
    """Command and commit, for the result files."""
    replicas: int = 1
    """Processes that answer side by side: one alone is bound by Python, not by the GPU."""
    _engine: tuple[Any, TransformersEngine | EngineReplicas] | None = None

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def dtype(self) -> torch.dtype:
        """bf16 where it is fast."""
        return torch.bfloat16 if has_fast_bf16(self.device) else torch.float32

    def generator(self, name: str) -> str:
        """Path of a generator."""
        if name not in self.generators:
            raise InputError(f"no generator {name!r}; the plan has {', '.join(self.generators)}")
        return resolve_model(self.generators[name])

    def tokenizer(self, name: str) -> Any:
        return load_tokenizer(self.generator(name))

    def tokens(self, name: str) -> TokenFolder:
        return TokenFolder(self.folder / "tokens" / name)

    def trajectories(self, name: str) -> Path:
        """A token folder as a trajectory file, written where it is missing or has grown."""
        path = self.folder / "data" / f"{name}.jsonl"
        self.tokens(name).export(path)
        return path

    def value_model(self, name: str) -> LengthValueModel:
        """A value model that a step trained."""
        model = LengthValueModel.from_pretrained(
            **self.value_source(name), dtype=self.dtype, device=self.device
        )
        model.head.float()
        return model

    def value_source(self, name: str) -> dict[str, Any]:
        """Where `LengthValueModel.from_pretrained` finds what a step trained."""
        folder = self.folder / "models" / name
        base = self.figures(name).get("backbone")
        has_adapter = (folder / "adapter_config.json").exists()
        return {"folder": str(folder), "base_model": self.generator(base) if has_adapter else None}

    def engine(
        self,
        generator: str,
        value_model: str | None,
        *,
        batch: int,
        tokens: int,
        candidates: int,
    ) -> TransformersEngine | EngineReplicas:
        """An engine for `batch` requests of `tokens` each; the last one asked for is kept."""
        key = (generator, value_model, batch, tokens, candidates)
        if self._engine is not None and self._engine[0] == key:
            return self._engine[1]
        self.release()
        share = math.ceil(batch / self.replicas)
        options = {
            "max_requests": share,
            "max_tokens": max(share * tokens, 4096),
            "max_candidates": candidates,
        }
        source = self.value_source(value_model) if value_model else None
        spec = EngineSpec(self.generator(generator), source, self.dtype, options)
        engine: TransformersEngine | EngineReplicas
        if self.replicas > 1:
            engine = EngineReplicas(spec, spread(self.device, self.replicas))
        else:
            engine = spec.load(self.device)
        self._engine = (key, engine)
        return engine

    def release(self) -> None:
        """Give the engine's memory back."""
        if self._engine is not None and isinstance(self._engine[1], EngineReplicas):
            self._engine[1].close()
        self._engine = None
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def figures(self, step: str) -> dict[str, Any]:
        """What a step found; InputError where it was never run."""
        from lenvm.files import read_json

        path = self.folder / "steps" / f"{step}.json"
        if not path.exists():
            raise InputError(f"step {step!r} has not been run in {self.folder}")
        return dict(read_json(path)["figures"])

    def describe_machine(self) -> dict[str, Any]:
        """Hardware and versions, for the result files."""
        import transformers

        on_gpu = self.device.startswith("cuda")
        return {
            **self.about,
            "hardware": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
            "versions": {
                "lenvm": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def spread(device: str, replicas: int) -> list[str]:
    """Devices of the replicas: in turn on all GPUs that the process sees."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{i % count}" if count > 1 else device for i in range(replicas)]


def end_of(lab: Lab, seconds: float | None) -> float:
    """When a part that may take `seconds` begins nothing more."""
    return min(lab.deadline, time.monotonic() + (seconds or float("inf")))
