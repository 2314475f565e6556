#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "uvloop", "lmdb>=3,<4", "aiofiles", "asyncpg", "pytest", "pytest-asyncio",
# ]
# ///
"""The promises of mkv, tested on the real thing: real nginx, sockets, LMDB, PostgreSQL, kill -9.

The chapters are files in tests/; arguments are pytest's. Some tests need root, mounts, a second
processor, strace or PostgreSQL: they are skipped where that is missing, and say so.
"""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
LOOP = "asyncio_default_fixture_loop_scope"  # an option of pytest-asyncio that wants to be set


class Clock:
    """How long each chapter takes."""

    def __init__(self) -> None:
        self.seconds: Counter = Counter()
        self.began = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A step of a test has ended."""
        self.seconds[Path(report.location[0]).stem] += report.duration

    def pytest_sessionfinish(self) -> None:
        """All have."""
        for chapter, seconds in self.seconds.items():
            print(f"\n{chapter}: {seconds:.0f} s", end="")
        print(f"\nin all: {time.monotonic() - self.began:.0f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    some = [word for word in sys.argv[1:] if Path(word.partition("::")[0]).exists()]
    chapters = [] if some else [str(HERE / "tests")]
    options = [
        "-p",
        "no:cacheprovider",
        "-rs",
        "--rootdir",
        str(HERE),
        "-o",
        f"{LOOP}=function",
        *sys.argv[1:],
    ]
    sys.exit(pytest.main([*chapters, *options], plugins=[Clock()]))
