#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["uvloop", "lmdb>=3,<4", "pytest", "pytest-asyncio"]
# ///
"""The promises of mkv, tested on the real thing: real nginx, sockets, LMDB and kill -9."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import gc
import hashlib
import http.client
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

import mkv

HERE = Path(__file__).resolve().parent


# --- harness --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reply:
    """An answer: status, header fields by lower-case name, body."""

    status: int
    fields: dict[str, str]
    body: bytes


def call(
    port: int, method: str, path: str, body: Any = None, fields: dict[str, str] | None = None
) -> Reply:
    """One request on a connection of its own; redirects are not followed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
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


CHUNKED = "Transfer-Encoding: chunked\r\n"


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


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that no connection going out gets by chance."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
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
    """One `mkv.py server`; a preamble is code that runs in it first, with mkv imported."""

    def __init__(self, db: Path, port: int, *flags: str, preamble: str = "") -> None:
        self.db, self.port, self.flags, self.preamble = db, port, flags, preamble
        self.log = db.parent / "server.log"
        self.start()

    def start(self) -> None:
        script = [str(HERE / "mkv.py")]
        if self.preamble:
            imports = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport mkv\n"
            script = ["-c", f"{imports}{self.preamble}\nmkv.main()"]
        command = [sys.executable, *script, "server", "-bind", "127.0.0.1"]
        command += ["-db", str(self.db), "-port", str(self.port), *self.flags]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            until(self.alive)
        except AssertionError:  # nobody else would end it
            self.process.kill()
            raise

    def alive(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("GET", "/?health").status == 200
        except OSError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def kill(self) -> None:
        workers = descendants(self.process.pid)
        self.stop(signal.SIGKILL)
        for pid in workers:  # if there are any, they serve on
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: all(map(ended, workers)))

    def call(self, method: str, path: str, body: Any = None, **fields: str) -> Reply:
        """A request; keyword arguments are header fields, Content_MD5="…"."""
        return call(
            self.port, method, path, body, {k.replace("_", "-"): v for k, v in fields.items()}
        )

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
        """A number from /?metrics."""
        for line in self.call("GET", "/?metrics").body.decode().splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        return 0.0

    def memory(self) -> int:
        """Peak resident memory, in bytes (VmHWM)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


Tables = tuple[dict[bytes, mkv.Record], dict[bytes, mkv.Row]]


class Rows:
    """The tables of an index and what reads and changes them, without all else that it is."""

    look, change = mkv.Index.look, mkv.Index.change

    def __init__(self, env: lmdb.Environment) -> None:
        self.env, self.keys, self.journal = env, env.open_db(b"keys"), env.open_db(b"journal")

    def dump(self, txn: lmdb.Transaction) -> list[list[tuple[bytes, bytes]]]:
        """The rows of both tables as they are stored."""
        return [list(txn.cursor(table)) for table in (self.keys, self.journal)]

    def tables(self) -> Tables:
        """Records, and rows with a journal entry, by key."""
        with self.env.begin() as txn:
            keys, journal = self.dump(txn)
            records = {key: mkv.parse_record(text) for key, text in keys}
            return records, {key: self.look(key, txn) for key, _ in journal}


class Cluster:
    """Volumes and a server over one index, all under one folder; settle and grace are short."""

    FLAGS = ("-settle", "300ms", "-grace", "100ms", "-voltimeout", "300ms")

    def __init__(
        self,
        folder: Path,
        *flags: str,
        volumes: int = 3,
        subvolumes: int = 10,
        preamble: str = "",
    ) -> None:
        self.folder, self.subvolumes, self.servers = folder, subvolumes, []
        *ports, port = free_ports(volumes + 1)
        self.volumes = [
            Volume(folder / f"volume{i}", port, subvolumes) for i, port in enumerate(ports)
        ]
        try:
            self.server = self.start(port, *flags, preamble=preamble)
        except BaseException:
            self.close()
            raise

    def start(self, port: int, *flags: str, preamble: str = "") -> Server:
        """Another server over the same index and volumes."""
        names = ",".join(volume.name for volume in self.volumes)
        settings = ["-volumes", names, "-subvolumes", str(self.subvolumes), *self.FLAGS, *flags]
        self.servers.append(Server(self.folder / "index", port, *settings, preamble=preamble))
        return self.servers[-1]

    def close(self) -> None:
        """End all processes, and give the space back: only the log stays."""
        for server in self.servers:
            if server.process.poll() is None:
                server.kill()
        for volume in self.volumes:
            volume.thaw()
            volume.kill()
        for folder in [path for path in self.folder.iterdir() if path.is_dir()]:
            shutil.rmtree(folder)

    def tables(self) -> Tables:
        """What the index holds: records, and rows with a journal entry, by key."""
        path = str(self.folder / "index")
        with lmdb.open(path, readonly=True, max_dbs=2, map_size=1 << 40) as env:
            return Rows(env).tables()

    def server_accepts(self) -> bool:
        """Whether a new connection to the server is taken."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.server.port)) == 0

    def journal_is_empty(self) -> bool:
        return not self.tables()[1]

    def files(self) -> set[str]:
        """All stored files, as location + path without svXX: 127.0.0.1:3001/sv01/aa/bb/name."""
        return {volume.name + path for volume in self.volumes for path in volume.files()}

    def named(self) -> set[str]:
        """The files that the records name."""
        return {
            replica.location + mkv.key2path(key, replica.write_id)
            for key, record in self.tables()[0].items()
            for replica in record.replicas
        }

    def is_clean(self) -> bool:
        """The journal is empty and the volumes hold what the index names, no more and no less."""
        return self.journal_is_empty() and self.files() == self.named()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
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


# --- placement and record -------------------------------------------------------------------------

WRITE_ID = "6b0108907bf79949"


def key_of(path: str) -> tuple[bytes, str]:
    """Key and write id of a file, by its path alone: so no two keys can share one."""
    name, _, write_id = path[7:].replace("-/", "").partition("-")
    return base64.b64decode(name, validate=True), write_id


def test_paths_of_the_ancestor() -> None:
    assert mkv.key2path(b"hello") == "/5d/41/aGVsbG8="
    assert mkv.key2path(b"helloworld") == "/fc/5e/aGVsbG93b3JsZA=="
    assert key_of("/5d/41/aGVsbG8=") == (b"hello", "")


def test_a_write_id_ends_the_name() -> None:
    assert mkv.key2path(b"hello", WRITE_ID) == f"/5d/41/aGVsbG8=-{WRITE_ID}"
    assert key_of(f"/5d/41/aGVsbG8=-{WRITE_ID}") == (b"hello", WRITE_ID)


def test_base64_with_a_slash_makes_a_sub_folder() -> None:
    key = "/photos/été".encode()
    name = base64.b64encode(key).decode()
    assert "/" in name
    for write_id, end in (("", ""), (WRITE_ID, f"-{WRITE_ID}")):
        path = mkv.key2path(key, write_id)
        assert path[6:] == f"/{name}{end}"
        assert key_of(path) == (key, write_id)


def test_long_names_are_cut_into_pieces() -> None:
    key = b"/" + b"k" * 510
    name = base64.b64encode(key).decode()
    assert len(name) == 684 and "/" not in name
    path = mkv.key2path(key, WRITE_ID)
    assert path[7:] == f"{name[:230]}-/{name[230:460]}-/{name[460:]}-{WRITE_ID}"
    assert key_of(path) == (key, WRITE_ID)
    assert key_of(mkv.key2path(key)) == (key, "")  # the ancestor does not cut


def test_names_of_exactly_230_characters_are_not_cut() -> None:
    for size in range(165, 181):  # 220 to 244 characters
        for key in (b"k" * size, b"k" * 30 + b"\xc3\xbf\xc3\xbf" + b"k" * size):
            path = mkv.key2path(key, WRITE_ID)
            runs = base64.b64encode(key).decode().split("/")
            assert path.count("-/") == sum((len(run) - 1) // 230 for run in runs if run)
            assert key_of(path) == (key, WRITE_ID)


def random_key(chance: random.Random) -> bytes:
    """2 to 511 bytes of UTF-8, from a slash on."""
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    ranges = chance.sample(ranges, chance.randint(1, 5))
    text = "/"
    length = chance.choice((2, 10, 100, 340, 511))
    while len(text.encode()) < length:
        text += chr(chance.randint(*chance.choice(ranges)))
    return text.encode()[:511].decode(errors="ignore").encode()


def test_the_path_of_any_key_leads_back_to_it_and_fits_file_systems() -> None:
    chance = random.Random(1)
    for _ in range(5000):
        key, write_id = random_key(chance), f"{chance.getrandbits(64):016x}"
        assert 2 <= len(key) <= 511
        path = mkv.key2path(key, write_id)
        assert key_of(path) == (key, write_id)
        assert key_of(mkv.key2path(key)) == (key, "")
        pieces = path[1:].split("/")
        assert all(0 < len(piece) <= 255 and not piece.startswith(".") for piece in pieces), key


def test_volumes_of_the_ancestor() -> None:
    volumes = ["larry", "moe", "curly"]
    vectors = {b"hello": "larry", b"helloworld": "curly", b"world": "moe", b"blah": "curly"}
    for key, volume in vectors.items():
        (location,) = mkv.key2volume(key, volumes, 1, 3)
        assert location.partition("/")[0] == volume
        assert re.fullmatch(f"{volume}/sv0[0-2]", location)
        assert mkv.key2volume(key, volumes, 1, 1) == [volume]
        assert mkv.key2volume(key, volumes[::-1], 1, 3) == [location]


def test_the_ranking_is_by_md5_of_key_and_volume() -> None:
    volumes = [f"volume{number}:3001" for number in range(7)]
    for number in range(100):
        key = b"/%d" % number
        scores = {volume: hashlib.md5(key + volume.encode()).digest() for volume in volumes}
        order = sorted(volumes, key=scores.__getitem__, reverse=True)
        places = [f"{v}/sv{int.from_bytes(scores[v][12:16], 'big') % 256:02X}" for v in order]
        assert mkv.key2volume(key, volumes, 7, 256) == places
        assert mkv.key2volume(key, volumes, 3, 256) == places[:3]


def test_a_new_volume_takes_its_share_only() -> None:
    volumes = [f"volume{number}:3001" for number in range(5)]
    moved = 0
    for number in range(1000):
        old, new = (mkv.key2volume(b"/%d" % number, some, 3, 1) for some in (volumes[:4], volumes))
        assert [volume for volume in new if volume != volumes[4]] == old[: 3 - (volumes[4] in new)]
        moved += volumes[4] in new
    assert 500 < moved < 700  # three fifths


OTHER_ID = "6b0108917bf79949"
MD5 = hashlib.md5(b"value").hexdigest()
OLD = (mkv.Replica("larry/sv00", ""), mkv.Replica("moe/sv0A", ""))
NEW = (mkv.Replica("larry/sv00", WRITE_ID), mkv.Replica("moe/sv0A", WRITE_ID))
MIXED = (mkv.Replica("larry/sv00", OTHER_ID), mkv.Replica("moe/sv0A", WRITE_ID))
RECORDS = {
    # As minikeyvalue writes them.
    "larry/sv00,moe/sv0A": mkv.Record(OLD),
    "larry": mkv.Record((mkv.Replica("larry", ""),)),
    "DELETEDlarry/sv00,moe/sv0A": mkv.Record(OLD, deleted=True),
    f"HASH{MD5}larry/sv00,moe/sv0A": mkv.Record(OLD, hash=MD5),
    f"DELETEDHASH{MD5}larry/sv00,moe/sv0A": mkv.Record(OLD, hash=MD5, deleted=True),
    # With size and write id.
    f"larry/sv00,moe/sv0A 5 {WRITE_ID}": mkv.Record(NEW, 5, WRITE_ID),
    f"HASH{MD5}larry/sv00,moe/sv0A 5 {WRITE_ID}": mkv.Record(NEW, 5, WRITE_ID, MD5),
    f"DELETEDlarry/sv00,moe/sv0A 5 {WRITE_ID}": mkv.Record(NEW, 5, WRITE_ID, "", True),
    f"larry/sv00@{OTHER_ID},moe/sv0A 5 {WRITE_ID}": mkv.Record(MIXED, 5, WRITE_ID),
    f"127.0.0.1:3001/sv00 5 {WRITE_ID}": mkv.Record(
        (mkv.Replica("127.0.0.1:3001/sv00", WRITE_ID),), 5, WRITE_ID
    ),
    # A value of minikeyvalue that rebalance has copied.
    f"larry/sv00@{OTHER_ID},moe/sv0A": mkv.Record((MIXED[0], OLD[1])),
}


@pytest.mark.parametrize("text", RECORDS)
def test_a_record_has_a_text_and_back(text: str) -> None:
    assert RECORDS[text].text() == text.encode()
    assert mkv.parse_record(text.encode()) == RECORDS[text]


def test_what_is_no_record_is_500() -> None:
    for text in (b"HASH12larry x", b"larry 5 x", b"larry x", f"larry 5 {WRITE_ID} 5".encode()):
        with pytest.raises(mkv.HTTPError) as error:
            mkv.parse_record(text)
        assert error.value.status == 500


@pytest.mark.parametrize("key", [b"/k", b"//", "/photos/été".encode(), b"/" + b"k" * 510])
@pytest.mark.parametrize("write_id", ["", WRITE_ID])
def test_path2key_is_the_inverse_of_key2path(key: bytes, write_id: str) -> None:
    assert mkv.path2key(mkv.key2path(key, write_id)) == (key, write_id)


def test_paths_that_no_key_has_are_refused() -> None:
    good, long = mkv.key2path(b"/hello"), mkv.key2path(b"/" + b"k" * 300, WRITE_ID)
    top, name = good[:7], good[7:]
    tails = (
        "-",
        "/",
        "=",
        "\n",
        "-x",
        f"-{WRITE_ID[:-1]}",
        f"-{WRITE_ID}0",
        f"-{WRITE_ID.upper()}",
    )
    paths = [good + tail for tail in (*tails, f"-{WRITE_ID}-{WRITE_ID}")]
    paths += [
        "",
        "/",
        top,
        good[1:],
        good.upper(),
        "/00/00/" + name,
        top + "/" + name,
        "/svAA" + good,
    ]
    paths += [top + odd for odd in (name[:-1], name[:3] + " " + name[3:], "é", "..", "../" + name)]
    paths += [top + f"{name[:4]}{cut}{name[4:]}-{WRITE_ID}" for cut in ("-", "-/", "/")]
    paths += [long.replace("-/", ""), long.replace("-/", "/")]
    paths += [mkv.key2path(key) for key in (b"", b"/", b"hello", b"/\xff", b"/" + b"k" * 511)]
    for path in paths:
        with pytest.raises(ValueError):
            mkv.path2key(path)


# --- the operations -------------------------------------------------------------------------------

SETTLE = 100  # seconds after which nothing that was sent takes effect
File = tuple[bytes, mkv.Replica]  # one file of a key


class World(Rows):
    """An index without a system: the operations, and a model of files, time and processes.

    Makers, deleters and sweepers are generators: between any two steps of one, others may
    have their turn. A PUT that was sent lands later, or never; a process may die in its midst.
    """

    KEYS = (b"/a", b"/b", b"/c")
    PLACES = ("v0", "v1", "v2", "v3/sv00", "v3/sv01")

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__(lmdb.open(str(path), max_dbs=2, map_size=1 << 28, sync=False))
        self.chance, self.now, self.names = random.Random(seed), 1_000_000_000.0, itertools.count()
        self.flying: dict[File, float] = {}  # PUTs without an answer: until when they may land
        self.files: set[File] = set()
        self.ids: set[tuple[bytes, str]] = set()  # all that were ever given
        self.made: dict[bytes, set[str]] = {}  # acknowledged and not deleted: their write ids
        self.log: list[tuple[float, Callable, bytes, tuple]] = []  # all operations, in order
        self.processes = ["p0", "p1", "p2"]
        self.actors: list[tuple[str, Generator]] = []  # with the process they run in
        self.happened: dict[str, int] = {}
        self.evicted = 0  # claims of dead processes

    def do(self, operation: Callable, key: bytes, *args: Any) -> Any:
        """One operation, as the index runs it: a refusal does not undo what others did."""
        self.log.append((self.now, operation, key, args))
        with self.env.begin(write=True) as txn:
            before = self.dump(txn)
            answer = self.change(txn, operation, key, args, self.now)
            refused = isinstance(answer, mkv.HTTPError)
            assert not refused or self.dump(txn) == before, "who refuses changes nothing"
        name = "unlink" if operation is mkv.Row.remove and args[0] else operation.__name__
        name += f" {answer.status}" if refused else ""
        self.happened[name] = self.happened.get(name, 0) + 1
        if refused:
            raise answer
        return answer

    # What the actors do to the volumes.

    def put(self, key: bytes, replica: mkv.Replica) -> None:
        assert (key, replica) not in self.files, "a name is never used twice"
        self.flying[key, replica] = self.now + SETTLE

    def delete(self, key: bytes, replica: mkv.Replica) -> int:
        gone = (key, replica) in self.files
        self.files.discard((key, replica))
        return 204 if gone else 404

    def new_id(self, key: bytes, write_id: str) -> None:
        assert (key, write_id) not in self.ids, "a write id is given once"
        assert re.fullmatch("[0-9a-f]{16}", write_id)
        self.ids.add((key, write_id))

    def clean_up(self, key: bytes, owner: str, write_id: str) -> Generator:
        """What a maker does that does not commit: 404 is no proof for it."""
        left = self.do(mkv.Row.settle, key, owner, ())
        yield
        gone = [r for r in left if r.write_id == write_id and self.delete(key, r) == 204]
        yield
        self.do(mkv.Row.settle, key, "", gone)

    def maker(self, key: bytes, owner: str) -> Generator:
        places, old = self.chance.sample(self.PLACES, 3), mkv.Record()
        if self.chance.random() < 0.3:  # what is there already is written anew
            old = self.tables()[0].get(key, old)
            yield
        write_id = self.do(mkv.Row.claim, key, owner, places[:2], self.now, old)
        self.new_id(key, write_id)
        yield
        replicas = [mkv.Replica(place, write_id) for place in places]
        for replica in replicas[:2]:
            self.put(key, replica)
            yield
        try:
            if self.chance.random() < 0.3:
                self.do(mkv.Row.extend, key, owner, replicas[2])
                yield
                self.put(key, replicas[2])
            for _ in range(self.chance.randrange(6)):
                yield
            done = tuple(replica for replica in replicas if (key, replica) in self.files)
            if done and self.chance.random() < 0.8:
                record = mkv.Record(done, 5, write_id, deleted=old.deleted)
                self.do(mkv.Row.commit, key, owner, record, old)
                self.made[key] = {write_id}
                return
        except mkv.HTTPError as error:
            assert error.status == 503 or (error.status == 409 and old.replicas)
        yield from self.clean_up(key, owner, write_id)

    def deleter(self, key: bytes, _: str) -> Generator:
        record = self.do(mkv.Row.remove, key, False, self.chance.random() < 0.3)
        self.made.pop(key)
        yield
        gone = []
        for replica in record.replicas:
            if self.chance.random() < 0.7:  # else its volume is down
                self.delete(key, replica)
                gone.append(replica)
            yield
        self.do(mkv.Row.settle, key, "", gone)

    def unlinker(self, key: bytes, _: str) -> Generator:
        yield
        self.do(mkv.Row.remove, key, True, False)

    def sweeper(self, key: bytes, _: str) -> Generator:
        entry = self.tables()[1].get(key)
        if not entry or entry.owner:
            return
        yield
        settled, gone = self.now - entry.since > SETTLE, []
        for replica in entry.replicas:
            if self.delete(key, replica) == 204 or settled:
                gone.append(replica)
            yield
        self.do(mkv.Row.settle, key, "", gone)

    # The course of the world.

    def step(self) -> None:
        """Something happens somewhere."""
        self.now += self.chance.choice((0, 0, 0, 0.3, 1, 7))
        self.flying = {file: end for file, end in self.flying.items() if end > self.now}
        if self.flying and self.chance.random() < 0.4:
            file = self.chance.choice(list(self.flying))
            del self.flying[file]
            self.files.add(file)
        elif self.chance.random() < 0.01:
            self.die(self.chance.randrange(3))
        elif len(self.actors) < 8:
            kinds = [self.maker] * 4 + [self.deleter, self.unlinker, self.sweeper]
            process = self.chance.choice(self.processes)
            owner = f"{process}.{next(self.names)}"
            actor = self.chance.choice(kinds)(self.chance.choice(self.KEYS), owner)
            self.actors.append((process, actor))
        else:
            process, actor = self.chance.choice(self.actors)
            try:
                next(actor)
            except (StopIteration, mkv.HTTPError):  # done, or refused
                self.actors.remove((process, actor))

    def die(self, number: int) -> None:
        """A process is killed, and then evicted."""
        dead = self.processes[number]
        self.actors = [(process, actor) for process, actor in self.actors if process != dead]
        self.processes[number] = f"p{next(self.names)}"
        for key, row in self.tables()[1].items():
            if row.owner.startswith(f"{dead}."):
                self.do(mkv.Row.settle, key, row.owner, ())
                self.evicted += 1

    def check(self) -> None:
        """What must hold after every step."""
        records, entries = self.tables()
        named = {(key, r) for key, record in records.items() for r in record.replicas}
        listed = {(key, r) for key, entry in entries.items() for r in entry.replicas}
        assert self.files | set(self.flying) <= named | listed, "a file is named or listed"
        assert named <= self.files, "what is named is there"
        assert not named & listed, "what is named is not garbage"
        assert set(records) == set(self.made), "what is acknowledged is there, and nothing else"
        for key, record in records.items():
            assert {replica.write_id for replica in record.replicas} <= self.made[key]
        assert all(entry.owner or entry.replicas for entry in entries.values())


def live_through(path: Path, seed: int, steps: int) -> World:
    """A world after that many steps, each of them checked."""
    world = World(path, seed)
    for _ in range(steps):
        world.step()
        world.check()
    return world


@pytest.mark.parametrize("seed", range(4))
def test_every_file_is_named_or_listed_whatever_happens(tmp_path: Path, seed: int) -> None:
    world = live_through(tmp_path / "index", seed, 6000)
    for name in ("claim", "claim 403", "claim 409", "extend", "commit", "settle", "remove"):
        assert world.happened[name] > 5, name
    for name in ("remove 404", "unlink", "unlink 404", "commit 409"):
        assert world.happened[name] > 5, name
    assert world.evicted > 5
    # Once all rest, the sweeper leaves what is named and nothing else.
    for number in range(3):
        world.die(number)
    world.actors, world.flying, world.now = [], {}, world.now + 2 * SETTLE
    for key in world.KEYS:
        list(world.sweeper(key, ""))
    world.check()
    records, entries = world.tables()
    assert entries == {}
    assert world.files == {(key, r) for key, record in records.items() for r in record.replicas}


def test_the_same_operations_in_the_same_order_give_the_same_index(tmp_path: Path) -> None:
    world = live_through(tmp_path / "index", 10, 4000)
    replay = World(tmp_path / "replay", 0)
    for now, operation, key, args in world.log:
        replay.now = now
        with contextlib.suppress(mkv.HTTPError):
            replay.do(operation, key, *args)
    with world.env.begin() as one, replay.env.begin() as other:
        assert world.dump(one) == replay.dump(other)
    assert world.happened == replay.happened
    assert len(world.log) > 1000 and any(world.tables())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "index", 0)


def refuses(status: int, world: World, operation: Callable, *args: Any) -> bool:
    """Whether an operation is refused with that status."""
    with pytest.raises(mkv.HTTPError) as error:
        world.do(operation, b"/k", *args)
    return error.value.status == status


def at(world: World, now: float, operation: Callable, *args: Any) -> Any:
    """An operation on a key at a time."""
    world.now = now
    return world.do(operation, b"/k", *args)


def test_a_write_id_is_time_and_owner_and_newer_than_all_before(world: World) -> None:
    def claim(owner: str, now: float) -> str:
        return at(world, now, mkv.Row.claim, owner, ["v0"], now, mkv.Record())

    first = claim("p.1", 1000.9)
    assert first == f"{1000:08x}{hashlib.md5(b'p.1').hexdigest()[:8]}"
    at(world, 1000.9, mkv.Row.settle, "p.1", ())
    for now in (1000.9, 5.0):  # a clock that stands still, and one that was put back
        latest = claim(f"p.{now}", now)
        assert latest[:8] > first[:8]
        at(world, now, mkv.Row.settle, f"p.{now}", ())
        first = latest
    made = claim("p.9", 5.0)
    record = mkv.Record((mkv.Replica("v0", made),), 1, made)
    at(world, 5.0, mkv.Row.commit, "p.9", record, mkv.Record())
    at(world, 5.0, mkv.Row.remove, True, False)
    assert claim("p.10", 5.0)[:8] > made[:8]


def test_only_the_owner_extends_and_commits(world: World) -> None:
    write_id = at(world, 1000.0, mkv.Row.claim, "p.1", ["v0"], 1000.0, mkv.Record())
    replica = mkv.Replica("v0", write_id)
    record = mkv.Record((replica,), 1, write_id)
    for owner in ("p.2", "p", "p.11"):
        assert refuses(503, world, mkv.Row.extend, owner, replica)
        assert refuses(503, world, mkv.Row.commit, owner, record, mkv.Record())
        assert refuses(409, world, mkv.Row.claim, owner, ["v0"], 1000.0, mkv.Record())
    at(world, 1001.0, mkv.Row.settle, "p.11", ())  # another owner of a similar name
    assert refuses(409, world, mkv.Row.claim, "p.2", ["v0"], 1000.0, mkv.Record())
    at(world, 1001.0, mkv.Row.settle, "p.1", ())
    assert world.tables()[1] == {b"/k": mkv.Row(mkv.Record(()), "", 1001.0, (replica,))}
    assert refuses(503, world, mkv.Row.commit, "p.1", record, mkv.Record())
    assert refuses(503, world, mkv.Row.extend, "p.1", replica)
    assert at(world, 1002.0, mkv.Row.claim, "p.2", ["v0"], 1002.0, mkv.Record())


def test_a_key_with_a_thousand_leftovers_is_not_claimed_before_they_are_gone(world: World) -> None:
    for turn in range(10):
        places, owner = [f"v{number}" for number in range(100)], f"p.{turn}"
        write_id = at(world, turn, mkv.Row.claim, owner, places, turn, mkv.Record())
        at(world, turn, mkv.Row.settle, owner, ())
    row = world.tables()[1][b"/k"]
    assert len(row.replicas) == 1000
    assert refuses(503, world, mkv.Row.claim, "p.x", ["v0"], 11.0, mkv.Record())
    assert world.tables()[1][b"/k"] == row  # so its age goes on
    at(world, 12.0, mkv.Row.settle, "", (mkv.Replica("v0", write_id),))
    assert at(world, 12.0, mkv.Row.claim, "p.x", ["v0"], 12.0, mkv.Record())


def test_a_key_from_the_end_of_time_is_not_written_anew_but_can_still_be_read(world: World) -> None:
    last = float(0xFFFFFFFF)
    write_id = at(world, last, mkv.Row.claim, "p.1", ["v0"], last, mkv.Record())
    record = mkv.Record((mkv.Replica("v0", write_id),), 1, write_id)
    at(world, last, mkv.Row.commit, "p.1", record, mkv.Record())
    at(world, 1000.0, mkv.Row.remove, True, False)
    for now in (1000.0, last, last + 1):
        assert refuses(503, world, mkv.Row.claim, "p.2", ["v0"], now, mkv.Record())
    assert world.tables() == ({b"/k": record._replace(deleted=True)}, {})
    at(world, 1000.0, mkv.Row.remove, False, False)


def test_since_is_when_an_owner_went_or_replicas_came_and_only_then(world: World) -> None:
    def since() -> float:
        return world.tables()[1][b"/k"].since

    write_id = at(world, 1.0, mkv.Row.claim, "p.1", ["v0", "v1"], 1.0, mkv.Record())
    first, second = (mkv.Replica(place, write_id) for place in ("v0", "v1"))
    at(world, 2.0, mkv.Row.settle, "p.1", ())  # the owner goes
    assert since() == 2.0
    at(world, 3.0, mkv.Row.settle, "", (second,))  # a replica goes
    assert since() == 2.0
    write_id = at(world, 4.0, mkv.Row.claim, "p.2", ["v2"], 4.0, mkv.Record())
    record = mkv.Record((mkv.Replica("v2", write_id),), 1, write_id)
    at(world, 5.0, mkv.Row.commit, "p.2", record, mkv.Record())
    assert world.tables()[1] == {b"/k": mkv.Row(record, "", 5.0, (first,))}
    at(world, 5.5, mkv.Row.remove, True, False)
    assert since() == 5.0
    at(world, 6.0, mkv.Row.remove, False, True)  # replicas come
    assert since() == 6.0
    at(world, 7.0, mkv.Row.settle, "p.1", ())
    assert since() == 6.0
    at(world, 8.0, mkv.Row.settle, "", world.tables()[1][b"/k"].replicas)
    assert world.tables() == ({}, {})


# --- the index ------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[mkv.Index]:
    """An index for this process."""
    index = mkv.Index(path)
    try:
        yield index
    finally:
        index.commit(index.kept + index.queue)
        index.env.close()


def new_owner(index: mkv.Index) -> str:
    """A name for one claim, as put() makes them."""
    return f"{index.process}.{os.urandom(7).hex()}"


async def write(index: mkv.Index, key: bytes, place: str = "v0") -> None:
    """Claim and commit a key, without any file."""
    owner = new_owner(index)
    write_id = await index.do(mkv.Row.claim, key, owner, [place], time.time(), mkv.Record())
    record = mkv.Record((mkv.Replica(place, write_id),), 1, write_id)
    await index.do(mkv.Row.commit, key, owner, record, mkv.Record())


def test_concurrent_operations_share_commits(tmp_path: Path) -> None:
    async def many() -> None:
        await asyncio.gather(*(write(index, b"/%d" % number) for number in range(2000)))

    with opened(tmp_path / "index") as index:
        before = index.env.info()["last_txnid"]
        asyncio.run(many())
        commits = index.env.info()["last_txnid"] - before
        assert 2 <= commits <= 100  # for 4000 operations
        found = [key for rows in index.walk(index.keys) for key, _ in rows]
        assert found == sorted(b"/%d" % number for number in range(2000))
        assert not [rows for rows in index.walk(index.journal) if rows]


def test_a_refused_operation_does_not_spoil_its_group(tmp_path: Path) -> None:
    async def mixed() -> list[Any]:
        work = [write(index, b"/%d" % (number % 50)) for number in range(100)]
        return await asyncio.gather(*work, return_exceptions=True)

    with opened(tmp_path / "index") as index:
        results = asyncio.run(mixed())
        assert results[:50] == [None] * 50
        assert {error.status for error in results[50:]} <= {403, 409}
        assert sum(len(rows) for rows in index.walk(index.keys)) == 50


@pytest.mark.parametrize("steps", range(4))
def test_operations_are_done_after_all_tasks_were_cancelled(tmp_path: Path, steps: int) -> None:
    async def work() -> None:
        tasks = asyncio.all_tasks()
        index.do(mkv.Row.claim, b"/k", new_owner(index), ["v0"], time.time())
        await asyncio.sleep(0)  # its commit begins
        for task in asyncio.all_tasks() - tasks:
            assert task.cancel()
        for _ in range(steps):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await write(index, b"/later")

    with opened(tmp_path / "index") as index:
        asyncio.run(work())
        assert index.look(b"/later").record.replicas


def test_walk_goes_through_all_rows_from_a_start_on(tmp_path: Path) -> None:
    async def many() -> None:
        await asyncio.gather(*(write(index, b"/%05d" % number) for number in range(5000)))

    with opened(tmp_path / "index") as index:
        asyncio.run(many())
        for start in (0, 1, 999, 1000, 1001, 2500, 4000, 4999, 5000):
            rows = [row for rows in index.walk(index.keys, b"/%05d" % start) for row in rows]
            assert [key for key, _ in rows] == [b"/%05d" % number for number in range(start, 5000)]
            assert all(text == index.look(key).record.text() for key, text in rows[:10])


def test_what_is_queued_when_an_event_loop_ends_is_done_all_the_same(tmp_path: Path) -> None:
    with opened(tmp_path / "index") as index:

        async def leave() -> None:
            loop, begun = asyncio.get_running_loop(), threading.Event()
            loop.set_default_executor(ThreadPoolExecutor(1))
            loop.run_in_executor(None, lambda: begun.set() or time.sleep(0.2))  # a busy machine
            index.do(mkv.Row.claim, b"/k", new_owner(index), ["a:1"], 1.0, mkv.Record())
            while index.queue or not begun.is_set():
                await asyncio.sleep(0)

        asyncio.run(leave())
        index.commit(index.kept + index.queue)
        assert index.look(b"/k").owner.startswith(index.process)


PROCESS = f"""
import asyncio, os, sys
sys.path.insert(0, {str(HERE)!r})
import mkv
from pathlib import Path

def new_owner(index):
    return f"{{index.process}}.{{os.urandom(7).hex()}}"

async def write(index, number):
    key, owner = b"/%d" % number, new_owner(index)
    write_id = await index.do(mkv.Row.claim, key, owner, ["v0"], 1e9, mkv.Record())
    record = mkv.Record((mkv.Replica("v0", write_id),), 1, write_id)
    await index.do(mkv.Row.commit, key, owner, record, mkv.Record())
    print(number, flush=True)

async def write_for_ever(index):
    for number in range(0, 1 << 60, 20):
        await asyncio.gather(*(write(index, number + each) for each in range(20)))

async def claim_and_wait(index):
    for key in b"/claimed", b"/also":
        await index.do(mkv.Row.claim, key, new_owner(index), ["v0"], 1e9, mkv.Record())
    print(index.process, flush=True)
    await asyncio.sleep(1e6)

async def evict_and_wait(index):
    await index.evict(b"/claimed", index.look(b"/claimed").owner)
    print(index.look(b"/claimed").owner or "evicted", flush=True)
    await asyncio.sleep(1e6)

index = mkv.Index(Path(sys.argv[1]))
asyncio.run(globals()[sys.argv[2]](index))
"""


@contextlib.contextmanager
def process(path: Path, work: str) -> Iterator[subprocess.Popen]:
    """Another process that works on an index."""
    command = [sys.executable, "-c", PROCESS, str(path), work]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            yield other
        finally:
            other.kill()


def test_what_was_acknowledged_before_kill_9_is_there_after_it(tmp_path: Path) -> None:
    with process(tmp_path / "index", "write_for_ever") as other:
        lines = [other.stdout.readline() for _ in range(1000)]
        other.kill()
        lines += other.stdout.readlines()
    acknowledged = [int(line) for line in lines if line.endswith("\n")]
    assert len(acknowledged) >= 1000
    with opened(tmp_path / "index") as index:
        for number in acknowledged:
            record = index.look(b"/%d" % number).record
            assert record.replicas[0].location == "v0"


def test_a_dead_process_is_evicted_and_a_living_one_is_not(tmp_path: Path) -> None:
    def entry() -> mkv.Row:
        return index.look(b"/claimed")

    with (
        opened(tmp_path / "index") as index,
        process(tmp_path / "index", "claim_and_wait") as other,
    ):
        name = other.stdout.readline().strip()
        assert entry().owner.startswith(name + ".")
        other.send_signal(signal.SIGSTOP)
        for _ in range(3):
            asyncio.run(index.evict(b"/claimed", entry().owner))
        assert entry().owner.startswith(name + ".")
        with pytest.raises(mkv.HTTPError) as error:
            asyncio.run(write(index, b"/claimed"))
        assert error.value.status == 409
        other.kill()
        other.wait()
        asyncio.run(index.evict(b"/claimed", entry().owner))
        assert entry().owner == "" and len(entry().replicas) == 1
        asyncio.run(write(index, b"/claimed"))
        assert index.look(b"/claimed").record.replicas


def test_who_evicts_one_claim_of_a_dead_process_leaves_the_others_to_others(tmp_path: Path) -> None:
    path = tmp_path / "index"
    with opened(path) as index, process(path, "claim_and_wait") as dead:
        dead.stdout.readline()
        dead.kill()
        dead.wait()
        with process(path, "evict_and_wait") as other:
            assert other.stdout.readline() == "evicted\n"
            asyncio.run(index.evict(b"/also", index.look(b"/also").owner))
            assert index.look(b"/also").owner == ""


def test_an_owner_that_nobody_is_counts_as_dead_and_ones_own_claims_stay(tmp_path: Path) -> None:
    async def claim_and_evict() -> None:
        owners = {b"/k": "0123456789abcd.1", b"/l": "f" * 16 + ".1", b"/mine": new_owner(index)}
        for key, owner in owners.items():
            await index.do(mkv.Row.claim, key, owner, ["v0"], time.time(), mkv.Record())
        for key in owners:
            await index.evict(key, index.look(key).owner)
        await write(index, b"/k")
        await write(index, b"/l")

    with opened(tmp_path / "index") as index:
        asyncio.run(claim_and_evict())
        assert (
            index.look(b"/k").record.replicas
            and index.look(b"/l").record.replicas
            and index.look(b"/mine").owner
        )


# --- the parser -----------------------------------------------------------------------------------


class Parser(asyncio.StreamReader):
    """A reader as a connection has one, with what mkv reads from it."""

    def __init__(self) -> None:
        super().__init__(mkv.MAX_HEAD)

    async def head(self) -> bytes:
        try:
            return await self.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError as error:  # as a connection answers it
            raise mkv.HTTPError(431, str(error)) from error

    def body(self, length: int | None, seconds: float) -> AsyncIterator[bytes]:
        return mkv.read_body(self, length, seconds)


async def next_request(parser: Parser) -> tuple[mkv.Request, int | None]:
    """The head of a request and the length of its body, as a connection reads them."""
    head = mkv.parse_request(await parser.head())
    return head, head.length


async def messages(
    pieces: Iterable[bytes], next_head: Callable = next_request
) -> list[tuple[Any, bytes]]:
    """What a parser makes of these pieces: heads and bodies, or the status at last."""
    parser, found = Parser(), []

    async def feed() -> None:
        for piece in pieces:
            parser.feed_data(piece)
            for _ in range(3):  # the parser takes what it can
                await asyncio.sleep(0)
        parser.feed_eof()

    feeding = asyncio.create_task(feed())
    try:
        while True:
            head, length = await next_head(parser)
            body = b"".join([piece async for piece in parser.body(length, 60)])
            found.append((head, body))
    except mkv.HTTPError as error:
        found.append((error.status, b""))
    except asyncio.LimitOverrunError:
        found.append((431, b""))
    except EOFError:
        assert parser.at_eof()
    await feeding
    return found


STREAM = b"".join(
    [
        request("GET", "/a"),
        request("PUT", "/b", b"0\r\n\r\nGET /x"),
        request("PUT", "/c", b"", "transfer-encoding:  Chunked \r\n"),
        b'5;name="va;lue"\r\nabcde\r\n00A \r\n0123456789\r\n0;x\r\nTrailer: 1\r\nAnother:\r\n\r\n',
        request("PUT", "/d", b"", CHUNKED) + b"0\r\n\r\n",
        request("PUT", "/e", b"x", "Content-Length: 1\r\n").replace(
            b"Content-Length: 1\r\n", b"", 1
        ),
        request("DELETE", "/f?x=y"),
    ]
)
BODIES = [b"", b"0\r\n\r\nGET /x", b"abcde0123456789", b"", b"x", b""]


@pytest.mark.asyncio
async def test_the_parser_cuts_a_stream_into_messages() -> None:
    heads, bodies = zip(*await messages([STREAM]), strict=True)
    assert list(bodies) == BODIES
    assert [head.method for head in heads] == ["GET", "PUT", "PUT", "PUT", "PUT", "DELETE"]
    assert [head.path for head in heads] == [b"/a", b"/b", b"/c", b"/d", b"/e", b"/f"]
    assert heads[-1].query == b"x=y" and heads[0].query is None


@pytest.mark.asyncio
async def test_the_parser_makes_the_same_messages_of_every_split() -> None:
    whole, size = await messages([STREAM]), len(STREAM)
    for cut in range(size + 1):
        assert await messages([STREAM[:cut], STREAM[cut:]]) == whole, cut
    for step in range(1, 60):
        pieces = (STREAM[start : start + step] for start in range(0, size, step))
        assert await messages(pieces) == whole, step
    chance = random.Random(1)
    for _ in range(1000):
        cuts = sorted(chance.choices(range(size), k=chance.randrange(1, 30)))
        pieces = [STREAM[start:end] for start, end in zip([0, *cuts], [*cuts, size], strict=True)]
        assert await messages(pieces) == whole, cuts


@pytest.mark.asyncio
async def test_the_parser_makes_the_same_messages_of_every_pair_of_cuts_in_a_chunked_request() -> (
    None
):
    stream = request("PUT", "/k", b"", CHUNKED) + b"3;x\r\nabc\r\n1\r\nd\r\n0\r\nT: x\r\n\r\n"
    stream += request("GET", "/k")
    whole = await messages([stream])
    assert [body for _, body in whole] == [b"abcd", b""]
    for first, second in itertools.combinations(range(len(stream)), 2):
        pieces = stream[:first], stream[first:second], stream[second:]
        assert await messages(pieces) == whole, pieces


@pytest.mark.asyncio
async def test_the_parser_refuses_nonsense_in_every_split_and_begins_nothing_after_it() -> None:
    first, chunked = request("GET", "/first"), request("PUT", "/k", b"", CHUNKED)
    for bad in (
        b"GET /k HTTP/1.1\nHost: x\r\n\r\n",
        b"GET /k HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
        chunked + b"3\r\nabcd\r\n0\r\n\r\n",
        chunked + b"3\nabc\r\n0\r\n\r\n",
        chunked + b"0\r\nbad trailer\r\n\r\n",
    ):
        stream = first + bad + SMUGGLED
        for cut in range(len(stream) + 1):
            found = await messages([stream[:cut], stream[cut:]])
            assert [getattr(head, "path", head) for head, _ in found] == [b"/first", 400]


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"GET /k HTTP/1.1\n\r\n\r\n"),
        (431, b"G" * 16_388),  # the last three may yet belong to the end
        (431, b"X: y\r\n" * 2732),
        (400, request("PUT", "/k", b"", CHUNKED) + b"3\r\nabcd!"),
    ],
)
@pytest.mark.asyncio
async def test_the_parser_refuses_as_soon_as_it_can(status: int, data: bytes) -> None:
    parser = Parser()
    parser.feed_data(data)  # and no end
    with pytest.raises(mkv.HTTPError) as error:
        async with asyncio.timeout(5):
            head = mkv.parse_request(await parser.head())
            assert not [piece async for piece in parser.body(head.length, 60)]
    assert error.value.status == status


@pytest.mark.asyncio
async def test_a_body_may_be_waited_for_as_long_as_its_bytes_allow() -> None:
    for length, start in ((100_000, b""), (None, b"186a0\r\n"), (None, b"186")):
        parser = Parser()
        parser.feed_data(start)
        with pytest.raises(TimeoutError):
            assert not [piece async for piece in parser.body(length, 0.01)]
    parser = Parser()
    parser.feed_data(b"x" * 10)
    with pytest.raises(mkv.HTTPError, match="ended early"):
        parser.feed_eof()
        assert not [piece async for piece in parser.body(11, 60)]


@pytest.mark.asyncio
async def test_a_fast_start_buys_no_more_time_than_the_limit() -> None:
    for length, start in ((10_000_000, b""), (None, b"989680\r\n")):
        parser = Parser()
        parser.feed_data(start + bytes(5_000_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10) as guard:
                async for _ in parser.body(length, 0.05):
                    pass
        assert not guard.expired()


# --- the protocol ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for tests that need no other; at the end nothing may have leaked."""
    shared = Cluster(tmp_path_factory.mktemp("shared"))
    yield shared
    try:
        until(shared.is_clean)
    finally:
        shared.close()


def test_a_value_is_written_read_and_deleted(cluster: Callable[..., Cluster]) -> None:
    system = cluster()
    assert system.server.put("/wehave", b"bigswag") == 201
    assert system.server.get("/wehave") == b"bigswag"
    assert system.server.call("DELETE", "/wehave").status == 204
    assert system.server.get("/wehave") is None
    until(system.is_clean)
    assert system.files() == set()


def test_files_lie_where_the_placement_says_under_names_with_a_write_id(system: Cluster) -> None:
    assert system.server.put("/placed", b"value") == 201
    record = system.tables()[0][b"/placed"]
    volumes = [volume.name for volume in system.volumes]
    places = mkv.key2volume(b"/placed", volumes, 3, 10)
    assert [replica.location for replica in record.replicas] == places
    assert re.fullmatch("[0-9a-f]{16}", record.write_id)
    assert abs(int(record.write_id[:8], 16) - time.time()) < 60
    assert {place + mkv.key2path(b"/placed", record.write_id) for place in places} <= system.files()
    assert (record.size, record.hash) == (5, hashlib.md5(b"value").hexdigest())


def test_get_redirects_with_volumes_balance_and_md5(system: Cluster) -> None:
    assert system.server.put("/redirected", b"value") == 201
    answer = system.server.call("GET", "/redirected")
    record = system.tables()[0][b"/redirected"]
    places = [replica.location for replica in record.replicas]
    path = mkv.key2path(b"/redirected", record.write_id)
    assert (answer.status, answer.body) == (302, b"")
    assert answer.fields["location"] in {f"http://{place}{path}" for place in places}
    assert answer.fields["key-volumes"] == ",".join(places)
    assert answer.fields["key-balance"] == "balanced"
    assert answer.fields["content-md5"] == hashlib.md5(b"value").hexdigest()
    assert answer.fields["content-length"] == "0"


def test_ranges_are_served_through_the_redirect(system: Cluster) -> None:
    assert system.server.put("/ranged", b"0123456789") == 201
    target = system.server.call("GET", "/ranged").fields["location"]
    port, _, path = target.removeprefix("http://127.0.0.1:").partition("/")
    value = call(int(port), "GET", "/" + path, None, {"Range": "bytes=2-4"})
    assert (value.status, value.body) == (206, b"234")


def test_head_answers_as_get_does_without_a_body(system: Cluster) -> None:
    assert system.server.put("/headed", b"value") == 201
    with Wire(system.server.port) as wire:
        wire.send(request("HEAD", "/headed"))
        status, fields = wire.head()
        assert status == 302
        assert fields["key-volumes"] and fields["location"] and fields["content-length"] == "0"
        wire.send(request("HEAD", "/head-of-nothing"))
        assert wire.head()[0] == 404
        wire.send(request("HEAD", "/?health"))
        assert wire.head() == (200, {"content-length": "3", **TEXT})
        wire.send(request("HEAD", "/?list"))
        assert wire.head()[0] == 200
        wire.send(request("GET", "/headed"))
        assert wire.answer().status == 302  # so no body came with the others


TEXT = {"content-type": "text/plain; charset=utf-8"}


def test_a_key_is_written_once(system: Cluster) -> None:
    assert system.server.put("/once", b"first") == 201
    assert system.server.put("/once", b"second") == 403
    assert system.server.get("/once") == b"first"


def test_what_is_missing_is_404(system: Cluster) -> None:
    for method in ("GET", "HEAD", "DELETE", "UNLINK"):
        assert system.server.call(method, "/missing").status == 404, method


def test_errors_carry_one_line_of_plain_text(system: Cluster) -> None:
    answer = system.server.call("GET", "/missing")
    assert answer.fields["content-type"].startswith("text/plain")
    assert answer.body.count(b"\n") == 1 and answer.body.endswith(b"\n") and len(answer.body) > 5


def test_an_unlinked_key_is_hidden_until_it_is_deleted(system: Cluster) -> None:
    assert system.server.put("/unlinked", b"value") == 201
    record = system.tables()[0][b"/unlinked"]
    assert system.server.call("UNLINK", "/unlinked").status == 204
    assert system.server.get("/unlinked") is None
    assert system.server.call("UNLINK", "/unlinked").status == 404
    assert system.tables()[0][b"/unlinked"] == record._replace(deleted=True)
    assert system.named() <= system.files()  # the bytes are kept
    assert system.server.call("DELETE", "/unlinked").status == 204
    assert system.server.call("DELETE", "/unlinked").status == 404


def test_a_put_over_an_unlinked_key_replaces_it_at_once(cluster: Callable[..., Cluster]) -> None:
    system = cluster("-grace", "1h")
    for value in (b"first", b"second", b"third"):
        assert system.server.put("/again", value) == 201
        assert system.server.get("/again") == value
        until(system.is_clean)
        assert len(system.files()) == 3
        assert system.server.call("UNLINK", "/again").status == 204


def test_a_failed_put_over_an_unlinked_key_leaves_the_old_value_to_its_delete(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster()
    assert system.server.put("/again", b"first") == 201
    assert system.server.call("UNLINK", "/again").status == 204
    assert system.server.call("PUT", "/again", b"second", Content_MD5="0" * 32).status == 400
    until(system.is_clean)
    assert len(system.files()) == 3 and system.server.get("/again") is None
    assert json.loads(system.server.call("GET", "/?unlinked").body)["keys"] == ["/again"]


def test_with_protect_a_key_is_unlinked_before_it_is_deleted(
    cluster: Callable[..., Cluster],
) -> None:
    server = cluster("-protect").server
    assert server.put("/safe", b"value") == 201
    assert server.call("DELETE", "/safe").status == 403
    assert server.get("/safe") == b"value"
    assert server.call("UNLINK", "/safe").status == 204
    assert server.call("DELETE", "/safe").status == 204
    assert server.call("DELETE", "/safe").status == 404


def test_the_fallback_gets_the_requests_for_missing_keys(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-fallback", "elsewhere:8080").server
    answer = server.call("GET", "/missing/%C3%A9t%C3%A9")
    assert answer.status == 302
    assert answer.fields["location"] == "http://elsewhere:8080/missing/%C3%A9t%C3%A9"
    answer = server.call("GET", "/a%2Fb%3Fc%20%0D%0A")
    assert answer.fields["location"] == "http://elsewhere:8080/a/b%3Fc%20%0D%0A"
    assert server.put("/here", b"value") == 201
    assert server.get("/here") == b"value"
    assert server.call("UNLINK", "/here").status == 204
    assert server.call("HEAD", "/here").fields["location"] == "http://elsewhere:8080/here"
    assert server.call("DELETE", "/missing").status == 404


def test_one_of_several_fallbacks_gets_a_request(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-fallback", "a:80,[::1]:81").server
    found = {server.call("GET", "/missing").fields["location"] for _ in range(50)}
    assert found == {"http://a:80/missing", "http://[::1]:81/missing"}


DELETED_IN_BETWEEN = """
find = mkv.Store.find
def late(self, key):
    answer = find(self, key)
    if not answer:
        self.index.commit([(mkv.Row.remove, key, (False, False), 0.0, None)])
    return answer
mkv.Store.find = late
"""


def test_the_fallback_gets_the_requests_for_keys_that_are_deleted_meanwhile(
    cluster: Callable[..., Cluster],
) -> None:
    flags = "-fallback", "elsewhere:8080", "-voltimeout", "0"
    server = cluster(*flags, preamble=DELETED_IN_BETWEEN).server
    assert server.put("/k", b"value") == 201
    for _ in range(2):
        answer = server.call("GET", "/k")
        assert (answer.status, answer.fields["location"]) == (302, "http://elsewhere:8080/k")


def test_the_others_share_what_a_volume_that_is_down_cannot_serve(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    locations = system.server.call("GET", "/k").fields["key-volumes"].split(",")
    ask = functools.partial(system.server.call, "GET", "/k")
    up = functools.partial(system.server.metric, "mkv_volumes_up")
    for down in locations:
        volume = next(each for each in system.volumes if down.startswith(each.name))
        volume.kill()
        until(lambda: ask() and up() == 2)
        where = Counter(ask().fields["location"].split("/")[2] for _ in range(600))
        assert len(where) == 2 and min(where.values()) > 200, where  # not so: one time in 10^15
        volume.start()
        until(lambda: up() == 3)


def test_balance_is_told_by_the_volumes_of_now(cluster: Callable[..., Cluster]) -> None:
    system = cluster("-replicas", "1")
    assert system.server.put("/one", b"value") == 201
    assert system.server.call("GET", "/one").fields["key-balance"] == "balanced"
    other = system.start(free_ports(1)[0], "-replicas", "2")
    answer = other.call("GET", "/one")
    assert answer.fields["key-balance"] == "unbalanced"
    assert len(answer.fields["key-volumes"].split(",")) == 1
    assert other.get("/one") == b"value"


def test_one_subvolume_means_no_sub_folders(cluster: Callable[..., Cluster]) -> None:
    system = cluster(subvolumes=1)
    assert system.server.put("/flat", b"value") == 201
    assert system.server.get("/flat") == b"value"
    assert {volume.name for volume in system.volumes} == {
        replica.location for replica in system.tables()[0][b"/flat"].replicas
    }
    until(system.is_clean)


def test_content_md5_is_checked_in_base64_and_hex(system: Cluster) -> None:
    digest = hashlib.md5(b"value")
    good = [digest.hexdigest(), digest.hexdigest().upper(), base64.b64encode(digest.digest())]
    for number, md5 in enumerate(good):
        assert system.server.call("PUT", f"/md5-{number}", b"value", Content_MD5=md5).status == 201
    other = hashlib.md5(b"other")
    bad = [other.hexdigest(), base64.b64encode(other.digest()), "xyz", "00", digest.hexdigest()[1:]]
    for md5 in bad:
        assert system.server.call("PUT", "/md5-bad", b"value", Content_MD5=md5).status == 400, md5
    assert system.server.get("/md5-bad") is None
    assert system.server.put("/md5-bad", b"free at once") == 201


def test_without_md5sum_no_md5_is_kept_but_a_given_one_is_checked(
    cluster: Callable[..., Cluster],
) -> None:
    server = cluster("-md5sum", "false").server
    assert server.put("/plain", b"value") == 201
    assert "content-md5" not in server.call("GET", "/plain").fields
    assert server.call("PUT", "/checked", b"value", Content_MD5="0" * 32).status == 400


def test_an_empty_value_is_411(system: Cluster) -> None:
    assert system.server.put("/empty", b"") == 411  # Content-Length: 0
    assert system.server.put("/empty", iter([])) == 411  # chunked
    assert statuses(raw(system.server.port, request("PUT", "/empty", b"", "Connection: close\r\n")))
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/empty"))  # no length at all
        assert wire.answer().status == 411
    assert system.server.get("/empty") is None


def test_keys_are_utf_8_of_2_to_511_bytes(system: Cluster) -> None:
    server = system.server
    for path in ("/", "/%FF", "/%C3", "/a%ED%A0%80", "/%", "/%4", "/%zz"):
        for method in ("GET", "PUT", "DELETE"):
            assert server.call(method, path, b"x" if method == "PUT" else None).status == 400, path
    longest = "/" + "é" * 255
    assert len(longest.encode()) == 511
    for key in ("/a", longest, "/photos/été", "/😀?#%&+ ;=\n\0\"'", "//", "/a//b/../c/."):
        assert server.put(quote(key), key.encode()) == 201, key
        assert server.get(quote(key)) == key.encode(), key
        assert key.encode() in system.tables()[0]
        assert server.call("DELETE", quote(key)).status == 204, key
    for method in ("GET", "PUT", "DELETE", "UNLINK"):
        assert server.call(method, "/" + "k" * 511, b"x").status == 414, method
    for path in ("/", "/%FF", "/" + "k" * 511):  # a HEAD has no body
        assert raw(server.port, request("HEAD", path)).endswith(b"\r\n\r\n"), path


def test_a_key_is_the_decoded_path_however_it_was_written(system: Cluster) -> None:
    assert system.server.put("/%61bc%2fd", b"value") == 201
    assert system.server.get("/abc/d") == b"value"
    with Wire(system.server.port) as wire:
        wire.send(request("GET", "http://somewhere:3000/abc/d"))
        assert wire.answer().status == 302


def test_a_value_may_come_late_while_volumes_are_reloaded(cluster: Callable[..., Cluster]) -> None:
    system = cluster()
    assert [system.server.put(f"/warm{n}", b"value") for n in range(3)] == [201] * 3
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/late", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert wire.head()[0] == 100
        for volume in system.volumes:
            old = volume.workers()
            os.kill(volume.process.pid, signal.SIGHUP)  # ends idle connections
            until(lambda v=volume, old=old: not set(old) & set(v.workers()))
        wire.send(b"value")
        assert wire.answer().status == 201
    assert system.server.get("/late") == b"value"


def test_another_method_is_405_with_allow(system: Cluster) -> None:
    for method in ("POST", "PATCH", "OPTIONS", "TRACE", "MOVE"):
        answer = system.server.call(method, "/key")
        assert answer.status == 405, method
        allowed = set(answer.fields["allow"].split(", "))
        assert {"GET", "HEAD", "PUT", "DELETE", "UNLINK"} <= allowed


def test_another_query_is_400(system: Cluster) -> None:
    paths = "/key?x /?lists /?list&unlinked /?list&x=1 /?start=/a /?limit=1 /? /a?health /a?metrics"
    paths += " /?list&limit=x /?list&limit=-1 /?list&start=%FF /?list&start=%zz /%FF?list /%zz?list"
    for path in paths.split():
        assert system.server.call("GET", path).status == 400, path
    assert system.server.call("GET", "/" + "k" * 511 + "?list").status == 414
    for method in ("PUT", "DELETE", "UNLINK"):
        assert system.server.call(method, "/key?list", b"x").status == 400, method
    assert system.server.get("/key") is None


def test_health_is_ok(system: Cluster) -> None:
    assert system.server.call("GET", "/?health") == Reply(
        200, {"content-length": "3", **TEXT}, b"ok\n"
    )


def test_metrics_count_requests_bytes_and_keys(cluster: Callable[..., Cluster]) -> None:
    server = cluster().server
    for status in (201, 403):
        assert server.put("/counted", b"x" * 1000) == status
    answer = server.call("GET", "/?metrics")
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/plain")
    for line in answer.body.decode().splitlines():
        assert re.fullmatch(r'#.*|[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+', line)
    assert server.metric('mkv_requests_total{method="PUT",status="201"}') == 1
    assert server.metric('mkv_requests_total{method="PUT",status="403"}') == 1
    assert server.metric('mkv_request_seconds_total{method="PUT"}') > 0
    assert server.metric("mkv_received_bytes_total") >= 1000
    assert (server.metric("mkv_keys"), server.metric("mkv_journal_entries")) == (1, 0)
    assert (server.metric("mkv_volumes"), server.metric("mkv_volumes_up")) == (3, 3)
    assert 0 <= server.metric("mkv_event_loop_lag_seconds") < 10


def test_the_second_of_two_concurrent_puts_is_409(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(
            request("PUT", "/contended", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n")
        )
        assert wire.head()[0] == 100
        assert system.server.put("/contended", b"second") == 409
        assert system.server.get("/contended") is None
        wire.send(b"first")
        assert wire.answer().status == 201
    assert system.server.get("/contended") == b"first"
    assert system.server.put("/contended", b"third") == 403


def test_of_many_concurrent_puts_exactly_one_wins(system: Cluster) -> None:
    with ThreadPoolExecutor(16) as pool:
        values = [str(number).encode() * 50_000 for number in range(16)]
        results = list(pool.map(lambda value: system.server.put("/race", value), values))
    assert sorted(set(results) - {403, 409}) == [201] and results.count(201) == 1
    assert system.server.get("/race") == values[results.index(201)]


def test_get_is_503_when_no_volume_can_be_reached(cluster: Callable[..., Cluster]) -> None:
    system = cluster(volumes=3)
    assert system.server.put("/away", b"value") == 201
    for volume in system.volumes:
        volume.kill()
    until(lambda: system.server.call("GET", "/away").status == 503)
    assert system.server.put("/more", b"value") == 503
    for volume in system.volumes:
        volume.start()
    until(lambda: system.server.call("GET", "/away").status == 302)
    assert system.server.get("/away") == b"value"
    until(lambda: system.server.put("/more", b"value") == 201)


def test_with_voltimeout_0_a_replica_without_the_file_is_never_named(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster("-voltimeout", "0")
    assert system.server.put("/partly", b"value") == 201
    first, second, third = system.volumes
    for volume in (first, second):
        (path,) = volume.files()
        (volume.folder / path[1:]).unlink()
    for _ in range(20):
        location = system.server.call("GET", "/partly").fields["location"]
        assert location.startswith(f"http://{third.name}/")
    (path,) = third.files()
    (third.folder / path[1:]).unlink()
    assert system.server.call("GET", "/partly").status == 404


COUNTED = """
def exchange(self, verb, *what, exchange=mkv.Volumes.exchange):
    print("question", verb, file=sys.stderr, flush=True)
    return exchange(self, verb, *what)

mkv.Volumes.exchange = exchange
"""


def test_with_voltimeout_0_a_get_asks_each_replica_once(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-voltimeout", "0", preamble=COUNTED).server
    assert server.put("/k", b"value") == 201
    for _ in range(10):
        assert server.call("GET", "/k").status == 302
    assert server.log.read_text().count("question HEAD") == 30


# --- lists ----------------------------------------------------------------------------------------


def listed(server: Server, path: str) -> tuple[list[str], str]:
    """The keys of a list, and where the next one begins."""
    answer = server.call("GET", path)
    assert answer.status == 200 and answer.fields["content-type"] == "application/json"
    value = json.loads(answer.body)
    assert set(value) == {"keys", "next"}
    return value["keys"], value["next"]


def test_list_of_nothing_is_empty(cluster: Callable[..., Cluster]) -> None:
    server = cluster().server
    assert listed(server, "/?list") == ([], "")
    assert listed(server, "/?unlinked&start=/x&limit=5") == ([], "")
    assert server.put("/a", b"x") == 201
    assert listed(server, "/b?list") == ([], "")
    assert listed(server, "/?list&start=/b") == ([], "")
    assert listed(server, "/0?list") == ([], "")


def test_a_page_may_begin_at_any_key(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    keys = ["/a", "/a b+%41&c=1#?", "/\u00ff", "/\ufffd", "/\ufffd\ufffd", "/\U0010ffff"]
    for key in keys:
        assert server.put(quote(key), b"x") == 201
    pages, start = [], ""
    while start or not pages:
        page, start = listed(server, f"/?list&limit=1&start={quote(start)}")
        pages += page
    assert pages == keys


def test_list_gives_keys_in_order_with_prefix_start_and_limit(
    cluster: Callable[..., Cluster],
) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    keys = ["/a", "/a/1", "/a/2", '/a/"3"\\', "/a/\n", "/ab", "/b c+d", "/été/1", "/été/😀"]
    keys.sort(key=str.encode)
    for key in keys:
        assert server.put(quote(key), b"x") == 201
    assert listed(server, "/?list") == (keys, "")
    assert listed(server, "/a?list")[0] == [key for key in keys if key.startswith("/a")]
    assert listed(server, "/a/?list")[0] == [key for key in keys if key.startswith("/a/")]
    assert listed(server, quote("/é") + "?list")[0] == ["/été/1", "/été/😀"]
    assert listed(server, "/?list&start=/a/2")[0] == keys[keys.index("/a/2") :]
    assert listed(server, "/a/?list&start=/")[0] == [key for key in keys if key.startswith("/a/")]
    assert listed(server, "/a/?list&start=/b")[0] == []
    assert listed(server, "/?list&limit=0") == ([], "/a")
    assert listed(server, f"/?list&limit={len(keys)}") == (keys, "")
    assert listed(server, "/a?list&limit=100")[1] == ""
    assert listed(server, "/a/?list&limit=4") == ([k for k in keys if k.startswith("/a/")], "")
    for limit in range(1, len(keys)):
        pages, start = [], ""
        while not pages or start:
            page, start = listed(server, f"/?list&limit={limit}&start={quote(start)}")
            assert len(page) <= limit
            pages += page
        assert pages == keys


def test_unlinked_keys_have_a_list_of_their_own(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    for number in range(10):
        assert server.put(f"/{number}", b"x") == 201
    for number in range(0, 10, 2):
        assert server.call("UNLINK", f"/{number}").status == 204
    assert listed(server, "/?list") == ([f"/{number}" for number in range(1, 10, 2)], "")
    assert listed(server, "/?unlinked") == ([f"/{number}" for number in range(0, 10, 2)], "")
    assert listed(server, "/?unlinked&limit=2") == (["/0", "/2"], "/4")
    assert listed(server, "/?list&limit=2") == (["/1", "/3"], "/5")
    assert server.call("DELETE", "/4").status == 204
    assert listed(server, "/?unlinked&start=/2&limit=2") == (["/2", "/6"], "/8")


def test_a_list_for_http_1_0_is_not_chunked(system: Cluster) -> None:
    assert system.server.put("/old-list/1", b"x") == 201
    answer = raw(system.server.port, b"GET /old-list/?list HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert json.loads(body) == {"keys": ["/old-list/1"], "next": ""}


def anonymous_memory(pid: int) -> int:
    """Resident bytes that are not pages of a file: LMDB's map does not count."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def test_a_list_of_a_million_keys_streams_without_memory_and_without_stalling_others(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster()
    server = system.server
    assert server.put("/hot", b"value") == 201
    server.stop()
    keys = [b"/many/%07d/some-name-of-middling-length.jpeg" % number for number in range(1_000_000)]
    with lmdb.open(str(server.db), max_dbs=2, map_size=1 << 40) as env:
        table = env.open_db(b"keys")
        with env.begin(table, write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti([(key, b"127.0.0.1:1/sv00 5 0123456789abcdef") for key in keys])
    server.start()
    until(lambda: server.get("/hot") == b"value")
    before, peak, delays, body = anonymous_memory(server.process.pid), 0, [], []

    def read_all() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as lister:
            lister.request("GET", "/?list")
            answer = lister.getresponse()
            while piece := answer.read(1 << 20):
                body.append(piece)

    reader = threading.Thread(target=read_all)
    # A client that reads nothing of its list costs no memory either.
    with Wire(server.port) as stalled, Wire(server.port) as wire:
        stalled.send(request("GET", "/?list"))
        assert stalled.head()[0] == 200
        reader.start()
        while reader.is_alive():
            began = time.perf_counter()
            wire.send(request("GET", "/hot"))
            assert wire.answer().status == 302
            delays.append(time.perf_counter() - began)
            peak = max(peak, anonymous_memory(server.process.pid))
    reader.join()
    found = json.loads(b"".join(body))
    assert found["next"] == ""
    assert found["keys"] == ["/hot", *(key.decode() for key in keys)]
    assert peak - before < 16 << 20
    assert len(delays) > 20
    assert sorted(delays)[len(delays) * 9 // 10] < 0.05


# --- http -----------------------------------------------------------------------------------------


def test_a_connection_is_kept_for_many_requests(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        for number in range(100):
            wire.send(request("GET", f"/kept-{number}"))
            assert wire.answer().status == 404
        wire.send(request("PUT", "/kept", b"value"))
        assert wire.answer().status == 201
        wire.send(request("GET", "/kept", b"", "Connection: close\r\n"))
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (302, "close")
        assert wire.closed()


@pytest.mark.parametrize("options", ["close", "Close", "x,close", "x ,\tclose", "close\t, x"])
def test_the_option_close_may_stand_among_others(system: Cluster, options: str) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("GET", "/?health", b"", f"Connection: {options}\r\n"))
        assert wire.answer().fields["connection"] == "close"
        assert wire.closed()


def test_http_1_0_is_honoured(system: Cluster) -> None:
    answer = raw(system.server.port, b"PUT /old HTTP/1.0\r\nContent-Length: 5\r\n\r\nvalue")
    assert statuses(answer) == [201]
    assert statuses(raw(system.server.port, b"GET /old HTTP/1.0\r\n\r\n")) == [302]


def test_pipelined_requests_are_answered_in_order(system: Cluster) -> None:
    steps = [("GET", 404), ("PUT", 201), ("GET", 302), ("DELETE", 204), ("GET", 404)]
    stream = b"".join(
        request(method, f"/pipe-{number}", b"v" * 70_000 if method == "PUT" else b"")
        for number in range(5)
        for method, _ in steps
    )
    last = request("GET", "/?health", b"", "Connection: close\r\n")
    assert statuses(raw(system.server.port, stream + last)) == [s for _, s in steps] * 5 + [200]


def test_pipelined_requests_may_come_in_any_pieces(system: Cluster) -> None:
    stream = request("PUT", "/pieces", b"value") + request("GET", "/pieces")
    stream += request("PUT", "/pieces-2", b"", "Transfer-Encoding: chunked\r\n")
    stream += b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: x\r\n\r\n" + request("GET", "/pieces-2")
    with Wire(system.server.port) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in stream:
            wire.send(bytes([byte]))
        assert [wire.answer().status for _ in range(4)] == [201, 302, 201, 302]
    assert system.server.get("/pieces-2") == b"abcde"


def test_chunked_uploads_work(system: Cluster) -> None:
    pieces = [
        random.Random(size).randbytes(size) for size in (1, 10, 100_000, 3, 1_000_000, 65_536)
    ]
    assert system.server.put("/chunked", iter(pieces)) == 201
    assert system.server.get("/chunked") == b"".join(pieces)
    assert system.tables()[0][b"/chunked"].size == sum(map(len, pieces))


def test_the_body_of_a_get_is_not_taken_for_a_request(system: Cluster) -> None:
    body = request("PUT", "/smuggled", b"x")
    answer = raw(system.server.port, request("GET", "/bodied", body, "Connection: close\r\n"))
    assert statuses(answer) == [404]
    assert system.server.get("/smuggled") is None


def test_100_continue_comes_before_a_body_that_will_be_taken(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/invited", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert wire.head()[0] == 100
        wire.send(b"value")
        assert wire.answer().status == 201
        chunked = "Transfer-Encoding: chunked\r\nExpect: 100-Continue\r\n"
        wire.send(request("PUT", "/invited-2", b"", chunked))
        assert wire.head()[0] == 100
        wire.send(b"5\r\nvalue\r\n0\r\n\r\n")
        assert wire.answer().status == 201
    assert system.server.get("/invited") == system.server.get("/invited-2") == b"value"


def test_100_continue_does_not_come_before_a_refusal(system: Cluster) -> None:
    assert system.server.put("/taken", b"value") == 201
    expect = "Content-Length: 5\r\nExpect: 100-continue\r\n"
    refused = {
        403: request("PUT", "/taken", b"", expect),
        400: request("PUT", "/uninvited", b"", expect + "Content-MD5: xyz\r\n"),
        414: request("PUT", "/" + "k" * 600, b"", expect),
        405: request("POST", "/uninvited", b"", expect),
        404: request("DELETE", "/uninvited", b"", expect),
        411: request("PUT", "/uninvited", b"", "Content-Length: 0\r\nExpect: 100-continue\r\n"),
    }
    for status, data in refused.items():
        with Wire(system.server.port) as wire:
            wire.send(data)
            assert wire.head()[0] == status


def test_another_expectation_is_ignored(system: Cluster) -> None:
    data = request("PUT", "/expecting", b"value", "Expect: 200-ok\r\nConnection: close\r\n")
    assert statuses(raw(system.server.port, data)) == [201]


def test_who_sends_50_mb_to_an_existing_key_reads_the_403(system: Cluster) -> None:
    assert system.server.put("/there", b"value") == 201
    for _ in range(3):
        with Wire(system.server.port) as wire:
            wire.send(request("PUT", "/there", b"x" * 50_000_000))  # fails if it is reset
            assert wire.answer().status == 403
            assert wire.closed()


def test_sigterm_lets_an_upload_finish(cluster: Callable[..., Cluster]) -> None:
    system = cluster()
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/late", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert wire.head()[0] == 100
        system.server.process.send_signal(signal.SIGTERM)
        until(lambda: not system.server_accepts())
        wire.send(b"value")
        assert wire.answer().status == 201
    assert system.server.process.wait(30) == 0
    system.server.start()
    assert system.server.get("/late") == b"value"


BAD_HEADS = {
    "length and chunked": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n" + CHUNKED),
    "chunked and length": (400, f"PUT /k HTTP/1.1\r\nHost: x\r\n{CHUNKED}Content-Length: 3\r\n"),
    "differing lengths": (
        400,
        "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\ncontent-length: 4\r\n",
    ),
    "differing lengths in a list": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 4\r\n"),
    "bare CR in a field": (400, "GET /k HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n"),
    "bare CR ends a field": (400, "GET /k HTTP/1.1\r\nHost: x\rX: a\r\n"),
    "bare CR in the request line": (400, "GET /k\r HTTP/1.1\r\nHost: x\r\n"),
    "bare LF ends a field": (400, "GET /k HTTP/1.1\r\nHost: x\nX: a\r\n"),
    "bare LF ends the request line": (400, "GET /k HTTP/1.1\nHost: x\r\n"),
    "bare LF ends the head": (400, "GET /k HTTP/1.1\r\nHost: x\r\n\n"),
    "bare LFs only": (400, "GET /k HTTP/1.1\nHost: x\n\n"),
    "NUL in a field": (400, "GET /k HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n"),
    "folded field": (400, "GET /k HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n"),
    "folded first field": (400, "GET /k HTTP/1.1\r\n Host: x\r\nHost: x\r\n"),
    "space before the colon": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n"),
    "tab before the colon": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding\t: chunked\r\n"),
    "no colon": (400, "GET /k HTTP/1.1\r\nHost: x\r\nnonsense\r\n"),
    "no name": (400, "GET /k HTTP/1.1\r\nHost: x\r\n: value\r\n"),
    "no Host": (400, "GET /k HTTP/1.1\r\n"),
    "two Hosts": (400, "GET /k HTTP/1.1\r\nHost: x\r\nHost: y\r\n"),
    "no version": (400, "GET /k\r\nHost: x\r\n"),
    "two spaces": (400, "GET  /k HTTP/1.1\r\nHost: x\r\n"),
    "space in the path": (400, "GET /k k HTTP/1.1\r\nHost: x\r\n"),
    "no path": (400, "GET k HTTP/1.1\r\nHost: x\r\n"),
    "another protocol": (400, "GET /k HTTQ/1.1\r\nHost: x\r\n"),
    "gzip, chunked": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n"),
    "gzip": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n"),
    "identity": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n"),
    "xchunked": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n"),
    "chunked twice": (501, f"PUT /k HTTP/1.1\r\nHost: x\r\n{CHUNKED}{CHUNKED}"),
    "a head over 16 KiB": (431, f"GET /k HTTP/1.1\r\nHost: x\r\nX: {'x' * 17000}\r\n"),
    "many fields over 16 KiB": (431, "GET /k HTTP/1.1\r\nHost: x\r\n" + "X: y\r\n" * 3000),
    "a path over 16 KiB": (431, f"GET /{'k' * 17000} HTTP/1.1\r\nHost: x\r\n"),
}
for _length in ("+3", "-3", "0x3", "3 3", "3;", "3.0", "1e3", "", "x", "9" * 30, "\u00b3"):
    _line = f"PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: {_length}\r\n"
    BAD_HEADS[f"length {_length!a}"] = (400, _line)


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_doubtful_head_is_refused_and_nothing_after_it_is_read(
    system: Cluster, name: str
) -> None:
    status, head = BAD_HEADS[name]
    answer = raw(system.server.port, head.encode("latin-1") + b"\r\n" + SMUGGLED)
    assert statuses(answer) == [status]
    assert b"connection: close" in answer.lower()
    assert system.server.get("/smuggled") is None


@pytest.mark.parametrize(
    "body",
    [
        *("x\r\nabc\r\n0\r\n\r\n", "-3\r\nabc\r\n0\r\n\r\n", "+3\r\nabc\r\n0\r\n\r\n"),
        *("0x3\r\nabc\r\n0\r\n\r\n", " 3\r\nabc\r\n0\r\n\r\n", "\r\nabc\r\n0\r\n\r\n"),
        *("3 3\r\nabc\r\n0\r\n\r\n", "3_\r\nabc\r\n0\r\n\r\n", "fffffffffffffffff\r\nabc\r\n"),
        *("3\nabc\r\n0\r\n\r\n", "3\r\nabc\n0\r\n\r\n", "3\r\nabcd\r\n0\r\n\r\n"),
        *("3\r\nab\r\n0\r\n\r\n", "3;x=\ry\r\nabc\r\n0\r\n\r\n", "3;x=\ny\r\nabc\r\n0\r\n\r\n"),
        *("3\r\nabc\r\n0\r\nbad trailer\r\n\r\n", "3\r\nabc\r\n0\r\n bad: trailer\r\n\r\n"),
        *("3\r\nabc\r\n0\r\nX: y\n\r\n",),
    ],
    ids=lambda body: ascii(body[:20]),
)
def test_a_doubtful_chunked_body_is_refused_and_nothing_after_it_is_read(
    system: Cluster, body: str
) -> None:
    head = request("PUT", "/doubtful", b"", CHUNKED)
    answer = raw(system.server.port, head + body.encode() + SMUGGLED)
    assert statuses(answer) == [400]
    assert b"connection: close" in answer.lower()
    assert system.server.get("/smuggled") is None
    assert system.server.get("/doubtful") is None


def test_a_head_without_end_is_431_as_soon_as_it_is_too_long(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(b"GET /k HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 3000)
        assert wire.answer().status == 431
        assert wire.closed()


def test_a_chunk_line_without_end_is_431(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/endless", b"", CHUNKED) + b"3;" + b"x" * 17_000)
        assert wire.answer().status == 431
        assert wire.closed()


def test_a_head_just_under_16_kib_is_taken(system: Cluster) -> None:
    fields = "".join(f"X-{number}: {'x' * 250}\r\n" for number in range(62))
    data = request("GET", "/?health", b"", fields + "Connection: close\r\n")
    assert 16_000 < len(data) < 16_384
    assert statuses(raw(system.server.port, data)) == [200]


def test_a_slow_head_is_408(cluster: Callable[..., Cluster]) -> None:
    port = cluster("-replicas", "1", volumes=1, preamble="mkv.HEAD_TIME = 0.3").server.port
    with Wire(port) as silent, Wire(port) as trickling:
        silent.send(b"GET /k HTTP/1.1\r\nHo")
        trickling.socket.settimeout(0.05)
        answer = b""
        for byte in itertools.chain(b"GET /k HTTP/1.1\r\nX: ", itertools.repeat(120, 400)):
            with contextlib.suppress(TimeoutError):  # the pace of the bytes
                trickling.send(bytes([byte]))
                if answer := trickling.socket.recv(1000):
                    break
        assert statuses(answer) == [408]
        assert silent.answer().status == 408
        assert silent.closed()


def test_a_body_that_stops_is_408_and_leaves_nothing(cluster: Callable[..., Cluster]) -> None:
    system = cluster(preamble="mkv.BODY_TIME = 0.5")
    for length in (10, 1_000_000):
        with Wire(system.server.port) as wire:
            wire.send(request("PUT", "/slow", b"", f"Content-Length: {length}\r\n") + b"x")
            assert wire.answer().status == 408
            assert wire.closed()
        assert system.server.put("/slow", b"value") == 201
        assert system.server.call("DELETE", "/slow").status == 204
    until(system.is_clean)


def is_quiet(wire: Wire, seconds: float) -> bool:
    """Whether nothing comes for a while, not even the end."""
    wire.socket.settimeout(seconds)
    try:
        return wire.socket.recv(1) is None
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    finally:
        wire.socket.settimeout(30)


def test_idle_connections_end(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-replicas", "1", volumes=1, preamble="mkv.IDLE_TIME = 0.3").server
    with Wire(server.port) as fresh, Wire(server.port) as used:
        used.send(request("GET", "/?health"))
        assert used.answer().status == 200
        assert fresh.closed() and used.closed()


def test_the_time_that_a_request_took_is_no_idle_time(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-replicas", "1", volumes=1, preamble="mkv.IDLE_TIME = 1.5").server
    with Wire(server.port) as wire:
        wire.send(request("PUT", "/long", b"", "Content-Length: 2\r\n") + b"x")
        assert is_quiet(wire, 1.7)
        wire.send(b"x")
        assert wire.answer().status == 201
        assert is_quiet(wire, 0.5)
        wire.send(request("GET", "/long"))
        assert wire.answer().status == 302


def test_a_connection_that_asks_now_and_then_is_not_idle(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-replicas", "1", volumes=1, preamble="mkv.IDLE_TIME = 1").server
    assert server.call("PUT", "/k", b"value").status == 201
    with Wire(server.port) as wire:
        for path, status in (("/k", 302), ("/none", 404)) * 3:
            assert is_quiet(wire, 0.5)
            wire.send(request("GET", path))
            assert wire.answer().status == status
        assert wire.closed()


def test_a_get_that_waits_for_a_volume_is_one_request(cluster: Callable[..., Cluster]) -> None:
    server = cluster("-voltimeout", "0").server
    assert server.call("PUT", "/k", b"value").status == 201
    with Wire(server.port) as wire:
        for _ in range(5):
            wire.send(request("GET", "/k"))
            assert wire.answer().status == 302
        wire.send(request("GET", "/k") + request("GET", "/none") + b"GET /k HTTP/1.1\r\nHo")
        assert [wire.answer().status for _ in range(2)] == [302, 404]
        wire.send(b"st: x\r\n\r\n")
        assert wire.answer().status == 302
    assert server.metric('mkv_requests_total{method="GET",status="302"}') == 7
    assert server.metric('mkv_requests_total{method="GET",status="404"}') == 1


# --- bytes that nobody meant ----------------------------------------------------------------------


CLOSE = "Connection: close\r\n"
LAST = request("GET", "/?health", b"", CLOSE)
ODD = [b"\r", b"\n", b"\0", b" ", b":", b",", b";", b"%", b"\xff", b"\r\n", b"\r\n\r\n", b"0", b"-"]
ODD += [b"9" * 40, b"x" * 500, b"HTTP/1.0", b"Content-Length: 7\r\n", b"Expect: 100-continue\r\n"]
ODD += [CHUNKED.encode(), CLOSE.encode(), b"fffffffffffffff\r\n", b"X: y\r\n" * 120]
ODD += [b"\t", b"\r\n Host: y", b"Host: y\r\n", b"x" * mkv.MAX_HEAD]
REQUESTS = [
    request("GET", "/%41?list&start=%00"),
    request("HEAD", "http://x/e", b"", "X: y\r\n" + CLOSE),
    request("PUT", "/b", b"x" * 50),
    request("PUT", "/c", b"", CHUNKED) + b"5;x=y\r\nabcde\r\n0\r\nTrailer: 1\r\n\r\n",
    b"DELETE /d HTTP/1.0\r\nExpect: 100-continue\r\n\r\n",
]
ANSWERS = [
    b"HTTP/1.1 201 Created\r\nServer: nginx\r\nContent-Length: 3\r\nLocation: http://x/\r\n\r\nabc",
    b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\n" + CHUNKED.encode() + b"\r\n4;x\r\n<h1>\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.0 200\r\nETag: x\r\n\r\n",
]


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with up to four changes: cut, doubled, or with something odd put in."""
    for _ in range(chance.randrange(5)):
        begin = chance.randrange(len(data) + 1)
        end = begin + chance.choice((0, 0, 1, 1, 2, 40))
        new = chance.choice((chance.choice(ODD), data[begin:end] * 2, b"", chance.randbytes(1)))
        data = data[:begin] + new + data[end:]
    return data


async def next_answer(parser: Parser) -> tuple[tuple[int, int | None], int | None]:
    """Status and length of an answer, and its length again, as they are heard from a volume."""
    first = mkv.STATUS.match(head := await parser.head())
    mkv.require(first, 400, "malformed first line")
    _, length, _ = mkv.parse_fields(head[first.end() :])
    return (int(first[1]), length), length


def assert_request(head: mkv.Request, body: bytes) -> None:
    """That nothing in an accepted request could be read in another way."""
    assert head.method.isascii() and head.method.isupper()
    assert re.fullmatch(rb"/[^\0-\x20\x7f?#]*", head.path)
    assert b"," not in head.fields.get(b"host", b"")
    for name, value in head.fields.items():
        assert name == name.lower() and re.fullmatch(rb"[^\0-\x20\x7f-\xff:,;]+", name)
        assert value == value.strip() and not re.search(rb"[\0-\x08\x0a-\x1f\x7f]", value)
    coded, sized = b"transfer-encoding" in head.fields, head.fields.get(b"content-length")
    assert head.length == (None if coded else int(sized or 0)) and not (coded and sized)
    assert head.length in (None, len(body))
    least = 2 if head.query is None else 1
    assert least <= len(head.key) <= mkv.MAX_KEY and head.key.decode()[0] == "/"


def assert_answer(head: tuple[int, int | None], body: bytes) -> None:
    status, length = head
    assert 200 <= status < 600 and length in (None, len(body))


@pytest.mark.parametrize(
    ("next_head", "seeds", "count", "check"),
    [
        (next_request, REQUESTS, 100_000, assert_request),
        (next_answer, ANSWERS, 100_000, assert_answer),
    ],
    ids=["requests", "answers"],
)
@pytest.mark.asyncio
async def test_no_bytes_surprise_a_parser_however_they_are_cut(
    next_head: Callable, seeds: list[bytes], count: int, check: Callable
) -> None:
    chance, ends = random.Random(count), Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        data = mutated(chance, b"".join(chance.choices(seeds, k=2)))
        cuts = sorted(chance.choices(range(len(data) + 1), k=chance.randrange(4)))
        pieces = [data[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(data)])]
        async with asyncio.timeout(10):
            found = await messages(pieces, next_head)
        refused = bool(found) and isinstance(found[-1][0], int)
        ends[found[-1][0] if refused else 0] += 1
        for head, body in found[: len(found) - refused]:
            check(head, body)
        if number % 10 == 0:
            assert await messages([data], next_head) == found, data
    assert set(ends) <= {0, 400, 405, 414, 431, 501} and min(ends[0], ends[400]) > count // 10, ends
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 32 << 10  # KiB


@pytest.mark.parametrize("path", ["/k%C3%A9y", "/missing", "/%zz", "/", "/k%00", "http://x/a"])
def test_the_wire_shows_no_difference_between_the_ways_to_an_answer(
    system: Cluster, path: str
) -> None:
    if path == "/k%C3%A9y":
        assert system.server.put(path, b"value") == 201
    odd = ("", CLOSE, "Host: y\r\n", "X: y\r\n z\r\n", f"X: {'x' * 2000}\r\n", "Expect: x\r\n")
    for method, fields in itertools.product(("GET", "HEAD", "GETS"), odd):
        data, answers = request(method, path, b"", fields), []
        for first, rest in ((data, LAST), (data[:7], data[7:] + LAST)):
            with Wire(system.server.port) as wire:
                wire.send(first)
                if first == data:
                    wire.file.peek(1)
                with contextlib.suppress(OSError):  # closed after the first
                    wire.send(rest)
                answers.append(re.sub(rb"Location: [^\r]*", b"", wire.file.read()))
        assert answers[0] == answers[1] and answers[0], data


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (400, "X: y\r\n"),
        (400, "Host: x\r\nHost: y\r\n"),
        (400, "Host: x\r\nX: y\r\n z\r\n"),
        (400, "Host: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n"),
        (404, "Host: x\r\nContent-Length: 1000\r\n"),
        (404, f"Host: x\r\n{CHUNKED}"),
        (501, "Host: x\r\nTransfer-Encoding: gzip\r\n"),
    ],
)
def test_a_get_that_came_alone_ends_the_connection_if_it_is_doubtful_or_has_a_body(
    system: Cluster, status: int, fields: str
) -> None:
    for _ in range(2):  # nor is it taken when such a head is known
        with Wire(system.server.port) as wire:
            wire.send(f"GET /doubtful HTTP/1.1\r\n{fields}\r\n".encode())
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (status, "close")
            wire.send(SMUGGLED)
            assert wire.closed()
    assert system.server.get("/smuggled") is None


def test_many_different_heads_leave_little_in_memory(system: Cluster) -> None:
    def send(count: int) -> int:
        with Wire(system.server.port) as wire:
            for number in range(count):
                fields = "".join(f"X-{n}: {number}{'x' * 150}\r\n" for n in range(90))
                wire.send(request("GET", f"/k{number}", b"", fields))
                assert wire.answer().status == 404
        return anonymous_memory(system.server.process.pid)

    first = send(1)
    known = send(400)  # more than are remembered
    assert known - first < 32_000_000
    assert send(2000) - known < 8_000_000  # of 30 MB


def test_methods_that_are_none_are_not_counted_one_by_one(system: Cluster) -> None:
    for method in ("LOOK", "ASK", "GETS"):
        assert statuses(raw(system.server.port, request(method, "/k", b"", CLOSE))) == [405]
        assert f'"{method}"' not in system.server.call("GET", "/?metrics").body.decode()


def test_http_1_0_hears_no_100_continue(system: Cluster) -> None:
    head = b"PUT /old-expecting HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    assert statuses(raw(system.server.port, head + b"value")) == [201]


# --- readers that do not read, volumes that lie ---------------------------------------------------


def quiet_reader(port: int, room: int = 8192) -> socket.socket:
    """A connection of a client that has little room for answers."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    wire.connect(("127.0.0.1", port))
    return wire


def test_who_asks_and_asks_and_never_reads_is_not_listened_to(
    cluster: Callable[..., Cluster],
) -> None:
    preamble = "mkv.IDLE_TIME, mkv.LINGER_TIME = 3, 0.5"
    server = cluster("-replicas", "1", volumes=1, preamble=preamble).server
    data, sent, memory = request("GET", "/missing") * 1000, 0, server.memory()
    with quiet_reader(server.port) as wire:
        wire.settimeout(1)
        began, reset = time.monotonic(), False
        try:
            while sent < 32_000_000:
                sent += wire.send(data)
                assert server.call("GET", "/?health").status == 200
        except (TimeoutError, ConnectionResetError) as error:
            reset = isinstance(error, ConnectionResetError)
        assert sent < 32_000_000
        assert not reset or time.monotonic() - began > 3  # the machine is slow: it was idle so long
        assert server.memory() - memory < 16_000_000
        until(lambda: server.metric("mkv_connections") == 1)


SMALL_BUFFERS = """
import socket
converse = mkv.Connection.converse
def small(self, reader, writer):
    wire = writer.get_extra_info("socket")
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    return converse(self, reader, writer)
mkv.Connection.converse = small
"""


def test_who_half_closes_before_reading_gets_every_answer_whole(
    cluster: Callable[..., Cluster],
) -> None:
    flags = "-replicas", "1", "-fallback", "127.0.0.1:1"
    server = cluster(*flags, volumes=1, preamble=SMALL_BUFFERS).server
    question = b"GET /" + "é".encode() * 250 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    name, asked = 'mkv_requests_total{method="GET",status="302"}', 0
    last = question.replace(b"Host", b"Connection: close\r\nHost")
    for end, count in itertools.product((question, last), range(4, 12)):  # one fits only in part
        with quiet_reader(server.port, 2048) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for each in [question] * (count - 1) + [end]:
                wire.sendall(each)
                asked += 1
                with contextlib.suppress(AssertionError):  # of until(): when there is no more room
                    until(lambda asked=asked: server.metric(name) == asked, 0.2)
            wire.shutdown(socket.SHUT_WR)
            wire.settimeout(30)
            answers = b""
            while piece := wire.recv(1 << 20):
                answers += piece
        asked = int(server.metric(name))
        assert statuses(answers) == [302] * count and answers.endswith(b"\r\n\r\n")
        assert len(answers.replace(b"Connection: close\r\n", b"")) % count == 0


def test_a_server_that_ends_waits_for_those_who_have_not_read_their_answers(
    cluster: Callable[..., Cluster],
) -> None:
    flags = "-replicas", "1", "-fallback", "127.0.0.1:1"
    server = cluster(*flags, volumes=1, preamble=SMALL_BUFFERS).server
    question = b"GET /" + "é".encode() * 250 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    for count in range(4, 9):
        with quiet_reader(server.port, 2048) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for asked in range(1, count + 1):
                wire.sendall(question)
                name = 'mkv_requests_total{method="GET",status="302"}'
                with contextlib.suppress(AssertionError):  # of until(): when there is no more room
                    until(lambda asked=asked, name=name: server.metric(name) == asked, 0.2)
            server.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # an idle one has a second
                server.process.wait(1.5)
            wire.settimeout(30)
            answers = b""
            while piece := wire.recv(1 << 20):
                answers += piece
        assert statuses(answers) == [302] * count and answers.endswith(b"\r\n\r\n")
        assert server.process.wait(20) == 0
        server.start()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_list_that_nobody_reads_is_broken_off_without_a_word(
    cluster: Callable[..., Cluster], version: str
) -> None:
    server = cluster("-replicas", "1", volumes=1, preamble="mkv.IDLE_TIME = 1").server
    server.stop()
    with lmdb.open(str(server.db), max_dbs=2, map_size=1 << 40) as env:
        table = env.open_db(b"keys")
        with env.begin(table, write=True) as txn, txn.cursor() as cursor:
            rows = ((b"/%06d" % n + b"x" * 400, b"127.0.0.1:1") for n in range(50_000))
            cursor.putmulti(rows)
    server.start()
    with quiet_reader(server.port) as wire:
        wire.sendall(f"GET /?list HTTP/{version}\r\nHost: x\r\n\r\n".encode())
        until(lambda: server.metric('mkv_requests_total{method="GET",status="200"}') > 1)
        until(lambda: server.metric("mkv_connections") == 1)
        wire.settimeout(10)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := wire.recv(1 << 20):
                answer += piece
        assert statuses(answer) == [200] and answer.count(b"HTTP/1.1") == 1
        assert not answer.endswith((b"}\n", b"\r\n0\r\n\r\n"))


class Liar(threading.Thread):
    """A volume whose every answer is the same bytes, and then others for ever, if there are any."""

    def __init__(self, answer: bytes, more: bytes | None) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.asked, self.says = False, (answer, more)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self.listener.accept()
                threading.Thread(target=self.lie, args=(wire, *self.says), daemon=True).start()

    def lie(self, wire: socket.socket, answer: bytes, more: bytes | None) -> None:
        with wire, contextlib.suppress(OSError):
            self.asked = bool(wire.recv(1 << 20)) or self.asked
            wire.sendall(answer)
            while more:
                wire.sendall(more)
            while more == b"" and wire.recv(1 << 20):
                pass

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake accept()
        self.listener.close()


HOSTILE = {  # what is said once, and what is repeated for ever; None: closed, empty: silence
    "nothing": (b"", None),
    "noise": (random.Random(1).randbytes(50_000), None),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", None),
    "a negative length": (b"HTTP/1.1 201 Created\r\nContent-Length: -1\r\n\r\n", None),
    "two lengths": (
        b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n" + CHUNKED.encode() + b"\r\n0\r\n\r\n",
        None,
    ),
    "an unknown coding": (b"HTTP/1.1 201 Created\r\nTransfer-Encoding: gzip\r\n\r\n", None),
    "bad chunks": (b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\nxyz\r\n", None),
    "a bare LF": (b"HTTP/1.1 201 Created\nContent-Length: 0\n\n", None),
    "half a head": (b"HTTP/1.1 201 Created\r\nContent-Le", None),
    "an unheard-of status": (b"HTTP/1.1 999 Created\r\nContent-Length: 0\r\n\r\n", None),
    "too many fields": (b"HTTP/1.1 201 Created\r\n" + b"X: y\r\n" * 101 + b"\r\n", None),
    "endless head": (b"HTTP/1.1 201 Created\r\n", b"X: y\r\n" * 1000),
    "endless line": (b"HTTP/1.1 201 Created\r\nX: ", b"y" * 10_000),
    "endless chunk extension": (
        b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\n5;",
        b"x" * 10_000,
    ),
    "endless body": (
        b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\n",
        b"5\r\nabcde\r\n" * 1000,
    ),
    "endless trailers": (
        b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\n0\r\n",
        b"X: y\r\n" * 1000,
    ),
    "endless interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless silence": (b"", b""),
}


def test_a_volume_of_an_impossible_name_is_a_503_and_no_harm_else(tmp_path: Path) -> None:
    flags = ("-volumes", f"a..b:1,{'c' * 64}.d:1,127.0.0.1:1", "-replicas", "3")
    server = Server(tmp_path / "index", *free_ports(1), *flags, "-voltimeout", "300ms")
    try:
        assert [server.put("/k", bytes(size)) for size in (9, 300_000, 9)] == [503, 503, 503]
        assert server.call("GET", "/k").status == 404
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_volume_is_a_503_and_no_harm_else(tmp_path: Path, name: str) -> None:
    liar = Liar(*HOSTILE[name])
    with opened(tmp_path / "index") as index:
        asyncio.run(write(index, b"/named", liar.name))
    flags = ("-volumes", liar.name, "-replicas", "1", "-subvolumes", "1", "-voltimeout", "100ms")
    server = Server(tmp_path / "index", *free_ports(1), *flags)
    try:
        with ThreadPoolExecutor() as pool:
            puts = {size: pool.submit(server.put, f"/{size}", bytes(size)) for size in (9, 300_000)}
            assert server.call("GET", "/?health").status == 200  # it does not stop for this
        assert {size: each.result() for size, each in puts.items()} == {9: 503, 300_000: 503}
        assert liar.asked
        assert server.call("GET", "/9").status == server.call("GET", "/300000").status == 404
        assert server.call("GET", "/named").status in (302, 503)  # the index knows of it
        assert server.call("DELETE", "/named").status == 204
        assert server.call("GET", "/named").status == 404
        assert server.memory() < 100_000_000
        assert server.stop() == 0
        assert b"Traceback" not in server.log.read_bytes()
    finally:
        server.kill()
        liar.close()


ROTTEN = """
async def rotten(self, location, path, read=mkv.Volumes.read):
    async for piece in read(self, location, path):
        yield {}

mkv.Volumes.read = rotten
"""


@pytest.mark.parametrize(
    ("size", "piece"),
    [
        (1000, "piece[:-1] + b'?'"),
        (200_000, "piece[:-1] + b'?'"),
        (1000, "piece + b'?'"),
        (1000, "piece[1:]"),
    ],
)
def test_a_stand_in_gets_the_bytes_that_were_put_or_is_none(
    cluster: Callable[..., Cluster], size: int, piece: str
) -> None:
    value = random.Random(size).randbytes(size)
    assert value[-1:] != b"?"
    system = cluster("-replicas", "2", preamble=ROTTEN.format(piece))
    ill = volume_at(system, ideal(system, "/copied")[0])
    ill.kill()
    assert system.server.put("/copied", value) == 503  # its source gives something else
    assert system.server.get("/copied") is None
    ill.start()
    until(system.is_clean)
    assert not system.files()


# --- uploads --------------------------------------------------------------------------------------


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


def replicas_of(system: Cluster, key: bytes) -> list[str]:
    """The URLs of all files of a key."""
    replicas = system.tables()[0][key].replicas
    return [f"http://{r.location}{mkv.key2path(key, r.write_id)}" for r in replicas]


def test_uploads_stream_in_little_memory_and_all_replicas_are_identical(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster("-voltimeout", "3s")  # disks stall
    large = Value(0, 256 << 20)
    assert upload(system.server, "/large", large) == 201
    several = [Value(seed, (64 << 20) + seed - 4) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        puts = [
            pool.submit(upload, system.server, f"/{seed}", value, chunked=seed % 2 == 1)
            for seed, value in enumerate(several)
        ]
        assert [put.result() for put in puts] == [201] * 8
    assert system.server.memory() < 96 << 20
    for url in replicas_of(system, b"/large"):
        assert sha256(download(url)) == large.sha256()
    for seed, value in enumerate(several):
        urls = replicas_of(system, b"/%d" % seed)
        assert len(urls) == 3
        assert sha256(download(urls[seed % 3])) == value.sha256()
        assert system.tables()[0][b"/%d" % seed].size == value.size
    until(system.is_clean)


def test_values_of_every_size_around_the_limits_survive(system: Cluster) -> None:
    for size in (1, 2, 65_535, 65_536, 65_537, 262_143, 262_145, (1 << 20) + 1, 5_000_000):
        value = Value(size, size)
        for chunked in (False, True):
            path = f"/size/{size}/{chunked}"
            assert upload(system.server, path, value, chunked) == 201
            assert hashlib.sha256(system.server.get(path)).hexdigest() == value.sha256()
            assert (
                system.tables()[0][path.encode()].hash == hashlib.md5(b"".join(value)).hexdigest()
            )


def test_small_and_large_uploads_do_not_get_in_each_others_way(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster("-voltimeout", "1s")

    def put(number: int) -> int:
        return system.server.put(f"/{number}", b"x" * (1000 if number % 4 else 100_000))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(put, range(1200))) == [201] * 1200
    until(system.is_clean)
    assert "is down" not in system.server.log.read_text()


def assert_failed_cleanly(system: Cluster, key: str) -> None:
    """Nothing of a key is left, and it is free again at once."""
    assert system.server.get(key) is None
    assert system.server.put(key, b"value") == 201
    assert system.server.get(key) == b"value"
    assert system.server.call("DELETE", key).status == 204
    until(system.journal_is_empty)
    assert system.files() == system.named()


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_wrong_md5_leaves_nothing(system: Cluster, size: int) -> None:
    answer = system.server.call("PUT", "/wrong", b"x" * size, Content_MD5="0" * 32)
    assert answer.status == 400
    assert hashlib.md5(b"x" * size).hexdigest().encode() in answer.body
    assert_failed_cleanly(system, "/wrong")


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_body_that_becomes_nonsense_leaves_nothing(system: Cluster, size: int) -> None:
    body = b"%x\r\n%b\r\nnonsense\r\n" % (size, b"x" * size)
    answer = raw(system.server.port, request("PUT", "/nonsense", b"", CHUNKED) + body)
    assert statuses(answer) == [400]
    assert_failed_cleanly(system, "/nonsense")


@pytest.mark.parametrize("size", [1000, 3_000_000])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_leaves_nothing(system: Cluster, size: int, reset: bool) -> None:
    length = f"Content-Length: {size + 1}\r\nExpect: 100-continue\r\n"
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/gone", b"", length))
        assert wire.head()[0] == 100
        wire.send(b"x" * size)
        if reset:
            linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    until(lambda: not any(entry.owner for entry in system.tables()[1].values()))
    assert_failed_cleanly(system, "/gone")


@pytest.mark.parametrize("cut", [b"", b"5", b"5\r\n", b"5\r\nval", b"5\r\nvalue\r\n", b"0\r\n"])
def test_a_chunked_body_that_is_cut_short_by_a_half_close_is_400(
    system: Cluster, cut: bytes
) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/cut", b"", CHUNKED) + cut)
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.answer().status == 400
        assert wire.closed()
    assert_failed_cleanly(system, "/cut")


def test_a_client_that_half_closes_too_early_reads_400(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/half", b"", "Content-Length: 10\r\n") + b"value")
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.answer().status == 400
    assert_failed_cleanly(system, "/half")


def test_a_client_that_half_closes_after_its_request_reads_the_answer(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/whole", b"value"))
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.answer().status == 201
        assert wire.closed()


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_replica_that_refuses_leaves_no_file_on_the_others(
    cluster: Callable[..., Cluster], size: int
) -> None:
    system = cluster()
    location = mkv.key2volume(b"/refused", [volume.name for volume in system.volumes], 3, 10)[1]
    (volume,) = [each for each in system.volumes if each.name == location.partition("/")[0]]
    # A file where a folder is needed: nginx cannot write there, not even as root.
    obstacle = volume.folder / location.partition("/")[2] / mkv.key2path(b"/refused")[1:3]
    obstacle.write_bytes(b"")
    for attempt in range(3):
        answer = system.server.call("PUT", "/refused", b"x" * size)
        assert answer.status in (500, 503), attempt  # never 409: the key is free at once
        assert answer.body.strip()
    assert system.server.get("/refused") is None
    until(lambda: len(system.files()) == 1)  # the obstacle
    obstacle.unlink()
    until(system.journal_is_empty)
    assert system.files() == set()
    until(lambda: system.server.put("/refused", b"x" * size) == 201)
    assert system.server.get("/refused") == b"x" * size
    until(system.is_clean)


def test_a_put_without_enough_volumes_is_503_and_leaves_nothing(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster()
    system.volumes[0].kill()
    for size in (1000, 3_000_000):
        answer = system.server.call("PUT", "/few", b"x" * size)
        assert answer.status == 503 and answer.body.strip()
    assert system.server.get("/few") is None
    system.volumes[0].start()
    until(lambda: system.server.put("/few", b"value") == 201)
    until(system.is_clean)


# A task is cancelled right after it has queued an operation for a key: at its next await.
CANCEL = """
import asyncio
do, done = mkv.Index.do, []
def do_and_cancel(self, operation, key, *args):
    future = do(self, operation, key, *args)
    if operation is mkv.Row.{operation} and key == b"/cancelled" and not done:
        done.append(asyncio.current_task().cancel())
        print("cancelled", flush=True)
    return future
mkv.Index.do = do_and_cancel
"""


def test_a_task_cancelled_while_its_claim_is_queued_leaves_the_key_free(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster(preamble=CANCEL.format(operation="claim"))
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/cancelled", b"first"))
        until(lambda: "cancelled" in system.server.log.read_text())
        until(lambda: system.server.put("/cancelled", b"second") == 201)
        assert system.server.get("/cancelled") == b"second"
    until(system.is_clean)


def test_a_task_cancelled_while_its_commit_is_queued_deletes_no_committed_file(
    cluster: Callable[..., Cluster],
) -> None:
    system = cluster(preamble=CANCEL.format(operation="commit"))
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/cancelled", b"first"))
        until(lambda: "cancelled" in system.server.log.read_text())
        assert until(lambda: system.server.get("/cancelled")) == b"first"
    assert system.server.put("/cancelled", b"second") == 403
    until(system.is_clean)
    assert len(system.files()) == 3


# --- volume.sh ------------------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """One volume without a server."""
    started = Volume(tmp_path / "volume", *free_ports(1))
    yield started
    started.kill()


def run_volume_sh(*args: str | Path, script: Path = HERE / "volume.sh", **env: str) -> str:
    """What volume.sh says when it does not start: one line."""
    ended = subprocess.run(
        [script, *args], env=os.environ | env, capture_output=True, text=True, timeout=20
    )
    assert ended.returncode == 2, ended
    assert ended.stdout == "" and ended.stderr.count("\n") == 1, ended
    return ended.stderr


def group_is_gone(group: int) -> bool:
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_delete_of_a_folder_is_refused(volume: Volume) -> None:
    for path in ("/sv00/aa/bb/file", "/sv00/aa/bb/sub/file", "/aa/bb/file"):
        assert call(volume.port, "PUT", path, b"value").status == 201
    before = volume.files()
    assert len(before) == 3
    paths = "/ /sv00/ /sv00/aa/ /sv00/aa/bb/ /sv00/aa/bb/sub/ /aa/bb/ /sv00/aa/. /sv00/aa/bb/x/.. "
    paths += "/sv00 /sv00/aa /sv00/aa/bb /aa //sv00//aa// /sv00/aa/%2e /sv00/aa%2f /sv00/aa/bb/?x"
    for path in paths.split():
        for depth in ("infinity", "0"):
            answer = call(volume.port, "DELETE", path, None, {"Depth": depth})
            assert answer.status in (403, 409), path
    assert call(volume.port, "PUT", "/sv00/aa/new/", b"value").status in (403, 409)
    for method in ("MKCOL", "MOVE", "COPY", "POST"):
        moved = {"Destination": "/sv00/aa/moved"}
        assert call(volume.port, method, "/sv00/aa/bb/", None, moved).status in (403, 405), method
    assert volume.files() == before
    assert call(volume.port, "DELETE", "/sv00/aa/bb/file").status == 204
    assert call(volume.port, "DELETE", "/sv00/aa/bb/file").status == 404


def test_a_folder_has_one_volume(volume: Volume) -> None:
    other = str(free_ports(1)[0])
    assert str(volume.folder) in run_volume_sh(volume.folder, PORT=other)
    assert call(volume.port, "PUT", "/sv00/aa/bb/file", b"value").status == 201
    volume.kill()
    volume.start()
    assert call(volume.port, "GET", "/sv00/aa/bb/file").body == b"value"


def test_dot_paths_are_refused(volume: Volume) -> None:
    (volume.folder / "sv00/.tmp/half").write_bytes(b"half-written")
    (volume.folder / ".tmp/half").write_bytes(b"half-written")
    paths = "/.nginx/nginx.conf /.nginx/pid /.nginx/ /.tmp/ /.tmp/half /sv00/.tmp/ /sv00/.tmp/half"
    paths += " /%2enginx/nginx.conf /sv00/aa/../.tmp/half /sv00/%2Etmp/half //.nginx/pid /.x"
    for path in paths.split():
        for method in ("GET", "HEAD", "PUT", "DELETE"):
            body = b"value" if method == "PUT" else None
            assert call(volume.port, method, path, body).status == 403, (method, path)
    assert (volume.folder / "sv00/.tmp/half").read_bytes() == b"half-written"
    assert not (volume.folder / ".x").exists()
    entries = json.loads(call(volume.port, "GET", "/").body)
    assert not [entry["name"] for entry in entries if entry["name"].startswith(".")]


def test_a_missing_drive_is_503_and_the_others_are_up(tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "sv03").write_bytes(b"no folder")
    (folder / "sv04").symlink_to(tmp_path / "nowhere/at/all")
    volume = Volume(folder, *free_ports(1))
    try:
        for subvolume in ("sv03", "sv04"):
            for method, path in (("GET", "/aa/bb/x"), ("PUT", "/aa/bb/x"), ("DELETE", "/aa/bb/x")):
                body = b"x" if method == "PUT" else None
                assert call(volume.port, method, f"/{subvolume}{path}", body).status == 503
            assert call(volume.port, "GET", f"/{subvolume}/").status == 503
        assert call(volume.port, "PUT", "/sv05/aa/bb/x", b"x").status == 201
        assert call(volume.port, "GET", "/sv05/aa/bb/y").status == 404
    finally:
        volume.kill()


def test_a_drive_that_vanished_is_503_not_404(volume: Volume) -> None:
    assert call(volume.port, "PUT", "/sv03/aa/bb/x", b"x").status == 201
    (volume.folder / "sv03").rename(volume.folder / "gone")
    (volume.folder / "sv03").mkdir()  # the empty folder that a drive was mounted on
    for method in ("GET", "HEAD", "DELETE", "PUT"):
        body = b"x" if method == "PUT" else None
        assert call(volume.port, method, "/sv03/aa/bb/x", body).status == 503, method
    assert call(volume.port, "GET", "/sv03/").status == 503
    assert call(volume.port, "PUT", "/sv02/aa/bb/x", b"x").status == 201
    (volume.folder / "sv03").rmdir()
    assert call(volume.port, "GET", "/sv03/aa/bb/x").status == 503
    (volume.folder / "gone").rename(volume.folder / "sv03")
    assert call(volume.port, "GET", "/sv03/aa/bb/x").body == b"x"


def test_a_folder_that_vanished_is_503_without_subvolumes_too(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "volume", *free_ports(1), subvolumes=1)
    try:
        assert call(volume.port, "PUT", "/aa/bb/x", b"x").status == 201
        volume.folder.rename(tmp_path / "gone")
        for method in ("GET", "PUT", "DELETE"):
            body = b"x" if method == "PUT" else None
            assert call(volume.port, method, "/aa/bb/x", body).status == 503, method
        assert call(volume.port, "GET", "/").status == 503
    finally:
        (tmp_path / "gone").rename(volume.folder)
        volume.kill()


def test_uploads_wait_on_the_drive_they_are_for_and_leave_nothing_when_cut_short(
    volume: Volume,
) -> None:
    waiting = volume.folder / "sv07/.tmp"
    with Wire(volume.port) as wire:
        wire.send(request("PUT", "/sv07/aa/bb/x", b"", "Content-Length: 9000000\r\n"))
        wire.send(b"x" * 1_000_000)
        until(lambda: any(waiting.iterdir()))
    until(lambda: not any(waiting.iterdir()))
    assert volume.files() == set()


def test_what_a_killed_nginx_was_writing_is_removed_at_the_next_start(volume: Volume) -> None:
    assert call(volume.port, "PUT", "/sv07/aa/bb/kept", b"value").status == 201
    with Wire(volume.port) as wire:
        wire.send(request("PUT", "/sv07/aa/bb/x", b"", "Content-Length: 9000000\r\n"))
        wire.send(b"x" * 1_000_000)
        until(lambda: any((volume.folder / "sv07/.tmp").iterdir()))
        volume.kill()
    assert any((volume.folder / "sv07/.tmp").iterdir())
    volume.start()
    assert not any((volume.folder / "sv07/.tmp").iterdir())
    assert call(volume.port, "GET", "/sv07/aa/bb/kept").body == b"value"


def test_a_volume_keeps_connections_for_thousands_of_requests(volume: Volume) -> None:
    with Wire(volume.port) as wire:
        for _ in range(1500):  # nginx ends them after 1000, unless told
            wire.send(request("GET", "/sv00/aa/bb/x"))
            assert wire.answer().status == 404


def test_volume_sh_says_what_is_wrong(tmp_path: Path) -> None:
    assert "usage" in run_volume_sh()
    assert "usage" in run_volume_sh(tmp_path / "a", tmp_path / "b")
    for number in ("0", "257", "-1", "x", "1.5", "10 10"):
        assert "SUBVOLUMES" in run_volume_sh(tmp_path / "volume", SUBVOLUMES=number)
    for port in ("0", "65536", "x"):
        assert "PORT" in run_volume_sh(tmp_path / "volume", PORT=port)
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in run_volume_sh(tmp_path / "file", PORT=str(free_ports(1)[0]))


def test_volume_sh_says_that_the_port_is_taken(volume: Volume, tmp_path: Path) -> None:
    port = str(volume.port)
    assert port in run_volume_sh(tmp_path / "other", PORT=port, HOST="127.0.0.1")
    assert port in run_volume_sh(tmp_path / "other", PORT=port)


def without_nginx(folder: Path) -> dict[str, str]:
    """The project's files in a folder, and an environment for them in which nginx is not found."""
    for name in ("mkv.py", "volume.sh", "nginx.conf.tmpl"):
        text = (HERE / name).read_text().replace("/usr/sbin", "/nowhere")
        (folder / name).write_text(text.replace("/usr/local/sbin", "/nowhere"))
        (folder / name).chmod(0o755)
    tools = folder / "tools"
    tools.mkdir()
    for name in (
        "bash",
        "cat",
        "sleep",
        "setpriv",
        "flock",
        "dirname",
        "readlink",
        "mkdir",
        "stat",
        "id",
        "chown",
        "rm",
        "sed",
        "grep",
    ):
        (tools / name).symlink_to(shutil.which(name))
    return {"PATH": str(tools)}


def test_volume_sh_says_that_nginx_is_missing(tmp_path: Path) -> None:
    env = without_nginx(tmp_path)
    said = run_volume_sh(tmp_path / "volume", script=tmp_path / "volume.sh", **env)
    assert "nginx is not installed" in said


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


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be others")


@pytest.mark.parametrize("user", [None, pytest.param("nobody", marks=needs_root)])
def test_a_volume_works_for_any_user_and_leaves_no_process_behind(user: str | None) -> None:
    with foreign_folder() if user else tempfile.TemporaryDirectory() as base:
        folder, (port,) = Path(base), free_ports(1)
        for name in ("volume.sh", "nginx.conf.tmpl"):
            shutil.copy(HERE / name, folder / name)
        env = os.environ | {"PORT": str(port), "HOST": "127.0.0.1"}
        command = [folder / "volume.sh", folder / "volume"]
        who = {"user": user, "group": "nogroup", "extra_groups": ()} if user else {}
        with subprocess.Popen(command, env=env, start_new_session=True, **who) as process:
            until(lambda: accepts(port))
            assert call(port, "PUT", "/sv00/aa/bb/x", b"value").status == 201
            assert call(port, "PUT", "/sv01/aa/bb/x", b"x" * 1_000_000).status == 201
            assert call(port, "GET", "/sv00/aa/bb/x").body == b"value"
            assert call(port, "DELETE", "/sv00/aa/bb/x").status == 204
            process.terminate()
            assert process.wait(20) == 0
        assert group_is_gone(process.pid)
        assert not accepts(port)
        assert {path.owner() for path in (folder / "volume").rglob("*")} == {folder.owner()}


@needs_root
def test_the_workers_of_a_volume_started_by_root_are_its_owner() -> None:
    with foreign_folder() as folder:
        volume = Volume(folder, *free_ports(1))
        try:
            assert call(volume.port, "PUT", "/sv00/aa/bb/x", b"x" * 1_000_000).status == 201
            workers = until(volume.workers)
            assert {Path(f"/proc/{pid}").owner() for pid in workers} == {"nobody"}
            files = [folder / "sv00/aa", folder / "sv00/aa/bb", folder / "sv00/aa/bb/x"]
            assert {path.owner() for path in files} == {"nobody"}
            assert not [path for path in files if path.stat().st_mode & stat.S_IWOTH]
        finally:
            volume.kill()


def call_from(source: str, port: int, method: str, path: str, **fields: str) -> int:
    """The status of a request that comes from another address of this machine."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(source, 0))
    with contextlib.closing(wire):
        wire.request(method, path, b"new" if method == "PUT" else None, headers=fields)
        return wire.getresponse().status


def test_allow_limits_put_and_delete_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALLOW", "127.0.0.5 127.0.1.0/24 ::1")
    volume, file = Volume(tmp_path / "volume", *free_ports(1)), "/sv00/aa/bb/file"
    forged = {"X-Forwarded-For": "127.0.0.5", "X-Real-IP": "127.0.0.5"}
    try:
        for source in ("127.0.0.5", "127.0.1.7"):
            ask = functools.partial(call_from, source, volume.port)
            assert [ask("PUT", file), ask("DELETE", file), ask("DELETE", file)] == [201, 204, 404]
            assert [ask("DELETE", "/sv00/aa/"), ask("PUT", "/sv00/.tmp/x")] == [403, 403]
        assert ask("PUT", file) == 201
        before = volume.files()
        for source in ("127.0.0.1", "127.0.0.6", "127.0.2.7"):
            ask = functools.partial(call_from, source, volume.port, **forged)
            for path in (file, "/sv00/aa/bb/new", "/sv00/aa/"):
                assert [ask("PUT", path), ask("DELETE", path)] == [403, 403]
            assert [ask("GET", file), ask("HEAD", file), ask("GET", "/sv00/aa/")] == [200] * 3
            assert [ask("GET", "/sv00/none"), ask("GET", "/.nginx/pid")] == [404, 403]
            assert ask("MKCOL", file) == 405
        (volume.folder / "sv00/.tmp").rename(volume.folder / "sv00/away")
        assert [ask("PUT", file), ask("GET", file)] == [503, 503]  # a drive that vanished
        (volume.folder / "sv00/away").rename(volume.folder / "sv00/.tmp")
        assert volume.files() == before
    finally:
        volume.kill()


@pytest.mark.parametrize(
    "allow", ["10.0.0.5,10.0.0.6", "a", "10.0.0.5; deny all", "*", "10.0.0.0/x", "é", "1.2.3.4}"]
)
def test_volume_sh_takes_only_addresses_for_allow(tmp_path: Path, allow: str) -> None:
    assert "ALLOW" in run_volume_sh(tmp_path / "volume", ALLOW=allow)
    assert not (tmp_path / "volume").exists()


# --- the command line -----------------------------------------------------------------------------


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def error_of(*args: str | Path, folder: Path, **options: Any) -> str:
    """What `mkv.py` says before it ends with exit code 2: one line."""
    command = [sys.executable, options.pop("script", HERE / "mkv.py"), *args]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, **options)
    try:
        out, said = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: volumes of its own would stay
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, ""), (out, said)
    assert said.count("\n") == 1, said
    return said


ONE = ("-volumes", "127.0.0.1:1", "-replicas", "1", "-bind", "127.0.0.1")


def test_mistakes_in_the_flags_take_one_line(tmp_path: Path) -> None:
    says = functools.partial(error_of, folder=tmp_path)
    assert "-nonsense" in says("server", "-nonsense")
    assert "--nonsense" in says("--nonsense", "server")
    for wrong in ("1x", "x", "", "1", "-1s", "1s2", "1 s"):
        assert "voltimeout" in says("server", *ONE, f"-voltimeout={wrong}")
    for wrong in ("maybe", "7", "True", ""):
        assert "md5sum" in says("server", f"-md5sum={wrong}")
    for wrong in ("http://a:80/", "a", "a:80/b", "a:80\r\n"):
        assert "fallback" in says("server", *ONE, f"-fallback={wrong}")
    assert "volumes" in says("server", "-volumes", "nonsense")
    assert "volumes" in says("server", "-volumes", "a:1,a:1", "-replicas", "1")
    assert "port" in says("server", *ONE, "-port", "70000")
    assert "port" in says("server", *ONE, "-port", "x")
    assert "subvolumes" in says("server", *ONE, "-subvolumes", "257")
    assert "nonsense" in says("nonsense")
    assert says()
    assert not any(tmp_path.iterdir())


def test_an_ipv6_address_is_written_as_in_a_url(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("there is no IPv6")
        port = probe.getsockname()[1]
    flags = "-volumes", "127.0.0.1:1", "-replicas", "1", "-bind", "[::1]", "-port", str(port)
    command = [sys.executable, HERE / "mkv.py", "server", *flags]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[3].rstrip(",")
            assert url == f"http://[::1]:{port}"
            with urllib.request.urlopen(f"{url}/?health", timeout=30) as answer:
                assert answer.read() == b"ok\n"
        finally:
            process.terminate()


def test_bytes_that_are_no_utf_8_are_taken_in_a_password(cluster: Callable[..., Cluster]) -> None:
    preamble = "sys.argv += ['-userpass', 'admin:' + chr(0xDCFF)]"
    assert cluster(preamble=preamble).server.put("/k", b"value") == 201


def test_fewer_volumes_than_replicas_take_one_line(tmp_path: Path) -> None:
    assert "replicas" in error_of("server", "-volumes", "a:1,b:2", folder=tmp_path)
    assert "replicas" in error_of("-replicas=2", "-volumes", "a:1", "server", folder=tmp_path)


def test_a_port_in_use_takes_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert port in error_of("server", *ONE, "-port", port, "-db", "index", folder=tmp_path)


def test_a_port_is_not_shared_with_a_server_of_another_index(
    cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    system = cluster("-replicas", "1", volumes=1)
    port = str(system.server.port)
    assert port in error_of("server", *ONE, "-port", port, "-db", "other", folder=tmp_path)


def test_an_unreadable_db_takes_one_line(tmp_path: Path) -> None:
    says = functools.partial(error_of, "server", *ONE, folder=tmp_path)
    port = str(free_ports(1)[0])
    (tmp_path / "file").write_bytes(b"no folder")
    assert "file" in says("-port", port, "-db", "file")
    assert "file" in says("-port", port, "-db", "file/index")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/data.mdb").write_bytes(b"no database" * 1000)
    assert "broken" in says("-port", port, "-db", "broken")


def test_too_little_address_space_takes_one_line(tmp_path: Path) -> None:
    said = error_of(
        *("server", *ONE, "-port", str(free_ports(1)[0]), "-db", "index"),
        folder=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )
    assert "Cannot allocate memory" in said and "index" in said


def descendants(pid: int) -> set[int]:
    """The processes under a process."""
    found, parents = set(), {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


DEMO_PORTS = (3000, 3001, 3002, 3003)


def demo_ports_are_free() -> bool:
    return not any(map(accepts, DEMO_PORTS))


@contextlib.contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen]:
    """`mkv.py server` without any flag, once it answers."""
    until(demo_ports_are_free, 60)
    with (folder / "out").open("wb") as out:
        command = [sys.executable, HERE / "mkv.py", "server"]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:

        def ready() -> bool:
            assert process.poll() is None, (folder / "out").read_text()
            return accepts(3000) and "curl" in (folder / "out").read_text()

        until(ready)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def test_the_demo_prints_three_curl_lines_that_work(tmp_path: Path) -> None:
    with demo(tmp_path):
        until(lambda: (tmp_path / "out").read_text().count("curl") >= 3)
        text = (tmp_path / "out").read_text()
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("curl ")]
        assert len(lines) == 3
        if not shutil.which("curl"):
            pytest.skip("curl is not installed")
        for line in lines:
            command = ["bash", "-c", line.replace("curl ", "curl -sS --fail ", 1)]
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=30, cwd=tmp_path
            )
            assert ended.returncode == 0 and ended.stderr == "", (line, ended)
    assert (tmp_path / "mkv-data").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_demo_stops_everything(tmp_path: Path, number: int) -> None:
    with demo(tmp_path) as process:
        assert all(map(accepts, DEMO_PORTS))
        assert call(3000, "PUT", "/wehave", b"bigswag").status == 201
        assert call(3000, "GET", "/wehave").status == 302
        family = descendants(process.pid)
        assert len(family) >= 6  # three masters, each with a worker
        process.send_signal(number)
        assert process.wait(30) == 0
        assert not any(map(accepts, DEMO_PORTS))
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    with demo(tmp_path):  # what was stored is there the next time
        assert until(lambda: call(3000, "GET", "/wehave").status == 302)


def test_when_the_demo_is_killed_its_volumes_go_too(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        family = descendants(process.pid)
        assert call(3000, "PUT", "/wehave", b"bigswag").status == 201
        process.kill()
        process.wait(30)
        until(lambda: all(map(ended, family)))
    with demo(tmp_path):
        assert until(lambda: call(3000, "GET", "/wehave").status == 302)


@pytest.mark.parametrize("port", DEMO_PORTS)
def test_the_demo_says_in_one_line_that_a_port_is_taken(tmp_path: Path, port: int) -> None:
    until(demo_ports_are_free, 60)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        assert str(port) in error_of("server", folder=tmp_path)
    assert demo_ports_are_free()


def test_the_demo_says_in_one_line_that_nginx_is_missing(tmp_path: Path) -> None:
    until(demo_ports_are_free, 60)
    env = os.environ | without_nginx(tmp_path)
    said = error_of("server", folder=tmp_path, script=tmp_path / "mkv.py", env=env)
    assert "nginx is not installed" in said


# --- the main job ---------------------------------------------------------------------------------


def test_all_documents_and_python_modules_are_stored_listed_read_and_deleted(
    cluster: Callable[..., Cluster],
) -> None:
    roots = (Path("/usr/share/doc"), Path("/usr/lib/python3"))
    paths = [path for root in roots for path in root.rglob("*") if not path.is_symlink()]
    paths = [path for path in paths if path.is_file() and path.stat().st_size]
    assert len(paths) > 100
    system = cluster("-voltimeout", "3s")  # disks stall
    kept = threading.local()

    def ask(port: int, method: str, path: str, body: bytes | None = None) -> Reply:
        """A request on a connection that each thread keeps."""
        connections = kept.__dict__.setdefault("connections", {})
        if port not in connections:
            connections[port] = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connections[port].connect()
            connections[port].sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[port].request(method, path, body)
        answer = connections[port].getresponse()
        return Reply(answer.status, dict(answer.getheaders()), answer.read())

    def store(path: Path) -> int:
        return ask(system.server.port, "PUT", quote(bytes(path)), path.read_bytes()).status

    def survives(path: Path) -> bool:
        location = ask(system.server.port, "GET", quote(bytes(path))).fields["Location"]
        port, _, target = location.removeprefix("http://127.0.0.1:").partition("/")
        value = ask(int(port), "GET", "/" + target)
        assert value.status == 200
        return hashlib.sha256(value.body).digest() == hashlib.sha256(path.read_bytes()).digest()

    def delete(path: Path) -> int:
        return ask(system.server.port, "DELETE", quote(bytes(path))).status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(store, paths)) == {201}
        assert listed(system.server, "/?list")[0] == sorted(map(str, paths), key=str.encode)
        assert len(system.files()) == 3 * len(paths)
        assert all(pool.map(survives, paths))
        assert set(pool.map(delete, paths)) == {204}
    assert listed(system.server, "/?list")[0] == []
    until(system.journal_is_empty)
    assert system.files() == set()


# --- harness --------------------------------------------------------------------------------------


MB = 1 << 20


Make = Callable[..., Cluster]


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
    key, record = path.encode(), system.tables()[0][path.encode()]
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


def descriptors(server: Server) -> int:
    """How many files and sockets a server has open."""
    return open_files(server.process.pid)


def open_files(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def cpu(server: Server) -> float:
    """Seconds of CPU time that a server has used."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def owned(system: Cluster) -> int:
    """How many claims there are."""
    return sum(bool(entry.owner) for entry in system.tables()[1].values())


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


# --- writes ---------------------------------------------------------------------------------------


def test_a_volume_dying_in_mid_upload_without_stand_in_leaves_nothing(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms")
    upload = Upload(system.server.port, "/big", 24 * MB)
    upload.send(blob("half", 6 * MB))
    temporary = drive_at(system, ideal(system, "/big")[0]) / ".tmp"
    until(lambda: any(f.stat().st_size > MB for f in temporary.rglob("*") if f.is_file()))
    bad = volume_at(system, ideal(system, "/big")[0])
    bad.kill()
    upload.send(blob("other half", 18 * MB))
    assert upload.answer() == 503
    assert system.server.get("/big") is None
    bad.start()
    until(lambda: system.server.put("/big", b"small now") == 201, 40)
    assert_copies(system, "/big", b"small now")
    until(system.is_clean, 40)


def test_uploads_do_not_pile_up_connections(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=2, subvolumes=1)
    server, value = system.server, blob("value", 100_000)
    assert server.put("/warm", value) == 201
    base = descriptors(server)
    for number in range(100):
        assert server.put(f"/k{number}", value) == 201
    assert descriptors(server) <= base + 40


def forget_connections(volume: Volume) -> None:
    """As after a power cut: new connections are served, on the old ones nothing comes any more."""
    old = volume.workers()
    for worker in old:
        os.kill(worker, signal.SIGSTOP)
    os.kill(volume.process.pid, signal.SIGHUP)  # more workers
    until(lambda: len(volume.workers()) > len(old))
    assert call(volume.port, "HEAD", "/").status == 200


def test_connections_that_died_in_silence_do_not_cost_one_timeout_each(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms", "-replicas", "1", volumes=1)
    server, (volume,) = system.server, system.volumes
    volume.freeze()
    base, paths = descriptors(server), [f"/k{number}" for number in range(20)]
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = pool.map(lambda path: server.put(path, b"value"), paths)
        until(lambda: descriptors(server) >= base + 30)  # each has its own to the volume
        volume.thaw()
        assert list(answers) == [201] * len(paths)
    forget_connections(volume)
    assert server.put("/lost", b"value") == 503
    until(lambda: server.put("/new", b"value") == 201, 5)


def test_uploads_of_all_sizes_at_a_time_do_not_disturb_each_other(cluster: Make) -> None:
    system = cluster("-voltimeout", "2s")
    clients = [Handed(system.server.port, number, fresh=False) for number in range(6)]
    try:
        until(lambda: all(c.wrong or c.rounds >= 50 for c in clients), 60)
    finally:
        for client in clients:
            client.enough.set()
        for client in clients:
            client.join()
    assert [client.wrong for client in clients] == [[]] * 6
    assert system.server.metric("mkv_volumes_up") == 3
    until(system.is_clean)


# --- reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ailments", [("dead", "dead"), ("frozen", "frozen"), ("dead", "frozen")])
def test_reads_with_all_volumes_but_one_dead_or_frozen(
    cluster: Make, mounts: Callable, ailments: tuple[str, str]
) -> None:
    system = cluster()
    values = {f"/k{n}": blob(f"{n}", 1000 + n) for n in range(30)}
    for path, value in values.items():
        assert system.server.put(path, value) == 201
        assert read(system.server, path) == value
    cures = [ail(ailment, system.volumes[n], mounts) for n, ailment in enumerate(ailments)]
    for path, value in values.items():
        assert read(system.server, path) == value
    restart(system)  # one that knows nothing of its volumes
    for path, value in values.items():
        assert read(system.server, path) == value
    assert read(system.server, "/no-such-key") is None
    for cure in cures:
        cure()


def half_closed(server: Server, volume: Volume) -> bool:
    """Whether the volume has ended every connection that the server keeps to it."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here, port = links(server.process.pid), f":{volume.port:04X}"
    states = {row[3] for row in rows if row[2].endswith(port) and f"socket:[{row[9]}]" in here}
    return states == {"08"}  # CLOSE_WAIT


def test_a_connection_that_a_volume_has_ended_is_not_taken_for_a_dead_volume(cluster: Make) -> None:
    system = cluster()
    for volume in system.volumes:
        config, old = volume.folder / ".nginx/nginx.conf", set(volume.workers())
        config.write_text(
            config.read_text().replace("keepalive_timeout 1h", "keepalive_timeout 1s")
        )
        volume.process.send_signal(signal.SIGHUP)
        until(lambda volume=volume, old=old: old.isdisjoint(volume.workers()))
    for number in range(3):
        assert system.server.put(f"/k{number}", b"value") == 201
        assert system.server.get(f"/k{number}") == b"value"
        until(lambda: all(half_closed(system.server, volume) for volume in system.volumes))
    assert system.server.call("DELETE", "/k0").status == 204
    assert "down" not in system.server.log.read_text()
    until(system.is_clean)


def test_a_frozen_volume_costs_one_timeout_and_not_one_per_request(cluster: Make) -> None:
    system = cluster("-voltimeout", "1s", "-replicas", "2", volumes=2, subvolumes=1)
    server, frozen = system.server, system.volumes[0]
    paths = [f"/k{n}" for n in range(50)]
    for path in paths:
        assert server.put(path, b"value") == 201
    frozen.freeze()
    client, times = Client(server.port), []

    def ask(path: str) -> str:
        began = time.monotonic()
        reply = client.call("GET", path)
        times.append(time.monotonic() - began)
        assert reply.status == 302
        return reply.fields["location"]

    chosen = itertools.cycle(paths)
    until(lambda: frozen.name not in [ask(next(chosen)) for _ in range(50)])
    until(lambda: ask(next(chosen)) and server.metric("mkv_volumes_up") == 1)
    assert all(frozen.name not in ask(path) for path in paths)
    assert len(times) >= 100
    assert len([seconds for seconds in times if seconds > 0.5]) <= 2
    restart(system)
    client, times = Client(server.port), []
    assert all(frozen.name not in ask(path) for path in paths)
    assert len([seconds for seconds in times if seconds > 0.5]) <= 2
    frozen.thaw()
    until(lambda: frozen.name in [volume_of(ask(p)[7:]) for p in paths], 40)


def test_without_voltimeout_a_removed_file_is_passed_over(cluster: Make) -> None:
    system = cluster("-voltimeout", "0", "-replicas", "2")
    server = system.server
    assert server.put("/k", b"value") == 201
    first, second = (drive_at(system, location) for location in copies(system, "/k"))
    for drive in (first, second):
        (file,) = [f for f in drive.rglob("*") if f.is_file() and ".nginx" not in f.parts]
        kept = file.rename(system.folder / "kept")
        assert [server.get("/k") for _ in range(30)] == [b"value"] * 30
        kept.rename(file)
    for drive in (first, second):
        (file,) = [f for f in drive.rglob("*") if f.is_file() and ".nginx" not in f.parts]
        file.unlink()
    assert server.call("GET", "/k").status == 404


@pytest.mark.parametrize("timeout", ["300ms", "0"])
def test_a_vanished_drive_is_passed_over_and_its_garbage_kept_on_the_list(
    cluster: Make, timeout: str
) -> None:
    system = cluster("-voltimeout", timeout, "-replicas", "2", volumes=3, subvolumes=3)
    server = system.server
    drive = ideal(system, "/kept", 2)[0]
    paths = [f"/k{n}" for n in range(200) if drive in ideal(system, f"/k{n}", 2)]
    for path in ["/kept", *paths]:
        assert server.put(path, path.encode()) == 201
    folder, away = drive_at(system, drive), system.folder / "away"
    folder.rename(away)
    assert read(server, "/kept") == b"/kept"

    def is_passed_over() -> bool:
        targets = [server.call("GET", path).fields.get("location", "") for path in paths]
        return not any(target.startswith(f"http://{drive}/") for target in targets)

    until(is_passed_over)
    holds(lambda: all(server.get(path) == path.encode() for path in ["/kept", *paths[:5]]), 1)
    for path in paths:
        assert server.call("DELETE", path).status == 204
        assert server.get(path) is None

    def listed() -> int:
        entries = system.tables()[1].values()
        return sum(r.location == drive for entry in entries for r in entry.replicas)

    until(lambda: len(system.files()) == 1)  # the other replica of /kept
    holds(lambda: listed() == len(paths), 1.5)  # several times -settle and -grace
    away.rename(folder)
    until(system.is_clean, 60)
    assert server.get("/kept") == b"/kept"
    assert len(system.files()) == 2


def block(drive: Path) -> None:
    """Leave no room for new folders on a drive: there are files of their names."""
    for number in range(256):
        with contextlib.suppress(FileExistsError):
            (drive / f"{number:02x}").touch(exist_ok=False)


def test_a_drive_that_takes_no_more_values_still_gives_those_it_has(cluster: Make) -> None:
    system = cluster("-voltimeout", "2s", "-replicas", "2", volumes=2, subvolumes=1)
    server, (full, other) = system.server, system.volumes
    assert server.put("/k", b"value") == 201
    block(full.folder)
    assert server.put("/more", b"value") == 503
    other.kill()
    reply = server.call("GET", "/k")
    assert reply.status == 302
    assert read(server, "/k") == b"value"


# --- deletes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ailment", ["dead", "frozen", "away"])
def test_delete_does_not_wait_for_volumes_that_are_down(
    cluster: Make, mounts: Callable, ailment: str
) -> None:
    system = cluster(subvolumes=1)
    server, bad = system.server, system.volumes[0]
    paths = [f"/k{n}" for n in range(12)]
    for path in paths:
        assert server.put(path, b"old") == 201
    cure = ail(ailment, bad, mounts)
    began = time.monotonic()
    for path in paths:
        assert server.call("DELETE", path).status == 204
        assert server.get(path) is None
    assert time.monotonic() - began < 8
    until(lambda: not (system.volumes[1].files() | system.volumes[2].files()))
    used = cpu(server)
    holds(lambda: len(system.tables()[1]) == len(paths), 1.5)
    assert cpu(server) - used < 1, "the sweeper does not loop"
    cure()
    until(system.is_clean, 60)
    assert not system.files()


def links(pid: int) -> set[str]:
    """What a process has open."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(file.readlink()))
    return found


def worker_of(volume: Volume, server: Server) -> int:
    """The nginx worker that has the server's only connection to a volume."""
    sockets = links(server.process.pid)
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here = f":{volume.port:04X}"
    mine = [row[1] for row in rows if row[2].endswith(here) and f"socket:[{row[9]}]" in sockets]
    (address,) = mine
    (inode,) = [row[9] for row in rows if row[2] == address and row[1].endswith(here)]
    (worker,) = [pid for pid in volume.workers() if f"socket:[{inode}]" in links(pid)]
    return worker


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


def one_worker_frozen(cluster: Make, *flags: str, volumes: int = 3) -> tuple[Cluster, Volume, int]:
    """A cluster, a volume, and that of its workers to which the server's next request will go."""
    system = cluster("-settle", "60s", *flags, volumes=volumes, subvolumes=1)
    volume = volume_at(system, ideal(system, "/k")[0])
    if len(volume.workers()) < 2:
        pytest.skip("needs two nginx workers: two processors")
    assert system.server.put("/k", b"old") == 201
    return system, volume, worker_of(volume, system.server)


def test_a_put_that_lands_after_the_server_was_killed_and_the_key_written_anew(
    cluster: Make,
) -> None:
    system, volume, worker = one_worker_frozen(cluster, "-voltimeout", "1s")
    server = system.server
    others = [v for v in system.volumes if v is not volume]
    assert server.call("DELETE", "/k").status == 204
    until(system.is_clean)
    with frozen(worker):
        thread = in_background(lambda: server.put("/k", b"late"))
        until(lambda: all(other.files() for other in others))
        restart(system)
        thread.join()
        assert not volume.files()
        until(lambda: server.put("/k", b"new") == 201)
        assert server.get("/k") == b"new"
        (new,) = volume.files()
        server.process.send_signal(signal.SIGSTOP)  # or the file may be swept before it is seen
    try:
        until(lambda: volume.files() > {new})  # the late PUT has landed
        assert copies(system, "/k")[volume.name] == b"new"
    finally:
        server.process.send_signal(signal.SIGCONT)
    until(system.is_clean, 40)
    assert volume.files() == {new}
    assert [server.get("/k") for _ in range(10)] == [b"new"] * 10
    assert_copies(system, "/k", b"new")


def test_a_delete_that_lands_after_the_server_was_killed_and_the_key_written_anew(
    cluster: Make,
) -> None:
    system, volume, worker = one_worker_frozen(cluster, "-voltimeout", "1s", "-grace", "1m")
    server, others = system.server, [v for v in system.volumes if v is not volume]
    (old,) = volume.files()
    with frozen(worker):
        thread = in_background(lambda: server.call("DELETE", "/k"))
        until(lambda: not any(other.files() for other in others))
        restart(system)
        thread.join()
        assert server.put("/k", b"new") == 201
        (new,) = volume.files() - {old}
    until(lambda: old not in volume.files())  # not by the sweeper: it leaves old files for a minute
    assert volume.files() == {new}
    assert [server.get("/k") for _ in range(10)] == [b"new"] * 10
    assert_copies(system, "/k", b"new")
    system.start(free_ports(1)[0])  # whose sweeper does not wait
    until(system.is_clean, 40)
    assert_copies(system, "/k", b"new")


# --- kill -9 --------------------------------------------------------------------------------------


class Load(threading.Thread):
    """A client that writes, reads and deletes keys of its own until its connection breaks."""

    SIZES = (10, 1000, 50_000, 200_000, 1_000_000)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.values: dict[str, bytes | None] = {f"/load{number}/{n}": None for n in range(8)}
        self.unsure: tuple[str, str, bytes] | None = None
        self.wrong: list[Any] = []
        self.done = 0

    def again(self, port: int, seed: int) -> "Load":
        """The same client, ready for another round."""
        fresh = Load(self.number)
        fresh.values, fresh.port, fresh.dice = self.values, port, random.Random(seed)
        fresh.start()
        return fresh

    def run(self) -> None:
        client = Client(self.port)
        try:
            while True:
                self.step(client)
        except OSError:
            pass

    def step(self, client: Client) -> None:
        path = self.dice.choice(list(self.values))
        old = self.values[path]
        if old is None:
            size = self.dice.choice(self.SIZES)
            new = blob(f"{path} {self.dice.random()}", size)
            self.unsure = ("PUT", path, new)
            status = client.call("PUT", path, new).status
            self.values[path] = new if status == 201 else None
            expected = 201
        elif self.dice.random() < 0.5:
            self.unsure = ("DELETE", path, old)
            status = client.call("DELETE", path).status
            self.values[path] = None if status == 204 else old
            expected = 204
        else:
            status, expected = client.call("GET", path).status, 302
        self.unsure = None
        self.done += 1
        if status != expected:
            self.wrong.append((path, status, expected))


def test_kill_9_under_load_loses_nothing_and_leaves_nothing(cluster: Make) -> None:
    system = cluster("-replicas", "2", subvolumes=2)
    server, dice, loads = system.server, random.Random(), [Load(n) for n in range(6)]
    broken = done = 0
    for turn in range(22):
        loads = [load.again(server.port, dice.getrandbits(64)) for load in loads]
        until(lambda loads=loads: sum(load.done for load in loads) > dice.randrange(60))
        server.kill()
        for load in loads:
            load.join()
            assert not load.wrong, (turn, load.wrong)
        done += sum(load.done for load in loads)
        server.start()
        client = Client(server.port)
        for load in loads:  # first of all: what was broken off can be written at once
            method, path, value = load.unsure or ("", "", b"")
            if method == "PUT":
                broken += 1
                if (found := read(server, path)) is None:
                    assert client.call("PUT", path, value).status == 201, (turn, path)
                else:
                    assert found == value, (turn, path)
                load.values[path] = value
            elif method == "DELETE":
                found = read(server, path)
                assert found in (None, value), (turn, path)
                load.values[path] = found
        for load in loads:
            for path, value in load.values.items():
                assert read(server, path) == value, (turn, path)
        until(system.is_clean)
    assert broken >= 10
    assert done >= 200


def test_after_kill_9_the_key_of_a_broken_off_put_can_be_written_at_once(cluster: Make) -> None:
    system = cluster("-grace", "1m", "-settle", "1h")
    server = system.server
    uploads = [Upload(server.port, f"/k{n}", 24 * MB) for n in range(3)]
    for upload in uploads:
        upload.send(blob("half", 4 * MB))
    until(lambda: len(system.tables()[1]) == len(uploads))
    assert server.put("/k0", b"is locked") == 409
    restart(system)
    assert [server.put(f"/k{n}", b"new") for n in range(3)] == [201] * 3
    for number in range(3):
        assert_copies(system, f"/k{number}", b"new")


def started(port: int) -> int:
    """How many sockets listen on a port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


# --- the index ------------------------------------------------------------------------------------


@pytest.fixture
def small_index(cluster: Make, mounts: Callable) -> tuple[Cluster, Server, Path, list[str]]:
    """A server whose -db is on a tmpfs that is full, the keys so far, and an upload in hand."""
    system = cluster("-replicas", "2", volumes=2, subvolumes=1)
    system.server.stop()
    folder = system.folder / "index"
    mounts(folder, "-t", "tmpfs", "-o", "size=600k", "none")
    system.server.start()
    upload = Upload(system.server.port, "/in-hand", MB)
    upload.send(b"not all of it")
    until(lambda: owned(system) == 1)
    paths, status = [], 201
    while status == 201:
        path = "/" + f"{len(paths)}-".ljust(400, "x")
        status = system.server.put(path, path.encode())
        paths.append(path)
        assert len(paths) < 3000
    assert status == 503
    return system, system.server, folder, paths, upload


def test_a_full_disk_under_the_index_answers_503_and_loses_nothing(small_index: tuple) -> None:
    system, server, folder, (*paths, refused), upload = small_index
    assert len(paths) > 20
    assert server.call("GET", "/?health").status == 200
    for path in paths:
        assert read(server, path) == path.encode()
    assert server.get(refused) is None
    upload.send(bytes(MB - len(b"not all of it")))
    status = upload.answer()
    assert status in (201, 503)  # a smaller change than a new key: there may be room for it
    assert (server.get("/in-hand") is not None) == (status == 201)
    shell("mount", "-o", "remount,size=16m", str(folder))
    until(lambda: server.put(refused, b"now there is room") == 201)
    if status == 503:
        until(lambda: server.put("/in-hand", b"now there is room") == 201)
    assert [server.call("DELETE", path).status for path in paths] == [204] * len(paths)
    until(system.is_clean, 40)
    assert len(system.files()) == 4
    assert server.get(refused) == b"now there is room"


def test_a_server_killed_on_a_full_disk_starts_again_with_all_it_acknowledged(
    small_index: tuple,
) -> None:
    system, server, folder, (*paths, refused), _ = small_index
    server.kill()
    shell("mount", "-o", "remount,size=16m", str(folder))
    server.start()
    for path in paths:
        assert read(server, path) == path.encode()
    assert server.put(refused, b"x") == 201
    assert server.put("/in-hand", b"x") == 201
    until(system.is_clean, 40)


def test_sigterm_ends_a_server_whose_index_cannot_be_written(small_index: tuple) -> None:
    _, server, _, _, upload = small_index
    upload.vanish()
    until(lambda: server.metric("mkv_connections") <= 1)
    assert server.stop() == 0


READER = """
import lmdb, sys, time
env = lmdb.open(sys.argv[1], readonly=True, max_dbs=2, map_size=1 << 40)
with env.begin() as txn:
    print("reading", flush=True)
    time.sleep(600)
"""


def test_a_killed_reader_does_not_let_the_index_grow_for_ever(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    server, path = system.server, system.folder / "index"

    def growth() -> int:
        """Bytes by which the file has grown after so many commits."""
        client, before = Client(server.port), (path / "data.mdb").stat().st_size
        for number in range(150):
            assert client.call("PUT", f"/k{number % 7}", b"x").status == 201
            assert client.call("DELETE", f"/k{number % 7}").status == 204
        return (path / "data.mdb").stat().st_size - before

    growth()
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout and reader.stdout.readline() == "reading\n"
        pinned = growth()
        assert pinned > 500_000, "a reader that lives pins pages"
    finally:
        reader.kill()
        reader.wait()
    growth()  # within which the sweeper notices
    assert growth() + growth() < pinned / 4


@pytest.mark.asyncio
async def test_what_the_journal_lists_is_not_kept_in_memory(tmp_path: Path) -> None:
    places = [f"v{number}:1" for number in range(900)]
    with opened(tmp_path / "index") as index:
        owner = new_owner(index)
        await index.do(mkv.Row.claim, b"/k", owner, places, time.time(), mkv.Record())
        tracemalloc.start()
        try:
            for place in places[:300]:  # each time the row is another
                files = index.look(b"/k").replicas
                await index.do(mkv.Row.settle, b"/k", "", [f for f in files if f[0] == place])
            assert len(index.look(b"/k").replicas) == 600
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 2 * MB
        finally:
            tracemalloc.stop()


def test_garbage_from_when_the_clock_was_wrong_is_swept(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"value") == 201
    assert server.stop() == 0
    with opened(system.folder / "index") as index, index.env.begin(write=True) as txn:
        year = time.time() + 366 * 24 * 3600
        index.change(txn, mkv.Row.remove, b"/k", (False, False), year)
    assert system.tables()[1][b"/k"].since == year
    server.start()
    until(system.is_clean)


@pytest.mark.asyncio
async def test_what_becomes_garbage_during_a_long_sweep_is_left_alone_for_grace(
    tmp_path: Path,
) -> None:
    asked, names = [], {"volumes": ("v:1",), "userpass": "", "grace": 0.3, "settle": 60.0}

    async def discard(key: bytes) -> None:
        owner = new_owner(index)
        await index.do(mkv.Row.claim, key, owner, ["v:1"], time.time(), mkv.Record())
        await index.do(mkv.Row.settle, key, owner, ())

    async def exchange(method: str, location: str, path: str, *_: str) -> AsyncIterator:
        for _ in range(2):  # it connects, and sends
            yield None
        asked.append(mkv.path2key(path)[0])
        if len(asked) == 1:
            while time.time() < began + 0.5:  # longer than grace
                await asyncio.sleep(0.01)
            await discard(b"/new")
        yield 204, 0

    with opened(tmp_path / "index") as index:
        store = mkv.Store(types.SimpleNamespace(**names, voltimeout=1.0, expiry=1), index)
        store.volumes.exchange = exchange
        old = [b"/k%02d" % number for number in range(20)]  # 16 are looked at together
        await asyncio.gather(*map(discard, old))
        until(lambda: time.time() - max(index.look(key).since for key in old) > 0.3)
        began = time.time()
        await store.sweep(thorough=True)
        assert sorted(asked) == old and index.look(b"/new").replicas


@pytest.mark.asyncio
async def test_what_an_index_that_cannot_be_written_refuses_leaves_nothing_to_do(
    tmp_path: Path,
) -> None:
    names = {"volumes": ("v:1",), "replicas": 1, "subvolumes": 1, "userpass": "", "grace": 1.0}
    with opened(tmp_path / "index") as index:
        store = mkv.Store(types.SimpleNamespace(**names, voltimeout=1.0), index)
        index.env.close()
        index.env = lmdb.open(str(tmp_path / "index"), max_dbs=2, readonly=True)
        index.keys, index.journal = index.env.open_db(b"keys"), index.env.open_db(b"journal")
        for _ in range(5):
            with pytest.raises(mkv.HTTPError) as refused:
                await store.put(b"/k", 1, "", letter(), mkv.Record(), [])
            assert refused.value.status == 503 and not index.kept


@pytest.mark.asyncio
async def test_a_thousand_leftovers_of_one_key_are_soon_swept(cluster: Make) -> None:
    system = cluster("-settle", "1s")
    assert system.server.stop() == 0
    places = [f"{v.name}/sv{n:02X}" for v in system.volumes for n in range(10)]
    with opened(system.folder / "index") as index:
        for _ in range(33):  # uploads that failed: whether their files are there nobody knows
            owner = new_owner(index)
            await index.do(mkv.Row.claim, b"/k", owner, places, time.time(), mkv.Record())
            await index.do(mkv.Row.settle, b"/k", owner, ())
    system.server.start()
    assert len(system.tables()[1][b"/k"].replicas) == 990
    until(system.is_clean, 15)
    assert system.server.put("/k", b"value") == 201


@pytest.mark.asyncio
async def test_a_key_with_much_garbage_is_swept_in_small_portions(tmp_path: Path) -> None:
    asked, most, at_once = set(), 0, 0

    async def exchange(method: str, location: str, *_: str) -> AsyncIterator:
        nonlocal most, at_once
        at_once += 1
        most = max(most, at_once)
        for _ in range(2):  # it connects, and sends
            await asyncio.sleep(0.001)
            yield None
        at_once -= 1
        asked.add((method, location))
        yield 204, 0

    flags = {
        "voltimeout": 1.0,
        "grace": 0.0,
        "settle": 1.0,
        "volumes": ("v:1",),
        "userpass": "",
        "expiry": 1,
    }
    with opened(tmp_path / "index") as index:
        store, owner = mkv.Store(types.SimpleNamespace(**flags), index), new_owner(index)
        store.volumes.exchange = exchange
        places = [f"v{number}:1" for number in range(2000)]
        await index.do(mkv.Row.claim, b"/k", owner, places, time.time(), mkv.Record())
        await index.do(mkv.Row.settle, b"/k", owner, ())
        while index.look(b"/k").replicas:
            await store.sweep()
            assert not index.flushing or await index.flushing is None
    assert asked == {("DELETE", place) for place in places} and most < 100


# --- clients that misbehave -----------------------------------------------------------------------


def test_clients_gone_in_mid_upload_leave_nothing(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/warm", blob("warm", MB)) == 201
    files = system.files()
    for turn in range(7):
        uploads = [Upload(server.port, f"/gone{n}", 8 * MB) for n in range(6)]
        uploads += [Upload(server.port, f"/little{n}", 1000) for n in range(6)]
        for upload in uploads[:6]:
            upload.send(blob("some", MB))
        for upload in uploads[6:]:
            upload.send(b"some")
        until(lambda: owned(system) == 12)
        assert read(server, "/warm") == blob("warm", MB)  # others are served meanwhile
        for number, upload in enumerate(uploads):
            if number % 2 == turn % 2:
                upload.vanish()
            else:
                upload.wire.close()
        until(system.is_clean, 40)
        if turn == 1:  # connections to volumes are kept, but not ever more of them
            base = descriptors(server)
    assert system.files() == files
    until(lambda: server.metric("mkv_connections") <= 1)
    until(lambda: descriptors(server) <= base + 30)
    assert server.memory() < 250 * MB
    for name in ("gone", "little"):
        for number in range(6):
            assert server.put(f"/{name}{number}", b"now whole") == 201
    temporary = [f for v in system.volumes for f in v.folder.rglob(".tmp/*") if f.is_file()]
    assert not temporary


def test_a_body_that_ends_early_is_refused(cluster: Make) -> None:
    system = cluster()
    for length in (1000, 2 * MB):
        upload = Upload(system.server.port, "/short", length)
        upload.send(bytes(length - 1))
        upload.wire.shutdown(socket.SHUT_WR)
        assert upload.answer() == 400
        assert system.server.get("/short") is None
    until(system.is_clean, 40)
    assert not system.files()


def test_what_follows_a_body_is_not_part_of_it(cluster: Make) -> None:
    system = cluster()
    for path, length in (("/small", 1000), ("/big", 2 * MB)):
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()
        answer = raw(system.server.port, head + blob(path, length) + b"more than announced\r\n\r\n")
        statuses = re.findall(rb"HTTP/1.1 (\d+)", answer)
        assert statuses == [b"201", b"400"]
        assert_copies(system, path, blob(path, length))
    until(system.is_clean)


def test_a_content_md5_that_does_not_match_stores_nothing(cluster: Make) -> None:
    system = cluster()
    for size in (1000, 2 * MB):
        right = hashlib.md5(blob("value", size)).hexdigest()
        wrong = hashlib.md5(b"another").hexdigest()
        for _ in range(3):
            reply = system.server.call("PUT", f"/{size}", blob("value", size), Content_MD5=wrong)
            assert reply.status == 400
            assert system.server.get(f"/{size}") is None
        until(lambda: not system.files())
        reply = system.server.call("PUT", f"/{size}", blob("value", size), Content_MD5=right)
        assert reply.status == 201
        until(system.is_clean, 40)
        assert system.server.call("DELETE", f"/{size}").status == 204
        until(system.is_clean, 40)


@pytest.mark.parametrize("length", [50_000, 5 * MB])
def test_under_1_kib_a_second_is_too_slow(cluster: Make, length: int) -> None:
    system = cluster(preamble="mkv.BODY_TIME = 1")
    server = system.server
    slow, steady = (Upload(server.port, path, length) for path in ("/slow", "/steady"))
    slow.send(b"a few bytes")
    sent, deadline = 0, time.monotonic() + 20
    slow.wire.setblocking(False)
    while sent < length:  # 20 KiB a second or more, while the other one idles
        steady.send(blob("steady", length)[sent : sent + 20_000])
        sent += 20_000
        if sent < length:
            with contextlib.suppress(BlockingIOError):
                if slow.wire.recv(1, socket.MSG_PEEK):
                    steady.send(blob("steady", length)[sent:])
                    break
            time.sleep(0.2)
        assert time.monotonic() < deadline
    assert steady.answer() == 201
    slow.wire.settimeout(20)
    assert slow.answer() == 408
    assert server.get("/slow") is None
    assert_copies(system, "/steady", blob("steady", length))
    assert server.put("/slow", b"now quick") == 201
    until(system.is_clean, 40)


def test_five_thousand_idle_connections_do_not_keep_others_from_being_served(
    cluster: Make,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (12_000, max(hard, 12_000)))
    except (ValueError, PermissionError):
        pytest.skip("needs 12,000 open files")
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        system = cluster("-maxconns", "5100")
        server = system.server
        base = descriptors(server)
        wires = [socket.socket() for _ in range(5000)]
        for number, wire in enumerate(wires):
            stack.enter_context(wire)
            wire.connect(("127.0.0.1", server.port))
            if number % 2:
                wire.sendall(b"GET /half a head")
        until(lambda: server.metric("mkv_connections") > 5000)
        for number in range(30):
            value = blob(f"{number}", 1000 if number % 10 else 500_000)
            assert server.put(f"/k{number}", value) == 201
            assert server.get(f"/k{number}") == value
        assert server.memory() < 300 * MB
        for wire in wires:
            wire.close()
        until(lambda: server.metric("mkv_connections") <= 1)
        until(lambda: descriptors(server) <= base + 20)
        assert server.get("/k1") == blob("1", 1000)


# --- the end of a server, and another one ---------------------------------------------------------


def test_sigterm_finishes_what_is_in_hand_and_refuses_what_is_new(cluster: Make) -> None:
    system = cluster()
    server, value = system.server, blob("value", 8 * MB)
    idle = Client(server.port)
    assert idle.call("GET", "/?health").status == 200
    uploads = [Upload(server.port, f"/k{n}", len(value)) for n in range(4)]
    for upload in uploads:
        upload.send(value[: 3 * MB])
    until(lambda: len(system.tables()[1]) == len(uploads))
    server.process.send_signal(signal.SIGTERM)

    def refuses() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", server.port)) != 0

    until(refuses)
    assert server.process.poll() is None
    for upload in uploads:
        upload.send(value[3 * MB :])
    assert [upload.answer() for upload in uploads] == [201] * 4
    assert server.process.wait(15) == 0
    assert system.is_clean()
    server.start()
    for number in range(4):
        assert server.get(f"/k{number}") == value


def test_sigterm_does_not_wait_for_ever(cluster: Make) -> None:
    system = cluster(preamble="mkv.DRAIN_TIME = 1")
    server = system.server
    upload = Upload(server.port, "/slow", 8 * MB)
    upload.send(blob("half", MB))
    until(lambda: system.tables()[1])
    assert server.stop() == 0
    assert not owned(system)
    server.start()
    assert server.put("/slow", b"free") == 201
    until(system.is_clean, 40)


def test_sigterm_does_not_cut_short_a_list_that_is_being_read(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    paths = [f"/{number:0400d}" for number in range(700)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda path: server.put(path, b"value"), paths)) == {201}
    with quiet_reader(server.port) as wire:
        wire.sendall(request("GET", "/?list"))
        data = wire.recv(1000)
        server.process.send_signal(signal.SIGTERM)
        while piece := wire.recv(4096):
            data += piece
            time.sleep(0.05)  # a slow reader
    assert json.loads(data.partition(b"\r\n\r\n")[2]) == {"keys": paths, "next": ""}
    assert server.process.wait(30) == 0


BUSY = """
import time

class Connection(mkv.Connection):
    def __init__(self, *args):
        time.sleep(0.02)
        super().__init__(*args)

mkv.Connection, mkv.DRAIN_TIME = Connection, 1
"""


def test_sigterm_ends_a_server_however_many_clients_go_on_to_connect(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1, preamble=BUSY).server

    def connect() -> None:
        while True:  # until that is refused
            call(server.port, "GET", "/?health")

    clients = [in_background(connect) for _ in range(10)]
    until(lambda: server.metric('mkv_requests_total{method="GET",status="200"}') > 50)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(6) == 0
    for client in clients:
        client.join()


SLOW_DISK = """
import time

def commit(self, group, commit=mkv.Index.commit):
    time.sleep(0.3)
    return commit(self, group)

mkv.Index.commit, mkv.DRAIN_TIME = commit, 1
"""


def test_sigterm_ends_a_server_with_a_slow_disk_and_uploads_that_are_stuck(cluster: Make) -> None:
    system = cluster("-voltimeout", "500ms", preamble=SLOW_DISK)
    server, frozen = system.server, volume_at(system, ideal(system, "/stuck")[0])
    silent, stuck = Upload(server.port, "/silent", 2), Upload(server.port, "/stuck", 1 << 30)
    silent.send(b"x")
    stuck.send(blob("begin", MB))
    until(lambda: arrived(system, ideal(system, "/stuck")[0]))
    until(lambda: owned(system) == 2)
    frozen.freeze()
    stuck.wire.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while True:
            stuck.send(bytes(MB))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert not owned(system)


def test_an_answer_of_a_server_that_ends_is_the_last_on_its_connection(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1)
    with Wire(system.server.port) as wire:
        wire.send(request("GET", "/missing"))
        assert "connection" not in wire.answer().fields
        system.server.process.send_signal(signal.SIGTERM)
        until(lambda: not system.server_accepts())
        wire.send(request("GET", "/missing"))
        assert wire.answer().fields["connection"] == "close"
        wire.send(request("GET", "/missing"))
        assert wire.closed()
    assert system.server.process.wait(5) == 0


class Handed(threading.Thread):
    """A client that writes and reads on, whatever happens to the servers; counts what it sees."""

    def __init__(self, port: int, number: int, fresh: bool) -> None:
        super().__init__()
        self.port, self.number, self.fresh = port, number, fresh
        self.client, self.enough = Client(port), threading.Event()
        self.rounds = self.repeated = 0
        self.wrong: list[Any] = []
        self.start()

    def call(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """A connection that ends before a byte of the answer: once more, on a fresh one."""
        if self.fresh:
            self.client.wire.close()
        try:
            return self.client.call(method, path, body)
        except OSError:
            self.repeated += 1
            return self.client.call(method, path, body)

    def run(self) -> None:
        try:
            while not self.enough.is_set() and not self.wrong:
                self.round(f"/hand{self.number}/{self.rounds}")
                self.rounds += 1
        except Exception as error:
            self.wrong.append(error)

    def round(self, path: str) -> None:
        value = blob(path, 100_000 if self.rounds % 4 == 0 else 1000)
        expected = [("PUT", value, 201), ("GET", None, 302), ("DELETE", None, 204)]
        for method, body, status in [*expected, ("GET", None, 404)]:
            reply = self.call(method, path, body)
            if reply.status != status:
                self.wrong.append((method, path, reply))
                return
            if status == 302 and getattr(follow(reply), "body", b"") != value:
                self.wrong.append((method, path, "another value"))


def test_a_port_in_use_is_left_alone_and_said_to_be_in_use(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"value") == 201
    command = [sys.executable, str(HERE / "mkv.py"), "server", "-bind", "127.0.0.1"]
    command += ["-port", str(server.port), *server.flags, "-db", str(system.folder / "other")]
    other = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert other.returncode not in (0, 1)
    assert str(server.port) in other.stderr and len(other.stderr.splitlines()) == 1
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        command[command.index("-port") + 1] = str(stranger.getsockname()[1])
        other = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert other.returncode not in (0, 1)
    assert [server.get("/k") for _ in range(20)] == [b"value"] * 20


# --- histories ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """A call on a key. `value`: what was to be written, or was read (None: absent)."""

    method: str
    start: float
    end: float
    status: int | None  # None: the connection broke, it may have happened or not
    value: str | None = None


def effects(it: Call, before: str | None) -> set[str | None]:
    """What a key may be after a call, if it was `before`; empty: the answer cannot be."""
    if it.method == "GET":
        return {before} if it.value == before else set()
    after, legal = (None, before is not None) if it.method == "DELETE" else (it.value, not before)
    if it.status is None:
        return {before, after} if legal else {before}
    if it.status in (201, 204):
        return {after} if legal else set()
    return {before} if not legal else set()  # 403 of PUT, 404 of DELETE


def is_linearizable(history: list[Call]) -> bool:
    """Whether there is an order of the calls on one key, each at some moment between its start and
    its end, in which a register that is absent at first would have given the same answers.

    A search over (calls done, value) after Wing and Gong, each visited once. A call may be next if
    no other one that is left ended before it started. Calls without an answer are taken only for
    what they change, and while their time is not over. One that neither changes anything nor ends
    the time of such a call is taken at once: that never spoils anything.
    """
    calls = sorted(history, key=lambda it: it.start)
    needed = sum(1 << n for n, it in enumerate(calls) if it.status is not None)
    todo, seen = [(0, None, -math.inf)], set()  # the calls done, the value, their latest start
    while todo:
        done, value, latest = todo.pop()
        if done & needed == needed:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        able, limit = [], math.inf
        for number in range((~done & (done + 1)).bit_length() - 1, len(calls)):
            it = calls[number]
            if it.start > limit:
                break
            if done >> number & 1:
                continue
            if it.status is not None:
                limit = min(limit, it.end)
            elif it.end < latest:
                done |= 1 << number
                continue
            able.append((number, it))
        steps = []
        for number, it in able:
            after = [v for v in effects(it, value) if it.status is not None or v != value]
            found = [(done | 1 << number, v, max(latest, it.start)) for v in after]
            ends = [other.end for _, other in able if other.status is None]
            if value in after and it.start <= min(ends, default=math.inf):
                steps = found
                break
            steps += found
        todo += steps
    return False


def test_the_checker_accepts_what_can_be() -> None:
    put, delete = Call("PUT", 0, 1, 201, "a"), Call("DELETE", 4, 5, 204)
    assert is_linearizable([])
    assert is_linearizable([put, Call("GET", 2, 3, 302, "a"), delete, Call("GET", 6, 7, 404)])
    during = [Call("GET", 0, 1, 404), Call("GET", 0.5, 1, 302, "a"), Call("PUT", 0, 2, 403, "b")]
    assert is_linearizable([put, *during])
    unknown = Call("PUT", 0, math.inf, None, "b")
    assert is_linearizable([unknown, Call("GET", 1, 2, 404)])
    assert is_linearizable([unknown, Call("GET", 1, 2, 404), Call("GET", 3, 4, 302, "b")])
    assert is_linearizable([put, Call("DELETE", 2, 3, None), Call("PUT", 4, 5, 201, "c")])
    read = [Call("DELETE", 1, 6, 204), Call("GET", 5, 7, 404)]  # it was written, and deleted
    assert is_linearizable([Call("PUT", 0, 4, None, "a"), *read])
    many = [Call("PUT", n, n + 20, None, f"{n}") for n in range(40)]
    assert is_linearizable([*many, Call("GET", 70, 71, 404)])


def test_the_checker_agrees_with_trying_all_orders() -> None:
    dice, seen = random.Random(1), {True: 0, False: 0}
    for _ in range(1500):
        history = []
        for number in range(5):
            method = dice.choice(["PUT", "GET", "DELETE"])
            start = dice.randrange(10)
            end = dice.choice([start + dice.random() * 6, math.inf])
            status = dice.choice(
                {"PUT": [201, 403, None], "DELETE": [204, 404, None]}.get(method, [0])
            )
            value = dice.choice([None, "0", "1", "2"]) if method == "GET" else f"{number}"
            history.append(Call(method, start, end, status, value))
        expected = any(is_legal(order) for order in itertools.permutations(history))
        assert is_linearizable(history) == expected, history
        seen[expected] += 1
    assert min(seen.values()) > 100


def is_legal(order: tuple[Call, ...]) -> bool:
    """Whether calls can have happened in this order."""
    values: set[str | None] = {None}
    for number, it in enumerate(order):
        if any(later.end < it.start for later in order[number:]):
            return False
        values = set().union(*(effects(it, value) for value in values))
    return bool(values)


def test_the_checker_rejects_a_stale_read() -> None:
    history = [Call("PUT", 0, 1, 201, "a"), Call("DELETE", 2, 3, 204), Call("PUT", 4, 5, 201, "b")]
    assert is_linearizable([*history, Call("GET", 6, 7, 302, "b")])
    assert not is_linearizable([*history, Call("GET", 6, 7, 302, "a")])
    assert not is_linearizable([*history[:2], Call("GET", 3.5, 7, 302, "a")])
    assert not is_linearizable([*history[:1], Call("GET", 2, 3, 404)])
    late = [Call("GET", 6, 7, 302, "b"), Call("GET", 8, 9, 302, "a")]  # back in time
    assert not is_linearizable([Call("PUT", 0, 10, None, "b"), Call("PUT", 0, 1, 201, "a"), *late])


def test_the_checker_rejects_a_lost_write() -> None:
    put = Call("PUT", 0, 1, 201, "a")
    assert not is_linearizable([put, Call("PUT", 2, 3, 201, "b")])
    assert not is_linearizable([put, Call("DELETE", 2, 3, 404)])
    assert not is_linearizable([put, Call("PUT", 0, 1, 201, "b"), Call("GET", 2, 3, 302, "a")])
    assert not is_linearizable([Call("DELETE", 0, 1, 204)])
    assert not is_linearizable([Call("PUT", 0, 1, 403, "a")])
    ended = Call("PUT", 0, 1, None, "b")  # if it happened at all, then before 1
    assert not is_linearizable([ended, Call("GET", 2, 3, 404), Call("GET", 4, 5, 302, "b")])


class Historian(threading.Thread):
    """A client that does what comes to its mind with a few keys, and writes down what it sees."""

    def __init__(self, server: Server, number: int, keys: list[str], deadline: float) -> None:
        super().__init__()
        self.server, self.number, self.keys, self.deadline = server, number, keys, deadline
        self.histories: dict[str, list[Call]] = {key: [] for key in keys}
        self.wrong: list[Any] = []
        self.dice = random.Random()
        self.start()

    def run(self) -> None:
        for turn in itertools.count():
            if self.wrong or time.monotonic() > self.deadline:
                break
            try:
                self.step(self.dice.choice(self.keys), f"{self.number}-{turn}-")
            except Exception as error:
                self.wrong.append(error)

    def step(self, key: str, name: str) -> None:
        method, start = self.dice.choice(["PUT", "GET", "GET", "DELETE"]), time.monotonic()
        value = name if method == "PUT" else None
        body = (name * self.dice.choice([1, 100, 20_000])).encode() if value else None
        try:
            reply = self.server.call(method, key, body)
            status, end = reply.status, time.monotonic()
        except ConnectionRefusedError:
            time.sleep(0.02)
            return  # not even sent
        except (OSError, http.client.HTTPException):
            # Only the end of its process breaks a connection, so if it happened, then before now.
            status, end = None, time.monotonic()
        if method == "GET" and status == 302:
            found = follow(reply, 2)
            if not found or found.status != 200:
                return  # one would ask again, which is another call
            value, end = name_in(found.body), time.monotonic()
        known = {"PUT": (201, 403, None), "GET": (302, 404), "DELETE": (204, 404, None)}[method]
        if status in known:
            self.histories[key].append(Call(method, start, end, status, value))
        elif status not in (409, 503, None):  # which change nothing
            self.wrong.append((method, key, reply))


@pytest.mark.parametrize("workers", [1, 2])
def test_histories_under_fire_are_linearizable(cluster: Make, workers: int) -> None:
    flags = "-replicas", "2", "-voltimeout", "150ms", "-workers", str(workers)
    system = cluster(*flags, volumes=4, subvolumes=2)
    keys, dice, deadline = ["/a", "/b", "/c", "/d"], random.Random(), time.monotonic() + 10
    clients = [Historian(system.server, n, keys, deadline) for n in range(10)]

    def count() -> int:
        return sum(len(calls) for client in clients for calls in client.histories.values())

    ailing: list[Callable[[], None]] = []
    events = 0
    while any(client.is_alive() for client in clients):
        goal = count() + dice.randrange(20, 200)
        deadline_now = time.monotonic() + 0.7
        until(lambda g=goal, d=deadline_now: count() > g or time.monotonic() > d)
        if ailing:
            ailing.pop()()
        elif dice.random() < 0.4:
            restart(system)
        elif workers > 1 and dice.random() < 0.5:
            kill_a_worker(system.server)
        else:
            volume = dice.choice(system.volumes)
            ailing.append(ail(dice.choice(["dead", "frozen"]), volume, lambda *_: None))
        events += 1
    for cure in ailing:
        cure()
    for client in clients:
        client.join()
    assert [client.wrong for client in clients] == [[]] * len(clients)
    histories = {key: [it for c in clients for it in c.histories[key]] for key in keys}
    for key, history in histories.items():
        start = time.monotonic()
        history.append(Call("GET", start, math.inf, 302, value_now(system.server, key)))
        assert is_linearizable(history), (key, sorted(history, key=lambda it: it.start))
        statuses = {it.status for it in history}
        assert {201, 204, 302, 403, 404} <= statuses
    assert None in {it.status for history in histories.values() for it in history}
    assert events >= 5
    until(system.is_clean, 60)


def value_now(server: Server, key: str) -> str | None:
    """What a key is in the end."""
    found = read(server, key)
    return None if found is None else name_in(found)


def name_in(body: bytes) -> str:
    """The name that a value repeats; of a mixture, or of a part, the whole."""
    name = b"-".join(body.split(b"-")[:2]) + b"-"
    times, rest = divmod(len(body), len(name))
    whole = times in (1, 100, 20_000) and not rest and body == name * times
    return (name if whole else body).decode()


# --- workers --------------------------------------------------------------------------------------


def workers_of(server: Server, count: int = 0) -> set[int]:
    """The processes that serve, once so many have said that they do since the log was begun."""
    until(lambda: server.log.read_text().count("mkv is at") >= count)
    return {pid for pid in descendants(server.process.pid) if b"mkv.py" in command_line(pid)}


def command_line(pid: int) -> bytes:
    """What a process was started with; nothing when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def kill_a_worker(server: Server) -> int:
    """Kill one; the others go on, and it is started anew."""
    victim = random.choice(sorted(until(lambda: workers_of(server))))  # both may have just ended
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    until(lambda: ended(victim))
    return victim


def ended(pid: int) -> bool:
    """Whether a process is no more, but for what its parent has to hear of it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return not any(Path(f"/proc/{pid}/fd").iterdir())
    return True


def test_workers_share_the_port_and_one_that_is_killed_is_replaced(cluster: Make) -> None:
    server = cluster("-workers", "3").server
    first = workers_of(server, 3)
    assert server.put("/k", b"value") == 201
    victim = kill_a_worker(server)
    second = workers_of(server, 4)
    assert len(second) == 3 and first - second == {victim}
    with contextlib.ExitStack() as stack:
        base = {pid: open_files(pid) for pid in second}

        def all_serve() -> bool:
            """Whether each has got a share of the connections; one more for them."""
            wire = stack.enter_context(until(lambda: enter(server.port)))
            wire.send(request("GET", "/k"))
            assert wire.answer().status == 302
            return all(open_files(pid) > base[pid] + 5 for pid in second)

        until(all_serve)


def test_of_two_writers_of_a_key_in_different_workers_one_gets_409(cluster: Make) -> None:
    system = cluster("-workers", "2")
    workers_of(system.server, 2)
    value = blob("value", MB)
    upload = Upload(system.server.port, "/k", len(value))
    upload.send(value[:1000])
    until(lambda: owned(system) == 1)
    for _ in range(30):  # on a connection each: to both workers
        assert system.server.put("/k", b"another") == 409
    upload.send(value[1000:])
    assert upload.answer() == 201
    for _ in range(30):
        assert system.server.put("/k", b"another") == 403
        assert system.server.get("/k") == value
    until(system.is_clean)


def test_the_key_of_an_upload_to_a_killed_worker_is_free_at_once(cluster: Make) -> None:
    system = cluster("-workers", "2")
    workers_of(system.server, 2)
    uploads = [Upload(system.server.port, f"/k{n}", 4 * MB) for n in range(20)]
    for upload in uploads:
        upload.send(b"x" * MB)
    until(lambda: owned(system) == 20)
    kill_a_worker(system.server)
    broken = 0

    def put_anew(path: str) -> int | None:
        with contextlib.suppress(ConnectionResetError):  # what listened in the dead one goes last
            return system.server.put(path, b"x" * 4 * MB)

    for number, upload in enumerate(uploads):
        try:
            upload.send(b"x" * 3 * MB)
            assert upload.answer() == 201
        except OSError:
            broken += 1
            assert until(lambda path=f"/k{number}": put_anew(path)) == 201
    assert broken
    for number in range(20):
        assert system.server.get(f"/k{number}") == b"x" * 4 * MB
    until(system.is_clean)


def test_sigterm_lets_all_workers_finish_and_leaves_none(cluster: Make) -> None:
    system = cluster("-workers", "2")
    pids = workers_of(system.server, 2)
    uploads = [Upload(system.server.port, f"/k{n}", 2 * MB) for n in range(10)]
    for upload in uploads:
        upload.send(b"x" * MB)
    until(lambda: owned(system) == 10)
    system.server.process.send_signal(signal.SIGTERM)
    until(lambda: not system.server_accepts())
    for upload in uploads:
        upload.send(b"x" * MB)
        assert upload.answer() == 201
    assert system.server.process.wait(20) == 0
    assert all(map(ended, pids))
    assert len(system.tables()[0]) == 10 and system.is_clean()


def test_workers_that_are_killed_at_once_are_all_replaced(cluster: Make) -> None:
    server = cluster("-workers", "3").server
    for turn in range(1, 6):
        pids = workers_of(server, 3 * turn)
        assert len(pids) == 3
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert len(workers_of(server, 18)) == 3
    until(lambda: server.put("/k", b"value") in (201, 403))


def test_workers_do_not_outlive_who_keeps_them_running(cluster: Make) -> None:
    server = cluster("-workers", "2").server
    pids = workers_of(server, 2)
    server.process.kill()
    until(lambda: all(map(ended, pids)))


def test_a_worker_that_ends_by_itself_ends_all(cluster: Make) -> None:
    server = cluster("-workers", "3").server
    pids = workers_of(server, 3)
    os.kill(min(pids), signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert all(map(ended, pids))


def test_workers_that_cannot_start_say_why_and_end_with_exit_code_2(tmp_path: Path) -> None:
    command = [
        sys.executable,
        HERE / "mkv.py",
        "server",
        "-workers",
        "2",
        "-volumes",
        "127.0.0.1:1",
    ]
    command += ["-replicas", "1", "-db", "/proc/none", "-port", str(*free_ports(1))]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=30, text=True)
    assert ended.returncode == 2 and "cannot use -db /proc/none" in ended.stderr
    assert "Traceback" not in ended.stderr


# --- writes that step aside -----------------------------------------------------------------------


def put(server: Server, path: str, value: bytes, chunked: bool = False) -> int:
    """PUT a value, with its length or in chunks; the status."""
    return server.call("PUT", path, iter([value]) if chunked else value).status


def puts(server: Server, values: dict[str, tuple[bytes, bool]]) -> list[int]:
    """PUT several (value, chunked) at a time; their statuses."""
    with ThreadPoolExecutor(len(values)) as pool:
        return list(pool.map(lambda path: put(server, path, *values[path]), values))


def paths_at(system: Cluster, location: str, prefix: str) -> Iterator[str]:
    """Paths without end that have a location among their ideal ones."""
    paths = (f"{prefix}{number}" for number in itertools.count())
    return (path for path in paths if location in ideal(system, path))


def balance(system: Cluster, path: str) -> str:
    """Whether a key is balanced, in the server's words."""
    reply = system.server.call("GET", path)
    assert reply.status == 302, reply
    assert reply.fields["key-volumes"].split(",") == list(copies(system, path))
    return reply.fields["key-balance"]


def arrived(system: Cluster, location: str) -> bool:
    """Whether a part of an upload is on a drive."""
    with contextlib.suppress(FileNotFoundError):  # it may just come to its end
        files = (drive_at(system, location) / ".tmp").rglob("*")
        return any(file.is_file() and file.stat().st_size for file in files)
    return False


def interrupted(value: bytes, work: Callable[[], Any]) -> Iterator[bytes]:
    """The pieces of a value, and in their midst something happens."""
    yield value[: len(value) // 2]
    work()
    yield value[len(value) // 2 :]


def put_interrupted(
    system: Cluster, path: str, value: bytes, work: Callable[[], Any], chunked: bool = False
) -> int:
    """PUT a value, and do something when half of it is on the first drive; the status."""

    def half() -> None:
        until(lambda: arrived(system, ideal(system, path)[0]))
        work()

    length = {} if chunked else {"Content_Length": str(len(value))}
    return system.server.call("PUT", path, interrupted(value, half), **length).status


def fill(folder: Path) -> Path:
    """The file that takes all that is left of a small drive."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@contextlib.contextmanager
def ill(
    ailment: str, volume: Volume, drive: str, mounts: Callable[..., None]
) -> Iterator[Callable[[], Any]]:
    """A volume, or only one drive of it, that fails its writers; the value is what cures it."""
    if ailment == "full":
        volume.kill()
        mounts(volume.folder / drive, "-t", "tmpfs", "-o", "size=1m", "none")
        volume.start()
        yield fill(volume.folder / drive / ".tmp").unlink
    elif ailment == "unwritable":
        with foreign_folder() as folder:  # where nginx does not work as root
            volume.kill()
            volume.folder = folder
            volume.start()
            (folder / drive).chmod(0o555)
            yield lambda: (folder / drive).chmod(0o755)
            volume.kill()
    else:
        yield ail(ailment, volume, mounts)


AILMENTS = ["dead", "frozen", "full", pytest.param("unwritable", marks=needs_root)]


@pytest.mark.parametrize("ailment", AILMENTS)
def test_puts_step_aside_from_what_cannot_be_written_and_use_it_again_when_it_can(
    cluster: Make, mounts: Callable, ailment: str
) -> None:
    system = cluster(volumes=4, subvolumes=2)
    server, volume = system.server, system.volumes[0]
    bad, sibling = f"{volume.name}/sv00", f"{volume.name}/sv01"
    paths, of_sibling = paths_at(system, bad, "/k"), paths_at(system, sibling, "/s")
    with ill(ailment, volume, "sv00", mounts) as cure:
        sizes = [(1000, False), (3 * MB, False), (1000, True), (2 * MB, True)]
        values = {next(paths): (blob(str(size), size[0]), size[1]) for size in sizes}
        assert puts(server, values) == [201] * len(values)  # all of them meet it
        for path, (value, _) in values.items():
            assert volume.name not in assert_copies(system, path, value)
            assert balance(system, path) == "unbalanced"
            assert read(server, path) == value
        began = time.monotonic()
        for path in itertools.islice(paths, 10):
            assert put(server, path, b"now it is known") == 201
            assert volume.name not in assert_copies(system, path, b"now it is known")
        assert time.monotonic() - began < 3, "a stall is ten times -voltimeout"
        path = next(of_sibling)
        assert put(server, path, b"sibling") == 201
        there = volume.name in assert_copies(system, path, b"sibling")
        assert there == (ailment in ("full", "unwritable")), "one drive is not its volume"
        cure()

        def is_used_again() -> bool:
            path = next(paths)
            assert put(server, path, b"again") == 201
            assert_copies(system, path, b"again")
            return balance(system, path) == "balanced"

        until(is_used_again, 40)
        until(system.is_clean, 40)


@pytest.mark.parametrize(
    ("ailment", "size", "chunked"),
    [("dead", 8, False), ("dead", 2, True), ("frozen", 24, True), ("frozen", 2, False)],
)
def test_a_volume_that_fails_in_mid_upload_is_replaced(
    cluster: Make, mounts: Callable, ailment: str, size: int, chunked: bool
) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4)
    bad, *others = ideal(system, "/big")
    value, cures = blob("big", size * MB), []

    def fall_ill() -> None:
        cures.append(ail(ailment, volume_at(system, bad), mounts))

    assert put_interrupted(system, "/big", value, fall_ill, chunked) == 201
    found = assert_copies(system, "/big", value)
    assert {location.partition("/")[0] for location in others} < set(found)
    assert balance(system, "/big") == "unbalanced"
    assert read(system.server, "/big") == value
    assert bad in {r.location for r in system.tables()[1][b"/big"].replicas}
    cures[0]()
    until(system.is_clean, 40)
    assert_copies(system, "/big", value)


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A volume with a drive that hangs: to PUT it has no answer."""
    with contextlib.suppress(OSError, EOFError):
        while (await reader.readuntil(b"\r\n\r\n")).startswith(b"HEAD"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await reader.read()
    writer.close()


@pytest.mark.asyncio
async def test_a_drive_that_hangs_is_soon_left_alone_for_longer_than_it_holds_up_a_put() -> None:
    volumes, pause = mkv.Volumes(types.SimpleNamespace(voltimeout=0.04, userpass="")), 0.0
    async with asyncio.timeout(10), await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        volume = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        file = mkv.Replica(f"{volume}/sv00", "")
        while pause < 0.5:  # a stall is ten times the timeout
            answers, *_ = await volumes.send("PUT", b"/k", [file], letter(), 1)
            assert answers == {file: (0, None)}
            stalled = time.monotonic()
            while not volumes.takes(file.location):
                await volumes.head(volume, "/")
                await asyncio.sleep(0.01)
            pause = time.monotonic() - stalled
        volumes.pool(volume, failed=True)  # ends the connection that is kept


def letter() -> AsyncIterator[bytes]:
    """A body of one byte."""
    (reader := asyncio.StreamReader()).feed_data(b"x")
    return mkv.read_body(reader, 1, 1.0)


async def obey(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A volume that answers what is sent in one piece, and closes after 0.5 s of silence."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            async with asyncio.timeout(0.5):
                head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(b"\r\nContent-Length: 1\r\n" in head)
            status = b"201 Created" if head[:3] == b"PUT" else b"204 No Content"
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % status)
    writer.close()


@contextlib.contextmanager
def unreachable() -> Iterator[tuple[str, socket.socket]]:
    """A volume that nobody is connected to or refused by any more, and the last connection."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        waiting = [sockets.enter_context(socket.socket()) for _ in range(8)]
        for each in waiting:  # what there is no room for is not heard of again
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield "127.0.0.1:{1}".format(*listener.getsockname()), waiting[0]


def new_volumes(timeout: float) -> mkv.Volumes:
    return mkv.Volumes(types.SimpleNamespace(voltimeout=timeout, userpass=""))


@pytest.mark.asyncio
async def test_an_answer_that_was_read_late_is_no_news_of_a_volume() -> None:
    volumes = new_volumes(0.1)
    async with (
        asyncio.timeout(10),
        await asyncio.start_server(hang, "127.0.0.1", 0) as hung,
        await asyncio.start_server(obey, "127.0.0.1", 0) as good,
    ):
        slow, prompt = (f"127.0.0.1:{s.sockets[0].getsockname()[1]}" for s in (hung, good))
        files = [mkv.Replica(slow, ""), mkv.Replica(prompt, "")]
        volumes.mark(prompt, "it does not answer")
        answers, *_ = await volumes.send("PUT", b"/k", files, letter(), 1)  # for a second
        assert [status for status, _ in answers.values()] == [0, 201]
        assert volumes.trusted[prompt] < time.monotonic() and not volumes.up(prompt)
        volumes.pool(prompt, failed=True)


@pytest.mark.asyncio
async def test_a_volume_that_cannot_be_reached_costs_one_timeout_however_many_files_it_has() -> (
    None
):
    volumes, began = new_volumes(0.3), time.monotonic()
    with unreachable() as (volume, connection):
        volumes.idle[volume].append(await asyncio.open_connection(sock=connection))
        files = [mkv.Replica(volume, f"{n:016x}") for n in range(32)]
        answers, *_ = await volumes.send("DELETE", b"/k", files)
        assert answers == dict.fromkeys(files, (0, None)) and list(answers) == files
    assert time.monotonic() - began < 3


@pytest.mark.asyncio
async def test_a_connection_is_not_kept_waiting_for_those_that_are_still_made() -> None:
    volumes = new_volumes(1.0)
    async with asyncio.timeout(10), await asyncio.start_server(obey, "127.0.0.1", 0) as server:
        good = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await volumes.head(good, "/") == 204
        with unreachable() as (bad, _):
            files = [mkv.Replica(bad, ""), mkv.Replica(good, "")]
            answers, *_ = await volumes.send("DELETE", b"/k", files)
        assert [*answers.values()] == [(0, None), (204, 0)] and volumes.up(good)
        volumes.pool(good, failed=True)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (b"Location: http://x/k\r\n", 1),
        (b"Content-Location: /k\r\nConnection: close\r\n", 0),
        (b"Location: http://x/k\r\nConnection: close\r\n", 0),
    ],
)
async def test_a_volume_may_say_that_it_closes_beside_any_location(
    fields: bytes, kept: int
) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 204 No Content\r\n" + fields + b"\r\n")
        writer.close()

    volumes = mkv.Volumes(types.SimpleNamespace(voltimeout=5.0, userpass=""))
    async with asyncio.timeout(10), await asyncio.start_server(say, "127.0.0.1", 0) as server:
        volume = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await volumes.head(volume, "/") == 204
        assert len(volumes.idle[volume]) == kept
        volumes.pool(volume, failed=True)  # ends the connection that is kept


@contextlib.asynccontextmanager
async def volume_that(
    talks: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable],
) -> AsyncIterator[str]:
    """The name of a volume that does this with each connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            await talks(reader, writer)
        writer.close()

    async with asyncio.timeout(10), await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.asyncio
@pytest.mark.parametrize("closes", [False, True])
async def test_what_a_volume_says_unasked_is_no_answer_to_what_is_asked_next(closes: bool) -> None:
    connections = 0

    async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            await asyncio.sleep(0.05)  # not in the same breath
            writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            if closes:
                return

    volumes = new_volumes(5.0)
    async with volume_that(repeat) as volume:
        for number in range(1, 4):
            assert await volumes.head(volume, "/") == 204
            assert connections == number
            ((reader, _),) = volumes.idle[volume]
            while not reader._buffer:
                await asyncio.sleep(0.01)
        volumes.pool(volume, failed=True)


@pytest.mark.asyncio
async def test_a_connection_whose_answer_has_not_ended_is_not_used_again() -> None:
    async def dawdle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.read()

    volumes = new_volumes(5.0)
    async with volume_that(dawdle) as volume:
        assert await volumes.head(volume, "/") == 204 and volumes.idle[volume]
        file = mkv.Replica(volume, "")
        answers, *_ = await volumes.send("PUT", b"/k", [file], letter(), 1)
        assert answers == {file: (201, None)} and not volumes.idle[volume]


@pytest.mark.asyncio
async def test_only_a_location_that_takes_values_can_be_said_to_take_none() -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")

    volumes = new_volumes(5.0)
    async with volume_that(fail) as volume:
        assert await volumes.head(volume, "/") == 503  # is the whole volume there?
        assert not volumes.down and volumes.takes(f"{volume}/sv00")
        assert await volumes.head(f"{volume}/sv00", "/60/08/L2s=") == 503
        assert volumes.down.keys() == {f"{volume}/sv00/"} and not volumes.takes(f"{volume}/sv00")
        volumes.pool(volume, failed=True)


@pytest.mark.parametrize("ailments", [("dead", "dead"), ("dead", "frozen")])
def test_a_put_that_finds_too_few_volumes_is_503_and_leaves_nothing(
    cluster: Make, mounts: Callable, ailments: tuple[str, str]
) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4)
    server = system.server
    values = {"/small": (b"small", False), "/large": (bytes(2 * MB), False)}
    values |= {"/chunked": (bytes(100_000), True)}
    assert puts(server, {"/warm": (b"warm", False)}) == [201]
    cures = [ail(each, system.volumes[n], mounts) for n, each in enumerate(ailments)]
    for _ in range(2):  # never 409: the key is free
        assert puts(server, values) == [503] * len(values)
    assert server.call("PUT", "/small", b"why").body.strip()
    assert all(server.call("GET", path).status == 404 for path in values)
    for cure in cures:
        cure()
    until(system.is_clean, 40)
    for path, (value, _) in values.items():
        until(lambda path=path, value=value: put(server, path, value) == 201, 40)
        assert_copies(system, path, value)
    until(system.is_clean, 40)


def test_when_two_of_four_volumes_die_in_mid_upload_nothing_is_left(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4)
    bad = [volume_at(system, location) for location in ideal(system, "/big")[:2]]
    value = blob("big", 8 * MB)
    assert put_interrupted(system, "/big", value, lambda: [v.kill() for v in bad]) == 503
    assert system.server.call("GET", "/big").status == 404
    until(lambda: not any(v.files() for v in system.volumes if v not in bad))
    for volume in bad:
        volume.start()
    until(system.is_clean, 40)
    assert not system.files()
    until(lambda: put(system.server, "/big", value) == 201, 40)
    assert_copies(system, "/big", value)


def read_slowly(volume: Volume) -> None:
    """Let nginx send 1 MB at once, and then 1 MB a second."""
    config = volume.folder / ".nginx/nginx.conf"
    config.write_text(config.read_text().replace("sendfile on;", "sendfile on; limit_rate 1m;"))
    old = set(until(volume.workers))
    os.kill(volume.process.pid, signal.SIGHUP)
    until(lambda: (workers := set(volume.workers())) and not workers & old)


def copying(cluster: Make, value: bytes, volumes: int) -> tuple[Cluster, str, Any]:
    """A cluster where the last copy of /big is being made, slowly; where, and the PUT's status."""
    system = cluster("-voltimeout", "200ms", volumes=volumes)
    for volume in system.volumes:
        read_slowly(volume)
    bad, *_, stand_in = ideal(system, "/big", 4)
    pool, kill = ThreadPoolExecutor(1), volume_at(system, bad).kill
    status = pool.submit(put_interrupted, system, "/big", value, kill)
    pool.shutdown(wait=False)
    until(lambda: arrived(system, stand_in) or status.done())
    assert not status.done(), "a copy takes seconds"
    return system, stand_in, status


def assert_true(system: Cluster, status: int, value: bytes) -> None:
    """That a PUT of /big has told the truth, and that nothing but what it told stays."""
    assert status in (201, 503)
    for volume in system.volumes:
        volume.thaw()
        if volume.process.poll() is not None:
            volume.start()
    if status == 201:
        assert_copies(system, "/big", value)
        assert read(system.server, "/big") == value
    else:
        assert read(system.server, "/big") is None
    until(system.is_clean, 40)
    if status == 503:
        assert not system.files()
        until(lambda: put(system.server, "/big", b"anew") == 201, 40)
        assert_copies(system, "/big", b"anew")


@pytest.mark.parametrize(("volumes", "expected"), [(4, 503), (5, 201)])
def test_a_stand_in_that_dies_while_it_is_made_is_replaced_if_there_is_another_volume(
    cluster: Make, volumes: int, expected: int
) -> None:
    value = blob("big", 3 * MB)
    system, stand_in, status = copying(cluster, value, volumes)
    volume_at(system, stand_in).kill()
    assert status.result() == expected
    assert_true(system, expected, value)


@pytest.mark.parametrize(("count", "ailment"), [(1, "dead"), (2, "dead"), (1, "frozen")])
def test_when_the_sources_of_a_stand_in_fail_while_it_is_made_the_answer_is_true(
    cluster: Make, mounts: Callable, count: int, ailment: str
) -> None:
    value = blob("big", 3 * MB)
    system, _, status = copying(cluster, value, 4)
    for location in ideal(system, "/big")[1 : 1 + count]:
        ail(ailment, volume_at(system, location), mounts)
    assert status.result() in ((201, 503) if count == 1 else (503,))
    assert_true(system, status.result(), value)


def test_a_server_killed_while_it_makes_a_stand_in_leaves_the_key_free_and_nothing_else(
    cluster: Make,
) -> None:
    system, _, status = copying(cluster, blob("big", 3 * MB), 4)
    (entry,) = system.tables()[1].values()
    assert entry.owner and len(entry.replicas) == 4
    restart(system)
    assert status.exception(), "the server was killed before it answered"
    assert put(system.server, "/big", b"anew") == 201
    assert_copies(system, "/big", b"anew")
    volume_at(system, ideal(system, "/big")[0]).start()
    until(system.is_clean, 40)
    assert_copies(system, "/big", b"anew")
    assert len(system.files()) == 3


@pytest.mark.parametrize("size", [1000, MB])
def test_a_stand_in_that_was_frozen_and_strikes_late_is_swept(cluster: Make, size: int) -> None:
    system = cluster("-grace", "1m", "-voltimeout", "200ms", volumes=5, subvolumes=1)
    server, value = system.server, blob("late", size)
    bad, *_, second, third = (volume_at(system, place) for place in ideal(system, "/k", 5))

    def fail() -> None:
        bad.kill()
        second.freeze()

    length = {"Content_Length": str(size)}
    pieces = interrupted(value, fail)
    assert server.call("PUT", "/k", pieces, **length).status == 201
    assert third.name in assert_copies(system, "/k", value)
    assert second.name in {r.location for r in system.tables()[1][b"/k"].replicas}
    server.process.send_signal(signal.SIGSTOP)  # or the file may be swept before it is seen
    try:
        second.thaw()
        until(second.files)
    finally:
        server.process.send_signal(signal.SIGCONT)
    bad.start()
    assert_copies(system, "/k", value)
    system.start(free_ports(1)[0])  # whose sweeper does not wait
    until(system.is_clean, 40)
    assert_copies(system, "/k", value)
    assert not second.files()


@pytest.mark.parametrize("ailment", ["dead", "frozen", "away"])
def test_a_key_deleted_while_a_volume_was_down_and_written_anew_keeps_the_new_value(
    cluster: Make, mounts: Callable, ailment: str
) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4, subvolumes=1)
    server, bad = system.server, volume_at(system, ideal(system, "/k")[0])
    assert put(server, "/k", b"old") == 201
    (old,) = bad.files()
    cure = ail(ailment, bad, mounts)
    assert server.call("DELETE", "/k").status == 204
    assert server.call("GET", "/k").status == 404
    assert put(server, "/k", b"new") == 201
    assert bad.name not in assert_copies(system, "/k", b"new")
    cure()
    until(system.is_clean, 40)
    assert old not in bad.files()
    assert [server.get("/k") for _ in range(20)] == [b"new"] * 20
    assert_copies(system, "/k", b"new")


class Writer(threading.Thread):
    """A client of whose calls none may fail, on keys that are its own."""

    SIZES = ((1000, False), (100_000, False), (200_000, True))

    def __init__(self, server: Server, number: int) -> None:
        super().__init__()
        self.server, self.number, self.enough = server, number, threading.Event()
        self.rounds = 0
        self.wrong: list[Any] = []
        self.start()

    def run(self) -> None:
        try:
            while not self.enough.is_set() and not self.wrong:
                self.round(f"/writer{self.number}/{self.rounds % 4}")
                self.rounds += 1
        except Exception as error:
            self.wrong.append(error)

    def round(self, path: str) -> None:
        size, chunked = self.SIZES[self.rounds % 3]
        value, pieces = blob(f"{path} {self.rounds}", size), None
        for method, expected in (("PUT", 201), ("READ", value), ("DELETE", 204), ("READ", None)):
            if method == "READ":
                found = read(self.server, path)
            else:
                pieces = iter([value]) if chunked else value
                reply = self.server.call(method, path, pieces if method == "PUT" else None)
                found = reply.status
            if found != expected:
                what = reply if method != "READ" else found and found[:50]
                self.wrong.append((method, path, what))
                return


@contextlib.contextmanager
def running(clients: list[Any]) -> Iterator[Callable[[int], None]]:
    """Threads that count their rounds, for a block; the value waits until each has some more."""

    def more(count: int) -> None:
        goals = {client: client.rounds + count for client in clients}
        until(lambda: all(c.wrong or c.rounds >= goals[c] for c in clients), 60)

    try:
        yield more
    finally:
        for client in clients:
            client.enough.set()
        for client in clients:
            client.join()
    assert [client.wrong for client in clients] == [[]] * len(clients)


def test_under_load_no_call_fails_when_a_volume_of_four_dies_and_returns(cluster: Make) -> None:
    system = cluster("-voltimeout", "500ms", volumes=4, subvolumes=2)
    server = system.server
    with running([Writer(server, number) for number in range(6)]) as more:
        more(2)
        for volume in system.volumes[:3]:
            volume.kill()
            until(lambda: server.metric("mkv_volumes_up") == 3)
            more(2)
            volume.start()
            until(lambda: server.metric("mkv_volumes_up") == 4)
            more(1)
    until(system.is_clean, 40)
    assert not system.files()


# --- from one server to the next ------------------------------------------------------------------


class Strict(Handed):
    """One that asks again freely where it had kept a connection, which may end while it is idle."""

    def call(self, method: str, path: str, body: bytes | None = None) -> Reply:
        if self.fresh:
            self.client.wire.close()
        kept = self.client.wire.sock is not None
        try:
            return self.client.call(method, path, body)
        except OSError:
            self.repeated += not kept  # a new one that ended before its request was taken: rare
            return self.client.call(method, path, body)


def succeed(system: Cluster, *flags: str) -> Server:
    """Start a server on the port and index of the one there is, and end that: the new one."""
    old, port = system.server, system.server.port
    before = started(port)
    system.server = system.start(port, *flags)
    until(lambda: started(port) == before + 1)
    assert old.stop() == 0
    assert started(port) == before
    return system.server


def test_a_server_takes_over_port_and_index_and_no_client_sees_it(cluster: Make) -> None:
    system = cluster("-voltimeout", "2s")
    port = system.server.port
    idle = Client(port)
    assert idle.call("PUT", "/k", b"value").status == 201
    value = blob("in hand", 4 * MB)
    in_hand = Upload(port, "/in-hand", len(value))
    in_hand.send(value[:MB])
    until(lambda: owned(system) == 1)
    clients = [Strict(port, number, fresh=number % 2 == 0) for number in range(6)]
    with running(clients) as more:
        more(5)
        folder, (volume_port,) = system.folder / "volume3", free_ports(1)
        system.volumes.append(Volume(folder, volume_port, system.subvolumes))
        old, system.server = system.server, system.start(port, "-voltimeout", "2s")
        until(lambda: started(port) == 2)
        more(5)
        assert [system.server.put("/in-hand", b"no") for _ in range(8)] == [409] * 8
        old.process.send_signal(signal.SIGTERM)
        until(lambda: started(port) == 1)
        more(2)
        in_hand.send(value[MB:])
        assert in_hand.answer() == 201
        assert old.process.wait(15) == 0
        succeed(system, "-voltimeout", "2s")  # and once more, on a port that was shared
        more(2)
    assert sum(client.repeated for client in clients) <= 2
    assert system.server.get("/in-hand") == value
    with contextlib.suppress(OSError):  # it had been idle: its end may be noticed only now
        idle.call("GET", "/k")
    assert idle.call("GET", "/k").status == 302
    new = system.volumes[3].name
    path = next(p for p in map("/new{}".format, range(99)) if new in str(ideal(system, p)))
    assert system.server.put(path, b"value") == 201
    assert new in assert_copies(system, path, b"value")
    until(system.is_clean, 40)


def test_servers_that_start_at_once_do_not_join_one_with_another_index(cluster: Make) -> None:
    system = cluster()
    command = [sys.executable, HERE / "mkv.py", "server", "-bind", "127.0.0.1"]
    command += [*system.server.flags, "-port", str(system.server.port), "-db", "other"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(3):
        starts = [subprocess.Popen(command, cwd=system.folder, **quiet) for _ in range(5)]
        assert [start.wait(30) for start in starts] == [2] * 5
    assert started(system.server.port) == 1


def test_a_server_ends_although_a_frozen_process_holds_the_index(cluster: Make) -> None:
    system = cluster(preamble="mkv.DRAIN_TIME = 1")
    index = str(system.folder / "index")
    with lmdb.open(index, max_dbs=2, map_size=1 << 40) as env, env.begin(write=True):
        upload = Upload(system.server.port, "/k", 5)
        upload.send(b"value")
        until(lambda: system.server.metric("mkv_connections") == 2)
        assert system.server.stop() == -signal.SIGALRM
    system.server.start()
    assert system.server.put("/k", b"value") == 201
    until(system.is_clean)


def test_the_port_of_a_server_with_another_index_is_in_use(cluster: Make) -> None:
    system = cluster()
    args = ("server", "-bind", "127.0.0.1", *system.server.flags, "-port", str(system.server.port))
    said = error_of(*args, "-db", "other", folder=system.folder)
    assert "in use" in said and str(system.server.port) in said
    assert [system.server.call("GET", "/?health").status for _ in range(20)] == [200] * 20


# --- what operators see ---------------------------------------------------------------------------


def lines(server: Server, *words: str) -> list[str]:
    """The lines of a server's log that have all of the words, but for its first."""
    logged = server.log.read_text().splitlines()
    return [line for line in logged if all(w in line for w in words) and "mkv is at" not in line]


def test_a_volume_that_dies_and_returns_is_worth_one_line_each(cluster: Make) -> None:
    system = cluster("-voltimeout", "600ms", volumes=4)
    server, bad = system.server, system.volumes[0]
    paths = [f"/k{number}" for number in range(30)]
    assert [put(server, path, b"value") for path in paths] == [201] * 30
    assert not lines(server, "is down") and not lines(server, "is up")
    bad.kill()
    for path in paths:
        assert read(server, path) == b"value"
        assert put(server, f"{path}/more", b"value") == 201
        assert server.call("DELETE", path).status == 204
    until(lambda: lines(server, bad.name, "is down"))
    holds(lambda: len(lines(server, bad.name)) == 1, 1)
    bad.start()
    until(lambda: lines(server, bad.name, "is up"))
    until(system.is_clean, 40)
    assert len(lines(server, bad.name)) == 2, lines(server, bad.name)
    assert len(lines(server, "is down")) == len(lines(server, "is up")) == 1


def test_a_drive_that_cannot_be_written_and_then_can_is_worth_one_line_each(
    cluster: Make, mounts: Callable
) -> None:
    system = cluster(volumes=4, subvolumes=2)
    server, drive = system.server, f"{system.volumes[0].name}/sv00"
    paths = paths_at(system, drive, "/k")
    with ill("full", system.volumes[0], "sv00", mounts) as cure:
        assert [put(server, next(paths), b"value") for _ in range(30)] == [201] * 30
        assert len(lines(server, drive, "is down")) == 1
        cure()
        until(lambda: put(server, next(paths), b"value") == 201 and lines(server, "is up"), 40)
    assert len(lines(server, drive, "is down")) == len(lines(server, drive, "is up")) == 1


def test_a_volume_without_drives_that_cannot_be_written_is_worth_one_line(cluster: Make) -> None:
    system = cluster(volumes=4, subvolumes=1)
    server, bad = system.server, system.volumes[0]
    block(bad.folder)
    paths = paths_at(system, bad.name, "/k")
    holds(lambda: put(server, next(paths), b"value") == 201, 2)
    (line,) = [line for line in lines(server, bad.name) if "stand-in" not in line]
    assert "is down" in line


def test_a_stand_in_is_worth_one_line_whatever_the_key(cluster: Make) -> None:
    system = cluster(volumes=4)
    server, key = system.server, "/two\nlines is up again"
    bad, *_, stand_in = ideal(system, key, 4)
    kill = volume_at(system, bad).kill
    pieces, length = interrupted(b"value", kill), {"Content_Length": "5"}
    assert server.call("PUT", quote(key), pieces, **length).status == 201
    (line,) = lines(server, "stand-in")
    assert "two" in line and "lines" in line and stand_in in line
    assert not [line for line in lines(server) if line.startswith("lines")]


def test_a_sweeper_that_gives_up_for_now_says_so_once(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1)
    server = system.server
    assert put(server, "/k", b"value") == 201
    system.volumes[0].kill()
    assert server.call("DELETE", "/k").status == 204
    until(lambda: lines(server, " 1 files still wait"))
    holds(lambda: len(lines(server, "still wait")) == 1, 3)  # dozens of rounds of the sweeper


def test_garbage_that_is_swept_in_time_is_not_worth_a_line(cluster: Make) -> None:
    system = cluster("-grace", "500ms", volumes=4)
    for number in range(30):
        path = f"/{number}"
        assert put(system.server, path, b"value") == 201
        file_at(system, path, 0).unlink()
        assert rebalance(system.server, path) == 204
    until(system.is_clean)
    assert not lines(system.server, "still wait")


def test_with_v_a_request_is_worth_one_line_and_without_it_none(cluster: Make) -> None:
    system = cluster("-v")
    for server in system.server, system.start(free_ports(1)[0]):
        calls = [("PUT", 201), ("PUT", 403), ("GET", 302), ("DELETE", 204), ("GET", 404)]
        for method, status in calls:
            assert server.call(method, "/logged%0Ahere", method[:3]).status == status
        with Wire(server.port) as wire:
            wire.send(request("PUT", "/piped", b"x") + request("GET", "/piped") * 3)
            assert [wire.answer().status for _ in range(4)] == [201, 302, 302, 302]
        assert server.call("DELETE", "/piped").status == 204
        for method, status in calls:
            assert len(lines(server, method, "/logged", "here", f" {status}")) == 1
        assert len(lines(server, "GET", "/piped", " 302")) == 3
        assert len(lines(server, "here")) == len(lines(server, "/logged")) == len(calls)


# --- rebalance ------------------------------------------------------------------------------------


def rebalance(server: Server, path: str) -> int:
    """REBALANCE a key: the status."""
    return server.call("REBALANCE", path).status


def names_of(volumes: list[Volume]) -> str:
    return ",".join(volume.name for volume in volumes)


def file_at(system: Cluster, path: str, number: int) -> Path:
    """The file of a replica of a key."""
    key, replica = path.encode(), system.tables()[0][path.encode()].replicas[number]
    return Path(str(drive_at(system, replica.location)) + mkv.key2path(key, replica.write_id))


def assert_home(system: Cluster, names: str, replicas: int = 3, subvolumes: int = 10) -> None:
    """That every key is where it belongs, and in the end nothing is anywhere else."""
    for key, record in system.tables()[0].items():
        home = mkv.key2volume(key, names.split(","), replicas, subvolumes)
        assert [replica.location for replica in record.replicas] == home, key
    until(system.is_clean)


def put_elsewhere(system: Cluster, path: str, value: bytes, chunked: bool = False) -> Volume:
    """PUT a value while the first of its ideal volumes is down: that volume, up again."""
    away = volume_at(system, ideal(system, path)[0])
    away.kill()
    assert put(system.server, path, value, chunked) == 201
    assert balance(system, path) == "unbalanced"
    away.start()
    until(lambda: system.server.metric("mkv_volumes_up") == len(system.volumes))
    return away


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_rebalance_brings_a_key_home_that_had_a_stand_in(cluster: Make, chunked: bool) -> None:
    system, value = cluster(volumes=4), blob("/k", 300_000)
    put_elsewhere(system, "/k", value, chunked)
    until(lambda: rebalance(system.server, "/k") == 204 and balance(system, "/k") == "balanced")
    assert list(copies(system, "/k")) == ideal(system, "/k")
    assert_copies(system, "/k", value)
    until(system.is_clean)
    assert len(system.files()) == 3


def test_rebalance_of_a_key_that_is_at_home_changes_nothing(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    before, files = system.tables(), system.files()
    assert rebalance(system.server, "/k") == 204
    assert (system.tables(), system.files()) == (before, files)


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"half")])
def test_rebalance_replaces_a_file_that_is_gone_or_of_another_size(
    cluster: Make, harm: Callable[[Path], Any]
) -> None:
    system, value = cluster(), blob("/k", 100_000)
    assert system.server.put("/k", value) == 201
    harm(file_at(system, "/k", 1))
    assert rebalance(system.server, "/k") == 204
    assert_copies(system, "/k", value)
    until(system.is_clean)
    assert len(system.files()) == 3


def test_rebalance_makes_up_for_a_volume_that_is_lost_for_good(cluster: Make) -> None:
    system, value = cluster(volumes=4), blob("/k", 100_000)
    server = system.server
    assert server.put("/k", value) == 201
    lost = volume_at(system, ideal(system, "/k")[0])
    lost.kill()
    assert rebalance(server, "/k") == 204
    assert list(copies(system, "/k")) == ideal(system, "/k", 4)[1:]
    assert read(server, "/k") == value


def test_rebalance_leaves_the_files_on_a_drive_that_is_full(cluster: Make, mounts: Any) -> None:
    system = cluster(volumes=4, subvolumes=2)
    location = ideal(system, "/k")[0]
    volume, drive = volume_at(system, location), location.partition("/")[2]
    with ill("full", volume, drive, mounts) as cure:
        cure()
        assert system.server.put("/k", b"value") == 201
        fill(volume.folder / drive / ".tmp")
        other = next(paths_at(system, location, "/other/"))
        assert system.server.put(other, blob(other, 100_000)) == 201
        assert balance(system, other) == "unbalanced"
        before, files = system.tables()[0], system.files()
        assert rebalance(system.server, "/k") == 204
        assert system.tables()[0] == before and files <= system.files()


def test_rebalance_spreads_no_bytes_but_those_that_were_put(cluster: Make) -> None:
    system, value = cluster(), blob("/k", 100_000)
    assert system.server.put("/k", value) == 201
    for number in (0, 1):
        file_at(system, "/k", number).write_bytes(bytes(len(value)))
    file_at(system, "/k", 2).unlink()
    record = system.tables()[0][b"/k"]
    answer = system.server.call("REBALANCE", "/k")
    assert answer.status == 503 and b"MD5" in answer.body
    assert system.tables()[0][b"/k"] == record
    until(system.journal_is_empty)
    assert len(system.files()) == 2


def test_rebalance_is_404_without_the_key_and_503_without_volumes(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms")
    server, upload = system.server, Upload(system.server.port, "/new", 1000)
    upload.send(b"x" * 500)
    until(lambda: server.metric("mkv_journal_entries") == 1)
    assert rebalance(server, "/new") == rebalance(server, "/none") == 404
    upload.vanish()
    assert server.put("/k", b"value") == 201
    file_at(system, "/k", 2).unlink()
    for volume in system.volumes:
        volume.kill()
        assert rebalance(server, "/k") == 503
    until(lambda: set(system.tables()[1]) <= {b"/k", b"/new"} and not owned(system))


def test_of_two_rebalances_of_a_key_at_a_time_the_second_is_409(cluster: Make) -> None:
    system, value = cluster("-voltimeout", "2s", volumes=4), blob("/k", 3 * MB)
    server, target = system.server, put_elsewhere(system, "/k", value)
    with ThreadPoolExecutor() as pool:
        target.freeze()
        moving = pool.submit(rebalance, server, "/k")
        until(lambda: owned(system))
        assert rebalance(server, "/k") == 409
        target.thaw()
        assert moving.result() == 204
    assert_copies(system, "/k", value)
    until(system.is_clean)


def test_an_unlinked_key_stays_unlinked_when_it_is_rebalanced(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    assert system.server.call("UNLINK", "/k").status == 204
    file_at(system, "/k", 0).unlink()
    assert rebalance(system.server, "/k") == 204
    assert_copies(system, "/k", b"value")
    assert system.tables()[0][b"/k"].deleted
    assert system.server.get("/k") is None
    assert listed(system.server, "/?unlinked")[0] == ["/k"]


@pytest.mark.parametrize("method", ["DELETE", "UNLINK"])
def test_a_delete_or_unlink_in_the_midst_of_a_rebalance_wins(cluster: Make, method: str) -> None:
    system, value = cluster("-voltimeout", "2s", volumes=4), blob("/k", 3 * MB)
    server, target = system.server, put_elsewhere(system, "/k", value)
    with ThreadPoolExecutor() as pool:
        target.freeze()
        moving = pool.submit(rebalance, server, "/k")
        until(lambda: owned(system))
        assert server.call(method, "/k").status == 204
        assert server.get("/k") is None
        target.thaw()
        assert moving.result() == 409
    assert server.get("/k") is None
    until(system.is_clean)
    assert len(system.files()) == (3 if method == "UNLINK" else 0)


def test_a_server_killed_in_the_midst_of_a_rebalance_leaves_the_key_as_it_was(
    cluster: Make,
) -> None:
    system, value = cluster("-voltimeout", "2s", volumes=4), blob("/k", 3 * MB)
    server, target = system.server, put_elsewhere(system, "/k", value)
    record = system.tables()[0][b"/k"]
    with ThreadPoolExecutor() as pool:
        target.freeze()
        moving = pool.submit(rebalance, server, "/k")
        until(lambda: owned(system))
        server.kill()
        assert isinstance(moving.exception(), OSError)
    target.thaw()
    server.start()
    assert system.tables()[0][b"/k"] == record
    until(lambda: rebalance(server, "/k") == 204 and balance(system, "/k") == "balanced")
    assert_copies(system, "/k", value)
    until(system.is_clean)


class Reader(threading.Thread):
    """A client that reads the same keys over and over; none may be missed."""

    def __init__(self, port: int, values: dict[str, bytes]) -> None:
        super().__init__()
        self.port, self.values, self.enough, self.rounds = port, values, threading.Event(), 0
        self.wrong: list[Any] = []
        self.start()

    def run(self) -> None:
        while not self.enough.is_set() and not self.wrong:
            path = random.choice(list(self.values))
            reply = found = None
            with contextlib.suppress(OSError):  # the server ended before it took the request
                reply = Client(self.port).call("GET", path)
                found = follow(reply)
            if reply and (not found or found.body != self.values[path]):
                self.wrong.append((path, reply, found))
            self.rounds += 1


CHANGES = {
    "3 to 5 volumes": ((3, 3, 10), (5, 3, 10)),
    "5 to 3 volumes": ((5, 3, 10), (3, 3, 10)),
    "2 to 3 replicas": ((4, 2, 10), (4, 3, 10)),
    "3 to 2 replicas": ((4, 3, 10), (4, 2, 10)),
    "1 to 10 subvolumes": ((3, 3, 1), (3, 3, 10)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_move_while_clients_read_and_write_and_none_of_them_sees_it(
    cluster: Make, change: str
) -> None:
    def flags(volumes: int, replicas: int, subvolumes: int) -> tuple:
        names = names_of(system.volumes[:volumes])
        return "-volumes", names, "-replicas", f"{replicas}", "-subvolumes", f"{subvolumes}"

    system = cluster(volumes=5)
    before, after = CHANGES[change]
    patient = "-grace", "1s", "-voltimeout", "3s"  # disks stall
    server = succeed(system, *flags(*before), *patient)
    values = {f"/key/{number}": blob(f"{number}", number * 1999 + 1) for number in range(60)}
    assert {server.put(path, value) for path, value in values.items()} == {201}
    clients = [Reader(server.port, values), Reader(server.port, values)]
    clients += [Handed(server.port, 1, False), Handed(server.port, 2, True)]
    with running(clients) as more:
        more(1)
        server = succeed(system, *flags(*after), *patient)
        keys = listed(server, "/key/?list")[0]
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(functools.partial(rebalance, server), keys)) == {204}
        more(1)
    for path in listed(server, "/?list")[0]:
        assert rebalance(server, path) == 204
    assert {path: read(server, path) for path in keys} == values
    assert_home(system, names_of(system.volumes[: after[0]]), *after[1:])


def test_the_steps_of_the_readme_add_a_volume_and_no_client_sees_it(
    cluster: Make, tmp_path: Path
) -> None:
    chapter = (HERE / "README.md").read_text().split("\n## Adding, removing")[1].split("\n## ")[0]
    script = re.search(r"```\n(.*?)```", chapter, re.DOTALL)[1]
    system = cluster(volumes=4)
    system.server.stop()
    hosts = {f"{host}:3001": v.name for host, v in zip("abcd", system.volumes, strict=True)}
    table = hosts | {"3000": f"{system.server.port}", "/var/lib/mkv": f"{system.folder}/index"}
    flags = "-settle 300ms -grace 1s -voltimeout 3s -bind 127.0.0.1"
    table |= {"pipx run uv run mkv.py": f"{sys.executable} {HERE / 'mkv.py'} {flags}"}
    script = re.sub("|".join(map(re.escape, table)), lambda found: table[found[0]], script)
    script = script.replace("\n# a new volume", "\nread\n# a new volume") + "echo done; read"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = ["bash", "-c", script]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **streams)
    try:
        until(system.server_accepts)
        values = {f"/key {number} %é?": blob(f"{number}", number * 999 + 1) for number in range(40)}
        values = {quote(path): value for path, value in values.items()}
        assert {system.server.put(path, value) for path, value in values.items()} == {201}
        hidden = next(iter(values))
        assert system.server.call("UNLINK", hidden).status == 204
        shown = {path: value for path, value in values.items() if path != hidden}
        clients = [Reader(system.server.port, shown), Reader(system.server.port, shown)]
        clients += [Handed(system.server.port, 1, False), Handed(system.server.port, 2, True)]
        with running(clients) as more:
            more(2)
            process.stdin.write("\n")
            process.stdin.flush()
            said = list(iter(process.stdout.readline, "done\n"))
            more(2)
        assert "mkv is at" in said[0] and not [line for line in said if "/key" in line], said
        assert len(system.tables()[0]) == len(values)  # the other clients have deleted theirs
        assert_home(system, names_of(system.volumes))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def copy_index(source: Path, copy: Path) -> None:
    """What the README says of it."""
    script = re.search(r"<<'END'\n(.*?)END\n", (HERE / "README.md").read_text(), re.DOTALL)[1]
    subprocess.run([sys.executable, "-", source, copy], input=script, text=True, check=True)


@pytest.mark.parametrize("rebuilt", [True, False])
def test_what_was_being_written_while_the_index_was_copied_outlives_a_return_to_the_copy(
    cluster: Make, rebuilt: bool
) -> None:
    system = cluster()
    server, index, copy = system.server, system.folder / "index", system.folder / "copy"
    values = {f"/k{number}": blob(f"{number}", 1000) for number in range(5)}
    store_all(system, values)
    uploads = {f"/new{number}": Upload(server.port, f"/new{number}", 1000) for number in range(5)}
    for upload in uploads.values():
        upload.send(bytes(500))
    until(lambda: owned(system) == 5)
    copy_index(index, copy)
    for upload in uploads.values():
        upload.send(bytes(500))
        assert upload.answer() == 201
    files = system.files()
    assert server.stop() == 0
    shutil.rmtree(index)
    copy.rename(index)
    if rebuilt:
        run(system, "rebuild")
        values |= dict.fromkeys(uploads, bytes(1000))
    server.start()
    assert server.put("/last", b"value") == 201
    assert server.call("DELETE", "/last").status == 204
    until(system.journal_is_empty)  # all is swept that can be
    assert system.files() == files
    assert_values(system, values)


# --- thrasher.py ----------------------------------------------------------------------------------


def thrasher(*args: str, **options: Any) -> subprocess.Popen:
    """thrasher.py under way."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, HERE / "thrasher.py", *args]
    return subprocess.Popen(command, start_new_session=True, **streams, **options)


@pytest.mark.parametrize("flags", ["-count 1000", "-count 30 -size 900000 -clients 3 -keys 5"])
def test_the_thrasher_finds_nothing_wrong_and_leaves_nothing(cluster: Make, flags: str) -> None:
    system = cluster()
    with thrasher("-server", f"127.0.0.1:{system.server.port}", *flags.split()) as process:
        out, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    *verbs, last, speed = out.splitlines()
    assert [line.split()[0] for line in verbs] == ["PUT", "GET", "DELETE"]
    assert all(re.search(r" p50 [\d.]+ ms, p99 [\d.]+ ms, max [\d.]+ ms$", v) for v in verbs)
    assert re.fullmatch(rf"{flags.split()[1]} write/read/delete in \d+\.\ds", last)
    assert re.fullmatch(r"thats \d+\.\d\d/sec", speed)
    assert listed(system.server, "/?list") == ([], "")
    until(system.is_clean)


WRONG = {  # what a server does that is broken, and what the thrasher says of it
    "it keeps another value": (
        """
        async def spoil(body):
            async for piece in body:
                yield piece[::-1]
        put = mkv.Store.put
        mkv.Store.put = lambda self, *a: put(self, *a[:3], spoil(a[3]), *a[4:])
        """,
        "not the value that was written",
    ),
    "it redirects to nowhere": (
        """
        make = mkv.Store.make_redirect
        mkv.Store.make_redirect = lambda *a: make(*a).replace(b"Location", b"Elsewhere")
        """,
        "a redirect to nowhere",
    ),
    "it takes no value": ("mkv.Volumes.takes = lambda *_: False", "not 201, but HTTP/1.1 503"),
    "it deletes nothing": (
        """
        def remove(self, hide, protect):
            raise mkv.HTTPError(404, "no such key")
        mkv.Row.remove = remove
        """,
        "not 204, but HTTP/1.1 404",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_thrasher_ends_with_1_at_a_wrong_answer(cluster: Make, name: str) -> None:
    preamble, reason = WRONG[name]
    system = cluster(preamble=textwrap.dedent(preamble))
    with thrasher("-server", f"127.0.0.1:{system.server.port}", "-count", "100") as process:
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "") and said.count("\n") == 1
    assert said.startswith("thrasher: ") and reason in said


def test_the_thrasher_ends_with_1_where_there_is_no_server() -> None:
    with thrasher("-server", f"127.0.0.1:{free_ports(1)[0]}") as process:
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said.count("\n")) == (1, "", 1)


def mentioning(text: str) -> list[int]:
    """The processes that have a text in their command line."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if text.encode() in command_line(pid)]


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_survives_a_benchmark(tmp_path: Path, number: int) -> None:
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with thrasher("bench", "-quick", "-rows", "cycle", env=env) as process:
        until(lambda: len(mentioning(str(tmp_path))) >= 4)  # three volumes, a server
        if number:
            process.send_signal(number)
            process.send_signal(number)
        out, said = process.communicate(timeout=120)
    if number:
        assert process.returncode == 1 and said.startswith("thrasher: ")
    else:
        assert (process.returncode, said) == (0, "")
        assert re.search(
            r"^\| write/read/delete, 16 clients \| .* \| [\d.]+ \| at most 0.5 \|$", out, re.M
        )
    assert not any(tmp_path.iterdir())
    until(lambda: not mentioning(str(tmp_path)))


# --- rebuild, rebalance, verify: harness ----------------------------------------------------------

KEPT_FOR = 2.0  # seconds that replaced files are kept for readers, in the tests with traffic
KEPT = ("-grace", f"{KEPT_FOR}s", "-voltimeout", "3s")  # disks stall


class Command(Server):
    """A rebuild, rebalance or verify of a cluster's index and volumes; ended with the cluster."""

    def __init__(self, system: Cluster, name: str, *flags: str, stderr: int | None = None) -> None:
        self.name, volumes = name, ",".join(volume.name for volume in system.volumes)
        command = [sys.executable, str(HERE / "mkv.py"), name, "-volumes", volumes]
        command += ["-db", str(system.folder / "index"), "-subvolumes", str(system.subvolumes)]
        command += [*Cluster.FLAGS, "-voltimeout", "3s", *flags]
        self.out, self.err = (system.folder / f"{len(system.servers)}.{x}" for x in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=stderr or err)
        system.servers.append(self)

    def wait(self) -> "Command":
        """Until it ends; its exit status, its findings, and what it said."""
        self.status = self.process.wait(40)
        self.said = self.err.read_text()
        self.findings = [json.loads(line) for line in self.out.read_text().splitlines()]
        assert all(next(iter(finding)) == "finding" for finding in self.findings)
        assert "Traceback" not in self.said, self.said
        return self

    def kinds(self) -> set[str]:
        return {finding["finding"] for finding in self.findings}

    def found(self, kind: str) -> list[dict]:
        """The findings of a kind, without the word."""
        found = [dict(each) for each in self.findings]
        return [each for each in found if each.pop("finding") == kind]

    def __repr__(self) -> str:
        return f"{self.name}: {self.status}, {self.findings[:9]}, {self.said}"


def run(system: Cluster, name: str, *flags: str, status: int = 0) -> Command:
    """A command from start to end, with this exit status; it sums up what it did."""
    command = Command(system, name, *flags).wait()
    assert command.status == status, command
    assert re.search(rf"^{name}: \d+ of \d+, ", command.said, re.MULTILINE), command
    return command


def plant(system: Cluster, location: str, path: str | bytes, data: bytes) -> None:
    """A file on a volume that came there by other ways."""
    file = Path(f"{drive_at(system, location)}{os.fsdecode(path)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def files_of(system: Cluster, path: str) -> list[tuple[str, str, Path]]:
    """Location, path and file of each replica that the record of a key names."""
    replicas = system.tables()[0][path.encode()].replicas
    named = [(r.location, mkv.key2path(path.encode(), r.write_id)) for r in replicas]
    return [(at, name, Path(f"{drive_at(system, at)}{name}")) for at, name in named]


def state(system: Cluster) -> tuple:
    """All that a command could change: index, names, times and sizes of files."""
    files = [Path(f"{volume.folder}{name}") for volume in system.volumes for name in volume.files()]
    stats = {file: file.stat() for file in files}
    return system.tables(), {f: (s.st_ino, s.st_size, s.st_mtime_ns) for f, s in stats.items()}


def values_of(names: Iterable[str]) -> dict[str, bytes]:
    """A value for each name, most of them small."""
    sizes = itertools.cycle((1, 100, 3000, 70_000, 200, 5000, 400_000, 40))
    return {name: blob(name, size) for name, size in zip(names, sizes, strict=False)}


LONG = "/" + "long" * 127 + ".."  # the longest there is; its base64 is cut into pieces
SLASH = "/photos/été"  # its base64 has a slash
NAMES = [LONG, SLASH, "/ with %41? & #", "/" + "ÿ" * 60, "/-", "//", "/日本/語"]


def store_all(system: Cluster, values: dict[str, bytes]) -> None:
    with ThreadPoolExecutor(4) as pool:
        puts = pool.map(lambda name: system.server.put(quote(name), values[name]), values)
        assert set(puts) == {201}


def assert_values(system: Cluster, values: dict[str, bytes]) -> None:
    """That the server has these values and no other key."""
    assert set(listed(system.server, "/?list")[0]) == set(values)
    for name, value in values.items():
        assert read(system.server, quote(name)) == value, name


def assert_at_home(system: Cluster, volumes: list[Volume], replicas: int, subvolumes: int) -> None:
    """That every key is where it belongs, and in the end nothing is anywhere else."""
    names = [volume.name for volume in volumes]
    for key, record in system.tables()[0].items():
        home = mkv.key2volume(key, names, replicas, subvolumes)
        assert [replica.location for replica in record.replicas] == home, key
    until(system.is_clean, 30)


class Traffic(threading.Thread):
    """A client that writes, reads, unlinks and deletes keys of its own; nothing may fail."""

    def __init__(self, port: int, number: int, values: dict[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.client, self.number, self.values = Client(port), number, values
        self.hidden: set[str] = set()
        self.redirects: list[tuple[float, str, Reply]] = []
        self.enough, self.rounds, self.wrong = threading.Event(), 0, ""
        self.start()

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self.round(random.Random(self.rounds))
                self.rounds += 1
            self.arrive(0)
        except Exception as error:
            self.wrong = repr(error)

    def ask(self, method: str, name: str, status: int, value: bytes | None = None) -> Reply:
        """A request; on a kept connection that ends before the answer, once more."""
        try:
            reply = self.client.call(method, quote(name), value)
        except OSError:
            reply = self.client.call(method, quote(name), value)
        assert reply.status == status, (method, name, reply)
        return reply

    def arrive(self, seconds: float) -> None:
        """Follow the redirects that are so old; only later than -grace may one lead nowhere."""
        while self.redirects and time.monotonic() - self.redirects[0][0] > seconds:
            began, name, reply = self.redirects.pop(0)
            found = follow(reply)
            if name in self.values and (not found or found.status != 200):
                assert time.monotonic() - began > KEPT_FOR, (name, reply, found)
            elif name in self.values:
                assert found.body == self.values[name], name

    def round(self, dice: random.Random) -> None:
        name, chosen = f"/new{self.number}/{self.rounds}", dice.choice(list(self.values))
        if self.rounds % 2:
            value = blob(name, dice.choice((10, 3000, 100_000)))
            self.ask("PUT", name, 201, value)
            self.values[name] = value
        for each in {name, chosen} & set(self.values):
            self.redirects.append((time.monotonic(), each, self.ask("GET", each, 302)))
        self.arrive(KEPT_FOR / 4)
        if self.rounds % 8 in (3, 7):
            self.ask("DELETE" if self.rounds % 8 == 3 else "UNLINK", chosen, 204)
            self.ask("GET", chosen, 404)
            del self.values[chosen]
            self.hidden |= {chosen} if self.rounds % 8 == 7 else set()


@contextlib.contextmanager
def traffic(system: Cluster, values: dict[str, bytes], rounds: int = 20) -> Iterator[None]:
    """Clients that share the keys of a cluster for the time of a block, at least so many rounds."""
    shares = [{name: values[name] for name in sorted(values)[n::4]} for n in range(4)]
    clients = [Traffic(system.server.port, n, share) for n, share in enumerate(shares)]
    try:
        until(lambda: all(client.wrong or client.rounds > 2 for client in clients))
        yield
        until(lambda: all(client.wrong or client.rounds > rounds for client in clients), 60)
    finally:
        for client in clients:
            client.enough.set()
        for client in clients:
            client.join()
    assert [client.wrong for client in clients] == [""] * 4
    values.clear()
    for client in clients:
        values |= client.values
    hidden = set(listed(system.server, "/?unlinked")[0])
    assert hidden >= set().union(*(client.hidden for client in clients))


def moving(system: Cluster, command: Command) -> bool:
    """Stops the command while it moves a key; False: it has ended before."""
    while command.process.poll() is None:
        if owned(system):
            command.process.send_signal(signal.SIGSTOP)
            if owned(system):
                return True
            command.process.send_signal(signal.SIGCONT)
    return False


def connected(process: subprocess.Popen, volume: Volume) -> bool:
    """Whether a process has a connection to a volume."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here = {f"socket:[{row[9]}]" for row in rows if row[2].endswith(f":{volume.port:04X}")}
    return bool(here & links(process.pid))


def grow(system: Cluster, count: int) -> None:
    """More volumes."""
    for number, port in enumerate(free_ports(count), len(system.volumes)):
        system.volumes.append(Volume(system.folder / f"volume{number}", port, system.subvolumes))


def replace(system: Cluster, *flags: str) -> None:
    """Another server, that knows all volumes, with more flags, in the place of the old one."""
    old = system.server
    assert old.stop() == 0
    system.server = system.start(*free_ports(1), *old.flags[4 + len(Cluster.FLAGS) :], *flags)


# --- rebuild --------------------------------------------------------------------------------------


def without_index(system: Cluster) -> None:
    """Ends the server and throws the index away."""
    assert system.server.process.poll() is not None or system.server.stop() == 0
    shutil.rmtree(system.folder / "index")


@pytest.mark.parametrize("subvolumes", [1, 10])
def test_a_tree_of_minikeyvalue_is_adopted(cluster: Make, subvolumes: int) -> None:
    system = cluster(volumes=3, subvolumes=subvolumes)
    without_index(system)
    values = values_of(f"/{n}{'ÿ' * n}." for n in range(40))
    strangers, slashes = 0, 0
    for number, (name, value) in enumerate(values.items()):
        key, names = name.encode(), [volume.name for volume in system.volumes]
        digest, encoded = hashlib.md5(key).hexdigest(), base64.b64encode(key).decode()
        slashes += "/" in encoded
        scores = {v: hashlib.md5(key + v.encode()).digest() for v in names}
        drives = {v: int.from_bytes(scores[v][12:16], "big") % subvolumes for v in names}
        if subvolumes > 1 and number % 5 == 0:  # one on a drive that is not the right one
            strangers += 1
            drives[names[0]] = (drives[names[0]] + 1) % subvolumes
        for volume in names:
            drive = f"{volume}/sv{drives[volume]:02X}" if subvolumes > 1 else volume
            plant(system, drive, f"/{digest[:2]}/{digest[2:4]}/{encoded}", value)
    assert slashes > 5 and (strangers > 5 or subvolumes == 1)
    old = system.files()
    assert run(system, "rebuild").findings == []
    records, journal = system.tables()
    assert not journal and system.named() == old == system.files()
    for name, value in values.items():
        record, places = records[name.encode()], ideal(system, name)
        locations = [replica.location for replica in record.replicas]
        home = [place for place in places if place in locations]
        assert locations[: len(home)] == home and len(locations) == 3  # strangers come last
        assert record[1:] == (len(value), "", "", False)
    system.server.start()
    assert_values(system, values)
    assert run(system, "verify", status=1 if strangers else 0).kinds() <= {"unbalanced"}
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, subvolumes)
    assert run(system, "verify").findings == []
    assert_values(system, values)
    for name in values:
        assert system.server.call("DELETE", quote(name)).status == 204
    until(lambda: not system.files() and system.journal_is_empty())


@pytest.mark.parametrize("subvolumes", [1, 3])
def test_rebuild_makes_the_index_that_was_there(cluster: Make, subvolumes: int) -> None:
    system = cluster(volumes=3, subvolumes=subvolumes)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(30))])
    store_all(system, values)
    grow(system, 1)
    replace(system)
    assert run(system, "rebalance").findings == []  # so that ids differ within a record
    assert system.server.call("UNLINK", "/k0").status == 204
    until(system.is_clean)
    assert system.server.stop() == 0
    before = system.tables()
    assert any(len({r.write_id for r in record.replicas}) > 1 for record in before[0].values())
    assert run(system, "rebuild").findings == []
    assert system.tables() == before  # what only the index knows is kept: MD5s, and UNLINKs
    without_index(system)
    assert run(system, "rebuild").findings == []
    (after, journal), short = system.tables(), lambda record: (record.replicas, record.size)
    assert not journal
    assert {k: short(r) for k, r in after.items()} == {k: short(r) for k, r in before[0].items()}
    system.server.start()
    assert_values(system, values)
    assert run(system, "verify").findings == []


def test_rebuild_revives_nothing_deleted_and_nothing_unacknowledged(cluster: Make) -> None:
    system = cluster("-voltimeout", "5s", "-grace", "1m")
    server = system.server
    store_all(system, values_of(["/deleted", "/kept"]))
    volume = volume_at(system, ideal(system, "/deleted")[0])
    volume.kill()
    assert server.call("DELETE", "/deleted").status == 204
    volume.start()
    until(lambda: server.metric("mkv_volumes_up") == 3)
    volume.freeze()
    thread = in_background(lambda: server.put("/unacknowledged", b"value"))
    until(lambda: len(system.files()) == 3 + 1 + 2)
    server.kill()
    volume.thaw()
    thread.join()
    assert len(system.tables()[1]) == 2
    for _ in range(2):
        assert run(system, "rebuild").findings == []
        assert set(system.tables()[0]) == {b"/kept"} and len(system.tables()[1]) == 2
    system.server = system.start(*free_ports(1))  # whose sweeper does not wait
    until(system.is_clean, 30)
    assert listed(system.server, "/?list")[0] == ["/kept"]


NEW = "f" * 8 + "0" * 8  # a write id that is newer than all others


@pytest.mark.parametrize("case", ["new", "new, adopted", "existing"])
def test_of_the_files_of_a_key_the_newest_are_the_value(cluster: Make, case: str) -> None:
    system = cluster(subvolumes=1)
    values = values_of(["/same", "/older", "/replaced", "/oldest"])
    store_all(system, values)
    named = {name: files_of(system, name) for name in values}
    old = {name: mkv.key2path(name.encode(), "0" * 15 + "1") for name in values}
    plant(system, named["/older"][0][0], old["/older"], b"older")
    plant(system, named["/oldest"][1][0], mkv.key2path(b"/oldest"), b"without an id")
    for location, _, _ in named["/replaced"][:2]:
        plant(system, location, mkv.key2path(b"/replaced", NEW), b"newer")
    garbage = {("/older", named["/older"][0][0], old["/older"])}
    garbage |= {("/oldest", named["/oldest"][1][0], mkv.key2path(b"/oldest"))}
    garbage |= {("/replaced", location, path) for location, path, _ in named["/replaced"]}
    assert system.server.stop() == 0
    before, files = system.tables(), system.files()
    if case != "existing":
        without_index(system)
    adopts = ["-adopt-garbage"] if case == "new, adopted" else []
    done = run(system, "rebuild", *adopts, status=1)
    found = {(each["key"], each["location"], each["path"]) for each in done.found("garbage")}
    assert (found, done.kinds()) == (garbage, {"garbage"})
    records, journal = system.tables()
    assert system.files() == files and set(records) == set(before[0])
    listed_now = {(k, r.location, r.write_id) for k, e in journal.items() for r in e.replicas}
    wanted = {(key.encode(), at, mkv.path2key(path)[1]) for key, at, path in garbage}
    assert listed_now == (set() if case == "new" else wanted)
    newest = records[b"/replaced"]
    assert {replica.write_id for replica in newest.replicas} == {NEW}
    assert (newest.size, newest.hash) == (5, "")  # the old MD5 does not fit
    assert bool(records[b"/same"].hash) == (case == "existing")
    system.server.start()
    values["/replaced"] = b"newer"
    assert_values(system, values)
    if case == "new":
        assert system.files() == files
    else:
        until(system.is_clean)


def test_newest_files_of_different_sizes_make_a_record_and_always_the_same(cluster: Make) -> None:
    system = cluster(subvolumes=1)
    assert system.server.put("/k", b"value") == 201
    files_of(system, "/k")[1][2].write_bytes(b"val")
    assert system.server.stop() == 0
    tables = []
    for _ in range(2):
        without_index(system)
        assert Command(system, "rebuild").wait().status in (0, 1)
        tables.append(system.tables())
    assert tables[0] == tables[1] and set(tables[0][0]) == {b"/k"}


def test_keys_whose_files_are_all_gone_stay_and_verify_names_them(cluster: Make) -> None:
    system = cluster()
    store_all(system, values_of(["/gone", "/half", "/kept"]))
    for _, _, file in files_of(system, "/gone") + files_of(system, "/half")[:1]:
        file.unlink()
    assert system.server.stop() == 0
    before = system.tables()
    assert run(system, "rebuild").findings == []
    assert system.tables() == before
    system.server.start()
    done = run(system, "verify", status=1)
    assert sorted(each["key"] for each in done.found("missing")) == ["/gone"] * 3 + ["/half"]
    assert {each["key"] for each in done.found("under-replicated")} == {"/gone", "/half"}
    assert system.server.call("DELETE", "/gone").status == 204
    run(system, "rebalance")
    assert_at_home(system, system.volumes, 3, 10)


JUNK = [b"/README", b"/5d/41/not base64!", b"/5d/42/aGVsbG8=", b"/5d/41/aGVsbG8=-0123"]
JUNK += [b"/5d/41/aGVsbG8", b"/aa/bb/cc/dd/ee/ff", b"/aa/b b/#%41?&", b"/aa/%2e/\"quoted'\\"]
JUNK += [b"/aa/bb/\xff\xfe", b"/a\xff/bb/x", "/été/ÿ".encode()]
JUNK += [b"/aa/bb/%2e%2e", b"/aa/%252e%252e/%00", b"/aa/x../\\..\\", "/aa/bb/😀".encode()]
JUNK += [b"/aa/bb/" + b"x" * 255, b"/%2e%2e/bb/x"]


def test_what_is_no_file_under_the_name_of_one_is_reported(cluster: Make) -> None:
    system = cluster()
    store_all(system, values_of(["/k"]))
    link = Path(f"{drive_at(system, ideal(system, '/x')[0])}{mkv.key2path(b'/x', WRITE_ID)}")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("nowhere")
    assert run(system, "verify", status=1).kinds() == {"name"}
    assert system.server.stop() == 0
    assert run(system, "rebuild", status=1).kinds() == {"name"}


def test_after_a_crash_in_a_move_rebuild_takes_copies_and_originals_for_one_value(
    cluster: Make,
) -> None:
    system = cluster(volumes=4, subvolumes=1)
    values = values_of(["/k"])
    store_all(system, values)
    record = system.tables()[0][b"/k"]
    fourth = ideal(system, "/k", 4)[3]
    copy = mkv.key2path(b"/k", record.write_id[:8] + "0" * 8)
    plant(system, fourth, copy, values["/k"])
    assert system.server.stop() == 0
    without_index(system)
    assert run(system, "rebuild", "-adopt-garbage").findings == []
    found = system.tables()[0][b"/k"]
    assert [r.location for r in found.replicas] == ideal(system, "/k", 4)
    system.server.start()
    assert run(system, "verify", status=1).kinds() == {"unbalanced"}
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 1)
    assert_values(system, values)


@pytest.mark.parametrize("subvolumes", [1, 2])
def test_names_that_no_key_has_are_reported_and_left_alone(cluster: Make, subvolumes: int) -> None:
    system = cluster(subvolumes=subvolumes)
    store_all(system, values_of(NAMES))
    assert system.server.stop() == 0
    place = ideal(system, "/x")[0]
    for junk in JUNK:
        plant(system, place, junk, b"junk")
    before = state(system)
    for name in ("rebuild", "verify"):
        done = run(system, name, status=1)
        assert done.kinds() == {"name"} and {f["location"] for f in done.findings} == {place}
        paths = {re.sub("[\ufffd\udc80-\udcff]", "?", each["path"]) for each in done.findings}
        files = {junk.decode(errors="replace").replace("\ufffd", "?") for junk in JUNK}
        assert all(any(file.startswith(path) for path in paths) for file in files), files - paths
        assert all(any(file.startswith(path) for file in files) for path in paths), paths - files
        assert state(system) == before


@needs_root
def test_a_folder_that_is_not_ours_does_not_stop_a_rebuild(cluster: Make) -> None:
    system = cluster(subvolumes=2)
    store_all(system, values_of(["/k"]))
    assert system.server.stop() == 0
    without_index(system)
    volume = system.volumes[0]
    volume.kill()
    with foreign_folder() as folder:  # nginx as nobody, and a lost+found of root on a drive
        shutil.copytree(volume.folder, folder, dirs_exist_ok=True)
        shell("chown", "-R", "nobody:nogroup", str(folder))
        (folder / "sv00/lost+found").mkdir(mode=0o700)
        volume.folder = folder
        volume.start()
        done = Command(system, "rebuild").wait()
        volume.kill()
    assert done.status in (0, 1) and done.kinds() <= {"name"}, done
    assert len(system.tables()[0][b"/k"].replicas) == 3


@pytest.mark.parametrize("ailment", ["dead", "drive away"])
def test_rebuild_changes_nothing_when_it_cannot_list_all(cluster: Make, ailment: str) -> None:
    system, one = cluster("-replicas", "1", subvolumes=2), ("-replicas", "1")
    store_all(system, values_of(f"/k{n}" for n in range(30)))
    assert system.server.stop() == 0
    before, _ = system.tables()
    ((location, _, file),) = files_of(system, "/k0")
    places = {record.replicas[0].location for record in before.values()}
    at = next(place for place in places if volume_of(place) != volume_of(location))
    plant(system, at, mkv.key2path(b"/new", WRITE_ID), b"value")
    victim, drive = volume_at(system, location), drive_at(system, location)
    victim.kill() if ailment == "dead" else drive.rename(system.folder / "away")
    refused = run(system, "rebuild", *one, status=2)
    assert victim.name in json.dumps(refused.findings) + refused.said
    assert system.tables() == (before, {})
    partial = run(system, "rebuild", *one, "-partial", status=2)
    assert partial.kinds() == {"unreachable"}
    assert {volume_of(each["location"]) for each in partial.findings} == {victim.name}
    records, _ = system.tables()  # whether files are where nobody can look, nobody knows
    assert set(records) == {b"/new", *before} and records[b"/k0"] == before[b"/k0"]
    shutil.rmtree(system.folder / "index")
    run(system, "rebuild", *one, status=2)
    with contextlib.suppress(lmdb.Error):
        assert system.tables() == ({}, {})
    run(system, "rebuild", *one, "-partial", status=2)
    assert b"/new" in system.tables()[0] and b"/k0" not in system.tables()[0]
    victim.start() if ailment == "dead" else (system.folder / "away").rename(drive)
    run(system, "rebuild", *one)
    assert set(system.tables()[0]) == {b"/new", *before}


def test_a_rebuild_and_a_server_keep_each_other_out(cluster: Make) -> None:
    system = cluster("-voltimeout", "20s")
    store_all(system, values_of(["/k"]))
    before = state(system)
    refused = Command(system, "rebuild").wait()
    assert refused.status == 2 and refused.findings == []
    assert refused.said.count("\n") == 1 and "another process uses it" in refused.said
    assert state(system) == before
    assert system.server.get("/k") == blob("/k", 1)
    assert system.server.stop() == 0
    system.volumes[1].freeze()
    command = Command(system, "rebuild", "-voltimeout", "20s")
    until(lambda: connected(command.process, system.volumes[1]))
    flags = ["-port", str(system.server.port), "-db", system.server.db, *system.server.flags]
    assert "rebuild" in error_of("server", *flags, folder=system.folder)
    system.volumes[1].thaw()
    assert command.wait().status == 0
    system.server.start()
    assert_values(system, values_of(["/k"]))


def test_rebuild_finds_files_of_other_numbers_of_subvolumes(cluster: Make) -> None:
    system = cluster("-subvolumes", "1", subvolumes=10)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(10))])
    store_all(system, values)
    without_index(system)
    assert run(system, "rebuild").findings == []
    assert system.named() == system.files()
    system.server = system.start(*free_ports(1))
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 10)
    assert_values(system, values)


# --- rebalance ------------------------------------------------------------------------------------


MOVES = {  # volumes before and after, the flags before, replicas and subvolumes before and after
    "3 to 5 volumes": (3, 5, 3, 3, 4, 4),
    "5 to 3 volumes": (5, 3, 3, 3, 4, 4),
    "2 to 3 replicas": (4, 4, 2, 3, 2, 2),
    "3 to 2 replicas": (4, 4, 3, 2, 2, 2),
    "1 to 10 subvolumes": (3, 3, 3, 3, 1, 10),
    "a volume lost for good": (4, 3, 2, 2, 2, 2),
}


@pytest.mark.parametrize("move", MOVES)
def test_every_key_moves_home_beside_readers_and_writers(cluster: Make, move: str) -> None:
    volumes, later, replicas, wanted, drives, subvolumes = MOVES[move]
    flags = ("-replicas", f"{replicas}", "-subvolumes", f"{drives}")
    system = cluster(*KEPT, *flags, volumes=volumes, subvolumes=subvolumes)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(40)), "/hidden"])
    store_all(system, values)
    assert system.server.call("UNLINK", "/hidden").status == 204
    del values["/hidden"]
    assert system.server.stop() == 0
    grow(system, max(0, later - volumes))
    lost, left = system.volumes[later:], system.volumes[:later]
    if move.endswith("lost for good"):
        lost[0].kill()
    flags = ("-replicas", f"{wanted}", "-subvolumes", f"{subvolumes}")
    flags += ("-volumes", ",".join(volume.name for volume in left))
    system.server = system.start(*free_ports(1), *KEPT, *flags)
    with traffic(system, values):
        assert run(system, "rebalance", *KEPT, *flags).findings == []
        assert run(system, "verify", *flags).findings == []  # nothing under way is taken for amiss
    if move.endswith("lost for good"):  # what it had stays listed, should it ever come back
        until(lambda: system.named() == {f for f in system.files() if lost[0].name not in f}, 30)
        assert not system.journal_is_empty()
        lost[0].start()
    assert_at_home(system, left, wanted, subvolumes)
    assert not any(volume.files() for volume in lost)
    hidden = listed(system.server, "/?unlinked")[0]
    assert "/hidden" in hidden
    assert_values(system, values)
    assert run(system, "verify", "-deep", *flags).findings == []
    assert run(system, "rebalance", *flags).findings == []
    assert {system.server.call("DELETE", quote(name)).status for name in hidden} == {204}
    until(system.is_clean)


def test_rebalance_works_without_a_server_too(cluster: Make) -> None:
    system = cluster(volumes=3)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(20))])
    store_all(system, values)
    grow(system, 2)
    assert system.server.stop() == 0
    assert run(system, "rebalance").findings == []
    assert system.is_clean()
    assert run(system, "verify").findings == []
    system.server = system.start(*free_ports(1))
    assert_values(system, values)
    assert_at_home(system, system.volumes, 3, 10)


@pytest.mark.parametrize("verb", ["DELETE", "UNLINK"])
def test_a_delete_or_unlink_in_the_middle_of_a_move_wins(cluster: Make, verb: str) -> None:
    system = cluster("-subvolumes", "1", volumes=3, subvolumes=2)
    value = Value(1, 80 * MB)
    assert upload(system.server, "/k", value) == 201
    replace(system, "-subvolumes", "2")
    command = Command(system, "rebalance")
    assert moving(system, command)
    assert system.server.call(verb, "/k").status == 204
    assert system.server.call("GET", "/k").status == 404
    command.process.send_signal(signal.SIGCONT)
    assert command.wait().status == 0 or verb == "UNLINK"
    assert system.server.call("GET", "/k").status == 404
    until(system.is_clean, 30)
    if verb == "DELETE":
        assert not system.files()
    else:
        assert listed(system.server, "/?unlinked")[0] == ["/k"]
        assert run(system, "rebalance").findings == []
        assert_at_home(system, system.volumes, 3, 2)
        assert system.tables()[0][b"/k"].deleted
        (_, _, file), *_ = files_of(system, "/k")
        assert file.stat().st_size == value.size


def test_a_rebalance_killed_anywhere_is_completed_by_the_next(cluster: Make) -> None:
    system = cluster(*KEPT, volumes=5, subvolumes=2)
    values = values_of(f"/k{n}" for n in range(80)) | {"/large": blob("large", 60 * MB)}
    store_all(system, values)
    three = ",".join(volume.name for volume in system.volumes[:3])
    dice, killed = random.Random(), 0
    with traffic(system, values, 5):
        for turn in range(9):
            fewer = () if turn % 2 else ("-volumes", three)
            command = Command(system, "rebalance", *KEPT, *fewer)
            killed += moving(system, command)
            command.process.send_signal(signal.SIGCONT)
            time.sleep(dice.random() * 0.3)  # anywhere
            command.kill()
    assert killed >= 5
    assert run(system, "rebalance", *KEPT).findings == []
    assert_values(system, values)
    assert_at_home(system, system.volumes, 3, 2)
    assert run(system, "verify", "-deep").findings == []


def test_a_volume_that_dies_under_a_rebalance_leaves_keys_for_the_next(cluster: Make) -> None:
    system = cluster(volumes=3, subvolumes=2)
    values = values_of(f"/k{n}" for n in range(40))
    values |= {f"/large{n}": blob(f"large{n}", 12 * MB) for n in range(5)}
    store_all(system, values)
    grow(system, 1)
    replace(system)
    command = Command(system, "rebalance")
    assert moving(system, command)
    system.volumes[3].kill()
    command.process.send_signal(signal.SIGCONT)
    assert command.wait().status == 1
    assert command.kinds() <= {"failed", "unbalanced"} and command.found("unbalanced")
    assert all(each["key"] and each["reason"] for each in command.found("failed"))
    assert_values(system, values)
    system.volumes[3].start()
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 2)
    assert_values(system, values)


def test_large_values_are_moved_and_verified_in_little_memory(cluster: Make) -> None:
    system = cluster("-replicas", "1", "-subvolumes", "1", volumes=1, subvolumes=2)
    value = Value(1, 160 * MB)
    assert upload(system.server, "/large", value) == 201
    replace(system, "-subvolumes", "2")
    for name, flags in (("rebalance", ()), ("verify", ("-deep",)), ("rebalance", ("-deep",))):
        command = Command(system, name, "-replicas", "1", *flags)
        peak = 0
        while command.process.poll() is None:
            with contextlib.suppress(IndexError):  # it is ending
                peak = command.memory()
        command.wait()
        assert (command.status, command.findings) == (0, []), command
        assert 0 < peak < 96 * MB
    assert_at_home(system, system.volumes, 1, 2)
    assert sha256(download(replicas_of(system, b"/large")[0])) == value.sha256()


def spoil(file: Path) -> None:
    """The same size, other bytes."""
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


def test_rebalance_repairs_from_a_good_copy_what_is_missing_or_wrong(cluster: Make) -> None:
    system = cluster()
    values = values_of(["/missing", "/short", "/bent", "/both", "/none", "/whole"])
    values["/both"] = blob("both", 300_000)
    store_all(system, values)
    del values["/none"]
    for name, hurt in (("/missing", Path.unlink), ("/bent", spoil), ("/both", spoil)):
        hurt(files_of(system, name)[0][2])
    for number in range(2):
        files_of(system, "/short")[number][2].write_bytes(b"short of bytes"[:number])
    files_of(system, "/both")[2][2].unlink()
    for _, _, file in files_of(system, "/none"):
        file.unlink()
    done = run(system, "rebalance", status=1)
    assert [each["key"] for each in done.findings] == ["/none"] and done.kinds() == {"failed"}
    for name in ("/missing", "/short", "/whole"):
        assert_copies(system, name, values[name])
    assert sorted(copies(system, "/both").values()).count(values["/both"]) >= 2
    done = run(system, "rebalance", "-deep", status=1)
    assert [each["key"] for each in done.findings] == ["/none"]
    for name, value in values.items():
        assert_copies(system, name, value)
    assert len(system.tables()[0][b"/none"].replicas) == 3  # its files may come back
    assert system.server.call("DELETE", "/none").status == 204
    assert_at_home(system, system.volumes, 3, 10)
    assert run(system, "rebalance", "-deep").findings == []
    assert run(system, "verify", "-deep").findings == []


def test_without_md5_a_deep_rebalance_spreads_no_rot_and_says_so(cluster: Make) -> None:
    system = cluster("-md5sum", "false")
    values = values_of(["/bent", "/whole"])
    store_all(system, values)
    (_, _, bent), *_ = files_of(system, "/bent")
    spoil(bent)
    grow(system, 1)
    flags = "-deep", "-md5sum", "false"
    assert [each["key"] for each in run(system, "verify", *flags, status=1).found("md5")] == [
        "/bent"
    ] * 3
    done = run(system, "rebalance", *flags, status=1)
    assert {each["key"] for each in done.found("failed")} == {"/bent"}
    assert sorted(copies(system, "/bent").values()).count(values["/bent"]) == 2


@pytest.mark.parametrize("hurt", [spoil, lambda file: file.write_bytes(file.read_bytes() + b"x")])
def test_what_was_repaired_is_newer_than_what_was_rotten_to_a_later_rebuild(
    cluster: Make, hurt: Callable[[Path], Any]
) -> None:
    kept = "-grace", "1h"  # what was rotten is still there
    system = cluster(*kept)
    values = values_of(f"/k{n}" for n in range(8))
    store_all(system, values)
    for name in values:
        hurt(files_of(system, name)[1][2])
    assert system.server.stop() == 0
    command = Command(system, "rebalance", "-deep", *kept)
    until(lambda: system.journal_is_empty() is False and len(system.tables()[1]) == len(values))
    until(lambda: not owned(system))
    command.kill()
    without_index(system)
    assert run(system, "rebuild", status=1).kinds() == {"garbage"}
    assert run(system, "verify", "-deep", status=1).kinds() == {"unknown"}
    system.server.start()
    assert_values(system, values)


def test_a_rotten_copy_gives_no_md5_to_a_record_that_had_none(cluster: Make) -> None:
    system = cluster("-md5sum", "false")
    values = values_of(f"/k{n}" for n in range(8))
    store_all(system, values)
    for name in values:
        (_, _, rotten), (_, _, missing), _ = files_of(system, name)
        spoil(rotten)
        missing.unlink()
    assert run(system, "rebalance").findings == []
    assert run(system, "rebalance", "-deep", status=1).kinds() == {"failed"}
    for name, value in values.items():
        assert value in copies(system, name).values()


def test_a_move_to_a_volume_that_turns_out_dead_goes_to_the_next(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=2)
    values = values_of(f"/k{n}" for n in range(12))
    store_all(system, values)
    grow(system, 3)
    for volume in system.volumes[2:4]:
        volume.kill()
    done = run(system, "rebalance", "-replicas", "3", status=1)
    assert done.kinds() == {"unbalanced"}
    assert {len(record.replicas) for record in system.tables()[0].values()} == {3}
    assert_values(system, values)


def test_a_volume_that_was_lost_leaves_the_records_when_fewer_replicas_are_wanted(
    cluster: Make,
) -> None:
    system = cluster(volumes=3)
    values = values_of(f"/k{n}" for n in range(10))
    store_all(system, values)
    assert system.server.stop() == 0
    system.volumes[2].kill()
    left = ",".join(volume.name for volume in system.volumes[:2])
    flags = ("-volumes", left, "-replicas", "2")
    assert run(system, "rebalance", *flags).findings == []
    assert run(system, "verify", *flags).findings == []
    assert {len(record.replicas) for record in system.tables()[0].values()} == {2}


def test_rebalance_fills_an_empty_drive_in_the_place_of_a_dead_one(cluster: Make) -> None:
    system = cluster(subvolumes=2)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(30))])
    store_all(system, values)
    system.volumes[1].kill()
    shutil.rmtree(system.volumes[1].folder)
    system.volumes[1].start()
    assert run(system, "verify", status=1).kinds() <= {"missing", "under-replicated"}
    assert run(system, "rebalance").findings == []
    assert run(system, "verify", "-deep").findings == []
    assert_at_home(system, system.volumes, 3, 2)
    assert_values(system, values)


# --- verify ---------------------------------------------------------------------------------------


def test_verify_names_everything_that_is_amiss_and_changes_nothing(cluster: Make) -> None:
    system = cluster(subvolumes=2)
    values = values_of(["/bent", "/short", "/missing", "/whole", SLASH, "/unlinked"])
    store_all(system, values)
    assert system.server.call("UNLINK", "/unlinked").status == 204
    assert run(system, "verify", "-deep").findings == []
    (at, path, bent), *_ = files_of(system, "/bent")
    wrong = [{"finding": "md5", "key": "/bent", "location": at, "path": path}]
    spoil(bent)
    at, path, file = files_of(system, "/short")[1]
    file.write_bytes(b"short of bytes")
    wrong.append({"finding": "size", "key": "/short", "location": at, "path": path})
    for key in ("/missing", SLASH, "/unlinked"):
        at, path, file = files_of(system, key)[2]
        file.unlink()
        wrong.append({"finding": "missing", "key": key, "location": at, "path": path})
    at = ideal(system, "/whole")[0]
    for key, write_id in (("/stranger", WRITE_ID), ("/whole", NEW), ("/é" + "ÿ" * 59, "")):
        path = mkv.key2path(key.encode(), write_id)
        plant(system, at, path, b"value")
        wrong.append({"finding": "unknown", "key": key, "location": at, "path": path})
    plant(system, at, "/aa/bb/nonsense", b"value")
    wrong.append({"finding": "name", "key": "", "location": at, "path": "/aa/bb/nonsense"})
    before = state(system)
    for flags, expected in (((), wrong[1:]), (("-deep",), wrong)):
        done = run(system, "verify", *flags, status=1)
        found = [each for each in done.findings if each["finding"] != "under-replicated"]
        assert len(found) == len(expected) and all(each in expected for each in found), found
        hurt = {each.get("key") for each in wrong}
        assert {each["key"] for each in done.found("under-replicated")} <= hurt
    assert state(system) == before


def test_verify_names_keys_with_too_few_replicas_or_not_at_home(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=3)
    values = values_of(f"/k{n}" for n in range(30))
    store_all(system, values)
    done = run(system, "verify", "-replicas", "3", status=1)
    short = [{"key": name} for name in sorted(values)]
    assert sorted(done.found("under-replicated"), key=lambda each: each["key"]) == short
    two, before = ("-replicas", "2"), state(system)
    assert run(system, "verify", *two).findings == []
    grow(system, 1)
    done = run(system, "verify", *two, status=1)
    away = {
        name
        for name in values
        if [at for at, _, _ in files_of(system, name)] != ideal(system, name, 2)
    }
    assert done.kinds() == {"unbalanced"} and len(done.findings) == len(away) > 0
    assert {each["key"] for each in done.found("unbalanced")} == away
    assert state(system) == before


def test_verify_takes_no_listed_garbage_for_a_finding(cluster: Make) -> None:
    system = cluster("-grace", "1m")
    store_all(system, values_of(["/k", "/old"]))
    volume = volume_at(system, ideal(system, "/old")[0])
    volume.kill()
    assert system.server.call("DELETE", "/old").status == 204
    volume.start()
    assert run(system, "verify").findings == []
    assert len(system.tables()[1]) == 1


@pytest.mark.parametrize("ailment", ["dead", "drive away", "no index"])
def test_verify_says_when_it_could_not_check(cluster: Make, ailment: str) -> None:
    system = cluster(subvolumes=2)
    store_all(system, values_of(f"/k{n}" for n in range(10)))
    location, _, _ = files_of(system, "/k0")[0]
    if ailment == "no index":
        none = system.folder / "none"
        done = Command(system, "verify", "-db", str(none)).wait()
        assert done.status == 2 and done.findings == [] and not none.exists()
        assert done.said.count("\n") == 1 and "no index" in done.said
        return
    before = system.tables()
    if ailment == "dead":
        volume_at(system, location).kill()
    else:
        drive_at(system, location).rename(system.folder / "away")
    done = run(system, "verify", status=2)
    assert done.kinds() == {"unreachable", "unfinished"}  # and not a word of what nobody can know
    places = {each["location"] for each in done.found("unreachable")}
    assert location in places and {volume_of(place) for place in places} == {volume_of(location)}
    assert volume_of(location) in done.found("unfinished")[0]["reason"]
    done = run(system, "verify", "-partial", status=2)
    assert done.kinds() == {"unreachable"}
    assert system.tables() == before


# --- progress, and the end before the end ---------------------------------------------------------


@pytest.mark.parametrize("name", ["rebuild", "rebalance", "verify"])
def test_ctrl_c_ends_a_command_at_once_and_it_says_what_is_left(cluster: Make, name: str) -> None:
    system = cluster("-subvolumes", "1", subvolumes=2)
    store_all(system, values_of(f"/k{n}" for n in range(20)))
    assert system.server.stop() == 0
    before = system.tables()
    system.volumes[0].freeze()
    command = Command(system, name, "-voltimeout", "60s")
    until(lambda: connected(command.process, system.volumes[0]))
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(10) == 2
    assert command.wait().kinds() == {"unfinished"}
    assert re.search(rf"{name}.*\d", command.said) and len(command.said.splitlines()) <= 3
    if name != "rebalance":
        assert system.tables() == before
    system.volumes[0].thaw()
    system.server.start()
    assert_values(system, values_of(f"/k{n}" for n in range(20)))
    assert run(system, "rebalance").findings == []
    until(system.is_clean)


def test_progress_on_a_terminal_is_one_line_that_changes(cluster: Make) -> None:
    system = cluster()
    store_all(system, values_of(f"/k{n}" for n in range(20)))
    screen, terminal = os.openpty()
    os.set_blocking(screen, False)
    said = b""

    def more() -> bytes:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(screen, 65536)
        return said

    system.volumes[0].freeze()
    command = Command(system, "verify", "-voltimeout", "60s", stderr=terminal)
    until(lambda: b"\r" in more() and re.search(rb"\d", said))
    assert b"\n" not in said
    system.volumes[0].thaw()
    assert command.wait().status == 0
    until(lambda: re.search(rb"verify: [^\r\n]*\d[^\r\n]*\r?\n$", more()))
    os.close(screen)
    os.close(terminal)


# --- security: locked volumes ---------------------------------------------------------------------

SECRET, EVER = "correct.horse.battery/staple+=", 1 << 33
LOCKED = {"AUTH": "users", "SECRET": SECRET}
VALUE = "/sv00/aa/bb/a+b=-id"


def basic(userpass: str) -> dict[str, str]:
    """The header field of a user with a password."""
    return {"Authorization": "Basic " + base64.b64encode(userpass.encode()).decode()}


ADMIN, STRANGER = basic("admin:pässword"), basic("admin:password")


def signed(path: str, until: int = EVER, secret: str = SECRET) -> str:
    """What nginx's documentation of secure_link says, for the path of a request."""
    md5 = hashlib.md5(f"{until}{path} {secret}".encode()).digest()
    return f"{path}?md5={base64.urlsafe_b64encode(md5).decode().rstrip('=')}&expires={until}"


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Volumes and servers that are started after locked(AUTH="users", …) have that in front."""
    digest = base64.b64encode(hashlib.sha1("pässword".encode()).digest()).decode()
    (tmp_path / "users").write_text(f"admin:{{SHA}}{digest}\n")
    (tmp_path / "users").chmod(0o600)

    def lock(**env: str) -> None:
        for name, value in env.items():
            monkeypatch.setenv(name, str(tmp_path / value) if name == "AUTH" else value)

    lock(MKV_USERPASS="admin:pässword", MKV_SECRET=SECRET)
    return lock


@pytest.fixture
def guarded(locked: Callable[..., None], tmp_path: Path) -> Iterator[Callable[..., Volume]]:
    """Starts a volume: guarded(AUTH="users", …)."""
    started: list[Volume] = []

    def start(**env: str) -> Volume:
        locked(**env)
        started.append(Volume(tmp_path / "volume", *free_ports(1)))
        return started[0]

    yield start
    for volume in started:
        volume.kill()


@pytest.fixture
def vault(guarded: Callable[..., Volume]) -> Volume:
    """A volume with AUTH and SECRET, and the value "value" at VALUE."""
    volume = guarded(**LOCKED)
    assert call(volume.port, "PUT", VALUE, b"value", ADMIN).status == 201
    return volume


def test_a_volume_with_auth_lets_in_who_has_a_password_and_nobody_else(vault: Volume) -> None:
    port, before = vault.port, vault.files()
    for path in (VALUE, "/sv00/aa/bb/other", "/", "/sv00/", "/sv00/aa/bb/"):
        for method in ("GET", "HEAD", *(("PUT", "DELETE") if path[-1] != "/" else ())):
            body = b"stranger" if method == "PUT" else None
            for fields in ({}, STRANGER, basic("nobody:pässword"), {"Authorization": "Basic !"}):
                answer = call(port, method, path, body, fields)
                assert answer.status == 401, (method, path, fields)
                assert answer.fields["www-authenticate"].startswith("Basic ")
                assert b"value" not in answer.body
    assert vault.files() == before
    assert call(port, "GET", VALUE, None, ADMIN).body == b"value"
    assert call(port, "GET", "/sv00/aa/bb/", None, ADMIN).status == 200
    assert call(port, "DELETE", VALUE, None, ADMIN).status == 204


def test_a_signed_link_is_good_for_reading_without_a_password_and_for_nothing_else(
    vault: Volume,
) -> None:
    port, link, before = vault.port, signed(VALUE), vault.files()
    assert call(port, "GET", link).body == b"value"
    assert call(port, "HEAD", link).fields["content-length"] == "5"
    assert call(port, "GET", link, None, {"Range": "bytes=1-2"}).body == b"al"
    assert call(port, "GET", signed("/sv00/aa/bb/none")).status == 404
    for path in (link, signed("/sv00/aa/bb/new")):
        for method in ("PUT", "DELETE", "POST", "MKCOL", "PATCH"):
            answer = call(port, method, path, b"new" if method == "PUT" else None)
            assert answer.status == 401, (method, path)
    assert vault.files() == before and call(port, "GET", link).body == b"value"


def test_a_link_that_is_not_right_is_refused_as_if_it_were_not_signed(vault: Volume) -> None:
    port, now, link = vault.port, int(time.time()), signed(VALUE)
    assert call(port, "PUT", "/sv00/aa/bb/other", b"other", ADMIN).status == 201
    md5 = link.partition("md5=")[2][:22]
    wrong = [signed(VALUE, now - 1), signed(VALUE, 0), signed(VALUE, -1)]  # expired
    wrong += [signed(VALUE, EVER, guess) for guess in ("", SECRET[:-1], SECRET.upper(), "@SECRET@")]
    wrong += [link.replace(f"={EVER}", f"={until}") for until in (EVER + 1, "", "x", f"0{EVER}")]
    wrong += [link.replace(VALUE, p) for p in ("/sv00/aa/bb/other", VALUE + "x", "/sv00/", "/")]
    wrong += [link.replace(md5, p) for p in ("", "x" * 22, md5[:-1], md5 + "A", "1")]
    wrong += [link.replace(md5[:5], md5[:5].swapcase()), link.replace("?", "%3F")]
    wrong += [link.partition("&")[0], VALUE + "?" + link.partition("&")[2]]
    unsigned = call(port, "GET", VALUE)
    assert unsigned.status == 401
    for path in wrong:
        assert path != link
        refused = call(port, "GET", path)
        assert (refused.status, refused.body) == (401, unsigned.body), path
        assert refused.fields["www-authenticate"] == unsigned.fields["www-authenticate"]


def test_a_signed_link_ends_when_it_expires(vault: Volume) -> None:
    link = signed(VALUE, int(time.time()) + 2)
    assert call(vault.port, "GET", link).status == 200
    until(lambda: call(vault.port, "GET", link).status == 401)


def test_without_a_secret_no_link_is_signed_and_a_signature_opens_nothing(
    guarded: Callable[..., Volume],
) -> None:
    volume = guarded(AUTH="users")
    assert call(volume.port, "PUT", VALUE, b"value", ADMIN).status == 201
    for secret in ("", "@SECRET@"):
        assert call(volume.port, "GET", signed(VALUE, EVER, secret)).status == 401


@pytest.mark.parametrize("names", ["AUTH", "AUTH SECRET", "AUTH SECRET ALLOW"])
def test_locks_leave_refusals_and_drives_that_vanished_as_they_are(
    guarded: Callable[..., Volume], names: str
) -> None:
    volume = guarded(**{name: (LOCKED | {"ALLOW": "127.0.0.1"})[name] for name in names.split()})
    for path in (VALUE, "/sv03/aa/bb/x"):
        assert call(volume.port, "PUT", path, b"value", ADMIN).status == 201
    before = volume.files()
    cases = [(403, "DELETE", f"/sv00/{path}") for path in ("", "aa/", "aa/bb/", "aa/bb/.", "x/..")]
    cases += [(403, method, "/.nginx/auth") for method in ("GET", "HEAD", "PUT", "DELETE")]
    cases += [(403, "GET", "/.nginx/nginx.conf"), (403, "PUT", "/sv00/.tmp/x")]
    cases += [(403, "PUT", "/sv00/aa/x/"), (503, "GET", "/sv03/")]
    cases += [(503, method, "/sv03/aa/bb/x") for method in ("GET", "HEAD", "PUT", "DELETE")]
    (volume.folder / "sv03/.tmp").rename(volume.folder / "sv03/away")
    for (status, method, path), fields in itertools.product(cases, (ADMIN, STRANGER, {})):
        for target in (path, signed(path)):
            body = b"x" if method == "PUT" else None
            answer = call(volume.port, method, target, body, fields)
            assert answer.status == status, (method, target, fields)
    assert volume.files() == before


def test_neither_a_password_nor_a_signature_writes_from_an_address_that_may_not(
    guarded: Callable[..., Volume],
) -> None:
    volume = guarded(ALLOW="127.0.0.5", **LOCKED)
    assert call_from("127.0.0.5", volume.port, "PUT", VALUE) == 401
    assert call_from("127.0.0.5", volume.port, "PUT", VALUE, **ADMIN) == 201
    before = volume.files()
    for path in (VALUE, signed(VALUE), "/sv00/aa/bb/new", signed("/sv00/aa/bb/new")):
        for method, fields in itertools.product(("PUT", "DELETE"), (ADMIN, {})):
            assert call_from("127.0.0.6", volume.port, method, path, **fields) == 403
    assert call_from("127.0.0.6", volume.port, "GET", VALUE, **ADMIN) == 200
    assert call_from("127.0.0.6", volume.port, "GET", signed(VALUE)) == 200
    assert volume.files() == before


@pytest.mark.parametrize("user", [None, pytest.param("nobody", marks=needs_root)])
def test_secrets_of_a_volume_are_seen_by_nobody_else(
    locked: Callable[..., None], tmp_path: Path, user: str | None
) -> None:
    locked(**LOCKED)  # the users' file is root's alone, and the workers may be another user
    with foreign_folder() if user else tempfile.TemporaryDirectory() as base:
        folder, (port,) = Path(base) / "volume", free_ports(1)
        for path in (folder, folder / ".nginx"):
            path.mkdir()
            shutil.chown(path, user or os.geteuid())
        old = folder / ".nginx/nginx.conf"
        for path in (old, folder / ".nginx/auth"):
            path.touch(0o644)
        env = os.environ | {"HOST": "127.0.0.1", "PORT": str(port)}
        with (
            (tmp_path / "log").open("wb") as log,
            old.open("rb") as spy,
            subprocess.Popen([HERE / "volume.sh", folder], env=env, stderr=log) as process,
        ):
            try:
                until(lambda: accepts(port))
                assert call(port, "PUT", VALUE, b"value", ADMIN).status == 201
                for fields in (STRANGER, {}, {"Authorization": "Basic !"}):  # no noise about it
                    assert call(port, "GET", VALUE, None, fields).status == 401
                assert SECRET in old.read_text() and spy.read() == b""
                modes = {p.name: p.stat().st_mode & 0o777 for p in (folder / ".nginx").glob("*")}
                assert modes["nginx.conf"] == modes["auth"] == 0o600
                assert old.owner() == Path(f"/proc/{process.pid}").owner()
                for pid in {process.pid} | descendants(process.pid):
                    for name in ("cmdline", "environ"):
                        assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
            finally:
                process.terminate()
        assert (tmp_path / "log").read_bytes() == b""


def test_volume_sh_says_which_lock_does_not_work(
    locked: Callable[..., None], tmp_path: Path
) -> None:
    volume, users = tmp_path / "volume", str(tmp_path / "users")
    (tmp_path / "empty").write_text("\n")
    for path in ("nowhere", "", "empty"):
        said = run_volume_sh(volume, AUTH=f"{tmp_path}/{path}")
        assert f"AUTH={tmp_path}/{path}" in said
    assert "AUTH" in run_volume_sh(volume, SECRET=SECRET)
    for secret in ("short", SECRET + ";", f'{SECRET}"', SECRET + "$uri", SECRET + "\n", "é" * 20):
        said = run_volume_sh(volume, AUTH=users, SECRET=secret)
        assert "SECRET" in said and secret not in said
    assert not volume.exists()


# --- security: a server that demands a password ---------------------------------------------------


class Recorder(socketserver.ThreadingTCPServer):
    """A port in front of another one; `heard` is what came in, connection by connection."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.port, self.heard = port, []
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.name = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, wire: socket.socket, _: object) -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port)) as other,
        ):
            self.heard.append(bytearray())
            back = threading.Thread(target=self.pump, args=(other, wire, bytearray()))
            back.start()
            self.pump(wire, other, self.heard[-1])
            back.join()

    @staticmethod
    def pump(source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                record += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


Recorded = Callable[..., tuple[Cluster, Server, list[Recorder]]]


@pytest.fixture
def recorded(cluster: Make, locked: Callable[..., None]) -> Iterator[Recorded]:
    """A locked-down cluster, its server with -basicauth, and recorders before its volumes."""
    recorders: list[Recorder] = []

    def make(*flags: str, preamble: str = "", **env: str) -> tuple:
        locked(**(env or LOCKED | {"ALLOW": "127.0.0.1"}))
        system = cluster()
        recorders.extend(Recorder(volume.port) for volume in system.volumes)
        settings = ["-basicauth", "-volumes", ",".join(each.name for each in recorders), *flags]
        server = system.start(*free_ports(1), *settings, preamble=preamble)
        return system, server, recorders

    yield make
    for recorder in recorders:
        recorder.shutdown()
        recorder.server_close()


def heard(recorders: list[Recorder], pattern: bytes) -> int:
    """How often the volumes were asked this."""
    told = [bytes(each) for recorder in recorders for each in recorder.heard]
    return sum(len(re.findall(pattern, each)) for each in told)


def test_basicauth_lets_in_who_has_a_password_and_nobody_else(recorded: Recorded) -> None:
    system, server, _ = recorded()
    assert server.call("PUT", "/k", b"value", **ADMIN).status == 201
    before = system.files()
    known = [("GET", "/k", 302), ("HEAD", "/k", 302), ("GET", "/none", 404), ("PUT", "/k", 403)]
    known += [("GET", "/?list", 200), ("GET", "/?metrics", 200), ("GET", "/?nonsense", 400)]
    known += [("GET", "/k?health", 400), ("GET", "/?health&list", 400), ("REBALANCE", "/k", 204)]
    known += [("UNLINK", "/k", 204), ("GET", "/?unlinked", 200), ("DELETE", "/k", 204)]
    strangers = [{}, STRANGER, basic(""), {"Authorization": "Bearer x"}, {"Authorization": "Basic"}]
    strangers += [{"Authorization": ADMIN["Authorization"] + tail} for tail in ("A", ", Basic x")]
    for fields, (method, path, _) in itertools.product(strangers, known):
        answer = server.call(method, path, b"x" if method == "PUT" else None, **fields)
        assert answer.status == 401, (method, path, fields)
        assert answer.fields["www-authenticate"].startswith('Basic realm="mkv"')
    assert system.files() == before and system.journal_is_empty()
    for method, path, status in known:
        answer = server.call(method, path, b"x" if method == "PUT" else None, **ADMIN)
        assert answer.status == status, (method, path)


def test_health_needs_no_password(recorded: Recorded) -> None:
    _, server, _ = recorded()
    for fields in ({}, STRANGER, ADMIN):
        assert server.call("GET", "/?health", **fields).status == 200


def test_a_put_without_a_password_gets_no_100(recorded: Recorded) -> None:
    _, server, _ = recorded()
    fields = f"Content-Length: {9 * MB}\r\nExpect: 100-continue\r\n"
    login = f"Authorization: {ADMIN['Authorization']}\r\n"
    for credentials, status in (("", 401), (login, 100)):
        with Wire(server.port) as wire:
            wire.send(request("PUT", "/big", b"", fields + credentials))
            assert wire.head()[0] == status


def test_every_request_of_a_connection_needs_a_password(recorded: Recorded) -> None:
    _, server, _ = recorded()
    login = f"Authorization: {ADMIN['Authorization']}\r\n"
    with Wire(server.port) as wire:
        for credentials, status in ((login, 404), ("", 401), (login, 404), ("", 401)):
            wire.send(request("GET", "/none", b"", credentials))
            assert wire.answer().status == status


def test_good_credentials_are_remembered_and_bad_ones_are_not(recorded: Recorded) -> None:
    _, server, recorders = recorded("-voltimeout", "5s")
    assert server.call("PUT", "/k", b"value", **ADMIN).status == 201
    for _ in range(20):
        assert server.call("GET", "/k", **ADMIN).status == 302
    assert heard(recorders, b"HEAD /login ") == 1
    for number in range(2, 6):
        assert server.call("GET", "/k", **STRANGER).status == 401
        assert heard(recorders, b"HEAD /login ") == number
    assert server.call("GET", "/k", **ADMIN).status == 302
    assert heard(recorders, b"HEAD /login ") == 5


def test_bad_credentials_change_nothing_in_what_is_known_of_the_volumes(
    recorded: Recorded,
) -> None:
    _, server, recorders = recorded("-voltimeout", "60s", "-subvolumes", "1")
    assert server.call("PUT", "/k", b"value", **ADMIN).status == 201
    assert server.call("GET", "/k", **ADMIN).status == 302
    log, asked = server.log.read_text(), heard(recorders, b"HEAD /(?!login)")
    long = [
        "A" * 9000,
        "A" * 15_000,
        "\xff" * 4000,
        "\xff" * 9000,
    ]  # nginx takes no line over 8 KiB
    bad = [STRANGER, {}, *({"Authorization": "Basic " + each} for each in long)]
    for fields in bad * 3:
        assert server.call("GET", "/k", **fields).status == 401
    for _ in range(20):
        assert server.call("GET", "/k", **ADMIN).status == 302
    assert heard(recorders, b"HEAD /(?!login)") == asked  # all are trusted as before
    assert server.call("PUT", "/k2", b"value", **ADMIN).status == 201
    assert server.log.read_text() == log


def test_a_password_that_was_changed_is_good_no_longer_than_it_is_remembered(
    recorded: Recorded, tmp_path: Path
) -> None:
    system, server, _ = recorded("-userpass", "root:root", preamble="mkv.LOGIN_TIME = 0.5")
    assert server.call("GET", "/k", **ADMIN).status == 404
    (tmp_path / "users").write_text("root:{PLAIN}root\n")
    for volume in system.volumes:
        volume.kill()
        volume.start()
    until(lambda: server.call("GET", "/k", **ADMIN).status == 401)
    assert server.call("PUT", "/k", b"value", **basic("root:root")).status == 201


def test_many_spellings_of_a_password_leave_little_in_memory(recorded: Recorded) -> None:
    _, server, _ = recorded()

    def send(count: int) -> int:
        """Memory of the server in bytes after so many requests."""
        with Wire(server.port) as wire:
            for number in range(count):
                field = (
                    f"Authorization: {ADMIN['Authorization']}={'A' * 2048}{number}{'z' * 12_000}"
                )
                wire.send(request("GET", "/none", b"", field + "\r\n"))
                assert wire.answer().status == 404
        return anonymous_memory(server.process.pid)

    before = send(200)
    assert send(1500) - before < 8 * MB


def test_one_volume_is_enough_to_check_credentials(recorded: Recorded) -> None:
    system, server, _ = recorded("-voltimeout", "1s")
    spellings = map("".join, itertools.product(*zip("basic", "BASIC", strict=True)))

    def status(fields: dict[str, str]) -> int:
        """Of a request with credentials that are new, if only by the spelling of "Basic"."""
        field = f"{next(spellings)} {fields['Authorization'].split()[1]}"
        return server.call("GET", "/none", Authorization=field).status

    first, second, third = system.volumes
    for harm in (first.kill, second.freeze):
        harm()
        assert [status(ADMIN), status(STRANGER), status(ADMIN)] == [404, 401, 404]
    third.kill()
    assert [status(ADMIN), status(STRANGER)] == [503, 503]
    first.start()
    until(lambda: server.call("GET", "/none", **ADMIN).status == 404)


def test_volumes_that_let_everybody_in_cannot_check_credentials(recorded: Recorded) -> None:
    _, server, _ = recorded(ALLOW="127.0.0.1")
    for fields in (ADMIN, STRANGER, {}):
        answer = server.call("GET", "/none", **fields)
        assert answer.status == 503 and b"credentials" in answer.body
        assert server.call("PUT", "/k", b"value", **fields).status == 503


def test_curl_reads_from_a_locked_down_cluster_without_showing_its_password_to_a_volume(
    recorded: Recorded,
) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    system, server, recorders = recorded()
    command = ["curl", "-sS", "--fail-with-body", "-u", "admin:pässword", "-A", "the-client"]
    url = f"http://127.0.0.1:{server.port}/k%20é"
    secrets = [secret.encode() for secret in ("pässword", ADMIN["Authorization"][6:], SECRET)]
    value = blob("curl", 2 * MB)
    subprocess.run([*command, "-T", "-", url], input=value, check=True, timeout=60)
    ended = subprocess.run([*command, "-L", "-v", url], capture_output=True, timeout=60)
    assert ended.stdout == value, ended.stderr
    shown = b"".join(line for line in ended.stderr.splitlines() if line[:2] == b"< ")
    assert b"Location: http://127.0.0.1:" in shown and b"@" not in shown
    assert not [secret for secret in secrets if secret in shown]
    told = [bytes(each) for recorder in recorders for each in recorder.heard]
    clients = [each for each in told if b"User-Agent: the-client" in each]
    assert len(clients) == 1 and b"authorization" not in clients[0].lower()
    assert not [secret for secret in secrets if secret in clients[0]]
    assert [each for each in told if ADMIN["Authorization"].encode() in each]  # the server's
    for wrong in (["-u", "admin:x"], ["-u", ":"]):
        ended = subprocess.run([*command, *wrong, "-L", url], capture_output=True, timeout=60)
        assert ended.returncode == 22 and value not in ended.stdout
    subprocess.run([*command, "-X", "DELETE", url], check=True, timeout=60)
    until(lambda: not system.files())


@pytest.mark.parametrize(("flags", "seconds"), [((), 3600), (("-expiry", "2s"), 2)])
def test_redirects_are_good_for_expiry_and_made_anew(
    recorded: Recorded, flags: tuple, seconds: int
) -> None:
    _, server, _ = recorded(*flags)
    assert server.call("PUT", "/k", b"value", **ADMIN).status == 201
    began, answer = time.time(), server.call("GET", "/k", **ADMIN)
    expires = int(answer.fields["location"].rpartition("=")[2])
    assert began - 1 < expires - seconds <= time.time()
    assert follow(answer).body == b"value"
    if seconds == 2:
        until(lambda: (found := follow(answer)) and found.status == 401)
        assert time.time() >= expires
    assert follow(server.call("GET", "/k", **ADMIN)).body == b"value"


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_userpass_is_what_the_volumes_are_shown(
    cluster: Make, locked: Callable[..., None], way: str
) -> None:
    locked(**LOCKED, MKV_USERPASS="admin:wrong" if way == "flag" else "admin:pässword")
    system = cluster(*(("-userpass", "admin:pässword") if way == "flag" else ()))
    for path, size in (("/small", 10), ("/large", MB)):
        assert system.server.put(path, blob(path, size)) == 201
        assert system.server.get(path) == blob(path, size)
        assert system.server.call("DELETE", path).status == 204
    until(lambda: system.is_clean() and not system.files())


def test_a_put_with_a_wrong_userpass_is_503_and_says_why(
    cluster: Make, locked: Callable[..., None]
) -> None:
    locked(**LOCKED)
    system = cluster("-userpass", "admin:wrong")
    for path, size in (("/small", 10), ("/large", 9 * MB)):
        answer = system.server.call("PUT", path, bytes(size))
        assert answer.status == 503, answer
        assert path == "/large" or b"401" in answer.body, answer
    assert not system.files() and not system.tables()[0]


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_rebuild_rebalance_and_verify_work_on_locked_volumes(
    cluster: Make, locked: Callable[..., None], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    locked(**LOCKED)
    system = cluster(subvolumes=2)
    values = values_of([f"/k{number}" for number in range(20)] + NAMES)
    store_all(system, values)
    if way == "flag":
        monkeypatch.setenv("MKV_USERPASS", "admin:wrong")
    flags = ("-userpass", "admin:pässword") if way == "flag" else ()
    assert run(system, "verify", "-deep", *flags).findings == []
    file_at(system, "/k1", 0).unlink()
    assert run(system, "verify", *flags, status=1).kinds() == {"missing", "under-replicated"}
    assert run(system, "rebalance", *flags).findings == []
    assert_copies(system, "/k1", values["/k1"])
    assert system.server.stop() == 0
    before = {key: set(record.replicas) for key, record in system.tables()[0].items()}
    without_index(system)
    run(system, "rebuild", *flags)
    assert {key: set(record.replicas) for key, record in system.tables()[0].items()} == before


@pytest.mark.parametrize("name", ["rebuild", "rebalance", "verify"])
@pytest.mark.parametrize("userpass", ["admin:wrong", ""])
def test_a_command_without_the_right_password_changes_nothing_and_says_401(
    cluster: Make, locked: Callable[..., None], name: str, userpass: str
) -> None:
    locked(**LOCKED)
    system = cluster(subvolumes=2)
    store_all(system, values_of(f"/k{number}" for number in range(5)))
    assert system.server.stop() == 0
    before = state(system)
    done = run(system, name, "-userpass", userpass, status=1 if name == "rebalance" else 2)
    assert "is down: it answers 401" in done.said
    assert done.kinds() <= {"unfinished", "unreachable", "failed"}  # nothing is called missing
    assert state(system) == before


def test_mistakes_in_the_locks_take_one_line(tmp_path: Path) -> None:
    says = functools.partial(error_of, "server", *ONE, folder=tmp_path)
    for number in ("0", "-1", "x"):
        assert "maxconns" in says(f"-maxconns={number}")
    assert "expiry" in says("-expiry", "x")
    assert not any(tmp_path.iterdir())


class Doorman(Liar):
    """A volume that says 401, and this to whoever shows credentials, but not before `go`."""

    def __init__(self, answer: bytes) -> None:
        self.inside, self.most, self.go = 0, 0, threading.Event()
        super().__init__(answer, None)

    def lie(self, wire: socket.socket, answer: bytes, _: bytes | None) -> None:
        with wire, contextlib.suppress(OSError):
            while heard := wire.recv(1 << 16):
                self.asked = True
                self.inside += 1
                self.most = max(self.most, self.inside)
                self.go.wait(10)
                self.inside -= 1
                if b"Authorization" in heard and not answer:
                    return
                denied = b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"
                wire.sendall(answer if b"Authorization" in heard else denied)


@pytest.fixture
def doorman(tmp_path: Path) -> Iterator[Callable[[bytes], tuple[Doorman, Server]]]:
    """A volume that gives this answer to whoever shows credentials, and a server that asks it."""
    opened: list[tuple[Doorman, Server]] = []

    def make(answer: bytes) -> tuple[Doorman, Server]:
        door = Doorman(answer)
        flags = "-basicauth", "-volumes", door.name, "-replicas", "1", "-voltimeout", "5s"
        opened.append((door, Server(tmp_path / "index", *free_ports(1), *flags)))
        return opened[-1]

    yield make
    for door, server in opened:
        server.kill()
        door.go.set()
        door.close()


@pytest.mark.parametrize("status", [200, 302, 403, 404, 500, None])
def test_only_204_lets_somebody_in(
    doorman: Callable[[bytes], tuple[Doorman, Server]], status: int | None
) -> None:
    answer = f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n" if status else ""
    door, server = doorman(answer.encode())
    door.go.set()
    said = server.call("GET", "/k", **ADMIN)
    assert said.status == 503 and b"credentials" in said.body and door.asked


def test_a_login_that_takes_long_does_not_make_its_volume_look_down(
    doorman: Callable[[bytes], tuple[Doorman, Server]],
) -> None:
    door, server = doorman(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
    said = server.call("GET", "/k", **STRANGER)  # the door stays shut for longer than -voltimeout
    assert said.status == 503 and b"credentials" in said.body
    assert "is down" not in server.log.read_text()


def test_a_crowd_of_strangers_asks_a_volume_a_few_questions_at_a_time(
    doorman: Callable[[bytes], tuple[Doorman, Server]],
) -> None:
    door, server = doorman(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n")
    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(server.call, "GET", f"/{n}", **basic(f"x:{n}")) for n in range(60)]
        until(lambda: door.inside >= 8)
        door.go.set()
        assert {each.result().status for each in asked} == {401}
    assert door.most == 8


# --- security: no more connections than there is room for -----------------------------------------


def enter(port: int) -> Wire | None:
    """A connection that is served, and stays; None when it is refused."""
    wire = Wire(port)
    with contextlib.suppress(OSError, IndexError):  # reset, or closed without an answer
        wire.send(request("GET", "/?health"))
        if wire.answer().status == 200:
            return wire
    wire.__exit__()
    return None


def fill_up(stack: contextlib.ExitStack, server: Server, count: int) -> list[Wire]:
    """So many connections that are served, which is as many as there may be."""
    wires = [stack.enter_context(until(lambda: enter(server.port))) for _ in range(count)]
    assert not enter(server.port)
    return wires


def test_a_connection_too_many_is_503_before_it_says_a_word(cluster: Make) -> None:
    server = cluster("-maxconns", "4").server
    with contextlib.ExitStack() as stack:
        fill_up(stack, server, 4)
        for _ in range(20):
            silent = stack.enter_context(Wire(server.port))
            answer = silent.answer()
            assert (answer.status, answer.fields["connection"]) == (503, "close")
            assert answer.body.count(b"\n") == 1 and b"-maxconns" in answer.body
            assert silent.closed()


def test_who_sends_50_mb_on_a_connection_too_many_reads_the_503(cluster: Make) -> None:
    server = cluster("-maxconns", "8").server
    with contextlib.ExitStack() as stack:
        inside, *_ = fill_up(stack, server, 8)
        outside = stack.enter_context(Wire(server.port))
        outside.send(request("PUT", "/k", bytes(50 * MB)))  # fails if it is reset
        assert outside.answer().status == 503
        assert outside.closed()
        inside.send(request("GET", "/k"))
        assert inside.answer().status == 404


def test_when_a_connection_ends_the_next_one_is_taken(cluster: Make) -> None:
    server = cluster("-maxconns", "3", preamble="mkv.LINGER_TIME = mkv.TICK = 60").server
    with contextlib.ExitStack() as stack:
        wires = fill_up(stack, server, 3)
        for _ in range(10):  # who was refused and does not go takes nobody's place
            assert stack.enter_context(Wire(server.port)).answer().status == 503
        for wire in wires:
            wire.__exit__()
            stack.enter_context(until(lambda: enter(server.port)))
            assert not enter(server.port)


def test_what_is_under_way_goes_on_when_no_more_connections_are_taken(cluster: Make) -> None:
    system = cluster("-maxconns", "2")
    server, value = system.server, blob("value", 4 * MB)
    with contextlib.ExitStack() as stack:
        (kept,) = [stack.enter_context(until(lambda: enter(server.port)))]
        upload = Upload(server.port, "/k", len(value))
        upload.send(value[:MB])
        until(lambda: owned(system) == 1)
        for _ in range(30):
            assert not enter(server.port)
        upload.send(value[MB:])
        kept.send(request("GET", "/none"))
        assert kept.answer().status == 404
        assert upload.answer() == 201
        kept.send(request("GET", "/k"))
        assert kept.answer().status == 302
    assert_copies(system, "/k", value)


def test_as_many_connections_are_taken_as_can_have_a_put_each_under_way(cluster: Make) -> None:
    preamble = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    server = cluster(preamble=preamble).server
    with contextlib.ExitStack() as stack:
        wires = fill_up(stack, server, 20)
        for number, wire in enumerate(wires):
            wire.send(request("PUT", f"/k{number}", b"value", "X: 1\r\n")[:-2])
        until(lambda: descriptors(server) >= 80)
        for wire in wires:
            wire.send(b"ue")
        assert [wire.answer().status for wire in wires] == [201] * 20


def test_a_crowd_that_is_refused_does_not_take_the_open_files_of_those_that_are_served(
    cluster: Make,
) -> None:
    preamble = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    preamble += "; mkv.LINGER_TIME = 60"
    server = cluster(preamble=preamble).server
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(until(lambda: enter(server.port)))
        for _ in range(200):
            address = "127.0.0.1", server.port
            stack.enter_context(socket.create_connection(address, timeout=30))
        kept.send(request("GET", "/none"))  # by the answer to which all those are accepted
        assert kept.answer().status == 404
        until(lambda: descriptors(server) < 95)
        kept.send(request("PUT", "/k", b"value"))
        assert kept.answer().status == 201


def test_sigterm_in_a_crowd_lets_an_upload_finish(cluster: Make) -> None:
    preamble = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))"
    system, value = cluster(preamble=preamble), blob("value", 2 * MB)
    upload = Upload(system.server.port, "/k", len(value))
    upload.send(value[:MB])
    until(lambda: owned(system) == 1)
    with contextlib.ExitStack() as stack:
        system.server.process.send_signal(signal.SIGSTOP)
        for _ in range(300):  # they wait to be accepted
            wire = stack.enter_context(socket.socket())
            wire.connect(("127.0.0.1", system.server.port))
        system.server.process.send_signal(signal.SIGTERM)
        system.server.process.send_signal(signal.SIGCONT)
        upload.send(value[MB:])
        assert upload.answer() == 201
        assert system.server.process.wait(30) == 0
    assert "Traceback" not in system.server.log.read_text()


@pytest.mark.parametrize("flood", ["requests", "trailers"])
def test_who_never_stops_asking_holds_nobody_up(system: Cluster, flood: str) -> None:
    port, over = system.server.port, threading.Event()
    piece = request("GET", "/?health") * 5000 if flood == "requests" else b"X: y\r\n" * 20_000

    def endless(number: int) -> None:
        with contextlib.suppress(OSError), Wire(port) as wire:
            if flood == "trailers":
                put = request("PUT", f"/t{number}", b"", CHUNKED)
                wire.send(put + b"5\r\nvalue\r\n0\r\n")
            reader = threading.Thread(target=read_all, args=(wire.socket,))
            reader.start()
            while not over.is_set():
                wire.send(piece)
            wire.socket.shutdown(socket.SHUT_RDWR)
            reader.join()

    def read_all(wire: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while wire.recv(1 << 20):
                pass

    floods = [threading.Thread(target=endless, args=(number,)) for number in range(3)]
    deadline = threading.Timer(20, over.set)
    for each in (*floods, deadline):
        each.start()
    try:
        for number in range(10):
            assert system.server.put(f"/fair{number}", b"value") == 201
            assert system.server.call("DELETE", f"/fair{number}").status == 204
        assert not over.is_set(), "answered only when the flood was over"
    finally:
        over.set()
        deadline.cancel()
        for each in floods:
            each.join()


def test_a_limit_of_open_files_beyond_all_bounds_is_no_obstacle(cluster: Make) -> None:
    server = cluster(preamble="import os; os.sysconf = lambda name: 1073741816").server
    assert server.put("/k", b"value") == 201


# --- security: limits, names ----------------------------------------------------------------------


def test_a_head_may_have_a_hundred_fields_and_not_one_more(system: Cluster) -> None:
    for count, status in ((100, 404), (101, 431)):
        fields = "".join(f"X-{number}: y\r\n" for number in range(count - 2)) + CLOSE
        data = request("GET", "/none", b"", fields)
        assert statuses(raw(system.server.port, data)) == [status], count


def test_trailers_without_end_are_431(system: Cluster) -> None:
    trailers = b"X: y\r\n" * 1000
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/k", b"", CHUNKED) + b"5\r\nvalue\r\n0\r\n")
        wire.socket.settimeout(0.01)
        status = b""
        while not status:
            with contextlib.suppress(TimeoutError):
                wire.send(trailers)
            with contextlib.suppress(TimeoutError):
                status = wire.socket.recv(12)
        assert status == b"HTTP/1.1 431"
    assert system.server.get("/k") is None
    until(system.is_clean)


NASTY = (
    ".. . / // \\ %2e%2e %252e%252e %00 \0 \r\n \x7f ~ - = + @ ? # & ; : \" ' * $( ` é 😀 \ufeff"
)
NASTY += " svFF .tmp .nginx -/ -6b0108907bf79949 aGVsbG8= a b ../../../etc/passwd " + "k" * 99
PIECES = [*NASTY.split(" "), " ", "\n"]
FILE = re.compile(r"/[0-9a-f]{2}/[0-9a-f]{2}(/[A-Za-z0-9+=]+-?)*/[A-Za-z0-9+=]*-[0-9a-f]{16}")


def nasty(chance: random.Random, most: int) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randint(1, most)))


def test_no_two_nasty_keys_share_a_file_or_stand_in_each_others_way() -> None:
    chance, keys, folders = random.Random(5), {}, set()
    for _ in range(6_000):
        for key in (("/" + nasty(chance, 12)).encode()[:511], random_key(chance)):
            path = mkv.key2path(key, WRITE_ID)
            assert FILE.fullmatch(path) and all(len(part) <= 255 for part in path.split("/")), key
            assert mkv.path2key(path) == (key, WRITE_ID) and keys.setdefault(path, key) == key
            folders |= set(itertools.accumulate(path.split("/")[:-1], "{}/{}".format))
            (location,) = mkv.key2volume(key, ["v:1"], 1, 256)
            assert re.fullmatch("v:1/sv[0-9A-F]{2}", location)
    assert len(keys) > 9_000 and not folders & set(keys)


def test_no_path_is_taken_for_the_file_of_a_key_that_has_another() -> None:
    chance, taken = random.Random(6), 0
    for _ in range(15_000):
        path = mkv.key2path(random_key(chance), chance.choice(("", WRITE_ID)))
        for _ in range(chance.randint(0, 2)):
            cut, end = sorted(chance.choices(range(len(path) + 1), k=2))
            odd = chance.choice(("", nasty(chance, 2), "/../", path[cut:]))
            path = path[:cut] + odd + path[end:]
        with contextlib.suppress(ValueError):
            key, write_id = mkv.path2key(path)
            assert mkv.key2path(key, write_id) == path and ".." not in path.split("/")
            taken += 1
    assert 1500 < taken < 13_500


def test_a_listing_that_lies_makes_no_key_but_of_its_own_file(tmp_path: Path) -> None:
    right = mkv.key2path(b"/k", WRITE_ID)
    names = [*PIECES, "../../../etc/passwd", "x" * 9999, f"..{right}", f"/../..{right}", right[4:]]
    rows = [{"name": name, "type": "file", "size": 5} for name in names]
    listing = json.dumps(rows).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(listing)}\r\n{CLOSE}\r\n"
    liar = Liar(head.encode() + listing, None)
    command = [sys.executable, HERE / "mkv.py", "rebuild", "-volumes", liar.name]
    command += ["-replicas", "1", "-subvolumes", "1", "-db", tmp_path / "index", "-adopt-garbage"]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=60)
    finally:
        liar.close()
    assert ended.returncode == 1, ended.stderr
    findings = [json.loads(line)["finding"] for line in ended.stdout.splitlines()]
    assert findings == ["name"] * (257 * len(names) - 1)
    with opened(tmp_path / "index") as index:
        assert index.count() == (1, 0)
        assert index.look(b"/k").record.replicas == (mkv.Replica(liar.name, WRITE_ID),)


def test_a_listing_that_is_none_is_a_volume_that_cannot_be_reached(tmp_path: Path) -> None:
    liar = Liar(f"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n{CLOSE}\r\n<html>".encode(), None)
    command = [sys.executable, HERE / "mkv.py", "rebuild", "-volumes", liar.name]
    command += ["-replicas", "1", "-subvolumes", "1", "-db", tmp_path / "index"]
    try:
        ended = [
            subprocess.run([*command, *more], capture_output=True) for more in ((), ("-partial",))
        ]
    finally:
        liar.close()
    for run, finding in zip(ended, ("unfinished", "unreachable"), strict=True):
        assert run.returncode == 2 and b"Traceback" not in run.stderr, run.stderr
        assert [json.loads(line)["finding"] for line in run.stdout.splitlines()] == [finding]


def test_nasty_keys_are_stored_each_in_a_file_of_its_own(system: Cluster) -> None:
    chance, values, before = random.Random(7), {}, system.files()
    outside = {path for path in system.folder.rglob("*") if ".nginx" not in str(path)}
    for number in range(150):
        text = "/" + nasty(chance, 8)
        if number % 2:  # some bytes as they are, the rest escaped, some twice
            text = "/nasty" + "".join(chance.choice((c, quote(c))) for c in text)
        target = re.sub(r"[?#%\x00-\x20\x7f-\U0010ffff]", lambda c: quote(c[0]), text)
        key = unquote_to_bytes(target)
        if len(key) > 1 and key not in values:
            put = request("PUT", target, b"%d" % number, CLOSE)
            assert statuses(raw(system.server.port, put)) == [201], target
            values[key] = target, b"%d" % number
    assert len(values) > 100
    files = system.files() - before
    assert len(files) == 3 * len(values)
    assert all(FILE.fullmatch(re.sub(r"^[0-9.:]+/sv0[0-9]", "", path)) for path in files)
    new = {path for path in system.folder.rglob("*") if ".nginx" not in str(path)} - outside
    drives = re.compile(r"volume\d/sv0\d/[0-9a-f]{2}(/.*)?")
    assert all(drives.fullmatch(str(path.relative_to(system.folder))) for path in new)
    for key, (target, value) in values.items():
        got = raw(system.server.port, request("GET", target, b"", CLOSE))
        location = re.search(rb"\r\nLocation: http://127.0.0.1:(\d+)([\x21-\x7e]+)\r\n", got)
        assert call(int(location[1]), "GET", location[2].decode()).body == value, key
        delete = request("DELETE", target, b"", CLOSE)
        assert statuses(raw(system.server.port, delete)) == [204]
    until(lambda: system.files() == before)


# --- security: the example of the README ----------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_the_locked_down_example_of_the_readme_works(tmp_path: Path, tls: bool) -> None:
    if not shutil.which("curl") or not shutil.which("openssl"):
        pytest.skip("needs curl and openssl")
    chapter = (HERE / "README.md").read_text().split("\n## Security\n")[1].split("\n## ")[0]
    keys, volume, index, client, *fronts = re.findall(r"```\n(.*?)```", chapter, re.S)
    port, inner, front, outer = free_ports(4)
    hosts = {"a": "127.0.0.2", "b": "127.0.0.3", "c": "127.0.0.4"}

    def here(text: str, host: str = "127.0.0.1") -> str:
        """The text with this machine's addresses, ports and folders."""
        table = {f"{name}:3001": f"{address}:{inner}" for name, address in hosts.items()}
        table |= {"https://a:": f"https://{hosts['a']}:", "listen ": f"listen {host}:"}
        table |= {"https://index:3000": f"https://127.0.0.1:{front}", "index": "127.0.0.1"}
        table |= {"pipx run uv run mkv.py": f"{sys.executable} {HERE / 'mkv.py'}"}
        table |= {"./volume.sh": f"HOST={host} {HERE / 'volume.sh'}", "/data": f"{tmp_path}/{host}"}
        table |= {"/var/lib/mkv": f"{tmp_path}/index", "/etc/ssl": str(tmp_path)}
        table |= {"10.0.0.1": "127.0.0.1", "127.0.0.1:3001": f"{host}:{inner}"}
        table |= {"3000": str(port), "3001": str(inner), "3443": str(outer), "443 ": f"{front} "}
        return re.sub("|".join(map(re.escape, table)), lambda found: table[found[0]], text)

    def bash(script: str, **options: Any) -> subprocess.Popen:
        command = ["bash", "-euc", script]
        return subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **options)

    assert bash(here(keys)).wait(30) == 0
    index = index.rstrip() + " -bind 127.0.0.1" * tls
    processes = [bash(here(index)), *(bash(here(volume, host)) for host in hosts.values())]
    try:
        if tls:
            certify = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=mkv"
            shell("bash", "-c", f"cd {tmp_path}; {certify} -keyout mkv.key -out mkv.crt")
            servers = here(fronts[0]) + "".join(here(fronts[1], host) for host in hosts.values())
            work = "access_log off; client_body_temp_path body; proxy_temp_path proxy;\n"
            user = "" if os.geteuid() else "user root;"
            config = f"daemon off; pid pid; {user} events {{}} http {{ {work} {servers} }}"
            (tmp_path / "nginx.conf").write_text(config)
            nginx = f"nginx -p {tmp_path} -e stderr -c nginx.conf"
            processes.append(bash(f"PATH=$PATH:/usr/sbin; exec {nginx}"))
            client = client.replace("http://", "https://").replace("curl ", "curl -k ")
            client = client.replace("https://a:3001", "https://a:3443")
            client += (
                "curl -k -u admin:$(cat password) -X DELETE -w '%{http_code}' https://a:3443/x"
            )
        ends = [("127.0.0.1", each) for each in (port, front)[: 1 + tls]]
        ends += [(host, each) for host in hosts.values() for each in (inner, outer)[: 1 + tls]]
        for end in ends:
            until(lambda end=end: socket.socket().connect_ex(end) == 0)
        asked = bash(here(client), stdout=subprocess.PIPE)
        out, _ = asked.communicate(timeout=60)
        assert asked.returncode == 0 and out.startswith(b"401\n401\n"), out
        assert out.endswith(b"403") == tls  # the front of a volume lets nobody write
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
