"""The front end's check of every request's parameters."""

from typing import Any


class InputProcessor:
    def _validate_params(self, params: Any, supported_tasks: tuple[str, ...]) -> None:
        if params.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
