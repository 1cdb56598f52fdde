"""Speaks the command line of QEMU's user mode: ``-cpu``, ``-U``, ``-L``; the program is run by this Python."""

import json
import platform
import runpy
import sys
from pathlib import Path

state = json.loads(Path(__file__).with_name("state.json").read_text())
words = sys.argv[1:]
settings: dict[str, list[str]] = {}
while words[0].startswith("-"):
    settings.setdefault(words[0], []).append(words[1])
    words = words[2:]
(cpu,), (root,) = settings["-cpu"], settings["-L"]
if cpu not in ("cortex-a76", "max"):
    sys.exit(f"qemu-aarch64-static: unable to find CPU model '{cpu}'")
if words[:2] != [f"{root}/usr/bin/python3", "-I"] or set(settings["-U"]) != {"LD_PRELOAD", "LD_LIBRARY_PATH"}:
    sys.exit(f"no such program: {words}")
platform.machine = lambda: state.get("machine", "aarch64")
exec(state.get("first", ""))
sys.argv = words[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
exec(state.get("then", ""))
