"""Other modules in another space."""
