"""Runs an entry point: a user's mistake becomes one paragraph on stderr and exit code 2."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from typing import Any, cast

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from compress.cli.words import places_of, quoted
from compress.errors import USER_ERROR, CompressError, did_you_mean, nearest, paragraph
from compress.quiet import ending_with_the_reader

_FILES = {"model": ("file", (".keras", ".h5", ".hdf5", ".tflite")), "data": ("npz", (".npz",))}
"""Groups that have a choice for a file of the user's: which it is, and what such files' names end in."""
_EXTRAS = {
    "hydra/launcher": {
        "joblib": "joblib",
        "submitit_local": "submitit",
        "submitit_slurm": "submitit",
        "ray": "ray",
        "ray_aws": "ray",
    },
    "hydra/sweeper": {"search": "search"},
}
"""Choices that need more than the project's own dependencies: group -> choice -> extra."""


def guarded(body: Callable[[], Sequence[CompressError]], arguments: Sequence[str]) -> int:
    """Run ``body`` and return the exit code; the errors that it returns or raises are printed.

    With ``debug=true`` among ``arguments`` a mistake is shown with its traceback.
    """
    with ending_with_the_reader():
        return _guarded(body, arguments)


def _guarded(body: Callable[[], Sequence[CompressError]], arguments: Sequence[str]) -> int:
    debug = "debug=true" in (argument.lower() for argument in arguments)
    # Hydra prints and exits by itself unless told to let its exceptions through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        refuse_passwords(arguments)
        failures = body()
    except KeyboardInterrupt:
        print("\nStopped. Finished stages are in the cache; the same command continues.", file=sys.stderr)
        return 130
    except (CompressError, HydraException, OmegaConfBaseException, OSError, YAMLError) as error:
        if debug:
            raise
        failures = [translate(error, arguments)]
    except (BrokenExecutor, ValueError, RuntimeError) as error:
        # A job of submitit that was ended from outside is one of its own RuntimeErrors; it may not be installed.
        gone = isinstance(error, BrokenExecutor) or type(error).__module__.startswith("submitit.")
        # Hydra refuses some overrides, such as strategy=null, with a bare ValueError; logging wraps an OSError in one.
        in_logging = isinstance(error.__cause__, OSError) and _raised_in(error, "logging.config")
        unwritable = cast(OSError, error.__cause__) if in_logging else None
        if debug or not (gone or unwritable or (isinstance(error, ValueError) and _raised_in(error, "hydra."))):
            raise
        failures = [_worker_gone(error) if gone else translate(unwritable or error, arguments)]
    for failure in failures:
        print(paragraph(failure), file=sys.stderr)
    return USER_ERROR if failures else 0


def _worker_gone(error: Exception) -> CompressError:
    """Return what it means that a launcher's process did not come back."""
    return CompressError(
        "hydra/launcher",
        expected="processes that end by themselves",
        received=f"one that was ended from outside, perhaps for its memory ({type(error).__name__})",
        fix="Run the same command again: what is finished comes from the cache. Fewer at once need less memory.",
    )


def _raised_in(error: BaseException, module: str) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(module)


def refuse_passwords(arguments: Sequence[str]) -> None:
    """Refuse a password on the command line: Hydra and MLflow keep command lines.

    Raises:
        CompressError: if a URI among ``arguments`` carries one.
    """
    for argument in arguments:
        if re.search(r"(?i)://([^\s@:/]*:\S+@|\S*[?&;][\w.-]*(password|passwd|secret|token)[\w.-]*=)", argument):
            key = argument.partition("=")[0]
            place = "the whole URI into the environment variable MLFLOW_TRACKING_URI"
            if key.endswith("storage"):
                place = "it into the database driver's own file or environment, such as PGPASSWORD"
            raise CompressError(
                key,
                expected="a URI without a password; the command line is kept in config dumps",
                received="a URI with a password",
                fix=f"Put {place}.",
            )


def translate(error: Exception, arguments: Sequence[str]) -> CompressError:
    """Return what an exception of Hydra, OmegaConf or the operating system means to the user."""
    if isinstance(error, CompressError):
        return error
    if isinstance(error.__cause__, CompressError):
        # Hydra wraps what a plugin says of its settings.
        return error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_choice(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and "not in struct" in str(cause):
        return _unknown_key(cause, arguments)
    if isinstance(error, OSError):
        return CompressError(
            "files",
            expected="folders and files that can be written and read",
            received=f"{error.strerror or type(error).__name__}: {error.filename or error}",
            fix="Name another folder: hydra.run.dir=... (multirun: hydra.sweep.dir=...), cache.dir=... .",
        )
    if isinstance(error, YAMLError):
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        return CompressError(
            "the configuration" if mark is None else f"{mark.name}, line {mark.line + 1}",
            expected="a YAML file",
            received=str(error.problem if isinstance(error, MarkedYAMLError) else error),
            fix="Correct it there: a bracket, a quote or the indentation.",
        )
    first = " ".join(str(error).split())
    if first.startswith("Additional config directory"):
        return CompressError("--config-dir", expected="a folder that exists", received=first, fix="Correct the path.")
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        first = f"{first} ({' '.join(str(error.__cause__).split())})"
    return CompressError(
        "the command line",
        expected="overrides like key=value",
        received=first[:400] or " ".join(arguments),
        fix="See --help, and --cfg job for all keys.",
    )


def _missing_choice(error: MissingConfigException) -> CompressError:
    group, _, choice = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
    options = [option for option in error.options or [] if not option.endswith(".yaml")]
    whole = (error.missing_cfg_file or "").removesuffix(".yaml")
    for named, (own, suffixes) in _FILES.items():
        path = whole.removeprefix(f"{named}/")
        if whole.startswith(f"{named}/") and (path.endswith(suffixes) or "/" in path):
            fix = f"Write {named}={own} {named}.path={quoted(path)}."
            return CompressError(named, expected=f"one of {', '.join(sorted(options))}", received=path, fix=fix)
    if not group:
        return CompressError(
            "the command line", expected="a config that exists", received=choice, fix=did_you_mean(choice, options)
        )
    extra = _EXTRAS.get(group, {}).get(choice)
    if extra is not None:
        return CompressError(
            group,
            expected=f"one that is installed ({', '.join(sorted(options))})",
            received=f"{choice}, which is not",
            fix=f"Write pip install 'compress[{extra}]'.",
        )
    options = sorted({*options, *_EXTRAS.get(group, {})})
    best = nearest(choice, options)
    return CompressError(
        group,
        expected=f"one of {', '.join(options)}",
        received=choice,
        fix=f"Did you mean {group}={best[0]}?" if len(best) < len(options) else "Choose one of them.",
    )


def _unknown_key(error: OmegaConfBaseException, arguments: Sequence[str]) -> CompressError:
    full_key = str(error.full_key)
    parent = error.parent_node
    keys = [str(key) for key in parent] if parent is not None and OmegaConf.is_dict(parent) else []
    name = full_key.rpartition(".")[2]
    # Only a misspelling of the last part is sure to be one of these keys.
    name = str(error.key) if error.key is not None else name
    above, _, last = full_key.rpartition(".")
    given = next((a for a in arguments if a.startswith((f"{full_key}=", f"{full_key}."))), None)
    value = None if given is None or not given.startswith(f"{full_key}=") else given.partition("=")[2]
    if given is not None and not above and OmegaConf.is_dict(parent) and name in parent.get("strategy", {}):
        return CompressError(full_key, expected="a key that exists", received=name, fix=f"Write strategy.{given}.")
    if value is not None and (other := _other_spelling(full_key, value, parent)) is not None:
        return CompressError(full_key, expected="a key that exists", received=name, fix=f"Write {other}.")
    # Hydra has made an empty mapping of a value that is null.
    fix = (
        did_you_mean(name, [k for k in keys if k[0] != "_"])
        if keys or value is None or "." not in above
        else f"{above} holds nothing yet. Write '{above}={{{last}: {value}}}'."
    )
    return CompressError(full_key, expected="a key that exists", received=name, fix=fix)


def _other_spelling(key: str, value: str, parent: object) -> str | None:
    """Return what an override was meant to be, where that is sure; ``parent``: the mapping that has no such key."""
    above, _, name = key.rpartition(".")
    if name in ("path", "file") and above in _FILES:
        own = f"{above}.path={quoted(value)}"
        return own if isinstance(parent, DictConfig) and "path" in parent else f"{above}={_FILES[above][0]} {own}"
    if not above and isinstance(parent, DictConfig):
        places = places_of(name, cast(Mapping[str, Any], OmegaConf.to_container(parent, resolve=False)))
        return " or ".join(f"{place}={value}" for place in places) or None
    return None
