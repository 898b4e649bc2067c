"""The hook registry's shape (SGLang 0.5.15, same path): targets are wrapped when hooks apply."""

import pkgutil
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


class HookRegistry:
    hooks: ClassVar[list[tuple[str, Callable[..., Any], HookType]]] = []

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls) -> None:
        while cls.hooks:
            target, hook, kind = cls.hooks.pop(0)
            path, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(path)
            raw = vars(owner)[name]
            original = getattr(raw, "__func__", raw)
            wrapped = _wrap(original, hook, kind)
            setattr(owner, name, classmethod(wrapped) if original is not raw else wrapped)


def _wrap(
    original: Callable[..., Any], hook: Callable[..., Any], kind: HookType
) -> Callable[..., Any]:
    def wrapped(*args: Any, **more: Any) -> Any:
        if kind == HookType.AROUND:
            return hook(original, *args, **more)
        if kind == HookType.BEFORE:
            args, more = hook(*args, **more) or (args, more)
            return original(*args, **more)
        result = original(*args, **more)
        changed = hook(result, *args, **more)
        return result if changed is None else changed

    return wrapped
