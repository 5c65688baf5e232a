#!/usr/bin/env python3
"""Peak memory and seconds of the three roles, each a process of its own on this machine.

usage: tools/roles-memory.py VEILTUNE ADAPTER BACKBONE NETWORK IMAGE...

Runs `veiltune keys`, `dealer`, `serve` and `classify` on loopback for one session of the images, and prints the
largest resident set of each role as the kernel counted it.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main(veiltune, adapter, backbone, network, *images):
    with tempfile.TemporaryDirectory() as keys:
        subprocess.run([veiltune, "keys", "--out", f"{keys}/k"], check=True, stdout=subprocess.DEVNULL)
        dealer, provider = (f"127.0.0.1:{free_port()}" for _ in range(2))
        own = lambda role: ["--keys", f"{keys}/k/{role}", "--network", network]
        once = ["--sessions", "1", "--max-images", str(len(images))]
        commands = {
            "dealer": ["dealer", "--listen", dealer, "--adapter-config", adapter, *own("dealer"), *once],
            "provider": ["serve", "--listen", provider, "--dealer", dealer, "--adapter", adapter]
            + ["--backbone", backbone, *own("provider"), *once],
            "client": ["classify", "--provider", provider, "--dealer", dealer, "--adapter-config", adapter]
            + ["--backbone", backbone, *own("client"), *images],
        }
        started = {}
        for role, command in commands.items():
            out = subprocess.DEVNULL if role != "client" else sys.stderr
            started[role] = subprocess.Popen([veiltune, *command], stdout=out)
            time.sleep(1)
        for role, process in started.items():
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                sys.exit(f"{role} failed")
            print(f"{role:10} {usage.ru_maxrss / 1024:8.0f} MiB {usage.ru_utime + usage.ru_stime:8.1f} s of CPU")


if __name__ == "__main__":
    if len(sys.argv) < 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
