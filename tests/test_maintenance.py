"""Rebuild, rebalance and verify: what they find, what they mend, and how they end."""

import contextlib
import functools
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from harness import HERE, MB, WRITE_ID, Cluster, Fake, Liar, Make, Upload, Value, Volume
from harness import ail, assert_copies, blob, block, cluster, copies, download, drive_at, fakes
from harness import free_ports, ideal, in_background, listed, mkv, plant, read, replicas_of
from harness import sha256, until, upload, volume_at

# --- commands -------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A command that has ended: its exit status, its findings, and what it said."""

    status: int
    findings: list[dict]
    said: str

    def kinds(self, key: str = "") -> list[str]:
        """Of all findings, or of those about a key."""
        about = [each for each in self.findings if key in ("", each.get("key"))]
        return sorted(each["finding"] for each in about)

    def values(self, name: str) -> set[str]:
        """What findings say of something."""
        return {each[name] for each in self.findings if each.get(name)}


def command_of(line: str, *flags: object, constants: dict | None = None) -> list[str]:
    """How a command is started; `constants` are limits that are too long for a test."""
    module = "mkv" if line.startswith("re") else "thrasher"
    script = [str(HERE / f"{module}.py")]
    if constants:
        lines = ["import sys", f"sys.path.insert(0, {str(HERE)!r})", f"import {module}"]
        for name, value in constants.items():
            lines += [f"assert hasattr({module}, {name!r})", f"{module}.{name} = {value!r}"]
        script = ["-c", "\n".join([*lines, f"{module}.main()"])]
    return [sys.executable, *script, *line.split(), *map(str, flags)]


def begin(line: str, *flags: object, constants: dict | None = None, **options: Any) -> Any:
    """A command under way."""
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # if we are not to
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(
        command_of(line, *flags, constants=constants), preexec_fn=heed, **streams
    )


def ended(process: subprocess.Popen, status: int | None = None) -> Done:
    """Wait for the end of a command; it has not lost its composure."""
    out, said = process.communicate(timeout=120)
    done = Done(process.returncode, list(map(json.loads, (out or "").splitlines())), said or "")
    assert "Traceback" not in done.said and "Exception" not in done.said, done.said
    assert all(next(iter(finding)) == "finding" for finding in done.findings)
    assert status in (None, done.status), done
    return done


def flags_for(system: Cluster, line: str) -> list[str]:
    """What a command has to know of a cluster."""
    known = ["-volumes", system.names(), "-subvolumes", str(system.subvolumes)]
    if line.startswith("verify"):
        return [*known, "-server", f"127.0.0.1:{system.server.port}"]
    return [*known, "-db", str(system.folder / "index"), *Cluster.FLAGS, *PATIENT]


def run(system: Cluster, line: str, *flags: object, status: int = 0, **options: Any) -> Done:
    """A command from start to end; it sums up what it did. No server runs beside a rebuild."""
    stopped = line == "rebuild" and system.server.running() and system.server.stop() == 0
    done = ended(begin(line, *flags_for(system, line), *flags, **options), status)
    assert re.search(rf"^{line.split()[0]}\b.*\d keys", done.said, re.M), done
    if stopped:
        system.server.start()
    return done


# --- clusters -------------------------------------------------------------------------------------

PATIENT = ("-voltimeout", "3s")  # so that no volume is taken for down on a busy machine
LONG = "/" + "long" * 127 + ".."  # the longest there is; its base64 is cut into pieces
NAMES = [LONG, "/a?b?c?d", "/ with %41? & #", "/" + "ÿ" * 60, "/-", "//", "/日本/語", "/\U0010ffff"]
SIZES = itertools.cycle((5000, 100, 3000, 70_000, 200, 400_000, 40))
VALUES = {name: blob(name, next(SIZES)) for name in [*NAMES, *(f"/k{n}" for n in range(32))]}


def store_all(system: Cluster, values: dict[str, bytes] = VALUES) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(system.server.put, map(quote, values), values.values())) == {201}


def assert_values(system: Cluster, values: dict[str, bytes] = VALUES) -> None:
    """That the server has these values and no other key."""
    if not system.server.running():
        system.server.start()
    assert set(listed(system.server, "/?list")[0]) == set(values)
    assert all(read(system.server, quote(name)) == value for name, value in values.items())


def assert_home(system: Cluster, replicas: int = 3, volumes: int = 9) -> None:
    """That every key is where it belongs, and in the end nothing is anywhere else."""
    names = system.names().split(",")[:volumes]
    for key, record in system.records().items():
        home = mkv.key2volume(key, names, replicas, system.subvolumes)
        assert [replica.location for replica in record.replicas] == home, key
    until(system.is_clean, 30)


def files_of(system: Cluster, path: str) -> list[Path]:
    """The files that the record of a key names."""
    files = [replica.at(path.encode()) for replica in system.records()[path.encode()].replicas]
    return [Path(f"{drive_at(system, location)}{name}") for location, name in files]


def plant_file(system: Cluster, location: str, path: str, data: bytes = b"value") -> str:
    """A file that came to its volume by other ways; its URL."""
    file = Path(f"{drive_at(system, location)}{path}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return location + path


def state(system: Cluster) -> tuple:
    """All that a command could change: index, names, times and sizes of files."""
    files = [Path(f"{volume.folder}{name}") for volume in system.volumes for name in volume.files()]
    stats = {file: file.lstat() for file in files}
    return system.tables(), {f: (s.st_ino, s.st_size, s.st_mtime_ns) for f, s in stats.items()}


def grow(system: Cluster, count: int, *flags: str, used: int = 9) -> None:
    """More volumes, and another server that knows them, or the first of them."""
    for number, port in enumerate(free_ports(count), len(system.volumes)):
        system.volumes.append(Volume(system.folder / f"volume{number}", port, system.subvolumes))
    assert system.server.stop() == 0
    system.server = system.start(*free_ports(1), *flags, *first(system, used))


def first(system: Cluster, count: int) -> tuple[str, str]:
    """Some of the volumes, as a flag."""
    return "-volumes", ",".join(system.names().split(",")[:count])


def without_index(system: Cluster) -> None:
    """End the server, and throw the index away."""
    assert not system.server.running() or system.server.stop() == 0
    shutil.rmtree(system.folder / "index")


# --- REBALANCE, the verb --------------------------------------------------------------------------


def rebalance(system: Cluster, path: str) -> tuple[int, str]:
    """REBALANCE a key: the status, and whether it is at home now."""
    answer = system.server.call("REBALANCE", path)
    return answer.status, answer.fields.get("key-balance", "")


def put_elsewhere(system: Cluster, path: str, value: bytes) -> Volume:
    """PUT a value while the first of its ideal volumes is down: that volume, up again."""
    away = volume_at(system, ideal(system, path)[0])
    away.kill()
    system.sees(away, up=False)
    assert system.server.put(path, value) == 201
    away.start()
    system.sees(away)
    return away


def test_a_key_that_had_a_stand_in_comes_home_and_then_nothing_changes(cluster: Make) -> None:
    system, value = cluster("-grace", "1h", volumes=4), blob("/k", 300_000)
    put_elsewhere(system, "/k", value)
    files = system.files()
    assert rebalance(system, "/k") == (204, "balanced")
    assert list(copies(system, "/k")) == ideal(system, "/k")
    assert_copies(system, "/k", value)
    assert files < system.files() and system.garbage()  # for readers who were sent there
    before = state(system)
    assert rebalance(system, "/k") == (204, "balanced")
    assert state(system) == before


def test_a_drive_that_takes_no_values_keeps_what_it_has_and_gets_no_more(cluster: Make) -> None:
    system = cluster(*PATIENT, volumes=4, subvolumes=1)
    location = ideal(system, "/k")[0]
    other = next(path for n in itertools.count() if location in ideal(system, path := f"/{n}"))
    assert system.server.put("/k", b"value") == 201
    block(drive_at(system, location))
    assert system.server.put(other, b"value") == 201
    before = system.records()
    assert rebalance(system, "/k") == (204, "balanced")
    assert run(system, "rebalance", status=1).findings == [{"finding": "unbalanced", "key": other}]
    assert system.records() == before


def test_what_cannot_be_rebalanced_is_told_and_stays_as_it_is(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    new = Upload(system.server.port, "/new", 1000)
    until(system.open_intents)
    asked = {"/new": 409, "/none": 404, "/": 400, "/k?nonsense": 400}
    assert {path: rebalance(system, path)[0] for path in asked} == asked
    new.vanish()
    files_of(system, "/k")[2].unlink()
    record = system.records()
    for volume in system.volumes:
        volume.kill()
        assert rebalance(system, "/k")[0] == 503
    assert system.records() == record


MEANWHILE = {  # the answer to another request, and to the one that moves the key
    "REBALANCE": (409, 204),
    "PUT": (409, 204),
    "UNLINK": (204, 409),
    "DELETE": (204, 409),
}


@pytest.mark.parametrize("method", MEANWHILE)
def test_of_a_move_and_another_request_one_wins(cluster: Make, method: str) -> None:
    system, value = cluster("-voltimeout", "2s", volumes=4), blob("/k", 3 * MB)
    other, moved = MEANWHILE[method]
    fields = {"body": b"new", "If_Match": "*"} if method == "PUT" else {}
    target = put_elsewhere(system, "/k", value)
    with ThreadPoolExecutor() as pool:
        target.freeze()
        moving = pool.submit(rebalance, system, "/k")
        until(system.open_intents)
        assert system.server.call(method, "/k", **fields).status == other
        target.thaw()
        assert moving.result()[0] == moved
    until(system.is_clean)
    assert len(system.files()) == (0 if method == "DELETE" else 3)
    assert system.server.get("/k") == (value if moved == 204 else None)


def test_large_values_are_moved_and_compared_in_little_memory(cluster: Make) -> None:
    system = cluster("-replicas", "1", "-subvolumes", "1", volumes=1, subvolumes=2)
    value = Value(1, 100 * MB)
    assert upload(system.server, "/large", value) == 201
    grow(system, 0, "-replicas", "1")
    for path in ("/large", "/large?deep"):
        assert rebalance(system, path) == (204, "balanced")
    assert system.server.memory() < 80 * MB
    assert sha256(download(replicas_of(system, b"/large")[0])) == value.sha256()
    assert_home(system, 1)


# --- replicas that are ill ------------------------------------------------------------------------

HARMS: dict[str, Callable[[Path], Any]] = {
    "good": lambda file: None,
    "missing": Path.unlink,
    "short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "long": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "rotten": lambda file: file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes())),
}
MISSING, SIZE, DIFFER = "missing under-replicated", "size under-replicated", "ambiguous " * 3
COMMANDS = ["verify", "verify -deep", "rebuild", "rebalance", "rebalance -deep"]
ILL = {  # keys, named for their files, and what these commands find
    "/good,good,good": ("", "", "", "", ""),
    "/missing,good,good": (MISSING, MISSING, "", "", ""),
    "/hidden/good,missing,good": (MISSING, MISSING, "", "", ""),
    "/long,good,good": (SIZE, SIZE, DIFFER, "", ""),
    "/short,good,long": (f"size {SIZE}", f"size {SIZE}", DIFFER, "", ""),
    "/rotten,good,good": ("", "md5 under-replicated", "", "", ""),
    "/rotten,good,missing": (MISSING, f"md5 {MISSING}", "", "", ""),
    "/rotten,rotten,missing": (MISSING, f"md5 md5 {MISSING}", "", "failed", "failed"),
    "/missing,missing,missing": (f"missing missing {MISSING}",) * 2 + ("", "failed", "failed"),
    "/no md5/rotten,good,good": ("", "md5 md5 md5 under-replicated", "", "", "failed"),
    "/no md5/rotten,missing,good": (MISSING, f"md5 md5 {MISSING}", "", "", "failed"),
}


def make_ill(system: Cluster) -> None:
    """Store the keys above, and do to their files what they are named for."""
    store_all(system, {key: blob(key, 5000) for key in ILL})
    assert system.server.call("UNLINK", "/hidden/good,missing,good").status == 204
    assert system.server.stop() == 0
    unsure = {k: r._replace(hash="") for k, r in system.records().items() if b"no md5" in k}
    plant(system.folder / "index", [(key, record.text()) for key, record in unsure.items()])
    for key in ILL:
        for harm, file in zip(
            key.rpartition("/")[2].split(","), files_of(system, key), strict=True
        ):
            HARMS[harm](file)


@pytest.mark.parametrize("command", [*COMMANDS, "rebalance -deep without a server"])
def test_replicas_that_are_ill_are_found_or_mended(cluster: Make, command: str) -> None:
    system, (command, alone, _) = cluster(*PATIENT), command.partition(" without")
    make_ill(system)
    if not alone:
        system.server.start()
    before = state(system)
    done = run(system, command, status=1)
    expected = {key: sorted(row[COMMANDS.index(command)].split()) for key, row in ILL.items()}
    assert {key: done.kinds(key) for key in ILL} == expected
    if not command.startswith("rebalance"):
        assert state(system) == before
        return
    assert not alone or f": {len(ILL)} keys" in done.said
    if alone:
        system.server.start()
    until(lambda: not system.garbage() and system.files() <= system.named())
    for key, failed in expected.items():
        old, record = before[0][0][key.encode()], system.records()[key.encode()]
        assert not failed or record == old
        assert (record.deleted, not record.hash) == (old.deleted, not old.hash)
        mended = not failed and ("-deep" in command or "rotten" not in key)
        there = [file.read_bytes() for file in files_of(system, key) if file.exists()]
        assert there.count(blob(key, 5000)) >= (3 if mended else key.count("good")), key


@pytest.mark.parametrize("harm", ["rotten", "long"])
def test_what_was_mended_is_newer_to_a_rebuild_than_what_was_ill(cluster: Make, harm: str) -> None:
    system, value = cluster(*PATIENT, "-grace", "1h"), blob("/k", 5000)
    assert system.server.put("/k", value) == 201
    HARMS[harm](files_of(system, "/k")[1])
    assert rebalance(system, "/k?deep") == (204, "balanced")
    without_index(system)
    assert set(run(system, "rebuild", status=1).kinds()) == {"garbage"}
    assert_values(system, {"/k": value})


# --- rebalance, the command -----------------------------------------------------------------------


def use(system: Cluster, number: int, values: dict[str, bytes], enough: threading.Event) -> None:
    """Write, read, unlink and delete keys of one's own; nothing may fail."""
    server, dice = system.server, random.Random(number)
    for turn in itertools.count():
        if turn > 20 and enough.is_set():
            return
        if turn % 2:
            name = f"/new{number}/{turn}"
            values[name] = blob(name, dice.choice((10, 3000, 100_000)))
            assert server.put(name, values[name]) == 201
        chosen = dice.choice(list(values))
        assert read(server, quote(chosen)) == values[chosen], chosen
        if turn % 4 == 3:
            method = "DELETE" if turn % 8 == 3 else "UNLINK"
            assert server.call(method, quote(chosen)).status == 204
            assert read(server, quote(chosen)) is None
            del values[chosen]


@contextlib.contextmanager
def traffic(system: Cluster) -> Iterator[dict[str, bytes]]:
    """Clients that share the keys for a block; what they have made of them is the value then."""
    shares = [dict(list(VALUES.items())[number::3]) for number in range(3)]
    enough, left = threading.Event(), {}
    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(use, system, n, share, enough) for n, share in enumerate(shares)]
        try:
            yield left
        finally:
            enough.set()
    for client, share in zip(clients, shares, strict=True):
        client.result()
        left |= share


MOVES = {  # volumes before and after, replicas and subvolumes before and after
    "more volumes and replicas": (3, 5, 2, 3, 2, 2),
    "fewer volumes and replicas": (5, 3, 3, 2, 2, 2),
    "more subvolumes": (3, 3, 3, 3, 1, 10),
    "a volume lost for good": (4, 3, 2, 2, 2, 2),
}


@pytest.mark.parametrize("move", MOVES)
def test_every_key_moves_home_and_no_client_sees_it(cluster: Make, move: str) -> None:
    volumes, later, replicas, wanted, drives, subvolumes = MOVES[move]
    old = ("-replicas", f"{replicas}", "-subvolumes", f"{drives}")
    system = cluster(*old, volumes=volumes, subvolumes=subvolumes)
    store_all(system, VALUES | {"/hidden": b"value"})
    assert system.server.call("UNLINK", "/hidden").status == 204
    lost = system.volumes[later:]
    if "lost" in move:
        lost[0].kill()
    new = ("-replicas", f"{wanted}", "-grace", "2s", *PATIENT)
    grow(system, max(0, later - volumes), *new, used=later)
    with traffic(system) as values:
        assert run(system, "rebalance").findings == []  # it is the server's flags that count
        flags = ("-replicas", wanted, *first(system, later))
        assert run(system, "verify -deep", *flags).findings == []
    if "lost" in move:  # what it had stays listed, should it ever come back
        assert system.garbage()
        lost[0].start()
    assert_home(system, wanted, later)
    assert not any(volume.files() for volume in lost)
    assert_values(system, values)
    assert "/hidden" in listed(system.server, "/?unlinked")[0]


VICTIMS = ["rebuild", "rebalance", "rebalance without a server", "server", "volume"]


@pytest.mark.parametrize("victim", VICTIMS)
def test_who_is_killed_anywhere_leaves_the_rest_to_the_next(cluster: Make, victim: str) -> None:
    system, (victim, alone, _) = cluster(subvolumes=2), victim.partition(" without")
    values = VALUES | {f"/large{number}": blob(f"large{number}", 12 * MB) for number in range(4)}
    store_all(system, values)
    grow(system, 1, *PATIENT)
    if victim == "rebuild":
        without_index(system)
    assert not alone or system.server.stop() == 0
    command = "rebuild" if victim == "rebuild" else "rebalance"
    other = {"server": system.server, "volume": system.volumes[3]}.get(victim)
    for _ in range(3):
        process = begin(command, *flags_for(system, command))
        time.sleep(0.2 + random.random() / 3)  # anywhere
        (other or process).kill()
        process.communicate()
        ends = (0, 1, 2) if other else (0, 1, -signal.SIGKILL)  # 1: the last one's move goes on
        assert process.returncode in ends
        if victim == "volume":
            shutil.rmtree(other.folder)  # there is another drive in its place
        if other:
            other.start()
            system.sees(system.volumes[3])
    until(lambda: not system.open_intents(), 30)
    assert run(system, command).findings == []
    assert_values(system, values)
    assert run(system, "rebalance").findings == []
    assert_home(system)


# --- rebuild --------------------------------------------------------------------------------------


def test_a_tree_of_minikeyvalue_is_adopted(cluster: Make) -> None:
    system = cluster(*PATIENT)
    without_index(system)
    values = {name: value for name, value in VALUES.items() if name != LONG}
    for number, (name, value) in enumerate(values.items()):
        stranger, *places = ideal(system, name)
        places.append(re.sub("sv0.", f"sv0{number % 10}", stranger))  # may be on another drive
        for place in places:
            plant_file(system, place, mkv.key2path(name.encode()), value)
    old = system.files()
    assert run(system, "rebuild").findings == []
    assert not system.garbage() and system.named() == old == system.files()
    assert_values(system, values)
    assert run(system, "rebalance").findings == []
    assert_home(system)
    assert_values(system, values)
    assert {system.server.call("DELETE", quote(name)).status for name in values} == {204}
    until(lambda: not system.files() and not system.garbage())


def test_rebuild_makes_the_index_that_was_there(cluster: Make) -> None:
    system = cluster("-subvolumes", "1", subvolumes=2)
    store_all(system)
    grow(system, 1, *PATIENT)
    for number in range(20):  # so that ids differ within a record, and subvolumes among records
        assert rebalance(system, f"/k{number}") == (204, "balanced")
    assert system.server.call("UNLINK", "/k0").status == 204
    until(system.is_clean)
    assert system.server.stop() == 0
    new = system.start(*free_ports(1), db=system.folder / "empty")  # is it what is wanted?
    assert "the index is empty: rebuild it?" in new.log.read_text()
    assert new.stop() == 0
    system.server.start()
    refused = ended(begin("rebuild", *flags_for(system, "rebuild")), 2)
    assert refused.findings == [] and "used by" in refused.said and refused.said.count("\n") == 1
    assert system.server.stop() == 0
    before = system.tables()
    assert run(system, "rebuild").findings == []
    assert system.tables() == before  # what only the index knows is kept: MD5s, and UNLINKs
    without_index(system)
    assert run(system, "rebuild").findings == []
    known = {key: (set(record.replicas), record.size) for key, record in before[0].items()}
    assert {key: (set(r.replicas), r.size) for key, r in system.records().items()} == known
    assert_values(system)


def test_rebuild_revives_nothing_deleted_and_nothing_unacknowledged(cluster: Make) -> None:
    flags = ("-voltimeout", "5s", "-grace", "1h")
    system = cluster(*flags)
    store_all(system, {"/deleted": b"value", "/moved": b"value"})
    grow(system, 0, *flags, "-replicas", "2")
    assert rebalance(system, "/moved") == (204, "balanced")
    grow(system, 0, *flags)
    volume = volume_at(system, ideal(system, "/deleted")[0])
    volume.kill()
    system.sees(volume, up=False)
    assert system.server.call("DELETE", "/deleted").status == 204
    volume.start()
    system.sees(volume)
    known = system.records()
    volume.freeze()
    thread = in_background(lambda: system.server.put("/unacknowledged", b"value"))
    until(lambda: len(system.files()) == 3 + 1 + 2)
    system.server.kill()
    volume.thaw()
    thread.join()
    for _ in range(2):
        assert run(system, "rebuild").findings == []
        assert system.records() == known and {b"/deleted", b"/moved"} <= system.garbage().keys()


NEWEST, OLDEST, OWN, COPY = "f" * 16, "0" * 15 + "1", "{own}", "{own:.8}00000000"
HISTORIES = {  # what else is there: on which volumes, with which id; what is found
    "/same": ("", "", b"", ""),
    "/copied by a move": ("0", COPY, b"value", ""),
    "/older": ("0", OLDEST, b"older", "garbage"),
    "/minikeyvalue's": ("1", "", b"older", "garbage"),
    "/newer": ("012", NEWEST, b"newer", "garbage"),
    "/newer, but fewer": ("01", NEWEST, b"newer", "ambiguous"),
    "/half": ("1", OWN, b"val", "ambiguous"),
}


@pytest.mark.parametrize("index", ["new", "existing"])
def test_the_newest_files_of_a_key_are_its_value(cluster: Make, index: str) -> None:
    system, unclear = cluster(subvolumes=1), set()
    store_all(system, dict.fromkeys(HISTORIES, b"value"))
    for key, record in system.records().items():
        numbers, write_id, data, kind = HISTORIES[key.decode()]
        path = mkv.key2path(key, write_id.format(own=record.write_id))
        for number in numbers:
            plant_file(system, system.volumes[int(number)].name, path, data)
        if kind == "ambiguous":
            unclear |= {file for file in system.files() if mkv.key2path(key) in file}
    files = system.files()
    assert system.server.stop() == 0
    if index == "new":
        without_index(system)
    done = run(system, "rebuild", status=1)
    losers, records = files - system.named() - unclear, system.records()
    garbage = {"".join(f.at(key)) for key, names in system.garbage().items() for f in names}
    assert garbage == (losers if index == "existing" else set())  # else they are only told
    told = {each["location"] + each["path"] for each in done.findings}
    assert told == unclear | (losers if index == "new" else set())
    assert records.keys() == {key.encode() for key in HISTORIES}
    assert (records[b"/same"].hash != "") == (index == "existing") and not records[b"/newer"].hash
    system.server.start()
    until(lambda: not system.garbage())
    assert system.files() == files - garbage
    for name, row in HISTORIES.items():
        if row[3] != "ambiguous" or (index == "existing" and "fewer" in name):
            assert read(system.server, quote(name)) == (row[2] if name == "/newer" else b"value")


# --- volumes that are ill -------------------------------------------------------------------------


@pytest.mark.parametrize("ailment", ["dead", "frozen", "away"])
def test_what_cannot_be_reached_is_told_and_the_rest_goes_on(cluster: Make, ailment: str) -> None:
    one = ("-replicas", "1")
    system = cluster(*one, "-voltimeout", "1s", subvolumes=2)
    store_all(system)
    before, volume = system.records(), system.volumes[0]
    lost = {k.decode() for k, record in before.items() if volume.name in record.text().decode()}
    cure = ail(ailment, volume, None)
    system.sees(volume, up=False)
    for command in ("verify -deep", "rebuild", "rebalance"):
        is_verify = command.startswith("verify")
        more = {"constants": {"PATIENCE": 1}} if is_verify else {}
        flags = one if is_verify else (*one, "-voltimeout", "300ms")
        status, kind = (1, "failed") if command == "rebalance" else (2, "unreachable")
        done = run(system, command, *flags, status=status, **more)
        assert set(done.kinds()) == {kind} and all(each["reason"] for each in done.findings)
        assert all(place.startswith(volume.name) for place in done.values("location"))
        assert done.values("key") == (set() if command == "rebuild" else lost)
        assert command == "rebalance" or "/" in done.values("path")  # it is no empty drive
        assert system.records() == before
    without_index(system)
    assert set(run(system, "rebuild", *flags, status=2).kinds()) == {"unreachable"}
    assert set(system.records()) == {name.encode() for name in VALUES.keys() - lost}
    cure()
    for command in ("rebuild", "verify"):
        assert run(system, command, *one).findings == []
        assert_values(system)


JUNK = ["/README", "/sv9", "/ab", "/5d/41/not base64!", "/5d/42/aGVsbG8=", "/5d/41/aGVsbG8"]
JUNK += ["/5d/41/aGVsbG8=-0123", "/aa/bb/cc/dd/ee/ff", "/aa/b b/#%41?&", "/aa/%2e/\"quoted'\\"]
JUNK += ["/aa/bb/\udcff\udcfe", "/a\udcff/bb/x", "/été/ÿ", "/aa/bb/%2e%2e", "/aa/%252e%252e/%00"]
JUNK += ["/aa/x../\\..\\", "/aa/bb/😀", "/aa/bb/" + "x" * 255, "/%2e%2e/bb/x"]


def test_names_that_mkv_does_not_give_are_told_and_left_alone(cluster: Make) -> None:
    system, link = cluster(), mkv.key2path(b"/x", WRITE_ID)
    store_all(system)
    place = ideal(system, "/x")[0]
    for junk in [*JUNK, link, "/lost+found/x"]:
        plant_file(system, place, junk)
    (drive_at(system, place) / "aa/bb/aa/bb").mkdir(parents=True)  # nobody's yet
    file = Path(f"{drive_at(system, place)}{link}")
    file.unlink()
    file.symlink_to("nowhere")
    names = [re.sub("[\udc80-\udcff]", "\ufffd", name) for name in [*JUNK, link]]
    before = state(system)
    for command in ("rebuild", "verify"):
        done = run(system, command, status=1)
        assert set(done.kinds()) == {"name"} and done.values("location") == {place}
        told = {re.sub("[\udc80-\udcff]", "\ufffd", path) for path in done.values("path")}
        assert len(told) == len(names)  # of a folder that leads nowhere its own name is said
        assert all(any(f"{name}/".startswith(f"{path}/") for path in told) for name in names)
        assert state(system) == before


def row(name: Any, kind: Any = "file", **more: Any) -> dict:
    """A file or folder in a listing."""
    return {"name": name, "type": kind} | more


def listing(*rows: Any) -> bytes:
    """As nginx gives it."""
    return json.dumps(rows).encode()


LISTINGS = [b"hello", b"", b"\xff\xfe\0", listing(row("x", size=1))[:-9], b"7", b"null", b'"x"']
LISTINGS += [b"[" * 100_000, b'{"a":' * 100_000, listing(1, 2), listing([]), listing(None)]
LISTINGS += [listing(odd) for odd in ({"name": "x"}, {"type": "directory"}, row("x"))]
LISTINGS += [b'[{"name": "x", "type": "file", "size": %b}]' % n for n in (b"NaN", b"9" * 5000)]
LISTINGS += [listing(row("x", size=size)) for size in (-1, 1.5, "1", None, True, [5], 1e400)]
LISTINGS += [listing(row(name, size=1)) for name in ("..", "", 7, [], "a/b", "\ud800", "\r\n")]
LISTINGS += [listing(row(name, "directory")) for name in ("..", ".", "", "a/b", "\udfff")]
LISTINGS += [listing(row("x", kind)) for kind in (7, [], "other")]
FOLDERS = {f"/{number:02x}/": text for number, text in enumerate(LISTINGS)}


OK = b"HTTP/1.1 200 OK\r\n"
NONSENSE = [  # answers, and what they go on with
    (OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n[]\r\n0\r\n\r\n", b""),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n", b""),
    (OK + b"Content-Length: 9\r\n\r\n[]", b""),
    (OK + b"Content-Length: 999999999999\r\n\r\n", b"[" * MB),
    (b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n[]", b""),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", b""),
    (b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n", b""),
    (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b""),
    (b"", b""),
]


@pytest.mark.parametrize("command", ["rebuild", "verify"])
def test_volumes_that_make_no_sense_are_told_and_the_rest_goes_on(
    tmp_path: Path, fakes: Callable[[], Fake], command: str
) -> None:
    index, odd, deep, liars = fakes(), fakes(), fakes(), [Liar(*says, ".") for says in NONSENSE]
    _, first, second, name = mkv.key2path(b"/key", WRITE_ID).split("/")
    rows = [row(name, size=5), row(name[:-1], "other"), row("x" * 9999, size=1)]
    odd.stored = FOLDERS | {
        "/": listing(*(row(path.strip("/"), "directory") for path in [*FOLDERS, first])),
        f"/{first}/": listing(row(second, "directory")),
        f"/{first}/{second}/": listing(*rows),
        f"/{first}/{second}/{name}": b"value",
    }
    deeper, nothing = listing(row("aa", "directory")), b'{"keys": [], "garbage": [], "next": ""}'
    deep.before = lambda _, path: deep.stored.setdefault(path, deeper)  # folders without end
    index.before = lambda _, path: index.stored.setdefault(path, nothing)
    names = ",".join(volume.name for volume in [odd, deep, *liars])
    own = {"rebuild": ("-db", tmp_path / "index", "-voltimeout", "300ms")}
    flags = own.get(command, ("-server", index.name))
    limits = {} if command == "rebuild" else {"PATIENCE": 1}
    more = ("-volumes", names, "-subvolumes", "1", "-replicas", "1")
    done = ended(begin(command, *more, *flags, constants=limits), 2)
    found = {(each["location"], each["path"]): each["finding"] for each in done.findings}
    assert len(found) == len(done.findings)
    for liar in liars:
        assert found.pop((liar.name, "/")) == "unreachable", liar.says
        liar.close()
    for folder, text in FOLDERS.items():
        ((at, path),) = [each for each in found if each[1].startswith(folder)]
        assert found.pop((at, path)) == ("unreachable" if path == folder else "name"), text
    known = {"name": 3, "unnamed": 1} if command == "verify" else {"name": 3}
    assert Counter(found.values()) == known and {deep.name, odd.name} == {at for at, _ in found}
    assert command == "verify" or "rebuild: 1 keys" in done.said


# --- how they end ---------------------------------------------------------------------------------


SIGNALS = {
    "rebuild": signal.SIGTERM,
    "rebalance": signal.SIGINT,
    "rebalance without a server": signal.SIGHUP,
    "verify": signal.SIGINT,
}
SLOW = ("-voltimeout", "60s")


@pytest.mark.parametrize("command", SIGNALS)
def test_a_signal_ends_a_command_at_once_and_it_has_told_how_far_it_was(
    cluster: Make, command: str
) -> None:
    system, number, said = cluster(), SIGNALS[command], bytearray()
    store_all(system)
    grow(system, 1, *SLOW)
    beside = command in ("rebalance", "verify")
    assert beside or system.server.stop() == 0
    command, volume = command.split()[0], system.volumes[3]
    volume.freeze()
    screen, terminal = os.openpty()
    flags = [*flags_for(system, command), *(SLOW if command != "verify" else ())]
    process = begin(command, *flags, stderr=terminal)
    os.close(terminal)
    os.set_blocking(screen, False)

    def lines() -> int:
        with contextlib.suppress(BlockingIOError):
            said.extend(os.read(screen, 4096))
        return said.count(b"\r")

    until(lambda: lines() > 2)  # it is one that changes
    assert b"\n" not in said and re.search(rb"%b: .*\d keys" % command.encode(), said)
    process.send_signal(number)
    assert process.wait(20) == 2  # not in a minute
    done = ended(process)
    assert done.kinds() == ["unfinished"] and done.values("reason") == {"interrupted"}
    assert os.read(screen, 65536).endswith(b"\n")
    os.close(screen)
    volume.thaw()
    assert_values(system)
    until(lambda: not system.open_intents(), 30)  # what was begun is ended
    assert run(system, "rebalance").findings == []
    assert_home(system)


def test_a_server_that_starts_gets_the_index_from_a_rebalance(cluster: Make) -> None:
    system = cluster(subvolumes=1)
    number = 2000  # so that it takes longer than a server to start
    store_all(system, {f"/k{each}": blob(f"/k{each}", 100) for each in range(number)})
    grow(system, 1, *PATIENT)
    for volume in system.volumes:  # of two workers: some keys take seconds
        for worker in volume.workers()[1:]:
            os.kill(worker, signal.SIGSTOP)
    assert system.server.stop() == 0
    command = begin("rebalance", *flags_for(system, "rebalance"))
    lock = system.folder / "index/alive"
    until(lambda: lock.read_text().startswith("a command, rebalance"))
    system.server.start()
    for volume in system.volumes:
        volume.thaw()
    done = ended(command, 0)
    assert done.findings == []
    assert number <= int(re.findall(r": (\d+) keys", done.said)[-1]) < 2 * number, "in mid-work"
    assert system.server.metric('mkv_requests_total{method="REBALANCE",status="204"}') >= number
    assert time.time() - system.server.metric('mkv_command_ended_seconds{command="rebalance"}') < 60
    assert system.server.metric('mkv_command_findings{command="rebalance"}') == 0
    assert_home(system)


STREAMS = {">/dev/full": 2, ">&-": 2, "| true": 2, "2>/dev/full": 1, "2>&-": 1}


@pytest.mark.parametrize("command", ["rebuild", "rebalance", "verify"])
def test_a_command_whose_words_nobody_takes_does_its_work_and_does_not_end_well(
    cluster: Make, command: str
) -> None:
    system = cluster(subvolumes=1)
    store_all(system)
    for file in files_of(system, "/k0"):
        file.unlink()
    plant_file(system, system.volumes[0].name, "/aa/bb/junk")
    if command == "rebuild":
        without_index(system)
    assert command != "rebalance" or system.server.stop() == 0
    line = shlex.join(command_of(command, *flags_for(system, command)))
    for redirect, status in STREAMS.items():
        words = ["bash", "-c", f"set -o pipefail; {line} {redirect}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, (redirect, done)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done
        assert all(json.loads(each)["finding"] for each in done.stdout.splitlines())
    if not system.server.running():
        system.server.start()
    assert read(system.server, "/k1") == VALUES["/k1"]
