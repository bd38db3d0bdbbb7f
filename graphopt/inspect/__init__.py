"""Records, reports and graph views."""
