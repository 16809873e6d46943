"""What a shard is: where its files lie, and what identifies the content of its tar and metadata."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from embedders.errors import InputError
from embedders.samples import KeyDot, image_extensions
from tasks.storage.folder import FileInfo, Folder, in_bulk

UNPACK = {".tar.gz": "gunzip FILE", ".tgz": "gunzip FILE", ".tar.zst": "zstd -d --rm FILE", ".tar.xz": "unxz FILE"}
"""Compressed tars, and what unpacks them."""

WRITTEN = ("index", "layers", "merged", "metadata", "quarantine", "unmatched")
"""The folders of an output that hold a file per shard."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar and the metadata Parquet beside it, named by the tar's path in the dataset without its ending.

    `tar_fingerprint` goes into keys. `tar_listed` is what the store said of the tar when the run began, where that is
    something else. `key_dot` is the dot of a file name that ends a sample's key.
    """

    name: str
    dataset: str
    output: str
    tar_bytes: int
    tar_fingerprint: str
    metadata_fingerprint: str | None
    tar_listed: str | None = None
    key_dot: KeyDot = "first"

    @property
    def source(self) -> Folder:
        """The dataset's folder."""
        return Folder(self.dataset)

    @property
    def target(self) -> Folder:
        """The output's folder."""
        return Folder(self.output)

    @property
    def tar(self) -> str:
        """The tar's name in the dataset."""
        return f"{self.name}.tar"

    @property
    def tar_etag(self) -> str | None:
        """What the listing of a store said of the tar's content; None where it said only how long it is."""
        _, _, etag = (self.tar_listed or self.tar_fingerprint).partition("-")
        return etag or None

    @property
    def metadata(self) -> str | None:
        """The name of the Parquet beside the tar, in the dataset; None where there is none."""
        return None if self.metadata_fingerprint is None else f"{self.name}.parquet"

    @property
    def metadata_info(self) -> FileInfo:
        """What the dataset's listing says of the Parquet beside the tar, which is there."""
        assert self.metadata_fingerprint is not None
        return FileInfo.of(f"{self.name}.parquet", self.metadata_fingerprint)

    @property
    def index_file(self) -> str:
        """DALI's index, in the output."""
        return f"index/{self.name}.idx"

    def layer_file(self, layer: str) -> str:
        """Ids and values of a layer, in the output: the cache of the shard."""
        return f"layers/{layer}/{self.name}.parquet"

    def quarantine_file(self, layer: str) -> str:
        """The samples without a value in a layer, in the output; there only if there is such a sample."""
        return f"quarantine/{layer}/{self.name}.parquet"

    @property
    def unmatched_file(self) -> str:
        """Metadata rows without an image and images without a row, in the output; there only if there are any."""
        return f"unmatched/{self.name}.parquet"

    @property
    def merged_file(self) -> str:
        """The metadata joined with the layers, in the output."""
        return f"metadata/{self.name}.parquet"


def find_shards(dataset: str, output: str, key_dot: KeyDot = "first") -> list[Shard]:
    """Every `.tar` below the dataset's folder, sorted by name.

    Args:
        key_dot: Which dot of a file name ends a sample's key.

    Raises:
        InputError: No such folder, no tar in it, compressed ones, which have no offsets to read at, or a name that is
            not UTF-8.
    """
    for path in (dataset, output):
        _check_name(path)
    folder = Folder(dataset)
    try:
        files = folder.list(".tar", ".parquet", *UNPACK)
        if not any(file.name.endswith((".tar", *UNPACK)) for file in files):
            raise _no_shards(folder)
    except OSError as error:
        folder.refuse(error)
    metadata = {f.name.removesuffix(".parquet"): f.fingerprint for f in files if f.name.endswith(".parquet")}
    shards = []
    for file in files:
        for suffix, command in UNPACK.items():
            if file.name.endswith(suffix):
                raise InputError(f"{dataset}/{file.name}: compressed shards are not read; unpack it: {command}")
        if file.name.endswith(".tar"):
            _check_name(f"{dataset}/{file.name}")
            name = file.name.removesuffix(".tar")
            metadata_fingerprint = metadata.get(name)
            shard = Shard(name, dataset, output, file.size, file.fingerprint, metadata_fingerprint, key_dot=key_dot)
            shards.append(shard)
    return shards


def _no_shards(folder: Folder) -> InputError:
    """What is said of a dataset without shards: what it is instead, and what to do."""
    url = folder.url.rstrip("/")
    if not folder.exists():
        parent, _, name = url.rpartition("/")
        if not folder.is_file():
            return InputError(f"{url}: no such folder; give the folder that holds the .tar shards")
        if name.endswith(".tar"):
            return InputError(f"{url}: this is one shard; give the folder that holds it: {parent or '.'}")
        if name.endswith(".zip"):
            unpack = f"unzip {name} -d pictures && {_pack('pictures')}"
            return InputError(f"{url}: a zip archive; unpack it and pack its files into tars: {unpack}")
        return InputError(f"{url}: a file; give the folder that holds the .tar shards")
    images = folder.list(*(f".{extension}" for kind in image_extensions() for extension in (kind, kind.upper())))
    if images:
        found = f"no .tar files, but pictures such as {images[0].name} ({len(images):,} in all)"
        return InputError(f"{url}: {found}; pack them: {_pack(url)}, and give shards as the dataset")
    zips = folder.list(".zip")
    if zips:
        found = f"no .tar files, but zip archives such as {zips[0].name} ({len(zips):,} in all)"
        return InputError(f"{url}: {found}; unpack them and pack their files into tars: {_pack('pictures')}")
    return InputError(f"{url}: no .tar files; give the folder that holds the WebDataset shards")


def _pack(folder: str) -> str:
    return f"mkdir shards && tar -C {shlex.quote(folder)} -cf shards/00000.tar ."


def _check_name(path: str) -> None:
    """Refuse names that neither a Parquet file nor Prefect can store."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise InputError(
            f"{shown}: its name is not UTF-8; rename it (convmv -f latin1 -t utf8 finds such names)"
        ) from error


def with_content_fingerprints(shards: Sequence[Shard]) -> list[Shard]:
    """The same shards, each identified by a hash of its tar's bytes; reads every tar whole."""

    def hashed(shard: Shard) -> Shard:
        return replace(shard, tar_fingerprint=content_fingerprint(shard), tar_listed=shard.tar_fingerprint)

    return in_bulk(hashed, shards)


def content_fingerprint(shard: Shard) -> str:
    """BLAKE2b of a tar's bytes."""
    with shard.source.local_copy(shard.tar) as path, open(path, "rb") as file:
        return "blake2b-" + hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sweep(output: str) -> None:
    """Remove what killed writers have left in an output; what else lies there is not looked at."""
    Folder(output).sweep(below=False)
    for kind in WRITTEN:
        Folder(f"{output.rstrip('/')}/{kind}").sweep()


class ShardReplaced(Exception):
    """A tar is another one than when the run began. Its shard fails by name; the next run takes it as it is then."""


def replaced(shard: Shard) -> ShardReplaced:
    """Return what is said of a tar that is another one."""
    return ShardReplaced(f"{shard.tar} was replaced or removed while the run went on; run again")


def check_unchanged(shard: Shard) -> None:
    """Prove that a tar that is read where it lies is still the one the run began with.

    A downloaded one was proven to be when it came, and the copy does not change.

    Raises:
        ShardReplaced: It is another one, or gone.
    """
    if shard.source.is_local:
        check_as_listed(shard)


def check_as_listed(shard: Shard) -> None:
    """Prove that a tar is still the one the run began with, by what its store says of it.

    Raises:
        ShardReplaced: It is another one, or gone.
    """
    listed = shard.tar_listed or shard.tar_fingerprint
    if not shard.source.is_local and "-" not in listed:
        return  # a store that lists no times and no etags
    if shard.source.fingerprint(shard.tar) != listed:
        raise replaced(shard)
