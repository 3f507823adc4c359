"""Processes that cost no imports: torch and Lightning take seconds to import, a fork of a process that has them none.

For scripts that tests start. Tests themselves do not fork: torch's autograd works in no fork of a process that used it.
"""

import os
import signal
import socket
import sys
import traceback

#: Seconds that one forked process may run.
LIMIT = 120


def run_forked(function, *arguments, processes=1):
    """Call the function in so many processes at once; the first exit status that is not 0, else 0.

    Several find each other as torchrun's do, by environment variables: a Lightning trainer starts none itself then.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running, failed = set(), 0
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            if processes > 1:
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "NODE_RANK": 0}
                os.environ.update({name: str(value) for name, value in (group | {"LOCAL_RANK": rank}).items()})
            _call_and_exit(function, arguments)
        running.add(pid)
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in running:  # it would wait for the one that failed
                os.kill(other, signal.SIGKILL)
    return failed


def _call_and_exit(function, arguments):
    status = 1
    signal.alarm(LIMIT)
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
