"""The stage cache: finished stages on disk; ``python -m compress.cache`` lists and clears it."""
