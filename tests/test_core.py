"""The promises of mkv, tested on the real thing: real nginx, sockets, LMDB and kill -9."""

import fcntl

# ruff: noqa: F403, F405
from harness import *

from contrib.conditions import Match, Unchanged  # noqa: E402
from contrib.maintenance import adopt  # noqa: E402

# --- placement and record -------------------------------------------------------------------------


def key_of(path: str) -> tuple[bytes, str]:
    """Key and write id of a file, by its path alone: so no two keys can share one."""
    name, _, write_id = path[7:].replace("-/", "").partition("-")
    return base64.b64decode(name, validate=True), write_id


def test_paths_of_the_ancestor() -> None:
    assert mkv.key2path(b"hello") == "/5d/41/aGVsbG8="
    assert mkv.key2path(b"helloworld") == "/fc/5e/aGVsbG93b3JsZA=="
    assert key_of("/5d/41/aGVsbG8=") == (b"hello", "")


def test_a_write_id_ends_the_name() -> None:
    assert mkv.key2path(b"hello", WRITE_ID) == f"/5d/41/aGVsbG8=-{WRITE_ID}"
    assert key_of(f"/5d/41/aGVsbG8=-{WRITE_ID}") == (b"hello", WRITE_ID)


def test_base64_with_a_slash_makes_a_sub_folder() -> None:
    key = "/photos/été".encode()
    name = base64.b64encode(key).decode()
    assert "/" in name
    for write_id, end in (("", ""), (WRITE_ID, f"-{WRITE_ID}")):
        path = mkv.key2path(key, write_id)
        assert path[6:] == f"/{name}{end}"
        assert key_of(path) == (key, write_id)


def test_long_names_are_cut_into_pieces() -> None:
    key = b"/" + b"k" * 510
    name = base64.b64encode(key).decode()
    assert len(name) == 684 and "/" not in name
    path = mkv.key2path(key, WRITE_ID)
    assert path[7:] == f"{name[:230]}-/{name[230:460]}-/{name[460:]}-{WRITE_ID}"
    assert key_of(path) == (key, WRITE_ID)
    assert key_of(mkv.key2path(key)) == (key, "")  # the ancestor does not cut


def test_names_of_exactly_230_characters_are_not_cut() -> None:
    for size in range(165, 181):  # 220 to 244 characters
        for key in (b"k" * size, b"k" * 30 + b"\xc3\xbf\xc3\xbf" + b"k" * size):
            path = mkv.key2path(key, WRITE_ID)
            runs = base64.b64encode(key).decode().split("/")
            assert path.count("-/") == sum((len(run) - 1) // 230 for run in runs if run)
            assert key_of(path) == (key, WRITE_ID)


def test_the_path_of_any_key_leads_back_to_it_and_fits_file_systems() -> None:
    chance = random.Random(1)
    for _ in range(5000):
        key, write_id = random_key(chance), f"{chance.getrandbits(64):016x}"
        assert 2 <= len(key) <= 511
        path = mkv.key2path(key, write_id)
        assert key_of(path) == (key, write_id)
        assert key_of(mkv.key2path(key)) == (key, "")
        pieces = path[1:].split("/")
        assert all(0 < len(piece) <= 255 and not piece.startswith(".") for piece in pieces), key


def test_volumes_of_the_ancestor() -> None:
    volumes = ["larry", "moe", "curly"]
    vectors = {b"hello": "larry", b"helloworld": "curly", b"world": "moe", b"blah": "curly"}
    for key, volume in vectors.items():
        (location,) = mkv.key2volume(key, volumes, 1, 3)
        assert location.partition("/")[0] == volume
        assert re.fullmatch(f"{volume}/sv0[0-2]", location)
        assert mkv.key2volume(key, volumes, 1, 1) == [volume]
        assert mkv.key2volume(key, volumes[::-1], 1, 3) == [location]


def test_the_ranking_is_by_md5_of_key_and_volume() -> None:
    volumes = [f"volume{number}:3001" for number in range(7)]
    for number in range(100):
        key = b"/%d" % number
        scores = {volume: hashlib.md5(key + volume.encode()).digest() for volume in volumes}
        order = sorted(volumes, key=scores.__getitem__, reverse=True)
        places = [f"{v}/sv{int.from_bytes(scores[v][12:16], 'big') % 256:02X}" for v in order]
        assert mkv.key2volume(key, volumes, 7, 256) == places
        assert mkv.key2volume(key, volumes, 3, 256) == places[:3]


def test_a_new_volume_takes_its_share_only() -> None:
    volumes = [f"volume{number}:3001" for number in range(5)]
    moved = 0
    for number in range(1000):
        old, new = (mkv.key2volume(b"/%d" % number, some, 3, 1) for some in (volumes[:4], volumes))
        assert [volume for volume in new if volume != volumes[4]] == old[: 3 - (volumes[4] in new)]
        moved += volumes[4] in new
    assert 500 < moved < 700  # three fifths


OTHER_ID = "6b0108917bf79949"
MD5 = hashlib.md5(b"value").hexdigest()
OLD = (mkv.Replica("larry/sv00", ""), mkv.Replica("moe/sv0A", ""))
NEW = (mkv.Replica("larry/sv00", WRITE_ID), mkv.Replica("moe/sv0A", WRITE_ID))
MIXED = (mkv.Replica("larry/sv00", OTHER_ID), mkv.Replica("moe/sv0A", WRITE_ID))
RECORDS = {
    # As minikeyvalue writes them.
    "larry/sv00,moe/sv0A": mkv.Record(OLD),
    "larry": mkv.Record((mkv.Replica("larry", ""),)),
    "DELETEDlarry/sv00,moe/sv0A": mkv.Record(OLD, deleted=True),
    f"HASH{MD5}larry/sv00,moe/sv0A": mkv.Record(OLD, hash=MD5),
    f"DELETEDHASH{MD5}larry/sv00,moe/sv0A": mkv.Record(OLD, hash=MD5, deleted=True),
    # With size and write id.
    f"larry/sv00,moe/sv0A 5 {WRITE_ID}": mkv.Record(NEW, 5, WRITE_ID),
    f"HASH{MD5}larry/sv00,moe/sv0A 5 {WRITE_ID}": mkv.Record(NEW, 5, WRITE_ID, MD5),
    f"DELETEDlarry/sv00,moe/sv0A 5 {WRITE_ID}": mkv.Record(NEW, 5, WRITE_ID, "", True),
    f"larry/sv00@{OTHER_ID},moe/sv0A 5 {WRITE_ID}": mkv.Record(MIXED, 5, WRITE_ID),
    f"127.0.0.1:3001/sv00 5 {WRITE_ID}": mkv.Record(
        (mkv.Replica("127.0.0.1:3001/sv00", WRITE_ID),), 5, WRITE_ID
    ),
    # A value of minikeyvalue that rebalance has copied.
    f"larry/sv00@{OTHER_ID},moe/sv0A": mkv.Record((MIXED[0], OLD[1])),
}


@pytest.mark.parametrize("text", RECORDS)
def test_a_record_has_a_text_and_back(text: str) -> None:
    assert RECORDS[text].text() == text.encode()
    assert mkv.parse_record(text.encode()) == RECORDS[text]


def test_what_is_no_record_is_500() -> None:
    for text in (b"HASH12larry x", b"larry 5 x", b"larry x", f"larry 5 {WRITE_ID} 5".encode()):
        with pytest.raises(mkv.HTTPError) as error:
            mkv.parse_record(text)
        assert error.value.status == 500


@pytest.mark.parametrize("key", [b"/k", b"//", "/photos/été".encode(), b"/" + b"k" * 510])
@pytest.mark.parametrize("write_id", ["", WRITE_ID])
def test_path2key_is_the_inverse_of_key2path(key: bytes, write_id: str) -> None:
    assert mkv.path2key(mkv.key2path(key, write_id)) == (key, write_id)


def test_paths_that_no_key_has_are_refused() -> None:
    good, long = mkv.key2path(b"/hello"), mkv.key2path(b"/" + b"k" * 300, WRITE_ID)
    top, name = good[:7], good[7:]
    tails = (
        "-",
        "/",
        "=",
        "\n",
        "-x",
        f"-{WRITE_ID[:-1]}",
        f"-{WRITE_ID}0",
        f"-{WRITE_ID.upper()}",
    )
    paths = [good + tail for tail in (*tails, f"-{WRITE_ID}-{WRITE_ID}")]
    paths += [
        "",
        "/",
        top,
        good[1:],
        good.upper(),
        "/00/00/" + name,
        top + "/" + name,
        "/svAA" + good,
    ]
    paths += [top + odd for odd in (name[:-1], name[:3] + " " + name[3:], "é", "..", "../" + name)]
    paths += [top + f"{name[:4]}{cut}{name[4:]}-{WRITE_ID}" for cut in ("-", "-/", "/")]
    paths += [long.replace("-/", ""), long.replace("-/", "/")]
    paths += [mkv.key2path(key) for key in (b"", b"/", b"hello", b"/\xff", b"/" + b"k" * 511)]
    for path in paths:
        with pytest.raises(ValueError):
            mkv.path2key(path)


# --- the operations -------------------------------------------------------------------------------

SETTLE = 100  # seconds after which nothing that was sent takes effect
GRACE = 10
File = tuple[bytes, mkv.Replica]  # one file of a key
EMPTY = mkv.Record()


@dataclasses.dataclass
class Process:
    """A server: what it has in memory, and its intents, which outlive it."""

    locks: set[bytes] = dataclasses.field(default_factory=set)
    intents: dict[tuple[bytes, str], list[mkv.Replica]] = dataclasses.field(default_factory=dict)
    actors: list[Iterator[None]] = dataclasses.field(default_factory=list)


class World:
    """Servers, clients, volumes and an index as dicts: the operations are mkv's, the rest chance.

    What actors do is cut into steps: between any two of one, others may have their turn. A request
    that was sent to a volume takes effect later, or never; a server may be killed between steps.
    """

    KEYS = (b"/a", b"/b", b"/c")
    PLACES = ("v0", "v1", "v2", "v3/sv00", "v3/sv01")

    def __init__(self, seed: int) -> None:
        self.chance, self.now = random.Random(seed), 1_000_000_000.0
        self.rows: dict[bytes, tuple[mkv.Record, dict[mkv.Replica, float]]] = {}
        self.files: set[File] = set()
        self.flying: dict[tuple[str, File], float] = {}  # requests: until when they may strike
        self.names: set[File] = set()  # all that were ever given
        self.values: dict[bytes, str] = {}  # acknowledged and not deleted: the time of the write
        self.servers = [Process() for _ in range(3)]
        self.log: list[tuple[float, Callable, bytes, tuple]] = []
        self.happened: Counter[str] = Counter()

    def do(self, operation: Callable, key: bytes, *args: Any) -> Any:
        """One operation, as an index runs it."""
        self.log.append((self.now, operation, key, args))
        record, garbage = self.rows.get(key, (EMPTY, {}))
        row, name = mkv.Row(record, dict(garbage), self.now), operation.__name__
        try:
            new, answer = operation(row, *args)
        except mkv.HTTPError as error:
            assert (row.record, row.garbage) == (record, garbage), "who refuses changes nothing"
            self.happened[f"{name} {error.status}"] += 1
            raise
        assert (row.record, row.garbage) == (record, garbage), "the old row stays as it was"
        self.happened[name] += 1
        since = {file: garbage.get(file, self.now) for file in new.garbage}
        assert new.garbage == since, "garbage is dated by the clock of the index"
        self.rows.pop(key, None)
        if new.record.replicas or new.garbage:
            self.rows[key] = new.record, dict(new.garbage)
        return answer

    def record(self, key: bytes) -> mkv.Record:
        return self.rows.get(key, (EMPTY, {}))[0]

    def new_id(self, key: bytes) -> str:
        """A write id: newer than all that a server knows when it looks."""
        record, garbage = self.rows.get(key, (EMPTY, {}))
        known = [r.write_id for r in (*record.replicas, *garbage)]
        newest = max((int(i[:8], 16) for i in known if i), default=0)
        return f"{max(int(self.now), newest + 1):08x}{self.chance.getrandbits(32):08x}"

    # Requests to volumes.

    def put(self, key: bytes, replica: mkv.Replica) -> None:
        assert (key, replica) not in self.names, "a name is never used twice"
        self.names.add((key, replica))
        self.flying["PUT", (key, replica)] = self.now + SETTLE

    def delete(self, key: bytes, replica: mkv.Replica) -> int:
        """The answer; 0: there is none, and the request may yet strike."""
        file = key, replica
        if self.chance.random() < 0.2:
            self.flying["DELETE", file] = self.now + SETTLE
            return 0
        if file not in self.files:
            return 404
        self.files.discard(file)
        return 204

    def strike(self) -> None:
        """A request that is on its way arrives."""
        what, file = self.chance.choice(list(self.flying))
        del self.flying[what, file]
        (self.files.add if what == "PUT" else self.files.discard)(file)

    # What servers do, step by step.

    def writing(self, server: Process, key: bytes) -> Iterator[None]:
        """PUT, also with If-Match, and REBALANCE."""
        if key in server.locks or key in {k for k, _ in server.intents}:
            return
        server.locks.add(key)
        old, kind = self.record(key), self.chance.choice(("put", "put", "replace", "move", "anew"))
        write_id = self.new_id(key)
        if kind == "move" and old.write_id:
            write_id = old.write_id[:8] + write_id[8:]
        moves = kind in ("move", "anew")
        if moves and not old.replicas:
            server.locks.discard(key)
            return
        places = self.chance.sample(self.PLACES, 3)
        keep = [r for r in old.replicas if kind == "move" and r.location not in places[:2]][:1]
        files = [mkv.Replica(place, write_id) for place in places]
        server.intents[key, write_id] = files[:2]
        yield
        for file in files[:2]:
            self.put(key, file)
            yield
        if self.chance.random() < 0.3:
            server.intents[key, write_id] = files
            yield
            self.put(key, files[2])
        for _ in range(self.chance.randrange(6)):
            yield
        mine = server.intents[key, write_id]
        made = [file for file in mine if (key, file) in self.files]
        failed = [file for file in mine if file not in made]
        committed = False
        if made and self.chance.random() < 0.8:
            new = mkv.Record((*keep, *made), 5, write_id, "", old.deleted and moves)
            write = Match(("*",)) if kind == "replace" else mkv.Condition()
            condition = Unchanged(old) if moves else write
            try:
                self.do(mkv.Row.commit, key, new, condition, failed)
            except mkv.HTTPError as error:
                assert error.status in (403, 409, 412)
            else:
                committed = True
                self.values[key] = write_id[:8]
        yield
        if not committed:
            yield from self.wasting(server, key, write_id)
        server.intents.pop((key, write_id))
        server.locks.discard(key)

    def wasting(self, server: Process, key: bytes, write_id: str) -> Iterator[None]:
        """What becomes of a write that failed, or was broken off: 404 is no proof for its files."""
        files, _ = self.do(mkv.Row.waste, key, server.intents[key, write_id])
        yield
        gone = [file for file in files if self.delete(key, file) == 204]
        yield
        self.do(mkv.Row.settle, key, gone)

    def deleting(self, server: Process, key: bytes) -> Iterator[None]:
        with contextlib.suppress(mkv.HTTPError):
            old = self.do(mkv.Row.remove, key, self.chance.random() < 0.3)
            self.values.pop(key)
            yield
            gone = [file for file in old.replicas if self.delete(key, file) in (204, 404)]
            yield
            self.do(mkv.Row.settle, key, gone)

    def unlinking(self, server: Process, key: bytes) -> Iterator[None]:
        with contextlib.suppress(mkv.HTTPError):
            self.do(mkv.Row.unlink, key)
        yield

    def sweeping(self, server: Process, key: bytes) -> Iterator[None]:
        garbage = dict(self.rows.get(key, (EMPTY, {}))[1])
        gone = []
        for file, since in garbage.items():
            if self.now - since < GRACE:
                continue
            proof = (204, 404) if self.now - since > SETTLE else (204,)
            if self.delete(key, file) in proof:
                gone.append(file)
            yield
        self.do(mkv.Row.settle, key, gone)

    def rebuilding(self, server: Process, key: bytes) -> Iterator[None]:
        """An index that knows everything learns nothing from the volumes."""
        before = self.rows.get(key)
        record, garbage = before or (EMPTY, {})
        found = {replica: 5 for k, replica in self.files if k == key}
        if found and found.keys() <= {*record.replicas, *garbage}:  # and nothing is intended
            self.do(adopt, key, found, True)
            assert self.rows.get(key) == before
        yield

    def starting(self, server: Process) -> Iterator[None]:
        """After kill -9: nothing is begun before what was broken off is wasted."""
        for key, write_id in list(server.intents):
            yield from self.wasting(server, key, write_id)
            server.intents.pop((key, write_id))

    # The course of the world.

    def step(self) -> None:
        """Something happens somewhere."""
        self.now += self.chance.choice((0, 0, 0, 0.3, 1, 7))
        self.flying = {what: end for what, end in self.flying.items() if end > self.now}
        server = self.chance.choice(self.servers)
        if self.flying and self.chance.random() < 0.4:
            self.strike()
        elif self.chance.random() < 0.01:
            server.locks.clear()
            server.actors = [self.starting(server)]
            self.happened["kill"] += bool(server.intents)
        elif len(server.actors) < 3 and not self.recovers(server):
            works = [self.writing] * 5 + [self.deleting, self.unlinking, self.sweeping]
            work = self.chance.choice([*works, self.rebuilding])
            server.actors.append(work(server, self.chance.choice(self.KEYS)))
        elif server.actors:
            actor = self.chance.choice(server.actors)
            if next(actor, self) is self:
                server.actors.remove(actor)

    def recovers(self, server: Process) -> bool:
        return any(actor.gi_code is World.starting.__code__ for actor in server.actors)

    def check(self) -> None:
        """What must hold after every step."""
        records = {key: record for key, (record, _) in self.rows.items() if record.replicas}
        named = {(key, r) for key, record in records.items() for r in record.replicas}
        listed = {(key, r) for key, (_, garbage) in self.rows.items() for r in garbage}
        intents = [item for server in self.servers for item in server.intents.items()]
        intended = {(key, r) for (key, _), files in intents for r in files}
        may_be = self.files | {file for what, file in self.flying if what == "PUT"}
        assert may_be <= named | listed | intended, "a file is named, garbage, or intended"
        assert named <= self.files, "what is named is there"
        assert not named & listed, "what is named is not garbage"
        assert set(records) == set(self.values), "what is acknowledged is there, and nothing else"
        for key, record in records.items():
            assert {r.write_id[:8] for r in record.replicas} == {self.values[key]}


def live_through(seed: int, steps: int) -> World:
    """A world after that many steps, each of them checked."""
    world = World(seed)
    for _ in range(steps):
        world.step()
        world.check()
    return world


@pytest.mark.parametrize("seed", range(4))
def test_every_file_is_named_or_listed_or_intended_whatever_happens(seed: int) -> None:
    world = live_through(seed, 60_000)
    names = "commit,commit 403,commit 409,commit 412,waste,settle,remove,remove 403,remove 404,"
    for name in (names + "unlink,unlink 404,adopt,kill").split(","):
        assert world.happened[name] > 5, (name, world.happened)
    # Once all rest, the sweeper leaves what is named and nothing else.
    for server in world.servers:
        server.locks.clear()
        list(world.starting(server))
    world.flying, world.now = {}, world.now + 2 * SETTLE
    until(
        lambda: (
            [list(world.sweeping(world.servers[0], key)) for key in world.KEYS]
            and not any(garbage for _, garbage in world.rows.values())
        )
    )
    world.flying = {}
    world.check()
    assert world.files == {(key, r) for key, (row, _) in world.rows.items() for r in row.replicas}


def test_the_same_operations_in_the_same_order_give_the_same_index() -> None:
    world, replay = live_through(10, 20_000), World(0)
    for replay.now, operation, key, args in world.log:
        with contextlib.suppress(mkv.HTTPError):
            replay.do(operation, key, *args)
    assert replay.rows == world.rows and world.rows
    assert len(world.log) > 1000


NOW = 2_000_000_000.0
OLD_ID, LATER_ID = f"{1_700_000_000:08x}00000001", f"{1_700_000_001:08x}00000002"


def files_at(write_id: str, *places: str) -> tuple[mkv.Replica, ...]:
    """Replicas of one write."""
    return tuple(mkv.Replica(place, write_id) for place in places)


LIVE = mkv.Record(files_at(OLD_ID, "v0", "v1"), 5, OLD_ID, MD5)
UNLINKED = LIVE._replace(deleted=True)
WITHOUT_MD5 = LIVE._replace(hash="")
FRESH = mkv.Record(files_at(LATER_ID, "v1", "v2"), 7, LATER_ID, hashlib.md5(b"new").hexdigest())
ANY = Match(("*",))
ABSENT = mkv.Condition()


def row(record: mkv.Record = EMPTY, *garbage: mkv.Replica, since: float = 1.0) -> mkv.Row:
    """A row at the time NOW."""
    return mkv.Row(record, dict.fromkeys(garbage, since), NOW)


def refusal(operation: Callable, *args: Any) -> int:
    """The status with which an operation is refused; 0 when it is not."""
    try:
        operation(*args)
    except mkv.HTTPError as error:
        return error.status
    return 0


@pytest.mark.parametrize(
    ("record", "condition", "status"),
    [
        (EMPTY, ABSENT, 0),
        (LIVE, ABSENT, 403),
        (LIVE, mkv.Condition(412), 412),
        (EMPTY, mkv.Condition(412), 0),
        (UNLINKED, ABSENT, 0),
        (UNLINKED, mkv.Condition(412), 0),
        (EMPTY, ANY, 412),
        (LIVE, ANY, 0),
        (WITHOUT_MD5, ANY, 0),
        (UNLINKED, ANY, 412),
        (LIVE, Match((f'"{MD5}"',)), 0),
        (LIVE, Match(('"x"', f'"{MD5}"')), 0),
        (LIVE, Match((f'"{FRESH.hash}"',)), 412),
        (LIVE, Match(('""',)), 412),
        (WITHOUT_MD5, Match(('""',)), 412),
        (WITHOUT_MD5, Match((f'"{MD5}"',)), 412),
        (UNLINKED, Match((f'"{MD5}"',)), 412),
        (LIVE, Unchanged(LIVE), 0),
        (UNLINKED, Unchanged(UNLINKED), 0),
        (UNLINKED, Unchanged(LIVE), 409),
        (LIVE, Unchanged(UNLINKED), 409),
        (EMPTY, Unchanged(LIVE), 409),
        (FRESH, Unchanged(LIVE), 409),
    ],
)
def test_a_commit_is_judged_by_its_condition(
    record: mkv.Record, condition: Any, status: int
) -> None:
    later = f"{1_700_000_009:08x}00000003"
    new = mkv.Record(files_at(later, "v1", "v2"), 7, later)
    assert refusal(mkv.Row.commit, row(record), new, condition, ()) == status


def test_what_a_commit_replaces_and_what_failed_becomes_garbage_now() -> None:
    known, failed = mkv.Replica("v9", OLD_ID), mkv.Replica("v0", LATER_ID)
    new, old = row(UNLINKED, known).commit(FRESH, ABSENT, [failed])
    assert old == UNLINKED and new.record == FRESH
    assert new.garbage == {known: 1.0, failed: NOW} | dict.fromkeys(LIVE.replicas, NOW)


def test_what_a_move_keeps_is_no_garbage() -> None:
    copy = mkv.Replica("v2", OLD_ID[:8] + "0000000f")
    moved = LIVE._replace(replicas=(LIVE.replicas[0], copy))
    new, _ = row(LIVE).commit(moved, Unchanged(LIVE), ())
    assert new.record == moved and new.garbage == {LIVE.replicas[1]: NOW}


@pytest.mark.parametrize(
    ("old", "garbage"),
    [(UNLINKED, ()), (EMPTY, files_at(OLD_ID, "v0")), (LIVE, ()), (EMPTY, LIVE.replicas)],
)
@pytest.mark.parametrize("write_id", [OLD_ID[:8] + "ffffffff", f"{1_699_999_999:08x}ffffffff"])
def test_a_write_is_later_than_all_that_is_known_of_the_key(
    old: mkv.Record, garbage: tuple, write_id: str
) -> None:
    new = mkv.Record(files_at(write_id, "v2"), 5, write_id)
    condition = ANY if old == LIVE else ABSENT
    assert refusal(mkv.Row.commit, row(old, *garbage), new, condition, ()) == 409


def test_garbage_is_never_named_again() -> None:
    for condition, old in ((ABSENT, EMPTY), (Unchanged(LIVE), LIVE)):
        known = row(old, FRESH.replicas[0])
        assert refusal(mkv.Row.commit, known, FRESH, condition, ()) in (409, 503)


def test_what_the_record_names_is_not_wasted() -> None:
    stray = mkv.Replica("v9", OLD_ID)
    new, (files, named) = row(LIVE).waste([*LIVE.replicas, stray])
    assert (new.record, new.garbage) == (LIVE, {stray: NOW})
    assert (list(files), named) == ([stray], True)
    new, (files, named) = row(FRESH, stray).waste([*LIVE.replicas, stray])
    assert new.garbage == {stray: 1.0} | dict.fromkeys(LIVE.replicas, NOW)
    assert (set(files), named) == ({stray, *LIVE.replicas}, False)


@pytest.mark.parametrize(
    ("record", "protect", "status"),
    [
        (EMPTY, False, 404),
        (EMPTY, True, 404),
        (LIVE, False, 0),
        (LIVE, True, 403),
        (UNLINKED, False, 0),
        (UNLINKED, True, 0),
    ],
)
def test_remove_makes_garbage_of_all_files(record: mkv.Record, protect: bool, status: int) -> None:
    assert refusal(mkv.Row.remove, row(record), protect) == status
    if not status:
        new, old = row(record).remove(protect)
        assert old == record and not new.record.replicas
        assert new.garbage == dict.fromkeys(record.replicas, NOW)


def test_unlink_hides_what_is_there_and_keeps_its_files() -> None:
    new, _ = row(LIVE).unlink()
    assert (new.record, new.garbage) == (UNLINKED, {})
    assert refusal(mkv.Row.unlink, row(UNLINKED)) == refusal(mkv.Row.unlink, row()) == 404


def test_settle_strikes_out_what_is_gone_and_nothing_else() -> None:
    first, second = files_at(OLD_ID, "v8", "v9")
    new, _ = row(LIVE, first, second).settle([first, *LIVE.replicas, *FRESH.replicas])
    assert (new.record, new.garbage) == (LIVE, {second: 1.0})


def found(*records: mkv.Record) -> dict[mkv.Replica, int]:
    """The files of records, as a walk over the volumes finds them."""
    return {replica: record.size for record in records for replica in record.replicas}


def test_adopt_takes_the_newest_files_into_an_empty_index() -> None:
    new, (older, ambiguous) = adopt(row(), found(LIVE, FRESH), False)
    assert set(new.record.replicas) == set(FRESH.replicas) and new.record.size == 7
    assert not new.record.deleted and not new.record.hash and not new.garbage
    assert set(older) == set(LIVE.replicas) and not ambiguous
    new, (older, _) = adopt(row(), found(LIVE, FRESH), True)
    assert set(new.garbage) == set(older) == set(LIVE.replicas)


def test_adopt_takes_copies_of_the_same_time_and_size_for_one_write() -> None:
    copy = mkv.Replica("v2", OLD_ID[:8] + "0000000f")
    new, (older, ambiguous) = adopt(row(), {**found(LIVE), copy: 5}, True)
    assert set(new.record.replicas) == {*LIVE.replicas, copy}
    assert (list(older), ambiguous, new.garbage) == ([], False, {})


def test_adopt_takes_minikeyvalues_files_for_older_than_any() -> None:
    ancient = files_at("", "v0", "v1")
    new, (older, _) = adopt(row(), {**found(LIVE), **dict.fromkeys(ancient, 9)}, True)
    assert set(new.record.replicas) == set(LIVE.replicas) and set(older) == set(ancient)
    new, (older, ambiguous) = adopt(row(), dict.fromkeys(ancient, 9), True)
    assert (set(new.record.replicas), new.record.size) == (set(ancient), 9)
    assert (list(older), ambiguous) == ([], False)


@pytest.mark.parametrize(
    "files",
    [
        {**found(LIVE), FRESH.replicas[0]: 7},  # fewer of the newer write
        {LIVE.replicas[0]: 5, LIVE.replicas[1]: 4},
    ],
)
def test_adopt_says_what_is_ambiguous(files: dict[mkv.Replica, int]) -> None:
    new, (_, ambiguous) = adopt(row(), files, False)
    assert ambiguous and new.record.replicas and not new.garbage


@pytest.mark.parametrize("record", [LIVE, UNLINKED, WITHOUT_MD5])
def test_adopt_leaves_alone_what_the_index_knows(record: mkv.Record) -> None:
    for files in (found(record), {record.replicas[0]: 5}):
        new, (older, _) = adopt(row(record), files, True)
        assert (new.record, new.garbage, list(older)) == (record, {}, [])


def test_adopt_revives_nothing_that_is_garbage() -> None:
    new, _ = adopt(row(EMPTY, *LIVE.replicas), found(LIVE), True)
    assert not new.record.replicas and new.garbage == dict.fromkeys(LIVE.replicas, 1.0)
    new, _ = adopt(row(LIVE, *FRESH.replicas), found(LIVE, FRESH), True)
    assert new.record == LIVE and new.garbage == dict.fromkeys(FRESH.replicas, 1.0)


def test_adopt_makes_garbage_of_what_is_older_than_the_record() -> None:
    new, (older, _) = adopt(row(FRESH), found(LIVE, FRESH), True)
    assert new.record == FRESH and new.garbage == dict.fromkeys(LIVE.replicas, NOW)
    assert set(older) == set(LIVE.replicas)


# --- the index ------------------------------------------------------------------------------------


async def write(index: mkv.LMDB, key: bytes, place: str = "v0") -> None:
    """Commit a key, without any file."""
    write_id = f"{int(time.time()):08x}{os.urandom(4).hex()}"
    record = mkv.Record((mkv.Replica(place, write_id),), 1, write_id)
    await index.do(mkv.Row.commit, key, record, mkv.Condition(), ())


def in_index(folder: Path, work: Callable) -> Any:
    """What work(index) returns, with an index that is open for its time."""

    async def run() -> Any:
        index = mkv.LMDB(folder, "nobody")
        try:
            return await work(index)
        finally:
            await index.do(mkv.Row.settle, b"/", ())  # after all that is queued

    try:
        return asyncio.run(run())
    finally:
        until(lambda: is_let_go(folder))


def is_let_go(folder: Path) -> bool:
    """Whether an index of this process is closed, by and by, with all that has to do with it."""
    gc.collect()
    with contextlib.suppress(lmdb.Error):
        lmdb.open(str(folder), max_dbs=8, map_size=1 << 40).close()
        return True
    return False


def last_transaction(folder: Path) -> int:
    with lmdb.open(str(folder), readonly=True, max_dbs=8) as env:
        return env.info()["last_txnid"]


def test_concurrent_operations_share_commits(tmp_path: Path) -> None:
    async def many(index: mkv.LMDB) -> None:
        await asyncio.gather(*(write(index, b"/%d" % number) for number in range(4000)))

    in_index(tmp_path, lambda index: asyncio.sleep(0))
    before = last_transaction(tmp_path)
    in_index(tmp_path, many)
    assert 2 <= last_transaction(tmp_path) - before <= 100
    records, garbage = stored(tmp_path)
    assert set(records) == {b"/%d" % number for number in range(4000)} and not garbage


def test_a_refused_operation_does_not_spoil_its_group(tmp_path: Path) -> None:
    async def mixed(index: mkv.LMDB) -> list[int]:
        work = [write(index, b"/%d" % (number % 50)) for number in range(100)]
        results = await asyncio.gather(*work, return_exceptions=True)
        return [getattr(result, "status", 0) for result in results]

    assert in_index(tmp_path, mixed) == [0] * 50 + [403] * 50
    assert len(stored(tmp_path)[0]) == 50


def test_an_operation_sees_what_was_done_before_it(tmp_path: Path) -> None:
    async def several(index: mkv.LMDB) -> None:
        first = asyncio.ensure_future(write(index, b"/k"))
        await asyncio.sleep(0)
        old = index.do(mkv.Row.remove, b"/k", False)
        await first
        assert (await old).replicas
        row = await index.row(b"/k")
        assert set(row.garbage) == set((await old).replicas) and not row.record.replicas
        assert abs(row.garbage[(await old).replicas[0]] - time.time()) < 10
        await index.do(mkv.Row.settle, b"/k", list(row.garbage))
        assert not (await index.row(b"/k")).garbage

    in_index(tmp_path, several)
    assert stored(tmp_path) == ({}, {})


@pytest.mark.parametrize("steps", range(6))
def test_operations_are_done_whatever_becomes_of_those_who_asked(
    tmp_path: Path, steps: int
) -> None:
    async def work(index: mkv.LMDB) -> None:
        tasks = [asyncio.create_task(write(index, b"/%d" % number)) for number in range(3)]
        await asyncio.sleep(0)  # they have asked
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        async with asyncio.timeout(5):
            await write(index, b"/later")

    in_index(tmp_path, work)
    assert set(stored(tmp_path)[0]) == {b"/0", b"/1", b"/2", b"/later"}


def test_what_is_queued_when_an_index_is_closed_is_done_all_the_same(tmp_path: Path) -> None:
    async def leave(index: mkv.LMDB) -> None:
        write_id = f"{int(time.time()):08x}00000000"
        record = mkv.Record((mkv.Replica("v0", write_id),), 1, write_id)
        for number in range(100):
            index.do(mkv.Row.commit, b"/%d" % number, record, mkv.Condition(), ())

    in_index(tmp_path, leave)
    assert len(stored(tmp_path)[0]) == 100


@pytest.mark.asyncio
async def test_jobs_that_arrive_while_a_group_is_on_its_way_share_the_next_one() -> None:
    groups, gate = [], asyncio.Event()

    async def work(jobs: Iterable[tuple[int]]) -> list[int]:
        groups.append([number for (number,) in jobs])
        await gate.wait()
        return [2 * number for (number,) in jobs]

    group = mkv.Group(work, 1)
    futures = [group.do(0)]
    await asyncio.sleep(0.01)
    futures += [group.do(number) for number in range(1, 10)]
    gate.set()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*futures) == [2 * number for number in range(10)]
    assert groups == [[0], list(range(1, 10))]


@pytest.mark.asyncio
async def test_an_exception_of_a_group_is_the_answer_to_all_its_jobs_and_to_no_others() -> None:
    async def work(jobs: Iterable[tuple[int]]) -> list[int]:
        if (0,) in jobs:
            raise mkv.HTTPError(503, "no room")
        return [number for (number,) in jobs]

    group = mkv.Group(work, 1)
    first = [group.do(number) for number in range(3)]
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*first, return_exceptions=True)
        assert {getattr(answer, "status", 0) for answer in answers} <= {0, 503}
        assert answers[0].status == 503
        assert await group.do(7) == 7


@pytest.mark.asyncio
async def test_no_job_is_left_behind_at_whatever_moment_it_comes() -> None:
    async def work(jobs: Iterable[tuple[int]]) -> list[int]:
        numbers = [number for (number,) in jobs]
        for _ in range(numbers[0] % 3):
            await asyncio.sleep(0)
        return numbers

    group = mkv.Group(work, 2)
    async with asyncio.timeout(20):
        for number in range(2000):
            future = group.do(number)
            for _ in range(number % 7):
                await asyncio.sleep(0)
            later = group.do(number + 1)
            assert (await later, await future) == (number + 1, number)


PROCESS = f"""
import asyncio, os, sys, time
sys.path.insert(0, {str(HERE)!r})
import mkv
from pathlib import Path

async def write(index, number):
    write_id = f"{{int(time.time()):08x}}{{os.urandom(4).hex()}}"
    record = mkv.Record((mkv.Replica("v0", write_id),), 1, write_id)
    await index.do(mkv.Row.commit, b"/%d" % number, record, mkv.Condition(), ())
    print(number, flush=True)

async def write_for_ever():
    index = mkv.LMDB(Path(sys.argv[1]), "nobody")
    for number in range(0, 1 << 60, 20):
        await asyncio.gather(*(write(index, number + each) for each in range(20)))

asyncio.run(write_for_ever())
"""


def test_what_was_acknowledged_before_kill_9_is_there_after_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        lines = [other.stdout.readline() for _ in range(1000)]
        other.kill()
        lines += other.stdout.readlines()
    acknowledged = [int(line) for line in lines if line.endswith("\n")]
    assert len(acknowledged) >= 1000
    records, _ = stored(tmp_path)
    assert {b"/%d" % number for number in acknowledged} <= set(records)
    in_index(tmp_path, lambda index: write(index, b"/more"))  # nothing holds it any more


def test_an_index_that_somebody_has_is_refused_and_he_is_named(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1)
    with pytest.raises((mkv.HTTPError, OSError)) as error:
        in_index(system.folder / "index", lambda index: asyncio.sleep(0))
    assert str(system.server.port) in str(error.value)
    other = "-db", system.folder / "index", "-port", str(free_ports(1)[0])
    said = error_of("server", *ONE, *other, folder=system.folder)
    assert "index" in said and str(system.server.port) in said
    assert system.server.put("/k", b"value") == 201
    system.server.kill()
    in_index(system.folder / "index", lambda index: write(index, b"/more"))
    system.server.start()
    assert set(system.records()) == {b"/k", b"/more"}


# --- the parser -----------------------------------------------------------------------------------


def head_of(data: bytes) -> mkv.Request:
    """The request of a head."""
    return mkv.parse_request(data[: data.index(b"\r\n\r\n") + 4])


def test_a_head_is_taken_apart() -> None:
    head = head_of(request("PUT", "/%61/b%2Fc?x=%20&y", b"value", "X-Y:  z \r\nx-y:w\r\n"))
    assert (head.method, head.path, head.query) == ("PUT", b"/%61/b%2Fc", b"x=%20&y")
    assert (head.key, head.length) == (b"/a/b/c", 5)
    assert head.fields[b"x-y"] == b"z,w" and head.fields[b"host"] == b"x"
    assert not head.close


@pytest.mark.parametrize(
    ("data", "length", "close"),
    [
        (request("GET", "/a"), 0, False),
        (request("GET", "/a", b"", CLOSE), 0, True),
        (request("PUT", "/a", b"", CHUNKED), None, False),
        (request("PUT", "/a", b"", "Transfer-Encoding:  Chunked \r\n"), None, False),
        (request("PUT", "/a", b"", "Content-Length: 007\r\n"), 7, False),
        (request("PUT", "/a", b"x", "Expect: 100-Continue\r\n"), 1, False),
        (request("PUT", "/a", b"x", "Expect: 200-ok\r\n"), 1, False),
        (b"PUT /a HTTP/1.0\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n", 1, True),
        (b"GET http://x:80/a HTTP/1.1\r\nHost: x\r\n\r\n", 0, False),
    ],
)
def test_a_head_says_what_follows_it(data: bytes, length: int | None, close: bool) -> None:
    head = head_of(data)
    assert (head.key, head.length, head.close) == (b"/a", length, close)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of one volume and one replica, for tests that ask much."""
    shared = Cluster(tmp_path_factory.mktemp("single"), "-replicas", "1", volumes=1, subvolumes=1)
    yield shared
    try:
        until(shared.is_clean)
    finally:
        shared.close()


class Pieces:
    """Sends bytes in pieces, each of which the server has read before the next one comes."""

    def __init__(self, port: int) -> None:
        self.port, self.other = port, Wire(port)

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self.other.__exit__()

    def send(self, *pieces: bytes) -> bytes:
        """The answers, to the end of the connection."""
        with Wire(self.port) as wire, contextlib.suppress(ConnectionError):
            wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ConnectionError):  # refused, and closed, before the last
                for piece in pieces:
                    wire.send(piece)
                    self.other.send(request("GET", "/?health"))  # in the same loop, and later
                    assert self.other.answer().status == 200
            return wire.file.read()
        return b""


@pytest.fixture
def pieces(single: Cluster) -> Iterator[Pieces]:
    with Pieces(single.server.port) as sender:
        yield sender


STREAM = b"".join(
    [
        request("GET", "/a"),
        request("PUT", "/b", b"0\r\n\r\nGET /x"),
        request("DELETE", "/b"),
        b"\r\n",  # skipped
        request("PUT", "/c", b"", "transfer-encoding:  Chunked \r\n"),
        b'5;name="va;lue"\r\nabcde\r\n00A \r\n0123456789\r\n0;x\r\nTrailer: 1\r\nAnother:\r\n\r\n',
        request("HEAD", "/c?x=y"),
        request("DELETE", "/c"),
        b"\r\n\r\n",
        request("GET", "/?health", b"", CLOSE),
    ]
)
STREAM_STATUSES = [404, 201, 204, 201, 302, 204, 200]


def test_every_split_of_a_stream_makes_the_same_requests(pieces: Pieces) -> None:
    for cut in range(len(STREAM)):
        assert statuses(pieces.send(STREAM[:cut], STREAM[cut:])) == STREAM_STATUSES, cut


def test_a_stream_may_come_in_pieces_of_any_size(pieces: Pieces) -> None:
    size, chance = len(STREAM), random.Random(1)
    for step in (*range(1, 9), 16, 50):
        cut = [STREAM[start : start + step] for start in range(0, size, step)]
        assert statuses(pieces.send(*cut)) == STREAM_STATUSES, step
    for _ in range(100):
        cuts = [0, *sorted(chance.choices(range(size), k=chance.randrange(1, 30))), size]
        cut = [STREAM[start:end] for start, end in itertools.pairwise(cuts)]
        assert statuses(pieces.send(*cut)) == STREAM_STATUSES, cuts


def test_the_body_is_the_same_in_every_pair_of_cuts_of_its_chunks(
    pieces: Pieces, single: Cluster
) -> None:
    body, last = b"3;x\r\nabc\r\n1\r\nd\r\n0\r\nT: x\r\n\r\n", request("DELETE", "/cut", b"", CLOSE)
    head = request(
        "PUT", "/cut", b"", CHUNKED + f"Content-MD5: {hashlib.md5(b'abcd').hexdigest()}\r\n"
    )
    for first, second in itertools.combinations(range(len(body)), 2):
        cut = head + body[:first], body[first:second], body[second:] + last
        assert statuses(pieces.send(*cut)) == [201, 204], cut


@pytest.mark.parametrize(
    "bad",
    [
        b"GET /k HTTP/1.1\nHost: x\r\n\r\n",
        b"GET /k HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
        request("PUT", "/k", b"", CHUNKED) + b"3\r\nabcd\r\n0\r\n\r\n",
        request("PUT", "/k", b"", CHUNKED) + b"3\nabc\r\n0\r\n\r\n",
        request("PUT", "/k", b"", CHUNKED) + b"0\r\nbad trailer\r\n\r\n",
    ],
)
def test_nonsense_is_refused_in_every_split_and_nothing_after_it_is_begun(
    pieces: Pieces, single: Cluster, bad: bytes
) -> None:
    stream = request("GET", "/first") + bad + SMUGGLED
    for cut in range(len(stream)):
        assert statuses(pieces.send(stream[:cut], stream[cut:])) == [404, 400], cut
    assert single.server.get("/smuggled") is None


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"GET /k HTTP/1.1\n\r\n\r\n"),
        (431, b"G" * 17_000),
        (431, b"X: y\r\n" * 3000),
        (400, request("PUT", "/k", b"", CHUNKED) + b"3\r\nabcd!\r\n"),
        (431, request("PUT", "/k", b"", CHUNKED) + b"3;" + b"x" * 17_000),
        (431, request("PUT", "/k", b"", CHUNKED) + b"0\r\n" + b"X: y\r\n" * 3000),
    ],
    ids=["a bare LF", "an endless line", "endless fields", "chunk", "chunk line", "trailers"],
)
def test_what_cannot_end_well_is_refused_before_its_end(
    single: Cluster, status: int, data: bytes
) -> None:
    with Wire(single.server.port) as wire:
        wire.send(data)  # and no end
        assert wire.answer().status == status
        assert wire.closed()


def test_empty_lines_before_a_request_are_skipped_but_not_for_ever(single: Cluster) -> None:
    last = request("GET", "/?health", b"", CLOSE)
    for lines in (b"\r\n", b"\r\n\r\n", b"\r\n\r\n\r\n"):
        assert statuses(raw(single.server.port, lines + last)) == [200]
        assert statuses(raw(single.server.port, request("GET", "/a") + lines + last)) == [404, 200]
    assert statuses(raw(single.server.port, b"\n" + last)) == [400]
    with Wire(single.server.port) as wire, contextlib.suppress(ConnectionError):
        used = cpu(single.server)
        for _ in range(100):
            wire.send(b"\r\n" * 10_000)
        single.server.call("GET", "/?health")
        assert cpu(single.server) - used < 2


# --- the protocol ---------------------------------------------------------------------------------

TEXT = {"content-type": "text/plain; charset=utf-8"}


def test_a_value_is_written_read_and_deleted(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/wehave", b"bigswag") == 201
    assert system.server.get("/wehave") == b"bigswag"
    assert system.server.call("DELETE", "/wehave").status == 204
    assert system.server.get("/wehave") is None
    until(system.is_clean)
    assert system.files() == set()


def test_files_lie_where_the_placement_says_under_names_with_a_write_id(system: Cluster) -> None:
    assert system.server.put("/placed", b"value") == 201
    record = system.records()[b"/placed"]
    volumes = [volume.name for volume in system.volumes]
    places = mkv.key2volume(b"/placed", volumes, 3, 10)
    assert [replica.location for replica in record.replicas] == places
    assert re.fullmatch("[0-9a-f]{16}", record.write_id)
    assert abs(int(record.write_id[:8], 16) - time.time()) < 60
    assert {place + mkv.key2path(b"/placed", record.write_id) for place in places} <= system.files()
    assert (record.size, record.hash) == (5, hashlib.md5(b"value").hexdigest())


def test_get_redirects_with_volumes_balance_and_md5(system: Cluster) -> None:
    assert system.server.put("/redirected", b"value") == 201
    answer = system.server.call("GET", "/redirected")
    record = system.records()[b"/redirected"]
    places = [replica.location for replica in record.replicas]
    path = mkv.key2path(b"/redirected", record.write_id)
    assert (answer.status, answer.body) == (302, b"")
    assert answer.fields["location"] in {f"http://{place}{path}" for place in places}
    assert answer.fields["key-volumes"] == ",".join(places)
    assert answer.fields["key-balance"] == "balanced"
    assert answer.fields["content-md5"] == hashlib.md5(b"value").hexdigest()
    assert answer.fields["content-length"] == "0"


def test_ranges_are_served_through_the_redirect(system: Cluster) -> None:
    assert system.server.put("/ranged", b"0123456789") == 201
    target = system.server.call("GET", "/ranged").fields["location"]
    port, _, path = target.removeprefix("http://127.0.0.1:").partition("/")
    value = call(int(port), "GET", "/" + path, None, {"Range": "bytes=2-4"})
    assert (value.status, value.body) == (206, b"234")


def test_head_answers_as_get_does_without_a_body(system: Cluster) -> None:
    assert system.server.put("/headed", b"value") == 201
    with Wire(system.server.port) as wire:
        wire.send(request("HEAD", "/headed"))
        status, fields = wire.head()
        assert status == 302
        assert fields["key-volumes"] and fields["location"] and fields["content-length"] == "0"
        wire.send(request("HEAD", "/head-of-nothing"))
        assert wire.head()[0] == 404
        wire.send(request("HEAD", "/?health"))
        assert wire.head() == (200, {"content-length": "3", **TEXT})
        wire.send(request("GET", "/headed"))
        assert wire.answer().status == 302  # so no body came with the others
        wire.send(request("HEAD", "/?list", b"", CLOSE))
        assert wire.head()[0] == 200
        assert wire.closed()


def test_a_key_is_written_once(system: Cluster) -> None:
    assert system.server.put("/once", b"first") == 201
    assert system.server.put("/once", b"second") == 403
    assert system.server.get("/once") == b"first"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("unlinked", [False, True])
def test_what_is_missing_is_404_without_a_body(
    system: Cluster, method: str, unlinked: bool
) -> None:
    if unlinked and system.server.put("/hidden-key", b"value") == 201:
        assert system.server.call("UNLINK", "/hidden-key").status == 204
    answer = system.server.call(method, "/hidden-key" if unlinked else "/missing")
    assert (answer.status, answer.body) == (404, b"")
    assert answer.fields["content-length"] == "0"


@pytest.mark.parametrize(
    ("status", "method", "path"),
    [
        (404, "DELETE", "/missing"),
        (404, "UNLINK", "/missing"),
        (404, "REBALANCE", "/missing"),
        (400, "GET", "/%FF"),
        (400, "GET", "/?nonsense"),
        (405, "POST", "/missing"),
        (411, "PUT", "/missing"),
        (414, "GET", "/" + "k" * 511),
    ],
)
def test_errors_carry_one_line_of_plain_text(
    system: Cluster, status: int, method: str, path: str
) -> None:
    answer = system.server.call(method, path)
    assert answer.status == status
    assert answer.fields["content-type"].startswith("text/plain")
    assert answer.body.count(b"\n") == 1 and answer.body.endswith(b"\n") and len(answer.body) > 5


def test_an_unlinked_key_is_hidden_until_it_is_deleted(system: Cluster) -> None:
    assert system.server.put("/unlinked", b"value") == 201
    record = system.records()[b"/unlinked"]
    assert system.server.call("UNLINK", "/unlinked").status == 204
    assert system.server.get("/unlinked") is None
    assert system.server.call("UNLINK", "/unlinked").status == 404
    assert system.records()[b"/unlinked"] == record._replace(deleted=True)
    assert system.named() <= system.files()  # the bytes are kept
    assert system.server.call("DELETE", "/unlinked").status == 204
    assert system.server.call("DELETE", "/unlinked").status == 404


def test_a_put_over_an_unlinked_key_replaces_it_at_once(cluster: Make) -> None:
    system = cluster()
    for value in (b"first", b"second", b"third"):
        assert system.server.put("/again", value) == 201
        assert system.server.get("/again") == value
        until(system.is_clean)
        assert len(system.files()) == 3
        assert system.server.call("UNLINK", "/again").status == 204


def test_a_failed_put_over_an_unlinked_key_leaves_the_old_value_to_its_delete(
    cluster: Make,
) -> None:
    system = cluster()
    assert system.server.put("/again", b"first") == 201
    assert system.server.call("UNLINK", "/again").status == 204
    assert system.server.call("PUT", "/again", b"second", Content_MD5="0" * 32).status == 400
    until(system.is_clean)
    assert len(system.files()) == 3 and system.server.get("/again") is None
    assert json.loads(system.server.call("GET", "/?unlinked").body)["keys"] == ["/again"]


def test_with_protect_a_key_is_unlinked_before_it_is_deleted(
    cluster: Make,
) -> None:
    server = cluster("-protect").server
    assert server.put("/safe", b"value") == 201
    assert server.call("DELETE", "/safe").status == 403
    assert server.get("/safe") == b"value"
    assert server.call("UNLINK", "/safe").status == 204
    assert server.call("DELETE", "/safe").status == 204
    assert server.call("DELETE", "/safe").status == 404


def test_if_match_replaces_a_live_value_and_its_readers_keep_the_old_one(cluster: Make) -> None:
    server = cluster("-grace", "1h").server
    assert server.put("/k", b"first") == 201
    old = server.call("GET", "/k")
    assert server.call("PUT", "/k", b"second", If_Match="*").status == 201
    assert server.get("/k") == b"second"
    reader = follow(old)
    assert reader is not None and (reader.status, reader.body) == (200, b"first")
    assert set(map(len, server.garbage().values())) == {3}


def test_what_was_replaced_goes_after_grace(cluster: Make) -> None:
    system = cluster()
    for value in (b"first", b"second", b"third"):
        fields = {} if value == b"first" else {"If_Match": "*"}
        assert system.server.call("PUT", "/k", value, **fields).status == 201
    until(system.is_clean)
    assert system.server.get("/k") == b"third" and len(system.files()) == 3


def quoted(value: bytes) -> str:
    """The MD5 of a value as an entity tag."""
    return f'"{hashlib.md5(value).hexdigest()}"'


@pytest.mark.parametrize(
    ("state", "fields", "status"),
    [
        ("live", {"If_Match": quoted(b"first")}, 201),
        ("live", {"If_Match": "*"}, 201),
        ("live", {"If_Match": f"{quoted(b'x')}, {quoted(b'first')}"}, 201),
        ("live", {"If_Match": quoted(b"x")}, 412),
        ("live", {"If_Match": hashlib.md5(b"first").hexdigest()}, 412),  # no quotes
        ("live", {"If_Match": f"W/{quoted(b'first')}"}, 412),
        ("live", {"If_Match": ""}, 412),
        ("live", {"If_None_Match": "*"}, 412),
        ("live", {"If_None_Match": quoted(b"x")}, 412),
        ("live", {"If_Match": "*", "If_None_Match": "*"}, 412),
        ("live", {"If_Match": "*", "If_Unmodified_Since": "Sat, 29 Oct 1994 19:43:31 GMT"}, 412),
        ("live", {"If_Modified_Since": "Sat, 29 Oct 1994 19:43:31 GMT"}, 412),
        ("live", {"If_Match": "*", "Content_Range": "bytes 0-4/5"}, 400),
        ("missing", {"If_Match": "*"}, 412),
        ("missing", {"If_Match": quoted(b"first")}, 412),
        ("missing", {"If_None_Match": "*"}, 201),
        ("missing", {"If_None_Match": quoted(b"x")}, 412),
        ("missing", {"If_Unmodified_Since": "Sat, 29 Oct 1994 19:43:31 GMT"}, 412),
        ("missing", {"Content_Range": "bytes 0-4/5"}, 400),
        ("unlinked", {"If_Match": "*"}, 412),
        ("unlinked", {"If_Match": quoted(b"first")}, 412),
        ("unlinked", {"If_None_Match": "*"}, 201),
    ],
)
def test_a_condition_of_a_put_is_judged_and_never_ignored(
    single: Cluster, state: str, fields: dict[str, str], status: int
) -> None:
    server, path = single.server, "/conditional"
    server.call("DELETE", path)
    if state != "missing":
        assert server.put(path, b"first") == 201
    if state == "unlinked":
        assert server.call("UNLINK", path).status == 204
    assert server.call("PUT", path, b"second", **fields).status == status
    value = b"second" if status == 201 else b"first" if state == "live" else None
    assert server.get(path) == value


@pytest.mark.parametrize("method", ["DELETE", "UNLINK"])
@pytest.mark.parametrize("name", ["If_Match", "If_None_Match", "If_Unmodified_Since"])
def test_a_condition_of_a_delete_is_refused(single: Cluster, method: str, name: str) -> None:
    single.server.put("/conditional", b"value")
    assert single.server.call(method, "/conditional", None, **{name: "*"}).status == 412
    assert single.server.call("GET", "/conditional").status == 302


def test_if_match_is_refused_with_protect_and_without_an_md5(cluster: Make) -> None:
    server = cluster("-protect", "-replicas", "1", volumes=1).server
    assert server.put("/k", b"first") == 201
    assert server.call("PUT", "/k", b"second", If_Match="*").status == 403
    assert server.get("/k") == b"first"


def test_of_many_writers_that_saw_the_same_value_one_replaces_it(system: Cluster) -> None:
    server = system.server
    assert server.put("/swapped", b"0") == 201

    def replace(number: int) -> int:
        return server.call("PUT", "/swapped", b"%d" % number, If_Match=quoted(b"0")).status

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(replace, range(1, 9)))
    assert results.count(201) == 1 and set(results) <= {201, 409, 412}
    assert server.get("/swapped") == b"%d" % (results.index(201) + 1)


def test_the_fallback_gets_the_requests_for_missing_keys(cluster: Make) -> None:
    server = cluster("-fallback", "elsewhere:8080").server
    answer = server.call("GET", "/missing/%C3%A9t%C3%A9")
    assert answer.status == 302
    assert answer.fields["location"] == "http://elsewhere:8080/missing/%C3%A9t%C3%A9"
    answer = server.call("GET", "/a%2Fb%3Fc%20%0D%0A")
    assert answer.fields["location"] == "http://elsewhere:8080/a/b%3Fc%20%0D%0A"
    assert server.put("/here", b"value") == 201
    assert server.get("/here") == b"value"
    assert server.call("UNLINK", "/here").status == 204
    assert server.call("HEAD", "/here").fields["location"] == "http://elsewhere:8080/here"
    assert server.call("DELETE", "/missing").status == 404


def test_the_others_share_what_a_volume_that_is_down_cannot_serve(
    cluster: Make,
) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    locations = system.server.call("GET", "/k").fields["key-volumes"].split(",")
    ask = functools.partial(system.server.call, "GET", "/k")
    up = functools.partial(system.server.metric, "mkv_volumes_up")
    for down in locations:
        volume = next(each for each in system.volumes if down.startswith(each.name))
        volume.kill()
        until(lambda: ask() and up() == 2)
        where = Counter(ask().fields["location"].split("/")[2] for _ in range(600))
        assert len(where) == 2 and min(where.values()) > 200, where  # not so: one time in 10^15
        volume.start()
        until(lambda: up() == 3)


def test_balance_is_told_by_the_volumes_of_now(cluster: Make) -> None:
    system = cluster("-replicas", "1")
    assert system.server.put("/one", b"value") == 201
    assert system.server.call("GET", "/one").fields["key-balance"] == "balanced"
    system.server.stop()
    other = system.start(system.server.port, "-replicas", "2")
    answer = other.call("GET", "/one")
    assert answer.fields["key-balance"] == "unbalanced"
    assert len(answer.fields["key-volumes"].split(",")) == 1
    assert other.get("/one") == b"value"


def test_one_subvolume_means_no_sub_folders(cluster: Make) -> None:
    system = cluster(subvolumes=1)
    assert system.server.put("/flat", b"value") == 201
    assert system.server.get("/flat") == b"value"
    assert {volume.name for volume in system.volumes} == {
        replica.location for replica in system.records()[b"/flat"].replicas
    }
    until(system.is_clean)


def test_content_md5_is_checked_in_base64_and_hex(system: Cluster) -> None:
    digest = hashlib.md5(b"value")
    good = [digest.hexdigest(), digest.hexdigest().upper(), base64.b64encode(digest.digest())]
    for number, md5 in enumerate(good):
        assert system.server.call("PUT", f"/md5-{number}", b"value", Content_MD5=md5).status == 201
    other = hashlib.md5(b"other")
    bad = [other.hexdigest(), base64.b64encode(other.digest()), "xyz", "00", digest.hexdigest()[1:]]
    for md5 in bad:
        assert system.server.call("PUT", "/md5-bad", b"value", Content_MD5=md5).status == 400, md5
    assert system.server.get("/md5-bad") is None
    assert system.server.put("/md5-bad", b"free at once") == 201


def test_an_empty_value_is_411(system: Cluster) -> None:
    assert system.server.put("/empty", b"") == 411  # Content-Length: 0
    assert system.server.put("/empty", iter([])) == 411  # chunked
    assert statuses(raw(system.server.port, request("PUT", "/empty", b"", "Connection: close\r\n")))
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/empty"))  # no length at all
        assert wire.answer().status == 411
    assert system.server.get("/empty") is None


def test_keys_are_utf_8_of_2_to_511_bytes(system: Cluster) -> None:
    server = system.server
    for path in ("/", "/%FF", "/%C3", "/a%ED%A0%80", "/%", "/%4", "/%zz"):
        for method in ("GET", "PUT", "DELETE"):
            if (method, path) != ("GET", "/"):
                body = b"x" if method == "PUT" else None
                assert server.call(method, path, body).status == 400, (method, path)
    longest = "/" + "é" * 255
    assert len(longest.encode()) == 511
    for key in ("/a", longest, "/photos/été", "/😀?#%&+ ;=\n\0\"'", "//", "/a//b/../c/."):
        assert server.put(quote(key), key.encode()) == 201, key
        assert server.get(quote(key)) == key.encode(), key
        assert key.encode() in system.records()
        assert server.call("DELETE", quote(key)).status == 204, key
    for method in ("GET", "PUT", "DELETE", "UNLINK"):
        assert server.call(method, "/" + "k" * 511, b"x").status == 414, method
    for path in ("/", "/%FF", "/" + "k" * 511):  # a HEAD has no body
        assert raw(server.port, request("HEAD", path, b"", CLOSE)).endswith(b"\r\n\r\n"), path


def test_the_root_alone_is_a_page_of_help(system: Cluster) -> None:
    answer = system.server.call("GET", "/")
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/plain")
    for word in (b"curl", b"DELETE", b"?list", b"?metrics"):
        assert word in answer.body
    assert system.server.call("HEAD", "/").fields["content-length"] == str(len(answer.body))


def test_a_key_is_the_decoded_path_however_it_was_written(system: Cluster) -> None:
    assert system.server.put("/%61bc%2fd", b"value") == 201
    assert system.server.get("/abc/d") == b"value"
    with Wire(system.server.port) as wire:
        wire.send(request("GET", "http://somewhere:3000/abc/d"))
        assert wire.answer().status == 302


def test_a_value_may_come_late_while_volumes_are_reloaded(cluster: Make) -> None:
    system = cluster()
    assert [system.server.put(f"/warm{n}", b"value") for n in range(3)] == [201] * 3
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/late", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert wire.head()[0] == 100
        for volume in system.volumes:
            old = volume.workers()
            os.kill(volume.process.pid, signal.SIGHUP)  # ends idle connections
            until(lambda v=volume, old=old: not set(old) & set(v.workers()))
        wire.send(b"value")
        assert wire.answer().status == 201
    assert system.server.get("/late") == b"value"


def test_another_method_is_405_with_allow(system: Cluster) -> None:
    for method in ("POST", "PATCH", "OPTIONS", "TRACE", "MOVE"):
        answer = system.server.call(method, "/key")
        assert answer.status == 405, method
        allowed = set(answer.fields["allow"].split(", "))
        assert {"GET", "HEAD", "PUT", "DELETE", "UNLINK"} <= allowed


@pytest.mark.parametrize("query", ["", "x", "x=1&y", "_=1700000000", "%FF=1"])
def test_unknown_words_after_a_plain_key_are_ignored_in_reading_only(
    single: Cluster, query: str
) -> None:
    server = single.server
    server.put("/plain", b"value")
    for method in ("GET", "HEAD"):
        answer = server.call(method, f"/plain?{query}")
        assert answer.status == 302 and answer.fields["location"].count("?") == 0
        assert server.call(method, f"/plain-missing?{query}").status == 404
    if query:
        for method in ("PUT", "DELETE", "UNLINK", "REBALANCE"):
            assert server.call(method, f"/plain?{query}", b"x").status == 400, method
    assert server.get("/plain") == b"value"


def test_another_query_is_400(system: Cluster) -> None:
    paths = "/?lists /?list&unlinked /?list&x=1 /?start=/a /?limit=1 /?list&garbage /a?list&x=1"
    paths += " /?list&limit=x /?list&limit=-1 /?list&start=%FF /?list&start=%zz /%FF?list /%zz?list"
    for path in paths.split():
        assert system.server.call("GET", path).status == 400, path
    assert system.server.call("GET", "/" + "k" * 511 + "?list").status == 414
    for method in ("PUT", "DELETE", "UNLINK"):
        assert system.server.call(method, "/key?list", b"x").status == 400, method
    assert system.server.get("/key") is None


def test_health_is_ok(system: Cluster) -> None:
    assert system.server.call("GET", "/?health") == Reply(
        200, {"content-length": "3", **TEXT}, b"ok\n"
    )


METRICS = """requests_total request_seconds_total received_bytes_total keys garbage_keys
intents_open volumes volumes_up volume_up connections commits_total commit_seconds_total
swept_files_total event_loop_lag_seconds"""


def test_metrics_count_requests_bytes_and_keys(cluster: Make) -> None:
    server = cluster().server
    for status in (201, 403):
        assert server.put("/counted", b"x" * 1000) == status
    assert server.put("/deleted", b"x") == 201
    assert server.call("DELETE", "/deleted").status == 204
    answer = server.call("GET", "/?metrics")
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/plain")
    text, number = answer.body.decode(), r"-?[0-9.]+(e[+-]?[0-9]+)?"
    for line in text.splitlines():
        assert re.fullmatch(
            rf'#.*|[a-z_]+(\{{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\}})? {number}', line
        ), line
    assert server.metric('mkv_requests_total{method="PUT",status="201"}') == 2
    assert server.metric('mkv_requests_total{method="PUT",status="403"}') == 1
    assert server.metric("mkv_swept_files_total") == 3
    assert server.metric('mkv_request_seconds_total{method="PUT"}') > 0
    assert server.metric("mkv_received_bytes_total") >= 1000
    assert (server.metric("mkv_keys"), server.metric("mkv_garbage_keys")) == (1, 0)
    assert (server.metric("mkv_volumes"), server.metric("mkv_volumes_up")) == (3, 3)
    assert server.metric("mkv_commits_total") >= 1 and server.metric("mkv_commit_seconds_total") > 0
    assert 0 <= server.metric("mkv_event_loop_lag_seconds") < 10
    for name in METRICS.split():
        kind = "counter" if name.endswith("_total") else "gauge"
        assert f"# TYPE mkv_{name} {kind}\n" in text and f"# HELP mkv_{name} " in text, name
        assert re.search(rf"^mkv_{name}[ {{]", text, re.M), name


def test_the_second_of_two_concurrent_puts_is_409(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(
            request("PUT", "/contended", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n")
        )
        assert wire.head()[0] == 100
        assert system.server.put("/contended", b"second") == 409
        assert system.server.get("/contended") is None
        wire.send(b"first")
        assert wire.answer().status == 201
    assert system.server.get("/contended") == b"first"
    assert system.server.put("/contended", b"third") == 403


def test_of_many_concurrent_puts_exactly_one_wins(system: Cluster) -> None:
    with ThreadPoolExecutor(16) as pool:
        values = [str(number).encode() * 50_000 for number in range(16)]
        results = list(pool.map(lambda value: system.server.put("/race", value), values))
    assert sorted(set(results) - {403, 409}) == [201] and results.count(201) == 1
    assert system.server.get("/race") == values[results.index(201)]


def test_get_is_503_when_no_volume_can_be_reached(cluster: Make) -> None:
    system = cluster(volumes=3)
    assert system.server.put("/away", b"value") == 201
    for volume in system.volumes:
        volume.kill()
    until(lambda: system.server.call("GET", "/away").status == 503)
    assert system.server.put("/more", b"value") == 503
    for volume in system.volumes:
        volume.start()
    until(lambda: system.server.call("GET", "/away").status == 302)
    assert system.server.get("/away") == b"value"
    until(lambda: system.server.put("/more", b"value") == 201)


# --- lists ----------------------------------------------------------------------------------------


def test_list_of_nothing_is_empty(cluster: Make) -> None:
    server = cluster().server
    assert listed(server, "/?list") == ([], "")
    assert listed(server, "/?unlinked&start=/x&limit=5") == ([], "")
    assert server.put("/a", b"x") == 201
    assert listed(server, "/b?list") == ([], "")
    assert listed(server, "/?list&start=/b") == ([], "")
    assert listed(server, "/0?list") == ([], "")


def test_a_page_may_begin_at_any_key(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    keys = ["/a", "/a b+%41&c=1#?", "/\u00ff", "/\ufffd", "/\ufffd\ufffd", "/\U0010ffff"]
    for key in keys:
        assert server.put(quote(key), b"x") == 201
    pages, start = [], ""
    while start or not pages:
        page, start = listed(server, f"/?list&limit=1&start={quote(start)}")
        pages += page
    assert pages == keys


def test_list_gives_keys_in_order_with_prefix_start_and_limit(
    cluster: Make,
) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    keys = ["/a", "/a/1", "/a/2", '/a/"3"\\', "/a/\n", "/ab", "/b c+d", "/été/1", "/été/😀"]
    keys.sort(key=str.encode)
    for key in keys:
        assert server.put(quote(key), b"x") == 201
    assert listed(server, "/?list") == (keys, "")
    assert listed(server, "/a?list")[0] == [key for key in keys if key.startswith("/a")]
    assert listed(server, "/a/?list")[0] == [key for key in keys if key.startswith("/a/")]
    assert listed(server, quote("/é") + "?list")[0] == ["/été/1", "/été/😀"]
    assert listed(server, "/?list&start=/a/2")[0] == keys[keys.index("/a/2") :]
    assert listed(server, "/a/?list&start=/")[0] == [key for key in keys if key.startswith("/a/")]
    assert listed(server, "/a/?list&start=/b")[0] == []
    assert listed(server, "/?list&limit=0") == ([], "/a")
    assert listed(server, f"/?list&limit={len(keys)}") == (keys, "")
    assert listed(server, "/a?list&limit=100")[1] == ""
    assert listed(server, "/a/?list&limit=4") == ([k for k in keys if k.startswith("/a/")], "")
    for limit in range(1, len(keys)):
        pages, start = [], ""
        while not pages or start:
            page, start = listed(server, f"/?list&limit={limit}&start={quote(start)}")
            assert len(page) <= limit
            pages += page
        assert pages == keys


def test_unlinked_keys_have_a_list_of_their_own(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    for number in range(10):
        assert server.put(f"/{number}", b"x") == 201
    for number in range(0, 10, 2):
        assert server.call("UNLINK", f"/{number}").status == 204
    assert listed(server, "/?list") == ([f"/{number}" for number in range(1, 10, 2)], "")
    assert listed(server, "/?unlinked") == ([f"/{number}" for number in range(0, 10, 2)], "")
    assert listed(server, "/?unlinked&limit=2") == (["/0", "/2"], "/4")
    assert listed(server, "/?list&limit=2") == (["/1", "/3"], "/5")
    assert server.call("DELETE", "/4").status == 204
    assert listed(server, "/?unlinked&start=/2&limit=2") == (["/2", "/6"], "/8")


def test_a_list_for_http_1_0_is_not_chunked(system: Cluster) -> None:
    assert system.server.put("/old-list/1", b"x") == 201
    answer = raw(system.server.port, b"GET /old-list/?list HTTP/1.0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert json.loads(body) == {"keys": ["/old-list/1"], "next": ""}


def test_a_long_list_says_all_of_a_key(cluster: Make) -> None:
    system = cluster(volumes=3, subvolumes=3)
    server, before = system.server, int(time.time())
    assert server.put("/long", b"value") == server.put(quote("/été"), b"x") == 201
    page = json.loads(server.call("GET", "/l?list&long").body)
    assert set(page) == {"keys", "next"} and page["next"] == ""
    (item,) = page["keys"]
    files = sorted(item.pop("files"))
    assert before <= item.pop("time") <= time.time() + 1
    assert item == {"key": "/long", "size": 5, "md5": hashlib.md5(b"value").hexdigest()}
    assert files == sorted(f for f in system.files() if mkv.key2path(b"/long") in f)
    assert len(files) == 3
    assert [item["key"] for item in server.pages("/?list")] == ["/long", "/été"]
    first = json.loads(server.call("GET", "/?list&long&limit=1").body)
    assert ([item["key"] for item in first["keys"]], first["next"]) == (["/long"], "/été")
    assert server.call("UNLINK", "/long").status == 204
    (item,) = server.pages("/?unlinked")
    assert item["key"] == "/long" and sorted(item["files"]) == files


def test_a_long_list_says_null_where_nothing_is_known(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1)
    system.server.stop()
    plant(system.folder / "index", [(b"/old", f"{system.volumes[0].name}/sv00".encode())])
    system.server.start()
    (item,) = system.server.pages("/?list")
    (file,) = item.pop("files")
    assert item == {"key": "/old", "size": None, "md5": None, "time": None}
    assert file == f"{system.volumes[0].name}/sv00{mkv.key2path(b'/old')}"


def test_garbage_is_listed_with_its_age(cluster: Make) -> None:
    system = cluster("-grace", "1h")
    assert system.server.put("/k", b"first") == 201
    files = system.files()
    assert json.loads(system.server.call("GET", "/?garbage").body)["garbage"] == []
    assert system.server.call("PUT", "/k", b"second", If_Match="*").status == 201
    rows = json.loads(system.server.call("GET", "/?garbage").body)["garbage"]
    assert {row["file"] for row in rows} == files and {row["key"] for row in rows} == {"/k"}
    assert all(0 <= row["age"] < 60 for row in rows)


def test_a_list_of_a_million_keys_streams_without_memory_and_without_stalling_others(
    cluster: Make,
) -> None:
    system = cluster()
    server = system.server
    assert server.put("/hot", b"value") == 201
    server.stop()
    keys = [b"/many/%07d/some-name-of-middling-length.jpeg" % number for number in range(1_000_000)]
    with lmdb.open(str(server.db), max_dbs=2, map_size=1 << 40) as env:
        table = env.open_db(b"keys")
        with env.begin(table, write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti([(key, b"127.0.0.1:1/sv00 5 0123456789abcdef") for key in keys])
    server.start()
    until(lambda: server.get("/hot") == b"value")
    before, peak, delays, body = anonymous_memory(server.process.pid), 0, [], []

    def read_all() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as lister:
            lister.request("GET", "/?list")
            answer = lister.getresponse()
            while piece := answer.read(1 << 20):
                body.append(piece)

    reader = threading.Thread(target=read_all)
    # A client that reads nothing of its list costs no memory either.
    with Wire(server.port) as stalled, Wire(server.port) as wire:
        stalled.send(request("GET", "/?list"))
        assert stalled.head()[0] == 200
        reader.start()
        while reader.is_alive():
            began = time.perf_counter()
            wire.send(request("GET", "/hot"))
            assert wire.answer().status == 302
            delays.append(time.perf_counter() - began)
            peak = max(peak, anonymous_memory(server.process.pid))
    reader.join()
    found = json.loads(b"".join(body))
    assert found["next"] == ""
    assert found["keys"] == ["/hot", *(key.decode() for key in keys)]
    assert peak - before < 16 << 20
    assert len(delays) > 20
    assert sorted(delays)[len(delays) * 9 // 10] < 0.05


# --- http -----------------------------------------------------------------------------------------


def test_a_connection_is_kept_for_many_requests(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        for number in range(100):
            wire.send(request("GET", f"/kept-{number}"))
            assert wire.answer().status == 404
        wire.send(request("PUT", "/kept", b"value"))
        assert wire.answer().status == 201
        wire.send(request("GET", "/kept", b"", "Connection: close\r\n"))
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (302, "close")
        assert wire.closed()


@pytest.mark.parametrize("options", ["close", "Close", "x,close", "x ,\tclose", "close\t, x"])
def test_the_option_close_may_stand_among_others(system: Cluster, options: str) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("GET", "/?health", b"", f"Connection: {options}\r\n"))
        assert wire.answer().fields["connection"] == "close"
        assert wire.closed()


def test_http_1_0_is_honoured(system: Cluster) -> None:
    answer = raw(system.server.port, b"PUT /old HTTP/1.0\r\nContent-Length: 5\r\n\r\nvalue")
    assert statuses(answer) == [201]
    assert statuses(raw(system.server.port, b"GET /old HTTP/1.0\r\n\r\n")) == [302]


def test_pipelined_requests_are_answered_in_order(system: Cluster) -> None:
    steps = [("GET", 404), ("PUT", 201), ("GET", 302), ("DELETE", 204), ("GET", 404)]
    stream = b"".join(
        request(method, f"/pipe-{number}", b"v" * 70_000 if method == "PUT" else b"")
        for number in range(5)
        for method, _ in steps
    )
    last = request("GET", "/?health", b"", "Connection: close\r\n")
    assert statuses(raw(system.server.port, stream + last)) == [s for _, s in steps] * 5 + [200]


def test_chunked_uploads_work(system: Cluster) -> None:
    pieces = [
        random.Random(size).randbytes(size) for size in (1, 10, 100_000, 3, 1_000_000, 65_536)
    ]
    assert system.server.put("/chunked", iter(pieces)) == 201
    assert system.server.get("/chunked") == b"".join(pieces)
    assert system.records()[b"/chunked"].size == sum(map(len, pieces))


def test_the_body_of_a_get_is_not_taken_for_a_request(system: Cluster) -> None:
    body = request("PUT", "/smuggled", b"x")
    answer = raw(system.server.port, request("GET", "/bodied", body, "Connection: close\r\n"))
    assert statuses(answer) == [404]
    assert system.server.get("/smuggled") is None


def test_100_continue_comes_before_a_body_that_will_be_taken(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/invited", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert wire.head()[0] == 100
        wire.send(b"value")
        assert wire.answer().status == 201
        chunked = "Transfer-Encoding: chunked\r\nExpect: 100-Continue\r\n"
        wire.send(request("PUT", "/invited-2", b"", chunked))
        assert wire.head()[0] == 100
        wire.send(b"5\r\nvalue\r\n0\r\n\r\n")
        assert wire.answer().status == 201
    assert system.server.get("/invited") == system.server.get("/invited-2") == b"value"


def test_100_continue_does_not_come_before_a_refusal(system: Cluster) -> None:
    assert system.server.put("/taken", b"value") == 201
    expect = "Content-Length: 5\r\nExpect: 100-continue\r\n"
    refused = {
        403: request("PUT", "/taken", b"", expect),
        400: request("PUT", "/uninvited", b"", expect + "Content-MD5: xyz\r\n"),
        414: request("PUT", "/" + "k" * 600, b"", expect),
        405: request("POST", "/uninvited", b"", expect),
        404: request("DELETE", "/uninvited", b"", expect),
        411: request("PUT", "/uninvited", b"", "Content-Length: 0\r\nExpect: 100-continue\r\n"),
    }
    for status, data in refused.items():
        with Wire(system.server.port) as wire:
            wire.send(data)
            assert wire.head()[0] == status


def test_another_expectation_is_ignored(system: Cluster) -> None:
    data = request("PUT", "/expecting", b"value", "Expect: 200-ok\r\nConnection: close\r\n")
    assert statuses(raw(system.server.port, data)) == [201]


def test_who_sends_50_mb_to_an_existing_key_reads_the_403(system: Cluster) -> None:
    assert system.server.put("/there", b"value") == 201
    for _ in range(3):
        with Wire(system.server.port) as wire:
            wire.send(request("PUT", "/there", b"x" * 50_000_000))  # fails if it is reset
            assert wire.answer().status == 403
            assert wire.closed()


def test_sigterm_lets_an_upload_finish(cluster: Make) -> None:
    system = cluster()
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/late", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert wire.head()[0] == 100
        system.server.process.send_signal(signal.SIGTERM)
        until(lambda: not system.server_accepts())
        wire.send(b"value")
        assert wire.answer().status == 201
    assert system.server.process.wait(30) == 0
    system.server.start()
    assert system.server.get("/late") == b"value"


BAD_HEADS = {
    "length and chunked": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n" + CHUNKED),
    "chunked and length": (400, f"PUT /k HTTP/1.1\r\nHost: x\r\n{CHUNKED}Content-Length: 3\r\n"),
    "differing lengths": (
        400,
        "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\ncontent-length: 4\r\n",
    ),
    "differing lengths in a list": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 4\r\n"),
    "bare CR in a field": (400, "GET /k HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n"),
    "bare CR ends a field": (400, "GET /k HTTP/1.1\r\nHost: x\rX: a\r\n"),
    "bare CR in the request line": (400, "GET /k\r HTTP/1.1\r\nHost: x\r\n"),
    "bare LF ends a field": (400, "GET /k HTTP/1.1\r\nHost: x\nX: a\r\n"),
    "bare LF ends the request line": (400, "GET /k HTTP/1.1\nHost: x\r\n"),
    "bare LF ends the head": (400, "GET /k HTTP/1.1\r\nHost: x\r\n\n"),
    "bare LFs only": (400, "GET /k HTTP/1.1\nHost: x\n\n"),
    "NUL in a field": (400, "GET /k HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n"),
    "folded field": (400, "GET /k HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n"),
    "folded first field": (400, "GET /k HTTP/1.1\r\n Host: x\r\nHost: x\r\n"),
    "space before the colon": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n"),
    "tab before the colon": (400, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding\t: chunked\r\n"),
    "no colon": (400, "GET /k HTTP/1.1\r\nHost: x\r\nnonsense\r\n"),
    "no name": (400, "GET /k HTTP/1.1\r\nHost: x\r\n: value\r\n"),
    "no Host": (400, "GET /k HTTP/1.1\r\n"),
    "two Hosts": (400, "GET /k HTTP/1.1\r\nHost: x\r\nHost: y\r\n"),
    "no version": (400, "GET /k\r\nHost: x\r\n"),
    "two spaces": (400, "GET  /k HTTP/1.1\r\nHost: x\r\n"),
    "space in the path": (400, "GET /k k HTTP/1.1\r\nHost: x\r\n"),
    "no path": (400, "GET k HTTP/1.1\r\nHost: x\r\n"),
    "another protocol": (400, "GET /k HTTQ/1.1\r\nHost: x\r\n"),
    "gzip, chunked": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n"),
    "gzip": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n"),
    "identity": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n"),
    "xchunked": (501, "PUT /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n"),
    "chunked twice": (501, f"PUT /k HTTP/1.1\r\nHost: x\r\n{CHUNKED}{CHUNKED}"),
    "a head over 16 KiB": (431, f"GET /k HTTP/1.1\r\nHost: x\r\nX: {'x' * 17000}\r\n"),
    "many fields over 16 KiB": (431, "GET /k HTTP/1.1\r\nHost: x\r\n" + "X: y\r\n" * 3000),
    "a path over 16 KiB": (431, f"GET /{'k' * 17000} HTTP/1.1\r\nHost: x\r\n"),
}
for _length in ("+3", "-3", "0x3", "3 3", "3;", "3.0", "1e3", "", "x", "9" * 30, "\u00b3"):
    _line = f"PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: {_length}\r\n"
    BAD_HEADS[f"length {_length!a}"] = (400, _line)


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_doubtful_head_is_refused_and_nothing_after_it_is_read(
    system: Cluster, name: str
) -> None:
    status, head = BAD_HEADS[name]
    answer = raw(system.server.port, head.encode("latin-1") + b"\r\n" + SMUGGLED)
    assert statuses(answer) == [status]
    assert b"connection: close" in answer.lower()
    assert system.server.get("/smuggled") is None


@pytest.mark.parametrize("name", [name for name, (status, _) in BAD_HEADS.items() if status != 431])
def test_the_parser_of_heads_refuses_them_by_itself(name: str) -> None:
    status, head = BAD_HEADS[name]
    head, end, _ = (head + "\r\n" + SMUGGLED.decode()).partition("\r\n\r\n")  # as it is cut
    with pytest.raises(mkv.HTTPError) as error:
        mkv.parse_request((head + end).encode("latin-1"))
    assert error.value.status == status


@pytest.mark.parametrize(
    "body",
    [
        *("x\r\nabc\r\n0\r\n\r\n", "-3\r\nabc\r\n0\r\n\r\n", "+3\r\nabc\r\n0\r\n\r\n"),
        *("0x3\r\nabc\r\n0\r\n\r\n", " 3\r\nabc\r\n0\r\n\r\n", "\r\nabc\r\n0\r\n\r\n"),
        *("3 3\r\nabc\r\n0\r\n\r\n", "3_\r\nabc\r\n0\r\n\r\n", "fffffffffffffffff\r\nabc\r\n"),
        *("3\nabc\r\n0\r\n\r\n", "3\r\nabc\n0\r\n\r\n", "3\r\nabcd\r\n0\r\n\r\n"),
        *("3\r\nab\r\n0\r\n\r\n", "3;x=\ry\r\nabc\r\n0\r\n\r\n", "3;x=\ny\r\nabc\r\n0\r\n\r\n"),
        *("3\r\nabc\r\n0\r\nbad trailer\r\n\r\n", "3\r\nabc\r\n0\r\n bad: trailer\r\n\r\n"),
        *("3\r\nabc\r\n0\r\nX: y\n\r\n",),
    ],
    ids=lambda body: ascii(body[:20]),
)
def test_a_doubtful_chunked_body_is_refused_and_nothing_after_it_is_read(
    system: Cluster, body: str
) -> None:
    head = request("PUT", "/doubtful", b"", CHUNKED)
    answer = raw(system.server.port, head + body.encode() + SMUGGLED)
    assert statuses(answer) == [400]
    assert b"connection: close" in answer.lower()
    assert system.server.get("/smuggled") is None
    assert system.server.get("/doubtful") is None


def test_a_head_without_end_is_431_as_soon_as_it_is_too_long(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(b"GET /k HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 3000)
        assert wire.answer().status == 431
        assert wire.closed()


def test_a_head_just_under_16_kib_is_taken(system: Cluster) -> None:
    fields = "".join(f"X-{number}: {'x' * 250}\r\n" for number in range(62))
    data = request("GET", "/?health", b"", fields + "Connection: close\r\n")
    assert 16_000 < len(data) < 16_384
    assert statuses(raw(system.server.port, data)) == [200]


def test_a_slow_head_is_408(cluster: Make) -> None:
    port = cluster("-replicas", "1", volumes=1, constants={"HEAD_TIME": 0.3}).server.port
    with Wire(port) as silent, Wire(port) as trickling:
        silent.send(b"GET /k HTTP/1.1\r\nHo")
        trickling.socket.settimeout(0.05)
        answer = b""
        for byte in itertools.chain(b"GET /k HTTP/1.1\r\nX: ", itertools.repeat(120, 400)):
            with contextlib.suppress(TimeoutError):  # the pace of the bytes
                trickling.send(bytes([byte]))
                if answer := trickling.socket.recv(1000):
                    break
        assert statuses(answer) == [408]
        assert silent.answer().status == 408
        assert silent.closed()


def test_a_body_that_stops_is_408_and_leaves_nothing(cluster: Make) -> None:
    system = cluster(constants={"BODY_TIME": 0.5})
    for length, body in (
        ("Content-Length: 10\r\n", b"x"),
        ("Content-Length: 1000000\r\n", b"x"),
        (CHUNKED, b""),
        (CHUNKED, b"5\r\nx"),
        (CHUNKED, b"1\r\nx\r\n0\r\nX: y\r\n"),
    ):
        with Wire(system.server.port) as wire:
            wire.send(request("PUT", "/slow", b"", length) + body)
            assert wire.answer().status == 408
            wire.send(b"\r\n" + SMUGGLED)
            assert wire.closed()
        assert system.server.put("/slow", b"value") == 201
        assert system.server.call("DELETE", "/slow").status == 204
    assert system.server.get("/smuggled") is None
    until(system.is_clean)


def test_a_fast_start_buys_no_more_time_than_the_limit(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1, constants={"BODY_TIME": 0.5}).server
    for head, start in (("Content-Length: 10000000\r\n", b""), (CHUNKED, b"989680\r\n")):
        with Wire(server.port) as wire:
            wire.send(request("PUT", "/fast", b"", head) + start + bytes(5_000_000))
            began = time.monotonic()
            assert wire.answer().status == 408
            assert time.monotonic() - began < 5
    assert server.get("/fast") is None


def is_quiet(wire: Wire, seconds: float) -> bool:
    """Whether nothing comes for a while, not even the end."""
    wire.socket.settimeout(seconds)
    try:
        return wire.socket.recv(1) is None
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    finally:
        wire.socket.settimeout(30)


def test_idle_connections_end(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1, constants={"IDLE_TIME": 0.3}).server
    with Wire(server.port) as fresh, Wire(server.port) as used:
        used.send(request("GET", "/?health"))
        assert used.answer().status == 200
        assert fresh.closed() and used.closed()


def test_idle_time_is_longer_than_that_of_common_load_balancers() -> None:
    assert mkv.IDLE_TIME == 75


def test_the_time_that_a_request_took_is_no_idle_time(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1, constants={"IDLE_TIME": 1.5}).server
    with Wire(server.port) as wire:
        wire.send(request("PUT", "/long", b"", "Content-Length: 2\r\n") + b"x")
        assert is_quiet(wire, 1.7)
        wire.send(b"x")
        assert wire.answer().status == 201
        assert is_quiet(wire, 0.5)
        wire.send(request("GET", "/long"))
        assert wire.answer().status == 302


def test_a_connection_that_asks_now_and_then_is_not_idle(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1, constants={"IDLE_TIME": 1}).server
    assert server.call("PUT", "/k", b"value").status == 201
    with Wire(server.port) as wire:
        for path, status in (("/k", 302), ("/none", 404)) * 3:
            assert is_quiet(wire, 0.5)
            wire.send(request("GET", path))
            assert wire.answer().status == status
        assert wire.closed()


def test_a_request_that_comes_in_parts_is_counted_once(cluster: Make) -> None:
    server = cluster().server
    assert server.call("PUT", "/k", b"value").status == 201
    with Wire(server.port) as wire:
        for _ in range(5):
            wire.send(request("GET", "/k"))
            assert wire.answer().status == 302
        wire.send(request("GET", "/k") + request("GET", "/none") + b"GET /k HTTP/1.1\r\nHo")
        assert [wire.answer().status for _ in range(2)] == [302, 404]
        wire.send(b"st: x\r\n\r\n")
        assert wire.answer().status == 302
    assert server.metric('mkv_requests_total{method="GET",status="302"}') == 7
    assert server.metric('mkv_requests_total{method="GET",status="404"}') == 1


# --- linear and fair ------------------------------------------------------------------------------

PATTERNS = {name: value for name, value in vars(mkv).items() if isinstance(value, re.Pattern)}


def cpu_of(work: Callable[[], Any]) -> float:
    """The least CPU time of three runs, in seconds."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_takes_time_that_grows_with_its_input(name: str) -> None:
    pattern = PATTERNS[name]
    finds = [pattern.match, pattern.fullmatch]
    if f"{name}.search(" in (HERE / "mkv.py").read_text():
        finds.append(pattern.search)
    units = ' \t a0A:;,=/%"&?@-.\r\n\0\x01\xff'
    runs = [
        *units,
        " \t",
        "a ",
        "0,",
        "a:",
        "a=",
        "a;",
        "\r\n",
        "a: \t\r\n",
        "%41",
        "/a",
        '"a"',
        "@0",
    ]
    starts = "", "a", "a:", "0;", "GET /", "HTTP/1.1 200 ", "GET /?", "a: b"
    ends = "", "\x01", "\r\n", "\r\n\r\n", "é", " "
    for start, run, end in itertools.product(starts, runs, ends):

        def text(size: int, start: str = start, run: str = run, end: str = end) -> Any:
            whole = start + run * (size // len(run)) + end
            return whole if isinstance(pattern.pattern, str) else whole.encode("latin-1")

        for find in finds:
            short, long = text(8 << 10), text(64 << 10)
            slow = cpu_of(lambda find=find, data=short: find(data))
            assert slow < 0.05, (start, run, end, find)  # then it is worth no longer look
            if slow > 0.001:
                ratio = cpu_of(lambda find=find, data=long: find(data)) / slow
                assert ratio < 16, (start, run, end, find)


@pytest.mark.parametrize(
    "tail",
    [
        b"a:" + b" " * 16_000 + b"\x01",
        b"a:" + b" \t" * 8000 + b"\x01",
        b"a: " + b"b " * 8000 + b"\x01",
    ],
)
def test_a_head_of_blanks_is_refused_in_no_time(tail: bytes) -> None:
    def parse() -> None:
        with pytest.raises(mkv.HTTPError):
            mkv.parse_request(b"GET /k HTTP/1.1\r\nHost: x\r\n" + tail + b"\r\n\r\n")

    assert cpu_of(parse) < 0.02


def hog(port: int, enough: threading.Event, data: bytes) -> None:
    """A client that sends the same again and again, on a new connection each."""
    while not enough.is_set():
        with contextlib.suppress(OSError), Wire(port) as wire:
            wire.socket.settimeout(5)
            wire.send(data)
            while wire.socket.recv(65536):
                pass


ONE_BYTE_CHUNKS = (
    request("PUT", "/hog", b"", CHUNKED + CLOSE) + b"1\r\nx\r\n" * 43_000 + b"0\r\n\r\n"
)
LONG_HEAD = b"GET /hog HTTP/1.1\r\nHost: x\r\na:" + b" " * 16_300 + b"\x01\r\n\r\n"


@pytest.mark.parametrize("data", [ONE_BYTE_CHUNKS, LONG_HEAD], ids=["chunks", "heads"])
def test_eight_hogs_do_not_keep_another_client_waiting(cluster: Make, data: bytes) -> None:
    system = cluster("-voltimeout", "1s")
    server, enough = system.server, threading.Event()
    hogs = [
        threading.Thread(
            target=hog, args=(server.port, enough, data.replace(b"/hog", b"/hog%d" % number))
        )
        for number in range(8)
    ]
    assert server.put("/there", b"value") == 201
    for thread in hogs:
        thread.start()
    try:
        client, times, deadline = Client(server.port), [], time.monotonic() + 4
        while time.monotonic() < deadline:
            number = len(times)
            for method, path, body, status in (
                ("GET", "/there", None, 302),
                ("PUT", f"/fair{number}", b"value", 201),
            ):
                began = time.monotonic()
                assert client.call(method, path, body).status == status
                times.append(time.monotonic() - began)
            assert server.metric("mkv_volumes_up") == 3
    finally:
        enough.set()
        for thread in hogs:
            thread.join()
    assert max(times) < 0.5, sorted(times)[-5:]
    assert len(times) > 20


def test_a_body_of_small_chunks_is_taken_whole(single: Cluster) -> None:
    body = b"".join(b"1\r\n%c\r\n" % (n % 251) for n in range(43_000)) + b"0\r\n\r\n"
    assert statuses(
        raw(single.server.port, request("PUT", "/crumbs", b"", CHUNKED + CLOSE) + body)
    ) == [201]
    assert single.server.get("/crumbs") == bytes(n % 251 for n in range(43_000))


# --- bytes that nobody meant ----------------------------------------------------------------------


LAST = request("GET", "/?health", b"", CLOSE)
ODD = [b"\r", b"\n", b"\0", b" ", b":", b",", b";", b"%", b"\xff", b"\r\n", b"\r\n\r\n", b"0", b"-"]
ODD += [b"9" * 40, b"x" * 500, b"HTTP/1.0", b"Content-Length: 7\r\n", b"Expect: 100-continue\r\n"]
ODD += [CHUNKED.encode(), CLOSE.encode(), b"fffffffffffffff\r\n", b"X: y\r\n" * 120]
ODD += [b"\t", b"\r\n Host: y", b"Host: y\r\n", b"x" * mkv.MAX_HEAD]
ODD += [b"\t", b"\r\n Host: y", b"Host: y\r\n", b"x" * 16_384]
REQUESTS = [
    request("GET", "/%41?list&start=%00"),
    request("HEAD", "http://x/e", b"", "X: y\r\n" + CLOSE),
    request("PUT", "/b", b"x" * 50),
    request("PUT", "/c", b"", CHUNKED) + b"5;x=y\r\nabcde\r\n0\r\nTrailer: 1\r\n\r\n",
    b"DELETE /d HTTP/1.0\r\nExpect: 100-continue\r\n\r\n",
]
ANSWERS = [
    b"HTTP/1.1 201 Created\r\nServer: nginx\r\nContent-Length: 3\r\nLocation: http://x/\r\n\r\nabc",
    b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\n" + CHUNKED.encode() + b"\r\n4;x\r\n<h1>\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.0 200\r\nETag: x\r\n\r\n",
]


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with up to four changes: cut, doubled, or with something odd put in."""
    for _ in range(chance.randrange(5)):
        begin = chance.randrange(len(data) + 1)
        end = begin + chance.choice((0, 0, 1, 1, 2, 40))
        new = chance.choice((chance.choice(ODD), data[begin:end] * 2, b"", chance.randbytes(1)))
        data = data[:begin] + new + data[end:]
    return data


def assert_request(head: mkv.Request) -> None:
    """That nothing in an accepted request could be read in another way."""
    assert head.method.isascii() and head.method.isupper()
    assert re.fullmatch(rb"/[^\0-\x20\x7f?#]*", head.path)
    assert b"," not in head.fields.get(b"host", b"")
    for name, value in head.fields.items():
        assert name == name.lower() and re.fullmatch(rb"[^\0-\x20\x7f-\xff:,;]+", name)
        assert value == value.strip() and not re.search(rb"[\0-\x08\x0a-\x1f\x7f]", value)
    coded, sized = b"transfer-encoding" in head.fields, head.fields.get(b"content-length")
    assert head.length == (None if coded else int(sized or 0)) and not (coded and sized)
    assert 1 <= len(head.key) <= mkv.MAX_KEY and head.key.decode()[0] == "/"


def test_no_bytes_surprise_the_parser_of_heads() -> None:
    chance, ends = random.Random(1), Counter()
    for _ in range(100_000):
        data = mutated(chance, chance.choice(REQUESTS))
        head, end, body = data.partition(b"\r\n\r\n")
        if len(head) > 16_000 or not end:
            continue
        try:
            request = mkv.parse_request(head + end)
        except mkv.HTTPError as error:
            ends[error.status] += 1
        else:
            ends[0] += 1
            assert_request(request)
    assert set(ends) <= {0, 400, 405, 414, 431, 501} and min(ends[0], ends[400]) > 10_000, ends


def test_no_bytes_surprise_a_server_however_they_are_cut(single: Cluster) -> None:
    server, chance, ends = single.server, random.Random(2), Counter()
    memory = anonymous_memory(server.process.pid)
    for _ in range(3000):
        data = mutated(chance, b"".join(chance.choices(REQUESTS, k=2))) + LAST
        middle = sorted(chance.choices(range(len(data) + 1), k=chance.randrange(4)))
        for path in ("/b", "/c", "/d"):
            server.call("DELETE", path)
        with Wire(server.port) as wire, contextlib.suppress(ConnectionError):
            with contextlib.suppress(ConnectionError):
                for begin, end in itertools.pairwise([0, *middle, len(data)]):
                    wire.send(data[begin:end])
                wire.socket.shutdown(socket.SHUT_WR)
            ends.update(statuses(wire.file.read()))
    assert set(ends) <= {100, 200, 201, 204, 302, 400, 403, 404, 405, 411, 414, 431, 501}, ends
    assert min(ends[200], ends[400]) > 300, ends
    assert anonymous_memory(server.process.pid) - memory < 32_000_000
    assert server.call("GET", "/?health").status == 200
    assert "Traceback" not in server.log.read_text()
    for path in json.loads(server.call("GET", "/?list").body)["keys"]:
        assert server.call("DELETE", quote(path)).status == 204


@pytest.mark.parametrize("path", ["/k%C3%A9y", "/missing", "/%zz", "/", "/k%00", "http://x/a"])
def test_the_wire_shows_no_difference_between_the_ways_to_an_answer(
    system: Cluster, path: str
) -> None:
    if path == "/k%C3%A9y":
        assert system.server.put(path, b"value") == 201
    odd = ("", CLOSE, "Host: y\r\n", "X: y\r\n z\r\n", f"X: {'x' * 2000}\r\n", "Expect: x\r\n")
    for method, fields in itertools.product(("GET", "HEAD", "GETS"), odd):
        data, answers = request(method, path, b"", fields), []
        for first, rest in ((data, LAST), (data[:7], data[7:] + LAST)):
            with Wire(system.server.port) as wire:
                wire.send(first)
                if first == data:
                    wire.file.peek(1)
                with contextlib.suppress(OSError):  # closed after the first
                    wire.send(rest)
                answers.append(re.sub(rb"Location: [^\r]*", b"", wire.file.read()))
        assert answers[0] == answers[1] and answers[0], data


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (400, "X: y\r\n"),
        (400, "Host: x\r\nHost: y\r\n"),
        (400, "Host: x\r\nX: y\r\n z\r\n"),
        (400, "Host: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n"),
        (404, "Host: x\r\nContent-Length: 1000\r\n"),
        (404, f"Host: x\r\n{CHUNKED}"),
        (501, "Host: x\r\nTransfer-Encoding: gzip\r\n"),
    ],
)
def test_a_get_that_came_alone_ends_the_connection_if_it_is_doubtful_or_has_a_body(
    system: Cluster, status: int, fields: str
) -> None:
    for _ in range(2):  # nor is it taken when such a head is known
        with Wire(system.server.port) as wire:
            wire.send(f"GET /doubtful HTTP/1.1\r\n{fields}\r\n".encode())
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (status, "close")
            wire.send(SMUGGLED)
            assert wire.closed()
    assert system.server.get("/smuggled") is None


def test_many_different_heads_leave_little_in_memory(system: Cluster) -> None:
    def send(count: int) -> int:
        with Wire(system.server.port) as wire:
            for number in range(count):
                fields = "".join(f"X-{n}: {number}{'x' * 150}\r\n" for n in range(90))
                wire.send(request("GET", f"/k{number}", b"", fields))
                assert wire.answer().status == 404
        return anonymous_memory(system.server.process.pid)

    first = send(1)
    known = send(400)  # more than are remembered
    assert known - first < 32_000_000
    assert send(2000) - known < 8_000_000  # of 30 MB


def test_methods_that_are_none_are_not_counted_one_by_one(system: Cluster) -> None:
    for method in ("LOOK", "ASK", "GETS"):
        assert statuses(raw(system.server.port, request(method, "/k", b"", CLOSE))) == [405]
        assert f'"{method}"' not in system.server.call("GET", "/?metrics").body.decode()


def test_http_1_0_hears_no_100_continue(system: Cluster) -> None:
    head = b"PUT /old-expecting HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    assert statuses(raw(system.server.port, head + b"value")) == [201]


# --- readers that do not read, volumes that lie ---------------------------------------------------


def test_who_asks_and_asks_and_never_reads_is_not_listened_to(cluster: Make) -> None:
    limits = {"IDLE_TIME": 3, "LINGER_TIME": 0.5}
    server = cluster("-replicas", "1", volumes=1, constants=limits).server
    data, sent, memory = request("GET", "/missing") * 1000, 0, server.memory()
    with quiet_reader(server.port) as wire:
        wire.settimeout(1)
        began, reset = time.monotonic(), False
        try:
            while sent < 32_000_000:
                sent += wire.send(data)
                assert server.call("GET", "/?health").status == 200
        except (TimeoutError, ConnectionResetError) as error:
            reset = isinstance(error, ConnectionResetError)
        assert sent < 32_000_000
        assert not reset or time.monotonic() - began > 3  # the machine is slow: it was idle so long
        assert server.memory() - memory < 16_000_000
        until(lambda: server.metric("mkv_connections") == 1)


@pytest.fixture
def narrow(cluster: Make) -> Server:
    """A server that can hand little to the kernel ahead of a client that does not read."""
    system = cluster("-replicas", "1", volumes=1)
    system.server.stop()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)  # connections inherit it
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        flags = "-replicas", "1", "-fallback", "127.0.0.1:1"
        yield system.start(listener.getsockname()[1], *flags, listener=listener)


QUESTION = b"GET /" + "é".encode() * 250 + b" HTTP/1.1\r\nHost: x\r\n\r\n"  # answered as long
ASKED = 'mkv_requests_total{method="GET",status="302"}'


def ask_in_silence(server: Server, questions: Iterable[bytes]) -> socket.socket:
    """Asks one after the other, and reads nothing."""
    wire, asked = quiet_reader(server.port, 2048), server.metric(ASKED)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for number, question in enumerate(questions, 1):
        wire.sendall(question)
        with contextlib.suppress(AssertionError):  # of until(): when there is no more room
            until(lambda number=number: server.metric(ASKED) == asked + number, 0.2)
    return wire


def read_all(wire: socket.socket) -> bytes:
    """To the end of a connection."""
    wire.settimeout(30)
    answers = b""
    while piece := wire.recv(1 << 20):
        answers += piece
    return answers


def test_who_half_closes_before_reading_gets_every_answer_whole(narrow: Server) -> None:
    last = QUESTION.replace(b"Host", b"Connection: close\r\nHost")
    for end, count in itertools.product((QUESTION, last), range(4, 12)):  # one fits only in part
        with ask_in_silence(narrow, [QUESTION] * (count - 1) + [end]) as wire:
            wire.shutdown(socket.SHUT_WR)
            answers = read_all(wire)
        assert statuses(answers) == [302] * count and answers.endswith(b"\r\n\r\n")
        assert len(answers.replace(b"Connection: close\r\n", b"")) % count == 0


def test_a_server_that_ends_waits_for_those_who_have_not_read_their_answers(
    narrow: Server,
) -> None:
    for count in range(4, 9):
        with ask_in_silence(narrow, [QUESTION] * count) as wire:
            narrow.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):  # an idle one has a second
                narrow.process.wait(1.5)
            answers = read_all(wire)
        assert statuses(answers) == [302] * count and answers.endswith(b"\r\n\r\n")
        assert narrow.process.wait(20) == 0
        narrow.start()


def many_keys(server: Server, count: int) -> None:
    """Put keys of 400 bytes into the index of a server, which starts anew."""
    server.stop()
    plant(server.db, [(b"/%06d" % n + b"x" * 400, b"127.0.0.1:1") for n in range(count)])
    server.start()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_list_that_nobody_reads_is_broken_off_without_a_word(cluster: Make, version: str) -> None:
    server = cluster("-replicas", "1", volumes=1, constants={"IDLE_TIME": 1}).server
    many_keys(server, 50_000)
    with quiet_reader(server.port) as wire:
        wire.sendall(f"GET /?list HTTP/{version}\r\nHost: x\r\n\r\n".encode())
        until(lambda: server.metric('mkv_requests_total{method="GET",status="200"}') > 1)
        until(lambda: server.metric("mkv_connections") == 1)
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = read_all(wire)
        assert statuses(answer) in ([], [200]) and answer.count(b"HTTP/1.1") <= 1
        assert not answer.endswith((b"}\n", b"\r\n0\r\n\r\n"))


def test_who_pauses_in_reading_a_list_gets_all_of_it(cluster: Make) -> None:
    limits = {"IDLE_TIME": 20, "LINGER_TIME": 0.3}
    server = cluster("-replicas", "1", volumes=1, constants=limits).server
    for count in (500, 2000, 12_000):
        many_keys(server, count)
        with quiet_reader(server.port, 2048) as wire:
            wire.sendall(request("GET", "/?list", b"", CLOSE))
            wire.settimeout(10)
            answer = b""
            for _ in range(4):
                assert is_idle(wire, 0.5)
                answer += wire.recv(65536)
            answer += read_all(wire)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["next"] == "", count


def is_idle(wire: socket.socket, seconds: float) -> bool:
    """Lets time pass in which a client does not read; the connection stays."""
    holds(lambda: wire.fileno() >= 0, seconds)
    return True


HOSTILE = {  # what is said once, and what is repeated for ever; None: closed, empty: silence
    "nothing": (b"", None),
    "noise": (random.Random(1).randbytes(50_000), None),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", None),
    "a negative length": (b"HTTP/1.1 201 Created\r\nContent-Length: -1\r\n\r\n", None),
    "two lengths": (
        b"HTTP/1.1 201 Created\r\nContent-Length: 5\r\n" + CHUNKED.encode() + b"\r\n0\r\n\r\n",
        None,
    ),
    "an unknown coding": (b"HTTP/1.1 201 Created\r\nTransfer-Encoding: gzip\r\n\r\n", None),
    "bad chunks": (b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\nxyz\r\n", None),
    "a bare LF": (b"HTTP/1.1 201 Created\nContent-Length: 0\n\n", None),
    "half a head": (b"HTTP/1.1 201 Created\r\nContent-Le", None),
    "an unheard-of status": (b"HTTP/1.1 999 Created\r\nContent-Length: 0\r\n\r\n", None),
    "too many fields": (b"HTTP/1.1 201 Created\r\n" + b"X: y\r\n" * 101 + b"\r\n", None),
    "endless head": (b"HTTP/1.1 201 Created\r\n", b"X: y\r\n" * 1000),
    "endless line": (b"HTTP/1.1 201 Created\r\nX: ", b"y" * 10_000),
    "endless chunk extension": (
        b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\n5;",
        b"x" * 10_000,
    ),
    "endless body": (
        b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\n",
        b"5\r\nabcde\r\n" * 1000,
    ),
    "endless trailers": (
        b"HTTP/1.1 500 X\r\n" + CHUNKED.encode() + b"\r\n0\r\n",
        b"X: y\r\n" * 1000,
    ),
    "endless interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "endless silence": (b"", b""),
}


def test_a_volume_of_an_impossible_name_is_a_503_and_no_harm_else(tmp_path: Path) -> None:
    flags = ("-volumes", f"a..b:1,{'c' * 64}.d:1,127.0.0.1:1", "-replicas", "3")
    server = Server(tmp_path / "index", *free_ports(1), *flags, "-voltimeout", "300ms")
    try:
        assert [server.put("/k", bytes(size)) for size in (9, 300_000, 9)] == [503, 503, 503]
        assert server.call("GET", "/k").status == 404
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.mark.parametrize("drives", ["", "."], ids=["always", "but for its drives"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_volume_is_a_503_and_no_harm_else(tmp_path: Path, name: str, drives: str) -> None:
    liar = Liar(*HOSTILE[name], drives=drives)
    named = f"{liar.name} 5 {WRITE_ID}".encode()
    plant(tmp_path / "index", [(b"/named", named), (b"/named2", named)])
    flags = ("-volumes", liar.name, "-replicas", "1", "-subvolumes", "1", "-voltimeout", "100ms")
    server = Server(tmp_path / "index", *free_ports(1), *flags)
    try:
        with ThreadPoolExecutor() as pool:
            puts = {size: pool.submit(server.put, f"/{size}", bytes(size)) for size in (9, 300_000)}
            assert server.call("GET", "/?health").status == 200  # it does not stop for this
        assert {size: each.result() for size, each in puts.items()} == {9: 503, 300_000: 503}
        assert liar.asked
        assert server.call("GET", "/9").status == server.call("GET", "/300000").status == 404
        assert server.call("GET", "/named").status in (302, 503)  # the index knows of it
        assert server.call("REBALANCE", "/named").status in (204, 503)
        for path in ("/named", "/named2"):
            assert server.call("DELETE", path).status == 204
            assert server.call("GET", path).status == 404
        assert server.memory() < 100_000_000
        assert server.stop() == 0
        assert b"Traceback" not in server.log.read_bytes()
    finally:
        server.kill()
        liar.close()


def test_no_answer_of_a_volume_surprises_a_server(tmp_path: Path) -> None:
    chance = random.Random(3)
    answers = [mutated(chance, b"".join(chance.choices(ANSWERS, k=2))) for _ in range(120)]
    liars = [Liar(answer, chance.choice((None, b"")), drives=".") for answer in answers]
    rows = [(b"/d%d" % n, f"{liar.name} 5 {WRITE_ID}".encode()) for n, liar in enumerate(liars)]
    plant(tmp_path / "index", rows)
    flags = ("-volumes", ",".join(liar.name for liar in liars), "-replicas", "1")
    server = Server(
        tmp_path / "index", *free_ports(1), *flags, "-subvolumes", "1", "-voltimeout", "200ms"
    )
    try:
        with ThreadPoolExecutor(8) as pool:
            puts = pool.map(lambda n: server.put(f"/p{n}", bytes(9)), range(len(liars)))
            assert set(puts) <= {201, 503}
            deletes = pool.map(lambda n: server.call("DELETE", f"/d{n}").status, range(len(liars)))
            assert set(deletes) == {204}
        assert server.call("GET", "/?health").status == 200
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
        for liar in liars:
            liar.close()


ROTTEN: dict[str, Callable[[bytes], bytes]] = {
    "another byte": lambda value: value[:-1] + b"?",
    "longer": lambda value: value + b"?",
    "shorter": lambda value: value[1:],
}


@pytest.mark.parametrize("rot", ROTTEN)
@pytest.mark.parametrize("size", [1000, 200_000])
def test_a_stand_in_gets_the_bytes_that_were_put_or_is_none(
    tmp_path: Path, fakes: Callable[[], Fake], size: int, rot: str
) -> None:
    value = random.Random(size).randbytes(size)
    rotten, ill, spare = fakes(), fakes(), fakes()
    rotten.given = ROTTEN[rot]
    names = [fake.name for fake in (rotten, ill, spare)]
    path = next(
        path
        for path in (f"/copied{number}" for number in itertools.count())
        if mkv.key2volume(path.encode(), names, 3, 1) == names
    )

    def fail(method: str, _: str) -> None:
        if method == "PUT":
            raise ConnectionError

    ill.before = fail
    flags = ("-volumes", ",".join(names), "-replicas", "2", "-subvolumes", "1", *Cluster.FLAGS)
    server = Server(tmp_path / "index", *free_ports(1), *flags)
    try:
        assert server.put(path, value) == 503  # its only source gives something else
        assert server.call("GET", path).status == 404
        assert any(method == "GET" for _, method, _ in rotten.log)
        until(lambda: not any((rotten.stored, ill.stored, spare.stored)))
        until(lambda: not server.garbage())
    finally:
        server.kill()


# --- uploads --------------------------------------------------------------------------------------


def test_uploads_stream_in_little_memory_and_all_replicas_are_identical(
    cluster: Make,
) -> None:
    system = cluster("-voltimeout", "3s")  # disks stall
    large = Value(0, 256 << 20)
    assert upload(system.server, "/large", large) == 201
    several = [Value(seed, (64 << 20) + seed - 4) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        puts = [
            pool.submit(upload, system.server, f"/{seed}", value, chunked=seed % 2 == 1)
            for seed, value in enumerate(several)
        ]
        assert [put.result() for put in puts] == [201] * 8
    assert system.server.memory() < 96 << 20
    for url in replicas_of(system, b"/large"):
        assert sha256(download(url)) == large.sha256()
    for seed, value in enumerate(several):
        urls = replicas_of(system, b"/%d" % seed)
        assert len(urls) == 3
        assert sha256(download(urls[seed % 3])) == value.sha256()
        assert system.records()[b"/%d" % seed].size == value.size
    until(system.is_clean)


def test_values_of_every_size_around_the_limits_survive(system: Cluster) -> None:
    for size in (1, 2, 65_535, 65_536, 65_537, 262_143, 262_145, (1 << 20) + 1, 5_000_000):
        value = Value(size, size)
        for chunked in (False, True):
            path = f"/size/{size}/{chunked}"
            assert upload(system.server, path, value, chunked) == 201
            assert hashlib.sha256(system.server.get(path)).hexdigest() == value.sha256()
            assert system.records()[path.encode()].hash == hashlib.md5(b"".join(value)).hexdigest()


def test_small_and_large_uploads_do_not_get_in_each_others_way(
    cluster: Make,
) -> None:
    system = cluster("-voltimeout", "1s")

    def put(number: int) -> int:
        return system.server.put(f"/{number}", b"x" * (1000 if number % 4 else 100_000))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(put, range(1200))) == [201] * 1200
    until(system.is_clean)
    assert "is down" not in system.server.log.read_text()


def assert_failed_cleanly(system: Cluster, key: str) -> None:
    """Nothing of a key is left, and it is free again at once."""
    assert system.server.get(key) is None
    assert system.server.put(key, b"value") == 201
    assert system.server.get(key) == b"value"
    assert system.server.call("DELETE", key).status == 204
    until(system.is_clean)


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_wrong_md5_leaves_nothing(system: Cluster, size: int) -> None:
    answer = system.server.call("PUT", "/wrong", b"x" * size, Content_MD5="0" * 32)
    assert answer.status == 400
    assert hashlib.md5(b"x" * size).hexdigest().encode() in answer.body
    assert_failed_cleanly(system, "/wrong")


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_body_that_becomes_nonsense_leaves_nothing(system: Cluster, size: int) -> None:
    body = b"%x\r\n%b\r\nnonsense\r\n" % (size, b"x" * size)
    answer = raw(system.server.port, request("PUT", "/nonsense", b"", CHUNKED) + body)
    assert statuses(answer) == [400]
    assert_failed_cleanly(system, "/nonsense")


@pytest.mark.parametrize("size", [1000, 3_000_000])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_leaves_nothing(system: Cluster, size: int, reset: bool) -> None:
    length = f"Content-Length: {size + 1}\r\nExpect: 100-continue\r\n"
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/gone", b"", length))
        assert wire.head()[0] == 100
        wire.send(b"x" * size)
        if reset:
            linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    until(lambda: not system.open_intents())
    assert_failed_cleanly(system, "/gone")


def test_a_client_that_goes_away_at_the_last_moment_leaves_all_or_nothing(cluster: Make) -> None:
    system, found = cluster("-replicas", "2", volumes=2, subvolumes=1), []
    for number in range(60):
        upload = Upload(system.server.port, f"/last{number}", 1000)
        upload.send(bytes(1000))
        spend = time.perf_counter() + number / 20_000
        while time.perf_counter() < spend:  # up to 3 ms: a commit is somewhere in there
            pass
        upload.vanish()
    until(lambda: not system.open_intents())
    for number in range(60):
        found.append(system.server.get(f"/last{number}"))
    assert set(found) <= {None, bytes(1000)}
    until(system.is_clean)


@pytest.mark.parametrize("cut", [b"", b"5", b"5\r\n", b"5\r\nval", b"5\r\nvalue\r\n", b"0\r\n"])
def test_a_chunked_body_that_is_cut_short_by_a_half_close_is_400(
    system: Cluster, cut: bytes
) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/cut", b"", CHUNKED) + cut)
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.answer().status == 400
        assert wire.closed()
    assert_failed_cleanly(system, "/cut")


def test_a_client_that_half_closes_too_early_reads_400(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/half", b"", "Content-Length: 10\r\n") + b"value")
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.answer().status == 400
    assert_failed_cleanly(system, "/half")


def test_a_client_that_half_closes_after_its_request_reads_the_answer(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/whole", b"value"))
        wire.socket.shutdown(socket.SHUT_WR)
        assert wire.answer().status == 201
        assert wire.closed()


@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_replica_that_refuses_leaves_no_file_on_the_others(cluster: Make, size: int) -> None:
    system = cluster()
    location = mkv.key2volume(b"/refused", [volume.name for volume in system.volumes], 3, 10)[1]
    (volume,) = [each for each in system.volumes if each.name == location.partition("/")[0]]
    # A file where a folder is needed: nginx cannot write there, not even as root.
    obstacle = volume.folder / location.partition("/")[2] / mkv.key2path(b"/refused")[1:3]
    obstacle.write_bytes(b"")
    for attempt in range(3):
        answer = system.server.call("PUT", "/refused", b"x" * size)
        assert answer.status in (500, 503), attempt  # never 409: the key is free at once
        assert answer.body.strip()
    assert system.server.get("/refused") is None
    until(lambda: len(system.files()) == 1)  # the obstacle
    obstacle.unlink()
    until(system.is_clean)
    assert system.files() == set()
    until(lambda: system.server.put("/refused", b"x" * size) == 201)
    assert system.server.get("/refused") == b"x" * size
    until(system.is_clean)


def test_a_put_without_enough_volumes_is_503_and_leaves_nothing(
    cluster: Make,
) -> None:
    system = cluster()
    system.volumes[0].kill()
    for size in (1000, 3_000_000):
        answer = system.server.call("PUT", "/few", b"x" * size)
        assert answer.status == 503 and answer.body.strip()
    assert system.server.get("/few") is None
    system.volumes[0].start()
    until(lambda: system.server.put("/few", b"value") == 201)
    until(system.is_clean)


# --- volume.sh ------------------------------------------------------------------------------------


def group_is_gone(group: int) -> bool:
    """Whether no process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_delete_of_a_folder_is_refused(volume: Volume) -> None:
    for path in ("/sv00/aa/bb/file", "/sv00/aa/bb/sub/file", "/aa/bb/file"):
        assert call(volume.port, "PUT", path, b"value").status == 201
    before = volume.files()
    assert len(before) == 3
    paths = "/ /sv00/ /sv00/aa/ /sv00/aa/bb/ /sv00/aa/bb/sub/ /aa/bb/ /sv00/aa/. /sv00/aa/bb/x/.. "
    paths += "/sv00 /sv00/aa /sv00/aa/bb /aa //sv00//aa// /sv00/aa/%2e /sv00/aa%2f /sv00/aa/bb/?x"
    for path in paths.split():
        for depth in ("infinity", "0"):
            answer = call(volume.port, "DELETE", path, None, {"Depth": depth})
            assert answer.status in (403, 409), path
    assert call(volume.port, "PUT", "/sv00/aa/new/", b"value").status in (403, 409)
    for method in ("MKCOL", "MOVE", "COPY", "POST"):
        moved = {"Destination": "/sv00/aa/moved"}
        assert call(volume.port, method, "/sv00/aa/bb/", None, moved).status in (403, 405), method
    assert volume.files() == before
    assert call(volume.port, "DELETE", "/sv00/aa/bb/file").status == 204
    assert call(volume.port, "DELETE", "/sv00/aa/bb/file").status == 404


def test_a_folder_has_one_volume(volume: Volume) -> None:
    other = str(free_ports(1)[0])
    assert str(volume.folder) in run_volume_sh(volume.folder, PORT=other)
    assert call(volume.port, "PUT", "/sv00/aa/bb/file", b"value").status == 201
    volume.kill()
    volume.start()
    assert call(volume.port, "GET", "/sv00/aa/bb/file").body == b"value"


def test_dot_paths_are_refused(volume: Volume) -> None:
    (volume.folder / "sv00/.tmp/half").write_bytes(b"half-written")
    (volume.folder / ".tmp/half").write_bytes(b"half-written")
    paths = "/.nginx/nginx.conf /.nginx/pid /.nginx/ /.tmp/ /.tmp/half /sv00/.tmp/ /sv00/.tmp/half"
    paths += " /%2enginx/nginx.conf /sv00/aa/../.tmp/half /sv00/%2Etmp/half //.nginx/pid /.x"
    for path in paths.split():
        for method in ("GET", "HEAD", "PUT", "DELETE"):
            body = b"value" if method == "PUT" else None
            assert call(volume.port, method, path, body).status == 403, (method, path)
    assert (volume.folder / "sv00/.tmp/half").read_bytes() == b"half-written"
    assert not (volume.folder / ".x").exists()
    entries = json.loads(call(volume.port, "GET", "/").body)
    assert not [entry["name"] for entry in entries if entry["name"].startswith(".")]


def test_a_missing_drive_is_503_and_the_others_are_up(tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "sv03").write_bytes(b"no folder")
    (folder / "sv04").symlink_to(tmp_path / "nowhere/at/all")
    volume = Volume(folder, *free_ports(1))
    try:
        for subvolume in ("sv03", "sv04"):
            for method, path in (("GET", "/aa/bb/x"), ("PUT", "/aa/bb/x"), ("DELETE", "/aa/bb/x")):
                body = b"x" if method == "PUT" else None
                assert call(volume.port, method, f"/{subvolume}{path}", body).status == 503
            assert call(volume.port, "GET", f"/{subvolume}/").status == 503
        assert call(volume.port, "PUT", "/sv05/aa/bb/x", b"x").status == 201
        assert call(volume.port, "GET", "/sv05/aa/bb/y").status == 404
    finally:
        volume.kill()


def test_a_drive_that_vanished_is_503_not_404(volume: Volume) -> None:
    assert call(volume.port, "PUT", "/sv03/aa/bb/x", b"x").status == 201
    (volume.folder / "sv03").rename(volume.folder / "gone")
    (volume.folder / "sv03").mkdir()  # the empty folder that a drive was mounted on
    for method in ("GET", "HEAD", "DELETE", "PUT"):
        body = b"x" if method == "PUT" else None
        assert call(volume.port, method, "/sv03/aa/bb/x", body).status == 503, method
    assert call(volume.port, "GET", "/sv03/").status == 503
    assert call(volume.port, "PUT", "/sv02/aa/bb/x", b"x").status == 201
    (volume.folder / "sv03").rmdir()
    assert call(volume.port, "GET", "/sv03/aa/bb/x").status == 503
    (volume.folder / "gone").rename(volume.folder / "sv03")
    assert call(volume.port, "GET", "/sv03/aa/bb/x").body == b"x"


def test_a_folder_that_vanished_is_503_without_subvolumes_too(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "volume", *free_ports(1), subvolumes=1)
    try:
        assert call(volume.port, "PUT", "/aa/bb/x", b"x").status == 201
        volume.folder.rename(tmp_path / "gone")
        for method in ("GET", "PUT", "DELETE"):
            body = b"x" if method == "PUT" else None
            assert call(volume.port, method, "/aa/bb/x", body).status == 503, method
        assert call(volume.port, "GET", "/").status == 503
    finally:
        (tmp_path / "gone").rename(volume.folder)
        volume.kill()


def test_uploads_wait_on_the_drive_they_are_for_and_leave_nothing_when_cut_short(
    volume: Volume,
) -> None:
    waiting = volume.folder / "sv07/.tmp"
    with Wire(volume.port) as wire:
        wire.send(request("PUT", "/sv07/aa/bb/x", b"", "Content-Length: 9000000\r\n"))
        wire.send(b"x" * 1_000_000)
        until(lambda: any(waiting.iterdir()))
    until(lambda: not any(waiting.iterdir()))
    assert volume.files() == set()


def test_what_a_killed_nginx_was_writing_is_removed_at_the_next_start(volume: Volume) -> None:
    assert call(volume.port, "PUT", "/sv07/aa/bb/kept", b"value").status == 201
    with Wire(volume.port) as wire:
        wire.send(request("PUT", "/sv07/aa/bb/x", b"", "Content-Length: 9000000\r\n"))
        wire.send(b"x" * 1_000_000)
        until(lambda: any((volume.folder / "sv07/.tmp").iterdir()))
        volume.kill()
    assert any((volume.folder / "sv07/.tmp").iterdir())
    volume.start()
    assert not any((volume.folder / "sv07/.tmp").iterdir())
    assert call(volume.port, "GET", "/sv07/aa/bb/kept").body == b"value"


def test_a_volume_keeps_connections_for_thousands_of_requests(volume: Volume) -> None:
    with Wire(volume.port) as wire:
        for _ in range(1500):  # nginx ends them after 1000, unless told
            wire.send(request("GET", "/sv00/aa/bb/x"))
            assert wire.answer().status == 404


def test_volume_sh_says_what_is_wrong(tmp_path: Path) -> None:
    assert "usage" in run_volume_sh()
    assert "usage" in run_volume_sh(tmp_path / "a", tmp_path / "b")
    for number in ("0", "257", "-1", "x", "1.5", "10 10"):
        assert "SUBVOLUMES" in run_volume_sh(tmp_path / "volume", SUBVOLUMES=number)
    for port in ("0", "65536", "x"):
        assert "PORT" in run_volume_sh(tmp_path / "volume", PORT=port)
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in run_volume_sh(tmp_path / "file", PORT=str(free_ports(1)[0]))


def test_volume_sh_says_that_the_port_is_taken(volume: Volume, tmp_path: Path) -> None:
    port = str(volume.port)
    assert port in run_volume_sh(tmp_path / "other", PORT=port, HOST="127.0.0.1")
    assert port in run_volume_sh(tmp_path / "other", PORT=port)


TOOLS = "bash cat sleep setpriv flock dirname readlink mkdir stat id chown rm sed grep mv sync"


def without_nginx(folder: Path) -> dict[str, str]:
    """The project's files in a folder, and an environment for them in which nginx is not found."""
    for name in ("mkv.py", "volume.sh", "nginx.conf.tmpl"):
        text = (HERE / name).read_text().replace("/usr/sbin", "/nowhere")
        (folder / name).write_text(text.replace("/usr/local/sbin", "/nowhere"))
        (folder / name).chmod(0o755)
    shutil.copytree(HERE / "contrib", folder / "contrib")
    tools = folder / "tools"
    tools.mkdir()
    for name in (*TOOLS.split(), "mountpoint"):
        (tools / name).symlink_to(shutil.which(name))
    return {"PATH": str(tools)}


def test_volume_sh_says_that_nginx_is_missing(tmp_path: Path) -> None:
    env = without_nginx(tmp_path)
    said = run_volume_sh(tmp_path / "volume", script=tmp_path / "volume.sh", **env)
    assert "nginx is not installed" in said


@pytest.mark.parametrize("user", [None, pytest.param("nobody", marks=needs_root)])
def test_a_volume_works_for_any_user_and_leaves_no_process_behind(user: str | None) -> None:
    with foreign_folder() if user else tempfile.TemporaryDirectory() as base:
        folder, (port,) = Path(base), free_ports(1)
        for name in ("volume.sh", "nginx.conf.tmpl"):
            shutil.copy(HERE / name, folder / name)
        env = os.environ | {"PORT": str(port), "HOST": "127.0.0.1"}
        command = [folder / "volume.sh", folder / "volume"]
        who = {"user": user, "group": "nogroup", "extra_groups": ()} if user else {}
        with subprocess.Popen(command, env=env, start_new_session=True, **who) as process:
            until(lambda: accepts(port))
            assert call(port, "PUT", "/sv00/aa/bb/x", b"value").status == 201
            assert call(port, "PUT", "/sv01/aa/bb/x", b"x" * 1_000_000).status == 201
            assert call(port, "GET", "/sv00/aa/bb/x").body == b"value"
            assert call(port, "DELETE", "/sv00/aa/bb/x").status == 204
            process.terminate()
            assert process.wait(20) == 0
        assert group_is_gone(process.pid)
        assert not accepts(port)
        assert {path.owner() for path in (folder / "volume").rglob("*")} == {folder.owner()}


@needs_root
def test_the_workers_of_a_volume_started_by_root_are_its_owner() -> None:
    with foreign_folder() as folder:
        volume = Volume(folder, *free_ports(1))
        try:
            assert call(volume.port, "PUT", "/sv00/aa/bb/x", b"x" * 1_000_000).status == 201
            workers = until(volume.workers)
            assert {Path(f"/proc/{pid}").owner() for pid in workers} == {"nobody"}
            files = [folder / "sv00/aa", folder / "sv00/aa/bb", folder / "sv00/aa/bb/x"]
            assert {path.owner() for path in files} == {"nobody"}
            assert not [path for path in files if path.stat().st_mode & stat.S_IWOTH]
        finally:
            volume.kill()


def test_allow_limits_put_and_delete_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALLOW", "127.0.0.5 127.0.1.0/24 ::1")
    volume, file = Volume(tmp_path / "volume", *free_ports(1)), "/sv00/aa/bb/file"
    forged = {"X-Forwarded-For": "127.0.0.5", "X-Real-IP": "127.0.0.5"}
    try:
        for source in ("127.0.0.5", "127.0.1.7"):
            ask = functools.partial(call_from, source, volume.port)
            assert [ask("PUT", file), ask("DELETE", file), ask("DELETE", file)] == [201, 204, 404]
            assert [ask("DELETE", "/sv00/aa/"), ask("PUT", "/sv00/.tmp/x")] == [403, 403]
        assert ask("PUT", file) == 201
        before = volume.files()
        for source in ("127.0.0.1", "127.0.0.6", "127.0.2.7"):
            ask = functools.partial(call_from, source, volume.port, **forged)
            for path in (file, "/sv00/aa/bb/new", "/sv00/aa/"):
                assert [ask("PUT", path), ask("DELETE", path)] == [403, 403]
            assert [ask("GET", file), ask("HEAD", file), ask("GET", "/sv00/aa/")] == [200] * 3
            assert [ask("GET", "/sv00/none"), ask("GET", "/.nginx/pid")] == [404, 403]
            assert ask("MKCOL", file) == 405
        (volume.folder / "sv00/.sv00").rename(volume.folder / "sv00/away")
        assert [ask("PUT", file), ask("GET", file)] == [503, 503]  # a drive that vanished
        (volume.folder / "sv00/away").rename(volume.folder / "sv00/.sv00")
        assert volume.files() == before
    finally:
        volume.kill()


@pytest.mark.parametrize(
    "allow", ["10.0.0.5,10.0.0.6", "a", "10.0.0.5; deny all", "*", "10.0.0.0/x", "é", "1.2.3.4}"]
)
def test_volume_sh_takes_only_addresses_for_allow(tmp_path: Path, allow: str) -> None:
    assert "ALLOW" in run_volume_sh(tmp_path / "volume", ALLOW=allow)
    assert not (tmp_path / "volume").exists()


# --- the command line -----------------------------------------------------------------------------


ONE = ("-volumes", "127.0.0.1:1", "-replicas", "1", "-bind", "127.0.0.1")


@pytest.mark.parametrize(
    ("word", "args"),
    [
        ("-nonsense", ["server", "-nonsense"]),
        ("--nonsense", ["--nonsense", "server"]),
        *(("voltimeout", ["server", *ONE, f"-voltimeout={wrong}"]) for wrong in ("1x", "x", "")),
        *(("voltimeout", ["server", *ONE, f"-voltimeout={wrong}"]) for wrong in ("1", "-1s", "0")),
        *(("voltimeout", ["server", *ONE, f"-voltimeout={wrong}"]) for wrong in ("1s2", "1 s")),
        *(("md5sum", ["server", f"-md5sum={wrong}"]) for wrong in ("maybe", "7", "True", "")),
        *(("fallback", ["server", *ONE, f"-fallback={wrong}"]) for wrong in ("http://a:80/", "a")),
        *(("fallback", ["server", *ONE, f"-fallback={wrong}"]) for wrong in ("a:80/b", "a:80\r\n")),
        ("volumes", ["server", "-volumes", "nonsense"]),
        ("volumes", ["server", "-volumes", "a:1,a:1", "-replicas", "1"]),
        ("port", ["server", *ONE, "-port", "70000"]),
        ("port", ["server", *ONE, "-port", "x"]),
        ("subvolumes", ["server", *ONE, "-subvolumes", "257"]),
        ("nonsense", ["nonsense"]),
        ("workers", ["server", *ONE, "-workers", "2"]),
        ("maxconns", ["server", *ONE, "-maxconns", "2"]),
        ("partial", ["rebuild", *ONE, "-partial"]),
        ("adopt-garbage", ["rebuild", *ONE, "-adopt-garbage"]),
        ("verify", ["verify", *ONE]),
        ("", []),
        ("replicas", ["server", "-volumes", "a:1,b:2"]),
        ("replicas", ["-replicas=2", "-volumes", "a:1", "server"]),
    ],
)
def test_a_mistake_in_the_flags_takes_one_line(tmp_path: Path, word: str, args: list[str]) -> None:
    assert word in error_of(*args, folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_ipv6_address_is_written_as_in_a_url(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("there is no IPv6")
        port = probe.getsockname()[1]
    flags = "-volumes", "127.0.0.1:1", "-replicas", "1", "-bind", "[::1]", "-port", str(port)
    command = [sys.executable, HERE / "mkv.py", "server", *flags]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[3].rstrip(",")
            assert url == f"http://[::1]:{port}"
            with urllib.request.urlopen(f"{url}/?health", timeout=30) as answer:
                assert answer.read() == b"ok\n"
        finally:
            process.terminate()


def test_two_names_of_one_volume_take_one_line(volume: Volume, tmp_path: Path) -> None:
    names = f"127.0.0.1:{volume.port},localhost:{volume.port}"
    flags = "-volumes", names, "-replicas", "1", "-port", str(free_ports(1)[0]), "-db", "index"
    assert f"localhost:{volume.port}" in error_of("server", *flags, folder=tmp_path)


def test_a_volume_that_does_not_tell_its_drives_has_all_of_them(
    tmp_path: Path, fakes: Callable[[], Fake]
) -> None:
    fake = fakes()
    fake.knows_drives = False
    flags = ("-volumes", fake.name, "-replicas", "1", "-subvolumes", "1", *Cluster.FLAGS)
    server = Server(tmp_path / "index", *free_ports(1), *flags)
    try:
        assert server.put("/k", b"value") == 201
        assert server.get("/k") == b"value"
        holds(lambda: server.sees(fake), 1.5)  # several looks
        said = [line for line in server.log.read_text().splitlines() if fake.name in line]
        assert len(said) == 1 and "drives" in said[0]
    finally:
        server.kill()


def test_bytes_that_are_no_utf_8_are_taken_in_a_password(cluster: Make) -> None:
    assert cluster("-userpass", "admin:" + chr(0xDCFF)).server.put("/k", b"value") == 201


def test_a_port_in_use_takes_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert port in error_of("server", *ONE, "-port", port, "-db", "index", folder=tmp_path)


def test_a_port_is_not_shared_with_another_server(cluster: Make, tmp_path: Path) -> None:
    system = cluster("-replicas", "1", volumes=1)
    port = str(system.server.port)
    for index in ("other", str(system.folder / "index")):
        assert "in use" in error_of("server", *ONE, "-port", port, "-db", index, folder=tmp_path)
    assert system.server.put("/k", b"value") == 201


def test_an_unreadable_db_takes_one_line(tmp_path: Path) -> None:
    says = functools.partial(error_of, "server", *ONE, folder=tmp_path)
    port = str(free_ports(1)[0])
    (tmp_path / "file").write_bytes(b"no folder")
    assert "file" in says("-port", port, "-db", "file")
    assert "file" in says("-port", port, "-db", "file/index")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/data.mdb").write_bytes(b"no database" * 1000)
    assert "broken" in says("-port", port, "-db", "broken")


def test_too_little_address_space_takes_one_line(tmp_path: Path) -> None:
    said = error_of(
        *("server", *ONE, "-port", str(free_ports(1)[0]), "-db", "index"),
        folder=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )
    assert "Cannot allocate memory" in said and "index" in said


DEMO_PORTS = (3000, 3001, 3002, 3003)


def demo_ports_are_free() -> bool:
    return not any(map(accepts, DEMO_PORTS))


@contextlib.contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen]:
    """`mkv.py server` without any flag, once it answers."""
    until(demo_ports_are_free, 60)
    with (folder / "out").open("wb") as out:
        command = [sys.executable, HERE / "mkv.py", "server"]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:

        def ready() -> bool:
            assert process.poll() is None, (folder / "out").read_text()
            return accepts(3000) and "curl" in (folder / "out").read_text()

        until(ready)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def test_the_demo_prints_three_curl_lines_that_work(tmp_path: Path) -> None:
    with demo(tmp_path):
        until(lambda: (tmp_path / "out").read_text().count("curl") >= 3)
        text = (tmp_path / "out").read_text()
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("curl ")]
        assert len(lines) == 3
        if not shutil.which("curl"):
            pytest.skip("curl is not installed")
        for line in lines:
            command = ["bash", "-c", line.replace("curl ", "curl -sS --fail ", 1)]
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=30, cwd=tmp_path
            )
            assert ended.returncode == 0 and ended.stderr == "", (line, ended)
    assert (tmp_path / "mkv-data").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_demo_stops_everything(tmp_path: Path, number: int) -> None:
    with demo(tmp_path) as process:
        assert all(map(accepts, DEMO_PORTS))
        assert call(3000, "PUT", "/wehave", b"bigswag").status == 201
        assert call(3000, "GET", "/wehave").status == 302
        family = descendants(process.pid)
        assert len(family) >= 6  # three masters, each with a worker
        process.send_signal(number)
        assert process.wait(30) == 0
        assert not any(map(accepts, DEMO_PORTS))
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    with demo(tmp_path):  # what was stored is there the next time
        assert until(lambda: call(3000, "GET", "/wehave").status == 302)


def test_when_the_demo_is_killed_its_volumes_go_too(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        family = descendants(process.pid)
        assert call(3000, "PUT", "/wehave", b"bigswag").status == 201
        process.kill()
        process.wait(30)
        until(lambda: all(map(ended, family)))
    with demo(tmp_path):
        assert until(lambda: call(3000, "GET", "/wehave").status == 302)


@pytest.mark.parametrize("port", DEMO_PORTS)
def test_the_demo_says_that_a_port_is_taken(tmp_path: Path, port: int) -> None:
    until(demo_ports_are_free, 60)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        assert str(port) in error_of("server", folder=tmp_path, lines=2)
    assert demo_ports_are_free()


def test_the_demo_says_that_nginx_is_missing(tmp_path: Path) -> None:
    until(demo_ports_are_free, 60)
    env = os.environ | without_nginx(tmp_path)
    said = error_of("server", folder=tmp_path, lines=2, script=tmp_path / "mkv.py", env=env)
    assert "nginx is not installed" in said


# --- the main job ---------------------------------------------------------------------------------


def test_all_documents_and_python_modules_are_stored_listed_read_and_deleted(
    cluster: Make,
) -> None:
    roots = (Path("/usr/share/doc"), Path("/usr/lib/python3"))
    paths = [path for root in roots for path in root.rglob("*") if not path.is_symlink()]
    paths = [path for path in paths if path.is_file() and path.stat().st_size]
    assert len(paths) > 100
    system = cluster("-voltimeout", "3s")  # disks stall
    kept = threading.local()

    def ask(port: int, method: str, path: str, body: bytes | None = None) -> Reply:
        """A request on a connection that each thread keeps."""
        connections = kept.__dict__.setdefault("connections", {})
        if port not in connections:
            connections[port] = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connections[port].connect()
            connections[port].sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[port].request(method, path, body)
        answer = connections[port].getresponse()
        return Reply(answer.status, dict(answer.getheaders()), answer.read())

    def store(path: Path) -> int:
        return ask(system.server.port, "PUT", quote(bytes(path)), path.read_bytes()).status

    def survives(path: Path) -> bool:
        location = ask(system.server.port, "GET", quote(bytes(path))).fields["Location"]
        port, _, target = location.removeprefix("http://127.0.0.1:").partition("/")
        value = ask(int(port), "GET", "/" + target)
        assert value.status == 200
        return hashlib.sha256(value.body).digest() == hashlib.sha256(path.read_bytes()).digest()

    def delete(path: Path) -> int:
        return ask(system.server.port, "DELETE", quote(bytes(path))).status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(store, paths)) == {201}
        assert listed(system.server, "/?list")[0] == sorted(map(str, paths), key=str.encode)
        assert len(system.files()) == 3 * len(paths)
        assert all(pool.map(survives, paths))
        assert set(pool.map(delete, paths)) == {204}
    assert listed(system.server, "/?list")[0] == []
    until(system.is_clean)
    assert system.files() == set()


# --- writes ---------------------------------------------------------------------------------------


def test_a_volume_dying_in_mid_upload_without_stand_in_leaves_nothing(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms")
    upload = Upload(system.server.port, "/big", 24 * MB)
    upload.send(blob("half", 6 * MB))
    temporary = drive_at(system, ideal(system, "/big")[0]) / ".tmp"
    until(lambda: any(f.stat().st_size > MB for f in temporary.rglob("*") if f.is_file()))
    bad = volume_at(system, ideal(system, "/big")[0])
    bad.kill()
    upload.send(blob("other half", 18 * MB))
    assert upload.answer() == 503
    assert system.server.get("/big") is None
    bad.start()
    until(lambda: system.server.put("/big", b"small now") == 201, 40)
    assert_copies(system, "/big", b"small now")
    until(system.is_clean, 40)


def test_uploads_do_not_pile_up_connections(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=2, subvolumes=1)
    server, value = system.server, blob("value", 100_000)
    assert server.put("/warm", value) == 201
    base = descriptors(server)
    for number in range(100):
        assert server.put(f"/k{number}", value) == 201
    assert descriptors(server) <= base + 40


def test_connections_that_died_in_silence_do_not_cost_one_timeout_each(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms", "-replicas", "1", volumes=1)
    server, (volume,) = system.server, system.volumes
    base, uploads = descriptors(server), [Upload(server.port, f"/k{n}", 5) for n in range(20)]
    for upload in uploads:
        upload.send(b"valu")  # each has its own connection to the volume
    until(lambda: descriptors(server) >= base + 30)
    for upload in uploads:
        upload.send(b"e")
    assert [upload.answer() for upload in uploads] == [201] * len(uploads)
    with old_workers_frozen(volume):  # as after a power cut: on them nothing comes any more
        fresh_workers(volume)
        until(lambda: server.put("/new", b"value") == 201, 5)
        assert [server.put(f"/more{n}", b"value") for n in range(20)] == [201] * 20


def write_and_read(port: int, number: int, rounds: int) -> None:
    """One client: large and small values of its own, written, read and deleted."""
    client = Client(port)
    for turn in range(rounds):
        path = f"/client{number}/{turn}"
        value = blob(path, 100_000 if turn % 4 == 0 else 1000)
        assert client.call("PUT", path, value).status == 201
        reply = follow(client.call("GET", path))
        assert reply is not None and reply.body == value
        assert client.call("DELETE", path).status == 204
        assert client.call("GET", path).status == 404


def test_uploads_of_all_sizes_at_a_time_do_not_disturb_each_other(cluster: Make) -> None:
    system = cluster("-voltimeout", "2s")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: write_and_read(system.server.port, number, 50), range(6)))
    assert system.server.metric("mkv_volumes_up") == 3
    until(system.is_clean)


# --- reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ailments", [("dead", "dead"), ("frozen", "frozen"), ("dead", "frozen")])
def test_reads_with_all_volumes_but_one_dead_or_frozen(
    cluster: Make, mounts: Callable, ailments: tuple[str, str]
) -> None:
    system = cluster()
    values = {f"/k{n}": blob(f"{n}", 1000 + n) for n in range(30)}
    for path, value in values.items():
        assert system.server.put(path, value) == 201
        assert read(system.server, path) == value
    cures = [ail(ailment, system.volumes[n], mounts) for n, ailment in enumerate(ailments)]
    for path, value in values.items():
        assert read(system.server, path) == value
    restart(system)  # one that knows nothing of its volumes
    for path, value in values.items():
        assert read(system.server, path) == value
    assert read(system.server, "/no-such-key") is None
    for cure in cures:
        cure()


def live_connections(server: Server, volume: Volume) -> int:
    """How many connections a server has to a volume that the volume has not ended."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here, port = links(server.process.pid), f":{volume.port:04X}"
    mine = [row for row in rows if row[2].endswith(port) and f"socket:[{row[9]}]" in here]
    return sum(row[3] == "01" for row in mine)  # ESTABLISHED


def test_a_connection_that_a_volume_has_ended_is_not_taken_for_a_dead_volume(cluster: Make) -> None:
    system = cluster()
    for volume in system.volumes:
        config, old = volume.folder / ".nginx/nginx.conf", set(volume.workers())
        text = config.read_text().replace("keepalive_timeout 1h", "keepalive_timeout 1s")
        config.write_text(text)
        volume.process.send_signal(signal.SIGHUP)
        until(lambda volume=volume, old=old: old.isdisjoint(volume.workers()))
    for number in range(3):
        assert system.server.put(f"/k{number}", b"value") == 201
        assert system.server.get(f"/k{number}") == b"value"
        until(lambda: all(live_connections(system.server, v) <= 1 for v in system.volumes))
    assert system.server.call("DELETE", "/k0").status == 204
    assert "down" not in system.server.log.read_text()
    until(system.is_clean)


def test_a_frozen_volume_costs_a_reader_nothing(cluster: Make) -> None:
    system = cluster("-voltimeout", "1s", "-replicas", "2", volumes=2, subvolumes=1)
    server, frozen = system.server, system.volumes[0]
    paths = [f"/k{n}" for n in range(50)]
    for path in paths:
        assert server.put(path, b"value") == 201
    frozen.freeze()
    client, times = Client(server.port), []

    def ask(path: str) -> str:
        began = time.monotonic()
        reply = client.call("GET", path)
        times.append(time.monotonic() - began)
        assert reply.status == 302
        return reply.fields["location"]

    until(lambda: ask("/k0") and server.sees(frozen, False), 5)
    assert all(frozen.name not in ask(path) for path in paths)
    restart(system)  # whose first look is over before it listens
    client = Client(server.port)
    assert all(frozen.name not in ask(path) for path in paths)
    assert len(times) >= 100 and max(times) < 0.5
    frozen.thaw()
    until(lambda: frozen.name in [volume_of(ask(p)[7:]) for p in paths], 5)


def test_a_frozen_volume_costs_its_writers_one_timeout_and_not_one_each(cluster: Make) -> None:
    system = cluster("-voltimeout", "1s", "-replicas", "2", volumes=3, subvolumes=1)
    server, frozen = system.server, system.volumes[0]
    frozen.freeze()
    began = time.monotonic()
    for number in range(30):
        assert server.put(f"/k{number}", b"value") == 201
    assert time.monotonic() - began < 14  # an upload without progress has ten times that
    frozen.thaw()
    until(system.is_clean, 40)


@pytest.mark.parametrize("cause", ["dead", "away"])
def test_a_volume_that_fails_is_noticed_within_a_second(
    cluster: Make, mounts: Callable, cause: str
) -> None:
    system = cluster("-replicas", "2", subvolumes=1)
    server, bad = system.server, system.volumes[0]
    paths = [f"/k{n}" for n in range(30)]
    for path in paths:
        assert server.put(path, b"value") == 201

    def targets() -> set[str]:
        return {server.call("GET", path).fields["location"].split("/")[2] for path in paths}

    until(lambda: bad.name in targets(), 2)
    cure = ail(cause, bad, mounts)
    until(lambda: bad.name not in targets(), 1.2)
    assert server.put("/while-down", b"value") == 201
    cure()
    until(lambda: bad.name in targets(), 1.5)


def test_a_vanished_drive_is_passed_over_and_its_garbage_kept_on_the_list(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=3, subvolumes=3)
    server = system.server
    drive = ideal(system, "/kept", 2)[0]
    paths = [f"/k{n}" for n in range(200) if drive in ideal(system, f"/k{n}", 2)]
    for path in ["/kept", *paths]:
        assert server.put(path, path.encode()) == 201
    folder, away = drive_at(system, drive), system.folder / "away"
    folder.rename(away)
    assert read(server, "/kept") == b"/kept"

    def is_passed_over() -> bool:
        targets = [server.call("GET", path).fields.get("location", "") for path in paths]
        return not any(target.startswith(f"http://{drive}/") for target in targets)

    until(is_passed_over, 1.5)
    holds(lambda: all(server.get(path) == path.encode() for path in ["/kept", *paths[:5]]), 1)
    for path in paths:
        assert server.call("DELETE", path).status == 204
        assert server.get(path) is None

    def waiting() -> int:
        return sum(r.location == drive for files in system.garbage().values() for r in files)

    until(lambda: len(system.files()) == 1)  # the other replica of /kept
    holds(lambda: waiting() == len(paths), 1.5)  # several times -settle and -grace
    away.rename(folder)
    until(system.is_clean, 60)
    assert server.get("/kept") == b"/kept"
    assert len(system.files()) == 2


def test_a_drive_that_takes_no_more_values_still_gives_those_it_has(cluster: Make) -> None:
    system = cluster("-voltimeout", "2s", "-replicas", "2", volumes=2, subvolumes=1)
    server, (full, other) = system.server, system.volumes
    assert server.put("/k", b"value") == 201
    block(full.folder)
    assert server.put("/more", b"value") == 503
    other.kill()
    reply = server.call("GET", "/k")
    assert reply.status == 302
    assert read(server, "/k") == b"value"


# --- deletes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ailment", ["dead", "frozen", "away"])
def test_delete_does_not_wait_for_volumes_that_are_down(
    cluster: Make, mounts: Callable, ailment: str
) -> None:
    system = cluster(subvolumes=1)
    server, bad = system.server, system.volumes[0]
    paths = [f"/k{n}" for n in range(12)]
    for path in paths:
        assert server.put(path, b"old") == 201
    cure = ail(ailment, bad, mounts)
    began = time.monotonic()
    for path in paths:
        assert server.call("DELETE", path).status == 204
        assert server.get(path) is None
    assert time.monotonic() - began < 8
    until(lambda: not (system.volumes[1].files() | system.volumes[2].files()))
    used = cpu(server)
    holds(lambda: len(system.garbage()) == len(paths), 1.5)
    assert cpu(server) - used < 1, "the sweeper does not loop"
    cure()
    until(system.is_clean, 60)
    assert not system.files()


def one_old_worker(cluster: Make, *flags: str) -> tuple[Cluster, Volume]:
    """A cluster with /k, and its first volume; -settle is long, so 404 is no proof."""
    system = cluster("-settle", "15s", "-voltimeout", "1s", *flags, subvolumes=1)
    assert system.server.put("/k", b"old") == 201
    return system, volume_at(system, ideal(system, "/k")[0])


def test_a_put_that_lands_after_the_server_was_killed_and_the_key_written_anew(
    cluster: Make,
) -> None:
    system, volume = one_old_worker(cluster)
    server = system.server
    others = [v for v in system.volumes if v is not volume]
    assert server.call("DELETE", "/k").status == 204
    until(system.is_clean)
    with old_workers_frozen(volume):
        thread = in_background(lambda: server.put("/k", b"late"))
        until(lambda: all(other.files() for other in others))
        server.kill()
        thread.join()
        fresh_workers(volume)
        assert not volume.files()
        server.start()
        until(lambda: server.put("/k", b"new") == 201)
        assert server.get("/k") == b"new"
        (new,) = volume.files()
        holds(lambda: b"/k" in system.garbage(), 1.5)  # however often 404 says that it is gone
        server.process.send_signal(signal.SIGSTOP)  # or the file may be swept before it is seen
    try:
        until(lambda: volume.files() > {new})  # the late PUT has landed
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert copies(system, "/k")[volume.name] == b"new"
    until(system.is_clean, 90)
    assert volume.files() == {new}
    assert [server.get("/k") for _ in range(10)] == [b"new"] * 10
    assert_copies(system, "/k", b"new")


def test_a_delete_that_lands_after_the_server_was_killed_and_the_key_written_anew(
    cluster: Make,
) -> None:
    system, volume = one_old_worker(cluster, "-grace", "1m")
    server, others = system.server, [v for v in system.volumes if v is not volume]
    (old,) = volume.files()
    with old_workers_frozen(volume):
        thread = in_background(lambda: server.call("DELETE", "/k"))
        until(lambda: not any(other.files() for other in others))
        server.kill()
        thread.join()
        fresh_workers(volume)
        server.start()
        assert server.put("/k", b"new") == 201
        (new,) = volume.files() - {old}
    until(lambda: old not in volume.files())  # not by the sweeper: it leaves old files for a minute
    assert volume.files() == {new}
    assert [server.get("/k") for _ in range(10)] == [b"new"] * 10
    assert_copies(system, "/k", b"new")
    server.stop()
    system.start(server.port)  # whose sweeper does not wait
    until(system.is_clean, 40)
    assert_copies(system, "/k", b"new")


# --- kill -9 --------------------------------------------------------------------------------------


class Load(threading.Thread):
    """A client that writes, reads and deletes keys of its own until its connection breaks."""

    SIZES = (10, 1000, 50_000, 200_000, 1_000_000)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.values: dict[str, bytes | None] = {f"/load{number}/{n}": None for n in range(8)}
        self.unsure: tuple[str, str, bytes] | None = None
        self.wrong: list[Any] = []
        self.done = 0

    def again(self, port: int, seed: int) -> "Load":
        """The same client, ready for another round."""
        fresh = Load(self.number)
        fresh.values, fresh.port, fresh.dice = self.values, port, random.Random(seed)
        fresh.start()
        return fresh

    def run(self) -> None:
        client = Client(self.port)
        try:
            while True:
                self.step(client)
        except OSError:
            pass

    def step(self, client: Client) -> None:
        path = self.dice.choice(list(self.values))
        old = self.values[path]
        if old is None:
            size = self.dice.choice(self.SIZES)
            new = blob(f"{path} {self.dice.random()}", size)
            self.unsure = ("PUT", path, new)
            status = client.call("PUT", path, new).status
            self.values[path] = new if status == 201 else None
            expected = 201
        elif self.dice.random() < 0.5:
            self.unsure = ("DELETE", path, old)
            status = client.call("DELETE", path).status
            self.values[path] = None if status == 204 else old
            expected = 204
        else:
            status, expected = client.call("GET", path).status, 302
        self.unsure = None
        self.done += 1
        if status != expected:
            self.wrong.append((path, status, expected))


def test_kill_9_under_load_loses_nothing_and_leaves_nothing(cluster: Make) -> None:
    system = cluster("-replicas", "2", subvolumes=2)
    server, dice, loads = system.server, random.Random(), [Load(n) for n in range(6)]
    broken = done = 0
    for turn in range(22):
        loads = [load.again(server.port, dice.getrandbits(64)) for load in loads]
        until(lambda loads=loads: sum(load.done for load in loads) > dice.randrange(60))
        server.kill()
        for load in loads:
            load.join()
            assert not load.wrong, (turn, load.wrong)
        done += sum(load.done for load in loads)
        server.start()
        client = Client(server.port)
        for load in loads:  # first of all: what was broken off can be written at once
            method, path, value = load.unsure or ("", "", b"")
            if method == "PUT":
                broken += 1
                if (found := read(server, path)) is None:
                    assert client.call("PUT", path, value).status == 201, (turn, path)
                else:
                    assert found == value, (turn, path)
                load.values[path] = value
            elif method == "DELETE":
                found = read(server, path)
                assert found in (None, value), (turn, path)
                load.values[path] = found
        for load in loads:
            for path, value in load.values.items():
                assert read(server, path) == value, (turn, path)
        until(system.is_clean)
    assert broken >= 10
    assert done >= 200


def test_after_kill_9_the_key_of_a_broken_off_put_can_be_written_at_once(cluster: Make) -> None:
    system = cluster("-grace", "1m", "-settle", "1h")
    server = system.server
    uploads = [Upload(server.port, f"/k{n}", 24 * MB) for n in range(3)]
    for upload in uploads:
        upload.send(blob("half", 4 * MB))
    until(lambda: system.open_intents() == len(uploads))
    assert server.put("/k0", b"is locked") == 409
    restart(system)
    assert [server.put(f"/k{n}", b"new") for n in range(3)] == [201] * 3
    assert not system.open_intents()
    for number in range(3):
        assert_copies(system, f"/k{number}", b"new")


def test_after_kill_9_what_was_broken_off_is_garbage_until_it_is_gone(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=2, subvolumes=1)
    upload = Upload(system.server.port, "/k", 24 * MB)
    upload.send(blob("half", 4 * MB))
    until(lambda: system.open_intents() == 1)
    system.server.kill()
    for volume in system.volumes:
        volume.kill()
    system.server.start()
    assert system.server.garbage().keys() == {b"/k"} and not system.open_intents()
    assert {f.location for f in system.server.garbage()[b"/k"]} == {v.name for v in system.volumes}
    for volume in system.volumes:
        volume.start()
    until(system.is_clean)


# --- the index, and its disk ----------------------------------------------------------------------


def test_lines_of_the_intents_that_are_none_are_reported_and_passed_over(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=2, subvolumes=1)
    upload = Upload(system.server.port, "/k", 100)
    upload.send(b"not all")
    until(lambda: system.open_intents() == 1)
    system.server.kill()
    torn = mkv.key2path(b"/torn", WRITE_ID)
    with (system.folder / "index/intents").open("ab") as file:
        file.write(f"nonsense\n+ /no/path {WRITE_ID}\n\0\xff\n- \n\n+ {torn} 127".encode("latin-1"))
    system.server.start()
    assert "nonsense" in system.server.log.read_text()
    until(system.is_clean)
    assert system.server.put("/k", b"value") == system.server.put("/torn", b"value") == 201


def test_the_intents_stay_small_and_lose_none_that_is_open(cluster: Make) -> None:
    system = cluster("-replicas", "1", "-grace", "1h", volumes=1, subvolumes=1)
    upload = Upload(system.server.port, "/open", 100)
    upload.send(b"not all")
    until(lambda: system.open_intents() == 1)
    client = Client(system.server.port)
    for number in range(2000):  # 1.5 KB each
        path = f"/{number}-".ljust(500, "x")
        assert client.call("PUT", path, b"value").status == 201
    assert (system.folder / "index/intents").stat().st_size < 1_500_000
    for volume in system.volumes:
        volume.kill()
    restart(system)
    assert until(system.server.garbage).keys() == {b"/open"}


@pytest.fixture
def small_index(cluster: Make, mounts: Callable) -> tuple[Cluster, Server, Path, list[str], Upload]:
    """A server whose -db is on a tmpfs that is full, the keys so far, and an upload in hand."""
    system = cluster("-replicas", "2", volumes=2, subvolumes=1)
    system.server.stop()
    folder = system.folder / "index"
    mounts(folder, "-t", "tmpfs", "-o", "size=600k", "none")
    system.server.start()
    upload = Upload(system.server.port, "/in-hand", MB)
    upload.send(b"not all of it")
    until(lambda: system.open_intents() == 1)
    paths, status = [], 201
    while status == 201:
        path = "/" + f"{len(paths)}-".ljust(400, "x")
        status = system.server.put(path, path.encode())
        paths.append(path)
        assert len(paths) < 3000
    assert status == 503
    return system, system.server, folder, paths, upload


def test_a_full_disk_under_the_index_answers_503_and_loses_nothing(small_index: tuple) -> None:
    system, server, folder, (*paths, refused), upload = small_index
    assert len(paths) > 20
    assert server.call("GET", "/?health").status == 200
    for path in paths:
        assert read(server, path) == path.encode()
    assert server.get(refused) is None
    upload.send(bytes(MB - len(b"not all of it")))
    status = upload.answer()
    assert status in (201, 503)  # a smaller change than a new key: there may be room for it
    assert (server.get("/in-hand") is not None) == (status == 201)
    shell("mount", "-o", "remount,size=16m", str(folder))
    until(lambda: server.put(refused, b"now there is room") == 201)
    if status == 503:
        until(lambda: server.put("/in-hand", b"now there is room") == 201)
    assert [server.call("DELETE", path).status for path in paths] == [204] * len(paths)
    until(system.is_clean, 40)
    assert len(system.files()) == 4
    assert server.get(refused) == b"now there is room"


def test_a_server_killed_on_a_full_disk_starts_again_with_all_it_acknowledged(
    small_index: tuple,
) -> None:
    system, server, folder, (*paths, refused), _ = small_index
    server.kill()
    shell("mount", "-o", "remount,size=16m", str(folder))
    server.start()
    for path in paths:
        assert read(server, path) == path.encode()
    assert server.put(refused, b"x") == 201
    assert server.put("/in-hand", b"x") == 201
    until(system.is_clean, 40)


def test_sigterm_ends_a_server_whose_index_cannot_be_written(small_index: tuple) -> None:
    _, server, _, _, upload = small_index
    upload.vanish()
    until(lambda: server.metric("mkv_connections") <= 1)
    assert server.stop() == 0


READER = """
import lmdb, sys, time
env = lmdb.open(sys.argv[1], readonly=True, max_dbs=2, map_size=1 << 40)
with env.begin() as txn:
    print("reading", flush=True)
    time.sleep(600)
"""


def test_a_killed_reader_does_not_let_the_index_grow_for_ever(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    server, path = system.server, system.folder / "index"

    def growth() -> int:
        """Bytes by which the file has grown after so many commits."""
        client, before = Client(server.port), (path / "data.mdb").stat().st_size
        for number in range(150):
            assert client.call("PUT", f"/k{number % 7}", b"x").status == 201
            assert client.call("DELETE", f"/k{number % 7}").status == 204
        return (path / "data.mdb").stat().st_size - before

    growth()
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout and reader.stdout.readline() == "reading\n"
        pinned = growth()
        assert pinned > 500_000, "a reader that lives pins pages"
    finally:
        reader.kill()
        reader.wait()
    growth()  # within which the sweeper notices
    assert growth() + growth() < pinned / 4


def age_garbage(system: Cluster, path: str, since: float) -> None:
    """Make the value of a key garbage since a time, while no server runs."""
    key = path.encode()
    record = stored(system.folder / "index")[0][key]
    with lmdb.open(str(system.folder / "index"), max_dbs=8, map_size=1 << 40) as env:
        table = env.open_db(b"keys")
        with env.begin(table, write=True) as txn:
            txn.delete(key)
    plant(system.folder / "index", [], [(key, garbage_row(record.replicas, since))])


@pytest.mark.parametrize("years", [1, -1])
def test_garbage_from_when_the_clock_was_wrong_is_swept(cluster: Make, years: int) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    assert system.server.stop() == 0
    age_garbage(system, "/k", time.time() + years * 366 * 24 * 3600)
    system.server.start()
    until(system.is_clean)


def test_a_key_from_the_end_of_time_is_not_written_anew_but_can_still_be_deleted(
    cluster: Make,
) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    server, (volume,) = system.server, system.volumes
    server.stop()
    last = f"DELETED{volume.name} 5 ffffffff00000001".encode()
    plant(system.folder / "index", [(b"/k", last)])
    server.start()
    assert server.put("/k", b"value") == 503
    assert server.call("DELETE", "/k").status == 204
    until(lambda: server.put("/k", b"value") == 201)


def test_what_becomes_garbage_during_a_long_sweep_is_left_alone_for_grace(
    tmp_path: Path, fakes: Callable[[], Fake]
) -> None:
    fake = fakes()
    old = [b"/k%02d" % number for number in range(20)]
    rows = [(key, garbage_row([mkv.Replica(fake.name, WRITE_ID)], 1.0)) for key in old]
    plant(tmp_path / "index", [], rows)
    gate = threading.Event()
    fake.before = lambda method, _: gate.wait(10) if method == "DELETE" else None
    flags = "-volumes", fake.name, "-replicas", "1", "-subvolumes", "1", "-grace", "1s"
    server = Server(
        tmp_path / "index", *free_ports(1), *flags, "-settle", "60s", "-voltimeout", "5s"
    )
    try:
        until(lambda: fake.log)  # a sweep has begun
        assert server.put("/new", b"first") == 201
        first = next(path for path in fake.stored)
        replaced = time.monotonic()
        assert server.call("PUT", "/new", b"second", If_Match="*").status == 201
        gate.set()
        until(lambda: first not in fake.stored)
        (at,) = [at for at, method, path in fake.log if (method, path) == ("DELETE", first)]
        assert at - replaced > 0.9
        assert {p for _, m, p in fake.log if m == "DELETE"} >= {
            mkv.key2path(k, WRITE_ID) for k in old
        }
    finally:
        gate.set()
        server.kill()


def test_a_thousand_leftovers_of_one_key_are_soon_swept(cluster: Make) -> None:
    system = cluster("-settle", "1s")
    assert system.server.stop() == 0
    places = [f"{v.name}/sv{n:02X}" for v in system.volumes for n in range(10)]
    ids = [f"{1_700_000_000 + n:08x}00000000" for n in range(33)]
    files = [mkv.Replica(place, write_id) for place in places for write_id in ids]
    plant(system.folder / "index", [], [(b"/k", garbage_row(files, time.time()))])
    system.server.start()
    assert len(files) == 990
    until(system.is_clean, 15)
    assert system.server.put("/k", b"value") == 201


def test_a_key_with_much_garbage_is_swept_in_small_portions(
    tmp_path: Path, fakes: Callable[[], Fake]
) -> None:
    fake, lock, now, most = fakes(), threading.Lock(), 0, 0
    files = [mkv.Replica(fake.name, f"{1_700_000_000 + n:08x}00000000") for n in range(2000)]
    paths = [mkv.key2path(b"/k", file.write_id) for file in files]
    fake.stored = dict.fromkeys(paths, b"x")

    def count(*_: str) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        with lock:
            now -= 1

    fake.before = count
    plant(tmp_path / "index", [], [(b"/k", garbage_row(files, 1.0))])
    flags = "-volumes", fake.name, "-replicas", "1", "-subvolumes", "1", "-grace", "0"
    server = Server(tmp_path / "index", *free_ports(1), *flags, "-settle", "1h")
    try:
        until(lambda: not fake.stored, 60)
        until(lambda: not server.garbage())
        assert sorted(path for _, _, path in fake.log) == sorted(paths) and most < 100
        assert server.metric("mkv_swept_files_total") == 2000
    finally:
        server.kill()


# --- what cannot be read --------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["keys", "garbage"])
def test_a_row_that_cannot_be_read_is_reported_and_stops_nothing_else(
    cluster: Make, table: str
) -> None:
    system = cluster()
    server = system.server
    for path in ("/a", "/c"):
        assert server.put(path, b"value") == 201
    server.stop()
    rows = [(b"/b", b"\xff nonsense \0"), (b"/b2", b"x y z")]
    plant(system.folder / "index", **{table: rows})
    server.start()
    assert server.get("/a") == server.get("/c") == b"value"
    assert {"/a", "/c"} <= set(listed(server, "/?list")[0])
    assert {"/a", "/c"} <= {item["key"] for item in server.pages("/?list")}
    assert server.call("GET", "/b").status in (404, 500)
    assert server.call("DELETE", "/a").status == 204
    until(lambda: not [f for f in system.files() if mkv.key2path(b"/a") in f])
    until(lambda: b"/a" not in server.garbage())
    if table == "keys":
        answer = server.call("GET", "/b")
        assert answer.status == 500 and b"index" in answer.body
    else:
        until(lambda: "cannot be read" in server.log.read_text())
    if server.call("GET", "/b").status == 500:
        assert server.call("DELETE", "/b").status == 204  # what helps
    assert server.put("/b", b"value") in (201, 500)


# --- from the first edition -----------------------------------------------------------------------

CLAIM = "0123456789abcd.fedcba9876543210"  # of a process that is dead


def first_edition(folder: Path, keys: dict[bytes, bytes], journal: dict[bytes, bytes]) -> None:
    """An index as the first edition left it."""
    folder.mkdir(parents=True)
    (folder / "alive").touch()
    with lmdb.open(str(folder), max_dbs=2, map_size=1 << 40) as env:
        for name, rows in ((b"keys", keys), (b"journal", journal)):
            with env.begin(env.open_db(name), write=True) as txn, txn.cursor() as cursor:
                cursor.putmulti(rows.items())


def test_the_index_of_a_first_edition_is_taken_over(cluster: Make) -> None:
    system = cluster("-grace", "1h", subvolumes=1)
    a, b, c = (volume.name for volume in system.volumes)
    assert system.server.put("/kept", b"value") == 201
    system.server.stop()
    kept = stored(system.folder / "index")[0][b"/kept"]
    shutil.rmtree(system.folder / "index")
    ids = [f"{1_600_000_000 + n:08x}0000000{n}" for n in range(4)]
    live = kept.replicas[0].location
    first_edition(
        system.folder / "index",
        {
            b"/kept": kept.text(),
            b"/old": f"DELETED{a},{b}".encode(),  # minikeyvalue's
        },
        {
            b"/garbage": f" 1600000000.5 {a}@{ids[0]},{b}@{ids[0]}".encode(),
            b"/claimed": f"{CLAIM} 0.0 {a}@{ids[1]},{c}@{ids[1]}".encode(),
            # a claim whose owner has committed, and then died: the record names its files
            b"/kept": f"{CLAIM} 0.0 {live}@{kept.write_id},{a}@{ids[2]}".encode(),
            b"/ancient": f" 1600000000.25 {a},{c}".encode(),
            b"/nothing": f"{CLAIM} 0.0 ".encode(),
        },
    )
    system.server.start()
    assert system.server.get("/kept") == b"value"
    assert system.records() == {
        b"/kept": kept,
        b"/old": mkv.Record((mkv.Replica(a, ""), mkv.Replica(b, "")), deleted=True),
    }
    garbage = {key: set(files) for key, files in system.garbage().items()}
    assert garbage == {
        b"/garbage": {mkv.Replica(a, ids[0]), mkv.Replica(b, ids[0])},
        b"/claimed": {mkv.Replica(a, ids[1]), mkv.Replica(c, ids[1])},
        b"/kept": {mkv.Replica(a, ids[2])},
        b"/ancient": {mkv.Replica(a, ""), mkv.Replica(c, "")},
    }
    assert all(age < 60 for files in system.garbage().values() for age in files.values())
    for path in ("/claimed", "/garbage", "/ancient"):
        assert system.server.put(path, b"new") == 201
    restart(system)
    assert {key: set(files) for key, files in system.garbage().items()} == garbage
    system.server.stop()
    system.start(system.server.port)
    assert system.server.call("DELETE", "/old").status == 204
    until(system.is_clean)
    assert system.server.get("/kept") == b"value"


def test_a_row_of_a_first_edition_that_cannot_be_read_stops_nothing(cluster: Make) -> None:
    system = cluster(subvolumes=1)
    system.server.stop()
    shutil.rmtree(system.folder / "index")
    a = system.volumes[0].name
    good = f" 1600000000.5 {a}@{WRITE_ID}".encode()
    first_edition(
        system.folder / "index",
        {},
        {b"/a": good, b"/b": b"nonsense", b"/c": b"\xff \0", b"/d": good},
    )
    system.server.start()
    until(system.is_clean)
    assert system.server.put("/b", b"value") == 201


def test_a_first_edition_and_its_successor_keep_each_other_out(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1)
    alive = system.folder / "index/alive"
    with alive.open("a+") as file:
        with pytest.raises(BlockingIOError):  # so does a first edition, for a byte of its own
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(CLAIM[:14], 16))
        system.server.stop()
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(CLAIM[:14], 16))
        other = "-db", system.folder / "index", "-port", str(free_ports(1)[0])
        assert "index" in error_of("server", *ONE, *other, folder=system.folder)
    system.server.start()


# --- copies of the index --------------------------------------------------------------------------


def snapshot(server: Server, folder: Path) -> None:
    """The backup: over HTTP, into a folder of its own."""
    answer = server.call("GET", "/?snapshot")
    assert answer.status == 200 and int(answer.fields["content-length"]) == len(answer.body)
    folder.mkdir()
    (folder / "data.mdb").write_bytes(answer.body)


def test_a_snapshot_starts_in_another_folder_with_all_that_was_acknowledged(cluster: Make) -> None:
    system = cluster()
    server, enough, done = system.server, threading.Event(), []

    def go_on() -> None:
        for number in itertools.count():
            if enough.is_set():
                return
            if server.put(f"/s{number}", b"%d" % number) == 201:
                done.append(number)

    writers = [threading.Thread(target=go_on)]
    upload = Upload(server.port, "/in-hand", 100)
    upload.send(b"not all")
    for thread in writers:
        thread.start()
    try:
        until(lambda: len(done) > 50)
        acknowledged = list(done)
        before = set(os.listdir(system.folder / "index"))
        snapshot(server, system.folder / "restored")
        assert set(os.listdir(system.folder / "index")) == before
    finally:
        enough.set()
        for thread in writers:
            thread.join()
    server.kill()
    copy = system.start(*free_ports(1), db=system.folder / "restored")
    for number in acknowledged:
        assert copy.get(f"/s{number}") == b"%d" % number
    assert copy.put("/more", b"value") == 201
    assert copy.get("/in-hand") is None


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_copy_of_the_folder_wastes_nothing_that_was_written_since(
    cluster: Make, end: str
) -> None:
    system = cluster("-grace", "1h")
    server = system.server
    assert server.put("/old", b"value") == 201
    uploads = [Upload(server.port, f"/k{n}", 100) for n in range(3)]
    for upload in uploads:
        upload.send(b"not all")
    until(lambda: system.open_intents() == len(uploads))
    if end == "kill":  # the copy has open intents
        server.process.send_signal(signal.SIGSTOP)
        shutil.copytree(system.folder / "index", system.folder / "copy")
        server.process.send_signal(signal.SIGCONT)
    for upload in uploads:  # production goes on: they become values
        upload.send(bytes(93))
    assert [upload.answer() for upload in uploads] == [201] * len(uploads)
    if end == "stop":
        server.stop()
        shutil.copytree(system.folder / "index", system.folder / "copy")
        server.start()
    assert server.put("/new", b"value") == 201
    files = system.files()
    copy = system.start(*free_ports(1), "-grace", "0", "-settle", "0", db=system.folder / "copy")
    assert copy.get("/old") == b"value"
    holds(lambda: system.files() == files, 2)
    assert not copy.garbage() and not copy.metric("mkv_intents_open")
    copy.kill()
    for number in range(3):
        assert server.get(f"/k{number}") == b"not all" + bytes(93)


def test_a_snapshot_beside_old_intents_wastes_nothing(cluster: Make) -> None:
    system = cluster("-grace", "1h")
    server = system.server
    upload = Upload(server.port, "/k", 100)
    upload.send(b"not all")
    until(lambda: system.open_intents() == 1)
    snapshot(server, system.folder / "restored")
    for name in os.listdir(system.folder / "index"):  # a cp -r, with the snapshot laid over it
        if name != "data.mdb":
            shutil.copy(system.folder / "index" / name, system.folder / "restored" / name)
    upload.send(bytes(93))
    assert upload.answer() == 201
    files = system.files()
    copy = system.start(
        *free_ports(1), "-grace", "0", "-settle", "0", db=system.folder / "restored"
    )
    holds(lambda: system.files() == files, 1.5)
    assert not copy.garbage()
    copy.kill()
    assert server.get("/k") == b"not all" + bytes(93)
