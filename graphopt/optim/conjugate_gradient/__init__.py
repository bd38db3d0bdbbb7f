"""Conjugate directions."""
