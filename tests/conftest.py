"""Set before torch is imported: threads that wait asleep, and one thread in each process that
shares the tests (`pytest -n`). They would else spend most of their time waiting for one another.

Property tests draw the same examples each time, so that a change is judged by what it changed;
HYPOTHESIS_PROFILE=explore draws new ones. None has a deadline: other jobs may run.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
