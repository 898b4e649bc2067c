from collections.abc import Iterator

import httpx
import pytest

from serving import serving


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """A server with a distribution head, shared by the tests that do not change it."""
    with serving() as found:
        yield found
