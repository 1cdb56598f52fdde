"""``python -m compress.boards.aarch64_root [FOLDER]``: the folder that the board ``aarch64`` runs LiteRT in.

It holds Python from Debian for arm64 and LiteRT with NumPy, in the versions that are installed here. Debian's packages
are fetched and their signatures checked by this machine's own apt, the others by pip; nothing is installed here, and no
rights are needed. The folder appears when it is complete.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from compress.boards.command import Answer, BoardFailure, run_program
from compress.errors import CompressError, run_command

DEFAULT_ROOT = "~/.cache/compress/aarch64"
DEBIAN_PACKAGES = ("python3", "libstdc++6")
PYTHON_PACKAGES = ("ai-edge-litert", "numpy")
LARGEST_DOWNLOAD = 200_000_000
"""Bytes of Debian's packages; today they are 16 million."""
_STEP_SECONDS = 600.0
_SIZE = re.compile(r"^'[^']+' \S+\.deb (\d+) ", re.M)
_LIBC = re.compile(r"libc6_2\.(\d+)")
_OLDEST_LIBC = 17
CPUINFO = """\
processor	: 0
BogoMIPS	: 100.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

"""
"""What Linux says of a Cortex-A76. Older QEMUs show this machine's own to the guest, and LiteRT crashes on it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m compress.boards.aarch64_root",
        description="Make the folder that board=aarch64 runs LiteRT in.",
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(DEFAULT_ROOT), help=f"default: {DEFAULT_ROOT}")
    parser.add_argument(
        "--sources", type=Path, help="a list of apt's, of places that have arm64 (default: this machine's own lists)"
    )
    parser.add_argument(
        "-c", "--constraint", type=Path, help="pip's file of versions (default: the versions that are installed here)"
    )
    given = parser.parse_args(arguments)

    def body() -> None:
        made = make_root(given.folder, given.sources, given.constraint)
        print(f"{made} is complete.")
        if shutil.which("qemu-aarch64-static") is None:
            print("The board needs QEMU's user mode, too: apt-get install qemu-user-static")

    sys.exit(run_command(body))


def make_root(folder: Path, sources: Path | None = None, constraint: Path | None = None) -> Path:
    """Make the root and return its path; what is there already is left alone.

    Args:
        folder: where; it must not be there yet.
        sources: a list of apt's.
        constraint: pip's file of versions.

    Raises:
        CompressError: if something needed is missing, or a download fails; nothing is left then.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CompressError(
            str(folder), expected="a folder that is not there yet", received="one that is", fix="Remove it first."
        )
    for file in (sources, constraint):
        if file is not None and not file.is_file():
            raise CompressError(str(file), expected="a file", received="no such file", fix="Correct the path.")
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CompressError(
                "this machine",
                expected="Debian's apt-get and dpkg-deb",
                received=f"no {tool}",
                fix="Make the folder on a Debian or Ubuntu machine, or in a container of one, and copy it here.",
            )
    wanted = _wanted_versions(constraint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        root = Path(name) / "root"
        try:
            packages = _fetch_debian(Path(name) / "apt", sources)
            _unpack(packages, root)
            _install_python(root, packages, wanted, constraint)
        except BoardFailure as failure:
            raise CompressError(
                "the folder for board=aarch64",
                expected="downloads and programs that work",
                received=str(failure),
                fix="Look at the network, then run the same command again.",
            ) from failure
        root.chmod(0o755)
        root.replace(folder)
    return folder


def _wanted_versions(constraint: Path | None) -> list[str]:
    """Return what pip is to install: the versions that are here, or those of the file of constraints."""
    if find_spec("pip") is None:
        raise CompressError(
            "this Python", expected="pip in it", received="none", fix=f"{sys.executable} -m ensurepip installs it."
        )
    if constraint is not None:
        return list(PYTHON_PACKAGES)
    try:
        return [f"{name}=={version(name)}" for name in PYTHON_PACKAGES]
    except PackageNotFoundError as error:
        raise CompressError(
            "this Python",
            expected=f"{' and '.join(PYTHON_PACKAGES)} in it, to take their versions",
            received=f"no {error.name}",
            fix="Name a file of versions: -c constraints.txt.",
        ) from error


def _fetch_debian(place: Path, sources: Path | None) -> list[Path]:
    """Have apt fetch Python and all that it needs, for arm64, with lists and a cache of its own."""
    for part in ("lists/partial", "cache/archives/partial"):
        (place / part).mkdir(parents=True)
    (place / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Get::AllowUnauthenticated": "false",
        "APT::Sandbox::User": "root",
        "Acquire::AllowInsecureRepositories": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "60",
        "Acquire::https::Timeout": "60",
        "Dir::State": place,
        "Dir::State::lists": place / "lists",
        "Dir::State::status": place / "status",
        "Dir::Cache": place / "cache",
        "Dir::Cache::archives": place / "cache/archives",
    }
    if sources is not None:
        settings |= {"Dir::Etc::sourcelist": sources.absolute(), "Dir::Etc::sourceparts": "/dev/null"}
    apt: list[str | Path] = [
        "apt-get",
        "-qq",
        *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
    ]
    # A list without arm64 is not what is looked for; whether all was found, the next step says.
    updated = _run([*apt, "update"])
    install = [*apt, "install", "--yes", "--download-only", *DEBIAN_PACKAGES]
    planned = _run([*install, "--print-uris"])
    if planned.code != 0:
        raise BoardFailure(
            f"apt found no {' and '.join(DEBIAN_PACKAGES)} for arm64 ({updated.last_error or planned.last_error}); "
            "name a list of places that have it: --sources"
        )
    sizes = [int(size) for size in _SIZE.findall(planned.output)]
    if not sizes or sum(sizes) > LARGEST_DOWNLOAD:
        raise BoardFailure(f"apt would fetch {sum(sizes):,} bytes, at most {LARGEST_DOWNLOAD:,} are taken")
    fetched = _run(install)
    found = sorted((place / "cache/archives").glob("*.deb"))
    if fetched.code != 0 or len(found) != len(sizes):
        raise BoardFailure(f"apt fetched {len(found)} packages of {len(sizes)}: {fetched.last_error}")
    return found


def _unpack(packages: Sequence[Path], root: Path) -> None:
    root.mkdir()
    for package in packages:
        done = _run(["dpkg-deb", "--extract", package, root])
        if done.code != 0:
            raise BoardFailure(f"{package.name} cannot be unpacked: {done.last_error}")
    for name in ("bin", "lib", "sbin"):
        # Newer Debians have all of it in usr, and a package that is not needed otherwise makes these links.
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for path in root.rglob("*"):
        # Such a link would lead out of the root, to a file of this machine.
        if path.is_symlink() and path.readlink().is_absolute():
            target = f"{root}{path.readlink()}"
            path.unlink()
            path.symlink_to(os.path.relpath(target, path.parent))
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(CPUINFO)


def _install_python(root: Path, packages: Sequence[Path], wanted: Sequence[str], constraint: Path | None) -> None:
    """Have pip put LiteRT where the root's Python finds it."""
    python = str((root / "usr/bin/python3").readlink())
    libc = next((int(found[1]) for package in packages if (found := _LIBC.match(package.name))), None)
    if not re.fullmatch(r"python3\.\d+", python) or libc is None:
        raise BoardFailure(f"the Python of the root is {python[:50]!r}, its C library is not known")
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(libc, _OLDEST_LIBC - 1, -1)]
    command: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={python.removeprefix('python')}", *(f"--platform={tag}" for tag in tags)]
    command += ["--platform=manylinux2014_aarch64", "--target", root / f"usr/local/lib/{python}/dist-packages"]
    command += ["--constraint", constraint.absolute()] if constraint is not None else []
    done = _run([*command, *wanted])
    if done.code != 0:
        raise BoardFailure(f"pip found no {' and '.join(wanted)} for {python} on arm64: {done.last_error}")


def _run(command: Sequence[str | Path]) -> Answer:
    return run_program(command, _STEP_SECONDS, env={"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"})


if __name__ == "__main__":
    main()
