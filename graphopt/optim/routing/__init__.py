"""Modules that send parameters, or steps, to different chains."""
