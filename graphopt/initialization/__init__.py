"""Learn how large each parameter should be before training starts."""
