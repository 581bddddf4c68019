"""In a pod, `ccid_client.py /dev/bus/usb/BUS/DEV APDU...`: powers the card of a CCID reader on through usbfs and sends it
commands (hex); prints the ATR and the answers in hex. USB CCID 1.1, sections 6.1.1, 6.1.4 and 6.2.1."""

import ctypes
import fcntl
import os
import struct
import sys

CLAIM_INTERFACE, BULK = 0x8004550F, 0xC0185502  # linux/usbdevice_fs.h, 64 bit
OUT, IN = 0x03, 0x82  # QEMU's reader (hw/usb/dev-smartcard-reader.c)
TIMEOUT_MS = 10_000
POWER_ON, TRANSFER, DATA = 0x62, 0x6F, 0x80
MAX_BYTES = 1024

fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(fd, CLAIM_INTERFACE, struct.pack("I", 0))


def bulk(endpoint: int, data: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(data, len(data))
    request = bytearray(struct.pack("@IIIP", endpoint, len(data), TIMEOUT_MS, ctypes.addressof(buffer)))
    count = fcntl.ioctl(fd, BULK, request)  # with a mutable buffer the call's own result
    return buffer.raw[:count]


def ask(kind: int, sequence: int, data: bytes = b"") -> bytes:
    bulk(OUT, struct.pack("<BIBB3x", kind, len(data), 0, sequence) + data)
    answer = bulk(IN, bytes(MAX_BYTES))
    if len(answer) < 10:
        sys.exit(f"a short answer: {answer.hex()}")
    said, length, _, number, status, error = struct.unpack("<BIBBBB", answer[:9])
    if said != DATA or number != sequence or status & 0xC0:
        sys.exit(f"refused: type {said:#x}, status {status:#x}, error {error:#x}")
    return answer[10 : 10 + length]


print(ask(POWER_ON, 1).hex())
for sequence, command in enumerate(sys.argv[2:], 2):
    print(ask(TRANSFER, sequence, bytes.fromhex(command)).hex())
