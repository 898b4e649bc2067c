"""The value model as an external model of SGLang's: per-token values from `POST /encode`.

    SGLANG_EXTERNAL_MODEL_PACKAGE=lenvm.engines.sglang python -m sglang.launch_server \\
      --model-path CHECKPOINT --is-embedding --cuda-graph-backend-prefill disabled \\
      --json-model-override-args '{"architectures": ["LengthValueModel"]}'

`embedding` is one row for every token of the prompt: [V, length], V in (-1, 0) at the checkpoint's
gamma, length the predicted number of tokens still to come. The backbone is SGLang's own.

A forward sees only the tokens that are not in the KV cache: the radix cache has the others, or an
earlier chunk of the prompt. So a token's values are kept at the slot of its KV, and an answer is
read along the slots of its request. Whatever finds a token's KV finds its values.

Written against SGLang 0.5.15: `models/qwen2_rm.py`, `model_executor/forward_context.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.pooler import EmbeddingPoolerOutput
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import get_server_args
from torch import Tensor, nn

from lenvm.engines.values import build_head_of, find_backbone, load_head


class LengthValueModel(nn.Module):
    """A backbone of SGLang's with a value head of ours."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self._folder = get_server_args().model_path
        architecture = find_backbone("SGLang", config.model_type)
        cls, _ = ModelRegistry.resolve_model_cls([architecture])
        self.backbone = cls(config, quant_config=quant_config, prefix=prefix)
        self.value_head, self.gamma = build_head_of(self._folder, config.hidden_size)
        self._kept: Tensor | None = None  # [slots of the KV cache, 2] fp32

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: Any,
        input_embeds: Tensor | None = None,
        get_embedding: bool = True,
    ) -> Any:
        """[V, length] of every token of each request so far: a list of [seq_len, 2] fp32."""
        hidden = self.backbone.model(input_ids, positions, forward_batch, input_embeds)
        belief = self.value_head.belief(self.value_head(hidden), self.gamma)
        kept, slots = self._keep(hidden.device), forward_batch.out_cache_loc
        found = torch.stack([belief.value(), belief.length()], -1)
        kept[slots] = found[: len(slots)]
        table = get_req_to_token_pool().req_to_token
        rows = forward_batch.req_pool_indices.tolist()
        lengths = forward_batch.seq_lens_cpu.tolist()
        values = [kept[table[row, :n].long()] for row, n in zip(rows, lengths, strict=True)]
        return EmbeddingPoolerOutput(embeddings=values)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Backbone from SGLang's loader, the head from its own file."""
        self.backbone.load_weights(
            (name if name.startswith("model.") else f"model.{name}", weight)
            for name, weight in weights
            if not name.startswith(("v_head.", "lm_head."))
        )
        load_head(self.value_head, self._folder, next(self.backbone.parameters()).device)

    def _keep(self, device: torch.device) -> Tensor:
        """A row for every slot of the KV cache; slot 0 takes what is padding."""
        pool = get_token_to_kv_pool()
        slots = pool.size + pool.page_size
        if self._kept is None or len(self._kept) != slots:
            self._kept = torch.zeros(slots, 2, device=device)
        return self._kept


EntryClass = LengthValueModel
