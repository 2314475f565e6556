"""What operators meet: volume.sh, the command line, the demo, sockets, logs, metrics, locks."""

import base64
import contextlib
import hashlib
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from harness import HERE, MB, Cluster, Fake, Make, Reply, Server, Upload, Volume, Wire
from harness import accepts, block, call, cluster, demo, descendants, drive_at, ended
from harness import error_of, fakes, follow, foreign_folder, free_ports, holds, ideal, listed
from harness import mounts, needs, needs_root, request, shell, stored, until, volume
from harness import volume_at

SECRET, EVER = "correct.horse.battery/staple+=", 1 << 33
VALUE, NEW = "/sv00/aa/bb/a+b=-id", "/sv00/aa/bb/new"


def basic(userpass: str) -> dict[str, str]:
    """The header field of a user with a password."""
    return {"Authorization": "Basic " + base64.b64encode(userpass.encode()).decode()}


ADMIN, ANNA, BERND = basic("admin:pässword"), basic("anna:one"), basic("bernd:zwö:drei")
STRANGERS = [{}, basic("admin:password"), basic("nobody:pässword"), {"Authorization": "Basic !"}]
STRANGERS += [{"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1"}]


def ask(port: int, method: str, path: str, source: str = "127.0.0.1", **fields: str) -> Reply:
    """A request; that of a PUT has a body."""
    return call(port, method, path, b"value" if method == "PUT" else None, fields, source)


def signed(path: str, until: int = EVER, secret: str = SECRET) -> str:
    """What nginx's documentation of secure_link says, for the path of a request."""
    md5 = hashlib.md5(f"{until}{path} {secret}".encode()).digest()
    return f"{path}?md5={base64.urlsafe_b64encode(md5).decode().rstrip('=')}&expires={until}"


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """What is started meanwhile has that in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def running(folder: Path, subvolumes: int = 10, **env: str) -> Iterator[Volume]:
    """A volume, with more in its environment."""
    with environment(**env):
        started = Volume(folder, *free_ports(1), subvolumes)
    try:
        yield started
    finally:
        started.kill()


@pytest.fixture(scope="module")
def locks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a locked volume: admin's password is pässword, and root alone reads it."""
    users = tmp_path_factory.mktemp("locks") / "users"
    users.touch(0o600)
    digest = base64.b64encode(hashlib.sha1("pässword".encode()).digest()).decode()
    users.write_text(f"admin:{{SHA}}{digest}\n")
    return {"AUTH": str(users), "SECRET": SECRET, "ALLOW": "127.0.0.1 127.0.1.0/24 ::1"}


# --- a volume and its drives ----------------------------------------------------------------------


def look(volume: Volume) -> tuple[str, list[str]]:
    """What a volume says of itself: its id, and the drives that are there."""
    answer = call(volume.port, "GET", "/.drives")
    assert re.fullmatch(rb"[0-9a-f]{32}( sv[0-9A-F]{2}| \.)*\n", answer.body), answer
    volume_id, *drives = answer.body.decode().split()
    return volume_id, drives


def check_drives(volume: Volume, missing: list[str]) -> None:
    """That these drives are not listed and answer 503, and all others have the file /aa/bb/x."""
    every = [f"sv{number:02X}" for number in range(volume.subvolumes)]
    every = every if volume.subvolumes > 1 else ["."]
    assert look(volume)[1] == [drive for drive in every if drive not in missing]
    for drive in {*every[:9], *missing}:
        asked = [("GET", "x"), ("HEAD", "x"), ("GET", ""), ("PUT", "new"), ("DELETE", "new")]
        asked = [(method, f"/{drive}/aa/bb/{name}") for method, name in asked]
        statuses = {ask(volume.port, *each).status for each in asked}
        assert statuses == ({503} if drive in missing else {200, 201, 204}), drive


def fill_drives(volume: Volume) -> None:
    """A value on each drive."""
    for drive in look(volume)[1]:
        assert ask(volume.port, "PUT", f"/{drive}/aa/bb/x").status in (201, 204)


def change(volume: Volume, script: str) -> None:
    """Run a script in the folder of a volume; in the one above, if it is away."""
    above, name = volume.folder.parent, volume.folder.name
    shell("bash", "-ec", f"cd {above}; [ ! -d {name} ] || cd {name}; {script}")


def warnings(capfd: pytest.CaptureFixture) -> list[str]:
    """What was said on stderr since it was last asked for, line by line."""
    return capfd.readouterr().err.splitlines()


SWAP = "mv sv03 x; mv sv07 sv03; mv x sv07"
AWAY = f"""
10  | mv sv03/.sv03 x                  | mv x sv03/.sv03       | sv03      |
10  | mv sv03 x                        | mv x sv03             | sv03      |
10  | mv sv03 x; mkdir sv03            | rmdir sv03; mv x sv03 | sv03      |
10  | {SWAP}                           | {SWAP}                | sv03 sv07 |
256 | mv svFF x                        | mv x svFF             | svFF      |
2   | mv ../volume ../x                | mv x volume           | sv00 sv01 |
1   | mv ../volume ../x                | mv x volume           | .         |
10  | {SWAP}                           | {SWAP}                | sv03 sv07 | drive sv07, drive sv03
10  | mkdir sv03/.sv07                 | rmdir sv03/.sv07      | sv03      | remove .*/sv03/.sv07
10  | mv sv03 x; touch sv03            | rm sv03; mv x sv03    | sv03      | cannot be written
10  | mv sv03 x; ln -s /no/where sv03  | rm sv03; mv x sv03    | sv03      | cannot be written
"""


@pytest.mark.parametrize("row", AWAY.strip().splitlines())
def test_a_drive_that_is_not_there_is_503_and_not_404_until_it_is_back(
    tmp_path: Path, capfd: pytest.CaptureFixture, row: str
) -> None:
    """Of how many; what happens; its cure; which are missing then; what the next start says."""
    count, spoil, cure, missing, said = [cell.strip() for cell in row.split("|")]
    with running(tmp_path / "volume", int(count)) as volume:
        fill_drives(volume)
        check_drives(volume, [])
        for script, gone, words in ((spoil, missing.split(), said.split(", ")), (cure, [], [])):
            if said:
                volume.kill()
            change(volume, script)
            if said:
                volume.start()
                for line, drive, why in zip(warnings(capfd), gone, words, strict=True):
                    assert re.search(f"{volume.folder}/{drive} is left out .*{why}", line)
            check_drives(volume, gone)


@pytest.mark.parametrize("link", [True, False])
def test_a_drive_whose_mount_failed_is_not_the_folder_under_it(
    volume: Volume, mounts: Callable[..., None], capfd: pytest.CaptureFixture, link: bool
) -> None:
    """Even if that was a drive once, with values of that time and a marker."""
    drive, disk, memory = volume.folder / "sv03", volume.folder / "x", ".nginx/mounts"
    disk.mkdir()
    if link:
        change(volume, "mv sv03 ../3; ln -s ../3 sv03")
    fill_drives(volume)
    under = sorted(drive.rglob("*"))
    mounts(disk, "-t", "tmpfs", "-o", "size=1m", "none")

    def restart() -> list[str]:
        volume.kill()
        volume.start()
        return warnings(capfd)

    for is_new in (True, False):
        mounts(drive, "--bind", str(disk))
        assert restart() == []
        assert ask(volume.port, "GET", "/sv03/aa/bb/x").status == (404 if is_new else 200)
        fill_drives(volume)
        check_drives(volume, [])
        shell("umount", "-l", str(drive))
        check_drives(volume, ["sv03"])
        for _ in range(2):  # it is remembered for good
            (line,) = restart()
            assert "/sv03 is left out" in line and "strike sv03 out of" in line and memory in line
            check_drives(volume, ["sv03"])
            assert sorted(drive.rglob("*")) == under
    change(volume, f"sed -i /sv03/d {memory}")
    assert restart() == []
    check_drives(volume, [])


def test_what_is_not_a_whole_upload_lies_on_its_drive_and_goes(volume: Volume) -> None:
    waiting = volume.folder / "sv07/.tmp"
    for killed in (False, True):
        with Wire(volume.port) as wire:
            wire.send(request("PUT", "/sv07/aa/bb/x", b"", "Content-Length: 9000000\r\n"))
            wire.send(bytes(MB))
            until(lambda: any(waiting.iterdir()))
            if killed:
                volume.kill()
        assert any(waiting.iterdir()) or not killed
        if killed:
            volume.start()
        until(lambda: not any(waiting.iterdir()), 0.1 if killed else 15)
    assert volume.files() == set()


def test_connections_to_a_volume_are_kept_and_may_pause(volume: Volume) -> None:
    with Wire(volume.port) as wire:
        for _ in range(1500):  # nginx ends them after 1000, unless told
            wire.send(request("GET", VALUE))
            assert wire.answer().status == 404
    config = (volume.folder / ".nginx/nginx.conf").read_text()
    for setting in ("send_timeout", "client_body_timeout", "keepalive_timeout"):
        assert f" {setting} 1h;" in config  # nginx's own 60 s are too long to try


def test_a_volume_has_an_id_that_is_whole_its_own_and_kept(tmp_path: Path) -> None:
    ids, left = set(), [("x", ""), ("id", ""), ("id", "01\n"), ("id.new", "01")]
    for name, text in left:  # by a crash while it was made
        folder = tmp_path / f"{len(ids)}"
        (folder / ".nginx").mkdir(parents=True)
        (folder / ".nginx" / name).write_text(text)
        with running(folder) as volume:
            ids.add(first := look(volume)[0])
            volume.kill()
            volume.start()
            assert look(volume)[0] == first
    assert len(ids) == len(left)


@needs_root
def test_a_volume_of_another_user_keeps_nobodys_files_and_no_secrets(locks: dict[str, str]) -> None:
    with foreign_folder() as folder, contextlib.ExitStack() as stack:
        private = [folder / ".nginx/nginx.conf", folder / ".nginx/auth"]
        private[0].parent.mkdir()
        private[0].touch()  # of an older one; a spy has it open
        spy = stack.enter_context(private[0].open())
        volume = stack.enter_context(running(folder, **locks))
        for path, size in ((VALUE, 9), (NEW, MB)):
            assert call(volume.port, "PUT", path, bytes(size), ADMIN).status == 201
        made = list(folder.rglob("sv00/**/*"))
        workers = [Path(f"/proc/{pid}") for pid in volume.workers()]
        assert {path.owner() for path in [*made, *workers]} == {"nobody"}
        assert not [path for path in made if path.stat().st_mode & stat.S_IWOTH]
        assert SECRET in private[0].read_text() and spy.read() == ""
        assert not [path for path in private if path.stat().st_mode & 0o077]


@needs_root
def test_a_volume_needs_no_root_and_leaves_no_process(tmp_path: Path) -> None:
    with foreign_folder() as folder:
        for name in ("volume.sh", "nginx.conf.tmpl"):
            shutil.copy(HERE / name, folder)  # where all may read
        env, (port,) = os.environ | {"HOST": "127.0.0.1"}, free_ports(1)
        who = "setpriv --reuid=nobody --regid=nogroup --clear-groups".split()
        command = [*who, folder / "volume.sh", folder / "volume"]
        with subprocess.Popen(command, env=env | {"PORT": str(port)}) as process:
            until(lambda: accepts(port))
            assert [ask(port, verb, VALUE).status for verb in ("PUT", "DELETE")] == [201, 204]
            family = descendants(process.pid)
            process.terminate()
        assert process.returncode == 0 and all(map(ended, family)) and not accepts(port)


# --- mistakes with volume.sh ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a volume that runs, and things of which one cannot be made."""
    folder = tmp_path_factory.mktemp("place")
    script = "echo admin:hash >users; echo >empty; echo >file; mkdir broken 'a blank'; "
    script += "ln -s 'a blank' blank; seq 9999 >broken/data.mdb"
    subprocess.run(["bash", "-ec", script], cwd=folder, check=True)
    with running(folder / "volume") as volume:
        (folder / "port").write_text(str(volume.port))
        yield folder


def told_by_volume_sh(folder: Path, command: str, **env: str) -> str:
    """What a line of shell with volume.sh says when that does not start: one line."""
    path = f"{HERE}:{os.environ['PATH']}"
    env = os.environ | {"PORT": str(*free_ports(1)), "HOST": "127.0.0.1", "PATH": path} | env
    words = ["/usr/bin/timeout", "20", "/bin/bash", "-c", command]  # it may start, and run on
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    return done.stderr


WRONG = "SUBVOLUMES=0 SUBVOLUMES=257 SUBVOLUMES=-1 SUBVOLUMES=x SUBVOLUMES=1.5 SUBVOLUMES=09 "
WRONG += "SUBVOLUMES=1\\ 1 PORT=0 PORT=65536 PORT=x PORT=08080 AUTH=nowhere AUTH=. AUTH=empty "
WRONG += "ALLOW=1.2.3.4,1.2.3.5 ALLOW=a ALLOW=\\* ALLOW=1.2.3.4/x ALLOW=é ALLOW=1.2.3.4\\; "
WRONG += "ALLOW=1.2.3.4} SECRET=0123456789abcdef"
WEAK = "short", "ééééééééé", *(f"'{SECRET}{end}'" for end in ("\n", " ", ";", '"', "$uri"))


@pytest.mark.parametrize(
    "said, command",
    [
        *(("usage", f"volume.sh {args}") for args in ("", "new other", "-x")),
        *(
            (word.partition("=")[0], f"{word} volume.sh new")
            for word in re.split(r"(?<!\\) ", WRONG)
        ),
        *(("SECRET is", f"AUTH=users SECRET={secret} volume.sh new") for secret in WEAK),
        ("cannot make file", "volume.sh file"),
        ("without blanks", "volume.sh blank"),
        ("another volume has", "volume.sh volume"),
        *(("is no volume", f"SUBVOLUMES={number} volume.sh volume/sv03") for number in (1, 9)),
        *(("is taken", f"HOST={host} PORT=$(<port) volume.sh new") for host in ("127.0.0.1", "")),
    ],
)
def test_a_mistake_with_volume_sh_is_told_in_one_line(place: Path, said: str, command: str) -> None:
    line = told_by_volume_sh(place, command)
    assert said in line and SECRET not in line
    assert not (place / "new").exists()


def test_volume_sh_says_that_nginx_is_missing(tmp_path: Path) -> None:
    text = (HERE / "volume.sh").read_text().replace("/sbin", "/nowhere")
    (tmp_path / "volume.sh").write_text(text)
    (tmp_path / "bash").symlink_to("/bin/bash")
    said = told_by_volume_sh(tmp_path, "bash volume.sh new", PATH=str(tmp_path))
    assert "nginx is not installed" in said


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_volume_sh_tells_what_it_takes(flag: str) -> None:
    told = subprocess.check_output([HERE / "volume.sh", flag], text=True)
    names = "PORT HOST SUBVOLUMES ALLOW AUTH SECRET".split()
    assert told.startswith("usage: ") and re.findall(r"^  ([A-Z]+) ", told, re.M) == names


# --- the command line -----------------------------------------------------------------------------

ONE = "server -volumes 127.0.0.1:1 -replicas 1 -bind 127.0.0.1"
WORDS = "-voltimeout= -voltimeout=x -voltimeout=1x -voltimeout=1s2 -voltimeout=1 -voltimeout=-1s "
WORDS += "-voltimeout=0 -voltimeout=2h -fallback=a -fallback=http://a:80 -fallback=a:1/b "
WORDS += "-fallback=a:1,b:1 -volumes=nonsense -volumes=a:1,a:1 -volumes=a:1, -port=x -port=0 "
WORDS += "-port=70000 -subvolumes=x -subvolumes=0 -subvolumes=257 -replicas=0 -replicas=2 "
WORDS += "-replicas=-1 -intents=file -nonsense --nonsense -repl=1 "
WORDS += "-workers=2 -maxconns=2 -md5sum=true -partial -adopt-garbage"  # first edition's


@pytest.mark.parametrize(
    "said, words",
    [
        *((re.findall("[a-z]+", word)[0], f"{ONE} {word}") for word in WORDS.split()),
        ("replicas", "-volumes a:1,b:2 server"),
        *(("command", words) for words in ("", "nonsense", ONE.replace("server", "verify"))),
        ("basicauth", f"{ONE} -basicauth"),
    ],
)
def test_a_mistake_in_the_flags_is_told_in_one_line(tmp_path: Path, said: str, words: str) -> None:
    env = os.environ | {"MKV_CLIENTS": "anna,"}  # without a password
    assert said in error_of(*words.split(), folder=tmp_path, env=env)
    assert not any(tmp_path.iterdir())


FAILS = """
in use          | -port TAKEN -db index
file            | -db file
file            | -db file/index
broken          | -db broken
localhost:TAKEN | -db index -volumes 127.0.0.1:TAKEN,localhost:TAKEN
"""


@pytest.mark.parametrize("row", FAILS.strip().splitlines())
def test_a_server_that_cannot_start_says_why_in_one_line(place: Path, row: str) -> None:
    said, flags = row.replace("TAKEN", (place / "port").read_text()).split("|")
    words = f"{ONE} -port {free_ports(1)[0]} {flags}".split()
    assert said.strip() in error_of(*words, folder=place)


@contextlib.contextmanager
def process_of(folder: Path, *flags: str, streams: str = "") -> Iterator[tuple]:
    """A server that may not be up: its process, its port, and what it says."""
    folder.mkdir()
    port, log = *free_ports(1), folder / "log"
    words = [sys.executable, HERE / "mkv.py", "server", "-port", port, "-db", folder / "index"]
    line = shlex.join(map(str, [*words, "-bind", "127.0.0.1", *flags]))
    command = ["bash", "-c", f"exec {line} >>{log} 2>&1 {streams}"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield process, port, log
    finally:
        process.kill()
        process.wait()


def test_a_signal_ends_a_server_that_is_not_up_yet_at_once(tmp_path: Path, volume: Volume) -> None:
    volume.freeze()  # it is waited for
    flags = ("-volumes", volume.name, "-replicas", "1", "-voltimeout", "60s")
    with process_of(tmp_path / "down", *flags) as (process, port, _):
        until(lambda: (tmp_path / "down/index/data.mdb").exists())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    volume.thaw()


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_server_needs_no_streams(tmp_path: Path, volume: Volume, streams: str) -> None:
    flags = ("-volumes", volume.name, "-replicas", "1")
    with process_of(tmp_path / "mute", *flags, streams=streams) as (process, port, _):
        until(lambda: accepts(port))
        assert call(port, "PUT", "/k", b"value").status == 201
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_two_names_of_a_volume_that_was_down_end_the_server_when_it_is_up(
    tmp_path: Path, volume: Volume
) -> None:
    volume.kill()
    names = f"{volume.name},localhost:{volume.port}"
    with process_of(tmp_path / "two", "-volumes", names, "-replicas", "1") as (process, port, log):
        until(lambda: accepts(port))
        volume.start()
        assert process.wait(20) == 0 and "names of one volume" in log.read_text()


def test_an_ipv6_address_is_written_as_in_a_url(tmp_path: Path) -> None:
    needs("IPv6")
    (port,) = free_ports(1)
    words = f"{ONE} -bind [::1] -port {port} -db index".split()
    command = [sys.executable, HERE / "mkv.py", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert f" http://[::1]:{port}," in process.stdout.readline()
            with urllib.request.urlopen(f"http://[::1]:{port}/?health", timeout=30) as answer:
                assert answer.read() == b"ok\n"
        finally:
            process.terminate()


# --- the demo -------------------------------------------------------------------------------------

DEMO_PORTS = (3000, 3001, 3002, 3003)


def test_the_demo_prints_three_curl_lines_that_work(tmp_path: Path) -> None:
    needs("curl")
    with demo(tmp_path):
        lines = re.findall("^curl .*$", (tmp_path / "out").read_text(), re.M)
        script = "\n".join(lines).replace("curl", "curl -fsS")
        said = subprocess.check_output(["bash", "-ec", script], text=True)
    assert len(lines) == 3 and said == 'swag{"keys": ["/key"], "next": ""}\n'
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == ["mkv-data"]


def test_the_demo_ends_with_all_its_processes_and_keeps_what_it_stored(tmp_path: Path) -> None:
    ends = (signal.SIGTERM, 201, 0), (signal.SIGINT, 403, 0), (signal.SIGKILL, 403, -9)
    for number, put, status in ends:
        with demo(tmp_path) as process:
            assert call(3000, "PUT", "/wehave", b"bigswag").status == put
            assert follow(call(3000, "GET", "/wehave")).body == b"bigswag"
            family = descendants(process.pid)
            assert len(family) >= 6  # three masters, each with a worker
            process.send_signal(number)
            assert process.wait(30) == status
            until(lambda family=family: all(map(ended, family)), 15 if status else 0.1)
            assert not any(map(accepts, DEMO_PORTS))


@pytest.mark.parametrize("port", [3000, 3002])
def test_the_demo_says_that_a_port_is_taken(tmp_path: Path, port: int) -> None:
    until(lambda: not any(map(accepts, DEMO_PORTS)), 60)
    with socket.create_server(("127.0.0.1", port)):
        assert str(port) in error_of("server", folder=tmp_path, lines=2)
    assert not any(map(accepts, DEMO_PORTS))


# --- what operators see ---------------------------------------------------------------------------


@contextlib.contextmanager
def shared(folder: Path, *flags: str, **settings: Any) -> Iterator[Cluster]:
    """A cluster for many tests, whose disks may stall; at the end nothing may have leaked."""
    system = Cluster(folder, "-voltimeout", "2s", *flags, **settings)
    try:
        yield system
        until(system.is_clean)
    finally:
        system.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that has a volume to spare."""
    with shared(tmp_path_factory.mktemp("four"), volumes=4) as system:
        yield system


def delete_all(server: Server) -> None:
    """DELETE every key."""
    for path in listed(server, "/?list")[0]:
        assert server.call("DELETE", quote(path)).status == 204


@contextlib.contextmanager
def another(system: Cluster, folder: Path, *flags: str, **settings: Any) -> Iterator[Server]:
    """A server with an index of its own, and more flags, over the volumes of a cluster."""
    known = ("-volumes", system.names(), *Cluster.FLAGS, "-voltimeout", "2s", *flags)
    listener = settings.get("listener")
    port = listener.getsockname()[1] if listener else free_ports(1)[0]
    server = Server(folder / "index", port, *known, **settings)
    try:
        yield server
        delete_all(server)
        assert server.stop() == 0
    finally:
        if server.running():
            server.kill()


def unblock(drive: Path) -> None:
    """Undo block()."""
    shell("find", str(drive), *"-maxdepth 1 -type f -name [0-9a-f][0-9a-f] -delete".split())


def logged(server: Server, *words: str, since: int = 0) -> list[str]:
    """The lines of a server's log that have all of the words, but for the first of each start."""
    lines = server.log.read_text().splitlines()[since:]
    return [line for line in lines if all(w in line for w in words) and "mkv is at" not in line]


def test_a_socket_of_systemd_outlives_its_servers_and_nobody_is_refused(
    four: Cluster, tmp_path: Path
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=4096) as listener,
        another(four, tmp_path, listener=listener) as server,
    ):
        first = Upload(server.port, "/first", 5)
        first.send(b"va")
        until(lambda: server.metric("mkv_intents_open") == 1)
        server.process.send_signal(signal.SIGTERM)
        first.send(b"lue")
        assert first.answer() == 201 and server.process.wait(15) == 0
        late = [Upload(server.port, f"/late{number}", 5) for number in range(10)]
        for each in late:
            each.send(b"value")
        server.start()
        assert {each.answer() for each in late} == {201}


def test_a_socket_that_is_for_another_process_is_not_taken(four: Cluster, tmp_path: Path) -> None:
    with environment(LISTEN_PID="1", LISTEN_FDS="1"), another(four, tmp_path) as server:
        assert server.put("/k", b"value") == 201  # it is at -port


def test_a_volume_that_dies_and_returns_is_worth_one_line_each(four: Cluster) -> None:
    """Ready is whether a PUT can succeed, and healthy is whether a GET can."""
    server, (first, second, *_) = four.server, four.volumes
    steps = [(first, "kill", 3, 200, 201), (second, "kill", 2, 503, 503)]
    steps += [(first, "start", 3, 200, 201), (second, "start", 4, 200, 201)]
    assert server.put("/k", b"value") == 201 and logged(server) == []
    for each, step, count, ready, put in steps:
        getattr(each, step)()
        four.sees(each, up=step == "start")
        assert server.metric("mkv_volumes_up") == count
        assert server.put(f"/{step}{count}", b"value") == put
        asked = [server.call("GET", f"/?{word}").status for word in ("ready", "health")]
        assert asked == [ready, 200]
        assert follow(server.call("GET", "/k")).body == b"value"
        said = {"kill": "is down", "start": "is up again"}[step]
        assert f"{each.name} {said}" in logged(server)[-1]
    holds(lambda: len(logged(server)) == len(steps), 1.2)  # more than one look
    delete_all(server)


def test_a_volume_that_is_dead_or_lacks_drives_at_the_start_is_worth_one_line(
    four: Cluster, tmp_path: Path
) -> None:
    dead, poor, *_ = four.volumes
    dead.kill()
    change(poor, "mv sv03/.sv03 x; mv sv08/.sv08 y")
    with another(four, tmp_path, "-replicas", "2") as server:
        lines = sorted(logged(server), key=lambda line: dead.name not in line)
        assert f"{dead.name} is down" in lines[0] and f"{poor.name} lacks sv03 sv08" in lines[1]
        assert len(lines) == 2
    change(poor, "mv x sv03/.sv03; mv y sv08/.sv08")
    dead.start()
    four.sees(dead)


def test_a_volume_that_does_not_tell_its_drives_has_all_of_them(
    tmp_path: Path, fakes: Callable[[], Fake]
) -> None:
    fake = fakes()
    fake.knows_drives = False
    words = f"-volumes {fake.name} -replicas 1 -subvolumes 1 -voltimeout 2s".split()
    server = Server(tmp_path / "index", *free_ports(1), *words)
    try:
        assert server.put("/k", b"value") == 201 and server.get("/k") == b"value"
        holds(lambda: server.sees(fake), 1.2)  # more than one look
        (line,) = logged(server)
        assert f"{fake.name} does not tell its drives" in line
    finally:
        server.kill()


def test_a_stand_in_is_worth_one_line_whatever_the_key(four: Cluster) -> None:
    server, key, since = four.server, "/two\nlines is up again", len(logged(four.server)) + 1
    bad, *_, last = ideal(four, key, 4)
    block(drive_at(four, bad))
    assert server.put(quote(key), b"value") == 201
    unblock(drive_at(four, bad))
    (line,) = logged(server, "stand-in", since=since)
    assert "'/two\\nlines is up again' has a stand-in at " + last in line
    assert server.call("DELETE", quote(key)).status == 204


def test_drives_that_take_no_values_are_worth_one_line_and_make_a_server_unready(
    cluster: Make,
) -> None:
    system = cluster("-voltimeout", "200ms", subvolumes=1)
    server, bad = system.server, system.volumes[0]
    refuses = f'mkv_location_refuses_writes{{location="{bad.name}"}}'
    block(bad.folder)
    for _ in range(2):  # it is tried again, two seconds later
        until(lambda: b"not written" in server.call("PUT", "/k", b"value").body)
        assert server.call("GET", "/?ready").status == 503 and server.metric(refuses) == 1
    assert server.call("GET", "/?health").status == 200
    unblock(bad.folder)
    until(lambda: server.put("/k", b"value") == 201)
    assert server.call("GET", "/?ready").status == 200 and server.metric(refuses) == 0
    assert len(logged(server, f"{bad.name} is left alone: 5")) == 1
    assert len(logged(server, f"{bad.name} takes values again")) == 1


@pytest.mark.parametrize("flags", [(), ("-v", "-userpass", "admin:\udcff")])  # no UTF-8
def test_with_v_a_request_is_worth_one_line(
    four: Cluster, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    calls = "PUT 201, PUT 403, GET 302, HEAD 302, DELETE 204, GET 404".split(", ")
    with another(four, tmp_path, *flags) as server:
        for method, status in map(str.split, calls):
            assert ask(server.port, method, "/logged%0Ahere").status == int(status)
    lines = [line.split(" ", 2)[2] for line in logged(server, "logged")]
    assert lines == [each.replace(" ", " /logged%0Ahere ") for each in calls if flags]


def test_a_server_whose_index_cannot_be_written_is_healthy_and_not_ready(four: Cluster) -> None:
    server, process = four.server, f"--pid={four.server.process.pid}"
    shell("prlimit", process, "--fsize=1:unlimited")  # no file can be written
    try:
        assert server.put("/new", b"value") == server.call("GET", "/?ready").status == 503
        assert server.call("GET", "/?health").status == 200
    finally:
        shell("prlimit", process, "--fsize=unlimited:unlimited")
    until(lambda: server.call("GET", "/?ready").status == 200)
    assert server.put("/new", b"value") == 201
    assert server.call("DELETE", "/new").status == 204


FAMILIES = "keys garbage_keys intents_open volumes volumes_up volume_up connections commits_total"
FAMILIES += " commit_seconds_total swept_files_total event_loop_lag_seconds received_bytes_total"
FAMILIES += " requests_total request_seconds_total"


def test_each_family_of_metrics_is_one_block_with_help_and_type(four: Cluster) -> None:
    for method in ("GET", "HEAD", "DELETE"):
        assert four.server.call(method, "/none").status == 404
    text = four.server.call("GET", "/?metrics").body.decode()
    label = r'[a-z]+="[^"\n]*"'
    sample = rf"\1(?:{{{label}(?:,{label})*}})? [0-9.e+-]+\n"
    block = rf"# HELP (mkv_[a-z_]+) .+\n# TYPE \1 (?:counter|gauge)\n(?:{sample})+"
    assert re.sub(block, "", text) == ""
    names = [found[1] for found in re.finditer(block, text)]
    assert len(names) == len({*names, *(f"mkv_{name}" for name in FAMILIES.split())})
    if shutil.which("promtool"):
        subprocess.run(["promtool", "check", "metrics"], input=text, text=True, check=True)


def test_metrics_count_what_is_done_and_what_waits(four: Cluster) -> None:
    server, puts = four.server, 'requests_total{method="PUT",status="201"}'
    names = ["keys", "garbage_keys", "swept_files_total", "received_bytes_total", puts]

    def numbers() -> list[float]:
        return [server.metric(f"mkv_{name}") for name in names]

    until(four.is_clean)
    bases, commits = numbers(), server.metric("mkv_commits_total")

    def grown(*expected: int) -> bool:
        return [new - old for new, old in zip(numbers(), bases, strict=True)] == list(expected)

    assert server.put("/k", b"value") == 201 and grown(1, 0, 0, 5, 1)
    bad = volume_at(four, server.call("HEAD", "/k").fields["key-volumes"].partition(",")[0])
    bad.kill()
    four.sees(bad, up=False)
    assert server.call("DELETE", "/k").status == 204
    until(lambda: grown(0, 1, 2, 5, 1))
    bad.start()
    until(lambda: grown(0, 0, 3, 5, 1))
    assert server.metric("mkv_commits_total") >= commits + 2


# --- locks ----------------------------------------------------------------------------------------


PROOF = ANNA["Authorization"]
KEYS = {"MKV_USERPASS": "admin:pässword", "MKV_SECRET": SECRET}


@pytest.fixture(scope="module")
def locked(locks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of locked volumes; its clients have passwords that these do not know."""
    with contextlib.ExitStack() as stack:
        with environment(**locks, **KEYS, MKV_CLIENTS="anna:one,bernd:zwö:drei"):
            folder = tmp_path_factory.mktemp("locked")
            system = stack.enter_context(shared(folder, "-basicauth"))
        system.server.login = "anna:one"
        yield system


Doors = dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def doors(
    locks: dict[str, str], locked: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Doors]:
    """The ports of the server and of volumes with some of the locks; the address one comes from."""
    folder = tmp_path_factory.mktemp("doors")
    with (
        running(folder / "1", **locks) as vault,
        running(folder / "2", AUTH=locks["AUTH"]) as unsigned,
        running(folder / "3", ALLOW=locks["ALLOW"]) as limited,
    ):
        for volume in (vault, unsigned, limited):
            change(volume, "rmdir sv03/.sv03")
        yield {
            "server": (locked.server.port, "127.0.0.1"),
            "vault": (vault.port, "127.0.0.1"),
            "network": (vault.port, "127.0.1.7"),  # ALLOW has it
            "elsewhere": (vault.port, "127.0.0.6"),
            "unsigned": (unsigned.port, "127.0.0.1"),
            "open": (limited.port, "127.0.0.1"),
            "outside": (limited.port, "127.0.2.7"),
        }


LINK = signed(VALUE)
FOLDERS = "/,/sv00/,/sv00/aa/,/sv00/aa/bb/,/sv00/aa/.,/sv00/aa/bb/x/..,//sv00//aa//,/sv00/aa/%2e,"
FOLDERS += f"/sv00/aa%2f,/sv00/aa/bb/?x,/aa/,{signed('/sv00/aa/')}"
DOTS = "/.nginx/nginx.conf,/.nginx/auth,/.nginx/,/.tmp/x,/sv00/.tmp/,/sv00/.tmp/x,/.x,/.drives/,"
DOTS += "/%2enginx/pid,/sv00/aa/../.tmp/x,/sv00/%2Etmp/x,//.nginx/pid,/sv00/.sv00,/sv00/.sv00/"
WHO_MAY = f"""
server    GET,HEAD              {VALUE},{VALUE}?health                      302  401
server    GET                   {NEW}                                       404  401
server    PUT                   {VALUE}                                     403  401
server    PUT                   {NEW}                                       201  401
server    DELETE,UNLINK         {VALUE}                                     204  401
server    REBALANCE             {VALUE},{VALUE}?deep                        204  401
server    GET                   /,/?list,/?unlinked&long,/?garbage          200  401
server    GET                   /?snapshot,/?ready,/?metrics                200  401
server    GET                   /?nonsense,/?health&list                    400  401
server    GET,HEAD              /?health                                    200  200
vault     GET,HEAD              {VALUE},/,/sv00/,/sv00/aa/bb/,/.drives      200  401
vault     GET                   {NEW}                                       404  401
vault     PUT                   {NEW},{signed(NEW)}                         201  401
vault     DELETE                {VALUE},{LINK}                              204  401
vault     GET,HEAD              {LINK}                                      200  200
vault     GET                   {signed(NEW)}                               404  404
vault     POST,MKCOL,MOVE,COPY  {VALUE},{LINK}                              405  401
network   PUT                   {NEW}                                       201  401
elsewhere GET,HEAD              {VALUE}                                     200  401
elsewhere GET,HEAD              {LINK}                                      200  200
elsewhere PUT,DELETE            {VALUE},{LINK},{NEW}                        403  403
unsigned  GET                   {LINK},{signed(VALUE, EVER, "")}            200  401
unsigned  GET                   {signed(VALUE, EVER, "@SECRET@")}           200  401
open      GET                   {VALUE}                                     200  200
open      PUT                   {NEW}                                       201  201
open      DELETE                {VALUE}                                     204  204
open      DELETE                /sv00,/sv00/aa,/sv00/aa/bb                  409  409
outside   GET,HEAD              {VALUE}                                     200  200
outside   PUT,DELETE            {VALUE},{NEW}                               403  403
anywhere  DELETE                {FOLDERS}                                   403  403
anywhere  PUT,MKCOL             /sv00/aa/new/                               403  403
anywhere  GET,HEAD,PUT,DELETE   {DOTS}                                      403  403
anywhere  PUT,DELETE,POST,MKCOL /.drives                                    403  403
anywhere  GET,HEAD,PUT,DELETE   /sv03/x,/sv03/,{signed("/sv03/x")}          503  503
"""


@pytest.mark.parametrize("row", WHO_MAY.strip().splitlines())
def test_who_may_do_what(doors: Doors, row: str) -> None:
    """At which door, how, what; the status for who is right, and for all others."""
    name, methods, paths, right, others = row.split()
    some = ("vault", "unsigned", "open") if name == "anywhere" else (name,)
    friend, strangers = (BERND, [*STRANGERS, ADMIN]) if name == "server" else (ADMIN, STRANGERS)
    asked = itertools.product(some, methods.split(","), paths.split(","), [*strangers, friend])
    for door, method, path, fields in asked:
        port, source = doors[door]
        assert ask(port, "PUT", VALUE, **friend).status in (201, 204, 403)
        ask(port, "DELETE", NEW, **friend)
        answer = ask(port, method, path, source, **fields)
        assert answer.status == int(right if fields is friend else others), (method, path, fields)
        if answer.status >= 400:
            kept = [ask(port, "GET", path, **friend).status for path in (VALUE, NEW)]
            assert kept in ([200, 404], [302, 404])
            assert b"value" not in answer.body and b"sv00" not in answer.body
        if answer.status == 401:
            assert answer.fields["www-authenticate"].startswith('Basic realm="mkv"')


def test_a_locked_volume_whose_folder_vanished_does_not_look_like_one_of_the_first_edition(
    locks: dict[str, str], tmp_path: Path
) -> None:
    with running(tmp_path / "volume", **locks) as volume:
        change(volume, "mv ../volume ../x")  # and with it the users: nginx's own answer is 403
        assert {ask(volume.port, "GET", "/.drives", **who).status for who in (ADMIN, {})} == {503}
        change(volume, "mv x volume")
        assert ask(volume.port, "GET", "/.drives", **ADMIN).status == 200


def test_a_link_that_is_not_right_is_refused_as_if_it_were_not_signed(
    doors: Doors,
) -> None:
    port, past = doors["vault"][0], int(time.time()) - 1
    proof = LINK.partition("?")[2]
    md5, end = re.match("md5=(.*)&(expires=.*)", proof).groups()
    wrong = f"""
    {signed(VALUE, past)} {signed(VALUE, 0)} {signed(VALUE, -1)} {signed(VALUE, EVER, "")}
    {signed(VALUE, EVER, SECRET[:-1])} {signed(VALUE, EVER, SECRET.upper())}
    {LINK}0 {VALUE}?md5={md5}&expires=0{EVER} {VALUE}?md5={md5}&expires= {VALUE}?md5={md5}&expires=x
    {NEW}?{proof} {VALUE}x?{proof} /sv00/?{proof} /?{proof} /.drives?{proof} {VALUE}%3F{proof}
    {VALUE}?md5=&{end} {VALUE}?md5={"x" * 22}&{end} {VALUE}?md5={md5[:-1]}&{end}
    {VALUE}?md5={md5}A&{end} {VALUE}?md5={md5.swapcase()}&{end} {VALUE}?{end} {VALUE}?md5={md5}
    """.split()
    assert ask(port, "PUT", VALUE, **ADMIN).status in (201, 204)
    unsigned = ask(port, "GET", VALUE)
    for path in wrong:
        refused = ask(port, "GET", path)
        assert (refused.status, refused.body) == (401, unsigned.body), path
        assert refused.fields["www-authenticate"] == unsigned.fields["www-authenticate"]


def test_a_redirect_is_a_link_that_is_good_for_an_hour_and_shows_no_secret(locked: Cluster) -> None:
    server = locked.server
    assert server.put("/linked%20%C3%A9", b"value") == 201
    began, answer = time.time(), server.call("GET", "/linked%20%C3%A9")
    assert began - 1 < int(answer.fields["location"].rpartition("=")[2]) - 3600 <= time.time()
    assert follow(answer).body == b"value"  # without a password
    secrets = SECRET, ADMIN["Authorization"][6:], PROOF[6:], "pässword", "@"
    assert not [secret for secret in secrets if secret in str(answer)]
    assert server.call("DELETE", "/linked%20%C3%A9").status == 204


USERS = ": anna anna: :one anna:one, anna:on Anna:one anna:zwö:drei bernd:zwö admin:pässword "
USERS += "anna:one,bernd:zwö:drei"
NOBODY = "", "Bearer x", "Basic", "Basic anna:one", f"{PROOF}A", f"{PROOF}, Basic x"
NOBODY += tuple(basic(user)["Authorization"] for user in ["", "anna:one\n", *USERS.split()])


def test_a_password_is_right_or_not(locked: Cluster) -> None:
    right = PROOF, PROOF.replace("Basic", "basic"), PROOF.replace("Basic", "BASIC")
    for field in right + NOBODY:
        status = ask(locked.server.port, "GET", "/none", Authorization=field).status
        assert status == (404 if field in right else 401), field


def test_each_request_of_a_connection_needs_a_password_before_it_gets_a_100(
    locked: Cluster,
) -> None:
    login = f"Authorization: {PROOF}\r\n"
    with Wire(locked.server.port) as wire:
        for fields, status in ((login, 404), ("", 401), (login, 404), ("", 401)):
            wire.send(request("GET", "/none", b"", fields))
            assert wire.answer().status == status
    for fields, status in (("", 401), (login, 100)):
        with Wire(locked.server.port) as wire:
            expect = f"Content-Length: {9 * MB}\r\nExpect: 100-continue\r\n"
            wire.send(request("PUT", "/big", b"", expect + fields))
            assert wire.head()[0] == status


def test_a_put_with_a_wrong_userpass_is_503_and_says_why(locked: Cluster, tmp_path: Path) -> None:
    with another(locked, tmp_path, "-userpass", "admin:wrong") as server:
        answer = server.call("PUT", "/wrong", b"value")
        assert answer.status == 503 and b"401" in answer.body


@pytest.mark.parametrize(
    "status, flags, userpass, clients",
    [
        (0, "", "admin:pässword", "anna:one"),
        (0, "-userpass admin:pässword", "admin:x", "anna:one"),
        (2, "-userpass admin:wrong", "admin:pässword", "anna:x"),
        (2, "", "", ""),
    ],
)
def test_commands_need_the_password_and_change_nothing_without_it(
    locked: Cluster, tmp_path: Path, status: int, flags: str, userpass: str, clients: str
) -> None:
    assert locked.server.put("/moved", b"value") in (201, 403)
    until(locked.is_clean)
    before, env = (locked.tables(), locked.files()), {"MKV_CLIENTS": clients}
    env = os.environ | env | {"MKV_USERPASS": userpass}
    for name, index, said in (("rebalance", locked.folder, "log in"), ("rebuild", tmp_path, "401")):
        words = f"-volumes {locked.names()} -db {index}/index -voltimeout 3s {flags}".split()
        command = [sys.executable, HERE / "mkv.py", name, *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and (said in done.stdout + done.stderr) == bool(status)
    assert (locked.tables(), locked.files()) == before
    assert stored(tmp_path / "index")[0].keys() == (set() if status else locked.records().keys())
