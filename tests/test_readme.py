"""The blocks of README.md, run as they stand.

A table (`Stage.here`) puts the hosts, ports and folders of this machine in the place of theirs, and
a few lines (`Stage.systemctl`) play systemd by the units in README.md.
"""

import contextlib
import grp
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from contrib.flags import FLAGS
from harness import HERE, MB, PATH, accepts, blob, call, demo, free_ports, mkv, needs, until

README = (HERE / "README.md").read_text()


def chapter(title: str) -> str:
    """What stands under a heading, of any depth, up to the next of its depth."""
    hidden = re.sub(
        r"^```.*?^```", lambda found: found[0].replace("#", "\0"), README, flags=re.M | re.S
    )
    marks, text = re.search(rf"^(#+) {re.escape(title)}\n(.*)", hidden, re.M | re.S).groups()
    return re.split(rf"^#{{1,{len(marks)}}} ", text, flags=re.M)[0].replace("\0", "#")


def blocks(title: str) -> list[str]:
    """The blocks under a heading."""
    return re.findall(r"^```\w*\n(.*?)^```", chapter(title), re.M | re.S)


def configured(path: str) -> str:
    """The block that says in its first line that it is this file."""
    return re.search(rf"^```\n# {re.escape(path)}\n(.*?)^```", README, re.M | re.S)[1]


def bash(script: str, folder: Path, **env: str) -> str:
    """Run a block, which ends at the first line that fails; what it prints."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    env = os.environ | {"PATH": PATH} | env
    pipe = subprocess.PIPE
    ended = subprocess.run(command, cwd=folder, env=env, stdout=pipe, text=True, timeout=120)
    assert ended.returncode == 0, script
    return ended.stdout


# --- its tables -----------------------------------------------------------------------------------


def test_the_readme_installs_what_mkv_declares() -> None:
    declared = re.search(r"^# dependencies = (.*)$", (HERE / "mkv.py").read_text(), re.M)[1]
    installs = re.findall(r"pip install (uvloop.*?)(?: &&|$)", README, re.M)
    assert [sorted(shlex.split(words)) for words in installs] == [sorted(json.loads(declared))] * 2


def test_the_table_of_the_api_names_every_verb_and_every_query() -> None:
    table = "".join(re.findall(r"^\|.*$", chapter("The API"), re.M))
    words = "?list ?unlinked ?garbage ?snapshot ?health ?ready ?metrics ?deep &long &start= &limit="
    assert not [word for word in (*mkv.METHODS, *words.split()) if word not in table]


def test_the_table_of_flags_agrees_with_the_help() -> None:
    said = subprocess.check_output([sys.executable, HERE / "mkv.py", "-h"], text=True)
    rows = re.findall(r"^\| `-([a-z]+)(?: [^`]*)?` \| ([^|]*?) ?\|", chapter("Flags"), re.M)
    told = set(re.findall(r"^  -([a-z]+)", said, re.M)) - {"h"}
    assert {name for name, _ in rows} == told == {name for name, *_ in FLAGS}
    defaults = {name: (kind, default) for name, kind, default, _ in FLAGS}
    for name, text in rows:
        kind, default = defaults[name]
        if not kind:
            assert text == "off" and default is False
        elif plain := re.fullmatch(r"`?([\w./]+(?!-PORT))`?", text):
            assert kind(plain[1]) == default, name


def test_every_finding_is_in_the_table_of_the_readme() -> None:
    rows = re.findall(r"^\| (`.*?) \|", chapter("Adding and losing volumes"), re.M)
    table = set(re.findall(r"`([a-z0-9-]+)`", "".join(rows)))
    code = (HERE / "contrib/maintenance.py").read_text() + (HERE / "thrasher.py").read_text()
    found = set(re.findall(r'finding\(\s*"([a-z0-9-]+)"', code))
    assert found and found <= table


# --- the demo, and what works with it -------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the README's server runs, which needs the ports 3000 to 3003."""
    needs("curl")
    assert blocks("Quick start")[1].endswith(".venv/bin/python mkv.py server\n")
    folder = tmp_path_factory.mktemp("demo")
    with demo(folder):
        yield folder


def test_the_blocks_about_the_api_work(folder: Path) -> None:
    said = bash(*blocks("The API"), folder)
    assert said.startswith("bigswagbigHTTP/1.1 302 Found")
    fields = {line.partition(":")[0] for line in said.splitlines()}
    assert {"Key-Volumes", "Key-Balance", "Content-Md5", "Location"} <= fields
    everything, long, page, hidden = map(json.loads, re.findall(r"^\{.*\}$", said, re.M))
    names = ["/backup/apt.tgz", "/etc/hosts", "/etc/os-release"]
    assert everything == {"keys": [*names, "/wehave"], "next": ""}
    assert set(long["keys"][0]) == {"key", "size", "md5", "time", "files"}
    assert page == {"keys": ["/etc/hosts"], "next": "/etc/os-release"}
    assert hidden == {"keys": ["/wehave"], "next": ""}
    assert json.loads(call(3000, "GET", "/?list").body)["keys"] == names


def test_try_it_on_something_real_works(folder: Path) -> None:
    few = 'find() { command find "$@" | sed -n 1,100p; }\n'  # as it stands, but for that
    said = bash(few + blocks("Try it on something real")[0], folder)
    same, count, first, garbage, keys, last = said.splitlines()
    assert 20 < int(same) == int(count) <= 100
    page = json.loads(first)["keys"]
    assert len(page) == 5 and page[0].startswith("/usr/share/doc/")
    assert garbage.startswith("mkv_garbage_keys ") and keys.startswith("mkv_keys ")
    assert json.loads(last) == {"keys": [], "next": ""}  # and find has found nothing


CLI, PYTHON = blocks("Try it on something real")[1:]
URL, *CALLS = PYTHON.splitlines()
BEFORE = {
    "wget": "head -c 1000 ../table.parquet >table.parquet",  # to be resumed
    "git": "git init -q; git config user.name a; git config user.email a@b; git annex init -q; "
    "git config annex.security.allowed-ip-addresses all",
    "ffmpeg": "ffmpeg -v error -f lavfi -i testsrc=d=70:s=320x240:r=5 film.mp4; "
    "curl -fsST film.mp4 localhost:3000/film.mp4",
}


@pytest.mark.parametrize("line", CLI.splitlines() + CALLS)
def test_what_is_said_to_work_with_it_does(folder: Path, tmp_path: Path, line: str) -> None:
    tool, table, there = line.split()[0], tmp_path / "table.parquet", tmp_path / "there"
    script = f"{BEFORE.get(tool, '')}\n{line}"
    if line in CLI:
        needs({"git": "git-annex"}.get(tool, tool))
        table.write_bytes(blob("table", MB))
    else:
        modules = {"pyarrow", "pyarrow.parquet", *re.findall(r"^\w+|fsspec", line)}
        found = {module: pytest.importorskip(module) for module in modules}
        rows = found["pyarrow"].table({"n": list(range(100_000))})
        found["pyarrow.parquet"].write_table(rows, table)
        imports = "".join(f"import {module}\n" for module in modules)
        (tmp_path / "script.py").write_text(f"{imports}{URL}\n{line}")
        script = f"cd ..; {sys.executable} script.py"
    there.mkdir()
    if "requests.put" not in line:
        bash("curl -fsST table.parquet localhost:3000", tmp_path)
    bash(script, there, HOME=str(tmp_path))
    bash("curl -fsSL localhost:3000/table.parquet | cmp - table.parquet", tmp_path)
    for file in there.glob("*.parquet"):
        assert file.read_bytes() == table.read_bytes() or tool == "git"
    bash("for name in table.parquet film.mp4; do curl -sX DELETE localhost:3000/$name; done", there)


def test_prometheus_gets_the_numbers_that_its_rules_are_about(folder: Path, tmp_path: Path) -> None:
    needs("promtool", "prometheus")
    scrape, rules = blocks("Monitoring")
    (tmp_path / "rules.yml").write_text(rules)
    more = "global: {scrape_interval: 1s}\nrule_files: [rules.yml]\n"
    (tmp_path / "prometheus.yml").write_text(more + scrape)
    bash("promtool check config prometheus.yml && promtool check rules rules.yml", tmp_path)
    wanted = set(re.findall(r"\bmkv_\w+", rules)) - {"mkv_location_refuses_writes"}  # none has
    bash(f"{sys.executable} {HERE}/mkv.py rebalance", folder)
    (port,) = free_ports(1)
    command = "prometheus --config.file=prometheus.yml --storage.tsdb.path=data "
    command += f"--log.level=error --web.listen-address=127.0.0.1:{port}"
    with subprocess.Popen(command.split(), cwd=tmp_path) as process:

        def got() -> set[str]:
            url = f"http://127.0.0.1:{port}/api/v1/label/__name__/values"
            with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
                return wanted & set(json.load(answer)["data"])
            return set()

        try:
            until(lambda: got() == wanted, 30)
        finally:
            process.terminate()


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
        table = f"""
        10.0.0.1 127.0.0.1
        127.0.0.1:3000 127.0.0.1:{self.port}
        443 127.0.0.1:{self.front}
        /opt/mkv {HERE}
        /opt/mkv/.venv/bin/python {sys.executable}
        /data/ {self.folder}/{host}/data/
        """
        words = dict(line.split() for line in table.strip().splitlines())
        words |= {f"{name}:3001": f"{ours}:{self.inner}" for name, ours in self.HOSTS.items()}
        words |= {
            name: f"{self.folder}{name}" for name in ("/etc/mkv", "/etc/nginx", "/etc/ssl", "/var/")
        }
        longest = sorted(map(re.escape, words), key=len, reverse=True)
        return re.sub("|".join(longest), lambda found: words[found[0]], text)

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
                said += bash(play + self.here(part), self.folder)
        return said

    def systemctl(self, verb: str, *units: str) -> None:
        """Start or stop what the README's units say; the socket stays."""
        for name in [unit.removesuffix(".service") for unit in units if unit != "mkv.socket"]:
            if verb in ("stop", "restart"):
                self.stop(name)
            if verb in ("start", "restart"):
                process = self.start(name)
                if "oneshot" in configured(f"/etc/systemd/system/{name}.service"):
                    assert process.wait(120) == 0

    def start(self, unit: str, host: str = "", **env: str) -> subprocess.Popen:
        """Start a service; one that has a socket is passed it."""
        text = self.here(configured(f"/etc/systemd/system/{unit}.service"), host)
        says = dict(re.findall("^(EnvironmentFile|ExecStartPre|ExecStart)=(.*)$", text, re.M))
        script = f"set -a; . {says['EnvironmentFile']}; {says.get('ExecStartPre', ':')}\n"
        if "mkv.socket" in text:
            script += f"exec 3<&{self.listener.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$\n"
        return self.spawn(unit + host, f"{script}exec {says['ExecStart']}", **env)

    def spawn(self, name: str, script: str, **env: str) -> subprocess.Popen:
        """Start what is to be stopped by this name."""
        command, env = ["bash", "-ec", script], os.environ | {"PATH": PATH} | env
        options = {"env": env, "pass_fds": [self.listener.fileno()], "start_new_session": True}
        self.processes[name] = subprocess.Popen(command, cwd=self.folder, **options)
        return self.processes[name]

    def stop(self, name: str) -> None:
        """End what was started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)

    def ready(self) -> bool:
        """Whether a PUT can succeed."""
        return call(self.port, "GET", "/?ready").status == 200

    def store(self, name: str) -> dict[str, bytes]:
        """Some values that are stored, by path."""
        values = {
            f"/{name}/{number}": blob(f"{name}{number}", number * 99 + 1) for number in range(40)
        }
        for path, value in values.items():
            assert call(self.port, "PUT", path, value).status == 201
        return values

    def check(self, values: dict[str, bytes]) -> None:
        """They are still there, and go now."""
        for path, value in values.items():
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
                assert answer.read() == value
            assert call(self.port, "DELETE", path).status == 204


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Volumes, server and nginx of the README's chapter, and a spare volume."""
    needs("curl", "openssl", "nginx", "root")
    stage = Stage(tmp_path_factory.mktemp("stage"))
    try:
        stage.run(blocks("Passwords")[0])
        settings = stage.folder / "etc/mkv/server.env"
        quick = f"-port {stage.port} -settle 2s -grace 200ms -voltimeout 3s -db"  # disks stall
        settings.write_text(settings.read_text().replace("-db", quick, 1))
        for host in stage.HOSTS.values():
            stage.start("mkv-volume", host, HOST=host, PORT=str(stage.inner))
        stage.start("mkv")
        certify = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=mkv -keyout mkv.key"
        bash(f"{certify} -out mkv.crt 2>/dev/null", stage.folder / "etc/ssl")
        stage.run(blocks("TLS, clients and browsers: one nginx")[1].partition("\n\n")[0])
        site = stage.here(configured("/etc/nginx/conf.d/mkv.conf"))
        config = f"daemon off; pid pid; user root; events {{}} http {{ access_log off; {site} }}"
        (stage.folder / "nginx.conf").write_text(config)
        stage.spawn("nginx", "exec nginx -p . -e stderr -c nginx.conf")
        until(lambda: accepts(stage.front))
        until(stage.ready, 30)
        yield stage
    finally:
        for name in list(stage.processes):
            stage.stop(name)
        stage.listener.close()


def test_three_machines_are_locked_down(stage: Stage) -> None:
    client = blocks("TLS, clients and browsers: one nginx")[1].partition("\n\n")[2]
    assert client.count("curl ") == 5 and stage.run(client) == "no entry\nno entry\n"
    write = """
    for host in 10.0.0.11:3001 10.0.0.12:3001 10.0.0.13:3001; do
      (. /etc/mkv/server.env; curl -u "$MKV_USERPASS" -X PUT -d x --interface 127.0.0.99 \\
        -sS -o /dev/null -w '%{http_code} ' http://$host/sv00/x)
    done
    """
    assert stage.run(write) == "403 403 403 "  # nobody but the index server writes
    private = [path for path in (stage.folder / "etc/mkv").iterdir() if path.stat().st_mode & 0o077]
    users = (stage.folder / "etc/nginx/mkv.users").stat()
    assert private == [] and users.st_mode & 0o777 == 0o640
    assert grp.getgrgid(users.st_gid).gr_name == "www-data"


def test_a_page_elsewhere_uses_the_store_through_the_nginx_in_front(stage: Stage) -> None:
    script = r"""
    url=https://store.example/page login=anna:$(cat /etc/mkv/anna)
    ask() { curl -sSi -H 'Origin: https://elsewhere.example' $url "$@"; }
    ask -X OPTIONS -H 'Access-Control-Request-Method: PUT'
    echo ---
    ask
    echo ---
    head -c 20000000 /dev/zero >value
    ask -u $login -T value | grep -q 201
    tag='If-Match: "'$(md5sum <value | cut -c-32)'"'
    echo 012345 | cat value - | ask -u $login -H "$tag" -T - | grep -q 201
    ask -u $login -H "$tag" -X PUT -d no | grep -q 412
    ask -u $login -r 20000002-20000004
    echo ---
    ask -u $login -X DELETE | grep 204
    """
    asked, refused, got, _ = stage.run(script).split("---\n")
    assert asked.startswith("HTTP/1.1 204") and refused.startswith("HTTP/1.1 401")
    assert re.search("^Access-Control-Allow-Methods:.*PUT", asked, re.M)
    assert re.search("^Access-Control-Allow-Headers: Authorization.*If-Match", asked, re.M)
    assert got.startswith("HTTP/1.1 206") and got.endswith("\n234")
    assert re.search("^Access-Control-Expose-Headers: Content-Md5", got, re.M)
    assert re.search(r"^Content-Md5: [0-9a-f]{32}", got, re.M)
    assert "Location" not in got and "Key-Volumes" not in got
    for said in (asked, refused, got):
        assert said.count("Access-Control-Allow-Origin: *") == 1


PAGE = """<body><script>(async () => {
const url = "https://store.example:PORT/page", who = {Authorization: "Basic " + btoa("anna:WORD")}
const put = await fetch(url, {method: "PUT", body: "from a browser", headers: who})
const got = await fetch(url, {headers: {...who, Range: "bytes=5-"}})
const text = await got.text()
const gone = await fetch(url, {method: "DELETE", headers: who})
document.body.textContent = [put.status, got.status, text, gone.status].join(" ")
})()</script>"""


def test_a_browser_lets_a_page_elsewhere_use_the_store(stage: Stage) -> None:
    needs("chromium")
    word = (stage.folder / "etc/mkv/anna").read_text().strip()
    page = stage.folder / "page.html"
    page.write_text(PAGE.replace("PORT", str(stage.front)).replace("WORD", word))
    flags = "--headless --no-sandbox --ignore-certificate-errors --virtual-time-budget=20000"
    command = [*f"chromium {flags} --user-data-dir={stage.folder}/chromium --dump-dom".split()]
    command += ["--host-resolver-rules=MAP store.example 127.0.0.1", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "<body>201 206 a browser 204</body>" in shown.replace("\n", ""), shown


def test_a_backup_is_restored_and_what_was_written_since_is_taken_in(stage: Stage) -> None:
    backup, restore = blocks("Backup")
    early = stage.store("early")
    assert call(stage.port, "PUT", "/gone", b"value").status == 201
    stage.run(backup)
    late = stage.store("late")
    assert call(stage.port, "DELETE", "/gone").status == 204
    stage.run(restore)
    until(stage.ready, 30)
    stage.check(early | late)
    assert call(stage.port, "DELETE", "/gone").status == 204  # it was listed again


def test_an_index_that_is_lost_is_made_again(stage: Stage) -> None:
    values = stage.store("rebuilt")
    (block,) = blocks("When the index is lost")
    stop, _, rest = block.partition("\n")
    stage.run(f"{stop}\nrm -r /var/lib/mkv\n{rest}")
    until(stage.ready, 30)
    stage.check(values)


def test_verify_finds_nothing_wrong(stage: Stage) -> None:
    until(lambda: json.loads(call(stage.port, "GET", "/?garbage").body)["garbage"] == [], 30)
    values = stage.store("verified")
    assert stage.run(blocks("Adding and losing volumes")[1]) == ""
    stage.check(values)


def test_a_volume_is_added_and_no_client_sees_it(stage: Stage) -> None:
    values, enough = stage.store("moved"), threading.Event()

    def read() -> set[int]:
        statuses: set[int] = set()
        while not enough.is_set():
            statuses.add(call(stage.port, "GET", "/moved/1").status)
        return statuses

    with ThreadPoolExecutor() as pool:
        reader = pool.submit(read)
        try:
            stage.run(blocks("Adding and losing volumes")[0])
        finally:
            enough.set()
        assert reader.result() == {302}
    homes = [call(stage.port, "HEAD", path).fields for path in values]
    assert {home["key-balance"] for home in homes} == {"balanced"}
    fourth = f"{stage.HOSTS['10.0.0.14']}:{stage.inner}"
    assert any(fourth in home["key-volumes"] for home in homes)
    stage.check(values)


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    needs("systemd-analyze")
    units = re.findall(r"^# (/etc/systemd/system/\S+)$", README, re.M)
    for path in units:
        text = configured(path).replace("/opt/mkv/.venv/bin/python", sys.executable)
        (tmp_path / Path(path).name).write_text(text.replace("/opt/mkv", str(HERE)))
    command = ["systemd-analyze", "verify", "--man=no", *sorted(map(str, tmp_path.iterdir()))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert len(units) == 7 and ended.returncode == 0 and "mkv" not in ended.stderr
    for timer in re.findall("^OnCalendar=(.*)$", README, re.M):
        subprocess.run(["systemd-analyze", "calendar", timer], check=True, capture_output=True)
    generator = "/usr/lib/systemd/system-generators/systemd-fstab-generator"
    (tmp_path / "fstab").write_text(re.search("^LABEL=.*\n", README, re.M)[0])
    env = os.environ | {"SYSTEMD_FSTAB": str(tmp_path / "fstab")}
    subprocess.run([generator, *[tmp_path] * 3], env=env, check=True)
    assert "\nBefore=mkv-volume.service\n" in (tmp_path / "data-volume1-sv00.mount").read_text()
