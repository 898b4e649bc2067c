from dataclasses import dataclass
from typing import Any


@dataclass
class EmbeddingPoolerOutput:
    embeddings: Any
    pooled_hidden_states: Any = None
