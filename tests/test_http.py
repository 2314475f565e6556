"""HTTP: the parser, the protocol, lists, connections; clients that are odd, slow, gone or many."""

import ast

# ruff: noqa: F403, F405
from harness import *

LAST = request("GET", "/?health", b"", CLOSE)
GET, PUT = (f"{verb} /k HTTP/1.1\r\nHost: x\r\n" for verb in ("GET", "PUT"))


def kept(*flags: str, **settings: Any) -> Any:
    """A fixture: a cluster for many tests, of which nothing may have leaked at the end."""

    @pytest.fixture(scope="module")
    def fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
        made = Cluster(tmp_path_factory.mktemp("kept"), *flags, **settings)
        try:
            yield made
            until(made.is_clean)
        finally:
            made.close()

    return fixture


ONE, ROOM = {"volumes": 1, "subvolumes": 1}, 200
HASTE = {"HEAD_TIME": 0.7, "BODY_TIME": 1, "IDLE_TIME": 1.5}
single = kept("-replicas", "1", **ONE)  # for tests that ask much
hasty = kept("-replicas", "1", constants=HASTE, **ONE)  # with little patience for its clients
crowded = kept(nofile=ROOM, constants={"LINGER_TIME": 60})  # half of it is for connections
MANY = [b"/many/%06d/some-name-of-middling-length.jpeg" % number for number in range(400_000)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server with many keys, of which no file is there, and with as much room as there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    made = Cluster(tmp_path_factory.mktemp("large"), "-voltimeout", "1s", nofile=hard)
    made.server.stop()
    plant(made.server.db, [(key, b"127.0.0.1:1/sv00 5 0123456789abcdef") for key in MANY])
    plant(made.server.db, [(b"/of-old", b"127.0.0.1:1/sv00")])
    made.server.start()
    assert made.server.put("/there", b"value") == 201
    yield made
    made.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- heads and bodies: what is taken --------------------------------------------------------------


TAKEN = [  # a head, the length of its body (None: in chunks), whether no other request follows
    *[(GET + fields, 0, False) for fields in ("", "X:\r\n" * 99, f"X: {'x' * 16_300}\r\n")],
    *[(GET.replace("/k", path), 0, False) for path in ("http://x:80/k?", "/%6b?k")],
    *[(f"{GET}Connection: {x}\r\n", 0, True) for x in ("close", "x ,\tClose", "close\t, x")],
    (GET + "Connection: closed\r\n", 0, False),
    ("GET /k HTTP/1.0\r\n", 0, True),
    (PUT + "Content-Length: 007\r\n", 7, False),
    (PUT + "Content-Length: 1\r\nExpect: 200-ok\r\n", 1, False),
    (PUT + CHUNKED, None, False),
    (PUT + "transfer-encoding:  Chunked \r\n", None, False),
    ("PUT /k HTTP/1.0\r\nContent-Length: 1\r\nExpect: 100-continue\r\n", 1, True),
]


def brief(value: object) -> str | None:
    """The end of a long text, to name a test."""
    return ascii(value)[-40:] if isinstance(value, str | bytes) else None


@pytest.mark.parametrize(("head", "length", "close"), TAKEN, ids=brief)
def test_a_head_says_what_follows(single: Cluster, head: str, length: Any, close: bool) -> None:
    data = head.encode() + b"\r\n"
    parsed = mkv.parse_request(data)
    assert (parsed.key, parsed.length, parsed.close) == (b"/k", length, close)
    data += b"1\r\nx\r\n0\r\n\r\n" if length is None else bytes(length)
    answers = [404 if length == 0 else 201] + [200] * (not close)
    assert statuses(raw(single.server.port, data + LAST)) == answers
    single.server.call("DELETE", "/k")


def half_closed(port: int, data: bytes) -> bytes:
    """What is answered to a client that says all, and that it has no more to say."""
    with Wire(port) as wire, contextlib.suppress(ConnectionError):
        with contextlib.suppress(ConnectionError):
            wire.send(data)
            wire.socket.shutdown(socket.SHUT_WR)
        return wire.file.read()
    return b""


def in_pieces(port: int, *pieces: bytes) -> bytes:
    """What is answered to pieces, each of which was read before the next one comes."""
    with Wire(port) as wire, Wire(port) as other:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # refused, and closed, before the last
            for piece in pieces:
                wire.send(piece)
                other.send(request("GET", "/?health"))  # in the same loop, and later
                assert other.answer().status == 200
        return wire.file.read()


def proof(value: bytes) -> str:
    """The field with which no other body is taken."""
    return f"Content-MD5: {hashlib.md5(value).hexdigest()}\r\n"


BODY, LETTERS = b"0\r\n\r\nGET /x", b"abcde0123456789"
ODDLY = b'5;name="va;lue"\r\nabcde\r\n00A \r\n0123456789\r\n0;x\r\nTrailer: 1\r\nAnother:\r\n\r\n'
PUTS = request("PUT", "/b", BODY, proof(BODY)), request("PUT", "/c", b"", CHUNKED + proof(LETTERS))
DELETES = request("DELETE", "/b"), request("DELETE", "/c", b"", CLOSE)
STREAMS = {
    (201, 302, 204, 200): PUTS[0] + request("HEAD", "/b?x") + b"\r\n\r\n" + DELETES[0] + LAST,
    (201, 204): PUTS[1] + ODDLY + DELETES[1],
    (404, 400): request("GET", "/k") + b"GET /k HTTP/1.1\nHost: x\r\n\r\n" + SMUGGLED,
    (400,): f"{PUT}{CHUNKED}\r\n3\r\nabcd\r\n0\r\n\r\n".encode() + SMUGGLED,
}


@pytest.mark.parametrize("expected", STREAMS)
def test_a_stream_means_the_same_wherever_it_is_cut(single: Cluster, expected: tuple) -> None:
    stream, chance = STREAMS[expected], random.Random(1)
    whole = range(1, len(stream))
    cuts = [[cut] for cut in whole] + [list(whole[::step]) for step in (1, 2, 3, 7, 50)]
    cuts += [sorted(chance.sample(whole, chance.randrange(2, 20))) for _ in range(50)]
    for cut in cuts:
        pieces = [stream[start:end] for start, end in itertools.pairwise([0, *cut, len(stream)])]
        assert statuses(in_pieces(single.server.port, *pieces)) == [*expected], cut
    assert single.server.get("/smuggled") is None


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_empty_line_before_each_of_many_requests_is_no_error(
    single: Cluster, method: str
) -> None:
    with Wire(single.server.port) as wire:
        for _ in range(15):
            wire.send(b"\r\n")
            assert single.server.call("GET", "/?health").status == 200  # by when that was read
            wire.send(request(method, "/missing"))
            assert wire.head()[0] == 404


@pytest.mark.parametrize("fields", ["", CLOSE, f"X: {'x' * 2000}\r\n", "X: y\r\n z\r\n"])
@pytest.mark.parametrize("path", ["/there", "/missing", "/%FF", "/", "/?health", "/?list", "/k?x"])
def test_an_answer_is_the_same_in_all_ways(single: Cluster, path: str, fields: str) -> None:
    port = single.server.port
    single.server.put("/there", b"value")
    for verb in ("GET", "HEAD"):
        data = request(verb, path, b"", fields)
        ways = [data, LAST], [data + LAST], [data[:9], data[9:] + LAST]
        assert len({in_pieces(port, *way) for way in ways}) == 1
    get, head = (raw(port, request(verb, path, b"", fields + CLOSE)) for verb in ("GET", "HEAD"))
    assert head == get[: get.index(b"\r\n\r\n") + 4]


# --- what is refused ------------------------------------------------------------------------------

LINES = ["GET /k", "GET k HTTP/1.1", "GET  /k HTTP/1.1", "GET /k  HTTP/1.1", "GET /k k HTTP/1.1"]
LINES += ["GET /k\r HTTP/1.1", "GET /k HTTP/1.1 ", "\nGET /k HTTP/1.1", " GET /k HTTP/1.1"]
LINES += ["get /k HTTP/1.1", "GET /k HTTQ/1.1", "GET /k HTTP/2.0", "GET /k#x HTTP/1.1"]
LINES += [f"GET /{key} HTTP/1.1" for key in ("%FF", "%C3", "a%ED%A0%80", "%", "%4", "%zz", "\xff")]
LINES += ["GET\t/k HTTP/1.1", "GET /k?\0 HTTP/1.1", "PUT /%FF HTTP/1.1", "GET /%FF?list HTTP/1.1"]
FIELDS = ["X: a\rb", "X: a\nb", "X: a\0b", "X: a\x7fb", "\n", "\r", "X: y\r", "X: y\n"]
FIELDS += ["X: a\r\n b", "X: a\r\n\tb", " X: y"]  # folded
FIELDS += ["Content-Length : 3", "Transfer-Encoding\t: chunked", "X Y: z", "x", ": y", "é: y"]
FIELDS += ["Host: y"]  # the second
LENGTHS = ["+3", "-3", "0x3", "3 3", "3;", "3.0", "1e3", "", "x", "9" * 30, "\xb3", "3, 4", "3_0"]
LENGTHS += ["3\r\ncontent-length: 4", f"3\r\n{CHUNKED[:-2]}"]
CODINGS = ["gzip, chunked", "chunked, gzip", "gzip", "identity", "xchunked", "", "chunked;q=1"]
CODINGS += ["chunked\r\nTransfer-Encoding: chunked"]
HEADS = [(400, f"{line}\r\nHost: x\r\n") for line in LINES]
HEADS += [(400, f"{GET}{field}\r\n") for field in FIELDS]
HEADS += [(400, f"{PUT}Content-Length: {length}\r\n") for length in LENGTHS]
HEADS += [
    (400, "GET /k HTTP/1.1\r\n"),  # no Host
    (400, "GET /k HTTP/1.1\r\n Host: x\r\nHost: x\r\n"),
    (400, "GET /k HTTP/1.1\nHost: x\n\n\r\n"),
    (400, "PUT /k HTTP/1.0\r\n" + CHUNKED),
    (400, f"{PUT}{CHUNKED}Content-Length: 3\r\n"),
    (405, GET.replace("GET", "GETS")),
    (414, GET.replace("/k", "/" + "k" * 511)),
    (431, GET + "X:\r\n" * 100),
]
HEADS += [(501, f"{PUT}Transfer-Encoding: {coding}\r\n") for coding in CODINGS]
BODIES = ["x\r\nabc\r\n", "-3\r\nabc\r\n", "+3\r\nabc\r\n", "0x3\r\nabc\r\n", " 3\r\nabc\r\n"]
BODIES += ["\r\nabc\r\n", "3 3\r\nabc\r\n", "3_\r\nabc\r\n", "fffffffffffffffff\r\nabc\r\n"]
BODIES += ["3\nabc\r\n", "3\r\nabc\n", "3\r\nabcd\r\n", "3\r\nab\r\n", "3;x=\ry\r\nabc\r\n"]
BODIES += ["3;x=\ny\r\nabc\r\n", "3;\0\r\nabc\r\n", "0\r\nbad trailer\r\n", "0\r\n bad: y\r\n"]
BODIES += ["0\r\nX: y\n\r\n", "3\r\nabcxx"]
ON_THE_WIRE = [(status, head + "\r\n") for status, head in HEADS]
ON_THE_WIRE += [(400, f"{PUT}{CHUNKED}\r\n{body}0\r\n\r\n") for body in BODIES]
ON_THE_WIRE += [  # some of these have no end; of some the end is not read
    (431, "G" * 17_000),
    (431, GET + "X: y\r\n" * 3000),
    (431, f"{PUT}{CHUNKED}\r\n3;{'x' * 17_000}"),
    (431, f"{PUT}{CHUNKED}\r\n0\r\n" + "X: y\r\n" * 101 + "\r\n"),
    (431, f"{PUT}{CHUNKED}\r\n0\r\n" + "X: y\r\n" * 3000),
    (431, f"{PUT}{CHUNKED}\r\n0\r\n" + f"X: {'y' * 9000}\r\n" * 2),
    (400, f"{PUT}{CHUNKED}\r\n3\r\nabcd!\r\n"),
    (404, f"{GET}Content-Length: {len(SMUGGLED)}\r\n\r\n"),
    (404, f"{GET}{CHUNKED}\r\n"),
]


@pytest.mark.parametrize(("status", "head"), HEADS, ids=brief)
def test_the_parser_of_heads_refuses_by_itself(status: int, head: str) -> None:
    data = f"{head}\r\n".encode("latin-1") + SMUGGLED
    with pytest.raises(mkv.HTTPError) as error:
        mkv.parse_request(data[: data.index(b"\r\n\r\n") + 4])  # as it is cut
    assert error.value.status == status


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("status", "data"), ON_THE_WIRE, ids=brief)
def test_nothing_after_it_is_read(single: Cluster, status: int, data: str, alone: bool) -> None:
    for _ in range(2):  # nor is it taken when such a head is known
        with Wire(single.server.port) as wire:
            wire.send(data.encode("latin-1") + SMUGGLED * (not alone))
            answer = wire.answer()
            assert (answer.status, answer.fields["connection"]) == (status, "close")
            wire.send(SMUGGLED)
            assert wire.closed()
    assert single.server.get("/smuggled") is None and single.server.get("/k") is None


ODD = [b"\r", b"\n", b"\0", b" ", b":", b",", b";", b"%", b"\xff", b"\r\n", b"\r\n\r\n", b"0", b"-"]
ODD += [b"9" * 40, b"x" * 500, b"HTTP/1.0", b"Content-Length: 7\r\n", b"Expect: 100-continue\r\n"]
ODD += [CHUNKED.encode(), CLOSE.encode(), b"fffffffffffffff\r\n", b"X: y\r\n" * 120]
ODD += [b"\t", b"\r\n Host: y", b"Host: y\r\n", b"x" * mkv.MAX_HEAD]
REQUESTS = [
    request("GET", "/%41?list&start=%00"),
    request("HEAD", "http://x/e", b"", "X: y\r\n" + CLOSE),
    request("PUT", "/b", b"x" * 50),
    request("PUT", "/c", b"", CHUNKED) + b"5;x=y\r\nabcde\r\n0\r\nTrailer: 1\r\n\r\n",
    b"DELETE /d HTTP/1.0\r\nExpect: 100-continue\r\n\r\n",
]


def mutated(chance: random.Random, data: bytes) -> bytes:
    """The bytes with up to four changes: cut, doubled, or with something odd put in."""
    for _ in range(chance.randrange(5)):
        begin = chance.randrange(len(data) + 1)
        end = begin + chance.choice((0, 0, 1, 1, 2, 40))
        new = chance.choice((chance.choice(ODD), data[begin:end] * 2, b"", chance.randbytes(1)))
        data = data[:begin] + new + data[end:]
    return data


HEAD = re.compile(  # all that may be in one
    rb"[A-Z]+ (http://[^\0-\x20\x7f/?#]*)?/[^\0-\x20\x7f#]* HTTP/1\.[01]\r\n"
    rb"([!#-'*+.0-9A-Z^-z|~-]+:[^\0-\x08\x0a-\x1f\x7f]*\r\n)*\r\n"
)
LENGTH = re.compile(
    rb"^(?:content-length|transfer-encoding):[ \t]*([0-9]{1,18}|(chunked))[ \t]*\r$", re.I | re.M
)


def test_nothing_in_a_head_that_is_taken_can_be_read_in_another_way() -> None:
    chance, taken = random.Random(1), 0
    for _ in range(30_000):
        head = mutated(chance, chance.choice(REQUESTS)).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        with contextlib.suppress(mkv.HTTPError):  # and no other
            found = mkv.parse_request(head)
            lengths = [None if coded else int(length) for length, coded in LENGTH.findall(head)]
            assert HEAD.fullmatch(head) and (lengths or [0]) == [found.length]
            assert 1 <= len(found.key) <= mkv.MAX_KEY and found.key.decode()[0] == "/"
            taken += 1
    assert 3000 < taken < 27_000


def test_no_bytes_surprise_a_server_and_few_are_remembered(single: Cluster) -> None:
    server, chance, ends = single.server, random.Random(2), Counter()
    memory = anonymous_memory(server.process.pid)
    for number in range(600):
        data = mutated(chance, b"".join(chance.choices(REQUESTS, k=2))) + LAST
        ends.update(statuses(half_closed(server.port, data)))
        long = f"X: {number}{'x' * 16_000}\r\n"  # 10 MB of heads in all
        assert statuses(raw(server.port, request("GET", "/none", b"", long + CLOSE))) == [404]
        for path in ("/b", "/c", "/d"):
            server.call("DELETE", path)
    assert set(ends) <= {100, 200, 201, 204, 302, 400, 403, 404, 405, 411, 414, 431, 501}, ends
    assert min(ends[200], ends[400]) > 50, ends
    assert anonymous_memory(server.process.pid) - memory < 6 * MB
    assert "Traceback" not in server.log.read_text()
    for item in list(server.pages("/?list")):
        assert server.call("DELETE", quote(item["key"])).status == 204


# --- linear and fair ------------------------------------------------------------------------------


def expressions() -> set[tuple[str, str | bytes]]:
    """Every regular expression of the system, with each method that tries it."""
    files = [HERE / "mkv.py", *(HERE / "contrib").glob("[!f]*.py")]  # who writes flags is trusted
    code, literal = "".join(file.read_text() for file in files), r"""(r?b?"[^"]*")"""
    found = re.findall(rf"re\.(\w*(?:match|split|sub|search))\(\s*{literal}", code)
    for name, text in re.findall(rf"(\w+) = re\.compile\({literal}", code):
        found += [(method, text) for method in re.findall(rf"\b{name}\.(\w+)\(", code)]
    return {(method, ast.literal_eval(text)) for method, text in found}


RUNS = [*' \t a0A:;,=/%"&?@-.\r\n\0\x01\xff', " \t", "a ", "0,", "a:", "a=", "a;", "\r\n"]
RUNS += ["a: \t\r\n", "%41", "/a", '"a"', "@0", "a.", "0m"]
STARTS = "", "a", "a:", "0;", "GET /", "HTTP/1.1 200 ", "GET /?", "a: b", "HASH"
STOPS = "", "\x01", "\r\n", "\r\n\r\n", "é", " "


def linear(work: Callable[[Any], Any], kind: type) -> None:
    """That 16 KiB of whatever run, with something wrong at its end, take next to no CPU time."""
    for start, run, stop in itertools.product(STARTS, RUNS, STOPS):
        for size in (30, 1000, 16_384):  # what is exponential is seen at once
            text = start + run * (size // len(run)) + stop
            data = text if kind is str else text.encode("latin-1")
            began = time.process_time()
            work(data)
            assert time.process_time() - began < 0.1, (start, run, stop, size)


@pytest.mark.parametrize(("method", "text"), sorted(expressions(), key=str), ids=brief)
def test_no_expression_backtracks(method: str, text: str | bytes) -> None:
    find = getattr(re.compile(text), method)
    linear(functools.partial(find, "") if method == "sub" else find, type(text))


@pytest.mark.parametrize("before", [GET, f"{GET}X:", "GET /", f"{PUT}Connection:", "GET /%"])
def test_a_head_is_parsed_in_no_time(before: str) -> None:
    def parse(data: bytes) -> None:
        with contextlib.suppress(mkv.HTTPError):
            mkv.parse_request(before.encode() + data + b"\r\n\r\n")

    linear(parse, bytes)


FLOODS = {  # what is sent again and again, and whether the answers are read
    "chunks": (request("PUT", "/hog", b"", CHUNKED) + b"1\r\nx\r\n" * 43_000 + b"!\r\n", True),
    "heads": (b"GET /hog HTTP/1.1\r\nHost: x\r\na:" + b" " * 16_300 + b"\x01\r\n\r\n", True),
    "requests": (request("GET", "/there") * 5000, True),
    "trailers": (request("PUT", "/hog", b"", CHUNKED) + b"0\r\n" + b"X: y\r\n" * 40_000, True),
    "empty lines": (b"\r\n" * 130_000, True),
    "lists": (request("GET", "/?list&long"), True),
    "lists that nobody reads": (request("GET", "/?list"), False),
}


def loop_time(server: Server) -> float:
    """Seconds that its event loop has been at work, however busy the machine is."""
    return int(Path(f"/proc/{server.process.pid}/schedstat").read_text().split()[0]) / 1e9


def hog(port: int, number: int, data: bytes, reads: bool, over: threading.Event) -> None:
    """A client that asks for too much, again and again."""
    data = data.replace(b"/hog", b"/hog%d" % number)
    while not over.is_set():
        with contextlib.suppress(OSError), quiet_reader(port, MB if reads else 8192) as wire:
            wire.settimeout(0.3)
            wire.sendall(data)
            while reads and not over.is_set() and wire.recv(MB):
                pass
            over.wait(0 if reads else 60)


@pytest.mark.parametrize("flood", FLOODS)
def test_eight_hogs_keep_nobody_waiting_and_take_no_memory(large: Cluster, flood: str) -> None:
    server, over, times = large.server, threading.Event(), []
    memory, deadline = anonymous_memory(server.process.pid), time.monotonic() + 1.5
    with contextlib.ExitStack() as stack:
        for number in range(8):
            asks = functools.partial(hog, server.port, number, *FLOODS[flood], over)
            stack.callback(in_background(asks).join)
        stack.callback(over.set)
        client = Client(server.port, 10)
        while time.monotonic() < deadline:
            put = "PUT", f"/{quote(flood)}{len(times)}", b"x"
            for status, asked in ((302, ("GET", "/there")), (201, put)):
                began = loop_time(server)
                assert client.call(*asked).status == status
                times.append(loop_time(server) - began)
        assert server.metric("mkv_volumes_up") == 3
        assert anonymous_memory(server.process.pid) - memory < 16 * MB
    assert sorted(times)[len(times) // 2] < 0.2, times
    assert "left alone" not in server.log.read_text()


# --- the protocol ---------------------------------------------------------------------------------

OLD, NEW = hashlib.md5(b"first").hexdigest(), hashlib.md5(b"second")
DATE = "Sat, 29 Oct 1994 19:43:31 GMT"
PROTOCOL = f"""
302 GET /live
302 HEAD /live?x=1&_=17&%FF
404 GET /missing?x
404 HEAD /missing
404 GET /hidden
201 PUT /missing
201 PUT /hidden
403 PUT /live
400 PUT /missing?x
201 PUT /missing | Content-MD5: {NEW.hexdigest().upper()}
201 PUT /hidden | Content-MD5: {base64.b64encode(NEW.digest()).decode()}
400 PUT /hidden | Content-MD5: {OLD}
400 PUT /missing | Content-MD5: {"A" * 22}==
400 PUT /missing | Content-MD5: {NEW.hexdigest()[1:]}
400 PUT /missing | Content-Range: bytes 0-4/5
400 PUT /live | Content-Range: bytes 0-4/5 | If-Match: *
415 PUT /missing | Content-Encoding: gzip
201 PUT /live | If-Match: *
201 PUT /live | If-Match: "{OLD}"
412 PUT /live | If-Match: "{"0" * 32}"
412 PUT /live | If-Match: * | If-None-Match: *
412 PUT /missing | If-Match: *
412 PUT /hidden | If-Match: *
201 PUT /missing | If-None-Match: *
201 PUT /hidden | If-None-Match: *
412 PUT /live | If-None-Match: *
412 PUT /missing | If-None-Match: "{OLD}"
412 PUT /missing | If-Unmodified-Since: {DATE}
204 DELETE /live
204 DELETE /hidden
404 DELETE /missing
400 DELETE /live?list
412 DELETE /live | If-Match: *
412 DELETE /live | If-None-Match: *
412 DELETE /live | If-Unmodified-Since: {DATE}
204 UNLINK /live
404 UNLINK /hidden
404 UNLINK /missing
400 UNLINK /live?deep
412 UNLINK /live | If-Match: *
204 REBALANCE /live
204 REBALANCE /live?deep
404 REBALANCE /missing
400 REBALANCE /live?x
412 REBALANCE /live | If-Match: *
"""
PROTECTED = """
403 DELETE /live
204 DELETE /hidden
404 DELETE /missing
204 UNLINK /live
201 PUT /hidden
403 PUT /live | If-Match: *
"""


def judge(server: Server, row: str) -> None:
    """Ask for a key that is live, hidden or missing, and see what became of it."""
    asked, *lines = row.split(" | ")
    status, verb, target = asked.split()
    path = target.partition("?")[0]
    for before in ("UNLINK", "DELETE"):
        server.call(before, path)
    if path != "/missing":
        assert server.put(path, b"first") == 201
    if path == "/hidden":
        assert server.call("UNLINK", path).status == 204
    fields = dict(line.split(": ") for line in lines)
    answer = call(server.port, verb, target, b"second" if verb == "PUT" else None, fields)
    quiet = status < "400" or verb in ("GET", "HEAD")  # other errors say why
    assert answer.status == int(status)
    assert re.fullmatch(b"" if quiet else b"[^\n]{5,}\n", answer.body)
    gone = status == "204" and verb in ("DELETE", "UNLINK")
    value = b"second" if status == "201" else None if gone or path != "/live" else b"first"
    assert server.get(path) == value
    server.call("UNLINK", path)
    left = (path != "/missing" or value) and not (gone and verb == "DELETE")
    assert server.call("DELETE", path).status == (204 if left else 404)


@pytest.mark.parametrize("row", PROTOCOL.strip().split("\n"))
def test_the_protocol(single: Cluster, row: str) -> None:
    judge(single.server, row)


def test_the_protocol_with_protect(cluster: Make) -> None:
    server = cluster("-protect", "-replicas", "1", **ONE).server
    for row in PROTECTED.strip().split("\n"):
        judge(server, row)


QUERIES = "/?nonsense /?lists /?list&unlinked /?list&x=1 /?start=/a /?limit=1 /?list&garbage /?long"
QUERIES += " /a?list&x=1 /?list&limit=x /?list&limit=-1 /?list&start=%FF /?list&start=%zz"
QUERIES += " /?he&alth /?snap&shot"


def test_what_is_no_key_and_no_query_is_400(single: Cluster) -> None:
    asked = [("GET", path) for path in QUERIES.split()]
    asked += [(verb, "/") for verb in ("PUT", "DELETE", "UNLINK", "REBALANCE")]
    for verb, path in asked:
        answer = single.server.call(verb, path, b"x")
        assert answer.status == 400 and answer.body.count(b"\n") == 1, (verb, path)


def test_an_empty_value_is_411(single: Cluster) -> None:
    for body in (b"", iter([])):
        assert single.server.put("/empty", body) == 411
    assert statuses(raw(single.server.port, request("PUT", "/empty", b"", CLOSE))) == [411]
    assert single.server.put("/empty", b"free at once") == 201
    assert single.server.call("DELETE", "/empty").status == 204


def test_another_method_is_405_and_is_not_counted_by_its_name(single: Cluster) -> None:
    for method in ("POST", "OPTIONS", "LOOK"):
        answer = single.server.call(method, "/key")
        assert answer.status == 405
        assert {"GET", "HEAD", "PUT", "DELETE", "UNLINK"} <= set(answer.fields["allow"].split(", "))
    counted = re.findall('method="(.*?)"', single.server.call("GET", "/?metrics").body.decode())
    assert set(counted) <= {*mkv.METHODS, "-"}


def test_a_get_redirects_to_a_replica_and_says_all_of_it(system: Cluster) -> None:
    assert system.server.put("/redirected", b"value") == 201
    places, write_id = ideal(system, "/redirected"), system.records()[b"/redirected"].write_id
    targets = {place + mkv.key2path(b"/redirected", write_id) for place in places}
    assert targets <= system.files() and abs(int(write_id[:8], 16) - time.time()) < 60
    answer = system.server.call("GET", "/redirected")
    assert answer.fields.pop("location").removeprefix("http://") in targets
    digest = hashlib.md5(b"value").hexdigest()
    fields = {"key-volumes": ",".join(places), "key-balance": "balanced", "content-md5": digest}
    assert answer == Reply(302, fields | {"content-length": "0"}, b"")


def test_an_unlinked_value_keeps_its_files_until_it_is_deleted_or_replaced(system: Cluster) -> None:
    before = system.files()
    for value in (b"first", b"second"):
        assert system.server.put("/unlinked", value) == 201
        assert system.server.call("UNLINK", "/unlinked").status == 204
        until(system.is_clean)
        assert len(system.files() - before) == 3
    assert system.server.call("DELETE", "/unlinked").status == 204
    until(lambda: system.files() == before)


def test_a_second_put_is_409_and_the_first_outlasts_a_reload_of_nginx(system: Cluster) -> None:
    with Wire(system.server.port) as wire:
        wire.send(request("PUT", "/held", b"", "Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert wire.head()[0] == 100
        assert system.server.put("/held", b"other") == 409
        assert system.server.call("GET", "/held").status == 404
        for volume in system.volumes:
            old = set(volume.workers())
            os.kill(volume.process.pid, signal.SIGHUP)  # ends idle connections
            until(lambda v=volume, old=old: not old & set(v.workers()))
        wire.send(b"value")
        assert wire.answer().status == 201
    assert system.server.get("/held") == b"value"


def test_the_fallback_gets_the_requests_for_what_is_not_here(cluster: Make) -> None:
    server = cluster("-fallback", "elsewhere:8080", "-replicas", "1", **ONE).server
    answer = server.call("GET", "/a%2Fb%3Fc%20%0D%0A%c3%a9")
    place = "http://elsewhere:8080/a/b%3Fc%20%0D%0A%C3%A9"
    assert (answer.status, answer.fields["location"]) == (302, place)
    assert server.put("/here", b"value") == 201
    assert server.get("/here") == b"value"
    assert server.call("UNLINK", "/here").status == 204
    assert server.call("HEAD", "/here").fields["location"] == "http://elsewhere:8080/here"
    assert server.call("DELETE", "/missing").status == 404


def test_the_volumes_that_are_up_share_the_reads_and_none_is_503(cluster: Make) -> None:
    system = cluster()
    server, (first, *others) = system.server, system.volumes
    assert server.put("/k", b"value") == 201
    first.kill()
    system.sees(first, False)
    where = Counter(server.call("GET", "/k").fields["location"].split("/")[2] for _ in range(300))
    assert set(where) == {volume.name for volume in others} and min(where.values()) > 75, where
    assert server.put("/new", b"value") == 503
    for volume in others:
        volume.kill()
    until(lambda: server.call("GET", "/k").status == 503)
    for volume in system.volumes:
        volume.start()
    until(lambda: server.put("/new", b"value") == 201)
    assert server.get("/k") == b"value"


def test_the_root_alone_is_a_page_of_help(single: Cluster) -> None:
    answer = single.server.call("GET", "/")
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/plain")
    assert all(word in answer.body for word in (b"curl", b"DELETE", b"?list", b"?metrics"))


COUNTED = """received_bytes_total keys swept_files_total requests_total{method="PUT",status="201"}
requests_total{method="PUT",status="403"} requests_total{method="GET",status="302"}""".split()


def test_metrics_count_each_request_once_also_when_it_comes_in_parts(system: Cluster) -> None:
    server, asked = system.server, request("GET", "/counted")
    before = [server.metric(f"mkv_{name}") for name in COUNTED]
    assert [server.put("/counted", bytes(1000)) for _ in range(2)] == [201, 403]
    in_pieces(server.port, asked, asked + request("GET", "/none") + asked[:9], asked[9:] + LAST)
    assert server.put("/deleted", bytes(1000)) == 201
    assert server.call("DELETE", "/deleted").status == 204
    until(system.is_clean)
    after = [server.metric(f"mkv_{name}") for name in COUNTED]
    assert [new - old for new, old in zip(after, before, strict=True)] == [2000, 1, 3, 2, 1, 3]


# --- lists ----------------------------------------------------------------------------------------

ENDS = ["", "/1", "/2", '/"3"\\', "/\n", "b", " c+d%41&e=1#?", "/été", "/\xff", "/\U0010ffff"]
ENDS += ["/\ufffd", "/\ufffd\ufffd"]


def test_lists_are_pages_of_what_is_there_in_order(single: Cluster) -> None:
    server, keys = single.server, sorted([f"/list{end}" for end in ENDS], key=str.encode)
    for number, key in enumerate(keys):
        assert server.put(quote(key), b"x") == 201
        if number % 3 == 0:
            assert server.call("UNLINK", quote(key)).status == 204
    lists = {"unlinked": keys[::3], "list": [key for key in keys if key not in keys[::3]]}
    starts = "", "/", "/list/1x", "/lisu", *keys
    for word, prefix, start in itertools.product(lists, ("/list", "/list/é", "/lisu"), starts):
        query = f"{quote(prefix)}?{word}&start={quote(start)}"
        found = [key for key in lists[word] if key.startswith(prefix)]
        found = [key for key in found if key.encode() >= start.encode()]
        assert listed(server, query) == (found, "")
        for limit in (0, 1, 2, 100):
            page = found[:limit], "".join(found[limit : limit + 1])
            assert listed(server, f"{query}&limit={limit}") == page
    old = raw(server.port, b"GET /list?unlinked HTTP/1.0\r\n\r\n")
    assert b"chunked" not in old and json.loads(old.partition(b"\r\n\r\n")[2])["keys"] == keys[::3]
    assert [server.call("DELETE", quote(key)).status for key in keys] == [204] * len(keys)


def test_a_long_list_says_all_that_is_known_of_a_key(system: Cluster, large: Cluster) -> None:
    before = system.files()
    assert system.server.put("/long", b"value") == 201
    (item,) = json.loads(system.server.call("GET", "/lo?list&long").body)["keys"]
    assert set(item.pop("files")) == system.files() - before
    assert abs(item.pop("time") - time.time()) < 60
    assert item == {"key": "/long", "size": 5, "md5": hashlib.md5(b"value").hexdigest()}
    (item,) = json.loads(large.server.call("GET", "/of-old?list&long").body)["keys"]
    assert item.pop("files") == ["127.0.0.1:1/sv00" + mkv.key2path(b"/of-old")]
    assert item == {"key": "/of-old", "size": None, "md5": None, "time": None}


def test_a_list_of_many_keys_is_whole(large: Cluster) -> None:
    assert listed(large.server, "/many/?list") == ([key.decode() for key in MANY], "")


# --- connections ----------------------------------------------------------------------------------

EXPECT = "Content-Length: 5\r\nExpect: 100-continue\r\n"
UNINVITED = {
    403: request("PUT", "/taken", b"", EXPECT),
    411: request("PUT", "/new", b"", EXPECT.replace("5", "0")),
    414: request("PUT", "/" + "k" * 600, b"", EXPECT),
}


@pytest.mark.parametrize("status", UNINVITED)
def test_100_continue_does_not_come_before_a_refusal(single: Cluster, status: int) -> None:
    single.server.put("/taken", b"value")
    assert statuses(half_closed(single.server.port, UNINVITED[status])) == [status]


def test_who_sends_50_mb_to_a_key_that_exists_reads_the_403(single: Cluster) -> None:
    single.server.put("/taken", b"value")
    for _ in range(3):
        with Wire(single.server.port) as wire:
            wire.send(request("PUT", "/taken", bytes(50 * MB)))  # fails if it is reset
            assert wire.answer().status == 403 and wire.closed()


def trickle(wire: Wire, more: bytes) -> bytes:
    """The begin of the answer to who sends a little now and then, or nothing any more."""
    wire.socket.settimeout(0.05)
    for _ in range(400):
        with contextlib.suppress(TimeoutError):
            wire.send(more)
            return wire.socket.recv(12)
    return b"none in 20 s"


LONG = f"{PUT}Content-Length: 9000000\r\n\r\n"
IN_CHUNKS = f"{PUT}{CHUNKED}\r\n"
SLOW = [("GET /k HTTP/1.1\r\nHo", ""), ("GET /k HTTP/1.1\r\nX: ", "x")]  # at once; now and then
SLOW += [(LONG + "x", ""), (LONG, "x"), (IN_CHUNKS, ""), (IN_CHUNKS, "1\r\nx\r\n")]
SLOW += [(IN_CHUNKS + "1\r\nx\r\n0\r\n", "X: y\r\n")]
for _begin in (LONG, IN_CHUNKS + "989680\r\n"):  # a fast start buys no time
    SLOW.append((_begin + "x" * 5_000_000, ""))


@pytest.mark.parametrize(("start", "more"), SLOW, ids=brief)
def test_what_comes_too_slowly_is_408(hasty: Cluster, start: str, more: str) -> None:
    with Wire(hasty.server.port) as wire:
        wire.send(start.encode())
        assert trickle(wire, more.encode()) == b"HTTP/1.1 408"
        wire.socket.settimeout(30)
        wire.send(b"\r\n" + SMUGGLED)
        wire.file.read()
    assert hasty.server.get("/smuggled") is None
    assert hasty.server.put("/k", b"free at once") == 201
    assert hasty.server.call("DELETE", "/k").status == 204


def test_a_head_that_follows_an_answer_has_no_more_time_than_the_first(tmp_path: Path) -> None:
    flags = "-volumes", "127.0.0.1:1", "-replicas", "1", "-subvolumes", "1"
    server = Server(tmp_path / "index", *free_ports(1), *flags, constants={"HEAD_TIME": 0.5})
    try:
        with Wire(server.port) as wire:
            wire.send(request("GET", "/none"))
            assert wire.answer().status == 404  # and IDLE_TIME begins
            wire.send(b"GET")
            assert trickle(wire, b"") == b"HTTP/1.1 408"
    finally:
        server.kill()


def test_a_steady_upload_may_take_its_time_and_is_not_idle(hasty: Cluster) -> None:
    with Wire(hasty.server.port) as wire:
        wire.send(request("PUT", "/steady", b"", "Content-Length: 40000\r\n"))
        for _ in range(20):  # in 2 s
            wire.send(bytes(2000))
            time.sleep(0.1)
        assert wire.answer().status == 201
        for path, status in (("/steady", 302), ("/none", 404)) * 2:  # nor is who asks now and then
            time.sleep(0.5)
            wire.send(request("GET", path))
            assert wire.answer().status == status
        with Wire(hasty.server.port) as silent:
            assert wire.closed() and silent.closed()


# --- uploads --------------------------------------------------------------------------------------


def test_uploads_of_all_sizes_at_a_time_need_little_memory(cluster: Make) -> None:
    system = cluster("-voltimeout", "3s")  # disks stall
    sizes = [128 << 20, *[(12 << 20) + number for number in range(8)], *range(1000, 1091)]
    values = [Value(number, size) for number, size in enumerate(sizes)]

    def store(number: int) -> int:
        return upload(system.server, f"/{number}", values[number], chunked=number % 2 == 1)

    with ThreadPoolExecutor(9) as pool:
        assert set(pool.map(store, range(100))) == {201}
    assert system.server.memory() < 96 << 20
    for number in (*range(9), 99):
        digests = {sha256(download(url)) for url in replicas_of(system, b"/%d" % number)}
        assert digests == {values[number].sha256()}
    until(system.is_clean)


@pytest.mark.parametrize("crumbs", [0, 1, 43_000])
@pytest.mark.parametrize("size", [1, 65_535, 65_536, 262_143, 262_144, 262_145, 5_000_000])
def test_values_of_every_size_survive(single: Cluster, size: int, crumbs: int) -> None:
    value, server = blob("value", size), single.server
    data = request("PUT", "/size", value)
    if crumbs:  # chunks of a byte each, and a large one
        chunks = [b"1\r\n%c\r\n" % byte for byte in value[:crumbs]]
        rest = b"%x\r\n%b\r\n" % (size - crumbs, value[crumbs:]) if size > crumbs else b""
        data = request("PUT", "/size", b"", CHUNKED) + b"".join([*chunks, rest, b"0\r\n\r\n"])
    assert statuses(raw(server.port, data + request("HEAD", "/size", b"", CLOSE))) == [201, 302]
    assert server.get("/size") == value
    assert server.call("DELETE", "/size").status == 204


CUT = ["", "\r\n", "\r\n5", "\r\n5\r\nvalue\r\n", "\r\n0\r\n", "\r\n0\r\nX: y\r\n", "\r\nx\r\n"]
FAILING = [LONG + "%x%b", *[f"{IN_CHUNKS}%x\r\n%b{end}" for end in CUT]]
FAILING += [f"{PUT}{CHUNKED}{proof(b'other')}\r\n%x\r\n%b\r\n0\r\n\r\n"]


@pytest.mark.parametrize("size", [1000, 3_000_000])
@pytest.mark.parametrize("data", FAILING, ids=brief)
def test_a_body_that_fails_is_400(system: Cluster, data: str, size: int) -> None:
    port = system.server.port
    assert statuses(half_closed(port, data.encode() % (size, bytes(size)))) == [400]
    assert system.server.get("/k") is None
    assert statuses(half_closed(port, request("PUT", "/k", b"x"))) == [201]
    assert system.server.call("DELETE", "/k").status == 204
    until(system.is_clean)


def test_clients_gone_in_mid_upload_leave_nothing(system: Cluster) -> None:
    server, files = system.server, system.files()
    for _ in range(5):
        uploads = [Upload(server.port, f"/gone{n}", 8 * MB * (n % 2) + 1000) for n in range(12)]
        for number, each in enumerate(uploads):
            each.send(bytes(MB * (number % 2) + 500))
        until(lambda: system.open_intents() == 12)
        for number, each in enumerate(uploads):
            each.vanish() if number % 4 < 2 else each.wire.close()
        until(lambda: system.is_clean() and server.metric("mkv_connections") <= 1, 40)
    assert descriptors(server) < 120  # connections to volumes are kept, but not ever more of them
    assert system.files() == files
    assert not [f for v in system.volumes for f in v.folder.rglob(".tmp/*") if f.is_file()]
    assert {server.put(f"/gone{number}", b"now whole") for number in range(12)} == {201}


def test_clients_gone_at_the_last_moment_leave_all_or_nothing(single: Cluster) -> None:
    for number in range(60):
        upload = Upload(single.server.port, f"/last{number}", 1000)
        upload.send(bytes(1000))
        spend = time.perf_counter() + number / 20_000
        while time.perf_counter() < spend:  # up to 3 ms: a commit is somewhere in there
            pass
        upload.vanish()
    until(lambda: not single.open_intents())
    found = {single.server.get(f"/last{number}") for number in range(60)}
    assert found <= {None, bytes(1000)}
    until(single.is_clean)


# --- no more connections than there is room for ---------------------------------------------------


def enter(port: int) -> Wire | None:
    """A connection that is served, and stays; None when it is refused."""
    wire = Wire(port)
    with contextlib.suppress(OSError, IndexError):  # reset, or closed without an answer
        wire.send(request("GET", "/?health"))
        if wire.answer().status == 200:
            return wire
    return wire.__exit__()


@pytest.fixture
def crowd(crowded: Cluster) -> Iterator[list[Wire]]:
    """As many connections as are served."""
    until(lambda: crowded.server.metric("mkv_connections") == 1)
    with contextlib.ExitStack() as stack:
        wires = list(iter(lambda: enter(crowded.server.port), None))
        for wire in wires:
            stack.enter_context(wire)
        assert ROOM // 2 - 2 <= len(wires) <= ROOM // 2
        yield wires


def test_a_connection_too_many_reads_503(crowded: Cluster, crowd: list[Wire]) -> None:
    first, second, third, *_ = crowd
    first.send(request("PUT", "/inside", b"value")[:-2])
    for said in (b"", b"GET", request("PUT", "/k", bytes(50 * MB))):
        with Wire(crowded.server.port) as outside:
            outside.send(said)  # fails if it is reset
            answer = outside.answer()
            assert (answer.status, answer.fields["connection"]) == (503, "close")
            assert answer.body.count(b"\n") == 1 and b"connections" in answer.body
            assert outside.closed()
    first.send(b"ue")  # who is inside is served
    assert first.answer().status == 201
    second.send(request("GET", "/inside"))
    assert second.answer().status == 302
    third.__exit__()
    with until(lambda: enter(crowded.server.port)):
        assert not enter(crowded.server.port)


def test_without_descriptors_no_drive_is_blamed(crowded: Cluster, crowd: list[Wire]) -> None:
    server = crowded.server
    for number, wire in enumerate(crowd):  # a PUT on each needs three more: there are not so many
        wire.send(request("PUT", f"/crowd{number}", b"value", "X: 1\r\n")[:-2])
    for wire in crowd:
        wire.send(b"ue")
    found = [wire.answer().status for wire in crowd]
    assert set(found) <= {201, 503} and 201 in found
    for wire in crowd:
        wire.__exit__()
    until(lambda: server.metric("mkv_connections") == 1)
    said = server.log.read_text()
    assert "left alone" not in said and "is down" not in said
    assert server.metric("mkv_volumes_up") == 3
    values = [server.get(f"/crowd{number}") for number in range(len(found))]
    assert values == [b"value" if status == 201 else None for status in found]
    until(lambda: server.put("/recovered", b"value") == 201)
    until(crowded.is_clean)


def test_who_is_refused_takes_no_descriptors_from_who_is_served(crowded: Cluster) -> None:
    server = crowded.server
    with until(lambda: enter(server.port)) as inside, contextlib.ExitStack() as stack:
        for _ in range(2 * ROOM):
            stack.enter_context(quiet_reader(server.port))
        inside.send(request("GET", "/none"))  # by the answer to which all those are accepted
        assert inside.answer().status == 404
        until(lambda: descriptors(server) < ROOM - 10)
        inside.send(request("PUT", "/within", b"value"))
        assert inside.answer().status == 201


def test_idle_connections_by_the_thousand_hold_up_nobody(large: Cluster) -> None:
    server, base = large.server, descriptors(large.server)
    count = min(3000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2 - 500)
    with contextlib.ExitStack() as stack:
        for number in range(count):
            wire = stack.enter_context(quiet_reader(server.port))
            wire.sendall(b"GET /half a head"[: number % 2 * 16])
        until(lambda: server.metric("mkv_connections") > count)
        for number in range(20):
            assert server.put(f"/idle{number}", bytes(100_000)) == 201
            assert server.get(f"/idle{number}") == bytes(100_000)
    until(lambda: server.metric("mkv_connections") < count // 10)
    until(lambda: descriptors(server) <= base + 20)


def test_connections_that_are_over_take_no_memory(single: Cluster) -> None:
    server, sizes = single.server, []
    for _ in range(2):
        for _ in range(2000):
            assert server.call("GET", "/none").status == 404
        until(lambda: server.metric("mkv_connections") == 1)
        sizes.append(anonymous_memory(server.process.pid))
    assert sizes[1] - sizes[0] < 4 * MB


# --- names ----------------------------------------------------------------------------------------

NASTY = (
    ".. . / // \\ %2e%2e %252e%252e %00 \0 \r \n \x7f ~ - = + @ ? # & ; : \" ' * $( ` é 😀 \ufeff"
)
NASTY += " svFF .tmp .nginx -/ -6b0108907bf79949 aGVsbG8= a b ../../../etc/passwd " + "k" * 99
STORED = re.compile(r"[0-9.:]+(/[0-9a-f]{2}){2}(/[A-Za-z0-9+=]+-?)*/[A-Za-z0-9+=]*-[0-9a-f]{16}")


def test_nasty_keys_are_stored_each_in_a_file_of_its_own(single: Cluster) -> None:
    chance, server, before = random.Random(7), single.server, single.files()
    keys = {"/" + "é" * 255, "//", "/%"}
    for _ in range(200):
        parts = chance.choices([*NASTY.split(" "), " "], k=chance.randint(1, 8))
        keys.add(f"/{''.join(parts)}k".encode()[:511].decode(errors="ignore"))
    for key in keys:  # some characters as they are, the rest escaped
        must = re.compile(r"[?#%\0-\x20\x7f-\U0010ffff]")
        target = [quote(c, "") if must.match(c) or chance.random() < 0.5 else c for c in key[1:]]
        put = request("PUT", "/" + "".join(target), key.encode(), CLOSE)
        assert statuses(raw(server.port, put)) == [201], key
    files = single.files() - before
    assert len(files) == len(keys) > 150 and all(map(STORED.fullmatch, files))
    for key in keys:
        assert server.get(quote(key)) == key.encode()
        assert server.call("DELETE", quote(key)).status == 204
    until(lambda: single.files() == before)
