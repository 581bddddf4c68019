"""Throwaway certificates, made by the system's openssl."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def openssl(directory: Path, *argv: str) -> None:
    subprocess.run(["openssl", *argv], cwd=directory, check=True, capture_output=True)


def make_ca(directory: Path, name: str) -> None:
    openssl(
        directory,
        *f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={name}".split(),
        *f"-keyout {name}.key -out {name}.crt -addext keyUsage=critical,keyCertSign".split(),
    )


def issue(directory: Path, ca: str, name: str) -> None:
    openssl(
        directory,
        *f"req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr".split(),
    )
    (directory / "ext").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    openssl(
        directory,
        *f"x509 -req -in {name}.csr -CA {ca}.crt -CAkey {ca}.key -CAcreateserial -days 2 -extfile ext -out {name}.crt".split(),
    )


def client(pki: Path, name: str = "", ca: str = "ca") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pki / f"{ca}.crt"))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if name:
        context.load_cert_chain(pki / f"{name}.crt", pki / f"{name}.key")
    return context
