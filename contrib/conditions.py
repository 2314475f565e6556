"""What a write may demand: of its own MD5, and of the record whose place it takes."""

import re
from base64 import b64decode
from typing import NamedTuple

from mkv import CONDITIONS, Condition, Record, require


class Match(NamedTuple):
    """A live record with one of these tags: `*`, or `"<md5>"`."""

    tags: tuple[str, ...]
    md5: str = ""
    is_move = False

    def check(self, record: Record) -> None:
        """412."""
        known = {"*", f'"{record.hash}"'} if record.hash else {"*"}
        right = record.live and not known.isdisjoint(self.tags)
        require(right, 412, "another value is here, or none")


class Unchanged(NamedTuple):
    """Exactly this record: for a move, which may be a copy of the time of the original."""

    old: Record
    is_move: bool = True

    def check(self, record: Record) -> None:
        """409."""
        require(record == self.old, 409, "the key has changed meanwhile")


def md5_of(field: bytes) -> str:
    """The MD5 that a Content-MD5 tells, in hex: it may be in hex, or base64 (RFC 1864). 400."""
    if re.fullmatch(rb"[0-9A-Fa-f]{32}", field):
        return field.decode().lower()
    require(re.fullmatch(rb"[0-9A-Za-z+/]{22}==", field), 400, "malformed Content-MD5")
    return b64decode(field).hex()


def parse(fields: dict[bytes, bytes], protect: bool) -> Condition | Match:
    """What the header fields of a PUT demand. 400, 403, 412, 415."""
    md5 = md5_of(fields[b"content-md5"]) if b"content-md5" in fields else ""
    demands = CONDITIONS & fields.keys()
    require(b"content-range" not in demands, 400, "a PUT is of the whole value")
    require(b"content-encoding" not in demands, 415, "a value is kept as it comes")
    if demands == {b"if-match"}:
        require(not protect, 403, "protected: UNLINK the key first")
        tags = fields[b"if-match"].decode("latin-1").split(",")
        return Match(tuple(tag.strip() for tag in tags), md5)
    new = not demands or fields.get(b"if-none-match") == b"*"
    require(new and len(demands) < 2, 412, "PUT knows If-Match, and If-None-Match: *")
    return Condition(412 if demands else 403, md5=md5)
