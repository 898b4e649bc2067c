"""The front end's last step before a request goes to the scheduler."""

from typing import Any


class TokenizerManager:
    def __init__(self, server_args: Any) -> None:
        self.server_args = server_args

    def _create_tokenized_object(self, obj: Any, input_text: Any, input_ids: list[int]) -> Any:
        return obj.sampling_params, obj.custom_logit_processor, input_ids
