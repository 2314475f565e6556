"""volume.sh: what a volume says of itself, and drives that are away or in the wrong place."""

from harness import *


SECRET, EVER = "correct.horse.battery/staple+=", 1 << 33


LOCKED = {"AUTH": "users", "SECRET": SECRET}


def basic(userpass: str) -> dict[str, str]:
    """The header field of a user with a password."""
    return {"Authorization": "Basic " + base64.b64encode(userpass.encode()).decode()}


ADMIN, STRANGER = basic("admin:pässword"), basic("admin:password")


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Volume]]:
    """Starts a volume: guarded(AUTH="users", …)."""
    digest = base64.b64encode(hashlib.sha1("pässword".encode()).digest()).decode()
    (tmp_path / "users").write_text(f"admin:{{SHA}}{digest}\n")
    (tmp_path / "users").chmod(0o600)
    started: list[Volume] = []

    def start(**env: str) -> Volume:
        for name, value in env.items():
            monkeypatch.setenv(name, str(tmp_path / value) if name == "AUTH" else value)
        started.append(Volume(tmp_path / "volume", *free_ports(1)))
        return started[0]

    yield start
    for volume in started:
        volume.kill()


# --- volume.sh: what a volume says of itself ------------------------------------------------------


def look(volume: Volume, **fields: str) -> tuple[str, list[str]]:
    """What a volume says of itself: its id, and the drives that are there."""
    answer = call(volume.port, "GET", "/.drives", None, fields)
    assert answer.status == 200, answer
    assert re.fullmatch(rb"[0-9a-f]{32}( sv[0-9A-F]{2}| \.)*\n", answer.body), answer
    volume_id, *drives = answer.body.decode().split()
    return volume_id, drives


def drives(volume: Volume) -> list[str]:
    """The drives that are there."""
    return look(volume)[1]


def all_but(*missing: str) -> list[str]:
    """The drives of a volume that has ten, without those."""
    return [drive for drive in (f"sv{n:02X}" for n in range(10)) if drive not in missing]


def put(volume: Volume, path: str, value: bytes = b"value") -> int:
    """The status."""
    return call(volume.port, "PUT", path, value).status


def get(volume: Volume, path: str) -> bytes | int:
    """The value, or the status where there is none."""
    answer = call(volume.port, "GET", path)
    return answer.body if answer.status == 200 else answer.status


def answers_503(volume: Volume, drive: str) -> bool:
    """Whether a drive answers 503 to everything."""
    methods = {"GET": None, "HEAD": None, "PUT": b"x", "DELETE": None}
    asked = [
        call(volume.port, *(m, f"/{drive}/aa/bb/x", body)).status for m, body in methods.items()
    ]
    return {*asked, call(volume.port, "GET", f"/{drive}/").status} == {503}


@pytest.mark.parametrize("subvolumes", [1, 2, 10, 256])
def test_a_volume_lists_the_drives_that_are_there(tmp_path: Path, subvolumes: int) -> None:
    volume = Volume(tmp_path / "volume", *free_ports(1), subvolumes=subvolumes)
    try:
        expected = [f"sv{n:02X}" for n in range(subvolumes)] if subvolumes > 1 else ["."]
        assert drives(volume) == expected
        length = len(call(volume.port, "GET", "/.drives").body)
        head = call(volume.port, "HEAD", "/.drives")
        assert (head.status, head.fields["content-length"]) == (200, str(length))
        for method in ("PUT", "DELETE", "POST", "MKCOL"):
            body = b"x" if method == "PUT" else None
            assert call(volume.port, method, "/.drives", body).status == 403, method
        volume.folder.rename(tmp_path / "gone")
        assert drives(volume) == []
        (tmp_path / "gone").rename(volume.folder)
        assert drives(volume) == expected
    finally:
        volume.kill()


@pytest.mark.parametrize("names", ["AUTH", "AUTH SECRET", "AUTH SECRET ALLOW"])
def test_a_locked_volume_lists_its_drives_to_who_has_a_password(
    guarded: Callable[..., Volume], names: str
) -> None:
    volume = guarded(**{name: (LOCKED | {"ALLOW": "127.0.0.9"})[name] for name in names.split()})
    for fields in ({}, STRANGER, basic("nobody:pässword"), {"Authorization": "Basic !"}):
        answer = call(volume.port, "GET", "/.drives", None, fields)
        assert answer.status == 401
        assert answer.fields["www-authenticate"].startswith("Basic ")
        assert b"sv00" not in answer.body
    assert look(volume, **ADMIN)[1] == all_but()
    (volume.folder / "sv04/.sv04").rmdir()
    assert look(volume, **ADMIN)[1] == all_but("sv04")
    assert call(volume.port, "PUT", "/.drives", b"x", ADMIN).status == 403


def test_a_locked_volume_whose_folder_vanished_does_not_look_like_one_of_the_first_edition(
    guarded: Callable[..., Volume], tmp_path: Path
) -> None:
    volume = guarded(AUTH="users")
    volume.folder.rename(tmp_path / "gone")  # and with it the users: nginx's own answer is 403
    for fields in (ADMIN, STRANGER, {}):
        assert call(volume.port, "GET", "/.drives", None, fields).status == 503
    (tmp_path / "gone").rename(volume.folder)
    assert look(volume, **ADMIN)[1] == all_but()


@needs_root
def test_the_workers_see_the_drives_of_a_folder_that_is_not_roots() -> None:
    with foreign_folder() as folder:
        volume = Volume(folder, *free_ports(1))
        try:
            assert drives(volume) == all_but()
            made = [folder / "sv00/.sv00", folder / "sv00/.tmp", folder / ".nginx/id"]
            assert {path.owner() for path in made} == {"nobody"}
        finally:
            volume.kill()


def test_a_volume_keeps_its_id_and_no_other_has_it(volume: Volume, tmp_path: Path) -> None:
    volume_id, _ = look(volume)
    for _ in range(2):
        volume.kill()
        volume.start()
        assert look(volume)[0] == volume_id
    assert (volume.folder / ".nginx/id").read_text() == volume_id + "\n"
    other = Volume(tmp_path / "other", *free_ports(1))
    try:
        assert look(other)[0] != volume_id
    finally:
        other.kill()


@pytest.mark.parametrize("name, text", [("id", ""), ("id", "0123\n"), ("id.new", "0123")])
def test_a_crash_while_the_id_is_made_leaves_none_that_is_not_whole(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / "volume/.nginx").mkdir(parents=True)
    (tmp_path / "volume/.nginx" / name).write_text(text)
    volume = Volume(tmp_path / "volume", *free_ports(1))
    try:
        volume_id, _ = look(volume)
        assert (volume.folder / ".nginx/id").read_text() == volume_id + "\n"
        assert not (volume.folder / ".nginx/id.new").exists()
    finally:
        volume.kill()


def test_a_reader_may_pause(volume: Volume) -> None:
    settings = re.findall(
        r"^ *(send_timeout .*?;)", (volume.folder / ".nginx/nginx.conf").read_text(), re.M
    )
    assert settings == ["send_timeout 1h;"]  # nginx's own 60 s are too long to try


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_volume_sh_tells_what_it_takes(tmp_path: Path, flag: str) -> None:
    env = os.environ | {"PORT": "none of its business"}
    told = subprocess.run(
        [HERE / "volume.sh", flag],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("usage: ")
    for name in ("PORT", "HOST", "SUBVOLUMES", "ALLOW", "AUTH", "SECRET"):
        assert re.search(rf"^ +{name} ", told.stdout, re.M), name
    assert list(tmp_path.iterdir()) == []


def test_volume_sh_takes_no_flag_for_a_folder_and_no_number_with_a_zero_ahead(
    tmp_path: Path,
) -> None:
    assert "usage" in run_volume_sh("-x")
    assert "PORT" in run_volume_sh(tmp_path / "volume", PORT="08080")
    assert "SUBVOLUMES" in run_volume_sh(tmp_path / "volume", SUBVOLUMES="09")
    assert list(tmp_path.iterdir()) == []


# --- volume.sh: drives that are away or in the wrong place ----------------------------------------


def test_a_drive_without_its_marker_is_not_there(volume: Volume) -> None:
    for drive in all_but():
        assert put(volume, f"/{drive}/aa/bb/x", drive.encode()) == 201
    for drive in ("sv00", "sv03", "sv09"):
        (volume.folder / drive / f".{drive}").rename(volume.folder / "marker")
        assert drives(volume) == all_but(drive)
        assert answers_503(volume, drive)
        assert get(volume, "/sv05/aa/bb/x") == b"sv05"
        (volume.folder / "marker").rename(volume.folder / drive / f".{drive}")
        assert drives(volume) == all_but()
        assert get(volume, f"/{drive}/aa/bb/x") == drive.encode()


def test_nobody_sees_or_touches_a_marker(volume: Volume) -> None:
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        for path in ("/sv03/.sv03", "/sv03/.sv03/", "/sv03/%2esv03/x", "/sv03/aa/../.sv03/x"):
            body = b"x" if method == "PUT" else None
            assert call(volume.port, method, path, body).status == 403, (method, path)
    assert b".sv03" not in call(volume.port, "GET", "/sv03/").body
    assert drives(volume) == all_but()


def swap(volume: Volume, one: str, other: str) -> None:
    """Let two drives of a volume change places."""
    (volume.folder / one).rename(volume.folder / "between")
    (volume.folder / other).rename(volume.folder / one)
    (volume.folder / "between").rename(volume.folder / other)


def warnings(capfd: pytest.CaptureFixture) -> list[str]:
    """What was said on stderr since it was last asked for, line by line."""
    return capfd.readouterr().err.splitlines()


def test_drives_that_changed_places_are_not_there(
    volume: Volume, capfd: pytest.CaptureFixture
) -> None:
    for drive in ("sv03", "sv07"):
        assert put(volume, f"/{drive}/aa/bb/x", drive.encode()) == 201
    swap(volume, "sv03", "sv07")  # while it runs
    assert drives(volume) == all_but("sv03", "sv07")
    assert answers_503(volume, "sv03") and answers_503(volume, "sv07")
    volume.kill()
    assert warnings(capfd) == []
    volume.start()
    third, seventh = warnings(capfd)
    assert "/sv03 is left out" in third and "is the drive sv07" in third
    assert "/sv07 is left out" in seventh and "is the drive sv03" in seventh
    assert drives(volume) == all_but("sv03", "sv07")
    assert answers_503(volume, "sv03") and answers_503(volume, "sv07")
    assert put(volume, "/sv05/aa/bb/x") == 201
    volume.kill()
    swap(volume, "sv03", "sv07")
    volume.start()
    assert warnings(capfd) == [] and drives(volume) == all_but()
    assert get(volume, "/sv03/aa/bb/x") == b"sv03"
    assert get(volume, "/sv07/aa/bb/x") == b"sv07"


def test_a_drive_with_two_markers_is_left_to_the_operator(
    volume: Volume, capfd: pytest.CaptureFixture
) -> None:
    volume.kill()
    (volume.folder / "sv03/.sv07").mkdir()  # as after cp -a sv07/. sv03
    volume.start()
    (said,) = warnings(capfd)
    assert f"remove {volume.folder}/sv03/.sv07" in said
    assert drives(volume) == all_but("sv03") and answers_503(volume, "sv03")
    volume.kill()
    (volume.folder / "sv03/.sv07").rmdir()
    volume.start()
    assert warnings(capfd) == [] and drives(volume) == all_but()


def test_a_drive_is_not_taken_for_a_volume(volume: Volume) -> None:
    before = sorted((volume.folder / "sv03").iterdir())
    for subvolumes in ("1", "10"):
        port = str(free_ports(1)[0])
        said = run_volume_sh(volume.folder / "sv03", PORT=port, SUBVOLUMES=subvolumes)
        assert "the drive sv03" in said
    assert sorted((volume.folder / "sv03").iterdir()) == before


TMPFS = ("-t", "tmpfs", "-o", "size=1m", "none")


@pytest.mark.parametrize("used", [True, False])
def test_a_mount_that_vanishes_is_not_there(
    tmp_path: Path, mounts: Callable[..., None], used: bool
) -> None:
    """Also if the folder under it was a drive once, with values of that time and a marker."""
    folder, drive = tmp_path / "volume", tmp_path / "volume/sv03"
    if used:
        volume = Volume(folder, *free_ports(1))
        assert put(volume, "/sv03/aa/bb/x", b"of that time") == 201
        volume.kill()
        shutil.copytree(drive, tmp_path / "copy")
    drive.mkdir(parents=True, exist_ok=True)
    mounts(drive, *TMPFS)
    if used:  # as one moves it to a file system of its own
        shutil.copytree(tmp_path / "copy", drive, dirs_exist_ok=True)
    volume = Volume(folder, *free_ports(1))
    try:
        assert drives(volume) == all_but()
        assert put(volume, "/sv03/aa/bb/y") == 201
        shell("umount", "-l", str(drive))
        assert drives(volume) == all_but("sv03")
        assert answers_503(volume, "sv03")
        assert put(volume, "/sv04/aa/bb/y") == 201
    finally:
        volume.kill()


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("link", [True, False])
def test_a_drive_whose_mount_failed_is_left_out_until_it_is_mounted(
    tmp_path: Path,
    mounts: Callable[..., None],
    capfd: pytest.CaptureFixture,
    link: bool,
    used: bool,
) -> None:
    folder, disk = tmp_path / "volume", tmp_path / "disk"
    drive = tmp_path / "mnt/3" if link else folder / "sv03"
    for path in (disk, folder, drive):
        path.mkdir(parents=True)
    if link:
        (folder / "sv03").symlink_to(drive)
    if used:
        Volume(folder, *free_ports(1)).kill()
    mounts(disk, *TMPFS)
    mounts(drive, "--bind", str(disk))
    volume = Volume(folder, *free_ports(1))
    try:
        assert put(volume, "/sv03/aa/bb/x") == 201
        volume.kill()
        shell("umount", "-l", str(drive))
        under = sorted(drive.rglob("*"))
        assert warnings(capfd) == []
        for _ in range(2):  # it is remembered for good
            volume.start()
            (said,) = warnings(capfd)
            assert f"{folder}/sv03 is left out" in said and "not mounted" in said
            assert f"{folder}/.nginx/mounts" in said
            assert drives(volume) == all_but("sv03") and answers_503(volume, "sv03")
            assert put(volume, "/sv04/aa/bb/x") in (201, 204)
            assert sorted(drive.rglob("*")) == under  # nothing is written under the mount point
            volume.kill()
        mounts(drive, "--bind", str(disk))
        volume.start()
        assert warnings(capfd) == [] and drives(volume) == all_but()
        assert get(volume, "/sv03/aa/bb/x") == b"value"
    finally:
        volume.kill()


def test_a_drive_that_is_mounted_no_longer_is_used_when_the_operator_says_so(
    volume: Volume, mounts: Callable[..., None], capfd: pytest.CaptureFixture
) -> None:
    volume.kill()
    for drive in ("sv03", "sv07"):
        mounts(volume.folder / drive, *TMPFS)
    volume.start()
    volume.kill()
    for drive in ("sv03", "sv07"):
        shell("umount", str(volume.folder / drive))
    memory = volume.folder / ".nginx/mounts"
    memory.write_text(memory.read_text().replace("sv03\n", ""))
    volume.start()
    (said,) = warnings(capfd)
    assert "/sv07 is left out" in said
    assert drives(volume) == all_but("sv07")
    assert put(volume, "/sv03/aa/bb/x") == 201


def test_an_empty_drive_takes_the_place_of_a_dead_one(
    volume: Volume, mounts: Callable[..., None], capfd: pytest.CaptureFixture
) -> None:
    volume.kill()
    mounts(volume.folder / "sv03", *TMPFS)
    volume.start()
    assert put(volume, "/sv03/aa/bb/x") == 201
    volume.kill()
    shell("umount", str(volume.folder / "sv03"))
    mounts(volume.folder / "sv03", *TMPFS)
    volume.start()
    assert warnings(capfd) == [] and drives(volume) == all_but()
    assert get(volume, "/sv03/aa/bb/x") == 404
