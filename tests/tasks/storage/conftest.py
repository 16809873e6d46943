"""An S3 server, with a proxy before it that counts what is asked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.servers import Proxy, s3_server


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The URL of an S3 server."""
    with s3_server() as url:
        yield url


@pytest.fixture
def proxy(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy before an S3 server with an empty bucket, which this process takes for the store."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with Proxy(store).running() as proxy:
        settings = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": proxy.url}
        for name, value in (settings | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        if fs.exists("staging"):
            fs.rm("staging", recursive=True)
        fs.mkdir("staging")
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
