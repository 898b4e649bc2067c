"""Published data sets and checkpoints from a model hub: pinned to a commit, resumable, verified.

The first call notes the commit in the manifest; later calls keep to it, whatever the branch
does, and fetch the files that are missing. huggingface_hub fetches; a file appears whole or not at
all, and is then compared with the hub's size and checksum. HF_ENDPOINT names another hub, HF_TOKEN
logs in.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from lenvm.errors import DataError, EndpointError, InputError
from lenvm.files import claim, manifest_path, read_json

RepoKind = Literal["model", "dataset"]

PUBLISHED: dict[str, tuple[str, RepoKind]] = {
    "lenvm-data": ("namezz/LenVM-Data", "dataset"),
    "lenvm-qwen2.5-0.5b": ("namezz/lvm-a-qwen2.5-7b-instruct-b-qwen2.5-0.5b-instruct", "model"),
}
"""Names for what the published system offers: trajectories, and a value model (Qwen2.5-0.5B) of
Qwen2.5-7B-Instruct. Any other OWNER/NAME works as well."""


@dataclass(frozen=True)
class DownloadReport:
    """What a download did; `str` is the message at its end."""

    folder: Path
    repo: str
    commit: str
    num_files: int
    num_bytes: int
    num_fetched: int
    """Files that were not there yet."""

    def __str__(self) -> str:
        state = f"{self.num_fetched} fetched now" if self.num_fetched else "all were there"
        return (
            f"{self.folder}: {self.repo} at {self.commit[:12]}, {self.num_files} files, "
            f"{self.num_bytes / 1e6:.1f} MB, {state}"
        )


def download(
    name: str,
    folder: Path | None = None,
    *,
    kind: RepoKind | None = None,
    revision: str | None = None,
    patterns: Sequence[str] = (),
) -> DownloadReport:
    """Fetch a repository into `folder` (default: downloads/OWNER--NAME) and verify it.

    name: one of `PUBLISHED`, or OWNER/NAME with `kind`. revision: branch, tag or commit; without it
    the commit of an earlier call, else the main branch's. patterns: only files that match one.

    Raises InputError for an unknown name or a folder of other things, EndpointError where the hub
    does not answer or has no such repository, DataError for a full disk or a file that differs.
    """
    repo, kind = _resolve(name, kind)
    folder = folder or Path("downloads") / repo.replace("/", "--")
    pinned = _find_pinned(folder)
    with _explaining(repo, folder):
        commit, wanted = _ask(repo, kind, revision or pinned or "main", patterns)
        if not wanted:
            raise InputError(f"{repo} at {commit[:12]} has no file that matches {list(patterns)}")
        config = {"repo": repo, "kind": kind, "commit": commit, "patterns": list(patterns)}
        claim(folder, "download", config)
        with _alone(folder):
            missing = [f for f in wanted if not _is_there(folder, f)]
            if missing:
                _fetch(repo, kind, commit, folder, [f.path for f in missing])
            for file in missing:
                _verify(folder, file)
    return DownloadReport(
        folder, repo, commit, len(wanted), sum(f.size for f in wanted), len(missing)
    )


@dataclass(frozen=True)
class _RemoteFile:
    path: str
    size: int
    sha256: str | None


def _resolve(name: str, kind: RepoKind | None) -> tuple[str, RepoKind]:
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
        raise InputError(f"{name!r}: known are {', '.join(PUBLISHED)}, and hub names OWNER/NAME")
    return name, kind or "model"


def _find_pinned(folder: Path) -> str | None:
    """The commit that an earlier call noted. InputError for a folder that is somebody else's."""
    path = manifest_path(folder)
    if path.exists():
        config = read_json(path).get("config") or {}
        return config.get("commit")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and not a download; use another folder")
    return None


def _ask(
    repo: str, kind: RepoKind, revision: str, patterns: Sequence[str]
) -> tuple[str, list[_RemoteFile]]:
    """(commit, files) of a revision, as the hub lists them."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint())
    ask = api.dataset_info if kind == "dataset" else api.model_info
    info = ask(repo, revision=revision, files_metadata=True)
    if info.sha is None:
        raise EndpointError(f"the hub names no commit for {repo} at {revision}")
    return info.sha, [
        _RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None)
        for s in info.siblings or []
        if not patterns or any(fnmatch(s.rfilename, p) for p in patterns)
    ]


def _fetch(repo: str, kind: RepoKind, commit: str, folder: Path, paths: list[str]) -> None:
    from huggingface_hub import snapshot_download

    for part in (folder / ".cache").rglob("*.incomplete"):  # of a call that was killed
        part.unlink()
    snapshot_download(
        repo,
        repo_type=kind,
        revision=commit,
        local_dir=folder,
        allow_patterns=[_escape(path) for path in paths],
        endpoint=_endpoint(),
    )


def _escape(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _is_there(folder: Path, file: _RemoteFile) -> bool:
    path = folder / file.path
    return path.is_file() and path.stat().st_size == file.size


def _verify(folder: Path, file: _RemoteFile) -> None:
    """DataError for a file that is not what the hub lists; it is removed, to be fetched anew."""
    path = folder / file.path
    found = path.stat().st_size if path.is_file() else None
    if found != file.size:
        problem = f"{found} bytes, expected {file.size}"
    elif file.sha256 and _hash_file(path) != file.sha256:
        problem = "the checksum differs"
    else:
        return
    path.unlink(missing_ok=True)
    raise DataError(f"{path} is damaged ({problem}) and was removed; run the same command again")


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's manifest locked. DataError where another process does."""
    import fcntl

    with manifest_path(folder).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder} is being downloaded by another process") from None
        yield


@contextmanager
def _explaining(repo: str, folder: Path) -> Iterator[None]:
    """What huggingface_hub raises, as errors that say what to do."""
    import httpx
    from huggingface_hub import errors

    hub = _endpoint() or "https://huggingface.co"
    kept = "Finished files are kept: run the same command again to go on."
    try:
        yield
    except errors.GatedRepoError:
        raise EndpointError(
            f"{repo} asks for consent: accept its terms on {hub}/{repo} and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise EndpointError(f"{repo} on {hub} has no such revision; leave out --revision") from None
    except errors.RepositoryNotFoundError:
        raise EndpointError(
            f"{hub} has no {repo}, or it is private: check the name and --kind, or set HF_TOKEN"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise EndpointError(
            f"cannot download {repo} from {hub}: {_brief(error)}\n{kept} HF_ENDPOINT names another "
            "hub."
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}. Make room. {kept}"
        ) from error


def _brief(error: Any) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
