"""What a private cupsd needs on disk: two configuration files, directories, and the back end that copies to a device.

`state_dir/cups` is durable; cupsd owns what is below `spool`, `cache`, `state` and keeps its queues in `etc`. The programs it
may run lie in `bin`, also below the state directory: Debian's initramfs mounts /run with noexec.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
from pathlib import Path

from nodeagent.errors import AgentError, Reason

HISTORY_S = 86400
MAX_JOBS = 500
"""cupsd forgets finished jobs after HISTORY_S, or earlier when there are MAX_JOBS of them. After a crash the spool looks
here whether a job has been printed."""
SEARCH = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin"

# Facts about cupsd 2.4.2: without ServerName it resolves the host's name while it starts; with `PageLog` set to nothing it
# segfaults when a job ends; without `Printcap` set to nothing it writes /run/cups/printcap; without DirtyCleanInterval 0 a
# job it has accepted is not on disk for 30 s; MaxJobTime cancels a job that waits for its printer; `User` runs filters,
# of which there are none, and may not be root; a fault found before `ErrorLog` is read goes to the journal.
CUPSD_CONF = """\
Listen {socket}
ServerName localhost
LogLevel warn
Browsing No
BrowseLocalProtocols none
WebInterface No
DefaultAuthType Basic
DirtyCleanInterval 0
ErrorPolicy retry-current-job
JobKillDelay 2
MaxClients 200
MaxCopies 999
MaxHoldTime 0
MaxJobs {max_jobs}
MaxJobTime 0
PreserveJobFiles No
PreserveJobHistory {history_s}
<Location />
  AuthType Basic
  Require user root
  Order allow,deny
  Allow all
</Location>
<Policy default>
  JobPrivateAccess all
  JobPrivateValues none
  SubscriptionPrivateAccess all
  SubscriptionPrivateValues none
  <Limit All>
    AuthType Basic
    Require user root
  </Limit>
</Policy>
"""
FILES_CONF = """\
ErrorLog stderr
ServerRoot {home}/etc
ServerBin {home}/bin
DataDir {home}/share
RequestRoot {home}/spool
TempDir {home}/spool/tmp
CacheDir {home}/cache
StateDir {home}/state
AccessLog /dev/null
PageLog /dev/null
Printcap
SystemGroup root
User {user}
Group {group}
"""
BACKEND = r"""#!/bin/sh
# A CUPS back end (backend(7)): JOB USER TITLE COPIES OPTIONS FILE; DEVICE_URI is opencdi:PATH[?usb=BUS/DEVICE].
set -u
[ $# -eq 6 ] || exit 0 # asked which devices there are: none that cupsd should find by itself

# A back end whose cupsd was killed must not go on writing while the next cupsd starts the job again.
if [ -z "${OPENCDI_TIED-}" ]; then
    OPENCDI_TIED=yes exec setpriv --pdeathsig KILL /bin/sh "$0" "$@"
fi
read -r parent < "/proc/$PPID/comm"
[ "$parent" = cupsd ] || exit 1

device=${DEVICE_URI#opencdi:}
usb=
case $device in
*\?usb=*)
    usb=${device#*\?usb=}
    device=${device%%\?*}
    ;;
esac

file=$6
printed=
case $3 in
spool:*) # the job is the path of a document in the spool, which need not be copied for cupsd
    IFS= read -r file < "$6"
    printed=${file%.*}.printed
    if [ -e "$printed" ]; then # everybody was killed between the last byte and cupsd's note of it
        [ ! -f "$device.begun" ] || read -r _ key < "$device.begun"
        [ "${key-}" != "$3" ] || rm -f "$device.begun"
        exit 0
    fi
    if [ ! -f "$file" ]; then
        echo "ERROR: The document is not in the spool any more." >&2
        exit 5 # CUPS_BACKEND_CANCEL
    fi
    ;;
esac

connected() {
    [ -w "$device" ] || return 1
    [ -n "$usb" ] || return 0
    # Another printer may have got this node since: whatever is plugged in has a device number of its own.
    at=/sys/class/usbmisc/${device##*/}/device/..
    read -r bus < "$at/busnum" && read -r number < "$at/devnum" && [ "$bus/$number" = "$usb" ]
} 2> /dev/null

if ! connected; then
    echo "STATE: +offline-report" >&2
    echo "INFO: The printer is not connected; the job waits." >&2
    until connected; do sleep 0.5; done
    echo "STATE: -offline-report" >&2
    echo "INFO: The printer is connected again." >&2
fi

# A simulated printer throws an unfinished job away, as a real one does with a page of which the rest never comes.
begun=
if [ -f "$device" ]; then
    begun=$device.begun
    if [ -s "$begun" ]; then
        read -r size _ < "$begun"
        truncate -s "<$size" "$device"
    else
        size=$(stat -c %s "$device")
    fi
    echo "$size $3" > "$begun"
fi

left=$4
while [ "$left" -gt 0 ]; do
    # nocreat: a device that vanishes now must not become a file.
    if ! setpriv --pdeathsig KILL /bin/sh -c '[ "$PPID" = "$1" ] && exec dd if="$2" of="$3" bs=1M \
        conv=nocreat,notrunc oflag=append status=none' copy $$ "$file" "$device"; then
        echo "ERROR: The printer did not take the data; the job starts again." >&2
        sleep 2 # retry-current-job means at once
        exit 1
    fi
    left=$((left - 1))
done
[ -z "$printed" ] || : > "$printed"
[ -z "$begun" ] || rm -f "$begun"
"""


class CupsFiles:
    """The places. `install` makes them what they should be; it is repeated at every start."""

    def __init__(self, state_dir: Path, run_dir: Path, server_bin: Path) -> None:
        self.home = state_dir / "cups"
        self.socket = run_dir / "cups" / "cups.sock"
        self.simulated = state_dir / "simulated"
        self._server_bin = server_bin

    def install(self) -> tuple[str, ...]:
        """Write everything, remove an old socket, and say how cupsd is started. Blocks on disk.

        Raises AgentError when there is no cupsd here or it could not work; OSError when the disk fails.
        """
        cupsd = shutil.which("cupsd", path=SEARCH)
        if cupsd is None:
            raise AgentError(
                Reason.UPSTREAM_UNAVAILABLE, "there is no cupsd on this system", hint="apt-get install cups-daemon"
            )
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.statvfs(self.home).f_flag & os.ST_NOEXEC:
            raise AgentError(
                Reason.UPSTREAM_UNAVAILABLE,
                f"{self.home} is mounted with noexec, so cupsd cannot run its back end there",
                hint="put state_dir on a file system mounted with exec",
            )
        for name in ("etc", "spool/tmp", "cache", "state", "bin/backend", "bin/daemon", "share/mime", "share/banners"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        self.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket.parent.chmod(0o700)
        self.socket.unlink(missing_ok=True)
        # cups-exec puts a back end into its place before it becomes it; cupsd refuses what others could have written.
        executor = self.home / "bin/daemon/cups-exec"
        executor.unlink(missing_ok=True)
        executor.symlink_to(self._server_bin / "daemon/cups-exec")
        _write(self.home / "bin/backend/opencdi", BACKEND, 0o700)
        # All jobs are raw; without types and filters of the system's there is nothing to load and nothing to choose.
        _write(self.home / "share/mime/opencdi.types", "application/vnd.cups-raw\n", 0o600)
        _write(self.home / "share/mime/opencdi.convs", "", 0o600)
        configuration = self.home / "etc/cupsd.conf", self.home / "etc/cups-files.conf"
        text = CUPSD_CONF.format(socket=self.socket, max_jobs=MAX_JOBS, history_s=HISTORY_S)
        _write(configuration[0], text, 0o600)
        text = FILES_CONF.format(home=self.home, user=_user(), group=_group())
        _write(configuration[1], text, 0o600)
        return (cupsd, "-f", "-c", str(configuration[0]), "-s", str(configuration[1]))

    def prepare_device(self, device_uri: str) -> None:
        """A simulated printer's file is there as long as the printer is. Raises OSError."""
        path = Path(device_uri.removeprefix("opencdi:"))
        if self.simulated in path.parents:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(0o600)


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode)
    path.write_text(text)


def _user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "lp" if "lp" in names else "nobody"


def _group() -> str:
    names = {entry.gr_name for entry in grp.getgrall()}
    return next((name for name in ("lp", "nogroup") if name in names), "nobody")
