"""How a value model joins another engine: read from the environment, the same in every process.

An engine's front end checks requests with it, its workers load the value model with it. Where
LENVM_MODEL is not set there is no value model: the plugin does nothing, and a request that asks for
length control is refused.

| variable | default | meaning |
|---|---|---|
| LENVM_MODEL | none | folder of the value model, or FOLDER@BASE for an adapter on that base |
| LENVM_MAX_CANDIDATES | 16 | most candidates of a token; a control's top_k may not be over it |
| LENVM_MAX_REQUESTS | 256 | most guided requests at a time |
| LENVM_GPU_MEMORY | 0.15 | part of the GPU's memory for the value model and its KV cache |
| LENVM_COUNT_CANDIDATES | none | 1: score real candidates only, for one wait for the GPU a step |
| LENVM_GAMMA | none | for checkpoints of the published system, which store none |
| LENVM_UNTESTED_ENGINE | none | 1: run with an engine version that was not tested |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lenvm.errors import CheckpointError, InputError, LenVMError
from lenvm.files import read_json
from lenvm.guidance.request import LengthControl

if TYPE_CHECKING:
    import torch

    from lenvm.guidance.params import Guided
    from lenvm.guidance.scorer import CandidateScorer
    from lenvm.guidance.session import GuidanceSession
    from lenvm.model.value_model import LengthValueModel

DEFAULT_WIDTH = 15
"""A control's own top_k."""
PREFIX = "LENVM_"
FIELD = "lenvm"
"""Name of the control in `vllm_xargs` and `custom_params`."""


@dataclass(frozen=True)
class GuidanceSettings:
    """The value model of an engine, and its limits."""

    model: str
    max_candidates: int = 16
    max_requests: int = 256
    gpu_memory: float = 0.15
    count_candidates: bool = False
    gamma: float | None = None
    untested_engine: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory < 0.9:
            raise InputError(f"LENVM_GPU_MEMORY is {self.gpu_memory}; allowed: over 0, under 0.9")
        for name in ("max_candidates", "max_requests"):
            if getattr(self, name) < 1:
                raise InputError(f"{PREFIX}{name.upper()} is {getattr(self, name)}; at least 1")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "GuidanceSettings | None":
        """None where LENVM_MODEL is not set. InputError names a variable that does not parse."""
        if not environ.get(PREFIX + "MODEL"):
            return None
        kinds: dict[str, Any] = {
            "max_candidates": int,
            "max_requests": int,
            "gpu_memory": float,
            "gamma": float,
            "count_candidates": lambda text: bool(int(text)),
            "untested_engine": lambda text: bool(int(text)),
        }
        given = {}
        for name, kind in kinds.items():
            if text := environ.get(PREFIX + name.upper()):
                try:
                    given[name] = kind(text)
                except ValueError:
                    raise InputError(f"{PREFIX}{name.upper()} is {text!r}, not a number") from None
        return cls(environ[PREFIX + "MODEL"], **given)

    def to_env(self) -> dict[str, str]:
        """What `from_env` reads."""
        values = {
            "MODEL": self.model,
            "MAX_CANDIDATES": str(self.max_candidates),
            "MAX_REQUESTS": str(self.max_requests),
            "GPU_MEMORY": str(self.gpu_memory),
        }
        if self.gamma is not None:
            values["GAMMA"] = str(self.gamma)
        if self.count_candidates:
            values["COUNT_CANDIDATES"] = "1"
        if self.untested_engine:
            values["UNTESTED_ENGINE"] = "1"
        return {PREFIX + name: value for name, value in values.items()}

    # -- what the front end knows without loading weights -----------------------------------------

    @cached_property
    def _facts(self) -> "Facts":
        from lenvm.model.guide import find_guide
        from lenvm.model.loading import split_name
        from lenvm.model.value_model import read_vocab_size

        try:
            vocab_size = read_vocab_size(find_guide(self.model) or self.model)
        except (LenVMError, OSError) as error:
            raise CheckpointError(f"LENVM_MODEL: {error}") from error
        about = split_name(self.model)[0] / "lenvm.json"
        config = read_json(about) if about.exists() else {}
        return Facts(
            gamma=float(self.gamma or config.get("gamma", 0.997)),
            has_distribution=config.get("head") == "distribution",
            max_candidates=self.max_candidates,
            vocab_size=vocab_size,
        )

    @property
    def failure_token_id(self) -> int:
        """The token that ends a request whose guidance failed: the last of the vocabulary."""
        return self._facts.vocab_size - 1

    def check(self, guided: "Guided") -> None:
        """InputError where the value model cannot serve a request. Runs before admission."""
        from lenvm.guidance.scoring import find_fault

        fault = find_fault(guided, self._facts)  # type: ignore[arg-type]  # facts score nothing
        if fault is not None:
            raise InputError(fault)

    # -- what a worker loads ----------------------------------------------------------------------

    def load_session(
        self, device: "torch.device", *, tokenizer: str | None = None
    ) -> "GuidanceSession":
        """The value model on `device` with its KV cache, every step shape compiled; of one with a
        guide both, for the guide scores and the model itself resolves `shortest`.

        tokenizer: the generator's, checked against the value model's.
        """
        import torch

        from lenvm.guidance.scorer import CandidateScorer
        from lenvm.guidance.session import GuidanceSession
        from lenvm.model.tokenization import load_tokenizer
        from lenvm.model.value_model import LengthValueModel

        on_gpu = device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model = LengthValueModel.from_pretrained(
            self.model, gamma=self.gamma, dtype=dtype, device=device
        )
        if tokenizer is not None:
            model.check_tokenizer(load_tokenizer(tokenizer))
        limits: dict[str, Any] = {
            "max_requests": self.max_requests,
            "max_candidates": self.max_candidates,
        }
        if on_gpu:
            limits |= {"max_tokens": 1 << 24, "kv_bytes": self._kv_bytes(model, device)}
        session = GuidanceSession.build(
            model, eos_token_ids=(), count_candidates=self.count_candidates, **limits
        )
        if on_gpu:
            assert isinstance(session.scorer, CandidateScorer)
            self._warm_up(session.scorer)
        return session

    def _warm_up(self, scorer: "CandidateScorer") -> None:
        """Compile and capture what a step of usual width meets, before the first request."""
        width = min(DEFAULT_WIDTH, self.max_candidates)
        for power in (1 << n for n in range((self.max_requests - 1).bit_length() + 1)):
            for rows in {power, 3 * power // 4 or 1, power // 2 + 1}:
                scorer.decoder.warm_up(min(rows, self.max_requests), width)
            scorer.decoder.warm_up(min(power, self.max_requests), 1)

    def _kv_bytes(self, model: "LengthValueModel", device: "torch.device") -> int:
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        models = [model] if model.guide is None else [model, model.guide]
        weights = sum(p.numel() * p.element_size() for m in models for p in m.parameters())
        left = int(self.gpu_memory * total) - weights - (1 << 30)  # work space and graphs
        if left < 1 << 28:
            raise InputError(
                f"LENVM_GPU_MEMORY {self.gpu_memory} is {self.gpu_memory * total / 2**30:.1f} GiB; "
                f"the value model's weights need {weights / 2**30:.1f} GiB of it and work space 1 "
                "GiB: give more, and less to the engine"
            )
        return left


@dataclass(frozen=True)
class Facts:
    """What is known of a value model without its weights."""

    gamma: float
    has_distribution: bool
    max_candidates: int
    vocab_size: int


def read_control(extra: Mapping[str, Any] | None) -> LengthControl | None:
    """The control among a request's extra arguments; None where it has none. ControlError."""
    value = (extra or {}).get(FIELD)
    return None if value is None else LengthControl.parse(value)


def check_version(engine: str, found: str, tested: tuple[str, ...], *, untested: bool) -> None:
    """InputError for an engine release that was not tested, unless `untested` says go on."""
    if found not in tested and not untested:
        raise InputError(
            f"{engine} {found} was not tested with this lenvm (tested: {', '.join(tested)}); "
            "install a tested one, or set LENVM_UNTESTED_ENGINE=1 and check the output"
        )
