"""Start SGLang's own HTTP server; run by the Python of SGLang's environment, as a file.

    python launch.py <flags of sglang.launch_server>

Two things differ from `python -m sglang.launch_server`. The server ends when its standard input does: the
trainer holds the other end of that pipe, so a trainer that is killed, whatever the signal, takes its servers
along. And MOSAIC_SGLANG_CPU=1 installs the stand-ins that let SGLang run without a GPU; they are installed
on import, since SGLang's worker processes import this file again (multiprocessing, start method "spawn").
"""

from __future__ import annotations

import os
import signal
import sys
import threading

if os.environ.get("MOSAIC_SGLANG_CPU") == "1":
    import cpu_stand_in

    cpu_stand_in.install(seeded=os.environ.get("MOSAIC_SGLANG_SEEDED") == "1")


def _end_with_the_parent() -> None:
    """Kill the process group, of which this process is the leader, once standard input is closed."""
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    from sglang.srt.entrypoints.http_server import launch_server  # pyrefly: ignore
    from sglang.srt.server_args import prepare_server_args  # pyrefly: ignore
    from sglang.srt.utils import kill_process_tree  # pyrefly: ignore

    threading.Thread(target=_end_with_the_parent, daemon=True, name="parent-watch").start()
    try:
        launch_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
