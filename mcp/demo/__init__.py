"""A whole fleet on this machine, shown and removed again."""
