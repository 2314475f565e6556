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
MAP_SIZE, DRAIN_TIME = 1 << 40, 10  # address space for LMDB; seconds that SIGTERM leaves to work
Pieces = AsyncIterator[bytes]  # a value on its way


class HTTPError(Exception):  # no success: status, one line that says why, more header lines
    def __init__(self, status: int, reason: str, fields: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.fields = status, reason, fields


def require(condition: Any, status: int, reason: str) -> None:
    """HTTPError unless the condition holds."""
    if not condition:
        raise HTTPError(status, reason)


# --- placement ------------------------------------------------------------------------------------
# Where a key's files lie, in minikeyvalue's layout. Pure. A location is "host:port" (a volume) or
# "host:port/svXX"; a write id is 16 hex digits: 8 of seconds since 1970, 8 that tell writers apart.


def key2path(key: bytes, write_id: str = "") -> str:
    """The path of a key's file: two bytes of its md5, its base64, and its write id, if any."""
    digest, name = hashlib.md5(key).hexdigest(), base64.b64encode(key).decode()
    if write_id:  # no name has over 255 bytes; base64 may itself have "/": a sub-folder
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
    numbered = [(v, int.from_bytes(md5[12:], "big") % subvolumes) for md5, v in scores]
    return [volume + drive.format(number) for volume, number in numbered[:replicas]]


# --- record ---------------------------------------------------------------------------------------
# What the index knows of a key: [DELETED][HASH<32 hex>]<location>,<location>@<id>,…[ <size> <id>]
# Without size and id it is minikeyvalue's record, byte for byte. Pure.

RECORD = re.compile(r"(DELETED)?(?:HASH([0-9a-f]{32}))?([^ ]*)(?: ([0-9]+)(?: ([0-9a-f]{16}))?)?")


class Replica(NamedTuple):  # one file of a key
    location: str
    write_id: str


class Record(NamedTuple):
    replicas: tuple[Replica, ...]  # in ranking order
    size: int | None = None  # bytes
    write_id: str = ""  # of the replicas that have no other
    hash: str = ""  # MD5 in hex
    deleted: bool = False  # unlinked: hidden, but the files stay

    def text(self) -> bytes:
        """The record as the index stores it."""
        mark = "DELETED" * self.deleted + (self.hash and "HASH" + self.hash)
        files = [r.location if r.write_id == self.write_id else "@".join(r) for r in self.replicas]
        size = "" if self.size is None else f" {self.size} {self.write_id}".rstrip()
        return f"{mark}{','.join(files)}{size}".encode()


def parse_record(text: bytes) -> Record:
    """The inverse of Record.text(). 500 for what is no record."""
    match = RECORD.fullmatch(text.decode())
    require(match, 500, f"unreadable record: {text!r}")
    deleted, md5, files, size, write_id = match.groups("")
    parts = [file.partition("@") for file in files.split(",") if file]
    replicas = tuple(Replica(location, own if at else write_id) for location, at, own in parts)
    return Record(replicas, int(size) if size else None, write_id, md5, bool(deleted))


# --- index ----------------------------------------------------------------------------------------
# Two LMDB tables. keys: key → record. journal: key → files that may exist and that no record names;
# with an owner somebody is making them (the lock on the key), without one they are garbage. Writing
# is by operations: they check and change in one transaction, from plain arguments, without clock or
# chance, and so can be replayed. Their answer is heard when it is on disk.


class Entry(NamedTuple):  # `<owner> <since> <replicas>`, these as in a record without size and id
    owner: str
    since: float  # seconds since 1970, when the last owner went or the last replica came
    replicas: tuple[Replica, ...]


def parse_entry(text: bytes) -> Entry:
    """The journal entry that Operations.enter() wrote."""
    owner, since, replicas = text.split(b" ")
    return Entry(owner.decode(), float(since), parse_record(replicas).replicas)


class Operations(NamedTuple):  # all that can be done to the index, in one write transaction
    txn: lmdb.Transaction
    keys: Any
    journal: Any

    def look(self, key: bytes, owner: str = "") -> tuple[Record, Entry]:
        """What the tables say of a key, empty if nothing. 503 when another than `owner` has it."""
        record = parse_record(self.txn.get(key, b"", db=self.keys))
        entry = parse_entry(self.txn.get(key, b" 0 ", db=self.journal))
        require(owner in ("", entry.owner), 503, "the claim on the key was lost")
        return record, entry

    def enter(self, key: bytes, old: Entry, owner: str, new: Sequence[Replica], now: float) -> None:
        """Put an owner and replicas in the place of a journal entry; with neither, it goes."""
        self.txn.delete(key, db=self.journal)
        if owner or new:
            fresh = (old.owner and not owner) or not set(new) <= set(old.replicas)
            text = f"{owner} {now if fresh else old.since!r} ".encode() + Record(tuple(new)).text()
            self.txn.put(key, text, db=self.journal)

    def claim(self, key: bytes, owner: str, where: list, now: float, old: Record | None) -> str:
        """Lock a key and list files to be made: their write id. For a move, of `old`. 409, 403."""
        record, entry = self.look(key)
        require(not entry.owner, 409, "another PUT or move of this key is under way")
        require(old or not record.replicas or record.deleted, 403, "key exists: DELETE it first")
        require(not old or old == record, 409, "the key has changed meanwhile")
        known = {replica.write_id for replica in entry.replicas + record.replicas}
        seconds = int("0" + (old.write_id if old else max(known, default=""))[:8], 16)
        seconds = seconds if old else max(int(now), seconds + 1)
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
        garbage = [r for r in entry.replicas + record.replicas if r not in new.replicas]
        self.txn.put(key, new.text(), db=self.keys)
        self.enter(key, entry, "", garbage, now)

    def settle(self, key: bytes, owner: str, gone: Sequence[Replica], now: float) -> list[Replica]:
        """Strike out files that are gone, and the owner if it is this one; returns what is left."""
        _, entry = self.look(key)
        left = [replica for replica in entry.replicas if replica not in gone]
        self.enter(key, entry, "" if owner == entry.owner else entry.owner, left, now)
        return left

    def remove(self, key: bytes, protect: bool, now: float) -> Record:
        """Delete a key: its files are garbage. Returns what its record was. 404, 403."""
        record, entry = self.look(key)
        require(record.replicas, 404, "no such key")
        require(record.deleted or not protect, 403, "protected: UNLINK the key first")
        self.txn.delete(key, db=self.keys)
        self.enter(key, entry, entry.owner, entry.replicas + record.replicas, now)
        return record

    def unlink(self, key: bytes) -> None:
        """Hide a key. 404."""
        record, _ = self.look(key)
        require(record.replicas and not record.deleted, 404, "no such key")
        self.txn.put(key, record._replace(deleted=True).text(), db=self.keys)

    def evict(self, process: str, now: float) -> None:
        """All claims of a dead process lose their owner: the keys are free, the files garbage."""
        for key, text in list(self.txn.cursor(db=self.journal)):
            entry = parse_entry(text)
            if entry.owner.startswith(process + "."):
                self.enter(key, entry, "", entry.replicas, now)


class Index:
    """The LMDB environment in a folder, for any number of processes with one event loop each.

    A process keeps the file owners/<its random name> locked: whoever gets the lock knows that it is
    dead, and evicts it. All hold the folder itself by a shared lock, rebuild by an exclusive one.
    """

    def __init__(self, path: Path, exclusive: bool = False) -> None:
        self.owners, self.claims = path / "owners", itertools.count(1)
        self.owners.mkdir(parents=True, exist_ok=True)
        self.folder = os.open(self.owners, os.O_RDONLY)
        fcntl.flock(self.folder, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
        self.env = lmdb.open(str(path), map_size=MAP_SIZE, max_dbs=2, max_readers=4096)
        self.keys, self.journal = self.env.open_db(b"keys"), self.env.open_db(b"journal")
        self.process = ""
        self.owner()
        self.queue: deque[tuple] = deque()  # (operation, arguments, future)
        self.wake, self.closing = threading.Event(), False
        self.thread = threading.Thread(target=self.commit_groups, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closing = True
        self.thread.join()
        self.env.close()
        (self.owners / self.process).unlink(missing_ok=True)
        self.lock.close()
        os.close(self.folder)

    def owner(self) -> str:
        """A name for one claim, never given twice. Taken for dead by others, we take a new name."""
        while not (self.owners / self.process).is_file():
            self.process = os.urandom(8).hex()
            self.lock = (self.owners / self.process).open("w")
            fcntl.flock(self.lock, fcntl.LOCK_EX)  # who takes us for dead has to finish first
        return f"{self.process}.{next(self.claims)}"

    async def evict_dead(self, named: set[str]) -> None:
        """Evict whoever is named in the journal, or has a file, but does not live."""
        for process in named.union(path.name for path in self.owners.iterdir()) - {self.process}:
            path = self.owners / process
            with path.open("a") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                await self.do(Operations.evict, process, time.time())
                path.unlink(missing_ok=True)

    def get(self, key: bytes) -> bytes | None:
        """The text of a key's record."""
        with self.env.begin(self.keys) as txn:
            return txn.get(key)

    def count(self, table: Any) -> int:
        with self.env.begin() as txn:
            return txn.stat(table)["entries"]

    def walk(self, table: Any, start: bytes | None = b"") -> Iterator[list[tuple[bytes, bytes]]]:
        """The rows from `start` on, in batches; no snapshot outlasts one, or it would pin pages."""
        while start is not None:
            with self.env.begin(table) as txn, txn.cursor() as cursor:
                found = cursor.set_range(start)
                rows = list(itertools.islice(cursor.iternext(), 1001)) if found else []
            start = rows.pop()[0] if len(rows) > 1000 else None
            yield rows

    def do(self, operation: Callable, *args: Any, later: bool = False) -> asyncio.Future | None:
        """Queue an operation: a future of its answer. `later`: with others, and nobody listens."""
        future = None if later else asyncio.get_running_loop().create_future()
        self.queue.append((operation, args, future))
        if future:
            self.wake.set()
        return future and asyncio.shield(future)  # who waits may be cancelled, the operation not

    def commit_groups(self) -> None:
        """The thread that writes. What queued up during one sync shares the next: group commit."""
        while self.queue or not self.closing:
            self.wake.wait(0.1)  # no longer, for the sake of what is in no hurry
            self.wake.clear()
            group, answers = [self.queue.popleft() for _ in range(len(self.queue))], []
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
                self.queue += [(do, args, None) for do, args, _ in group if do is Operations.settle]
            for (_, _, future), answer in zip(group, answers, strict=True):
                if future and not future.get_loop().is_closed():
                    refused = isinstance(answer, HTTPError)
                    tell = future.set_exception if refused else future.set_result
                    future.get_loop().call_soon_threadsafe(tell, answer)


# --- http -----------------------------------------------------------------------------------------
# HTTP/1.1 by hand (RFC 9112). What could be read in two ways is refused, and nothing after it is
# understood: so no request is smuggled past a proxy. Parsing needs no sockets.

REQUEST = re.compile(
    rb"([A-Z]+) (?:http://[^/?#\x00-\x20\x7f]*)?(/[^?#\x00-\x20\x7f]*)(?:\?([^#\x00-\x20\x7f]*))?"
    rb" HTTP/1\.([01])"
)
STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?: .*)?")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
TEXT = "Content-Type: text/plain; charset=utf-8\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def parse_head(lines: list[bytes], kind: re.Pattern) -> tuple[re.Match, dict, int]:
    """First line, fields by lower-case name, body length (None: chunked). 400, 431, 501."""
    require(len(lines) - 1 <= MAX_FIELDS, 431, f"a head has at most {MAX_FIELDS} fields")
    require(lines and (first := kind.fullmatch(lines[0])), 400, "malformed first line")
    fields: dict[bytes, bytes] = {}
    for line in lines[1:]:  # a FIELD is not folded, has no space before the colon, no bare CR
        require(match := FIELD.fullmatch(line), 400, "malformed header field")
        name, value = match[1].lower(), match[2].rstrip(b" \t")
        fields[name] = fields[name] + b"," + value if name in fields else value
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"0")
    require(re.fullmatch(rb"[0-9]{1,18}", length), 400, "malformed Content-Length")
    require(not coding or b"content-length" not in fields, 400, "two lengths of one body")
    require(coding is None or coding.lower() == b"chunked", 501, "the only coding is chunked")
    return first, fields, int(length) if coding is None else None


class Request(NamedTuple):  # the head of a request
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
    return response(error.status, TEXT + error.fields, error.reason.encode() + b"\n")


async def read_line(reader: asyncio.StreamReader, status: int = 400) -> bytes:
    """The next line, without its CR LF; `status` for one that is too long. EOFError."""
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError as error:
        raise HTTPError(status, f"over {MAX_HEAD} bytes") from error
    require(line.endswith(b"\r\n"), 400, "a line ends in CR LF")
    return line[:-2]


async def read_lines(reader: asyncio.StreamReader) -> list[bytes]:
    """The lines of a head, or trailers, up to the empty one. 400, 431, EOFError."""
    lines: list[bytes] = []
    while line := await read_line(reader, 431):
        lines.append(line)
        require(len(b"\r\n".join(lines)) < MAX_HEAD, 431, f"over {MAX_HEAD} bytes")
    return lines


async def read_body(reader: asyncio.StreamReader, length: int | None, seconds: float) -> Pieces:
    """The pieces of a body (None: chunked). 400, EOFError, TimeoutError after waiting."""
    left, allowed = length, seconds  # to wait; BODY_RATE bytes earn one more
    while left or length is None:  # RFC 9112, 7.1
        began = time.monotonic()
        async with asyncio.timeout(min(allowed, seconds)):
            if not left:
                require(size := CHUNK.fullmatch(await read_line(reader)), 400, "malformed chunk")
                left = int(size[1], 16)
            if not left:
                trailers = await read_lines(reader)
                require(all(map(FIELD.fullmatch, trailers)), 400, "malformed trailer")
                return
            piece = await reader.read(min(left, READ_AHEAD))
            require(piece, 400, "the body ended early")
            left -= len(piece)
            if length is None and not left:
                require(await reader.readexactly(2) == b"\r\n", 400, "a chunk too long")
        allowed += began - time.monotonic() + len(piece) / BODY_RATE
        yield piece


class Wire(asyncio.StreamReaderProtocol):  # a connection, of a client or to a volume
    def __init__(self) -> None:
        self.reader = asyncio.StreamReader(MAX_HEAD)  # longer lines fail; at the double it pauses
        super().__init__(self.reader)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.writer = asyncio.StreamWriter(transport, self, self.reader, asyncio.get_running_loop())


class Connection(Wire):  # of a client; what takes no waiting is answered on arrival, else by a task
    task: asyncio.Task | None = None
    closing = False  # the last answer has been given
    whole = True  # the body of the request has been read

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store, self.started = store, time.monotonic()
        store.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.store.connections.discard(self)

    def eof_received(self) -> bool:
        super().eof_received()
        return self.task is not None  # keep the connection for the answer

    def data_received(self, data: bytes) -> None:
        if self.task or not self.answer_at_once(data):
            super().data_received(data)
            self.task = self.task or asyncio.create_task(self.converse())

    def answer_at_once(self, data: bytes) -> bool:
        """Answer a GET, if that is all there is, and nothing has to be waited for."""
        self.started = time.monotonic()
        waits = self.store.draining or self.writer.transport.get_write_buffer_size()
        if waits or data[:4] != b"GET " or not data.find(b"\r\n\r\n") == len(data) - 4 < MAX_HEAD:
            return False
        with contextlib.suppress(HTTPError):  # the task will meet it again
            request = parse_request(data[:-4].split(b"\r\n"))
            if request.length == 0 and not request.close and request.query is None:
                answer = self.store.answer(request, None)
                if isinstance(answer, bytes):
                    self.respond(answer, request)
                    return True
                answer.close()
        return False

    async def converse(self) -> None:
        """Answer the requests in the reader, one after the other."""
        try:
            while self.reader._buffer and not self.closing:
                self.started = time.monotonic()
                async with asyncio.timeout(HEAD_TIME):
                    lines = await read_lines(self.reader)
                await self.serve(parse_request(lines))
        except (HTTPError, TimeoutError) as error:
            known = error if isinstance(error, HTTPError) else HTTPError(408, "too slow")
            self.respond(refusal(known), None)
        except BaseException as error:  # the client is gone, or there is a bug
            self.writer.transport.abort()
            if not isinstance(error, OSError | EOFError):
                raise
        if (self.closing or self.reader.at_eof()) and not self.writer.is_closing():
            with contextlib.suppress(OSError):  # close() at once would reset the answer away
                self.writer.write_eof()
                async with asyncio.timeout(LINGER_TIME):
                    while await self.reader.read(READ_AHEAD):
                        pass
            self.writer.close()
        self.task = None

    async def body(self, request: Request) -> Pieces:
        if b"expect" in request.fields:
            self.writer.write(response(100))
        async for piece in read_body(self.reader, request.length, BODY_TIME):
            self.store.received += len(piece)
            yield piece
        self.whole = True

    async def serve(self, request: Request) -> None:
        """Answer a request. OSError when the client does not take the answer."""
        self.whole = request.length == 0
        try:
            answer = self.store.answer(request, None if self.whole else self.body(request))
            while isinstance(answer, Awaitable):
                answer = await answer
        except HTTPError as error:
            answer = refusal(error)
        stream = None if isinstance(answer, bytes) else answer
        framing = b"\r\n" if request.close else b"Transfer-Encoding: chunked\r\n\r\n"
        self.respond(STREAM + framing if stream else answer, request)
        if stream and request.method == "GET":
            async for piece in stream:  # HTTP/1.0 knows no chunks
                chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
                self.writer.write(piece if request.close else chunk)
                await asyncio.sleep(0)
                async with asyncio.timeout(IDLE_TIME):
                    await self.writer.drain()
            self.writer.write(b"" if request.close else b"0\r\n\r\n")

    def respond(self, answer: bytes, request: Request | None) -> None:
        """Send an answer; it is the last one if anything speaks for that."""
        store, seconds = self.store, time.monotonic() - self.started
        method, status = request.method if request else "-", answer[9:12].decode()
        store.requests[method, status] += 1
        store.seconds[method] += seconds
        self.closing = not request or request.close or not self.whole or store.draining
        if self.closing:
            answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        if method == "HEAD":
            answer = answer[: answer.find(b"\r\n\r\n") + 4]
        if not self.writer.is_closing():
            self.writer.write(answer)


# --- volumes --------------------------------------------------------------------------------------
# The client of the volumes: pooled keep-alive connections, and trust in those that have answered.
# That a volume does not answer is no exception, but status 0.

TROUBLE = OSError, EOFError, HTTPError, RuntimeError  # a timeout is the first, uvloop's the last


class Link(Wire):  # to a volume, for one request at a time
    heard = False  # something of the answer

    def __init__(self, volumes: "Volumes", volume: str) -> None:
        super().__init__()
        self.volumes, self.volume = volumes, volume

    def data_received(self, data: bytes) -> None:
        self.heard = True
        super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self in self.volumes.idle[self.volume]:
            self.volumes.idle[self.volume].remove(self)
            self.volumes.distrust(self.volume)


class Volumes:  # an answer from a location makes it trusted for `timeout` seconds
    def __init__(self, timeout: float) -> None:
        self.timeout, self.patience = timeout, timeout or 1.0
        self.idle: dict[str, list[Link]] = defaultdict(list)
        self.trusted: dict[str, float] = {}  # location → until when (monotonic)
        self.down: set[str] = set()  # volumes that failed to answer when last asked
        self.probes: dict[str, asyncio.Task] = {}  # under way, by location

    async def connect(self, location: str) -> Link:
        volume = location.partition("/")[0]
        host, _, port = volume.rpartition(":")
        connect = asyncio.get_running_loop().create_connection
        async with asyncio.timeout(self.patience):
            _, link = await connect(lambda: Link(self, volume), host.strip("[]"), int(port))
        link.writer.transport.set_write_buffer_limits(WRITE_AHEAD, WRITE_AHEAD - SMALL)
        return link

    async def request(self, method: str, location: str, path: str, body: bytes = b"") -> int:
        """The status of an exchange; PUT has ten times the time."""
        idle, link = self.idle[location.partition("/")[0]], None
        pooled = bool(idle)
        try:
            async with asyncio.timeout(10 * self.patience if body else self.patience):
                link = idle.pop() if pooled else await self.connect(location)
                head = request_head(method, location, path, f"Content-Length: {len(body)}")
                link.writer.write(head + body)
                return await self.hear(link, method, location)
        except TROUBLE as error:
            if (
                pooled and not link.heard and isinstance(error, ConnectionError | EOFError)
            ):  # not taken
                return await self.request(method, location, path, body)
            return self.lost(location, link)

    async def hear(self, link: Link, method: str, location: str) -> int:
        """The status of an answer; it renews trust, or ends it. TROUBLE if it cannot be read."""
        first, fields, length = parse_head(await read_lines(link.reader), STATUS)
        status = int(first[1])
        self.down.discard(link.volume)
        if method != "HEAD" and status != 204:
            async for _ in read_body(link.reader, length, self.patience):
                pass  # an error page
        if status in (200, 201, 204):
            self.trusted[location] = time.monotonic() + self.timeout
        elif status != 404:
            self.trusted.pop(location, None)
        link.heard = False
        if fields.get(b"connection") == b"close" or len(self.idle[link.volume]) > 15:
            link.writer.close()
        else:
            self.idle[link.volume].append(link)
        return status

    def lost(self, location: str, link: Link | None) -> int:
        self.distrust(location.partition("/")[0])
        self.down.add(location.partition("/")[0])
        if link:
            link.writer.transport.abort()  # of an upload that is cut short nginx keeps nothing
        return 0

    def distrust(self, volume: str) -> None:
        """Ask all its locations before the next redirect to them."""
        self.trusted = {p: t for p, t in self.trusted.items() if p.partition("/")[0] != volume}

    async def write(self, path: str, places: list, length: int | None, body: Pieces) -> tuple:
        """PUT a body to all places in one pass: statuses, size, md5. Raises what it raises."""
        size, md5, statuses, links = 0, hashlib.md5(), {}, {}
        framing = f"Content-Length: {length}" if length else "Transfer-Encoding: chunked"
        framing += "\r\nConnection: close"
        if length and length <= SMALL:
            data = b"".join([piece async for piece in body])
            puts = [self.request("PUT", place, path, data) for place in places]
            statuses = dict(zip(places, await asyncio.gather(*puts), strict=True))
            return statuses, length, hashlib.md5(data)

        async def step(place: str, data: bytes | None) -> None:
            try:
                async with asyncio.timeout(10 * self.patience):
                    if place not in links:
                        links[place] = await self.connect(place)
                        links[place].writer.write(request_head("PUT", place, path, framing))
                    if data is None:  # all is sent
                        statuses[place] = await self.hear(links[place], "PUT", place)
                        del links[place]
                    else:
                        links[place].writer.write(data)
                        await links[place].writer.drain()
            except TROUBLE:
                statuses[place] = self.lost(place, links.pop(place, None))

        async def pass_on(data: bytes | None) -> None:
            await asyncio.gather(*(step(place, data) for place in places if place not in statuses))

        try:
            await pass_on(b"")
            async for piece in body:
                await pass_on(piece if length else b"%x\r\n%b\r\n" % (len(piece), piece))
                size += len(piece)
                md5.update(piece)
                require(len(statuses) < len(places), 503, "no volume took the value")
            await pass_on(b"" if length else b"0\r\n\r\n")
            await pass_on(None)
        finally:
            for link in links.values():
                link.writer.transport.abort()
        return statuses, size, md5

    def probe(self, location: str, path: str) -> None:
        """Ask a location for a file in the background, unless it is being asked for one."""
        if location not in self.probes:
            self.probes[location] = asyncio.create_task(self.request("HEAD", location, path))
            self.probes[location].add_done_callback(lambda _: self.probes.pop(location))


def request_head(method: str, location: str, path: str, framing: str) -> bytes:
    """The head of a request to a volume."""
    volume, slash, folder = location.partition("/")
    head = f"{method} {slash}{folder}{path} HTTP/1.1\r\nHost: {volume}\r\n{framing}\r\n\r\n"
    return head.encode()


# --- store ----------------------------------------------------------------------------------------
# The verbs. An operation of the index decides; all else is work on files that the journal lists.
# Neither sockets nor LMDB are to be seen from here.


class Store:  # an index, volumes, and the flags that say how to use them
    def __init__(self, flags: argparse.Namespace, index: Index) -> None:
        self.flags, self.index, self.volumes = flags, index, Volumes(flags.voltimeout)
        self.home = lambda k: key2volume(k, flags.volumes, flags.replicas, flags.subvolumes)
        self.redirects = functools.lru_cache(maxsize=4096)(self.make_redirects)
        self.connections: set[Connection] = set()
        self.draining = False  # if so, the next answer on each connection is the last
        self.requests, self.seconds = Counter(), Counter()  # by method and status; by method
        self.received, self.lag = 0, 0.0  # bytes, seconds

    def answer(self, request: Request, body: Pieces | None) -> Any:
        """The answer to a request: bytes, a coroutine of bytes, or a stream. HTTPError."""
        if request.query is not None:
            return self.ask(request)
        key = unquote_to_bytes(request.path)
        require(len(key) <= MAX_KEY, 414, f"a key has at most {MAX_KEY} bytes")
        escaped = not re.search(rb"%(?![0-9A-Fa-f]{2})", request.path)
        valid = escaped and len(key) > 1 and key.decode(errors="ignore").encode() == key
        require(valid, 400, "a key is a path of two bytes or more, UTF-8 and percent-encoded")
        if request.method in ("GET", "HEAD"):
            return self.get(key, request.path)
        if request.method == "PUT":
            return self.put(key, request, body)
        if request.method in ("DELETE", "UNLINK"):
            return self.remove(key, request.method)
        raise HTTPError(405, "no such method", "Allow: GET, HEAD, PUT, DELETE, UNLINK\r\n")

    def get(self, key: bytes, path: bytes) -> bytes | Coroutine:
        """302 to a trusted replica, picked at random; trust that ran out is renewed on the side."""
        text, now = self.index.get(key), time.monotonic()
        redirects = self.redirects(key, text) if text else ()
        if not redirects:
            if not self.flags.fallback:
                return refusal(HTTPError(404, "no such key"))
            target = quote(path, safe="%/:@!$&'()*+,;=~")  # as it was sent, but ASCII
            return response(302, f"Location: http://{self.flags.fallback}{target}\r\n")
        trust = [(self.volumes.trusted.get(each[0], 0) - now, each) for each in redirects]
        ready = [answer for left, (_, _, answer) in trust if left > 0]
        if not ready:
            return self.find(key, path, text)
        for left, (location, file, _) in trust:
            if left < self.volumes.timeout / 4:
                self.volumes.probe(location, file)
        return random.choice(ready)

    def make_redirects(self, key: bytes, text: bytes) -> list[tuple[str, str, bytes]]:
        """(location, path, answer to GET) for each replica; none when the key is unlinked."""
        record = parse_record(text)
        places = [replica.location for replica in record.replicas]
        balance = "balanced" if places == self.home(key) else "unbalanced"
        fields = f"Key-Volumes: {','.join(places)}\r\nKey-Balance: {balance}\r\n"
        fields += f"Content-Md5: {record.hash}\r\n" if record.hash else ""
        files = [(place, key2path(key, write_id)) for place, write_id in record.replicas]
        answers = [response(302, f"Location: http://{p}{file}\r\n{fields}") for p, file in files]
        return [(*f, a) for f, a in zip(files, answers, strict=True) if not record.deleted]

    async def find(self, key: bytes, path: bytes, text: bytes) -> bytes | Coroutine:
        """GET when no replica is trusted: ask all of them, the first that is there will do."""
        redirects = self.redirects(key, text)
        tasks = [asyncio.create_task(self.volumes.request("HEAD", p, f)) for p, f, _ in redirects]
        for asked in asyncio.as_completed(tasks):
            await asked
            for task, (_, _, answer) in zip(tasks, redirects, strict=True):
                if task.done() and task.result() == 200:
                    return answer
        require({task.result() for task in tasks} == {404}, 503, "no replica can be reached")
        require(self.index.get(key) != text, 404, "the volumes have no such file")
        return self.get(key, path)  # deleted or moved while we asked: once more

    async def put(self, key: bytes, request: Request, body: Pieces | None) -> bytes:
        """201: `replicas` volumes have the whole value, and the index has it on disk."""
        require(request.length != 0, 411, "a value has at least one byte, and a length or chunks")
        places, owner, write_id = self.home(key), self.index.owner(), None
        do, given = self.index.do, request.fields.get(b"content-md5", b"")
        valid = re.fullmatch(rb"([0-9A-Fa-f]{32}|[0-9A-Za-z+/]{22}==)?", given)  # or RFC 1864's
        require(valid, 400, "malformed Content-MD5")
        try:
            write_id = await do(Operations.claim, key, owner, places, time.time(), None)
            path = key2path(key, write_id)
            statuses, size, md5 = await self.volumes.write(path, places, request.length, body)
            failed = ", ".join(f"{place}: {statuses[place]}" for place in places)
            require(set(statuses.values()) == {201}, 503, f"not all replicas are written, {failed}")
            require(size, 411, "a value has at least one byte")
            digest = md5.hexdigest()
            right = b"", digest.encode(), base64.b64encode(md5.digest())
            same = given in right or given.lower() in right
            require(same, 400, f"Content-MD5 does not match: it is {digest}")
            replicas = tuple(Replica(place, write_id) for place in places)
            record = Record(replicas, size, write_id, digest if self.flags.md5sum else "")
            await do(Operations.commit, key, owner, record, None, time.time())
        except BaseException:  # the index, after all that was queued, says what is to be undone
            listed = await do(Operations.settle, key, owner, (), time.time())
            await self.erase(key, [r for r in listed if r.write_id == write_id], (204,))
            raise
        return response(201)

    async def erase(self, key: bytes, replicas: Sequence[Replica], proof: Sequence[int]) -> None:
        """Delete files where that can be done; a status in `proof` shows that one is gone."""
        files = [(location, key2path(key, write_id)) for location, write_id in replicas]
        statuses = await asyncio.gather(*(self.volumes.request("DELETE", *file) for file in files))
        gone = [r for r, status in zip(replicas, statuses, strict=True) if status in proof]
        if gone:
            self.index.do(Operations.settle, key, "", gone, time.time(), later=True)

    async def remove(self, key: bytes, method: str) -> bytes:
        """204: no GET finds the key. After DELETE its files go too, sooner or later."""
        if method == "UNLINK":
            await self.index.do(Operations.unlink, key)
        else:
            record = await self.index.do(Operations.remove, key, self.flags.protect, time.time())
            await self.erase(key, record.replicas, (204, 404))
        return response(204)

    def ask(self, request: Request) -> bytes | Pieces:
        """GET with a query: ?list, ?unlinked, /?health, /?metrics. 400 for any other."""
        try:
            query = parse_qs(request.query.decode(), keep_blank_values=True, errors="strict")
            limit = int(query.get("limit", [sys.maxsize])[0])
        except ValueError as error:
            raise HTTPError(400, f"malformed query: {error}") from error
        words, start = set(query) - {"start", "limit"}, query.get("start", [""])[0].encode()
        require(request.method in ("GET", "HEAD") and limit >= 0, 400, "not with a query like this")
        if request.path == b"/" and set(query) in ({"health"}, {"metrics"}):
            return response(200, TEXT, b"ok\n" if "health" in query else self.metrics())
        require(words in ({"list"}, {"unlinked"}), 400, "no such query: try ?list")
        return self.list(unquote_to_bytes(request.path), start, limit, "unlinked" in words)

    async def list(self, prefix: bytes, start: bytes, limit: int, unlinked: bool) -> AsyncIterator:
        """The JSON of the keys with a prefix, from `start` on, a thousand at a time."""
        yield b'{"keys": ['
        comma = ""
        for rows in self.index.walk(self.index.keys, max(prefix, start)):
            shown = [key for key, record in rows if (record[:7] == b"DELETED") == unlinked]
            keys = [key.decode() for key in shown if key.startswith(prefix)]
            page, following = keys[:limit], "".join(keys[limit : limit + 1])
            yield (comma + json.dumps(page)[1:-1] if page else " ").encode()  # never empty
            comma, limit = ", " if page else comma, limit - len(page)
            if following or not rows or not rows[-1][0].startswith(prefix):
                break
        yield f'], "next": {json.dumps(following)}}}\n'.encode()

    def metrics(self) -> bytes:
        """What an operator watches, for Prometheus; of this process, but for keys and journal."""
        label, times = 'requests_total{{method="{}",status="{}"}}', self.seconds.items()
        values = {label.format(*which): count for which, count in self.requests.items()}
        values |= {f'request_seconds_total{{method="{method}"}}': spent for method, spent in times}
        values |= {"received_bytes_total": self.received, "event_loop_lag_seconds": self.lag}
        rows = {"keys": self.index.keys, "journal_entries": self.index.journal}
        values |= {name: self.index.count(table) for name, table in rows.items()}
        values |= {"connections": len(self.connections), "volumes": len(self.flags.volumes)}
        values |= {"volumes_up": len(self.flags.volumes) - len(self.volumes.down)}
        return "".join(f"mkv_{name} {value}\n" for name, value in sorted(values.items())).encode()

    async def sweep(self) -> None:
        """For ever: delete garbage older than `grace`, evict the dead, end idle connections. Until
        `settle` has passed, 404 does not prove a file gone: it is asked for again, ever later.
        """
        grace, last, owners = max(self.flags.grace, 0.01), 0.0, set()
        while True:
            with contextlib.suppress(HTTPError):  # the index is full: later
                await self.index.evict_dead(owners)
            owners, now, called = set(), time.time(), time.monotonic()
            for rows in self.index.walk(self.index.journal):
                work = []
                for key, entry in [(key, parse_entry(text)) for key, text in rows]:
                    age, before = now - entry.since, max(0.0, last - entry.since)
                    final = age > self.flags.settle
                    again = int(age / grace).bit_length() > int(before / grace).bit_length()
                    if entry.owner:
                        owners.add(entry.owner.partition(".")[0])
                    elif age >= grace and (final or again):
                        work.append(self.erase(key, entry.replicas, (204, 404)[: 1 + final]))
                for start in range(0, len(work), 32):
                    await asyncio.gather(*work[start : start + 32])
            self.index.env.reader_check()  # a reader that was killed pins old pages
            for connection in list(self.connections):
                if not connection.task and called - connection.started > IDLE_TIME:
                    connection.writer.transport.abort()
            last, called, pause = now, time.monotonic(), min(5.0, grace / 2 + 0.05)
            await asyncio.sleep(pause)
            self.lag = time.monotonic() - called - pause


# --- command line ---------------------------------------------------------------------------------
# Flags as the ancestor has them (one dash or two), the server process, the volumes of the demo.


def duration(text: str) -> float:
    """Seconds, from a duration as Go writes it: 300ms, 1.5s, 1h30m, 0. ValueError."""
    parts = re.findall(r"([0-9]+\.?[0-9]*)(h|ms|m|s)", text)
    if text != "0" and (not parts or "".join(map("".join, parts)) != text):
        raise ValueError
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in parts)


def addresses(text: str) -> tuple[str, ...]:
    """host:port,host:port,… ValueError for doubles and what is none."""
    volumes = tuple(text.split(","))
    address = re.compile(r"([\w.-]+|\[[0-9a-f:.]+\]):[0-9]{1,5}")
    if not all(map(address.fullmatch, volumes)) or len(set(volumes)) < len(volumes):
        raise ValueError
    return volumes


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, checked, and volumes of its own if none are given."""
    parser.add_argument("command", choices=["server"])
    for name, kind, default, text in (
        ("volumes", addresses, (), "host:port,… (without: three of its own, for a look around)"),
        ("db", Path, Path("mkv-data/index"), "folder of the index"),
        ("port", int, 3000, "port to listen on"),
        ("bind", str, "", "address to listen on (all; 127.0.0.1 without -volumes)"),
        ("replicas", int, 3, "copies of each value"),
        ("subvolumes", int, 10, "drives a volume, 1 to 256"),
        ("fallback", str, "", "host:port to redirect to when a key is not here"),
        ("md5sum", json.loads, True, "whether to keep the MD5 of values: true or false"),
        ("voltimeout", duration, 1.0, "how long a volume may be silent; 0: always ask"),
        ("settle", duration, 3600.0, "after this time no request can still take effect"),
        ("grace", duration, 60.0, "how long replaced files stay for readers on their way"),
    ):
        parser.add_argument(f"-{name}", f"--{name}", type=kind, default=default, help=text)
    parser.add_argument("-protect", "--protect", action="store_true", help="UNLINK before DELETE")
    flags = parser.parse_args()
    flags.demo = () if flags.volumes else (3001, 3002, 3003)
    flags.bind = flags.bind or ("127.0.0.1" if flags.demo else "0.0.0.0")
    flags.volumes = flags.volumes or tuple(f"127.0.0.1:{port}" for port in flags.demo)
    for name, most in ("port", 65535), ("subvolumes", 256), ("replicas", len(flags.volumes)):
        if not 1 <= getattr(flags, name) <= most:
            parser.error(f"-{name} is 1 to {most}")
    return flags


@contextlib.contextmanager
def own_volumes(flags: argparse.Namespace) -> Iterator[None]:
    """The volumes of the demo, under ./mkv-data, for as long as the block runs."""
    volumes: list[subprocess.Popen] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, until serve() takes both
    try:
        for port in flags.demo:
            folder, script = Path(f"mkv-data/volume{port}"), Path(__file__).with_name("volume.sh")
            flags_of = {"PORT": f"{port}", "HOST": "127.0.0.1", "SUBVOLUMES": f"{flags.subvolumes}"}
            command, env = [script, folder], os.environ | flags_of
            volumes.append(subprocess.Popen(command, env=env, start_new_session=True))
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


async def serve(flags: argparse.Namespace, index: Index, listener: socket.socket) -> None:
    """The server, until SIGINT or SIGTERM; then what is in hand."""
    loop, stop, store = asyncio.get_running_loop(), asyncio.Event(), Store(flags, index)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    jobs = [asyncio.create_task(job) for job in (store.sweep(), stop.wait())]  # it evicts first
    server = await loop.create_server(lambda: Connection(store), sock=listener, backlog=4096)
    done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*done)  # raises what ended the sweeper
    server.close()
    store.draining, began = True, time.monotonic()
    while store.connections:
        for connection in list(store.connections):  # an idle one has a second to ask once more
            if time.monotonic() - began > (DRAIN_TIME if connection.task else 1):
                connection.writer.transport.abort()
        await asyncio.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser("mkv.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    flags = parse_flags(parser)
    family = socket.AF_INET6 if ":" in flags.bind else socket.AF_INET
    try:
        index = Index(flags.db)
        listener = socket.create_server((flags.bind, flags.port), family=family, backlog=4096)
    except BlockingIOError:
        parser.error(f"a rebuild of {flags.db} is under way")
    except lmdb.MemoryError:
        parser.error(f"not enough address space for {MAP_SIZE >> 30} GiB of index: see ulimit -v")
    except (OSError, lmdb.Error) as error:
        parser.error(f"cannot use -db {flags.db} and -port {flags.port}: {error}")
    with own_volumes(flags):
        at, names = f"http://{flags.bind}:{flags.port}", ", ".join(flags.volumes)
        print(f"mkv is at {at}, its index in {flags.db}, its volumes at {names}", flush=True)
        if flags.demo:
            print(f"curl -X PUT -d swag {at}/key\ncurl -L {at}/key\ncurl '{at}/?list'", flush=True)
        uvloop.run(serve(flags, index, listener))
    index.close()


if __name__ == "__main__":
    main()
