"""What a write may demand of the record whose place it takes: If-Match, If-None-Match; a move."""

from typing import NamedTuple

from mkv import CONDITIONS, Condition, Record, require


class Match(NamedTuple):
    """A live record with one of these tags: `*`, or `"<md5>"`."""

    tags: tuple[str, ...]
    is_move: bool = False

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


def parse(fields: dict[bytes, bytes], protect: bool) -> Condition | Match:
    """What the header fields of a PUT demand. 400, 403, 412, 415."""
    demands = CONDITIONS & fields.keys()
    require(b"content-range" not in demands, 400, "a PUT is of the whole value")
    require(b"content-encoding" not in demands, 415, "a value is kept as it comes")
    if demands == {b"if-match"}:
        require(not protect, 403, "protected: UNLINK the key first")
        tags = fields[b"if-match"].decode("latin-1").split(",")
        return Match(tuple(tag.strip() for tag in tags))
    new = demands == {b"if-none-match"} and fields[b"if-none-match"] == b"*"
    require(new, 412, "PUT knows If-Match, and If-None-Match: *")
    return Condition(taken=412)
