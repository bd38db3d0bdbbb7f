"""What a person can see: reports of what passes did, and where nodes come from."""
