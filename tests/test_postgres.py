#!/usr/bin/env python3
"""Tests of the shared index, on clusters of PostgreSQL of their own."""

# ruff: noqa: F403, F405, I001 (the harness comes first: it knows where mkv.py is)
from functools import partial

import asyncpg
from harness import *
from harness import HERE, Cluster, Make, Server, Upload, accepts, error_of, free_ports, frozen
from harness import listed, needs, shell, until

from contrib.conditions import Match
from contrib.maintenance import adopt
from contrib.postgres import SETTINGS, Postgres
from thrasher import Node, synchronous

needs("postgresql")
CONFIG = """
fsync = off  # who is killed is a process, not the machine
shared_buffers = 16MB
max_connections = 60
min_wal_size = 2MB
wal_sender_timeout = 60s
"""
README = re.findall(r"^```\w*\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
numbers = itertools.count()


def block(words: str) -> str:
    """The block of README.md that has these words."""
    (found,) = [text for text in README if words in text]
    return found


# --- clusters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder where the user postgres may write."""
    folder = Path(tempfile.mkdtemp(prefix="mkv-postgres-", dir="/tmp"))
    shutil.chown(folder, "postgres", "postgres")
    yield folder
    shutil.rmtree(folder)


def new_node(home: Path, source: Node | None = None) -> Node:
    """A PostgreSQL that has nothing yet, or the same as another."""
    return Node(home / f"node{next(numbers)}", *free_ports(1), CONFIG, source)


@pytest.fixture(scope="module")
def node(home: Path) -> Iterator[Node]:
    """A PostgreSQL for the tests that need no other."""
    started = new_node(home)
    yield started
    started.kill()


@pytest.fixture
def pair(home: Path) -> Iterator[tuple[Node, Node, str]]:
    """A primary, a standby that has all of it before a COMMIT is answered, and the URL of both."""
    primary = new_node(home)
    standby = new_node(home, primary)
    yield primary, standby, synchronous(primary, standby)
    primary.kill()
    standby.kill()


def database(node: Node) -> str:
    """The URL of a database that nobody has used."""
    name = f"mkv{next(numbers)}"
    node.sql(f"CREATE DATABASE {name}")
    return node.url(name)


@pytest.fixture
def url(node: Node) -> str:
    """A database of its own for each test."""
    return database(node)


class Many(Cluster):
    """Volumes, and servers that share an index, if it is in PostgreSQL."""

    def start(self, port: int, *flags: str, **settings: Any) -> Server:
        """A server with intents of its own."""
        own = ["-intents", str(self.folder / f"intents-{port}")] if settings.get("db") else []
        return super().start(port, *own, *flags, **settings)

    def more(self, url: str, *flags: str) -> Server:
        """One more."""
        return self.start(*free_ports(1), *flags, db=url)


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Callable[..., tuple]]:
    """Starts volumes and so many servers."""
    started = []

    def make(url: str, count: int, *flags: str) -> tuple[Many, list[Server]]:
        started.append(Many(tmp_path, *flags, db=url))
        servers = [started[0].server, *(started[0].more(url, *flags) for _ in range(count - 1))]
        return started[0], servers

    yield make
    for system in started:
        system.close()


def at_once(work: Callable, items: Iterable) -> list[Any]:
    """What a function returns for each, all at the same time."""
    items = list(items)
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))


class Proxy(socketserver.ThreadingTCPServer):
    """Between servers and PostgreSQL. When some bytes come by, it does what is said.

    It cuts the connection before or after PostgreSQL has them, or freezes the backend for so long.
    """

    daemon_threads = True

    def __init__(self, node: Node, at: bytes = b"", what: str | float = "") -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.node, self.at, self.what = node, at, what
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, url: str) -> str:
        """It, by way of this."""
        return url.replace(f":{self.node.port}/", f":{self.server_address[1]}/")

    def handle_error(self, *_: object) -> None:
        """Connections break: nobody has to hear of it."""


class ProxyHandler(socketserver.BaseRequestHandler):
    """One connection."""

    server: Proxy

    def handle(self) -> None:
        node = self.server.node
        with socket.create_connection(("127.0.0.1", node.port)) as there:
            threading.Thread(target=pump, args=(there, self.request), daemon=True).start()
            while data := self.request.recv(1 << 20):
                if self.server.at and self.server.at in data:
                    self.server.at = b""
                    if self.server.what == "cut before":
                        break
                    if self.server.what == "cut after":
                        self.request.shutdown(socket.SHUT_RDWR)
                    else:
                        find = "SELECT pid FROM pg_stat_activity WHERE client_port ="
                        pid = int(node.sql(f"{find} {there.getsockname()[1]}"))
                        os.kill(pid, signal.SIGSTOP)
                        thaw = threading.Timer(self.server.what, os.kill, (pid, signal.SIGCONT))
                        thaw.start()
                there.sendall(data)
            there.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Hand on all that comes."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 20):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


# --- the class ------------------------------------------------------------------------------------


def record(number: int, size: int = 1) -> mkv.Record:
    """A record of a write of some second."""
    write_id = f"{number:08x}00000000"
    return mkv.Record((mkv.Replica("v:1", write_id),), size, write_id)


def commit(index: Any, key: bytes, number: int) -> asyncio.Future:
    """A PUT, as the index sees it."""
    return index.do(mkv.Row.commit, key, record(number), mkv.Condition(), ())


async def walked(index: Any, table: str, start: bytes) -> list[bytes]:
    """The keys of a table."""
    return [key async for rows in index.walk(table, start) for key, _ in rows]


@pytest.mark.asyncio
async def test_servers_that_start_at_once_share_the_tables(url: str) -> None:
    indexes = await asyncio.gather(*(Postgres(url, None).begin() for _ in range(8)))
    (name,) = {index.id for index in indexes}
    assert re.fullmatch("[0-9a-f]{32}", name)


@pytest.mark.asyncio
async def test_jobs_share_transactions_and_a_walk_has_all_of_them_in_order(url: str) -> None:
    index = await Postgres(url, None).begin()
    keys = [b"/" + n.to_bytes(3, "big") for n in range(4500)]
    jobs = [commit(index, key, 1) for key in random.sample(keys, len(keys))]
    assert [await job for job in jobs] == [mkv.Record()] * 4500
    assert index.operations == 4500 and index.commits <= 3 and index.seconds > 0
    rows = await asyncio.gather(*(index.row(key) for key in keys))
    assert all(row.record == record(1) for row in rows)
    assert await index.count() == (4500, 0)
    assert await walked(index, index.keys, keys[5]) == keys[5:]


@pytest.mark.asyncio
async def test_nobody_waits_for_who_waits_for_him(url: str) -> None:
    """Four servers, two groups each, all with the same keys in other orders."""
    indexes = [await Postgres(url, None).begin() for _ in range(4)]

    async def work(index: Postgres) -> None:
        for _ in range(30):
            keys = random.sample([b"/%d" % n for n in range(40)], 40)
            await asyncio.gather(*(index.do(mkv.Row.waste, key, ()) for key in keys))

    await asyncio.gather(*(work(index) for index in indexes * 2))
    assert [index.retries for index in indexes] == [0] * 4


@pytest.mark.asyncio
async def test_it_says_what_lmdb_says(url: str, tmp_path: Path) -> None:
    """The same operations, at random, on both."""
    both = await Postgres(url, None).begin(), mkv.LMDB(tmp_path / "index", "")
    chance = random.Random(1)
    for number in range(1, 400):
        key = b"/%d" % chance.randrange(5) + chance.choice((b"", "ä\n\0".encode()))
        file = record(chance.randrange(1, number + 1)).replicas
        cases = (
            (mkv.Row.commit, record(number), mkv.Condition(), ()),
            (mkv.Row.commit, record(number, 2), Match(("*",)), file),
            (mkv.Row.waste, file),
            (mkv.Row.remove, chance.random() < 0.5),
            (mkv.Row.unlink,),
            (mkv.Row.settle, file),
            (adopt, {file[0]: 3}, True),
        )
        operation, *args = chance.choice(cases)
        jobs = [index.do(operation, key, *args) for index in both]
        one, other = map(repr, await asyncio.gather(*jobs, return_exceptions=True))
        assert one == other
        one, other = [await index.row(key) for index in both]
        assert (one.record, one.garbage.keys()) == (other.record, other.garbage.keys())
    assert await both[0].count() == await both[1].count()


@pytest.mark.asyncio
async def test_a_row_that_is_none_stops_no_other(node: Node, url: str) -> None:
    index = await Postgres(url, None).begin()
    await commit(index, b"/good", 1)
    node.sql("INSERT INTO mkv VALUES ('/bad', 'not a record', 'x y z')", url)
    jobs = [commit(index, b"/bad", 2), commit(index, b"/better", 2)]
    answers = await asyncio.gather(*jobs, return_exceptions=True)
    assert answers[0].status == 500 and answers[1] == mkv.Record()
    assert (await index.row(b"/bad")).record.error and (await index.row(b"/good")).record.live
    assert await walked(index, index.garbage, b"/a") == [b"/bad"]
    await index.do(mkv.Row.remove, b"/bad", False)
    await commit(index, b"/bad", 3)


@pytest.mark.asyncio
async def test_a_row_whose_server_is_frozen_is_free_soon(url: str) -> None:
    index = await Postgres(url, None).begin()
    await commit(index, b"/k", 1)
    frozen = await asyncpg.connect(url, server_settings=SETTINGS)
    await frozen.execute("BEGIN")
    await frozen.execute("UPDATE mkv SET garbage = 'x'")
    began = time.monotonic()
    assert await index.do(mkv.Row.remove, b"/k", False) == record(1)
    assert 2 < time.monotonic() - began < 6 and index.retries
    assert not (await index.row(b"/k")).record.live
    frozen.terminate()


@pytest.mark.asyncio
async def test_a_commit_is_never_cancelled(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives up waiting for the standby leaves all open: nobody sees what may be lost."""
    monkeypatch.setattr("contrib.postgres.WORK_TIME", 2.5)
    _, standby, url = pair
    index = await Postgres(url, None).begin()
    standby.send(signal.SIGSTOP)
    with pytest.raises(mkv.HTTPError) as unknown:
        await commit(index, b"/k", 1)
    assert unknown.value.status == 504 and index.unknown == 1
    for _ in range(10):
        assert not (await index.row(b"/k")).record.live
        await asyncio.sleep(0.02)
    standby.send(signal.SIGCONT)
    assert await index.do(mkv.Row.waste, b"/k", record(1).replicas) == ([], True)


# --- load -----------------------------------------------------------------------------------------


class Load:
    """Clients that write, read and delete keys of their own on all servers, and remember it all."""

    def __init__(self, servers: list[Server], clients: int = 6) -> None:
        self.servers, self.ended, self.statuses = servers, threading.Event(), Counter()
        self.values: dict[str, set[bytes | None]] = {}  # what a key may have: None is nothing
        self.slowest, self.wrong, self.done = 0.0, [], 0
        self.threads = [threading.Thread(target=self.work, args=(n,)) for n in range(clients)]
        for thread in self.threads:
            thread.start()

    def ask(self, verb: str, path: str, body: Any = None) -> int:
        began = time.monotonic()
        status = random.choice(self.servers).call(verb, path, body).status
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.statuses[verb, status] += 1
        self.done += status < 500 and verb != "GET"
        return status

    def work(self, client: int) -> None:
        for number in itertools.takewhile(lambda _: not self.ended.is_set(), itertools.count()):
            path, value, may = f"/{client}/{number}", b"%d %d" % (client, number), {None}
            for verb, new in (("PUT", value), ("DELETE", None))[: number % 3 + 1]:
                status = self.ask(verb, path, new)
                right = status != 404 or None in may
                if status in (201, 204, 404):
                    may = {new}
                elif status in (502, 504):  # of the nginx in front, of a server: it may be done
                    may = {new, *may}
                self.values[path] = may
                found = self.ask("GET", path)
                if not right or found not in {302 if value else 404 for value in may} | {502, 503}:
                    self.wrong.append((path, verb, status, found))

    def goes_on(self, writes: int = 20) -> None:
        """Wait until so many more are done."""
        done = self.done
        until(lambda: self.done >= done + writes)

    def stop(self, allowed: set[int]) -> None:
        """See that all is as it was acknowledged, and that no other failures were seen."""
        self.ended.set()
        for thread in self.threads:
            thread.join()
        print(self.statuses, f"{self.slowest:.2f} s")
        assert self.wrong == []
        assert {status for _, status in self.statuses if status >= 500} <= allowed
        assert self.slowest < 12
        for path, may in self.values.items():
            assert random.choice(self.servers).get(path) in may, (path, may)


# --- promises, with either index ------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lmdb", "postgres"])
def shop(request: Any, node: Node, tmp_path_factory: Any) -> Iterator[tuple[Many, list[Server]]]:
    """Volumes, and three servers that share an index; or one server in the place of three."""
    shared = {"db": database(node)} if request.param == "postgres" else {}
    system = Many(tmp_path_factory.mktemp("shop"), **shared)
    others = [system.more(shared["db"]) if shared else system.server for _ in range(2)]
    yield system, [system.server, *others]
    try:
        until(system.is_clean)
    finally:
        system.close()


@pytest.mark.parametrize("fields", [{}, {"If_Match": f'"{hashlib.md5(b"old").hexdigest()}"'}])
def test_of_writes_at_a_time_one_wins(shop: tuple, fields: dict[str, str]) -> None:
    _, servers = shop
    for number in range(12):
        path = f"/{'replaced' if fields else 'new'}{number}"
        assert not fields or servers[0].put(path, b"old") == 201
        puts = [partial(s.call, "PUT", path, b"%d" % n, **fields) for n, s in enumerate(servers)]
        said = [reply.status for reply in at_once(lambda put: put(), puts)]
        assert said.count(201) == 1, said
        assert set(said) <= {201, 409, 412 if fields else 403}, said
        assert [server.get(path) for server in servers] == [b"%d" % said.index(201)] * 3


def test_what_one_server_does_the_others_see_at_once(shop: tuple) -> None:
    _, (one, other, third) = shop
    for number in range(30):
        path = f"/seen{number % 3}"
        assert one.put(path, b"value") == 201
        assert other.call("GET", path).status == 302
        assert third.call("DELETE", path).status == 204
        assert one.call("GET", path).status == 404
        one, other = other, one
    assert one.put("/hidden", b"value") == 201
    assert other.call("UNLINK", "/hidden").status == 204
    assert [server.get("/hidden") for server in (one, third)] == [None, None]
    assert one.call("REBALANCE", "/hidden").status == 204
    assert [item["key"] for item in third.pages("/?unlinked")] == ["/hidden"]
    assert listed(other, "/hidden?list") == ([], "")


def test_writes_and_moves_of_a_few_keys(shop: tuple) -> None:
    """All verbs on all servers at once: at the end all is as the index says."""
    system, servers = shop
    odd: list[tuple[str, int]] = []

    def work(seed: int) -> None:
        chance, server = random.Random(seed), servers[seed % 3]
        end = time.monotonic() + 2
        while time.monotonic() < end:
            verb, path = chance.choice(("PUT", "DELETE", "REBALANCE", "GET")), chance.choice("abcd")
            status = server.call(verb, f"/{path}", b"x" * 100 if verb == "PUT" else None).status
            gone = verb == "REBALANCE" and status == 503  # all files, under its hands
            if status not in (201, 204, 302, 403, 404, 409) and not gone:
                odd.append((verb, status))

    at_once(work, range(6))
    assert odd == []
    until(system.is_clean)


def test_a_server_that_is_killed_ends_its_writes_when_it_is_back(shop: tuple) -> None:
    system, (one, other, _) = shop
    upload = Upload(one.port, "/killed", 1000)
    upload.send(b"x" * 500)
    until(lambda: one.metric("mkv_intents_open"))
    one.kill()
    assert other is one or other.put("/killed", b"other") == 201
    upload.vanish()
    one.start()
    until(system.is_clean)
    assert other.get("/killed") == one.get("/killed") == (None if other is one else b"other")


# --- servers that share an index ------------------------------------------------------------------


def test_a_write_that_is_overtaken_is_refused(many: Callable, url: str) -> None:
    """It began before another server's PUT and DELETE, and would commit after them."""
    system, (one, other) = many(url, 2, "-grace", "1h")
    upload = Upload(one.port, "/k", 10)
    upload.send(b"12345")
    until(system.open_intents)
    assert other.put("/k", b"other") == 201
    system.volumes[0].freeze()
    assert other.call("DELETE", "/k").status == 204
    system.volumes[0].thaw()
    assert other.garbage()
    upload.send(b"67890")
    assert upload.answer() == 409
    assert [server.get("/k") for server in (one, other)] == [None, None]


def test_a_clock_that_is_ahead_sweeps_nothing_too_early(
    many: Callable, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ("-grace", "2s", "-settle", "1h")
    system, (one,) = many(url, 1, *slow)
    two_hours = "import time; now = time.time; time.time = lambda: now() + 7200"
    (tmp_path / "sitecustomize.py").write_text(two_hours)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ahead = system.more(url, *slow)
    assert one.put("/k", b"old") == 201
    old = system.files()
    began = time.monotonic()
    assert one.call("PUT", "/k", b"new", If_Match="*").status == 201
    ages = [age for files in ahead.garbage().values() for age in files.values()]
    assert len(ages) == 3 and all(0 <= age < 2 for age in ages)
    while time.monotonic() < began + 1.8:
        assert old < system.files()
        time.sleep(0.02)
    until(system.is_clean)
    assert ahead.put("/later", b"1") == 201
    assert one.call("DELETE", "/later").status == 204
    assert one.put("/later", b"2") == 201
    assert ahead.get("/later") == b"2"


@pytest.mark.parametrize("what", ["cut before", "cut after"])
def test_a_connection_that_breaks_at_commit(
    many: Callable, node: Node, url: str, what: str
) -> None:
    """What cannot be known is 504; of a PUT it can be known."""
    proxy, done = Proxy(node, what=what), what == "cut after"
    system, (server,) = many(proxy.url(url), 1)

    def cut(verb: str, body: bytes | None = None) -> int:
        proxy.at = b"COMMIT"
        return server.call(verb, "/k", body).status

    assert cut("PUT", b"value") == (201 if done else 504)
    assert server.get("/k") == (b"value" if done else None)
    assert server.put("/k", b"value") == (403 if done else 201)
    assert cut("UNLINK") == 504
    assert server.call("GET", "/k").status == (404 if done else 302)
    assert cut("DELETE") == 504
    assert server.call("DELETE", "/k").status == (404 if done else 204)
    assert server.metric("mkv_commit_unknown_total") == 3
    until(system.is_clean)


def test_backends_that_freeze(many: Callable, node: Node, url: str) -> None:
    """Before UPDATE, before COMMIT, for long or for a while: nobody else is held up, or misled."""
    system, (other,) = many(url, 1)
    update, commit, long = b"WITH emptied", b"COMMIT", 11.5
    cases = {(update, 3.0): 201, (commit, 1.5): 201, (update, long): 503, (commit, long): 504}
    servers = [system.more(Proxy(node, *case).url(url)) for case in cases]
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        others = pool.submit(lambda: {other.put(f"/other{n}", b"x") for n in range(100)})
        said = at_once(lambda n: servers[n].put(f"/{n}", b"value"), range(4))
        assert others.result() == {201}
    assert time.monotonic() - began < 15
    assert said == list(cases.values())
    until(system.is_clean)
    found = [{server.get(f"/{n}"), other.get(f"/{n}")} for n, server in enumerate(servers)]
    assert found[:3] == [{b"value"}, {b"value"}, {None}] and len(found[3]) == 1


def elsewhere(system: Cluster, url: str, intents: Path) -> list[str]:
    """The flags of a process of its own."""
    flags = {"db": url, "volumes": system.names(), "intents": intents, "port": free_ports(1)[0]}
    return [str(word) for name, value in flags.items() for word in (f"-{name}", value)]


def test_an_index_that_is_away(many: Callable, node: Node, url: str, tmp_path: Path) -> None:
    """Restarted, it fails no write; away for longer, all is 503 in time, and goes on by itself."""
    system, (server,) = many(url, 1)
    load = Load([server])
    load.goes_on()
    node.stop()
    node.start()
    load.goes_on()
    load.stop(allowed={504})
    assert server.put("/k", b"value") == 201
    upload = Upload(server.port, "/late", 10)
    upload.send(b"12345")
    until(system.open_intents)
    node.kill()
    upload.send(b"67890")
    asked = [
        "GET /k",
        "DELETE /k",
        "REBALANCE /k",
        "UNLINK /k",
        "GET /?health",
        "GET /?ready",
        "GET /?list",
    ]
    calls = [partial(server.call, *each.split()) for each in asked]
    calls += [upload.answer, partial(server.metric, "mkv_keys")]
    calls.append(
        partial(error_of, "server", *elsewhere(system, url, tmp_path / "i"), folder=tmp_path)
    )
    began = time.monotonic()
    *said, late, keys, error = at_once(lambda each: each(), calls)
    assert time.monotonic() - began < 15
    assert {reply.status for reply in said} | {late} == {503} and keys == -1
    assert all(b"cannot be reached" in reply.body for reply in said)
    assert "cannot be reached" in error
    node.start()
    began = time.monotonic()
    until(lambda: server.call("GET", "/k").status == 302)
    assert time.monotonic() - began < 3
    assert server.metric("mkv_commit_retries_total") > 3
    assert server.metric("mkv_commit_operations_total") >= server.metric("mkv_commits_total") > 0
    until(system.is_clean)
    assert server.put("/late", b"now") == 201


def test_the_commands_use_the_shared_index(
    many: Callable, node: Node, url: str, tmp_path: Path
) -> None:
    system, (server,) = many(url, 1)
    values = {f"/{n}": b"%d" % n for n in range(5)}
    assert {server.put(path, value) for path, value in values.items()} == {201}

    flags = elsewhere(system, url, tmp_path / f"intents-{server.port}")
    assert f":{server.port}" in error_of("server", *flags, folder=tmp_path)  # two have the same

    def run(command: str, *more: str) -> tuple[int, str]:
        script = [sys.executable, HERE / "mkv.py", command, *flags, *more]
        ended = subprocess.run(script, timeout=60, stdout=subprocess.PIPE, text=True, check=False)
        return ended.returncode, ended.stdout

    assert run("rebalance") == (0, "")
    assert server.metric('mkv_requests_total{method="REBALANCE",status="204"}') == 5
    assert server.call("GET", "/?snapshot").status == 501
    server.kill()
    assert run("rebalance") == (0, "")
    node.sql("DELETE FROM mkv", url)
    status, said = run("rebuild")  # of files that a server may be writing
    assert (status, json.loads(said)["finding"], json.loads(said)["files"]) == (1, "young", 15)
    assert node.sql("SELECT count(*) FROM mkv", url) == "0"
    assert run("rebuild", "-settle", "0") == (0, "")
    server.start()
    assert {path: server.get(path) for path in values} == values
    until(system.is_clean)


def test_without_asyncpg_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    hide = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.modules['asyncpg'] = None"
    script.write_text(f"{hide}\nimport mkv; mkv.main()")
    flags = f"server -db postgres://x/y -volumes 127.0.0.1:1 -replicas 1 -port {free_ports(1)[0]}"
    assert "--with asyncpg" in error_of(*flags.split(), folder=tmp_path, script=script)


def test_an_index_moves_to_postgres_and_back(
    many: Callable, node: Node, url: str, tmp_path: Path
) -> None:
    """By README's recipes; and its SQL tells what is there."""
    system, (old,) = many("", 1, "-grace", "1h")
    folder = tmp_path / "index"
    for path in "/backup/a", "/backup/b", "/hidden", "/replaced", "/gone":
        assert old.put(path, path.encode()) == 201
    assert old.call("PUT", "/replaced", b"value", If_Match="*").status == 201
    assert old.call("UNLINK", "/hidden").status == 204
    system.volumes[0].kill()
    assert old.call("DELETE", "/gone").status == 204
    tables = system.tables()
    assert len(tables[0]) == 4 and set(tables[1]) == {b"/replaced", b"/gone"}

    def run(words: str) -> None:
        text = block(words).replace("/var/lib/mkv", str(folder)).replace("/var", str(tmp_path))
        text = text.replace("postgres://mkv@db1,db2,db3/mkv?target_session_attrs=read-write", url)
        text = text.replace("/opt/mkv/.venv/bin/python", sys.executable)
        shell("bash", "-euc", "systemctl() { :; }; chown() { :; }\n" + text)

    old.stop()
    new = system.more(url, "-grace", "1h")
    (tmp_path / "backups").mkdir()
    run("\\copy mkv FROM")
    assert system.tables() == tables
    each = [f"{name}|4" for name in sorted(volume.name for volume in system.volumes)]
    said = [node.sql(question, url) for question in block("SELECT count").split(";")[:3]]
    assert said == ["2|18", "\n".join(each), "/hidden"]
    new.stop()
    folder.rename(tmp_path / "old")
    folder.mkdir()
    run("\\copy (SELECT")
    old.start()
    assert system.tables() == tables


# --- the nginx in front ---------------------------------------------------------------------------


class Front(Server):
    """README's nginx in front of servers, which is asked as if it were one."""

    kill = Server.stop  # its workers, too

    def __init__(self, system: Cluster, ports: Iterable[int]) -> None:
        (self.port,), self.login = free_ports(1), ""
        text = block("upstream mkv").replace("127.0.0.1:3000", f"127.0.0.1:{self.port}")
        for number, port in enumerate(ports, 1):
            text = text.replace(f"10.0.0.{number}:3000", f"127.0.0.1:{port}")
        for name in "client_body", "proxy", "fastcgi", "uwsgi", "scgi":
            text += f"{name}_temp_path {name};\n"
        config = system.folder / "front.conf"
        main = "daemon off; pid pid; user root; worker_processes 2; events {}"
        config.write_text(f"{main} http {{ access_log off; {text} }}")
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        command = [nginx, "-p", system.folder, "-e", "front.log", "-c", config]
        self.process = subprocess.Popen(command, start_new_session=True)
        system.servers.insert(0, self)
        until(lambda: accepts(self.port))


def test_clients_do_not_see_that_a_server_dies(many: Callable, url: str) -> None:
    """But for the requests that are in its hands, of which each client has one."""
    system, servers = many(url, 3)
    load = Load([Front(system, [server.port for server in servers])], clients=2)
    for server in servers:
        load.goes_on()
        server.kill()
        load.goes_on()
        server.start()
    load.goes_on()
    load.stop(allowed={502})
    lost = {verb: count for (verb, status), count in load.statuses.items() if status == 502}
    assert sum(lost.values()) <= 6 and "GET" not in lost
    until(system.is_clean)


def test_a_frozen_server_holds_up_reads_for_a_while_and_uploads_wait(
    many: Callable, url: str
) -> None:
    system, servers = many(url, 3)
    door, times = Front(system, [server.port for server in servers]), []
    assert door.put("/k", b"value") == 201
    upload = Upload(door.port, "/slow", 10)
    upload.send(b"12345")
    until(lambda: any(server.metric("mkv_intents_open") for server in servers))
    idle = next(server for server in servers if not server.metric("mkv_intents_open"))
    with frozen(idle.process.pid):
        for _ in range(6):
            began = time.monotonic()
            assert door.get("/k") == b"value"
            times.append(time.monotonic() - began)
        assert door.put("/other", b"value") == 201
    assert 2.5 < max(times) < 6
    upload.send(b"67890")
    assert upload.answer() == 201
    assert door.get("/slow") == b"1234567890"


class Deadly(socketserver.StreamRequestHandler):
    """A server that says it is alive, and dies of all else that it reads."""

    def handle(self) -> None:
        head = list(iter(self.rfile.readline, b"\r\n"))
        if head[0].startswith(b"GET / "):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def test_reads_are_repeated_and_writes_are_not(many: Callable, url: str) -> None:
    system, (one, other) = many(url, 2)
    seen, found = set(), {}
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Deadly) as deadly:
        threading.Thread(target=deadly.serve_forever, args=(0.05,)).start()
        door = Front(system, [one.port, other.port, deadly.server_address[1]])
        for verb, number in itertools.product(("PUT", "UNLINK", "DELETE"), range(4)):
            path = f"/{verb}{number}"
            assert verb == "PUT" or one.put(path, b"value") == 201
            status = door.call(verb, path, b"value" if verb == "PUT" else None).status
            found[path] = one.call("GET", path).status
            seen.add((verb, status, found[path]))
        assert {path: door.call("GET", path).status for path in found} == found
        deadly.shutdown()
    done = {("PUT", 201, 302), ("UNLINK", 204, 404), ("DELETE", 204, 404)}
    assert seen == done | {("PUT", 502, 404), ("UNLINK", 502, 302), ("DELETE", 502, 302)}


# --- failover -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_failover_loses_nothing(many: Callable, pair: tuple, how: int) -> None:
    primary, standby, url = pair
    system, (one, other) = many(url, 2)
    quiet = system.more(url, "-settle", "1h")
    door = Front(system, [one.port, other.port, one.port])
    load = Load([one, other, door])
    load.goes_on()
    standby.send(signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        alone = pool.submit(quiet.put, "/alone", b"value")  # nothing else tells this one
        time.sleep(0.2)  # now some are at COMMIT, of which the standby may have heard, or not
        primary.send(how)
        standby.send(signal.SIGCONT)
        time.sleep(0.5)
        standby.sql("SELECT pg_promote()")
        promoted = time.monotonic()
        load.goes_on(writes=1)
        assert time.monotonic() - promoted < 4
        assert alone.result() in (201, 504)
        assert time.monotonic() - promoted < 5
    load.goes_on()
    load.stop(allowed={504})
    assert load.statuses["GET", 504] == 0
    assert load.slowest < 7.5  # it did not wait for a host that is none any more
    until(system.is_clean)


def test_a_wait_for_the_standby_that_is_cancelled_is_no_success(
    many: Callable, pair: tuple
) -> None:
    """PostgreSQL calls it done, with a warning; but a failover would lose it."""
    primary, standby, url = pair
    system, (server,) = many(url, 1)
    assert server.put("/before", b"value") == 201
    standby.send(signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        said = pool.submit(server.put, "/k", b"value")
        waits = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: primary.sql(f"SELECT count(*) {waits}") == "1")
        primary.sql(f"SELECT pg_cancel_backend(pid) {waits}")
        assert said.result() == 504
    standby.send(signal.SIGCONT)
    until(system.is_clean)
    assert server.get("/k") == b"value"
