#!/usr/bin/env python3
"""Tests of the shared index, on clusters of PostgreSQL of their own."""

# ruff: noqa: F403, F405, I001 (the harness comes first: it knows where mkv.py is)
import asyncpg
from harness import *
from harness import HERE, Cluster, Make, Server, call, descendants, error_of, free_ports, until

from contrib.conditions import Match
from contrib.maintenance import adopt
from contrib.postgres import SETTINGS, Postgres

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
BIN = FOUND[-1].parent if FOUND else Path("/")
if not FOUND or os.geteuid() != 0:
    pytest.skip("needs Debian's postgresql, and root", allow_module_level=True)
CONFIG = """
listen_addresses = '127.0.0.1'
fsync = off  # who is killed is a process, not the machine
shared_buffers = 16MB
max_connections = 60
min_wal_size = 2MB
wal_sender_timeout = 60s
log_line_prefix = '%t [%p] '
"""


def as_postgres(*command: str | Path) -> str:
    """What a program says that must not run as root."""
    prefix = ["runuser", "-u", "postgres", "--"]
    ended = subprocess.run([*prefix, *command], capture_output=True, text=True, cwd="/")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


class Node:
    """One PostgreSQL; its data lie in a folder of the user postgres."""

    def __init__(self, data: Path, port: int) -> None:
        self.data, self.port = data, port
        lines = f"port = {port}\nunix_socket_directories = '{data}'\n"
        with (data / "postgresql.conf").open("a") as file:
            file.write(lines)
        self.start()

    def start(self) -> None:
        with (self.data / "log").open("ab") as log:
            command = [BIN / "postgres", "-D", self.data]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", user="postgres", extra_groups=[]
            )
        until(self.alive)

    def alive(self) -> bool:
        assert self.process.poll() is None, (self.data / "log").read_text()
        command = [BIN / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0

    def pids(self) -> list[int]:
        """All its processes, the first one first."""
        return [self.process.pid, *descendants(self.process.pid)]

    def send(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """kill -9 of all its processes."""
        self.send(signal.SIGKILL)
        self.process.wait()
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def stop(self, number: int = signal.SIGINT) -> None:
        """A fast shutdown."""
        self.process.send_signal(number)
        self.process.wait(20)

    def sql(self, text: str, database: str = "postgres") -> str:
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", database]
        command = [BIN / "psql", *where, "-XqAt", "-v", "ON_ERROR_STOP=1", "-c", text]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def url(self, database: str) -> str:
        return f"postgres://postgres@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder where the user postgres may write, with a fresh cluster to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="mkv-postgres-", dir="/tmp"))
    try:
        shutil.chown(folder, "postgres", "postgres")
        options = ["-A", "trust", "-U", "postgres", "-N", "-E", "UTF8", "--locale=C"]
        options.append("--wal-segsize=1")
        as_postgres(BIN / "initdb", "-D", folder / "fresh", *options)
        with (folder / "fresh" / "postgresql.conf").open("a") as file:
            file.write(CONFIG)
        yield folder
    finally:
        shutil.rmtree(folder)


def new_node(home: Path) -> Node:
    """A PostgreSQL that has nothing yet."""
    (port,) = free_ports(1)
    as_postgres("cp", "-r", home / "fresh", home / f"node{port}")
    return Node(home / f"node{port}", port)


@pytest.fixture(scope="module")
def node(home: Path) -> Iterator[Node]:
    """A PostgreSQL for the tests that need no other."""
    started = new_node(home)
    yield started
    started.kill()


numbers = itertools.count()


@pytest.fixture
def url(node: Node) -> str:
    """A database of its own for each test."""
    name = f"mkv{next(numbers)}"
    node.sql(f"CREATE DATABASE {name}")
    return node.url(name)


class Pair:
    """A primary, and a standby that has all of it before a COMMIT is answered."""

    def __init__(self, home: Path) -> None:
        self.a = new_node(home)
        (port,) = free_ports(1)
        data = home / f"node{port}"
        how = f"host=127.0.0.1 port={self.a.port} user=postgres application_name=b"
        as_postgres(
            *(BIN / "pg_basebackup", "-d", how, "-D", data, "-R", "-C", "-S", "b", "-c", "fast")
        )
        self.b = Node(data, port)
        self.a.sql("ALTER SYSTEM SET synchronous_standby_names = 'b'")
        self.a.sql("SELECT pg_reload_conf()")
        until(lambda: self.a.sql("SELECT sync_state FROM pg_stat_replication") == "sync")
        self.a.sql("CREATE DATABASE mkv")
        hosts = f"127.0.0.1:{self.a.port},127.0.0.1:{self.b.port}"
        self.url = f"postgres://postgres@{hosts}/mkv"

    def promote(self) -> float:
        """Make a primary of the standby; when it was."""
        self.b.sql("SELECT pg_promote()")
        return time.monotonic()


@pytest.fixture
def pair(home: Path) -> Iterator[Pair]:
    started = Pair(home)
    yield started
    for each in (started.a, started.b):
        each.send(signal.SIGCONT)
        each.kill()


def start(system: Cluster, url: str, *flags: str, **settings: Any) -> Server:
    """One more server of a cluster, with intents of its own."""
    (port,) = free_ports(1)
    intents = str(system.folder / f"intents-{port}")
    return system.start(port, "-intents", intents, *flags, db=url, **settings)


def many(cluster: Make, url: str, count: int, *flags: str) -> tuple[Cluster, list[Server]]:
    """Volumes, and servers that share an index."""
    system = cluster("-intents", "intents-first", *flags, db=url)
    return system, [system.server, *(start(system, url, *flags) for _ in range(count - 1))]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are not named by an absolute path belong to the test."""
    monkeypatch.chdir(tmp_path)


class Proxy(socketserver.ThreadingTCPServer):
    """Between servers and PostgreSQL. At the next COMMIT it may cut the connection, or freeze."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self, node: Node) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.node, self.port = node, self.server_address[1]
        self.at, self.what, self.frozen = b"", "", 0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def next(self, at: bytes, what: str) -> None:
        """What to do at the next message that has these bytes."""
        self.what, self.at = what, at

    def handle_error(self, *_: object) -> None:
        """Connections break: nobody has to hear of it."""


class ProxyHandler(socketserver.BaseRequestHandler):
    """One connection."""

    server: Proxy

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.node.port)) as self.there:
            self.cut = False
            threading.Thread(target=self.back, daemon=True).start()
            while data := self.request.recv(1 << 20):
                if self.server.at and self.server.at in data:
                    self.server.at = b""
                    if self.server.what == "cut before":
                        break
                    self.cut = self.server.what == "cut after"
                    if self.server.what == "freeze":
                        port = self.there.getsockname()[1]
                        find = f"SELECT pid FROM pg_stat_activity WHERE client_port = {port}"
                        self.server.frozen = int(self.server.node.sql(find))
                        os.kill(self.server.frozen, signal.SIGSTOP)
                self.there.sendall(data)
            self.there.shutdown(socket.SHUT_RDWR)

    def back(self) -> None:
        """What PostgreSQL says, to the server."""
        with contextlib.suppress(OSError):
            while data := self.there.recv(1 << 20):
                if self.cut:
                    break
                self.request.sendall(data)
            self.request.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(node: Node) -> Iterator[Proxy]:
    started = Proxy(node)
    yield started
    started.shutdown()
    started.server_close()


def through(proxy: Proxy, url: str) -> str:
    """The URL, by way of the proxy."""
    return url.replace(f":{proxy.node.port}/", f":{proxy.port}/")


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What calls return that begin together."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def record(number: int, size: int = 1) -> mkv.Record:
    """A record of a write of some second."""
    write_id = f"{number:08x}00000000"
    return mkv.Record((mkv.Replica("v:1", write_id),), size, write_id)


def commit(index: Any, key: bytes, number: int) -> asyncio.Future:
    """A PUT, as the index sees it."""
    return index.do(mkv.Row.commit, key, record(number), mkv.Condition(), ())


# --- the class ------------------------------------------------------------------------------------


def test_servers_that_start_at_once_share_the_tables(node: Node, url: str) -> None:
    async def main() -> set[str]:
        indexes = [Postgres(url, None) for _ in range(8)]
        return {index.id for index in await asyncio.gather(*(i.begin() for i in indexes))}

    ids = asyncio.run(main())
    assert len(ids) == 1 and re.fullmatch("[0-9a-f]{32}", ids.pop())


def test_jobs_share_transactions(url: str) -> None:
    async def main() -> None:
        index = await Postgres(url, None).begin()
        jobs = [commit(index, b"/%d" % n, 1) for n in range(1000)]
        assert [await job for job in jobs] == [mkv.Record()] * 1000
        assert index.commits <= 3 and index.seconds > 0
        rows = await asyncio.gather(*(index.row(b"/%d" % n) for n in range(1000)))
        assert all(row.record == record(1) for row in rows)
        assert await index.count() == (1000, 0)

    asyncio.run(main())


def test_nobody_waits_for_who_waits_for_him(url: str) -> None:
    """Two servers, two groups each, all with the same keys in other orders."""

    async def main() -> None:
        indexes = [await Postgres(url, None).begin() for _ in range(2)]
        chance, keys = random.Random(1), [b"/%d" % n for n in range(20)]

        async def work(index: Postgres) -> None:
            for number in range(1, 150):
                jobs = [commit(index, key, number) for key in chance.sample(keys, 15)]
                jobs += [index.do(mkv.Row.remove, key, False) for key in chance.sample(keys, 15)]
                await asyncio.gather(*jobs, return_exceptions=True)

        await asyncio.gather(*(work(index) for index in indexes * 2))
        assert [index.retries for index in indexes] == [0, 0]

    asyncio.run(main())


def test_it_says_what_lmdb_says(url: str, tmp_path: Path) -> None:
    """The same operations, at random, on both."""

    async def main() -> None:
        shared, own = await Postgres(url, None).begin(), mkv.LMDB(tmp_path / "index", "")
        chance = random.Random(1)
        for number in range(1, 400):
            key = b"/%d" % chance.randrange(5) + chance.choice((b"", "ä\n\0".encode()))
            file = record(chance.randrange(1, number + 1)).replicas
            operation, *args = chance.choice(
                [
                    (mkv.Row.commit, record(number), mkv.Condition(), ()),
                    (mkv.Row.commit, record(number, 2), Match(("*",)), file),
                    (mkv.Row.waste, file),
                    (mkv.Row.remove, chance.random() < 0.5),
                    (mkv.Row.unlink,),
                    (mkv.Row.settle, file),
                    (adopt, {file[0]: 3}, True),
                ]
            )
            jobs = [index.do(operation, key, *args) for index in (shared, own)]
            one, other = await asyncio.gather(*jobs, return_exceptions=True)
            assert repr(one) == repr(other)
            rows = [await index.row(key) for index in (shared, own)]
            assert rows[0].record == rows[1].record
            assert rows[0].garbage.keys() == rows[1].garbage.keys()
        for table in "keys", "garbage":
            told = []
            for index in (shared, own):
                walk = index.walk(getattr(index, table), b"/1")
                told.append([row async for rows in walk for row in rows])
            assert [key for key, _ in told[0]] == [key for key, _ in told[1]] and told[0]
            if table == "keys":
                assert told[0] == told[1]
                continue
            for (_, one), (_, other) in zip(*told, strict=True):
                files, same = mkv.parse_garbage(one), mkv.parse_garbage(other)
                assert files.keys() == same.keys()
                assert all(abs(files[file] - same[file]) < 0.2 for file in files)
        assert await shared.count() == await own.count()
        with pytest.raises(mkv.HTTPError) as refused:
            await shared.copy(1)
        assert refused.value.status == 501

    asyncio.run(main())


def test_a_walk_goes_through_all_in_order(node: Node, url: str) -> None:
    async def main() -> list[bytes]:
        index = await Postgres(url, None).begin()
        text = record(1).text().decode()
        rows = f"SELECT '/'::bytea || int4send(n), '{text}', '' FROM generate_series(1, 4500) n"
        node.sql(f"INSERT INTO mkv {rows}", url.rpartition("/")[2])
        return [key async for rows in index.walk(index.keys, b"/") for key, _ in rows]

    assert asyncio.run(main()) == [b"/" + n.to_bytes(4, "big") for n in range(1, 4501)]


def test_a_row_that_is_none_stops_no_other(node: Node, url: str) -> None:
    async def main() -> None:
        index = await Postgres(url, None).begin()
        await commit(index, b"/good", 1)
        node.sql("INSERT INTO mkv VALUES ('/bad', 'not a record', 'x y z')", url.rpartition("/")[2])
        jobs = [commit(index, b"/bad", 2), commit(index, b"/better", 2)]
        answers = await asyncio.gather(*jobs, return_exceptions=True)
        assert answers[0].status == 500 and answers[1] == mkv.Record()
        assert (await index.row(b"/bad")).error
        assert (await index.row(b"/good")).record.live
        assert len([key async for rows in index.walk(index.garbage, b"") for key, _ in rows]) == 1
        await index.do(mkv.Row.remove, b"/bad", False)
        await commit(index, b"/bad", 3)

    asyncio.run(main())


def test_a_row_whose_server_is_frozen_is_free_soon(node: Node, url: str) -> None:
    async def main() -> None:
        index = await Postgres(url, None).begin()
        await commit(index, b"/k", 1)
        frozen = await asyncpg.connect(url, server_settings=SETTINGS)
        await frozen.execute("BEGIN")
        await frozen.execute("UPDATE mkv SET garbage = 'x'")
        began = time.monotonic()
        assert await index.do(mkv.Row.remove, b"/k", False) == record(1)
        assert 2 < time.monotonic() - began < 6 and index.retries
        assert node.sql("SELECT record FROM mkv", url.rpartition("/")[2]) == ""
        frozen.terminate()

    asyncio.run(main())


# --- servers --------------------------------------------------------------------------------------


def test_of_two_puts_on_two_servers_one_wins(cluster: Make, url: str) -> None:
    system, servers = many(cluster, url, 2)
    for number in range(25):
        path, values = f"/{number}", [f"{number}: {i}".encode() for i in range(2)]
        puts = [functools.partial(s.put, path, v) for s, v in zip(servers, values, strict=True)]
        said = at_once(*puts)
        assert sorted(said)[0] == 201 and sorted(said)[1] in (403, 409), said
        assert [server.get(path) for server in servers] == [values[said.index(201)]] * 2
    until(system.is_clean)


def test_what_one_server_does_the_others_see_at_once(cluster: Make, url: str) -> None:
    system, (one, other) = many(cluster, url, 2, "-grace", "0")
    for number in range(30):
        path = f"/{number % 3}"
        assert one.put(path, b"value") == 201
        assert other.call("GET", path).status == 302
        assert other.call("DELETE", path).status == 204
        assert one.call("GET", path).status == 404
        one, other = other, one
    assert one.put("/k", b"value") == 201
    assert other.call("UNLINK", "/k").status == 204
    assert one.call("GET", "/k").status == 404
    assert one.call("REBALANCE", "/k").status == 204
    assert [item["key"] for item in one.pages("/?unlinked")] == ["/k"]
    assert listed_names(other, "/?list") == []
    assert other.call("GET", "/?snapshot").status == 501
    until(system.is_clean)


def listed_names(server: Server, path: str) -> list[str]:
    """The keys of a list."""
    return json.loads(server.call("GET", path).body)["keys"]


def test_writes_and_moves_of_a_few_keys_on_three_servers(cluster: Make, url: str) -> None:
    """All verbs on all servers at once: at the end all is as the index says."""
    system, servers = many(cluster, url, 3, "-grace", "0")
    odd: list[tuple[str, int]] = []

    def work(seed: int) -> None:
        chance, server = random.Random(seed), servers[seed % 3]
        end = time.monotonic() + 3
        while time.monotonic() < end:
            verb, path = chance.choice(("PUT", "DELETE", "REBALANCE", "GET")), chance.choice("abcd")
            status = server.call(verb, f"/{path}", b"x" * 100 if verb == "PUT" else None).status
            gone = verb == "REBALANCE" and status == 503  # all files, under its hands
            if status not in (201, 204, 302, 403, 404, 409) and not gone:
                odd.append((verb, status))

    at_once(*(functools.partial(work, seed) for seed in range(6)))
    assert odd == []
    until(system.is_clean)
    assert all(server.metric("mkv_commits_total") for server in servers)


def test_intents_belong_to_one_server(cluster: Make, url: str, tmp_path: Path) -> None:
    system, (one,) = many(cluster, url, 1)
    (port,) = free_ports(1)
    flags = ["-volumes", system.names(), "-port", str(port), "-intents", "intents-first"]
    said = error_of("server", "-db", url, *flags, folder=tmp_path)
    assert f":{one.port}" in said
    (tmp_path / "intents-first.lock").rename("old.lock")  # nobody would do so
    start(system, url)


def test_a_server_that_is_killed_ends_its_writes_when_it_is_back(cluster: Make, url: str) -> None:
    system, (one, other) = many(cluster, url, 2)
    upload = Upload(one.port, "/k", 1000)
    upload.send(b"x" * 500)
    until(system.open_intents)
    one.kill()
    assert other.put("/k", b"other") == 201
    upload.vanish()
    one.start()
    until(system.is_clean)
    assert [server.get("/k") for server in (one, other)] == [b"other"] * 2


def test_a_server_that_is_frozen_holds_up_nobody(cluster: Make, url: str) -> None:
    system, (one, other) = many(cluster, url, 2)
    stop = threading.Event()

    def load(seed: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for verb in "PUT", "DELETE":
                one.call(verb, f"/{number % 3}", b"x")

    threads = [in_background(functools.partial(load, seed)) for seed in range(4)]
    for _ in range(3):
        time.sleep(0.1)
        one.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for path in "/0", "/1", "/2":
            assert other.call("DELETE", path).status in (204, 404)
        assert time.monotonic() - began < 6
        one.process.send_signal(signal.SIGCONT)
    stop.set()
    for thread in threads:
        thread.join()
    until(system.is_clean)


def test_a_write_that_is_overtaken_is_refused(cluster: Make, url: str) -> None:
    """It began before another server's PUT and DELETE, and would commit after them."""
    system, (one, other) = many(cluster, url, 2, "-grace", "1h")
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


class Ahead(Server):
    """A server whose clock is two hours ahead."""

    def command(self) -> list[str]:
        lines = [
            "import sys, time; now = time.time; time.time = lambda: now() + 7200",
            f"sys.path.insert(0, {str(HERE)!r}); import mkv; mkv.main()",
        ]
        command = super().command()
        return [command[0], "-c", "\n".join(lines), *command[2:]]


def test_a_clock_that_is_ahead_sweeps_nothing_too_early(cluster: Make, url: str) -> None:
    system, (one,) = many(cluster, url, 1, "-grace", "2s", "-settle", "1h")
    (port,) = free_ports(1)
    flags = ["-volumes", system.names(), "-intents", "intents-ahead", *Cluster.FLAGS]
    log = system.folder / "ahead.log"
    ahead = Ahead(url, port, *flags, "-grace", "2s", "-settle", "1h", log=log)
    system.servers.append(ahead)
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
    cluster: Make, url: str, proxy: Proxy, what: str
) -> None:
    """What cannot be known is 504; of a PUT it can be known."""
    system, (server,) = many(cluster, through(proxy, url), 1)
    done = what == "cut after"
    proxy.next(b"COMMIT", what)
    assert server.put("/put", b"value") == (201 if done else 504)
    assert server.get("/put") == (b"value" if done else None)
    assert done or server.put("/put", b"value") == 201
    proxy.next(b"COMMIT", what)
    assert server.call("UNLINK", "/put").status == 504
    assert server.call("GET", "/put").status == (404 if done else 302)
    proxy.next(b"COMMIT", what)
    assert server.call("DELETE", "/put").status == 504
    assert server.call("DELETE", "/put").status == (404 if done else 204)
    assert server.metric("mkv_commit_unknown_total") == 3
    until(system.is_clean)


def test_backends_that_freeze(cluster: Make, node: Node, url: str) -> None:
    """Before UPDATE, before COMMIT, for long or for a while: nobody else is held up, or misled."""
    system, (other,) = many(cluster, url, 1)
    update, cases = b"WITH emptied", []
    for at, thaw, statuses in (
        (update, 3.0, {201}),
        (b"COMMIT", 1.5, {201}),
        (update, 0, {503}),
        (b"COMMIT", 0, {504}),
    ):
        proxy = Proxy(node)
        proxy.next(at, "freeze")
        cases.append((f"/{len(cases)}", proxy, start(system, through(proxy, url)), thaw, statuses))

    def put(path: str, proxy: Proxy, server: Server, thaw: float, statuses: set[int]) -> None:
        began = time.monotonic()
        if thaw:
            until(lambda: proxy.frozen)
            time.sleep(thaw)
            os.kill(proxy.frozen, signal.SIGCONT)
        else:
            assert server.put(path, b"value") in statuses
            os.kill(proxy.frozen, signal.SIGCONT)
        assert time.monotonic() - began < 12

    works = [functools.partial(put, *case) for case in cases]
    works += [functools.partial(case[2].put, case[0], b"value") for case in cases if case[3]]
    works.append(lambda: [other.put(f"/other{n}", b"value") for n in range(100)])
    *_, first, second, others = at_once(*works)
    assert (first, second, set(others)) == (201, 201, {201})
    until(system.is_clean)
    for path, proxy, server, _, statuses in cases:
        found = {each.get(path) for each in (server, other)}
        assert len(found) == 1
        assert statuses == {504} or found == {b"value" if statuses == {201} else None}
        proxy.shutdown()
        proxy.server_close()


def test_postgres_that_restarts_fails_no_write(cluster: Make, home: Path) -> None:
    node = new_node(home)
    node.sql("CREATE DATABASE mkv")
    system, servers = many(cluster, node.url("mkv"), 2)
    try:
        load = Load(servers)
        time.sleep(0.5)
        node.stop()
        node.start()
        time.sleep(0.5)
        load.stop(0.5)
        load.check(allowed={504})
        until(system.is_clean)
    finally:
        node.kill()


def test_an_index_that_is_away(cluster: Make, home: Path, tmp_path: Path) -> None:
    node = new_node(home)
    node.sql("CREATE DATABASE mkv")
    system, (server,) = many(cluster, node.url("mkv"), 1)
    assert server.put("/k", b"value") == 201
    upload = Upload(server.port, "/late", 10)
    upload.send(b"12345")
    until(system.open_intents)
    node.kill()

    def timed(work: Callable[[], Any]) -> tuple[Any, float]:
        began = time.monotonic()
        return work(), time.monotonic() - began

    def late() -> int:
        upload.send(b"67890")
        return upload.answer()

    ask = functools.partial(call, server.port)
    calls = [late] + [
        lambda verb=verb, path=path: ask(verb, path).status
        for verb, path in (
            *(("GET", "/k"), ("DELETE", "/k"), ("REBALANCE", "/k"), ("GET", "/?health")),
            *(("GET", "/?ready"), ("UNLINK", "/k"), ("PUT", "/new")),
        )
    ]
    flags = ["-volumes", system.names(), "-port", "1", "-intents", str(tmp_path / "i")]
    calls.append(lambda: error_of("server", "-db", server.db, *flags, folder=tmp_path))
    said = at_once(*(functools.partial(timed, each) for each in calls))
    assert [status for status, _ in said[:-1]] == [503] * 7 + [411], said
    assert all(seconds < 12 for _, seconds in said)
    assert "cannot be reached" in said[-1][0]
    node.start()
    began = time.monotonic()
    until(lambda: ask("GET", "/k").status == 302)
    assert time.monotonic() - began < 3
    assert server.metric("mkv_commit_retries_total") > 3
    until(system.is_clean)
    assert server.put("/late", b"now") == 201
    node.kill()


def test_the_commands_use_the_shared_index(
    cluster: Make, node: Node, url: str, tmp_path: Path
) -> None:
    system, (server,) = many(cluster, url, 1)
    values = {f"/{n}": b"%d" % n for n in range(5)}
    assert {server.put(path, value) for path, value in values.items()} == {201}

    def run(command: str) -> int:
        where = ["-db", url, "-volumes", system.names(), "-port", str(server.port)]
        script = [sys.executable, HERE / "mkv.py", command, *where, "-intents", "intents-first"]
        return subprocess.run(script, timeout=30, check=False).returncode

    asked = server.metric('mkv_requests_total{method="REBALANCE",status="204"}')
    assert run("rebalance") == 0
    assert server.metric('mkv_requests_total{method="REBALANCE",status="204"}') == asked + 5
    server.kill()
    assert run("rebalance") == 0
    node.sql("DELETE FROM mkv", url.rpartition("/")[2])
    assert run("rebuild") == 0
    server.start()
    assert {path: server.get(path) for path in values} == values
    until(system.is_clean)


def test_without_asyncpg_a_sentence_says_what_to_do(url: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    hide = f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.modules['asyncpg'] = None"
    script.write_text(f"{hide}\nimport mkv; mkv.main()")
    flags = ["server", "-db", url, "-volumes", "127.0.0.1:1", "-replicas", "1", "-port", "1"]
    assert "--with asyncpg" in error_of(*flags, folder=tmp_path, script=script)


# --- failover -------------------------------------------------------------------------------------


class Load:
    """Clients that write, read and delete keys of their own on all servers, and remember it all."""

    def __init__(self, servers: list[Server], clients: int = 6) -> None:
        self.servers, self.ended = servers, threading.Event()
        self.statuses: Counter = Counter()
        self.values: dict[str, set[bytes | None]] = {}  # what a key may have: None is nothing
        self.slowest, self.wrong, self.done = 0.0, [], [0.0]
        self.threads = [threading.Thread(target=self.work, args=(n,)) for n in range(clients)]
        for thread in self.threads:
            thread.start()

    def ask(self, chance: random.Random, verb: str, path: str, body: Any = None) -> Reply:
        began = time.monotonic()
        reply = call(chance.choice(self.servers).port, verb, path, body)
        now = time.monotonic()
        self.slowest = max(self.slowest, now - began)
        self.statuses[verb, reply.status] += 1
        if reply.status < 500 and verb != "GET":
            self.done.append(now)
        return reply

    def work(self, client: int) -> None:
        chance, number = random.Random(client), 0
        while not self.ended.is_set():
            number += 1
            path, value = f"/{client}/{number}", b"%d %d" % (client, number)
            may = self.values[path] = {None, value}
            status = self.ask(chance, "PUT", path, value).status
            if status == 201:
                may.discard(None)
            elif status != 504:
                may.discard(value)
            if chance.random() < 0.4 and status == 201:
                may.add(None)
                gone = self.ask(chance, "DELETE", path).status
                if gone in (204, 404):
                    may.discard(value)
                    if gone == 404:
                        self.wrong.append((path, "was not there"))
                elif gone != 504:
                    may.discard(None)
            found = self.ask(chance, "GET", path).status
            if found == (302 if value not in may else 404 if None not in may else 0):
                self.wrong.append((path, found, may))

    def stop(self, seconds: float = 0) -> None:
        time.sleep(seconds)
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def check(self, allowed: set[int]) -> None:
        """That all is as it was acknowledged, and only these failures were seen."""
        print(self.statuses, f"{self.slowest:.2f} s")
        assert self.wrong == []
        assert self.statuses["PUT", 201] > 20
        assert {status for _, status in self.statuses if status >= 500} <= allowed
        assert self.slowest < 12
        for number, (path, may) in enumerate(self.values.items()):
            server = self.servers[number % len(self.servers)]
            assert server.get(path) in may, (path, may)

    def gap(self, since: float) -> float:
        """Seconds from a time till the next write was answered."""
        return min([moment for moment in self.done if moment > since], default=math.inf) - since


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_failover_loses_nothing(cluster: Make, pair: Pair, how: int) -> None:
    system, servers = many(cluster, pair.url, 3)
    load = Load(servers)
    time.sleep(0.7)
    pair.b.send(signal.SIGSTOP)
    time.sleep(0.2)  # now some are at COMMIT, of which the standby may have heard, or not
    pair.a.send(how)
    pair.b.send(signal.SIGCONT)
    time.sleep(0.5)
    promoted = pair.promote()
    time.sleep(3)
    load.stop()
    gap = load.gap(promoted)
    print(f"{gap:.2f} s after the promotion")
    assert gap < 3
    load.check(allowed={504})
    assert load.slowest < 7.5  # it did not wait for a host that is none any more
    until(system.is_clean)


def test_a_commit_is_never_cancelled(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives up waiting for the standby leaves all open: nobody sees what may be lost."""
    monkeypatch.setattr("contrib.postgres.WORK_TIME", 2.5)

    async def main() -> None:
        index = await Postgres(pair.url, None).begin()
        pair.b.send(signal.SIGSTOP)
        with pytest.raises(mkv.HTTPError) as unknown:
            await commit(index, b"/k", 1)
        assert unknown.value.status == 504 and index.unknown == 1
        for _ in range(10):
            assert not (await index.row(b"/k")).record.live
            await asyncio.sleep(0.02)
        pair.b.send(signal.SIGCONT)
        files = record(1).replicas
        assert await index.do(mkv.Row.waste, b"/k", files) == ([], True)

    asyncio.run(main())


def test_a_wait_for_the_standby_that_is_cancelled_is_no_success(cluster: Make, pair: Pair) -> None:
    """PostgreSQL calls it done, with a warning; but a failover would lose it."""
    system, (server,) = many(cluster, pair.url, 1)
    assert server.put("/before", b"value") == 201
    pair.b.send(signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        said = pool.submit(server.put, "/k", b"value")
        waits = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: pair.a.sql(f"SELECT count(*) {waits}") == "1")
        pair.a.sql(f"SELECT pg_cancel_backend(pid) {waits}")
        assert said.result() == 504
    pair.b.send(signal.SIGCONT)
    until(system.is_clean)
    assert server.get("/k") == b"value"
