"""The gadget's side of a FIDO key, `fido_key.py /dev/hidgN COUNT`: answers so many reports, CTAPHID_INIT as the standard
says (CTAP 2.1, 11.2.9.1.3), everything else with itself."""

import os
import select
import sys

REPORT_BYTES = 64
INIT = 0x86
CHANNEL = b"\x00\x00\x00\x01"
TIMEOUT_S = 30.0

fd = os.open(sys.argv[1], os.O_RDWR)
for _ in range(int(sys.argv[2])):
    if not select.select([fd], [], [], TIMEOUT_S)[0]:
        sys.exit("no report came")
    report = os.read(fd, REPORT_BYTES)
    if report[4] == INIT:
        nonce = report[7:15]
        report = report[:4] + bytes([INIT, 0, 17]) + nonce + CHANNEL + bytes([2, 5, 0, 0, 4])
    os.write(fd, report.ljust(REPORT_BYTES, b"\0"))
