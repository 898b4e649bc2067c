"""Entry points name what is there, import next to nothing, and do nothing until configured."""

import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "stand_in"
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
TARGETS = {value for group in GROUPS.values() for value in group.values()}


def run(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("LENVM_")}
    env |= {"PYTHONPATH": f"{STAND_IN}:{ROOT / 'src'}", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_groups_are_the_engines_own():
    assert set(GROUPS) == {
        "vllm.general_plugins",
        "sglang.srt.plugins",
    }
    assert all(find_spec(target.split(":")[0]) for target in TARGETS if "guidance" not in target)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_an_entry_point_imports_neither_torch_nor_the_value_model(target):
    module, name = target.split(":")
    code = (
        f"import sys; from {module} import {name} as found\n"
        "if not isinstance(found, type): found()\n"
        "heavy = [m for m in sys.modules if m in ('torch', 'transformers') or "
        "m.startswith(('lenvm.model', 'lenvm.engines.adapter', 'lenvm.guidance.session'))]\n"
        "print(heavy)"
    )
    assert run(code) == "[]"


def test_vllm_finds_the_processor_only_where_there_is_a_value_model(tmp_path):
    code = (
        "from importlib.metadata import entry_points\nfrom lenvm.engines.vllm import register\n"
        "from lenvm.engines.vllm.request import is_installed\n"
        "register(); register()\n"
        "found = [e for e in entry_points(group='vllm.logits_processors') if e.name == 'lenvm']\n"
        "print(len(found), is_installed(), *(e.load().__name__ for e in found))"
    )
    assert run(code) == "0 False"
    assert run(code, LENVM_MODEL=str(tmp_path)) == "1 True LengthGuidance"


def test_lenvm_alone_leaves_vllm_on_its_v2_runner(tmp_path):
    code = (
        "from lenvm.engines.vllm import register\n"
        "from vllm.config.vllm import VllmConfig\n"
        "register(); register()\n"
        "for made in ({}, {'enable_prompt_embeds': True}, {'tensor_parallel_size': 2}):\n"
        "    print(VllmConfig(**made)._get_v2_model_runner_unsupported_features())\n"
        "mine = VllmConfig(); mine.model_config.logits_processors = ['mine:Mine']\n"
        "print(mine._get_v2_model_runner_unsupported_features())"
    )
    processors = "['custom logits processors']"
    expected = ["[]", "['prompt embeds']", processors, processors]
    assert run(code, LENVM_MODEL=str(tmp_path)).splitlines() == expected
    assert run(code).splitlines() == ["[]", "['prompt embeds']", "[]", processors]


def test_a_sign_is_made_only_where_there_is_a_value_model_and_goes_with_its_process(tmp_path):
    code = (
        "import os\nfrom lenvm.engines.vllm import register, show_sign, sees_sign\n"
        "register(); register()\nbefore = sees_sign(); show_sign()\n"
        "print(os.environ.get('LENVM_VLLM_SIGN'), before, sees_sign())"
    )
    assert run(code) == "None False False"
    sign, before, after = run(code, LENVM_MODEL=str(tmp_path), TMPDIR=str(tmp_path)).split()
    assert (before, after) == ("False", "True")
    assert not Path(sign).parent.exists()


def test_the_page_names_every_setting_and_the_flags_that_the_launcher_prints():
    from lenvm.engines.launch import build_command
    from lenvm.engines.settings import GuidanceSettings

    page = (ROOT / "docs/engines.md").read_text()
    settings = GuidanceSettings("runs/model", gamma=0.9, untested_engine=True)
    assert all(f"`{name}`" in page for name in settings.to_env())
    for engine in ("vllm", "sglang"):
        argv, env = build_command(engine, "G", GuidanceSettings("runs/model"))
        skipped = ("--host", "--port", "--logits-processors")
        flags = [w for w in argv if w.startswith("--") and w not in skipped]
        assert all(flag in page for flag in flags)
        assert all(f"{name}={value}" in page for name, value in env.items())
