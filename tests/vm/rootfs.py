"""The root file system of the guest: made once by mmdebstrap, from the mirror that apt on this machine uses, and kept.

It stays a directory, which the guest mounts read-only over 9p. The cache is outside the repository, one directory for each
suite, list of packages and text of this file; two test runs that want the same one at the same time build it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from tests.vm import initramfs

BUILD_TIMEOUT_S = 900
"""71 s were measured on two cores with the mirror near by."""
UNUSED_S = 7 * 86400
"""A root that nobody has booted for so long is removed when another one is built."""
POLL_S = 0.5

PACKAGES = (
    *("linux-image-amd64", "busybox-static", "kmod", "udev", "procps", "iproute2", "e2fsprogs", "usbutils", "strace"),
    *("python3-minimal", "libpython3-stdlib", "libseccomp2", "util-linux", "runc", "alsa-utils"),
    *("cups-daemon", "cups-client", "cups-filters", "ghostscript", "fonts-dejavu-core"),
)
"""Of the guest; nodeagent itself and its Python packages come from the checkout over 9p."""

EXCLUDED = (
    *(f"/usr/share/{name}/*" for name in ("man", "doc", "locale", "info", "bash-completion")),
    *(
        f"/lib/modules/*/kernel/drivers/{name}/*"
        for name in ("gpu", "infiniband", "iio", "net/ethernet", "net/wireless")
    ),
    *(f"/lib/modules/*/kernel/drivers/media/{name}/*" for name in ("dvb-frontends", "i2c", "pci", "tuners", "usb")),
)
APT_OPTIONS = re.compile(r'^Acquire::(?:[a-z]+::Proxy(?:::.*)?|Check-Valid-Until|Check-Date) ".*";$')
"""What a machine behind a proxy, or with a frozen mirror, says in its own configuration and mmdebstrap would not see."""


class LabFailed(Exception):
    """The lab could not do what it was asked for; the message says what a person can look at."""


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """A finished root: `directory` for 9p, `kernel` for QEMU's -kernel, `release` as in `uname -r`."""

    directory: Path
    kernel: Path
    release: str
    lock: Path

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Nobody sweeps it away meanwhile."""
        with self.lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(self.lock)
            yield


def impossible() -> str:
    """Why there can be no lab on this machine; empty when there can."""
    if platform.machine() != "x86_64":
        return f"the lab boots x86-64 guests on x86-64, this machine is {platform.machine()}"
    tools = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap"}
    if missing := [package for program, package in tools.items() if shutil.which(program) is None]:
        return f"{' and '.join(missing)} cannot be had here: .ci/packages test says why"
    return ""


def cache() -> Path:
    """Where roots are kept: $XDG_CACHE_HOME/nodeagent-lab where that is set, else /var/cache/nodeagent-lab."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "nodeagent-lab" if home else Path("/var/cache/nodeagent-lab")


def obtain(
    suite: str = "bookworm", packages: tuple[str, ...] = PACKAGES, say: Callable[[str], object] = lambda _: None
) -> Root:
    """The root for a suite; built when it is not there yet, which takes a minute or two. Blocks; needs root.

    Raises LabFailed with the end of mmdebstrap's output.
    """
    text = "\n".join([suite, *sorted(packages), Path(__file__).read_text()])
    name = f"{suite}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    cache().mkdir(parents=True, exist_ok=True)
    place, lock = cache() / name, cache() / f"{name}.lock"
    with lock.open("ab") as file:
        _lock(file, say)
        if not place.is_dir():
            say(f"building {place} (once; {BUILD_TIMEOUT_S} s at most)")
            begun = time.monotonic()
            _build(place, suite, packages)
            say(f"built {place} in {time.monotonic() - begun:.0f} s")
        os.utime(lock)
    _sweep()
    [release] = [path.name for path in (place / "root/lib/modules").iterdir()]
    return Root(directory=place / "root", kernel=place / "kernel", release=release, lock=lock)


def _lock(file: IO[bytes], say: Callable[[str], object]) -> None:
    """Exclusive, within the time that another run may need to build."""
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if Path(file.name).with_suffix("").is_dir():
                return  # finished, and held by those who boot it
            if time.monotonic() > deadline:
                raise LabFailed(f"{file.name} was held for {BUILD_TIMEOUT_S} s by another build") from None
            if not told:
                say("another run builds the same root; waiting for it")
                told = True
            time.sleep(POLL_S)
        else:
            return


def _build(place: Path, suite: str, packages: tuple[str, ...]) -> None:
    """Under another name, which only the holder of the lock touches; the last step is the rename."""
    working, printed = place.with_name(f".building-{place.name}"), place.with_suffix(".log")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir()
    root = working / "root"
    command = [
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--include={','.join(packages)}"),
        *('--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"'),
        *(f"--aptopt={option.rstrip(';')}" for option in _apt_options()),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED),
        *("--dpkgopt=force-unsafe-io", "--skip=cleanup/apt/cache"),
        *(suite, str(root), *_sources(suite)),
    ]
    # INITRD: what /etc/kernel/postinst.d/initramfs-tools looks at (kernel-img.conf(5)); we bring an initramfs of our own.
    environment = {**os.environ, "INITRD": "No", "LC_ALL": "C.UTF-8"}
    with printed.open("wb") as log:
        try:
            code = subprocess.run(
                ["setpriv", "--pdeathsig", "TERM", "--", *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, timeout=BUILD_TIMEOUT_S, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = -1
    if code:
        end = "\n".join(printed.read_text(errors="replace").splitlines()[-15:])
        raise LabFailed(f"mmdebstrap ended with {code}; all of its output is in {printed}\n{end}")
    for unneeded in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(root / unneeded, ignore_errors=True)
    [image] = (root / "boot").glob("vmlinuz-*")
    (working / "kernel").write_bytes(initramfs.vmlinux(image.read_bytes()))
    working.rename(place)


def _apt_options() -> list[str]:
    return [line for line in _ask("apt-config", "dump") if APT_OPTIONS.match(line)]


def _sources(suite: str) -> list[str]:
    """The lines of sources.list for `suite` on this machine's mirrors; none where it has none of Debian: mmdebstrap then
    takes its own. Updates are left out for suites other than the machine's, whose mirror may no longer carry them."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    own = release.get("VERSION_CODENAME", "").strip('"')
    if release.get("ID") != "debian" or not own:
        return []
    targets = _ask("apt-get", "indextargets", "--format", "$(CREATED_BY) $(REPO_URI) $(RELEASE)")
    places = {row[2]: row[1] for row in (t.split() for t in targets) if len(row) == 3 and row[0] == "Packages"}
    wanted = ("", "-updates", "-security") if suite == own else ("", "-security")
    return [f"deb {places[own + w]} {suite}{w} main" for w in wanted if own + w in places] if own in places else []


def _ask(*command: str) -> list[str]:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ran.stdout.splitlines() if ran.returncode == 0 else []


def _sweep() -> None:
    """Remove what nobody has used for UNUSED_S and nobody holds. The locks stay: somebody may have one open."""
    for lock in cache().glob("*.lock"):
        with contextlib.suppress(OSError), lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock.stat().st_mtime > UNUSED_S:
                for left in (lock.with_suffix(""), lock.with_name(f".building-{lock.stem}")):
                    shutil.rmtree(left, ignore_errors=True)
                lock.with_suffix(".log").unlink(missing_ok=True)
