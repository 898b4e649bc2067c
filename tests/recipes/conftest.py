"""Recipes and benchmarks are scripts beside the package, so where they lie is said here."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]
