"""What an operator types and reads; the only package that may touch click, and no other package may touch it."""
