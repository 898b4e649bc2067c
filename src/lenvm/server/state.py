"""ServerState: what the routes of one server share."""

from dataclasses import dataclass

from lenvm.engines.transformers import TransformersEngine
from lenvm.server.config import ServerConfig
from lenvm.server.errors import ApiError
from lenvm.server.loop import EngineLoop
from lenvm.server.metrics import Metrics
from lenvm.server.prompts import PromptEncoder


@dataclass(frozen=True)
class ServerState:
    """One server's engine, its thread, its limits and its counters."""

    config: ServerConfig
    engine: TransformersEngine
    loop: EngineLoop
    encoder: PromptEncoder
    metrics: Metrics

    @classmethod
    def build(cls, engine: TransformersEngine, config: ServerConfig) -> "ServerState":
        metrics = Metrics()
        loop = EngineLoop(engine, metrics, max_waiting=config.max_waiting)
        return cls(config, engine, loop, PromptEncoder(engine.tokenizer), metrics)

    @property
    def vocab_size(self) -> int:
        """Token ids that both models know: below this."""
        session = self.engine.session
        sizes = [self.engine.vocab_size] + ([session.scorer.vocab_size] if session else [])
        return min(sizes)

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for another model than the one served."""
        if name not in (None, self.config.name):
            raise ApiError(
                404,
                f"no model {name[:100]!r} here; allowed: {self.config.name!r}",
                param="model",
                code="model_not_found",
                value=name,
                allowed=self.config.name,
            )
