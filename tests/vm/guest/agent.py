"""Runs commands for whoever is on the other side of a virtio-serial port. Python 3.9 and its standard library only.

A request is `{"id": 1, "argv": [...], "timeout_s": 10, "stdin": base64, "env": {...}}`, its answer `{"id": 1, "code": 0,
"stdout": base64, "stderr": base64, "cut": false}`. Requests run at the same time; each is a process group that is killed when
its time is over (code 124, as of timeout(1)). Output goes to files, so that what a command leaves running keeps nobody waiting.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time

PORT = "lab.agent"
MAX_OUTPUT_BYTES = 4 << 20
PORT_TIMEOUT_S = 30.0
TIMED_OUT = 124
NO_PEER_POLL_S = 0.05


def port(name: str) -> str:
    """The node of a virtio-serial port, once it is there (drivers/char/virtio_console.c shows its name in sysfs)."""
    deadline = time.monotonic() + PORT_TIMEOUT_S
    while time.monotonic() < deadline:
        for shown in pathlib.Path("/sys/class/virtio-ports").glob("*/name"):
            node = f"/dev/{shown.parent.name}"
            with contextlib.suppress(OSError):
                if shown.read_text().strip() == name and os.path.exists(node):
                    return node
        time.sleep(0.02)
    raise SystemExit(f"there is no virtio-serial port {name}")


class Agent:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._one = threading.Lock()

    def run(self) -> None:
        """Serve until the machine is switched off."""
        self._say({"up_s": time.clock_gettime(time.CLOCK_BOOTTIME), "release": os.uname().release})
        buffer = bytearray()
        while True:
            data = os.read(self._fd, 1 << 16)
            if not data:
                time.sleep(NO_PEER_POLL_S)  # nobody is connected: the port is readable and empty
            buffer += data
            while b"\n" in data and b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                threading.Thread(target=self._serve, args=(json.loads(line),), daemon=True).start()

    def _serve(self, request: dict) -> None:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
            given.write(base64.b64decode(request.get("stdin", "")))
            given.seek(0)
            try:
                code = _run(request, given, out, err)
            except OSError as error:
                err.write(f"{request['argv'][0]}: {error.strerror}".encode())
                code = 127
            texts, cut = [], False
            for file in (out, err):
                file.seek(0)
                data = file.read(MAX_OUTPUT_BYTES)
                cut = cut or len(file.read(1)) > 0
                texts.append(base64.b64encode(data).decode())
        self._say({"id": request["id"], "code": code, "stdout": texts[0], "stderr": texts[1], "cut": cut})

    def _say(self, message: dict) -> None:
        with self._one:
            data = json.dumps(message).encode() + b"\n"
            while data:
                data = data[os.write(self._fd, data) :]


def _run(request: dict, given: object, out: object, err: object) -> int:
    process = subprocess.Popen(
        request["argv"],
        stdin=given,
        stdout=out,
        stderr=err,
        env={**os.environ, **request.get("env", {})},
        cwd="/",
        start_new_session=True,
    )
    try:
        return process.wait(request["timeout_s"])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return TIMED_OUT


if __name__ == "__main__":
    Agent(os.open(port(PORT), os.O_RDWR | os.O_CLOEXEC)).run()
