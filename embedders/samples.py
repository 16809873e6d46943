"""What a sample is: the members of a tar that share a key, and which of them is the image."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from embedders.ids import printable

KeyDot = Literal["first", "last"]
"""Which dot of a file name ends the sample's key."""
IGNORED_EXAMPLES, NAME_SHOWN = 5, 200
_NO_IMAGES = frozenset(["BUFR", "GRIB", "HDF5", "MPEG", "PDF"])
"""Formats that Pillow tells by name and that are no images: tables, weather, films and documents."""
_WEBDATASET = frozenset(["img", "jpg", "jpeg", "pbm", "pgm", "png", "pnm", "ppm"])


@functools.cache
def image_extensions() -> frozenset[str]:
    """Every extension, in lower case and without a dot, that the installed Pillow or webdataset takes for an image."""
    registered = Image.registered_extensions().items()
    known = (ext.lstrip(".") for ext, kind in registered if kind in Image.OPEN and kind not in _NO_IMAGES)
    return frozenset(known) | _WEBDATASET


@functools.lru_cache(1024)
def is_image(extension: str) -> bool:
    """Whether a component is an image by the last part of its extension."""
    return extension.rpartition(".")[2].lower() in image_extensions()


def chosen_extensions(image_component: str | None) -> list[str]:
    """The extensions that an `image_component` such as "left.jpg" or "jpg,png" names, in lower case."""
    names = (name.strip().removeprefix(".").lower() for name in (image_component or "").split(","))
    return [name for name in names if name]


class Component(NamedTuple):
    """One member of a sample: `extension` is what follows the first dot, `offset` and `size` are in bytes."""

    extension: str
    offset: int
    size: int
    name: str


class Sample(NamedTuple):
    """The members that share a key, in the order of the tar."""

    key: str
    components: tuple[Component, ...]

    def images(self, chosen: str | None = None) -> tuple[Component, ...]:
        """The components that are images by their last extension.

        Args:
            chosen: An extension, or several with commas between them. The first one that the sample has counts, in
                any case of its letters.
        """
        if chosen is None:
            return tuple([c for c in self.components if is_image(c.extension)])
        for extension in chosen_extensions(chosen):
            if found := tuple(c for c in self.components if c.extension.lower() == extension):
                return found
        return ()

    def json(self) -> Component | None:
        """The sample's `.json` component."""
        for component in self.components:  # faster than a generator, and run once a sample
            if component.extension.lower() == "json":
                return component
        return None


class Ignored(NamedTuple):
    """The members that are part of no sample: how many there are, and the names of the first ones."""

    total: int = 0
    examples: tuple[str, ...] = ()

    def and_one(self, name: str) -> Ignored:
        """These, and one more."""
        few = len(self.examples) < IGNORED_EXAMPLES
        return Ignored(self.total + 1, (*self.examples, printable(name)[:NAME_SHOWN]) if few else self.examples)


NONE_IGNORED = Ignored()


@dataclass(frozen=True)
class TarIndex:
    """The plan of a shard: its samples in the order of their first members, and the members that are none of them."""

    samples: tuple[Sample, ...]
    ignored: Ignored = NONE_IGNORED
    doubt: str = ""
    """Why the tar may lack members at its end, although it can be read; empty for nearly all."""


def split_name(name: str, key_dot: KeyDot = "first") -> tuple[str, str] | None:
    """The key and the extension of a member's name; None if it has none, or is hidden.

    `tar -C folder .` writes "./a.jpg", whose key is "a".
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start) if key_dot == "first" else name.rfind(".", start)
    if dot <= start or dot == len(name) - 1 or name[start] == ".":
        return None
    return without_dot_folder(name[:dot]), name[dot + 1 :]


def without_dot_folder(key: str) -> str:
    return key[2:] if key.startswith("./") else key
