"""Images of a prompt: their places in its messages, and files as base64 data URLs on the wire.

A trajectory holds paths, not pixels.
"""

import base64
import mimetypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lenvm.data.prompts import Prompt
from lenvm.data.trajectory import Trajectory, read_trajectories
from lenvm.errors import DataError

ADDRESSES = ("http://", "https://", "data:")


def to_wire_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages in the OpenAI form: every image a part {"type": "image_url", ...}.

    Images stand where `place_images` puts them. Raises DataError as it does, or where a file cannot
    be read.
    """
    return _place(prompt, _image_part)


def place_images(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages whose images are all parts {"type": "image"}, as chat templates take them.

    Parts {"type": "image"} take the prompt's images in order; images left over stand before the
    text of the last user message. Raises DataError where there are fewer images than parts.
    """
    return _place(prompt, lambda _: {"type": "image"})


def read_with_images(*paths: Path) -> Iterator[Trajectory]:
    """`read_trajectories`, with relative image files found from the folder of their JSONL file."""
    for path in paths:
        for trajectory in read_trajectories(path):
            if trajectory.images:
                files = resolve_images(trajectory.images, path.parent)
                trajectory = trajectory.model_copy(update={"images": files})
            yield trajectory


def resolve_images(images: Sequence[str], base: Path) -> list[str]:
    """Absolute image files, relative paths starting in `base`; addresses stay."""
    return [
        image if image.startswith(ADDRESSES) else str((base / image).resolve()) for image in images
    ]


def _place(prompt: Prompt, make: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    messages = prompt.messages or []
    if not prompt.images:
        return messages
    images = iter(prompt.images)
    placed = [
        {**m, "content": _place_parts(m.get("content"), images, prompt, make)} for m in messages
    ]
    rest = [make(image) for image in images]
    if rest:
        last = max(i for i, m in enumerate(placed) if m.get("role") == "user")
        content = placed[last]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        placed[last]["content"] = rest + parts
    return placed


def _place_parts(
    content: Any, images: Iterator[str], prompt: Prompt, make: Callable[[str], dict[str, Any]]
) -> Any:
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "image":
            image = next(images, None)
            if image is None:
                raise DataError(
                    f"prompt {prompt.prompt_hash} has more image parts than its "
                    f"{len(prompt.images)} images"
                )
            parts.append(make(image))
        else:
            parts.append(part)
    return parts


def _image_part(image: str) -> dict[str, Any]:
    url = image if image.startswith(ADDRESSES) else _data_url(Path(image))
    return {"type": "image_url", "image_url": {"url": url}}


def _data_url(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror}") from None
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
