"""Codes of the packed file: numbers into few bytes and back, without loss. Documented in ``docs/packed_file.md``."""
