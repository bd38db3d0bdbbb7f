"""Chains of element-wise rules over one-dimensional views: traced once, run as a compiled kernel or as foreach calls."""
