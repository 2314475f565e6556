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
import logging
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, defaultdict, namedtuple
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote_to_bytes

import lmdb
import uvloop

MAX_KEY, MAX_HEAD, MAX_FIELDS = 511, 16384, 100  # bytes: LMDB's limit; twice nginx's; as Apache's
HEAD_TIME, IDLE_TIME, LINGER_TIME = 10, 60, 5  # seconds for a head, between two, after the last
BODY_TIME, BODY_RATE = 60, 1024  # seconds for which a body may bring fewer bytes a second than that
READ_AHEAD, WRITE_AHEAD = 1 << 18, 1 << 20  # bytes held for a reader, or a volume, before a pause
SMALL = 1 << 16  # bytes up to which a value goes over a connection that is kept
TICK, DRAIN_TIME = 0.2, 10  # seconds between two rounds of tick(); that SIGTERM leaves to work
METHODS = "GET", "HEAD", "PUT", "DELETE", "UNLINK", "REBALANCE"
Pieces = AsyncIterator[bytes]  # a value on its way


class HTTPError(Exception):  # no success: status, one line that says why, more header lines
    def __init__(self, status: int, reason: str, fields: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.fields = status, reason, fields


def require(condition: Any, status: int, reason: str, fields: str = "") -> None:  # or HTTPError
    if not condition:
        raise HTTPError(status, reason, fields)


# --- placement ------------------------------------------------------------------------------------
# Where a key's files lie, in minikeyvalue's layout. Pure. A location is "host:port" (a volume) or
# "host:port/svXX"; a write id is 16 hex digits: 8 of seconds since 1970, 8 that tell writers apart.


def key2path(key: bytes, write_id: str = "") -> str:
    """The path of a key's file: two bytes of its md5, its base64, and its write id, if any."""
    digest, name = hashlib.md5(key).hexdigest(), base64.b64encode(key).decode()
    if write_id:  # no name has over 255 bytes; base64 may itself have "/": a sub-folder
        name = re.sub(r"[^/]{230}(?=[^/])", r"\g<0>-/", name) + "-" + write_id
    return f"/{digest[:2]}/{digest[2:4]}/{name}"


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
    replicas: tuple[Replica, ...] = ()  # in ranking order
    size: int | None = None  # bytes
    write_id: str = ""  # of the replicas that have no other
    hash: str = ""  # MD5 in hex
    deleted: bool = False  # unlinked: hidden, but the files stay

    def text(self) -> bytes:  # as the index stores it
        mark = "DELETED" * self.deleted + (self.hash and "HASH" + self.hash)
        files = [r.location if r.write_id == self.write_id else "@".join(r) for r in self.replicas]
        size = "" if self.size is None else f" {self.size} {self.write_id}".rstrip()
        return f"{mark}{','.join(files)}{size}".encode()


def parse_record(text: bytes) -> Record:  # the inverse of Record.text(). 500
    match = RECORD.fullmatch(text.decode(errors="replace"))
    require(match, 500, f"unreadable record: {text!r}")
    deleted, md5, files, size, write_id = match.groups("")
    parts = [file.partition("@") for file in files.split(",") if file]
    replicas = tuple(Replica(location, own if at else write_id) for location, at, own in parts)
    return Record(replicas, int(size) if size else None, write_id, md5, bool(deleted))


# --- index ----------------------------------------------------------------------------------------
# Two LMDB tables. keys: key → record. journal: key → owner, since, files that may exist and that no
# record names: an owner is making them (the lock on the key), or they are garbage. An operation is
# a function of row and plain arguments, without clock or chance; it is answered when on disk.


class Row(NamedTuple):  # a key in both tables; each operation returns the new row, and an answer
    record: Record  # empty if there is none
    owner: str  # of the claim, if there is one
    since: float  # seconds since 1970: when the last owner went, or the last replica came
    replicas: tuple[Replica, ...]  # in the journal

    def claim(self, owner: str, where: Sequence[str], now: float, old: Record) -> tuple:
        """Lock a key and list files to be made: their write id, newer than all others. 409, 403."""
        live = self.record.replicas and not self.record.deleted
        require(not self.owner, 409, "another PUT or REBALANCE of this key is under way")
        require(old.replicas or not live, 403, "key exists: DELETE it first")
        newest = max((r.write_id for r in self.replicas + self.record.replicas), default="")
        seconds = max(int(now), 1 + int("0" + newest[:8], 16))
        write_id = f"{seconds:08x}{hashlib.md5(owner.encode()).hexdigest()[:8]}"
        made = tuple(Replica(location, write_id) for location in where)
        return self._replace(owner=owner, replicas=self.replicas + made), write_id

    def extend(self, owner: str, replica: Replica) -> tuple:  # by the file of a stand-in. 503
        require(owner == self.owner, 503, "the claim on the key was lost")
        return self._replace(replicas=(*self.replicas, replica)), None

    def commit(self, owner: str, new: Record, old: Record) -> tuple:
        """Vouch for what a claim made; all else is garbage. Returns the old record. 503, 409."""
        require(owner == self.owner, 503, "the claim on the key was lost")
        require(not old.replicas or old == self.record, 409, "the key has changed meanwhile")
        garbage = [r for r in self.replicas + self.record.replicas if r not in new.replicas]
        return Row(new, "", self.since, tuple(dict.fromkeys(garbage))), self.record

    def settle(self, owner: str, gone: Sequence[Replica]) -> tuple:
        """Strike out files that are gone, and the owner if it is this one; returns what is left."""
        left = tuple(replica for replica in self.replicas if replica not in gone)
        return self._replace(owner=self.owner * (owner != self.owner), replicas=left), left

    def remove(self, protect: bool) -> tuple:
        """Delete a key: its files are garbage. Returns what its record was. 404, 403."""
        require(self.record.replicas, 404, "no such key")
        require(self.record.deleted or not protect, 403, "protected: UNLINK the key first")
        listed = self.replicas + self.record.replicas
        return self._replace(record=Record(), replicas=listed), self.record

    def unlink(self) -> tuple:  # hide a key. 404
        require(self.record.replicas and not self.record.deleted, 404, "no such key")
        return self._replace(record=self.record._replace(deleted=True)), None


class Index:
    """The LMDB environment in a folder, for any number of processes with one event loop each. Their
    names are numbers of bytes in the file "alive", each locked by its process for all its life."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.env = lmdb.open(str(path), map_size=1 << 40, max_dbs=2, max_readers=4096)
        self.keys, self.journal = self.env.open_db(b"keys"), self.env.open_db(b"journal")
        self.queue, self.kept, self.flushing = [], [], None  # jobs; those to be tried again; a task
        self.alive, self.claims = (path / "alive").open("a"), itertools.count(1)
        self.process = os.urandom(7).hex()
        self.take(self.process)

    def close(self) -> None:  # after writing what nobody waited for
        self.commit(self.kept + self.queue)
        self.env.close()

    def owner(self) -> str:  # a name for one claim, never given twice
        return f"{self.process}.{next(self.claims)}"

    def take(self, process: str) -> bool:  # a process's lock, for good: False while it lives
        lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, int(process[:14], 16), 1, 0)
        with contextlib.suppress(BlockingIOError):
            return bool(fcntl.fcntl(self.alive, fcntl.F_OFD_SETLK, lock))
        return False

    async def evict_dead(self) -> None:  # free the keys they claimed: what they made is garbage
        for rows in self.walk(self.journal):
            for key, text in rows:
                owner = text.split(b" ")[0].decode()
                if owner and not owner.startswith(self.process) and self.take(owner.split(".")[0]):
                    await self.do(Row.settle, key, owner, ())
            await asyncio.sleep(0)  # for the others

    def get(self, key: bytes) -> bytes | None:  # the text of a key's record
        return self.env.begin(self.keys).get(key)

    def look(self, key: bytes, txn: lmdb.Transaction | None = None) -> Row:
        """What both tables have of a key; parts may be empty."""
        with contextlib.nullcontext(txn) if txn else self.env.begin() as txn:
            record, entry = txn.get(key, b"", db=self.keys), txn.get(key, b" 0 ", db=self.journal)
        owner, since, replicas = entry.split(b" ")
        return Row(parse_record(record), owner.decode(), float(since), parse_record(replicas)[0])

    def count(self) -> tuple[int, int]:  # of keys and journal entries
        with self.env.begin() as txn:
            return txn.stat(self.keys)["entries"], txn.stat(self.journal)["entries"]

    def walk(self, table: Any, start: bytes | None = b"", count: int = 1000) -> Iterator[list]:
        """Rows from `start` on, in batches; no snapshot outlasts one, or it would pin pages."""
        while start is not None:
            with self.env.begin(table) as txn, txn.cursor() as cursor:
                found = cursor.set_range(start)
                rows = list(itertools.islice(cursor.iternext(), count + 1)) if found else []
            start = rows.pop()[0] if len(rows) > count else None
            yield rows

    def do(self, operation: Callable, key: bytes, *args: Any) -> asyncio.Future:
        """Queue an operation: a future of its answer. It is done, whatever tasks are cancelled."""
        future = asyncio.get_running_loop().create_future()
        self.queue.append((operation, key, args, time.time(), future))
        if not self.flushing or self.flushing.done() or self.flushing.cancelling():
            self.flushing = asyncio.create_task(self.flush())
        return asyncio.shield(future)

    async def flush(self) -> None:  # group commit: what queues up during one sync is the next
        while self.queue:
            group, self.queue, self.kept = self.kept + self.queue, [], []
            answers = await asyncio.to_thread(self.commit, group)
            for (*_, future), answer in zip(group, answers, strict=True):
                if not future.done():  # as is one that was kept
                    refused = isinstance(answer, Exception)
                    (future.set_exception if refused else future.set_result)(answer)

    def commit(self, group: list[tuple]) -> list[Any]:
        """Run operations in one transaction, on disk at the end: their answers, or exceptions."""
        try:
            with self.env.begin(write=bool(group)) as txn:
                return [self.change(txn, *job) for *job, _ in group]
        except lmdb.Error as error:  # say, no space: nothing is done, but settles are not given up
            self.kept = [job for job in group if job[0] is Row.settle]
            failure = HTTPError(503, f"the index cannot be written: {error}")
            return [() if job in self.kept else failure for job in group]

    def change(self, txn: lmdb.Transaction, operation: Callable, key: bytes, args: Any, now: float):
        """Put the row that an operation makes in the place of the old one: its answer, or error."""
        try:
            old = self.look(key, txn)
            new, answer = operation(old, *args)
        except (HTTPError, ValueError) as error:  # it refuses, or cannot read what is there
            return error
        if new.record != old.record:
            txn.put(key, new.record.text(), db=self.keys)
        if not new.record.replicas:
            txn.delete(key, db=self.keys)
        fresh = (old.owner and not new.owner) or not set(new.replicas) <= set(old.replicas)
        text = f"{new.owner} {now if fresh else old.since!r} ".encode()
        txn.put(key, text + Record(new.replicas).text(), db=self.journal)
        if not new.owner and not new.replicas:
            txn.delete(key, db=self.journal)
        return answer


# --- http -----------------------------------------------------------------------------------------
# HTTP/1.1 by hand (RFC 9112). What could be read in two ways is refused, and nothing after it is
# understood: so no request is smuggled past a proxy. Parsing needs no sockets.

REQUEST = re.compile(
    rb"([A-Z]+) (?:http://[^/?#\0- \x7f]*)?(/[^?#\0- \x7f]*)(?:\?([^#\0- \x7f]*))? HTTP/1\.([01])"
)
READ = re.compile(rb"(GET|HEAD) (/[^?#\0- \x7f]*) HTTP/1\.1\r\n(.*)\r\n\r\n", re.DOTALL)
STATUS = re.compile(rb"HTTP/1\.[01] ([2-5][0-9][0-9])(?: .*)?")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
TEXT = "Content-Type: text/plain; charset=utf-8\r\n"
ALLOW = f"Allow: {', '.join(METHODS)}\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@functools.lru_cache(maxsize=256)  # a connection repeats its fields, and clients each other's
def parse_fields(block: bytes) -> tuple[dict[bytes, bytes], int | None, bool]:
    """Fields by lower-case name, body length (None: chunked), whether it closes. 400, 431, 501."""
    lines, fields = block.split(b"\r\n") if block else [], {}
    require(len(lines) <= MAX_FIELDS, 431, f"a head has at most {MAX_FIELDS} fields")
    for line in lines:
        match = FIELD.fullmatch(line)  # not folded, no space before the colon, no bare CR or LF
        require(match, 400, "malformed header field")
        name, value = match[1].lower(), match[2].rstrip(b" \t")
        fields[name] = fields[name] + b"," + value if name in fields else value
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"0")
    require(re.fullmatch(rb"[0-9]{1,18}", length), 400, "malformed Content-Length")
    require(not coding or b"content-length" not in fields, 400, "two lengths of one body")
    require(coding is None or coding.lower() == b"chunked", 501, "the only coding is chunked")
    options = fields.get(b"connection", b"").lower().replace(b" ", b"").split(b",")
    return fields, int(length) if coding is None else None, b"close" in options


# As sent: path, query (None without "?"). Length of the body, None: chunked. To close afterwards?
Request = namedtuple("Request", "method path query fields length close")


def parse_request(head: bytes) -> Request:
    """The request with this head; RFC 9112, 3 and 9.6. 400, 431, 501."""
    line, _, block = head.partition(b"\r\n")
    require(first := REQUEST.fullmatch(line), 400, "malformed first line")
    method, path, query, minor = first.groups()
    fields, length, close = parse_fields(block)
    fields = fields | {b"expect": b""} if minor == b"0" else fields  # RFC 9110, 10.1.1
    require(minor == b"0" or b"," not in fields.get(b"host", b","), 400, "no Host, or several")
    require(minor == b"1" or length is not None, 400, "chunked in HTTP/1.0")
    return Request(method.decode(), path, query, fields, length, close or minor == b"0")


def parse_answer(head: bytes) -> tuple[int, int | None, bool]:
    """Status of an answer with this head, length (None: chunked), whether it closes. 400, 501."""
    line, _, block = head.partition(b"\r\n")
    require(first := STATUS.fullmatch(line), 400, "no answer, or an interim one")
    return int(first[1]), *parse_fields(block)[1:]


def parse_key(path: bytes) -> bytes:  # that the path of a request names. 400, 414
    key = unquote_to_bytes(path) if b"%" in path else path
    require(len(key) <= MAX_KEY, 414, f"a key has at most {MAX_KEY} bytes")
    utf8 = key.isascii() or key.decode(errors="ignore").encode() == key
    right = utf8 and len(key) > 1 and not re.search(rb"%(?![0-9A-Fa-f]{2})", path)
    require(right, 400, "a key is a path of two bytes or more, UTF-8 and percent-encoded")
    return key


def response(status: int, fields: str = "", body: bytes = b"") -> bytes:  # fields end in CR LF
    length = f"Content-Length: {len(body)}\r\n" if status not in (100, 204) else ""
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{length}{fields}\r\n".encode() + body


def refusal(error: HTTPError) -> bytes:  # as one line of plain text
    return response(error.status, TEXT + error.fields, error.reason.encode() + b"\n")


async def read_until(reader: asyncio.StreamReader, end: bytes, status: int = 400) -> bytes:
    """What comes before `end`; `status` when that is too long. EOFError."""
    try:
        return (await reader.readuntil(end))[: -len(end)]
    except asyncio.LimitOverrunError as error:
        raise HTTPError(status, f"over {MAX_HEAD} bytes") from error


async def read_body(reader: asyncio.StreamReader, length: int | None, seconds: float) -> Pieces:
    """The pieces of a body (None: chunked). 400, EOFError, TimeoutError after waiting."""
    left, allowed = length, seconds  # to wait; BODY_RATE bytes earn one more
    while left or length is None:  # RFC 9112, 7.1
        began = time.monotonic()
        async with asyncio.timeout(allowed):
            if not left:
                size = CHUNK.fullmatch(await read_until(reader, b"\r\n"))
                require(size, 400, "malformed chunk size")
                left = int(size[1], 16)
            if not left:
                while line := await read_until(reader, b"\r\n"):
                    require(FIELD.fullmatch(line), 400, "malformed trailer")
                return
            piece = await reader.read(min(left, READ_AHEAD))
            require(piece, 400, "the body ended early")
            left -= len(piece)
            if length is None and not left:
                require(await reader.readexactly(2) == b"\r\n", 400, "a chunk too long")
        allowed = min(seconds, allowed + began - time.monotonic() + len(piece) / BODY_RATE)
        yield piece


class Wire(asyncio.StreamReaderProtocol):  # a connection, of a client or to a volume
    eof_received = asyncio.Protocol.eof_received  # when the other side closes, so do we

    def __init__(self, lost: Callable) -> None:  # lost(self) is called at its end
        super().__init__(asyncio.StreamReader(MAX_HEAD), self.opened)
        self.lost = lost

    def opened(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.transport = reader, writer, writer.transport

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(None)  # readers meet the end; nobody would hear of the error
        self.lost(self)


class Connection(Wire):  # of a client; what takes no waiting is answered on arrival, else by a task
    task: asyncio.Task | None = None
    closing, whole, path = False, True, b"-"  # the last answer is given; the body read; requested

    def __init__(self, store: Any) -> None:
        super().__init__(store.connections.discard)
        self.store, self.started = store, time.monotonic()
        store.connections.add(self)

    def eof_received(self) -> bool:
        self.reader.feed_eof()
        return self.task is not None  # keep the connection for the answer

    def data_received(self, data: bytes) -> None:
        if self.task or not self.answer_at_once(data):
            super().data_received(data)
            self.task = self.task or asyncio.create_task(self.converse())

    def answer_at_once(self, data: bytes) -> bool:
        """Answer a GET, if that is all there is, and nothing has to be waited for."""
        self.started = time.monotonic()
        lone = len(data) <= MAX_HEAD and READ.fullmatch(data)
        if lone and not (self.store.draining or self.transport.get_write_buffer_size()):
            with contextlib.suppress(HTTPError):  # the task will meet it again
                fields, length, close = parse_fields(lone[3])
                self.path = lone[2]
                answer = self.store.get(parse_key(self.path), self.path)
                if answer and length == 0 and not close and b"," not in fields.get(b"host", b","):
                    self.respond(answer, lone[1].decode(), False)
                    return True
        return False

    async def converse(self) -> None:  # answer the requests in the reader, one after the other
        try:
            while self.reader._buffer and not self.closing:
                await self.serve()
            if self.closing or self.reader.at_eof():
                self.writer.write_eof()  # close() at once would reset the answer away
                async with asyncio.timeout(LINGER_TIME):
                    while await self.reader.read(READ_AHEAD):
                        pass
                self.transport.close()
            self.task, self.started = None, time.monotonic()
        except BaseException as error:  # the client is gone or might as well be, or there is a bug
            self.transport.abort()
            if not isinstance(error, OSError | EOFError | RuntimeError):
                raise

    async def body(self, request: Request) -> Pieces:
        if request.fields.get(b"expect", b"").lower() == b"100-continue":
            self.writer.write(response(100))
        async for piece in read_body(self.reader, request.length, BODY_TIME):
            self.store.received += len(piece)
            yield piece
        self.whole = True

    async def serve(self) -> None:
        """Answer a request. EOFError, OSError when the client does not take the answer."""
        self.started, method, close, stream = time.monotonic(), "-", True, None
        try:
            async with asyncio.timeout(HEAD_TIME):
                await self.writer.drain()
                request = parse_request(await read_until(self.reader, b"\r\n\r\n", 431))
            self.path, close, self.whole = request.path, request.close, request.length == 0
            require(request.method in METHODS, 405, "no such method", ALLOW)
            method = request.method
            answer = self.store.answer(request, None if self.whole else self.body(request))
            answer = await answer if isinstance(answer, Awaitable) else answer
        except (HTTPError, TimeoutError) as error:
            answer = refusal(error if isinstance(error, HTTPError) else HTTPError(408, "too slow"))
        if not isinstance(answer, bytes):
            framing = b"\r\n" if close else b"Transfer-Encoding: chunked\r\n\r\n"  # 1.0 has none
            stream, answer = answer, STREAM + framing
        self.respond(answer, method, close)
        if stream and method == "GET":
            async for piece in stream:
                self.writer.write(piece if close else b"%x\r\n%b\r\n" % (len(piece), piece))
                await asyncio.sleep(0)  # for the others
                async with asyncio.timeout(IDLE_TIME):
                    await self.writer.drain()
            self.writer.write(b"" if close else b"0\r\n\r\n")

    def respond(self, answer: bytes, method: str, close: bool) -> None:
        """Send an answer; it is the last one if anything speaks for that."""
        store = self.store
        store.requests[method, answer[9:12]] += 1
        store.seconds[method] += time.monotonic() - self.started
        if store.flags.v:
            logging.info("%s %s %s", method, self.path.decode("latin-1"), answer[9:12].decode())
        if close or store.draining or not self.whole:
            self.closing = True
            answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        if method == "HEAD":
            answer = answer[: answer.find(b"\r\n\r\n") + 4]
        self.writer.write(answer)


# --- volumes --------------------------------------------------------------------------------------
# The client of the volumes: pooled connections, trust in locations that have answered, a list of
# what is down. To request(), that a volume does not answer is no exception, but status 0.

TROUBLE = OSError, EOFError, HTTPError, RuntimeError, ValueError  # last: names of hosts


class Volumes:  # what is known of them; a location that answers is trusted for `timeout` seconds
    def __init__(self, timeout: float) -> None:
        self.timeout, self.patience = timeout, timeout or 1.0
        self.idle: dict[str, list[Wire]] = defaultdict(list)
        self.trusted: dict[str, float] = {}  # location → until when (monotonic)
        self.down: dict[str, tuple] = {}  # volume, or location + "/" for PUT → next try, pause
        self.probes: dict[str, asyncio.Task] = {}  # under way, by location

    def distrust(self, volume: str) -> None:  # ask all its locations before the next redirect
        self.trusted = {p: t for p, t in self.trusted.items() if p.partition("/")[0] != volume}
        while self.idle[volume]:  # they may be as dead as the one that failed
            self.idle[volume].pop().transport.abort()

    def lost(self, volume: str, link: Wire) -> None:
        if link in self.idle[volume]:  # by the other side
            self.distrust(volume)

    def mark(self, place: str, trouble: str) -> None:
        """A volume does not answer, or a location takes no value; without trouble, it does."""
        due, pause = self.down.get(place, (0.0, self.patience / 2))
        if bool(trouble) != bool(due):
            logging.warning("%s is %s", place, f"down: {trouble}" if trouble else "up again")
        if not trouble:
            self.down.pop(place, None)
        elif due <= time.monotonic():
            pause = min(2 * pause, (64 if "/" in place else 8) * self.patience)
            self.down[place] = time.monotonic() + pause, pause

    def up(self, location: str) -> bool:
        return location.partition("/")[0] not in self.down

    def takes(self, location: str) -> bool:  # whether to PUT there, if only to try it again
        due, _ = self.down.get(location + "/", (0.0, 0.0))
        return self.up(location) and due <= time.monotonic()

    async def connect(self, volume: str) -> Wire:  # OSError
        host, _, port = volume.rpartition(":")
        wire = functools.partial(Wire, functools.partial(self.lost, volume))
        create = asyncio.get_running_loop().create_connection
        async with asyncio.timeout(self.patience):
            _, link = await create(wire, host.strip("[]"), int(port))
        link.transport.set_write_buffer_limits(WRITE_AHEAD, WRITE_AHEAD - SMALL)
        return link

    @contextlib.asynccontextmanager
    async def exchange(
        self, method: str, location: str, path: str, fields: str = "", body: Any = None
    ) -> AsyncIterator[tuple[int, int | None, Pieces]]:
        """Status, length and body of an answer. body() is the next piece of ours, b"" after the
        last. An answer renews trust, or ends it. TROUBLE is noted, and raised."""
        (volume, slash, drive), link = location.partition("/"), None
        idle, seconds = self.idle[volume], self.patience * (10 if method in ("GET", "PUT") else 1)
        try:
            link = idle.pop() if idle and "close" not in fields else await self.connect(volume)
            head = f"{method} {slash}{drive}{path} HTTP/1.1\r\nHost: {volume}\r\n{fields}\r\n"
            link.writer.write(head.encode())
            while body and (piece := await body()):
                async with asyncio.timeout(seconds):
                    link.writer.write(piece)
                    await link.writer.drain()
            async with asyncio.timeout(seconds):
                answer = await read_until(link.reader, b"\r\n\r\n")
            status, length, close = parse_answer(answer)
            self.mark(volume, "")
            if status >= 500 or method == "PUT":
                self.mark(location + "/", "" if status == 201 else f"it answers {status}")
            if status < 300:
                self.trusted[location] = time.monotonic() + self.timeout
            elif status != 404:
                self.trusted.pop(location, None)
            rest = 0 if method == "HEAD" or status == 204 else length
            yield status, length, read_body(link.reader, rest, seconds)
            if not close and not link.reader._buffer and len(idle) < 64:
                idle.append(link)
                link = None
        except TROUBLE as error:
            self.distrust(volume)
            places = [] if link and link.reader._buffer else [volume]  # it may answer too early
            places += [location + "/"] if link and method == "PUT" else []
            for place in places:
                self.mark(place, str(error) or repr(error))
            raise
        finally:
            if link:
                link.transport.abort()  # of an upload that is cut short nginx keeps nothing

    async def request(self, *what: Any) -> tuple[int, int | None]:
        """Status, or 0, and length of an answer to what exchange() takes; an error page is lost."""
        try:
            async with self.exchange(*what) as (status, length, rest):
                async with asyncio.timeout(self.patience):
                    async for _ in rest:
                        pass
            return status, length
        except TROUBLE:
            return 0, None

    async def read(self, location: str, path: str) -> Pieces:  # of a file, streamed. 503
        try:
            async with self.exchange("GET", location, path) as (status, _, pieces):
                async for piece in pieces:
                    if status == 200:
                        yield piece
        except TROUBLE as error:
            raise HTTPError(503, f"{location} does not give {path}: {error!r}") from error
        require(status == 200, 503, f"{location} answers {status} to GET {path}")

    async def write(self, path: str, places: list, length: int | None, body: Pieces) -> tuple:
        """PUT a body to all places in one pass: statuses, size, md5. Raises what it raises."""
        size, md5, queues = 0, hashlib.md5(), {place: asyncio.Queue(1) for place in places}
        fields = f"Content-Length: {length}\r\n" if length else "Transfer-Encoding: chunked\r\n"
        fields += "" if length and length <= SMALL else "Connection: close\r\n"

        async def upload(place: str) -> tuple[str, int]:
            status, _ = await self.request("PUT", place, path, fields, queues[place].get)
            queue = queues.pop(place)
            while not queue.empty():  # who waits for room in it goes on
                queue.get_nowait()
            return place, status

        tasks = [asyncio.create_task(upload(place)) for place in places]
        try:
            async for piece in body:
                size += len(piece)
                md5.update(piece)
                for queue in list(queues.values()):
                    await queue.put(piece if length else b"%x\r\n%b\r\n" % (len(piece), piece))
                require(queues, 503, "no volume takes the value")
            for last in [b""] if length else [b"0\r\n\r\n", b""]:
                for queue in list(queues.values()):
                    await queue.put(last)
            return dict(await asyncio.gather(*tasks)), size, md5.digest()
        finally:
            for task in tasks:
                task.cancel()

    def probe(self, place: str, path: str = "/") -> None:  # in the background, one at a time
        if place not in self.probes:
            self.probes[place] = asyncio.create_task(self.request("HEAD", place, path))
            self.probes[place].add_done_callback(lambda _: self.probes.pop(place))


# --- store ----------------------------------------------------------------------------------------
# The verbs. An operation of the index decides; all else is work on files that the journal lists.
# Neither sockets nor LMDB are to be seen from here.

NO_KEY = refusal(HTTPError(404, "no such key"))


class Store:  # an index, volumes, and the flags that say how to use them
    def __init__(self, flags: argparse.Namespace, index: Index) -> None:
        self.flags, self.index, self.volumes = flags, index, Volumes(flags.voltimeout)
        self.redirects = functools.lru_cache(maxsize=4096)(self.make_redirects)
        self.connections, self.draining = set(), False  # if so, their next answers are the last
        self.requests, self.seconds = Counter(), Counter()  # by method and status; by method
        self.received, self.waiting = 0, 0  # bytes of bodies; files that could not be deleted
        self.pause = min(5.0, flags.grace / 2 + 0.05)  # seconds between two rounds of sweep()
        self.lag, self.ticked = 0.0, time.monotonic()  # seconds; of the last round

    def ranking(self, key: bytes, count: int = 256) -> list[str]:  # locations for a key, best first
        return key2volume(key, self.flags.volumes, count, self.flags.subvolumes)

    def answer(self, request: Request, body: Pieces | None) -> Any:
        """The answer to a request: bytes, a coroutine of bytes, or a stream. HTTPError."""
        if request.query is not None:
            return self.ask(request)
        key, verb = parse_key(request.path), request.method
        if verb in ("GET", "HEAD"):
            return self.get(key, request.path) or self.find(key, request.path)
        if verb == "PUT":
            md5 = request.fields.get(b"content-md5", b"").decode("latin-1")
            return self.put(key, request.length, md5, body, Record())
        return self.rebalance(key) if verb == "REBALANCE" else self.remove(key, verb)

    def get(self, key: bytes, path: bytes) -> bytes | None:
        """302 to a trusted replica, at random; None if none is trusted. Trust is kept up. 404."""
        text = self.index.get(key)
        redirects = self.redirects(key, text) if text else ()
        if not redirects:
            if not self.flags.fallback:
                return NO_KEY
            target = quote(path, safe="%/:@!$&'()*+,;=~")  # as it was sent, but ASCII
            return response(302, f"Location: http://{self.flags.fallback}{target}\r\n")
        trusted, now, late = self.volumes.trusted, time.monotonic(), self.volumes.timeout / 4
        for location, file, _ in redirects:
            if trusted.get(location, 0) < now + late and self.volumes.up(location):
                self.volumes.probe(location, file)
        ready = [answer for location, _, answer in redirects if trusted.get(location, 0) > now]
        return random.choice(ready) if ready else None

    def make_redirects(self, key: bytes, text: bytes) -> list[tuple[str, str, bytes]]:
        """(location, path, answer to GET) for each replica; none when the key is unlinked."""
        record = parse_record(text)
        places = [replica.location for replica in record.replicas]
        balance = "balanced" if places == self.ranking(key, self.flags.replicas) else "unbalanced"
        fields = f"Key-Volumes: {','.join(places)}\r\nKey-Balance: {balance}\r\n"
        fields += f"Content-Md5: {record.hash}\r\n" if record.hash else ""
        files = [(place, key2path(key, write_id)) for place, write_id in record.replicas]
        answers = [response(302, f"Location: http://{p}{file}\r\n{fields}") for p, file in files]
        return [(*f, a) for f, a in zip(files, answers, strict=True) if not record.deleted]

    async def find(self, key: bytes, path: bytes) -> bytes:
        """GET when no replica is trusted: ask all that are not known to be down."""
        text = self.index.get(key) or b""
        redirects = self.redirects(key, text)
        up = [each for each in redirects if self.volumes.up(each[0])] or redirects
        answers = await asyncio.gather(*(self.volumes.request("HEAD", p, f) for p, f, _ in up))
        for (status, _), (_, _, answer) in zip(answers, up, strict=True):
            if status == 200:
                return answer
        if not redirects or self.index.get(key) != text:  # deleted or moved meanwhile: once more
            return self.get(key, path) or await self.find(key, path)
        told = [status for status, _ in answers]  # 0: nothing
        raise HTTPError(404 if told == [404] * len(redirects) else 503, f"the volumes say {told}")

    async def put(self, key: bytes, length: Any, given: str, body: Any, old: Record) -> bytes:
        """201: `replicas` volumes have it all, the index on disk names them; `old` is replaced."""
        require(length != 0, 411, "a value has at least one byte, and a length or chunks")
        require(re.fullmatch(r"[\da-fA-F]{32}|[\w+/]{22}==|", given), 400, "malformed Content-MD5")
        ranking, count = self.ranking(key), self.flags.replicas
        able = [place for place in ranking if self.volumes.takes(place)]
        require(len(able) >= count, 503, f"of {count} volumes needed {len(able)} can be written")
        async with self.making(key, able[:count], old) as (owner, write_id):
            path, todo = key2path(key, write_id), able[:count]
            statuses, size, md5 = await self.volumes.write(path, todo, length, body)
            require(size, 411, "a value has at least one byte")
            digest, right = md5.hex(), {"", md5.hex(), base64.b64encode(md5).decode()}
            status = 503 if old.replicas else 400  # the replica is rotten, or the client is wrong
            require({given, given.lower()} & right, status, f"MD5 does not match: {digest}")
            made = [place for place in todo if statuses[place] == 201]
            for place in able[count:]:
                if 0 < len(made) < count:
                    logging.warning("%r has a stand-in at %s", key.decode(), place)
                    await self.index.do(Row.extend, key, owner, Replica(place, write_id))
                    copy = self.volumes.read(random.choice(made), path)
                    with contextlib.suppress(HTTPError):  # the next one may do
                        copied, _, same = await self.volumes.write(path, [place], size, copy)
                        made += [place] if copied[place] == 201 and same == md5 else []
            require(len(made) == count, 503, f"{count} replicas cannot be made: {statuses}")
            files = tuple(Replica(p, write_id) for p in sorted(made, key=ranking.index))
            record = Record(files, size, write_id, digest if self.flags.md5sum else "", old.deleted)
            before = await self.index.do(Row.commit, key, owner, record, old)
        await self.erase(key, () if old.replicas else before.replicas, (204, 404))  # was unlinked
        return response(201)

    async def rebalance(self, key: bytes) -> bytes:
        """204: the best volumes that work have the value, whole, and no others. 404, 409, 503."""
        old, count = self.index.look(key).record, self.flags.replicas
        require(old.replicas, 404, "no such key")
        asks = [self.volumes.request("HEAD", p, key2path(key, i)) for p, i in old.replicas]
        answers = zip(old.replicas, await asyncio.gather(*asks), strict=True)
        good = {p: i for (p, i), answer in answers if answer == (200, old.size)}
        home = [p for p in self.ranking(key) if p in good or self.volumes.takes(p)][:count]
        require(good and len(home) == count, 503, "too few volumes can be reached")
        if list(good) != home:
            place, write_id = random.choice(list(good.items()))
            body = self.volumes.read(place, key2path(key, write_id))
            await self.put(key, old.size, old.hash, body, old)
        return response(204)

    @contextlib.asynccontextmanager
    async def making(self, key: bytes, places: list[str], old: Record) -> AsyncIterator[tuple]:
        """A claim: (owner, write id). Unless the block commits, what it made is deleted."""
        owner, write_id = self.index.owner(), None
        try:
            write_id = await self.index.do(Row.claim, key, owner, places, time.time(), old)
            yield owner, write_id
        except BaseException:  # after any commit queued before it: no record names what it lists
            listed = await self.index.do(Row.settle, key, owner, ())
            await self.erase(key, [r for r in listed if r.write_id == write_id], (204,))
            raise

    async def erase(self, key: bytes, replicas: Sequence[Replica], proof: Sequence[int]) -> int:
        """Delete files on volumes that are up. A status in `proof` shows one gone: how many are."""
        files = [replica for replica in replicas if self.volumes.up(replica.location)]
        ask = [self.volumes.request("DELETE", p, key2path(key, write_id)) for p, write_id in files]
        answers = await asyncio.gather(*ask)
        gone = [r for r, (status, _) in zip(files, answers, strict=True) if status in proof]
        if gone:  # nobody has to wait for that to be on disk
            self.index.do(Row.settle, key, "", gone)
        return len(gone)

    async def remove(self, key: bytes, method: str) -> bytes:
        """204: no GET finds the key. After DELETE its files go too, sooner or later."""
        if method == "UNLINK":
            await self.index.do(Row.unlink, key)
        else:
            record = await self.index.do(Row.remove, key, self.flags.protect)
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

    async def list(self, prefix: bytes, start: bytes, limit: int, unlinked: bool) -> Pieces:
        """The JSON of the keys with a prefix, from `start` on, a thousand at a time."""
        yield b'{"keys": ['
        comma = ""
        for rows in self.index.walk(self.index.keys, max(prefix, start)):
            shown = [key for key, text in rows if text.startswith(b"DELETED") == unlinked]
            keys = [key.decode() for key in shown if key.startswith(prefix)]
            page, following = keys[:limit], "".join(keys[limit : limit + 1])
            yield (comma + json.dumps(page)[1:-1] if page else " ").encode()  # never empty
            comma, limit = ", " if page else comma, limit - len(page)
            if following or not rows or not rows[-1][0].startswith(prefix):
                break
        yield f'], "next": {json.dumps(following)}}}\n'.encode()

    def metrics(self) -> bytes:  # for Prometheus; of this process, but for keys and journal
        (keys, entries), volumes = self.index.count(), set(self.flags.volumes)
        label, times = 'requests_total{{method="{}",status="{}"}}', self.seconds.items()
        values = {label.format(m, status.decode()): n for (m, status), n in self.requests.items()}
        values |= {f'request_seconds_total{{method="{method}"}}': spent for method, spent in times}
        values |= {"received_bytes_total": self.received, "event_loop_lag_seconds": self.lag}
        values |= {"keys": keys, "journal_entries": entries, "connections": len(self.connections)}
        values |= {"volumes": len(volumes), "volumes_up": len(volumes - set(self.volumes.down))}
        return "".join(f"mkv_{name} {value}\n" for name, value in values.items()).encode()

    async def sweep(self) -> None:
        """Delete garbage older than `grace`, the older the more seldom; evict owners that are dead.
        Until `settle` has passed, 404 does not prove a file gone: a late PUT may still land."""
        await self.index.evict_dead()
        now, left = time.time(), 0
        for rows in self.index.walk(self.index.journal, b"", 16):
            work = []
            for key, row in [(key, self.index.look(key)) for key, _ in rows]:
                age = now - row.since
                if age >= self.flags.grace and not row.owner:
                    left += (n := len(row.replicas))
                    if random.random() * (age - self.flags.grace) < 8 * self.pause:
                        proof = (204, 404) if age > self.flags.settle else (204,)
                        work.append(self.erase(key, random.sample(row.replicas, min(n, 32)), proof))
            left -= sum(await asyncio.gather(*work))
            await asyncio.sleep(0)  # for the others
        if left and not self.waiting:
            logging.warning("%d files still wait to be deleted", left)
        self.waiting = left
        self.index.env.reader_check()  # a reader that was killed pins old pages

    async def tick(self) -> None:  # try what is down, end idle connections, see how late we are
        now = time.monotonic()
        self.lag, self.ticked = max(0.0, now - self.ticked - TICK), now
        for place, (due, _) in self.volumes.down.items():
            if due <= now and "/" not in place:  # a location is tried by the next PUT
                self.volumes.probe(place)
        for connection in list(self.connections):
            if not connection.task and now - connection.started > IDLE_TIME:
                connection.transport.abort()


async def every(seconds: float, job: Callable) -> None:  # for at most a fifth of the time
    while True:
        began = time.monotonic()
        with contextlib.suppress(HTTPError, OSError):  # no room, no descriptor: later
            await job()
        await asyncio.sleep(max(seconds, 4 * (time.monotonic() - began)))


# --- command line ---------------------------------------------------------------------------------
# Flags as the ancestor has them (one dash or two), the server process, the volumes of the demo.


def duration(text: str) -> float:
    """Seconds, from a duration as Go writes it: 300ms, 1.5s, 1h30m, 0. ValueError."""
    parts = re.findall(r"([0-9]+\.?[0-9]*)(h|ms|m|s)", text)
    if text != "0" and (not parts or "".join(map("".join, parts)) != text):
        raise ValueError
    return sum(float(n) * {"h": 3600, "m": 60, "s": 1, "ms": 0.001}[unit] for n, unit in parts)


def addresses(text: str) -> tuple[str, ...]:
    """host:port,host:port,… ValueError for doubles and what is none."""
    volumes, address = text.split(","), re.compile(r"([\w.-]+|\[[0-9a-f:.]+\]):[0-9]{1,5}")
    if not all(map(address.fullmatch, volumes)) or len(set(volumes)) < len(volumes):
        raise ValueError
    return tuple(volumes)


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
        ("protect", None, False, "UNLINK before DELETE"),
        ("v", None, False, "log every request"),
    ):
        how = {"type": kind, "default": default} if kind else {"action": "store_true"}
        parser.add_argument(f"-{name}", f"--{name}", help=text, **how)
    flags = parser.parse_args()
    flags.demo = () if flags.volumes else (3001, 3002, 3003)
    flags.bind = flags.bind or ("127.0.0.1" if flags.demo else "0.0.0.0")
    flags.volumes = flags.volumes or tuple(f"127.0.0.1:{port}" for port in flags.demo)
    for name, most in ("port", 65535), ("subvolumes", 256), ("replicas", len(flags.volumes)):
        if not 1 <= getattr(flags, name) <= most:
            parser.error(f"-{name} is 1 to {most}")
    return flags


def own_volumes(flags: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Start the volumes of the demo, under ./mkv-data; they end with the stack."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, until serve() takes both
    for port in flags.demo:
        command = [Path(__file__).with_name("volume.sh"), f"mkv-data/volume{port}"]
        mine = {"PORT": f"{port}", "HOST": "127.0.0.1", "SUBVOLUMES": f"{flags.subvolumes}"}
        env, pid = os.environ | mine, Path(command[1], ".nginx/pid")  # written when it listens
        volume = stack.enter_context(subprocess.Popen(command, env=env, start_new_session=True))
        stack.callback(volume.terminate)
        while not pid.exists() or pid.read_text().strip() != str(volume.pid):
            if volume.poll() is not None:
                sys.exit(2)  # volume.sh has said why
            time.sleep(0.01)


def listen(flags: argparse.Namespace) -> tuple[socket.socket, Any]:
    """A socket at the port, which only servers of the same index share, and their lock. OSError."""
    lock, shared = (flags.db / f"{flags.bind}:{flags.port}").open("w"), False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # there is one already
        shared = True
    family = socket.AF_INET6 if ":" in flags.bind else socket.AF_INET
    listener = socket.create_server((flags.bind, flags.port), family=family, reuse_port=shared)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # from now on
    fcntl.flock(lock, fcntl.LOCK_SH)
    return listener, lock


async def serve(store: Store, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is in hand, or has connected already."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await store.index.evict_dead()
    queue, connect = listener.dup(), functools.partial(Connection, store)
    server = await loop.create_server(connect, sock=listener, backlog=4096)
    jobs = every(store.pause, store.sweep), every(TICK, store.tick), stop.wait()
    done, _ = await asyncio.wait(map(asyncio.create_task, jobs), return_when="FIRST_COMPLETED")
    await asyncio.gather(*done)  # raises what ended a job
    server.close()
    store.draining, began = True, time.monotonic()
    with queue, contextlib.suppress(BlockingIOError):
        while time.monotonic() < began + DRAIN_TIME:
            await loop.connect_accepted_socket(connect, queue.accept()[0])
    while store.connections:
        for connection in list(store.connections):  # an idle one has a second to ask once more
            if time.monotonic() - began > (DRAIN_TIME if connection.task else 1):
                connection.transport.abort()
        await asyncio.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser("mkv.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    flags = parse_flags(parser)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # Debian starts us with 1024
    try:
        index = Index(flags.db)
        listener, _lock = listen(flags)
    except (OSError, lmdb.Error) as error:
        parser.error(f"cannot use -db {flags.db} and -port {flags.port}: {error}")
    with contextlib.ExitStack() as stack:
        own_volumes(flags, stack)
        at, names = f"http://{flags.bind}:{flags.port}", ", ".join(flags.volumes)
        print(f"mkv is at {at}, its index in {flags.db}, its volumes at {names}", flush=True)
        if flags.demo:
            print(f"curl -X PUT -d swag {at}/key\ncurl -L {at}/key\ncurl '{at}/?list'", flush=True)
        uvloop.run(serve(Store(flags, index), listener))
    index.close()


if __name__ == "__main__":
    main()
