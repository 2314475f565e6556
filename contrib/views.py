"""What GET shows besides values: lists of keys and garbage, a snapshot, health, metrics, help."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from time import monotonic, time

import aiofiles
import lmdb

from contrib.maintenance import REPORTS, ailments, lock_file, read_reports
from mkv import (
    PIECE,
    TEXT,
    TURN,
    HTTPError,
    Row,
    Store,
    parse_garbage,
    parse_record,
    require,
    response,
    written,
)

Pieces = AsyncIterator[bytes]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"  # the length is not known
HELP = """mkv, a key-value store

curl -fsS -T FILE HOST:PORT/key       put
curl -fsSL HOST:PORT/key              get
curl -fsS -X DELETE HOST:PORT/key     delete

/?list  /prefix?list&start=&limit=&long  /?unlinked  /?garbage  /?snapshot
/?health  /?ready  /?metrics
"""
LOOK = 0.02  # seconds that a look at the event loop takes
LISTS = ({"list"}, {"list", "long"}, {"unlinked"}, {"unlinked", "long"}, {"garbage"})


async def view(store: Store, key: bytes, words: dict[str, list[str]]) -> bytes | Pieces:
    """The answer to a query: its words, with their values as latin-1. 400, 503."""
    texts = {"": help_text, "health": health, "ready": ready, "metrics": metrics}
    word = "&".join(words)
    if key == b"/" and word in texts:
        return response(200, TEXT, (await texts[word](store)).encode())
    if key == b"/" and word == "snapshot":
        return snapshot(store)
    start, limit = (words.get(name, [""])[0].encode("latin-1") for name in ("start", "limit"))
    what = words.keys() - {"start", "limit"}
    right = what in LISTS and start.decode(errors="ignore").encode() == start
    require(right and re.fullmatch(b"[0-9]{0,18}", limit), 400, "no such query: try /?list")
    return listed(store, key, start, int(limit or 1 << 62), what)


async def listed(store: Store, prefix: bytes, start: bytes, limit: int, what: set[str]) -> Pieces:
    """The JSON of keys with a prefix, from `start` on, or of their garbage, piece by piece."""
    is_garbage, mark = "garbage" in what, "unlinked" in what
    table = store.index.garbage if is_garbage else store.index.keys
    describe = garbage_of if is_garbage else records_of if "long" in what else names_of
    turn = 8 * TURN if describe is names_of else TURN  # rows, before others have theirs
    comma, following, end = "", "", prefix + b"\xff"  # beyond all keys with it: they are UTF-8
    opening = STREAM + (b'{"garbage": [' if is_garbage else b'{"keys": [')
    most = 16 if is_garbage else 2000  # rows: one of garbage may have a thousand files
    async for rows in store.index.walk(table, max(prefix, start), most):
        found = [row for row in rows if row[0] < end and row[1].startswith(b"DELETED") == mark]
        page = found[:limit]
        if opening:  # not before the index has answered: it may be 503
            yield opening
            opening = b""
        for begin in range(0, len(page), turn):
            items = describe(page[begin : begin + turn])
            if items:
                yield (comma + json.dumps(items)[1:-1]).encode()
                comma = ", "
        limit -= len(page)
        if len(found) > len(page):
            following = found[len(page)][0].decode(errors="replace")
        if following or (rows and rows[-1][0] >= end):
            break
    yield f'], "next": {json.dumps(following)}}}\n'.encode()


Page = Sequence[tuple[bytes, bytes]]  # keys, and what a table has of them


def names_of(page: Page) -> list[str]:
    """Keys, as ?list has them."""
    return [key.decode(errors="replace") for key, _ in page]


def records_of(page: Page) -> list[dict]:
    """Keys and their records, as ?list&long has them."""
    items = []
    for key, text in page:
        record = parse_record(text)
        items.append(
            {
                "key": key.decode(errors="replace"),
                "size": record.size,
                "md5": record.hash or None,
                "time": written(record.write_id) or None,
                "files": ["".join(file.at(key)) for file in record.replicas],
            }
        )
    return items


def garbage_of(page: Page) -> list[dict]:
    """Garbage, each file with its age in seconds, as ?garbage has it."""
    items = []
    for key, text in page:
        for file, since in parse_garbage(text).items():
            name = key.decode(errors="replace")
            items.append({"key": name, "file": "".join(file.at(key)), "age": time() - since})
    return items


async def snapshot(store: Store) -> Pieces:
    """A copy of the index, which starts as it is: its file data.mdb. 501, 503."""
    here = store.index.immediate
    require(here, 501, "the index is in PostgreSQL, which has ways of its own: pg_dump")
    try:
        file = await aiofiles.tempfile.TemporaryFile(dir=store.index.folder)  # without a name
        await asyncio.to_thread(store.index.env.copyfd, file.fileno(), compact=True)
    except (OSError, lmdb.Error) as error:
        raise HTTPError(503, f"no copy can be made: {error}") from error
    size = await file.seek(0, os.SEEK_END)
    await file.seek(0)
    yield f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode()
    while piece := await file.read(PIECE):
        yield piece
    await file.close()


async def help_text(_: Store) -> str:
    """What GET / says."""
    return HELP


async def health(store: Store) -> str:
    """Whether keys can be read. 503."""
    await store.index.row(b"/")
    return "ok\n"


async def ready(store: Store) -> str:
    """Whether a PUT can succeed, as far as can be known: volumes, index, intents. 503."""
    flags = store.flags
    drives = [f"/sv{number:02X}" for number in range(flags.subvolumes)]
    drives = drives if flags.subvolumes > 1 else [""]
    able = [v for v in flags.volumes if any(store.takes(v + drive) for drive in drives)]
    enough = len(able) >= flags.replicas and not store.draining
    require(enough, 503, f"{len(able)} volumes take values: {ailments(store)}")
    await store.index.do(Row.settle, b"/", ())
    return "ok\n"


async def metrics(store: Store) -> str:
    """Numbers for Prometheus."""
    index, names = store.index, store.flags.volumes
    began = monotonic()
    await asyncio.sleep(LOOK)
    lag = max(0.0, monotonic() - began - LOOK)
    keys, garbage = -1, -1
    with suppress(HTTPError):  # an index that cannot be reached tells nothing else
        keys, garbage = await index.count()
    up = {name: int(len(store.drive(name)[0].drives) > 0) for name in names}
    samples: dict[str, float] = {
        "keys": keys,
        "garbage_keys": garbage,
        "intents_open": len(store.intents.open),
        "connections": len(store.connections),
        "event_loop_lag_seconds": lag,
        "volumes": len(up),
        "volumes_up": sum(up.values()),
        "received_bytes_total": store.totals["received_bytes"],
        "swept_files_total": store.totals["swept_files"],
        "commits_total": index.commits,
        "commit_seconds_total": index.seconds,
    }
    known = [name for name in ("operations", "retries", "unknown") if hasattr(index, name)]
    samples |= {f"commit_{name}_total": getattr(index, name) for name in known}
    samples |= {f'volume_up{{volume="{name}"}}': is_up for name, is_up in up.items()}
    for place in store.refusing:
        refuses = int(store.is_up(place) and not store.takes(place))
        samples[f'location_refuses_writes{{location="{place}"}}'] = refuses
    for (method, status), count in store.requests.items():
        samples[f'requests_total{{method="{method}",status="{status.decode()}"}}'] = count
    for method, seconds in store.seconds.items():
        samples[f'request_seconds_total{{method="{method}"}}'] = seconds
    for command, report in read_reports(lock_file(store.flags, REPORTS)).items():
        samples[f'command_ended_seconds{{command="{command}"}}'] = report["ended"]
        samples[f'command_findings{{command="{command}"}}'] = sum(report["found"].values())
    return exposition(samples)


HELPS = {
    "keys": "Keys in the index.",
    "garbage_keys": "Keys that have files which wait to be deleted.",
    "intents_open": "Writes under way.",
    "connections": "Connections of clients.",
    "event_loop_lag_seconds": "How late the event loop was just now: one process does one thing.",
    "volumes": "Volumes that the server was started with.",
    "volumes_up": "Those that answer.",
    "volume_up": "Whether a volume answers.",
    "location_refuses_writes": "Whether a location is left alone, since it failed for a file.",
    "requests_total": "Requests, by verb and status.",
    "request_seconds_total": "Time from a request's first byte to its answer's, by verb.",
    "command_ended_seconds": "When rebuild or rebalance last ended, since 1970.",
    "command_findings": "What it then found that is not as it should be.",
    "received_bytes_total": "Bytes of values received.",
    "swept_files_total": "Files deleted.",
    "commits_total": "Transactions of the index.",
    "commit_seconds_total": "Time that these took.",
    "commit_operations_total": "Changes that they made: one for each PUT, DELETE and so on.",
    "commit_retries_total": "Times that the index was asked again, since it could not be reached.",
    "commit_unknown_total": "Transactions of which it is not known whether they took effect.",
}


def exposition(samples: dict[str, float], helps: Callable = HELPS.get) -> str:
    """Samples in Prometheus' text format, each family in one block."""
    lines, last = [], ""
    for sample, value in sorted(samples.items()):
        name = sample.partition("{")[0]
        if name != last:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines.append(f"# HELP mkv_{name} {helps(name, name)}\n# TYPE mkv_{name} {kind}")
        last = name
        lines.append(f"mkv_{sample} {value}")
    return "\n".join(lines) + "\n"
