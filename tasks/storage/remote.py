"""What stores have in common: the packages that reach them, how their errors are told, secrets in their URLs."""

from __future__ import annotations

import errno
import re

from embedders.errors import one_line

PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError)
CLIENTS = frozenset({"aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "httpx", "huggingface_hub"})
"""Packages that talk to stores, whose errors are not all OSErrors."""

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
PACKAGES |= {"abfs": "adlfs", "az": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "smb": "smbprotocol"}

_SECRET_IN_QUERY = re.compile(r"[?&][^=&]*(token|sig|secret|password|credential|key)[^=&]*=", re.IGNORECASE)


def as_os_error(error: Exception) -> Exception:
    """Return the OSError that a store client's error stands for, with that as its cause.

    What is an OSError already, or no store's error, comes back as it is: never raise it `from` itself, since an error
    that is its own cause keeps every frame it went through.
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
    told = kind(text)
    told.__cause__ = error
    return told


def _package(error: BaseException) -> str:
    """The store's client that an error's class, or one of its bases, comes from; "" if none."""
    packages = (base.__module__.partition(".")[0] for base in type(error).__mro__)
    return next((package for package in packages if package in CLIENTS), "")


def missing_package(protocol: str, error: ImportError) -> str:
    """What to install for a kind of store."""
    package = PACKAGES.get(protocol)
    return f"{protocol}:// needs a package: pip install {package}" if package else one_line(error)


def beyond_the_end(error: OSError) -> bool:
    """Whether a store refuses a range because the file is empty."""
    return error.errno == errno.EINVAL and "range" in str(error).lower()


def way_out(protocol: str, error: OSError) -> str:
    """What a person can do about an error of a store."""
    if isinstance(error, PermissionError):
        where = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" if protocol == "s3" else "the credentials"
        return f"check {where}, and that they may read and write there"
    if isinstance(error, FileNotFoundError):
        return "check the name; a bucket is not made here"
    return "check the address (AWS_ENDPOINT_URL) and the network" if protocol == "s3" else "check the address"


def has_secret(url: str) -> bool:
    """Whether a URL holds a password, an access key or a token."""
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
    """A URL without what may be secret: its host, if that much can be told, and nothing of its query."""
    protocol, _, rest = url.rpartition("::")[2].partition("://")
    return f"{protocol}://***@{rest.rpartition('@')[2]}".partition("?")[0]
