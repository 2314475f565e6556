"""What the tests of mkv have in common: clients, volumes, servers, clusters and helpers."""
# ruff: noqa: F401 (the tests have their imports from here)

import asyncio
import base64
import contextlib
import dataclasses
import functools
import gc
import hashlib
import http.client
import http.server
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import lmdb
import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import mkv  # noqa: E402

MB = 1 << 20
LANE = int(os.environ.get("LANE", 0))  # tests that run at the same time take other ports
WRITE_ID = "6b0108907bf79949"
CLOSE = "Connection: close\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"


# --- what a machine may lack ----------------------------------------------------------------------

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def has(need: str) -> bool:
    """Whether this machine has a program, or root, IPv6, postgresql (Debian's; it wants root)."""
    if need == "root":
        return os.geteuid() == 0
    if need == "IPv6":
        addresses = Path("/proc/net/if_inet6")
        return addresses.exists() and f"{1:032x}" in addresses.read_text()
    if need == "postgresql":
        return has("root") and bool(list(Path("/usr/lib/postgresql").glob("*/bin/initdb")))
    return bool(shutil.which(need, path=PATH))


def needs(*things: str) -> None:
    """Skip a test, or a chapter, where something is missing. Mounts and traces tell themselves."""
    for need in things:
        if not has(need):
            pytest.skip(f"needs {need}", allow_module_level=True)


# --- requests and answers -------------------------------------------------------------------------


@dataclasses.dataclass
class Reply:
    """An answer: status, header fields by lower-case name, body."""

    status: int
    fields: dict[str, str]
    body: bytes


def call(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    fields: dict[str, str] | None = None,
    source: str = "",
) -> Reply:
    """One request on a connection of its own, from an address of this machine; no redirects."""
    address = (source, 0) if source else None
    connection = http.client.HTTPConnection("127.0.0.1", port, 60, source_address=address)
    try:
        connection.request(method, path, body=body, headers=fields or {})
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, headers, answer.read())
    finally:
        connection.close()


def raw(port: int, data: bytes, timeout: float = 10) -> bytes:
    """Send bytes, and read until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as wire:
        wire.sendall(data)
        answer = b""
        while piece := wire.recv(65536):
            answer += piece
        return answer


class Wire:
    """A connection that is kept: bytes out, answers in."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and header fields of the next answer, 100 Continue included."""
        status = int(self.file.readline().split()[1])
        lines = iter(lambda: self.file.readline().decode().rstrip("\r\n"), "")
        return status, {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}

    def answer(self) -> Reply:
        """The next answer whole; not for HEAD."""
        status, fields = self.head()
        return Reply(status, fields, self.file.read(int(fields.get("content-length", "0"))))

    def closed(self) -> bool:
        """Waits for more, and tells whether the other side closed instead."""
        return self.file.read(1) == b""


def request(method: str, path: str, body: bytes = b"", fields: str = "") -> bytes:
    """A request's bytes; `fields` are lines that end in CR LF."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{length}{fields}\r\n".encode() + body


SMUGGLED = request("PUT", "/smuggled", b"x")


def statuses(answers: bytes) -> list[int]:
    """Of answers one after the other."""
    return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3})", answers, re.M)]


def until(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """Poll until a condition holds; its value. AssertionError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {condition}"
        time.sleep(0.01)
    return value


def holds(condition: Callable[[], Any], seconds: float) -> None:
    """That something does not come to pass can only be watched for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert condition(), f"no longer so: {condition}"
        time.sleep(0.02)


def blob(name: str, size: int) -> bytes:
    """Bytes that no other name has."""
    return (hashlib.sha256(name.encode()).digest() * (size // 32 + 1))[:size]


class Upload:
    """A PUT whose body is sent piece by piece."""

    def __init__(self, port: int, path: str, length: int, fields: str = "") -> None:
        self.wire = socket.create_connection(("127.0.0.1", port), timeout=60)
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{fields}\r\n"
        self.wire.sendall(head.encode())

    def send(self, data: bytes) -> None:
        self.wire.sendall(data)

    def answer(self) -> int:
        """The status."""
        response = http.client.HTTPResponse(self.wire)
        response.begin()
        response.read()
        self.wire.close()
        return response.status

    def vanish(self) -> None:
        """Go away with a reset."""
        self.wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.wire.close()


class Client:
    """One keep-alive connection, made when needed; a connection that breaks is an OSError."""

    def __init__(self, port: int, timeout: float = 60) -> None:
        self.wire = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def call(self, method: str, path: str, body: bytes | None = None) -> Reply:
        try:
            self.wire.request(method, path, body=body)
            answer = self.wire.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.wire.close()
            raise error if isinstance(error, OSError) else ConnectionError(repr(error)) from error
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, data)


def quiet_reader(port: int, room: int = 8192) -> socket.socket:
    """A connection of a client that has little room for answers."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    wire.connect(("127.0.0.1", port))
    return wire


# --- volumes, servers, clusters -------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that no connection going out gets by chance."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000 + LANE, 32_000, 2)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)


class Volume:
    """One nginx, started by volume.sh in a process group of its own."""

    def __init__(self, folder: Path, port: int, subvolumes: int = 10) -> None:
        self.folder, self.port, self.subvolumes = folder, port, subvolumes
        self.name = f"127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        env = os.environ | {
            "PORT": str(self.port),
            "HOST": "127.0.0.1",
            "SUBVOLUMES": str(self.subvolumes),
        }
        command = [str(HERE / "volume.sh"), str(self.folder)]
        self.process = subprocess.Popen(command, env=env, start_new_session=True)
        until(self.alive)

    def alive(self) -> bool:
        assert self.process.poll() is None, "volume.sh ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def signal(self, number: int) -> None:
        """To master and workers: SIGKILL of a master leaves its workers serving."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def workers(self) -> list[int]:
        """The pids of the worker processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        until(lambda: not self.listening())

    def listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def files(self) -> set[str]:
        """The paths of all stored files, with svXX if any, such as /sv01/aa/bb/name."""
        found = set()
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found |= {"/" + str((Path(folder) / name).relative_to(self.folder)) for name in names}
        return found


class Server:
    """One `mkv.py server`; `constants` are limits of the module that are too long for a test.

    `nofile` is its limit of descriptors; a listener is handed to it as systemd does.
    """

    def __init__(
        self,
        db: Path | str,
        port: int,
        *flags: str,
        constants: dict[str, float] | None = None,
        nofile: int = 0,
        listener: socket.socket | None = None,
        log: Path | None = None,
    ) -> None:
        self.db, self.port, self.flags = db, port, flags
        self.constants, self.nofile, self.listener = constants or {}, nofile, listener
        self.log = log or Path(db).parent / "server.log"
        self.login = ""  # user:password, for what call() asks
        self.start()

    def command(self) -> list[str]:
        """How it is started."""
        script = [str(HERE / "mkv.py")]
        if self.constants:
            lines = ["import sys", f"sys.path.insert(0, {str(HERE)!r})", "import mkv"]
            for name, value in self.constants.items():
                module, _, constant = name.rpartition(".")
                module = module or "mkv"
                lines += [f"import {module}", f"assert hasattr({module}, {constant!r})"]
                lines.append(f"{module}.{constant} = {value!r}")
            script = ["-c", "\n".join([*lines, "mkv.main()"])]
        limit = ["prlimit", f"--nofile={self.nofile}"] if self.nofile else []
        if self.listener:
            take = f'exec 3<&{self.listener.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
            limit = ["bash", "-c", take, "bash", *limit]
        flags = ["-bind", "127.0.0.1", "-db", str(self.db), "-port", str(self.port), *self.flags]
        return [*limit, sys.executable, *script, "server", *flags]

    def start(self) -> None:
        with self.log.open("ab") as log:
            passed = [self.listener.fileno()] if self.listener else []
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, pass_fds=passed)
        try:
            until(self.alive)
        except BaseException:  # nobody else would end it
            self.process.kill()
            self.process.wait()
            raise

    def running(self) -> bool:
        """Whether there is a process; it may be frozen."""
        return self.process.poll() is None

    def alive(self) -> bool:
        assert self.running(), self.log.read_text()
        try:
            return self.call("GET", "/?health").status == 200
        except OSError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def call(self, method: str, path: str, body: Any = None, **fields: str) -> Reply:
        """A request; keyword arguments are header fields, Content_MD5="…"."""
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        if self.login:
            proof = base64.b64encode(self.login.encode()).decode()
            headers.setdefault("Authorization", f"Basic {proof}")
        return call(self.port, method, path, body, headers)

    def put(self, path: str, body: Any) -> int:
        return self.call("PUT", path, body).status

    def get(self, path: str) -> bytes | None:
        """The value, through the redirect; None when there is none."""
        answer = self.call("GET", path)
        if answer.status == 404:
            return None
        assert answer.status == 302, answer
        port, _, target = answer.fields["location"].removeprefix("http://127.0.0.1:").partition("/")
        value = call(int(port), "GET", "/" + target)
        assert value.status == 200, value
        return value.body

    def metric(self, name: str) -> float:
        """A number from /?metrics; 0 when it is not there."""
        for line in self.call("GET", "/?metrics").body.decode().splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        return 0.0

    def sees(self, volume: "Volume", up: bool = True) -> bool:
        """Whether the prober takes a volume for up, or for down."""
        return self.metric(f'mkv_volume_up{{volume="{volume.name}"}}') == up

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        """All items of a list in long form, from one page to the next."""
        start = ""
        while start is not None:
            answer = self.call("GET", f"{path}&long&start={quote(start)}")
            assert answer.status == 200, answer
            page = json.loads(answer.body)
            yield from page["keys"]
            start = page["next"] or None

    def records(self) -> dict[bytes, mkv.Record]:
        """What the index says of each key, over HTTP."""
        found = {}
        for path, deleted in (("/?list", False), ("/?unlinked", True)):
            for item in self.pages(path):
                files = tuple(map(replica_of, item["files"]))
                newest = files[0].write_id if files else ""
                found[item["key"].encode()] = mkv.Record(
                    files, item["size"], newest, item["md5"] or "", deleted
                )
        return found

    def garbage(self) -> dict[bytes, dict[mkv.Replica, float]]:
        """Files that wait to be deleted, with their ages in seconds, over HTTP."""
        answer = self.call("GET", "/?garbage")
        assert answer.status == 200, answer
        found: dict[bytes, dict[mkv.Replica, float]] = {}
        for item in json.loads(answer.body)["garbage"]:
            found.setdefault(item["key"].encode(), {})[replica_of(item["file"])] = item["age"]
        return found

    def memory(self) -> int:
        """Peak resident memory, in bytes (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


FILE = re.compile(r"([^/]+(?:/sv[0-9A-F]{2})?)(/[0-9a-f]{2}/[0-9a-f]{2}/.+)", re.S)


def replica_of(file: str) -> mkv.Replica:
    """The replica that is host:port/svXX/aa/bb/name-id in lists and reports."""
    location, path = FILE.fullmatch(file).groups()
    return mkv.Replica(location, mkv.path2key(path)[1])


def file_of(key: bytes, replica: mkv.Replica) -> str:
    """The inverse: host:port/svXX/aa/bb/name-id."""
    return replica.location + mkv.key2path(key, replica.write_id)


def read_garbage(entry: str) -> dict[mkv.Replica, float]:
    """A row of the table of garbage: files, and since when they are."""
    found = {}
    for item in entry.split(","):
        since, _, file = item.partition(" ")
        location, _, write_id = file.partition("@")
        found[mkv.Replica(location, write_id)] = float(since)
    return found


def stored(folder: Path) -> tuple[dict[bytes, mkv.Record], dict[bytes, dict[mkv.Replica, float]]]:
    """Records and garbage (with its ages) as they lie in the folder of an LMDB index."""
    tables = []
    with lmdb.open(str(folder), readonly=True, max_dbs=8, map_size=1 << 40) as env:
        for name in (b"keys", b"garbage"):
            with env.begin() as txn:
                tables.append(list(txn.cursor(env.open_db(name, txn, create=False))))
    records, now = {}, time.time()
    for key, text in tables[0]:
        record = mkv.parse_record(text)
        newest = record.replicas[0].write_id if record.replicas else ""
        records[key] = record._replace(write_id=newest)  # as records() has it
    listed = {key: read_garbage(entry.decode()) for key, entry in tables[1]}
    ages = {key: {f: now - t for f, t in files.items()} for key, files in listed.items()}
    return records, ages


Tables = tuple[dict[bytes, mkv.Record], dict[bytes, set[mkv.Replica]]]


def plant(
    folder: Path,
    keys: Iterable[tuple[bytes, bytes]] = (),
    garbage: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Put rows into the tables of an index that no server has, as they are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), max_dbs=8, map_size=1 << 40) as env:
        for name, rows in ((b"keys", keys), (b"garbage", garbage)):
            with env.begin(env.open_db(name), write=True) as txn, txn.cursor() as cursor:
                cursor.putmulti(rows)


def garbage_row(files: Iterable[mkv.Replica], since: float) -> bytes:
    """Files that are garbage since a time, as they are stored."""
    return ",".join(f"{since} {f.location}@{f.write_id}" for f in files).encode()


class Cluster:
    """Volumes and a server over one index, all under one folder; settle and grace are short."""

    FLAGS = ("-settle", "300ms", "-grace", "100ms", "-voltimeout", "300ms")

    def __init__(
        self,
        folder: Path,
        *flags: str,
        volumes: int = 3,
        subvolumes: int = 10,
        **settings: Any,
    ) -> None:
        self.folder, self.subvolumes, self.servers = folder, subvolumes, []
        *ports, port = free_ports(volumes + 1)
        self.volumes = [
            Volume(folder / f"volume{i}", port, subvolumes) for i, port in enumerate(ports)
        ]
        try:
            self.server = self.start(port, *flags, **settings)
        except BaseException:
            self.close()
            raise

    def names(self) -> str:
        """The volumes, as -volumes takes them."""
        return ",".join(volume.name for volume in self.volumes)

    def start(self, port: int, *flags: str, db: Path | str = "", **settings: Any) -> Server:
        """Another server over the same volumes; of an LMDB, only one at a time."""
        known = ["-volumes", self.names(), "-subvolumes", str(self.subvolumes), *self.FLAGS, *flags]
        log = self.folder / "server.log"
        server = Server(db or self.folder / "index", port, *known, log=log, **settings)
        self.servers.append(server)
        return server

    def close(self) -> None:
        """End all processes, and give the space back: only the log stays."""
        for server in self.servers:
            if server.running():
                server.kill()
        for volume in self.volumes:
            volume.thaw()
            volume.kill()
        for folder in [path for path in self.folder.iterdir() if path.is_dir()]:
            shutil.rmtree(folder)

    def records(self) -> dict[bytes, mkv.Record]:
        """What the index says of each key: asked for over HTTP, or read when no server runs."""
        running = [server for server in self.servers if server.running()]
        return running[-1].records() if running else stored(self.folder / "index")[0]

    def garbage(self) -> dict[bytes, dict[mkv.Replica, float]]:
        """Files that wait to be deleted, with their ages; asked for, or read."""
        running = [server for server in self.servers if server.running()]
        return running[-1].garbage() if running else stored(self.folder / "index")[1]

    def tables(self) -> Tables:
        """Records and garbage, without its ages: to be compared."""
        return self.records(), {key: set(files) for key, files in self.garbage().items()}

    def server_accepts(self) -> bool:
        """Whether a new connection to the server is taken."""
        return accepts(self.server.port)

    def files(self) -> set[str]:
        """All stored files, as location + path without svXX: 127.0.0.1:3001/sv01/aa/bb/name."""
        return {volume.name + path for volume in self.volumes for path in volume.files()}

    def named(self) -> set[str]:
        """The files that the records name."""
        records = self.records().items()
        return {file_of(key, replica) for key, record in records for replica in record.replicas}

    def open_intents(self) -> int:
        """How many writes are under way, or broken off and not wasted yet."""
        running = [server for server in self.servers if server.running()]
        return sum(int(server.metric("mkv_intents_open")) for server in running)

    def is_clean(self) -> bool:
        """No garbage, no intents, and the volumes hold what the index names, no more, no less."""
        return not self.garbage() and not self.open_intents() and self.files() == self.named()

    def sees(self, volume: Volume, up: bool = True) -> None:
        """Wait until the server takes a volume for up, or for down."""
        until(lambda: self.server.sees(volume, up), 10)


Make = Callable[..., Cluster]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Make]:
    """Starts clusters: cluster("-flag", "value", volumes=3, subvolumes=10)."""
    clusters = []

    def make(*flags: str, **settings: Any) -> Cluster:
        folder = tmp_path / str(len(clusters))
        folder.mkdir()
        clusters.append(Cluster(folder, *flags, **settings))
        return clusters[-1]

    yield make
    for each in clusters:
        each.close()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for tests that need no other; at the end nothing may have leaked."""
    shared = Cluster(tmp_path_factory.mktemp("shared"))
    yield shared
    try:
        until(shared.is_clean)
    finally:
        shared.close()


# --- looking at them, and making them ill ---------------------------------------------------------


def follow(reply: Reply, timeout: float = 60) -> Reply | None:
    """What the target of a redirect answers; None when it does not."""
    port, _, path = reply.fields["location"].removeprefix("http://127.0.0.1:").partition("/")
    try:
        return Client(int(port), timeout).call("GET", "/" + path)
    except OSError:
        return None


def read(server: Server, path: str, seconds: float = 20) -> bytes | None:
    """The value, for a client that asks again when the redirect target refuses; None: 404."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        reply = server.call("GET", path)
        if reply.status == 404:
            return None
        found = follow(reply, 1) if reply.status == 302 else None
        if found and found.status == 200:
            return found.body
        time.sleep(0.01)
    raise AssertionError(f"{path} cannot be read: {reply}")


def listed(server: Server, path: str) -> tuple[list[str], str]:
    """The keys of a list, and where the next one begins."""
    answer = server.call("GET", path)
    assert answer.status == 200 and answer.fields["content-type"] == "application/json"
    value = json.loads(answer.body)
    assert set(value) == {"keys", "next"}
    return value["keys"], value["next"]


def volume_of(location: str) -> str:
    """host:port of host:port/svXX."""
    return location.partition("/")[0]


def volume_at(system: Cluster, location: str) -> Volume:
    """The volume of a location."""
    return next(v for v in system.volumes if v.name == volume_of(location))


def drive_at(system: Cluster, location: str) -> Path:
    """The folder of a location."""
    return volume_at(system, location).folder / location.partition("/")[2]


def ideal(system: Cluster, path: str, count: int = 3) -> list[str]:
    """The first locations of the ranking."""
    names = [volume.name for volume in system.volumes]
    return mkv.key2volume(path.encode(), names, count, system.subvolumes)


def copies(system: Cluster, path: str) -> dict[str, bytes]:
    """The bytes of each replica on disk, by location."""
    key, record = path.encode(), system.records()[path.encode()]
    return {
        r.location: Path(
            str(drive_at(system, r.location)) + mkv.key2path(key, r.write_id)
        ).read_bytes()
        for r in record.replicas
    }


def assert_copies(system: Cluster, path: str, value: bytes, count: int = 3) -> list[str]:
    """That a key has so many whole copies on as many volumes; their volumes."""
    found = copies(system, path)
    assert len({volume_of(location) for location in found}) == len(found) == count, found.keys()
    assert all(copy == value for copy in found.values()), path
    return [volume_of(location) for location in found]


def replicas_of(system: Cluster, key: bytes) -> list[str]:
    """The URLs of all files of a key."""
    replicas = system.records()[key].replicas
    return [f"http://{r.location}{mkv.key2path(key, r.write_id)}" for r in replicas]


def descriptors(server: Server) -> int:
    """How many files and sockets a server has open."""
    return open_files(server.process.pid)


def open_files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def anonymous_memory(pid: int) -> int:
    """Resident bytes that are not pages of a file: LMDB's map does not count."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def descendants(pid: int) -> set[int]:
    """The processes under a process."""
    found, parents = set(), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def ended(pid: int) -> bool:
    """Whether a process is no more, but for what its parent has to hear of it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return not any(Path(f"/proc/{pid}/fd").iterdir())
    return True


def restart(system: Cluster) -> Server:
    """kill -9 of the server, and the same again."""
    system.server.kill()
    system.server.start()
    return system.server


def shell(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def mounts(cluster: Make) -> Iterator[Callable[..., None]]:
    """Mounts for the time of a test, undone before its cluster is; skips where it may not mount."""
    done = []

    def mount(folder: Path, *options: str) -> None:
        try:
            shell("mount", *options, str(folder))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs to mount: {error.stderr.decode().strip()}")
        done.append(folder)

    yield mount
    for folder in reversed(done):
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def ail(ailment: str, volume: Volume, mounts: Callable[..., None]) -> Callable[[], None]:
    """Make a volume ill; returns what cures it."""
    folder, away = volume.folder, volume.folder.with_name("away")
    if ailment == "dead":
        volume.kill()
        return volume.start
    if ailment == "frozen":
        volume.freeze()
        return volume.thaw
    if ailment == "away":
        folder.rename(away)
        return lambda: away.rename(folder)
    if ailment == "read-only":
        mounts(folder, "--bind", str(folder))
        shell("mount", "-o", "remount,ro,bind", str(folder))
        return lambda: shell("mount", "-o", "remount,rw,bind", str(folder))
    assert ailment == "full"
    volume.kill()
    mounts(folder, "-t", "tmpfs", "-o", "size=1m", "none")
    volume.start()
    filler = folder / ".nginx" / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    return filler.unlink


def block(drive: Path) -> None:
    """Leave no room for new folders on a drive: there are files of their names."""
    for number in range(256):
        with contextlib.suppress(FileExistsError):
            (drive / f"{number:02x}").touch(exist_ok=False)


@contextlib.contextmanager
def frozen(worker: int) -> Iterator[None]:
    """A process that is stopped for the time of a block."""
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def in_background(work: Callable[[], Any]) -> threading.Thread:
    """A call whose connection may break."""

    def run() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


class Liar(threading.Thread):
    """A volume whose every answer is the same bytes, and then others for ever, if there are any.

    With `drives` it answers as a good volume when it is asked for these.
    """

    def __init__(self, answer: bytes, more: bytes | None, drives: str = "") -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.asked, self.says, self.drives = False, (answer, more), drives
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self.listener.accept()
                threading.Thread(target=self.lie, args=(wire, *self.says), daemon=True).start()

    def lie(self, wire: socket.socket, answer: bytes, more: bytes | None) -> None:
        with wire, contextlib.suppress(OSError):
            asked = wire.recv(1 << 20)
            while self.drives and asked.startswith(b"GET /.drives "):
                text = f"{hashlib.md5(self.name.encode()).hexdigest()} {self.drives}\n"
                wire.sendall(
                    f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
                )
                asked = wire.recv(1 << 20)
            self.asked = bool(asked) or self.asked
            wire.sendall(answer)
            while more:
                wire.sendall(more)
            while more == b"" and wire.recv(1 << 20):
                pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake accept()
        self.listener.close()


class Fake(http.server.ThreadingHTTPServer):
    """A volume without drives, in memory. A test may spoil what it does.

    `before(method, path)` is called before each answer, but not to the prober, and may block;
    `says` has what it answers to a method instead of doing it, 0 is nothing;
    `given(value)` makes of a stored value what a GET gets; `log` has (time, method, path).
    `knows_drives` is whether it answers the prober, as older volumes do not; `drives` is what it
    says then. Its answers have `fields` as well, and after each come `more` bytes, unasked.
    """

    daemon_threads, request_queue_size = True, 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.name = f"127.0.0.1:{self.server_address[1]}"
        self.stored: dict[str, bytes] = {}
        self.log: list[tuple[float, str, str]] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.given: Callable[[bytes], bytes] = lambda value: value
        self.knows_drives, self.drives = True, "."
        self.says: dict[str, int] = {}
        self.fields: dict[str, str] = {}
        self.more = b""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Connections break: nobody has to hear of it."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class FakeHandler(http.server.BaseHTTPRequestHandler):
    """One connection to a fake volume."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    wbufsize = 1 << 16  # an answer is one piece
    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        """Of a PUT, by its length or in chunks; EOFError when it is cut short."""
        if self.headers.get("Transfer-Encoding"):
            value = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                value += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return value
        value = self.rfile.read(length := int(self.headers.get("Content-Length", "0")))
        if len(value) < length:
            raise EOFError("cut short")
        return value

    def reply(self, status: int, value: bytes = b"") -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(value)))
        for name, text in self.server.fields.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write((b"" if self.command == "HEAD" else value) + self.server.more)

    def answer(self) -> None:
        """Do what a volume does."""
        if self.path == "/.drives":
            name = hashlib.md5(self.server.name.encode()).hexdigest()
            known = self.server.knows_drives
            text = f"{name} {self.server.drives}\n".encode()
            return self.reply(200, text) if known else self.reply(403)
        value = self.body()
        self.server.log.append((time.monotonic(), self.command, self.path))
        self.server.before(self.command, self.path)
        if (status := self.server.says.get(self.command)) == 0:
            raise ConnectionError
        if status:
            return self.reply(status)
        if self.command == "PUT":
            self.server.stored[self.path] = value
            return self.reply(201)
        found = self.server.stored.get(self.path)
        if self.command == "DELETE" and found is not None:
            del self.server.stored[self.path]
            return self.reply(204)
        return self.reply(404) if found is None else self.reply(200, self.server.given(found))

    do_GET = do_HEAD = do_PUT = do_DELETE = answer  # noqa: N815


@pytest.fixture
def fakes() -> Iterator[Callable[[], Fake]]:
    """Makes fake volumes."""
    made = []

    def make() -> Fake:
        made.append(Fake())
        return made[-1]

    yield make
    for fake in made:
        fake.close()


class Value:
    """A value of any size that is never in memory as a whole; each MiB of it is different."""

    def __init__(self, seed: int, size: int) -> None:
        self.block, self.size = random.Random(seed).randbytes(1 << 20), size

    def __iter__(self) -> Iterator[bytes]:
        for number, start in enumerate(range(0, self.size, 1 << 20)):
            yield (number.to_bytes(8, "big") + self.block[8:])[: self.size - start]

    def sha256(self) -> str:
        return sha256(self)


def sha256(pieces: Iterable[bytes]) -> str:
    """In hex, of pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def download(url: str) -> Iterator[bytes]:
    """What a volume serves, in pieces."""
    port, _, path = url.removeprefix("http://127.0.0.1:").partition("/")
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/" + path)
        answer = connection.getresponse()
        assert answer.status == 200
        while piece := answer.read(1 << 20):
            yield piece


def upload(server: Server, path: str, value: Value, chunked: bool = False) -> int:
    """PUT a value as a stream; the status."""
    length = {} if chunked else {"Content_Length": str(value.size)}
    return server.call("PUT", path, iter(value), **length).status


def random_key(chance: random.Random) -> bytes:
    """2 to 511 bytes of UTF-8, from a slash on."""
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    ranges = chance.sample(ranges, chance.randint(1, 5))
    text = "/"
    length = chance.choice((2, 10, 100, 340, 511))
    while len(text.encode()) < length:
        text += chr(chance.randint(*chance.choice(ranges)))
    return text.encode()[:511].decode(errors="ignore").encode()


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen]:
    """`mkv.py server` without flags, once it is there; what it says is in the file `out`."""
    until(lambda: not any(map(accepts, (3000, 3001, 3002, 3003))), 60)
    out = folder / "out"
    command = [sys.executable, HERE / "mkv.py", "server"]
    with out.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None or "?list" in out.read_text())
        assert process.poll() is None, out.read_text()
        yield process
    finally:
        process.terminate()
        process.wait(30)


def error_of(*args: str | Path, folder: Path, lines: int = 1, **options: Any) -> str:
    """What `mkv.py` says before it ends with exit code 2: one line; of the demo, at most two."""
    command = [sys.executable, options.pop("script", HERE / "mkv.py"), *args]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, **options)
    try:
        out, said = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: volumes of its own would stay
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, ""), (out, said)
    assert 1 <= said.count("\n") <= lines, said
    return said


@contextlib.contextmanager
def foreign_folder() -> Iterator[Path]:
    """A folder of the user nobody, where it can be reached."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        folder.chmod(0o755)
        shutil.chown(folder, "nobody", "nogroup")
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def old_workers_frozen(volume: Volume) -> Iterator[None]:
    """The workers that a volume has are stopped for the time of a block; see fresh_workers()."""
    old = volume.workers()
    for worker in old:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in old:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)


def fresh_workers(volume: Volume) -> None:
    """New workers take new connections; the old ones, when thawed, finish what they have."""
    old = set(volume.workers())
    os.kill(volume.process.pid, signal.SIGHUP)
    until(lambda: set(volume.workers()) - old)
    assert call(volume.port, "HEAD", "/").status == 200


needs_root = pytest.mark.skipif(not has("root"), reason="only root can be others")


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """One volume without a server."""
    started = Volume(tmp_path / "volume", *free_ports(1))
    yield started
    started.kill()
