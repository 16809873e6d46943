"""Make thumbnails of samples from the images in the dataset's tars."""

from __future__ import annotations

import base64
import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import pyarrow.parquet as pq
from PIL import Image

from embedders.bad_images import BadImage
from embedders.errors import InputError, MalformedShard, one_line
from embedders.ids import printable
from embedders.image_headers import sniff
from embedders.images import MAX_PIXELS, decode
from embedders.quarantine import Reason
from embedders.samples import Component
from embedders.tar import map_tar, read_tar
from embedders.tar_index import parse_index
from tasks.manifest import Manifest
from tasks.records import layer_record
from tasks.relocation import missing_dataset
from tasks.storage.arrow_file import arrow_file_by_parts
from tasks.storage.folder import Folder
from tasks.wording import counted

IMAGE_BYTES = 64 << 20
"""Larger members are not read for a thumbnail."""


class Pictures:
    """Read images of samples from the tars, at the offsets in the index.

    A shard whose tar is gone has no pictures; `lost` says why, by shard.

    Example:
        >>> pictures = Pictures("/data/shards", "/data/out", "image_embedding")
        >>> pictures.of([("00000", "000000003")], side=96)
        {('00000', '000000003'): 'data:image/webp;base64,UklGR…'}
    """

    def __init__(
        self,
        dataset: str,
        output: str,
        layer: str,
        image_component: str | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """Open the dataset and the output.

        Args:
            dataset: Folder or URL with the tars.
            output: Folder or URL of the output.
            layer: The layer whose ids and quarantine tell which sample is which.
            image_component: The embedder's, to find a sample's image.
            max_pixels: The embedder's. Larger images have no picture.
        """
        self.source, self.output, self.layer, self.component = Folder(dataset), Folder(output), layer, image_component
        self.max_pixels = max_pixels or MAX_PIXELS
        self.lost: dict[str, str] = {}
        self._known: dict[str, Mapping[str, Component]] = {}

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Self:
        """Open what a manifest tells of: the images that the vectors of its layer were made from."""
        component, limit = (manifest.embedder.get(name) for name in ("image_component", "max_pixels"))
        return cls(manifest.dataset, manifest.output, manifest.column, component, limit)

    @property
    def missing(self) -> str:
        """Return a sentence that says why pictures are missing; "" if none is."""
        if not self.lost:
            return ""
        shard, why = next(iter(self.lost.items()))
        cause = missing_dataset(self.source.url) or f"such as {shard}: {why}"
        return f"no pictures of {counted(len(self.lost), 'shard')}: {cause}"

    def of(self, places: Sequence[tuple[str, str]], side: int) -> dict[tuple[str, str], str]:
        """Return thumbnails of samples.

        Args:
            places: Shard and id of each sample.
            side: The longer side of a thumbnail, in pixels.

        Returns:
            WebP thumbnails as data URLs, by shard and id. Samples that cannot be shown are left out.
        """
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
        """Return the names of samples' images in their tars.

        Args:
            places: Shard and id of each sample.

        Returns:
            The names by shard and id. Samples whose tars cannot be read are left out.
        """
        found = {}
        for shard in {shard for shard, _ in places}:
            with self._noting(shard):
                components = self._components(shard)
                ids = {sample_id for of, sample_id in places if of == shard} & components.keys()
                found.update({(shard, sample_id): printable(components[sample_id].name) for sample_id in ids})
        return found

    @contextlib.contextmanager
    def _noting(self, shard: str) -> Iterator[None]:
        """Skip a shard whose tar is gone, cannot be reached or was replaced; note why in `lost`."""
        try:
            yield
        except (OSError, InputError, MalformedShard) as error:
            self.lost[shard] = one_line(error)

    def _components(self, shard: str) -> Mapping[str, Component]:
        """Return the image of each sample of a shard by its id in the output; it is read once."""
        if shard not in self._known:
            self._known[shard] = self._read_components(shard)
        return self._known[shard]

    def _read_components(self, shard: str) -> Mapping[str, Component]:
        """Return the image of each sample of a shard by its id in the output.

        No json is read for the ids: the output has them in the order of the tar, without the quarantined samples.

        Raises:
            MalformedShard: Index and output do not hold the same samples.
        """
        tar = self.source.info(f"{shard}.tar")
        index = parse_index(self.output.read_text(f"index/{shard}.idx") or "", tar.fingerprint, None)
        if index is None and self.source.is_local:
            index = read_tar(map_tar(self.source.path(tar.name)), tar.name)
        if index is None:
            raise MalformedShard(f"{tar.name}: no index of it as it is now")
        bad = self._quarantined(shard)
        with arrow_file_by_parts(self.output, self.output.info(f"layers/{self.layer}/{shard}.parquet")) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False)
            ids = parquet.read(columns=["id"], use_threads=False).column(0).to_pylist()
        record = layer_record(parquet.metadata)
        if record is None or not record.in_order:
            raise MalformedShard(f"{tar.name}: its vectors are not in the order of the tar")
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
        """Return the ids of a shard's quarantined samples by member."""
        name = f"quarantine/{self.layer}/{shard}.parquet"
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
    """Return a thumbnail of an encoded image as a data URL.

    Args:
        encoded: The image file.
        side: The longer side of the thumbnail, in pixels.
        max_pixels: Larger images have no thumbnail.

    Returns:
        A WebP thumbnail; None for an image that cannot be decoded. A truncated JPEG is shown as far as it goes.
    """
    out = io.BytesIO()
    try:
        thumbnail = _decoded(encoded, side, max_pixels)
        thumbnail.thumbnail((side, side))
        thumbnail.save(out, "WEBP", quality=55)
    except (BadImage, MemoryError, OSError, ValueError):  # the last two if a side of the thumbnail has no pixel left
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
