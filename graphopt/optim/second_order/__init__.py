"""Curvature from products with the Hessian."""
