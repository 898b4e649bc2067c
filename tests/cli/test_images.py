"""Images through the commands: sent to the server, kept as paths, read by the value model."""

import base64
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lenvm.data.prompts import load_prompts
from lenvm.data.trajectory import read_trajectories
from lenvm.engines.rollout import rollout
from lenvm.engines.sampling import SamplingParams
from lenvm.errors import InputError
from lenvm.files import read_json
from lenvm.model.value_model import LengthValueModel, LenVMConfig
from stub_server import stub_server
from tiny_vlm import IMAGE, VISION_START, save_tiny_vlm, tiny_vlm_tokenizer

IMAGES = sorted((Path(__file__).parents[1] / "images").glob("*.jpg"))


def run(*arguments: Any) -> str:
    app = typer.Typer()
    app.callback()(lambda: None)
    for name in ("sample", "convert", "values", "predict", "eval"):
        importlib.import_module(f"lenvm.cli.{name}").register(app)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm") / "base")


@pytest.fixture(scope="module")
def checkpoint(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "value"
    torch.manual_seed(3)
    LengthValueModel.build(base, LenVMConfig(gamma=0.99), dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = []
    for image in IMAGES:
        shutil.copy(image, tmp_path / image.name)
        rows.append({"prompt": f"w9 {image.stem}", "image": image.name, "split": "test"})
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "w10"}]))
    return path


def test_images_go_to_the_server_and_come_back_as_values(
    base: str, checkpoint: Path, prompts: Path, tmp_path: Path
):
    path = tmp_path / "t.jsonl"
    with stub_server(token_ids=False, owned_by="openai", max_length=12) as stub:
        options = ("--endpoint", stub.url, "--tokenizer", base, "-n", 2)
        run("sample", prompts, "-o", path, *options)
        sent = [
            p for r in stub.requests for p in r["messages"][0]["content"] if isinstance(p, dict)
        ]
    urls = [part["image_url"]["url"] for part in sent if part["type"] == "image_url"]
    assert len(urls) == len(IMAGES)
    first = base64.b64decode(urls[0].removeprefix("data:image/jpeg;base64,"))
    assert first in [image.read_bytes() for image in IMAGES]
    found = [t for t in read_trajectories(path) if t.images]
    assert len(found) == 2 * len(IMAGES)
    assert "base64" not in path.read_text()
    model = LengthValueModel.from_pretrained(checkpoint)
    reader = model.images
    assert reader is not None
    for t in found:
        assert reader.expand(t.prompt_token_ids, t.images) == t.prompt_token_ids
        assert t.prompt_token_ids.count(IMAGE) > 1
        assert t.prompt_token_ids.count(VISION_START) == 1
    lines = run("values", "--trajectories", path, "--lenvm", checkpoint, "--jsonl").splitlines()
    for line, t in zip(map(json.loads, lines), read_trajectories(path), strict=True):
        (raw,) = model.read([[*t.prompt_token_ids, *t.completion_token_ids]], images=[t.images])
        length = model.belief(raw).length()[len(t.prompt_token_ids) - 1]
        assert line["remaining_predicted"][0] == pytest.approx(length.item(), abs=1)
        assert line["images"] == t.images
    predicted = run("predict", "--prompts", prompts, "--lenvm", checkpoint, "--jsonl").splitlines()
    assert len(predicted) == len(IMAGES) + 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:  # the server's words are none of the tokenizer's, which reads them all as w3
        row["completion_text"] = tiny_vlm_tokenizer().decode(row["completion_token_ids"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("eval", "length-prediction", path, "--lenvm", checkpoint, "-o", tmp_path / "e")
    assert read_json(tmp_path / "e" / "summary.json")["num_prompts"] >= len(IMAGES)


def test_values_of_a_prompt_with_an_image(checkpoint: Path):
    command = ("values", "w9 what", "w11 w12", "--lenvm", checkpoint, "--jsonl")
    first, second = (json.loads(run(*command, "--image", image)) for image in IMAGES[:2])
    assert first["tokens"] == second["tokens"]
    assert first["values"] != second["values"]
    assert len(first["values"]) == 4
    assert first["images"] == [str(IMAGES[0])]
    with pytest.raises(InputError, match="--image goes with a PROMPT"):
        run("values", "--trajectories", "x", "--image", "y")


def test_published_rows_with_images_become_trajectories(base: str, tmp_path: Path):
    shutil.copy(IMAGES[0], tmp_path / "a.jpg")
    row = {
        "conversations": [
            {"from": "human", "value": "<image>w9"},
            {"from": "gpt", "value": "w10 w11"},
        ],
        "meta_info": {"answer_token_length": 3, "model_name": "m", "lenvm_idx": 0},
        "images": ["a.jpg"],
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    run("convert", tmp_path / "p.jsonl", "-o", tmp_path / "t.jsonl", "--tokenizer", base)
    (found,) = read_trajectories(tmp_path / "t.jsonl")
    assert found.images == [str(tmp_path / "a.jpg")]
    assert found.prompt_token_ids.count(IMAGE) > 1
    assert found.usage is not None


def test_the_engine_in_this_process_refuses_images(prompts: Path, tmp_path: Path):
    with pytest.raises(InputError, match="has images, and the engine in this process reads text"):
        rollout(
            None,  # type: ignore[arg-type]
            load_prompts(str(prompts)),
            tmp_path / "t.jsonl",
            n=1,
            sampling=SamplingParams(max_tokens=5),
            model="m",
        )
    assert not (tmp_path / "t.jsonl").exists()
