"""The command line: flags as minikeyvalue has them, with one dash or two."""

import argparse
import os
import re
import socket
from importlib import import_module

DEMO = ("127.0.0.1:3001", "127.0.0.1:3002", "127.0.0.1:3003")  # the volumes without -volumes
COMMANDS = ("server", "rebuild", "rebalance")


def duration(text: str) -> float:
    """Seconds, from 300ms, 1s, 1.5m, 1h, or 0. ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*)(ms|s|m|h)|0", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: 300ms, 1s, 1m, 1h")
    return float(match[1] or 0) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, None: 0}[match[2]]


def addresses(text: str) -> tuple[str, ...]:
    """Of host:port,host:port,… ArgumentTypeError."""
    volumes = tuple(text.split(","))
    for volume in volumes:
        if not re.fullmatch(r"([\w.-]+|\[[0-9a-f:.]+\]):[0-9]{1,5}", volume):
            raise argparse.ArgumentTypeError(f"{volume!r} is not host:port")
        if volumes.count(volume) > 1:
            raise argparse.ArgumentTypeError(f"{volume} is named twice")
    return volumes


def address(text: str) -> str:
    """A host:port. ArgumentTypeError."""
    if "," in text:
        raise argparse.ArgumentTypeError(f"{text!r} is more than one")
    return addresses(text)[0]


FLAGS = (  # name, type (None: it has no value), default, meaning
    ("volumes", addresses, DEMO, "host:port,… (without: three of its own, to look around)"),
    ("db", str, "mkv-data/index", "folder of the index, or postgres://user@host1,host2/database"),
    ("port", int, 3000, "port to listen on"),
    ("bind", str, "", "address to listen on (all; 127.0.0.1 without -volumes)"),
    ("replicas", int, 3, "copies of each value"),
    ("subvolumes", int, 10, "drives a volume, 1 to 256"),
    ("fallback", address, None, "host:port to redirect to when a key is not here"),
    ("voltimeout", duration, 1.0, "how long a volume may be silent"),
    ("settle", duration, 3600.0, "after this time no request can still take effect"),
    ("grace", duration, 60.0, "how long replaced files stay for readers on their way"),
    ("userpass", str, os.environ.get("MKV_USERPASS", ""), "user:password, for the volumes"),
    ("intents", str, "", "file of the intents, with -db postgres:// (mkv-data/intents-PORT)"),
    ("basicauth", None, False, "let in only whom $MKV_CLIENTS names: user:password,…"),
    ("protect", None, False, "UNLINK before DELETE"),
    ("v", None, False, "log every request"),
    ("deep", None, False, "rebalance: compare the MD5 of every replica, too"),
)


def fill_streams() -> None:
    """Put something in the place of streams that are closed: libuv aborts when it gets one."""
    while (file := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(file)


def parse_flags() -> argparse.Namespace:
    """The command and its flags, checked, with defaults."""
    fill_streams()
    parser = argparse.ArgumentParser("mkv.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("command", choices=COMMANDS)
    for name, kind, default, text in FLAGS:
        how = {"type": kind, "default": default} if kind else {"action": "store_true"}
        parser.add_argument(f"-{name}", f"--{name}", help=text, **how)
    flags = parser.parse_args()
    flags.shared = flags.db.startswith(("postgres://", "postgresql://"))
    if flags.intents and not flags.shared:
        parser.error("-intents goes with -db postgres://…")
    beside = f"mkv-data/intents-{flags.port}" if flags.shared else f"{flags.db}/intents"
    flags.intents = flags.intents or beside
    flags.secret = os.environ.get("MKV_SECRET", "")
    flags.ready = False  # until then a signal ends the process at once
    flags.hint = ""  # what the demo says at its start
    flags.demo = flags.command == "server" and flags.volumes is DEMO
    flags.bind = flags.bind or ("127.0.0.1" if flags.volumes is DEMO else "0.0.0.0")
    flags.family = socket.AF_INET6 if ":" in flags.bind else socket.AF_INET
    if not 1 <= flags.replicas <= len(flags.volumes):
        parser.error(f"-replicas is {flags.replicas}, -volumes has {len(flags.volumes)}")
    for name, most in (("port", 65535), ("subvolumes", 256), ("voltimeout", 3600)):
        if not 0 < getattr(flags, name) <= most:
            parser.error(f"-{name} is more than 0, and at most {most}")
    if flags.basicauth and ":" not in os.environ.get("MKV_CLIENTS", flags.userpass):
        parser.error("-basicauth wants passwords: MKV_CLIENTS=user:password,…")
    if flags.secret or flags.basicauth:  # now: later there may be no descriptor left to read it
        import_module("contrib.security")
    return flags
