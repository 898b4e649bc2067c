"""The clients in docs/server.md are run as they stand; what it says of the API is so."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lenvm.server.protocol import ChatRequest
from serving import CHAT, stream

TEXT = Path("docs/server.md").read_text()


def block(language: str) -> str:
    """The first block of the section on clients in that language."""
    section = TEXT.split("## Clients", 1)[1]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def run(command, client, **options) -> str:
    env = {**os.environ, "LENVM_URL": str(client.base_url).rstrip("/")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=60, check=True, **options
    )
    return done.stdout


def test_the_python_client(client):
    assert "40 tokens; expected" in run([sys.executable, "-c", block("python")], client)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_the_javascript_client(client):
    out = run(["node", "--input-type=module", "-e", block("javascript")], client)
    assert int(out.split()[0]) <= 40


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_client(client):
    out = run(["sh", "-c", block("sh")], client)
    assert '"completion_tokens": 12' in out
    assert out.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("language", ["python", "javascript", "sh"])
def test_a_client_is_about_ten_lines(language):
    assert len(block(language).strip().splitlines()) <= 12


def test_every_path_and_field_named_there_exists(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path in set(re.findall(r"`(?:POST|GET) (/[\w/.]*)`", TEXT)):
        known = path in paths or client.get(path).status_code == 200
        assert known, path
    served = TEXT.split("Served:", 1)[1].split("Other fields", 1)[0]
    for name in re.findall(r"`([a-z_]+)", served):
        assert name in ChatRequest.model_fields or name in ("prompt", "length"), name


def test_every_example_of_the_schema_is_answered(client):
    paths = client.get("/openapi.json").json()
    for path, operations in paths["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is None:
            continue
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        for example in paths["components"]["schemas"][name]["examples"]:
            example = dict(example)
            if path.endswith("completions"):
                example["max_tokens"] = example.get("length", {}).get("equal_to", 8)
            if "positions" in example:
                assert len(example["text"].split()) > max(example["positions"])
            reply = client.post(path, json=example)
            assert reply.status_code == 200, reply.text
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def shape(value):
    """Keys of a JSON value, all the way down, but for those that are null: OpenAPI drops them."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return None


def test_the_examples_of_answers_have_the_fields_of_answers(client):
    chat = CHAT | {"length": {"at_least": 4}}
    bodies = {
        "/v1/chat/completions": chat,
        "/v1/completions": {"prompt": "w7", "max_tokens": 4, "length": {"at_most": 4}},
        "/v1/length/predict": {"prompts": ["w7"]},
        "/v1/length/values": {"text": "w7"},
        "/v1/length/candidates": {"text": "w7", "top_k": 1},
    }
    paths = client.get("/openapi.json").json()["paths"]
    assert {path for path, entry in paths.items() if "post" in entry} == set(bodies)
    for path, body in bodies.items():
        content = paths[path]["post"]["responses"]["200"]["content"]
        answer = client.post(path, json=body).json()
        assert shape(answer) == shape(content["application/json"]["example"]), path
        if "text/event-stream" in content:
            assert shape(stream(client, **chat)[0]) == shape(
                content["text/event-stream"]["example"]
            )
