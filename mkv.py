# /// script
# requires-python = ">=3.11"
# dependencies = ["uvloop", "lmdb>=3,<4"]
# ///
"""mkv: a distributed key-value store for blobs. This file is all of it; stock nginx has the bytes.

A file is claimed (listed in the journal), written, vouched for (named by its key's record), garbage
(in the journal again), gone: in this order only, and no name is used twice. All else rests on that.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter, defaultdict, namedtuple
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, lockf
from functools import lru_cache
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote_to_bytes

import lmdb
import uvloop

MAX_KEY, MAX_HEAD, MAX_FIELDS = 511, 16384, 100  # bytes: LMDB's limit; twice nginx's; as Apache's
HEAD_TIME, IDLE_TIME, LINGER_TIME = 10, 60, 5  # seconds: for a head, between two, lingering close
BODY_TIME, BODY_RATE, READ_AHEAD = 60, 1024, 1 << 18  # s, bytes/s: slower is 408; bytes a read
TICK, DRAIN_TIME, LOGIN_TIME = 0.2, 10, 60  # seconds: tick to tick, SIGTERM to end, a login
METHODS = "GET", "HEAD", "PUT", "DELETE", "UNLINK", "REBALANCE"
DEMO = "127.0.0.1:3001", "127.0.0.1:3002", "127.0.0.1:3003"  # the volumes without -volumes
Pieces = AsyncIterator[bytes]  # of a body, none of them empty


class HTTPError(ValueError):  # a refusal: status, a line that says why, more header lines (CR LF)
    def __init__(self, status: int, reason: str, fields: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.fields = status, reason, fields


def require(condition: Any, status: int, reason: str, fields: str = "") -> None:  # else HTTPError
    if not condition:
        raise HTTPError(status, reason, fields)


# --- placement ------------------------------------------------------------------------------------
# Where a key's files lie, in minikeyvalue's layout. Pure. A location is "host:port" (a volume) or
# "host:port/svXX"; a write id is 16 hex digits: 8 of seconds since 1970, 8 that tell writers apart.
def key2path(key: bytes, write_id: str = "") -> str:
    """The path of a key's file: two bytes of its md5, its base64, and its write id, if any."""
    digest, name = hashlib.md5(key).hexdigest(), base64.b64encode(key).decode()
    if write_id and len(name) > 230:  # a name has 255 at most; base64 has "/" itself: sub-folders
        name = re.sub(r"[^/]{230}(?=[^/])", r"\g<0>-/", name)
    return f"/{digest[:2]}/{digest[2:4]}/{name}" + (f"-{write_id}" if write_id else "")


def path2key(path: str) -> tuple[bytes, str]:
    """Key and write id ("" if none) of the file with this path, else ValueError: not our file."""
    name, _, write_id = path[7:].replace("-/", "").partition("-")
    key = base64.b64decode(name)
    right = key.decode()[:1] == "/" and 1 < len(key) <= MAX_KEY and key2path(key, write_id) == path
    require(right and re.fullmatch("([0-9a-f]{16})?", write_id), 400, "no key has such a file")
    return key, write_id


def key2volume(key: bytes, volumes: Sequence[str], replicas: int, subvolumes: int) -> list[str]:
    """The first `replicas` locations of the key's ranking: by md5(key + volume), highest first."""
    scores = sorted([(hashlib.md5(key + v.encode()).digest(), v) for v in volumes], reverse=True)
    drive = "/sv{:02X}" if subvolumes > 1 else ""
    return [v + drive.format(int.from_bytes(md5[12:]) % subvolumes) for md5, v in scores[:replicas]]


# --- record ---------------------------------------------------------------------------------------
# What the index knows of a key: [DELETED][HASH<32 hex>]<location>,<location>@<id>,…[ <size> <id>]
# Without size and id it is minikeyvalue's record, byte for byte. Pure.
RECORD = re.compile(r"(DELETED)?(?:HASH([0-9a-f]{32}))?([^ ]*)(?: ([0-9]+)(?: ([0-9a-f]{16}))?)?")
Replica = namedtuple("Replica", "location write_id")  # one file of a key


class Record(NamedTuple):
    replicas: tuple[Replica, ...] = ()  # in ranking order
    size: int | None = None  # bytes
    write_id: str = ""  # of the replicas that have no other
    hash: str = ""  # MD5 in hex
    deleted: bool = False  # unlinked: hidden, but the files stay

    def text(self) -> bytes:  # as the index stores it
        mark = ("DELETED" if self.deleted else "") + (f"HASH{self.hash}" if self.hash else "")
        files = [r.location if r.write_id == self.write_id else "@".join(r) for r in self.replicas]
        size = "" if self.size is None else f" {self.size} {self.write_id}".rstrip()
        return f"{mark}{','.join(files)}{size}".encode()


@lru_cache(4096)
def parse_record(text: bytes) -> Record:  # the inverse of Record.text(). 500
    require(match := RECORD.fullmatch(text.decode(errors="replace")), 500, f"unreadable: {text!r}")
    deleted, md5, files, size, write_id = match.groups("")
    parts = [file.partition("@") for file in files.split(",") if file]
    replicas = [Replica(location, own if at else write_id) for location, at, own in parts]
    return Record(tuple(replicas), int(size) if size else None, write_id, md5, bool(deleted))


# --- index ----------------------------------------------------------------------------------------
# LMDB tables. keys: key → record. journal: key → owner, since, files that may exist and that no
# record names: an owner is making them (the lock on the key), or they are garbage. An operation is
# a function of row and plain arguments, without clock or chance; it is answered when on disk.
class Row(NamedTuple):  # a key in both tables; each operation returns the new row, and an answer
    record: Record  # empty if there is none
    owner: str  # of the claim, if there is one
    since: float  # seconds since 1970: when the last owner went, or the last replica came
    replicas: tuple[Replica, ...]  # in the journal

    def claim(self, owner: str, where: list, now: float, old: Record, keep: Any = ()) -> tuple:
        """Lock a key, list files to be made: their write id, newer than all, or as what is kept."""
        live = self.record.replicas and not self.record.deleted
        require(not self.owner, 409, "another PUT or REBALANCE of this key is under way")
        require(old.replicas or not live, 403, "key exists: DELETE it first")
        newest = max((r.write_id for r in self.replicas + self.record.replicas), default="")
        age = old.write_id[:8] if keep else f"{max(int(now), 1 + int(newest[:8] or '0', 16)):08x}"
        require(len(age) == 8 and len(self.replicas) < 1000, 503, "wrong clock, or 1000 leftovers")
        write_id = age + hashlib.md5(owner.encode()).hexdigest()[:8]
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
        return self._replace(owner="" if owner == self.owner else self.owner, replicas=left), left

    def remove(self, hide: bool, protect: bool) -> tuple:
        """Hide a key, or delete it: its files are garbage. Returns the old record. 404, 403."""
        require(self.record.replicas and not (hide and self.record.deleted), 404, "no such key")
        require(hide or self.record.deleted or not protect, 403, "protected: UNLINK the key first")
        record = self.record._replace(deleted=True) if hide else Record()
        listed = self.replicas + (() if hide else self.record.replicas)
        return self._replace(record=record, replicas=listed), self.record

    def adopt(self, file: Replica, size: int, ranking: list[str], condemn: bool) -> tuple:
        """Vouch for a file that was found, unless there are newer ones. Returns the older ones."""
        if file in self.replicas + self.record.replicas:
            return self, ()
        record, age = self.record, file.write_id[:8]
        if not record.replicas or age > record.write_id[:8]:
            record = Record((file,), size, file.write_id)
        elif age == record.write_id[:8]:
            files = sorted([*record.replicas, file], key=lambda r: (*ranking, r[0]).index(r[0]))
            record = record._replace(replicas=tuple(files), size=max(size, record.size or 0))
        garbage = tuple({file, *self.record.replicas} - {*record.replicas})
        return self._replace(record=record, replicas=self.replicas + garbage * condemn), garbage


class Index:
    """LMDB in a folder, for many processes: each locks a byte of the file "alive" all its life."""

    def __init__(self, path: Path, create: bool = True) -> None:
        require(create or (path / "data.mdb").exists(), 404, "no index there")
        path.mkdir(parents=True, exist_ok=True)
        self.env = lmdb.open(str(path), map_size=1 << 40, max_dbs=2, max_readers=4096)
        self.keys, self.journal = self.env.open_db(b"keys"), self.env.open_db(b"journal")
        self.queue, self.kept, self.flushing = [], [], None  # jobs; those to be tried again; a task
        self.alive, self.process = (path / "alive").open("a+"), os.urandom(7).hex()
        require(self.take(self.process), 503, "a rebuild is under way")

    def take(self, name: str, count: int = 1, how: int = LOCK_EX | LOCK_NB) -> bool:
        with contextlib.suppress(BlockingIOError):  # count bytes from offset `name` on; 0: all
            lockf(self.alive, how, count, int(name[:14], 16))
            return True
        return False

    async def evict(self, key: bytes, owner: str) -> None:  # a claim whose process is dead
        if owner and owner[:14] != self.process and self.take(owner, how=LOCK_SH | LOCK_NB):
            await self.do(Row.settle, key, owner, ())

    def look(self, key: bytes, txn: lmdb.Transaction | None = None) -> Row:  # parts may be empty
        txn = txn or self.env.begin()
        record, entry = txn.get(key, b"", db=self.keys), txn.get(key, b" 0 ", db=self.journal)
        owner, since, files = entry.split(b" ")
        listed = parse_record.__wrapped__(files).replicas if files else ()  # each is read once
        return Row(parse_record(record), owner.decode(), float(since), listed)

    def record(self, key: bytes) -> Record:  # empty if there is none
        return parse_record(self.env.begin().get(key, b"", db=self.keys))

    def count(self) -> tuple[int, int]:  # of keys and journal entries
        return tuple(self.env.begin().stat(t)["entries"] for t in (self.keys, self.journal))

    def walk(self, table: Any, start: bytes | None = b"", size: int = 1000) -> Iterator[list]:
        """Rows from `start` on, in batches; no snapshot outlasts one, or it would pin pages."""
        while start is not None:
            with self.env.begin(table) as txn, txn.cursor() as cursor:
                rows = list(islice(cursor.iternext(), size + 1)) if cursor.set_range(start) else []
            start = rows.pop()[0] if len(rows) > size else None
            yield rows

    def do(self, operation: Callable, key: bytes, *args: Any) -> asyncio.Future:
        """Queue an operation: a future of its answer. It is done, whatever tasks are cancelled."""
        future = asyncio.get_running_loop().create_future()
        self.queue.append((operation, key, args, time.time(), future))
        if not self.flushing or self.flushing.done() or self.flushing.cancelling():
            self.flushing = asyncio.create_task(self.flush())
        return future

    async def flush(self) -> None:  # group commit: what queues up during one sync is the next
        while self.queue:
            group, self.queue, self.kept = self.kept + self.queue, [], []
            commit = asyncio.get_running_loop().run_in_executor(None, self.commit, group)
            answers = await asyncio.shield(commit)  # which is not called off with this task
            for (*_, future), answer in zip(group, answers, strict=True):
                if not future.done():  # as is one that was kept, or whose caller was cancelled
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
            return [() if job[0] is Row.settle else failure for job in group]

    def change(self, txn: Any, operation: Callable, key: bytes, args: tuple, now: float) -> Any:
        """Put the row that an operation makes in the place of the old one: its answer, or error."""
        try:
            old = self.look(key, txn)
            new, answer = operation(old, *args)
        except ValueError as error:  # it refuses, or cannot read what is there
            return error
        fresh = (old.owner and not new.owner) or not set(new.replicas) <= set(old.replicas)
        lead = f"{new.owner} {now if fresh else old.since!r} ".encode()
        entry = lead + Record(new.replicas).text() if new.owner or new.replicas else b""
        txn.put(key, entry, db=self.journal) if entry else txn.delete(key, db=self.journal)
        if new.record != old.record:
            record = new.record.text() if new.record.replicas else b""
            txn.put(key, record, db=self.keys) if record else txn.delete(key, db=self.keys)
        return answer


# --- http -----------------------------------------------------------------------------------------
# HTTP/1.1 by hand (RFC 9112). What could be read in two ways is refused, and so is all that comes
# after it: no request is smuggled past a proxy. Parsing needs no sockets.
LINE = re.compile(rb"([A-Z]+) (?:http://[^/?# ]*)?(/[^?# ]*)(?:\?([^# ]*))? HTTP/1\.([01])\r\n")
STATUS = re.compile(rb"HTTP/1\.[01] ([2-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?\r\n")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
TEXT, ALLOW = "Content-Type: text/plain; charset=utf-8\r\n", f"Allow: {', '.join(METHODS)}\r\n"
BROKEN = {TimeoutError: (408, "too slow"), asyncio.LimitOverrunError: (431, "too long a line")}
BROKEN[asyncio.IncompleteReadError] = 400, "the request ended early"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
Request = namedtuple("Request", "method path query key fields length waits close")


@lru_cache(64)  # a client sends the same ones again and again
def parse_fields(text: bytes) -> tuple[dict, int | None, bool]:
    """Fields by lower-case name, body length (None: chunked), last? 400, 431, 501."""
    lines, fields = text.split(b"\r\n")[:-2], {}
    require(len(lines) <= MAX_FIELDS, 431, f"a head has at most {MAX_FIELDS} fields")
    for line in lines:  # not folded, no space before the colon, no bare CR or LF
        require(match := FIELD.fullmatch(line), 400, "malformed header field")
        name, value = match[1].lower(), match[2].rstrip(b" \t")
        fields[name] = fields[name] + b"," + value if name in fields else value
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"0")
    require(re.fullmatch(rb"[0-9]{1,18}", length), 400, "malformed Content-Length")
    require(not coding or b"content-length" not in fields, 400, "two lengths of one body")
    require(coding is None or coding.lower() == b"chunked", 501, "the only coding is chunked")
    options = fields.get(b"connection", b"").lower().translate(None, b" \t").split(b",")
    return fields, int(length) if coding is None else None, b"close" in options


@lru_cache(64)
def parse_request(head: bytes) -> Request:
    """The request; query None: no "?", length None: chunked. 400, 405, 414, 431, 501."""
    require(first := LINE.match(head), 400, "malformed first line")
    fields, length, close = parse_fields(head[first.end() :])
    method, path, query, minor = first.groups()
    waits = minor == b"1" and fields.get(b"expect", b"").lower() == b"100-continue"
    require(minor == b"0" or b"," not in fields.get(b"host", b","), 400, "no Host, or several")
    require(minor == b"1" or length is not None, 400, "chunked in HTTP/1.0")
    require(method.decode() in METHODS, 405, "no such method", ALLOW)
    key = unquote_to_bytes(path)
    require(len(key) <= MAX_KEY, 414, f"a key has at most {MAX_KEY} bytes")
    odd = re.search(rb"[\0-\x1f\x7f]|%(?![0-9A-Fa-f]{2})", first[0][:-2])
    odd = odd or key.decode(errors="ignore").encode() != key or (len(key) < 2 and query is None)
    require(not odd, 400, "a key is UTF-8, percent-encoded, of two bytes or more")
    return Request(method.decode(), path, query, key, fields, length, waits, close or minor == b"0")


@lru_cache(256)
def response(status: int, fields: str = "", body: bytes = b"") -> bytes:  # fields end in CR LF
    length = f"Content-Length: {len(body)}\r\n" if status not in (100, 204) else ""
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{length}{fields}\r\n".encode() + body


async def read_body(reader: Any, length: int | None, seconds: float, client: Any = None) -> Pieces:
    """A body in pieces (length None: chunked). 400, EOFError, LimitOverrunError, TimeoutError."""
    if client:  # the writer to one that waits for this answer
        client.write(response(100))
    left, allowed = length, seconds  # of body or chunk; to wait: BODY_RATE bytes earn one more
    while left or length is None:  # RFC 9112, 7.1
        began = time.monotonic()
        async with asyncio.timeout(None if length and reader._buffer else allowed):
            if not left:
                require(size := CHUNK.fullmatch(await reader.readuntil(b"\r\n")), 400, "bad chunk")
                left = int(size[1], 16)
            if not left:
                if (begin := await reader.readexactly(2)) != b"\r\n":  # of trailers
                    parse_fields(begin + await reader.readuntil(b"\r\n\r\n"))
                return
            piece = await reader.read(min(left, READ_AHEAD))
            require(piece, 400, "the body ended early")
            left -= len(piece)
            if length is None and not left:
                require(await reader.readexactly(2) == b"\r\n", 400, "a chunk too long")
        allowed = min(seconds, allowed + began - time.monotonic() + len(piece) / BODY_RATE)
        yield piece


class Connection(asyncio.StreamReaderProtocol):  # of a client; requests are answered in order
    def __init__(self, store: Any) -> None:
        self.reader, self.store = asyncio.StreamReader(MAX_HEAD), store
        super().__init__(self.reader, self.converse)
        self.idle, self.closing, self.due = False, False, time.monotonic() + IDLE_TIME

    def data_received(self, data: bytes) -> None:  # a GET that came alone may be answered at once
        began = time.monotonic()
        alone = self.idle and data[:4] == b"GET " and not self.reader._buffer and not self.unsent()
        if alone and data.find(b"\r\n\r\n") == len(data) - 4 < MAX_HEAD:
            try:
                request = parse_request(data)
                plain = request.query is None and request.length == 0 and not request.close
                plain = plain and not self.store.draining and self.store.admits(request)
                if plain and (answer := self.store.find(request.key)):
                    return self.send(answer, "GET", request.path, began)
            except HTTPError:
                pass  # converse() will say so
        return super().data_received(data)

    async def converse(self, reader: asyncio.StreamReader, writer: Any) -> None:
        self.writer, self.unsent = writer, writer.transport.get_write_buffer_size
        writer.transport.set_write_buffer_limits(0)  # drain() waits until all is sent
        self.full = len(self.store.connections) >= self.store.flags.maxconns
        (crowd := self.store.refused if self.full else self.store.connections).add(self)
        try:
            while not self.closing:
                await asyncio.sleep(0)  # for the others
                self.idle = not self.full
                first = await reader.readexactly(1) if self.idle else b""
                self.idle, self.due = False, sys.maxsize
                await self.serve(first)
                await writer.drain()
            writer.write_eof()  # close() at once would reset the answer away
            async with asyncio.timeout(TICK * (len(crowd) < 32) if self.full else LINGER_TIME):
                while await reader.read(READ_AHEAD):
                    pass
        except (OSError, EOFError, RuntimeError):  # the client is gone, or might as well be
            with contextlib.suppress(OSError):
                await writer.drain()  # what data_received() has answered; tick() sees to an end
        finally:
            writer.transport.abort()
            crowd.discard(self)

    async def serve(self, first: bytes) -> None:  # a request that begins with this byte. OSError
        method, path, close, rest, began = "-", b"-", True, (), time.monotonic()
        try:
            require(not self.full, 503, "too many connections: see -maxconns")
            async with asyncio.timeout(None if b"\r\n\r\n" in self.reader._buffer else HEAD_TIME):
                request = parse_request(first + await self.reader.readuntil(b"\r\n\r\n"))
            method, path, close = request.method, request.path, request.close or request.length != 0
            body = read_body(self.reader, request.length, BODY_TIME, request.waits and self.writer)
            answer = await self.store.answer(request, body)
            if not isinstance(answer, bytes):  # of unknown length: it ends with the connection
                rest, answer, close = answer, STREAM, close or method == "GET"
            close = request.close if method == "PUT" else close  # its body is read
        except (HTTPError, *BROKEN) as error:
            error = error if isinstance(error, HTTPError) else HTTPError(*BROKEN[type(error)])
            answer = response(error.status, TEXT + error.fields, error.reason.encode() + b"\n")
        self.closing = close or self.store.draining
        if self.closing:
            answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        self.send(answer, "HEAD" if first == b"H" else method, path, began)  # "-" if unreadable
        if rest and method == "GET":
            async for piece in rest:
                self.writer.write(piece)
                self.due = time.monotonic() + IDLE_TIME
                await asyncio.sleep(0)  # for the others
                await self.writer.drain()

    def send(self, answer: bytes, method: str, path: bytes, began: float) -> None:  # and count it
        self.writer.write(answer[: answer.find(b"\r\n\r\n") + 4] if method == "HEAD" else answer)
        status, counters, now = answer[9:12].decode(), self.store.counters, time.monotonic()
        self.due = now + IDLE_TIME
        counters[f'requests_total{{method="{method}",status="{status}"}}'] += 1
        counters[f'request_seconds_total{{method="{method}"}}'] += now - began
        if self.store.flags.v:
            logging.info("%s %s %s", method, path.decode("latin-1"), status)


# --- volumes --------------------------------------------------------------------------------------
# Pooled connections to nginx, trust in what answers, a list of what is down. No answer: status 0.
class Volumes:  # what is known of them; a location that answers is trusted for `timeout` seconds
    def __init__(self, flags: argparse.Namespace) -> None:
        self.timeout, self.patience = flags.voltimeout, flags.voltimeout or 1.0
        basic = base64.b64encode(flags.userpass.encode(errors="surrogateescape")).decode()
        self.login = f"Authorization: Basic {basic}\r\n" if basic else ""
        self.idle: dict[str, list] = defaultdict(list)  # (reader, writer) of connections, by volume
        self.trusted: dict[str, float] = {}  # location → until when (monotonic)
        self.down: dict[str, tuple] = {}  # volume, or location + "/" for PUT → next try, pause
        self.probes: dict[str, asyncio.Task] = {}  # under way, by location

    def pool(self, place: str, failed: bool = False) -> list:
        """Idle connections. If one failed, or is closed, so may be all: none, and no more trust."""
        idle = self.idle[volume := place.partition("/")[0]]
        if failed or idle and (idle[-1][0]._eof or idle[-1][0]._buffer or idle[-1][1].is_closing()):
            self.trusted = {p: t for p, t in self.trusted.items() if p.partition("/")[0] != volume}
            while idle:
                idle.pop()[1].transport.abort()
        return idle

    def mark(self, place: str, trouble: str) -> None:
        """A volume does not answer, or a location takes no value; without trouble, it does."""
        due, pause = self.down.get(place, (0.0, self.patience / 2))
        if bool(trouble) != (place in self.down):
            logging.warning("%s is %s", place, f"down: {trouble}" if trouble else "up again")
        if not trouble:
            self.down.pop(place, None)
        elif due <= time.monotonic():
            pause = min(2 * pause, (64 if "/" in place else 8) * self.patience)
            self.down[place] = time.monotonic() + pause, pause

    def up(self, location: str) -> bool:
        return location.partition("/")[0] not in self.down

    def takes(self, location: str) -> bool:  # whether to PUT there, if only to try it again
        return self.up(location) and self.down.get(location + "/", (0.0,))[0] <= time.monotonic()

    async def exchange(self, verb: str, place: str, path: str, more: str = "Content-Length: 0"):
        """A request in steps: one task has many under way. Connects; takes the pieces of a body,
        then None; yields those of a file; at last status (0: no whole answer), and length."""
        volume, link, auth = place.partition("/")[0], (), more.startswith("Authorization")
        idle, seconds = self.pool(volume), self.patience * (10 if verb in ("GET", "PUT") else 1)
        try:
            if not idle:
                host, _, port = volume.rpartition(":")
                async with asyncio.timeout(self.patience):
                    link = await asyncio.open_connection(host.strip("[]"), port, limit=MAX_HEAD)
            reader, writer = link = link or idle.pop()
            path, fields = place[len(volume) :] + path, more if auth else self.login + more
            lead = f"{verb} {path} HTTP/1.1\r\nHost: {volume}\r\n{fields}\r\n\r\n".encode()
            chunked, sent = more.startswith("Transfer-Encoding"), 0.0
            while piece := (yield):
                if writer.is_closing() or writer.transport.get_write_buffer_size() > READ_AHEAD / 4:
                    async with asyncio.timeout(sent + seconds - time.monotonic()):
                        await writer.drain()
                writer.writelines((lead, b"%x\r\n" % len(piece) if chunked else b"", piece))
                lead, sent = (b"\r\n" if chunked else b""), time.monotonic()
            writer.write(lead + (b"0\r\n\r\n" if chunked else b""))
            sent = time.monotonic()
            yield  # without Location all answers to PUT are one in the cache of parse_fields()
            left = None if b"\r\n\r\n" in reader._buffer else sent + seconds - time.monotonic()
            async with asyncio.timeout(left):
                answer = re.sub(rb"\nLocation: .*\r", b"", await reader.readuntil(b"\r\n\r\n"))
            require(first := STATUS.match(answer), 503, "malformed first line")
            status, (_, length, close) = int(first[1]), parse_fields(answer[first.end() :])
            if not auth and time.monotonic() < sent + self.patience:  # no stranger's, nor old
                self.mark(volume, "it answers 401" if status == 401 else "")
            if verb == "PUT" or (status >= 500 and path != "/"):
                self.mark(place + "/", "" if status == 201 else f"it answers {status}")
            if status != 404:  # which says something of a file only
                self.trusted[place] = sent + self.timeout if status < 300 else 0.0
            rest = 0 if verb == "HEAD" or status == 204 else length
            if verb == "GET":
                async for piece in read_body(reader, rest, seconds):
                    if status == 200:
                        yield piece
            if (verb == "GET" or rest == 0) and not (close or reader._buffer or len(idle) > 63):
                idle.append(link)
        except (OSError, EOFError, ValueError, RuntimeError, asyncio.LimitOverrunError) as error:
            status, length = 0, None
            self.pool(volume, failed=True)
            trouble = str(error) or repr(error)
            if not (link and (auth or reader._buffer)):  # some answer early; a login may be slow
                self.mark(volume, trouble)
            if link and verb == "PUT":
                self.mark(place + "/", trouble)
        finally:
            if link and link not in idle:
                writer.transport.abort()  # of an upload that is cut short nginx keeps nothing
        yield status, length

    async def head(self, *what: Any) -> int:  # status, or 0
        return [step async for step in self.exchange("HEAD", *what)][-1][0]

    async def read(self, location: str, path: str) -> Pieces:  # of a file, streamed. 503
        async for step in self.exchange("GET", location, path):
            if isinstance(step, bytes):
                yield step
        require(step[0] == 200, 503, f"{location} answers {step[0]} to GET {path}")

    async def send(self, verb: str, key: bytes, files: Any, body: Any = None, length: Any = 0):
        """Ask for files of a key, all at once; each is PUT the same body, in one pass. Returns
        (status, length) by file, the status 0 for no answer; size and MD5 of the body. 503."""
        piece, size, md5 = await anext(body, b"") if body else b"", 0, hashlib.md5()
        form = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        exchanges = {f: self.exchange(verb, f[0], key2path(key, f[1]), form) for f in files}
        answers = dict.fromkeys(files)

        async def step(some: Sequence[Replica], piece: bytes | None = None) -> None:
            for file in some:
                answers[file] = answers[file] or await exchanges[file].asend(piece)

        try:
            warm = {f[0].partition("/")[0]: f for f in files if self.pool(f[0])}.values()
            await asyncio.gather(*(step([file]) for file in files if file not in warm))  # connect
            await step(warm)  # have connections
            while piece:
                size += len(piece)
                md5.update(piece)
                await step(files, piece)  # the slowest sets the pace
                require(not files or None in answers.values(), 503, "no volume takes the value")
                piece = await anext(body, b"")
            await step(files)  # all is sent
            await step(files)
            return answers, size, md5.digest()
        finally:
            for exchange in exchanges.values():
                await exchange.aclose()

    def trusts(self, location: str, key: bytes, write_id: str) -> bool:  # asked again in good time
        self.pool(location)  # which ends the trust if nginx has closed a connection
        left = self.trusted.get(location, 0.0) - time.monotonic()
        if left < self.timeout / 4 and self.timeout and self.up(location):
            self.probe(location, key2path(key, write_id))
        return left > 0

    def probe(self, place: str, path: str = "/") -> None:  # in the background, one at a time
        if place not in self.probes:
            self.probes[place] = asyncio.create_task(self.head(place, path))
            self.probes[place].add_done_callback(lambda _: self.probes.pop(place))


# --- store ----------------------------------------------------------------------------------------
# The verbs, without sockets or LMDB. An operation of the index decides; all else is work on files.
class Store:  # an index, volumes, and the flags that say how to use them
    def __init__(self, flags: argparse.Namespace, index: Index) -> None:
        self.flags, self.index, self.volumes, self.draining = flags, index, Volumes(flags), False
        self.connections, self.refused, self.counters = set(), set(), defaultdict(int)
        self.redirect, self.gate = lru_cache(4096)(self.make_redirect), asyncio.Semaphore(8)
        self.ranking = lambda key, n=256: key2volume(key, flags.volumes, n, flags.subvolumes)
        self.seen, self.ticked, self.pause = {}, time.monotonic(), min(5.0, flags.grace / 2 + 0.05)

    async def answer(self, request: Request, body: Pieces | None) -> bytes | Pieces:
        """The answer to a request, whole or as the pieces of its JSON. HTTPError."""
        if not self.admits(request):
            await self.log_in(request.fields.get(b"authorization", b""))
        if request.query is not None:
            return self.query(request)
        key, verb = request.key, request.method
        if verb in ("GET", "HEAD"):
            return self.find(key) or await self.get(key)
        if verb == "PUT":
            md5 = request.fields.get(b"content-md5", b"").decode("latin-1")
            return await self.put(key, request.length, md5, body, Record(), [])
        if verb == "REBALANCE":
            return await self.rebalance(key)
        old = await self.index.do(Row.remove, key, verb == "UNLINK", self.flags.protect)
        await self.erase(key, () if verb == "UNLINK" else old.replicas, (204, 404))
        return response(204)

    def admits(self, request: Request) -> bool:  # without a question
        ok = not self.flags.basicauth or (request.path, request.query) == (b"/", b"health")
        return ok or self.seen.get(hash(request.fields.get(b"authorization")), 0) > self.ticked

    async def log_in(self, auth: bytes) -> None:  # whom a volume with AUTH lets in. 401, 503
        line, now = f"Authorization: {auth[:2048].decode('latin-1')}", time.monotonic()
        for volume in sorted(self.flags.volumes, key=self.volumes.down.__contains__):
            async with self.gate:  # not all at once: nginx hashes slowly, and has other work
                status = await self.volumes.head(f"{volume}/login", "", line)
            require(status != 401, 401, "log in, please", 'WWW-Authenticate: Basic realm="mkv"\r\n')
            if status == 204:  # 404: that volume lets in everybody
                break
        require(status == 204, 503, "no volume can check the credentials")
        self.seen = {h: t for h, t in self.seen.items() if t > now} | {hash(auth): now + LOGIN_TIME}

    def find(self, key: bytes) -> bytes:
        """302 to a trusted replica, at random, or 404. Nothing: get() has to ask volumes."""
        record, others = self.index.record(key), self.flags.fallback
        if not record.replicas or record.deleted:
            to = others and f"Location: http://{random.choice(others)}{quote(key)}\r\n"
            return response(302, to) if to else response(404, TEXT, b"no such key\n")
        for file in sorted(record.replicas, key=lambda _: random.random()):
            if self.volumes.trusts(file.location, key, file.write_id):
                return self.redirect(key, record, file, int(time.time()))
        return b""

    def make_redirect(self, key: bytes, record: Record, file: Replica, now: int) -> bytes:
        """302 to a file, which redirect() keeps; signed for secure_link if there is a secret."""
        places, link = [place for place, _ in record.replicas], key2path(key, file.write_id)
        if secret := os.environ.get("MKV_SECRET"):
            path, until = (file.location + link).partition("/")[2], now + int(self.flags.expiry)
            text = f"{until}/{path} {secret}".encode(errors="surrogateescape")
            proof = base64.urlsafe_b64encode(hashlib.md5(text).digest())[:22].decode()
            link += f"?md5={proof}&expires={until}"
        balance = "balanced" if places == self.ranking(key, self.flags.replicas) else "unbalanced"
        head = f"Location: http://{file.location}{link}\r\nKey-Volumes: {','.join(places)}\r\n"
        head += (f"Content-Md5: {record.hash}\r\n" if record.hash else "") + "Content-Length: 0\r\n"
        return f"HTTP/1.1 302 Found\r\n{head}Key-Balance: {balance}\r\n\r\n".encode()

    async def get(self, key: bytes) -> bytes:  # 302 to a replica that is there now. 404, 503
        record = self.index.record(key)
        up = [r for r in record.replicas if self.volumes.up(r.location)] or record.replicas
        answers, *_ = await self.volumes.send("HEAD", key, up)
        good = [file for file, (status, _) in answers.items() if status == 200]
        if not good and (not up or self.index.record(key) != record):  # deleted or moved meanwhile
            return self.find(key) or await self.get(key)
        told = [status for status, _ in answers.values()]
        require(good, 404 if told == [404] * len(record.replicas) else 503, f"volumes say {told}")
        return self.redirect(key, record, random.choice(good), int(time.time()))

    async def put(self, key: bytes, length: Any, md5: str, body: Any, old: Any, keep: Any) -> bytes:
        """201: `replicas` volumes have it all (some `keep` it), the index on disk names them."""
        require(length != 0, 411, "a value has at least one byte, and a length or chunks")
        require(re.fullmatch(r"[\da-fA-F]{32}|[\w+/]{22}==|", md5), 400, "malformed Content-MD5")
        ranking, count = self.ranking(key), self.flags.replicas - len(keep)
        fit = [p for p in ranking if p not in dict(keep) and self.volumes.takes(p)]
        require(len(fit) >= count, 503, f"of {count} volumes needed {len(fit)} can be written")
        owner, write_id, todo = f"{self.index.process}.{os.urandom(7).hex()}", None, fit[:count]
        try:
            await self.index.evict(key, self.index.look(key).owner)
            write_id = await self.index.do(Row.claim, key, owner, todo, time.time(), old, keep)
            files = [Replica(place, write_id) for place in fit]
            answers, size, digest = await self.volumes.send("PUT", key, files[:count], body, length)
            self.counters["received_bytes_total"] += size
            require(size or old.size == 0, 411, "a value has at least one byte")
            right = md5.lower() in ("", digest.hex()) or md5 == base64.b64encode(digest).decode()
            require(right, 503 if old.replicas else 400, f"MD5 does not match: {digest.hex()}")
            made = [file for file, (status, _) in answers.items() if status == 201]
            for file in files[count:]:
                if 0 < len(made) < count:
                    logging.warning("%r has a stand-in at %s", key.decode(), file.location)
                    await self.index.do(Row.extend, key, owner, file)
                    copy = self.volumes.read(random.choice(made).location, key2path(key, write_id))
                    with contextlib.suppress(HTTPError):  # the next one may do
                        copied, _, its_md5 = await self.volumes.send("PUT", key, [file], copy, None)
                        made += [file] if copied[file][0] == 201 and its_md5 == digest else []
            require(len(made) == count, 503, f"volumes say {[s for s, _ in answers.values()]}")
            replicas = tuple(sorted([*keep, *made], key=lambda file: ranking.index(file[0])))
            known = digest.hex() if self.flags.md5sum and (old.hash or not keep) else ""
            record = Record(replicas, size, write_id, known, old.deleted)
            before = await self.index.do(Row.commit, key, owner, record, old)
        except BaseException as error:  # settled after a queued commit: what that names is safe
            if write_id or not isinstance(error, HTTPError):  # the claim was not refused
                listed = await self.index.do(Row.settle, key, owner, ())
                await self.erase(key, [r for r in listed if r.write_id == write_id], (204,))
            raise
        await self.erase(key, () if old.replicas else before.replicas, (204, 404))  # was unlinked
        return response(201)

    async def examine(self, key: bytes, record: Record, deep: bool) -> dict[Replica, str]:
        """What is wrong with each replica: "", missing, size, md5 (if deep), or unreachable."""
        (answers, *_), wrong, sums = await self.volumes.send("HEAD", key, record.replicas), {}, {}
        for file, (status, size) in answers.items():
            same = "" if record.size in (size, None) else "size"
            wrong[file] = {200: same, 404: "missing"}.get(status, "unreachable")
            if deep and not wrong[file]:
                with contextlib.suppress(HTTPError):
                    body = self.volumes.read(file.location, key2path(key, file.write_id))
                    *_, sums[file] = await self.volumes.send("", key, [], body)  # nowhere
                wrong[file] = "" if file in sums else "unreachable"
        right = {bytes.fromhex(record.hash)} if record.hash else {*sums.values()}
        return wrong | {file: "md5" for file, md5 in sums.items() if {md5} != right}

    async def rebalance(self, key: bytes, deep: bool = False) -> bytes:
        """204: the best volumes that work have the value, whole, and no others. 404, 409, 503."""
        old, count = self.index.record(key), self.flags.replicas
        require(old.replicas, 404, "no such key")
        wrong = await self.examine(key, old, deep)
        good = {place: write_id for (place, write_id), finding in wrong.items() if not finding}
        home = [p for p in self.ranking(key) if p in good or self.volumes.takes(p)][:count]
        require(good and len(home) == count, 503, "too few volumes can be reached")  # see move()
        if [place for place, _ in wrong] != home or any(wrong.values()):
            place, write_id = random.choice(list(good.items()))
            anew = not old.write_id or {"size", "md5"} & {*wrong.values()}  # newer than the rotten
            keep = [Replica(p, good[p]) for p in home if p in good and not anew]
            body = self.volumes.read(place, key2path(key, write_id))
            await self.put(key, None, old.hash, body, old, keep)
        return response(204)

    async def erase(self, key: bytes, replicas: Sequence[Replica], proof: Sequence[int]) -> int:
        """Delete files on volumes that are up. A status in `proof` shows one gone: how many are."""
        up = [replica for replica in replicas if self.volumes.up(replica.location)]
        answers, *_ = await self.volumes.send("DELETE", key, up)
        gone = [replica for replica, (status, _) in answers.items() if status in proof]
        if gone:  # nobody has to wait for that to be on disk
            self.index.do(Row.settle, key, "", gone)
        return len(gone)

    def query(self, request: Request) -> bytes | Pieces:  # ?list, ?unlinked, health, metrics. 400
        query = parse_qs(request.query.decode("latin-1"), True, encoding="latin-1")  # of bytes
        limit, start = (query.get(name, [""])[0].encode("latin-1") for name in ("limit", "start"))
        good = request.method in ("GET", "HEAD") and start.decode(errors="ignore").encode() == start
        require(good and re.fullmatch(b"[0-9]{0,18}", limit), 400, "no query like this")
        if request.path == b"/" and set(query) in ({"health"}, {"metrics"}):
            (keys, entries), up = self.index.count(), {*self.flags.volumes} - {*self.volumes.down}
            values = {"keys": keys, "journal_entries": entries, "volumes": len(self.flags.volumes)}
            values |= {"volumes_up": len(up), "connections": len(self.connections)}
            text = "".join(f"mkv_{n} {v}\n" for n, v in (values | self.counters).items())
            return response(200, TEXT, text.encode() if "metrics" in query else b"ok\n")
        require(set(query) - {"start", "limit"} in ({"list"}, {"unlinked"}), 400, "try ?list")
        return self.list(request.key, start, int(limit or 1 << 62), "unlinked" in query)

    async def list(self, prefix: bytes, start: bytes, limit: int, unlinked: bool) -> Pieces:
        """The JSON of the keys with a prefix, from `start` on, a thousand at a time."""
        yield b'{"keys": ['
        comma, end = "", prefix + b"\xff"  # after all keys with the prefix: they are UTF-8
        for rows in self.index.walk(self.index.keys, max(prefix, start)):
            keys = [k.decode() for k, r in rows if k < end and r.startswith(b"DELETED") == unlinked]
            page, following = keys[:limit], (keys[limit] if len(keys) > limit else "")
            yield (comma + json.dumps(page)[1:-1] if page else " ").encode()  # never empty
            comma, limit = (", " if page else comma), limit - len(page)
            if following or not rows or rows[-1][0] > end:
                break
        yield f'], "next": {json.dumps(following)}}}\n'.encode()

    async def sweep(self, thorough: bool = False) -> None:
        """Evict dead owners; delete garbage, ever more rarely. Till `settle` 404 is no proof."""
        left = 0
        for rows in self.index.walk(self.index.journal, b"", 16):
            work = []
            for key, row in [(key, self.index.look(key)) for key, _ in rows]:
                await self.index.evict(key, row.owner)
                age, n = time.time() - row.since, len(row.replicas)
                if abs(age) >= self.flags.grace and not row.owner:  # < 0: the clock was wrong
                    left += n
                    if thorough or random.random() * age < (8 + n) * self.pause:
                        proof = (204, 404) if age > self.flags.settle else (204,)
                        work.append(self.erase(key, random.sample(row.replicas, min(n, 32)), proof))
            left -= sum(await asyncio.gather(*work, asyncio.sleep(0, 0)))  # 0: a turn for others
        if left and not self.counters["files_to_delete"]:
            logging.warning("%d files still wait to be deleted", left)
        self.counters["files_to_delete"] = left
        self.index.env.reader_check()  # a reader that was killed pins old pages

    async def tick(self) -> None:  # try what is down, see how late we are
        now, last = time.monotonic(), self.ticked
        self.counters["event_loop_lag_seconds"], self.ticked = max(0.0, now - last - TICK), now
        for connection in [c for c in self.connections if c.due < now]:  # idle, or deaf
            connection.writer.transport.abort()
        for place in [p for p, (t, _) in self.volumes.down.items() if t <= now and "/" not in p]:
            self.volumes.probe(place)  # a location is tried by the next PUT


async def every(seconds: float, job: Callable) -> None:  # for at most a fifth of the time
    while True:
        began = time.monotonic()
        with contextlib.suppress(HTTPError, OSError):  # no room, no descriptor: later
            await job()
        await asyncio.sleep(max(seconds, 4 * (time.monotonic() - began)))


# --- maintenance ----------------------------------------------------------------------------------
# rebuild, rebalance, verify: for all files, or all keys, in constant memory, beside a live server.
# What they find goes to stdout, a line of JSON each; how far they are, to stderr.
class Maintenance(Store):  # one run of a command
    done, total, pace = 0, 0, (0.2 if sys.stderr.isatty() else 10)  # seconds between two reports

    def report(self, finding: str, key: bytes = b"", file: Any = None, **more: Any) -> None:
        self.found[finding] += 1
        where = {"location": file.location, "path": key2path(key, file.write_id)} if file else {}
        print(json.dumps({"finding": finding, "key": key.decode()} | where | more), flush=True)

    async def progress(self) -> None:  # on a terminal always in the same line
        rate, todo = max(0.1, self.done / (time.monotonic() - self.began)), self.total - self.done
        text = f"{self.done} of {self.total}, {rate:.0f}/s, {todo / rate:.0f} s left"
        print(text, dict(self.found), end=" \r" if self.pace < 1 else "\n", file=sys.stderr)

    async def run(self) -> int:
        """Do it. 0: all is well, 1: there are findings, 2: not all of it could be done."""
        self.began, self.found, command = time.monotonic(), Counter(), self.flags.command
        jobs = (TICK, self.tick), (self.pace, self.progress), (self.pause, self.sweep)
        _tasks = [asyncio.create_task(every(*job)) for job in jobs[: 2 + (command == "rebalance")]]
        try:
            if command != "rebuild":
                await self.for_keys(self.check if command == "verify" else self.move)
            if command == "rebalance":  # what was replaced goes when its readers have left
                await asyncio.sleep(self.flags.grace if self.index.count()[1] else 0)
                await self.sweep(thorough=True)
            else:
                await self.for_files(self.identify if command == "verify" else self.adopt)
        except (HTTPError, asyncio.CancelledError) as error:  # the latter by Ctrl-C
            self.report("unfinished", reason=str(error))
        print(f"{command}: {self.done} of {self.total}, {dict(self.found)}", file=sys.stderr)
        return 2 if self.found["unfinished"] + self.found["unreachable"] else 1 if self.found else 0

    async def for_keys(self, job: Callable) -> None:  # job(key, record), for 16 keys at a time
        self.total += self.index.count()[0]
        for rows in self.index.walk(self.index.keys, b"", 16):
            await asyncio.gather(*(job(key, parse_record(text)) for key, text in rows))
            for key, files in [(key, self.index.record(key).replicas) for key, _ in rows]:
                if files and [p for p, _ in files] != self.ranking(key, self.flags.replicas):
                    self.report("unbalanced", key)
            self.done += len(rows)

    async def for_files(self, job: Callable) -> None:  # job(key, file, size), for all on volumes
        self.condemn = self.flags.adopt_garbage or self.index.count()[0] > 0
        self.total += 257  # folders: "/", and one for each first byte of an MD5
        drives = [f"/sv{n:02X}" for n in range(self.flags.subvolumes) if self.flags.subvolumes > 1]
        self.places = [volume + drive for volume in self.flags.volumes for drive in ("", *drives)]
        for folder in "/", *map("/{:02x}/".format, range(256)):
            walks = [self.descend(place, folder, job) for place in self.places]
            ends = await asyncio.gather(*walks, return_exceptions=True)
            for place, error in [(p, e) for p, e in zip(self.places, ends, strict=True) if e]:
                if not self.flags.partial or not str(error).startswith(place):
                    raise error
                self.report("unreachable", location=place, reason=str(error))
                self.places.remove(place)
            self.done += 1

    async def descend(self, place: str, folder: str, job: Callable) -> None:
        """Run job(key, file, size) for all files below a folder; of "/" report what is odd. 503."""
        exchange, rows = self.volumes.exchange("GET", place, quote(folder)), None
        *pieces, (status, _) = [step async for step in exchange if step]  # None: it asks for a body
        with contextlib.suppress(ValueError):  # else a file, or unreachable
            rows = [] if status == 404 else json.loads(b"".join(pieces).decode(errors="replace"))
        require(rows is not None, 503, f"{place}{folder} cannot be listed: {status}")  # by place
        for row in rows:
            path = folder + row["name"]
            known = place + path in self.places or re.fullmatch(r"/([\da-f]{2}|lost\+found)", path)
            if row["type"] == "directory" and folder != "/" and "\ufffd" not in path:
                await self.descend(place, path + "/", job)
            elif not known:
                try:
                    key, write_id, size = *path2key(path), row["size"]
                except (KeyError, ValueError):
                    self.report("name", location=place, path=path)
                else:
                    await job(key, Replica(place, write_id), size)

    async def adopt(self, key: bytes, file: Replica, size: int) -> None:  # into the index
        for old in await self.index.do(Row.adopt, key, file, size, self.ranking(key), self.condemn):
            self.report("garbage", key, old)

    async def identify(self, key: bytes, file: Replica, _: int) -> None:  # report what nobody knows
        known = file in (row := self.index.look(key)).replicas + row.record.replicas
        if not known and await self.volumes.head(file[0], key2path(key, file[1])) != 404:
            self.report("unknown", key, file)

    async def check(self, key: bytes, record: Record) -> None:  # report what is wrong with a key
        wrong = await self.examine(key, record, self.flags.deep)
        if self.index.record(key) == record:  # else it has changed meanwhile
            for file in [file for file, finding in wrong.items() if finding]:
                self.report(wrong[file], key, file)
            if sum(f in ("", "unreachable") for f in wrong.values()) < self.flags.replicas:
                self.report("under-replicated", key)

    async def move(self, key: bytes, record: Record, deep: bool = False) -> None:  # home
        try:
            await self.rebalance(key, deep or self.flags.deep)
        except HTTPError as error:
            now, rotten = self.index.record(key), not deep and "few" not in error.reason
            if now != record or rotten:  # it has changed meanwhile, or a replica: once more
                await self.move(key, now, deep or rotten)
            elif now.replicas:
                self.report("failed", key, reason=error.reason)


# --- command line ---------------------------------------------------------------------------------
# Flags as the ancestor has them (one dash or two), the server process, the volumes of the demo.
def duration(text: str) -> float:  # seconds, from one as Go writes it: 300ms, 1h30m. ValueError
    require(re.fullmatch(r"0|([0-9]+\.?[0-9]*(h|ms|m|s))+", text), 400, text)
    parts = re.findall(r"([0-9]+\.?[0-9]*)(h|ms|m|s)", text)
    return sum(float(n) * {"h": 3600, "m": 60, "s": 1, "ms": 0.001}[unit] for n, unit in parts)


def addresses(text: str) -> tuple[str, ...]:  # of host:port,host:port,… ValueError for doubles
    volumes, address = text.split(","), re.compile(r"([\w.-]+|\[[0-9a-f:.]+\]):[0-9]{1,5}")
    require(all(map(address.fullmatch, volumes)) and len({*volumes}) == len(volumes), 400, text)
    return tuple(volumes)


def parse_flags(parser: argparse.ArgumentParser) -> argparse.Namespace:  # checked, with defaults
    parser.add_argument("command", choices=["server", "rebuild", "rebalance", "verify"])
    for name, kind, default, text in (
        ("volumes", addresses, DEMO, "host:port,… (without: three of its own, to look around)"),
        ("db", Path, Path("mkv-data/index"), "folder of the index"),
        ("port", int, 3000, "port to listen on"),
        ("bind", str, "", "address to listen on (all; 127.0.0.1 without -volumes)"),
        ("replicas", int, 3, "copies of each value"),
        ("subvolumes", int, 10, "drives a volume, 1 to 256"),
        ("fallback", addresses, (), "host:port,… to redirect to when a key is not here"),
        ("md5sum", ("false", "true").index, True, "keep the MD5 of values: true or false"),
        ("voltimeout", duration, 1.0, "how long a volume may be silent; 0: always ask"),
        ("settle", duration, 3600.0, "after this time no request can still take effect"),
        ("grace", duration, 60.0, "how long replaced files stay for readers on their way"),
        ("userpass", str, os.environ.get("MKV_USERPASS", ""), "user:password, for the volumes"),
        ("basicauth", None, False, "let in only whom the volumes let in"),
        ("expiry", duration, 3600.0, "how long redirects are good that are signed, by $MKV_SECRET"),
        ("workers", int, 1, "processes that share port and index"),
        ("maxconns", int, min(os.sysconf("SC_OPEN_MAX") // 5, 1 << 20), "connections of clients"),
        ("protect", None, False, "UNLINK before DELETE"),
        ("v", None, False, "log every request"),
        ("deep", None, False, "verify, rebalance: compare the MD5 of every replica, too"),
        ("partial", None, False, "rebuild, verify: pass over locations that do not answer"),
        ("adopt-garbage", None, False, "rebuild: delete what is not a value, in a new index too"),
    ):
        how = {"type": kind, "default": default} if kind else {"action": "store_true"}
        parser.add_argument(f"-{name}", f"--{name}", help=text, **how)
    flags = parser.parse_args()
    flags.bind = flags.bind or ("127.0.0.1" if flags.volumes is DEMO else "0.0.0.0")
    limits = {"port": 65535, "subvolumes": 256, "replicas": len(flags.volumes), "workers": 256}
    for name, most in (limits | {"maxconns": 1 << 20}).items():
        if not 1 <= getattr(flags, name) <= most:
            parser.error(f"-{name} is 1 to {most}")
    return flags


def listen(flags: argparse.Namespace, index: Index) -> socket.socket:
    """A socket at the port, which only servers of the same index share. OSError."""
    name = hashlib.md5(f"{flags.bind}:{flags.port}".encode()).hexdigest()
    share = index.take(name[14:], how=LOCK_EX) and not index.take(name)  # waits for other starts
    kind = socket.AF_INET6 if ":" in flags.bind else socket.AF_INET
    sock = socket.create_server((flags.bind.strip("[]"), flags.port), family=kind, reuse_port=share)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # from now on
    index.take(name, how=LOCK_SH)
    index.take(name[14:], how=LOCK_UN)
    return sock


async def serve(store: Store, listener: socket.socket, said: str) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is in hand, or has connected already."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    queue, opened = listener.dup(), lambda: Connection(store)
    server = await loop.create_server(opened, sock=listener, backlog=4096)
    print(said, flush=True)
    jobs = every(store.pause, store.sweep), every(TICK, store.tick), stop.wait()
    await next(asyncio.as_completed(jobs))  # a signal came; or it raises what ended another job
    server.close()
    store.draining, began = True, time.monotonic()
    signal.alarm(10 + DRAIN_TIME)  # kills: a frozen process may hold the lock of the index
    with queue, contextlib.suppress(OSError):  # it is empty, or there are too many
        while time.monotonic() < began + DRAIN_TIME:
            await loop.connect_accepted_socket(opened, queue.accept()[0])
    while await asyncio.sleep(0.02, store.connections):  # those just accepted, too
        for each in list(store.connections):  # an idle one has a second to ask once more
            if time.monotonic() - began > (1 if each.idle and not each.unsent() else DRAIN_TIME):
                each.writer.transport.abort()


def main() -> None:
    bytes(1 << 24)  # glibc learns not to return, and fault in again, the memory of large pieces
    parser = argparse.ArgumentParser("mkv.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    flags = parse_flags(parser)
    logging.basicConfig(format="%(asctime)s %(message)s", level="DEBUG" if flags.v else "INFO")
    url, names = f"http://{flags.bind}:{flags.port}", ",".join(flags.volumes)
    if flags.command == "server" and (flags.volumes is DEMO or flags.workers > 1):
        os.environ |= {"SUBVOLUMES": f"{flags.subvolumes}", "WORKERS": f"{flags.workers}"}
        script = str(Path(__file__).with_name("volume.sh"))  # it starts this again, as often
        again = [sys.executable, *sys.argv, "-workers=1", "-bind", flags.bind, "-volumes", names]
        os.execv(script, [script, "demo" if flags.volumes is DEMO else "servers", url, *again])
    try:
        index = Index(flags.db, flags.command in ("server", "rebuild"))
        require(flags.command != "rebuild" or index.take("0", 0), 503, "another process uses it")
        listener = listen(flags, index) if flags.command == "server" else None
    except (OSError, lmdb.Error, ValueError) as error:
        parser.error(f"cannot use -db {flags.db} and -port {flags.port}: {error}")
    at = f"mkv is at {url}, its index in {flags.db}, its volumes at {names}"
    job = serve(Store(flags, index), listener, at) if listener else Maintenance(flags, index).run()
    status = uvloop.run(job)
    index.commit(index.kept + index.queue)  # what nobody waits for
    sys.exit(status)


if __name__ == "__main__":
    main()
