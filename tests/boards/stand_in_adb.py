"""Speaks adb's command line: ``devices``, ``-s SERIAL``, ``push``, ``shell``; the device is a folder beside it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

here = Path(__file__).parent
device = here / "device"
state = json.loads((here / "state.json").read_text())
words = sys.argv[1:]


def there(text: str) -> str:
    return text.replace("/data/local/tmp", str(device / "data/local/tmp"))


if words[0] == "devices":
    print("List of devices attached")
    for serial, condition in state["devices"]:
        print(f"{serial}\t{condition}")
    sys.exit(0)
serials = [serial for serial, condition in state["devices"] if condition == "device"]
if words[0] == "-s":
    serials = [serial for serial in serials if serial == words[1]]
    words = words[2:]
if len(serials) != 1:
    sys.exit("error: more than one device/emulator" if serials else "error: device not found")
if words[0] == "push":
    if state.get("full") and words[1].endswith(".tflite"):
        sys.exit(f"adb: error: failed to copy '{words[1]}' to '{words[2]}': remote No space left on device")
    shutil.copyfile(words[1], there(words[2]))
    print(f"{words[1]}: 1 file pushed")
elif words[0] == "shell":
    # As adb does: the words are joined by spaces, and the device's shell takes them apart.
    command = there(" ".join(words[1:]))
    if "benchmark_model" in command and "--graph" in command:
        if state.get("unplugged"):
            sys.exit("error: device 'emulator-5554' not found")
        if state.get("hangs"):
            time.sleep(600)
        if "says" in state:
            print(state["says"])
            sys.exit(0)
    sys.exit(
        subprocess.run(["sh", "-c", command], env={**os.environ, "OLD": str(int(bool(state.get("old"))))}).returncode
    )
else:
    sys.exit(f"adb: unknown command {words[0]}")
