"""Benchmarks of graphopt against its peers: ``python -m benchmarks.run --list``, and README.md beside this file."""
