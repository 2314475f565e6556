#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["uvloop"]
# ///
"""thrasher: load for mkv, and a benchmark of it.

python thrasher.py        writes, reads and deletes keys on a running server, and compares what it
                          reads; ends with status 1 at the first wrong answer
python thrasher.py bench  brings up volumes and a server in a temporary folder (on the disk that
                          TMPDIR is on), measures, prints a Markdown table; nothing of it survives
"""

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

HERE = Path(__file__).resolve().parent  # mkv.py and volume.sh lie there too
PIECE = 1 << 18  # bytes of a large value that are handed to the socket at once
START_TIME = 20  # seconds that a process has until it listens

# --- client ---------------------------------------------------------------------------------------
# Just enough of HTTP/1.1 to cost less than what is measured: raw protocols, one write a request.

LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
LOCATION = re.compile(rb"\r\nlocation: *http://([^/\r]+)([^\r]*)", re.IGNORECASE)
CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Wrong(Exception):
    """An answer that a correct server would not have given."""


class Wire(asyncio.Protocol):
    """A keep-alive connection, for one request at a time."""

    transport: asyncio.Transport
    reply: asyncio.Future[tuple[bytes, bytes]]  # head, every line with its CR LF, and body
    drained: asyncio.Future[None] | None = None  # there while the peer reads slowly

    def __init__(self) -> None:
        self.buffer, self.head, self.length = bytearray(), b"", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        self.drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self.drained:
            self.drained.set_result(None)
            self.drained = None

    def connection_lost(self, error: Exception | None) -> None:
        self.resume_writing()
        if not self.reply.done():
            self.reply.set_exception(ConnectionError(f"the connection broke: {error or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.head:
            size = self.buffer.find(b"\r\n\r\n")
            if size < 0:
                return
            self.head = bytes(self.buffer[: size + 2])
            del self.buffer[: size + 4]
            length = LENGTH.search(self.head)
            self.length = int(length[1]) if length else 0
        if len(self.buffer) < self.length:
            return
        if not self.reply.done():
            self.reply.set_result((self.head, bytes(self.buffer)))
        if CLOSE.search(self.head):
            self.transport.close()
        self.head = b""
        self.buffer.clear()

    async def exchange(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Send a request, wait for the head and the body of its answer. ConnectionError."""
        self.reply, view = asyncio.get_running_loop().create_future(), memoryview(body)
        self.transport.write(head + view[:PIECE])
        for start in range(PIECE, len(body), PIECE):
            if self.drained:
                await self.drained
            if self.reply.done():  # refused
                break
            self.transport.write(view[start : start + PIECE])
        return await self.reply


class Client:
    """Somebody who asks one thing after the other, on one connection to each address."""

    def __init__(self) -> None:
        self.wires: dict[str, Wire] = {}

    async def ask(
        self, address: str, method: str, path: str, status: int, body: bytes = b""
    ) -> tuple[bytes, bytes]:
        """The head and the body of an answer. Wrong when it has another status; OSError."""
        wire = self.wires.get(address)
        if not wire or wire.transport.is_closing():
            host, _, port = address.rpartition(":")
            loop = asyncio.get_running_loop()
            _, wire = await loop.create_connection(Wire, host.strip("[]"), int(port))
            self.wires[address] = wire
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {address}\r\n{length}\r\n"
        fields, text = await wire.exchange(head.encode(), body)
        if int(fields[9:12]) != status:
            said = (fields.partition(b"\r")[0] + b" " + text[:200]).decode(errors="replace").strip()
            raise Wrong(f"{method} {path}: not {status}, but {said}")
        return fields, text

    async def read(self, server: str, path: str, value: bytes) -> None:
        """GET a key, follow the redirect, compare the value. Wrong, OSError."""
        redirect, _ = await self.ask(server, "GET", path, 302)
        target = LOCATION.search(redirect)
        if not target:
            raise Wrong(f"GET {path}: a redirect to nowhere")
        _, body = await self.ask(target[1].decode(), "GET", target[2].decode(), 200)
        if body != value:
            raise Wrong(f"GET {path}: not the value that was written")


# --- thrash ---------------------------------------------------------------------------------------
# The ancestors' benchmark: many clients, each of which writes, reads and deletes one key at a time.


async def thrash(
    server: str, work: Iterable[object], clients: int = 16, size: int = 64, keys: int = 10_000
) -> dict[str, list[float]]:
    """One cycle for each element of `work`; the seconds that its requests took, by verb.

    A key is written by one client only, so no two requests for it are under way. Wrong, OSError.
    """
    work, took = iter(work), {"PUT": [], "GET": [], "DELETE": []}
    prefix = f"/thrash-{secrets.token_hex(4)}-"  # nobody else's, not even an aborted run's

    async def cycles(number: int) -> None:
        client, mine = Client(), itertools.cycle(range(number, keys, clients))
        for _ in work:
            path = f"{prefix}{next(mine)}"
            value = (path.encode() * (size // len(path) + 1))[:size]
            times = [time.perf_counter()]
            await client.ask(server, "PUT", path, 201, value)
            times.append(time.perf_counter())
            await client.read(server, path, value)
            times.append(time.perf_counter())
            await client.ask(server, "DELETE", path, 204)
            times.append(time.perf_counter())
            for verb, (begin, end) in zip(took, itertools.pairwise(times), strict=True):
                took[verb].append(end - begin)

    await asyncio.gather(*map(cycles, range(clients)))
    return took


def classic(flags: argparse.Namespace) -> None:
    """What `python thrasher.py` does."""
    clients, keys = min(flags.clients, flags.count), flags.keys or flags.count
    began = time.perf_counter()
    took = uvloop.run(thrash(flags.server, range(flags.count), clients, flags.size, keys))
    seconds = time.perf_counter() - began
    for verb, times in took.items():
        ordered = sorted(times)
        p50, p99 = (ordered[int(len(ordered) * part)] * 1000 for part in (0.5, 0.99))
        print(f"{verb:6} p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {ordered[-1] * 1000:.2f} ms")
    print(f"{flags.count} write/read/delete in {seconds:.1f}s")
    print(f"thats {flags.count / seconds:.2f}/sec")


# --- system ---------------------------------------------------------------------------------------
# What a row of the table is measured on: a fresh mkv, whose processes end with the block that needs
# them, and what Linux tells of these.

# Arguments: folder of the index, number of keys, volumes. Makes the keys /key-00000000 and so on.
# There are no files; that goes unnoticed while the volumes are trusted.
FILL = """
import lmdb, mkv, sys
path, count, volumes = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
replicas = tuple(mkv.Replica(volume, "6000000000000000") for volume in volumes)
text = mkv.Record(replicas, 1000, "6000000000000000", "0123456789abcdef" * 2).text()
with lmdb.open(path, map_size=1 << 40, max_dbs=2, sync=False) as env:
    table = env.open_db(b"keys")
    for start in range(0, count, 100_000):
        rows = ((b"/key-%08d" % n, text) for n in range(start, min(start + 100_000, count)))
        with env.begin(table, write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti(rows, append=True)
    env.sync(True)
"""

# Arguments: folder of the volumes, number of keys, volumes. Makes the files of so many keys.
FILES = """
import mkv, pathlib, sys
folder, count, volumes = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
names = dict(zip(volumes, ("larry", "moe", "curly")))
for key in (b"/key-%08d" % n for n in range(count)):
    for location in mkv.key2volume(key, volumes, 3, 10):
        volume, _, drive = location.partition("/")
        path = mkv.key2path(key, "6000000000000000")
        file = folder / names[volume] / (drive + path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 100)
"""

# Argument: folder of the index. Prints the seconds that reading all keys takes.
WALK = """
import collections, lmdb, sys, time
with lmdb.open(sys.argv[1], max_dbs=2, readonly=True) as env:
    began = time.perf_counter()
    with env.begin(env.open_db(b"keys", create=False)) as txn:
        collections.deque(txn.cursor().iternext(values=False), maxlen=0)
    print(time.perf_counter() - began)
"""

# An nginx that answers 404 to everything.
NOT_FOUND = """
daemon off; pid pid; worker_processes 2; events { worker_connections 4096; } http {
    client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c; uwsgi_temp_path d;
    scgi_temp_path e; access_log off; keepalive_requests 1000000000;
    server { listen 127.0.0.1:%d backlog=4096; location / { return 404; } }
}
"""


class System(NamedTuple):
    """A running mkv on three volumes, and where to find it; addresses are host:port."""

    server: str
    volumes: list[str]
    server_pid: int
    volume_pids: list[int]
    folder: Path
    index: Path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


@contextlib.contextmanager
def process(port: int, *command: object, **env: object) -> Iterator[int]:
    """The pid of a process that listens on a port; it and its children end with the block."""
    words, settings = list(map(str, command)), {name: str(value) for name, value in env.items()}
    quiet = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(words, env=os.environ | settings, **quiet) as started:
        try:
            deadline = time.monotonic() + START_TIME
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if started.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"thrasher: this did not start: {' '.join(words)}")
                time.sleep(0.01)
            yield started.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def output(*command: object) -> str:
    """What a command prints; it runs beside mkv.py."""
    words = list(map(str, command))
    return subprocess.run(words, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextlib.contextmanager
def system(*flags: str, keys: int = 0, subvolumes: int = 10) -> Iterator[System]:
    """A server with so many keys in its index. Nothing is left of it after the block."""
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="mkv-bench-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        folder.chmod(0o755)  # the workers of a root-started nginx are somebody else
        volumes, pids, index, server = [], [], folder / "index", free_port()
        for name in ("larry", "moe", "curly"):
            env = {"PORT": free_port(), "HOST": "127.0.0.1", "SUBVOLUMES": subvolumes}
            volume = process(env["PORT"], HERE / "volume.sh", folder / name, **env)
            pids.append(stack.enter_context(volume))
            volumes.append(f"127.0.0.1:{env['PORT']}")
        if keys:
            output(sys.executable, "-c", FILL, index, keys, ",".join(volumes))
        command = (sys.executable, HERE / "mkv.py", "server", "-bind", "127.0.0.1", "-port", server)
        more = ("-db", index, "-volumes", ",".join(volumes), "-subvolumes", subvolumes, *flags)
        pid = stack.enter_context(process(server, *command, *more))
        yield System(f"127.0.0.1:{server}", volumes, pid, pids, folder, index)


def family(*pids: int) -> Iterator[Path]:
    """Where /proc tells of processes, their children, the children of these, and so on."""
    for pid in pids:
        yield Path(f"/proc/{pid}")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        yield from family(*map(int, children))


def cpu(*pids: int) -> float:
    """Seconds of CPU time that processes and their children have used, in the kernel too."""
    stats = [(path / "stat").read_text().rpartition(")")[2].split() for path in family(*pids)]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, field: str) -> float:
    """MiB of a process and its children, under a name of /proc/PID/status."""
    texts = [(path / "status").read_text() for path in family(pid)]
    return sum(int(re.search(rf"{field}:\s+([0-9]+) kB", text)[1]) for text in texts) / 1024


# --- bench ----------------------------------------------------------------------------------------
# The table. Machines are noisy, so each row has a yardstick that is measured in turn with it: the
# ratio is the result, the absolute numbers are the footnote.

Rows = Iterator[tuple[str, str, str, float, str]]  # name, measured, yardstick, ratio, to reach


class Scale(NamedTuple):
    """How much is done for a row."""

    rounds: int = 3  # of which the median counts
    seconds: int = 4  # that wrk takes, each time
    cycles: int = 10_000
    one: int = 256  # MiB of a single value
    many: int = 64  # MiB of each of sixteen
    listed: int = 1_000_000  # keys
    keys: int = 10_000_000
    moved: int = 100_000  # keys
    growth: int = 30  # seconds


QUICK = Scale(1, 1, 1000, 64, 16, 100_000, 1_000_000, 2000, 5)

RANDOM_KEYS = """
local threads = 0
function setup(thread) threads = threads + 1; thread:set("seed", threads) end
function init(args) math.randomseed(seed); asked = tonumber(args[1]); step = args[2] / asked end
function request()
    return wrk.format("GET", ("/key-%08d"):format(math.random(0, asked - 1) * step))
end
"""


def medians(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """Measure in turn, again and again; the median of each."""
    results = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*results, strict=True)]


def wrk(seconds: int, url: str, *more: object) -> float:
    """Requests per second."""
    said = output("wrk", "-t2", "-c100", f"-d{seconds}s", f"http://{url}", *more)
    if errors := re.search("Socket errors.*", said):
        print(f"thrasher: {url}: {errors[0]}", file=sys.stderr)
    return float(re.search(r"Requests/sec: +([0-9.]+)", said)[1])


async def seed(server: str) -> None:
    """Make the key /present, and see that it and /missing are answered as they should."""
    client = Client()
    await client.ask(server, "GET", "/missing", 404)
    await client.ask(server, "PUT", "/present", 201, b"value")
    await client.read(server, "/present", b"value")


def get_rows(scale: Scale) -> Rows:
    """GET of one key that is not there, and of one that is, of one process and of two."""
    two_workers = system("-workers", "2")
    with system() as mkv, two_workers as two, contextlib.ExitStack() as stack:
        port, config = free_port(), mkv.folder / "nginx.conf"
        config.write_text(NOT_FOUND % port)
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
        stack.enter_context(process(port, nginx, "-p", mkv.folder, "-e", "stderr", "-c", config))
        uvloop.run(seed(mkv.server))
        uvloop.run(seed(two.server))
        urls = [f"127.0.0.1:{port}/", f"{mkv.server}/missing", f"{mkv.server}/present"]
        urls.append(f"{two.server}/present")
        measures = (functools.partial(wrk, scale.seconds, url) for url in urls)
        nginx_rate, missing, present, both = medians(scale.rounds, *measures)
    stick = f"nginx, 2 workers, 404: {nginx_rate:,.0f}/s"
    ratio = missing / nginx_rate
    yield "GET of a missing key", f"{missing:,.0f}/s", stick, ratio, "at least 0.75"
    ratio = present / nginx_rate
    yield "GET of a present key", f"{present:,.0f}/s", stick, ratio, "at least 0.65"
    yield "the same, -workers 2", f"{both:,.0f}/s", stick, both / nginx_rate, ""


def cycle_rows(scale: Scale) -> Rows:
    """CPU time of write/read/delete."""
    with system() as mkv:
        uvloop.run(thrash(mkv.server, range(500)))  # makes connections and folders
        before = cpu(mkv.server_pid), cpu(*mkv.volume_pids), time.perf_counter()
        uvloop.run(thrash(mkv.server, range(scale.cycles)))
        after = cpu(mkv.server_pid), cpu(*mkv.volume_pids), time.perf_counter()
    server, volumes, took = (end - begin for begin, end in zip(before, after, strict=True))
    measured = f"{scale.cycles / took:,.0f}/s, {server / scale.cycles * 1000:.2f} ms CPU each"
    stick = f"three volumes: {volumes / scale.cycles * 1000:.2f} ms CPU"
    yield "write/read/delete, 16 clients", measured, stick, server / volumes, "at most 0.5"


async def upload(targets: Sequence[tuple[str, str]], value: bytes) -> float:
    """Seconds for PUTs of a value to all (address, path) at once. They are deleted afterwards."""
    clients = [(Client(), address, path) for address, path in targets]
    began = time.perf_counter()
    await asyncio.gather(*(c.ask(address, "PUT", path, 201, value) for c, address, path in clients))
    took = time.perf_counter() - began
    await asyncio.gather(*(c.ask(address, "DELETE", path, 204) for c, address, path in clients))
    return took


def put_rows(scale: Scale) -> Rows:
    """Large values: one, then sixteen at once."""
    for count, mib, goal in ((1, scale.one, "at most 1.3"), (16, scale.many, "1.3, under 96 MiB")):
        value = os.urandom(1 << 20) * mib
        with system() as mkv:
            paths = [f"/sv00/00/{n:02}/value" for n in range(count)]
            direct = [(volume, path) for path in paths for volume in mkv.volumes]
            ways = (direct, [(mkv.server, path) for path in paths])
            measures = (lambda to=way, value=value: uvloop.run(upload(to, value)) for way in ways)
            stick, seconds = medians(scale.rounds, *measures)
            measured = f"{seconds:.2f} s, peak memory {memory(mkv.server_pid, 'VmHWM'):.0f} MiB"
        name, stick_text = f"{count} × {mib} MiB PUT to 3 replicas", f"{3 * count} direct PUTs"
        yield name, measured, f"{stick_text}: {stick:.2f} s", seconds / stick, goal


def list_rows(scale: Scale) -> Rows:
    """?list of everything."""

    def listing() -> float:
        began = time.perf_counter()
        with urllib.request.urlopen(f"http://{mkv.server}/?list") as reply:
            body = reply.read()
        took = time.perf_counter() - began
        if len(json.loads(body)["keys"]) != scale.listed:
            raise Wrong("GET /?list: not all keys")
        return took

    with system(keys=scale.listed) as mkv:
        walk = functools.partial(output, sys.executable, "-c", WALK, mkv.index)
        stick, seconds = medians(scale.rounds, lambda: float(walk()), listing)
    name, stick_text = f"?list of {scale.listed:,} keys", f"LMDB cursor: {stick:.2f} s"
    yield name, f"{seconds:.2f} s", stick_text, seconds / stick, "at most 5"


def keys_rows(scale: Scale) -> Rows:
    """GET of random keys: of 1,000 among many, of many, and of 1,000 where there are no more."""
    measures = []  # one PUT makes all volumes trusted, without files
    with contextlib.ExitStack() as stack:
        for keys in (1000, scale.keys):
            mkv = stack.enter_context(system("-voltimeout", "1h", keys=keys, subvolumes=1))
            uvloop.run(seed(mkv.server))
            script = mkv.folder / "keys.lua"
            script.write_text(RANDOM_KEYS)
            for asked in dict.fromkeys((1000, keys)):
                more = (scale.seconds, mkv.server, "-s", script, "--", asked, keys)
                measures.append(functools.partial(wrk, *more))
        stick, few, rate = medians(scale.rounds, *measures)
    name, stick_text = f"GET at {scale.keys:,} keys", f"at 1,000 keys: {stick:,.0f}/s"
    yield name, f"{rate:,.0f}/s", stick_text, rate / stick, "at least 0.85"
    yield "the same, of 1,000 among them", f"{few:,.0f}/s", stick_text, few / stick, ""


def command_rows(scale: Scale) -> Rows:
    """CPU time of a rebuild, a verify, and a rebalance that moves most keys to other drives."""
    with system() as mkv:
        volumes = ",".join(mkv.volumes)
        output(sys.executable, "-c", FILES, mkv.folder, scale.moved, volumes)
        settings = ("-volumes", volumes, "-db", mkv.folder / "commands", "-grace", "0")
        for command, *flags in (("rebuild",), ("verify",), ("rebalance", "-subvolumes", 5)):
            before = time.perf_counter(), cpu(*mkv.volume_pids), sum(os.times()[2:4])
            output(sys.executable, HERE / "mkv.py", command, *settings, *flags)
            after = time.perf_counter(), cpu(*mkv.volume_pids), sum(os.times()[2:4])  # of children
            took, nginx, spent = (end - begin for begin, end in zip(before, after, strict=True))
            measured = f"{scale.moved / took:,.0f} keys/s, {spent:.1f} s CPU"
            stick = f"three volumes: {nginx:.1f} s CPU"
            name = f"{command} of {scale.moved:,} keys × 3 replicas"
            yield name, measured, stick, spent / nginx, "at most 1"


def growth_rows(scale: Scale) -> Rows:
    """What a server holds after a while of write/read/delete, and before that, but warmed up."""

    def held() -> tuple[int, float]:
        files = sum(len(list((path / "fd").iterdir())) for path in family(mkv.server_pid))
        return files, memory(mkv.server_pid, "RssAnon")

    with system() as mkv:
        uvloop.run(thrash(mkv.server, range(10_000)))  # connections, caches
        files, mib = held()
        end = time.monotonic() + scale.growth
        work = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())
        cycles = len(uvloop.run(thrash(mkv.server, work))["PUT"])
        later_files, later_mib = held()
    name = f"growth in {scale.growth} s, {cycles:,} write/read/delete"
    measured, stick = f"{later_files} files, {later_mib:.1f} MiB", f"{files} files, {mib:.1f} MiB"
    yield name, measured, f"at the start: {stick}", max(later_files / files, later_mib / mib), "1.0"


GROUPS = (get_rows, cycle_rows, put_rows, list_rows, keys_rows, command_rows, growth_rows)
ROWS = {group.__name__.removesuffix("_rows"): group for group in GROUPS}


def bench(flags: argparse.Namespace) -> None:
    """What `python thrasher.py bench` does."""
    if not importlib.util.find_spec("lmdb"):
        sys.exit("thrasher: what runs bench must be able to run mkv.py: uv run --with lmdb …")

    def end(*_: object) -> None:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # while all that was started is ended
        sys.exit("thrasher: terminated")

    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    scale = QUICK if flags.quick else Scale()
    scale = scale._replace(growth=600) if flags.long else scale
    print(f"Measured on {os.cpu_count()} cores.\n")
    print("| row | measured | yardstick | ratio | to reach |\n| --- | --- | --- | --- | --- |")
    for name in flags.rows.split(","):
        if name in ("get", "keys") and not shutil.which("wrk"):
            print(f"| {name} | wrk is not installed | | | |")
            continue
        for title, measured, yardstick, ratio, goal in ROWS[name](scale):
            print(f"| {title} | {measured} | {yardstick} | {ratio:.2f} | {goal} |", flush=True)


# --- command line ---------------------------------------------------------------------------------

FLAGS: dict[str, tuple[type, object, str]] = {
    "server": (str, "127.0.0.1:3000", "host:port of a running server"),
    "count": (int, 10_000, "how often a key is written, read and deleted"),
    "clients": (int, 16, "how many do so at a time"),
    "size": (int, 64, "bytes of a value"),
    "keys": (int, 0, "distinct keys; deleted ones are written again (0: as many as -count)"),
    "rows": (str, ",".join(ROWS), "bench: the rows to measure"),
}


def main() -> None:
    """What `python thrasher.py` does."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=["bench"])
    for name, (kind, default, text) in FLAGS.items():
        help_text = f"{text} ({default})" if default else text
        parser.add_argument(f"-{name}", f"--{name}", type=kind, default=default, help=help_text)
    parser.add_argument("-quick", "--quick", action="store_true", help="bench: less of everything")
    parser.add_argument("-long", "--long", action="store_true", help="bench: 10 minutes of growth")
    flags = parser.parse_args()
    if min(flags.count, flags.clients, flags.size) < 1 or 0 != flags.keys < flags.clients:
        parser.error("-count, -clients, -size are at least 1, and -keys is at least -clients")
    if not re.fullmatch(r".+:[0-9]{1,5}", flags.server) or set(flags.rows.split(",")) - set(ROWS):
        parser.error(f"-server is host:port, -rows are of {','.join(ROWS)}")
    try:
        bench(flags) if flags.command else classic(flags)
    except (Wrong, OSError) as error:
        sys.exit(f"thrasher: {error}")
    except KeyboardInterrupt:
        sys.exit("thrasher: interrupted")


if __name__ == "__main__":
    main()
