"""Scaling and ablations: a TOML grid of trainings, each evaluated the same way."""
