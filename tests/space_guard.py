"""Runs a Python file as a program that can reach nothing but this machine: `python space_guard.py REPORT FILE`.

Every attempt to look up or to connect to anything else fails, and leaves a line in REPORT.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)


def main() -> None:
    report, program = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    report.write_text("")

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            address = arguments[1]  # a path for Unix sockets, which stay here
            host = address[0] if isinstance(address, tuple) else None
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            host = arguments[0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host not in HERE:
            with report.open("a") as file:
                file.write(f"{event} {host}\n")
            raise ConnectionRefusedError(f"{event} {host}")

    sys.addaudithook(refuse)
    sys.argv = [str(program)]
    sys.path[0] = str(program.parent)
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
