"""`vllm serve` in tests: answers /health after a moment, and says what it was started with.

`--die N` ends it with that status before it answers; `--deaf` never answers."""

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

STARTED = time.monotonic()


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        is_up = time.monotonic() - STARTED > 0.4 and "--deaf" not in sys.argv
        self.send_response(200 if is_up else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    print("arguments:", *sys.argv[1:], flush=True)
    print("value model:", os.environ.get("LENVM_MODEL"), flush=True)
    if "--die" in sys.argv:
        sys.exit(int(sys.argv[sys.argv.index("--die") + 1]))
    server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health)

    def stop(number: int, _frame: object) -> None:
        print("ends after signal", number, flush=True)
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server.serve_forever()


if __name__ == "__main__":
    main()
