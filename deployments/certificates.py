"""`python -m deployments.certificates FOLDER`: the TLS files with which a Dask cluster keeps strangers out.

Whoever can send messages to a scheduler or a worker can run code as its owner. With these files, only processes that
can read the folder are listened to. Everyone in the cluster shares one key; it is the authority that signed itself.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

CERTIFICATE, KEY = "tls.crt", "tls.key"
AUTHORITY = "ca.crt"
"""The names that a Kubernetes Secret of type kubernetes.io/tls and cert-manager use."""


def write_certificates(folder: Path) -> None:
    """Write a new certificate and its key, valid for a year, to a folder that only its owner can read.

    Args:
        folder: Is created with mode 700; its parent must exist. On a cluster, put it where all nodes see it.

    Raises:
        OSError: The folder exists or cannot be created.
    """
    from distributed.security import Security

    made = Security.temporary()
    folder.mkdir(mode=0o700)
    texts = {AUTHORITY: made.tls_ca_file, CERTIFICATE: made.tls_worker_cert, KEY: made.tls_worker_key}
    for name, text in texts.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)


def tls_settings(folder: Path | str) -> dict[str, str]:
    """Return Dask's settings that use the files of a folder in the client, the scheduler and the workers."""
    settings = {"distributed.comm.require-encryption": "true", "distributed.comm.tls.ca-file": f"{folder}/{AUTHORITY}"}
    for role in ("client", "scheduler", "worker"):
        settings[f"distributed.comm.tls.{role}.cert"] = f"{folder}/{CERTIFICATE}"
        settings[f"distributed.comm.tls.{role}.key"] = f"{folder}/{KEY}"
    return settings


def as_variables(settings: dict[str, str]) -> dict[str, str]:
    """Return the environment variables that give Dask some settings."""
    return {"DASK_" + name.upper().replace(".", "__").replace("-", "_"): value for name, value in settings.items()}


def main(arguments: Sequence[str]) -> int:
    """Write the files and print the variables that use them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.certificates", description=(__doc__ or "").strip())
    parser.add_argument("folder", type=Path, help="folder to create, readable by you alone")
    folder = parser.parse_args(arguments).folder.absolute()
    try:
        write_certificates(folder)
    except OSError as error:
        parser.error(f"{folder}: {error.strerror}; name a new folder inside an existing one")
    for name, value in as_variables(tls_settings(folder)).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
