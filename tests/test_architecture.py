"""The layer rule, the cost of importing lenvm, and the one place of each optional library."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lenvm"
LAYERS = [
    {"errors"},
    {"files", "returns"},
    {"model", "data"},
    {"guidance", "training", "rl"},
    {"engines", "evals", "reports"},
    {"server"},
    {"demo", "pipeline"},
    {"cli"},
    {"__main__"},
]
DEPTH = {name: depth for depth, names in enumerate(LAYERS) for name in names}
OPTIONAL = [
    "vllm", "sglang", "trl", "deepspeed", "triton", "cuda", "datasets", "wordcloud", "math_verify"
]  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_above(path: Path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "lenvm" or len(parts) == 1:
            continue
        other = parts[1]
        assert other == own or DEPTH[other] < DEPTH[own], f"{path} imports {name}"


@pytest.mark.parametrize("library", OPTIONAL)
def test_an_optional_library_is_imported_in_one_file_or_a_folder_of_its_name(library: str):
    users = [p for p in modules() if any(n.split(".")[0] == library for n in imports(p))]
    own = PACKAGE / "engines" / library
    assert len(users) <= 1 or all(own in p.parents for p in users), users


def test_importing_lenvm_and_its_command_line_does_not_import_torch():
    code = "import sys, lenvm.cli; lenvm.cli.build_app(); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.strip() == "False"


def test_every_module_says_what_it_is():
    for path in modules():
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text())), path
