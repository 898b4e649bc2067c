"""The command line: one file per command, each with `register(app)`; errors without tracebacks.

Heavy libraries are imported inside the commands, so that `lenvm --help` is quick.
"""

import importlib
import os
import sys
from typing import Annotated

import typer

from lenvm import __version__
from lenvm.errors import InputError, LenVMError

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
COMMANDS = (
    "demo",
    "generate",
    "predict",
    "values",
    "prompts",
    "sample",
    "convert",
    "merge",
    "grade",
    "stats",
    "train",
    "eval",
    "report",
    "download",
    "run",
    "serve",
)

RESUMING = ("demo", "sample", "train", "eval", "download", "run")
"""Commands that go on where they were interrupted when run again."""
INTERRUPTED = 130

HELP = """Know, steer and see how long a language model's answer will be.

Start with `lenvm demo`, or `lenvm generate --equal-to 120 "Explain why the sky is blue."`
"""


def build_app() -> typer.Typer:
    """The typer application with every command registered."""
    app = typer.Typer(
        name="lenvm",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_print_version)
        ] = False,
        debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    ) -> None:
        if debug:
            os.environ["LENVM_DEBUG"] = "1"

    for name in COMMANDS:
        importlib.import_module(f"lenvm.cli.{name}").register(app)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lenvm {__version__}")
        raise typer.Exit


def prepare_process() -> None:
    """Defaults of the environment, before torch is imported.

    Threads that wait for their neighbours look for work a thousand times and then sleep. Spinning
    longer, torch is many times slower beside another job; asleep at once, slower alone. The policy
    is named, too: without it libgomp looks a hundred times only as soon as two threads of a process
    have used torch (the server's main thread loads what its engine's thread runs), and the server
    is a third slower. KMP_BLOCKTIME is Intel's and LLVM's default: they would spin for ever."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        os.environ.setdefault("KMP_BLOCKTIME", "200")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours say more
    os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> None:
    """Entry point of the `lenvm` script. Exit codes: 0 done, 130 Ctrl-C, else the error's own."""
    prepare_process()
    code: object = 0
    try:
        code = build_app()(standalone_mode=False)  # an Exit comes back as its code
    except LenVMError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        raise SystemExit(InputError.exit_code) from None
    if code == INTERRUPTED:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        kept = "; what was finished is kept, run the same command to continue"
        begin = "\n" if sys.stderr.isatty() else ""  # the terminal has written ^C
        print(
            f"{begin}lenvm: interrupted{kept if command in RESUMING else ''}",
            file=sys.stderr,
        )
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _fail(message: str, code: int) -> None:
    if os.environ.get("LENVM_DEBUG"):
        raise
    print(f"lenvm: {message}", file=sys.stderr)
    raise SystemExit(code)
