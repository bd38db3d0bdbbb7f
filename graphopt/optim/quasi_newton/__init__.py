"""Curvature from differences of gradients."""
