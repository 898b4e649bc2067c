"""What a server is started with: limits, keys, names. Checked once, at the start."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lenvm.errors import InputError

KEY_VARIABLE = "LENVM_API_KEYS"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """Limits and names of one server."""

    name: str = "lenvm"
    """The model's name in /v1/models and in every answer."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """Empty: nobody is asked for a key."""
    max_waiting: int = 64
    """Completions that may wait for room; more are answered 429."""
    max_body_bytes: int = 4 << 20
    default_max_tokens: int = 1024
    """Where a request names no max_tokens; at least twice the length that it asks for."""
    timeout_s: float = 600.0
    """Longest time of one request."""
    body_timeout_s: float = 30.0
    """Longest time for a request's body to arrive."""
    drain_s: float = 30.0
    """After SIGTERM, running requests have this long to finish."""
    track: bool = False
    """Report values of requests without control, too, unless they say otherwise."""
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for field in ("max_body_bytes", "default_max_tokens", "timeout_s", "body_timeout_s"):
            if getattr(self, field) <= 0:
                raise InputError(f"{field} is {getattr(self, field)}; it must be above 0")
        if self.max_waiting < 0 or self.drain_s < 0:
            raise InputError("max_waiting and drain_s must be at least 0")
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port is {self.port}; allowed: 0 to 65535")

    @property
    def is_loopback(self) -> bool:
        """Only this machine reaches the server."""
        return self.host in LOOPBACK

    def knows(self, key: str) -> bool:
        """Whether a key is one of the server's; takes the same time whichever it is."""
        digest = hashlib.sha256(key.encode()).digest()
        found = False
        for known in self.api_keys:
            found |= hmac.compare_digest(digest, hashlib.sha256(known.encode()).digest())
        return found


def load_api_keys(file: Path | None) -> tuple[str, ...]:
    """Keys of a file (one a line, # comments) or of LENVM_API_KEYS (separated by commas)."""
    if file is None:
        return _clean(os.environ.get(KEY_VARIABLE, "").split(","))
    if not file.is_file():
        raise InputError(f"no API key file {file}")
    keys = _clean(line.partition("#")[0] for line in file.read_text().splitlines())
    if not keys:
        raise InputError(f"{file} holds no API key: one a line")
    return keys


def _clean(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(key.strip() for key in keys if key.strip())
