"""The locks: who may come in (-basicauth), and signed redirects (MKV_SECRET)."""

import argparse
import hmac
import os
from base64 import b64decode, urlsafe_b64encode
from contextlib import suppress
from time import time

from mkv import Request, md5, require

LINK_TIME = 3600  # seconds that a signed redirect is good for


def check(request: Request, flags: argparse.Namespace) -> None:
    """Let in only who knows a password of MKV_CLIENTS, but for /?health. 401."""
    if (request.path, request.query) == (b"/", b"health"):
        return
    scheme, _, proof = request.fields.get(b"authorization", b"").partition(b" ")
    given = b""
    with suppress(ValueError):
        given = b64decode(proof, validate=True) if scheme.lower() == b"basic" else b""
    clients = os.environ.get("MKV_CLIENTS", flags.userpass).split(",")
    known = [client.encode(errors="surrogateescape") for client in clients if ":" in client]
    right = [hmac.compare_digest(given, client) for client in known]  # in constant time
    require(any(right), 401, "log in, please", 'WWW-Authenticate: Basic realm="mkv"\r\n')


def sign(answer: bytes, secret: str) -> bytes:
    """A redirect whose URL may be read for a while without a password: see nginx's secure_link."""
    head, _, rest = answer.partition(b"Location: http://")
    url, _, rest = rest.partition(b"\r\n")
    until = int(time()) + LINK_TIME
    text = f"{until}/{url.decode().partition('/')[2]} {secret}"
    proof = urlsafe_b64encode(md5(text.encode(errors="surrogateescape")).digest())[:22]
    return b"%sLocation: http://%s?md5=%b&expires=%d\r\n%s" % (head, url, proof, until, rest)
