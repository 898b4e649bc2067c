"""Running an app: uvicorn, signals, the drain."""

import gc
import logging
import signal
import sys
from types import FrameType
from typing import Any

import uvicorn

from lenvm.server.config import ServerConfig

log = logging.getLogger("lenvm.server")


class DrainingServer(uvicorn.Server):
    """Tells the app as soon as it is to stop, so that it takes nothing new and says so."""

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


def run(app: Any, config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT; returns after the drain."""

    def end(sig: int, frame: FrameType | None) -> None:
        """uvicorn raises the signal again when it is done."""

    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, end)
    server = build_server(app, config)
    # What is loaded stays. Counted in, its million objects let the rings of finished requests wait
    # for hundreds of thousands more, and halt every stream when their time comes.
    gc.collect()
    gc.freeze()
    server.run()
    if not server.started:
        sys.exit(1)
