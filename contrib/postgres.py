"""The shared index of mkv.py: a table in PostgreSQL, for any number of equal servers.

-db postgres://user@host1,host2/mkv?sslmode=…; a password is in $PGPASSWORD or ~/.pgpass. A row is
locked from the look at it to the COMMIT of what has become of it, so that nothing of a server, or a
backend, that died or hung takes effect after a later answer about its key.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import Any, TextIO
from urllib.parse import urlsplit

from mkv import (
    Group,
    HTTPError,
    Record,
    Row,
    parse_garbage,
    parse_record,
    require,
    run_operations,
    take_lock,
)

try:
    import asyncpg
except ImportError as missing:
    raise HTTPError(503, "it needs asyncpg: uv run --with asyncpg mkv.py …") from missing

WORK_TIME, END_TIME = 8, 3  # seconds that a request waits for the index; and to end a failed write
COMMIT_TIME = 1  # seconds of these that are left for COMMIT, or nothing is begun any more
STEP_TIME, CONNECT_TIME, PAUSE = 2, 1, 0.1  # seconds for all before COMMIT; a host; between tries
MANY = 100_000  # rows: more than these are not counted
SETTINGS = {
    "application_name": "mkv",
    "lock_timeout": "1500ms",  # the backend that has the row may be frozen
    "idle_in_transaction_session_timeout": "3s",  # or its server
    "tcp_user_timeout": "5s",
    "client_connection_check_interval": "1s",
    "default_transaction_isolation": "read committed",  # what is locked is the newest
    "client_min_messages": "warning",
    "enable_seqscan": "off",  # for a plan stays while the table grows
}
NOW = "extract(epoch FROM clock_timestamp())::float8"
TABLES = """DO $$ BEGIN  -- of servers that start at once, one makes them, and the others try again
CREATE TABLE IF NOT EXISTS mkv (key bytea PRIMARY KEY, record text, garbage text);
CREATE INDEX IF NOT EXISTS mkv_garbage ON mkv (key) WHERE garbage <> '';
CREATE TABLE IF NOT EXISTS mkv_id AS SELECT replace(gen_random_uuid()::text, '-', '') AS id;
END $$"""
LOCK = f"""INSERT INTO mkv SELECT unnest($1::bytea[]), '', ''
ON CONFLICT (key) DO UPDATE SET record = mkv.record RETURNING key, record, garbage, {NOW}"""
SAVE = """WITH emptied AS (DELETE FROM mkv WHERE key = ANY($1::bytea[]))
UPDATE mkv SET record = new.record, garbage = new.garbage
FROM unnest($2::bytea[], $3::text[], $4::text[]) AS new(key, record, garbage)
WHERE mkv.key = new.key"""
READ = f"SELECT key, record, garbage, {NOW} FROM mkv WHERE key = ANY($1::bytea[])"
WALK = f"SELECT key, {{0}}, {NOW} FROM mkv WHERE key >= $1 AND {{0}} <> '' ORDER BY key LIMIT $2"
COUNT = """SELECT CASE WHEN keys < $1 THEN keys ELSE greatest(keys, reltuples::int8) END, files FROM
(SELECT count(*) AS keys FROM (SELECT FROM mkv WHERE record <> '' LIMIT $1) AS a) AS b,
(SELECT count(*) AS files FROM (SELECT FROM mkv WHERE garbage <> '' LIMIT $1) AS c) AS d,
pg_class WHERE oid = 'mkv'::regclass"""


def load(record: str, garbage: str, now: float) -> Row:
    """A row, from its texts, in which times are by PostgreSQL's clock, as `now`."""
    return Row(parse_record(record.encode()), parse_garbage(garbage.encode()), now)


def texts(row: Row) -> tuple[str, str]:
    """The inverse."""
    return row.record.text().decode(), row.garbage_text().decode()


def shift(text: str, seconds: float) -> bytes:
    """A text of garbage, its times by another clock."""
    later = partial(re.sub, "[0-9]+[.]?[0-9]*(?= )", lambda t: f"{float(t[0]) + seconds:.3f}")
    return later(text).encode()


@contextmanager
def limit(wire: asyncpg.Connection, seconds: float) -> Iterator[None]:
    """Cut a connection that takes longer. asyncpg's own time-outs cancel: a COMMIT never is."""
    timer = asyncio.get_running_loop().call_later(seconds, wire.terminate)
    try:
        yield
    finally:
        timer.cancel()


async def start(flags: Any) -> "Postgres":
    """The index that -db names. No other process has our intents. 503."""
    lock = take_lock(Path(f"{flags.intents}.lock"), flags.address)
    return await Postgres(flags.db, lock).begin()


class Postgres:
    """The shared index, over six connections at most: a lane has one, that of changes two."""

    immediate = False  # look() would wait
    keys, garbage = "record", "garbage"  # columns: what walk() takes

    def __init__(self, url: str, lock: TextIO) -> None:
        parts, self.lock = urlsplit(url), lock  # of our intents
        user, at, hosts = parts.netloc.rpartition("@")
        self.urls = [parts._replace(netloc=user + at + host).geturl() for host in hosts.split(",")]
        self.wires: dict[asyncpg.Connection, str] = {}  # and the URL that each has come from
        self.idle: list[asyncpg.Connection] = []
        self.changes = self.lane(self.change, 2)
        self.group = self.lane(self.change)  # of what is done when all requests are answered, too
        self.reads, self.queries = self.lane(self.read), self.lane(self.query)
        self.looks = Group(self.look)
        self.commits = self.operations = self.retries = self.unknown = 0
        self.seconds = 0.0  # of all commits

    def lane(self, step: Callable, width: int = 1) -> Group:
        """A group of jobs (till when, *arguments): those that come together are one step."""

        async def work(jobs: Sequence[tuple]) -> list[Any]:
            """The answers to jobs. 503, 504."""
            return await self.persist(min(job[0] for job in jobs), step, [job[1:] for job in jobs])

        return Group(work, width)

    async def begin(self) -> "Postgres":
        """Make the tables, unless they are there. 503."""
        await self.ask(TABLES)
        ((self.id,),) = await self.ask("SELECT id FROM mkv_id")
        return self

    def do(self, operation: Callable, key: bytes, *args: Any) -> asyncio.Future:
        """A future of an operation's answer. 503: it is not done. 504: it may be done.

        What ends a write stays in its order, and does not wait for changes.
        """
        if operation in (Row.waste, Row.settle):
            return self.group.do(monotonic() + END_TIME, operation, key, *args)
        return self.changes.do(monotonic() + WORK_TIME, operation, key, *args)

    def ask(self, sql: str, *args: Any) -> asyncio.Future:
        """A future of what a query finds. 503."""
        return self.queries.do(monotonic() + WORK_TIME, sql, *args)

    async def row(self, key: bytes) -> Row:
        """A key's row. 503."""
        return await self.reads.do(monotonic() + WORK_TIME, key)

    async def walk(self, table: str, start: bytes, most: int = 2000) -> AsyncIterator[list[tuple]]:
        """Rows of `keys` or `garbage` from `start` on, in batches; times are by our clock. 503."""
        more = True
        while more:
            rows = await self.ask(WALK.format(table), start, most)
            ahead = time() - rows[0][2] if rows and table == self.garbage else 0
            yield [(key, shift(text, ahead) if ahead else text.encode()) for key, text, _ in rows]
            start, more = rows[-1][0] + b"\0" if rows else b"", len(rows) == most

    async def count(self) -> tuple[int, int]:
        """Of keys, and of keys that have garbage; about, where they are many. 503."""
        (counts,) = await self.ask(COUNT, MANY)
        return tuple(counts)

    async def persist(self, until: float, step: Callable, jobs: Sequence[tuple]) -> list[Any]:
        """A step's answers to jobs; as long as it fails, from the beginning again. 503, 504."""
        error: Any = "it is too slow"
        while monotonic() < until - COMMIT_TIME:
            try:
                async with self.wire() as wire:
                    seconds = until - COMMIT_TIME - monotonic()
                    with limit(wire, min(seconds, STEP_TIME + len(jobs) / 5000)):
                        answers = await step(wire, jobs)
                    if step == self.change:
                        await self.commit(wire, until)
                        self.operations += len(jobs)
                    return answers
            except HTTPError:
                raise
            except Exception as failure:  # OSError, asyncpg's, and any if it is cut under asyncpg
                error = failure
            self.retries += 1
            while self.idle:  # they lead to the same host
                self.idle.pop().terminate()
            await asyncio.sleep(PAUSE)
        raise HTTPError(503, f"the index cannot be reached: {error}")

    @asynccontextmanager
    async def wire(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection for one task. If that fails, or is cancelled, it is cut."""
        while self.idle and self.idle[-1].is_closed():
            self.idle.pop()
        wire = self.idle.pop() if self.idle else await self.connect()
        try:
            yield wire
        except BaseException:
            wire.terminate()
            raise
        self.idle.append(wire)

    async def connect(self) -> asyncpg.Connection:
        """A new one, to the first host that takes writes; all to others lead to an old primary."""
        error: Exception = OSError("no host")
        how = {"server_settings": SETTINGS, "target_session_attrs": "read-write"}
        for url in self.urls:
            try:
                wire = await asyncpg.connect(url, timeout=CONNECT_TIME, **how)
            except Exception as failure:  # as in persist()
                error = failure
                continue
            wire.add_log_listener(lambda wire, warning: wire.terminate())
            self.wires = {w: u for w, u in self.wires.items() if not w.is_closed()} | {wire: url}
            for other in [other for other, its in self.wires.items() if its != url]:
                other.terminate()
            return wire
        raise error

    async def look(self, jobs: Sequence[tuple]) -> list[None]:
        """Is there a new primary? Then connect() cuts the connections to the old one."""
        with suppress(Exception):  # there is none
            (await self.connect()).terminate()
        return [None for _ in jobs]

    async def read(self, wire: asyncpg.Connection, jobs: Sequence[tuple]) -> list[Row]:
        """The rows of keys."""
        found = await wire.fetch(READ, list({key for (key,) in jobs}))
        rows = {key: load(*its) for key, *its in found}
        return [rows.get(key, Row(Record(), {}, time())) for (key,) in jobs]

    async def query(self, wire: asyncpg.Connection, jobs: Sequence[tuple]) -> list[list]:
        """What queries find."""
        return [await wire.fetch(sql, *args) for sql, *args in jobs]

    async def change(self, wire: asyncpg.Connection, jobs: Sequence[tuple]) -> list[Any]:
        """Begin a transaction, and do operations in it: their answers, once it is committed."""
        await wire.execute("BEGIN")
        found = await wire.fetch(LOCK, sorted({key for _, key, *_ in jobs}))  # so none deadlock
        old = {key: load(*its) for key, *its in found}
        rows = dict(old)
        answers = run_operations(rows, jobs)
        new = {key: texts(row) for key, row in rows.items() if not row.record.error}
        empty = [key for key in new if not any(new[key])]
        changed = [(k, *new[k]) for k in new if any(new[k]) and rows[k] is not old[k]]
        await wire.execute(SAVE, empty, *([row[i] for row in changed] for i in range(3)))
        return answers

    async def commit(self, wire: asyncpg.Connection, until: float) -> None:
        """COMMIT, in a task that nobody cancels. 504: it may have taken effect, or may yet."""
        began, task = monotonic(), asyncio.create_task(wire.execute("COMMIT"))
        try:
            with limit(wire, until - began):
                while not (await asyncio.wait([task], timeout=1))[0]:
                    self.looks.do().cancel()  # nobody waits for it
            done = await task == "COMMIT" and not wire.is_closed()
            require(done, 504, "a warning: somebody has cancelled the wait for a standby")
        except Exception as error:
            self.unknown += 1
            raise HTTPError(504, f"the index does not say whether it is done: {error}") from error
        self.commits, self.seconds = self.commits + 1, self.seconds + monotonic() - began
