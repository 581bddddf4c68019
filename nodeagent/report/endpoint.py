"""Where the API server is and who the agent is to it: the pod's service account, or the file that $KUBECONFIG names."""

from __future__ import annotations

import base64
import binascii
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import msgspec
import yaml

from nodeagent.config import KubernetesConfig
from nodeagent.errors import ConfigError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MAX_FILE_BYTES = 60_000
"""Of a kubeconfig or a token: small enough to be read at once anywhere."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A server and credentials. Files are read when they are needed, so that rotated ones are seen."""

    server: str
    """`https://host:port`, without a slash at the end."""
    ca_file: str = ""
    ca_data: bytes = b""
    token_file: str = ""
    token: str = ""
    cert_file: str = ""
    key_file: str = ""
    cert_data: bytes = b""
    key_data: bytes = b""

    def read_token(self) -> str:
        """The bearer token, empty when there is none. Raises OSError. Blocks."""
        if not self.token_file:
            return self.token
        with Path(self.token_file).open("rb") as file:
            token = file.read(MAX_FILE_BYTES).decode("ascii", errors="replace").strip()
        if not token.isprintable() or " " in token:
            raise OSError(f"{self.token_file} does not hold a token")
        return token

    def ssl_context(self) -> ssl.SSLContext:
        """Trust and client certificate. Raises OSError (ssl.SSLError is one). Blocks."""
        context = ssl.create_default_context(
            cafile=self.ca_file or None, cadata=self.ca_data.decode("ascii", errors="ignore") or None
        )
        # A cluster's CA is made by kubeadm and others without the extensions that Python 3.13 began to insist on.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file or None)
        elif self.cert_data:
            fd = os.memfd_create("client-certificate", os.MFD_CLOEXEC)  # load_cert_chain takes files only
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.write(self.cert_data + b"\n" + self.key_data)
                context.load_cert_chain(f"/proc/self/fd/{fd}")
            finally:
                os.close(fd)
        return context


def discover(
    config: KubernetesConfig, environ: Mapping[str, str] = os.environ, service_account: Path = SERVICE_ACCOUNT
) -> Endpoint | None:
    """The API server to use, or None when there is none or it is switched off.

    Raises ConfigError when $KUBECONFIG names a file that cannot be used.
    """
    if config.api == "off":
        return None
    if named := environ.get("KUBECONFIG", ""):
        return from_kubeconfig(Path(named.split(os.pathsep)[0]))
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    token = service_account / "token"
    if not (host and port and token.exists()):
        return None
    return Endpoint(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        ca_file=str(service_account / "ca.crt"),
        token_file=str(token),
    )


# ---- kubeconfig (client-go tools/clientcmd/api/v1); what is not needed to reach one server is passed over


class _Kebab(msgspec.Struct, frozen=True, rename="kebab"):
    """Keys such as `certificate-authority-data`."""


class _Cluster(_Kebab, frozen=True):
    server: str
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False


class _User(_Kebab, frozen=True):
    token: str = ""
    token_file: str = msgspec.field(default="", name="tokenFile")
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    exec_: object = msgspec.field(default=None, name="exec")
    auth_provider: object = None


class _Context(_Kebab, frozen=True):
    cluster: str
    user: str = ""


class _NamedCluster(msgspec.Struct, frozen=True):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct, frozen=True):
    name: str
    user: _User


class _NamedContext(msgspec.Struct, frozen=True):
    name: str
    context: _Context


class _Kubeconfig(_Kebab, frozen=True):
    current_context: str = ""
    clusters: tuple[_NamedCluster, ...] = ()
    contexts: tuple[_NamedContext, ...] = ()
    users: tuple[_NamedUser, ...] = ()


def from_kubeconfig(path: Path) -> Endpoint:
    """The endpoint of the current context. Raises ConfigError; credentials from programs (`exec`) are not supported."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"KUBECONFIG {path}: larger than {MAX_FILE_BYTES} bytes")
        config = msgspec.convert(yaml.safe_load(data), _Kubeconfig)
    except OSError as error:
        raise ConfigError(f"KUBECONFIG {path}: {error.strerror}", hint="unset KUBECONFIG to go without") from error
    except (yaml.YAMLError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(f"KUBECONFIG {path}: {' '.join(str(error).split())}") from error
    context = next((c.context for c in config.contexts if c.name == config.current_context), None)
    cluster = next((c.cluster for c in config.clusters if context and c.name == context.cluster), None)
    if context is None or cluster is None:
        raise ConfigError(f"KUBECONFIG {path}: its current-context {config.current_context!r} names no cluster")
    user = next((u.user for u in config.users if u.name == context.user), _User())
    if user.exec_ or user.auth_provider:
        raise ConfigError(
            f"KUBECONFIG {path}: user {context.user!r} gets its credentials from a program, which is not supported",
            hint="use a token, a tokenFile or a client certificate",
        )
    if cluster.insecure_skip_tls_verify:
        raise ConfigError(f"KUBECONFIG {path}: insecure-skip-tls-verify is not supported", hint="name the cluster's CA")
    if not cluster.server.startswith(("https://", "http://")):
        raise ConfigError(f"KUBECONFIG {path}: server {cluster.server!r} is not a URL")

    def beside(name: str) -> str:
        return str(path.parent / name) if name else ""

    return Endpoint(
        server=cluster.server.rstrip("/"),
        ca_file="" if cluster.certificate_authority_data else beside(cluster.certificate_authority),
        ca_data=_decoded(path, cluster.certificate_authority_data),
        token=user.token,
        token_file="" if user.token else beside(user.token_file),
        cert_file="" if user.client_certificate_data else beside(user.client_certificate),
        key_file="" if user.client_key_data else beside(user.client_key),
        cert_data=_decoded(path, user.client_certificate_data),
        key_data=_decoded(path, user.client_key_data),
    )


def _decoded(path: Path, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ConfigError(f"KUBECONFIG {path}: a *-data value is not base64") from error
