"""Modules that look for flat minima."""
