# /// script
# requires-python = ">=3.11"
# dependencies = ["uvloop", "lmdb>=3,<4", "aiofiles"]
# ///
"""mkv: a distributed key-value store for blobs. This file is the server; stock nginx has the bytes.

The life of a file: intended (a line in the intents), written, vouched for (a record names it),
garbage, gone. Only forward, and no name is used twice. All else rests on that.
"""
import asyncio
import hashlib
import logging
import os
import random
import re
import sys
from base64 import b64decode, b64encode
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from errno import EMFILE, ENFILE
from fcntl import LOCK_EX, LOCK_NB, lockf
from functools import lru_cache, partial
from http import HTTPStatus
from importlib import import_module
from itertools import chain, islice, repeat
from pathlib import Path
from time import monotonic, time
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote_to_bytes

import lmdb

MAX_KEY, MAX_HEAD, MAX_FIELDS = 511, 16384, 100  # bytes: LMDB's limit; twice nginx's; as Apache's
HEAD_TIME, IDLE_TIME, LINGER_TIME = 10, 75, 5  # seconds: for a head, to the next, for a refusal
BODY_TIME, BODY_RATE = 60, 1024  # seconds of silence in a body; bytes a second: slower is 408
PIECE, TURN = 1 << 18, 256  # bytes handed on at once; chunks, rows, folders between others' turns
PROBE, TICK = 0.5, 0.1  # seconds: between looks at a volume; between ticks
md5 = partial(hashlib.md5, usedforsecurity=False)

class HTTPError(ValueError):
    """A refusal: a status, a sentence that says why, and perhaps header lines (each with CR LF)."""
    def __init__(self, status: int, reason: str, fields: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.fields = status, reason, fields

def require(condition: Any, status: int, reason: str, fields: str = "") -> None:
    """Raise HTTPError unless a condition holds."""
    if not condition:
        raise HTTPError(status, reason, fields)
# --- placement ------------------------------------------------------------------------------------
# Where a key's files lie, in minikeyvalue's layout. A location is "host:port" (a volume of one
# drive) or "host:port/svXX". A write id is 16 hex digits: 8 of seconds since 1970, 8 random.
def new_id(seconds: int) -> str:
    """A write id of that time that nobody else has. 503: the time is beyond 2106."""
    require(0 <= seconds < 1 << 32, 503, "the clock, or a write id, is wrong")
    return f"{seconds:08x}{os.urandom(4).hex()}"

@lru_cache(4096)
def written(write_id: str) -> int:
    """Seconds since 1970, from a write id; 0 without one: what minikeyvalue wrote is older."""
    return int("0" + re.match("[0-9a-f]{0,8}", write_id)[0], 16)

@lru_cache(4096)
def key2path(key: bytes, write_id: str = "") -> str:
    """The path of a file at its location: two bytes of the key's MD5, its base64, its write id."""
    digest, name = md5(key).hexdigest(), b64encode(key).decode()
    if write_id and len(name) > 230:  # a name has 255 at most; "/" in base64 makes sub-folders
        name = re.sub(r"[^/]{230}(?=[^/])", r"\g<0>-/", name)
    return f"/{digest[:2]}/{digest[2:4]}/{name}" + (f"-{write_id}" if write_id else "")

@lru_cache(4096)
def path2key(path: str) -> tuple[bytes, str]:
    """Key and write id ("" if none) of the file with this path. ValueError: not our file."""
    name, _, write_id = path[7:].replace("-/", "").partition("-")
    key = b64decode(name)
    right = key.decode()[:1] == "/" and 1 < len(key) <= MAX_KEY and key2path(key, write_id) == path
    require(right and re.fullmatch("([0-9a-f]{16})?", write_id), 400, "no key has such a file")
    return key, write_id

def key2volume(key: bytes, volumes: Sequence[str], replicas: int, subvolumes: int) -> list[str]:
    """The first `replicas` locations in the key's ranking: by md5(key + volume), highest first."""
    scores = sorted([(md5(key + v.encode()).digest(), v) for v in volumes], reverse=True)
    drive = "/sv{:02X}" if subvolumes > 1 else ""
    return [v + drive.format(int.from_bytes(s[12:]) % subvolumes) for s, v in scores[:replicas]]
# --- record ---------------------------------------------------------------------------------------
# What the index knows of a key: [DELETED][HASH<32 hex>]<location>,<location>@<id>,…[ <size> <id>]
# Without size and id it is minikeyvalue's record, byte for byte.
RECORD = r"(DELETED)?(?:HASH([0-9a-f]{32}))?([^\0- ]+)(?: ([0-9]{1,18})(?: ([0-9a-f]{16}))?)?"

class Replica(NamedTuple):
    """One file of a key."""
    location: str
    write_id: str
    def at(self, key: bytes) -> tuple[str, str]:
        """Its location, and its path there."""
        return self.location, key2path(key, self.write_id)

class Record(NamedTuple):
    """A value: where it is, and what is known of it. Without replicas there is none."""
    replicas: tuple[Replica, ...] = ()  # in ranking order
    size: int | None = None  # bytes; None: minikeyvalue wrote it
    write_id: str = ""  # of the replicas that have no other
    hash: str = ""  # MD5 in hex, if it is known
    deleted: bool = False  # unlinked: hidden, but the files stay
    error: str = ""  # why it cannot be read: then only DELETE helps
    live = property(lambda self: bool(self.replicas) and not self.deleted)  # does a GET find it?
    def text(self) -> bytes:
        """As the index stores it; parse_record() is the inverse."""
        mark = ("DELETED" if self.deleted else "") + (f"HASH{self.hash}" if self.hash else "")
        files = [r.location if r.write_id == self.write_id else "@".join(r) for r in self.replicas]
        size = "" if self.size is None else f" {self.size} {self.write_id}".rstrip()
        return f"{mark}{','.join(files)}{size}".encode() if files else b""

@lru_cache(4096)
def parse_record(text: bytes) -> Record:
    """The record that has this text."""
    match = re.fullmatch(RECORD, text.decode(errors="replace"))
    if not match:
        return Record(error=f"the index has no record here: {text[:200]!r}" if text else "")
    deleted, digest, files, size, write_id = match.groups("")
    parts = [file.partition("@") for file in files.split(",") if file]
    replicas = tuple(Replica(location, own if at else write_id) for location, at, own in parts)
    return Record(replicas, int(size) if size else None, write_id, digest, bool(deleted))

@lru_cache(64)
def parse_garbage(text: bytes) -> dict[Replica, float]:
    """Files, with since when they are garbage, from "<since> <location>@<id>,…"."""
    try:
        parts = [re.split("[ @]", part) for part in text.decode().split(",") if part]
        return {Replica(location, write_id): float(since) for since, location, write_id in parts}
    except ValueError:
        logging.error("this garbage cannot be read, and is passed over: %a", text[:200])
        return {}
# --- operations -----------------------------------------------------------------------------------
# All that ever changes in the index: functions of a key's row and plain arguments, which return the
# new row and an answer, or raise HTTPError and change nothing. Pure: `now` is the index's clock.
class Condition(NamedTuple):
    """What the record must be for a write to take its place: free, or `taken` is the status."""
    taken: int = 403
    is_move = False  # a move may be a copy, of the time of the original
    md5: str = ""  # in hex, of the value, if it is told
    def check(self, record: Record) -> None:
        """403, 412; others (contrib/) may say 409."""
        require(not record.live, self.taken, "the key exists: DELETE it first")

class Row(NamedTuple):
    """A key in both tables, at a time: its record, and its garbage, each file with since when."""
    record: Record
    garbage: dict[Replica, float]  # seconds since 1970, by the index's clock, as `now`
    now: float
    def newest(self) -> int:
        """The time of the newest write that is known of, in seconds since 1970; -1: none."""
        return max([-1, *(written(f.write_id) for f in (*self.record.replicas, *self.garbage))])
    def with_record(self, record: Record, files: Iterable[Replica] = ()) -> "Row":
        """With another record. What it does not name of the old one, and of `files`, is garbage."""
        lost = dict.fromkeys((*self.record.replicas, *files), self.now) | self.garbage
        return Row(record, {f: t for f, t in lost.items() if f not in record.replicas}, self.now)
    def garbage_text(self) -> bytes:
        """As the index stores it; parse_garbage() is the inverse."""
        return ",".join(f"{t:.3f} {'@'.join(f)}" for f, t in self.garbage.items()).encode()
    def commit(self, new: Record, condition: Condition, waste: Sequence[Replica]) -> tuple:
        """Vouch for a write; `waste` are its files that failed. The old record. 403, 409, 412."""
        condition.check(self.record)
        is_copy = condition.is_move and written(new.write_id) == written(self.record.write_id)
        later = is_copy or written(new.write_id) > self.newest()
        require(later, 409, "a later write of this key is known")
        require(self.garbage.keys().isdisjoint(new.replicas), 503, "a file's name was used twice")
        return self.with_record(new, waste), self.record
    def waste(self, files: Sequence[Replica]) -> tuple:
        """Give files up: those that are garbage now, and whether the record names any."""
        lost = [file for file in files if file not in self.record.replicas]
        return self.with_record(self.record, lost), (lost, len(lost) < len(files))
    def remove(self, protect: bool) -> tuple:
        """Forget the value; its files are garbage. The old record. 404, 403."""
        require(self.record.replicas or self.record.error, 404, "no such key")
        require(self.record.deleted or self.record.error or not protect, 403, "UNLINK it first")
        return self.with_record(Record()), self.record
    def unlink(self) -> tuple:
        """Hide the value. 404."""
        require(self.record.live, 404, "no such key")
        return self._replace(record=self.record._replace(deleted=True)), None
    def settle(self, gone: Sequence[Replica]) -> tuple:
        """Strike out garbage that is gone. What is from when the clock was ahead is of now."""
        left = {f: min(t, self.now) for f, t in self.garbage.items() if f not in gone}
        return self._replace(garbage=left), None

def run_operations(rows: dict[bytes, Row], jobs: Sequence[tuple]) -> list[Any]:
    """Run (operation, key, *arguments) in turn on rows: answers, or the HTTPErrors they raise."""
    answers = []
    for operation, key, *args in jobs:
        try:
            error = rows[key].record.error
            require(not error or operation is Row.remove, 500, error)
            rows[key], answer = operation(rows[key], *args)
        except HTTPError as error:
            answer = error
        answers.append(answer)
    return answers
# --- index ----------------------------------------------------------------------------------------
# Two tables. keys: key → record. garbage: key → files that may exist and that no record names.
# Only operations write; what they answer is on disk. One process has a folder to itself.
class Group:
    """Group commit: jobs that come while a batch of them is at work share the next one."""
    def __init__(self, work: Callable, limit: int = 1, pause: float = 0) -> None:
        self.work, self.limit = work, limit  # jobs → answers, or HTTPErrors; batches at a time
        self.pause = pause  # seconds, after a batch of many: more come to share the next one
        self.jobs, self.running = [], set()
    def do(self, *job: Any) -> asyncio.Future:
        """A future of the job's answer; the job is done even if that is cancelled."""
        future = asyncio.get_running_loop().create_future()
        self.jobs.append((job, future))
        if len(self.running) < self.limit:
            self.running.add(asyncio.create_task(self._run()))
        return future
    async def _run(self) -> None:  # leaves in the step that finds no jobs: none is overlooked
        while self.jobs:
            jobs, futures = zip(*self.jobs, strict=True)
            self.jobs = []
            try:
                answers = await self.work(jobs)
            except Exception as error:  # is everybody's answer
                answers = [error] * len(jobs)
            for future, answer in zip(futures, answers, strict=True):
                failed, waits = isinstance(answer, Exception), not future.done()
                if waits:
                    future.set_exception(answer) if failed else future.set_result(answer)
            if len(jobs) > 3:
                await asyncio.sleep(self.pause)
        self.running.discard(asyncio.current_task())

def take_lock(path: Path, address: str) -> Any:
    """Hold a file alone while this process lives; it says where we are. 503: another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    with suppress(BlockingIOError):
        lockf(file, LOCK_EX | LOCK_NB)
        file.truncate(0)
        print(address, end="", file=file, flush=True)
        return file
    raise HTTPError(503, f"{path.parent} is used by {path.read_text()}")

class LMDB:
    """The embedded index: an LMDB in a folder, with a thread for write transactions. 503."""
    immediate = True  # record() does not wait
    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.lock = folder, take_lock(folder / "alive", address)
        self.env = lmdb.open(str(folder), map_size=1 << 40, max_dbs=3)
        self.keys, self.garbage = self.env.open_db(b"keys"), self.env.open_db(b"garbage")
        self.thread, self.group = ThreadPoolExecutor(1), Group(self._work, pause=0.001)
        self.do = self.group.do  # (operation, key, *arguments): a future of the answer
        self.commits, self.seconds = 0, 0.0
        self.id = self.env.begin().get(b"id", os.urandom(16).hex().encode()).decode()
        self.save([(None, b"id", self.id.encode())])
    def record(self, key: bytes) -> Record:
        """A key's record, without waiting."""
        return parse_record(self.env.begin().get(key, b"", db=self.keys))
    async def row(self, key: bytes) -> Row:
        """A key's row."""
        with self.env.begin() as txn:
            texts = txn.get(key, b"", db=self.keys), txn.get(key, b"", db=self.garbage)
        return Row(parse_record(texts[0]), parse_garbage(texts[1]), time())
    async def _work(self, jobs: Sequence[tuple]) -> list[Any]:  # the answers of operations. 503
        old = {key: await self.row(key) for _, key, *_ in jobs}
        rows = dict(old)
        answers = run_operations(rows, jobs)
        changes = []
        for key, row in [(key, row) for key, row in rows.items() if row is not old[key]]:
            if row.record != old[key].record:
                changes.append((self.keys, key, row.record.text()))
            if row.garbage != old[key].garbage:
                changes.append((self.garbage, key, row.garbage_text()))
            changes = changes or [(None, b"id", self.id.encode())]  # /?ready tries a commit
        if changes:
            await asyncio.get_running_loop().run_in_executor(self.thread, self.save, changes)
        return answers
    def save(self, changes: Sequence[tuple]) -> None:
        """Put (table, key, text), or delete what has none; on disk when this returns. 503."""
        began = monotonic()
        try:
            self.env.reader_check()  # a reader that was killed pins old pages
            with self.env.begin(write=True) as txn:
                for table, key, text in changes:
                    txn.put(key, text, db=table) if text else txn.delete(key, db=table)
        except lmdb.Error as error:
            raise HTTPError(503, f"the index cannot be written: {error}") from error
        self.commits, self.seconds = self.commits + 1, self.seconds + monotonic() - began
    async def walk(self, table: Any, start: bytes, most: int = 2000) -> AsyncIterator[list[tuple]]:
        """Rows of `keys` or `garbage` from `start` on, in batches; no transaction outlasts one."""
        while start is not None:
            with self.env.begin(table) as txn, txn.cursor() as cursor:
                rows = list(islice(cursor.iternext(), most)) if cursor.set_range(start) else []
            yield rows
            start = rows[-1][0] + b"\0" if rows else None
    async def count(self) -> tuple[int, int]:
        """Of keys, and of keys that have garbage."""
        with self.env.begin() as txn:
            return txn.stat(self.keys)["entries"], txn.stat(self.garbage)["entries"]

class Intents:
    """The files that are being made: an append-only file that survives kill -9 of this process.

    "+ path location,…" stands there before a byte goes there, "- path" when the write is over.
    The first line names index and inode: in a copy they are another life's."""
    def __init__(self, path: Path, index_id: str) -> None:
        self.path, self.title = path, f"mkv {index_id}"
        self.open: dict[str, list[str]] = {}  # path → locations, of writes that are not over
        lines = path.read_text(errors="replace").split("\n") if path.exists() else [""]
        ours = path.exists() and lines[0] == f"{self.title} {path.stat().st_ino}"
        for line in lines[1:-1]:  # the last one is empty, or torn
            sign, name, places = [*line.split(" "), "", ""][:3]
            with suppress(ValueError):
                path2key(name)
                require(ours and sign in ("+", "-"), 400, "")  # the warning below tells it
                made = self.open.pop(name, []) + list(filter(None, places.split(",")))
                self.open |= {name: made} if sign == "+" else {}
                continue
            logging.warning("%s: of another life, or no intent: %a", path, line)
        self._rewrite()
    def _rewrite(self) -> None:  # with what is open. OSError
        new = Path(f"{self.path}.new")
        file = new.open("wb", buffering=0)
        lines = [f"\n+ {path} {','.join(places)}" for path, places in self.open.items()]
        text = f"{self.title} {os.fstat(file.fileno()).st_ino}{''.join(lines)}\n"
        self._append(file, text)
        new.rename(self.path)
        self.file, self.left = file, len(text) + (1 << 20)  # bytes until it is rewritten
    def _append(self, file: Any, text: str) -> None:  # all of it, or nothing. OSError
        data, done = text.encode(), 0
        with suppress(OSError):
            done = file.write(data)
        if done < len(data):
            file.truncate(file.seek(-done, os.SEEK_CUR))
            raise OSError(f"no room for {self.path}")
    def begin(self, path: str, places: Sequence[str]) -> None:
        """Note that files are going to be made. 503."""
        line = f"+ {path} {','.join(places)}\n"
        self.left -= 2 * len(line)  # with its end
        try:
            if self.left < 0:
                self._rewrite()
            self._append(self.file, line)
        except OSError as error:
            raise HTTPError(503, f"the intents cannot be written: {error}") from error
        self.open.setdefault(path, []).extend(places)
    def end(self, path: str) -> None:
        """Note that a write is over. If that fails, the next life has one more to look at."""
        del self.open[path]
        with suppress(OSError):
            self._append(self.file, f"- {path}\n")
# --- http -----------------------------------------------------------------------------------------
# HTTP/1.1 by hand (RFC 9112). What could be read in two ways is refused, and so is all that comes
# after it: no request is smuggled past a proxy. No expression here backtracks: linear in its input.
LINE = re.compile(rb"([A-Z]+) (?:http://[^/?# ]*)?(/[^?# ]*)(?:\?([^# ]*))? HTTP/1\.([01])\r\n")
STATUS = re.compile(rb"HTTP/1\.[01] ([2-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?\r\n")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
NOISE = re.compile(rb"(?m)^(?:Date|Location|Last-Modified|ETag): [^\r\n]*\r\n")  # not needed
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
ODD = re.compile(rb"[\0-\x1f\x7f]|%(?![0-9A-Fa-f]{2})")
METHODS = ("GET", "HEAD", "PUT", "DELETE", "UNLINK", "REBALANCE")
ALLOW = f"Allow: {', '.join(METHODS)}\r\n"
TEXT, END = "Content-Type: text/plain; charset=utf-8\r\n", b"\r\n\r\n"
BROKEN = (OSError, EOFError, ValueError, OverflowError, RuntimeError)  # what a connection raises

class Request(NamedTuple):
    """The head of a request."""
    method: str = "-"
    path: bytes = b"-"  # as it was sent
    query: bytes | None = None  # None: there was no "?"
    key: bytes = b""
    fields: dict[bytes, bytes] = {}  # by lower-case name
    length: int | None = 0  # bytes of the body; None: in chunks
    close: bool = True  # no other request comes on this connection

@lru_cache(64)  # a client sends the same ones again and again
def parse_fields(text: bytes) -> tuple[dict[bytes, bytes], int | None, bool]:
    """Fields by lower-case name, length of the body (None: chunked), last one? 400, 431, 501."""
    lines, fields = text.split(b"\r\n")[:-2], {}
    require(len(lines) <= MAX_FIELDS, 431, f"a head has at most {MAX_FIELDS} fields")
    for line in lines:  # not folded, no space before the colon, no bare CR or LF
        match = FIELD.fullmatch(line)
        require(match, 400, "malformed header field")
        name, value = match[1].lower(), match[2].strip(b" \t")
        fields[name] = fields[name] + b"," + value if name in fields else value
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length", b"0")
    require(re.fullmatch(rb"[0-9]{1,18}", length), 400, "malformed Content-Length")
    require(not coding or b"content-length" not in fields, 400, "two lengths of one body")
    require(coding is None or coding.lower() == b"chunked", 501, "the only coding is chunked")
    options = fields.get(b"connection", b"").lower().translate(None, b" \t").split(b",")
    return fields, int(length) if coding is None else None, b"close" in options

def parse_request(head: bytes) -> Request:
    """The request with this head. 400, 405, 414, 431, 501."""
    line = LINE.match(head)
    require(line, 400, "malformed first line")
    fields, length, close = parse_fields(head[line.end() :])
    method, path, query, minor = line.groups()
    http11, key = minor == b"1", unquote_to_bytes(path)
    require(not http11 or b"," not in fields.get(b"host", b","), 400, "no Host, or several")
    require(http11 or length is not None, 400, "chunked in HTTP/1.0")
    require(method.decode() in METHODS, 405, "no such method", ALLOW)
    require(len(key) <= MAX_KEY, 414, f"a key has at most {MAX_KEY} bytes")
    right = key.decode(errors="ignore").encode() == key and not ODD.search(line[0][:-2])
    require(right, 400, "a key is UTF-8, percent-encoded")
    fields = fields if http11 else fields | {b"expect": b""}  # RFC 9110, 10.1.1
    return Request(method.decode(), path, query, key, fields, length, close or not http11)
parse_short = lru_cache(1024)(parse_request)  # of those that clients send again and again

@lru_cache(64)  # without NOISE, volumes say the same again and again
def parse_answer(head: bytes) -> tuple[int, dict[bytes, bytes], int | None, bool]:
    """The status of an answer, and its fields as above. 400, 431, 501, 503."""
    line = STATUS.match(head)
    require(line, 503, "it speaks no HTTP")
    return int(line[1]), *parse_fields(head[line.end() :])

@lru_cache(256)
def response(status: int, fields: str = "", body: bytes = b"") -> bytes:
    """The bytes of an answer; each line of `fields` ends in CR LF."""
    length = "" if status in (100, 204) else f"Content-Length: {len(body)}\r\n"
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{length}{fields}\r\n".encode() + body

def refusal(error: Exception) -> bytes:
    """The answer that tells of an error."""
    if isinstance(error, TimeoutError):
        error = HTTPError(408, "too slow")
    if isinstance(error, (EOFError, OSError)):
        error = HTTPError(400, "the request ended early")
    if not isinstance(error, HTTPError):
        logging.error("this is a bug", exc_info=error)
        error = HTTPError(500, "this is a bug: see the log")
    return response(error.status, TEXT + error.fields, error.reason.encode() + b"\n")

class Wire(asyncio.Protocol):
    """A connection: what has come and nobody has read, and waiting, by one task at a time.

    Deadlines are of monotonic(); what is raised is BROKEN."""
    def __init__(self) -> None:
        self.there, self.ended = bytearray(), False  # ended: no more will come
        self.waiter, self.deadline, self.alarm, self.rings = None, 0.0, None, float("inf")
    def connection_made(self, transport: asyncio.Transport) -> None:
        """It begins."""
        self.transport, self.loop = transport, asyncio.get_running_loop()
    def data_received(self, data: bytes) -> None:
        """Keep it; no more comes while there is much."""
        self.there += data
        if len(self.there) > MAX_HEAD:
            self.transport.pause_reading()
        self.resume_writing()
    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        self.ended = True
        self.resume_writing()
        if self.alarm:
            self.alarm.cancel()
    def resume_writing(self) -> None:
        """Something has happened: who waits is woken."""
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)
    async def _wait(self, deadline: float, over: bool) -> None:  # until something happens
        if over:
            raise EOFError("it closed the connection")
        self.waiter, self.deadline = self.loop.create_future(), deadline
        if deadline < self.rings:
            self._ring()
        await self.waiter
    def _ring(self) -> None:  # one alarm for many waits: it may ring when its own is long over
        if self.alarm:
            self.alarm.cancel()
        left, self.rings = self.deadline - monotonic(), float("inf")
        if not self.waiter.done() and left <= 0:
            self.waiter.set_exception(TimeoutError())
        elif not self.waiter.done():
            self.rings, self.alarm = self.deadline, self.loop.call_later(left, self._ring)
    async def drain(self, deadline: float, most: int = 0) -> None:
        """Until what was written is sent, but for so many bytes."""
        while self.transport.get_write_buffer_size() > most:
            await self._wait(deadline, self.transport.is_closing())
    async def more(self, deadline: float) -> None:
        """Until more has come."""
        await self._wait(deadline, self.ended)
    def take(self, most: int) -> bytearray:
        """What has come, so many bytes of it at most."""
        piece = self.there[:most]
        del self.there[:most]
        if len(self.there) <= MAX_HEAD:
            self.transport.resume_reading()
        return piece
    async def until(self, end: bytes, deadline: float) -> bytes:
        """All that comes up to the end of a line or head, with it. 431."""
        while end not in self.there[:MAX_HEAD]:
            require(len(self.there) < MAX_HEAD, 431, "too long a line")
            await self.more(deadline)
        return bytes(self.take(self.there.find(end) + len(end)))

class Body:
    """The body of a message, piece by piece. What it raises is BROKEN."""
    def __init__(self, wire: Wire, length: int | None, seconds: float, ask: Any = None) -> None:
        self.wire, self.ended, self.ask = wire, length == 0, ask  # ask: send 100 Continue, once
        self.left, self.chunked, self.begun = length or 0, length is None, False  # of body or chunk
        self.seconds = self.allowed = seconds  # to wait; BODY_RATE bytes earn one more
    async def read(self) -> bytes | bytearray:
        """The next piece; nothing at the end."""
        if self.ask:
            self.ask()
        self.ask, began = None, monotonic()
        if self.ended:
            return b""
        deadline = began + self.allowed
        piece = await (self._gather(deadline) if self.chunked else self._part(deadline))
        earned = len(piece) / BODY_RATE + began - monotonic()
        self.allowed = min(self.seconds, self.allowed + earned)
        return piece
    async def _part(self, deadline: float) -> bytearray:  # of the body, or chunk; at least a byte
        while not self.wire.there:
            await self.wire.more(deadline)
        piece = self.wire.take(min(self.left, PIECE))
        self.left -= len(piece)
        self.ended = not self.left and not self.chunked
        return piece
    async def _gather(self, deadline: float) -> bytearray:  # chunks that have come: perhaps tiny
        piece, turn = bytearray(), 0
        while True:
            if not self.left:  # RFC 9112, 7.1
                end = await self.wire.until(b"\r\n", deadline) if self.begun else b"\r\n"
                require(end == b"\r\n", 400, "a chunk is longer than it says")
                line = CHUNK.fullmatch(await self.wire.until(b"\r\n", deadline))
                require(line, 400, "malformed chunk")
                self.begun, self.left = True, int(line[1], 16)
            if not self.left:
                trailer = await self.wire.until(b"\r\n", deadline)
                while trailer != b"\r\n" and trailer[-4:] != END:
                    trailer += await self.wire.until(b"\r\n", deadline)
                    require(len(trailer) <= MAX_HEAD, 431, "too long a trailer")
                parse_fields(trailer)
                self.ended = True
                return piece
            piece += await self._part(deadline)
            if len(piece) >= PIECE or len(self.wire.there) < (1 if self.left else 5):
                return piece  # b"\r\n0\r\n" has 5
            turn += 1
            if turn % TURN == 0:
                await asyncio.sleep(0)  # the others' turn

class Connection(Wire):
    """A client's connection. No task is cancelled: who has left is the end of the body."""
    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store, self.idle = store, False  # idle: no request is under way
        self.last, self.empty = False, 0  # is it the last request? empty lines before one
    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has come."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # drain() waits until all is sent
        self.task = asyncio.create_task(self._converse())
    def eof_received(self) -> bool:
        """The client asks no more, but may still read."""
        self.ended = True
        self.resume_writing()
        return True
    def data_received(self, data: bytes) -> None:
        """A short GET that comes alone is answered here, from the index alone."""
        alone = self.idle and data[:4] == b"GET " and data.find(END) == len(data) - 4 < 1024
        if alone and not self.there and not self.transport.get_write_buffer_size():
            with suppress(HTTPError):  # _converse() will say so
                began, request, self.empty = monotonic(), parse_short(data), 0
                plain = request.query is None and request.length == 0 and not request.close
                if plain and self.store.gets_at_once and len(request.key) > 1:
                    answer = self.store.get(request, self.store.index.record(request.key))
                    self.deadline = began + IDLE_TIME
                    return self._respond(request, answer, began)
        return super().data_received(data)
    async def _converse(self) -> None:
        crowd = self.store.connections
        crowd.add(self)
        if len(crowd) > self.store.most_connections:
            self.last = True
            self._respond(Request(), refusal(HTTPError(503, "too many connections")), monotonic())
        with suppress(*BROKEN):  # the client has left, or might as well have
            require(len(crowd) < self.store.most_connections + 32, 503, "there is no room to wait")
            while not self.last:
                await self._next()
                await asyncio.sleep(0)  # the others' turn
                await self.drain(monotonic() + IDLE_TIME)
            self.transport.write_eof()  # a close at once would reset the answer away
            ends = monotonic() + LINGER_TIME
            while True:
                self.take(PIECE)
                await self.more(ends)
        crowd.discard(self)
        with suppress(*BROKEN):
            await self.drain(monotonic() + IDLE_TIME)
        self.transport.abort()
    async def _next(self) -> None:  # wait for a request, and answer it. BROKEN
        self.idle = True
        while len(self.there) < 2:
            await self.more(monotonic() + IDLE_TIME)
        self.idle = False
        if self.there[:2] == b"\r\n" and self.empty < 10:  # RFC 9112, 2.2
            self.take(2)
            self.empty += 1
        else:
            self.empty = 0
            await self._serve()
    async def _serve(self) -> None:  # answer a request. BROKEN
        request, began = Request("HEAD" if self.there[:2] == b"HE" else "-"), monotonic()
        body = Body(self, 0, BODY_TIME)
        try:
            request = parse_request(await self.until(END, began + HEAD_TIME))
            waits = request.fields.get(b"expect", b"").lower() == b"100-continue"
            go_on = partial(self.transport.write, response(100)) if waits else None
            body = Body(self, request.length, BODY_TIME, go_on)
            answer = await self.store.answer(request, body)
            head = answer if isinstance(answer, bytes) else await anext(answer)
        except Exception as error:  # of a client, of ours, or a bug: the answer tells
            head = answer = refusal(error)
        self.last = request.close or not body.ended or not isinstance(answer, bytes)
        self._respond(request, head, began)
        if isinstance(answer, bytes) or request.method == "HEAD":
            return
        async for piece in answer:
            self.transport.write(piece)
            await self.drain(monotonic() + IDLE_TIME)
            await asyncio.sleep(0)  # the others' turn
    def _respond(self, request: Request, answer: bytes, began: float) -> None:
        self.last = self.last or self.store.draining
        if self.last:
            answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        self.transport.write(answer[: answer.find(END) + 4] if request.method == "HEAD" else answer)
        self.store.note(request, answer[9:12], monotonic() - began)
# --- volumes --------------------------------------------------------------------------------------
# What nginx holds. A look at each volume, twice a second, says which drives are there.
class Volume:
    """One volume: its kept connections, the drives that the last look has shown, what is amiss."""
    def __init__(self, name: str, flags: Any) -> None:
        drives = [f"sv{number:02X}" for number in range(flags.subvolumes) if flags.subvolumes > 1]
        self.drives = self.expected = frozenset([".", *drives])  # "." may have older files
        self.name, self.timeout, self.looks, self.state, self.id = name, flags.voltimeout, 0, "", ""
        self.idle, self.most_idle = [], os.sysconf("SC_OPEN_MAX") // 4 // len(flags.volumes)
        basic = b64encode(flags.userpass.encode(errors="surrogateescape")).decode()
        self.login = f"Authorization: Basic {basic}\r\n" if basic else ""
    async def watch(self) -> None:
        """Look twice a second what is there, over a new connection: it may find a frozen worker."""
        for pause in chain((0,), repeat(PROBE)):
            await asyncio.sleep(pause)
            exchange = Exchange(self, "GET", (self.name, "/.drives"), self.timeout)
            await exchange.connect()
            await exchange.write()
            await exchange.answer()
            text = (await exchange.text(PIECE)).decode(errors="replace")
            exchange.close(keep=False)
            if getattr(exchange.cause, "errno", 0) in (EMFILE, ENFILE):  # our lack tells nothing
                continue
            said = exchange.error or exchange.status
            self.id, *words = text.split() if said == 200 and text.strip() else [""]
            old = said in (403, 404)  # an older volume.sh: it does not tell, and has all
            self.drives = frozenset([".", *words] if words else self.expected if old else ())
            lacking = " ".join(sorted(self.expected - self.drives))
            silent = "does not tell its drives: start it anew" if old else f"is down: {said}"
            state = silent if not words else f"lacks {lacking}" if lacking else ""
            if state != self.state:
                logging.warning("%s %s", self.name, state or "is up again")
            self.state, self.looks = state, self.looks + 1

class Exchange:
    """A request to a volume, in steps, so that one task can have many under way: reuse() or
    connect(), write(), answer(), text() or the body, close(). If one fails, `error` says why."""
    def __init__(self, volume: Volume, method: str, place: tuple, patience: float, more: str = ""):
        self.volume, self.method, self.location = volume, method, place[0]
        self.url, self.patience = "".join(place), patience  # seconds without a sign of life
        self.status, self.error, self.cause, self.length = 0, "", None, None
        self.wire, self.sent = None, monotonic()
        fields = f"Host: {volume.name}\r\n{volume.login}" + (more or "Content-Length: 0\r\n")
        self.head = f"{method} {self.url[len(volume.name) :]} HTTP/1.1\r\n{fields}\r\n".encode()
        self.whole = not more  # is all of the body written?
    def reuse(self) -> bool:
        """Take a kept connection, if there is one that is good."""
        while self.volume.idle and not self.wire:
            wire = self.volume.idle.pop()
            if wire.there or wire.transport.is_closing():
                wire.transport.abort()
            else:
                self.wire = wire
        return bool(self.wire)
    async def connect(self) -> None:
        """Make a connection."""
        host, _, port = self.volume.name.rpartition(":")
        try:
            async with asyncio.timeout(self.volume.timeout):
                loop = asyncio.get_running_loop()
                _, self.wire = await loop.create_connection(Wire, host.strip("[]"), int(port))
        except BROKEN as error:
            self._fail(error if str(error) else OSError("it takes no connection"))
    def _fail(self, error: BaseException) -> None:  # other connections may be as dead
        self.status, self.cause = 0, error
        self.error = str(error) or f"silent for {self.patience:g} s"
        idle, self.volume.idle = self.volume.idle, []
        for wire in [*idle, self.wire] if self.wire else idle:
            wire.transport.abort()
    async def write(self, piece: bytes | bytearray = b"", last: bool = False) -> None:
        """Write the head, if it has not been, and a piece of the body, the last one or not."""
        if self.error or self.wire.transport.is_closing():
            return
        data = (b"%x\r\n" % len(piece), piece, b"\r\n") if piece else ()
        self.wire.transport.writelines((self.head, *data, b"0\r\n\r\n" if last else b""))
        self.head, self.sent, self.whole = b"", monotonic(), self.whole or last
        try:
            await self.wire.drain(self.sent + self.patience, PIECE)
        except BROKEN as error:
            self._fail(error)
    async def answer(self) -> None:
        """Read the head of the answer."""
        if self.error:
            return
        try:
            head = await self.wire.until(END, self.sent + self.patience)
            self.status, self.fields, self.length, self.last = parse_answer(NOISE.sub(b"", head))
            bare = self.method == "HEAD" or self.status == 204
            self.body = Body(self.wire, 0 if bare else self.length, self.patience)
        except BROKEN as error:
            self._fail(error)
    async def text(self, most: int = 1 << 26) -> bytearray:
        """The whole body of the answer; what there is of it, if there is an error or too much."""
        text = bytearray()
        try:
            while not self.error and not self.body.ended and len(text) < most:
                text += await self.body.read()
        except BROKEN as error:
            self._fail(error)
        return text
    def close(self, keep: bool = True) -> None:
        """Keep the connection if all is said and read; else cut it: nginx drops half an upload."""
        keep = keep and len(self.volume.idle) < self.volume.most_idle
        if keep and self.status and self.whole and self.body.ended and not self.last:
            self.volume.idle.append(self.wire)
        elif self.wire:
            self.wire.transport.abort()

class Volumes:
    """All volumes: which locations are there, which take writes; requests to many at a time."""
    def __init__(self, flags: Any) -> None:
        self.flags, self.all = flags, {}  # name → Volume
        self.drive = lru_cache(4096)(self._drive)  # of a location: its volume, its name there
        self.refusing: dict[str, float] = {}  # location that failed → until when (monotonic)
    def _drive(self, location: str) -> tuple[Volume, str]:  # a new volume is watched from now on
        name, _, drive = location.partition("/")
        if name not in self.all:
            self.all[name] = Volume(name, self.flags)
            self.all[name].watcher = asyncio.create_task(self.all[name].watch())
        return self.all[name], drive or "."
    def is_up(self, location: str) -> bool:
        """Whether its drive was there when we last looked."""
        volume, drive = self.drive(location)
        return drive in volume.drives
    def takes(self, location: str) -> bool:
        """Whether it is up, and has not failed of late: else it gets no PUT."""
        return self.is_up(location) and self.refusing.get(location, 0) < monotonic()
    def _judge(self, exchange: Exchange) -> None:  # leave alone what takes no value, or fails
        place, status, is_put = exchange.location, exchange.status, exchange.method == "PUT"
        is_silent = exchange.wire and isinstance(exchange.cause, TimeoutError)
        if is_put and status == 201:
            if self.refusing.pop(place, 0):
                logging.warning("%s takes values again", place)
        elif is_silent or status >= 500 or (is_put and status):
            if place not in self.refusing:
                logging.warning("%s is left alone: %s", place, exchange.error or status)
            self.refusing[place] = monotonic() + 10 * self.flags.voltimeout
    async def open(self, method: str, places: Iterable, more: str = "") -> list[Exchange]:
        """Begin requests to many (location, path); those without a connection connect at once."""
        patience = self.flags.voltimeout * (10 if method in ("GET", "PUT") else 1)
        made = [Exchange(self.drive(at[0])[0], method, at, patience, more) for at in places]
        await asyncio.gather(*[exchange.connect() for exchange in made if not exchange.reuse()])
        for exchange in [exchange for exchange in made if exchange.whole]:
            await exchange.write()
        return made
    async def ask(self, method: str, places: Iterable) -> list[Exchange]:
        """HEAD or DELETE files, all at once."""
        exchanges = await self.open(method, places)
        for exchange in exchanges:
            await exchange.answer()
            await exchange.text(PIECE)
            exchange.close()
            self._judge(exchange)
        return exchanges
    async def upload(self, path: str, places: Iterable[str], body: Any) -> tuple:
        """PUT a body to many places, in one pass: the exchanges, its size and MD5. HTTPError."""
        date = formatdate(written(path2key(path)[1]), usegmt=True)
        size, digest, piece = 0, md5(), await body.read()
        form = f"Date: {date}\r\nTransfer-Encoding: chunked\r\n"
        exchanges = await self.open("PUT", [(place, path) for place in places], form)
        try:
            while not (exchanges and all(exchange.error for exchange in exchanges)):
                size += len(piece)
                digest.update(piece)
                for exchange in exchanges:  # the slowest sets the pace
                    await exchange.write(piece, last=body.ended)
                if body.ended:
                    break
                piece = await body.read()
            for exchange in exchanges:
                await exchange.answer()
                self._judge(exchange)
        finally:
            for exchange in exchanges:
                exchange.close()
        return exchanges, size, digest.digest()
# --- store ----------------------------------------------------------------------------------------
# The verbs, without sockets, LMDB or SQL. An operation of the index decides; all else is work on
# files, each of which is in the intents, named by a record, or garbage, at any time.
CONDITIONS = {b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"}
CONDITIONS |= {b"content-range", b"content-encoding"}  # as strict: none is ignored

class Store(Volumes):
    """An index, the volumes, and the flags that say how to use them."""
    def __init__(self, flags: Any, index: Any, intents: Intents) -> None:
        super().__init__(flags)
        self.index, self.intents, self.draining, self.sweep_due = index, intents, False, 0.0
        self.stale = set(intents.open)  # paths of writes that could not be given up yet
        self.locks = {path2key(path)[0] for path in self.stale}  # keys that are being written
        self.connections, self.gets_at_once = set(), index.immediate and not flags.basicauth
        self.most_connections = os.sysconf("SC_OPEN_MAX") // 2  # the other half is for volumes
        every = {"volumes": flags.volumes, "replicas": len(flags.volumes)}  # a location on each
        self.ranking = lru_cache(4096)(partial(key2volume, **every, subvolumes=flags.subvolumes))
        self.redirect = lru_cache(4096)(self._redirect)  # (key, record, one of its files) → 302
        self.requests, self.seconds, self.totals = Counter(), Counter(), Counter()  # for metrics
    def note(self, request: Request, status: bytes, seconds: float) -> None:
        """Count a request; with -v, log it."""
        self.requests[request.method, status] += 1
        self.seconds[request.method] += seconds
        if self.flags.v:
            logging.info("%s %s %d", request.method, ascii(request.path)[2:-1], int(status))
    async def answer(self, request: Request, body: Body) -> bytes | AsyncIterator[bytes]:
        """The answer to any request, whole or in pieces, of which the first has the head."""
        if self.flags.basicauth:
            import_module("contrib.security").check(request, self.flags)
        verb, key, query = request.method, request.key, (request.query or b"").decode("latin-1")
        if verb in ("GET", "HEAD"):
            words = parse_qs(query, keep_blank_values=True, encoding="latin-1")
            if key == b"/" or not words.keys().isdisjoint(("list", "unlinked")):
                return await import_module("contrib.views").view(self, key, words)
            return self.get(request, (await self.index.row(key)).record)
        require(len(key) > 1, 400, "a key has two bytes at least")
        require(query == "" or (query == "deep" and verb == "REBALANCE"), 400, "no such query")
        if verb == "PUT":
            return await self.put(request, body)
        require(CONDITIONS.isdisjoint(request.fields), 412, f"{verb} knows no conditions")
        if verb == "REBALANCE":
            return await import_module("contrib.maintenance").rebalance(self, key, query == "deep")
        if verb == "UNLINK":
            await self.index.do(Row.unlink, key)
        else:
            old = await self.index.do(Row.remove, key, self.flags.protect)
            await self.erase([(key, file, float("inf")) for file in old.replicas])  # PUTs answered
        return response(204)
    def get(self, request: Request, record: Record) -> bytes:
        """302 to a replica that is there, at random; signed for secure_link. 404, 500, 503."""
        require(not record.error, 500, record.error)
        if not record.live:
            other = self.flags.fallback and f"http://{self.flags.fallback}{quote(request.key)}"
            return response(302, f"Location: {other}\r\n") if other else response(404)
        up = [file for file in record.replicas if self.is_up(file.location)]
        require(up, 503, "no volume that has it can be reached: see /?ready")
        willing = [f for f in up if self.takes(f.location)] if self.refusing else up
        answer = self.redirect(request.key, record, random.choice(willing or up))
        secret = self.flags.secret
        return import_module("contrib.security").sign(answer, secret) if secret else answer
    def _redirect(self, key: bytes, record: Record, file: Replica) -> bytes:
        places = [replica.location for replica in record.replicas]
        home = sorted(places) == sorted(self.ranking(key)[: self.flags.replicas])
        balance, volumes = "balanced" if home else "unbalanced", ",".join(places)
        fields = f"Location: http://{''.join(file.at(key))}\r\n"
        fields += f"Key-Volumes: {volumes}\r\nKey-Balance: {balance}\r\n"
        return response(302, fields + (f"Content-Md5: {record.hash}\r\n" if record.hash else ""))
    async def put(self, request: Request, body: Body) -> bytes:
        """201: `replicas` volumes have it all, and the index on disk names them."""
        key, fields, number = request.key, request.fields, self.flags.replicas
        require(request.length != 0, 411, "a value has at least one byte, and a length or chunks")
        condition, row = Condition(), await self.index.row(key)
        require(not row.record.error, 500, row.record.error)
        if b"content-md5" in fields or not CONDITIONS.isdisjoint(fields):
            condition = import_module("contrib.conditions").parse(fields, self.flags.protect)
        require(len(row.garbage) < 1000, 503, "a thousand files of this key are yet to be deleted")
        condition.check(row.record)
        fit = [place for place in self.ranking(key) if self.takes(place)]
        write_id = new_id(max(int(time()), row.newest() + 1))
        async with self.intended(key, write_id) as path:
            made, size, digest = await self.make(path, fit, number, body)
            self.totals["received_bytes"] += size
            require(size, 411, "a value has at least one byte")
            require(condition.md5 in ("", digest.hex()), 400, f"the MD5 is {digest.hex()}")
            await self.commit(path, Record(made, size, write_id, digest.hex()), condition)
        return response(201)
    @asynccontextmanager
    async def intended(self, key: bytes, write_id: str) -> AsyncIterator[str]:
        """Hold a key, and make files of this path; if that fails, they go. 409."""
        require(key not in self.locks, 409, "another PUT or REBALANCE of this key is under way")
        path = key2path(key, write_id)
        self.locks.add(key)
        try:
            yield path
        except BaseException:
            if path not in self.intents.open or not await self.give_up(path):
                raise
        finally:
            if path not in self.stale:
                self.locks.discard(key)
    async def commit(self, path: str, record: Record, condition: Condition) -> None:
        """Vouch for the files of a record. 403, 409, 412, 503."""
        key, write_id = path2key(path)
        files = [Replica(place, write_id) for place in self.intents.open[path]]
        waste = [file for file in files if file not in record.replicas]
        old = await self.index.do(Row.commit, key, record, condition, waste)
        self.intents.end(path)
        if old.replicas or waste:
            self.sweep_soon(self.flags.grace)
    async def give_up(self, path: str) -> bool:
        """End a write that failed: its files go, unless the record names any: whether it does."""
        key, write_id = path2key(path)
        files = [Replica(place, write_id) for place in self.intents.open[path]]
        try:
            lost, named = await self.index.do(Row.waste, key, files)
        except HTTPError as error:
            logging.warning("%s cannot be given up yet: %s", path, error)
            self.stale.add(path)  # the sweeper will; until then the key is locked
            return False
        self.intents.end(path)
        self.stale.discard(path)
        await self.erase([(key, file, 0) for file in lost])
        self.locks.discard(key)  # last: what is freed here may be another's by then
        return named
    async def make(self, path: str, places: list, number: int, body: Any) -> tuple:
        """Write to the first `number` places, or stand-ins: the files, size, MD5. HTTPError."""
        _, write_id = path2key(path)
        if len(places) < number:
            raise import_module("contrib.maintenance").lack(self, places, number)
        self.intents.begin(path, places[:number])
        tries, size, digest = await self.upload(path, places[:number], body)
        made = [each.location for each in tries if each.status == 201]
        if 0 < len(made) < number:
            stand_in = import_module("contrib.maintenance").stand_in
            made += await stand_in(self, path, places[number:], made, number, digest)
        said = [f"{each.location} says {each.error or each.status}" for each in tries]
        require(len(made) == number, 503, f"not written: {'; '.join(said)}")
        return tuple(Replica(place, write_id) for place in places if place in made), size, digest
    async def erase(self, files: Sequence[tuple[bytes, Replica, float]]) -> None:
        """Delete files that are garbage for so many seconds; before `settle` 404 proves nothing."""
        grace, settle = self.flags.grace, self.flags.settle
        gone = defaultdict(list, {key: [] for key, _, age in files if age < 0})
        there = [each for each in files if self.is_up(each[1].location)]
        answers = await self.ask("DELETE", [file.at(key) for key, file, _ in there])
        for (key, file, age), answer in zip(there, answers, strict=True):
            if answer.status == 204 or (answer.status == 404 and age > settle):
                gone[key].append(file)
            else:
                self.sweep_soon(settle - age if answer.status == 404 else grace)
        for key, its_files in gone.items():
            self.index.do(Row.settle, key, its_files).cancel()  # it is done; nobody waits for it
            self.totals["swept_files"] += len(its_files)
    def sweep_soon(self, seconds: float) -> None:
        """There will be something to sweep then."""
        self.sweep_due = min(self.sweep_due, monotonic() + seconds)
    async def sweep(self, rest: float = 4) -> None:
        """Delete the garbage that is older than `grace`; rest so many times as long as it takes."""
        grace, self.sweep_due = self.flags.grace, monotonic() + self.flags.settle
        for path in list(self.stale):
            await self.give_up(path)
            self.sweep_soon(grace)
        async for rows in self.index.walk(self.index.garbage, b"", 16):  # rows of 1,000 files
            rows = [(key, *each) for key, text in rows for each in parse_garbage(text).items()]
            ages = [(key, file, time() - since) for key, file, since in rows]
            due = [each for each in ages if not 0 <= each[2] < grace]  # < 0: the clock was ahead
            if len(due) < len(ages):
                self.sweep_soon(grace)
            for start in range(0, max(1, len(due)), 64):  # an empty one gives others their turn
                began = monotonic()
                await self.erase(due[start : start + 64])
                await asyncio.sleep(rest * (monotonic() - began))
    async def tick(self) -> None:
        """Sweep when something is due, or drives have come back."""
        seen = set()
        while True:
            await asyncio.sleep(TICK)
            there = {(name, drive) for name, volume in self.all.items() for drive in volume.drives}
            if there - seen or self.sweep_due <= monotonic():
                try:
                    await self.sweep()
                except HTTPError:  # the index cannot be reached
                    self.sweep_soon(self.flags.grace)
            seen = there
# --- command line ---------------------------------------------------------------------------------
def main() -> None:
    """Run a command: server, rebuild, rebalance. contrib/ has flags, process, and what is rare."""
    sys.modules.setdefault("mkv", sys.modules["__main__"])  # for contrib
    import_module("contrib.process").main()

if __name__ == "__main__":
    main()
