"""One closed list of reasons, one exception that carries them.

A `Reason` is for machines: the same word is the gRPC detail, the metric label, the Event reason and the
field in JSON. The sentence beside it is for people and says what happened to which device; the hint says
what to do about it.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why something was refused or failed. Adding a member is free; renaming one is a breaking change."""

    # who may hold a device
    NAMESPACE_NOT_ALLOWED = "namespace_not_allowed"
    LABELS_DO_NOT_MATCH = "labels_do_not_match"
    SERVICE_ACCOUNT_NOT_ALLOWED = "service_account_not_allowed"
    IDENTITY_UNAVAILABLE = "identity_unavailable"
    SANDBOX_NOT_ALLOWED = "sandbox_not_allowed"
    INIT_CONTAINER_ONLY = "init_container_only"
    # devices and leases
    NO_RULE = "no_rule"
    DEVICE_UNKNOWN = "device_unknown"
    DEVICE_UNPLUGGED = "device_unplugged"
    LEASED_UNDER_OTHER_RESOURCE = "leased_under_other_resource"
    SERVICE_UNAVAILABLE = "service_unavailable"
    STALE_SLOT = "stale_slot"
    DEADLINE = "deadline"
    # bytes from a seat
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"
    TOO_SLOW = "too_slow"
    NOT_YOURS = "not_yours"
    NOT_SUPPORTED = "not_supported"
    # the daemon and its surroundings
    CONFIG_INVALID = "config_invalid"
    STATE_INVALID = "state_invalid"
    NOT_RUNNING = "not_running"
    KUBELET_UNAVAILABLE = "kubelet_unavailable"
    CRI_UNAVAILABLE = "cri_unavailable"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    INTERNAL = "internal"


class AgentError(Exception):
    """A failure with a reason for machines, a sentence for people and, where there is one, a remedy."""

    def __init__(self, reason: Reason, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(AgentError):
    """The configuration cannot be used; `message` starts with the path of the key, e.g. `devices.rules[2].give: ...`."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(Reason.CONFIG_INVALID, message, hint=hint)
