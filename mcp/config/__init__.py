"""Configuration: TOML files to frozen classes; a mistake is answered with file, line, key and what was probably meant.

Each program's file has a module of its own here, so that each loads what is its own only.
"""
