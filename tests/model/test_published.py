"""What the published system offers, fetched from a stand-in hub, loads and evaluates as it is."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from lenvm.errors import InputError
from lenvm.files import read_json
from lenvm.model.published import describe_published
from lenvm.model.tokenization import load_tokenizer
from lenvm.model.value_model import LengthValueModel
from stub_hub import Hub, running
from tiny import EOS, tiny_generator, tiny_tokenizer

HIDDEN = 32


def run(*arguments: Any) -> str:
    app = typer.Typer()
    app.callback()(lambda: None)
    for name in ("download", "convert", "eval", "predict", "values"):
        importlib.import_module(f"lenvm.cli.{name}").register(app)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def published_checkpoint(folder: Path) -> dict[str, bytes]:
    """Files of a causal model with its LM head, and the value head by the published names."""
    tiny_generator("llama").to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(1)
    head = {
        "v_head.fc.weight": torch.randn(HIDDEN, HIDDEN) / 8,
        "v_head.fc.bias": torch.randn(HIDDEN) / 8,
        "v_head.summary.weight": torch.randn(1, HIDDEN) / 8,
        "v_head.summary.bias": torch.tensor([-1.0]),
    }
    save_file({k: v.to(torch.bfloat16) for k, v in head.items()}, folder / "value_head.safetensors")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def published_data() -> bytes:
    """A grouped file: three prompts with four answers each, one of them cut off."""
    rows = []
    for i in range(12):
        words = "w9 " * (3 + i)
        rows.append(
            {
                "conversations": [
                    {"from": "human", "value": f"w{10 + i // 4} w20"},
                    {"from": "gpt", "value": words.strip()},
                ],
                "meta_info": {
                    "answer_token_length": 4 + i if i != 11 else 14,
                    "lenvm_idx": i // 4,
                    "split": "test",
                    "dataset_name": "zwhe99/DeepMath-103K",
                    "model_name": "Qwen/Qwen2.5-7B-Instruct",
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "top_k": -1,
                    "max_tokens": 14 if i == 11 else 4096,
                },
                "source_fields": {},
            }
        )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with running(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield hub


def test_published_data_and_checkpoints_evaluate_as_they_are(hub: Hub, tmp_path: Path):
    hub.files = published_checkpoint(tmp_path / "made")
    model = tmp_path / "checkpoint"
    with pytest.raises(InputError, match=r"stores no gamma: name it, --gamma 0\.997"):
        run("download", "owner/name", "-o", model)
    assert run("download", "owner/name", "-o", model, "--gamma", 0.99).strip() == str(model)
    run("download", "owner/name", "-o", model)  # there, and described
    hub.files = {"test/math.jsonl": published_data()}
    data = tmp_path / "data"
    run("download", "owner/name", "--kind", "dataset", "-o", data)
    trajectories = tmp_path / "t.jsonl"
    options = ("-o", trajectories, "--tokenizer", model, "--split", "test")
    run("convert", data / "test" / "math.jsonl", *options)
    run("eval", "length-prediction", trajectories, "--lenvm", model, "-o", tmp_path / "e")
    summary = read_json(tmp_path / "e" / "summary.json")
    assert (summary["num_prompts"], summary["num_censored"]) == (3, 1)
    assert (summary["gamma"], summary["head"]) == (0.99, "scalar")
    rows = run("values", "--trajectories", trajectories, "--lenvm", model, "--limit", 1, "--jsonl")
    value = json.loads(rows)["values"][0]
    loaded = LengthValueModel.from_pretrained(model, dtype=torch.float32)
    assert loaded.config.eos_token_ids == [EOS]
    prompt = json.loads(trajectories.read_text().splitlines()[0])["prompt_token_ids"]
    hidden = loaded.backbone(torch.tensor([prompt])).last_hidden_state[0, -1]
    layers = loaded.head.fc, loaded.head.summary
    z = layers[1](torch.nn.functional.silu(layers[0](hidden)))
    assert value == pytest.approx(-torch.sigmoid(z).item(), rel=2e-2)
    predicted = json.loads(run("predict", "w10 w20", "--lenvm", model, "--jsonl"))
    assert predicted["value"] == pytest.approx(value, rel=1e-5)


def test_gamma_of_a_known_checkpoint_is_its_own(tmp_path: Path):
    published_checkpoint(tmp_path / "c")
    repo = "namezz/lvm-a-qwen2.5-7b-instruct-b-qwen2.5-0.5b-instruct"
    with pytest.raises(InputError, match=r"trained at gamma 0\.997, not 0\.9"):
        describe_published(tmp_path / "c", repo, 0.9)
    with pytest.raises(InputError, match=r"gamma is 1\.5; allowed"):
        describe_published(tmp_path / "c", "owner/name", 1.5)
    config = describe_published(tmp_path / "c", repo)
    assert (config.gamma, config.generator) == (0.997, "Qwen/Qwen2.5-7B-Instruct")
    loaded = LengthValueModel.from_pretrained(tmp_path / "c")
    loaded.check_tokenizer(load_tokenizer(str(tmp_path / "c")))
