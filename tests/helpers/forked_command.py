"""A command line that runs a module in a child of the fork server, with the streams that it is
given.

It takes the socket of `tests.helpers.process.listening`, a module with `main`, and arguments.
Signals are passed on. Started with `-I -S`: all that it imports takes 20 ms, where a module with
torch takes two seconds.
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    _, address, *command = sys.argv
    given = json.dumps(
        {"command": command, "cwd": os.path.realpath("."), "environment": dict(os.environ)}
    ).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(given).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(given)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        for stream in (0, 1, 2):  # closed where the child closes them
            os.close(stream)
        code = int(server.recv(16) or -signal.SIGKILL)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
