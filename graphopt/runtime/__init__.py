"""What runs at step time: companions are bound to their parameters, statistics are published after backward."""
