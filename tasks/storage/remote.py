"""What remote stores have in common: packages that access them, errors of their clients, secrets in their URLs."""

from __future__ import annotations

import errno
import re
from typing import Any

from fsspec.config import conf

from embedders.errors import one_line

PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError)
CLIENTS = frozenset({"aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "httpx", "huggingface_hub"})
"""Packages whose errors are not all OSErrors."""

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PACKAGES |= {"abfs": "adlfs", "az": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "smb": "smbprotocol"}

_SECRET_IN_QUERY = re.compile(r"[?&][^=&]*(token|sig|secret|password|credential|key)[^=&]*=", re.IGNORECASE)


CONNECTIONS = 64
"""Requests at once to S3 by one process; its client's own limit is 10, which at 30 ms each are 330 per second."""


def client_options(protocol: str) -> dict[str, Any]:
    """Return what fsspec's file system for a kind of store is made with, beside what the user's configuration says."""
    if protocol in {"file", "local"}:
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write there too
    if protocol in {"s3", "s3a"}:
        given = conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS, **given}
    return options


def as_os_error(error: Exception) -> Exception:
    """Return the OSError that an error of a store's client stands for.

    Args:
        error: Any exception.

    Returns:
        A PermissionError, a FileNotFoundError or an OSError with the client's error as its cause; or the error itself
        if it is an OSError already or not a store's. Never raise that `from` itself: an error that is its own cause
        keeps every frame it went through.
    """
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and _package(cause) == "aiohttp":
        error = cause  # fsspec calls whatever an HTTP server answers "not found"
    if not _package(error):
        return error
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    names = {base.__name__ for base in type(error).__mro__}
    text = one_line(error, named=True)
    kind = OSError
    if names & {"NoCredentialsError", "CredentialRetrievalError", "PartialCredentialsError"} or status in {401, 403}:
        kind = PermissionError
    if names & {"ParamValidationError", "RepositoryNotFoundError", "EntryNotFoundError"} or status in {404, 410}:
        kind = FileNotFoundError
    os_error = kind(text)
    os_error.__cause__ = error
    return os_error


def _package(error: BaseException) -> str:
    """Return the package of a store's client that an error's class, or a base of it, comes from; "" if none."""
    packages = (base.__module__.partition(".")[0] for base in type(error).__mro__)
    return next((package for package in packages if package in CLIENTS), "")


def missing_package(protocol: str, error: ImportError) -> str:
    """Return what to install to access a kind of store, or the error's own text if that is unknown."""
    package = PACKAGES.get(protocol)
    return f"{protocol}:// needs a package: pip install {package}" if package else one_line(error)


def beyond_the_end(error: OSError) -> bool:
    """Return whether a store refused a range because the file is empty."""
    return error.errno == errno.EINVAL and "range" in str(error).lower()


def way_out(protocol: str, error: OSError) -> str:
    """Return what the user can do about an error of a store."""
    if isinstance(error, PermissionError):
        where = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" if protocol == "s3" else "the credentials"
        return f"check {where}, and that they allow reading and writing"
    if isinstance(error, FileNotFoundError):
        return "check the name; create the bucket if it does not exist"
    return "check the address (AWS_ENDPOINT_URL) and the network" if protocol == "s3" else "check the address"


def has_secret(url: str) -> bool:
    """Return whether a URL holds a password, an access key or a token."""
    for link in url.split("::"):
        protocol, separator, rest = link.partition("://")
        if not separator:
            continue
        host, _, path = rest.partition("/")
        user, at, _ = host.rpartition("@")
        if at and (":" in user or protocol in {"http", "https", "s3", "s3a", "gs", "gcs"}):
            return True
        _, colon, port = host.rpartition(":")
        if colon and not port.isdigit() and "@" in path:  # a key with a slash in it
            return True
        if _SECRET_IN_QUERY.search(rest):
            return True
    return False


def redacted(url: str) -> str:
    """Return a URL without its possible secrets: scheme, host and path, but no user and no query.

    Example:
        >>> redacted("s3://KEY:SECRET@host/bucket?token=abc")
        's3://***@host/bucket'
    """
    protocol, _, rest = url.rpartition("::")[2].partition("://")
    return f"{protocol}://***@{rest.rpartition('@')[2]}".partition("?")[0]
