"""What every optimizer module stands on: modules, settings, state, chains, and the ways to run them."""
