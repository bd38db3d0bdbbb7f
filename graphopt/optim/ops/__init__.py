"""Low-level operations on updates, and modules that combine the results of others."""
