"""Placement, record, operations, index and intents: what is known of files, and how it is kept."""

import fcntl

# ruff: noqa: F403, F405
from harness import *

from contrib.conditions import Match, Unchanged

# --- placement and record -------------------------------------------------------------------------

LONG = b"/" + b"k" * 510  # the longest key
NAME = base64.b64encode(LONG).decode()
PATHS = {  # by key and write id
    (b"hello", ""): "/5d/41/aGVsbG8=",  # minikeyvalue's
    (b"helloworld", ""): "/fc/5e/aGVsbG93b3JsZA==",
    (b"hello", WRITE_ID): f"/5d/41/aGVsbG8=-{WRITE_ID}",
    ("/photos/été".encode(), WRITE_ID): f"/25/25/L3Bob3Rvcy/DqXTDqQ==-{WRITE_ID}",
    (LONG, ""): f"/34/a7/{NAME}",
    (LONG, WRITE_ID): f"/34/a7/{NAME[:230]}-/{NAME[230:460]}-/{NAME[460:]}-{WRITE_ID}",
}


@pytest.mark.parametrize(("key", "write_id"), PATHS)
def test_a_file_has_this_path(key: bytes, write_id: str) -> None:
    assert mkv.key2path(key, write_id) == PATHS[key, write_id]


def test_the_path_of_any_key_leads_back_to_it_and_fits_file_systems() -> None:
    chance = random.Random(1)
    keys = [random_key(chance) for _ in range(3000)]
    keys += [b"/" + b"k" * size for size in range(1, 511)]  # names end where pieces do
    keys += [b"/" + b"k" * 30 + "ÿÿ".encode() + b"k" * size for size in range(160, 180)]
    for key in keys:
        path = mkv.key2path(key, WRITE_ID)
        assert mkv.path2key(path) == (key, WRITE_ID)
        assert mkv.path2key(mkv.key2path(key)) == (key, "")
        pieces = path[1:].split("/")
        assert all(0 < len(piece) <= 255 and not piece.startswith(".") for piece in pieces), key


def test_paths_that_no_key_has_are_refused() -> None:
    good, long = mkv.key2path(b"/hello"), mkv.key2path(LONG, WRITE_ID)
    top, name = good[:7], good[7:]
    ends = f"- / = \n -x -{WRITE_ID[1:]} -{WRITE_ID}0 -{WRITE_ID.upper()} -{WRITE_ID}-{WRITE_ID}"
    paths = [good + end for end in ends.split(" ")]
    paths += [
        "",
        "/",
        top,
        good[1:],
        good.upper(),
        "/00/00/" + name,
        f"{top}/{name}",
        "/sv0A" + good,
    ]
    paths += [top + odd for odd in (name[:-1], f" {name}", f"-/{name}", "é", "..", "../" + name)]
    paths += [long.replace("-/", cut) for cut in ("", "/", "-", "-//")]
    paths += [mkv.key2path(key) for key in (b"", b"/", b"hello", b"/\xff", LONG + b"k")]
    for path in paths:
        with pytest.raises(ValueError):
            mkv.path2key(path)


def test_the_ranking_is_by_md5_of_key_and_volume() -> None:
    vectors = {b"hello": "larry", b"helloworld": "curly", b"world": "moe", b"blah": "curly"}
    for key, volume in vectors.items():  # minikeyvalue's
        assert mkv.key2volume(key, ["larry", "moe", "curly"], 1, 1) == [volume]
    volumes = [f"volume{number}:3001" for number in range(7)]
    for key in (b"/%d" % number for number in range(100)):
        scores = {volume: hashlib.md5(key + volume.encode()).digest() for volume in volumes}
        order = sorted(volumes, key=scores.__getitem__, reverse=True)
        places = [f"{v}/sv{int.from_bytes(scores[v][12:16], 'big') % 256:02X}" for v in order]
        assert mkv.key2volume(key, volumes, 3, 256) == places[:3]
        assert mkv.key2volume(key, volumes[::-1], 7, 256) == places


OTHER_ID, MD5 = "6b0108917bf79949", hashlib.md5(b"value").hexdigest()
PLACES = "larry/sv00", "moe/sv0A"
OLD, NEW, OTHER = ([mkv.Replica(place, i) for place in PLACES] for i in ("", WRITE_ID, OTHER_ID))
RECORDS = {
    "larry/sv00,moe/sv0A": mkv.Record((*OLD,)),  # minikeyvalue's
    f"DELETEDHASH{MD5}larry/sv00,moe/sv0A": mkv.Record((*OLD,), hash=MD5, deleted=True),
    f"larry/sv00@{OTHER_ID},moe/sv0A": mkv.Record((OTHER[0], OLD[1])),  # after rebalance
    f"HASH{MD5}larry/sv00,moe/sv0A 5 {WRITE_ID}": mkv.Record((*NEW,), 5, WRITE_ID, MD5),
    f"DELETEDlarry/sv00@{OTHER_ID},moe/sv0A 5 {WRITE_ID}": mkv.Record(
        (OTHER[0], NEW[1]), 5, WRITE_ID, deleted=True
    ),
}


@pytest.mark.parametrize("text", RECORDS)
def test_a_record_has_a_text_and_back(text: str) -> None:
    assert RECORDS[text].text() == text.encode()
    assert mkv.parse_record(text.encode()) == RECORDS[text]


# --- operations -----------------------------------------------------------------------------------

SETTLE, GRACE = 100, 10  # seconds
EMPTY = mkv.Record()


class World:
    """Servers, volumes and an index as dicts: the operations are mkv's, all else is chance.

    What servers do is cut into steps: between any two, others have their turn, or kill -9 comes.
    What is sent to a volume takes effect at once, or later, or never.
    """

    KEYS = (b"/a", b"/b", b"/c")
    PLACES = ("v0", "v1", "v2", "v3/sv00", "v3/sv01")

    def __init__(self, seed: int) -> None:
        self.chance, self.now = random.Random(seed), 1e9
        self.rows = dict.fromkeys(self.KEYS, mkv.Row(EMPTY, {}, 0))
        self.files = set()  # on volumes: (key, replica)
        self.flying = {}  # requests: until when they may strike
        self.values = {}  # acknowledged and not deleted: the time of the write
        self.intents = [{}, {}, {}]  # of servers, by key: files; they outlive kill -9
        self.actors = [[], [], []]  # what servers are doing
        self.happened = Counter()

    def do(self, operation: Callable, key: bytes, *args: Any) -> Any:
        """One operation, as an index runs it."""
        row = self.rows[key]._replace(now=self.now)
        before, name = (row.record, dict(row.garbage)), operation.__name__
        try:
            new, answer = operation(row, *args)
        except mkv.HTTPError as error:
            name += f" {error.status}"
            raise
        finally:
            self.happened[name] += 1
            assert before == (row.record, row.garbage), "the old row stays as it was"
        assert operation(row, *args) == (new, answer), "it depends on nothing else"
        since = {file: row.garbage.get(file, self.now) for file in new.garbage}
        assert new.garbage == since, "garbage is dated by the clock of the index"
        self.rows[key] = new
        return answer

    def delete(self, key: bytes, files: Iterable[mkv.Replica], *proof: int) -> Iterator[None]:
        """DELETE files, and strike out those whose answer is a proof. Some are not answered."""
        gone = []
        for file in files:
            status = 204 if (key, file) in self.files else 404
            if self.chance.random() < 0.2:
                self.flying["DELETE", (key, file)] = self.now + SETTLE
                continue
            self.files.discard((key, file))
            gone += [file] if status in proof else []
            yield
        self.do(mkv.Row.settle, key, gone)

    def writing(self, me: int, key: bytes) -> Iterator[None]:
        """PUT, also with If-Match, and REBALANCE, which keeps a file or none."""
        intents, row = self.intents[me], self.rows[key]
        old, kind = row.record, self.chance.choice(("put", "put", "replace", "move", "anew"))
        is_move = kind in ("move", "anew")
        if key in intents or (is_move and not old.replicas):
            return
        seconds = max(int(self.now), row.newest() + 1)
        seconds = mkv.written(old.write_id) if kind == "move" else seconds
        write_id = f"{seconds:08x}{self.chance.getrandbits(32):08x}"
        files = intents[key] = []
        for place in self.chance.sample(self.PLACES, self.chance.choice((2, 2, 3))):
            files.append(mkv.Replica(place, write_id))
            yield
            self.flying["PUT", (key, files[-1])] = self.now + SETTLE
            yield
        for _ in range(self.chance.randrange(6)):
            yield
        made = [file for file in files if (key, file) in self.files]
        keep = old.replicas[:1] if kind == "move" else ()
        if made and self.chance.random() < 0.8:
            new = mkv.Record((*keep, *made), 5, write_id, "", old.deleted and is_move)
            match = Match(("*",)) if kind == "replace" else mkv.Condition()
            condition, before = Unchanged(old) if is_move else match, self.rows[key]
            with contextlib.suppress(mkv.HTTPError):
                self.do(mkv.Row.commit, key, new, condition, set(files) - set(made))
                free = {"put": not before.record.live, "replace": before.record.live}
                assert free.get(kind, before.record == old), kind
                assert kind == "move" or seconds > before.newest(), "it is later than all"
                self.happened[kind] += 1
                self.values[key] = write_id[:8]
                yield
                del intents[key]
                return
        yield
        yield from self.wasting(me, key)

    def wasting(self, me: int, key: bytes) -> Iterator[None]:
        """What becomes of a write that failed, or was broken off: 404 is no proof for its files."""
        files, _ = self.do(mkv.Row.waste, key, self.intents[me][key])
        yield
        del self.intents[me][key]
        yield from self.delete(key, files, 204)

    def starting(self, me: int) -> Iterator[None]:
        """After kill -9: nothing is begun before what was broken off is wasted."""
        for key in list(self.intents[me]):
            yield from self.wasting(me, key)

    def deleting(self, _: int, key: bytes) -> Iterator[None]:
        """DELETE: these files were answered for, so that 404 is proof."""
        with contextlib.suppress(mkv.HTTPError):
            protect = self.chance.random() < 0.3
            old = self.do(mkv.Row.remove, key, protect)
            assert old.deleted or not protect
            del self.values[key]
            yield from self.delete(key, old.replicas, 204, 404)

    def unlinking(self, _: int, key: bytes) -> Iterator[None]:
        """UNLINK."""
        with contextlib.suppress(mkv.HTTPError):
            self.do(mkv.Row.unlink, key)
            assert not self.rows[key].record.live
        yield

    def sweeping(self, _: int, key: bytes) -> Iterator[None]:
        """The sweeper: 404 is proof for what has been garbage for long."""
        ages = {file: self.now - since for file, since in self.rows[key].garbage.items()}
        yield from self.delete(key, [file for file in ages if ages[file] > SETTLE], 204, 404)
        yield from self.delete(key, [file for file in ages if GRACE < ages[file] <= SETTLE], 204)

    def step(self) -> None:
        """Something happens somewhere."""
        self.now += self.chance.choice((0, 0, 0, 0.3, 1, 7))
        self.flying = {what: end for what, end in self.flying.items() if end > self.now}
        me = self.chance.randrange(3)
        actors = self.actors[me]
        if self.flying and self.chance.random() < 0.4:
            what, file = self.chance.choice(list(self.flying))
            del self.flying[what, file]
            self.files.discard(file)
            self.files |= {file} if what == "PUT" else set()
        elif self.chance.random() < 0.01:
            self.actors[me] = [self.starting(me)]
            self.happened["kill"] += bool(self.intents[me])
        elif len(actors) < 3 and not any(each.__name__ == "starting" for each in actors):
            works = [self.writing] * 5 + [self.deleting, self.unlinking, self.sweeping]
            actors.append(self.chance.choice(works)(me, self.chance.choice(self.KEYS)))
        else:
            actor = self.chance.choice(actors)
            if next(actor, self) is self:
                actors.remove(actor)

    def check(self) -> None:
        """What must hold after every step."""
        records = {key: row.record for key, row in self.rows.items() if row.record.replicas}
        named = {(key, file) for key, record in records.items() for file in record.replicas}
        listed = {(key, file) for key, row in self.rows.items() for file in row.garbage}
        intents = [item for server in self.intents for item in server.items()]
        intended = {(key, file) for key, files in intents for file in files}
        may_be = self.files | {file for what, file in self.flying if what == "PUT"}
        assert may_be <= named | listed | intended, "a file is named, garbage, or intended"
        assert named <= self.files, "what is named is there"
        assert not named & listed, "what is named is not garbage"
        assert set(records) == set(self.values), "what is acknowledged is there, and nothing else"
        for key, record in records.items():
            assert {file.write_id[:8] for file in record.replicas} == {self.values[key]}


@pytest.mark.parametrize("seed", range(4))
def test_every_file_is_named_or_listed_or_intended_whatever_happens(seed: int) -> None:
    world = World(seed)
    for _ in range(60_000):
        world.step()
        world.check()
    assert len(world.happened) == 16 and min(world.happened.values()) > 5, world.happened
    for me in range(3):  # all rest
        list(world.starting(me))
    world.flying, world.now = {}, world.now + 2 * SETTLE
    for key in world.KEYS * 50:
        list(world.sweeping(0, key))
    world.flying = {}
    world.check()
    assert not any(row.garbage for row in world.rows.values()), "and nothing else is left"


@pytest.mark.asyncio
async def test_no_job_of_a_group_is_left_behind_at_whatever_moment_it_comes() -> None:
    async def work(jobs: list[tuple[int]]) -> list[int]:
        for _ in range(jobs[0][0] % 3):
            await asyncio.sleep(0)
        return [number for (number,) in jobs]

    group = mkv.Group(work)
    async with asyncio.timeout(20):
        for number in range(500):
            future = group.do(number)
            for _ in range(number % 7):
                await asyncio.sleep(0)
            assert (await group.do(number + 1), await future) == (number + 1, number)


@pytest.mark.asyncio
async def test_a_group_has_as_many_batches_at_a_time_after_a_crowd_as_before() -> None:
    async def work(jobs: list[tuple[bool]]) -> list[None]:
        if jobs[0][0]:
            await asyncio.Event().wait()  # for ever: it holds up its own batch
        return [None] * len(jobs)

    async def client() -> None:
        for _ in range(100):
            await group.do(False)

    group = mkv.Group(work, 2)
    async with asyncio.timeout(20):
        await asyncio.gather(*[client() for _ in range(50)])
        group.do(True)
        await asyncio.sleep(0)  # its batch has begun
        await group.do(False)


def test_operations_that_come_together_share_a_commit_and_are_done_in_turn(system: Cluster) -> None:
    server, paths = system.server, [f"/group{number}" for number in range(20)]
    assert {server.put(path, b"value") for path in paths} == {201}
    before, wires = server.metric("mkv_commits_total"), [Wire(server.port) for _ in paths * 2]
    with frozen(server.process.pid):
        for wire, path in zip(wires, paths * 2, strict=True):
            wire.send(request("UNLINK", path))
    counted = Counter(wire.answer().status for wire in wires)
    assert counted == {204: 20, 404: 20}  # the second of a key is too late
    assert 1 <= server.metric("mkv_commits_total") - before <= 10
    assert not system.garbage() and not any(map(server.get, paths))


# --- durability, as the kernel sees it ------------------------------------------------------------


def trace(server: Server, file: Path) -> subprocess.Popen:
    """System calls of a server go to a file, until terminate(). Skips where none may see them."""
    needs("strace")
    calls = "trace=read,write,writev,pwrite64,pwritev,sendto,sendmsg,fsync,fdatasync"
    command = ["strace", "-f", "-yy", "-s", "99999", "-e", calls, "-o", file, "-p"]
    pipe = subprocess.PIPE
    tracer = subprocess.Popen([*command, str(server.process.pid)], stderr=pipe, text=True)
    said = tracer.stderr.readline()
    if "attached" not in said:
        pytest.skip(f"strace may not trace: {said}")
    return tracer


@dataclasses.dataclass
class Call:
    """A system call: its text, and the lines of the trace on which it began and ended."""

    text: str
    began: int
    ended: int


def parse_trace(file: Path) -> list[Call]:
    """In the order in which they began."""
    calls, current = [], {}
    for number, line in enumerate(file.read_text().splitlines()):
        thread, text = line.split(maxsplit=1)
        if not text.startswith("<... "):
            current[thread] = Call("", number, number)
            calls.append(current[thread])
        current[thread].text += text
        current[thread].ended = number
    return calls


def durable(server: Server, file: Path) -> list[str]:
    """The descriptors of a file to which a write is on disk when it returns."""
    folder, found = Path(f"/proc/{server.process.pid}/fd"), []
    for fd in [fd for fd in folder.iterdir() if fd.resolve() == file]:
        flags = folder.with_name("fdinfo").joinpath(fd.name).read_text().split()[3]
        found += [fd.name] if int(flags, 8) & os.O_DSYNC else []
    return found


def test_no_answer_comes_before_its_fdatasync_and_no_byte_before_its_intent(cluster: Make) -> None:
    system = cluster("-voltimeout", "5s", volumes=4)
    server, file = system.server, system.folder / "trace"
    block(drive_at(system, ideal(system, "/3.")[0]))  # there will be a stand-in
    tracer = trace(server, file)

    def work(path: str) -> list[int]:
        client = Client(server.port)
        return [client.call(verb, path, body).status for verb, body in verbs]

    verbs = (("PUT", b"value"), ("UNLINK", None), ("PUT", b"new"), ("DELETE", None))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, [f"/{n}." for n in range(16)])) == [[201, 204, 201, 204]] * 16
    meta = "|".join(durable(server, system.folder / "index/data.mdb"))
    tracer.terminate()
    tracer.communicate(timeout=20)
    calls, asked, counted = parse_trace(file), {}, Counter()

    def after(line: int, text: str) -> float:
        """The line where the first system call like that has ended, which began after another."""
        found = (call.ended for call in calls if call.began > line and re.match(text, call.text))
        return next(found, math.inf)

    for call in calls:
        client = rf"\w+\(\d+<TCP:\[\S+:{server.port}->(\S+)\]>.*?"
        if found := re.match(rf'{client}"(?:PUT|UNLINK|DELETE) (\S+) HTTP', call.text):
            asked[found[1]] = call.ended, re.escape(found[2])
        elif found := re.match(rf'{client}"HTTP/1.1 20[14]', call.text):
            line, path = asked[found[1]]
            line = after(line, rf"p?write.*/data.mdb>.*{path}")
            line = after(line, r"f(data)?sync\(.*/data.mdb>.*\) += 0")
            assert after(line, rf"pwrite64\(({meta})<.*/data.mdb>") < call.began, call
            counted["answers"] += 1
        elif found := re.match(r'\w+\(\d+<TCP:\S+->(\S+)\]>.*?"PUT (/sv..)(\S+) HTTP', call.text):
            place, path = found[1] + found[2], re.escape(found[3])
            assert after(-1, rf"write\(.*/intents>.*\+ {path} \S*{place}\b") < call.began, call
            counted["uploads"] += 1
    assert counted["answers"] == 64 and counted["uploads"] > 96


# --- the index and its disk -----------------------------------------------------------------------


def anew(system: Cluster, **rows: Iterable[tuple[bytes, bytes]]) -> Server:
    """The server anew, after rows were put into the tables of its index."""
    assert system.server.stop() == 0
    plant(system.folder / "index", **rows)
    system.server.start()
    return system.server


def test_a_folder_has_one_process_also_of_a_first_edition(system: Cluster) -> None:
    index, (port,) = system.folder / "index", free_ports(1)
    start = ("server", "-volumes", system.names(), "-db", index, "-port", str(port))
    said = error_of(*start, folder=system.folder)
    assert "index" in said and str(system.server.port) in said
    with (index / "alive").open("a+") as file:  # a first edition locks a byte of its own
        lock = functools.partial(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 << 56)
        with pytest.raises(BlockingIOError):
            lock()
        system.server.stop()
        lock()
        assert "index" in error_of(*start, folder=system.folder)
    system.server.start()


def test_the_index_of_a_first_edition_is_taken_over(cluster: Make) -> None:
    system = cluster("-grace", "1h", "-replicas", "1", subvolumes=1)
    server, index, owner = system.server, system.folder / "index", "0123456789abcd.fedcba9876543210"
    assert server.put("/kept", b"value") == 201
    server.stop()
    kept = stored(index)[0][b"/kept"]
    place = kept.replicas[0].location
    shutil.rmtree(index)
    old, lost = mkv.Replica(place, ""), mkv.Replica(place, WRITE_ID)
    plant(index, [(b"/kept", kept.text()), (b"/old", f"DELETED{place}".encode())])
    journal = {
        b"/garbage": f" 1600000000.5 {place}@{WRITE_ID},{place}",
        b"/claimed": f"{owner} 0.0 {place}@{WRITE_ID}",
        b"/kept": f"{owner} 0.0 {place}@{kept.write_id},{place}@{WRITE_ID}",
        b"/unreadable": "nonsense",
    }
    with lmdb.open(str(index), max_dbs=3, map_size=1 << 40) as env:
        with env.begin(env.open_db(b"journal"), write=True) as txn:
            for key, entry in journal.items():
                txn.put(key, entry.encode())
    server.start()
    records = {b"/kept": kept, b"/old": mkv.Record((old,), deleted=True)}
    garbage = {b"/garbage": {old, lost}, b"/claimed": {lost}, b"/kept": {lost}}
    assert system.tables() == (records, garbage)
    server.stop()
    system.start(server.port)  # once is enough; and with the usual grace
    assert server.call("DELETE", "/old").status == 204
    until(system.is_clean)
    assert server.get("/kept") == b"value"


@pytest.mark.parametrize("kind", ["a copied folder", "a snapshot", "another index"])
def test_a_copy_of_the_index_wastes_nothing_that_was_in_hand(system: Cluster, kind: str) -> None:
    server, index, copy = system.server, system.folder / "index", system.folder / kind
    path = "/" + kind.replace(" ", "-")
    assert server.put(f"{path}/old", b"value") == 201
    upload = Upload(server.port, path, 100)
    upload.send(b"not all")
    until(lambda: system.open_intents() == 1)
    if kind == "a copied folder":
        with frozen(server.process.pid):
            shutil.copytree(index, copy)
    else:
        copy.mkdir()
    if kind == "a snapshot":
        copy.joinpath("data.mdb").write_bytes(server.call("GET", "/?snapshot").body)
    if kind == "another index":
        copy.joinpath("intents").hardlink_to(index / "intents")
    upload.send(bytes(93))
    assert upload.answer() == 201
    files, before, now = system.files(), server.log.read_text(), ("-grace", "0", "-settle", "0")
    other = system.start(*free_ports(1), *now, db=copy)
    assert ("another life" in server.log.read_text()[len(before) :]) == (kind != "a snapshot")
    assert other.get(f"{path}/old") == (None if kind == "another index" else b"value")
    holds(lambda: system.files() == files and not other.garbage(), 1)
    other.kill()
    assert server.get(path) == b"not all" + bytes(93)


@pytest.mark.parametrize("end", [0, signal.SIGTERM, signal.SIGKILL])
def test_a_full_disk_under_the_index_is_503_and_loses_nothing(
    cluster: Make, mounts: Callable, end: int
) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    server, index, paths = system.server, system.folder / "index", []
    server.stop()
    mounts(index, "-t", "tmpfs", "-o", "size=300k", "none")
    server.start()
    path, status = "/full", 201
    while status == 201:
        paths.append(path)
        path = f"/{len(paths)}".ljust(400, "x")
        status = server.put(path, b"value")
    assert status == 503 and len(paths) > 20
    assert server.get(paths[-1]) == b"value" and server.get(path) is None
    if end:
        assert server.stop(end) == (0 if end == signal.SIGTERM else -end)
    shell("mount", "-o", "remount,size=16m", str(index))
    if end:
        server.start()
    until(lambda: server.put(path, b"value") == 201)
    assert all(server.get(path) == b"value" for path in paths[1:])
    until(system.is_clean)


READER = """
import lmdb, sys
with lmdb.open(sys.argv[1], readonly=True, max_dbs=2, map_size=1 << 40).begin() as txn:
    print("reading", flush=True)
    sys.stdin.read()
"""


def test_a_killed_reader_does_not_let_the_index_grow_for_ever(system: Cluster) -> None:
    client, index = Client(system.server.port), system.folder / "index"

    def growth() -> int:
        """Bytes by which the file grows with so many commits."""
        before = (index / "data.mdb").stat().st_size
        for _ in range(200):
            assert client.call("GET", "/?ready").status == 200
        return (index / "data.mdb").stat().st_size - before

    growth()
    pipe, command = subprocess.PIPE, [sys.executable, "-c", READER, index]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as reader:
        assert reader.stdout.readline() == b"reading\n"
        pinned = growth()
        reader.kill()
    assert pinned > 500_000, "a reader that lives pins pages"
    growth()  # within which it is noticed
    assert growth() < pinned / 4


# --- what the index should not have ---------------------------------------------------------------


def test_what_a_clock_that_was_ahead_has_left_does_no_harm(system: Cluster) -> None:
    place, ahead = f"{system.volumes[0].name}/sv00", time.time() + 366 * 86400
    year, last = f"{int(ahead):08x}00000000", "ffffffff00000000"  # than which none is later
    server = anew(
        system,
        keys=[(b"/k", f"{place} 3 {year}".encode()), (b"/last", f"{place} 3 {last}".encode())],
        garbage=[(b"/new", garbage_row([mkv.Replica(place, WRITE_ID)], ahead))],
    )
    puts = [server.call("PUT", path, b"new", If_Match="*").status for path in ("/k", "/last")]
    assert puts == [201, 503] and system.records()[b"/k"].write_id > year
    assert server.call("DELETE", "/k").status == server.call("DELETE", "/last").status == 204
    assert server.put("/k", b"newer") == 201
    until(lambda: server.put("/last", b"value") == 201)
    until(system.is_clean)


def command(system: Cluster, name: str) -> tuple[int, set[str]]:
    """The exit status of a rebuild or rebalance, and the keys that it speaks of."""
    words = [HERE / "mkv.py", name, "-volumes", system.names(), "-db", system.folder / "index"]
    ended = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, timeout=60)
    return ended.returncode, {json.loads(line)["key"] for line in ended.stdout.splitlines()}


def test_a_row_that_cannot_be_read_is_reported_and_passed_over(system: Cluster) -> None:
    server, bad = system.server, b"\xff\0 no record HASHx"
    assert server.put("/a", b"value") == server.put("/z", b"value") == 201
    texts = {"/bad": bad, "/b": b"1.5 x", "/big": b"v:1 " + b"9" * 5000, "/cut": b"v:1\r\nX:1"}
    keys = [(path.encode(), text) for path, text in texts.items()]
    anew(system, keys=keys, garbage=[(b"/a", bad), (b"/c", b"1.5 x")])
    for names in (listed(server, "/?list")[0], [item["key"] for item in server.pages("/?list")]):
        assert {"/a", "/z"} <= set(names)
    until(lambda: server.log.read_text().count("cannot be read") >= 2)
    assert command(system, "rebalance") == (1, set(texts))
    for path in texts:
        assert server.call("GET", path).status == server.put(path, b"x") == 500
        assert server.call("DELETE", path).status == 204
        assert server.put(path, b"x") == 201
    assert server.call("DELETE", "/a").status == 204
    until(system.is_clean)  # swept as ever
    assert server.stop() == 0
    plant(system.folder / "index", [(b"/z", bad)])
    assert command(system, "rebuild") == (1, {"/z"})
    server.start()
    assert server.call("DELETE", "/z").status == 204  # what helps
    assert server.stop() == 0
    assert command(system, "rebuild") == (0, set())
    server.start()
    assert server.get("/z") == b"value"


def test_a_replica_whose_id_is_damaged_is_made_anew(system: Cluster) -> None:
    server = system.server
    assert server.put("/damaged", b"value") == 201
    until(system.is_clean)
    record = system.records()[b"/damaged"]
    whole, text = record.replicas, record.text()
    lost = whole[0].location.encode()
    anew(system, keys=[(b"/damaged", text.replace(lost, lost + b"@600000zz00000000", 1))])
    assert server.call("GET", "/damaged").status == 302  # perhaps to what is not there
    assert command(system, "rebalance") == (0, set())
    assert server.get("/damaged") == b"value"
    assert server.call("DELETE", "/damaged").status == 204
    until(lambda: b"damaged" not in server.call("GET", "/?garbage").body)
    assert server.stop() == 0
    file = Path(f"{drive_at(system, lost.decode())}{whole[0].at(b'/damaged')[1]}")
    assert file.exists()  # nothing names it
    file.unlink()
    server.start()


def test_what_is_from_when_the_clock_was_ahead_is_of_now() -> None:
    file = mkv.Replica("v:1/sv00", WRITE_ID)
    row, _ = mkv.Row(EMPTY, {file: 9000.0}, 5000.0).settle(())
    assert row.garbage == {file: 5000.0}  # only an hour from now on is its 404 a proof


def test_what_cannot_be_read_can_be_deleted_with_protect_too() -> None:
    row = mkv.Row(mkv.parse_record(b"no record here"), {}, 5000.0)
    assert row.record.error and row.remove(True)[0].record == EMPTY


def test_rows_of_many_garbage_files_take_little_memory(tmp_path: Path) -> None:
    (port, dead), rows = free_ports(2), []
    for number in range(500):  # a thousand files each, on a volume that is down
        files = [mkv.Replica(f"127.0.0.1:{dead}", f"{n:08x}00000000") for n in range(999)]
        rows.append((f"/{number}".encode(), garbage_row(files, 1.0 + number)))
    plant(tmp_path / "index", [], rows)
    flags = ("-volumes", f"127.0.0.1:{dead}", "-replicas", "1", "-subvolumes", "1")
    server = Server(tmp_path / "index", port, *flags)
    try:
        assert sum(map(len, server.garbage().values())) == 999 * 500
        assert server.memory() < 200 * MB
    finally:
        server.kill()


def garbage_of(place: str, count: int) -> bytes:
    """So many old files."""
    return garbage_row([mkv.Replica(place, f"{n:08x}00000000") for n in range(count)], 1.0)


def test_the_sweeper_takes_small_portions_and_pauses_and_leaves_young_garbage_alone(
    tmp_path: Path, fakes: Callable[[], Fake]
) -> None:
    fake, gate, lost = fakes(), threading.Event(), []
    replaced: dict[str, float] = {}  # files, and when

    def before(method: str, path: str) -> None:
        if method == "DELETE":
            gate.wait(10)
            if not lost:
                lost.append(path)
                raise ConnectionError("no answer, which proves nothing")

    def replace() -> bool:
        """One more value; whether the file of an earlier one is gone."""
        key = f"/{len(replaced)}"
        assert server.put(key, b"old") == 201
        replaced[list(fake.stored)[-1]] = time.monotonic()
        assert server.call("PUT", key, b"new", If_Match="*").status == 201
        return len(fake.stored) < 2 * len(replaced)

    def asked() -> list[tuple[float, str]]:
        return [(at, path) for at, method, path in fake.log if method == "DELETE"]

    fake.before = before
    plant(tmp_path / "index", [], [(b"/k", garbage_of(fake.name, 300))])
    flags = ["-volumes", fake.name, "-replicas", "1", "-subvolumes", "1", "-grace", "1s"]
    server = Server(tmp_path / "index", *free_ports(1), *flags, "-voltimeout", "5s")
    try:
        until(asked)  # a sweep has begun
        holds(lambda: len(asked()) < 100, 0.3)
        gate.set()
        until(replace, 60)
        until(lambda: len(asked()) >= 301 + len(replaced), 60)
        times, paths = zip(*asked(), strict=True)
        assert paths.count(lost[0]) >= 2
        assert all(times[paths.index(path)] - at > 0.9 for path, at in replaced.items())
        assert max(b - a for a, b in itertools.pairwise(times)) > 1.2, "a fifth of the time"
    finally:
        gate.set()
        server.kill()


def test_garbage_of_a_volume_that_comes_back_is_soon_gone_and_harms_nobody(cluster: Make) -> None:
    system = cluster("-replicas", "2", "-settle", "1h", subvolumes=1)
    server, back = system.server, system.volumes[0]
    back.kill()
    rows = {b"/%d" % n: garbage_of(back.name, 1) for n in range(2000)}
    anew(system, garbage=(rows | {b"/many": garbage_of(back.name, 1000)}).items())
    assert server.put("/many", b"value") == 503, "a thousand are enough"
    holds(lambda: server.metric("mkv_garbage_keys") == 2001, 1)
    back.start()
    client = Client(server.port, timeout=5)

    def use() -> bool:
        """Whether most of it is gone; meanwhile, nobody waits for long."""
        assert client.call("PUT", "/while", b"value").status == 201
        assert client.call("DELETE", "/while").status == 204
        return server.metric("mkv_garbage_keys") < 5

    until(use, 60)
    until(system.is_clean)
    assert server.metric("mkv_swept_files_total") >= 3000
    assert server.put("/many", b"value") == 201


# --- intents --------------------------------------------------------------------------------------

FOREIGN = ["nonsense", "+ nonsense", "+ /aa/bb/x y", "+ /aa/bb/x y z", "-", "\0" * 99]
ADDED = {
    "nothing": "",
    "a line that was cut short": f"+ {mkv.key2path(b'/torn', WRITE_ID)} 127",
    "what is none": "\n".join([*FOREIGN, ""]),
}


@pytest.mark.parametrize("added", ADDED)
def test_what_kill_9_broke_off_goes_and_nothing_else(cluster: Make, added: str) -> None:
    system = cluster("-voltimeout", "5s")
    server, paths = system.server, [f"/broken%20off%0A{n}" for n in range(3)]
    assert server.put("/kept", b"value") == 201
    (kept,) = system.records().values()
    places = ",".join(file.location for file in kept.replicas)
    system.volumes[0].freeze()
    uploads = [in_background(functools.partial(server.put, path, b"old")) for path in paths]
    until(lambda: len(system.files()) == 3 + 2 * len(paths))
    server.kill()
    system.volumes[0].thaw()
    for upload in uploads:
        upload.join()
    with (system.folder / "index/intents").open("a") as file:  # killed before it struck this out
        file.write(f"+ {mkv.key2path(b'/kept', kept.write_id)} {places}\n{ADDED[added]}")
    server.start()
    assert server.log.read_text().count("no intent") == ADDED[added].count("\n")
    assert [server.put(path, b"new") for path in paths] == [201] * len(paths)
    restart(system)  # what stands after a torn line can be read
    until(system.is_clean)
    assert [server.get(path) for path in paths] == [b"new"] * len(paths)
    assert_copies(system, "/kept", b"value")


def test_the_file_of_intents_stays_small_and_keeps_the_open_ones(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    upload = Upload(system.server.port, "/open", 100)
    upload.send(b"not all")
    until(lambda: system.open_intents() == 1)
    paths = [f"/{number}".ljust(500, "x") for number in range(900)]  # 1.4 KB each
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(system.server.put, paths, paths)) == {201}
    assert (system.folder / "index/intents").stat().st_size < 1.1 * MB
    system.volumes[0].kill()
    restart(system)
    assert system.garbage().keys() == {b"/open"}


def test_a_put_whose_intent_cannot_be_written_is_503_and_nothing_is_sent(system: Cluster) -> None:
    server, intents = system.server, system.folder / "index/intents"
    assert server.put("/before", b"value") == 201
    size, files = intents.stat().st_size, system.files()
    shell("prlimit", f"--pid={server.process.pid}", f"--fsize={size + 20}:")  # there is room for 20
    assert server.put("/k-", b"value") == 503 and server.get("/k-") is None
    assert system.files() == files and intents.stat().st_size == size
    shell("prlimit", f"--pid={server.process.pid}", "--fsize=unlimited:")
    assert server.put("/k-", b"value") == 201
    assert restart(system).get("/k-") == b"value"
