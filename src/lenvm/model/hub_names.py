"""A model's name that is no folder here: whether the hub or its cache has it.

Asked once before a model is loaded: transformers asks for each of its files with five retries, a
minute for a name that was mistyped where there is no network.
"""

import time

from lenvm.errors import InputError

TRIES, WAIT_S = 2, 1.0


def check_hub_name(name: str) -> None:
    """InputError where `name` is neither in the hub's cache nor on the hub, or the hub cannot be
    reached. A hub that is slow or busy is left to the download itself, which has more patience."""
    from huggingface_hub import errors, is_offline_mode, try_to_load_from_cache

    try:
        files = ("config.json", "adapter_config.json")
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
            return
    except errors.HFValidationError:
        raise _refuse(name, "it is no name on a hub (OWNER/NAME)", "check the path") from None
    if is_offline_mode():
        raise _refuse(
            name,
            "the hub's cache has no model of that name (HF_HUB_OFFLINE is set)",
            "check the name, or download it first",
        )
    fault = _ask(name)
    for _ in range(TRIES - 1):
        if fault is None:
            return
        time.sleep(WAIT_S)
        fault = _ask(name)
    if fault is not None:
        raise _refuse(name, fault, "check the name, or the connection")


def _ask(name: str) -> str | None:
    """Why the hub cannot be reached. InputError where it says that it has no such model."""
    import httpx
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    hub = constants.ENDPOINT
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except errors.GatedRepoError:
        raise _refuse(
            name,
            f"{hub} gives it to those alone who accept its terms",
            f"accept them on {hub}/{name} and set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise _refuse(
            name,
            f"{hub} has no model of that name, or a private one",
            "check the name, or set HF_TOKEN",
        ) from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        return f"{hub} cannot be reached ({str(error) or 'no answer'})"
    except (errors.HfHubHTTPError, httpx.HTTPError):
        return None  # a repository of other files, or a hub that is busy: the download finds out
    return None


def _refuse(name: str, fault: str, advice: str) -> InputError:
    return InputError(f"no model {name!r}: there is no such folder here, and {fault}; {advice}")
