"""The demo: three volumes of its own beside the server, on 127.0.0.1, in ./mkv-data."""

import argparse
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import sleep

from mkv import TICK, require


@contextmanager
def volumes(flags: argparse.Namespace) -> Iterator[None]:
    """The volumes run; they end with this process, however it ends. HTTPError."""
    with ExitStack() as stack:
        for port in [name.partition(":")[2] for name in flags.volumes]:
            folder = Path(f"mkv-data/volume{port}")
            env = {"PORT": port, "HOST": "127.0.0.1", "SUBVOLUMES": str(flags.subvolumes)}
            script = str(Path(__file__).parent.with_name("volume.sh"))
            command = ["setpriv", "--pdeathsig", "TERM", script, str(folder)]
            volume = subprocess.Popen(command, env=os.environ | env, process_group=0)
            stack.enter_context(volume)
            stack.callback(volume.terminate)
            pid = folder / ".nginx/pid"
            while not pid.exists() or pid.read_text().strip() != str(volume.pid):
                require(volume.poll() is None, 503, f"no volume at port {port}")
                sleep(TICK)
        address = f"{flags.bind}:{flags.port}"
        flags.hint = (
            f"\ncurl -X PUT -d swag {address}/key\ncurl -L {address}/key\ncurl '{address}/?list'"
        )
        yield
