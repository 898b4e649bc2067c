"""SGLang, as released: its plugin entry point and nothing else.

`register` is the entry point `sglang.srt.plugins`, which SGLang calls in every process. Where
LENVM_MODEL is set it asks SGLang's own hook registry for five hooks (hooks.py); else it does
nothing. requests.py maps SGLang's batch onto a `GuidedBatch`. Hooks that could not be applied would
ignore controls without a word, so a release that was not tested ends the process.
"""

import os

TESTED = ("0.5.15",)
"""SGLang releases that this package was written against."""
PROCESSOR = "lenvm"
"""Name of the processor on the server; requests never carry code."""


def register() -> None:
    """Hooks for length control, where there is a value model. SystemExit where they cannot be."""
    if not os.environ.get("LENVM_MODEL"):
        return
    from importlib.metadata import version

    from lenvm.engines.settings import GuidanceSettings, check_version
    from lenvm.errors import LenVMError

    try:
        settings = GuidanceSettings.from_env()
        assert settings is not None
        check_version("SGLang", version("sglang"), TESTED, untested=settings.untested_engine)
        from lenvm.engines.sglang import hooks

        hooks.register()
    except (LenVMError, ImportError) as error:  # SGLang would only log what a plugin raises
        raise SystemExit(f"lenvm: {error}") from error
