"""Images of a prompt as they travel: files into base64 data URLs in the messages of a request."""

import base64
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lenvm.data.prompts import Prompt
from lenvm.errors import DataError


def to_wire_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """Messages in the OpenAI form: every image a part {"type": "image_url", ...}.

    Parts {"type": "image"} take the prompt's images in order; images left over stand before the
    text of the last user message. Raises DataError where there are fewer images than parts, or a
    file cannot be read.
    """
    messages = prompt.messages or []
    if not prompt.images:
        return messages
    images = iter(prompt.images)
    wired = [{**m, "content": _wire_content(m.get("content"), images, prompt)} for m in messages]
    rest = [_image_part(image) for image in images]
    if rest:
        last = max(i for i, m in enumerate(wired) if m.get("role") == "user")
        content = wired[last]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        wired[last]["content"] = rest + parts
    return wired


def _wire_content(content: Any, images: Iterator[str], prompt: Prompt) -> Any:
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
            parts.append(_image_part(image))
        else:
            parts.append(part)
    return parts


def _image_part(image: str) -> dict[str, Any]:
    url = image if image.startswith(("http://", "https://", "data:")) else _data_url(Path(image))
    return {"type": "image_url", "image_url": {"url": url}}


def _data_url(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image {path}: {error.strerror}") from None
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
