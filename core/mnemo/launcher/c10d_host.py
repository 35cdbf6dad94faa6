"""A process that hosts a `torch.distributed.TCPStore`: ``python -m mnemo.launcher.c10d_host``.

It loads torch, then reads ports from its standard input, and writes a line once it listens there
with an empty Store; the one before ends. The process ends when its standard input does, that is
with whoever started it, however that one ends.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Host it."""
    # The Store's only thread looks up the name of whoever connects: where the name server does not
    # answer, all nodes would wait for it, 5 s each time. So it is not asked, and says nothing.
    os.environ["RES_OPTIONS"] = "attempts:0"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    # A signal to the whole process group is the agent's business.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = None
    for line in sys.stdin:
        del store  # which closes its port
        store = TCPStore("127.0.0.1", int(line), is_master=True, wait_for_workers=False)
        print(store.port, flush=True)


if __name__ == "__main__":
    main()
