"""The seccomp profiles as data, and what is kept open."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from nodeagent.seats import confine

PROFILES = Path(__file__).resolve().parents[2] / "seccomp"


@pytest.mark.parametrize("name", ["seat-worker", "seat-program"])
def test_profiles_compile_to_something_small(name: str) -> None:
    assert 20 < len(confine.compile_profile(PROFILES / f"{name}.json")) < 400


@pytest.mark.parametrize("name", ["seat-worker", "seat-program"])
def test_profiles_say_who_they_are_for_and_what_they_cost_and_no_call_is_listed_twice(name: str) -> None:
    profile = json.loads((PROFILES / f"{name}.json").read_text())
    header = " ".join(profile["comment"])
    assert "Who it is for" in header and "What it costs" in header
    unconditional = [call for rule in profile["syscalls"] if not rule.get("args") for call in rule["names"]]
    assert len(unconditional) == len(set(unconditional))


def test_the_worker_profile_has_no_way_to_a_process_a_path_or_a_peer() -> None:
    profile = json.loads((PROFILES / "seat-worker.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = {c for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for c in rule["names"]}
    assert not allowed & {
        *("fork", "vfork", "clone", "clone3", "execve", "execveat", "kill", "pidfd_open", "pidfd_send_signal"),
        *("open", "openat", "openat2", "creat", "mkdir", "unlink", "unlinkat", "rename", "symlink", "chmod", "chown"),
        *("socket", "connect", "bind", "listen", "prctl", "seccomp", "memfd_create", "shmget", "shmat", "msgget"),
    }


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"defaultAction": "SCMP_ACT_NOTIFY", "syscalls": []}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "surprise": 1}]}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO",'
        ' "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_ALMOST"}]}]}',
    ],
)
def test_what_is_no_profile_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        confine.compile_profile(tmp_path / "bad.json")


def test_a_call_that_libseccomp_does_not_know_is_left_to_the_default(tmp_path: Path) -> None:
    rule = {"names": ["a_call_of_the_year_2040", "ptrace"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS}
    (tmp_path / "new.json").write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    assert len(confine.compile_profile(tmp_path / "new.json"))


@pytest.mark.parametrize("keep", [set(), {0}, {0, 1, 2}, {0, 1, 2, 7, 9}, {5}])
def test_everything_but_what_is_kept_is_closed(keep: set[int]) -> None:
    """In a child: the descriptors of pytest are none to play with."""
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(20, 30):
                os.dup2(null, fd)
            for fd in keep:
                os.dup2(null, fd)
            confine.close_all_but(keep)
            found = {fd for fd in range(64) if _is_open(fd)}
            os._exit(0 if found == keep else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
