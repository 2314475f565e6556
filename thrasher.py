#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["uvloop", "lmdb>=3,<4", "aiofiles", "asyncpg"]
# ///
"""thrasher: what looks at mkv from outside: load, a benchmark, and a check of what is stored.

python thrasher.py         writes, reads and deletes keys on a running server, and compares what it
                           reads; ends with status 1 at the first wrong answer
python thrasher.py bench   brings up volumes and a server in a temporary folder (on the disk that
                           TMPDIR is on), measures, prints a Markdown table; nothing of it survives
python thrasher.py verify  compares what a running server knows with what its volumes have, both
                           ways, over HTTP alone, and changes nothing; prints findings, a line of
                           JSON each; ends with 0: clean, 1: findings, 2: not all could be checked
"""

import argparse
import array
import asyncio
import base64
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO
from urllib.parse import quote

import uvloop

import mkv  # for the names of files alone, which are pure functions

HERE = Path(__file__).resolve().parent  # mkv.py and volume.sh lie there too
PIECE = 1 << 18  # bytes of a large value that are handed to the socket at once
MAX_HEAD = 1 << 16  # bytes of an answer's head
MAX_PAGE = 1 << 26  # bytes of a page of a list, or of a folder's listing
START_TIME = 20  # seconds that a process has until it listens
ENDS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)  # these end a benchmark

# --- client ---------------------------------------------------------------------------------------
# Just enough of HTTP/1.1 to cost less than what is measured: raw protocols, one write a request,
# and several requests on their way on the same connection.

STATUS = re.compile(rb"HTTP/1\.[01] ([2-5][0-9][0-9])[ \r]")
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,18})\r", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
CHUNK = re.compile(rb"(?:\r\n)?([0-9a-f]{1,15})[^\r\n]*\r\n", re.IGNORECASE)
LOCATION = re.compile(rb"\r\nlocation: *http://([^/\r]+)([^\r]*)", re.IGNORECASE)
CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Wrong(Exception):
    """An answer that a correct server would not have given."""


class Nonsense(OSError):
    """What is no HTTP, or more of it than anybody needs."""


class Body(Protocol):
    """What takes the body of an answer, piece by piece: a Text, the MD5 of hashlib."""

    def update(self, piece: bytes, /) -> object:
        """Take a piece. ValueError: that cannot be."""


class Text(bytearray):
    """A body that is kept whole."""

    limit = sys.maxsize

    def update(self, piece: bytes) -> None:
        """Append a piece. ValueError."""
        if len(self) + len(piece) > self.limit:
            raise ValueError("an answer without end")
        self += piece


class Page(Text):
    """A page of a list, a folder: a liar cannot fill the memory with it."""

    limit = MAX_PAGE


class Answer(NamedTuple):
    """What came back."""

    status: int
    head: bytes  # every line with its CR LF
    length: int | None  # of the body, of which HEAD gets nothing; None: it does not say
    body: Any  # the Body that took it


class Request(NamedTuple):
    """One that is on its way."""

    reply: asyncio.Future[Answer]
    method: str
    body: Body  # for the body of the answer


class Wire(asyncio.Protocol):
    """A keep-alive connection. Requests may follow each other; the answers come in their order."""

    transport: asyncio.Transport
    drained: asyncio.Future[None] | None = None  # there while the peer reads slowly

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()  # that have no answer yet
        self.unsent = b""  # what was asked in this turn of the loop
        self.buffer = bytearray()
        self.head = b""  # of the answer that is on its way here
        self.length: int | None = None
        self.left = 0  # bytes of its body, or of a chunk, that are missing
        self.chunked, self.endless = False, False  # how its body ends, if it has no length
        self.silence = 0  # ticks since something came, which others count

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self.transport = transport

    def pause_writing(self) -> None:
        """The peer reads slowly."""
        self.drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """The peer has caught up."""
        if self.drained:
            self.drained.set_result(None)
            self.drained = None

    def connection_lost(self, error: Exception | None) -> None:
        """It has ended, and with it an answer of no stated length; all others fail."""
        self.resume_writing()
        if self.endless and self.requests and not error:
            self.finish()
        self.fail(ConnectionError(f"the connection broke: {error or 'closed'}"))

    def fail(self, error: OSError) -> None:
        """Hang up; who waits for an answer gets this error."""
        self.transport.abort()
        while self.requests:
            request = self.requests.popleft()
            if not request.reply.done():
                request.reply.set_exception(error)

    def data_received(self, data: bytes) -> None:
        """Take whatever is whole."""
        self.silence = 0
        try:
            if self.head and len(data) < self.left and not self.buffer:
                self.left -= len(data)  # in the midst of a large body: no need to copy it
                self.requests[0].body.update(data)
                return
            self.buffer += data
            while self.buffer and self.advance():
                pass
        except ValueError as error:
            self.fail(Nonsense(str(error)))

    def advance(self) -> bool:
        """Take a head, a chunk's first line or a piece of a body off the buffer, if it is there."""
        if not self.head:
            return self.take_head()
        if self.chunked and not self.left:
            return self.take_chunk_size()
        piece = bytes(self.buffer[: self.left])
        del self.buffer[: len(piece)]
        self.left -= len(piece)
        self.requests[0].body.update(piece)
        if not self.left and not self.chunked:
            self.finish()
        return True

    def take_head(self) -> bool:
        """See how long the body will be. ValueError."""
        size = self.buffer.find(b"\r\n\r\n")
        if size < 0 and len(self.buffer) < MAX_HEAD:
            return False
        if not self.requests or not STATUS.match(self.buffer) or size < 0:
            raise ValueError("an answer that is none")
        self.head = bytes(self.buffer[: size + 2])
        del self.buffer[: size + 4]
        length = LENGTH.search(self.head)
        self.length = int(length[1]) if length else None
        bodiless = self.requests[0].method == "HEAD" or self.head[9:12] in (b"204", b"304")
        self.chunked = not bodiless and CHUNKED.search(self.head) is not None
        self.endless = not bodiless and not self.chunked and self.length is None
        self.left = 0 if bodiless or self.chunked else self.length or 0
        if self.endless:
            self.left = sys.maxsize
        elif not self.left and not self.chunked:
            self.finish()
        return True

    def take_chunk_size(self) -> bool:
        """See how long a chunk will be; the last one is empty, without a trailer. ValueError."""
        line = CHUNK.match(self.buffer)
        if not line:
            if len(self.buffer) > MAX_HEAD:
                raise ValueError("a chunk that is none")
            return False
        self.left = int(line[1], 16)
        if self.left:
            del self.buffer[: line.end()]
            return True
        if len(self.buffer) < line.end() + 2:
            return False
        del self.buffer[: line.end() + 2]
        self.finish()
        return True

    def finish(self) -> None:
        """Hand an answer to who waits for it."""
        request = self.requests.popleft()
        answer = Answer(int(self.head[9:12]), self.head, self.length, request.body)
        if not request.reply.done():
            request.reply.set_result(answer)
        if CLOSE.search(self.head):
            self.transport.close()
        self.head, self.endless = b"", False

    async def exchange(self, method: str, head: bytes, body: bytes, into: Body) -> Answer:
        """Send a request, wait for its answer. OSError."""
        if self.transport.is_closing():
            raise ConnectionError("the connection broke: closed at once")
        if not self.requests:
            self.silence = 0
        request = Request(asyncio.get_running_loop().create_future(), method, into)
        self.requests.append(request)
        if not self.unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        view = memoryview(body)
        self.unsent += head + view[:PIECE]
        for start in range(PIECE, len(body), PIECE):
            self.flush()
            if self.drained:
                await self.drained
            if request.reply.done():  # refused
                break
            self.transport.write(view[start : start + PIECE])
        return await request.reply

    def flush(self) -> None:
        """Hand over all that was asked in this turn of the loop, in one write."""
        if self.unsent and not self.transport.is_closing():
            self.transport.write(self.unsent)
        self.unsent = b""


class Client:
    """Somebody with one connection to each address."""

    def __init__(self, userpass: str = "") -> None:
        self.wires: dict[str, Wire] = {}
        self.connecting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        proof = base64.b64encode(userpass.encode(errors="surrogateescape")).decode()
        self.login = f"Authorization: Basic {proof}\r\n" if userpass else ""

    async def connect(self, address: str) -> Wire:
        """The connection, made anew if it has ended. OSError."""
        async with self.connecting[address]:
            wire = self.wires.get(address)
            if not wire or wire.transport.is_closing():
                host, _, port = address.rpartition(":")
                loop = asyncio.get_running_loop()
                _, wire = await loop.create_connection(Wire, host.strip("[]"), int(port))
                self.wires[address] = wire
            return wire

    async def send(
        self, address: str, method: str, path: str, body: bytes = b"", into: Body | None = None
    ) -> Answer:
        """An answer, whatever it says; its body goes `into` something, else it is kept. OSError."""
        wire = self.wires.get(address)
        if not wire or wire.transport.is_closing():
            wire = await self.connect(address)
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {address}\r\n{self.login}{length}\r\n"
        taker = Text() if into is None else into
        return await wire.exchange(method, head.encode(), body, taker)

    async def ask(
        self, address: str, method: str, path: str, status: int, body: bytes = b""
    ) -> Answer:
        """An answer. Wrong when it has another status; OSError."""
        answer = await self.send(address, method, path, body)
        if answer.status != status:
            said = answer.head.partition(b"\r")[0] + b" " + answer.body[:200]
            raise Wrong(
                f"{method} {path}: not {status}, but {said.decode(errors='replace').strip()}"
            )
        return answer

    async def read(self, server: str, path: str, value: bytes) -> None:
        """GET a key, follow the redirect, compare the value. Wrong, OSError."""
        redirect = await self.ask(server, "GET", path, 302)
        target = LOCATION.search(redirect.head)
        if not target:
            raise Wrong(f"GET {path}: a redirect to nowhere")
        answer = await self.ask(target[1].decode(), "GET", target[2].decode(), 200)
        if answer.body != value:
            raise Wrong(f"GET {path}: not the value that was written")


# --- thrash ---------------------------------------------------------------------------------------
# The ancestors' benchmark: many clients, each of which writes, reads and deletes one key at a time.


async def thrash(
    servers: Sequence[str],
    work: Iterable[object],
    clients: int = 16,
    size: int = 64,
    keys: int = 10_000,
    userpass: str = "",
) -> dict[str, list[float]]:
    """One cycle for each element of `work`; the seconds that its requests took, by verb.

    Clients are spread over the servers. A key is written by one client only, so no two requests for
    it are under way. Wrong, OSError.
    """
    work, took = iter(work), {"PUT": [], "GET": [], "DELETE": []}
    prefix = f"/thrash-{secrets.token_hex(4)}-"  # nobody else's, not even an aborted run's

    async def cycles(number: int) -> None:
        client, server = Client(userpass), servers[number % len(servers)]
        mine = itertools.cycle(range(number, keys, clients))
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
    work = thrash(flags.server, range(flags.count), clients, flags.size, keys, flags.userpass)
    took = uvloop.run(work)
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
# There are no files, which goes unnoticed: before a redirect, no volume is asked for them.
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

# Arguments: number of keys, volumes, folders of these. Makes the files of so many keys.
FILES = """
import mkv, pathlib, sys
count, volumes = int(sys.argv[1]), sys.argv[2].split(",")
folders = dict(zip(volumes, map(pathlib.Path, sys.argv[3:])))
for key in (b"/key-%08d" % n for n in range(count)):
    for location in mkv.key2volume(key, volumes, 3, 10):
        volume, _, drive = location.partition("/")
        path = mkv.key2path(key, "6000000000000000")
        file = folders[volume] / (drive + path)
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


class Volumes(NamedTuple):
    """Running volumes."""

    names: list[str]  # host:port
    folders: list[Path]
    pids: list[int]


class System(NamedTuple):
    """A running mkv, and where to find it."""

    server: str  # host:port
    pid: int
    index: Path | str
    volumes: Volumes


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
    listen = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, ENDS)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # until what has begun is sure to be ended
    with subprocess.Popen(words, env=os.environ | settings, preexec_fn=listen, **quiet) as started:
        try:
            listen()
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
def temporary() -> Iterator[Path]:
    """A folder of which nothing is left after the block."""
    with tempfile.TemporaryDirectory(prefix="mkv-bench-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)  # the workers of a root-started nginx are somebody else
        yield Path(name)


@contextlib.contextmanager
def nginxes(folder: Path, count: int, subvolumes: int) -> Iterator[Volumes]:
    """So many volumes, in a folder each."""
    volumes = Volumes([], [], [])
    with contextlib.ExitStack() as stack:
        for name in ("larry", "moe", "curly", "shemp", "joe")[:count]:
            env = {"PORT": free_port(), "HOST": "127.0.0.1", "SUBVOLUMES": subvolumes}
            volume = process(env["PORT"], HERE / "volume.sh", folder / name, **env)
            volumes.pids.append(stack.enter_context(volume))
            volumes.names.append(f"127.0.0.1:{env['PORT']}")
            volumes.folders.append(folder / name)
        yield volumes


@contextlib.contextmanager
def serving(index: Path | str, volumes: Volumes, *flags: object) -> Iterator[System]:
    """A server over an index and volumes."""
    port = free_port()
    command = (sys.executable, HERE / "mkv.py", "server", "-bind", "127.0.0.1", "-port", port)
    more = ("-db", index, "-volumes", ",".join(volumes.names), *flags)
    with process(port, *command, *more) as pid:
        yield System(f"127.0.0.1:{port}", pid, index, volumes)


@contextlib.contextmanager
def system(keys: int = 0, volumes: int = 3, subvolumes: int = 10) -> Iterator[System]:
    """All that there is to mkv, with so many keys in its index. Nothing is left of it."""
    with temporary() as folder, nginxes(folder, volumes, subvolumes) as disks:
        index = folder / "index"
        if keys:
            output(sys.executable, "-c", FILL, index, keys, ",".join(disks.names))
        with serving(index, disks, "-subvolumes", subvolumes) as mkv:
            yield mkv


class Node:
    """A PostgreSQL that is thrown away, in a folder of the user postgres (or of ours)."""

    def __init__(self, data: Path, port: int, config: str = "", source: "Node | None" = None):
        """Make and start it; a standby, if there is a source."""
        self.data, self.port = data, port
        if source:
            where = f"host=127.0.0.1 port={source.port} user=mkv application_name=standby"
            options = ("-R", "-C", "-S", "standby", "-c", "fast", "-N")
            self.run("pg_basebackup", "-d", where, "-D", data, *options)
        else:
            options = ("-A", "trust", "-U", "mkv", "-E", "UTF8", "--locale=C", "--wal-segsize=1")
            self.run("initdb", "-D", data, "-N", *options)
        with (data / "postgresql.conf").open("a") as file:
            file.write(f"port = {port}\nunix_socket_directories = ''\n{config}\n")
        try:
            self.start()
        except BaseException:  # nobody else would end it
            self.kill()
            raise

    def run(self, name: str, *words: object) -> str:
        """What a program of PostgreSQL prints; it does not run as root."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian's
        user = ("runuser", "-u", "postgres", "--") if os.geteuid() == 0 else ()
        command = map(str, [*user, found[-1] / name if found else name, *words])
        pipe = {"stdout": subprocess.PIPE, "text": True}
        return subprocess.run(list(command), cwd="/", check=True, **pipe).stdout.strip()

    def start(self) -> None:
        """Returns when it takes connections."""
        self.run("pg_ctl", "-D", self.data, "-l", self.data / "log", "-w", "start")

    @property
    def pid(self) -> int:
        """The first of its processes; 0: there is none."""
        with contextlib.suppress(FileNotFoundError):
            return int((self.data / "postmaster.pid").read_text().split()[0])
        return 0

    def stop(self) -> None:
        """End all connections, and it."""
        self.run("pg_ctl", "-D", self.data, "-m", "fast", "-w", "stop")

    def send(self, number: int) -> None:
        """A signal to all its processes, the first one first."""
        for path in list(family(self.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name), number)

    def kill(self) -> None:
        """kill -9 of all its processes, frozen ones too."""
        if self.pid and Path(f"/proc/{self.pid}").exists():
            self.send(signal.SIGKILL)
        while not socket.socket().connect_ex(("127.0.0.1", self.port)):
            time.sleep(0.01)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def sql(self, text: str, url: str = "") -> str:
        """What psql prints."""
        return self.run("psql", url or self.url("postgres"), "-XqAtc", text)

    def url(self, database: str) -> str:
        """For psql, or -db."""
        return f"postgres://mkv@127.0.0.1:{self.port}/{database}"


def synchronous(primary: Node, standby: Node) -> str:
    """Let a COMMIT wait for the standby: the URL of a database of both."""
    primary.sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
    primary.sql("SELECT pg_reload_conf()")
    while primary.sql("SELECT sync_state FROM pg_stat_replication") != "sync":
        time.sleep(0.01)
    primary.sql("CREATE DATABASE mkv")
    return f"postgres://mkv@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/mkv"


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
    """GET of one key that is not there, and of one that is."""
    with system() as mkv, temporary() as folder, contextlib.ExitStack() as stack:
        port, config = free_port(), folder / "nginx.conf"
        config.write_text(NOT_FOUND % port)
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
        stack.enter_context(process(port, nginx, "-p", folder, "-e", "stderr", "-c", config))
        uvloop.run(seed(mkv.server))
        urls = (f"127.0.0.1:{port}/", f"{mkv.server}/missing", f"{mkv.server}/present")
        measures = (functools.partial(wrk, scale.seconds, url) for url in urls)
        nginx_rate, missing, present = medians(scale.rounds, *measures)
    stick = f"nginx, 2 workers, 404: {nginx_rate:,.0f}/s"
    ratio = missing / nginx_rate
    yield "GET of a missing key", f"{missing:,.0f}/s", stick, ratio, "at least 0.75"
    ratio = present / nginx_rate
    yield "GET of a present key", f"{present:,.0f}/s", stick, ratio, "at least 0.65"


def random_keys(scale: Scale, mkv: System, folder: Path, asked: int, keys: int) -> float:
    """GETs per second of so many different keys, which lie evenly among all keys."""
    script = folder / "keys.lua"
    script.write_text(RANDOM_KEYS)
    return wrk(scale.seconds, mkv.server, "-s", script, "--", asked, keys)


def different_rows(scale: Scale) -> Rows:
    """GET of many keys by turns, and of one again and again, by the same client."""
    with system(keys=1000) as mkv, temporary() as folder:
        counts = (1, 1000)
        measures = (functools.partial(random_keys, scale, mkv, folder, n, 1000) for n in counts)
        one, many = medians(scale.rounds, *measures)
    stick = f"one key: {one:,.0f}/s"
    yield "GET of 1,000 different keys", f"{many:,.0f}/s", stick, many / one, ""


def cycle_rows(scale: Scale) -> Rows:
    """CPU time of write/read/delete."""
    with system(volumes=5) as mkv:

        def spent() -> tuple[float, float, float]:
            return cpu(mkv.pid), cpu(*mkv.volumes.pids), time.perf_counter()

        uvloop.run(thrash([mkv.server], range(500)))  # makes connections and folders
        before = spent()
        uvloop.run(thrash([mkv.server], range(scale.cycles)))
        after = spent()
    server, volumes, took = (end - begin for begin, end in zip(before, after, strict=True))
    measured = f"{scale.cycles / took:,.0f}/s, {server / scale.cycles * 1000:.2f} ms CPU each"
    stick = f"five volumes: {volumes / scale.cycles * 1000:.2f} ms CPU"
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
            direct = [(volume, path) for path in paths for volume in mkv.volumes.names]
            ways = (direct, [(mkv.server, path) for path in paths])
            measures = (lambda to=way, value=value: uvloop.run(upload(to, value)) for way in ways)
            stick, seconds = medians(scale.rounds, *measures)
            measured = f"{seconds:.2f} s, peak memory {memory(mkv.pid, 'VmHWM'):.0f} MiB"
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
    measures = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary())
        for keys in (1000, scale.keys):
            mkv = stack.enter_context(system(keys=keys, subvolumes=1))
            for asked in dict.fromkeys((1000, keys)):
                measures.append(functools.partial(random_keys, scale, mkv, folder, asked, keys))
        stick, few, rate = medians(scale.rounds, *measures)
    name, stick_text = f"GET at {scale.keys:,} keys", f"at 1,000 keys: {stick:,.0f}/s"
    yield name, f"{rate:,.0f}/s", stick_text, rate / stick, "at least 0.85"
    yield "the same, of 1,000 among them", f"{few:,.0f}/s", stick_text, few / stick, ""


def command_rows(scale: Scale) -> Rows:
    """CPU time of a rebuild, a verify, and a rebalance that moves most keys to other drives."""
    with temporary() as folder, nginxes(folder, 3, 10) as volumes:
        names = ",".join(volumes.names)
        output(sys.executable, "-c", FILES, scale.moved, names, *volumes.folders)
        index = folder / "index"
        flags = ("-volumes", names, "-db", index, "-grace", "0")

        def row(name: str, *command: object, servers: Sequence[int] = ()) -> tuple:
            """CPU time of a command and of the servers that it asks, compared with the volumes'."""

            def spent() -> tuple[float, float, float]:
                children = sum(os.times()[2:4])
                return time.perf_counter(), children + cpu(*servers), cpu(*volumes.pids)

            before = spent()
            output(sys.executable, *command)
            after = spent()
            took, ours, nginx = (end - begin for begin, end in zip(before, after, strict=True))
            measured = f"{scale.moved / took:,.0f} keys/s, {ours:.1f} s CPU"
            title = f"{name} of {scale.moved:,} keys × 3 replicas"
            return title, measured, f"three volumes: {nginx:.1f} s CPU", ours / nginx, "at most 1"

        yield row("rebuild", HERE / "mkv.py", "rebuild", *flags)
        with serving(index, volumes) as mkv:
            look = (HERE / "thrasher.py", "verify", "-server", mkv.server, "-volumes", names)
            yield row("verify", *look, servers=[mkv.pid])
        flags = ("-volumes", names, "-db", index, "-grace", "0", "-subvolumes", "5")
        with serving(index, volumes, "-grace", "0", "-subvolumes", "5") as mkv:
            yield row("rebalance", HERE / "mkv.py", "rebalance", *flags, servers=[mkv.pid])


def growth_rows(scale: Scale) -> Rows:
    """What a server holds after a while of write/read/delete, and before that, but warmed up."""

    def held() -> tuple[int, float]:
        files = sum(len(list((path / "fd").iterdir())) for path in family(mkv.pid))
        return files, memory(mkv.pid, "RssAnon")

    with system() as mkv:
        uvloop.run(thrash([mkv.server], range(10_000)))  # connections, caches
        files, mib = held()
        end = time.monotonic() + scale.growth
        work = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())
        cycles = len(uvloop.run(thrash([mkv.server], work))["PUT"])
        later_files, later_mib = held()
    name = f"growth in {scale.growth} s, {cycles:,} write/read/delete"
    measured, stick = f"{later_files} files, {later_mib:.1f} MiB", f"{files} files, {mib:.1f} MiB"
    yield name, measured, f"at the start: {stick}", max(later_files / files, later_mib / mib), "1.0"


def postgres_rows(scale: Scale) -> Rows:
    """The index in PostgreSQL, a synchronous pair, compared with LMDB; then a failover."""

    def cost(system: System, *pids: int) -> tuple[float, ...]:
        """Cycles a second; seconds of CPU that a cycle costs the server, and others."""
        uvloop.run(thrash([system.server], range(500)))  # makes connections and folders
        before = time.perf_counter(), cpu(system.pid), cpu(*pids)
        uvloop.run(thrash([system.server], range(scale.cycles)))
        after = time.perf_counter(), cpu(system.pid), cpu(*pids)
        took, *spent = (end - begin for begin, end in zip(before, after, strict=True))
        return scale.cycles / took, *(seconds / scale.cycles for seconds in spent)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary())
        home = folder / "postgres"
        home.mkdir()
        if os.geteuid() == 0:
            shutil.chown(home, "postgres")
        nodes = [Node(home / "a", free_port())]
        stack.callback(nodes[0].kill)
        nodes.append(Node(home / "b", free_port(), source=nodes[0]))
        stack.callback(nodes[1].kill)
        url, intents = synchronous(*nodes), ("-intents", folder / "intents")
        volumes = stack.enter_context(nginxes(folder, 3, 10))
        own = stack.enter_context(serving(folder / "index", volumes))
        shared = stack.enter_context(serving(url, volumes, *intents))
        for mkv in (own, shared):
            uvloop.run(seed(mkv.server))
        for path in ("missing", "present"):
            urls = [f"{mkv.server}/{path}" for mkv in (own, shared)]
            measures = (functools.partial(wrk, scale.seconds, url) for url in urls)
            stick, rate = medians(scale.rounds, *measures)
            name, ratio = f"GET of a {path} key, PostgreSQL", rate / stick
            yield name, f"{rate:,.0f}/s", f"LMDB: {stick:,.0f}/s", ratio, "at least 0.4"
        (rate, mine, its), (stick, cheap, _) = cost(shared, nodes[0].pid), cost(own)
        measured = f"{rate:,.0f}/s, {mine * 1000:.2f} + {its * 1000:.2f} ms CPU each"
        stick_text = f"LMDB: {stick:,.0f}/s, {cheap * 1000:.2f} ms CPU"
        name = "write/read/delete, server + PostgreSQL"
        yield name, measured, stick_text, mine / cheap, "at most 1.5"

        began = time.perf_counter()
        nodes[0].kill()
        nodes[1].sql("SELECT pg_promote()")
        promoted = time.perf_counter() - began
        uvloop.run(Client().ask(shared.server, "PUT", "/after", 201, b"value"))
        took = time.perf_counter() - began
        name, stick_text = "failover, kill -9 to the next write", f"promotion: {promoted:.2f} s"
        yield name, f"{took:.2f} s", stick_text, took / promoted, ""


ROWS: dict[str, Callable[[Scale], Rows]] = {
    "get": get_rows,
    "different": different_rows,
    "cycle": cycle_rows,
    "put": put_rows,
    "list": list_rows,
    "keys": keys_rows,
    "command": command_rows,
    "growth": growth_rows,
    "postgres": postgres_rows,
}
NEED_WRK = ("get", "different", "keys", "postgres")


def bench(flags: argparse.Namespace) -> None:
    """What `python thrasher.py bench` does."""

    def end(*_: object) -> None:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)  # while all that was started is ended
        sys.exit("thrasher: terminated")

    for number in ENDS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    scale = QUICK if flags.quick else Scale()
    scale = scale._replace(growth=600) if flags.long else scale
    print(f"Measured on {os.cpu_count()} cores.\n")
    print("| row | measured | yardstick | ratio | to reach |\n| --- | --- | --- | --- | --- |")
    for name in flags.rows.split(","):
        if name in NEED_WRK and not shutil.which("wrk"):
            print(f"| {name} | wrk is not installed | | | |")
            continue
        if name == "postgres" and not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
            print(f"| {name} | PostgreSQL is not installed | | | |")
            continue
        for title, measured, yardstick, ratio, goal in ROWS[name](scale):
            print(f"| {title} | {measured} | {yardstick} | {ratio:.2f} | {goal} |", flush=True)


# --- verify ---------------------------------------------------------------------------------------
# What the index says, and what the volumes have. First every key: its files are asked for. Then
# every folder: each file in it is one that the index names, or lists as garbage, or is a finding.
# Memory: 8 bytes for each file that is named (240 MB for 10 million keys with three replicas), and
# the files that nothing names.

PATIENCE = 10  # seconds without a byte of an answer: then there is none
PAUSE = 30  # seconds in which a volume that gave no answer is not asked again
CLIENTS, DEPTH = 4, 16  # so many clients, each of which asks so many things at a time
PAGE = 1000  # keys of a list at a time
LOOKS = 10  # at a key that is another one each time
SUSPECTS = 100_000  # files that are doubted together
DOUBT = 1  # seconds between two looks for whoever may name a file: a write needs a moment
TRIES = 60  # of a question to a server that has answered before, a second apart: it may restart
MAX_PATH = 1000  # characters: no file of a key has so many, however its name is cut

KEYS, GARBAGE = ("list&long", "unlinked&long"), "garbage"  # the lists of a server
LISTS = dict.fromkeys(KEYS, "keys") | {GARBAGE: "garbage"}  # and what is in them

LOCATED = re.compile(
    r"((?:[\w.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}(?:/sv[0-9A-F]{2})?)"
    r"(/[0-9a-f]{2}/[0-9a-f]{2}/[A-Za-z0-9+/=-]+)"
)
FOLDER = re.compile(r"/[0-9a-f]{2}/(?:[0-9a-f]{2}/(?:[A-Za-z0-9+=-]+/)*)?")
MD5 = re.compile("[0-9a-f]{32}")
ID = re.compile(b"[0-9a-f]{32}")  # of a volume


class File(NamedTuple):
    """A file, or a folder, on a volume."""

    location: str  # host:port or host:port/svXX
    path: str

    @property
    def url(self) -> str:
        """As lists have it: host:port/svXX/aa/bb/name."""
        return self.location + self.path


class Item(NamedTuple):
    """What the index says of a key."""

    key: str
    size: int | None  # bytes; None: it does not know
    md5: str | None  # in hex; None: it does not know
    files: tuple[File, ...]


def parse_file(text: object) -> File:
    """The inverse of File.url, for a file. ValueError."""
    match = LOCATED.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise ValueError(f"not a file: {text!r:.200}")
    return File(*match.groups())


def parse_item(row: object) -> Item:
    """An item of ?list&long. ValueError: a server that is right would not say so."""
    if not isinstance(row, dict):
        raise ValueError("not an item of a list")
    key, size, md5, files = (row.get(name) for name in ("key", "size", "md5", "files"))
    if not isinstance(key, str) or not isinstance(files, list) or not files:
        raise ValueError("no key, or no files")
    if size is not None and (type(size) is not int or size < 0):
        raise ValueError(f"not a size: {size!r:.200}")
    if md5 is not None and not (isinstance(md5, str) and MD5.fullmatch(md5)):
        raise ValueError(f"not an MD5: {md5!r:.200}")
    item = Item(key, size, md5, tuple(map(parse_file, files)))
    for path in {file.path for file in item.files}:
        if mkv.path2key(path)[0] != key.encode():
            raise ValueError(f"another key's file: {path}")
    return item


def key_of(row: object) -> str:
    """The key that an odd item of a list is about, if it says so."""
    key = row.get("key") if isinstance(row, dict) else ""
    return key if isinstance(key, str) else ""


def parse_garbage(row: object) -> tuple[str, File]:
    """An item of ?garbage: key and file. ValueError."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise ValueError("not an item of the garbage")
    return row["key"], parse_file(row.get("file"))


def parse_json(text: bytes | bytearray) -> Any:
    """Whatever it is. ValueError."""
    try:
        return json.loads(text.decode(errors="replace"))
    except RecursionError as error:
        raise ValueError("brackets without end") from error


def parse_page(text: bytes | bytearray, name: str) -> tuple[list, str]:
    """Items of a list, and the key where the next ones begin, "" at the end. ValueError."""
    page = parse_json(text)
    rows, after = (page.get(name), page.get("next")) if isinstance(page, dict) else (None, None)
    if not isinstance(rows, list) or not isinstance(after, str):
        raise ValueError("not a list")
    return rows, after


def parse_listing(text: bytes | bytearray) -> list[tuple[str, str]]:
    """Name and type of all that is in a folder, as nginx lists it. ValueError."""
    rows, found = parse_json(text), []
    if not isinstance(rows, list):
        raise ValueError("not a listing")
    for row in rows:
        name, kind = (row.get("name"), row.get("type")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(kind, str):
            raise ValueError(f"not of a listing: {row!r:.200}")
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"not a name: {name!r:.200}")
        size = row.get("size", 0 if kind != "file" else None)
        if type(size) is not int or size < 0:
            raise ValueError(f"not a size: {size!r:.200}")
        found.append((name, kind))
    return found


class Patient(Client):
    """A client of what may be down, frozen or restarted. Many may use it at a time."""

    def __init__(self, userpass: str) -> None:
        super().__init__(userpass)
        self.alone = asyncio.Lock()  # for answers that end with their connection
        self.down: dict[str, float] = {}  # address → until when (monotonic) it is left alone
        self.handshakes: dict[asyncio.Timeout, int] = {}  # ticks that they have taken

    async def connect(self, address: str) -> Wire:
        """A connection, in time. OSError."""
        limit = asyncio.timeout(None)  # until tick() sets another
        self.handshakes[limit] = 0
        try:
            async with limit:
                return await super().connect(address)
        except (ValueError, OverflowError) as error:  # no name of a host, no number of a port
            raise Nonsense(f"no address: {error}") from error
        finally:
            del self.handshakes[limit]

    async def fetch(
        self, file: File, method: str = "GET", make: Callable[[], Body] = Page
    ) -> Answer:
        """What a volume or a server says to GET or HEAD. OSError: it does not answer.

        What is on its way when a connection is closed, by a reload for instance, is asked again;
        perhaps each connection is closed after one answer, so as often as there are askers.
        """
        address = file.location.partition("/")[0]
        path = file.url[len(address) :]
        if self.down.get(address, 0) > time.monotonic():
            raise ConnectionError("it did not answer a moment ago")
        try:
            for _ in range(DEPTH):
                with contextlib.suppress(ConnectionError):
                    return await self.send(address, method, path, into=make())
            return await self.send(address, method, path, into=make())
        except TimeoutError as error:
            self.down[address] = time.monotonic() + PAUSE
            raise TimeoutError(f"no answer in {PATIENCE} s") from error

    def tick(self) -> None:
        """Give up what has been silent for too long; called once a second.

        Ticks are counted, not seconds: when this process itself was held up, by a reader of its
        output for instance, that is nobody else's silence.
        """
        for wire in self.wires.values():
            wire.silence += 1
            if wire.requests and wire.silence > PATIENCE:
                wire.fail(TimeoutError())
        for limit in self.handshakes:
            self.handshakes[limit] += 1
            if self.handshakes[limit] > PATIENCE:
                limit.reschedule(0)


class Verify:
    """One run of it."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.servers = flags.server
        self.clients = [Patient(flags.userpass) for _ in range(CLIENTS)]
        drives = [f"/sv{n:02X}" for n in range(flags.subvolumes)] if flags.subvolumes > 1 else []
        self.places = [volume + drive for volume in flags.volumes for drive in ("", *drives)]
        self.known = [array.array("q") for _ in range(256)]  # hashes of URLs, by the first folder
        self.named: set[str] = set()  # addresses of volumes that the index names
        self.lost: set[str] = set()  # locations that cannot be listed
        self.suspects: list[File] = []  # that nothing seems to name
        self.unnamed: list[File] = []  # that nothing names
        self.found: Counter[str] = Counter()
        self.count: Counter[str] = Counter()
        self.stage = "keys"
        self.tries = 1  # of a question to a server

    # what it says

    def report(self, finding: str, key: str = "", file: File | None = None, **more: Any) -> None:
        """Print a finding. OSError: nobody takes it."""
        self.found[finding] += 1
        where = {"location": file.location, "path": file.path} if file else {}
        print(json.dumps({"finding": finding, "key": key} | where | more), flush=True)

    def summary(self) -> str:
        """How far it is."""
        done = (f"{self.count[name]:,} {name}" for name in ("keys", "replicas", "folders", "files"))
        found = ", ".join(f"{number:,} {finding}" for finding, number in self.found.items())
        return f"verify: {self.stage}: {', '.join(done)}; {found or 'no findings'}"

    async def progress(self) -> None:
        """Say how far it is, for ever; on a terminal in one line that changes."""
        pace, end = (0.2, " \r") if sys.stderr and sys.stderr.isatty() else (10, "\n")
        while True:
            await asyncio.sleep(pace)
            say(self.summary(), end)

    async def tick(self) -> None:
        """Look after what does not answer, for ever."""
        while True:
            await asyncio.sleep(1)
            for client in self.clients:
                client.tick()

    # what it asks

    async def spread(self, work: Iterable, job: Callable[[Patient, Any], Awaitable]) -> None:
        """job(client, each) for all of the work, many at a time."""
        todo = iter(work)

        async def worker(client: Patient) -> None:
            for each in todo:
                await job(client, each)

        await asyncio.gather(*map(worker, self.clients * DEPTH))

    async def page(
        self, client: Patient, which: str, limit: int, start: str = "", prefix: str = "/"
    ) -> tuple[list, str]:
        """Items of so many keys of a list, and where the next ones begin. Wrong.

        The servers are asked in turn, and all of them again when none has answered: one that is
        started anew has cut its answers short.
        """
        at = f"&start={quote(start, safe='', errors='replace')}" if start else ""
        path, name = f"{quote(prefix)}?{which}&limit={limit}{at}", LISTS[which]
        said = ""
        for _ in range(self.tries):
            for server in self.servers:
                try:
                    async with client.alone:
                        answer = await client.fetch(File(server, path))
                    if answer.status != 200:
                        raise ValueError(f"it answers {answer.status}")
                    page = parse_page(answer.body, name)
                except (OSError, ValueError) as error:
                    said = f"GET {server}{path}: {error}"
                else:
                    self.tries = TRIES
                    return page
            await asyncio.sleep(1)
        raise Wrong(said)

    async def pages(self, which: str) -> AsyncIterator[list]:
        """All items of a list, so many keys at a time. Wrong."""
        start = ""
        while True:
            rows, after = await self.page(self.clients[0], which, PAGE, start)
            yield rows
            if not after:
                return
            if after <= start:
                raise Wrong(f"GET /?{which}: it goes in circles")
            start = after

    async def item(self, client: Patient, key: str) -> Item | None:
        """What the index says of a key now; None: there is none. Wrong, ValueError.

        The list of the unlinked comes second: a key may go from the other one to this, not back.
        """
        for which in KEYS:
            rows, _ = await self.page(client, which, 1, prefix=key)
            if rows and isinstance(rows[0], dict) and rows[0].get("key") == key:
                return parse_item(rows[0])
        return None

    async def files_of(self, client: Patient, key: str) -> set[File]:
        """All files that the index names of a key, or lists as its garbage. Wrong, ValueError.

        A file goes from keys to garbage, not back, so the lists are asked in this order.
        """
        item = await self.item(client, key)
        rows, _ = await self.page(client, GARBAGE, 1, start=key)
        garbage = [file for owner, file in map(parse_garbage, rows) if owner == key]
        return {*garbage, *(item.files if item else ())}

    def remember(self, file: File) -> None:
        """That the index knows of this file."""
        self.known[int(file.path[1:3], 16)].append(hash(file.url))
        self.named.add(file.location.partition("/")[0])

    # keys

    async def check_row(self, client: Patient, row: object) -> None:
        """Report what is wrong with a key, as a list has it. Wrong, OSError."""
        self.count["keys"] += 1
        try:
            await self.check_key(client, parse_item(row))
        except ValueError as error:
            self.report("unreadable", key_of(row), reason=str(error))

    async def check_key(self, client: Patient, item: Item) -> None:
        """Report what is wrong, unless the key changes meanwhile. Wrong, OSError, ValueError."""
        for _ in range(LOOKS):
            for file in item.files:
                self.remember(file)
            looks = [await self.look_at(client, file, item.size) for file in item.files]
            findings = self.judge(item, looks)
            now = await self.item(client, item.key) if findings else None
            if now == item:
                for finding in findings:
                    self.report(**finding)
            if now in (item, None):
                return
            item = now

    def check_garbage(self, row: object) -> None:
        """Remember a file that waits to be deleted. OSError."""
        try:
            self.remember(parse_garbage(row)[1])
        except ValueError as error:
            self.report("unreadable", key_of(row), reason=str(error))

    async def look_at(self, client: Patient, file: File, size: int | None) -> tuple[str, str]:
        """Of a replica: the finding, if any, and its MD5, or why it is unreachable."""
        self.count["replicas"] += 1
        method, make = ("GET", hashlib.md5) if self.flags.deep else ("HEAD", Page)
        try:
            answer = await client.fetch(file, method, make)
        except OSError as error:
            return "unreachable", str(error) or repr(error)
        if answer.status == 404:
            return "missing", ""
        if answer.status != 200:
            return "unreachable", f"it answers {answer.status}"
        if size not in (None, answer.length):
            return "size", ""
        return "", answer.body.hexdigest() if self.flags.deep else ""

    def judge(self, item: Item, looks: Sequence[tuple[str, str]]) -> list[dict]:
        """The findings about a key. What could not be reached may be good."""
        findings, good = [], 0
        sums = {item.md5} if item.md5 else {text for finding, text in looks if not finding}
        for file, (finding, text) in zip(item.files, looks, strict=True):
            if self.flags.deep and not finding and sums != {text}:
                finding = "md5"
            more = {"reason": text} if finding == "unreachable" else {}
            if finding:
                findings.append({"finding": finding, "key": item.key, "file": file} | more)
            good += finding in ("", "unreachable")
        if good < self.flags.replicas:
            findings.append({"finding": "under-replicated", "key": item.key, "good": good})
        return findings

    # files

    async def check_names(self) -> None:
        """Wrong: a volume has two names, here and in the index. All on it would be strays."""
        names: dict[bytes, str] = {}

        async def see(client: Patient, address: str) -> None:
            with contextlib.suppress(OSError):
                answer = await client.fetch(File(address, "/.drives"))
                volume_id = answer.body.partition(b" ")[0]
                if answer.status != 200 or not ID.fullmatch(volume_id):
                    return  # an older one
                other = names.setdefault(bytes(volume_id), address)
                if other != address:
                    raise Wrong(f"{address} and {other} are two names of one volume")

        await self.spread(sorted(self.named | set(self.flags.volumes)), see)

    async def check_files(self) -> None:
        """Report all files that nothing names. Wrong, OSError."""
        folders: list[File] = []
        roots = [File(place, "/") for place in self.places]
        await self.spread(roots, functools.partial(self.list_folder, below=folders, known=set()))
        folders.sort(key=lambda folder: folder.path)
        for top, level in itertools.groupby(folders, lambda folder: folder.path):
            number = int(top[1:3], 16)
            self.stage = f"folder {number + 1} of 256"
            known, todo = set(self.known[number]), list(level)
            while todo:
                below: list[File] = []
                job = functools.partial(self.list_folder, below=below, known=known)
                await self.spread(todo, job)
                todo = below
            if len(self.suspects) > SUSPECTS:
                await self.doubt()
        await self.doubt()

    async def list_folder(
        self, client: Patient, folder: File, below: list[File], known: set[int]
    ) -> None:
        """Look at all that is in a folder; the folders in it are for later. OSError."""
        location, path = folder
        if location in self.lost:
            return
        self.count["folders"] += 1
        try:
            rows = await self.listing(client, folder)
        except (OSError, ValueError) as error:
            if location not in self.lost:
                self.report("unreachable", file=folder, reason=f"cannot be listed: {error}")
            if isinstance(error, OSError):  # else it is this folder's trouble
                self.lost.add(location)
            return
        for name, kind in rows:
            each = File(location, path + name)
            if kind == "directory" and FOLDER.fullmatch(each.path + "/") and len(path) < MAX_PATH:
                below.append(File(location, each.path + "/"))
            elif kind == "file":
                self.identify(each, known)
            elif path != "/" or (each.url not in self.places and name != "lost+found"):
                self.report("name", file=each)

    async def listing(self, client: Patient, folder: File) -> list[tuple[str, str]]:
        """Name and type of all in a folder; of nothing when it is gone. OSError, ValueError."""
        try:
            answer = await client.fetch(folder)
        except OSError as error:
            raise OSError(str(error) or repr(error)) from error
        if answer.status == 404 and folder.path != "/":
            return []
        if answer.status == 503:
            raise OSError("it answers 503: no such drive there")
        if answer.status != 200:
            raise ValueError(f"it answers {answer.status}")
        return parse_listing(answer.body)

    def identify(self, file: File, known: set[int]) -> None:
        """Tell a file that is a key's, or was one, from others. OSError."""
        self.count["files"] += 1
        try:
            mkv.path2key(file.path)
        except ValueError:
            self.report("name", file=file)
            return
        if hash(file.url) not in known:
            self.suspects.append(file)

    async def doubt(self) -> None:
        """Report the suspects that nothing names now either, nor a moment later. Wrong, OSError."""
        suspects, self.suspects = self.suspects, []
        suspects = await self.still_unnamed(suspects)
        if suspects:
            await asyncio.sleep(DOUBT)
            suspects = await self.still_unnamed(suspects)
        for file in suspects:
            self.report("unnamed", mkv.path2key(file.path)[0].decode(), file)
        self.unnamed += suspects

    async def still_unnamed(self, files: Iterable[File]) -> list[File]:
        """Those that are there, but not in any of the three lists. Wrong."""
        suspects = defaultdict(list)
        for file in files:
            suspects[mkv.path2key(file.path)[0].decode()].append(file)
        left: list[File] = []

        async def see(client: Patient, key: str) -> None:
            try:
                named = await self.files_of(client, key)
            except ValueError:  # nobody knows what it names; it is reported as such
                return
            for file in suspects[key]:
                if file not in named and not await self.is_gone(client, file):
                    left.append(file)

        await self.spread(list(suspects), see)
        return left

    async def is_gone(self, client: Patient, file: File) -> bool:
        """Whether a file that was listed is there no more."""
        with contextlib.suppress(OSError):
            return (await client.fetch(file, "HEAD")).status == 404
        return False

    # all of it

    async def look(self) -> None:
        """Check everything. Wrong, OSError."""
        for which in KEYS:
            async for rows in self.pages(which):
                await self.spread(rows, self.check_row)
        async for rows in self.pages(GARBAGE):
            for row in rows:
                self.check_garbage(row)
        await self.check_names()
        await self.check_files()
        if self.flags.wait:
            await self.look_again()
        self.stage = "done"

    async def look_again(self) -> None:
        """Report as strays what nothing names after a long while either. Wrong, OSError."""
        number, seconds = len(self.unnamed), self.flags.settle
        if number:
            self.stage = f"{number:,} unnamed files are looked at again in {seconds:g} s"
            say(self.summary())
            await asyncio.sleep(seconds)
        login = '-u "$MKV_USERPASS" ' if self.flags.userpass else ""
        for file in await self.still_unnamed(self.unnamed):
            line = f"curl -gX DELETE {login}{shlex.quote(f'http://{file.url}')}"
            self.report("stray", mkv.path2key(file.path)[0].decode(), file, delete=line)
        del self.found["unnamed"]

    async def run(self) -> int:
        """The exit status. OSError: nobody takes what it prints."""
        background = [asyncio.create_task(job) for job in (self.progress(), self.tick())]
        try:
            await self.look()
        except (Wrong, asyncio.CancelledError) as error:
            self.report("unfinished", reason=str(error) or "interrupted")
        for task in background:
            task.cancel()
        say(self.summary())
        if self.found["unreachable"] + self.found["unfinished"]:
            return 2
        return 1 if self.found.total() else 0


def mute(stream: TextIO) -> None:
    """Let a stream lead nowhere, so that nobody fails who writes to it, Python's end included."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(text: str, end: str = "\n") -> None:
    """Tell a person, if there is one."""
    if sys.stderr:
        try:
            print(text, end=end, file=sys.stderr, flush=True)
        except OSError:
            mute(sys.stderr)


def occupy() -> None:
    """Open the descriptors 0 to 2 that are closed: libuv aborts when it gets one of them."""
    while (file := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(file)


def verify(flags: argparse.Namespace) -> None:
    """What `python thrasher.py verify` does."""
    occupy()
    if not sys.stdout:
        say("thrasher: verify has nowhere to print its findings")
        sys.exit(2)
    try:
        status = uvloop.run(Verify(flags).run())
    except OSError as error:
        mute(sys.stdout)
        say(f"thrasher: the findings cannot be printed: {error}")
        status = 2
    sys.exit(status)


# --- command line ---------------------------------------------------------------------------------

DEMO = "127.0.0.1:3001,127.0.0.1:3002,127.0.0.1:3003"  # the volumes of `mkv.py server` alone
UNITS = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600}


def addresses(text: str) -> list[str]:
    """host:port,host:port,… ValueError."""
    found = text.split(",")
    if not all(re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+):[0-9]{1,5}", each) for each in found):
        raise ValueError(text)
    return list(dict.fromkeys(found))


def duration(text: str) -> float:
    """Seconds: 300ms, 1s, 1.5s, 1m, 1h; a number alone is one of seconds. ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|)", text)
    if not match:
        raise ValueError(text)
    return float(match[1]) * UNITS[match[2]]


FLAGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "server": (addresses, "127.0.0.1:3000", "host:port,… of running servers with the same index"),
    "userpass": (str, "", "user:password for server and volumes ($MKV_USERPASS)"),
    "count": (int, "10000", "how often a key is written, read and deleted"),
    "clients": (int, "16", "how many do so at a time"),
    "size": (int, "64", "bytes of a value"),
    "keys": (int, "0", "distinct keys; deleted ones are written again (0: as many as -count)"),
    "rows": (str, ",".join(ROWS), "bench: the rows to measure"),
    "volumes": (addresses, DEMO, "verify: host:port,… of all volumes"),
    "subvolumes": (int, "10", "verify: drives a volume"),
    "replicas": (int, "3", "verify: copies that each value should have"),
    "settle": (duration, "1h", "verify -wait: how long"),
}
SWITCHES = {
    "quick": "bench: less of everything",
    "long": "bench: 10 minutes of growth",
    "deep": "verify: read every replica, and compare its MD5",
    "wait": "verify: look again, after -settle, at files that nothing names",
}


def parse_flags() -> argparse.Namespace:
    """The command line, checked."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=["bench", "verify"])
    for name, (kind, default, text) in FLAGS.items():
        help_text = f"{text} ({default})" if default else text
        parser.add_argument(f"-{name}", f"--{name}", type=kind, default=default, help=help_text)
    for name, text in SWITCHES.items():
        parser.add_argument(f"-{name}", f"--{name}", action="store_true", help=text)
    flags = parser.parse_args()
    if min(flags.count, flags.clients, flags.size) < 1 or 0 != flags.keys < flags.clients:
        parser.error("-count, -clients, -size are at least 1, and -keys is at least -clients")
    if set(flags.rows.split(",")) - set(ROWS):
        parser.error(f"-rows are of {','.join(ROWS)}")
    if not 1 <= flags.subvolumes <= 256 or flags.replicas < 1:
        parser.error("-subvolumes is 1 to 256, and -replicas at least 1")
    flags.userpass = flags.userpass or os.environ.get("MKV_USERPASS", "")
    return flags


def main() -> None:
    """What `python thrasher.py` does."""
    flags = parse_flags()
    commands = {None: classic, "bench": bench, "verify": verify}
    try:
        commands[flags.command](flags)
    except (Wrong, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"thrasher: {error}")
    except KeyboardInterrupt:
        sys.exit("thrasher: interrupted")


if __name__ == "__main__":
    main()
