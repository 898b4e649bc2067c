"""Running an app: uvicorn, signals, the drain."""

import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn

from lenvm.errors import InputError
from lenvm.server.config import ServerConfig

log = logging.getLogger("lenvm.server")


class DrainingServer(uvicorn.Server):
    """Tells the app as soon as it is to stop, so that it takes nothing new and says so."""

    on_start: Callable[[str], None] | None = None
    """Told the URL once the server answers."""

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets) if sockets else None)
        if self.started and self.on_start is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        server = getattr(getattr(self.config.app, "state", None), "server", None)
        if server is not None:
            server.loop.draining = True
        log.info("draining", extra={"event": "drain", "signal": signal.Signals(sig).name})
        super().handle_exit(sig, frame)


def build_server(app: Any, config: ServerConfig) -> DrainingServer:
    """A server that is not yet running."""
    return DrainingServer(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=int(config.drain_s) or 1,
            timeout_keep_alive=30,
            lifespan="on",
            ws="none",
            server_header=False,
        )
    )


def bind(host: str, port: int) -> socket.socket:
    """The address, taken before a model is loaded. InputError where it cannot be."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise InputError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose another --port or "
            "--host"
        ) from None
    return taken


def run(
    app: Any,
    config: ServerConfig,
    taken: socket.socket | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; returns after the drain.

    taken: an address of `bind`. on_start is told the server's URL once it answers."""

    def end(sig: int, frame: FrameType | None) -> None:
        """uvicorn raises the signal again when it is done."""

    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, end)
    server = build_server(app, config)
    server.on_start = on_start
    # What is loaded stays. Counted in, its million objects let the rings of finished requests wait
    # for hundreds of thousands more, and halt every stream when their time comes.
    gc.collect()
    gc.freeze()
    server.run(None if taken is None else [taken])
    if not server.started:
        sys.exit(1)
