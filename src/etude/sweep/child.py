"""python -m etude.sweep.child FD SECONDS SCRIPT ARGUMENT...: a script as a job of a sweep, which ends with the sweep.

The sweep alone holds the other end of the pipe FD. When it is gone, killed or not, this process gets a SIGTERM: a run then
saves. After SECONDS its whole group is killed."""

import os
import runpy
import signal
import sys
import threading
import time


def end_with_the_sweep(fd: int, grace: float) -> None:
    while os.read(fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    given = int(sys.argv[1]), float(sys.argv[2])
    threading.Thread(target=end_with_the_sweep, args=given, daemon=True).start()
    sys.argv = sys.argv[3:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as for a script that is started itself
    runpy.run_path(sys.argv[0], run_name="__main__")
