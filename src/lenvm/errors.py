"""Every error that lenvm raises on purpose.

A message says what was got, what is allowed, and what to do next. The command line prints the
message alone (no traceback) and exits with `exit_code`; anything that is not a `LenVMError` is a
defect in lenvm and keeps its traceback.
"""

from collections.abc import Sequence


class LenVMError(Exception):
    """Base of all errors that a user can do something about."""

    exit_code = 1


class InputError(LenVMError):
    """An argument, a configuration value or a request that cannot be used as it is."""

    exit_code = 2


class ControlError(InputError):
    """A length control that does not parse.

    `field` names the offending field ("(whole)": how they go together), `value` what was got,
    `allowed` what may stand there; a server turns the three into HTTP 422.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        what = "length control" if field == "(whole)" else f"length control: {field}"
        super().__init__(f"{what} is {value!r}; allowed: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


class RequestError(InputError):
    """Requests of a batch that cannot go on; the others are unharmed. `request_ids` names them, the
    cause says why."""

    def __init__(self, request_ids: Sequence[str], cause: Exception) -> None:
        names = ", ".join(repr(request_id) for request_id in request_ids)
        super().__init__(f"request {names}: {cause}")
        self.request_ids, self.cause = tuple(request_ids), cause


class DataWarning(UserWarning):
    """Data that can be used, with a fault that its user should know of."""


class DataError(LenVMError):
    """A file that is missing, empty, malformed, of another schema, or made with other settings."""

    exit_code = 3


class CheckpointError(LenVMError):
    """A model folder that lacks a part, is of a newer format, or does not fit its generator."""

    exit_code = 4


class EndpointError(LenVMError):
    """A server that does not answer, or answers with something that cannot be used."""

    exit_code = 5


class CapacityError(LenVMError):
    """A request over a budget (KV memory, positions, candidates). Raised before it runs."""

    exit_code = 6


class TrainingError(LenVMError):
    """Training that cannot start or must not go on (a loss that is not finite, changed data)."""

    exit_code = 7


class StageError(LenVMError):
    """A stage of a pipeline whose command failed; the command has said why."""

    exit_code = 8
