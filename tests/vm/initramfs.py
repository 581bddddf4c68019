"""What QEMU loads: the kernel without its decompressor, and an initramfs that mounts the root. Pure but for reading files."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

XZ = b"\xfd7zXZ\x00"
ELF = b"\x7fELF"
WANTED = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
BUSYBOX = ("bin/busybox", "usr/bin/busybox")

INIT = """\
#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for module in $($B cat /modules); do $B insmod /$module; done
plan9() { $B mkdir -p $2; $B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro $1 $2; }
plan9 root /ro
$B mount -t tmpfs tmpfs /rw; $B mkdir /rw/upper /rw/work
$B mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work root /new
for word in $($B cat /proc/cmdline); do
    case $word in lab.share=*) share=${word#lab.share=}; plan9 ${share%%:*} /new${share#*:};; esac
done
for place in proc sys dev; do $B mount --move /$place /new/$place; done
exec $B switch_root /new /bin/sh /repo/tests/vm/guest/init.sh
"""
"""`cache=loose` caches without asking: nothing of what is shared changes while a guest runs, or the guest need not see it."""


def vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage; the image itself when it is not compressed by xz.

    Debian's kernels have CONFIG_PVH, so QEMU boots the ELF directly: decompressing it under TCG takes 3 s and more.
    """
    at = image.find(XZ)
    while at >= 0:
        try:
            found = lzma.LZMADecompressor().decompress(image[at:])
        except lzma.LZMAError:
            found = b""
        if found.startswith(ELF):
            return found
        at = image.find(XZ, at + 1)
    return image


def initramfs(root: Path, release: str) -> bytes:
    """A cpio archive (newc, Documentation/driver-api/early-userspace/buffer-format.rst) with busybox, INIT and modules."""
    modules = [*_modules(root / "lib/modules" / release)]
    busybox = next(path for name in BUSYBOX if (path := root / name).is_file())
    archive = _Cpio()
    for directory in ("bin", "proc", "sys", "dev", "ro", "rw", "new"):
        archive.add(directory, 0o040755)
    archive.add("bin/busybox", 0o100755, busybox.read_bytes())
    for number, (_, data) in enumerate(modules):
        archive.add(f"{number}.ko", 0o100644, data)
    archive.add("modules", 0o100644, " ".join(f"{n}.ko" for n in range(len(modules))).encode())
    archive.add("init", 0o100755, INIT.encode())
    return archive.finish()


def _modules(directory: Path) -> Iterator[tuple[str, bytes]]:
    """WANTED and what they need, in the order of loading; what is built in is not there."""
    needs: dict[str, list[str]] = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        module, _, below = line.partition(":")
        needs[module] = below.split()
    paths = {Path(m).name.partition(".ko")[0].replace("-", "_"): m for m in needs}
    order: dict[str, None] = {}
    for name in WANTED:
        if name in paths:
            # modules.dep lists what a module needs so that the last one is to be loaded first (depmod(8)).
            order.update(dict.fromkeys([*reversed(needs[paths[name]]), paths[name]]))
    for module in order:
        data = (directory / module).read_bytes()
        yield module, lzma.decompress(data) if module.endswith(".xz") else data


class _Cpio:
    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        self._pad()
        self._data += data
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._data)

    def _pad(self) -> None:
        self._data += b"\0" * (-len(self._data) % 4)
