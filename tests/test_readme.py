"""The examples of README.md, as they stand there.

A table (`Stage.here`) puts the hosts, ports and folders of this machine in the place of theirs, and
a few lines (`Stage.systemctl`) play systemd by the units in README.md.
"""

import contextlib
import grp
import http.client
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from contrib.flags import parse_flags
from harness import (  # noqa: F401 (some are fixtures)
    HERE,
    Cluster,
    accepts,
    blob,
    call,
    free_ports,
    mkv,
    system,
    until,
)

README = Path(os.environ.get("MKV_README", HERE / "README.md")).read_text()


def chapter(title: str) -> str:
    """What stands under a heading, of any depth, up to the next of its depth."""
    marks = re.search(rf"^(#+) {re.escape(title)}$", README, re.M)[1]
    text = README.split(f"\n{marks} {title}\n")[1]
    return re.split(rf"^#{{1,{len(marks)}}} ", outside(text), maxsplit=1, flags=re.M)[0].replace(
        "\0", "#"
    )


def outside(text: str) -> str:
    """The text, in which no line of a block looks like a heading."""
    block = re.compile(r"^```.*?^```", re.M | re.S)
    return block.sub(lambda found: found[0].replace("#", "\0"), text)


def blocks(title: str) -> list[str]:
    """The blocks under a heading."""
    return re.findall(r"^```\w*\n(.*?)^```", chapter(title), re.M | re.S)


def configured(path: str) -> str:
    """The block that says in its first line that it is this file."""
    return re.search(rf"^```\n# {re.escape(path)}\n(.*?)^```", README, re.M | re.S)[1]


UNITS = re.findall(r"^# (/etc/systemd/system/\S+)$", README, re.M)


def bash(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run a block, which ends at the first line that fails."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, (script, ended)
    return ended


def needs(*tools: str) -> None:
    """Skip the test where something is not installed."""
    for tool in tools:
        if not shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin"):
            pytest.skip(f"needs {tool}")


# --- quick start, API -----------------------------------------------------------------------------


@contextlib.contextmanager
def quick_start(folder: Path) -> Iterator[None]:
    """The README's server, which needs the ports 3000 to 3003."""
    needs("curl")
    ports = (3000, 3001, 3002, 3003)
    until(lambda: not any(map(accepts, ports)), 60)
    command = blocks("Quick start")[1].split()[-2:]
    assert command == ["mkv.py", "server"]
    words = [sys.executable, HERE / command[0], command[1]]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: process.poll() is not None or accepts(3000))
            assert process.poll() is None
            yield
        finally:
            process.terminate()


def test_the_readme_installs_what_mkv_declares() -> None:
    declared = re.search(r"^# dependencies = (.*)$", (HERE / "mkv.py").read_text(), re.M)[1]
    installs = re.findall(r"pip install (uvloop.*?)(?: &&|$)", README, re.M)
    assert len(installs) == 2
    for words in installs:
        assert sorted(shlex.split(words)) == sorted(json.loads(declared))


def test_the_line_that_runs_the_tests_is_in_the_readme() -> None:
    assert "pipx run uv run test_mkv.py" in README.splitlines()


def test_the_blocks_about_the_api_work(tmp_path: Path) -> None:
    with quick_start(tmp_path):
        (script,) = blocks("The API")
        said = bash(script, tmp_path).stdout
        assert said.startswith("bigswagbigHTTP/1.1 302 Found")
        fields = [line.partition(":")[0] for line in said.splitlines()]
        assert {"Key-Volumes", "Key-Balance", "Content-Md5", "Location"} <= set(fields)
        everything, long, page, hidden = map(json.loads, re.findall(r"^\{.*\}$", said, re.M))
        names = ["/backup/apt.tgz", "/etc/hosts", "/etc/os-release"]
        assert everything == {"keys": [*names, "/wehave"], "next": ""}
        assert set(long["keys"][0]) == {"key", "size", "md5", "time", "files"}
        assert page == {"keys": ["/etc/hosts"], "next": "/etc/os-release"}
        assert hidden == {"keys": ["/wehave"], "next": ""}
        assert json.loads(call(3000, "GET", "/?list").body)["keys"] == names


def test_the_table_of_the_api_names_every_verb_and_every_query() -> None:
    table = "".join(re.findall(r"^\|.*$", chapter("The API"), re.M))
    for verb in mkv.METHODS:
        assert f"`{verb}`" in table
    words = ["list", "unlinked", "garbage", "snapshot", "health", "ready", "metrics", "deep"]
    for word in words:
        assert f"?{word}" in table


def test_try_it_on_something_real_works(tmp_path: Path) -> None:
    # As it stands, but for the number of files: `find` gives no more than 200.
    few = 'find() { command find "$@" | sed -n 1,200p; }\n'
    with quick_start(tmp_path):
        script = blocks("Try it on something real")[0]
        said = bash(few + script, tmp_path).stdout
    same, count, first, *metrics, last = said.splitlines()
    assert 20 < int(same) == int(count) <= 200
    page = json.loads(first)
    assert len(page["keys"]) == 5 and page["keys"][0].startswith("/usr/share/doc/")
    assert metrics == ["mkv_garbage_keys 0", f"mkv_keys {count}"]
    assert json.loads(last) == {"keys": [], "next": ""}  # and find has found nothing


# --- what works with it ---------------------------------------------------------------------------

CLI, PYTHON = blocks("Try it on something real")[1:]
LINES = [line for line in CLI.splitlines() + PYTHON.splitlines()[1:] if line]


@pytest.mark.parametrize("line", LINES, ids=lambda line: re.sub(r"\W+", "-", line)[:30])
def test_what_is_said_to_work_with_it_does(system: Cluster, tmp_path: Path, line: str) -> None:
    tool = line.split()[0]
    modules = sorted(set(re.findall(r"^\w+|\bfsspec\b", line)))
    if line in CLI:
        needs("git-annex" if tool == "git" else tool)
    for module in modules if line not in CLI else []:
        pytest.importorskip(module)
    table = tmp_path / "table.parquet"
    table.write_bytes(blob("table", 3_000_000))
    if importlib.util.find_spec("pyarrow"):
        pyarrow = pytest.importorskip("pyarrow.parquet")
        columns = {"n": list(range(100_000)), "s": [str(n) for n in range(100_000)]}
        pyarrow.write_table(pytest.importorskip("pyarrow").table(columns), table)
    elif {"pandas", "polars"} & set(modules):
        pytest.skip("needs pyarrow")
    server = system.server
    here, url = f"http://127.0.0.1:{server.port}", f"{PYTHON.splitlines()[0]}\n"
    if "requests.put" not in line:
        assert server.put("/table.parquet", table.read_bytes()) == 201
    if tool == "ffmpeg":
        film = "ffmpeg -v error -f lavfi -i testsrc=d=70:s=320x240:r=5 film.mp4"
        subprocess.run(film.split(), cwd=tmp_path, check=True)
        assert server.put("/film.mp4", (tmp_path / "film.mp4").read_bytes()) == 201
    try:
        if line in CLI:
            begin = table.read_bytes()[:1000]
            table.unlink()
            if "-c" in line.split():
                table.write_bytes(begin)  # to be resumed
            annex = "git init -q; git config user.name a; git config user.email a@b; "
            annex += "git annex init -q; git config annex.security.allowed-ip-addresses all"
            before = annex if tool == "git" else ""
            env = {"HOME": str(tmp_path)}
            bash(f"{before}\n{line.replace('http://localhost:3000', here)}", tmp_path, **env)
            if tool == "ffmpeg":
                assert (tmp_path / "minute.png").stat().st_size > 1000
            elif tool != "git":
                assert table.read_bytes() == server.get("/table.parquet")
        else:
            imports = "".join(f"import {module}\n" for module in modules)
            imports += "import pyarrow.parquet\n" if "pyarrow" in modules else ""
            script = (imports + url + line).replace("http://localhost:3000", here)
            subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)
            assert server.get("/table.parquet") == table.read_bytes()
    finally:
        for path in ("/table.parquet", "/film.mp4"):
            server.call("DELETE", path)


# --- flags ----------------------------------------------------------------------------------------


def test_the_table_of_flags_agrees_with_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, HERE / "mkv.py", "-h"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"^  -([a-z0-9-]+)\b", said, re.M)) - {"h"}
    rows = re.findall(r"^\| `-([a-z0-9-]+)(?: ([^`]*))?` \| ([^|]*?) ?\|", chapter("Flags"), re.M)
    assert {name for name, _, _ in rows} == known
    monkeypatch.delenv("MKV_USERPASS", raising=False)
    volumes = ["-volumes", "a:1,b:1,c:1"]
    monkeypatch.setattr(sys, "argv", ["mkv.py", "server", *volumes])
    flags = parse_flags()
    for name, value, default in rows:
        plain = re.fullmatch(r"`?([\w./-]+)`?", default)
        if not value:
            assert default == "off" and getattr(flags, name) is False
        elif plain and plain[1] != "mkv-data/intents-PORT":
            monkeypatch.setattr(sys, "argv", ["mkv.py", "server", *volumes, f"-{name}", plain[1]])
            assert getattr(parse_flags(), name) == getattr(flags, name), name


# --- run it for real ------------------------------------------------------------------------------


class Stage:
    """One machine that plays the README's five, with its blocks, by the README's units."""

    HOSTS = {f"10.0.0.1{n}": f"127.0.0.{n + 1}" for n in (1, 2, 3, 4)}

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, {}
        self.port, self.inner, self.front = free_ports(3)
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=4096)
        for name in ("etc/ssl", "etc/nginx", "var/lib/mkv", "var/backups"):
            (folder / name).mkdir(parents=True)

    def here(self, text: str, host: str = "") -> str:
        """The text with this machine's addresses, ports and folders."""
        root = str(self.folder)
        table = {f"{name}:3001": f"{ours}:{self.inner}" for name, ours in self.HOSTS.items()}
        table |= {"10.0.0.1": "127.0.0.1", "127.0.0.1:3000": f"127.0.0.1:{self.port}"}
        table |= {"listen 443": f"listen 127.0.0.1:{self.front}"}
        table |= {"/opt/mkv/.venv/bin/python": sys.executable, "/opt/mkv": str(HERE)}
        table |= {"/etc/mkv": f"{root}/etc/mkv", "/etc/nginx": f"{root}/etc/nginx"}
        table |= {"/etc/ssl": f"{root}/etc/ssl", "/var/": f"{root}/var/"}
        table |= {"/data/": f"{root}/{host}/data/"}
        words = sorted(table, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, words)), lambda found: table[found[0]], text)

    def run(self, block: str) -> str:
        """A block in bash, its systemctl lines played here; what it prints."""
        curl = f"command curl -k --connect-to store.example:443:127.0.0.1:{self.front}"
        play = f'runuser() {{ shift 3; "$@"; }}; curl() {{ {curl} "$@"; }}\n'
        play += 'install() { command install "${@/#mkv/root}"; }\n'  # there is no such user
        said = ""
        for part in re.split(r"^(systemctl .*\n)", block, flags=re.M):
            if part.startswith("systemctl "):
                self.systemctl(*part.split()[1:])
            else:
                said += bash(play + self.here(part), self.folder).stdout
        return said

    def systemctl(self, verb: str, *units: str) -> None:
        """Start or stop what the README's units say."""
        for unit in units:
            if unit.endswith(".socket"):
                continue  # it is self.listener, and stays
            name = unit.removesuffix(".service")
            if verb in ("stop", "restart") and name in self.processes:
                self.stop(name)
            if verb in ("start", "restart"):
                process = self.start(name)
                if "oneshot" in configured(f"/etc/systemd/system/{name}.service"):
                    del self.processes[name]
                    assert process.wait(120) == 0

    def start(self, unit: str, host: str = "", **more: str) -> subprocess.Popen:
        """Start a service; one that has a socket is passed it."""
        text = self.here(configured(f"/etc/systemd/system/{unit}.service"), host)
        settings = re.search("^EnvironmentFile=(.*)$", text, re.M)[1]
        words = shlex.split(Path(settings).read_text())
        env = os.environ | dict(word.split("=", 1) for word in words) | more
        command = shlex.split(re.search("^ExecStart=(.*)$", text, re.M)[1])
        where = command.index("$MKV_FLAGS") if "$MKV_FLAGS" in command else len(command)
        command[where : where + 1] = env.get("MKV_FLAGS", "").split()
        for before in re.findall("^ExecStartPre=(.*)$", text, re.M):
            subprocess.run(shlex.split(before), check=True, timeout=60)
        passed = []
        if f"{unit}.socket" in text:
            passed = [self.listener.fileno()]
            take = f'exec 3<&{passed[0]}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
            command = ["bash", "-c", take, "bash", *command]
        options = {"cwd": self.folder, "pass_fds": passed, "start_new_session": True}
        process = subprocess.Popen(command, env=env, **options)
        self.processes[unit + host] = process
        return process

    def stop(self, name: str) -> None:
        """End what was started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)

    def close(self) -> None:
        for name in list(self.processes):
            self.stop(name)
        self.listener.close()

    def ready(self) -> bool:
        """Whether a PUT can succeed."""
        return call(self.port, "GET", "/?ready").status == 200

    def put(self, path: str, value: bytes) -> int:
        return call(self.port, "PUT", path, value).status

    def get(self, path: str) -> bytes | None:
        """The value, by the front nginx, which follows redirects; None: there is none."""
        password = (self.folder / "etc/mkv/anna").read_text().strip()
        curl = ["curl", "-ksS", "-w", "%{stderr}%{http_code}", "-u", f"anna:{password}"]
        url = f"https://127.0.0.1:{self.front}{path}"
        ended = subprocess.run([*curl, url], capture_output=True, check=True)
        assert ended.stderr in (b"200", b"404"), ended
        return ended.stdout if ended.stderr == b"200" else None


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Volumes, server and nginx of the README's chapter, and a spare volume."""
    needs("curl", "openssl", "nginx")
    if os.geteuid():
        pytest.skip("it is for root")
    stage = Stage(tmp_path_factory.mktemp("stage"))
    try:
        mask = stage.run("umask\n")
        assert stage.run(blocks("Passwords")[0] + "umask\n") == mask  # what follows is for others
        settings = stage.folder / "etc/mkv/server.env"
        quick = f"-port {stage.port} -settle 2s -grace 200ms -voltimeout 3s -db"  # disks stall
        settings.write_text(settings.read_text().replace("-db", quick, 1))
        for host in stage.HOSTS.values():
            stage.start("mkv-volume", host, HOST=host, PORT=str(stage.inner))
        stage.start("mkv")
        certify = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=mkv"
        bash(f"{certify} -keyout etc/ssl/mkv.key -out etc/ssl/mkv.crt", stage.folder)
        users, _, client = blocks("TLS, clients and browsers: one nginx")[1].partition("\n\n")
        assert stage.run(users + "\numask\n") == mask
        front = stage.folder / "front"
        front.mkdir()
        site = stage.here(configured("/etc/nginx/conf.d/mkv.conf"))
        config = f"daemon off; pid pid; user root; events {{}} http {{ access_log off; {site} }}"
        (front / "nginx.conf").write_text(config)
        nginx = ["nginx", "-p", front, "-e", "stderr", "-c", front / "nginx.conf"]
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        subprocess.run([*nginx, "-t"], env=os.environ | {"PATH": path}, check=True)
        options = {"env": os.environ | {"PATH": path}, "start_new_session": True}
        stage.processes["nginx"] = subprocess.Popen(nginx, **options)
        until(lambda: accepts(stage.front))
        until(stage.ready, 30)
        yield stage
    finally:
        stage.close()


def test_three_machines_are_locked_down(stage: Stage) -> None:
    client = blocks("TLS, clients and browsers: one nginx")[1].partition("\n\n")[2]
    assert client.count("curl ") == 5
    assert stage.run(client) == "no entry\nno entry\n"
    for host in list(stage.HOSTS.values())[:3]:  # nobody but the index server writes
        url = f"http://{host}:{stage.inner}/sv00/x"
        password = (stage.folder / "etc/mkv/server.env").read_text()
        userpass = re.search("MKV_USERPASS=(.*)", password)[1]
        curl = "curl -sS -o /dev/null -w %{http_code} -X PUT -d x --interface 127.0.0.99 -u"
        said = bash(f"{curl} {userpass} {url}", stage.folder).stdout
        assert said == "403"
    kept = [path for path in (stage.folder / "etc/mkv").iterdir() if path.stat().st_mode & 0o077]
    assert kept == []
    users = (stage.folder / "etc/nginx/mkv.users").stat()
    assert (users.st_mode & 0o777, grp.getgrgid(users.st_gid).gr_name) == (0o640, "www-data")


def test_a_page_elsewhere_may_use_the_store(stage: Stage) -> None:
    password = (stage.folder / "etc/mkv/anna").read_text().strip()
    url = f"https://127.0.0.1:{stage.front}/page"
    assert stage.put("/page", b"0123456789") == 201
    origin = "curl -ksSi -H 'Origin: https://elsewhere.example'"
    ask = f"{origin} -X OPTIONS -H 'Access-Control-Request-Method: PUT' "
    asked = bash(f"{ask} -H 'Access-Control-Request-Headers: authorization,if-match' {url}", Path())
    assert asked.stdout.startswith("HTTP/1.1 204")
    assert re.search("^Access-Control-Allow-Methods:.*PUT", asked.stdout, re.M)
    assert re.search("^Access-Control-Allow-Headers: Authorization.*If-Match", asked.stdout, re.M)
    got = bash(f"{origin} -u anna:{password} -r 2-4 {url}", Path()).stdout
    assert got.startswith("HTTP/1.1 206") and got.endswith("\n234")
    refused = bash(f"{origin} {url}", Path()).stdout
    assert refused.startswith("HTTP/1.1 401")
    for said in (asked.stdout, got, refused):
        assert said.count("Access-Control-Allow-Origin: *") == 1
    assert re.search(r"^Access-Control-Expose-Headers: Content-Md5", got, re.M)
    assert re.search(r"^Content-Md5: [0-9a-f]{32}", got, re.M)
    assert "Location" not in got and "Key-Volumes" not in got
    assert call(stage.port, "DELETE", "/page").status == 204


def test_large_values_pass_through_the_nginx_in_front(stage: Stage) -> None:
    value = blob("large", 20 << 20)
    (stage.folder / "large").write_bytes(value)
    password = (stage.folder / "etc/mkv/anna").read_text().strip()
    curl = f"curl -kfsS -u anna:{password} https://127.0.0.1:{stage.front}/large"
    bash(f"{curl} -T large; cat large | {curl}%20piped -T -", stage.folder)
    assert stage.get("/large") == stage.get("/large%20piped") == value
    bash(f"{curl} -X DELETE; {curl}%20piped -X DELETE", stage.folder)
    assert stage.get("/large") is None


def test_a_value_is_replaced_through_the_nginx_in_front(stage: Stage) -> None:
    password = (stage.folder / "etc/mkv/anna").read_text().strip()
    curl = f"curl -ksS -u anna:{password} https://127.0.0.1:{stage.front}/replaced"
    status = "-o /dev/null -w %{http_code}"
    bash(f"{curl} -f -X PUT -d one", stage.folder)
    head = bash(f"{curl} -f -I", stage.folder).stdout
    tag = re.search("^Content-Md5: (.*)$", head, re.M)[1]
    assert re.search("^Content-Length: 3$", head, re.M)
    replace = f"{curl} {status} -X PUT -d three -H 'If-Match: \"{tag}\"'"
    assert bash(replace, stage.folder).stdout == "201"
    assert bash(replace, stage.folder).stdout == "412"
    assert stage.get("/replaced") == b"three"
    assert bash(f"{curl} {status} -X DELETE", stage.folder).stdout == "204"
    assert "/replaced" not in bash(f"{curl.removesuffix('replaced')}?list", stage.folder).stdout


def values_of(name: str) -> dict[str, bytes]:
    return {f"/{name}/{number}": blob(f"{name}{number}", number * 99 + 1) for number in range(40)}


def assert_stored(stage: Stage, values: dict[str, bytes]) -> None:
    assert {path: stage.get(path) for path in values} == values


def test_a_backup_is_restored_and_what_was_written_since_is_taken_in(stage: Stage) -> None:
    backup, restore = blocks("Backup")
    early, late = values_of("early"), values_of("late")
    gone = {"/gone": b"value"}
    assert {stage.put(*item) for item in (early | gone).items()} == {201}
    stage.run(backup)
    assert {stage.put(*item) for item in late.items()} == {201}
    assert call(stage.port, "DELETE", "/gone").status == 204
    stage.run(restore)
    until(stage.ready, 30)
    assert_stored(stage, early | late)
    assert stage.get("/gone") is None  # a redirect to nowhere, which nginx follows
    assert call(stage.port, "DELETE", "/gone").status == 204
    assert {call(stage.port, "DELETE", path).status for path in early | late} == {204}


def test_an_index_that_is_lost_is_made_again(stage: Stage) -> None:
    values = values_of("rebuilt")
    assert {stage.put(*item) for item in values.items()} == {201}
    (block,) = blocks("When the index is lost")
    before, after = re.split(r"(?<=mkv\.service\n)", block, maxsplit=1)
    stage.run(before)
    shutil.rmtree(stage.folder / "var/lib/mkv")
    stage.run(after)
    until(stage.ready, 30)
    assert_stored(stage, values)
    assert {call(stage.port, "DELETE", path).status for path in values} == {204}


def test_a_volume_is_added_and_no_client_sees_it(stage: Stage) -> None:
    values = values_of("moved")
    assert {stage.put(*item) for item in values.items()} == {201}
    change = blocks("Adding and losing volumes")[0]
    settings = stage.folder / "etc/mkv/server.env"
    three = settings.read_text()
    enough, statuses = threading.Event(), Counter()

    def read() -> None:
        while not enough.is_set():
            try:
                statuses[call(stage.port, "GET", "/moved/1").status] += 1
            except (OSError, http.client.HTTPException) as error:
                statuses[repr(error)] += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        stage.run(change)
        fourth = f"{stage.HOSTS['10.0.0.14']}:{stage.inner}"
        assert settings.read_text().count(fourth) == 1
        items = json.loads(call(stage.port, "GET", "/moved/?list&long").body)["keys"]
        files = [file for item in items for file in item["files"]]
        assert len(files) == 3 * len(values) and any(file.startswith(fourth) for file in files)
        for path in values:
            assert call(stage.port, "HEAD", path).fields["key-balance"] == "balanced"
        assert_stored(stage, values)
        enough.set()
        reader.join()
        assert statuses.keys() == {302} and statuses[302] > 100, statuses
    finally:
        enough.set()
        settings.write_text(three)
        stage.systemctl("restart", "mkv")
        stage.systemctl("start", "mkv-rebalance")
        until(stage.ready, 30)
    assert_stored(stage, values)
    assert {call(stage.port, "DELETE", path).status for path in values} == {204}


def test_verify_finds_nothing_wrong(stage: Stage) -> None:
    said = subprocess.run(
        [sys.executable, HERE / "thrasher.py", "-h"], capture_output=True, text=True
    ).stdout
    if "verify" not in said:
        pytest.skip("thrasher.py has no verify")
    assert stage.put("/verified", b"value") == 201
    until(lambda: json.loads(call(stage.port, "GET", "/?garbage").body)["garbage"] == [], 30)
    assert stage.run(blocks("Adding and losing volumes")[1]) == ""
    assert call(stage.port, "DELETE", "/verified").status == 204


def test_every_finding_is_in_the_table_of_the_readme() -> None:
    rows = re.findall(r"^\| (`.*?) \|", chapter("Adding and losing volumes"), re.M)
    table = set(re.findall(r"`([a-z0-9-]+)`", "".join(rows)))
    parts = [HERE / "mkv.py", HERE / "contrib/maintenance.py", HERE / "thrasher.py"]
    code = "".join(path.read_text() for path in parts if path.exists())
    found = set(re.findall(r'finding\(\s*"([a-z0-9-]+)"', code))
    assert found and found <= table


# --- systemd, Prometheus --------------------------------------------------------------------------


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    needs("systemd-analyze")
    assert len(UNITS) == 7
    for path in UNITS:
        text = configured(path).replace("/opt/mkv/.venv/bin/python", sys.executable)
        (tmp_path / Path(path).name).write_text(text.replace("/opt/mkv", str(HERE)))
    units = sorted(map(str, tmp_path.iterdir()))
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True
    )
    ours = [line for line in ended.stderr.splitlines() if "mkv" in line]
    assert ended.returncode == 0 and ours == []
    for timer in re.findall("^OnCalendar=(.*)$", README, re.M):
        subprocess.run(["systemd-analyze", "calendar", timer], check=True, capture_output=True)


def test_systemd_understands_the_mount_of_a_drive(tmp_path: Path) -> None:
    generator = Path("/usr/lib/systemd/system-generators/systemd-fstab-generator")
    if not generator.exists():
        pytest.skip("needs systemd")
    (tmp_path / "fstab").write_text(re.search("^LABEL=.*\n", README, re.M)[0])
    env = os.environ | {"SYSTEMD_FSTAB": str(tmp_path / "fstab")}
    out = tmp_path / "units"
    out.mkdir()
    subprocess.run([generator, out, out, out], env=env, check=True)
    assert "\nBefore=mkv-volume.service\n" in (out / "data-volume1-sv00.mount").read_text()


@pytest.fixture
def monitored(system: Cluster, tmp_path: Path) -> Path:
    """A folder with the README's configuration for Prometheus."""
    scrape, rules = blocks("Monitoring")
    (tmp_path / "rules.yml").write_text(rules)
    scrape = scrape.replace("127.0.0.1:3000", f"127.0.0.1:{system.server.port}")
    more = "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [rules.yml]\n"
    (tmp_path / "prometheus.yml").write_text(more + scrape)
    return tmp_path


def test_prometheus_takes_the_configuration_and_the_rules(monitored: Path) -> None:
    needs("promtool")
    bash("promtool check config prometheus.yml && promtool check rules rules.yml", monitored)


def test_prometheus_gets_the_numbers_that_its_rules_are_about(
    system: Cluster, monitored: Path
) -> None:
    needs("prometheus")
    (port,) = free_ports(1)
    flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=data"]  # Debian's is in /var
    flags += [f"--web.listen-address=127.0.0.1:{port}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(["prometheus", *flags], cwd=monitored, **quiet) as process:

        def value(name: str) -> list:
            url = f"http://127.0.0.1:{port}/api/v1/query?query={name}"
            with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
                return [each["value"][1] for each in json.load(answer)["data"]["result"]]
            return []

        try:
            until(lambda: value("mkv_volume_up") == ["1"] * 3, 30)
            assert len(value("mkv_garbage_keys")) == 1
        finally:
            process.terminate()


def test_the_rules_are_about_numbers_that_there_are(system: Cluster) -> None:
    named = set(re.findall(r"\bmkv_\w+", blocks("Monitoring")[1]))
    text = call(system.server.port, "GET", "/?metrics").body.decode()
    shown = set(re.findall(r"^(mkv_\w+)", text, re.M))
    assert named - shown <= {"mkv_location_refuses_writes"}  # there once a location has refused
    code = "".join(path.read_text() for path in [HERE / "mkv.py", *HERE.glob("contrib/*.py")])
    assert all(name.removeprefix("mkv_") in code for name in named)
