"""The process: it runs a command; a server starts, serves until a signal comes, and drains."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import nullcontext
from functools import partial
from time import monotonic

import lmdb
import uvloop

from contrib import demo, maintenance
from contrib.flags import parse_flags
from mkv import TICK, Connection, HTTPError, Store

DRAIN_TIME = 10  # seconds from SIGTERM to the end, at most
LAST_TIME = 1  # seconds that an idle connection has, to ask once more


def main() -> None:
    """Run the command of the command line."""
    flags = parse_flags()
    logging.basicConfig(format="%(asctime)s %(message)s", level="INFO")
    bytes(1 << 24)  # glibc learns to keep, and not to fault in again, the memory of large pieces
    try:
        if flags.command != "server":
            sys.exit(maintenance.main(flags))
        with demo.volumes(flags) if flags.demo else nullcontext():
            uvloop.run(serve(flags))
    except (OSError, lmdb.Error, HTTPError) as error:
        print(f"mkv.py: error: -db {flags.db} -port {flags.port}: {error}", file=sys.stderr)
        sys.exit(2)


async def serve(flags: argparse.Namespace) -> None:
    """Serve until a signal comes; then finish what is in hand. OSError, lmdb.Error, HTTPError."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    passed = os.environ.get("LISTEN_PID") == str(os.getpid())  # by systemd
    new = partial(socket.create_server, (flags.bind.strip("[]"), flags.port), family=flags.family)
    listener = socket.socket(fileno=3) if passed else new()
    host, flags.port = listener.getsockname()[:2]
    flags.address = f"[{host}]:{flags.port}" if ":" in host else f"{host}:{flags.port}"
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        loop.add_signal_handler(number, lambda: stop.set() if flags.ready else os._exit(0))
    await maintenance.free(flags)  # of a rebalance
    store = await maintenance.load(flags)
    server = await loop.create_server(lambda: Connection(store), sock=listener, backlog=4096)
    print(f"mkv is at http://{flags.address}, its index in {flags.db}{flags.hint}", flush=True)
    ends = [asyncio.create_task(store.tick()), asyncio.create_task(stop.wait())]
    ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    signal.alarm(2 * DRAIN_TIME)  # should it hang: kill -9 does no harm
    await drain(store)
    ended.pop().result()  # raises what has ended it


async def drain(store: Store) -> None:
    """Answer what has been asked, and end all connections."""
    store.draining, store.gets_at_once, began = True, False, monotonic()
    while store.connections:
        for each in list(store.connections):
            idle = each.idle and not each.transport.get_write_buffer_size()
            if monotonic() > began + (LAST_TIME if idle else DRAIN_TIME):
                each.transport.abort()
        await asyncio.sleep(TICK)
    await asyncio.gather(*store.index.group.running)
