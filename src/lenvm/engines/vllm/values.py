"""The value model as a vLLM pooling model: per-token values from `POST /pooling`.

    vllm serve CHECKPOINT --runner pooling --hf-overrides '{"architectures": ["LengthValueModel"]}'

Task `token_classify` answers with one row for every token of the prompt: [V, length, raw ...], V in
(-1, 0) at the checkpoint's gamma, the predicted number of tokens still to come, and the head's raw
outputs. The backbone is vLLM's own, so tensor parallelism, chunked prefill (vLLM collects the
chunks, `pooler/tokwise/methods.py`; see `ChunkPool`) and prefix caching
(`PoolingParams.skip_reading_prefix_cache`: per-token tasks do not read it) are vLLM's. The head
runs in fp32, as everywhere.

Written against vLLM 0.25.0: `model_executor/models/adapters.py`, `interfaces_base.py`,
`layers/pooler/`.
"""

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.tokwise import AllPool, TokenPooler, TokenPoolerHead
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import maybe_prefix

from lenvm.engines.values import build_head_of, find_backbone, load_head


class ValuePoolerHead(TokenPoolerHead):  # type: ignore[misc]  # vLLM is not there to be typed
    """Hidden states [N, H] of a request's tokens -> [N, 2 + D]: V, length, raw outputs."""

    def __init__(self, head: Any, gamma: float) -> None:
        super().__init__()
        self.head, self.gamma = head, gamma

    def get_supported_tasks(self) -> Set[Any]:
        return {"token_classify"}

    def forward_chunk(self, pooled_data: Tensor | None, pooling_param: Any) -> Tensor | None:
        if pooled_data is None:  # the prompt is not finished
            return None
        raw = self.head(pooled_data)
        belief = self.head.belief(raw, self.gamma)
        return torch.cat([belief.value()[:, None], belief.length()[:, None], raw], -1)


class ChunkPool(AllPool):  # type: ignore[misc]
    """All tokens of a prompt, also of one in chunks. vLLM 0.25.0 keeps the chunks as views of the
    backbone's output, which under CUDA graphs is a buffer that the next step overwrites: here a
    chunk is kept as a copy."""

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        cursor = pooling_metadata.get_pooling_cursor()
        if not all(cursor.is_finished()):
            hidden_states = hidden_states.clone()
        found: list[Tensor | None] = super().forward(hidden_states, pooling_metadata)
        return found


class VllmLengthValueModel(nn.Module):
    """A backbone of vLLM's with a value head of ours."""

    is_pooling_model = True
    default_seq_pooling_type = "LAST"
    default_tok_pooling_type = "ALL"
    attn_type = "decoder"
    score_type = "bi-encoder"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        architecture = find_backbone("vLLM", model.hf_text_config.model_type)
        cls, _ = ModelRegistry.resolve_model_cls([architecture], model)
        self.backbone = as_embedding_model(cls)(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "backbone")
        )
        self._folder = model.model
        head, gamma = build_head_of(self._folder, model.get_hidden_size())
        pooler = TokenPooler(pooling=ChunkPool(), head=ValuePoolerHead(head, gamma))
        self.pooler = DispatchPooler({"token_classify": pooler})
        self.value_head = head

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.backbone.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden: Tensor = self.backbone(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Backbone from vLLM's loader, the head from its own file."""
        rest = ((name, w) for name, w in weights if not name.startswith("v_head."))
        loaded = {f"backbone.{name}" for name in self.backbone.load_weights(rest) or ()}
        load_head(self.value_head, self._folder, next(self.backbone.parameters()).device)
        names = {name for name, _ in self.named_parameters()}
        return loaded | {n for n in names if n.startswith(("value_head.", "pooler."))}
