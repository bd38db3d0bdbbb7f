"""Limits on gradients and updates."""
