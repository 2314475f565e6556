"""thrasher.py: load, benchmark, and what verify says of what changes or makes no sense."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import WRITE_ID, Cluster, Fake, FakeHandler, Liar, Make, cluster, drive_at, fakes
from harness import free_ports, ideal, listed, mkv, plant, until
from test_maintenance import (
    NAMES,
    VALUES,
    begin,
    ended,
    files_of,
    plant_file,
    run,
    state,
    store_all,
)

# --- load -----------------------------------------------------------------------------------------


def load(*flags: str, status: int = 0) -> tuple[str, str]:
    """What the load generator prints, and what it says."""
    with begin("", *flags) as process:
        out, said = process.communicate(timeout=120)
    assert process.returncode == status, (out, said)
    return out, said


@pytest.mark.parametrize("flags", ["-count 300", "-count 30 -size 900000 -clients 3 -keys 5"])
def test_the_load_finds_nothing_wrong_and_leaves_nothing(cluster: Make, flags: str) -> None:
    system = cluster()
    out, said = load("-server", f"127.0.0.1:{system.server.port}", *flags.split())
    times = r" +p50 [\d.]+ ms, p99 [\d.]+ ms, max [\d.]+ ms\n"
    sums = rf"{flags.split()[1]} write/read/delete in [\d.]+s\nthats [\d.]+/sec\n"
    assert re.fullmatch(f"PUT{times}GET{times}DELETE{times}{sums}", out) and said == ""
    assert listed(system.server, "/?list") == ([], "")
    until(system.is_clean)


class Faulty(FakeHandler):
    """An index server that is its own volume, and has a fault."""

    def answer(self) -> None:
        fault, values, value = self.server.fault, self.server.stored, self.body()
        self.server.log.append((0, self.command, self.path))
        if self.command == "PUT":
            values[f"/at{self.path}"] = value[::-1] if fault == "keeps another value" else value
            self.reply(503 if fault == "takes no value" else 201)
        elif self.command == "DELETE":
            self.reply(404 if fault == "deletes nothing" else 204)
        elif self.path in values:
            self.reply(200, values[self.path])
        else:
            self.send_response(302)
            name = "Elsewhere" if fault == "redirects to nowhere" else "Location"
            self.send_header(name, f"http://{self.server.name}/at{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_GET = do_PUT = do_DELETE = answer  # noqa: N815


def faulty(fake: Fake, fault: str) -> Fake:
    """A server with a fault."""
    fake.RequestHandlerClass, fake.fault = Faulty, fault
    return fake


FAULTS = {  # and what is said of it
    "keeps another value": "not the value that was written",
    "redirects to nowhere": "a redirect to nowhere",
    "takes no value": "not 201, but HTTP/1.1 503",
    "deletes nothing": "not 204, but HTTP/1.1 404",
    "is not there": "",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_load_ends_with_1_at_a_wrong_answer(fakes: Callable[[], Fake], fault: str) -> None:
    there = fault != "is not there"
    name = faulty(fakes(), fault).name if there else f"127.0.0.1:{free_ports(1)[0]}"
    out, said = load("-server", name, "-count", "100", status=1)
    assert out == "" and said.count("\n") == 1
    assert said.startswith("thrasher: ") and FAULTS[fault] in said


def test_clients_are_spread_over_all_servers(fakes: Callable[[], Fake]) -> None:
    servers = [faulty(fakes(), ""), faulty(fakes(), "")]
    load("-server", ",".join(server.name for server in servers), "-count", "100")
    puts = [[verb for _, verb, _ in server.log].count("PUT") for server in servers]
    assert sum(puts) == 100 and min(puts) > 20


def mentioning(text: str) -> list[int]:
    """The processes that have a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if text.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


KILLED = [(each, begun) for each in (signal.SIGINT, signal.SIGTERM) for begun in range(1, 5)]


@pytest.mark.parametrize(("number", "begun"), [(0, 4), *KILLED])
def test_nothing_survives_a_benchmark(tmp_path: Path, number: int, begun: int) -> None:
    env, flags = os.environ | {"TMPDIR": str(tmp_path)}, ("-quick", "-rows", "cycle")
    with begin("bench", *flags, env=env, start_new_session=True) as process:
        until(lambda: len(mentioning(str(tmp_path))) >= begun)  # of three volumes, a server
        for _ in range(2 if number else 0):
            process.send_signal(number)
        out, said = process.communicate(timeout=120)
    if number:
        assert process.returncode == 1 and said.startswith("thrasher: ")
    else:
        assert (process.returncode, said) == (0, "")
        row = r"^\| write/read/delete, 16 clients[^|]* \| [^|]+ \| [^|]+ \| [\d.]+ \| [^|]* ?\|$"
        assert re.search(row, out, re.MULTILINE), out
    assert not any(tmp_path.iterdir())
    until(lambda: not mentioning(str(tmp_path)))


# --- verify: what changes meanwhile ---------------------------------------------------------------

EMPTY = b'{"keys": [], "garbage": [], "next": ""}'


def relay(fake: Fake, system: Cluster, says: Callable[[str], bytes | None]) -> str:
    """Let a fake hand on what the server says, or say something else; its name."""

    def before(_: str, path: str) -> None:
        said = says(path)
        fake.stored[path] = system.server.call("GET", path).body if said is None else said

    fake.before = before
    return fake.name


@pytest.mark.parametrize("subvolumes", [1, 2])
def test_a_sound_system_is_clean_and_stays_as_it_is(cluster: Make, subvolumes: int) -> None:
    system = cluster("-grace", "1h", subvolumes=subvolumes)
    store_all(system)
    assert system.server.call("UNLINK", "/k0").status == 204
    assert system.server.call("DELETE", "/k1").status == 204
    for number in range(2, 30):  # so that there is garbage
        assert system.server.call("PUT", f"/k{number}", b"new", If_Match="*").status == 201
    before = state(system)
    for flags in ((), ("-deep",), ("-wait", "-settle", "1")):
        done = run(system, "verify", *flags, constants={"PAGE": 7})
        files = len(system.files())
        assert done.findings == [] and f" {len(VALUES) - 1} keys," in done.said
        assert f" {files} files;" in done.said and files == 3 * (len(VALUES) - 1 + 28)
    assert state(system) == before


def write(system: Cluster) -> None:
    """Make a key, and replace it at once, so that there is garbage."""
    for fields in ({}, {"If_Match": "*"}):
        assert system.server.call("PUT", "/new", b"value", **fields).status == 201


def move(system: Cluster) -> None:
    """Make another file of a key that has lost one."""
    files_of(system, "/k")[0].unlink()
    assert system.server.call("REBALANCE", "/k").status == 204


CHANGES: dict[str, Callable[[Cluster], Any]] = {
    "written": write,
    "deleted": lambda system: system.server.call("DELETE", "/k"),
    "unlinked": lambda system: system.server.call("UNLINK", "/k"),
    "moved": move,
}


@pytest.mark.parametrize("change, late", [*((change, 1) for change in CHANGES), ("written", 2)])
def test_what_changes_after_a_list_was_read_is_no_finding(
    cluster: Make, fakes: Callable[[], Fake], change: str, late: int
) -> None:
    system = cluster("-grace", "1h")
    assert system.server.put("/k", b"value") == 201
    lists = ("list&long", "unlinked&long", "garbage")
    past = {which: [system.server.call("GET", f"/?{which}").body] * late for which in lists}
    CHANGES[change](system)

    def says(path: str) -> bytes | None:
        old = past[path.partition("?")[2].partition("&limit")[0]]
        return old.pop() if old and (late > 1 or path.startswith("/?")) else None

    server = relay(fakes(), system, says)
    assert run(system, "verify", "-server", server).findings == []


@pytest.mark.parametrize("stray", [True, False])
def test_a_stray_is_told_from_a_write_by_waiting_and_can_be_deleted(
    cluster: Make, fakes: Callable[[], Fake], stray: bool
) -> None:
    system, key, hidden = cluster(), NAMES[1], [True]
    place, path = ideal(system, key)[0], mkv.key2path(key.encode(), WRITE_ID)
    file = plant_file(system, place, path)
    assert system.server.put("/late", b"value") == 201
    server = relay(fakes(), system, lambda _: EMPTY if hidden else None)
    process = begin("verify -wait -settle 3s", "-volumes", system.names(), "-server", server)
    unnamed = [json.loads(process.stdout.readline()) for _ in range(4)]
    assert {each["finding"] for each in unnamed} == {"unnamed"}
    hidden.clear()  # now the write is over
    if not stray:
        Path(f"{drive_at(system, place)}{path}").unlink()
    done = ended(process, 1 if stray else 0)
    assert "4 unnamed files are looked at again in 3 s" in done.said
    assert done.kinds() == ["stray"] * stray
    for each in done.findings:
        assert (each["key"], each["location"] + each["path"]) == (key, file)
        subprocess.run(each["delete"], shell=True, check=True)
    assert file not in system.files()
    assert run(system, "verify").findings == []


# --- verify: what makes no sense ------------------------------------------------------------------

NOBODY = "127.0.0.1:1"  # a volume that nobody gets to
OK = b"HTTP/1.1 200 OK\r\n\r\n"
SERVERS = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "400": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nno\n",
    "cut short": OK + b'{"keys": [{"key": "/k", "size"',
    "cut before its end": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n" + EMPTY,
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


def test_a_server_that_makes_no_sense_ends_it_with_2() -> None:
    limits, looks, liars = {"PATIENCE": 1, "TRIES": 1}, {}, []
    for name, answer in SERVERS.items():
        liars.append(Liar(answer, b"" if b"Content-Length" in answer else None))
        flags = ("-volumes", NOBODY, "-server", liars[-1].name)
        looks[name] = begin("verify", *flags, constants=limits)
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    looks["nobody"] = begin("verify", "-volumes", NOBODY, "-server", nobody)
    for name, process in looks.items():
        done = ended(process, 2)
        assert done.kinds() == ["unfinished"] and done.values("reason"), name
    for liar in liars:
        liar.close()


def test_a_server_that_restarts_is_asked_again_and_one_that_is_down_is_passed_over(
    cluster: Make, fakes: Callable[[], Fake]
) -> None:
    system, asked = cluster(), itertools.count()
    store_all(system)
    server = relay(fakes(), system, lambda _: b'{"keys": [{"key' if next(asked) == 1 else None)
    down = f"127.0.0.1:{free_ports(1)[0]}"
    assert run(system, "verify", "-server", f"{down},{server}").findings == []


def item(**changes: Any) -> dict:
    """An item of a list with something odd about it."""
    files = [NOBODY + mkv.key2path(b"/odd", WRITE_ID)]
    return {"key": "/odd", "size": 5, "md5": None, "time": 1, "files": files} | changes


ITEMS = [7, None, [], {}, item(key=7), item(key="/\ud800"), item(key="/other")]
ITEMS += [item(size=size) for size in (-1, 1.5, "5", True)] + [item(md5=md5) for md5 in (7, "x")]
ITEMS += [item(files=files) for files in (7, [7], [], ["x"], ["h:1/aa/bb/../../x"])]
WASTE = [7, None, {}, {"key": "/k"}, {"key": "/k", "file": "x"}, {"key": 7, "file": "x"}]
HOSTS = ["..:1", "x" * 70 + ":1", "127.0.0.1:99999", "127.0.0.1:0", "nowhere.invalid:1", "[::1]:1"]


def test_items_that_cannot_be_are_told_and_passed_over(
    cluster: Make, fakes: Callable[[], Fake]
) -> None:
    system = cluster()
    store_all(system)
    good = json.loads(system.server.call("GET", "/?list&long").body)["keys"]
    away = item(key="/k", files=[host + mkv.key2path(b"/k", WRITE_ID) for host in HOSTS])
    odd = {"/?list": {"keys": [*ITEMS, away, *good]}, "/k?list": {"keys": [away]}}
    odd["/?garbage"] = {"garbage": WASTE}
    pages = {path: json.dumps(page | {"next": ""}).encode() for path, page in odd.items()}
    server = relay(fakes(), system, lambda path: pages.get(path.partition("&")[0]))
    done = run(system, "verify", "-server", server, status=2)
    assert Counter(done.kinds()) == {"unreadable": len(ITEMS + WASTE), "unreachable": len(HOSTS)}
    assert done.values("location") == set(HOSTS)


def test_a_row_that_cannot_be_read_is_told_and_its_files_are_not_given_up(cluster: Make) -> None:
    system = cluster()
    store_all(system, {"/good": b"value", "/spoilt": b"value"})
    assert system.server.stop() == 0
    plant(system.folder / "index", [(b"/spoilt", b"\xff nonsense \xff")])
    system.server.start()
    done = run(system, "verify", "-wait", "-settle", "1", status=1)
    assert done.kinds() == ["unreadable"] and done.values("key") == {"/spoilt"}
    assert len(system.files()) == 6


def test_what_volumes_may_do_is_no_finding_and_what_they_may_not_is(cluster: Make) -> None:
    system = cluster(volumes=4)
    store_all(system)
    for volume in system.volumes:  # close a connection after each answer
        config = volume.folder / ".nginx/nginx.conf"
        text = re.sub("keepalive_timeout [^;]*;", "keepalive_timeout 0;", config.read_text())
        config.write_text(text)
        os.kill(volume.process.pid, signal.SIGHUP)
    assert run(system, "verify").findings == []
    assert run(system, "verify", "-replicas", "4", status=1).values("key") == VALUES.keys()
    alias = system.names().replace("127.0.0.1", "localhost", 1)
    done = run(system, "verify", "-volumes", alias, status=2)
    assert done.kinds() == ["unfinished"] and "two names" in done.said + str(done.values("reason"))


@pytest.mark.parametrize("flag, kind", [((), "unreachable"), (("-basicauth",), "unfinished")])
def test_a_password_is_shown_to_server_and_volumes(
    cluster: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: tuple, kind: str
) -> None:
    users, right = tmp_path / "users", "admin:pässword"
    users.write_text("admin:{PLAIN}pässword\n")
    monkeypatch.setenv("AUTH", str(users))
    monkeypatch.setenv("MKV_USERPASS", right)
    system = cluster(*flag)
    system.server.login = right
    store_all(system)
    assert run(system, "verify -deep").findings == []
    stray = plant_file(system, ideal(system, "/x")[0], mkv.key2path(b"/x", WRITE_ID))
    monkeypatch.setenv("MKV_USERPASS", "admin:wrong")
    done = run(system, "verify -wait -settle 0", "-userpass", right, status=1)
    (line,) = done.values("delete")
    assert "ssword" not in line
    done = run(system, "verify", status=2)
    assert set(done.kinds()) == {kind}  # and nothing is called missing
    assert all("401" in each["reason"] for each in done.findings)
    subprocess.run(line, shell=True, check=True, env=os.environ | {"MKV_USERPASS": right})
    assert stray not in system.files()


MISTAKES = [("-server", "x"), ("-volumes", "a,b"), ("-volumes", ""), ("-subvolumes", "0")]
MISTAKES += [("-subvolumes", "257"), ("-replicas", "0"), ("-settle", "1x"), ("-settle", "-1")]


def test_mistakes_with_flags_are_told() -> None:
    looks = {flag: begin("verify", "=".join(flag)) for flag in MISTAKES}
    for (name, _), process in looks.items():
        out, said = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "") and name.lstrip("-") in said.splitlines()[-1]
        assert "Traceback" not in said
