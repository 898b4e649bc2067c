"""Whatever the OpenAPI schema allows, and what it does not: never a 5xx, always our error form."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import ask, settle

schemathesis = pytest.importorskip("schemathesis")

OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/length/predict", "POST"),
    ("/v1/length/values", "POST"),
    ("/v1/length/candidates", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
]
MODES = list(schemathesis.GenerationMode)
quick = settings(
    max_examples=int(os.environ.get("LENVM_FUZZ", "25")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def api(client):
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


CASES = [(path, method, mode) for path, method in OPERATIONS for mode in MODES]
CASES = [c for c in CASES if c[1] == "POST" or c[2].value == "positive"]  # a path has no wrong form


@pytest.mark.parametrize(("path", "method", "mode"), CASES, ids=lambda x: getattr(x, "value", x))
def test_no_request_makes_the_server_fail(path, method, mode, api, client):
    seen = set()

    @quick
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens", 4), int):
            case.body["max_tokens"] = min(case.body.get("max_tokens", 4), 4)
        reply = case.call(timeout=60)
        seen.add(reply.status_code)
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert reply.json()["error"]["message"]

    check()
    assert seen


def test_no_operation_of_the_schema_is_left_out(client):
    paths = client.get("/openapi.json").json()["paths"]
    found = {(path, method.upper()) for path, entry in paths.items() for method in entry}
    assert found == set(OPERATIONS)


@quick
@given(raw=st.binary(max_size=200))
def test_random_bytes_are_refused(raw, client):
    for path in ("/v1/chat/completions", "/v1/length/values"):
        reply = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert 400 <= reply.status_code < 500
        assert reply.json()["error"]["message"]


def test_after_all_that_the_server_is_well(client):
    settle(client)
    assert ask(client).status_code == 200
