#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["uvloop", "lmdb>=3,<4"]
# ///
"""mkv: a distributed key-value store for blobs. This file is all of it; stock nginx has the bytes.

              PUT /key ──────────────┐  streams once, fans out to every replica
 client ───► mkv.py server ──► nginx volume ─► /data/sv07/60/08/L3dlaGF2ZQ==-…
    ▲             │  ▲             nginx volume ─► /data/sv04/60/08/L3dlaGF2ZQ==-…
    │  302        ▼  │             nginx volume ─► /data/sv07/60/08/L3dlaGF2ZQ==-…
    └──────── LMDB index                 │
              keys + journal             │
 client ◄──────────── GET the bytes ─────┘  straight from nginx, ranges and all

A file is claimed (listed in the journal), written, vouched for (named by its key's record), garbage
(in the journal again), gone: in this order only, and no name is used twice. All else rests on that.
"""

import argparse
import asyncio
import base64
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote_to_bytes

import lmdb
import uvloop

MAX_KEY, MAX_HEAD, MAX_FIELDS = 511, 16384, 100  # bytes: LMDB's limit; twice nginx's; as Apache
HEAD_TIME, IDLE_TIME, LINGER_TIME = 10, 60, 5  # seconds for a head, between two, after the last
BODY_TIME, BODY_RATE = 60, 1024  # seconds for which a body may bring fewer bytes a second than that
READ_AHEAD, WRITE_AHEAD = 1 << 18, 1 << 20  # bytes held for a reader, or a volume, before a pause
SMALL = 1 << 16  # bytes up to which a value is held, and sent again if need be
MAP_SIZE = 1 << 40  # bytes of address space for LMDB, whose file grows only as needed
DRAIN_TIME = 10  # seconds that SIGTERM leaves to what is in hand

log = functools.partial(print, file=sys.stderr, flush=True)  # for operators, a line at a time


class HTTPError(Exception):
    """An answer that is no success: status, one line that says why, more header lines."""

    def __init__(self, status: int, reason: str, fields: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.fields = status, reason, fields


def require(condition: Any, status: int, reason: str, fields: str = "") -> None:
    """HTTPError unless the condition holds."""
    if not condition:
        raise HTTPError(status, reason, fields)


# --- placement ------------------------------------------------------------------------------------
# Where a key's files lie, in minikeyvalue's layout. Pure. A location is "host:port" (a volume) or
# "host:port/svXX"; a write id is 16 hex digits: 8 of seconds since 1970, 8 that tell writers apart.


def key2path(key: bytes, write_id: str = "") -> str:
    """The path of a key's file: two bytes of its md5, its base64, the write id (minikeyvalue's: "").

    Base64 may have "/": then it lies in a sub-folder. "-/" cuts names of over 255 bytes.
    """
    digest, name = hashlib.md5(key).hexdigest(), base64.b64encode(key).decode()
    if write_id:
        name = re.sub(r"[^/]{230}(?=[^/])", r"\g<0>-/", name) + "-" + write_id
    return f"/{digest[:2]}/{digest[2:4]}/{name}"


def path2key(path: str) -> tuple[bytes, str]:
    """The inverse: (key, write id). ValueError for any path that key2path would not have made."""
    name, _, write_id = path[7:].replace("-/", "").partition("-")
    key = base64.b64decode(name, validate=True)
    if not re.fullmatch(r"([0-9a-f]{16})?", write_id) or key2path(key, write_id) != path:
        raise ValueError(f"not the path of a key: {path}")
    return key, write_id


def key2volume(key: bytes, volumes: Sequence[str], replicas: int, subvolumes: int) -> list[str]:
    """The first `replicas` locations of the key's ranking: by md5(key + volume), highest first."""
    scores = sorted(((hashlib.md5(key + v.encode()).digest(), v) for v in volumes), reverse=True)
    drive = "/sv{:02X}" if subvolumes > 1 else ""
    numbers = [int.from_bytes(md5[12:], "big") % subvolumes for md5, _ in scores[:replicas]]
    return [scores[i][1] + drive.format(number) for i, number in enumerate(numbers)]


# --- record ---------------------------------------------------------------------------------------
# What the index knows of a key: [DELETED][HASH<32 hex>]<location>,<location>@<id>,…[ <size> <id>]
# Without size and id it is minikeyvalue's record, byte for byte. Pure.

RECORD = re.compile(r"(DELETED)?(?:HASH([0-9a-f]{32}))?([^ ]*)(?: ([0-9]+)(?: ([0-9a-f]{16}))?)?")


class Replica(NamedTuple):
    """One file of a key."""

    location: str
    write_id: str


class Record(NamedTuple):
    """The replicas of a key, in ranking order, and what is known of its value."""

    replicas: tuple[Replica, ...]
    size: int | None = None  # bytes
    write_id: str = ""  # of the replicas that have no other
    hash: str = ""  # MD5 in hex
    deleted: bool = False  # unlinked: hidden, but the files stay

    def text(self) -> bytes:
        """The record as the index stores it."""
        mark = "DELETED" * self.deleted + (self.hash and "HASH" + self.hash)
        size = "" if self.size is None else f" {self.size} {self.write_id}".rstrip()
        return (mark + replicas_text(self.replicas, self.write_id) + size).encode()


def parse_record(text: bytes) -> Record:
    """The inverse of Record.text(). 500 for what is no record."""
    match = RECORD.fullmatch(text.decode())
    require(match, 500, f"unreadable record: {text!r}")
    deleted, md5, replicas, size, write_id = match.groups("")
    known = int(size) if size else None
    return Record(parse_replicas(replicas, write_id), known, write_id, md5, bool(deleted))


def replicas_text(replicas: Sequence[Replica], write_id: str = "") -> str:
    """location@id,…; where the id is the given one, the location alone."""
    return ",".join(r.location if r.write_id == write_id else "@".join(r) for r in replicas)


def parse_replicas(text: str, write_id: str = "") -> tuple[Replica, ...]:
    """The inverse of replicas_text()."""
    parts = (part.partition("@") for part in text.split(",") if part)
    return tuple(Replica(location, own if at else write_id) for location, at, own in parts)


# --- index ----------------------------------------------------------------------------------------
# Two LMDB tables. keys: key → record. journal: key → files that may exist and that no record names;
# with an owner somebody is making them (the lock on the key), without one they are garbage. Writing
# is by operations: they check and change in one transaction, from plain arguments, without clock or
# chance, and so can be replayed. Their answer is heard when it is on disk.


class Entry(NamedTuple):
    """What the journal says of a key: `<owner> <since> <location>@<id>,…`"""

    owner: str = ""
    since: float = 0.0  # seconds since 1970, when the last owner went or the last replica came
    replicas: tuple[Replica, ...] = ()


def parse_entry(text: bytes) -> Entry:
    """The inverse of what Operations.enter() writes."""
    owner, since, replicas = text.decode().split(" ")
    return Entry(owner, float(since), parse_replicas(replicas))


class Operations(NamedTuple):
    """All that can be done to the index, in one write transaction."""

    txn: lmdb.Transaction
    keys: Any
    journal: Any

    def look(self, key: bytes, owner: str = "") -> tuple[Record | None, Entry]:
        """The record and the journal entry of a key. 503 when another than `owner` has the key."""
        record, text = self.txn.get(key, db=self.keys), self.txn.get(key, db=self.journal)
        entry = parse_entry(text) if text else Entry()
        require(owner in ("", entry.owner), 503, "the claim on the key was lost")
        return record and parse_record(record), entry

    def enter(self, key: bytes, old: Entry, owner: str, new: Sequence[Replica], now: float) -> None:
        """Put an owner and replicas in the place of a journal entry; with neither, it goes."""
        self.txn.delete(key, db=self.journal)
        if owner or new:
            fresh = (old.owner and not owner) or not set(new) <= set(old.replicas)
            text = f"{owner} {now if fresh else old.since!r} {replicas_text(new)}"
            self.txn.put(key, text.encode(), db=self.journal)

    def claim(
        self, key: bytes, owner: str, where: list[str], now: float, old: Record | None
    ) -> str:
        """Lock a key and list the files to be made; their write id. 409, 403: the key is not free.

        Without `old` for a new value; with it for more files of the value it describes: a move.
        """
        record, entry = self.look(key)
        require(not entry.owner, 409, "another PUT or move of this key is under way")
        require(old or not record or record.deleted, 403, "the key exists: DELETE it first")
        require(not old or old == record, 409, "the key has changed meanwhile")
        known = {r.write_id for r in entry.replicas + (record.replicas if record else ())}
        newer = max([int(now), *(1 + int(write_id[:8] or "0", 16) for write_id in known)])
        seconds = int(old.write_id[:8] or "0", 16) if old else newer
        tail = int(hashlib.md5(owner.encode()).hexdigest()[:8], 16)
        while (write_id := f"{seconds:08x}{tail & 0xFFFFFFFF:08x}") in known:
            tail += 1
        made = [Replica(location, write_id) for location in where]
        self.enter(key, entry, owner, [*entry.replicas, *made], now)
        return write_id

    def extend(self, key: bytes, owner: str, replica: Replica) -> None:
        """List one more file under a claim: that of a stand-in. 503."""
        _, entry = self.look(key, owner)
        self.enter(key, entry, owner, (*entry.replicas, replica), entry.since)

    def commit(self, key: bytes, owner: str, new: Record, old: Record | None, now: float) -> None:
        """Vouch for what a claim made; whatever else was there is garbage. 503; for a move 409."""
        record, entry = self.look(key, owner)
        require(not old or old == record, 409, "the key has changed meanwhile")
        listed = entry.replicas + (record.replicas if record else ())
        self.txn.put(key, new.text(), db=self.keys)
        self.enter(key, entry, "", [r for r in listed if r not in new.replicas], now)

    def settle(self, key: bytes, owner: str, gone: Sequence[Replica], now: float) -> list[Replica]:
        """Strike out files that are gone, and the owner if it is this one; returns what is left."""
        _, entry = self.look(key)
        left = [replica for replica in entry.replicas if replica not in gone]
        if owner == entry.owner or len(left) < len(entry.replicas):
            self.enter(key, entry, "" if owner == entry.owner else entry.owner, left, now)
        return left

    def remove(self, key: bytes, protect: bool, now: float) -> Record:
        """Delete a key: its files are garbage. Returns what its record was. 404, 403."""
        record, entry = self.look(key)
        require(record, 404, "no such key")
        require(record.deleted or not protect, 403, "protected: UNLINK the key first")
        self.txn.delete(key, db=self.keys)
        self.enter(key, entry, entry.owner, entry.replicas + record.replicas, now)
        return record

    def unlink(self, key: bytes) -> None:
        """Hide a key. 404."""
        record, _ = self.look(key)
        require(record and not record.deleted, 404, "no such key")
        self.txn.put(key, record._replace(deleted=True).text(), db=self.keys)

    def evict(self, process: str, now: float) -> None:
        """All claims of a dead process lose their owner: the keys are free, the files garbage."""
        for key, text in list(self.txn.cursor(db=self.journal)):
            entry = parse_entry(text)
            if entry.owner.partition(".")[0] == process:
                self.enter(key, entry, "", entry.replicas, now)


class Index:
    """The LMDB environment in a folder; any number of processes may use it, each for one event loop.

    A process keeps the file owners/<its random name> locked: whoever gets the lock knows that it is
    dead, and evicts it. All hold the folder itself by a shared lock, rebuild by an exclusive one.
    """

    def __init__(self, path: Path, note: str = "", exclusive: bool = False) -> None:
        self.owners, self.note, self.claims = path / "owners", note, itertools.count(1)
        self.owners.mkdir(parents=True, exist_ok=True)
        self.folder = os.open(self.owners, os.O_RDONLY)
        fcntl.flock(self.folder, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
        self.env = lmdb.open(str(path), map_size=MAP_SIZE, max_dbs=2, max_readers=4096)
        self.keys, self.journal = self.env.open_db(b"keys"), self.env.open_db(b"journal")
        self.process, self.lock = "", None
        self.owner()
        self.queue: deque[tuple] = deque()  # (operation, arguments, future)
        self.wake, self.closing = threading.Event(), False
        self.thread = threading.Thread(target=self.commit_groups, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Commit what is queued, then let go."""
        self.closing = True
        self.thread.join()
        self.env.close()
        (self.owners / self.process).unlink(missing_ok=True)
        os.close(self.lock)
        os.close(self.folder)

    def owner(self) -> str:
        """A name for one claim, never given twice. Taken for dead by others, we take a new name."""
        while self.lock is None or not (self.owners / self.process).exists():
            self.process = os.urandom(8).hex()
            self.lock = lock_file(self.owners / self.process, self.note)
        return f"{self.process}.{next(self.claims)}"

    async def evict_dead(self, named: set[str]) -> None:
        """Evict whoever is named in the journal, or has a file, but does not live."""
        for process in named.union(path.name for path in self.owners.iterdir()) - {self.process}:
            lock = lock_file(self.owners / process)
            if lock is not None:
                await self.do(Operations.evict, process, time.time())
                (self.owners / process).unlink()
                os.close(lock)

    def is_shared(self) -> bool:
        """Whether another living process of this index has the same note (a server: its address)."""
        others = [path for path in self.owners.iterdir() if path.name != self.process]
        return any(path.read_text() == self.note and lock_file(path) is None for path in others)

    def get(self, key: bytes) -> bytes | None:
        """The text of a key's record."""
        with self.env.begin(self.keys) as txn:
            return txn.get(key)

    def count(self, table: Any) -> int:
        """The number of rows in a table."""
        with self.env.begin() as txn:
            return txn.stat(table)["entries"]

    def walk(self, table: Any, start: bytes | None = b"") -> Iterator[list[tuple[bytes, bytes]]]:
        """The rows from `start` on, in batches; no snapshot outlasts its batch, or it pins pages."""
        while start is not None:
            with self.env.begin(table) as txn, txn.cursor() as cursor:
                found = cursor.set_range(start)
                rows = list(itertools.islice(cursor.iternext(), 1001)) if found else []
            start = rows.pop()[0] if len(rows) > 1000 else None
            yield rows

    def do(self, operation: Callable, *args: Any, later: bool = False) -> asyncio.Future | None:
        """Queue an operation; a future of its answer or HTTPError. `later`: with others, unheard."""
        future = None if later else asyncio.get_running_loop().create_future()
        self.queue.append((operation, args, future))
        if not later:
            self.wake.set()
        return future

    def commit_groups(self) -> None:
        """The thread that writes. What queued up during one sync shares the next: group commit."""
        while self.queue or not self.closing:
            self.wake.wait(0.1)  # no longer, for the sake of what is in no hurry
            self.wake.clear()
            group = [self.queue.popleft() for _ in range(len(self.queue))]
            answers: list[Any] = []
            try:
                with self.env.begin(write=bool(group)) as txn:
                    operations = Operations(txn, self.keys, self.journal)
                    for operation, args, _ in group:
                        try:
                            answers.append(operation(operations, *args))
                        except HTTPError as refusal:
                            answers.append(refusal)
            except lmdb.Error as error:  # say, no space: all fail, but settles are tried again
                answers = [HTTPError(503, f"the index cannot be written: {error}")] * len(group)
                self.queue.extend(
                    (*each[:2], None) for each in group if each[0] is Operations.settle
                )
            heard = [(each[2], a) for each, a in zip(group, answers, strict=True) if each[2]]
            if heard:
                heard[0][0].get_loop().call_soon_threadsafe(deliver, heard)


def deliver(heard: list[tuple[asyncio.Future, Any]]) -> None:
    """Hand the answers of a group to those who wait."""
    for future, answer in heard:
        if isinstance(answer, HTTPError) and not future.done():
            future.set_exception(answer)
        elif not future.done():
            future.set_result(answer)


def lock_file(path: Path, text: str = "") -> int | None:
    """The descriptor of a locked file, made if need be; None when a living process has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):  # else evicted before it was locked
            os.write(descriptor, text.encode())
            return descriptor
    os.close(descriptor)
    return None


# --- http -----------------------------------------------------------------------------------------
# HTTP/1.1 by hand (RFC 9112). What two readers could understand in two ways is refused, and nothing
# after it is read: that is how requests are smuggled past a proxy.

REQUEST = re.compile(
    rb"([A-Z]+) (?:http://[^/?#\x00-\x20\x7f]*)?(/[^?#\x00-\x20\x7f]*)(?:\?([^#\x00-\x20\x7f]*))?"
    rb" HTTP/1\.([01])"
)
STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: .*)?")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
TEXT = "Content-Type: text/plain; charset=utf-8\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_TO_END = STREAM.replace(b"Transfer-Encoding: chunked", b"Connection: close")


def parse_head(lines: list[bytes], kind: re.Pattern[bytes]) -> tuple[re.Match, dict, int | None]:
    """First line, fields by lower-case name (several of one name joined with a comma), and length of
    the body (None: chunked); RFC 9112, 5 and 6.3. 400 for any doubt, 431, 501.
    """
    require(len(lines) - 1 <= MAX_FIELDS, 431, f"a head has at most {MAX_FIELDS} fields")
    first, fields = kind.fullmatch(lines[0]), {}
    require(first, 400, "malformed first line")
    for line in lines[1:]:
        match = FIELD.fullmatch(line)  # no folded lines, no space before the colon, no bare CR
        require(match, 400, "malformed header field")
        name, value = match[1].lower(), match[2].rstrip(b" \t")
        fields[name] = fields[name] + b"," + value if name in fields else value
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"0")
    require(re.fullmatch(rb"[0-9]{1,18}", length), 400, "malformed Content-Length")
    require(not coding or b"content-length" not in fields, 400, "two lengths of one body")
    require(coding is None or coding.lower() == b"chunked", 501, "the only coding is chunked")
    return first, fields, int(length) if coding is None else None


class Request(NamedTuple):
    """The head of a request."""

    method: str
    path: bytes  # percent-encoded, as sent
    query: bytes | None
    fields: dict[bytes, bytes]
    length: int | None  # bytes of the body, None: chunked
    close: bool  # the connection ends with the answer


def parse_request(lines: list[bytes]) -> Request:
    """The request that begins with these lines; RFC 9112, 3 and 9.6. 400, 417, 431, 501."""
    first, fields, length = parse_head(lines, REQUEST)
    method, path, query, minor = first.groups()
    hosts, expects = fields.get(b"host", b","), fields.get(b"expect", b"100-continue").lower()
    require(minor == b"0" or b"," not in hosts, 400, "no Host, or more than one")
    require(minor == b"1" or length is not None, 400, "chunked in HTTP/1.0")
    require(expects == b"100-continue", 417, "nothing but 100-continue can be expected")
    options = fields.get(b"connection", b"").lower().replace(b" ", b"").split(b",")
    close = minor == b"0" or b"close" in options
    return Request(method.decode(), path, query, fields, length, close)


def response(status: int, fields: str = "", body: bytes = b"") -> bytes:
    """A whole answer; `fields` are lines that end in CR LF."""
    length = f"Content-Length: {len(body)}\r\n" if status not in (100, 204) else ""
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{length}{fields}\r\n".encode() + body


def refusal(error: HTTPError) -> bytes:
    """The answer that an error is: one line of text."""
    return response(error.status, TEXT + error.fields, error.reason.encode() + b"\n")


class Wire(asyncio.StreamReaderProtocol):
    """A connection, of a client or to a volume: a protocol with a reader and a writer."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader(READ_AHEAD // 2)  # it pauses at the double
        super().__init__(self.reader)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self.writer = asyncio.StreamWriter(transport, self, self.reader, loop)


class Connection(Wire):
    """A client. What can be answered at once is answered where it comes in, all else by a task.

    `server` answers with bytes, a coroutine of bytes, or a stream of JSON.
    """

    task: asyncio.Task | None = None
    closing = False  # the last answer has been given
    whole = True  # the body of the request has been read
    unread = 0  # bytes in the reader

    def __init__(self, server: Any) -> None:
        super().__init__()
        self.server, self.started = server, time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.server.connections.discard(self)

    def eof_received(self) -> bool:
        super().eof_received()
        return self.task is not None  # keep the connection for the answer

    def data_received(self, data: bytes) -> None:
        if self.task or not self.answer_at_once(data):
            self.unread += len(data)
            super().data_received(data)
            self.task = self.task or asyncio.create_task(self.converse())

    def answer_at_once(self, data: bytes) -> bool:
        """Answer a GET, if that is all there is, and nothing has to be waited for."""
        self.started = time.monotonic()
        waits = self.server.draining or self.writer.transport.get_write_buffer_size()
        if waits or data[:4] != b"GET " or data.find(b"\r\n\r\n") != len(data) - 4:
            return False
        with contextlib.suppress(HTTPError):  # it will be met again
            request = parse_request(data[:-4].split(b"\r\n"))
            if request.length == 0 and request.query is None and not request.close:
                answer = self.server.answer(request, None)
                if isinstance(answer, bytes):
                    self.respond(answer, request)
                    return True
                answer.close()
        return False

    async def converse(self) -> None:
        """Answer the requests in the reader, one after the other."""
        try:
            require(len(self.server.connections) <= self.server.limit, 503, "too many connections")
            while self.unread and not self.closing:
                await self.serve(await self.head())
        except HTTPError as error:
            self.respond(refusal(error), None)
        except (OSError, EOFError):  # the client is gone, or does not read
            self.writer.transport.abort()
        if self.closing and not self.writer.is_closing():
            with contextlib.suppress(OSError):  # close() at once would reset the answer away
                self.writer.write_eof()
                async with asyncio.timeout(LINGER_TIME):
                    while await self.reader.read(READ_AHEAD):
                        pass
            self.writer.close()
        self.task = None

    async def line(self) -> bytes:
        """The next line, without its CR LF. 400, 431."""
        try:
            line = await self.reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            raise HTTPError(431, "a line too long") from error
        self.unread -= len(line)
        require(line.endswith(b"\r\n"), 400, "a line ends in CR LF")
        return line[:-2]

    async def head(self) -> Request:
        """The next request. 400, 408, 417, 431, 501."""
        self.started, lines = time.monotonic(), []
        try:
            async with asyncio.timeout(HEAD_TIME):
                while line := await self.line():
                    lines.append(line)
                    require(sum(map(len, lines)) < MAX_HEAD, 431, f"a head over {MAX_HEAD} bytes")
        except TimeoutError as error:
            raise HTTPError(408, "the head did not come in time") from error
        return parse_request(lines or [b""])

    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, piece by piece; asking for the first one invites it. 400, 408."""
        left, seconds = request.length, BODY_TIME
        if b"expect" in request.fields:
            self.writer.write(response(100))
        while left or request.length is None:
            if not left:  # the next chunk: RFC 9112, 7.1
                size = CHUNK.fullmatch(await self.line())
                require(size, 400, "malformed chunk size")
                left = int(size[1], 16)
            if not left:
                while line := await self.line():
                    require(FIELD.fullmatch(line), 400, "malformed trailer field")
                break
            began = time.monotonic()
            try:
                async with asyncio.timeout(seconds):
                    piece = await self.reader.read(min(left, READ_AHEAD))
            except TimeoutError as error:
                raise HTTPError(408, f"less than {BODY_RATE} bytes a second") from error
            require(piece, 400, "the body ended early")
            self.unread -= len(piece)
            left -= len(piece)
            waited = time.monotonic() - began
            seconds = min(seconds - waited + len(piece) / BODY_RATE, BODY_TIME)
            yield piece
            if request.length is None and not left:
                require(not await self.line(), 400, "a chunk is longer than its size")
        self.whole = True

    async def serve(self, request: Request) -> None:
        """Answer a request. OSError when the client does not take the answer."""
        self.whole = request.length == 0
        try:
            answer = self.server.answer(request, None if self.whole else self.body(request))
            answer = await answer if isinstance(answer, Awaitable) else answer
        except HTTPError as error:
            answer = refusal(error)
        if isinstance(answer, bytes):
            self.respond(answer, request)
            return
        self.respond(STREAM_TO_END if request.close else STREAM, request)
        if request.method == "GET":
            async for piece in answer:
                chunk = b"%x\r\n%b\r\n" % (len(piece), piece)  # HTTP/1.0 knows no chunks
                self.writer.write(piece if request.close else chunk)
                await asyncio.sleep(0)
                async with asyncio.timeout(IDLE_TIME):
                    await self.writer.drain()
            self.writer.write(b"" if request.close else b"0\r\n\r\n")

    def respond(self, answer: bytes, request: Request | None) -> None:
        """Send an answer; it is the last one if anything speaks for that."""
        server, seconds = self.server, time.monotonic() - self.started
        method, status = request.method if request else "-", answer[9:12].decode()
        server.requests[method, status] += 1
        server.seconds[method] += seconds
        if server.flags.v and request:
            log(f"{method} {request.path.decode(errors='replace')} {status} {seconds:f} s")
        self.closing = not request or request.close or not self.whole or server.draining
        if self.closing and b"Connection: close" not in answer:
            answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        if method == "HEAD":
            answer = answer[: answer.find(b"\r\n\r\n") + 4]
        self.writer.write(answer)


# --- volumes --------------------------------------------------------------------------------------
# The client of the volumes: pooled keep-alive connections, and what the answers say of the health of
# a volume. One that does not answer is no exception here, but an answer of status 0.


class Link(Wire):
    """A connection to a volume, for one request at a time."""

    heard = False  # something of the answer

    def __init__(self, volumes: "Volumes", volume: str) -> None:
        super().__init__()
        self.volumes, self.volume = volumes, volume

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(WRITE_AHEAD, WRITE_AHEAD - SMALL)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self in self.volumes.idle[self.volume]:
            self.volumes.idle[self.volume].remove(self)
            self.volumes.distrust(self.volume)


class Answer(NamedTuple):
    """What a volume said; status 0 and a reason if it did not."""

    status: int
    reason: str
    length: int | None = None  # bytes of the body
    link: Link | None = None  # with the body of a GET that is 200, to be read and closed


TROUBLE = (OSError, EOFError, HTTPError, asyncio.LimitOverrunError)  # TimeoutError is an OSError


class Volumes:
    """All volumes: connections and health. An answer makes a location trusted for `timeout` seconds."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.patience = timeout, timeout or 1.0
        self.idle: dict[str, list[Link]] = defaultdict(list)
        self.trusted: dict[str, float] = {}  # location → until when (monotonic)
        self.down: dict[str, tuple[float, float]] = {}  # see mark(): when to try again, the pause
        self.probes: dict[str, tuple[str, asyncio.Task]] = {}  # under way: the path, the question

    async def connect(self, location: str) -> Link:
        """A fresh connection to the volume of a location. OSError."""
        volume = volume_of(location)
        host, _, port = volume.rpartition(":")
        connect = asyncio.get_running_loop().create_connection
        async with asyncio.timeout(self.patience):
            return (await connect(lambda: Link(self, volume), host.strip("[]"), int(port)))[1]

    async def request(
        self, method: str, location: str, path: str, body: bytes = b"", patience: float = 0.0
    ) -> Answer:
        """One exchange, within `patience` seconds."""
        idle, link = self.idle[volume_of(location)], None
        pooled = bool(idle)
        try:
            async with asyncio.timeout(patience or self.patience):
                link = idle.pop() if pooled else await self.connect(location)
                link.writer.write(request_head(method, location, path, len(body)) + body)
                return await self.hear(link, method, location)
        except TROUBLE as error:
            if pooled and isinstance(error, ConnectionError | EOFError) and not link.heard:
                return await self.request(
                    method, location, path, body, patience
                )  # not taken: repeat
            return self.lost(location, error, link)

    async def hear(self, link: Link, method: str, location: str) -> Answer:
        """Read an answer, learn from it, and pool the connection if it is in order. TROUBLE."""
        head = await link.reader.readuntil(b"\r\n\r\n")
        first, fields, length = parse_head(head[:-4].split(b"\r\n"), STATUS)
        status = int(first[1])
        answer = Answer(status, f"answers {status}", length, link)
        self.judge(location, method, status)
        if method == "GET" and status == 200:
            return answer
        rest = 0 if method == "HEAD" or status == 204 else length
        require(rest is not None and rest <= SMALL, 502, "sends a strange error page")
        await link.reader.readexactly(rest)
        link.heard = False
        if fields.get(b"connection", b"").lower() == b"close":
            link.writer.close()
        else:
            self.idle[link.volume].append(link)
        return answer

    def lost(self, location: str, error: Exception, link: Link | None) -> Answer:
        """No answer, or none that can be understood: the volume is down."""
        reason = str(error) or "does not answer in time"
        self.mark(volume_of(location), reason)
        if link:
            link.writer.transport.abort()  # of an upload that is cut short nginx keeps nothing
        return Answer(0, reason)

    async def write(
        self, path: str, places: Sequence[str], length: int | None, body: AsyncIterator[bytes]
    ) -> tuple[dict[str, Answer], int, Any]:
        """PUT a body of `length` bytes (None: not known) to all places in one pass: their answers, its
        size, its md5. The slowest sets the pace; one that fails, or stalls for ten timeouts, is left
        behind. When the body breaks off, that is raised, and nothing stays.
        """
        size, md5, data, links, answers = 0, hashlib.md5(), b"", {}, {}

        async def step(work: Callable[[str], Awaitable], place: str) -> None:
            try:
                async with asyncio.timeout(10 * self.patience):
                    await work(place)
            except TROUBLE as error:
                answers[place] = self.lost(place, error, links.pop(place, None))

        async def begin(place: str) -> None:
            links[place] = await self.connect(place)
            links[place].writer.write(request_head("PUT", place, path, length))

        async def go_on(place: str) -> None:
            if links[place].heard:  # before the end of the body: a refusal
                await end(place)
            else:
                links[place].writer.write(data)
                await links[place].writer.drain()

        async def end(place: str) -> None:
            answers[place] = await self.hear(links[place], "PUT", place)
            del links[place]

        if length and length <= SMALL:
            data = b"".join([piece async for piece in body])
            puts = [self.request("PUT", place, path, data, 10 * self.patience) for place in places]
            answers = dict(zip(places, await asyncio.gather(*puts), strict=True))
            return answers, length, hashlib.md5(data)
        try:
            await asyncio.gather(*(step(begin, place) for place in places))
            async for piece in body:
                size += len(piece)
                data = piece if length else b"%x\r\n%b\r\n" % (len(piece), piece)
                md5.update(piece)
                await asyncio.gather(*(step(go_on, place) for place in list(links)))
                if not links:
                    break
            data = b"" if length else b"0\r\n\r\n"
            await asyncio.gather(*(step(go_on, place) for place in list(links)))
            await asyncio.gather(*(step(end, place) for place in list(links)))
        finally:
            for link in links.values():
                link.writer.transport.abort()
        return answers, size, md5

    async def copy(self, key: bytes, source: Replica, place: str, write_id: str) -> Answer:
        """Stream a replica to one more place, under a write id. 503 when it cannot be read."""
        path = key2path(key, source.write_id)
        answer = await self.request("GET", source.location, path, b"", 10 * self.patience)
        require(answer.status == 200, 503, f"{source.location} {answer.reason}")
        body = self.value(answer.link.reader, answer.length)
        try:
            return (await self.write(key2path(key, write_id), [place], answer.length, body))[0][
                place
            ]
        except TROUBLE as error:
            raise HTTPError(503, f"{source.location} broke off") from error
        finally:
            answer.link.writer.transport.abort()

    async def value(self, reader: asyncio.StreamReader, left: int) -> AsyncIterator[bytes]:
        """A body that a volume sends. TROUBLE when it stalls or breaks off."""
        while left:
            async with asyncio.timeout(10 * self.patience):
                piece = await reader.read(min(left, READ_AHEAD))
            require(piece, 503, "broke off")
            left -= len(piece)
            yield piece

    def probe(self, location: str, path: str) -> tuple[str, asyncio.Task]:
        """Ask a location for a file, unless it is being asked for one: (that one's path, the task)."""
        flight = location if self.timeout else location + path
        if flight not in self.probes:
            task = asyncio.create_task(self.request("HEAD", location, path))
            task.add_done_callback(lambda _: self.probes.pop(flight))
            self.probes[flight] = path, task
        return self.probes[flight]

    def judge(self, location: str, method: str, status: int) -> None:
        """What an answer says about the health of volume and location."""
        trouble = "" if status in (200, 201, 204, 404) else f"answers {status}"
        self.mark(volume_of(location), "")
        self.mark(f"writing to {location}" if method == "PUT" else location + "/", trouble)
        if status in (200, 201, 204):
            self.trusted[location] = time.monotonic() + self.timeout
        elif status != 404 and method != "PUT":
            self.trusted.pop(location, None)

    def mark(self, name: str, trouble: str) -> None:
        """A volume, a location (as "location/") or "writing to" one is in trouble, or out of it.

        The pauses after which it is tried again double, up to 64 times the timeout.
        """
        until, pause = self.down.get(name, (0.0, self.patience / 2))
        if bool(trouble) != bool(until):
            log(f"{name} is down: {trouble}" if trouble else f"{name} works again")
        if trouble and until <= time.monotonic():
            pause = min(2 * pause, 64 * self.patience)
            self.down[name] = time.monotonic() + pause, pause
            self.distrust(name)
        elif not trouble:
            self.down.pop(name, None)

    def distrust(self, volume: str) -> None:
        """Ask its locations before the next redirect to them."""
        for location in [place for place in self.trusted if volume_of(place) == volume]:
            del self.trusted[location]

    def up(self, location: str, writing: bool = False) -> bool:
        """Whether neither volume nor location are known to be down, or not writable."""
        until, _ = self.down.get(f"writing to {location}" if writing else "", (0.0, 0.0))
        names = {volume_of(location), location + "/"}
        return until <= time.monotonic() and not names & self.down.keys()

    def tick(self) -> None:
        """Called several times a timeout: asks what is down whether it is back."""
        for name, (until, _) in list(self.down.items()):
            if until <= time.monotonic() and not name.startswith("writing"):
                self.mark(name, "still")
                self.probe(name.removesuffix("/"), "/")


def request_head(method: str, location: str, path: str, length: int | None) -> bytes:
    """The head of a request to a volume; its body has `length` bytes, or is chunked (None)."""
    volume, slash, folder = location.partition("/")
    framing = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
    return (
        f"{method} {slash}{folder}{path} HTTP/1.1\r\nHost: {volume}\r\n{framing}\r\n\r\n".encode()
    )


def volume_of(location: str) -> str:
    """The volume a location is on."""
    return location.partition("/")[0]


# --- store ----------------------------------------------------------------------------------------
# The verbs. An operation of the index decides; all else is work on files that the journal lists.
# Neither sockets nor LMDB are to be seen from here.


MISSING = refusal(HTTPError(404, "no such key"))


class Store:
    """The key-value store: an index, volumes, and the flags that say how to use them."""

    def __init__(self, flags: argparse.Namespace, index: Index) -> None:
        self.flags, self.index, self.volumes = flags, index, Volumes(flags.voltimeout)
        self.redirects = functools.lru_cache(maxsize=4096)(self.make_redirects)
        self.connections: set[Connection] = set()
        self.limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4  # connections
        self.draining = False  # the next answer on each connection is the last
        self.requests, self.seconds = Counter(), Counter()  # by method and status; by method
        self.received, self.ticked, self.lag = 0, time.monotonic(), 0.0  # bytes, seconds, seconds
        self.swept, self.waiting = 0.0, 0  # the sweeper's last round: when, and the files it left

    def ranking(self, key: bytes) -> list[str]:
        """All locations for a key, best first."""
        volumes = self.flags.volumes
        return key2volume(key, volumes, len(volumes), self.flags.subvolumes)

    def answer(self, request: Request, body: AsyncIterator[bytes] | None) -> Any:
        """The answer to a request: bytes, a coroutine of bytes, or a stream. HTTPError."""
        if request.query is not None:
            return self.ask(request)
        key = unquote_to_bytes(request.path)
        require(len(key) <= MAX_KEY, 414, f"a key has at most {MAX_KEY} bytes")
        require(key.decode(errors="ignore").encode() == key, 400, "a key is UTF-8")
        require(not re.search(rb"%(?![0-9A-Fa-f]{2})", request.path), 400, "malformed %-escape")
        require(len(key) > 1, 400, "there is no key in this request")
        match request.method:
            case "GET" | "HEAD":
                return self.get(key, request.path)
            case "PUT":
                return self.put(key, request, body)
            case "DELETE":
                return self.delete(key)
            case "UNLINK":
                return self.unlink(key)
        raise HTTPError(405, "no such method", "Allow: GET, HEAD, PUT, DELETE, UNLINK\r\n")

    def get(self, key: bytes, path: bytes) -> bytes | Coroutine:
        """302 to a trusted replica, picked at random; trust that has run out is renewed on the side."""
        text = self.index.get(key)
        answers = self.redirects(key, text) if text else ()
        if not answers and self.flags.fallback:
            target = quote(path, safe="%/:@!$&'()*+,;=~")  # as it was sent, but ASCII
            return response(302, f"Location: http://{self.flags.fallback}{target}\r\n")
        if not answers:
            return MISSING
        now, trusted, ready = time.monotonic(), self.volumes.trusted, []
        for replica, answer in answers.items():
            if trusted.get(replica.location, 0) > now:
                ready.append(answer)
            elif self.volumes.timeout and self.volumes.up(replica.location):
                self.volumes.probe(replica.location, key2path(key, replica.write_id))
        return random.choice(ready) if ready else self.find(key, path, text)

    def make_redirects(self, key: bytes, text: bytes) -> dict[Replica, bytes]:
        """The possible answers to GET; none when the key is unlinked."""
        record = parse_record(text)
        places = [replica.location for replica in record.replicas]
        balanced = places == self.ranking(key)[: self.flags.replicas]
        fields = f"Key-Volumes: {','.join(places)}\r\n"
        fields += f"Key-Balance: {'balanced' if balanced else 'unbalanced'}\r\n"
        fields += f"Content-Md5: {record.hash}\r\n" if record.hash else ""
        return {
            r: response(
                302, f"Location: http://{r.location}{key2path(key, r.write_id)}\r\n{fields}"
            )
            for r in record.replicas
            if not record.deleted
        }

    async def find(self, key: bytes, path: bytes, text: bytes) -> bytes:
        """GET when no replica is trusted: ask for all, redirect to the first that is there."""
        answers, absent = self.redirects(key, text), 0
        for question in asyncio.as_completed([self.status(key, replica) for replica in answers]):
            replica, status = await question
            if status == 200:
                return answers[replica]
            absent += status == 404
        if absent < len(answers):
            raise HTTPError(503, "no replica can be reached")
        if self.index.get(key) == text:
            raise HTTPError(404, "the volumes have no such file")
        again = self.get(key, path)  # deleted or moved while we asked
        return again if isinstance(again, bytes) else await again

    async def status(self, key: bytes, replica: Replica) -> tuple[Replica, int]:
        """What HEAD says of a replica. That its location has just shown another file will do too."""
        path, asked, status = key2path(key, replica.write_id), "", 404
        while status == 404 and asked != path:
            asked, question = self.volumes.probe(replica.location, path)
            status = (await question).status
        return replica, status

    async def put(self, key: bytes, request: Request, body: AsyncIterator[bytes] | None) -> bytes:
        """201: `replicas` volumes have the whole value, and the index has it on disk."""
        require(request.length != 0, 411, "a value has at least one byte, and a length or chunks")
        ranked, count = self.ranking(key), self.flags.replicas
        able = [place for place in ranked if self.volumes.up(place, writing=True)]
        require(len(able) >= count, 503, f"{count} volumes are needed, {len(able)} can be written")
        async with self.claimed(key, able[:count], None) as (owner, write_id):
            answers, size, md5 = await self.volumes.write(
                key2path(key, write_id), able[:count], request.length, body
            )
            require(size, 411, "a value has at least one byte")
            given = request.fields.get(b"content-md5", b"")  # in base64 (RFC 1864) or hex
            digests = b"", base64.b64encode(md5.digest()), md5.hexdigest().encode()
            require(given in digests or given.lower() in digests, 400, "Content-MD5 does not match")
            for place in able[count:]:
                good = [place for place, answer in answers.items() if answer.status == 201]
                if not 0 < len(good) < count:
                    break
                log(f"PUT {key.decode()}: {place} stands in")
                await self.index.do(Operations.extend, key, owner, Replica(place, write_id))
                source = Replica(good[0], write_id)
                answers[place] = await self.volumes.copy(key, source, place, write_id)
            good = [place for place in ranked if place in answers and answers[place].status == 201]
            failed = "; ".join(f"{p} {answers[p].reason}" for p in answers if p not in good)
            require(len(good) == count, 503, f"{len(good)} of {count} replicas: {failed}")
            replicas = tuple(Replica(place, write_id) for place in good)
            hashed = md5.hexdigest() if self.flags.md5sum else ""
            record = Record(replicas, size, write_id, hashed)
            await self.index.do(Operations.commit, key, owner, record, None, time.time())
        return response(201)

    @contextlib.asynccontextmanager
    async def claimed(
        self, key: bytes, places: Sequence[str], old: Record | None
    ) -> AsyncIterator[tuple[str, str]]:
        """A claim: its owner and write id. If the block does not commit, what it made is deleted.

        Which files that are the index says, after all that was queued before: so none that a record
        names is among them, however the block ended.
        """
        owner, write_id = self.index.owner(), None
        try:
            write_id = await self.index.do(Operations.claim, key, owner, places, time.time(), old)
            yield owner, write_id
        except BaseException:
            listed = await self.index.do(Operations.settle, key, owner, (), time.time())
            await self.erase(key, [r for r in listed if r.write_id == write_id], (204,))
            raise

    async def erase(self, key: bytes, replicas: Sequence[Replica], proof: Sequence[int]) -> int:
        """Delete files where that can be done; a status in `proof` shows one gone. How many are."""
        asked = [replica for replica in replicas if self.volumes.up(replica.location)]
        answers = await asyncio.gather(
            *(self.volumes.request("DELETE", r.location, key2path(key, r.write_id)) for r in asked)
        )
        gone = [r for r, answer in zip(asked, answers, strict=True) if answer.status in proof]
        if gone:
            self.index.do(Operations.settle, key, "", gone, time.time(), later=True)
        return len(gone)

    async def delete(self, key: bytes) -> bytes:
        """204: no GET finds the key. Its files are gone, or will be when their volume is back."""
        record = await self.index.do(Operations.remove, key, self.flags.protect, time.time())
        await self.erase(key, record.replicas, (204, 404))
        return response(204)

    async def unlink(self, key: bytes) -> bytes:
        """204: hidden, until DELETE or a new PUT."""
        await self.index.do(Operations.unlink, key)
        return response(204)

    def ask(self, request: Request) -> bytes | AsyncIterator[bytes]:
        """GET with a query: ?list, ?unlinked, /?health, /?metrics. 400 for any other."""
        try:
            query = parse_qs(request.query.decode(), keep_blank_values=True, errors="strict")
            limit = int(query.get("limit", [sys.maxsize])[0])
        except ValueError as error:
            raise HTTPError(400, f"malformed query: {error}") from error
        words, prefix = set(query) - {"start", "limit"}, unquote_to_bytes(request.path)
        require(request.method in ("GET", "HEAD") and limit >= 0, 400, "not with a query like this")
        if request.path == b"/" and set(query) in ({"health"}, {"metrics"}):
            return response(200, TEXT, b"ok\n" if "health" in query else self.metrics())
        require(words in ({"list"}, {"unlinked"}), 400, "no such query: try ?list")
        return self.list(prefix, query.get("start", [""])[0].encode(), limit, words == {"unlinked"})

    async def list(
        self, prefix: bytes, start: bytes, limit: int, unlinked: bool
    ) -> AsyncIterator[bytes]:
        """The JSON of the keys with a prefix, from `start` on, a thousand at a time."""
        text, following = '{"keys": [', ""
        for rows in self.index.walk(self.index.keys, max(prefix, start)):
            keys = [
                key.decode()
                for key, record in rows
                if key.startswith(prefix) and record.startswith(b"DELETED") == unlinked
            ]
            page, following = keys[:limit], "".join(keys[limit : limit + 1])
            limit -= len(page)
            yield (text + json.dumps(page)[1:-1]).encode()
            text = ", " if page or text == ", " else text
            if following or not rows or not rows[-1][0].startswith(prefix):
                break
        yield f'], "next": {json.dumps(following)}}}\n'.encode()

    def metrics(self) -> bytes:
        """What an operator watches, for Prometheus; of this process, but for keys and journal."""
        values = {
            "received_bytes_total": self.received,
            "connections": len(self.connections),
            "keys": self.index.count(self.index.keys),
            "journal_entries": self.index.count(self.index.journal),
            "volumes": len(self.flags.volumes),
            "volumes_up": sum(map(self.volumes.up, self.flags.volumes)),
            "event_loop_lag_seconds": self.lag,
        }
        for (method, status), count in self.requests.items():
            values[f'requests_total{{method="{method}",status="{status}"}}'] = count
        for method, seconds in self.seconds.items():
            values[f'request_seconds_total{{method="{method}"}}'] = seconds
        return "".join(f"mkv_{name} {value}\n" for name, value in sorted(values.items())).encode()

    def tick(self) -> None:
        """Called every second: ends what takes too long, and notes how late it is called."""
        now = time.monotonic()
        self.ticked, self.lag = now, max(0.0, now - self.ticked - 1)
        for connection in list(self.connections):
            if not connection.task and now - connection.started > IDLE_TIME:
                connection.writer.transport.abort()

    async def sweep(self) -> None:
        """One round over the journal: delete garbage older than `grace`, evict the dead.

        While a PUT that was never answered may still land, 404 is no proof that a file is gone: until
        `settle` has passed such files are asked for again, each time after twice as long.
        """
        owners, waiting, now, grace = set(), 0, time.time(), self.flags.grace
        for rows in self.index.walk(self.index.journal):
            work = []
            for key, entry in [(key, parse_entry(text)) for key, text in rows]:
                age, before = now - entry.since, max(0.0, self.swept - entry.since)
                settled = age > self.flags.settle
                if entry.owner:
                    owners.add(entry.owner.partition(".")[0])
                elif age >= grace:
                    waiting += len(entry.replicas)
                    if settled or int(age / grace).bit_length() > int(before / grace).bit_length():
                        work.append(self.erase(key, entry.replicas, (204, 404)[: 1 + settled]))
            for start in range(0, len(work), 32):
                waiting -= sum(await asyncio.gather(*work[start : start + 32]))
        if bool(waiting) != bool(self.waiting):
            log(
                f"sweeper: {waiting} files have to wait"
                if waiting
                else "sweeper: all files are gone"
            )
        self.swept, self.waiting = now, waiting
        await self.index.evict_dead(owners)
        self.index.env.reader_check()  # a reader that was killed pins old pages


# --- command line ---------------------------------------------------------------------------------
# Flags as the ancestor has them (one dash or two), the server process, the volumes of the demo.


def duration(text: str) -> float:
    """Seconds, from a duration as Go writes it: 300ms, 1.5s, 1h30m, 0."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    parts = re.findall(r"([0-9]+\.?[0-9]*)(h|ms|m|s)", text)
    if text != "0" and (not parts or "".join(map("".join, parts)) != text):
        raise ValueError
    return sum(float(number) * units[unit] for number, unit in parts)


def addresses(text: str) -> tuple[str, ...]:
    """host:port,host:port,… without doubles."""
    volumes = tuple(text.split(","))
    valid = all(re.fullmatch(r"([\w.-]+|\[[0-9a-f:.]+\]):[0-9]{1,5}", volume) for volume in volumes)
    if not valid or len(set(volumes)) < len(volumes):
        raise ValueError
    return volumes


FLAGS = [
    ("volumes", addresses, (), "host:port,… (without: three of its own, for a look around)"),
    ("db", Path, Path("mkv-data/index"), "folder of the index"),
    ("port", int, 3000, "port to listen on"),
    ("bind", str, "", "address to listen on (all; 127.0.0.1 with volumes of its own)"),
    ("replicas", int, 3, "copies of each value"),
    ("subvolumes", int, 10, "drives a volume, 1 to 256"),
    ("fallback", str, "", "host:port to redirect to when a key is not here"),
    ("md5sum", json.loads, True, "whether to keep the MD5 of values: true or false"),
    ("voltimeout", duration, 1.0, "how long a volume may be silent; 0: ask before each redirect"),
    ("settle", duration, 3600.0, "after this time no request can still take effect"),
    ("grace", duration, 60.0, "how long replaced files stay for readers on their way"),
]


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, checked, and volumes of its own if none are given."""
    parser.add_argument("command", choices=["server"])
    for name, kind, default, text in FLAGS:
        parser.add_argument(f"-{name}", f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("-protect", "--protect", action="store_true", help="UNLINK before DELETE")
    parser.add_argument("-v", "--v", action="store_true", help="log every request")
    flags = parser.parse_args()
    flags.demo = () if flags.volumes else (3001, 3002, 3003)
    flags.bind = flags.bind or ("127.0.0.1" if flags.demo else "0.0.0.0")
    flags.volumes = flags.volumes or tuple(f"127.0.0.1:{port}" for port in flags.demo)
    flags.grace = max(flags.grace, 0.01)
    if not 0 < flags.port < 65536 or not 0 < flags.subvolumes <= 256:
        parser.error("-port is 1 to 65535, -subvolumes 1 to 256")
    if not 0 < flags.replicas <= len(flags.volumes):
        parser.error(f"-replicas is 1 to {len(flags.volumes)}, the number of volumes")
    return flags


def listen(flags: argparse.Namespace, index: Index) -> socket.socket:
    """A socket at the port, which only another server of the same index may share. OSError."""
    listener = socket.socket(socket.AF_INET6 if ":" in flags.bind else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, index.is_shared())
    listener.bind((flags.bind, flags.port))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.listen(4096)
    return listener


@contextlib.contextmanager
def own_volumes(flags: argparse.Namespace) -> Iterator[None]:
    """The volumes of the demo, under ./mkv-data, for as long as the block runs."""
    volumes: list[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, until serve() takes both
    try:
        for port in flags.demo:
            folder, script = Path(f"mkv-data/volume{port}"), Path(__file__).with_name("volume.sh")
            settings = {"PORT": f"{port}", "HOST": "127.0.0.1", "SUBVOLUMES": f"{flags.subvolumes}"}
            env = os.environ | settings
            volumes.append(subprocess.Popen([script, folder], env=env, start_new_session=True))
            pid = folder / ".nginx/pid"  # there when nginx listens
            while not pid.exists() or pid.read_text().strip() != str(volumes[-1].pid):
                if volumes[-1].poll() is not None:
                    sys.exit(2)  # volume.sh has said why
                time.sleep(0.01)
        yield
    finally:
        for volume in volumes:
            volume.terminate()
            volume.wait()


async def every(seconds: float, job: Callable[[], Any]) -> None:
    """Do a job again and again. An HTTPError is worth a line, all else ends the process."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await (job() or asyncio.sleep(0))
        except HTTPError as error:
            log(f"{job.__name__}: {error.reason}")


async def serve(flags: argparse.Namespace, index: Index, listener: socket.socket) -> None:
    """The server, until SIGINT or SIGTERM; then what is in hand, and in the accept queue."""
    loop, stop, store = asyncio.get_running_loop(), asyncio.Event(), Store(flags, index)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    queue, connect = listener.dup(), functools.partial(Connection, store)
    server = await loop.create_server(connect, sock=listener, backlog=4096)
    jobs = [
        every(1, store.tick),
        every(store.volumes.patience / 5, store.volumes.tick),
        every(min(5.0, flags.grace / 2 + 0.05), store.sweep),
        stop.wait(),
    ]
    tasks = [asyncio.create_task(job) for job in jobs]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*done)  # raises what ended a job
    server.close()
    store.draining, began = True, time.monotonic()
    await asyncio.sleep(0)
    queue.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            await loop.connect_accepted_socket(connect, queue.accept()[0])
    queue.close()
    while store.connections:
        await asyncio.sleep(0.02)
        for connection in list(store.connections):  # an idle one has a second to ask once more
            if time.monotonic() - began > (DRAIN_TIME if connection.task else 1):
                connection.writer.transport.abort()


def main() -> None:
    """What `python mkv.py` does."""
    parser = argparse.ArgumentParser("mkv.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    flags = parse_flags(parser)
    try:
        index = Index(flags.db, f"{flags.bind}:{flags.port}")
        listener = listen(flags, index)
    except BlockingIOError:
        parser.error(f"a rebuild of {flags.db} is under way")
    except lmdb.MemoryError:
        parser.error(f"not enough address space for {MAP_SIZE >> 30} GiB of index: see ulimit -v")
    except (OSError, lmdb.Error) as error:
        parser.error(f"cannot use -db {flags.db} and -port {flags.port}: {error}")
    with own_volumes(flags):
        at, names = f"http://{index.note}", ", ".join(flags.volumes)
        print(f"mkv is at {at}, its index in {flags.db}, its volumes at {names}", flush=True)
        if flags.demo:
            print(f"curl -X PUT -d bigswag {at}/wehave\ncurl -L {at}/wehave", flush=True)
            print(f"curl '{at}/?list'", flush=True)
        uvloop.run(serve(flags, index, listener))
    index.close()


if __name__ == "__main__":
    main()
