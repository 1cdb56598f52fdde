"""Bytes of a file, as it is and gzipped."""

from __future__ import annotations

import gzip
from pathlib import Path


def file_bytes(path: Path) -> int:
    """Return the size of the file in bytes."""
    return path.stat().st_size


def gzip_bytes(path: Path) -> int:
    """Return the size of the file under gzip, level 9, without a timestamp."""
    return len(gzip.compress(path.read_bytes(), compresslevel=9, mtime=0))
