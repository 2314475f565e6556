#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "uvloop", "lmdb>=3,<4", "aiofiles", "asyncpg", "pytest", "pytest-asyncio",
# ]
# ///
"""The promises of mkv, tested on the real thing: real nginx, sockets, LMDB, PostgreSQL, kill -9.

The chapters are files in tests/. Without arguments all of them run, two at a time; arguments are
pytest's. All need nginx. Some need root, mounts, strace, PostgreSQL and so on: they are skipped
where that is missing, and say so.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest

HERE = Path(__file__).resolve().parent
LOOP = "asyncio_default_fixture_loop_scope"  # an option of pytest-asyncio that wants to be set
CHAPTERS = (  # the longest first; those on one line use the same ports
    ("store",),
    ("maintenance",),
    ("postgres",),
    ("operators", "readme"),
    ("http",),
    ("index",),
    ("thrasher",),
)


def run_here(arguments: list[str]) -> int:
    """Run pytest in this process: its exit status."""
    sys.path.insert(0, str(HERE))
    options = ["-p", "no:cacheprovider", "-rs", "--rootdir", str(HERE), "-o", f"{LOOP}=function"]
    return pytest.main([*options, *arguments])


def run_chapters(waiting: SimpleQueue, lane: int, failed: list[str]) -> None:
    """Run chapters, each in a process, until none is left; each lane has ports of its own."""
    while True:
        try:
            names = waiting.get_nowait()
        except Empty:
            return
        files = [str(HERE / f"tests/test_{name}.py") for name in names]
        began, env = time.monotonic(), os.environ | {"LANE": str(lane)}
        command = [sys.executable, __file__, "-q", *files]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        title = f"{', '.join(names)}: {time.monotonic() - began:.0f} s"
        print(f"\n--- {title}\n{done.stdout.decode(errors='replace')}", flush=True)
        if done.returncode:
            failed.append(title)


def main() -> int:
    """Run what is asked for: the exit status."""
    if len(sys.argv) > 1:
        return run_here(sys.argv[1:])
    files = {path.stem.removeprefix("test_") for path in HERE.glob("tests/test_*.py")}
    assert files == {name for names in CHAPTERS for name in names}, files
    waiting, failed, began = SimpleQueue(), [], time.monotonic()
    for names in CHAPTERS:
        waiting.put(names)
    lanes = [threading.Thread(target=run_chapters, args=(waiting, n, failed)) for n in range(2)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    print(f"in all: {time.monotonic() - began:.0f} s;", f"failed: {'; '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
