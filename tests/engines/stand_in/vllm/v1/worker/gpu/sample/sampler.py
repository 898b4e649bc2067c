"""The V2 runner's sampler, as far as bad words: what comes before temperature."""

from typing import Any

import torch


class BadWordsState:
    def apply_bad_words(self, logits: torch.Tensor, *rows: Any) -> None:
        pass


class Sampler:
    def __init__(self) -> None:
        self.bad_words_state = BadWordsState()
        self.added: list[tuple[int, int]] = []

    def add_request(self, req_idx: int, prompt_len: int, sampling_params: Any) -> None:
        self.added.append((req_idx, prompt_len))

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> torch.Tensor:
        processed = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        self.bad_words_state.apply_bad_words(processed, input_batch.idx_mapping_np)
        return processed
