"""Process 1 of a test node: reports that the node is up, then reaps orphans until a signal kills
it.

Runs with the node's own Python, from its text: nothing of it is installed there.
"""

import os
import signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
os.write(1, b"up\n")
os.close(1)
while True:
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        signal.sigwait({signal.SIGCHLD})
