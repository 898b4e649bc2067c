"""`python -m lenvm`: the command line, for launchers that start modules (torchrun, accelerate)."""

from lenvm.cli import main

main()
