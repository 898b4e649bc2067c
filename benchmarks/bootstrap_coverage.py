"""How often the evaluations' 95% intervals hold the true mean, by the number of clusters.

    python benchmarks/bootstrap_coverage.py    # two seconds

Each study draws one value a cluster from a normal distribution and asks for the mean, as every
evaluation does (`lenvm.evals.bootstrap`).
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from lenvm.evals.bootstrap import Resampler  # noqa: E402

OUT = ROOT / "benchmarks/results/bootstrap_coverage.json"
NUM_CLUSTERS = (4, 8, 10, 20, 50)
NUM_STUDIES = 4000


def measure(num_clusters: int) -> float:
    """Share of studies whose interval holds the mean."""
    random = np.random.default_rng(num_clusters)
    names = [str(i) for i in range(num_clusters)]
    resampler = Resampler(names)
    held = 0
    for _ in range(NUM_STUDIES):
        found = resampler.mean(random.standard_normal(num_clusters).tolist(), names).to_json()
        held += found["low"] <= 0 <= found["high"]
    return held / NUM_STUDIES


def main() -> None:
    commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    rows = [{"clusters": n, "coverage": round(measure(n), 3)} for n in NUM_CLUSTERS]
    print(json.dumps(rows))
    found = {
        "schema": "lenvm.benchmark.bootstrap_coverage/1",
        "command": "python benchmarks/bootstrap_coverage.py",
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "hardware": platform.machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "num_studies": NUM_STUDIES,
        "rows": rows,
    }
    OUT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
