"""Volumes and the store: writes, reads, deletes and replaces, failures, kill -9, a server's end."""

import email.utils

from harness import *

OLD, NEW = b"old", blob("new", 300_000)
REPLACE = "If-Match: *\r\n"

# --- clusters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Cluster]:
    """Three replicas on so many volumes of two drives; the first drive of all is a small disk."""
    folder = tmp_path_factory.mktemp("fleet")
    drive = folder / "volume0/sv00"
    drive.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(drive)]
    subprocess.run(command, check=False, capture_output=True)  # only root may
    made = Cluster(folder, volumes=request.param, subvolumes=2)
    try:
        yield made
        until(made.is_clean)
    finally:
        subprocess.run(["umount", "-l", str(drive)], check=False, capture_output=True)
        made.close()


with_spare = pytest.mark.parametrize("fleet", [4], indirect=True)


@contextlib.contextmanager
def another(system: Cluster, *flags: str, port: int = 0, **settings: Any) -> Iterator[Server]:
    """Another server, of other flags, in the place of a cluster's for the time of a block."""
    usual = system.server
    assert usual.stop() == 0
    system.server = system.start(port or free_ports(1)[0], *flags, **settings)
    try:
        yield system.server
    finally:
        if system.server.running():
            system.server.kill()
        system.server = usual
        usual.start()


def half_sent(system: Cluster, path: str, value: bytes, fields: str = "") -> Upload:
    """An upload of which half is on its way to the volumes; see finish()."""
    count = system.open_intents()
    upload = Upload(system.server.port, path, len(value), fields)
    upload.send(value[: len(value) // 2])
    upload.rest = value[len(value) // 2 :]
    until(lambda: system.open_intents() == count + 1)
    return upload


def finish(uploads: Iterable[Upload]) -> list[int]:
    """Send what is left of uploads: their statuses."""
    for upload in uploads:
        upload.send(upload.rest)
    return [upload.answer() for upload in uploads]


def paths_at(system: Cluster, location: str, prefix: str) -> Iterator[str]:
    """Paths without end that have a location, or a volume, among their ideal ones."""
    paths = (f"/{prefix}/{number}" for number in itertools.count())
    return (p for p in paths if any(i.startswith(location) for i in ideal(system, p)))


def files_of(system: Cluster, path: str) -> int:
    """How many files of a key there are, whatever the index says."""
    return sum(mkv.key2path(path.encode()) in file for file in system.files())


def balance(system: Cluster, path: str) -> str:
    """Whether a key is balanced, in the server's words."""
    return system.server.call("GET", path).fields["key-balance"]


# --- failure, moment, verb ------------------------------------------------------------------------

FAILURES = {  # the drive that fails, alone or with its volume
    "dead": "sv01",
    "frozen": "sv01",
    "vanished": "sv01",
    "full": "sv00",
    "read-only": "sv00",
}
CELLS = {  # when the failure comes, and the verb: what is answered with a spare volume, and without
    ("before", "GET"): (302, 302),
    ("before", "PUT"): (201, 503),  # in chunks
    ("before", "REPLACE"): (201, 503),
    ("before", "UNLINK"): (204, 204),
    ("before", "DELETE"): (204, 204),
    ("in mid-body", "PUT"): (201, 503),
    ("in mid-body", "REPLACE"): (201, 503),
}


def strike(failure: str, volume: Volume, drive: Path) -> Callable[[], Any]:
    """Let a volume fail, or a drive of it; returns what cures it."""
    if failure in ("dead", "frozen"):
        return ail(failure, volume, lambda *_: None)
    if failure == "vanished":
        drive.rename(away := drive.with_name(".away"))
        drive.mkdir()  # as the mount point of a disk that has left
        return lambda: (drive.rmdir(), away.rename(drive))
    if failure == "read-only":
        shell("mount", "--bind", str(drive), str(drive))
        shell("mount", "-o", "remount,ro,bind", str(drive))
        return lambda: shell("umount", "-l", str(drive))
    filler = drive / ".tmp/filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler.unlink


TIGHT = [(3, "dead"), (3, "frozen"), (3, "full")]  # as many volumes as replicas
AMPLE = [(4, failure) for failure in FAILURES]


@pytest.mark.parametrize(("fleet", "failure"), TIGHT + AMPLE, indirect=["fleet"])
def test_a_failure_at_any_moment_of_any_verb_is_survived(fleet: Cluster, failure: str) -> None:
    server, volume = fleet.server, fleet.volumes[0]
    spare, bad = len(fleet.volumes) == 4, f"{volume.name}/{FAILURES[failure]}"
    if bad.endswith("0") and not drive_at(fleet, bad).is_mount():
        pytest.skip("needs to mount")
    value = NEW[:200_000] if failure == "full" else NEW  # nginx has 100,000 bytes in memory
    at_bad = paths_at(fleet, bad, failure)
    paths = {cell: next(at_bad) for cell in CELLS}
    halves = {}
    for cell, path in paths.items():
        assert cell[1] == "PUT" or server.put(path, OLD) == 201
        if cell[0] == "in mid-body":
            halves[cell] = half_sent(fleet, path, value, REPLACE * (cell[1] == "REPLACE"))
    temporary = drive_at(fleet, bad) / ".tmp"
    until(lambda: failure == "full" or any(f.stat().st_size for f in temporary.iterdir()))

    def answer(cell: tuple[str, str]) -> int:
        if cell in halves:
            return finish([halves[cell]])[0]
        if cell[1] == "PUT":
            return server.put(paths[cell], iter([value]))
        if cell[1] == "REPLACE":
            return server.call("PUT", paths[cell], value, If_Match="*").status
        return server.call(cell[1], paths[cell]).status

    cure = strike(failure, volume, drive_at(fleet, bad))
    try:
        with ThreadPoolExecutor() as pool:
            found = dict(zip(CELLS, pool.map(answer, CELLS), strict=True))
        assert found == {cell: status[not spare] for cell, status in CELLS.items()}
        values: dict[str, bytes | None] = {}
        for cell, path in paths.items():
            old = OLD if cell[1] in ("GET", "REPLACE") else None
            values[path] = value if found[cell] == 201 else old
            assert read(server, path) == values[path], cell
        assert spare or server.put(paths["before", "PUT"], value) == 503, "the key is free: no 409"
        check_while_ill(fleet, failure, bad, paths)
    finally:
        cure()
    until(lambda: server.put(p := next(at_bad), OLD) == 201 and balance(fleet, p) == "balanced", 40)
    until(fleet.is_clean, 40)
    for path, value in values.items():
        assert value or server.put(path, b"free") == 201, path
        assert_copies(fleet, path, value or b"free")


def check_while_ill(fleet: Cluster, failure: str, bad: str, paths: dict) -> None:
    """What holds as long as a failure lasts."""
    server, volume = fleet.server, volume_of(bad)
    if len(fleet.volumes) == 4 and failure != "full":  # where a small value finds room at times
        began = time.monotonic()
        for path in itertools.islice(paths_at(fleet, bad, f"{failure}/ill"), 10):
            assert server.put(path, b"small") == 201 and balance(fleet, path) == "unbalanced"
        assert time.monotonic() - began < 20, "one stall each: a stall is ten times -voltimeout"
    if failure in ("dead", "frozen", "vanished"):
        got, deleted = paths["before", "GET"], paths["before", "DELETE"].encode()
        until(lambda: bad not in {server.call("GET", got).fields["location"][7:] for _ in range(9)})
        holds(lambda: bad in {f.location for f in server.garbage().get(deleted, ())}, 0.7)
    if failure not in ("dead", "frozen"):  # one drive is not its volume
        path = next(paths_at(fleet, f"{volume}/sv0{1 - int(bad[-1])}", "sibling/" + failure))
        assert server.put(path, OLD) == 201 and balance(fleet, path) == "balanced"


# --- volumes that hang, refuse, lie ---------------------------------------------------------------


def test_what_hung_workers_do_late_harms_nobody(cluster: Make) -> None:
    """Of one volume the workers hang that have our connections; others answer for it."""
    system = cluster("-settle", "30s", volumes=4, subvolumes=1)
    server, volume = system.server, system.volumes[0]
    at_hung = paths_at(system, volume.name, "hung")
    deleted, late, killed, *warm = itertools.islice(at_hung, 10)
    uploads = [half_sent(system, path, OLD) for path in (deleted, *warm)]  # each on a connection
    assert set(finish(uploads)) == {201}
    hung = {path: half_sent(system, path, b"late") for path in (late, killed)}

    def uses_it_again(path: str) -> bool:
        assert server.put(path, OLD) == 201
        return volume.name in assert_copies(system, path, OLD)

    with old_workers_frozen(volume):
        fresh_workers(volume)
        assert server.call("DELETE", deleted).status == 204
        assert finish([hung[late]]) == [201] and files_of(system, late) == 3
        assert volume.name not in assert_copies(system, late, b"late")
        until(lambda: uses_it_again(next(at_hung)), 20)  # not a stall for each connection
        assert server.sees(volume) and server.call("DELETE", late).status == 204
        hung[killed].send(hung[killed].rest)
        until(lambda: files_of(system, killed) == 2)
        restart(system)
        assert {server.put(path, NEW) for path in (late, deleted, killed)} == {201}
        holds(lambda: late.encode() in server.garbage(), 1)  # that it is not there proves nothing
        server.kill()
        before = volume.files()
    until(lambda: len(volume.files() - before) == 2)  # the late PUTs have landed
    server.start()
    until(system.is_clean, 40)
    for path in (late, deleted, killed):
        assert_copies(system, path, NEW)
        assert [server.get(path) for _ in range(9)] == [NEW] * 9


class Toys(Cluster):
    """Four volumes in memory, of many drives, and a server that wants two replicas of each key."""

    def __init__(self, folder: Path) -> None:
        self.fakes, self.numbers = [Fake() for _ in range(4)], itertools.count()
        self.met: set[str] = set()  # locations
        self.locations = [fake.name for fake in self.fakes]
        self.drives = " ".join(f"sv{number:02X}" for number in range(256))
        self.heal()
        flags = ("-volumes", ",".join(self.locations), "-replicas", "2", "-subvolumes", "256")
        self.server = Server(folder / "index", *free_ports(1), *flags, *self.FLAGS)
        self.servers = [self.server]

    def path(self, location: str = "") -> str:
        """A new path, whose ranking is that of the volumes; at a location, or at new ones alone."""
        while True:
            path = f"/toy{next(self.numbers)}"
            ranking = mkv.key2volume(path.encode(), self.locations, 4, 256)
            new = ranking[0] == location if location else self.met.isdisjoint(ranking)
            if new and [volume_of(each) for each in ranking] == self.locations:
                self.met |= set(ranking)
                return path

    def files(self) -> set[str]:
        """All stored files."""
        return {fake.name + path for fake in self.fakes for path in fake.stored}

    def holders(self, path: str) -> list[int]:
        """The numbers of the volumes that have files of a key."""
        begin = mkv.key2path(path.encode())
        return [n for n, fake in enumerate(self.fakes) if any(begin in f for f in fake.stored)]

    def heal(self) -> None:
        """No volume does any harm from now on."""
        for fake in self.fakes:
            fake.fields, fake.more, fake.drives = {}, b"", self.drives
            fake.says, fake.before, fake.given = {}, lambda *_: None, lambda value: value


@pytest.fixture(scope="module")
def shared_toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toys]:
    made = Toys(tmp_path_factory.mktemp("toys"))
    yield made
    made.server.kill()
    for fake in made.fakes:
        fake.close()


@pytest.fixture
def toys(shared_toys: Toys) -> Iterator[Toys]:
    """They are well at the end of each test, and soon nothing of it is left but what it stored."""
    yield shared_toys
    shared_toys.heal()
    until(shared_toys.is_clean)


def once() -> dict[str, Any]:
    """A volume that says of each connection that it will close it, and is slow to do so."""
    asked = set()

    def before(method: str, _: str) -> None:
        thread = threading.current_thread()  # one for each connection
        if method == "PUT" and thread in asked:
            raise ConnectionError("it has said so")
        asked.add(thread)

    return {"before": before, "fields": {"X-ETag": "y", "Connection": "x, close"}}


FAILS, CLOSES = {"says": {"PUT": 500}}, {"fields": {"Location": "/", "Connection": "close"}}
SAYS_MORE = {"more": b"HTTP/1.1 408 X\r\nContent-Length: 0\r\n\r\n"}
SAYS_LAST = {"more": b"HTTP/1.1 408 X\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"}
FAULTS: dict[str, tuple] = {  # of which volumes of the ranking; which have the value in the end
    "one cuts the connection": ({1: {"says": {"PUT": 0}}}, [0, 2]),
    "one says 204": ({1: {"says": {"PUT": 204}}}, [0, 2]),
    "one says 403": ({1: {"says": {"PUT": 403}}}, [0, 2]),
    "one says 507": ({1: {"says": {"PUT": 507}}}, [0, 2]),
    "a stand-in fails too": ({0: FAILS, 2: FAILS}, [1, 3]),
    "both fail": ({0: FAILS, 1: FAILS}, []),
    "no stand-in works": ({1: FAILS, 2: FAILS, 3: FAILS}, []),
    "the source has rotted": ({0: {"given": lambda v: v[:-1] + b"?"}, 1: FAILS}, []),
    "the source gives more": ({0: {"given": lambda v: v + b"?"}, 1: FAILS}, []),
    "the source gives less": ({0: {"given": lambda v: v[1:]}, 1: FAILS}, []),
    "the source says nothing": ({0: {"says": {"GET": 0}}, 1: FAILS}, []),
    "they close connections": ({0: CLOSES, 1: CLOSES}, [0, 1]),
    "they close connections late": ({0: once(), 1: once()}, [0, 1]),
    "they say more than was asked": ({0: SAYS_MORE, 1: SAYS_MORE}, [0, 1]),
    "and that they close": ({0: SAYS_LAST, 1: SAYS_LAST}, [0, 1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_two_volumes_get_the_bytes_that_were_put_once_or_none_has_them(
    toys: Toys, fault: str
) -> None:
    faults, holders = FAULTS[fault]
    for number, fields in faults.items():
        vars(toys.fakes[number]).update(fields)
    for size in (1000, 300_000) * 2:
        path, value = toys.path(), blob(fault, size)
        assert toys.server.put(path, value) == (201 if holders else 503)
        until(lambda path=path: toys.holders(path) == holders)
        assert not holders or toys.server.get(path) == value
        assert toys.server.call("DELETE", path).status == (204 if holders else 404)
    for fake in toys.fakes:
        puts = [name for _, method, name in fake.log if method == "PUT"]
        assert len(puts) == len(set(puts))


def test_connections_on_which_a_volume_says_more_are_closed(toys: Toys) -> None:
    for fake in toys.fakes:
        vars(fake).update(SAYS_MORE)
    toys.server.stop()
    toys.server.start()
    counts = []
    for path in [toys.path() for _ in range(30)]:
        assert toys.server.put(path, OLD) == 201
        counts.append(descriptors(toys.server))
        assert toys.server.call("DELETE", path).status == 204
    assert counts[-1] < counts[0] + 30


def test_a_server_killed_while_it_makes_a_stand_in_leaves_the_key_free(toys: Toys) -> None:
    path, reached, go_on = toys.path(), threading.Event(), threading.Event()

    def wait(method: str, _: str) -> None:
        if method == "PUT":
            reached.set()
            go_on.wait(60)

    toys.fakes[1].says, toys.fakes[2].before = {"PUT": 500}, wait
    thread = in_background(lambda: toys.server.put(path, OLD))
    assert reached.wait(60)
    toys.server.kill()
    go_on.set()
    thread.join()
    until(lambda: toys.holders(path) == [0, 2])
    toys.heal()
    toys.server.start()
    assert toys.server.put(path, NEW) == 201 and toys.server.get(path) == NEW


def test_a_drive_that_hangs_is_left_alone_and_does_not_take_its_volume_down(toys: Toys) -> None:
    server, (hung, twin, *_), go_on = toys.server, toys.fakes, threading.Event()
    drive = mkv.key2volume((path := toys.path()).encode(), toys.locations, 1, 256)[0]
    other, *same = toys.path(), *(toys.path(drive) for _ in range(3))

    def hang(method: str, name: str) -> None:
        if method == "PUT" and drive.endswith(name[:5]):
            go_on.wait(60)
            raise ConnectionError

    def target() -> str:
        return volume_of(server.call("GET", same[0]).fields["location"][7:])

    assert server.put(same[0], OLD) == 201
    hung.before = hang
    assert server.put(path, OLD) == 201 and toys.holders(path) == [1, 2]  # ten times -voltimeout
    refuses = f'mkv_location_refuses_writes{{location="{drive}"}}'
    assert server.metric(refuses) == 1 and {target() for _ in range(9)} == {twin.name}
    began = time.monotonic()
    assert server.put(same[1], OLD) == 201 and time.monotonic() - began < 3
    assert server.put(other, OLD) == 201 and toys.holders(other) == [0, 1]
    twin.drives = ""
    until(lambda: target() == hung.name)  # where nothing else is up
    toys.heal()
    go_on.set()
    until(lambda: not server.metric(refuses))
    assert server.put(same[2], OLD) == 201 and toys.holders(same[2])[0] == 0


CREATED = b"HTTP/1.1 201 X\r\n"
PAGE = b"HTTP/1.1 200 X\r\n" + CHUNKED.encode() + b"\r\n"
HOSTILE = {  # what is said once, and what is repeated for ever; None: closed, empty: silence
    "nothing": (b"", None),
    "noise": (random.Random(1).randbytes(50_000), None),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", None),
    "a negative length": (CREATED + b"Content-Length: -1\r\n\r\n", None),
    "two lengths": (CREATED + b"Content-Length: 5\r\n" + CHUNKED.encode() + b"\r\n", None),
    "an unknown coding": (CREATED + b"Transfer-Encoding: gzip\r\n\r\n", None),
    "bad chunks": (PAGE + b"xyz\r\n", None),
    "half a head": (CREATED + b"Content-Le", None),
    "too many fields": (CREATED + b"X: y\r\n" * 101 + b"\r\n", None),
    "an endless head": (CREATED, b"X: y\r\n" * 1000),
    "an endless line": (CREATED + b"X: ", b"y" * 10_000),
    "an endless extension": (PAGE + b"5;", b"x" * 10_000),
    "endless little chunks": (PAGE, b"5\r\nabcde\r\n" * 1000),
    "endless large chunks": (PAGE, b"ffff\r\n" + bytes(65535) + b"\r\n"),
    "an endless trailer": (PAGE + b"0\r\n", b"X: y\r\n" * 1000),
    "endless interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless silence": (b"", b""),
}


@pytest.fixture
def hole() -> Iterator[str]:
    """The name of a volume whose machine is off: nothing answers, not even to say so."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # it has room for one
            wire = stack.enter_context(socket.socket())
            wire.setblocking(False)
            wire.connect_ex(full.getsockname())
        yield f"127.0.0.1:{full.getsockname()[1]}"


def test_no_answer_of_a_volume_does_any_harm(tmp_path: Path, hole: str) -> None:
    liars = [Liar(*says, drives) for says in HOSTILE.values() for drives in (".", "")]
    names = [*(liar.name for liar in liars), hole, "a..b:1", f"{'c' * 64}.d:1"]
    rows = [(b"/%d" % n, f"{name} 5 {WRITE_ID}".encode()) for n, name in enumerate(names)]
    plant(tmp_path / "index", rows)
    flags = ("-volumes", ",".join(names), "-replicas", "1", "-subvolumes", "1")
    server = Server(tmp_path / "index", *free_ports(1), *flags, "-voltimeout", "200ms")

    def ask(number: int) -> tuple[int, ...]:
        return tuple(
            server.call(verb, f"/{number}").status for verb in ("REBALANCE", "DELETE", "GET")
        )

    try:
        with ThreadPoolExecutor(16) as pool:
            while not all(liar.asked for liar in liars):
                values = {f"/{random.random()}": bytes(size) for size in (9, 300_000) * 8}
                assert set(pool.map(server.put, values, values.values())) == {503}
            assert set(pool.map(ask, range(len(names)))) == {(503, 204, 404)}
        assert server.call("GET", "/?health").status == 200
        assert server.memory() < 100_000_000
        assert server.stop() == 0 and "Traceback" not in server.log.read_text()
    finally:
        server.kill()
        for liar in liars:
            liar.close()


# --- the main job ---------------------------------------------------------------------------------


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster in memory, if there is room: so many folders are slow to make and to remove."""
    shm = Path("/dev/shm")
    room = shm.is_dir() and shutil.disk_usage(shm).free > 4_000_000_000
    with tempfile.TemporaryDirectory(dir=shm if room else tmp_path) as folder:
        made = Cluster(Path(folder), "-voltimeout", "3s")  # disks stall
        yield made
        made.close()


def test_all_documents_are_stored_listed_read_and_deleted(roomy: Cluster) -> None:
    files = [path for path in Path("/usr/share/doc").rglob("*") if not path.is_symlink()]
    values = {quote(bytes(path)): path.read_bytes() for path in files if path.is_file()}
    values = {path: value for path, value in values.items() if value}
    assert len(values) > 100
    system, server = roomy, roomy.server

    def everywhere(work: Callable[[Client, str], Any]) -> set[Any]:
        """What a work gives on each path, done by many clients."""

        def some(number: int) -> set[Any]:
            client = Client(server.port)
            return {work(client, path) for path in list(values)[number::8]}

        with ThreadPoolExecutor(8) as pool:
            return set().union(*pool.map(some, range(8)))

    assert everywhere(lambda client, path: client.call("PUT", path, values[path]).status) == {201}
    keys = sorted(unquote_to_bytes(path) for path in values)
    assert [key.encode() for key in listed(server, "/?list")[0]] == keys
    assert len(system.files()) == 3 * len(keys)
    assert everywhere(lambda c, path: follow(c.call("GET", path)).body == values[path]) == {True}
    assert everywhere(lambda client, path: client.call("DELETE", path).status) == {204}
    assert descriptors(server) < 150, "connections are kept, not piled up"
    assert listed(server, "/?list")[0] == []
    until(system.is_clean)
    assert not system.files()


# --- reads ----------------------------------------------------------------------------------------


def test_values_are_read_while_one_of_three_volumes_is_up(system: Cluster) -> None:
    server, (dead, iced, left) = system.server, system.volumes
    paths = [f"/reads/{number}" for number in range(30)]
    assert {server.put(path, path.encode()) for path in paths} == {201}
    dead.kill()
    iced.freeze()
    try:
        for _ in range(2):
            assert [read(server, path) for path in paths] == [path.encode() for path in paths]
            began = time.monotonic()
            targets = {server.call("GET", path).fields["location"][7:] for path in paths}
            assert {volume_of(target) for target in targets} == {left.name}
            assert time.monotonic() - began < 5, "no GET waits for a volume"
            restart(system)  # one that knows nothing of its volumes
    finally:
        iced.thaw()
        dead.start()
        for volume in system.volumes:
            system.sees(volume)


def test_connections_that_volumes_have_ended_are_not_taken_for_dead_volumes(
    system: Cluster,
) -> None:
    said = system.server.log.read_text().count("is down")
    assert system.server.put("/ended", b"value") == 201
    for volume in system.volumes:
        old = set(volume.workers())
        fresh_workers(volume)
        until(lambda volume=volume, old=old: old.isdisjoint(volume.workers()))
    assert system.server.put("/ended/2", b"value") == 201
    assert system.server.call("DELETE", "/ended").status == 204
    assert system.server.log.read_text().count("is down") == said


# --- writes on conditions -------------------------------------------------------------------------


def tag(value: bytes) -> str:
    """A value as If-Match names it."""
    return f'"{hashlib.md5(value).hexdigest()}"'


LATER = {"If_Unmodified_Since": "Fri, 01 Jan 2100 00:00:00 GMT"}
ANY, NONE, SAME, OTHER = {"If_Match": "*"}, {"If_None_Match": "*"}, tag(OLD), tag(b"other")
CONDITIONS: dict[tuple, list] = {  # what there is, verb, status: header fields
    ("live", "PUT", 403): [{}],
    ("live", "PUT", 201): [ANY, {"If_Match": SAME}, {"If_Match": f"{OTHER}, {SAME}"}],
    ("live", "PUT", 412): [
        {"If_Match": OTHER},
        {"If_Match": SAME.strip('"')},
        {"If_Match": "W/" + SAME},
        {"If_Match": ""},
        {"If_None_Match": OTHER},
        NONE,
        ANY | NONE,
        ANY | LATER,
    ],
    ("live", "PUT", 400): [ANY | {"Content_MD5": SAME.strip('"')}],
    ("live", "DELETE", 412): [ANY, NONE, LATER],
    ("live", "UNLINK", 412): [ANY, NONE, LATER],
    ("free", "PUT", 201): [{}, NONE],
    ("free", "PUT", 412): [ANY, {"If_Match": SAME}, LATER, {"If_Modified_Since": "yesterday"}],
    ("free", "PUT", 400): [{"Content_Range": "bytes 0-2/10"}],
    ("free", "PUT", 415): [{"Content_Encoding": "gzip"}],
    ("unlinked", "PUT", 201): [{}, NONE],
    ("unlinked", "PUT", 412): [ANY, {"If_Match": SAME}],
}


@pytest.mark.parametrize(("there", "verb", "status"), CONDITIONS)
def test_a_write_on_conditions_is_done_or_changes_nothing(
    system: Cluster, there: str, verb: str, status: int
) -> None:
    server = system.server
    for number, fields in enumerate(CONDITIONS[there, verb, status]):
        path = f"/{there}/{verb}/{status}/{number}"
        assert there == "free" or server.put(path, OLD) == 201
        assert there != "unlinked" or server.call("UNLINK", path).status == 204
        assert server.call(verb, path, NEW if verb == "PUT" else None, **fields).status == status
        value = NEW if status == 201 else OLD if there == "live" else None
        assert server.get(path) == value, fields
        assert (path in listed(server, "/?unlinked")[0]) == (there == "unlinked" and not value)
        if value:
            assert_copies(system, path, value)
            assert server.call("GET", path).fields["content-md5"] == tag(value).strip('"')
    until(system.is_clean)


def test_an_md5_that_is_not_known_matches_nothing(system: Cluster) -> None:
    server = system.server
    assert server.stop() == 0
    plant(server.db, [(b"/no-md5", f"{ideal(system, '/no-md5')[0]} 3 {WRITE_ID}".encode())])
    server.start()
    assert server.call("PUT", "/no-md5", NEW, If_Match=tag(OLD)).status == 412
    assert server.call("PUT", "/no-md5", NEW, If_Match="*").status == 201
    assert server.get("/no-md5") == NEW


def test_with_protect_nothing_is_replaced_nor_deleted_but_what_is_unlinked(system: Cluster) -> None:
    assert system.server.put("/protected", OLD) == 201
    with another(system, "-protect") as server:
        for match in ("*", tag(OLD)):
            assert server.call("PUT", "/protected", NEW, If_Match=match).status == 403
        assert server.call("DELETE", "/protected").status == 403
        assert server.get("/protected") == OLD
        assert server.call("UNLINK", "/protected").status == 204
        assert server.call("DELETE", "/protected").status == 204


@pytest.mark.parametrize("verb", ["DELETE", "UNLINK"])
def test_a_replace_is_judged_when_it_is_done_and_not_when_it_began(
    system: Cluster, verb: str
) -> None:
    server, path = system.server, f"/judged/{verb}"
    assert server.put(path, OLD) == 201
    upload = half_sent(system, path, NEW, REPLACE)
    assert server.call("PUT", path, NEW, If_Match="*").status == 409
    assert server.call(verb, path).status == 204
    assert finish([upload]) == [412]
    assert server.get(path) is None
    until(system.is_clean)


def test_who_was_sent_to_a_value_that_is_replaced_reads_it_for_grace(system: Cluster) -> None:
    with another(system, "-grace", "1m") as server:
        assert server.put("/graced", OLD) == 201
        sent = server.call("GET", "/graced")
        assert server.call("PUT", "/graced", NEW, If_Match="*").status == 201
        restart(system)  # a sweep begins at once
        holds(lambda: follow(sent).body == OLD, 0.7)
    until(lambda: follow(sent).status == 404)


@with_spare
def test_all_replicas_of_a_value_have_its_date_and_one_etag_and_a_new_value_another(
    fleet: Cluster,
) -> None:
    server, path, ahead = fleet.server, "/dated", int(time.time()) + 86400
    volume = volume_at(fleet, place := ideal(fleet, path)[0])
    server.kill()
    old = f"{place} 3 {ahead:08x}{'0' * 8}".encode()  # so that the new time is not that of the PUT
    plant(server.db, [(path.encode(), old)])
    server.start()

    def seen() -> tuple[str, str]:
        heads = [urllib.request.urlopen(url).headers for url in replicas_of(fleet, path.encode())]
        found = {(head["Last-Modified"], head["ETag"]) for head in heads}
        assert len(heads) == 3 and len(found) == 1
        return found.pop()

    upload = half_sent(fleet, path, NEW, REPLACE)
    volume.kill()
    assert finish([upload]) == [201]  # with a stand-in
    before = seen()
    assert email.utils.parsedate_to_datetime(before[0]).timestamp() == ahead + 1
    volume.start()
    fleet.sees(volume)
    assert server.call("REBALANCE", path).status == 204
    assert balance(fleet, path) == "balanced" and seen() == before
    assert server.call("PUT", path, NEW, If_Match="*").status == 201
    assert seen()[1] != before[1]


# --- kill -9, and the end of a server -------------------------------------------------------------


def test_after_kill_9_what_was_broken_off_is_garbage_and_the_keys_are_as_before(
    system: Cluster,
) -> None:
    server = system.server
    assert server.put("/broken", OLD) == 201
    for down in (False, True):
        path = f"/broken/{down}"
        uploads = [half_sent(system, path, NEW), half_sent(system, "/broken", NEW, REPLACE)]
        assert server.put(path, b"locked") == 409
        server.kill()
        for volume in system.volumes if down else ():
            volume.kill()
        server.start()
        assert not system.open_intents()
        if down:  # then it waits
            assert {key: len(files) for key, files in server.garbage().items()} == {
                path.encode(): 3,
                b"/broken": 3,
            }
            for volume in system.volumes:
                volume.start()
                system.sees(volume)
        assert server.put(path, b"new") == 201, f"the key is free of {uploads}"
        assert server.get("/broken") == OLD
        until(system.is_clean)
        assert_copies(system, path, b"new")


def test_sigterm_finishes_what_is_in_hand_and_refuses_what_is_new(system: Cluster) -> None:
    server, paths = system.server, [f"/in-hand/{number}" for number in range(3)]
    missing, put = request("GET", "/missing"), request("PUT", "/in-hand", OLD)
    uploads = [half_sent(system, path, NEW) for path in paths]
    with contextlib.ExitStack() as stack:
        wires = [Wire(server.port) for _ in range(4)]
        silent, late, idle, writing = map(stack.enter_context, wires)
        idle.send(missing)
        assert "connection" not in idle.answer().fields
        writing.send(put[:-2])
        until(lambda: system.open_intents() == 4)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not system.server_accepts())
        silent.send(missing * 2)  # who has connected may ask once
        late.send(missing)
        writing.send(put[-2:] + missing)
        for wire, status in ((silent, 404), (late, 404), (writing, 201)):
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (status, "close")
            wire.send(missing)
            assert wire.closed()
        assert idle.closed() and server.running()
    assert finish(uploads) == [201] * 3
    assert server.process.wait(15) == 0
    server.start()
    assert server.get(paths[0]) == NEW and server.get("/in-hand") == OLD and system.is_clean()


@pytest.mark.parametrize("trouble", ["clients", "a volume and the index"])
def test_sigterm_ends_a_server_whatever_hangs(system: Cluster, trouble: str) -> None:
    paths = [f"/hung/{len(trouble)}/{number}" for number in range(2)]

    def connect() -> None:
        while True:  # until that is refused
            call(server.port, "GET", "/?health")

    with (
        another(system, constants={"contrib.process.DRAIN_TIME": 1}) as server,
        contextlib.ExitStack() as stack,
    ):
        uploads = [half_sent(system, path, NEW) for path in paths]
        if trouble == "clients":
            for thread in [in_background(connect) for _ in range(8)]:
                stack.callback(thread.join)
        else:
            index = lmdb.open(str(server.db), max_dbs=8, map_size=1 << 40)
            stack.enter_context(stack.enter_context(index).begin(write=True))
            stack.callback(system.volumes[0].thaw)
            system.volumes[0].freeze()
            uploads[1].send(uploads[1].rest)
        assert server.stop() == (0 if trouble == "clients" else -signal.SIGALRM)
    assert [system.server.put(path, OLD) for path in paths] == [201, 201]
    until(system.is_clean)


def test_a_port_or_an_index_in_use_is_left_alone_and_said_to_be_in_use(system: Cluster) -> None:
    server, other = system.server, str(*free_ports(1))
    assert server.put("/in-use", OLD) == 201
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken, index = str(stranger.getsockname()[1]), str(server.db)
        for port, db, named in ((taken, "other", taken), (other, index, index)):
            flags = ["-bind", "127.0.0.1", *server.flags, "-port", port, "-db", db]
            assert named in error_of("server", *flags, folder=system.folder)
    assert [server.get("/in-use") for _ in range(20)] == [OLD] * 20


def test_a_socket_that_is_for_another_process_is_not_taken(system: Cluster) -> None:
    server = system.server
    assert server.stop() == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        script = f'export LISTEN_PID=1 LISTEN_FDS=1; exec "$@" 3<&{fd}'
        with server.log.open("ab") as log:
            command = ["bash", "-c", script, "bash", *server.command()]
            server.process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[fd])
        until(server.alive)  # on -port


# --- histories ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """A call on a key. `value`: what was to be written, or was read (None: absent)."""

    method: str  # REPLACE: a PUT with If-Match
    start: float
    end: float
    status: int | None  # None: the connection broke, it may have happened or not
    value: str | None = None
    expected: str = ""  # of REPLACE: the value before, if not any


def effects(it: Call, before: str | None) -> set[str | None]:
    """What a key may be after a call, if it was `before`; empty: the answer cannot be."""
    if it.method == "GET":
        return {before} if it.value == before else set()
    legal = (before is None) == (it.method == "PUT") and it.expected in ("", before)
    after = it.value if legal else before
    if it.status is None:
        return {before, after}
    return {after} if legal == (it.status in (201, 204)) else set()


def is_linearizable(history: list[Call]) -> bool:
    """Whether there is an order of the calls on one key, each at some moment between its start and
    its end, in which a register that is absent at first would have given the same answers.

    A search over (calls done, value) after Wing and Gong, each visited once. A call may be next if
    no other one that is left ended before it started. One that was answered and changes nothing is
    taken at once: that never spoils anything.
    """
    calls = sorted(history, key=lambda it: it.start)
    todo, seen = [(0, None)], set()
    while todo:
        done, value = state = todo.pop()
        if done + 1 == 1 << len(calls):
            return True
        steps, limit = [], math.inf if state not in seen else -math.inf
        seen.add(state)
        for number in range((~done & (done + 1)).bit_length() - 1, len(calls)):
            it = calls[number]
            if it.start > limit:
                break
            if not done >> number & 1:
                limit = min(limit, it.end)
                after = effects(it, value)
                found = [(done | 1 << number, each) for each in after]
                if after == {value} and it.status:
                    steps = found
                    break
                steps += found
        todo += steps
    return False


WRITTEN = Call("PUT", 0, 1, 201, "a")
REPLACED = Call("REPLACE", 2, 3, 201, "b", "a")
STORIES = [  # can it be?
    (True, [WRITTEN, Call("GET", 0, 1, 404), Call("PUT", 0, 2, 403, "b"), REPLACED]),
    (True, [Call("PUT", 0, 9, None, "b"), Call("GET", 1, 2, 404), Call("GET", 3, 4, 302, "b")]),
    (False, [WRITTEN, Call("DELETE", 2, 3, 204), Call("GET", 4, 5, 302, "a")]),  # a stale read
    (False, [WRITTEN, Call("GET", 2, 3, 404)]),  # a lost write
    (False, [WRITTEN, REPLACED, Call("REPLACE", 2, 3, 201, "c", "a")]),
]


@pytest.mark.parametrize(("can_be", "history"), STORIES)
def test_the_checker_knows_what_can_be(can_be: bool, history: list[Call]) -> None:
    assert is_linearizable(history) == can_be


def is_legal(order: tuple[Call, ...]) -> bool:
    """Whether calls can have happened in this order."""
    values: set[str | None] = {None}
    for number, it in enumerate(order):
        if any(later.end < it.start for later in order[number:]):
            return False
        values = set().union(*(effects(it, value) for value in values))
    return bool(values)


ANSWERS = {"PUT": (201, 403), "GET": (302, 404), "DELETE": (204, 404), "REPLACE": (201, 412)}


def test_the_checker_agrees_with_trying_all_orders() -> None:
    dice, seen = random.Random(1), Counter()
    for _ in range(1000):
        history = []
        for number in range(5):
            method, start = dice.choice([*ANSWERS]), dice.randrange(10)
            value = dice.choice([None, "0", "1", "2"]) if method == "GET" else f"{number}"
            value = None if method == "DELETE" else value
            expected = dice.choice(["", "0", "1"]) if method == "REPLACE" else ""
            status = dice.choice([*ANSWERS[method], None])
            end = start + dice.random() * 9
            history.append(Call(method, start, end, status, value, expected))
        expected = any(is_legal(order) for order in itertools.permutations(history))
        assert is_linearizable(history) == expected, history
        seen[expected] += 1
    assert min(seen[True], seen[False]) > 60


def name_in(body: bytes | None) -> str | None:
    """The name that a value repeats; of a mixture, or of a part, the whole."""
    if body is None:
        return None
    name = body[: body.index(b"-") + 1]
    return (name if name * (len(body) // len(name)) == body else body).decode()


NAMES = itertools.count()


def live(
    server: Server, keys: list[str], methods: list[str], besides: set, enough: threading.Event
) -> list[tuple[str, Call]]:
    """Do what comes to mind with a few keys until it is enough; what was seen of which."""
    calls, seen = [], {}  # of a key: name and tag of the last value
    while not enough.is_set():
        key, method, reply, status = random.choice(keys), random.choice(methods), None, None
        verb, value, body, fields, expected = method, None, None, {}, ""
        if method in ("PUT", "REPLACE"):
            verb, value = "PUT", f"{next(NAMES)}-"
            body = (value * random.choice([1, 1000, 50_000])).encode()
        if method == "REPLACE":
            expected, match = random.choice([("", "*"), seen.get(key, ("", "*"))])
            fields = {"If_Match": match}
        start = time.monotonic()
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server was killed
            reply = server.call(verb, key, body, **fields)
            status = reply.status
        end = time.monotonic()
        assert status in {*ANSWERS[method], *besides}, (method, key, reply)
        if status == 302:
            found = follow(reply, 2)
            if not found or found.status != 200:
                assert 302 in besides, (key, reply, found)
                continue  # one would ask again, which is another call
            value, body, end = name_in(found.body), found.body, time.monotonic()
        if status in (201, 302):
            seen[key] = value, tag(body)
        if status in ANSWERS[method] or (status is None and verb != "GET"):
            calls.append((key, Call(method, start, end, status, value, expected)))
    return calls


def fall_ill(fleet: Cluster) -> None:
    ailment, volume = random.choice(["dead", "frozen"]), random.choice(fleet.volumes[:2])
    cure = ail(ailment, volume, lambda *_: None)
    time.sleep(random.random() * 1.5)  # what happens, happens at any time
    cure()


def be_killed(fleet: Cluster) -> None:
    time.sleep(random.random() / 2)
    restart(fleet)


def hand_over(fleet: Cluster) -> None:
    time.sleep(0.5)
    assert fleet.server.stop() == 0
    fleet.server.start()


ALL, ILL = "PUT GET GET DELETE REPLACE", "-voltimeout 100ms -settle 5s"
FIRES = {  # what happens, how often, flags, methods; what may be answered besides: 302 is in vain
    "kill -9 and ill volumes": ([fall_ill, be_killed], 10, ILL, ALL, {None, 302, 409, 503}),
    "kill -9": ([be_killed], 6, "-replicas 2", ALL, {None, 302, 409}),
    "one of two volumes is ill": ([fall_ill], 3, "-replicas 2", ALL, {302, 409}),
    "servers share a socket": ([hand_over], 3, "-grace 1m", "PUT GET REPLACE", {409}),
}


@with_spare
@pytest.mark.parametrize("fire", FIRES)
def test_histories_under_fire_are_linearizable(fleet: Cluster, fire: str) -> None:
    events, count, flags, methods, besides = FIRES[fire]
    keys = [f"/{fire}/{number}".replace(" ", "_") for number in range(4)]
    enough, how = threading.Event(), methods.split()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        port = listener.getsockname()[1]
        with (
            another(fleet, *flags.split(), port=port, listener=listener) as server,
            ThreadPoolExecutor(10) as pool,
        ):
            futures = [pool.submit(live, server, keys, how, besides, enough) for _ in range(10)]
            try:
                for _ in range(count):
                    random.choice(events)(fleet)
            finally:
                enough.set()
            calls = list(itertools.chain(*(future.result() for future in futures)))
            for key in keys:
                start, now = time.monotonic(), name_in(read(server, key))
                calls.append((key, Call("GET", start, math.inf, 302, now)))
    for key in keys:
        history = [it for its_key, it in calls if its_key == key]
        assert is_linearizable(history), (key, sorted(history, key=lambda it: it.start))
    answers = {status for method in how for status in ANSWERS[method]}
    assert {it.status for _, it in calls} >= answers | ({None} & besides)
    until(fleet.is_clean, 60)


# --- readers that do not read ---------------------------------------------------------------------

LIST = request("GET", "/?list", b"", CLOSE)
ASKED = 'mkv_requests_total{method="GET",status="302"}'


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a long list, that can hand the kernel little ahead of who does not read."""
    folder = tmp_path_factory.mktemp("narrow")
    plant(folder / "index", [(b"/%06d" % n + b"x" * 400, b"127.0.0.1:1") for n in range(3000)])
    flags = "-volumes", "127.0.0.1:1", "-replicas", "1", "-fallback", "127.0.0.1:1"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)  # connections inherit it
        port, limits = listener.getsockname()[1], {"IDLE_TIME": 3, "LINGER_TIME": 0.5}
        server = Server(folder / "index", port, *flags, constants=limits, listener=listener)
        yield server
        server.kill()


def ask_in_silence(server: Server, wire: socket.socket, length: int, most: int = 99) -> int:
    """Ask for missing keys, one after the other, until no answer finds room: how many."""
    question = request("GET", "/" + quote("é" * length))  # whose answer is as long
    asked = server.metric(ASKED)
    with contextlib.suppress(AssertionError):
        for count in range(1, most + 1):
            wire.sendall(question)
            until(lambda count=count: server.metric(ASKED) == asked + count, 0.5)
    assert count < 99
    return count


def read_all(wire: socket.socket) -> bytes:
    """To the end of a connection."""
    wire.settimeout(30)
    return b"".join(iter(lambda: wire.recv(1 << 20), b""))


@pytest.mark.parametrize("length", [160, 250])  # what is short is answered where it comes
@pytest.mark.parametrize("then", ["closes one side", "the server ends", "pauses"])
def test_who_reads_late_gets_every_answer_whole(narrow: Server, then: str, length: int) -> None:
    with contextlib.ExitStack() as stack:
        readers = [quiet_reader(narrow.port, 2048) for _ in range(3)]
        asker, idler, lister = map(stack.enter_context, readers)
        count = ask_in_silence(narrow, asker, length)
        ask_in_silence(narrow, idler, length, count - 2)  # the last one is not all sent, if short
        lister.sendall(LIST)
        listed = lister.recv(1000)
        if then == "closes one side":
            for reader in readers:
                reader.shutdown(socket.SHUT_WR)
        elif then == "the server ends":
            narrow.process.send_signal(signal.SIGTERM)
        else:
            for reader in (asker, idler):
                reader.sendall(request("GET", "/?health", b"", CLOSE))
        holds(narrow.running, 1.2)  # an idle connection would have a second
        listed += read_all(lister)
        answers = [read_all(reader) for reader in (asker, idler)]
    if then == "the server ends":
        assert narrow.process.wait(20) == 0
        narrow.start()
    for number, text in zip((count, count - 2), answers, strict=True):
        assert statuses(text) == [302] * number + [200] * (then == "pauses")
        assert then == "pauses" or text.endswith(b"\r\n\r\n")
    assert len(json.loads(listed.partition(b"\r\n\r\n")[2])["keys"]) == 3000


def test_who_asks_and_asks_and_never_reads_is_not_listened_to(narrow: Server) -> None:
    memory, old = narrow.memory(), request("GET", "/?list").replace(b"1.1", b"1.0")
    with contextlib.ExitStack() as stack:
        missing, *lists = [stack.enter_context(quiet_reader(narrow.port)) for _ in range(3)]
        for wire, question in zip(lists, (LIST, old), strict=True):
            wire.sendall(question)
        missing.settimeout(20)
        with pytest.raises(OSError):
            missing.sendall(request("GET", "/missing") * 400_000)
        assert narrow.call("GET", "/?health").status == 200
        until(lambda: narrow.metric("mkv_connections") == 1)
        assert narrow.memory() - memory < 16_000_000
        for wire in lists:  # what is broken off does not look whole
            answer = b""
            with contextlib.suppress(ConnectionError):
                answer = read_all(wire)
            assert statuses(answer) in ([], [200]) and not answer.endswith((b"}\n", b"0\r\n\r\n"))
