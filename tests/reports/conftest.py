from pathlib import Path

import pytest

from reports.made_up_evals import write_everything


@pytest.fixture(scope="session")
def everything(tmp_path_factory) -> Path:
    """A folder with a result of every evaluation and `traces.jsonl`."""
    root = tmp_path_factory.mktemp("everything")
    write_everything(root)
    return root
