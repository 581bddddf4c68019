"""In a pod, `fido_client.py /dev/hidrawN`: CTAPHID_INIT with a nonce; prints the answer in hex."""

import os
import select
import sys

NONCE = bytes.fromhex("0102030405060708")
TIMEOUT_S = 20.0

fd = os.open(sys.argv[1], os.O_RDWR)
# hidraw wants the number of the report first, 0 where reports have none (Documentation/hid/hidraw.rst).
os.write(fd, b"\0" + (b"\xff\xff\xff\xff\x86\x00\x08" + NONCE).ljust(64, b"\0"))
if not select.select([fd], [], [], TIMEOUT_S)[0]:
    sys.exit("the key did not answer")
print(os.read(fd, 64)[:24].hex())
