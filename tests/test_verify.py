"""What `thrasher.py verify` finds, what it passes over, and how it ends."""

import contextlib
import dataclasses
import fcntl
import http.server
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import pytest

from harness import (  # noqa: F401 (some are fixtures)
    HERE,
    WRITE_ID,
    Cluster,
    Liar,
    Make,
    Volume,
    cluster,
    drive_at,
    file_of,
    free_ports,
    ideal,
    mkv,
    plant,
    until,
    volume_at,
    volume_of,
)

SLASH = "/a?b?c?d"  # its base64 has slashes
LONG = "/" + "long" * 127 + ".."  # the longest there is; its base64 is cut into pieces
NAMES = [SLASH, LONG, "/été", "/a b+%41&c=1#?", "/ff/ff", "//x", "/\U0010ffff"]
OLDER = "5000000000000000"  # another write id


# --- harness --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Look:
    """A verify that has ended: its exit status, its findings, and what it said."""

    status: int
    findings: list[dict]
    said: str

    def kinds(self) -> set[str]:
        return {finding["finding"] for finding in self.findings}

    def found(self, kind: str) -> list[dict]:
        """The findings of a kind, without the word."""
        found = [dict(each) for each in self.findings]
        return [each for each in found if each.pop("finding") == kind]


def verify(
    servers: str, volumes: Iterable[str], *flags: str, constants: dict | None = None, **options: Any
) -> subprocess.Popen:
    """A verify under way; `constants` are limits of the module that are too long for a test."""
    script = [str(HERE / "thrasher.py")]
    if constants:
        lines = ["import sys", f"sys.path.insert(0, {str(HERE)!r})", "import thrasher"]
        for name, value in constants.items():
            lines += [f"assert hasattr(thrasher, {name!r})", f"thrasher.{name} = {value!r}"]
        script = ["-c", "\n".join([*lines, "thrasher.main()"])]
    command = [sys.executable, *script, "verify", "-server", servers]
    command += ["-volumes", ",".join(volumes), *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, **streams)


def ended(process: subprocess.Popen, status: int | None = None) -> Look:
    """Wait for its end; it has not lost its composure."""
    with process:
        out, said = process.communicate(timeout=120)
    look = Look(process.returncode, [json.loads(line) for line in (out or "").splitlines()], said)
    assert "Traceback" not in (said or "") and "Exception" not in (said or ""), said
    assert all(next(iter(finding)) == "finding" for finding in look.findings)
    assert status is None or look.status == status, look
    return look


def run(system: Cluster, *flags: str, status: int = 0, **options: Any) -> Look:
    """A verify of a cluster, from start to end."""
    names = [volume.name for volume in system.volumes]
    more = ("-subvolumes", str(system.subvolumes), *flags)
    look = ended(verify(system.server_name, names, *more, **options), status)
    assert re.search(r"^verify: done: [\d,]+ keys, .* files; ", look.said, re.MULTILINE), look
    return look


def peak_memory(process: subprocess.Popen) -> float:
    """Wait for its end; MiB that it had at most (what getrusage says may be its parent's)."""
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, TypeError):
            text = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]))
        time.sleep(0.01)
    return peak / 1024


def located(file: str) -> dict[str, str]:
    """Location and path of a file, as findings have them."""
    location, path = re.fullmatch(r"([^/]+(?:/sv[0-9A-F]{2})?)(/.*)", file).groups()
    return {"location": location, "path": path}


class Lists(http.server.ThreadingHTTPServer):
    """An index server that only answers lists. A test may spoil what it says.

    `before(path)` is called before each answer; what it returns, if anything, is said instead.
    """

    daemon_threads, request_queue_size = True, 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ListsHandler)
        self.name = f"127.0.0.1:{self.server_address[1]}"
        self.keys: dict[str, dict] = {}
        self.unlinked: dict[str, dict] = {}
        self.garbage: list[dict] = []
        self.asked: list[str] = []
        self.before: Callable[[str], bytes | None] = lambda path: None
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Connections break: nobody has to hear of it."""

    def add(self, key: str, files: Iterable[str], size: int | None = 5, md5: Any = None) -> dict:
        """Name a key's files."""
        item = {"key": key, "size": size, "md5": md5, "time": 1, "files": list(files)}
        self.keys[key] = item
        return item

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class ListsHandler(http.server.BaseHTTPRequestHandler):
    """One question; the answer ends with the connection."""

    server: Lists

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        target = self.requestline.split()[1]  # self.path has no two slashes at its front
        self.server.asked.append(target)
        said = self.server.before(target)
        path, _, query = target.partition("?")
        words = parse_qs(query, keep_blank_values=True)
        if said is None:
            name, lists = "keys", {key: [item] for key, item in self.server.keys.items()}
            if "unlinked" in words:
                lists = {key: [item] for key, item in self.server.unlinked.items()}
            elif "garbage" in words:
                name, lists = "garbage", {}
                for item in self.server.garbage:
                    lists.setdefault(item["key"], []).append(item)
            prefix, limit = unquote(path), int(words.get("limit", ["1000000"])[0])
            start = max(prefix, words.get("start", [""])[0])
            keys = sorted(key for key in lists if key >= start and key.startswith(prefix))
            page, after = keys[:limit], keys[limit : limit + 1]
            listed = [item for key in page for item in lists[key]]
            said = json.dumps({name: listed, "next": "".join(after)}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said)


@pytest.fixture
def lists() -> Iterator[Callable[[], Lists]]:
    """Makes servers that only answer lists."""
    made = []

    def make() -> Lists:
        made.append(Lists())
        return made[-1]

    yield make
    for each in made:
        each.close()


class Bare(Cluster):
    """Volumes, and lists of what is on them: a system whose index a test makes up."""

    def __init__(self, folder: Path, lists: Lists, volumes: int = 3, subvolumes: int = 2) -> None:
        self.folder, self.subvolumes, self.servers = folder, subvolumes, []
        self.lists, self.server_name, self.volumes = lists, lists.name, []
        for port in free_ports(volumes):
            self.volumes.append(Volume(folder / f"volume{port}", port, subvolumes))

    def store(self, key: str, value: bytes = b"value", write_id: str = WRITE_ID) -> list[str]:
        """Write three files of a key that nothing names yet."""
        path = mkv.key2path(key.encode(), write_id)
        files = [location + path for location in ideal(self, key)]
        for file in files:
            put(self, file, value)
        return files


@pytest.fixture
def bare(tmp_path: Path, lists: Callable[[], Lists]) -> Iterator[Callable[..., Bare]]:
    """Makes systems whose index a test makes up."""
    made = []

    def make(**settings: Any) -> Bare:
        folder = tmp_path / f"bare{len(made)}"
        folder.mkdir()
        made.append(Bare(folder, lists(), **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def on_disk(system: Cluster, file: str) -> Path:
    """Where a file of a list lies."""
    at = located(file)
    return Path(f"{drive_at(system, at['location'])}{at['path']}")


def put(system: Cluster, file: str, value: bytes | str = b"value") -> Path:
    """A file that came to its volume by other ways."""
    path = on_disk(system, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else value.encode())
    return path


def bystander(system: Cluster, file: str) -> str:
    """A file's name, as it would be at another volume."""
    at = located(file)
    others = (volume.name for volume in system.volumes)
    other = next(name for name in others if name != volume_of(at["location"]))
    return other + at["location"].removeprefix(volume_of(at["location"])) + at["path"]


def state(system: Cluster) -> dict[str, tuple]:
    """All files, and what a command could change of them."""
    found = {}
    for volume in system.volumes:
        for name in volume.files():
            stat = Path(f"{volume.folder}{name}").stat()
            found[volume.name + name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def asks_for(path: str, key: str) -> bool:
    """Whether a question is about one key alone."""
    return path.startswith(f"{quote(key)}?")


# --- what it finds --------------------------------------------------------------------------------


@pytest.mark.parametrize("subvolumes", [1, 2, 256])
def test_a_sound_system_is_clean(bare: Callable[..., Bare], subvolumes: int) -> None:
    system = bare(subvolumes=subvolumes)
    for key in NAMES:
        system.lists.add(key, system.store(key))
    system.lists.unlinked["/hidden"] = system.lists.add("/hidden", system.store("/hidden"))
    del system.lists.keys["/hidden"]
    system.lists.add("/ancestor's", system.store("/ancestor's", write_id=""), size=None)
    garbage = system.store("/garbage")
    system.lists.garbage = [{"key": "/garbage", "file": file, "age": 1.5} for file in garbage]
    before = state(system)
    for flags in ((), ("-deep",), ("-wait", "-settle", "1")):
        assert run(system, *flags).findings == []
    assert state(system) == before


def test_everything_that_is_amiss_is_named_and_nothing_is_changed(
    bare: Callable[..., Bare],
) -> None:
    system = bare()
    md5 = mkv.md5(b"value").hexdigest()
    for key in ("/bent", "/differ", "/short", "/whole", *NAMES):
        system.lists.add(key, system.store(key), md5=None if key == "/differ" else md5)
    wrong, deep = [], []
    bent, short = (system.lists.keys[key]["files"][1] for key in ("/bent", "/short"))
    put(system, bent, "volue")
    deep.append({"finding": "md5", "key": "/bent"} | located(bent))
    put(system, system.lists.keys["/differ"]["files"][0], "velue")
    for file in system.lists.keys["/differ"]["files"]:  # nobody knows which one is right
        deep.append({"finding": "md5", "key": "/differ"} | located(file))
    put(system, short, "val")
    wrong.append({"finding": "size", "key": "/short"} | located(short))
    for key in NAMES:
        missing = system.lists.keys[key]["files"][2]
        on_disk(system, missing).unlink()
        wrong.append({"finding": "missing", "key": key} | located(missing))
    for key, write_id in (("/stranger", WRITE_ID), ("/whole", OLDER), ("/é" + "ÿ" * 59, "")):
        file = ideal(system, key)[0] + mkv.key2path(key.encode(), write_id)
        put(system, file)
        wrong.append({"finding": "unnamed", "key": key} | located(file))
    moved = bystander(system, system.lists.keys["/whole"]["files"][0])
    if moved not in system.lists.keys["/whole"]["files"]:
        put(system, moved)
        wrong.append({"finding": "unnamed", "key": "/whole"} | located(moved))
    nonsense = f"{ideal(system, '/x')[0]}/aa/bb/nonsense"
    put(system, nonsense)
    wrong.append({"finding": "name", "key": ""} | located(nonsense))
    before = state(system)
    for flags, expected in (((), wrong), (("-deep",), wrong + deep)):
        look = run(system, *flags, status=1)
        found = [each for each in look.findings if each["finding"] != "under-replicated"]
        assert sorted(map(str, found)) == sorted(map(str, expected))
        few = {"/short": 2} | dict.fromkeys(NAMES, 2)
        few |= {"/bent": 2, "/differ": 0} if flags else {}
        said = {each["key"]: each["good"] for each in look.found("under-replicated")}
        assert said == few
    assert state(system) == before


def test_keys_with_fewer_replicas_than_asked_for_are_named(bare: Callable[..., Bare]) -> None:
    system = bare()
    for number in range(5):
        system.lists.add(f"/k{number}", system.store(f"/k{number}"))
    assert run(system, "-replicas", "2").findings == []
    look = run(system, "-replicas", "4", status=1)
    assert look.kinds() == {"under-replicated"}
    assert {each["key"] for each in look.found("under-replicated")} == set(system.lists.keys)


JUNK = ["/nonsense", "/aabbc", "/ab", "/aa/bc", "/aa/zz/x", "/aa/bb/cc/dd/ee/ff", "/sv9", "/été/ÿ"]
JUNK += ["/5d/41/aGVsbG8", "/aa/b b/#%41?&", "/aa/%2e/\"quoted'\\", "/aa/bb/%2e%2e", "/lost+found"]
JUNK += ["/aa/bb/\udcff\udcfe", "/a\udcff/bb/x", "/aa/bb/😀", "/aa/bb/" + "x" * 255, "/aa/x../\\.."]


@pytest.mark.parametrize("subvolumes", [1, 2])
def test_what_has_a_name_that_mkv_does_not_give_is_named(
    bare: Callable[..., Bare], subvolumes: int
) -> None:
    system = bare(subvolumes=subvolumes, volumes=1)
    place = ideal(system, "/x")[0]
    for junk in JUNK:
        path = Path(f"{drive_at(system, place)}{junk}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"junk")
    (drive_at(system, place) / "aa/bb/aa/bb").mkdir(parents=True)  # nobody's yet
    look = run(system, status=1)
    assert look.kinds() == {"name"}
    assert {(each["key"], each["location"]) for each in look.findings} == {("", place)}
    said = sorted(re.sub("[\ufffd\udc80-\udcff]", "?", each["path"]) for each in look.findings)
    real = sorted(re.sub("[\ufffd\udc80-\udcff]", "?", junk) for junk in JUNK)
    assert len(said) == len(real)  # of a folder that leads nowhere only its own name is said
    assert all(b == a or b.startswith(a + "/") for a, b in zip(said, real, strict=True))


def test_a_link_to_nowhere_is_a_name_and_lost_and_found_is_none(bare: Callable[..., Bare]) -> None:
    system = bare(volumes=1)
    place = ideal(system, "/x")[0]
    (drive_at(system, place) / "lost+found").mkdir()
    assert run(system).findings == []
    link = Path(f"{drive_at(system, place)}{mkv.key2path(b'/x', WRITE_ID)}")
    link.parent.mkdir(parents=True)
    link.symlink_to("nowhere")
    assert run(system, status=1).kinds() == {"name"}


def test_drives_beyond_the_subvolumes_are_named(bare: Callable[..., Bare]) -> None:
    system = bare(volumes=1)
    look = ended(verify(system.server_name, [system.volumes[0].name], "-subvolumes", "1"), 1)
    assert {each["path"] for each in look.found("name")} == {"/sv00", "/sv01"}


# --- what changes meanwhile -----------------------------------------------------------------------


def test_a_stray_is_told_from_a_write_by_waiting_and_can_be_deleted(
    bare: Callable[..., Bare],
) -> None:
    system = bare()
    stray = ideal(system, SLASH)[0] + mkv.key2path(SLASH.encode(), WRITE_ID)
    written = ideal(system, "/late")[0] + mkv.key2path(b"/late", WRITE_ID)
    brief = ideal(system, "/brief")[0] + mkv.key2path(b"/brief", WRITE_ID)
    for file in (stray, written, brief):
        put(system, file)
    began = time.monotonic()
    process = verify(
        system.server_name, [v.name for v in system.volumes], "-subvolumes=2", "-wait", "-settle=3s"
    )
    unnamed = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert {each["finding"] for each in unnamed} == {"unnamed"}
    system.lists.add("/late", [written] * 3)
    on_disk(system, brief).unlink()
    look = ended(process, 1)
    assert time.monotonic() - began > 3
    (found,) = look.findings
    line = found.pop("delete")
    assert found == {"finding": "stray", "key": SLASH} | located(stray)
    assert re.search("3 unnamed files are looked at again in 3 s", look.said)
    before = state(system)
    subprocess.run(line, shell=True, check=True)
    assert set(before) - set(state(system)) == {stray}
    assert not on_disk(system, stray).exists()
    assert run(system, "-replicas", "1").findings == []


def test_with_wait_what_is_named_in_the_end_is_well(bare: Callable[..., Bare]) -> None:
    system = bare()
    files = system.store("/late")
    names = [volume.name for volume in system.volumes]
    process = verify(system.server_name, names, "-subvolumes=2", "-wait", "-settle=2")
    unnamed = [json.loads(process.stdout.readline()) for _ in files]
    assert {each["finding"] for each in unnamed} == {"unnamed"}
    system.lists.add("/late", files)
    assert ended(process, 0).findings == []


@pytest.mark.parametrize("where", ["keys", "unlinked", "garbage", "gone"])
def test_a_file_that_is_named_meanwhile_is_no_finding(
    bare: Callable[..., Bare], where: str
) -> None:
    system = bare()
    files = system.store("/new")

    def before(path: str) -> None:
        if not asks_for(path, "/new"):
            return  # else its write is over now
        system.lists.before = lambda path: None
        if where == "garbage":
            system.lists.garbage = [{"key": "/new", "file": file, "age": 0} for file in files]
        elif where == "gone":
            for file in files:
                on_disk(system, file).unlink()
        else:
            item = system.lists.add("/new", files)
            system.lists.keys.clear()
            getattr(system.lists, where)["/new"] = item

    system.lists.before = before
    assert run(system).findings == []


def test_a_file_whose_write_takes_a_moment_longer_is_no_finding(bare: Callable[..., Bare]) -> None:
    system = bare()
    files, asked = system.store("/new"), itertools.count()

    def before(path: str) -> None:
        if path.startswith("/?garbage&limit=1&") and next(asked) == 0:
            system.lists.add("/new", files)

    system.lists.before = before
    assert run(system).findings == []


@pytest.mark.parametrize("change", ["moved", "deleted", "unlinked", "written anew"])
def test_a_key_that_changes_between_list_and_look_is_no_finding(
    bare: Callable[..., Bare], change: str
) -> None:
    system = bare()
    good, old = system.store("/k"), [f.replace(WRITE_ID, OLDER) for f in system.store("/k")]
    item, listed = system.lists.add("/k", good), threading.Event()

    def before(path: str) -> bytes | None:
        if path.startswith("/?list") and not listed.is_set():
            listed.set()
            stale = item | {"files": old} | ({"size": 9} if change == "written anew" else {})
            if change == "unlinked":
                system.lists.unlinked["/k"] = system.lists.keys.pop("/k")
            return json.dumps({"keys": [stale], "next": ""}).encode()
        if change == "deleted" and asks_for(path, "/k"):
            system.lists.keys.clear()
            system.lists.garbage = [{"key": "/k", "file": file, "age": 0} for file in good]
        return None

    system.lists.before = before
    assert run(system).findings == []
    assert listed.is_set()


def test_a_key_that_changes_all_the_time_ends_no_look(bare: Callable[..., Bare]) -> None:
    system = bare()
    item, numbers = system.lists.add("/k", system.store("/k")), itertools.count(100)

    def before(path: str) -> None:
        files = [file.replace(WRITE_ID, f"{next(numbers):016x}") for file in item["files"]]
        system.lists.add("/k", files)

    system.lists.before = before
    look = run(system, status=1)
    assert look.kinds() == {"unnamed"}  # the files that were there at first


# --- what cannot be checked -----------------------------------------------------------------------


@pytest.mark.parametrize("ailment", ["dead", "frozen", "drive away"])
@pytest.mark.parametrize("flags", [(), ("-deep",)])
def test_what_cannot_be_reached_is_named_and_nothing_is_said_of_what_nobody_knows(
    bare: Callable[..., Bare], ailment: str, flags: tuple[str, ...]
) -> None:
    system = bare()
    for number in range(30):
        system.lists.add(f"/k{number}", system.store(f"/k{number}"))
    file = system.lists.keys["/k0"]["files"][0]
    at, volume = located(file)["location"], volume_at(system, file)
    if ailment == "dead":
        volume.kill()
    elif ailment == "frozen":
        volume.freeze()
    else:
        drive_at(system, at).rename(system.folder / "away")
    began = time.monotonic()
    look = run(system, *flags, status=2, constants={"PATIENCE": 1})
    assert time.monotonic() - began < 20
    assert look.kinds() == {"unreachable"}  # and not missing, or under-replicated
    found = look.found("unreachable")
    away = {f for item in system.lists.keys.values() for f in item["files"]}
    roots = [volume.name + drive for drive in ("", "/sv00", "/sv01")]
    if ailment == "drive away":
        roots = [at]
    replicas = {each["location"] + each["path"] for each in found if each["key"]}
    assert replicas == {file for file in away if file.startswith(f"{roots[0]}/")}
    assert sorted(each["location"] for each in found if not each["key"]) == roots
    assert all(each["reason"] for each in found)


def test_a_volume_that_is_reloaded_again_and_again_is_no_finding(bare: Callable[..., Bare]) -> None:
    system = bare()
    for number in range(1500):
        system.lists.add(f"/k{number}", system.store(f"/k{number}"))
    names = [volume.name for volume in system.volumes]
    process, reloads = verify(system.server_name, names, "-subvolumes=2"), 0
    while process.poll() is None:
        for volume in system.volumes:
            os.kill(volume.process.pid, signal.SIGHUP)
        reloads += 1
        time.sleep(0.1)
    assert ended(process, 0).findings == [] and reloads > 2


def test_a_volume_that_closes_after_each_answer_is_no_finding(bare: Callable[..., Bare]) -> None:
    system = bare()
    for number in range(200):
        system.lists.add(f"/k{number}", system.store(f"/k{number}"))
    for volume in system.volumes:
        config = volume.folder / ".nginx/nginx.conf"
        text = re.sub("keepalive_timeout [^;]*;", "keepalive_timeout 0;", config.read_text())
        config.write_text(text)
        os.kill(volume.process.pid, signal.SIGHUP)
    assert run(system).findings == []


NOBODY = "127.0.0.1:1"  # a volume that nobody gets to


OK = b"HTTP/1.1 200 OK\r\n\r\n"
SERVERS = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "400": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nno\n",
    "401": b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 3\r\n\r\nno\n",
    "cut short": OK + b'{"keys": [{"key": "/k", "size"',
    "cut before its end": b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"keys": [], "next": ""}',
    "no JSON": OK + b"keys",
    "no list": OK + b"[]",
    "a list of nothing": OK + b"{}",
    "keys that are none": OK + b'{"keys": 7, "next": ""}',
    "no next": OK + b'{"keys": []}',
    "an odd next": OK + b'{"keys": [], "next": null}',
    "brackets": OK + b"[" * 100_000,
    "circles": OK + b'{"keys": [], "next": "/k"}',
    "no UTF-8": OK + b'{"keys": [], "next": "\xff"}',
    "a lone surrogate": OK + b'{"keys": [], "next": "\\ud800"}',
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000,
    "no garbage": OK + b'{"keys": [], "next": ""}',
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_makes_no_sense_ends_with_2(name: str) -> None:
    answer = SERVERS[name]
    liar = Liar(answer, b"" if b"Content-Length" in answer else None)
    look = ended(verify(liar.name, [NOBODY], constants={"PATIENCE": 1, "TRIES": 1}), 2)
    liar.close()
    assert look.kinds() == {"unfinished"} and look.findings[0]["reason"]


def test_no_server_ends_with_2() -> None:
    look = ended(verify(f"127.0.0.1:{free_ports(1)[0]}", [NOBODY]), 2)
    assert look.kinds() == {"unfinished"}


def test_a_server_that_is_down_is_left_for_the_next(bare: Callable[..., Bare]) -> None:
    system = bare()
    system.lists.add("/k", system.store("/k"))
    system.server_name = f"127.0.0.1:{free_ports(1)[0]},{system.server_name}"
    assert run(system).findings == []


def item(**changes: Any) -> dict:
    """An item of a list with something odd about it."""
    path = mkv.key2path(b"/odd", WRITE_ID)
    good = {"key": "/odd", "size": 5, "md5": None, "time": 1, "files": ["127.0.0.1:1" + path]}
    return good | changes


ITEMS = [7, None, [], {}, item(key=7), item(key="/\ud800"), item(size=-1), item(size=1.5)]
ITEMS += [item(size="5"), item(size=True), item(md5=7), item(md5="x"), item(files=7)]
ITEMS += [item(files=[7]), item(files=[]), item(files=["x"]), item(files=["h:1/aa/bb/../../x"])]
ITEMS += [item(files=["127.0.0.1:1" + mkv.key2path(b"/other", WRITE_ID)]), item(key="/other")]


def test_items_that_cannot_be_are_named_and_passed_over(bare: Callable[..., Bare]) -> None:
    system = bare()
    system.lists.add("/k", system.store("/k"))
    page = {"keys": [*ITEMS, system.lists.keys["/k"]], "next": ""}
    system.lists.before = lambda path: json.dumps(page).encode() if "/?list" in path else None
    look = run(system, status=1)
    assert look.kinds() == {"unreadable"} and len(look.findings) == len(ITEMS)
    assert all(each["reason"] for each in look.findings)


HOSTS = ["..:1", "x" * 70 + ":1", "127.0.0.1:99999", "127.0.0.1:0", "nowhere.invalid:1", "[::1]:1"]


def test_hosts_that_cannot_be_are_unreachable(bare: Callable[..., Bare]) -> None:
    system = bare(volumes=1)
    path = mkv.key2path(b"/k", WRITE_ID)
    system.lists.add("/k", [host + path for host in HOSTS])
    look = run(system, status=2)
    assert {each["location"] for each in look.found("unreachable")} == set(HOSTS)


WASTE = [7, None, {}, {"key": "/k"}, {"key": "/k", "file": "x"}, {"key": 7, "file": "x"}]


def test_garbage_that_cannot_be_is_named_and_passed_over(bare: Callable[..., Bare]) -> None:
    system = bare()
    files = system.store("/k")
    good = [{"key": "/k", "file": file, "age": 0.5} for file in files]
    said = json.dumps({"garbage": [*WASTE, *good], "next": ""}).encode()
    system.lists.before = lambda path: said if "garbage" in path else None
    look = run(system, status=1)
    assert look.kinds() == {"unreadable"} and len(look.findings) == len(WASTE)


@pytest.mark.parametrize("said", [b"", b"[]", b'{"garbage": [', b'{"garbage": 7, "next": ""}'])
def test_a_list_of_garbage_that_cannot_be_ends_with_2(
    lists: Callable[[], Lists], said: bytes
) -> None:
    server = lists()
    server.before = lambda path: said if "garbage" in path else None
    look = ended(verify(server.name, [NOBODY], constants={"TRIES": 1}), 2)
    assert look.kinds() == {"unfinished"} and "garbage" in look.findings[0]["reason"]


@pytest.mark.parametrize("which", ["keys", "garbage"])
def test_lists_of_many_pages_are_read_to_their_end(bare: Callable[..., Bare], which: str) -> None:
    system = bare()
    keys = [*NAMES, *(f"/é{number}" for number in range(50))]
    for key in keys:
        files = system.store(key)
        if which == "keys":
            system.lists.add(key, files)
        else:
            system.lists.garbage += [{"key": key, "file": file, "age": 1} for file in files]
    look = run(system, constants={"PAGE": 7})
    assert look.findings == [] and f" {3 * len(keys)} files;" in look.said
    assert len([path for path in system.lists.asked if which[:4] in path or which == "keys"]) > 8


class Listing(http.server.BaseHTTPRequestHandler):
    """A volume that lists what a test wants it to, in one folder."""

    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1
    listings: dict[str, bytes] = {}  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        body = self.listings.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    do_HEAD = do_GET  # noqa: N815


def listing(*rows: Any) -> bytes:
    """As nginx gives it."""
    return json.dumps(rows).encode()


def row(name: Any, kind: Any = "file", **more: Any) -> dict:
    """A file or folder in a listing."""
    return {"name": name, "type": kind, "mtime": "Mon, 01 Jan 2024 00:00:00 GMT"} | more


FILE = mkv.key2path(b"/odd", WRITE_ID)[7:]
LISTINGS = {
    "no JSON": b"hello",
    "nothing": b"",
    "no UTF-8": b"\xff\xfe\x00",
    "half": listing(row(FILE, size=1))[:-9],
    "a number": b"7",
    "numbers": listing(1, 2),
    "lists": listing([], []),
    "null": listing(None),
    "a name alone": listing({"name": "x"}),
    "a type alone": listing({"type": "file"}),
    "one row": json.dumps(row(FILE, size=1)).encode(),
    "a number for a name": listing(row(7, size=1)),
    "a number for a type": listing(row("x", 7, size=1)),
    "no size": listing(row(FILE)),
    "a negative size": listing(row(FILE, size=-1)),
    "a fraction": listing(row(FILE, size=1.5)),
    "a text for a size": listing(row(FILE, size="1")),
    "null for a size": listing(row(FILE, size=None)),
    "true for a size": listing(row(FILE, size=True)),
    "no number": b'[{"name": "x", "type": "file", "size": NaN}]',
    "too many digits": b'[{"name": "x", "type": "file", "size": ' + b"9" * 5000 + b"}]",
    "..": listing(row("..", "directory")),
    ".": listing(row(".", "directory")),
    "no name": listing(row("", "directory")),
    "an empty name of a file": listing(row("", size=1)),
    "a slash": listing(row("a/b", size=1)),
    "brackets": b"[" * 100_000,
    "braces": b'{"a":' * 100_000,
    "a lone surrogate": b'[{"name": "\\ud800", "type": "file", "size": 1}]',
    "a folder of one": b'[{"name": "\\udfff", "type": "directory"}]',
    "a NUL": b'[{"name": "a\\u0000b", "type": "file", "size": 1}]',
    "line ends": b'[{"name": "a\\r\\nHost: x\\r\\n\\r\\n", "type": "directory"}]',
    "blanks": listing(row("a b", "directory")),
    "another type": listing(row("x", "other")),
}


@contextlib.contextmanager
def lister(handler: type) -> Iterator[str]:
    """The name of a volume that this answers for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("folder", ["/", "/aa/bb/"])
def test_listings_that_nginx_never_gives_are_named(lists: Callable[[], Lists], folder: str) -> None:
    pages = {"/": listing(row("aa", "directory")), "/aa/": listing(row("bb", "directory"))}
    with contextlib.ExitStack() as stack:
        names = {}
        for name, said in LISTINGS.items():
            handler = type("Handler", (Listing,), {"listings": pages | {folder: said}})
            names[stack.enter_context(lister(handler))] = name
        look = ended(verify(lists().name, names, "-subvolumes", "1"), 2)
    assert sorted(each["location"] for each in look.findings) == sorted(names)
    for each in look.findings:
        name = names[each["location"]]
        assert each["path"].startswith(folder), name
        if each["finding"] == "unreachable":
            assert each["path"] == folder and "cannot be listed" in each["reason"], name
        else:
            assert each["finding"] == "name", name


def test_a_volume_that_has_no_drive_there_is_no_empty_drive(lists: Callable[[], Lists]) -> None:
    with lister(Listing) as volume:
        look = ended(verify(lists().name, [volume], "-subvolumes", "1"), 2)
    (finding,) = look.findings
    assert (finding["finding"], finding["path"]) == ("unreachable", "/")


def test_folders_without_end_come_to_one(lists: Callable[[], Lists]) -> None:
    class Deep(Listing):
        def do_GET(self) -> None:  # noqa: N802
            self.listings = {self.path: listing(row("aa", "directory"))}
            super().do_GET()

    with lister(Deep) as volume:
        look = ended(verify(lists().name, [volume], "-subvolumes", "1"), 1)
    assert look.kinds() == {"name"} and len(look.findings) == 1


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HTTP = {
    "a chunk that is none": CHUNKED + b"x\r\n[]\r\n0\r\n\r\n",
    "chunks without end": CHUNKED + b"2\r\n[]\r\n",
    "a status that is none": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n[]",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "half": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]",
    "500": b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n",
    "404": b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
    "silence": b"",
}


@pytest.mark.parametrize("name", HTTP)
def test_a_volume_that_makes_no_sense_is_unreachable(lists: Callable[[], Lists], name: str) -> None:
    server, liar = lists(), Liar(HTTP[name], b"")
    server.add("/k", [liar.name + mkv.key2path(b"/k", WRITE_ID)], size=2)
    look = ended(
        verify(server.name, [liar.name], "-replicas=1", "-deep", constants={"PATIENCE": 1})
    )
    liar.close()
    assert look.kinds() <= {"unreachable", "missing", "under-replicated", "md5"}
    assert look.status == 2 and "unreachable" in look.kinds(), look


def test_a_volume_that_talks_for_ever_fills_no_memory(lists: Callable[[], Lists]) -> None:
    server = lists()
    liar = Liar(b"HTTP/1.1 200 OK\r\n\r\n", b"[" * (1 << 20))
    process = verify(server.name, [liar.name], "-subvolumes", "1")
    peak = peak_memory(process)
    liar.close()
    assert ended(process, 2).kinds() == {"unreachable"} and peak < 300, peak


def test_a_server_that_restarts_meanwhile_is_asked_again(bare: Callable[..., Bare]) -> None:
    system = bare()
    for number in range(3):
        system.lists.add(f"/k{number}", system.store(f"/k{number}"))
    asked = itertools.count()

    def before(path: str) -> bytes | None:
        return b'{"keys": [{"key": "/k' if 2 <= next(asked) <= 5 else None

    system.lists.before = before
    assert run(system).findings == []
    assert next(asked) > 6


def test_two_names_of_one_volume_are_refused(bare: Callable[..., Bare]) -> None:
    system = bare(volumes=1)
    path = mkv.key2path(b"/k", WRITE_ID)
    file = f"{ideal(system, '/k')[0]}{path}"
    put(system, file)
    system.lists.add("/k", [file])
    alias = system.volumes[0].name.replace("127.0.0.1", "localhost")
    look = ended(verify(system.server_name, [alias], "-subvolumes=2", "-replicas=1"), 2)
    assert look.kinds() == {"unfinished"} and "two names" in look.findings[0]["reason"]
    assert run(system, "-replicas=1").findings == []


# --- how it ends ----------------------------------------------------------------------------------


@pytest.fixture
def amiss(bare: Callable[..., Bare]) -> Bare:
    """A system with many findings."""
    system = bare(volumes=1)
    for number in range(300):
        path = mkv.key2path(f"/k{number}".encode(), WRITE_ID)
        system.lists.add(f"/k{number}", [f"{system.volumes[0].name}/sv00{path}"])
    return system


def test_a_reader_that_leaves_ends_it_with_2(amiss: Bare) -> None:
    process = verify(amiss.server_name, [amiss.volumes[0].name], "-subvolumes=2")
    assert json.loads(process.stdout.readline())["finding"]
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 2 and said.count("\n") == 1 and said.startswith("thrasher: ")
    process.stderr.close()


@pytest.mark.parametrize(
    "redirect, status", [(">/dev/full", 2), (">&-", 2), ("2>&-", 1), ("2>/dev/full", 1)]
)
def test_streams_that_are_full_or_closed_bring_no_traceback(
    amiss: Bare, redirect: str, status: int
) -> None:
    names = amiss.volumes[0].name
    words = [sys.executable, str(HERE / "thrasher.py"), "verify", "-server", amiss.server_name]
    line = f"{shlex.join([*words, '-volumes', names, '-subvolumes=2'])} {redirect}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and "Traceback" not in done.stderr, done
    assert "Exception" not in done.stderr and done.stderr.count("\n") <= 1
    assert all(json.loads(line)["finding"] for line in done.stdout.splitlines())


def test_ctrl_c_ends_it_at_once_with_2(bare: Callable[..., Bare]) -> None:
    system = bare()
    system.lists.add("/k", system.store("/k"))
    system.volumes[0].freeze()
    names = [volume.name for volume in system.volumes]
    process = verify(system.server_name, names, "-subvolumes=2", constants={"PATIENCE": 600})
    until(lambda: any(path.startswith("/?list") for path in system.lists.asked))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    look = ended(process, 2)
    assert look.findings == [{"finding": "unfinished", "key": "", "reason": "interrupted"}]
    assert re.search(r"^verify: .*\d", look.said) and look.said.count("\n") == 1


def test_a_reader_that_pauses_is_nobodys_silence(amiss: Bare) -> None:
    process = verify(
        amiss.server_name, [amiss.volumes[0].name], "-subvolumes=2", constants={"PATIENCE": 2}
    )
    fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
    time.sleep(6)
    assert ended(process, 1).kinds() == {"missing", "under-replicated"}


def test_progress_on_a_terminal_is_one_line_that_changes(bare: Callable[..., Bare]) -> None:
    system = bare()
    system.lists.add("/k", system.store("/k"))
    screen, terminal = os.openpty()
    os.set_blocking(screen, False)
    said = b""

    def more() -> bytes:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(screen, 65536)
        return said

    system.volumes[0].freeze()
    names = [volume.name for volume in system.volumes]
    process = verify(system.server_name, names, "-subvolumes=2", stderr=terminal)
    until(lambda: more().count(b"\r") > 2 and re.search(rb"\d", said))
    assert b"\n" not in said
    system.volumes[0].thaw()
    assert process.wait(60) == 0
    until(lambda: re.search(rb"verify: done: [^\r\n]*\d[^\r\n]*\r?\n$", more()))
    process.stdout.close()
    os.close(screen)
    os.close(terminal)


MISTAKES = [("-server", "x"), ("-volumes", "a,b"), ("-volumes", ""), ("-subvolumes", "0")]
MISTAKES += [("-subvolumes", "257"), ("-replicas", "0"), ("-settle", "1x"), ("-settle", "-1")]


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_with_flags_are_told(flags: tuple[str, str]) -> None:
    command = [sys.executable, str(HERE / "thrasher.py"), "verify", "=".join(flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and flags[0].lstrip("-") in done.stderr
    assert "Traceback" not in done.stderr


# --- with the real server -------------------------------------------------------------------------


def store_all(system: Cluster, names: Iterable[str]) -> None:
    """Write a value under each name."""
    for name in names:
        assert system.server.put(quote(name), name.encode() * 3) == 201


def files_of(system: Cluster, name: str) -> list[str]:
    """All files of a key, as lists have them."""
    key = name.encode()
    return [file_of(key, replica) for replica in system.records()[key].replicas]


@pytest.fixture
def real(cluster: Make) -> Make:  # noqa: F811
    """Starts clusters whose server verify may ask."""

    def make(*flags: str, **settings: Any) -> Cluster:
        system = cluster(*flags, **settings)
        system.server_name = f"127.0.0.1:{system.server.port}"
        return system

    return make


def test_a_real_system_is_clean_and_what_is_done_to_it_is_named(real: Make) -> None:
    system = real(subvolumes=2)
    store_all(system, [*NAMES, "/bent", "/short", "/unlinked"])
    assert system.server.call("UNLINK", "/unlinked").status == 204
    for flags in ((), ("-deep",)):
        look = run(system, *flags)
        assert look.findings == []
        assert f"{len(NAMES) + 3} keys, {3 * len(NAMES) + 9} replicas" in look.said
    wrong = []
    for kind, name in (("md5", "/bent"), ("size", "/short"), ("missing", "/unlinked")):
        file = files_of(system, name)[1]
        put(system, file, {"md5": b"tneb/" * 3, "size": b"short"}.get(kind, b""))
        if kind == "missing":
            on_disk(system, file).unlink()
        wrong.append({"finding": kind, "key": name} | located(file))
        wrong.append({"finding": "under-replicated", "key": name, "good": 2})
    stray = ideal(system, LONG)[0] + mkv.key2path(LONG.encode(), OLDER)
    put(system, stray)
    wrong.append({"finding": "unnamed", "key": LONG} | located(stray))
    before = state(system), system.tables()
    found = run(system, "-deep", status=1).findings
    assert sorted(map(str, found)) == sorted(map(str, wrong))
    assert (state(system), system.tables()) == before


def test_what_waits_to_be_deleted_is_no_finding(real: Make) -> None:
    system = real("-grace", "1m", "-settle", "1m")
    store_all(system, ["/k", "/old"])
    volume = volume_at(system, ideal(system, "/old")[0])
    volume.kill()
    system.sees(volume, up=False)
    assert system.server.call("DELETE", "/old").status == 204
    volume.start()
    assert run(system).findings == []
    assert len(system.garbage()) == 1


def test_nothing_is_taken_amiss_in_the_midst_of_traffic(real: Make) -> None:
    system = real("-grace", "1s", "-settle", "5s", "-voltimeout", "3s")
    store_all(system, [f"/still{number}" for number in range(300)])
    stop, wrong = threading.Event(), []

    def traffic(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            name = f"/busy{seed}-{chance.randrange(20)}"
            verb = chance.choice(["PUT", "PUT", "PUT", "DELETE", "UNLINK", "REBALANCE"])
            body = name.encode() * chance.randrange(1, 9999) if verb == "PUT" else None
            status = system.server.call(verb, name, body).status
            if status not in (201, 204, 403, 404):
                wrong.append((verb, name, status))

    threads = [threading.Thread(target=traffic, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    try:
        for flags in ((), ("-deep",), ("-wait", "-settle", "5")):
            look = run(system, *flags, status=None)
            assert look.kinds() <= ({"unnamed"} if "-wait" in flags else set()), look
            assert look.status == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert run(system, "-deep").findings == []


def test_a_row_that_cannot_be_read_is_named_and_its_files_are_not_given_up(real: Make) -> None:
    system = real()
    store_all(system, ["/good", "/spoilt"])
    files = files_of(system, "/spoilt")
    assert system.server.stop() == 0
    plant(system.folder / "index", [(b"/spoilt", b"\xff nonsense \xff")])
    system.server.start()
    look = run(system, "-wait", "-settle", "1", status=1)
    assert look.kinds() == {"unreadable"} and look.findings[0]["key"] == "/spoilt"
    assert all(on_disk(system, file).exists() for file in files)


def test_a_password_is_shown_to_server_and_volumes(
    real: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = tmp_path / "users"
    crypt = subprocess.run(
        ["openssl", "passwd", "-apr1", "pässword"], capture_output=True, text=True, check=True
    )
    users.write_text(f"admin:{crypt.stdout}")
    monkeypatch.setenv("AUTH", str(users))
    monkeypatch.setenv("MKV_USERPASS", "admin:pässword")
    system = real("-basicauth", subvolumes=2)
    monkeypatch.delenv("AUTH")
    system.server.login = "admin:pässword"
    store_all(system, [f"/k{number}" for number in range(10)])
    file = ideal(system, "/x")[0] + mkv.key2path(b"/x", WRITE_ID)
    put(system, file)
    for flags in ((), ("-userpass", "admin:pässword")):
        if flags:
            monkeypatch.setenv("MKV_USERPASS", "admin:wrong")
        look = run(system, "-deep", "-wait", "-settle=0", *flags, status=1)
        assert look.kinds() == {"unnamed", "stray"}
    line = look.found("stray")[0]["delete"]
    assert "ssword" not in line
    before = state(system)
    subprocess.run(
        line, shell=True, check=True, env={**os.environ, "MKV_USERPASS": "admin:pässword"}
    )
    assert set(before) - set(state(system)) == {file}
    names = [volume.name for volume in system.volumes]
    monkeypatch.setenv("MKV_USERPASS", "")
    for userpass in ("admin:wrong", ""):
        more = ("-subvolumes=2", "-userpass", userpass)
        look = ended(verify(system.server_name, names, *more), 2)
        assert look.kinds() == {"unfinished"} and "401" in look.findings[0]["reason"]


def test_volumes_that_are_locked_are_unreachable_without_the_password(
    bare: Callable[..., Bare], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    users = tmp_path / "users"
    users.write_text("admin:{PLAIN}secret\n")
    monkeypatch.setenv("AUTH", str(users))
    system = bare()
    system.lists.add("/k", system.store("/k"))
    monkeypatch.delenv("AUTH")
    assert run(system, "-deep", "-userpass", "admin:secret").findings == []
    monkeypatch.setenv("MKV_USERPASS", "admin:secret")
    assert run(system).findings == []
    look = run(system, "-userpass", "admin:wrong", status=2)
    assert look.kinds() == {"unreachable"}  # and nothing is called missing
    assert all("401" in each["reason"] for each in look.findings)


# --- the load -------------------------------------------------------------------------------------


def test_clients_are_spread_over_all_servers(real: Make) -> None:
    one, two = real(), real()
    servers = f"{one.server_name},{two.server_name}"
    command = [sys.executable, str(HERE / "thrasher.py"), "-server", servers, "-count", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done
    for system in (one, two):
        puts = system.server.metric('mkv_requests_total{method="PUT",status="201"}')
        assert 50 < puts < 150
