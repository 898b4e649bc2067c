"""Why a request ended."""

from typing import Any


class FINISH_ABORT:
    def __init__(self, message: Any = None, status_code: Any = None, err_type: Any = None) -> None:
        self.message, self.status_code, self.err_type = message, status_code, err_type
