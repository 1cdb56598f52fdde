"""Imports the module that a configuration names; a mistake in a user's own file is told with its place there."""

from __future__ import annotations

import importlib
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

from compress.errors import CompressError


def import_named(module: str, where: str) -> ModuleType:
    """Return the module of that name.

    Raises:
        CompressError: if there is none, or its code fails; naming file, line and what was raised.
    """
    try:
        return importlib.import_module(module)
    except CompressError:
        raise
    # A script without a guard may end the program.
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise CompressError(
                where,
                expected="an importable module",
                received=f"{module} ({error})",
                fix="Correct the name; PYTHONPATH names the folder in which it lies; or install it.",
            ) from error
        raise CompressError(
            where,
            expected=f"a module that can be imported ({module})",
            received=told(error),
            fix="Correct it there; debug=true shows the traceback."
            if missing is None
            else f"Install {missing}, or correct its name there.",
        ) from error


def told(error: BaseException) -> str:
    """Return where in somebody's code an exception was raised, and which one it is."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, text = error.filename, error.lineno, error.msg
    else:
        # The first frame is this module's, or whoever called the code.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if frame.filename[0] != "<"]
        own = [frame for frame in frames if not _of_a_library(frame.filename)] or frames
        file, line = (own[-1].filename, own[-1].lineno) if own else ("", None)
        text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    what = f"{kind}: {text}" if text else kind
    return f"{file}, line {line}: {what}" if file else what


def _of_a_library(file: str) -> bool:
    folders = (sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    return any(Path(file).is_relative_to(folder) for folder in folders)
