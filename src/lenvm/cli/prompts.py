"""`lenvm prompts`: the known prompt sets, or what a source holds."""

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def prompts(
        source: Annotated[
            str | None, typer.Argument(help="File, folder, set name, hub name or `bundled`.")
        ] = None,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="Write them as JSON lines.")
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="At most LIMIT prompts.")] = None,
        shuffle: Annotated[
            int | None, typer.Option(help="Shuffle with this seed before --limit.")
        ] = None,
        where: Annotated[
            list[str] | None, typer.Option(help="Keep prompts with FIELD=VALUE; repeatable.")
        ] = None,
        field: Annotated[
            list[str] | None,
            typer.Option(
                help="Field of the prompt, or NAME=FIELD (prompt, domain, split, images)."
            ),
        ] = None,
        domain: Annotated[str | None, typer.Option(help="Domain of every prompt.")] = None,
        show: Annotated[int, typer.Option(min=0, help="Print the first SHOW prompts.")] = 3,
    ) -> None:
        """List the known prompt sets; or count, show and convert the prompts of one source."""
        from lenvm.cli._console import print_table
        from lenvm.data.prompt_sets import iter_prompt_sets

        if source is None:
            rows = [(n, s.domain, s.repo, s.split, s.licence) for n, s in iter_prompt_sets()]
            print_table("Prompt sets", ["name", "domain", "hub", "split", "licence"], rows)
            return
        image_dir = output.with_name(output.stem + ".images") if output else None
        found = read_source(
            source,
            field=field,
            domain=domain,
            limit=limit,
            seed=shuffle,
            where=where or [],
            image_dir=image_dir,
        )
        _print_counts(source, found)
        for prompt in found[:show]:
            typer.echo(f"\n[{prompt.domain}/{prompt.split}] {prompt.text}")
        if output:
            _write(output, found)


def read_source(
    source: str,
    *,
    field: list[str] | None = None,
    domain: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    where: list[str] = [],  # noqa: B006 - never changed
    shard: str | None = None,
    image_dir: Path | None = None,
) -> list[Any]:
    """Prompts of a source as the commands name it; what was left out is counted on stderr."""
    from collections import Counter

    from lenvm.data.prompts import load_prompts, shard_of

    counts: Counter[str] = Counter()
    conditions = [_parse_pair(text, "--where") for text in where]
    found = load_prompts(
        source,
        fields=dict(_parse_pair(text, "--field", default="prompt") for text in field or []),
        domain=domain,
        limit=limit,
        seed=seed,
        keep=lambda prompt: all(_value(prompt, k) == v for k, v in conditions),
        image_dir=image_dir,
        counts=counts,
    )
    if shard is not None:
        found = shard_of(found, *_parse_shard(shard))
    left_out = [f"{counts[k]} {k}" for k in ("duplicates", "filtered", "unusable") if counts[k]]
    if left_out:
        typer.echo(f"{source}: {len(found)} prompts; left out: {', '.join(left_out)}", err=True)
    return found


def _value(prompt: Any, name: str) -> str | None:
    if name in ("split", "domain"):
        return str(getattr(prompt, name))
    value = prompt.metadata.get(name)
    return None if value is None else str(value)


def _parse_pair(text: str, option: str, default: str | None = None) -> tuple[str, str]:
    from lenvm.errors import InputError

    name, equals, value = text.partition("=")
    if not equals and default:
        return default, text
    if not (equals and name and value):
        raise InputError(f"{option} is {text!r}; expected NAME=VALUE")
    return name, value


def _parse_shard(text: str) -> tuple[int, int]:
    from lenvm.errors import InputError

    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise InputError(f"--shard is {text!r}; expected I/K, such as 0/4")
    return int(index), int(count)


def _print_counts(source: str, prompts: list[Any]) -> None:
    from collections import Counter

    from lenvm.cli._console import print_table

    splits = ("train", "validation", "test")
    counts = Counter((p.domain, p.split) for p in prompts)
    rows = [
        (d, *(counts[d, s] for s in splits), sum(counts[d, s] for s in splits))
        for d in sorted({p.domain for p in prompts})
    ]
    print_table(f"{source}: {len(prompts)} prompts", ["domain", *splits, "all"], rows)


def _write(output: Path, prompts: list[Any]) -> None:
    import json

    from lenvm.files import write_text

    lines = []
    for p in prompts:
        row = {"messages": p.messages} if p.messages is not None else {"prompt": p.prompt_text}
        row |= {"domain": p.domain, "split": p.split, "images": list(p.images), **p.metadata}
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(output, "\n".join(lines) + "\n")
    typer.echo(f"{len(lines)} prompts written to {output}", err=True)
