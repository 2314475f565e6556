"""The promises of mkv, second half; see harness.py."""

import email.utils
import http.server

from harness import *  # noqa: F403

# --- clients that misbehave -----------------------------------------------------------------------


def test_clients_gone_in_mid_upload_leave_nothing(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/warm", blob("warm", MB)) == 201
    files = system.files()
    for turn in range(7):
        uploads = [Upload(server.port, f"/gone{n}", 8 * MB) for n in range(6)]
        uploads += [Upload(server.port, f"/little{n}", 1000) for n in range(6)]
        for upload in uploads[:6]:
            upload.send(blob("some", MB))
        for upload in uploads[6:]:
            upload.send(b"some")
        until(lambda: system.open_intents() == 12)
        assert read(server, "/warm") == blob("warm", MB)  # others are served meanwhile
        for number, upload in enumerate(uploads):
            if number % 2 == turn % 2:
                upload.vanish()
            else:
                upload.wire.close()
        until(system.is_clean, 40)
        if turn == 1:  # connections to volumes are kept, but not ever more of them
            base = descriptors(server)
    assert system.files() == files
    until(lambda: server.metric("mkv_connections") <= 1)
    until(lambda: descriptors(server) <= base + 30)
    assert server.memory() < 250 * MB
    for name in ("gone", "little"):
        for number in range(6):
            assert server.put(f"/{name}{number}", b"now whole") == 201
    temporary = [f for v in system.volumes for f in v.folder.rglob(".tmp/*") if f.is_file()]
    assert not temporary


@pytest.mark.parametrize("length", [1000, 2 * MB])
def test_a_body_that_ends_early_is_refused(system: Cluster, length: int) -> None:
    upload = Upload(system.server.port, "/short", length)
    upload.send(bytes(length - 1))
    upload.wire.shutdown(socket.SHUT_WR)
    assert upload.answer() == 400
    assert system.server.get("/short") is None
    until(system.is_clean, 40)


@pytest.mark.parametrize("length", [1000, 2 * MB])
def test_what_follows_a_body_is_not_part_of_it(cluster: Make, length: int) -> None:
    system, value = cluster(), blob("/k", length)
    data = request("PUT", "/k", value) + b"more than announced\r\n\r\n"
    assert statuses(raw(system.server.port, data)) == [201, 400]
    assert_copies(system, "/k", value)


@pytest.mark.parametrize("size", [1000, 2 * MB])
def test_a_content_md5_that_does_not_match_stores_nothing(system: Cluster, size: int) -> None:
    server, path, value = system.server, f"/md5/{size}", blob("value", size)
    wrong, right = hashlib.md5(b"another").hexdigest(), hashlib.md5(value).hexdigest()
    for _ in range(3):
        assert server.call("PUT", path, value, Content_MD5=wrong).status == 400
        assert server.get(path) is None
    assert server.call("PUT", path, value, Content_MD5=right).status == 201
    until(system.is_clean, 40)
    assert server.call("DELETE", path).status == 204
    until(system.is_clean, 40)


@pytest.mark.parametrize("length", [50_000, 5 * MB])
def test_under_1_kib_a_second_is_too_slow(cluster: Make, length: int) -> None:
    system = cluster(constants={"BODY_TIME": 1})
    server = system.server
    slow, steady = (Upload(server.port, path, length) for path in ("/slow", "/steady"))
    slow.send(b"a few bytes")
    sent, deadline = 0, time.monotonic() + 20
    slow.wire.setblocking(False)
    while sent < length:  # 20 KiB a second or more, while the other one idles
        steady.send(blob("steady", length)[sent : sent + 20_000])
        sent += 20_000
        if sent < length:
            with contextlib.suppress(BlockingIOError):
                if slow.wire.recv(1, socket.MSG_PEEK):
                    steady.send(blob("steady", length)[sent:])
                    break
            time.sleep(0.2)
        assert time.monotonic() < deadline
    assert steady.answer() == 201
    slow.wire.settimeout(20)
    assert slow.answer() == 408
    assert server.get("/slow") is None
    assert_copies(system, "/steady", blob("steady", length))
    assert server.put("/slow", b"now quick") == 201
    until(system.is_clean, 40)


def test_five_thousand_idle_connections_do_not_keep_others_from_being_served(
    cluster: Make,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (12_000, max(hard, 12_000)))
    except (ValueError, PermissionError):
        pytest.skip("needs 12,000 open files")
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        system = cluster()
        server = system.server
        base = descriptors(server)
        wires = [socket.socket() for _ in range(5000)]
        for number, wire in enumerate(wires):
            stack.enter_context(wire)
            wire.connect(("127.0.0.1", server.port))
            if number % 2:
                wire.sendall(b"GET /half a head")
        until(lambda: server.metric("mkv_connections") > 5000)
        for number in range(30):
            value = blob(f"{number}", 1000 if number % 10 else 500_000)
            assert server.put(f"/k{number}", value) == 201
            assert server.get(f"/k{number}") == value
        assert server.memory() < 300 * MB
        for wire in wires:
            wire.close()
        until(lambda: server.metric("mkv_connections") <= 1)
        until(lambda: descriptors(server) <= base + 20)
        assert server.get("/k1") == blob("1", 1000)


# --- the end of a server --------------------------------------------------------------------------


def test_sigterm_finishes_what_is_in_hand_and_refuses_what_is_new(cluster: Make) -> None:
    system = cluster()
    server, value = system.server, blob("value", 8 * MB)
    idle = Client(server.port)
    assert idle.call("GET", "/?health").status == 200
    uploads = [Upload(server.port, f"/k{n}", len(value)) for n in range(4)]
    for upload in uploads:
        upload.send(value[: 3 * MB])
    until(lambda: system.open_intents() == len(uploads))
    server.process.send_signal(signal.SIGTERM)
    until(lambda: not system.server_accepts())
    assert server.running()
    for upload in uploads:
        upload.send(value[3 * MB :])
    assert [upload.answer() for upload in uploads] == [201] * 4
    assert server.process.wait(15) == 0
    server.start()
    for number in range(4):
        assert server.get(f"/k{number}") == value
    assert system.is_clean()


def test_sigterm_does_not_wait_for_ever(cluster: Make) -> None:
    system = cluster(constants={"DRAIN_TIME": 1})
    server = system.server
    upload = Upload(server.port, "/slow", 8 * MB)
    upload.send(blob("half", MB))
    until(lambda: system.open_intents() == 1)
    assert server.stop() == 0
    server.start()
    assert server.put("/slow", b"free") == 201
    until(system.is_clean, 40)


def test_sigterm_does_not_cut_short_a_list_that_is_being_read(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1).server
    paths = [f"/{number:0400d}" for number in range(700)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda path: server.put(path, b"value"), paths)) == {201}
    with quiet_reader(server.port) as wire:
        wire.sendall(request("GET", "/?list"))
        data = wire.recv(1000)
        server.process.send_signal(signal.SIGTERM)
        while piece := wire.recv(4096):
            data += piece
            time.sleep(0.05)  # a slow reader
    assert json.loads(data.partition(b"\r\n\r\n")[2]) == {"keys": paths, "next": ""}
    assert server.process.wait(30) == 0


def test_sigterm_ends_a_server_however_many_clients_go_on_to_connect(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1, constants={"DRAIN_TIME": 1}).server

    def connect() -> None:
        while True:  # until that is refused
            call(server.port, "GET", "/?health")

    clients = [in_background(connect) for _ in range(10)]
    until(lambda: server.metric('mkv_requests_total{method="GET",status="200"}') > 50)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(6) == 0
    for client in clients:
        client.join()


def test_sigterm_ends_a_server_with_uploads_that_are_stuck(cluster: Make) -> None:
    system = cluster("-voltimeout", "500ms", constants={"DRAIN_TIME": 1})
    server, volume = system.server, volume_at(system, ideal(system, "/stuck")[0])
    silent, stuck = Upload(server.port, "/silent", 2), Upload(server.port, "/stuck", 1 << 30)
    silent.send(b"x")
    stuck.send(blob("begin", MB))
    until(lambda: arrived(system, ideal(system, "/stuck")[0]))
    until(lambda: system.open_intents() == 2)
    volume.freeze()
    stuck.wire.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while True:
            stuck.send(bytes(MB))
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(10)
    volume.thaw()
    server.start()
    assert server.put("/stuck", b"free") == server.put("/silent", b"free") == 201
    until(system.is_clean, 40)


def test_a_server_ends_although_another_process_holds_the_lock_of_its_lmdb(cluster: Make) -> None:
    system = cluster(constants={"DRAIN_TIME": 1})
    index = str(system.folder / "index")
    with lmdb.open(index, max_dbs=8, map_size=1 << 40) as env, env.begin(write=True):
        upload = Upload(system.server.port, "/k", 5)
        upload.send(b"value")
        until(lambda: system.server.metric("mkv_connections") == 2)
        system.server.process.send_signal(signal.SIGTERM)
        system.server.process.wait(30)
    system.server.start()
    assert system.server.put("/k", b"value") in (201, 403)
    until(system.is_clean)


def test_an_answer_of_a_server_that_ends_is_the_last_on_its_connection(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1)
    put = request("PUT", "/k", b"value")
    with Wire(system.server.port) as wire, Wire(system.server.port) as idle:
        idle.send(request("GET", "/missing"))
        assert "connection" not in idle.answer().fields
        wire.send(put[:-2])
        until(lambda: system.open_intents() == 1)
        system.server.process.send_signal(signal.SIGTERM)
        until(lambda: not system.server_accepts())
        wire.send(put[-2:] + request("GET", "/k"))
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (201, "close")
        assert wire.closed() and idle.closed()
    assert system.server.process.wait(5) == 0


def test_who_has_connected_before_sigterm_may_still_ask_once(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1)
    with Wire(system.server.port) as wire:
        until(lambda: system.server.metric("mkv_connections") == 2)
        system.server.process.send_signal(signal.SIGTERM)
        until(lambda: not system.server_accepts())
        wire.send(request("GET", "/missing") * 2)
        answer = wire.answer()
        assert (answer.status, answer.fields["connection"]) == (404, "close")
        assert wire.closed()
    assert system.server.process.wait(5) == 0


def test_a_port_in_use_is_left_alone_and_said_to_be_in_use(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"value") == 201
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        for port in (server.port, stranger.getsockname()[1]):
            flags = ["-bind", "127.0.0.1", *server.flags, "-port", str(port), "-db", "other"]
            assert str(port) in error_of("server", *flags, folder=system.folder)
    assert [server.get("/k") for _ in range(20)] == [b"value"] * 20


def test_an_index_in_use_is_left_alone_and_said_to_be_in_use(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"value") == 201
    flags = ["-bind", "127.0.0.1", *server.flags, "-port", str(*free_ports(1)), "-db", server.db]
    said = error_of("server", *flags, folder=system.folder)
    assert str(server.db) in said
    assert server.get("/k") == b"value" and server.put("/k2", b"value") == 201


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
    after = None if it.method == "DELETE" else it.value
    legal = (before is None) == (it.method == "PUT") and it.expected in ("", before)
    if it.status is None:
        return {before, after} if legal else {before}
    if it.status in (201, 204):
        return {after} if legal else set()
    return {before} if not legal else set()  # 403 of PUT, 404 of DELETE, 412 of REPLACE


def is_linearizable(history: list[Call]) -> bool:
    """Whether there is an order of the calls on one key, each at some moment between its start and
    its end, in which a register that is absent at first would have given the same answers.

    A search over (calls done, value) after Wing and Gong, each visited once. A call may be next if
    no other one that is left ended before it started. Calls without an answer are taken only for
    what they change, and while their time is not over. One that neither changes anything nor ends
    the time of such a call is taken at once: that never spoils anything.
    """
    calls = sorted(history, key=lambda it: it.start)
    needed = sum(1 << n for n, it in enumerate(calls) if it.status is not None)
    todo, seen = [(0, None, -math.inf)], set()  # the calls done, the value, their latest start
    while todo:
        done, value, latest = todo.pop()
        if done & needed == needed:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        able, limit = [], math.inf
        for number in range((~done & (done + 1)).bit_length() - 1, len(calls)):
            it = calls[number]
            if it.start > limit:
                break
            if done >> number & 1:
                continue
            if it.status is not None:
                limit = min(limit, it.end)
            elif it.end < latest:
                done |= 1 << number
                continue
            able.append((number, it))
        steps = []
        for number, it in able:
            after = [v for v in effects(it, value) if it.status is not None or v != value]
            found = [(done | 1 << number, v, max(latest, it.start)) for v in after]
            ends = [other.end for _, other in able if other.status is None]
            if value in after and it.start <= min(ends, default=math.inf):
                steps = found
                break
            steps += found
        todo += steps
    return False


def test_the_checker_accepts_what_can_be() -> None:
    put, delete = Call("PUT", 0, 1, 201, "a"), Call("DELETE", 4, 5, 204)
    assert is_linearizable([])
    assert is_linearizable([put, Call("GET", 2, 3, 302, "a"), delete, Call("GET", 6, 7, 404)])
    during = [Call("GET", 0, 1, 404), Call("GET", 0.5, 1, 302, "a"), Call("PUT", 0, 2, 403, "b")]
    assert is_linearizable([put, *during])
    unknown = Call("PUT", 0, math.inf, None, "b")
    assert is_linearizable([unknown, Call("GET", 1, 2, 404)])
    assert is_linearizable([unknown, Call("GET", 1, 2, 404), Call("GET", 3, 4, 302, "b")])
    assert is_linearizable([put, Call("DELETE", 2, 3, None), Call("PUT", 4, 5, 201, "c")])
    read = [Call("DELETE", 1, 6, 204), Call("GET", 5, 7, 404)]  # it was written, and deleted
    assert is_linearizable([Call("PUT", 0, 4, None, "a"), *read])
    many = [Call("PUT", n, n + 20, None, f"{n}") for n in range(40)]
    assert is_linearizable([*many, Call("GET", 70, 71, 404)])


def test_the_checker_agrees_with_trying_all_orders() -> None:
    dice, seen = random.Random(1), {True: 0, False: 0}
    for _ in range(1500):
        history = []
        for number in range(5):
            method = dice.choice(["PUT", "GET", "DELETE", "REPLACE"])
            start = dice.randrange(10)
            end = dice.choice([start + dice.random() * 6, math.inf])
            outcomes = {"PUT": [201, 403, None], "DELETE": [204, 404, None]}
            status = dice.choice((outcomes | {"REPLACE": [201, 412, None]}).get(method, [0]))
            value = dice.choice([None, "0", "1", "2"]) if method == "GET" else f"{number}"
            expected = dice.choice(["", "0", "1"]) if method == "REPLACE" else ""
            history.append(Call(method, start, end, status, value, expected))
        expected = any(is_legal(order) for order in itertools.permutations(history))
        assert is_linearizable(history) == expected, history
        seen[expected] += 1
    assert min(seen.values()) > 100


def is_legal(order: tuple[Call, ...]) -> bool:
    """Whether calls can have happened in this order."""
    values: set[str | None] = {None}
    for number, it in enumerate(order):
        if any(later.end < it.start for later in order[number:]):
            return False
        values = set().union(*(effects(it, value) for value in values))
    return bool(values)


def test_the_checker_rejects_a_stale_read() -> None:
    history = [Call("PUT", 0, 1, 201, "a"), Call("DELETE", 2, 3, 204), Call("PUT", 4, 5, 201, "b")]
    assert is_linearizable([*history, Call("GET", 6, 7, 302, "b")])
    assert not is_linearizable([*history, Call("GET", 6, 7, 302, "a")])
    assert not is_linearizable([*history[:2], Call("GET", 3.5, 7, 302, "a")])
    assert not is_linearizable([*history[:1], Call("GET", 2, 3, 404)])
    late = [Call("GET", 6, 7, 302, "b"), Call("GET", 8, 9, 302, "a")]  # back in time
    assert not is_linearizable([Call("PUT", 0, 10, None, "b"), Call("PUT", 0, 1, 201, "a"), *late])


def test_the_checker_rejects_a_lost_write() -> None:
    put = Call("PUT", 0, 1, 201, "a")
    assert not is_linearizable([put, Call("PUT", 2, 3, 201, "b")])
    assert not is_linearizable([put, Call("DELETE", 2, 3, 404)])
    assert not is_linearizable([put, Call("PUT", 0, 1, 201, "b"), Call("GET", 2, 3, 302, "a")])
    assert not is_linearizable([Call("DELETE", 0, 1, 204)])
    assert not is_linearizable([Call("PUT", 0, 1, 403, "a")])
    replaced = [put, Call("REPLACE", 2, 3, 201, "b", "a"), Call("REPLACE", 2, 3, 201, "c", "a")]
    assert is_linearizable(replaced[:2]) and not is_linearizable(replaced)
    ended = Call("PUT", 0, 1, None, "b")  # if it happened at all, then before 1
    assert not is_linearizable([ended, Call("GET", 2, 3, 404), Call("GET", 4, 5, 302, "b")])


class Historian(threading.Thread):
    """A client that does what comes to its mind with a few keys, and writes down what it sees."""

    def __init__(self, server: Server, number: int, keys: list[str], deadline: float) -> None:
        super().__init__()
        self.server, self.number, self.keys, self.deadline = server, number, keys, deadline
        self.histories: dict[str, list[Call]] = {key: [] for key in keys}
        self.seen: dict[str, tuple[str, str]] = {}  # name and MD5 of the last value of a key
        self.wrong: list[Any] = []
        self.dice = random.Random()
        self.start()

    def run(self) -> None:
        for turn in itertools.count():
            if self.wrong or time.monotonic() > self.deadline:
                break
            try:
                self.step(self.dice.choice(self.keys), f"{self.number}-{turn}-")
            except Exception as error:
                self.wrong.append(error)

    def step(self, key: str, name: str) -> None:
        method = self.dice.choice(["PUT", "GET", "GET", "DELETE", "REPLACE"])
        value, fields, expected = None, {}, ""
        body = (name * self.dice.choice([1, 100, 20_000])).encode()
        if method in ("PUT", "REPLACE"):
            value = name
        if method == "REPLACE":
            expected, md5 = self.seen.get(key, ("", "")) if self.dice.random() < 0.7 else ("", "")
            fields = {"If_Match": f'"{md5}"' if md5 else "*"}
        start = time.monotonic()
        try:
            verb = "PUT" if value else method
            reply = self.server.call(verb, key, body if value else None, **fields)
            status, end = reply.status, time.monotonic()
        except ConnectionRefusedError:
            time.sleep(0.02)
            return  # not even sent
        except (OSError, http.client.HTTPException):
            # Only the end of its process breaks a connection, so if it happened, then before now.
            status, end = None, time.monotonic()
        if method == "GET" and status == 302:
            found = follow(reply, 2)
            if not found or found.status != 200:
                return  # one would ask again, which is another call
            value, body, end = name_in(found.body), found.body, time.monotonic()
        if status in (201, 302):
            self.seen[key] = value, hashlib.md5(body).hexdigest()
        known = {"PUT": (201, 403, None), "GET": (302, 404), "DELETE": (204, 404, None)}
        if status in (known | {"REPLACE": (201, 412, None)})[method]:
            self.histories[key].append(Call(method, start, end, status, value, expected))
        elif status not in (409, 503, None):  # which change nothing
            self.wrong.append((method, key, reply))


def test_histories_under_fire_are_linearizable(cluster: Make) -> None:
    flags = "-replicas", "2", "-voltimeout", "150ms"
    system = cluster(*flags, volumes=4, subvolumes=2)
    keys, dice, deadline = ["/a", "/b", "/c", "/d"], random.Random(), time.monotonic() + 12
    clients = [Historian(system.server, n, keys, deadline) for n in range(10)]

    def count() -> int:
        return sum(len(calls) for client in clients for calls in client.histories.values())

    ailing: list[Callable[[], None]] = []
    events = 0
    while any(client.is_alive() for client in clients):
        goal = count() + dice.randrange(20, 200)
        deadline_now = time.monotonic() + 0.7
        until(lambda g=goal, d=deadline_now: count() > g or time.monotonic() > d)
        if ailing:
            ailing.pop()()
        elif dice.random() < 0.4:
            restart(system)
        else:
            volume = dice.choice(system.volumes)
            ailing.append(ail(dice.choice(["dead", "frozen"]), volume, lambda *_: None))
        events += 1
    for cure in ailing:
        cure()
    for client in clients:
        client.join()
    assert [client.wrong for client in clients] == [[]] * len(clients)
    histories = {key: [it for c in clients for it in c.histories[key]] for key in keys}
    for key, history in histories.items():
        start = time.monotonic()
        history.append(Call("GET", start, math.inf, 302, value_now(system.server, key)))
        assert is_linearizable(history), (key, sorted(history, key=lambda it: it.start))
        assert {201, 204, 302, 403, 404, 412} <= {it.status for it in history}
    assert None in {it.status for history in histories.values() for it in history}
    assert events >= 5
    until(system.is_clean, 60)


def value_now(server: Server, key: str) -> str | None:
    """What a key is in the end."""
    found = read(server, key)
    return None if found is None else name_in(found)


def name_in(body: bytes) -> str:
    """The name that a value repeats; of a mixture, or of a part, the whole."""
    name = b"-".join(body.split(b"-")[:2]) + b"-"
    times, rest = divmod(len(body), len(name))
    whole = times in (1, 100, 20_000) and not rest and body == name * times
    return (name if whole else body).decode()


# --- writes that step aside -----------------------------------------------------------------------


def put(server: Server, path: str, value: bytes, chunked: bool = False) -> int:
    """PUT a value, with its length or in chunks; the status."""
    return server.call("PUT", path, iter([value]) if chunked else value).status


def puts(server: Server, values: dict[str, tuple[bytes, bool]]) -> list[int]:
    """PUT several (value, chunked) at a time; their statuses."""
    with ThreadPoolExecutor(len(values)) as pool:
        return list(pool.map(lambda path: put(server, path, *values[path]), values))


def paths_at(system: Cluster, location: str, prefix: str) -> Iterator[str]:
    """Paths without end that have a location among their ideal ones."""
    paths = (f"{prefix}{number}" for number in itertools.count())
    return (path for path in paths if location in ideal(system, path))


def balance(system: Cluster, path: str) -> str:
    """Whether a key is balanced, in the server's words."""
    reply = system.server.call("GET", path)
    assert reply.status == 302, reply
    assert reply.fields["key-volumes"].split(",") == list(copies(system, path))
    return reply.fields["key-balance"]


def arrived(system: Cluster, location: str) -> bool:
    """Whether a part of an upload is on a drive."""
    with contextlib.suppress(FileNotFoundError):  # it may just come to its end
        files = (drive_at(system, location) / ".tmp").rglob("*")
        return any(file.is_file() and file.stat().st_size for file in files)
    return False


def interrupted(value: bytes, work: Callable[[], Any]) -> Iterator[bytes]:
    """The pieces of a value, and in their midst something happens."""
    yield value[: len(value) // 2]
    work()
    yield value[len(value) // 2 :]


def put_interrupted(
    system: Cluster, path: str, value: bytes, work: Callable[[], Any], chunked: bool = False
) -> int:
    """PUT a value, and do something when half of it is on the first drive; the status."""

    def half() -> None:
        until(lambda: arrived(system, ideal(system, path)[0]))
        work()

    length = {} if chunked else {"Content_Length": str(len(value))}
    return system.server.call("PUT", path, interrupted(value, half), **length).status


def fill(folder: Path) -> Path:
    """The file that takes all that is left of a small drive."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@contextlib.contextmanager
def ill(
    ailment: str, volume: Volume, drive: str, mounts: Callable[..., None]
) -> Iterator[Callable[[], Any]]:
    """A volume, or only one drive of it, that fails its writers; the value is what cures it."""
    if ailment == "full":
        volume.kill()
        mounts(volume.folder / drive, "-t", "tmpfs", "-o", "size=1m", "none")
        volume.start()
        yield fill(volume.folder / drive / ".tmp").unlink
    elif ailment == "unwritable":
        with foreign_folder() as folder:  # where nginx does not work as root
            volume.kill()
            volume.folder = folder
            volume.start()
            (folder / drive).chmod(0o555)
            yield lambda: (folder / drive).chmod(0o755)
            volume.kill()
    else:
        yield ail(ailment, volume, mounts)


AILMENTS = ["dead", "frozen", "full", pytest.param("unwritable", marks=needs_root)]


@pytest.mark.parametrize("ailment", AILMENTS)
def test_puts_step_aside_from_what_cannot_be_written_and_use_it_again_when_it_can(
    cluster: Make, mounts: Callable, ailment: str
) -> None:
    system = cluster(volumes=4, subvolumes=2)
    server, volume = system.server, system.volumes[0]
    bad, sibling = f"{volume.name}/sv00", f"{volume.name}/sv01"
    paths, of_sibling = paths_at(system, bad, "/k"), paths_at(system, sibling, "/s")
    with ill(ailment, volume, "sv00", mounts) as cure:
        if ailment in ("full", "unwritable"):  # it was started anew
            system.sees(volume)
        sizes = [(1000, False), (3 * MB, False), (1000, True), (2 * MB, True)]
        values = {next(paths): (blob(str(size), size[0]), size[1]) for size in sizes}
        assert puts(server, values) == [201] * len(values)  # all of them meet it
        for path, (value, _) in values.items():
            assert volume.name not in assert_copies(system, path, value)
            assert balance(system, path) == "unbalanced"
            assert read(server, path) == value
        began = time.monotonic()
        for path in itertools.islice(paths, 10):
            assert put(server, path, b"now it is known") == 201
            assert volume.name not in assert_copies(system, path, b"now it is known")
        assert time.monotonic() - began < 3, "a stall is ten times -voltimeout"
        path = next(of_sibling)
        assert put(server, path, b"sibling") == 201
        there = volume.name in assert_copies(system, path, b"sibling")
        assert there == (ailment in ("full", "unwritable")), "one drive is not its volume"
        cure()

        def is_used_again() -> bool:
            path = next(paths)
            assert put(server, path, b"again") == 201
            assert_copies(system, path, b"again")
            return balance(system, path) == "balanced"

        until(is_used_again, 40)
        until(system.is_clean, 40)


@pytest.mark.parametrize(
    ("ailment", "size", "chunked"),
    [("dead", 8, False), ("dead", 2, True), ("frozen", 24, True), ("frozen", 2, False)],
)
def test_a_volume_that_fails_in_mid_upload_is_replaced(
    cluster: Make, mounts: Callable, ailment: str, size: int, chunked: bool
) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4)
    bad, *others = ideal(system, "/big")
    value, cures = blob("big", size * MB), []

    def fall_ill() -> None:
        cures.append(ail(ailment, volume_at(system, bad), mounts))

    assert put_interrupted(system, "/big", value, fall_ill, chunked) == 201
    found = assert_copies(system, "/big", value)
    assert {location.partition("/")[0] for location in others} < set(found)
    assert balance(system, "/big") == "unbalanced"
    assert read(system.server, "/big") == value
    assert bad in {r.location for r in system.garbage()[b"/big"]}
    cures[0]()
    until(system.is_clean, 40)
    assert_copies(system, "/big", value)


class Puppet(threading.Thread):
    """A volume of one drive, or more, that does as it is told.

    It keeps nothing. `says` makes of method and path an answer, or None for silence until the
    connection ends; an empty one, and one that has "Connection: close" in it, is the last. What
    was asked is in `heard`, (number of the connection, method, path).
    """

    def __init__(self, says: Callable[[str, str], bytes | None], drives: str = ".") -> None:
        super().__init__(daemon=True)
        self.says, self.drives = says, drives
        self.heard: list[tuple[int, str, str]] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.id = hashlib.md5(self.name.encode()).hexdigest()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count():
                wire, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(wire, number), daemon=True).start()

    def serve(self, wire: socket.socket, number: int) -> None:
        with wire, wire.makefile("rb") as file, contextlib.suppress(OSError, ValueError):
            while line := file.readline():
                method, path, _ = line.decode().split()
                fields = [field.lower() for field in iter(file.readline, b"\r\n") if field]
                self.heard.append((number, method, path))
                answer = self.drives_there() if path == "/.drives" else self.says(method, path)
                if answer is None:
                    file.read()
                    return
                if any(field.startswith(b"transfer-encoding") for field in fields):
                    while size := int(file.readline(), 16):
                        file.read(size + 2)
                    file.readline()
                for field in fields:
                    if field.startswith(b"content-length"):
                        file.read(int(field.split(b":")[1]))
                wire.sendall(answer)
                if not answer or b"\r\nConnection: close\r\n" in answer:
                    return

    def drives_there(self) -> bytes:
        return answer_of(200, body=f"{self.id} {self.drives}\n".encode())

    def asked(self, method: str) -> list[tuple[int, str]]:
        """Connection and path of all requests with this method."""
        return [(number, path) for number, verb, path in self.heard if verb == method]

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake accept()
        self.listener.close()


def answer_of(status: int, fields: bytes = b"", body: bytes = b"") -> bytes:
    """An answer as a volume gives it; `fields` are lines that end in CR LF."""
    length = b"" if status == 204 else b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 %d X\r\n" % status + length + fields + b"\r\n" + body


CREATED = answer_of(201, b"Location: http://x/k\r\n")


@pytest.fixture
def puppets(tmp_path: Path) -> Iterator[Callable[..., tuple[Server, list[Puppet]]]]:
    """A server of volumes that are puppets: puppets(says, says, flags=(), drives=".")."""
    made: list[Puppet] = []
    servers: list[Server] = []

    def make(*plays: Callable, flags: tuple = (), drives: str = ".") -> tuple:
        made.extend(Puppet(says, drives) for says in plays)
        names = ",".join(puppet.name for puppet in made)
        count = "1" if drives == "." else str(len(drives.split()))
        settled = ("-volumes", names, "-subvolumes", count, "-replicas", f"{len(made)}")
        flags = (*settled, *Cluster.FLAGS, *flags)
        servers.append(Server(tmp_path / "index", *free_ports(1), *flags))
        return servers[-1], made

    yield make
    for server in servers:
        if server.running():
            server.kill()
    for puppet in made:
        puppet.close()


def test_a_drive_that_hangs_is_left_alone_and_does_not_take_its_volume_down(
    puppets: Callable,
) -> None:
    def hang(method: str, path: str) -> bytes | None:
        if method == "PUT" and path.startswith("/sv00/"):
            return None
        return CREATED if method == "PUT" else answer_of(204)

    drives = "sv00 sv01"
    server, (puppet,) = puppets(hang, drives=drives, flags=("-voltimeout", "200ms"))

    def paths(drive: str) -> Iterator[str]:
        names = (f"/{drive}-{number}" for number in itertools.count())
        return (
            n for n in names if mkv.key2volume(n.encode(), [puppet.name], 1, 2)[0][-4:] == drive
        )

    hung, good = paths("sv00"), paths("sv01")
    assert server.put(next(hung), b"value") == 503  # after ten times -voltimeout
    refuses = f'mkv_location_refuses_writes{{location="{puppet.name}/sv00"}}'
    assert server.metric(refuses) == 1
    asked = len(puppet.asked("PUT"))
    began = time.monotonic()
    assert [server.put(next(hung), b"value") for _ in range(5)] == [503] * 5
    assert time.monotonic() - began < 1 and len(puppet.asked("PUT")) == asked
    for _ in range(20):
        assert server.put(next(good), b"value") == 201
        assert server.metric(f'mkv_volume_up{{volume="{puppet.name}"}}') == 1
    until(lambda: server.put(next(hung), b"value") == 503 and len(puppet.asked("PUT")) > asked + 20)


@pytest.mark.parametrize(
    "fields",
    [
        b"Location: http://x/k\r\n",
        b"Content-Location: /k\r\nConnection: close\r\n",
        b"Location: http://x/k\r\nConnection: close\r\n",
    ],
)
def test_a_volume_may_say_that_it_closes_beside_any_location(
    puppets: Callable, fields: bytes
) -> None:
    server, (puppet,) = puppets(lambda *_: answer_of(201, fields))
    assert [server.put(f"/k{number}", b"value") for number in range(10)] == [201] * 10
    connections = {number for number, _ in puppet.asked("PUT")}
    assert len(connections) == (10 if b"Connection" in fields else 1)


@pytest.mark.parametrize("closes", [False, True])
def test_what_a_volume_says_unasked_is_no_answer_to_what_is_asked_next(
    puppets: Callable, closes: bool
) -> None:
    more = answer_of(408, b"Connection: close\r\n" * closes)
    server, (puppet,) = puppets(lambda *_: CREATED + more)
    assert [server.put(f"/k{number}", b"value") for number in range(10)] == [201] * 10
    assert len({number for number, _ in puppet.asked("PUT")}) == 10


def test_a_value_is_sent_once_to_a_volume_that_cuts_the_connection(puppets: Callable) -> None:
    server, (puppet,) = puppets(lambda *_: b"")  # closes without a word
    assert server.put("/k", b"value") == 503
    assert len(puppet.asked("PUT")) == 1


@pytest.mark.parametrize("ailments", [("dead", "dead"), ("dead", "frozen")])
def test_a_put_that_finds_too_few_volumes_is_503_and_leaves_nothing(
    cluster: Make, mounts: Callable, ailments: tuple[str, str]
) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4)
    server = system.server
    values = {"/small": (b"small", False), "/large": (bytes(2 * MB), False)}
    values |= {"/chunked": (bytes(100_000), True)}
    assert puts(server, {"/warm": (b"warm", False)}) == [201]
    cures = [ail(each, system.volumes[n], mounts) for n, each in enumerate(ailments)]
    for _ in range(2):  # never 409: the key is free
        assert puts(server, values) == [503] * len(values)
    assert server.call("PUT", "/small", b"why").body.strip()
    assert all(server.call("GET", path).status == 404 for path in values)
    for cure in cures:
        cure()
    until(system.is_clean, 40)
    for path, (value, _) in values.items():
        until(lambda path=path, value=value: put(server, path, value) == 201, 40)
        assert_copies(system, path, value)
    until(system.is_clean, 40)


def test_when_two_of_four_volumes_die_in_mid_upload_nothing_is_left(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4)
    bad = [volume_at(system, location) for location in ideal(system, "/big")[:2]]
    value = blob("big", 8 * MB)
    assert put_interrupted(system, "/big", value, lambda: [v.kill() for v in bad]) == 503
    assert system.server.call("GET", "/big").status == 404
    until(lambda: not any(v.files() for v in system.volumes if v not in bad))
    for volume in bad:
        volume.start()
    until(system.is_clean, 40)
    assert not system.files()
    until(lambda: put(system.server, "/big", value) == 201, 40)
    assert_copies(system, "/big", value)


def read_slowly(volume: Volume) -> None:
    """Let nginx send 1 MB at once, and then 1 MB a second."""
    config = volume.folder / ".nginx/nginx.conf"
    config.write_text(config.read_text().replace("sendfile on;", "sendfile on; limit_rate 1m;"))
    old = set(until(volume.workers))
    os.kill(volume.process.pid, signal.SIGHUP)
    until(lambda: (workers := set(volume.workers())) and not workers & old)


def copying(cluster: Make, value: bytes, volumes: int) -> tuple[Cluster, str, Any]:
    """A cluster where the last copy of /big is being made, slowly; where, and the PUT's status."""
    system = cluster("-voltimeout", "200ms", volumes=volumes)
    for volume in system.volumes:
        read_slowly(volume)
    bad, *_, stand_in = ideal(system, "/big", 4)
    pool, kill = ThreadPoolExecutor(1), volume_at(system, bad).kill
    status = pool.submit(put_interrupted, system, "/big", value, kill)
    pool.shutdown(wait=False)
    until(lambda: arrived(system, stand_in) or status.done())
    assert not status.done(), "a copy takes seconds"
    return system, stand_in, status


def assert_true(system: Cluster, status: int, value: bytes) -> None:
    """That a PUT of /big has told the truth, and that nothing but what it told stays."""
    assert status in (201, 503)
    for volume in system.volumes:
        volume.thaw()
        if volume.process.poll() is not None:
            volume.start()
    if status == 201:
        assert_copies(system, "/big", value)
        assert read(system.server, "/big") == value
    else:
        assert read(system.server, "/big") is None
    until(system.is_clean, 40)
    if status == 503:
        assert not system.files()
        until(lambda: put(system.server, "/big", b"anew") == 201, 40)
        assert_copies(system, "/big", b"anew")


@pytest.mark.parametrize(("volumes", "expected"), [(4, 503), (5, 201)])
def test_a_stand_in_that_dies_while_it_is_made_is_replaced_if_there_is_another_volume(
    cluster: Make, volumes: int, expected: int
) -> None:
    value = blob("big", 3 * MB)
    system, stand_in, status = copying(cluster, value, volumes)
    volume_at(system, stand_in).kill()
    assert status.result() == expected
    assert_true(system, expected, value)


@pytest.mark.parametrize(("count", "ailment"), [(1, "dead"), (2, "dead"), (1, "frozen")])
def test_when_the_sources_of_a_stand_in_fail_while_it_is_made_the_answer_is_true(
    cluster: Make, mounts: Callable, count: int, ailment: str
) -> None:
    value = blob("big", 3 * MB)
    system, _, status = copying(cluster, value, 4)
    for location in ideal(system, "/big")[1 : 1 + count]:
        ail(ailment, volume_at(system, location), mounts)
    assert status.result() in ((201, 503) if count == 1 else (503,))
    assert_true(system, status.result(), value)


def test_a_server_killed_while_it_makes_a_stand_in_leaves_the_key_free_and_nothing_else(
    cluster: Make,
) -> None:
    system, _, status = copying(cluster, blob("big", 3 * MB), 4)
    assert system.open_intents() == 1
    restart(system)
    assert status.exception(), "the server was killed before it answered"
    assert put(system.server, "/big", b"anew") == 201
    assert_copies(system, "/big", b"anew")
    volume_at(system, ideal(system, "/big")[0]).start()
    until(system.is_clean, 40)
    assert_copies(system, "/big", b"anew")
    assert len(system.files()) == 3


@pytest.mark.parametrize("size", [1000, MB])
def test_a_stand_in_that_was_frozen_and_strikes_late_is_swept(cluster: Make, size: int) -> None:
    system = cluster("-grace", "1m", "-voltimeout", "200ms", volumes=5, subvolumes=1)
    server, value = system.server, blob("late", size)
    bad, *_, second, third = (volume_at(system, place) for place in ideal(system, "/k", 5))

    def fail() -> None:
        bad.kill()
        second.freeze()

    length = {"Content_Length": str(size)}
    pieces = interrupted(value, fail)
    assert server.call("PUT", "/k", pieces, **length).status == 201
    assert third.name in assert_copies(system, "/k", value)
    assert second.name in {r.location for r in system.garbage()[b"/k"]}
    server.process.send_signal(signal.SIGSTOP)  # or the file may be swept before it is seen
    try:
        second.thaw()
        until(second.files)
    finally:
        server.process.send_signal(signal.SIGCONT)
    bad.start()
    assert_copies(system, "/k", value)
    replace(system, "-grace", "100ms")  # the sweeper waits no longer
    until(system.is_clean, 40)
    assert_copies(system, "/k", value)
    assert not second.files()


@pytest.mark.parametrize("ailment", ["dead", "frozen", "away"])
def test_a_key_deleted_while_a_volume_was_down_and_written_anew_keeps_the_new_value(
    cluster: Make, mounts: Callable, ailment: str
) -> None:
    system = cluster("-voltimeout", "200ms", volumes=4, subvolumes=1)
    server, bad = system.server, volume_at(system, ideal(system, "/k")[0])
    assert put(server, "/k", b"old") == 201
    (old,) = bad.files()
    cure = ail(ailment, bad, mounts)
    assert server.call("DELETE", "/k").status == 204
    assert server.call("GET", "/k").status == 404
    assert put(server, "/k", b"new") == 201
    assert bad.name not in assert_copies(system, "/k", b"new")
    cure()
    until(system.is_clean, 40)
    assert old not in bad.files()
    assert [server.get("/k") for _ in range(20)] == [b"new"] * 20
    assert_copies(system, "/k", b"new")


class Writer(threading.Thread):
    """A client of whose calls none may fail, on keys that are its own."""

    SIZES = ((1000, False), (100_000, False), (200_000, True))

    def __init__(self, server: Server, number: int) -> None:
        super().__init__()
        self.server, self.number, self.enough = server, number, threading.Event()
        self.rounds = 0
        self.wrong: list[Any] = []
        self.start()

    def run(self) -> None:
        try:
            while not self.enough.is_set() and not self.wrong:
                self.round(f"/writer{self.number}/{self.rounds % 4}")
                self.rounds += 1
        except Exception as error:
            self.wrong.append(error)

    def round(self, path: str) -> None:
        size, chunked = self.SIZES[self.rounds % 3]
        value, pieces = blob(f"{path} {self.rounds}", size), None
        for method, expected in (("PUT", 201), ("READ", value), ("DELETE", 204), ("READ", None)):
            if method == "READ":
                found = read(self.server, path)
            else:
                pieces = iter([value]) if chunked else value
                reply = self.server.call(method, path, pieces if method == "PUT" else None)
                found = reply.status
            if found != expected:
                what = reply if method != "READ" else found and found[:50]
                self.wrong.append((method, path, what))
                return


@contextlib.contextmanager
def running(clients: list[Any]) -> Iterator[Callable[[int], None]]:
    """Threads that count their rounds, for a block; the value waits until each has some more."""

    def more(count: int) -> None:
        goals = {client: client.rounds + count for client in clients}
        until(lambda: all(c.wrong or c.rounds >= goals[c] for c in clients), 60)

    try:
        yield more
    finally:
        for client in clients:
            client.enough.set()
        for client in clients:
            client.join()
    assert [client.wrong for client in clients] == [[]] * len(clients)


def test_under_load_no_call_fails_when_a_volume_of_four_dies_and_returns(cluster: Make) -> None:
    system = cluster("-voltimeout", "500ms", volumes=4, subvolumes=2)
    server = system.server
    with running([Writer(server, number) for number in range(6)]) as more:
        more(2)
        for volume in system.volumes[:3]:
            volume.kill()
            until(lambda: server.metric("mkv_volumes_up") == 3)
            more(2)
            volume.start()
            until(lambda: server.metric("mkv_volumes_up") == 4)
            more(1)
    until(system.is_clean, 40)
    assert not system.files()


# --- from one server to the next ------------------------------------------------------------------


class Handed(threading.Thread):
    """A client that writes and reads on, whatever happens to the servers; counts what it sees."""

    def __init__(self, port: int, number: int, fresh: bool) -> None:
        super().__init__()
        self.port, self.number, self.fresh = port, number, fresh
        self.client, self.enough = Client(port), threading.Event()
        self.rounds = self.failed = 0
        self.wrong: list[Any] = []
        self.start()

    def call(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """A kept connection may end while it is idle: then once more, on a fresh one."""
        if self.fresh:
            self.client.wire.close()
        kept = self.client.wire.sock is not None
        try:
            return self.client.call(method, path, body)
        except OSError:
            self.failed += not kept
            return self.client.call(method, path, body)

    def run(self) -> None:
        try:
            while not self.enough.is_set() and not self.wrong:
                self.round(f"/hand{self.number}/{self.rounds}")
                self.rounds += 1
        except Exception as error:
            self.wrong.append(error)

    def round(self, path: str) -> None:
        value = blob(path, 100_000 if self.rounds % 4 == 0 else 1000)
        expected = [("PUT", value, 201), ("GET", None, 302), ("DELETE", None, 204)]
        for method, body, status in [*expected, ("GET", None, 404)]:
            reply = self.call(method, path, body)
            if reply.status != status:
                self.wrong.append((method, path, reply))
                return
            if status == 302 and getattr(follow(reply), "body", b"") != value:
                self.wrong.append((method, path, "another value"))


@contextlib.contextmanager
def inherited(system: Cluster) -> Iterator[socket.socket]:
    """A listening socket that outlives servers; the one that the cluster started has ended."""
    assert system.server.stop() == 0
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        yield listener


def test_a_socket_that_outlives_its_servers_refuses_nobody(cluster: Make) -> None:
    system, slow = cluster(), ("-voltimeout", "2s")
    with inherited(system) as listener:
        port = listener.getsockname()[1]
        first = system.start(port, *slow, listener=listener)
        assert first.put("/k", b"value") == 201
        value = blob("in hand", 4 * MB)
        in_hand = Upload(port, "/in-hand", len(value))
        in_hand.send(value[:MB])
        until(lambda: first.metric("mkv_intents_open") >= 1)
        clients = [Handed(port, number, fresh=number % 2 == 0) for number in range(6)]
        with running(clients) as more:
            more(5)
            grow(system, 1)
            first.process.send_signal(signal.SIGTERM)
            in_hand.send(value[MB:])
            assert in_hand.answer() == 201
            assert first.process.wait(15) == 0
            second = system.start(port, *slow, listener=listener)  # with one volume more
            more(5)
            assert second.stop() == 0
            third = system.server = system.start(port, *slow, listener=listener)
            more(5)
        assert sum(client.failed for client in clients) == 0
        assert third.get("/in-hand") == value and third.get("/k") == b"value"
        new = system.volumes[3].name
        path = next(p for p in map("/new{}".format, range(99)) if new in str(ideal(system, p)))
        assert third.put(path, b"value") == 201
        assert new in assert_copies(system, path, b"value")
        until(system.is_clean, 40)
        third.kill()


def test_who_connects_while_no_server_runs_is_served_by_the_next(cluster: Make) -> None:
    system = cluster()
    with inherited(system) as listener:
        port = listener.getsockname()[1]
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(call, port, "PUT", f"/k{n}", b"value") for n in range(20)]
            server = system.start(port, listener=listener)
            assert {each.result().status for each in waiting} == {201}
        assert set(listed(server, "/?list")[0]) == {f"/k{number}" for number in range(20)}
        server.kill()
        waiting = Upload(port, "/late", 5)
        waiting.send(b"value")
        server.start()
        assert waiting.answer() == 201
        server.kill()


def test_a_socket_that_is_for_another_process_is_not_taken(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.stop() == 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        script = f'export LISTEN_PID=1 LISTEN_FDS=1; exec "$@" 3<&{fd}'
        with server.log.open("ab") as log:
            command = ["bash", "-c", script, "bash", *server.command()]
            server.process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[fd])
        until(server.alive)  # on -port
        assert server.put("/k", b"value") == 201


# --- intents --------------------------------------------------------------------------------------


def broken_off(system: Cluster, count: int = 5) -> list[str]:
    """Uploads of which each volume has a part, and kill -9 of the server in their midst."""
    paths = [f"/broken%20off%0A{number}" for number in range(count)]
    uploads = [Upload(system.server.port, path, 4 * MB) for path in paths]
    for upload in uploads:
        upload.send(bytes(2 * MB))
    until(lambda: system.open_intents() == count)
    until(lambda: all(arrived(system, place) for place in ideal(system, "/broken off\n0")))
    system.server.kill()
    return paths


def intents_of(system: Cluster) -> Path:
    """The file of intents beside the index."""
    return system.folder / "index" / "intents"


def test_after_kill_9_in_mid_upload_the_key_is_free_and_the_files_go(cluster: Make) -> None:
    system = cluster("-grace", "1h")
    paths = broken_off(system)
    system.server.start()
    assert [system.server.put(path, b"new") for path in paths] == [201] * len(paths)
    replace(system, "-grace", "100ms")
    until(system.is_clean)
    assert len(system.files()) == 3 * len(paths)
    assert [system.server.get(path) for path in paths] == [b"new"] * len(paths)


def test_a_write_that_was_on_two_of_three_volumes_at_kill_9_goes_from_both(cluster: Make) -> None:
    system = cluster("-voltimeout", "5s")
    volume = system.volumes[0]
    volume.freeze()
    thread = in_background(lambda: system.server.put("/k", b"value"))
    until(lambda: len(system.files()) == 2)
    system.server.kill()
    volume.thaw()
    thread.join()
    system.server.start()
    assert system.server.get("/k") is None
    until(lambda: system.is_clean() and not system.files())


def test_a_value_whose_intent_was_left_open_is_not_lost(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    replica = system.records()[b"/k"].replicas[0]
    locations = ",".join(r.location for r in system.records()[b"/k"].replicas)
    system.server.kill()
    with intents_of(system).open("a") as file:  # as if it had been killed before it struck it out
        file.write(f"+ {mkv.key2path(b'/k', replica.write_id)} {locations}\n")
    system.server.start()
    until(system.is_clean)
    assert_copies(system, "/k", b"value")


def test_intents_in_a_copy_of_an_index_are_of_another_life(cluster: Make) -> None:
    system = cluster("-grace", "1h")
    server = system.server
    broken_off(system)
    copy = shutil.copytree(system.folder / "index", system.folder / "copy")
    system.server = system.start(*free_ports(1), "-grace", "1h", db=copy)
    assert "intents" in server.log.read_text()
    assert not system.garbage() and not system.open_intents()
    assert system.server.put("/k", b"value") == 201


NO_INTENTS = {
    "a word": "nonsense\n",
    "no locations": "+ nonsense\n",
    "no path of a key": "+ /aa/bb/x y\n",
    "too many words": "+ /aa/bb/x y z\n",
    "no path": "-\n",
    "zeros": "\0" * 99,
}


@pytest.mark.parametrize("name", NO_INTENTS)
def test_lines_that_are_no_intents_are_reported_and_passed_over(cluster: Make, name: str) -> None:
    system = cluster()
    paths = broken_off(system)
    before = system.server.log.read_text()
    with intents_of(system).open("a") as file:
        file.write(NO_INTENTS[name])
    system.server.start()
    assert "intents" in system.server.log.read_text()[len(before) :]
    assert [system.server.put(path, b"new") for path in paths] == [201] * len(paths)
    until(system.is_clean)


def test_a_last_line_that_was_cut_short_does_no_harm(cluster: Make) -> None:
    system = cluster()
    paths = broken_off(system)
    with intents_of(system).open("r+") as file:
        file.truncate(intents_of(system).stat().st_size - 7)
    system.server.start()
    assert [system.server.put(path, b"new") for path in paths] == [201] * len(paths)
    restart(system)  # what was added after it can be read
    assert system.server.put("/last", b"new") == 201
    until(system.is_clean)


def test_the_file_of_intents_does_not_grow_for_ever_and_keeps_the_open_ones(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    server = system.server
    upload = Upload(server.port, "/open", 4 * MB)
    upload.send(bytes(MB))
    until(lambda: system.open_intents() == 1)

    def write(number: int) -> int:
        path = f"/{number}".ljust(500, "x")
        return server.put(path, b"value") + server.call("DELETE", path).status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(write, range(3000))) == {201 + 204}
    assert intents_of(system).stat().st_size < 1.2 * MB
    restart(system)
    assert server.put("/open", b"new") == 201
    until(system.is_clean)
    assert len(system.files()) == 1


def test_a_put_whose_intent_cannot_be_written_is_503_and_nothing_is_sent(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    server, key = system.server, "/k".ljust(500, "x")
    assert server.put("/kept", b"value") == 201
    shell("prlimit", f"--pid={server.process.pid}", "--fsize=400000")
    for _ in range(2000):
        if (status := server.put(key, b"value")) != 201:
            break
        assert server.call("DELETE", key).status == 204
    assert status == 503
    assert server.get("/kept") == b"value" and server.call("GET", key).status == 404
    until(lambda: len(system.files()) == 1)
    assert intents_of(system).read_bytes().endswith(b"\n")
    restart(system)
    assert server.put(key, b"value") == 201
    until(system.is_clean)


# --- replacing a value ----------------------------------------------------------------------------


def tag(value: bytes) -> str:
    """A value as If-Match names it."""
    return f'"{hashlib.md5(value).hexdigest()}"'


MATCHES = {
    "any": "*",
    "its MD5": tag(b"old"),
    "one of two": f"{tag(b'other')}, {tag(b'old')}",
}


@pytest.mark.parametrize("name", MATCHES)
def test_if_match_replaces_a_live_value(cluster: Make, name: str) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"old") == 201
    assert server.call("PUT", "/k", b"the new one", If_Match=MATCHES[name]).status == 201
    assert_copies(system, "/k", b"the new one")
    assert server.get("/k") == b"the new one"
    found = server.call("GET", "/k").fields["content-md5"]
    assert found == hashlib.md5(b"the new one").hexdigest()
    until(system.is_clean)
    assert len(system.files()) == 3


WRONG_MATCHES = {  # whether the key exists, the field
    "another MD5": {"If_Match": tag(b"other")},
    "no tag": {"If_Match": tag(b"old").strip('"')},
    "a weak tag": {"If_Match": "W/" + tag(b"old")},
    "nothing": {"If_Match": ""},
    "only if it is free": {"If_None_Match": "*"},
    "only if it is another": {"If_None_Match": tag(b"other")},
    "both": {"If_Match": "*", "If_None_Match": "*"},
    "a date": {"If_Unmodified_Since": "Fri, 01 Jan 2100 00:00:00 GMT"},
    "another date": {"If_Modified_Since": "Sat, 01 Jan 2000 00:00:00 GMT"},
}


@pytest.mark.parametrize("name", WRONG_MATCHES)
def test_a_condition_that_does_not_hold_or_is_none_of_ours_is_412(
    system: Cluster, name: str
) -> None:
    server, path = system.server, f"/412/{name.replace(' ', '')}"
    assert server.put(path, b"old") == 201
    before = system.files()
    assert server.call("PUT", path, b"new", **WRONG_MATCHES[name]).status == 412
    assert server.get(path) == b"old" and system.files() == before
    if name != "only if it is free":
        assert server.call("PUT", path + "/free", b"new", **WRONG_MATCHES[name]).status == 412
        assert server.get(path + "/free") is None


@pytest.mark.parametrize("match", ["*", tag(b"old")])
def test_if_match_of_a_key_that_is_missing_or_unlinked_is_412(system: Cluster, match: str) -> None:
    server, path = system.server, f"/gone{match[:3]}".replace('"', "")
    assert server.call("PUT", path, b"new", If_Match=match).status == 412
    assert server.put(path, b"old") == 201
    assert server.call("UNLINK", path).status == 204
    assert server.call("PUT", path, b"new", If_Match=match).status == 412
    assert server.get(path) is None and path in listed(server, "/?unlinked")[0]
    assert server.put(path, b"again") == 201


def test_if_none_match_any_is_201_on_a_free_key_and_412_on_another(system: Cluster) -> None:
    server = system.server
    assert server.call("PUT", "/if-none-match", b"old", If_None_Match="*").status == 201
    assert server.call("PUT", "/if-none-match", b"new", If_None_Match="*").status == 412
    assert server.get("/if-none-match") == b"old"
    assert server.call("UNLINK", "/if-none-match").status == 204
    assert server.call("PUT", "/if-none-match", b"new", If_None_Match="*").status == 201
    assert server.get("/if-none-match") == b"new"


@pytest.mark.parametrize("method", ["DELETE", "UNLINK"])
@pytest.mark.parametrize("field", ["If_Match", "If_None_Match", "If_Unmodified_Since"])
def test_a_condition_on_delete_or_unlink_is_412(system: Cluster, method: str, field: str) -> None:
    path = f"/{method}/{field}"
    assert system.server.put(path, b"value") == 201
    assert system.server.call(method, path, **{field: "*"}).status == 412
    assert system.server.get(path) == b"value"


def test_a_part_of_a_value_is_400_and_not_taken_for_the_whole(system: Cluster) -> None:
    server = system.server
    assert server.call("PUT", "/part", b"value", Content_Range="bytes 0-4/10").status == 400
    assert server.get("/part") is None


def test_an_encoded_value_is_refused_and_not_taken_for_what_it_encodes(system: Cluster) -> None:
    reply = system.server.call("PUT", "/encoded", b"value", Content_Encoding="gzip")
    assert reply.status in (400, 415)  # no GET would say that it is encoded
    assert system.server.get("/encoded") is None


def forget_md5s(system: Cluster) -> None:
    """Take the MD5s out of all records, as after a rebuild."""
    assert system.server.stop() == 0
    with (
        lmdb.open(str(system.folder / "index"), max_dbs=8, map_size=1 << 40) as env,
        env.begin(env.open_db(b"keys"), write=True) as txn,
    ):
        for key, text in list(txn.cursor()):
            txn.put(key, mkv.parse_record(text)._replace(hash="").text())
    system.server.start()


def test_an_md5_that_is_not_known_matches_nothing(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"old") == 201
    forget_md5s(system)
    assert "content-md5" not in server.call("GET", "/k").fields
    assert server.call("PUT", "/k", b"new", If_Match=tag(b"old")).status == 412
    assert server.call("PUT", "/k", b"new", If_Match="*").status == 201
    assert server.get("/k") == b"new"


@pytest.mark.parametrize("match", ["*", tag(b"old")])
def test_with_protect_nothing_is_replaced(cluster: Make, match: str) -> None:
    server = cluster("-protect").server
    assert server.put("/k", b"old") == 201
    assert server.call("PUT", "/k", b"new", If_Match=match).status == 403
    assert server.get("/k") == b"old"


def test_of_many_replaces_of_one_version_exactly_one_wins(cluster: Make) -> None:
    system = cluster()
    server, value = system.server, b"0"
    assert server.put("/k", value) == 201
    with ThreadPoolExecutor(8) as pool:
        for turn in range(1, 20):
            old, news = tag(value), [f"{turn} {n}".encode() * 999 for n in range(8)]
            asked = [pool.submit(server.call, "PUT", "/k", new, If_Match=old) for new in news]
            found = [each.result().status for each in asked]
            assert found.count(201) == 1 and set(found) <= {201, 409, 412}, found
            value = news[found.index(201)]
            assert server.get("/k") == value
    until(system.is_clean)


@pytest.mark.parametrize("verb", ["DELETE", "UNLINK"])
def test_a_replace_is_judged_when_it_is_done_and_not_when_it_began(
    cluster: Make, verb: str
) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"old") == 201
    upload = Upload(server.port, "/k", 4, "If-Match: *\r\n")
    upload.send(b"ne")
    until(lambda: system.open_intents() == 1)
    assert server.call(verb, "/k").status == 204
    upload.send(b"w!")
    assert upload.answer() == 412
    assert server.get("/k") is None
    until(system.is_clean)
    assert len(system.files()) == (3 if verb == "UNLINK" else 0)


def test_who_was_sent_to_the_old_value_reads_it_whole_for_grace(cluster: Make) -> None:
    system = cluster("-grace", "3s")
    server = system.server
    assert server.put("/k", b"old") == 201
    sent = server.call("GET", "/k")
    assert server.call("PUT", "/k", b"new", If_Match="*").status == 201
    assert follow(sent).body == b"old"
    assert server.get("/k") == b"new"
    until(lambda: follow(sent).status == 404)
    until(system.is_clean)


def test_a_failed_replace_leaves_the_old_value(cluster: Make) -> None:
    system = cluster()
    server = system.server
    assert server.put("/k", b"old") == 201
    wrong = hashlib.md5(b"another").hexdigest()
    assert server.call("PUT", "/k", b"new", If_Match="*", Content_MD5=wrong).status == 400
    upload = Upload(server.port, "/k", 2 * MB, "If-Match: *\r\n")
    upload.send(bytes(MB))
    until(lambda: system.open_intents() == 1)
    upload.vanish()
    until(system.is_clean)
    system.volumes[0].kill()
    assert server.call("PUT", "/k", b"new", If_Match="*").status == 503
    assert read(server, "/k") == b"old"


def test_kill_9_in_the_midst_of_a_replace_leaves_the_old_value(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/k", b"old") == 201
    upload = Upload(system.server.port, "/k", 2 * MB, "If-Match: *\r\n")
    upload.send(bytes(MB))
    until(lambda: system.open_intents() == 1)
    restart(system)
    assert system.server.get("/k") == b"old"
    until(system.is_clean)
    assert_copies(system, "/k", b"old")


class Hammer(threading.Thread):
    """A client that reads one key as fast as it can; what it sees may only become newer."""

    def __init__(self, port: int, path: str) -> None:
        super().__init__()
        self.client, self.path, self.enough = Client(port), path, threading.Event()
        self.rounds, self.newest, self.wrong = 0, 0, []
        self.start()

    def run(self) -> None:
        try:
            while not self.enough.is_set() and not self.wrong:
                reply = self.client.call("GET", self.path)
                found = follow(reply) if reply.status == 302 else None
                version = int(found.body.split(b" ", 1)[0]) if found else 0
                if not found or found.status != 200 or found.body != version_of(version):
                    self.wrong.append((reply, found))
                elif version < self.newest:
                    self.wrong.append((version, self.newest))
                self.newest = version
                self.rounds += 1
        except Exception as error:
            self.wrong.append(error)


def version_of(number: int) -> bytes:
    """A value of a size of its own that repeats its number."""
    return b"%d " % number * (1 + number * 7919 % 50_000)


def test_a_hammering_reader_of_a_key_that_is_replaced_never_misses_nor_reads_a_mixture(
    cluster: Make,
) -> None:
    system = cluster("-grace", "5s")
    server = system.server
    assert server.put("/k", version_of(1)) == 201
    with running([Hammer(server.port, "/k") for _ in range(4)]) as more:
        for number in range(2, 60):
            match = "*" if number % 2 else tag(version_of(number - 1))
            reply = server.call("PUT", "/k", version_of(number), If_Match=match)
            assert reply.status == 201, reply
            more(1)
    replace(system, "-grace", "100ms")
    until(system.is_clean)
    assert len(system.files()) == 3


# --- what readers see of a replica ----------------------------------------------------------------


def seen_of(system: Cluster, path: str) -> set[tuple[str, str]]:
    """Last-Modified and ETag of the replicas of a key."""
    heads = [urllib.request.urlopen(url) for url in replicas_of(system, path.encode())]
    assert len(heads) == 3
    return {(head.headers["Last-Modified"], head.headers["ETag"]) for head in heads}


def date_of(seen: tuple[str, str]) -> float:
    """Last-Modified in seconds since 1970."""
    return email.utils.parsedate_to_datetime(seen[0]).timestamp()


@pytest.mark.parametrize("way", ["PUT", "stand-in", "REBALANCE"])
def test_all_replicas_of_a_value_have_its_date_and_one_etag(cluster: Make, way: str) -> None:
    system, ahead = cluster(volumes=4, subvolumes=1), int(time.time()) + 86400
    server, place = system.server, ideal(system, "/k")[0]
    assert server.stop() == 0
    old = f"{place} 3 {ahead:08x}{'0' * 8}".encode()  # so that the new time is not that of the PUT
    plant(server.db, keys=[(b"/k", old)])
    server.start()
    value = blob("/k", 2 * MB)
    upload = Upload(server.port, "/k", len(value), "If-Match: *\r\n")
    upload.send(value[:MB])
    until(lambda: arrived(system, place))
    if way == "stand-in":
        volume_at(system, place).kill()
    upload.send(value[MB:])
    assert upload.answer() == 201
    (seen,) = before = seen_of(system, "/k")
    assert date_of(seen) == ahead + 1
    assert system.records()[b"/k"].replicas[0].write_id.startswith(f"{ahead + 1:08x}")
    if way == "REBALANCE":
        file_at(system, "/k", 1).unlink()
        assert rebalance(server, "/k") == 204
        assert seen_of(system, "/k") == before


def test_a_new_value_has_another_etag_however_much_it_is_like_the_old_one(cluster: Make) -> None:
    server, etags = cluster().server, set()
    assert server.put("/k", b"value") == 201
    for _ in range(3):
        answer = follow(server.call("GET", "/k"))
        etags.add(answer.fields["etag"])
        assert server.call("PUT", "/k", b"value", If_Match="*").status == 201
    assert len(etags) == 3


# --- what the index should not have ---------------------------------------------------------------


def test_a_clock_that_was_a_day_ahead_is_set_right(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    server, place = system.server, system.volumes[0].name
    assert server.stop() == 0
    plant_file(system, place, mkv.key2path(b"/k", WRITE_ID), b"value")
    lost = mkv.Replica(place, WRITE_ID[::-1])  # whose file was never there
    files = [mkv.Replica(place, WRITE_ID), lost]
    plant(server.db, garbage=[(b"/k", garbage_row(files, time.time() + 86400))])
    server.start()
    until(system.is_clean)
    assert not system.files()
    assert server.put("/k", b"value") == 201


def test_a_write_after_one_with_a_clock_that_was_ahead_is_newer_still(cluster: Make) -> None:
    system = cluster("-replicas", "1", volumes=1, subvolumes=1)
    ahead = f"{int(time.time()) + 86400:08x}{'0' * 8}"
    place = system.volumes[0].name
    assert system.server.stop() == 0
    plant_file(system, place, mkv.key2path(b"/k", ahead), b"old")
    plant(system.server.db, keys=[(b"/k", f"{place} 3 {ahead}".encode())])
    system.server.start()
    assert system.server.get("/k") == b"old"
    assert system.server.call("PUT", "/k", b"new", If_Match="*").status == 201
    assert system.records()[b"/k"].replicas[0].write_id > ahead
    assert system.server.call("DELETE", "/k").status == 204
    assert system.server.put("/k", b"newer") == 201
    assert system.server.get("/k") == b"newer"
    until(system.is_clean)


def test_garbage_of_a_volume_that_comes_back_is_soon_gone_and_harms_nobody(cluster: Make) -> None:
    system, count = cluster(volumes=4, subvolumes=1), 10_000
    back = system.volumes[0]
    place, at = back.name, time.time() - 86400
    rows = {f"/old/{number:06}".encode(): mkv.Replica(place, WRITE_ID) for number in range(count)}
    assert system.server.stop() == 0
    plant(system.server.db, garbage=[(key, garbage_row([r], at)) for key, r in rows.items()])
    for key, replica in list(rows.items())[::10]:
        plant_file(system, place, mkv.key2path(key, replica.write_id), b"old")
    back.kill()
    system.server.start()
    server = system.server
    assert server.metric("mkv_garbage_keys") == count
    holds(lambda: server.metric("mkv_garbage_keys") == count, 1)
    with running([Writer(server, 1), Writer(server, 2)]) as more:
        more(2)
        back.start()
        slowest = 0.0
        deadline = time.monotonic() + 60
        while server.metric("mkv_garbage_keys") > 100:
            began = time.monotonic()
            assert began < deadline
            assert server.put("/while", b"value") == 201
            assert server.call("DELETE", "/while").status == 204
            slowest = max(slowest, time.monotonic() - began)
        more(2)
    assert slowest < 2
    until(system.is_clean, 30)
    assert server.metric("mkv_swept_files_total") >= count


BAD = b"\xff\0 no record HASHx"


def test_a_record_that_cannot_be_read_is_reported_and_passed_over(cluster: Make) -> None:
    system = cluster()
    server, values = system.server, values_of(["/a", "/b", "/z"])
    store_all(system, values)
    assert server.stop() == 0
    plant(server.db, keys=[(b"/bad", BAD)])
    server.start()
    for path in ("/?list", "/?list&start=/b", "/?list&limit=2"):  # to be deleted, it may be shown
        assert set(values) & set(listed(server, path)[0]) == set(listed(server, path)[0]) - {"/bad"}
    assert set(server.records()) - {b"/bad"} == {b"/a", b"/b", b"/z"}
    assert server.call("GET", "/bad").status == server.call("PUT", "/bad", b"x").status == 500
    assert server.call("GET", "/?ready").status == 200
    assert {name: read(server, name) for name in values} == values
    file_at(system, "/z", 0).unlink()
    command = Command(system, "rebalance").wait()
    assert command.status in (1, 2) and {f["key"] for f in command.findings} == {"/bad"}
    assert_copies(system, "/z", values["/z"])
    assert server.call("DELETE", "/a").status == 204
    assert server.call("DELETE", "/bad").status == 204
    assert server.call("GET", "/bad").status == 404
    assert server.put("/bad", b"good") == 201
    until(system.is_clean)


def test_garbage_that_cannot_be_read_is_reported_and_passed_over(cluster: Make) -> None:
    system = cluster()
    server, values = system.server, values_of(["/a", "/bad", "/z"])
    store_all(system, values)
    assert server.stop() == 0
    plant(server.db, garbage=[(b"/bad", BAD), (b"/worse", b"1.5 127.0.0.1:1")])
    server.start()
    assert not system.garbage()
    until(lambda: server.log.read_text().count("cannot be read") >= 2)
    assert_values(system, values)
    assert [server.call("DELETE", path).status for path in ("/a", "/z")] == [204, 204]
    until(lambda: len(system.files()) == 3 and not system.garbage())  # swept as ever
    assert Command(system, "rebalance").wait().status in (0, 1)
    assert server.call("DELETE", "/bad").status == 204
    assert server.call("DELETE", "/worse").status in (204, 404)
    assert server.put("/bad", b"good") == server.put("/worse", b"good") == 201
    assert server.stop() == 0
    with lmdb.open(str(system.folder / "index"), max_dbs=8, map_size=1 << 40) as env:
        table = env.open_db(b"garbage")
        assert BAD not in [row for _, row in env.begin().cursor(table)]


@pytest.mark.parametrize("name", ["keys", "garbage"])
def test_a_rebuild_goes_on_beside_what_cannot_be_read(cluster: Make, name: str) -> None:
    system = cluster()
    values = values_of(["/a", "/z"])
    store_all(system, values)
    assert system.server.stop() == 0
    plant(system.server.db, **{name: [(b"/bad", BAD)]})
    plant(system.server.db, keys=[(b"/z", BAD)])
    done = Command(system, "rebuild").wait()
    assert done.status in (1, 2) and "/z" in {finding["key"] for finding in done.findings}
    system.server.start()
    assert system.server.get("/a") == values["/a"]


# --- what operators see ---------------------------------------------------------------------------


def lines(server: Server, *words: str) -> list[str]:
    """The lines of a server's log that have all of the words, but for its first."""
    logged = server.log.read_text().splitlines()
    return [line for line in logged if all(w in line for w in words) and "mkv is at" not in line]


def test_a_volume_that_dies_and_returns_is_worth_one_line_each(cluster: Make) -> None:
    system = cluster("-voltimeout", "600ms", volumes=4)
    server, bad = system.server, system.volumes[0]
    paths = [f"/k{number}" for number in range(30)]
    assert [put(server, path, b"value") for path in paths] == [201] * 30
    assert not lines(server, "is down") and not lines(server, "is up")
    bad.kill()
    for path in paths:
        assert read(server, path) == b"value"
        assert put(server, f"{path}/more", b"value") == 201
        assert server.call("DELETE", path).status == 204
    until(lambda: lines(server, bad.name, "is down"))
    holds(lambda: len(lines(server, bad.name)) == 1, 1)
    bad.start()
    until(lambda: lines(server, bad.name, "is up"))
    until(system.is_clean, 40)
    assert len(lines(server, bad.name)) == 2, lines(server, bad.name)
    assert len(lines(server, "is down")) == len(lines(server, "is up")) == 1


def test_a_drive_that_cannot_be_written_and_then_can_is_worth_one_line_each(
    cluster: Make, mounts: Callable
) -> None:
    system = cluster(volumes=4, subvolumes=2)
    server, drive = system.server, f"{system.volumes[0].name}/sv00"
    paths = paths_at(system, drive, "/k")
    with ill("full", system.volumes[0], "sv00", mounts) as cure:
        system.sees(system.volumes[0])
        before = len(lines(server, drive))
        assert [put(server, next(paths), b"value") for _ in range(30)] == [201] * 30
        (line,) = [line for line in lines(server, drive)[before:] if "stand-in" not in line]
        assert "left alone" in line
        cure()
        again = functools.partial(lines, server, drive, "takes values again")
        until(lambda: put(server, next(paths), b"value") == 201 and again(), 40)
    assert len(again()) == 1


def test_a_volume_that_cannot_be_written_is_worth_one_line_while_that_lasts(cluster: Make) -> None:
    system = cluster(volumes=4, subvolumes=1)
    server, bad = system.server, system.volumes[0]
    block(bad.folder)
    paths = paths_at(system, bad.name, "/k")
    holds(lambda: put(server, next(paths), b"value") == 201, 2)
    (line,) = [line for line in lines(server, bad.name) if "stand-in" not in line]
    assert "left alone" in line


def test_a_stand_in_is_worth_one_line_whatever_the_key(cluster: Make) -> None:
    system = cluster(volumes=4)
    server, key = system.server, "/two\nlines is up again"
    bad, *_, stand_in = ideal(system, key, 4)
    kill = volume_at(system, bad).kill
    pieces, length = interrupted(b"value", kill), {"Content_Length": "5"}
    assert server.call("PUT", quote(key), pieces, **length).status == 201
    (line,) = lines(server, "stand-in")
    assert "two" in line and "lines" in line and stand_in in line
    assert not [line for line in lines(server) if line.startswith("lines")]


def test_with_v_a_request_is_worth_one_line_and_without_it_none(cluster: Make) -> None:
    system, calls = cluster(), [("PUT", 201), ("PUT", 403), ("GET", 302)]
    calls += [("DELETE", 204), ("GET", 404)]
    for count, flags in enumerate(((), ("-v",))):
        server = replace(system, *flags)
        for method, status in calls:
            assert server.call(method, "/logged%0Ahere", method[:3]).status == status
        with Wire(server.port) as wire:
            wire.send(request("PUT", "/piped", b"x") + request("GET", "/piped") * 3)
            assert [wire.answer().status for _ in range(4)] == [201, 302, 302, 302]
        assert server.call("DELETE", "/piped").status == 204
        for method, status in calls:
            assert len(lines(server, method, "/logged", "here", f" {status}")) == count
        assert len(lines(server, "GET", "/piped", " 302")) == 3 * count
        assert len(lines(server, "here")) == len(lines(server, "/logged")) == len(calls) * count


def test_health_is_200_while_keys_can_be_found_and_ready_while_a_put_can_succeed(
    cluster: Make,
) -> None:
    system = cluster(volumes=4)
    server = system.server
    first, second, *_ = system.volumes

    def ready() -> int:
        return server.call("GET", "/?ready").status

    assert ready() == 200 and server.put("/k", b"value") == 201
    first.kill()
    system.sees(first, up=False)
    assert ready() == 200 and server.put("/k2", b"value") == 201
    second.kill()
    system.sees(second, up=False)
    reply = server.call("GET", "/?ready")
    assert reply.status == 503 and reply.body.count(b"\n") == 1
    assert server.put("/k3", b"value") == 503
    assert server.call("GET", "/?health").status == 200
    first.start()
    until(lambda: ready() == 200)
    assert server.put("/k3", b"value") == 201


def test_a_server_whose_drives_take_no_values_is_not_ready(cluster: Make) -> None:
    system = cluster(subvolumes=1)
    block(system.volumes[0].folder)
    assert system.server.put("/k", b"value") == 503
    until(lambda: system.server.call("GET", "/?ready").status == 503)
    assert system.server.call("GET", "/?health").status == 200


def test_a_server_whose_index_cannot_be_written_is_not_ready(cluster: Make) -> None:
    server = cluster("-replicas", "1", volumes=1, subvolumes=1).server
    assert server.call("GET", "/?ready").status == 200 and server.put("/k", b"value") == 201
    process = f"--pid={server.process.pid}"
    shell("prlimit", process, "--fsize=1:unlimited")  # no file can be written
    assert server.put("/new", b"value") == 503
    reply = until(lambda: (found := server.call("GET", "/?ready")).status == 503 and found)
    assert reply.body.count(b"\n") == 1
    assert server.call("GET", "/?health").status == 200 and server.get("/k") == b"value"
    shell("prlimit", process, "--fsize=unlimited:unlimited")
    until(lambda: server.call("GET", "/?ready").status == 200)
    assert server.put("/new", b"value") == 201


def test_metrics_say_what_they_are(system: Cluster) -> None:
    server = system.server
    assert server.put("/metrics", b"value") == 201
    reply = server.call("GET", "/?metrics")
    told: dict[str, set[str]] = {}
    for line in reply.body.decode().splitlines():
        if line.startswith("#"):
            _, what, name, *_ = line.split(" ", 3)
            told.setdefault(name, set()).add(what)
        else:
            name = re.match(
                r"(mkv_[a-z_]+)(\{[a-z]+=\"[^\"]*\"(,[a-z]+=\"[^\"]*\")*\})? [0-9.e+-]+$", line
            )
            assert name and told.get(name[1]) == {"HELP", "TYPE"}, line
    names = "keys garbage_keys intents_open volumes volumes_up volume_up connections commits_total"
    names += " commit_seconds_total swept_files_total event_loop_lag_seconds received_bytes_total"
    names += " requests_total request_seconds_total"
    assert {f"mkv_{name}" for name in names.split()} <= set(told)


def test_metrics_tell_what_is_down_and_what_waits(cluster: Make) -> None:
    system = cluster()
    server, bad = system.server, system.volumes[0]
    assert server.put("/k", b"value") == 201
    assert server.metric("mkv_volumes") == server.metric("mkv_volumes_up") == 3
    assert server.metric("mkv_keys") == 1 and server.metric("mkv_garbage_keys") == 0
    bad.kill()
    system.sees(bad, up=False)
    assert server.metric("mkv_volumes_up") == 2
    assert server.call("DELETE", "/k").status == 204
    assert server.metric("mkv_keys") == 0 and server.metric("mkv_garbage_keys") == 1
    assert server.metric("mkv_commits_total") >= 2 and server.metric("mkv_commit_seconds_total") > 0
    bad.start()
    system.sees(bad)
    until(lambda: server.metric("mkv_garbage_keys") == 0)
    assert server.metric("mkv_swept_files_total") >= 1


def test_a_volume_that_is_dead_or_lacks_drives_at_the_start_is_worth_one_line(
    cluster: Make,
) -> None:
    system = cluster(volumes=4)
    assert system.server.stop() == 0
    dead, poor, *healthy = system.volumes
    dead.kill()
    poor.kill()
    poor.subvolumes = 8
    poor.start()
    before = len(lines(system.server))
    system.server.start()
    said = lines(system.server)[before:]
    assert len([line for line in said if dead.name in line]) == 1
    (line,) = [line for line in said if poor.name in line]
    assert "sv08" in line and "sv09" in line
    assert not [line for line in said if any(volume.name in line for volume in healthy)]


# --- rebalance ------------------------------------------------------------------------------------


def rebalance(server: Server, path: str) -> int:
    """REBALANCE a key: the status."""
    return server.call("REBALANCE", path).status


def names_of(volumes: list[Volume]) -> str:
    return ",".join(volume.name for volume in volumes)


def file_at(system: Cluster, path: str, number: int) -> Path:
    """The file of a replica of a key."""
    key, replica = path.encode(), system.records()[path.encode()].replicas[number]
    return Path(str(drive_at(system, replica.location)) + mkv.key2path(key, replica.write_id))


def assert_home(system: Cluster, names: str, replicas: int = 3, subvolumes: int = 10) -> None:
    """That every key is where it belongs, and in the end nothing is anywhere else."""
    for key, record in system.records().items():
        home = mkv.key2volume(key, names.split(","), replicas, subvolumes)
        assert [replica.location for replica in record.replicas] == home, key
    until(system.is_clean)


def put_elsewhere(system: Cluster, path: str, value: bytes, chunked: bool = False) -> Volume:
    """PUT a value while the first of its ideal volumes is down: that volume, up again."""
    away = volume_at(system, ideal(system, path)[0])
    away.kill()
    assert put(system.server, path, value, chunked) == 201
    assert balance(system, path) == "unbalanced"
    away.start()
    until(lambda: system.server.metric("mkv_volumes_up") == len(system.volumes))
    return away


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_rebalance_brings_a_key_home_that_had_a_stand_in(cluster: Make, chunked: bool) -> None:
    system, value = cluster(volumes=4), blob("/k", 300_000)
    put_elsewhere(system, "/k", value, chunked)
    until(lambda: rebalance(system.server, "/k") == 204 and balance(system, "/k") == "balanced")
    assert list(copies(system, "/k")) == ideal(system, "/k")
    assert_copies(system, "/k", value)
    until(system.is_clean)
    assert len(system.files()) == 3


def test_rebalance_of_a_key_that_is_at_home_changes_nothing(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    before, files = system.tables(), system.files()
    assert rebalance(system.server, "/k") == 204
    assert (system.tables(), system.files()) == (before, files)


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"half")])
def test_rebalance_replaces_a_file_that_is_gone_or_of_another_size(
    cluster: Make, harm: Callable[[Path], Any]
) -> None:
    system, value = cluster(), blob("/k", 100_000)
    assert system.server.put("/k", value) == 201
    harm(file_at(system, "/k", 1))
    assert rebalance(system.server, "/k") == 204
    assert_copies(system, "/k", value)
    until(system.is_clean)
    assert len(system.files()) == 3


def test_rebalance_makes_up_for_a_volume_that_is_lost_for_good(cluster: Make) -> None:
    system, value = cluster(volumes=4), blob("/k", 100_000)
    server = system.server
    assert server.put("/k", value) == 201
    lost = volume_at(system, ideal(system, "/k")[0])
    lost.kill()
    until(lambda: rebalance(server, "/k") == 204)
    assert list(copies(system, "/k")) == ideal(system, "/k", 4)[1:]
    assert read(server, "/k") == value


def test_rebalance_leaves_the_files_on_a_drive_that_is_full(cluster: Make, mounts: Any) -> None:
    system = cluster(volumes=4, subvolumes=2)
    location = ideal(system, "/k")[0]
    volume, drive = volume_at(system, location), location.partition("/")[2]
    with ill("full", volume, drive, mounts) as cure:
        cure()
        assert system.server.put("/k", b"value") == 201
        fill(volume.folder / drive / ".tmp")
        other = next(paths_at(system, location, "/other/"))
        assert system.server.put(other, blob(other, 100_000)) == 201
        assert balance(system, other) == "unbalanced"
        before, files = system.records(), system.files()
        assert rebalance(system.server, "/k") == 204
        assert system.records() == before and files <= system.files()


def test_rebalance_spreads_no_bytes_but_those_that_were_put(cluster: Make) -> None:
    system, value = cluster(), blob("/k", 100_000)
    assert system.server.put("/k", value) == 201
    for number in (0, 1):
        file_at(system, "/k", number).write_bytes(bytes(len(value)))
    file_at(system, "/k", 2).unlink()
    record = system.records()[b"/k"]
    assert rebalance(system.server, "/k") == 503
    assert system.records()[b"/k"] == record
    until(lambda: not system.garbage())
    assert len(system.files()) == 2


def test_rebalance_is_404_without_the_key_and_503_without_volumes(cluster: Make) -> None:
    system = cluster("-voltimeout", "200ms")
    server, upload = system.server, Upload(system.server.port, "/new", 1000)
    upload.send(b"x" * 500)
    until(lambda: system.open_intents() == 1)
    assert rebalance(server, "/new") in (404, 409) and rebalance(server, "/none") == 404
    upload.vanish()
    assert server.put("/k", b"value") == 201
    file_at(system, "/k", 2).unlink()
    for volume in system.volumes:
        volume.kill()
        assert rebalance(server, "/k") == 503
    until(lambda: set(system.garbage()) <= {b"/k", b"/new"} and not system.open_intents())


def test_of_two_rebalances_of_a_key_at_a_time_the_second_is_409(cluster: Make) -> None:
    system, value = cluster("-voltimeout", "2s", volumes=4), blob("/k", 3 * MB)
    server, target = system.server, put_elsewhere(system, "/k", value)
    with ThreadPoolExecutor() as pool:
        target.freeze()
        moving = pool.submit(rebalance, server, "/k")
        until(lambda: system.open_intents())
        assert rebalance(server, "/k") == 409
        target.thaw()
        assert moving.result() == 204
    assert_copies(system, "/k", value)
    until(system.is_clean)


def test_an_unlinked_key_stays_unlinked_when_it_is_rebalanced(cluster: Make) -> None:
    system = cluster()
    assert system.server.put("/k", b"value") == 201
    assert system.server.call("UNLINK", "/k").status == 204
    file_at(system, "/k", 0).unlink()
    assert rebalance(system.server, "/k") == 204
    assert_copies(system, "/k", b"value")
    assert system.records()[b"/k"].deleted
    assert system.server.get("/k") is None
    assert listed(system.server, "/?unlinked")[0] == ["/k"]


@pytest.mark.parametrize("method", ["DELETE", "UNLINK"])
def test_a_delete_or_unlink_in_the_midst_of_a_rebalance_wins(cluster: Make, method: str) -> None:
    system, value = cluster("-voltimeout", "2s", volumes=4), blob("/k", 3 * MB)
    server, target = system.server, put_elsewhere(system, "/k", value)
    with ThreadPoolExecutor() as pool:
        target.freeze()
        moving = pool.submit(rebalance, server, "/k")
        until(lambda: system.open_intents())
        assert server.call(method, "/k").status == 204
        assert server.get("/k") is None
        target.thaw()
        assert moving.result() == 409
    assert server.get("/k") is None
    until(system.is_clean)
    assert len(system.files()) == (3 if method == "UNLINK" else 0)


def test_a_server_killed_in_the_midst_of_a_rebalance_leaves_the_key_as_it_was(
    cluster: Make,
) -> None:
    system, value = cluster("-voltimeout", "2s", volumes=4), blob("/k", 3 * MB)
    server, target = system.server, put_elsewhere(system, "/k", value)
    record = system.records()[b"/k"]
    with ThreadPoolExecutor() as pool:
        target.freeze()
        moving = pool.submit(rebalance, server, "/k")
        until(lambda: system.open_intents())
        server.kill()
        assert isinstance(moving.exception(), OSError)
    target.thaw()
    server.start()
    assert system.records()[b"/k"] == record
    until(lambda: rebalance(server, "/k") == 204 and balance(system, "/k") == "balanced")
    assert_copies(system, "/k", value)
    until(system.is_clean)


class Reader(threading.Thread):
    """A client that reads the same keys over and over; none may be missed, nor a call refused."""

    def __init__(self, port: int, values: dict[str, bytes]) -> None:
        super().__init__()
        self.port, self.values, self.enough, self.rounds = port, values, threading.Event(), 0
        self.failed, self.wrong = 0, []
        self.start()

    def run(self) -> None:
        while not self.enough.is_set() and not self.wrong:
            path = random.choice(list(self.values))
            reply = found = None
            try:
                reply = Client(self.port).call("GET", path)
                found = follow(reply)
            except OSError:
                self.failed += 1
            if reply and (not found or found.body != self.values[path]):
                self.wrong.append((path, reply, found))
            self.rounds += 1


CHANGES = {
    "3 to 5 volumes": ((3, 3, 10), (5, 3, 10)),
    "5 to 3 volumes": ((5, 3, 10), (3, 3, 10)),
    "2 to 3 replicas": ((4, 2, 10), (4, 3, 10)),
    "3 to 2 replicas": ((4, 3, 10), (4, 2, 10)),
    "1 to 10 subvolumes": ((3, 3, 1), (3, 3, 10)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_move_while_clients_read_and_write_and_none_of_them_sees_it(
    cluster: Make, change: str
) -> None:
    def flags(volumes: int, replicas: int, subvolumes: int) -> tuple:
        names = names_of(system.volumes[:volumes])
        flags = "-volumes", names, "-replicas", f"{replicas}", "-subvolumes", f"{subvolumes}"
        return *flags, "-grace", "1s", "-voltimeout", "3s"  # disks stall

    system = cluster(volumes=5)
    before, after = CHANGES[change]
    with inherited(system) as listener:
        port = listener.getsockname()[1]
        server = system.start(port, *flags(*before), listener=listener)
        values = {f"/key/{number}": blob(f"{number}", number * 1999 + 1) for number in range(60)}
        assert {server.put(path, value) for path, value in values.items()} == {201}
        clients = [Reader(server.port, values), Reader(server.port, values)]
        clients += [Handed(server.port, 1, False), Handed(server.port, 2, True)]
        with running(clients) as more:
            more(1)
            assert server.stop() == 0
            server = system.server = system.start(port, *flags(*after), listener=listener)
            keys = listed(server, "/key/?list")[0]
            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(functools.partial(rebalance, server), keys)) == {204}
            more(1)
        assert sum(client.failed for client in clients) == 0
        for path in listed(server, "/?list")[0]:
            assert rebalance(server, path) == 204
        assert {path: read(server, path) for path in keys} == values
        assert_home(system, names_of(system.volumes[: after[0]]), *after[1:])


@pytest.mark.parametrize("rebuilt", [True, False])
def test_what_was_written_after_a_snapshot_outlives_a_return_to_it(
    cluster: Make, rebuilt: bool
) -> None:
    system = cluster()
    server, copy = system.server, system.folder / "copy"
    values = {f"/k{number}": blob(f"{number}", 1000) for number in range(5)}
    store_all(system, values)
    uploads = {f"/new{number}": Upload(server.port, f"/new{number}", 1000) for number in range(5)}
    for upload in uploads.values():
        upload.send(bytes(500))
    until(lambda: system.open_intents() == 5)
    copy.mkdir()
    (copy / "data.mdb").write_bytes(server.call("GET", "/?snapshot").body)
    for upload in uploads.values():
        upload.send(bytes(500))
        assert upload.answer() == 201
    files = system.files()
    assert server.stop() == 0
    shutil.rmtree(system.folder / "index")
    copy.rename(system.folder / "index")
    if rebuilt:
        run(system, "rebuild")
        values |= dict.fromkeys(uploads, bytes(1000))
    server.start()
    assert server.put("/last", b"value") == 201
    assert server.call("DELETE", "/last").status == 204
    until(lambda: not system.garbage())  # all is swept that can be
    assert system.files() == files
    assert_values(system, values)


# --- thrasher.py ----------------------------------------------------------------------------------


def thrasher(*args: str, **options: Any) -> subprocess.Popen:
    """thrasher.py under way."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, HERE / "thrasher.py", *args]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # if we are not to
    return subprocess.Popen(command, start_new_session=True, preexec_fn=heed, **streams, **options)


@pytest.mark.parametrize("flags", ["-count 1000", "-count 30 -size 900000 -clients 3 -keys 5"])
def test_the_thrasher_finds_nothing_wrong_and_leaves_nothing(cluster: Make, flags: str) -> None:
    system = cluster()
    with thrasher("-server", f"127.0.0.1:{system.server.port}", *flags.split()) as process:
        out, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    *verbs, last, speed = out.splitlines()
    assert [line.split()[0] for line in verbs] == ["PUT", "GET", "DELETE"]
    assert all(re.search(r" p50 [\d.]+ ms, p99 [\d.]+ ms, max [\d.]+ ms$", v) for v in verbs)
    assert re.fullmatch(rf"{flags.split()[1]} write/read/delete in \d+\.\ds", last)
    assert re.fullmatch(r"thats \d+\.\d\d/sec", speed)
    assert listed(system.server, "/?list") == ([], "")
    until(system.is_clean)


class Faulty(http.server.BaseHTTPRequestHandler):
    """A server that keeps values itself, has a fault, and is its own volume."""

    protocol_version = "HTTP/1.1"
    fault, values = "", {}

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **fields: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **fields}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        value = self.rfile.read(int(self.headers["Content-Length"]))
        if self.fault == "takes no value":
            return self.reply(503)
        self.values[self.path] = value[::-1] if self.fault == "keeps another value" else value
        return self.reply(201)

    def do_GET(self) -> None:
        if self.path.startswith("/volume/"):
            return self.reply(200, self.values[self.path.removeprefix("/volume")])
        if self.path not in self.values:
            return self.reply(404)
        name = "Elsewhere" if self.fault == "redirects to nowhere" else "Location"
        host, port = self.server.server_address
        return self.reply(302, **{name: f"http://{host}:{port}/volume{self.path}"})

    def do_DELETE(self) -> None:
        if self.fault == "deletes nothing":
            return self.reply(404)
        del self.values[self.path]
        return self.reply(204)


FAULTS = {  # and what the thrasher says of it
    "keeps another value": "not the value that was written",
    "redirects to nowhere": "a redirect to nowhere",
    "takes no value": "not 201, but HTTP/1.1 503",
    "deletes nothing": "not 204, but HTTP/1.1 404",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_thrasher_ends_with_1_at_a_wrong_answer(fault: str) -> None:
    handler = type("Handler", (Faulty,), {"fault": fault, "values": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with thrasher("-server", f"127.0.0.1:{server.server_port}", "-count", "100") as process:
            out, said = process.communicate(timeout=60)
        server.shutdown()
    assert (process.returncode, out) == (1, "") and said.count("\n") == 1
    assert said.startswith("thrasher: ") and FAULTS[fault] in said


def test_the_thrasher_ends_with_1_where_there_is_no_server() -> None:
    with thrasher("-server", f"127.0.0.1:{free_ports(1)[0]}") as process:
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said.count("\n")) == (1, "", 1)


def command_line(pid: int) -> bytes:
    """What a process was started with; nothing when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def mentioning(text: str) -> list[int]:
    """The processes that have a text in their command line."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if text.encode() in command_line(pid)]


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_survives_a_benchmark(tmp_path: Path, number: int) -> None:
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with thrasher("bench", "-quick", "-rows", "cycle", env=env) as process:
        until(lambda: len(mentioning(str(tmp_path))) >= 4)  # three volumes, a server
        if number:
            process.send_signal(number)
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


# --- rebuild, rebalance: harness ------------------------------------------------------------------

KEPT_FOR = 2.0  # seconds that replaced files are kept for readers, in the tests with traffic
KEPT = ("-grace", f"{KEPT_FOR}s", "-voltimeout", "3s")  # disks stall


class Command:
    """A rebuild or rebalance of a cluster's index and volumes."""

    running: list["Command"] = []

    def __init__(self, system: Cluster, name: str, *flags: str, stderr: int | None = None) -> None:
        self.name = name
        command = [sys.executable, str(HERE / "mkv.py"), name, "-volumes", system.names()]
        command += ["-db", str(system.folder / "index"), "-subvolumes", str(system.subvolumes)]
        command += [*Cluster.FLAGS, "-voltimeout", "3s", *flags]
        number = len(list(system.folder.glob("*.err")))
        self.out, self.err = (system.folder / f"{number}.{end}" for end in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=stderr or err)
        self.running.append(self)

    def wait(self) -> "Command":
        """Until it ends; its exit status, its findings, and what it said."""
        self.status = self.process.wait(60)
        self.said = self.err.read_text()
        self.findings = [json.loads(line) for line in self.out.read_text().splitlines()]
        assert all(next(iter(finding)) == "finding" for finding in self.findings)
        assert "Traceback" not in self.said, self.said
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def kinds(self) -> set[str]:
        return {finding["finding"] for finding in self.findings}

    def found(self, kind: str) -> list[dict]:
        """The findings of a kind, without the word."""
        found = [dict(each) for each in self.findings]
        return [each for each in found if each.pop("finding") == kind]

    def __repr__(self) -> str:
        ended = self.process.poll()
        return f"{self.name}: {ended}, {self.out.read_text()[:2000]}, {self.err.read_text()}"


@pytest.fixture(autouse=True)
def no_command_outlives_its_test() -> Iterator[None]:
    yield
    while Command.running:
        Command.running.pop().kill()


def run(system: Cluster, name: str, *flags: str, status: int = 0) -> Command:
    """A command from start to end, with this exit status; it sums up what it did."""
    command = Command(system, name, *flags).wait()
    assert command.status == status, command
    assert re.search(rf"^{name}: \d+ ", command.said, re.MULTILINE), command
    return command


def plant_file(system: Cluster, location: str, path: str | bytes, data: bytes) -> None:
    """A file on a volume that came there by other ways."""
    file = Path(f"{drive_at(system, location)}{os.fsdecode(path)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def files_of(system: Cluster, path: str) -> list[tuple[str, str, Path]]:
    """Location, path and file of each replica that the record of a key names."""
    replicas = system.records()[path.encode()].replicas
    named = [(r.location, mkv.key2path(path.encode(), r.write_id)) for r in replicas]
    return [(at, name, Path(f"{drive_at(system, at)}{name}")) for at, name in named]


def state(system: Cluster) -> tuple:
    """All that a command could change: index, names, times and sizes of files."""
    files = [Path(f"{volume.folder}{name}") for volume in system.volumes for name in volume.files()]
    stats = {file: file.stat() for file in files}
    return system.tables(), {f: (s.st_ino, s.st_size, s.st_mtime_ns) for f, s in stats.items()}


def values_of(names: Iterable[str]) -> dict[str, bytes]:
    """A value for each name, most of them small."""
    sizes = itertools.cycle((1, 100, 3000, 70_000, 200, 5000, 400_000, 40))
    return {name: blob(name, size) for name, size in zip(names, sizes, strict=False)}


LONG = "/" + "long" * 127 + ".."  # the longest there is; its base64 is cut into pieces
SLASH = "/photos/été"  # its base64 has a slash
NAMES = [LONG, SLASH, "/ with %41? & #", "/" + "ÿ" * 60, "/-", "//", "/日本/語"]


def store_all(system: Cluster, values: dict[str, bytes]) -> None:
    with ThreadPoolExecutor(4) as pool:
        puts = pool.map(lambda name: system.server.put(quote(name), values[name]), values)
        assert set(puts) == {201}


def assert_values(system: Cluster, values: dict[str, bytes]) -> None:
    """That the server has these values and no other key."""
    assert set(listed(system.server, "/?list")[0]) == set(values)
    for name, value in values.items():
        assert read(system.server, quote(name)) == value, name


def assert_at_home(system: Cluster, volumes: list[Volume], replicas: int, subvolumes: int) -> None:
    """That every key is where it belongs, and in the end nothing is anywhere else."""
    names = [volume.name for volume in volumes]
    for key, record in system.records().items():
        home = mkv.key2volume(key, names, replicas, subvolumes)
        assert [replica.location for replica in record.replicas] == home, key
    until(system.is_clean, 30)


class Traffic(threading.Thread):
    """A client that writes, reads, unlinks and deletes keys of its own; nothing may fail."""

    def __init__(self, port: int, number: int, values: dict[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.client, self.number, self.values = Client(port), number, values
        self.hidden: set[str] = set()
        self.redirects: list[tuple[float, str, Reply]] = []
        self.enough, self.rounds, self.wrong = threading.Event(), 0, ""
        self.start()

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self.round(random.Random(self.rounds))
                self.rounds += 1
            self.arrive(0)
        except Exception as error:
            self.wrong = repr(error)

    def ask(self, method: str, name: str, status: int, value: bytes | None = None) -> Reply:
        """A request; on a kept connection that ends before the answer, once more."""
        try:
            reply = self.client.call(method, quote(name), value)
        except OSError:
            reply = self.client.call(method, quote(name), value)
        assert reply.status == status, (method, name, reply)
        return reply

    def arrive(self, seconds: float) -> None:
        """Follow the redirects that are so old; only later than -grace may one lead nowhere."""
        while self.redirects and time.monotonic() - self.redirects[0][0] > seconds:
            began, name, reply = self.redirects.pop(0)
            found = follow(reply)
            if name in self.values and (not found or found.status != 200):
                assert time.monotonic() - began > KEPT_FOR, (name, reply, found)
            elif name in self.values:
                assert found.body == self.values[name], name

    def round(self, dice: random.Random) -> None:
        name, chosen = f"/new{self.number}/{self.rounds}", dice.choice(list(self.values))
        if self.rounds % 2:
            value = blob(name, dice.choice((10, 3000, 100_000)))
            self.ask("PUT", name, 201, value)
            self.values[name] = value
        for each in {name, chosen} & set(self.values):
            self.redirects.append((time.monotonic(), each, self.ask("GET", each, 302)))
        self.arrive(KEPT_FOR / 4)
        if self.rounds % 8 in (3, 7):
            self.ask("DELETE" if self.rounds % 8 == 3 else "UNLINK", chosen, 204)
            self.ask("GET", chosen, 404)
            del self.values[chosen]
            self.hidden |= {chosen} if self.rounds % 8 == 7 else set()


@contextlib.contextmanager
def traffic(system: Cluster, values: dict[str, bytes], rounds: int = 20) -> Iterator[None]:
    """Clients that share the keys of a cluster for the time of a block, at least so many rounds."""
    shares = [{name: values[name] for name in sorted(values)[n::4]} for n in range(4)]
    clients = [Traffic(system.server.port, n, share) for n, share in enumerate(shares)]
    try:
        until(lambda: all(client.wrong or client.rounds > 2 for client in clients))
        yield
        until(lambda: all(client.wrong or client.rounds > rounds for client in clients), 60)
    finally:
        for client in clients:
            client.enough.set()
        for client in clients:
            client.join()
    assert [client.wrong for client in clients] == [""] * 4
    values.clear()
    for client in clients:
        values |= client.values
    hidden = set(listed(system.server, "/?unlinked")[0])
    assert hidden >= set().union(*(client.hidden for client in clients))


def connected(process: subprocess.Popen, volume: Volume) -> bool:
    """Whether a process has a connection to a volume."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    here = {f"socket:[{row[9]}]" for row in rows if row[2].endswith(f":{volume.port:04X}")}
    return bool(here & links(process.pid))


def grow(system: Cluster, count: int) -> None:
    """More volumes."""
    for number, port in enumerate(free_ports(count), len(system.volumes)):
        system.volumes.append(Volume(system.folder / f"volume{number}", port, system.subvolumes))


def replace(system: Cluster, *flags: str) -> Server:
    """Another server, that knows all volumes, with more flags, in the place of the old one."""
    old = system.server
    assert old.stop() == 0
    own = old.flags[4 + len(Cluster.FLAGS) :]
    system.server = system.start(*free_ports(1), *own, *flags)
    return system.server


# --- rebuild --------------------------------------------------------------------------------------


def without_index(system: Cluster) -> None:
    """Ends the server and throws the index away."""
    assert not system.server.running() or system.server.stop() == 0
    shutil.rmtree(system.folder / "index")


@pytest.mark.parametrize("subvolumes", [1, 10])
def test_a_tree_of_minikeyvalue_is_adopted(cluster: Make, subvolumes: int) -> None:
    system = cluster(volumes=3, subvolumes=subvolumes)
    without_index(system)
    values = values_of(f"/{n}{'ÿ' * n}." for n in range(40))
    strangers, slashes = 0, 0
    for number, (name, value) in enumerate(values.items()):
        key, names = name.encode(), [volume.name for volume in system.volumes]
        digest, encoded = hashlib.md5(key).hexdigest(), base64.b64encode(key).decode()
        slashes += "/" in encoded
        scores = {v: hashlib.md5(key + v.encode()).digest() for v in names}
        drives = {v: int.from_bytes(scores[v][12:16], "big") % subvolumes for v in names}
        if subvolumes > 1 and number % 5 == 0:  # one on a drive that is not the right one
            strangers += 1
            drives[names[0]] = (drives[names[0]] + 1) % subvolumes
        for volume in names:
            drive = f"{volume}/sv{drives[volume]:02X}" if subvolumes > 1 else volume
            plant_file(system, drive, f"/{digest[:2]}/{digest[2:4]}/{encoded}", value)
    assert slashes > 5 and (strangers > 5 or subvolumes == 1)
    old = system.files()
    assert run(system, "rebuild").findings == []
    records, garbage = system.tables()
    assert not garbage and system.named() == old == system.files()
    for name, value in values.items():
        record, places = records[name.encode()], ideal(system, name)
        locations = [replica.location for replica in record.replicas]
        home = [place for place in places if place in locations]
        assert locations[: len(home)] == home and len(locations) == 3  # strangers come last
        assert record[1:] == (len(value), "", "", False)
    system.server.start()
    assert_values(system, values)
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, subvolumes)
    assert_values(system, values)
    for name in values:
        assert system.server.call("DELETE", quote(name)).status == 204
    until(lambda: not system.files() and not system.garbage())


@pytest.mark.parametrize("subvolumes", [1, 3])
def test_rebuild_makes_the_index_that_was_there(cluster: Make, subvolumes: int) -> None:
    system = cluster(volumes=3, subvolumes=subvolumes)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(30))])
    store_all(system, values)
    grow(system, 1)
    replace(system)
    assert run(system, "rebalance").findings == []  # so that ids differ within a record
    assert system.server.call("UNLINK", "/k0").status == 204
    until(system.is_clean)
    assert system.server.stop() == 0
    before = system.tables()
    assert any(len({r.write_id for r in record.replicas}) > 1 for record in before[0].values())
    assert run(system, "rebuild").findings == []
    assert system.tables() == before  # what only the index knows is kept: MD5s, and UNLINKs
    without_index(system)
    assert run(system, "rebuild").findings == []
    (after, garbage), short = system.tables(), lambda record: (record.replicas, record.size)
    assert not garbage
    assert {k: short(r) for k, r in after.items()} == {k: short(r) for k, r in before[0].items()}
    system.server.start()
    assert_values(system, values)


def test_rebuild_revives_nothing_deleted_and_nothing_unacknowledged(cluster: Make) -> None:
    system = cluster("-voltimeout", "5s", "-grace", "1m")
    server = system.server
    store_all(system, values_of(["/deleted", "/kept"]))
    volume = volume_at(system, ideal(system, "/deleted")[0])
    volume.kill()
    assert server.call("DELETE", "/deleted").status == 204
    volume.start()
    until(lambda: server.metric("mkv_volumes_up") == 3)
    volume.freeze()
    thread = in_background(lambda: server.put("/unacknowledged", b"value"))
    until(lambda: len(system.files()) == 3 + 1 + 2)
    server.kill()
    volume.thaw()
    thread.join()
    for _ in range(2):
        assert run(system, "rebuild").findings == []
        assert set(system.records()) == {b"/kept"}
        assert b"/deleted" in system.garbage()
    system.server = system.start(*free_ports(1))  # whose sweeper does not wait
    until(system.is_clean, 30)
    assert listed(system.server, "/?list")[0] == ["/kept"]


NEWEST = "f" * 8 + "0" * 8  # a write id that is newer than all others
OLDEST = "0" * 15 + "1"


@pytest.mark.parametrize("case", ["new", "existing"])
def test_of_the_files_of_a_key_the_newest_are_the_value(cluster: Make, case: str) -> None:
    system = cluster(subvolumes=1)
    values = values_of(["/same", "/older", "/replaced", "/oldest"])
    store_all(system, values)
    named = {name: files_of(system, name) for name in values}
    plant_file(system, named["/older"][0][0], mkv.key2path(b"/older", OLDEST), b"older")
    plant_file(system, named["/oldest"][1][0], mkv.key2path(b"/oldest"), b"without an id")
    for location, _, _ in named["/replaced"]:
        plant_file(system, location, mkv.key2path(b"/replaced", NEWEST), b"newer")
    garbage = {("/older", named["/older"][0][0], mkv.key2path(b"/older", OLDEST))}
    garbage |= {("/oldest", named["/oldest"][1][0], mkv.key2path(b"/oldest"))}
    garbage |= {("/replaced", location, path) for location, path, _ in named["/replaced"]}
    assert system.server.stop() == 0
    before, files = system.records(), system.files()
    if case == "new":
        without_index(system)
    done = run(system, "rebuild", status=1 if case == "new" else 0)
    found = {(each["key"], each["location"], each["path"]) for each in done.findings}
    assert found == (garbage if case == "new" else set()) and done.kinds() <= {"garbage"}
    records, condemned = system.tables()
    assert system.files() == files and set(records) == set(before)
    listed_now = {(k, r.location, r.write_id) for k, e in condemned.items() for r in e}
    wanted = {(key.encode(), at, mkv.path2key(path)[1]) for key, at, path in garbage}
    assert listed_now == (set() if case == "new" else wanted)
    newest = records[b"/replaced"]
    assert {replica.write_id for replica in newest.replicas} == {NEWEST}
    assert (newest.size, newest.hash) == (5, "")  # the old MD5 does not fit
    assert bool(records[b"/same"].hash) == (case == "existing")
    system.server.start()
    values["/replaced"] = b"newer"
    assert_values(system, values)
    if case == "new":
        assert system.files() == files
    else:
        until(system.is_clean)


@pytest.mark.parametrize("case", ["new", "existing"])
@pytest.mark.parametrize("doubt", ["fewer files", "other sizes"])
def test_when_it_is_doubtful_which_write_is_the_value_it_is_reported_and_nothing_is_deleted(
    cluster: Make, case: str, doubt: str
) -> None:
    system = cluster(subvolumes=1)
    values = values_of(["/same", "/k"]) | {"/k": b"value"}
    store_all(system, values)
    named = files_of(system, "/k")
    if doubt == "fewer files":
        for location, _, _ in named[:2]:
            plant_file(system, location, mkv.key2path(b"/k", NEWEST), b"newer")
    else:
        named[1][2].write_bytes(b"val")
    assert system.server.stop() == 0
    files = system.files()
    outcomes = []
    for _ in range(2):
        if case == "new":
            without_index(system)
        done = run(system, "rebuild", status=1)
        assert done.kinds() == {"ambiguous"} and {f["key"] for f in done.findings} == {"/k"}
        told = json.dumps(done.findings)
        here = {file for file in files if mkv.key2path(b"/k")[:-1] in file}
        assert all(re.sub(r"^[^/]*", "", file) in told for file in here), (here, told)
        assert all(volume_of(location) in told for location, _, _ in named)
        outcomes.append(system.records())
    assert outcomes[0] == outcomes[1]  # always the same
    system.server.start()
    assert set(listed(system.server, "/?list")[0]) == set(values)
    if case == "existing" and doubt == "fewer files":
        assert_values(system, values)
    holds(lambda: not system.garbage() and system.files() == files, 1)


def test_keys_whose_files_are_all_gone_stay(cluster: Make) -> None:
    system = cluster()
    store_all(system, values_of(["/gone", "/half", "/kept"]))
    for _, _, file in files_of(system, "/gone") + files_of(system, "/half")[:1]:
        file.unlink()
    assert system.server.stop() == 0
    before = system.tables()
    assert run(system, "rebuild").findings == []
    assert system.tables() == before
    system.server.start()
    assert system.server.call("DELETE", "/gone").status == 204
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 10)


def test_a_rebuild_killed_anywhere_is_completed_by_the_next(cluster: Make) -> None:
    system, dice = cluster(subvolumes=2), random.Random()
    values = values_of([*NAMES, *(f"/k{n}" for n in range(150))])
    store_all(system, values)
    assert system.server.stop() == 0
    before = {key: (set(r.replicas), r.size) for key, r in system.records().items()}
    without_index(system)
    for _ in range(8):
        command = Command(system, "rebuild")
        time.sleep(dice.random() * 0.8)  # anywhere
        command.kill()
    assert run(system, "rebuild").findings == []
    assert {key: (set(r.replicas), r.size) for key, r in system.records().items()} == before
    system.server.start()
    assert_values(system, values)


JUNK = [b"/README", b"/5d/41/not base64!", b"/5d/42/aGVsbG8=", b"/5d/41/aGVsbG8=-0123"]
JUNK += [b"/5d/41/aGVsbG8", b"/aa/bb/cc/dd/ee/ff", b"/aa/b b/#%41?&", b"/aa/%2e/\"quoted'\\"]
JUNK += [b"/aa/bb/\xff\xfe", b"/a\xff/bb/x", "/été/ÿ".encode()]
JUNK += [b"/aa/bb/%2e%2e", b"/aa/%252e%252e/%00", b"/aa/x../\\..\\", "/aa/bb/😀".encode()]
JUNK += [b"/aa/bb/" + b"x" * 255, b"/%2e%2e/bb/x"]


def test_what_is_no_file_under_the_name_of_one_is_reported(cluster: Make) -> None:
    system = cluster()
    store_all(system, values_of(["/k"]))
    link = Path(f"{drive_at(system, ideal(system, '/x')[0])}{mkv.key2path(b'/x', WRITE_ID)}")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("nowhere")
    assert system.server.stop() == 0
    assert run(system, "rebuild", status=1).kinds() == {"name"}


def test_after_a_crash_in_a_move_rebuild_takes_copies_and_originals_for_one_value(
    cluster: Make,
) -> None:
    system = cluster(volumes=4, subvolumes=1)
    values = values_of(["/k"])
    store_all(system, values)
    write_id = system.records()[b"/k"].replicas[0].write_id
    fourth = ideal(system, "/k", 4)[3]
    plant_file(system, fourth, mkv.key2path(b"/k", write_id[:8] + "0" * 8), values["/k"])
    assert system.server.stop() == 0
    without_index(system)
    assert run(system, "rebuild").findings == []
    found = system.records()[b"/k"]
    assert [r.location for r in found.replicas] == ideal(system, "/k", 4)
    system.server.start()
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 1)
    assert_values(system, values)


@pytest.mark.parametrize("subvolumes", [1, 2])
def test_names_that_no_key_has_are_reported_and_left_alone(cluster: Make, subvolumes: int) -> None:
    system = cluster(subvolumes=subvolumes)
    store_all(system, values_of(NAMES))
    assert system.server.stop() == 0
    place = ideal(system, "/x")[0]
    for junk in JUNK:
        plant_file(system, place, junk, b"junk")
    before = state(system)
    done = run(system, "rebuild", status=1)
    assert done.kinds() == {"name"} and {f["location"] for f in done.findings} == {place}
    paths = {re.sub("[\ufffd\udc80-\udcff]", "?", each["path"]) for each in done.findings}
    files = {junk.decode(errors="replace").replace("\ufffd", "?") for junk in JUNK}
    assert all(any(file.startswith(path) for path in paths) for file in files), files - paths
    assert all(any(path in file for file in files) for path in paths), paths - files
    assert state(system) == before


@needs_root
def test_a_folder_that_is_not_ours_does_not_stop_a_rebuild(cluster: Make) -> None:
    system = cluster(subvolumes=2)
    store_all(system, values_of(["/k"]))
    assert system.server.stop() == 0
    without_index(system)
    volume = system.volumes[0]
    volume.kill()
    with foreign_folder() as folder:  # nginx as nobody, and a lost+found of root on a drive
        shutil.copytree(volume.folder, folder, dirs_exist_ok=True)
        shell("chown", "-R", "nobody:nogroup", str(folder))
        (folder / "sv00/lost+found").mkdir(mode=0o700)
        volume.folder = folder
        volume.start()
        done = Command(system, "rebuild").wait()
        volume.kill()
    assert done.status in (0, 1) and done.kinds() <= {"name"}, done
    assert len(system.records()[b"/k"].replicas) == 3


@pytest.mark.parametrize("case", ["new", "existing"])
@pytest.mark.parametrize("ailment", ["dead", "drive away"])
def test_what_cannot_be_listed_is_reported_and_the_rest_of_a_rebuild_goes_on(
    cluster: Make, ailment: str, case: str
) -> None:
    system, one = cluster("-replicas", "1", subvolumes=2), ("-replicas", "1")
    store_all(system, values_of(f"/k{n}" for n in range(30)))
    assert system.server.stop() == 0
    before = system.records()
    ((location, _, _),) = files_of(system, "/k0")
    places = {record.replicas[0].location for record in before.values()}
    at = next(place for place in places if volume_of(place) != volume_of(location))
    plant_file(system, at, mkv.key2path(b"/new", WRITE_ID), b"value")
    victim, drive = volume_at(system, location), drive_at(system, location)
    victim.kill() if ailment == "dead" else drive.rename(system.folder / "away")
    if case == "new":
        without_index(system)
    done = run(system, "rebuild", *one, status=2)
    assert done.kinds() == {"unreachable"}
    found = {each["location"] for each in done.findings}
    assert {volume_of(place) for place in found} == {victim.name}
    assert ailment == "dead" or found == {location}
    records = system.records()
    if case == "existing":  # whether files are where nobody can look, nobody knows
        assert set(records) == {b"/new", *before} and records[b"/k0"] == before[b"/k0"]
    else:
        assert b"/new" in records and b"/k0" not in records
    victim.start() if ailment == "dead" else (system.folder / "away").rename(drive)
    assert run(system, "rebuild", *one).findings == []
    assert set(system.records()) == {b"/new", *before}
    system.server.start()
    assert_values(system, values_of(f"/k{n}" for n in range(30)) | {"/new": b"value"})


def test_a_rebuild_and_a_server_keep_each_other_out(cluster: Make) -> None:
    system = cluster("-voltimeout", "20s")
    store_all(system, values_of(["/k"]))
    before = state(system)
    refused = Command(system, "rebuild").wait()
    assert refused.status == 2 and refused.findings == []
    assert refused.said.count("\n") == 1 and "use" in refused.said
    assert state(system) == before
    assert system.server.get("/k") == blob("/k", 1)
    assert system.server.stop() == 0
    system.volumes[1].freeze()
    command = Command(system, "rebuild", "-voltimeout", "20s")
    until(lambda: connected(command.process, system.volumes[1]))
    flags = ["-port", str(system.server.port), "-db", system.server.db, *system.server.flags]
    assert str(system.server.db) in error_of(
        "server", "-bind", "127.0.0.1", *flags, folder=system.folder
    )
    system.volumes[1].thaw()
    assert command.wait().status == 0
    system.server.start()
    assert_values(system, values_of(["/k"]))


def test_rebuild_finds_files_of_other_numbers_of_subvolumes(cluster: Make) -> None:
    system = cluster("-subvolumes", "1", subvolumes=10)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(10))])
    store_all(system, values)
    without_index(system)
    assert run(system, "rebuild").findings == []
    assert system.named() == system.files()
    system.server = system.start(*free_ports(1))
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 10)
    assert_values(system, values)


RIGHT = mkv.key2path(b"/k", WRITE_ID)[7:]
ODD_LISTINGS = ["[1, 2]", "[[]]", '{"name": "x"}', '"x"', "null", "12", "<html>", "", "[" * 100_000]
ODD_LISTINGS += [json.dumps([{"name": name, "type": "directory"}]) for name in ("..", ".", "", 7)]
ODD_LISTINGS += [
    json.dumps([{"name": name, "type": "directory"}]) for name in ("\ud800", "a/b", [])
]
ODD_LISTINGS += [json.dumps([{"type": "directory"}]), json.dumps([{"name": "aa", "type": []}])]
ODD_LISTINGS += [json.dumps([{"name": "aa"}]), '[{"name": "aa", "type": "directory"}']
ODD_FILES = [{"name": RIGHT, "type": "file", "size": n} for n in (-5, 1.5, "5", None, [5], 1e400)]
ODD_FILES += [{"name": RIGHT, "type": "file"}, {"name": RIGHT, "size": 5}]
ODD_FILES += [{"name": n, "type": "file", "size": 5} for n in ("..", "", "\ud800", 7, RIGHT + "/")]


def rebuild_from(
    folder: Path, says: Callable[[str], str | None], status: tuple[int, ...] = (1, 2)
) -> tuple[set[str], dict[bytes, mkv.Record]]:
    """Kinds of findings, and records, of a rebuild from listings by path; without one: 404."""

    def answer(_: str, path: str) -> bytes:
        listing = says(path)
        return answer_of(404) if listing is None else answer_of(200, body=listing.encode())

    liar = Puppet(answer)
    command = [sys.executable, HERE / "mkv.py", "rebuild", "-volumes", liar.name]
    command += ["-replicas", "1", "-subvolumes", "1", "-db", folder / "index"]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=60)
    finally:
        liar.close()
    assert b"Traceback" not in ended.stderr, ended.stderr.decode()[-2000:]
    assert ended.returncode in status, ended
    kinds = {json.loads(line)["finding"] for line in ended.stdout.splitlines()}
    return kinds, stored(folder / "index")[0]


def below(files: list) -> Callable[[str], str | None]:
    """The listings of a volume that has these in the folder of the key /k."""
    first, second = mkv.key2path(b"/k")[1:6].split("/")
    levels = {"/": [{"name": first, "type": "directory"}]}
    levels[f"/{first}/"] = [{"name": second, "type": "directory"}]
    levels[f"/{first}/{second}/"] = files
    return lambda path: json.dumps(levels[path]) if path in levels else None


@pytest.mark.parametrize("number", range(len(ODD_LISTINGS)))
def test_a_listing_that_no_nginx_gives_is_reported(tmp_path: Path, number: int) -> None:
    listing = ODD_LISTINGS[number]
    kinds, records = rebuild_from(tmp_path, lambda path: listing if path == "/" else None)
    assert kinds and kinds <= {"name", "unreachable"} and not records


@pytest.mark.parametrize("number", range(len(ODD_FILES)))
def test_a_file_that_no_nginx_lists_is_reported(tmp_path: Path, number: int) -> None:
    kinds, records = rebuild_from(tmp_path, below([ODD_FILES[number]]))
    assert kinds and kinds <= {"name", "unreachable"} and not records


def test_what_is_right_in_an_odd_listing_is_taken_in(tmp_path: Path) -> None:
    good = {"name": RIGHT, "type": "file", "size": 5}
    names = [name for name in PIECES if name not in ("", "..", ".") and "/" not in name]
    names += [f"..{RIGHT}", RIGHT[4:], "x" * 9999]
    odd = [{"name": name, "type": "file", "size": 5} for name in names]
    odd += [{"name": RIGHT.replace("=", ""), "type": "other"}]  # nginx says so of a socket
    kinds, records = rebuild_from(tmp_path, below([good, *odd]), (1,))
    assert kinds == {"name"} and set(records) == {b"/k"} and records[b"/k"].size == 5


def test_folders_without_end_do_not_keep_a_rebuild_from_ending(tmp_path: Path) -> None:
    deeper = json.dumps([{"name": "aa", "type": "directory"}])
    kinds, records = rebuild_from(tmp_path, lambda path: deeper)
    assert kinds and kinds <= {"name", "unreachable"} and not records


# --- rebalance ------------------------------------------------------------------------------------


MOVES = {  # volumes before and after, the flags before, replicas and subvolumes before and after
    "3 to 5 volumes": (3, 5, 3, 3, 4, 4),
    "5 to 3 volumes": (5, 3, 3, 3, 4, 4),
    "2 to 3 replicas": (4, 4, 2, 3, 2, 2),
    "3 to 2 replicas": (4, 4, 3, 2, 2, 2),
    "1 to 10 subvolumes": (3, 3, 3, 3, 1, 10),
    "a volume lost for good": (4, 3, 2, 2, 2, 2),
}


@pytest.mark.parametrize("move", MOVES)
def test_every_key_moves_home_beside_readers_and_writers(cluster: Make, move: str) -> None:
    volumes, later, replicas, wanted, drives, subvolumes = MOVES[move]
    flags = ("-replicas", f"{replicas}", "-subvolumes", f"{drives}")
    system = cluster(*KEPT, *flags, volumes=volumes, subvolumes=subvolumes)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(40)), "/hidden"])
    store_all(system, values)
    assert system.server.call("UNLINK", "/hidden").status == 204
    del values["/hidden"]
    assert system.server.stop() == 0
    grow(system, max(0, later - volumes))
    lost, left = system.volumes[later:], system.volumes[:later]
    if move.endswith("lost for good"):
        lost[0].kill()
    flags = ("-replicas", f"{wanted}", "-subvolumes", f"{subvolumes}")
    flags += ("-volumes", ",".join(volume.name for volume in left))
    system.server = system.start(*free_ports(1), *KEPT, *flags)
    with traffic(system, values):
        assert run(system, "rebalance").findings == []  # it is the server's flags that count
    if move.endswith("lost for good"):  # what it had stays listed, should it ever come back
        until(lambda: system.named() == {f for f in system.files() if lost[0].name not in f}, 30)
        assert system.garbage()
        lost[0].start()
    assert_at_home(system, left, wanted, subvolumes)
    assert not any(volume.files() for volume in lost)
    hidden = listed(system.server, "/?unlinked")[0]
    assert "/hidden" in hidden
    assert_values(system, values)
    assert run(system, "rebalance", "-deep").findings == []
    assert {system.server.call("DELETE", quote(name)).status for name in hidden} == {204}
    until(system.is_clean)


def test_rebalance_works_without_a_server_too(cluster: Make) -> None:
    system = cluster(volumes=3)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(20))])
    store_all(system, values)
    grow(system, 2)
    system.server.kill()  # so that its address is still there
    assert run(system, "rebalance").findings == []
    system.server = system.start(*free_ports(1))
    assert_values(system, values)
    assert_at_home(system, system.volumes, 3, 10)


def test_a_rebalance_killed_anywhere_is_completed_by_the_next(cluster: Make) -> None:
    system = cluster(*KEPT, volumes=5, subvolumes=2)
    values = values_of(f"/k{n}" for n in range(80)) | {"/large": blob("large", 60 * MB)}
    store_all(system, values)
    three, dice = names_of(system.volumes[:3]), random.Random()
    for turn in range(8):  # now with a server, now without
        fewer = () if turn % 4 < 2 else ("-volumes", three)
        assert not system.server.running() or system.server.stop() == 0
        if turn % 2:
            system.server = system.start(*free_ports(1), *KEPT, *fewer)
        command = Command(system, "rebalance", *KEPT, *fewer)
        time.sleep(0.3 + dice.random())  # anywhere
        command.kill()
    assert not system.server.running() or system.server.stop() == 0
    system.server = system.start(*free_ports(1), *KEPT)
    with traffic(system, values, 5):
        assert run(system, "rebalance").findings == []
    assert_values(system, values)
    assert_at_home(system, system.volumes, 3, 2)
    assert run(system, "rebalance", "-deep").findings == []


def test_a_server_killed_under_a_rebalance_leaves_keys_for_the_next(cluster: Make) -> None:
    system = cluster(volumes=3, subvolumes=2)
    values = values_of(f"/k{n}" for n in range(40))
    values |= {f"/large{n}": blob(f"large{n}", 12 * MB) for n in range(5)}
    store_all(system, values)
    grow(system, 1)
    replace(system)
    command = Command(system, "rebalance")
    until(lambda: system.open_intents() or command.process.poll() is not None)
    system.server.kill()
    assert command.wait().status in (0, 2)  # it may have done the rest itself
    system.server.start()
    assert_values(system, values)
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 2)
    assert_values(system, values)


def test_a_volume_that_dies_under_a_rebalance_leaves_keys_for_the_next(cluster: Make) -> None:
    system = cluster(volumes=3, subvolumes=2)
    values = values_of(f"/k{n}" for n in range(40))
    values |= {f"/large{n}": blob(f"large{n}", 12 * MB) for n in range(5)}
    store_all(system, values)
    grow(system, 1)
    replace(system)
    command = Command(system, "rebalance")
    until(lambda: system.open_intents() or command.process.poll() is not None)
    system.volumes[3].kill()
    assert command.wait().status == 1
    assert command.kinds() <= {"failed", "unbalanced"} and command.findings
    assert all(each["key"] for each in command.findings)
    assert all(each["reason"] for each in command.found("failed"))
    assert_values(system, values)
    system.volumes[3].start()
    system.sees(system.volumes[3])
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 2)
    assert_values(system, values)


@pytest.mark.parametrize("beside", ["a server", "nobody"])
def test_large_values_are_moved_and_compared_in_little_memory(cluster: Make, beside: str) -> None:
    system = cluster("-replicas", "1", "-subvolumes", "1", volumes=1, subvolumes=2)
    value, flags = Value(1, 160 * MB), ("-replicas", "1", "-subvolumes", "2")
    assert upload(system.server, "/large", value) == 201
    replace(system, "-subvolumes", "2")
    assert beside == "a server" or system.server.stop() == 0
    for deep in ((), ("-deep",)):
        command, peak = Command(system, "rebalance", *flags, *deep), 0
        while command.process.poll() is None:
            with contextlib.suppress(OSError, IndexError):  # it is ending
                status = Path(f"/proc/{command.process.pid}/status").read_text()
                peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
            time.sleep(0.01)
        assert command.wait().status == 0 and command.findings == [], command
        assert 0 < peak < 96 * MB
    if beside == "a server":
        assert system.server.memory() < 96 * MB
    else:
        system.server.start()
    assert_at_home(system, system.volumes, 1, 2)
    assert sha256(download(replicas_of(system, b"/large")[0])) == value.sha256()


def spoil(file: Path) -> None:
    """The same size, other bytes."""
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


def test_rebalance_repairs_from_a_good_copy_what_is_missing_or_wrong(cluster: Make) -> None:
    system = cluster()
    values = values_of(["/missing", "/short", "/bent", "/both", "/none", "/whole"])
    values["/both"] = blob("both", 300_000)
    store_all(system, values)
    del values["/none"]
    for name, hurt in (("/missing", Path.unlink), ("/bent", spoil), ("/both", spoil)):
        hurt(files_of(system, name)[0][2])
    for number in range(2):
        files_of(system, "/short")[number][2].write_bytes(b"short of bytes"[:number])
    files_of(system, "/both")[2][2].unlink()
    for _, _, file in files_of(system, "/none"):
        file.unlink()
    done = run(system, "rebalance", status=1)
    assert [each["key"] for each in done.findings] == ["/none"] and done.kinds() == {"failed"}
    for name in ("/missing", "/short", "/whole"):
        assert_copies(system, name, values[name])
    assert sorted(copies(system, "/both").values()).count(values["/both"]) >= 2
    done = run(system, "rebalance", "-deep", status=1)
    assert [each["key"] for each in done.findings] == ["/none"]
    for name, value in values.items():
        assert_copies(system, name, value)
    assert len(system.records()[b"/none"].replicas) == 3  # its files may come back
    assert system.server.call("DELETE", "/none").status == 204
    assert_at_home(system, system.volumes, 3, 10)
    assert run(system, "rebalance", "-deep").findings == []


def test_a_deep_rebalance_of_one_key_replaces_a_rotten_file_and_another_one_does_not(
    cluster: Make,
) -> None:
    system, value = cluster(), blob("/k", 100_000)
    assert system.server.put("/k", value) == 201
    spoil(file_at(system, "/k", 1))
    assert rebalance(system.server, "/k") == 204
    assert sorted(copies(system, "/k").values()).count(value) == 2
    assert rebalance(system.server, "/k?deep") == 204
    assert_copies(system, "/k", value)
    assert rebalance(system.server, "/k?nonsense") == 400
    until(system.is_clean)


def test_without_md5_a_deep_rebalance_spreads_no_rot_and_says_so(cluster: Make) -> None:
    system = cluster()
    values = values_of(["/bent", "/whole"])
    store_all(system, values)
    forget_md5s(system)
    (_, _, bent), *_ = files_of(system, "/bent")
    spoil(bent)
    grow(system, 1)
    replace(system)
    done = run(system, "rebalance", "-deep", status=1)
    assert {each["key"] for each in done.found("failed")} == {"/bent"}
    assert sorted(copies(system, "/bent").values()).count(values["/bent"]) == 2


@pytest.mark.parametrize("hurt", [spoil, lambda file: file.write_bytes(file.read_bytes() + b"x")])
def test_what_was_repaired_is_newer_than_what_was_rotten_to_a_later_rebuild(
    cluster: Make, hurt: Callable[[Path], Any]
) -> None:
    system = cluster("-grace", "1h")  # what was rotten is still there
    values = values_of(f"/k{n}" for n in range(8))
    store_all(system, values)
    for name in values:
        hurt(files_of(system, name)[1][2])
    assert run(system, "rebalance", "-deep", "-grace", "0").findings == []
    system.server.kill()
    without_index(system)
    assert run(system, "rebuild", status=1).kinds() == {"garbage"}
    system.server.start()
    assert_values(system, values)


def test_a_rotten_copy_gives_no_md5_to_a_record_that_had_none(cluster: Make) -> None:
    system = cluster()
    values = values_of(f"/k{n}" for n in range(8))
    store_all(system, values)
    forget_md5s(system)
    for name in values:
        (_, _, rotten), (_, _, missing), _ = files_of(system, name)
        spoil(rotten)
        missing.unlink()
    assert run(system, "rebalance").findings == []
    assert run(system, "rebalance", "-deep", status=1).kinds() == {"failed"}
    for name, value in values.items():
        assert value in copies(system, name).values()


def test_a_move_to_a_volume_that_turns_out_dead_goes_to_the_next(cluster: Make) -> None:
    system = cluster("-replicas", "2", volumes=2)
    values = values_of(f"/k{n}" for n in range(12))
    store_all(system, values)
    grow(system, 3)
    for volume in system.volumes[2:4]:
        volume.kill()
    replace(system, "-replicas", "3")
    done = run(system, "rebalance", status=1)
    assert done.kinds() == {"unbalanced"}
    assert {len(record.replicas) for record in system.records().values()} == {3}
    assert_values(system, values)


def test_a_volume_that_was_lost_leaves_the_records_when_fewer_replicas_are_wanted(
    cluster: Make,
) -> None:
    system = cluster(volumes=3)
    values = values_of(f"/k{n}" for n in range(10))
    store_all(system, values)
    assert system.server.stop() == 0
    system.volumes[2].kill()
    flags = ("-volumes", names_of(system.volumes[:2]), "-replicas", "2")
    assert run(system, "rebalance", *flags).findings == []
    assert {len(record.replicas) for record in system.records().values()} == {2}


def test_rebalance_fills_an_empty_drive_in_the_place_of_a_dead_one(cluster: Make) -> None:
    system = cluster(subvolumes=2)
    values = values_of([*NAMES, *(f"/k{n}" for n in range(30))])
    store_all(system, values)
    system.volumes[1].kill()
    shutil.rmtree(system.volumes[1].folder)
    system.volumes[1].start()
    system.sees(system.volumes[1])
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 2)
    for name, value in values.items():
        assert_copies(system, name, value)


# --- progress, and the end before the end ---------------------------------------------------------


@pytest.mark.parametrize("name", ["rebuild", "rebalance"])
def test_ctrl_c_ends_a_command_at_once_and_it_says_what_is_left(cluster: Make, name: str) -> None:
    system = cluster("-subvolumes", "1", subvolumes=2)
    store_all(system, values_of(f"/k{n}" for n in range(20)))
    assert system.server.stop() == 0
    before = system.tables()
    system.volumes[0].freeze()
    command = Command(system, name, "-voltimeout", "60s")
    until(lambda: connected(command.process, system.volumes[0]))
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(10) == 2
    assert command.wait().kinds() == {"unfinished"}
    assert re.search(rf"{name}.*\d", command.said) and len(command.said.splitlines()) <= 3
    assert name == "rebalance" or system.tables() == before
    system.volumes[0].thaw()
    system.server.start()
    assert_values(system, values_of(f"/k{n}" for n in range(20)))
    replace(system, "-subvolumes", "2")
    assert run(system, "rebalance").findings == []
    until(system.is_clean)


def test_ctrl_c_ends_a_rebalance_beside_a_server_and_the_server_goes_on(cluster: Make) -> None:
    system = cluster("-voltimeout", "20s", volumes=3, subvolumes=2)
    values = values_of(f"/k{n}" for n in range(40))
    store_all(system, values)
    grow(system, 1)
    replace(system)
    system.volumes[3].freeze()
    command = Command(system, "rebalance")
    until(lambda: system.open_intents())
    command.process.send_signal(signal.SIGINT)
    assert command.process.wait(10) == 2
    assert command.wait().kinds() == {"unfinished"}
    system.volumes[3].thaw()
    assert_values(system, values)
    until(lambda: not system.open_intents(), 30)
    assert run(system, "rebalance").findings == []
    assert_at_home(system, system.volumes, 3, 2)


def test_progress_on_a_terminal_is_one_line_that_changes(tmp_path: Path) -> None:
    go, said = threading.Event(), b""
    screen, terminal = os.openpty()
    os.set_blocking(screen, False)

    def more() -> bytes:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(screen, 65536)
        return said

    slow = Puppet(lambda *_: answer_of(404) if go.wait(60) else None)
    command = [sys.executable, HERE / "mkv.py", "rebuild", "-volumes", slow.name]
    command += ["-replicas", "1", "-subvolumes", "1", "-db", tmp_path / "index"]
    command += ["-voltimeout", "60s"]
    with subprocess.Popen(command, stderr=terminal) as process:
        try:
            until(lambda: b"\r" in more() and re.search(rb"\d", said))
            assert b"\n" not in said
        finally:
            go.set()
        assert process.wait(30) == 0
    until(lambda: re.search(rb"rebuild: [^\r\n]*\d[^\r\n]*\r?\n$", more()))
    slow.close()
    os.close(screen)
    os.close(terminal)


@pytest.mark.parametrize("name", ["rebuild", "rebalance"])
@pytest.mark.parametrize("end", ["closed", "full"])
def test_a_command_whose_findings_nobody_takes_does_its_work_and_does_not_end_well(
    cluster: Make, name: str, end: str
) -> None:
    system = cluster(subvolumes=1)
    values = values_of(f"/k{n}" for n in range(20))
    store_all(system, values)
    broken = "/k0"
    for _, _, file in files_of(system, broken):
        file.unlink()
    for number in range(200):
        plant_file(system, system.volumes[0].name, f"/aa/bb/{number}", b"no file of ours")
    file_at(system, "/k1", 0).unlink()
    assert system.server.stop() == 0
    if name == "rebuild":
        without_index(system)
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, HERE / "mkv.py", name, "-volumes", system.names()]
    command += ["-db", system.folder / "index", "-subvolumes", "1", *Cluster.FLAGS]
    out = writing if end == "closed" else full
    ended = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    os.close(full)
    assert ended.returncode in (1, 2) and "Traceback" not in ended.stderr, ended.stderr
    system.server.start()
    if name == "rebalance":
        assert_copies(system, "/k1", values["/k1"])
    else:
        assert len(listed(system.server, "/?list")[0]) == 19


# --- security: locked volumes ---------------------------------------------------------------------

SECRET, EVER = "correct.horse.battery/staple+=", 1 << 33
LOCKED = {"AUTH": "users", "SECRET": SECRET}
VALUE = "/sv00/aa/bb/a+b=-id"


def basic(userpass: str) -> dict[str, str]:
    """The header field of a user with a password."""
    return {"Authorization": "Basic " + base64.b64encode(userpass.encode()).decode()}


ADMIN, STRANGER = basic("admin:pässword"), basic("admin:password")


def signed(path: str, until: int = EVER, secret: str = SECRET) -> str:
    """What nginx's documentation of secure_link says, for the path of a request."""
    md5 = hashlib.md5(f"{until}{path} {secret}".encode()).digest()
    return f"{path}?md5={base64.urlsafe_b64encode(md5).decode().rstrip('=')}&expires={until}"


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Volumes and servers that are started after locked(AUTH="users", …) have that in front."""
    digest = base64.b64encode(hashlib.sha1("pässword".encode()).digest()).decode()
    (tmp_path / "users").write_text(f"admin:{{SHA}}{digest}\n")
    (tmp_path / "users").chmod(0o600)

    def lock(**env: str) -> None:
        for name, value in env.items():
            monkeypatch.setenv(name, str(tmp_path / value) if name == "AUTH" else value)

    lock(MKV_USERPASS="admin:pässword", MKV_SECRET=SECRET)
    return lock


@pytest.fixture
def guarded(locked: Callable[..., None], tmp_path: Path) -> Iterator[Callable[..., Volume]]:
    """Starts a volume: guarded(AUTH="users", …)."""
    started: list[Volume] = []

    def start(**env: str) -> Volume:
        locked(**env)
        started.append(Volume(tmp_path / "volume", *free_ports(1)))
        return started[0]

    yield start
    for volume in started:
        volume.kill()


@pytest.fixture
def vault(guarded: Callable[..., Volume]) -> Volume:
    """A volume with AUTH and SECRET, and the value "value" at VALUE."""
    volume = guarded(**LOCKED)
    assert call(volume.port, "PUT", VALUE, b"value", ADMIN).status == 201
    return volume


def test_a_volume_with_auth_lets_in_who_has_a_password_and_nobody_else(vault: Volume) -> None:
    port, before = vault.port, vault.files()
    for path in (VALUE, "/sv00/aa/bb/other", "/", "/sv00/", "/sv00/aa/bb/"):
        for method in ("GET", "HEAD", *(("PUT", "DELETE") if path[-1] != "/" else ())):
            body = b"stranger" if method == "PUT" else None
            for fields in ({}, STRANGER, basic("nobody:pässword"), {"Authorization": "Basic !"}):
                answer = call(port, method, path, body, fields)
                assert answer.status == 401, (method, path, fields)
                assert answer.fields["www-authenticate"].startswith("Basic ")
                assert b"value" not in answer.body
    assert vault.files() == before
    assert call(port, "GET", VALUE, None, ADMIN).body == b"value"
    assert call(port, "GET", "/sv00/aa/bb/", None, ADMIN).status == 200
    assert call(port, "DELETE", VALUE, None, ADMIN).status == 204


def test_a_signed_link_is_good_for_reading_without_a_password_and_for_nothing_else(
    vault: Volume,
) -> None:
    port, link, before = vault.port, signed(VALUE), vault.files()
    assert call(port, "GET", link).body == b"value"
    assert call(port, "HEAD", link).fields["content-length"] == "5"
    assert call(port, "GET", link, None, {"Range": "bytes=1-2"}).body == b"al"
    assert call(port, "GET", signed("/sv00/aa/bb/none")).status == 404
    for path in (link, signed("/sv00/aa/bb/new")):
        for method in ("PUT", "DELETE", "POST", "MKCOL", "PATCH"):
            answer = call(port, method, path, b"new" if method == "PUT" else None)
            assert answer.status == 401, (method, path)
    assert vault.files() == before and call(port, "GET", link).body == b"value"


def test_a_link_that_is_not_right_is_refused_as_if_it_were_not_signed(vault: Volume) -> None:
    port, now, link = vault.port, int(time.time()), signed(VALUE)
    assert call(port, "PUT", "/sv00/aa/bb/other", b"other", ADMIN).status == 201
    md5 = link.partition("md5=")[2][:22]
    wrong = [signed(VALUE, now - 1), signed(VALUE, 0), signed(VALUE, -1)]  # expired
    wrong += [signed(VALUE, EVER, guess) for guess in ("", SECRET[:-1], SECRET.upper(), "@SECRET@")]
    wrong += [link.replace(f"={EVER}", f"={until}") for until in (EVER + 1, "", "x", f"0{EVER}")]
    wrong += [link.replace(VALUE, p) for p in ("/sv00/aa/bb/other", VALUE + "x", "/sv00/", "/")]
    wrong += [link.replace(md5, p) for p in ("", "x" * 22, md5[:-1], md5 + "A", "1")]
    wrong += [link.replace(md5[:5], md5[:5].swapcase()), link.replace("?", "%3F")]
    wrong += [link.partition("&")[0], VALUE + "?" + link.partition("&")[2]]
    unsigned = call(port, "GET", VALUE)
    assert unsigned.status == 401
    for path in wrong:
        assert path != link
        refused = call(port, "GET", path)
        assert (refused.status, refused.body) == (401, unsigned.body), path
        assert refused.fields["www-authenticate"] == unsigned.fields["www-authenticate"]


def test_a_signed_link_ends_when_it_expires(vault: Volume) -> None:
    link = signed(VALUE, int(time.time()) + 2)
    assert call(vault.port, "GET", link).status == 200
    until(lambda: call(vault.port, "GET", link).status == 401)


def test_without_a_secret_no_link_is_signed_and_a_signature_opens_nothing(
    guarded: Callable[..., Volume],
) -> None:
    volume = guarded(AUTH="users")
    assert call(volume.port, "PUT", VALUE, b"value", ADMIN).status == 201
    for secret in ("", "@SECRET@"):
        assert call(volume.port, "GET", signed(VALUE, EVER, secret)).status == 401


@pytest.mark.parametrize("names", ["AUTH", "AUTH SECRET", "AUTH SECRET ALLOW"])
def test_locks_leave_refusals_and_drives_that_vanished_as_they_are(
    guarded: Callable[..., Volume], names: str
) -> None:
    volume = guarded(**{name: (LOCKED | {"ALLOW": "127.0.0.1"})[name] for name in names.split()})
    for path in (VALUE, "/sv03/aa/bb/x"):
        assert call(volume.port, "PUT", path, b"value", ADMIN).status == 201
    before = volume.files()
    cases = [(403, "DELETE", f"/sv00/{path}") for path in ("", "aa/", "aa/bb/", "aa/bb/.", "x/..")]
    cases += [(403, method, "/.nginx/auth") for method in ("GET", "HEAD", "PUT", "DELETE")]
    cases += [(403, "GET", "/.nginx/nginx.conf"), (403, "PUT", "/sv00/.tmp/x")]
    cases += [(403, "PUT", "/sv00/aa/x/"), (503, "GET", "/sv03/")]
    cases += [(503, method, "/sv03/aa/bb/x") for method in ("GET", "HEAD", "PUT", "DELETE")]
    (volume.folder / "sv03/.sv03").rename(volume.folder / "sv03/away")
    for (status, method, path), fields in itertools.product(cases, (ADMIN, STRANGER, {})):
        for target in (path, signed(path)):
            body = b"x" if method == "PUT" else None
            answer = call(volume.port, method, target, body, fields)
            assert answer.status == status, (method, target, fields)
    assert volume.files() == before


def test_neither_a_password_nor_a_signature_writes_from_an_address_that_may_not(
    guarded: Callable[..., Volume],
) -> None:
    volume = guarded(ALLOW="127.0.0.5", **LOCKED)
    assert call_from("127.0.0.5", volume.port, "PUT", VALUE) == 401
    assert call_from("127.0.0.5", volume.port, "PUT", VALUE, **ADMIN) == 201
    before = volume.files()
    for path in (VALUE, signed(VALUE), "/sv00/aa/bb/new", signed("/sv00/aa/bb/new")):
        for method, fields in itertools.product(("PUT", "DELETE"), (ADMIN, {})):
            assert call_from("127.0.0.6", volume.port, method, path, **fields) == 403
    assert call_from("127.0.0.6", volume.port, "GET", VALUE, **ADMIN) == 200
    assert call_from("127.0.0.6", volume.port, "GET", signed(VALUE)) == 200
    assert volume.files() == before


@pytest.mark.parametrize("user", [None, pytest.param("nobody", marks=needs_root)])
def test_secrets_of_a_volume_are_seen_by_nobody_else(
    locked: Callable[..., None], tmp_path: Path, user: str | None
) -> None:
    locked(**LOCKED)  # the users' file is root's alone, and the workers may be another user
    with foreign_folder() if user else tempfile.TemporaryDirectory() as base:
        folder, (port,) = Path(base) / "volume", free_ports(1)
        for path in (folder, folder / ".nginx"):
            path.mkdir()
            shutil.chown(path, user or os.geteuid())
        old = folder / ".nginx/nginx.conf"
        for path in (old, folder / ".nginx/auth"):
            path.touch(0o644)
        env = os.environ | {"HOST": "127.0.0.1", "PORT": str(port)}
        with (
            (tmp_path / "log").open("wb") as log,
            old.open("rb") as spy,
            subprocess.Popen([HERE / "volume.sh", folder], env=env, stderr=log) as process,
        ):
            try:
                until(lambda: accepts(port))
                assert call(port, "PUT", VALUE, b"value", ADMIN).status == 201
                for fields in (STRANGER, {}, {"Authorization": "Basic !"}):  # no noise about it
                    assert call(port, "GET", VALUE, None, fields).status == 401
                assert SECRET in old.read_text() and spy.read() == b""
                modes = {p.name: p.stat().st_mode & 0o777 for p in (folder / ".nginx").glob("*")}
                assert modes["nginx.conf"] == modes["auth"] == 0o600
                assert old.owner() == Path(f"/proc/{process.pid}").owner()
                for pid in {process.pid} | descendants(process.pid):
                    for name in ("cmdline", "environ"):
                        assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
            finally:
                process.terminate()
        assert (tmp_path / "log").read_bytes() == b""


def test_volume_sh_says_which_lock_does_not_work(
    locked: Callable[..., None], tmp_path: Path
) -> None:
    volume, users = tmp_path / "volume", str(tmp_path / "users")
    (tmp_path / "empty").write_text("\n")
    for path in ("nowhere", "", "empty"):
        said = run_volume_sh(volume, AUTH=f"{tmp_path}/{path}")
        assert f"AUTH={tmp_path}/{path}" in said
    assert "AUTH" in run_volume_sh(volume, SECRET=SECRET)
    for secret in ("short", SECRET + ";", f'{SECRET}"', SECRET + "$uri", SECRET + "\n", "é" * 20):
        said = run_volume_sh(volume, AUTH=users, SECRET=secret)
        assert "SECRET" in said and secret not in said
    assert not volume.exists()


# --- security: a server that demands a password ---------------------------------------------------


class Recorder(socketserver.ThreadingTCPServer):
    """A port in front of another one; `heard` is what came in, connection by connection."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.port, self.heard = port, []
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.name = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, wire: socket.socket, _: object) -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port)) as other,
        ):
            self.heard.append(bytearray())
            back = threading.Thread(target=self.pump, args=(other, wire, bytearray()))
            back.start()
            self.pump(wire, other, self.heard[-1])
            back.join()

    @staticmethod
    def pump(source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                record += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


Recorded = Callable[..., tuple[Cluster, Server, list[Recorder]]]
Recorded = Callable[..., tuple[Cluster, Server, list[Recorder]]]


@pytest.fixture
def recorded(cluster: Make, locked: Callable[..., None]) -> Iterator[Recorded]:
    """A locked-down cluster, its server with -basicauth, and recorders before its volumes."""
    recorders: list[Recorder] = []

    def make(*flags: str, **env: str) -> tuple:
        locked(**LOCKED, ALLOW="127.0.0.1", **env)
        system = cluster()
        assert system.server.stop() == 0
        recorders.extend(Recorder(volume.port) for volume in system.volumes)
        names = ",".join(each.name for each in recorders)
        system.server = system.start(*free_ports(1), "-basicauth", "-volumes", names, *flags)
        return system, system.server, recorders

    yield make
    for recorder in recorders:
        recorder.shutdown()
        recorder.server_close()


KNOWN = [("GET", "/k", 302), ("HEAD", "/k", 302), ("GET", "/none", 404), ("PUT", "/k", 403)]
KNOWN += [("GET", "/?list", 200), ("GET", "/?list&long", 200), ("GET", "/?garbage", 200)]
KNOWN += [("GET", "/?metrics", 200), ("GET", "/?snapshot", 200), ("GET", "/?nonsense", 400)]
KNOWN += [("GET", "/k?health", 302), ("GET", "/?health&list", 400), ("REBALANCE", "/k", 204)]
KNOWN += [("REBALANCE", "/k?deep", 204), ("UNLINK", "/k", 204), ("GET", "/?unlinked", 200)]
KNOWN += [("DELETE", "/k", 204)]


def test_basicauth_lets_in_who_has_a_password_and_nobody_else(recorded: Recorded) -> None:
    system, server, _ = recorded()
    assert server.call("PUT", "/k", b"value", **ADMIN).status == 201
    before = system.files()
    strangers = [{}, STRANGER, basic(""), {"Authorization": "Bearer x"}, {"Authorization": "Basic"}]
    strangers += [{"Authorization": ADMIN["Authorization"] + tail} for tail in ("A", ", Basic x")]
    strangers += [basic(each) for each in ("admin", "admin:", ":pässword", "admin:pässword,")]
    strangers += [basic(each) for each in ("admin:pässwor", "Admin:pässword", "admin:pässword\n")]
    for fields, (method, path, _) in itertools.product(strangers, KNOWN):
        answer = server.call(method, path, b"x" if method == "PUT" else None, **fields)
        assert answer.status == 401, (method, path, fields)
        assert answer.fields["www-authenticate"].startswith('Basic realm="mkv"')
    assert system.files() == before
    for method, path, status in KNOWN:
        answer = server.call(method, path, b"x" if method == "PUT" else None, **ADMIN)
        assert answer.status == status, (method, path)


def test_clients_may_have_passwords_that_the_volumes_do_not_know(recorded: Recorded) -> None:
    _, server, _ = recorded(MKV_CLIENTS="anna:one,bernd:zwö:drei")
    assert server.call("PUT", "/k", b"value", **basic("anna:one")).status == 201
    assert follow(server.call("GET", "/k", **basic("bernd:zwö:drei"))).body == b"value"
    for userpass in ("admin:pässword", "anna:zwö:drei", "anna:one,bernd:zwö:drei", "bernd:zwö"):
        assert server.call("GET", "/k", **basic(userpass)).status == 401, userpass
    for spelling in ("basic", "BASIC"):  # RFC 9110, 11.1
        field = basic("anna:one")["Authorization"].replace("Basic", spelling)
        assert server.call("GET", "/k", Authorization=field).status == 302


def test_basicauth_without_any_password_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MKV_CLIENTS", "MKV_USERPASS"):
        monkeypatch.delenv(name, raising=False)
    flags = ("-volumes", "127.0.0.1:1", "-replicas", "1", "-bind", "127.0.0.1", "-basicauth")
    flags += ("-db", "index")
    for clients in ("", ",", "anna"):
        monkeypatch.setenv("MKV_CLIENTS", clients)
        said = error_of("server", *flags, "-port", str(*free_ports(1)), folder=tmp_path)
        assert "basicauth" in said or "MKV_CLIENTS" in said


def test_credentials_are_checked_without_a_volume(recorded: Recorded) -> None:
    system, server, recorders = recorded()
    for volume in system.volumes:
        volume.kill()
    assert server.call("GET", "/none", **ADMIN).status == 404
    assert server.call("GET", "/none", **STRANGER).status == 401
    told = b"".join(bytes(each) for recorder in recorders for each in recorder.heard)
    assert b"login" not in told and STRANGER["Authorization"].encode() not in told


def test_health_needs_no_password(recorded: Recorded) -> None:
    _, server, _ = recorded()
    for fields in ({}, STRANGER, ADMIN):
        assert server.call("GET", "/?health", **fields).status == 200


def test_a_put_without_a_password_gets_no_100(recorded: Recorded) -> None:
    _, server, _ = recorded()
    fields = f"Content-Length: {9 * MB}\r\nExpect: 100-continue\r\n"
    login = f"Authorization: {ADMIN['Authorization']}\r\n"
    for credentials, status in (("", 401), (login, 100)):
        with Wire(server.port) as wire:
            wire.send(request("PUT", "/big", b"", fields + credentials))
            assert wire.head()[0] == status


def test_every_request_of_a_connection_needs_a_password(recorded: Recorded) -> None:
    _, server, _ = recorded()
    login = f"Authorization: {ADMIN['Authorization']}\r\n"
    with Wire(server.port) as wire:
        for credentials, status in ((login, 404), ("", 401), (login, 404), ("", 401)):
            wire.send(request("GET", "/none", b"", credentials))
            assert wire.answer().status == status


def test_many_spellings_of_a_password_leave_little_in_memory(recorded: Recorded) -> None:
    _, server, _ = recorded()

    def send(count: int) -> int:
        """Memory of the server in bytes after so many requests."""
        with Wire(server.port) as wire:
            for number in range(count):
                proof = base64.b64encode(f"admin:{'A' * 9000}{number}".encode()).decode()
                wire.send(request("GET", "/none", b"", f"Authorization: Basic {proof}\r\n"))
                assert wire.answer().status == 401
        return anonymous_memory(server.process.pid)

    before = send(200)
    assert send(1500) - before < 8 * MB


def test_curl_reads_from_a_locked_down_cluster_without_showing_its_password_to_a_volume(
    recorded: Recorded,
) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    system, server, recorders = recorded()
    command = ["curl", "-sS", "--fail-with-body", "-u", "admin:pässword", "-A", "the-client"]
    url = f"http://127.0.0.1:{server.port}/k%20é"
    secrets = [secret.encode() for secret in ("pässword", ADMIN["Authorization"][6:], SECRET)]
    value = blob("curl", 2 * MB)
    subprocess.run([*command, "-T", "-", url], input=value, check=True, timeout=60)
    ended = subprocess.run([*command, "-L", "-v", url], capture_output=True, timeout=60)
    assert ended.stdout == value, ended.stderr
    shown = b"".join(line for line in ended.stderr.splitlines() if line[:2] == b"< ")
    assert b"Location: http://127.0.0.1:" in shown and b"@" not in shown
    assert not [secret for secret in secrets if secret in shown]
    told = [bytes(each) for recorder in recorders for each in recorder.heard]
    clients = [each for each in told if b"User-Agent: the-client" in each]
    assert len(clients) == 1 and b"authorization" not in clients[0].lower()
    assert not [secret for secret in secrets if secret in clients[0]]
    assert [each for each in told if ADMIN["Authorization"].encode() in each]  # the server's
    for wrong in (["-u", "admin:x"], ["-u", ":"]):
        ended = subprocess.run([*command, *wrong, "-L", url], capture_output=True, timeout=60)
        assert ended.returncode == 22 and value not in ended.stdout
    subprocess.run([*command, "-X", "DELETE", url], check=True, timeout=60)
    until(lambda: not system.files())


def test_redirects_are_good_for_an_hour(recorded: Recorded) -> None:
    _, server, _ = recorded()
    assert server.call("PUT", "/k", b"value", **ADMIN).status == 201
    began, answer = time.time(), server.call("GET", "/k", **ADMIN)
    expires = int(answer.fields["location"].rpartition("=")[2])
    assert began - 1 < expires - 3600 <= time.time()
    assert follow(answer).body == b"value"


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_userpass_is_what_the_volumes_are_shown(
    cluster: Make, locked: Callable[..., None], way: str
) -> None:
    locked(**LOCKED, MKV_USERPASS="admin:wrong" if way == "flag" else "admin:pässword")
    system = cluster(*(("-userpass", "admin:pässword") if way == "flag" else ()))
    for path, size in (("/small", 10), ("/large", MB)):
        assert system.server.put(path, blob(path, size)) == 201
        assert system.server.get(path) == blob(path, size)
        assert system.server.call("DELETE", path).status == 204
    until(lambda: system.is_clean() and not system.files())


def test_a_put_with_a_wrong_userpass_is_503_and_says_why(
    cluster: Make, locked: Callable[..., None]
) -> None:
    locked(**LOCKED)
    system = cluster("-userpass", "admin:wrong")
    for path, size in (("/small", 10), ("/large", 9 * MB)):
        answer = system.server.call("PUT", path, bytes(size))
        assert answer.status == 503, answer
        assert path == "/large" or b"401" in answer.body, answer
    assert not system.files() and not system.records()


@pytest.mark.parametrize("way", ["flag", "environment"])
@pytest.mark.parametrize("beside", ["a server", "nobody"])
def test_rebuild_and_rebalance_work_on_locked_volumes(
    cluster: Make,
    locked: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    beside: str,
) -> None:
    locked(**LOCKED)
    system = cluster("-basicauth", subvolumes=2)
    system.server.login = "admin:pässword"
    values = values_of([f"/k{number}" for number in range(20)] + NAMES)
    for name, value in values.items():
        assert system.server.put(quote(name), value) == 201
    if way == "flag":
        monkeypatch.setenv("MKV_USERPASS", "admin:wrong")
    flags = ("-userpass", "admin:pässword") if way == "flag" else ()
    file_at(system, "/k1", 0).unlink()
    assert beside == "a server" or system.server.stop() == 0
    assert run(system, "rebalance", *flags).findings == []
    assert run(system, "rebalance", *flags, "-deep").findings == []
    assert_copies(system, "/k1", values["/k1"])
    assert beside == "nobody" or system.server.stop() == 0
    before = {key: set(record.replicas) for key, record in system.records().items()}
    without_index(system)
    run(system, "rebuild", *flags)
    assert {key: set(record.replicas) for key, record in system.records().items()} == before


@pytest.mark.parametrize("name", ["rebuild", "rebalance"])
@pytest.mark.parametrize("userpass", ["admin:wrong", ""])
def test_a_command_without_the_right_password_changes_nothing_and_says_401(
    cluster: Make, locked: Callable[..., None], name: str, userpass: str
) -> None:
    locked(**LOCKED)
    system = cluster(subvolumes=2)
    store_all(system, values_of(f"/k{number}" for number in range(5)))
    assert system.server.stop() == 0
    before = state(system)
    done = Command(system, name, "-userpass", userpass).wait()
    assert done.status in (1, 2) and "401" in done.said + json.dumps(done.findings)
    assert done.kinds() <= {"unfinished", "unreachable", "failed"}  # nothing is called missing
    assert state(system) == before


def test_a_rebalance_that_the_server_does_not_let_in_says_401(
    cluster: Make, locked: Callable[..., None]
) -> None:
    locked(**LOCKED)
    system = cluster("-basicauth", subvolumes=2)
    system.server.login = "admin:pässword"
    assert system.server.put("/k", b"value") == 201
    before = state(system)
    done = Command(system, "rebalance", "-userpass", "admin:wrong").wait()
    assert done.status == 2 and "log in" in done.said + json.dumps(done.findings)
    assert state(system) == before


# --- security: no more connections than there is room for -----------------------------------------


def enter(port: int) -> Wire | None:
    """A connection that is served, and stays; None when it is refused."""
    wire = Wire(port)
    with contextlib.suppress(OSError, IndexError):  # reset, or closed without an answer
        wire.send(request("GET", "/?health"))
        if wire.answer().status == 200:
            return wire
    wire.__exit__()
    return None


ROOM = 200  # descriptors of a server: half of them are for connections


def fill_up(stack: contextlib.ExitStack, server: Server) -> list[Wire]:
    """As many connections as are served."""
    wires = []
    while wire := enter(server.port):
        wires.append(stack.enter_context(wire))
    assert ROOM // 2 - 2 <= len(wires) <= ROOM // 2
    return wires


def test_a_connection_too_many_is_503_before_it_says_a_word(cluster: Make) -> None:
    server = cluster(nofile=ROOM).server
    with contextlib.ExitStack() as stack:
        fill_up(stack, server)
        for _ in range(20):
            silent = stack.enter_context(Wire(server.port))
            answer = silent.answer()
            assert (answer.status, answer.fields["connection"]) == (503, "close")
            assert answer.body.count(b"\n") == 1 and b"connections" in answer.body
            assert silent.closed()


def test_who_sends_50_mb_on_a_connection_too_many_reads_the_503(cluster: Make) -> None:
    server = cluster(nofile=ROOM).server
    with contextlib.ExitStack() as stack:
        inside, *_ = fill_up(stack, server)
        outside = stack.enter_context(Wire(server.port))
        outside.send(request("PUT", "/k", bytes(50 * MB)))  # fails if it is reset
        assert outside.answer().status == 503
        assert outside.closed()
        inside.send(request("GET", "/k"))
        assert inside.answer().status == 404


def test_when_a_connection_ends_the_next_one_is_taken(cluster: Make) -> None:
    server = cluster(nofile=ROOM).server
    with contextlib.ExitStack() as stack:
        wires = fill_up(stack, server)
        for wire in wires[:5]:
            wire.__exit__()
            stack.enter_context(until(lambda: enter(server.port)))
            assert not enter(server.port)


def test_what_is_under_way_goes_on_when_no_more_connections_are_taken(cluster: Make) -> None:
    system = cluster(nofile=ROOM)
    server, value = system.server, blob("value", 4 * MB)
    with contextlib.ExitStack() as stack:
        upload = Upload(server.port, "/k", len(value))
        upload.send(value[:MB])
        until(lambda: system.open_intents() == 1)
        kept, *_ = fill_up(stack, server)[:-1]
        for _ in range(30):
            assert not enter(server.port)
        upload.send(value[MB:])
        kept.send(request("GET", "/none"))
        assert kept.answer().status == 404
        assert upload.answer() == 201
        kept.send(request("GET", "/k"))
        assert kept.answer().status == 302
    until(lambda: server.metric("mkv_connections") <= 1)
    assert_copies(system, "/k", value)


def test_a_server_that_runs_out_of_descriptors_blames_no_volume_and_recovers(
    cluster: Make,
) -> None:
    system = cluster(nofile=ROOM)
    server = system.server
    with contextlib.ExitStack() as stack:
        wires = fill_up(stack, server)  # a PUT on each needs three more: there are not so many
        for number, wire in enumerate(wires):
            wire.send(request("PUT", f"/k{number}", b"value", "X: 1\r\n")[:-2])
        for wire in wires:
            wire.send(b"ue")
        found = [wire.answer().status for wire in wires]
        assert set(found) <= {201, 503} and 201 in found
    until(lambda: server.metric("mkv_connections") <= 1)
    assert server.metric("mkv_volumes_up") == 3 and not lines(server, "is down")
    assert [server.put(f"/new{number}", b"value") for number in range(20)] == [201] * 20
    for number, status in enumerate(found):
        assert server.get(f"/k{number}") == (b"value" if status == 201 else None)
    until(system.is_clean)


def test_a_crowd_that_is_refused_does_not_take_the_open_files_of_those_that_are_served(
    cluster: Make,
) -> None:
    server = cluster(nofile=ROOM, constants={"LINGER_TIME": 60}).server
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(until(lambda: enter(server.port)))
        for _ in range(2 * ROOM):
            address = "127.0.0.1", server.port
            stack.enter_context(socket.create_connection(address, timeout=30))
        kept.send(request("GET", "/none"))  # by the answer to which all those are accepted
        assert kept.answer().status == 404
        until(lambda: descriptors(server) < ROOM - 20)
        kept.send(request("PUT", "/k", b"value"))
        assert kept.answer().status == 201


def test_sigterm_in_a_crowd_lets_an_upload_finish(cluster: Make) -> None:
    system, value = cluster(nofile=128), blob("value", 2 * MB)
    upload = Upload(system.server.port, "/k", len(value))
    upload.send(value[:MB])
    until(lambda: system.open_intents() == 1)
    with contextlib.ExitStack() as stack:
        system.server.process.send_signal(signal.SIGSTOP)
        for _ in range(300):  # they wait to be accepted
            wire = stack.enter_context(socket.socket())
            wire.connect(("127.0.0.1", system.server.port))
        system.server.process.send_signal(signal.SIGTERM)
        system.server.process.send_signal(signal.SIGCONT)
        upload.send(value[MB:])
        assert upload.answer() == 201
        assert system.server.process.wait(30) == 0
    assert "Traceback" not in system.server.log.read_text()


@pytest.mark.parametrize("flood", ["requests", "trailers"])
def test_who_never_stops_asking_holds_nobody_up(system: Cluster, flood: str) -> None:
    port, over = system.server.port, threading.Event()
    piece = request("GET", "/?health") * 5000 if flood == "requests" else b"X: y\r\n" * 20_000

    def endless(number: int) -> None:
        with contextlib.suppress(OSError), Wire(port) as wire:
            if flood == "trailers":
                put = request("PUT", f"/t{number}", b"", CHUNKED)
                wire.send(put + b"5\r\nvalue\r\n0\r\n")
            reader = threading.Thread(target=read_all, args=(wire.socket,))
            reader.start()
            while not over.is_set():
                wire.send(piece)
            wire.socket.shutdown(socket.SHUT_RDWR)
            reader.join()

    def read_all(wire: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while wire.recv(1 << 20):
                pass

    floods = [threading.Thread(target=endless, args=(number,)) for number in range(3)]
    deadline = threading.Timer(20, over.set)
    for each in (*floods, deadline):
        each.start()
    try:
        for number in range(10):
            assert system.server.put(f"/fair{number}", b"value") == 201
            assert system.server.call("DELETE", f"/fair{number}").status == 204
        assert not over.is_set(), "answered only when the flood was over"
    finally:
        over.set()
        deadline.cancel()
        for each in floods:
            each.join()


def test_a_limit_of_open_files_beyond_all_bounds_is_no_obstacle(cluster: Make) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = cluster(nofile=hard).server
    assert server.put("/k", b"value") == 201


# --- security: limits, names ----------------------------------------------------------------------


def test_a_head_may_have_a_hundred_fields_and_not_one_more(system: Cluster) -> None:
    for count, status in ((100, 404), (101, 431)):
        fields = "".join(f"X-{number}: y\r\n" for number in range(count - 2)) + CLOSE
        data = request("GET", "/none", b"", fields)
        assert statuses(raw(system.server.port, data)) == [status], count


def test_trailers_without_end_are_431(system: Cluster) -> None:
    trailers = b"X: y\r\n" * 1000
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/k", b"", CHUNKED) + b"5\r\nvalue\r\n0\r\n")
        wire.socket.settimeout(0.01)
        status = b""
        while not status:
            with contextlib.suppress(TimeoutError):
                wire.send(trailers)
            with contextlib.suppress(TimeoutError):
                status = wire.socket.recv(12)
        assert status == b"HTTP/1.1 431"
    assert system.server.get("/k") is None
    until(system.is_clean)


NASTY = (
    ".. . / // \\ %2e%2e %252e%252e %00 \0 \r\n \x7f ~ - = + @ ? # & ; : \" ' * $( ` é 😀 \ufeff"
)
NASTY += " svFF .tmp .nginx -/ -6b0108907bf79949 aGVsbG8= a b ../../../etc/passwd " + "k" * 99
PIECES = [*NASTY.split(" "), " ", "\n"]
STORED = re.compile(r"/[0-9a-f]{2}/[0-9a-f]{2}(/[A-Za-z0-9+=]+-?)*/[A-Za-z0-9+=]*-[0-9a-f]{16}")


def nasty(chance: random.Random, most: int) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randint(1, most)))


def test_no_two_nasty_keys_share_a_file_or_stand_in_each_others_way() -> None:
    chance, keys, folders = random.Random(5), {}, set()
    for _ in range(6_000):
        for key in (("/" + nasty(chance, 12)).encode()[:511], random_key(chance)):
            path = mkv.key2path(key, WRITE_ID)
            assert STORED.fullmatch(path) and all(len(part) <= 255 for part in path.split("/")), key
            assert mkv.path2key(path) == (key, WRITE_ID) and keys.setdefault(path, key) == key
            folders |= set(itertools.accumulate(path.split("/")[:-1], "{}/{}".format))
            (location,) = mkv.key2volume(key, ["v:1"], 1, 256)
            assert re.fullmatch("v:1/sv[0-9A-F]{2}", location)
    assert len(keys) > 9_000 and not folders & set(keys)


def test_no_path_is_taken_for_the_file_of_a_key_that_has_another() -> None:
    chance, taken = random.Random(6), 0
    for _ in range(15_000):
        path = mkv.key2path(random_key(chance), chance.choice(("", WRITE_ID)))
        for _ in range(chance.randint(0, 2)):
            cut, end = sorted(chance.choices(range(len(path) + 1), k=2))
            odd = chance.choice(("", nasty(chance, 2), "/../", path[cut:]))
            path = path[:cut] + odd + path[end:]
        with contextlib.suppress(ValueError):
            key, write_id = mkv.path2key(path)
            assert mkv.key2path(key, write_id) == path and ".." not in path.split("/")
            taken += 1
    assert 1500 < taken < 13_500


def test_nasty_keys_are_stored_each_in_a_file_of_its_own(system: Cluster) -> None:
    chance, values, before = random.Random(7), {}, system.files()
    outside = {path for path in system.folder.rglob("*") if ".nginx" not in str(path)}
    for number in range(150):
        text = "/" + nasty(chance, 8)
        if number % 2:  # some bytes as they are, the rest escaped, some twice
            text = "/nasty" + "".join(chance.choice((c, quote(c))) for c in text)
        target = re.sub(r"[?#%\x00-\x20\x7f-\U0010ffff]", lambda c: quote(c[0]), text)
        key = unquote_to_bytes(target)
        if len(key) > 1 and key not in values:
            put = request("PUT", target, b"%d" % number, CLOSE)
            assert statuses(raw(system.server.port, put)) == [201], target
            values[key] = target, b"%d" % number
    assert len(values) > 100
    files = system.files() - before
    assert len(files) == 3 * len(values)
    assert all(STORED.fullmatch(re.sub(r"^[0-9.:]+/sv0[0-9]", "", path)) for path in files)
    new = {path for path in system.folder.rglob("*") if ".nginx" not in str(path)} - outside
    drives = re.compile(r"volume\d/sv0\d/[0-9a-f]{2}(/.*)?")
    assert all(drives.fullmatch(str(path.relative_to(system.folder))) for path in new)
    for key, (target, value) in values.items():
        got = raw(system.server.port, request("GET", target, b"", CLOSE))
        location = re.search(rb"\r\nLocation: http://127.0.0.1:(\d+)([\x21-\x7e]+)\r\n", got)
        assert call(int(location[1]), "GET", location[2].decode()).body == value, key
        delete = request("DELETE", target, b"", CLOSE)
        assert statuses(raw(system.server.port, delete)) == [204]
    until(lambda: system.files() == before)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
