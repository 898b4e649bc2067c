"""Set before torch is imported: threads that wait asleep. Tests that run several processes on two
cores would else spend most of their time waiting for one another."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
