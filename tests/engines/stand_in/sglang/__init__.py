"""Stand-in for SGLang in tests: the names that lenvm's adapter touches, nothing else."""
