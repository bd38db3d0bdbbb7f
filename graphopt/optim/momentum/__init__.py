"""Averages over time."""
