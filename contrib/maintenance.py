"""Keys that move: stand-ins, REBALANCE, and the commands rebuild and rebalance.

The commands print what they find to stdout, a line of JSON each, and how far they are to stderr.
They may be stopped at any moment, and started again.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import re
import signal
import sys
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from time import monotonic, time
from typing import Any
from urllib.parse import quote

import uvloop

from contrib.conditions import Unchanged
from mkv import (
    BROKEN,
    LMDB,
    PIECE,
    TICK,
    TURN,
    Exchange,
    HTTPError,
    Intents,
    Record,
    Replica,
    Row,
    Store,
    Volume,
    Volumes,
    md5,
    new_id,
    path2key,
    require,
    response,
    take_lock,
    written,
)

OURS = "a command, "  # so begins the address in the lock of an index that a command has
WANTED = ".wanted"  # a file beside the lock, with this suffix: a server wants it
REPORTS = ".reports"  # another: how commands have ended
PATIENCE = 30  # seconds that a server waits for a rebalance to let go, and it for the server
ASKED, TRIES = 16, 10  # keys that rebalance has under way at a time; tries of one that changes
LOOKS = 4  # portions of TURN folders that a server with an empty index looks at: enough to get deep
LONGEST = 1200  # characters of the path of a file, at most


class SourceError(HTTPError):
    """A replica cannot be read, or is not what was written: another one may do."""


# --- copies ---------------------------------------------------------------------------------------


class Source:
    """A file at a location, to be read piece by piece; its errors are SourceErrors."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    @property
    def ended(self) -> bool:
        """Whether all of it has been read."""
        return self.exchange.status == 200 and self.exchange.body.ended

    async def read(self) -> bytes | bytearray:
        """The next piece; nothing at the end."""
        exchange = self.exchange
        try:
            require(exchange.status == 200, 503, exchange.error or f"it answers {exchange.status}")
            return await exchange.body.read()
        except BROKEN as error:
            raise SourceError(503, f"{exchange.url}: {str(error) or 'silent'}") from error


@asynccontextmanager
async def download(store: Store, place: tuple[str, str]) -> AsyncIterator[Source]:
    """A file at (location, path)."""
    (exchange,) = await store.open("GET", [place])
    try:
        await exchange.answer()
        yield Source(exchange)
    finally:
        exchange.close()


async def stand_in(
    store: Store, path: str, places: Sequence[str], made: Sequence[str], number: int, digest: bytes
) -> list[str]:
    """Copy a file from where it was made to other places, until `number` have it: to which."""
    key, _ = path2key(path)
    copies: list[str] = []
    for place in places:
        if len(made) + len(copies) == number:
            break
        logging.warning("%a has a stand-in at %s", key.decode(), place)
        store.intents.begin(path, [place])
        with suppress(SourceError):
            async with download(store, (random.choice([*made, *copies]), path)) as source:
                (copy,), _, copied = await store.upload(path, [place], source)
            if copy.status == 201 and copied == digest:
                copies.append(place)
    return copies


async def rebalance(store: Store, key: bytes, deep: bool) -> bytes:
    """204: the best locations that work have the value, whole, and no others. 404, 409, 503."""
    require(key not in store.locks, 409, "another PUT or REBALANCE of this key is under way")
    row = await store.index.row(key)
    require(not row.record.error, 500, row.record.error)
    old, number = row.record, store.flags.replicas
    require(old.replicas, 404, "no such key")
    wrong = await examine(store, key, old, deep)
    good = {file.location: file for file in old.replicas if not wrong[file]}
    changed = not good and (await store.index.row(key)).record != old
    require(not changed, 409, "the key has changed meanwhile")
    require(good, 503, f"no replica is good: {', '.join(wrong.values())}")
    ranking = store.ranking(key)
    fit = [place for place in ranking if place in good or store.takes(place)]
    if len(fit) < number:
        raise lack(store, fit, number)
    places = [file.location for file in old.replicas]
    if any(wrong.values()) or sorted(places) != sorted(fit[:number]):
        anew = not old.write_id or not {"size", "md5"}.isdisjoint(wrong.values())
        keep = [good[place] for place in fit[:number] if place in good and not anew]
        now = max(int(time()), row.newest() + 1)
        for source in random.sample(list(good.values()), len(good)):
            with suppress(SourceError):
                write_id = new_id(now if anew else written(old.write_id))
                await move(store, key, old, write_id, source, keep, fit)
                break
        else:
            changed = (await store.index.row(key)).record != old
            require(not changed, 409, "the key has changed meanwhile")
            raise HTTPError(503, "no replica can be read, and is what was written")
    home = fit[:number] == ranking[:number]
    return response(204, f"Key-Balance: {'balanced' if home else 'unbalanced'}\r\n")


async def move(
    store: Store,
    key: bytes,
    old: Record,
    write_id: str,
    source: Replica,
    keep: Sequence[Replica],
    fit: Sequence[str],
) -> None:
    """Make what is missing from a good replica, and `keep` others. SourceError, HTTPError.

    Where nothing is kept it is a write of its own, else its copies have the time of the original.
    """
    kept = {file.location for file in keep}
    places = [place for place in fit if place not in kept]
    number = store.flags.replicas - len(keep)
    async with store.intended(key, write_id) as path:
        async with download(store, source.at(key)) as body:
            made, size, digest = await store.make(path, places, number, body)
        if old.size not in (None, size) or old.hash not in ("", digest.hex()):
            raise SourceError(503, f"{source.location} has something else")
        replicas = sorted([*keep, *made], key=lambda file: fit.index(file.location))
        record = old._replace(replicas=tuple(replicas), size=size)
        if not keep:
            record = record._replace(write_id=write_id, hash=digest.hex())
        await store.commit(path, record, Unchanged(old))


async def examine(store: Store, key: bytes, record: Record, deep: bool) -> dict[Replica, str]:
    """What is wrong with each replica: nothing, missing, size, md5 (if deep), unreachable."""
    there = [file for file in record.replicas if store.is_up(file.location)]
    wrong, sums = dict.fromkeys(record.replicas, "unreachable"), {}
    answers = await store.ask("HEAD", [file.at(key) for file in there])
    for file, answer in zip(there, answers, strict=True):
        if answer.status == 200:
            wrong[file] = "" if record.size in (None, answer.length) else "size"
        elif answer.status == 404:
            wrong[file] = "missing"
        if deep and not wrong[file]:
            try:
                sums[file] = await md5_of(store, file.at(key))
            except SourceError:
                wrong[file] = "unreachable"
    right = {record.hash} if record.hash else set(sums.values())
    return wrong | {file: "md5" for file, digest in sums.items() if {digest} != right}


async def md5_of(store: Store, place: tuple[str, str]) -> str:
    """The MD5 of a file, in hex. SourceError."""
    digest = md5()
    async with download(store, place) as source:
        while piece := await source.read():
            digest.update(piece)
    return digest.hexdigest()


def lack(store: Store, places: Sequence[str], number: int) -> HTTPError:
    """Says that these are fewer places than a value needs, and why."""
    return HTTPError(503, f"{len(places)} of {number} volumes work: {ailments(store)}")


def ailments(store: Store) -> str:
    """What is amiss with the volumes, in words."""
    ill = [f"{volume.name} {volume.state}" for volume in store.all.values() if volume.state]
    resting = [place for place, until in store.refusing.items() if until > monotonic()]
    ill += [f"{place} is left alone" for place in resting]
    return "; ".join(ill) or "nothing is amiss"


# --- commands -------------------------------------------------------------------------------------


class Report:
    """What a command has found, and how far it is."""

    def __init__(self, command: str) -> None:
        self.command, self.done = command, 0
        self.found: Counter = Counter()

    def finding(self, finding: str, **what: str | int) -> None:
        """Print one."""
        self.found[finding] += 1
        try:
            print(json.dumps({"finding": finding} | what), flush=True)
        except OSError:  # nobody reads it, or there is no room
            self.found["unfinished"] += 1
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115

    def progress(self, end: str) -> None:
        """Tell how far it is."""
        with suppress(OSError):
            text = f"{self.command}: {self.done} keys, {dict(self.found)}"
            print(text, end=end, file=sys.stderr, flush=True)

    async def tell(self) -> None:
        """Tell it now and then; on a terminal in one line that changes."""
        is_terminal = sys.stderr.isatty()
        while True:
            await asyncio.sleep(0.2 if is_terminal else 10)
            self.progress("\r" if is_terminal else "\n")

    def status(self) -> int:
        """0: all is well, 1: there are findings, 2: not all of it could be done."""
        self.progress("\n")
        return 2 if self.found["unfinished"] + self.found["unreachable"] else int(bool(self.found))

    def file(self, path: Path) -> None:
        """Note beside the lock when the command has ended, and what it found: see /?metrics."""
        reports = read_reports(path) | {self.command: {"ended": time(), "found": self.found}}
        with suppress(OSError):
            new = path.with_suffix(".new")
            new.write_text(json.dumps(reports))
            new.rename(path)


class Silence(Report):
    """What nobody asks for."""

    def finding(self, finding: str, **what: str) -> None:
        """Say nothing."""


def read_reports(path: Path) -> dict[str, dict]:
    """What file() has noted, by command; nothing if there is no such file."""
    try:
        noted = json.loads(path.read_text())
        return {
            command: {
                "ended": float(report["ended"]),
                "found": {finding: int(count) for finding, count in report["found"].items()},
            }
            for command, report in noted.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def open_streams() -> None:
    """Put something in the place of streams that are closed."""
    sys.stdout = sys.stdout or Path("/dev/full").open("w")  # noqa: SIM115 (findings are lost)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115


def main(flags: argparse.Namespace) -> int:
    """Run a command; its exit status. OSError, lmdb.Error, HTTPError."""
    open_streams()
    report = Report(f"{flags.command} -deep" if flags.deep else flags.command)
    reports = lock_file(flags, REPORTS)
    flags.address = f"{OURS}{flags.command}, process {os.getpid()}"
    try:
        uvloop.run(run(flags, report))
    except KeyboardInterrupt:
        report.finding("unfinished", reason="interrupted")
    except Exception:
        report.found["unfinished"] += 1
        report.file(reports)
        raise
    report.file(reports)
    return report.status()


async def run(flags: argparse.Namespace, report: Report) -> None:
    """Rebuild, or rebalance, until it is done or a signal comes."""
    work = rebuild(flags, report) if flags.command == "rebuild" else bring_home(flags, report)
    task, teller = asyncio.create_task(work), asyncio.create_task(report.tell())
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        report.finding("unfinished", reason="interrupted")
    finally:
        teller.cancel()


def adopt(row: Row, found: dict[Replica, int], condemn: bool) -> tuple:
    """An operation: vouch for the newest write whose files (with sizes) were found.

    Unless newer ones are known, as record or garbage. Returns the files of older writes, which are
    garbage if we `condemn`; and whether it is in doubt which write is the value: then none is, and
    what the index knows stands.
    """
    fresh = {file: size for file, size in found.items() if file not in row.garbage}
    ages = Counter(written(file.write_id) for file in fresh)
    newest = max(ages, default=-2)
    files = [file for file in fresh if written(file.write_id) == newest]
    sizes = {fresh[file] for file in files}
    doubt = len(sizes) > 1 or len(files) < max(ages.values(), default=0)
    record, known = row.record, row.record.replicas
    if newest > row.newest() and not (known and doubt):
        record = Record(tuple(files), max(sizes), files[0].write_id)
    elif known and newest == written(record.write_id) and not doubt:
        both = tuple(dict.fromkeys([*known, *files]))
        record = record._replace(replicas=both, size=max(sizes))
    older = [file for file in fresh if file not in record.replicas]
    new = row.with_record(record, older) if condemn and not doubt else row._replace(record=record)
    return new, (older, doubt)


async def rebuild(flags: argparse.Namespace, report: Report) -> None:
    """Take what lies on the volumes into the index, which we have to ourselves.

    Unless it is shared: then keys that a server may be writing are passed over.
    """
    store = await load(flags)
    condemn, young = sum(await store.index.count()) > 0, 0
    async for found in ahead(all_files(store, report)):
        jobs = {}
        for key, files in found.items():
            recent = sum(written(file.write_id) > time() - flags.settle for file in files)
            if flags.shared and recent:
                young += recent
                continue
            ranks = {place: rank for rank, place in enumerate(store.ranking(key))}
            order = sorted(files, key=lambda file: ranks.get(file.location, len(ranks)))  # noqa: B023
            jobs[key] = store.index.do(adopt, key, {f: files[f] for f in order}, condemn)
        for key, job in jobs.items():
            try:
                older, doubt = await job
            except HTTPError as error:
                report.finding("unreadable", key=text_of(key), reason=error.reason)
                continue
            for file in found[key] if doubt else [] if condemn else older:
                location, path = file.at(key)
                finding = "ambiguous" if doubt else "garbage"
                report.finding(finding, key=text_of(key), location=location, path=path)
        report.done += len(jobs)
    if young:
        report.finding("young", files=young, reason="a server may be writing them: run it again")


async def ahead(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The same items; while one is looked at, the next is on its way."""

    async def following() -> Any:
        return await anext(items, None)

    task = asyncio.create_task(following())
    try:
        while (item := await task) is not None:
            task = asyncio.create_task(following())
            yield item
    finally:
        task.cancel()


def text_of(key: bytes) -> str:
    """A key, as JSON has it."""
    return key.decode(errors="replace")


async def all_files(store: Store, report: Report) -> AsyncIterator[dict[bytes, dict[Replica, int]]]:
    """The files on the volumes, with their sizes, by key: all files of a key come together."""
    quiet = isinstance(report, Silence)  # a server that starts: it waits for none that is down
    folders = {"/": [p for p in locations(store) if not quiet or store.is_up(p)]}
    while folders:
        batch, found = [], defaultdict(dict)
        while folders and len(batch) < TURN:
            folder, places = folders.popitem()
            batch += [(place, folder) for place in places]
        async for location, path, size in list_folders(store, batch, report):
            depth = path.count("/")
            ours = depth > 1 or re.fullmatch("/[0-9a-f]{2}", path)
            if size == FOLDER and ours and len(path) < LONGEST:
                folders.setdefault(path + "/", []).append(location)
                continue
            try:
                require(size >= 0, 400, "it is no file")
                key, write_id = path2key(path)
                found[key][Replica(location, write_id)] = size
            except ValueError:
                if not re.fullmatch(r"/(sv[0-9A-F]{2}|lost\+found)", path):
                    report.finding("name", location=location, path=path)
        yield found


def locations(store: Store) -> list[str]:
    """The roots of all volumes, and the drives that they should have, or say they have."""
    places = []
    for name in store.flags.volumes:
        volume, _ = store.drive(name)
        drives = sorted((volume.expected | volume.drives) - {"."})
        places += [name, *(f"{name}/{drive}" for drive in drives)]
    return places


FOLDER, OTHER = -1, -2  # in the place of a size


def parse_listing(text: str) -> list[tuple[str, int]]:
    """Names and sizes in a folder, from nginx's JSON. ValueError."""
    rows = []
    try:
        for row in json.loads(text):
            name, kind, size = row["name"], row["type"], row.get("size", OTHER)
            name.encode()
            right = name not in ("", ".", "..") and "/" not in name and type(size) is int
            is_file = kind == "file"
            require(right and (size >= 0) == is_file, 503, "it is no listing")
            rows.append((name, size if is_file else FOLDER if kind == "directory" else OTHER))
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no listing: {error!r}") from error
    return rows


async def list_folders(
    store: Store, batch: Sequence[tuple[str, str]], report: Report
) -> AsyncIterator[tuple[str, str, int]]:
    """What nginx lists at many (location, folder), all at once: location, path and size of each."""
    exchanges = await store.open("GET", [(place, quote(folder)) for place, folder in batch])
    for (location, folder), exchange in zip(batch, exchanges, strict=True):
        await exchange.answer()
        text = (await exchange.text()).decode(errors="replace")
        exchange.close()
        status, error = exchange.status, exchange.error
        try:
            require(status in (200, 404), 503, error or f"it answers {status}")
            for name, size in parse_listing(text) if status == 200 else ():
                yield location, folder + name, size
        except ValueError as error:
            report.finding("unreachable", location=location, path=folder, reason=str(error))


def lock_file(flags: argparse.Namespace, suffix: str = "") -> Path:
    """The lock of the index (LMDB), or of our intents; or a file beside it."""
    return Path((f"{flags.intents}.lock" if flags.shared else f"{flags.db}/alive") + suffix)


def holder(flags: argparse.Namespace) -> str:
    """Where the process is that has, or had, that lock. Not to be asked by itself: it loses it."""
    lock = lock_file(flags)
    return lock.read_text() if lock.exists() else ""


async def free(flags: argparse.Namespace) -> None:
    """A server wants to start: a rebalance that has the index is asked to let go, and does soon."""
    began, wanted = monotonic(), lock_file(flags, WANTED)
    while monotonic() < began + PATIENCE:
        try:  # kept open while we live: load() takes it again, and a close would lose it
            flags.lock = take_lock(lock_file(flags), flags.address)
            break
        except HTTPError:
            said = holder(flags)
            new = not said and monotonic() < began + 1  # who has just taken it has yet to say so
            if not new and not said.startswith(f"{OURS}rebalance"):
                break
            wanted.touch()
            await asyncio.sleep(TICK)
    wanted.unlink(missing_ok=True)


async def load(flags: argparse.Namespace) -> Store:
    """The store: all volumes are looked at, what another life has left is garbage. 400, 503."""
    if flags.shared:
        index = await import_module("contrib.postgres").start(flags)
    else:
        index = LMDB(Path(flags.db), flags.address)
    store = Store(flags, index, Intents(Path(flags.intents), index.id))
    volumes = [store.drive(name)[0] for name in flags.volumes]
    while not all(volume.looks for volume in volumes):
        await asyncio.sleep(TICK)
    await check_start(store, volumes)
    for path in list(store.stale):
        await store.give_up(path)
    return store


def check_names(volumes: Sequence[Volume]) -> None:
    """Every volume has one name. HTTPError."""
    ids = Counter(volume.id for volume in volumes if volume.id)
    twice = [volume.name for volume in volumes if ids[volume.id] > 1]
    require(not twice, 400, f"these are names of one volume: {', '.join(twice)}")


async def check_late(volumes: Sequence[Volume]) -> None:
    """The same, once volumes that are down have come up: it ends a server."""
    try:
        while not all(volume.id for volume in volumes):
            await asyncio.sleep(TICK)
            check_names(volumes)
    except HTTPError as error:
        logging.error("%s", error)
        os.kill(os.getpid(), signal.SIGTERM)


async def check_start(store: Store, volumes: Sequence[Volume]) -> None:
    """A volume of two names would be two replicas of a key: HTTPError. A lost index: a warning.

    The index of a first edition is taken over.
    """
    check_names(volumes)
    store.check = asyncio.create_task(check_late(volumes))
    store.flags.ready = True
    if store.index.immediate:
        await import_module("contrib.first_edition").take_over(store.index)
    if store.flags.command == "server" and not sum(await store.index.count()):
        looks = 0
        async for found in all_files(store, Silence("start")):
            looks += 1
            if found:
                logging.warning("the volumes have files, and the index is empty: rebuild it?")
            if found or looks == LOOKS:
                break


async def bring_home(flags: argparse.Namespace, report: Report) -> None:
    """Rebalance: ask the server that has the index; if there is none, do it until one comes."""
    try:
        store = await load(flags)
    except HTTPError as error:
        await asyncio.sleep(TICK)  # who has just taken it has yet to say so
        server = holder(flags)
        if error.status != 503 or not server or server.startswith(OURS):
            raise
        return await ask_server(flags, server, report)
    wanted = lock_file(flags, WANTED)
    wanted.unlink(missing_ok=True)  # who wants it says so again
    for mark in (False, True):  # the live ones first
        async for rows in store.index.walk(store.index.keys, b""):
            keys = [key for key, text in rows if text.startswith(b"DELETED") == mark]
            await attempts(store, keys, flags.deep, report, wanted)
            if wanted.exists():
                return await hand_over(store, report)
    if (await store.index.count())[1]:  # what was replaced goes when its readers have left
        sweeping = asyncio.create_task(sweep_later(store))
        while not sweeping.done():
            if wanted.exists():
                sweeping.cancel()
                return await hand_over(store, report)
            await asyncio.wait([sweeping], timeout=TICK)
        sweeping.result()
    return None


async def sweep_later(store: Store) -> None:
    """Delete garbage when its readers have left."""
    await asyncio.sleep(store.flags.grace)
    await store.sweep(rest=0)  # nobody else is at work


async def hand_over(store: Store, report: Report) -> None:
    """Let go of the index, and ask the server that takes it."""
    await asyncio.gather(*store.index.group.running)
    if store.index.immediate:
        store.index.env.close()
    store.index.lock.close()
    ends = monotonic() + PATIENCE
    while not holder(store.flags) or holder(store.flags).startswith(OURS):
        require(monotonic() < ends, 503, "a server wanted the index, and did not take it")
        await asyncio.sleep(TICK)
    await ask_server(store.flags, holder(store.flags), report)


async def attempts(
    store: Store, keys: Sequence[bytes], deep: bool, report: Report, wanted: Path
) -> None:
    """Rebalance keys, some at a time; all is given up when a server wants the index."""
    left = iter(keys)

    async def work() -> None:
        for key in left:
            await attempt(store, key, deep, report)
            report.done += 1

    tasks = [asyncio.create_task(work()) for _ in range(ASKED)]
    try:
        while (await asyncio.wait(tasks, timeout=TICK))[1] and not wanted.exists():
            pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def attempt(store: Store, key: bytes, deep: bool, report: Report) -> None:
    """Rebalance a key, and report what is not as it should be."""
    for last in (False, True):  # a second time, if a volume died
        try:
            if b": unbalanced" in await rebalance(store, key, deep):
                report.finding("unbalanced", key=text_of(key))
            return
        except HTTPError as error:
            if last:
                report.finding("failed", key=text_of(key), reason=error.reason)


async def ask_server(flags: argparse.Namespace, server: str, report: Report) -> None:
    """Ask a server to bring every key home, some at a time."""
    clients = os.environ.get("MKV_CLIENTS", flags.userpass)
    userpass = clients.split(",")[0]
    flags_for = {"volumes": [server], "voltimeout": 3600, "subvolumes": 1, "userpass": userpass}
    client = Volumes(argparse.Namespace(**flags_for))
    client.all[server] = Volume(server, client.flags)  # which nobody watches

    async def ask(method: str, path: str) -> tuple[Exchange, str]:
        """A request to the server, and what it says."""
        (exchange,) = await client.open(method, [(server, path)])
        await exchange.answer()
        text = await exchange.text()
        if exchange.status == 200:  # a list ends with its connection
            with suppress(EOFError):
                while True:
                    text += exchange.wire.take(PIECE)
                    await exchange.wire.more(monotonic() + client.flags.voltimeout)
        exchange.close()
        return exchange, text.decode(errors="replace").strip()

    async def bring(left: deque[str], tries: Counter) -> None:
        """Have keys brought home, one after the other, until none is left."""
        while left:
            key = left.popleft()
            path = quote(key) + ("?deep" if flags.deep else "")
            exchange, text = await ask("REBALANCE", path)
            tries[key] += 1
            again = {409: TRIES, 503: 2, 0: 2}.get(exchange.status, 0)  # changed; died
            if tries[key] < again:
                left.append(key)
                continue
            require(exchange.status, 503, f"{server}: {exchange.error}")
            if exchange.status == 204 and exchange.fields[b"key-balance"] != b"balanced":
                report.finding("unbalanced", key=key)
            elif exchange.status not in (204, 404):
                report.finding("failed", key=key, reason=exchange.error or text)
            report.done += 1

    for query in "list", "unlinked":
        start: str | None = ""
        while start is not None:
            exchange, text = await ask("GET", f"/?{query}&limit=1024&start={quote(start)}")
            require(exchange.status == 200, 503, f"{server}: {exchange.error or text}")
            try:
                listed = json.loads(text)
            except ValueError as error:
                raise HTTPError(503, f"{server}: its list was cut short") from error
            start, left, tries = listed["next"] or None, deque(listed["keys"]), Counter()
            await asyncio.gather(*[bring(left, tries) for _ in range(ASKED)])
