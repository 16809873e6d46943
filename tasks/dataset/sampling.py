"""A sample of what an output holds: vectors of some rows, and the pictures that they were made of."""

from __future__ import annotations

import base64
import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from embedders.errors import InputError, MalformedShard, one_line
from embedders.ids import printable
from embedders.image_headers import sniff
from embedders.images import MAX_PIXELS, BadImage, decode
from embedders.quarantine import Reason
from embedders.samples import Component
from embedders.tar import map_tar, read_tar
from embedders.tar_index import parse_index
from tasks.counted import counted
from tasks.relocation import missing_dataset
from tasks.storage.folder import Folder

SHARDS = 16
"""Shards that a sample is taken from: what is read of an output does not grow with it."""
IMAGE_BYTES = 64 << 20
"""Larger members are not read for a thumbnail."""


@dataclass(frozen=True)
class Sampled:
    """Rows of an output: `vectors` is (n, dimensions) float32, `places` the shard and the id of each."""

    vectors: np.ndarray
    places: tuple[tuple[str, str], ...]


def sample_vectors(output: Folder, count: int, generator: np.random.Generator) -> Sampled:
    """Up to `count` rows of one row group each of up to `SHARDS` shards, without repetition."""
    folder = Folder(f"{output.url.rstrip('/')}/embeddings")
    files = folder.list(".parquet")
    chosen = sorted(generator.permutation(len(files))[:SHARDS].tolist())
    vectors: list[np.ndarray] = []
    places: list[tuple[str, str]] = []
    for left, number in zip(range(len(chosen), 0, -1), chosen, strict=True):
        with folder.open(files[number].name) as file:
            parquet = pq.ParquetFile(file)
            if not parquet.metadata.num_rows:
                continue
            group = int(generator.integers(parquet.num_row_groups))
            table = parquet.read_row_group(group, use_threads=False)  # see `tasks.manifest.read_quarantine`
        rows = np.sort(generator.permutation(len(table))[: -(-(count - len(places)) // left)])
        matrix = table.column(1).combine_chunks().values.to_numpy().reshape(len(table), -1)
        vectors.append(np.asarray(matrix[rows], np.float32))
        ids = table.column(0).to_pylist()
        places += [(files[number].name.removesuffix(".parquet"), ids[row]) for row in rows]
    whole = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
    return Sampled(whole, tuple(places))


class Pictures:
    """Thumbnails of samples, read out of the tars at the places that the index tells; none where a tar is gone.

    `lost` has the shards whose tars could not be read, and why.
    """

    def __init__(
        self, dataset: str, output: str, image_component: str | None = None, max_pixels: int | None = None
    ) -> None:
        self.source, self.output, self.component = Folder(dataset), Folder(output), image_component
        self.max_pixels = max_pixels or MAX_PIXELS
        self.lost: dict[str, str] = {}

    @property
    def missing(self) -> str:
        """Why pictures could not be shown, as a sentence; "" if all could."""
        if not self.lost:
            return ""
        shard, why = next(iter(self.lost.items()))
        what = f"no pictures of {counted(len(self.lost), 'shard')}"
        return f"{what}: {missing_dataset(self.source.url) or f'such as {shard}: {why}'}"

    def of(self, places: Sequence[tuple[str, str]], side: int) -> dict[tuple[str, str], str]:
        """Data URLs of thumbnails of at most `side` pixels a side, by shard and id, for those that can be shown."""
        wanted: dict[str, set[str]] = defaultdict(set)
        for shard, sample_id in places:
            wanted[shard].add(sample_id)
        found = {}
        for shard, ids in wanted.items():
            with self._noting(shard):
                components = self._components(shard)
                for sample_id in sorted(ids & components.keys()):
                    if url := self._thumbnail(shard, components[sample_id], side):
                        found[shard, sample_id] = url
        return found

    def members(self, places: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """The images' names in their tars, by shard and id, for those that are within reach."""
        found = {}
        for shard in {shard for shard, _ in places}:
            with self._noting(shard):
                components = self._components(shard)
                ids = {sample_id for of, sample_id in places if of == shard} & components.keys()
                found.update({(shard, sample_id): printable(components[sample_id].name) for sample_id in ids})
        return found

    @contextlib.contextmanager
    def _noting(self, shard: str) -> Iterator[None]:
        """Go on without a shard whose tar is gone, out of reach or another one by now."""
        try:
            yield
        except (OSError, InputError, MalformedShard) as error:
            self.lost[shard] = one_line(error)

    def _components(self, shard: str) -> Mapping[str, Component]:
        """The image of each sample of a shard, by the id that the output has for it.

        Ids are in the order of the tar, less the quarantined members: no json is read to tell them.

        :raises MalformedShard: index and output do not tell of the same samples.
        """
        tar = self.source.info(f"{shard}.tar")
        index = parse_index(self.output.read_text(f"index/{shard}.idx") or "", tar.fingerprint, None)
        if index is None and self.source.is_local:
            index = read_tar(map_tar(self.source.path(tar.name)), tar.name)
        if index is None:
            raise MalformedShard(f"{tar.name}: no index of it as it is now")
        bad = self._quarantined(shard)
        with self.output.open(f"embeddings/{shard}.parquet") as file:
            ids = pq.ParquetFile(file).read(columns=["id"], use_threads=False).column(0).to_pylist()
        good, found = [], {}
        for sample in index.samples:
            images = sample.images(self.component)
            image = images[0] if len(images) == 1 else None
            name = printable((image or sample.components[0]).name)
            if name not in bad:
                good.append(image)
            elif image is not None:
                found[bad[name]] = image
        if len(good) != len(ids):
            raise MalformedShard(f"{tar.name}: {len(good)} samples, but {len(ids)} ids")
        return found | {i: image for i, image in zip(ids, good, strict=True) if image is not None}

    def _quarantined(self, shard: str) -> dict[str, str]:
        """Ids of quarantined samples by member."""
        name = f"quarantine/{shard}.parquet"
        if not self.output.has(name):
            return {}
        with self.output.open(name) as file:
            return {row["member"]: row["id"] for row in pq.ParquetFile(file).read(use_threads=False).to_pylist()}

    def _thumbnail(self, shard: str, component: Component, side: int) -> str | None:
        if component.size > IMAGE_BYTES:
            return None
        start = component.offset
        return data_url(self.source.read_range(f"{shard}.tar", start, start + component.size), side, self.max_pixels)


def data_url(encoded: bytes, side: int, max_pixels: int = MAX_PIXELS) -> str | None:
    """A WebP thumbnail of an encoded image as a data URL; None for what cannot be decoded, by the rules of embedding.

    Of a JPEG that is cut short there is what there is of it.
    """
    out = io.BytesIO()
    try:
        thumbnail = _decoded(encoded, side, max_pixels)
        thumbnail.thumbnail((side, side))
        thumbnail.save(out, "WEBP", quality=55)
    except (BadImage, MemoryError, OSError, ValueError):  # the last two where the thumbnail has no side left
        return None
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _decoded(encoded: bytes, side: int, max_pixels: int) -> Image.Image:
    shown = (side * 2, side * 2)
    try:
        return decode(encoded, max_pixels=max_pixels, at_least=shown)
    except BadImage as bad:
        if bad.reason is not Reason.TRUNCATED or sniff(encoded[:32]) != "jpeg":
            raise
        return decode(encoded + b"\xff\xd9", max_pixels=max_pixels, at_least=shown)
