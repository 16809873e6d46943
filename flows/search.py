"""`python -m flows.search OUT --image photo.jpg`: the images of a dataset that are most like one."""

from __future__ import annotations

import html
import io
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App, CycloptsError
from rich.console import Console
from rich.table import Table

from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.engine import Engine
from embedders.errors import InputError, MalformedShard
from embedders.webdataset import chosen_extensions, open_shard
from embedders.weights import RANDOM
from flows.cli import one_line
from flows.config import load_embedder
from tasks.embed import resolve_device
from tasks.report import read_manifest
from tasks.sample import Pictures, data_url
from tasks.search import Found, find_vector, nearest
from tasks.shards import digest
from tasks.storage import Folder

SHEET = "search.html"
SIDE = 240
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}
main{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:200px;font-size:12px;overflow-wrap:anywhere}
img{max-width:200px;max-height:200px;display:block}"""

app = App(
    name="python -m flows.search",
    help="Find the images of a dataset that are most like a photograph, or like one of its own.",
    help_format="plaintext",
    version_flags=[],
)


@app.default
def search(
    output: str,
    *,
    image: Path | None = None,
    id: str | None = None,
    count: int = 12,
    checkpoint: str | None = None,
    embedder: str | None = None,
    sheet: Path | None = None,
) -> list[Found]:
    """Print the nearest images with their paths and cosines, and write them as a page with pictures.

    Parameters
    ----------
    output
        The --output of a run of flows.embed.
    image
        A photograph; it is embedded as the dataset was.
    id
        The id of a sample of the dataset, instead.
    count
        How many to show.
    checkpoint
        The weights file, if the dataset was embedded with one.
    embedder
        The custom embedder as module:Class, if the dataset was embedded with one.
    sheet
        The page to write; by default search.html in the output.
    """
    if (image is None) == (id is None):
        raise InputError("give either --image FILE or --id ID")
    if count < 1:
        raise InputError(f"--count: give at least 1, not {count}")
    folder = Folder(output)
    manifest = read_manifest(output)
    made_by = manifest.embedder
    if image is not None:
        asked, wanted = rebuild(made_by, checkpoint, embedder), digest(made_by)
        query, shown = embed_image(image, asked), data_url(image.read_bytes(), SIDE)
    else:
        assert id is not None
        query, wanted, shown = find_vector(folder, id), None, None
    found = nearest(folder, query, count, wanted)
    pictures = Pictures(manifest.dataset, output, made_by.get("image_component"), made_by.get("max_pixels"))
    places = [one.place for one in found]
    members = pictures.members(places)
    show(found, members)
    page = contact_sheet(str(image or id), shown, found, members, pictures.of(places, SIDE))
    if sheet is not None:
        sheet.write_text(page)
    else:
        folder.write_text(SHEET, page)
    print(f"pictures: {sheet or folder.path(SHEET)}", file=sys.stderr)
    return found


def rebuild(made_by: Mapping[str, Any], checkpoint: str | None, custom: str | None) -> ImageEmbedder:
    """The embedder that a dataset was made with, from its fingerprint.

    :raises InputError: it cannot be had from there, or is not the same any more.
    """
    if custom is not None:
        made = load_embedder(custom)
    elif made_by.get("embedder") != "TimmImageEmbedder" or not made_by.get("model"):
        raise InputError(f"the dataset was embedded by {made_by.get('embedder')}; give it with --embedder module:Class")
    else:
        precision = str(made_by["precision"])
        chosen = {name: made_by[name] for name in ("exif", "max_pixels", "image_component") if name in made_by}
        made = TimmImageEmbedder(
            made_by["model"],
            pretrained=made_by["weights"] != RANDOM,
            checkpoint=checkpoint,
            batch_size=1,
            num_threads_per_worker=1,
            normalize_embeddings=made_by["normalized"],
            autocast=precision in {"float16 on a GPU", "float8"},  # one photograph needs no float8
            precision="auto" if precision in {"float32", "float16 on a GPU", "float8"} else precision,
            **chosen,
        )
    try:
        now = made.fingerprint()
    except InputError as error:
        if checkpoint is None and custom is None:
            raise InputError(f"{error}; if the dataset was embedded with a --checkpoint, give it here too") from error
        raise
    if digest(now) != digest(dict(made_by)):
        different = sorted(name for name in {*now, *made_by} if now.get(name) != made_by.get(name))
        way = "give the --checkpoint it was made with" if "weights" in different else "its vectors cannot be compared"
        raise InputError(f"the embedder is not the dataset's ({', '.join(different)}); {way}")
    return made


def embed_image(image: Path, embedder: ImageEmbedder) -> np.ndarray:
    """The vector of a photograph, (dimensions,) float32: as the only sample of a shard, it goes the dataset's way.

    :raises InputError: no such file, or no image.
    """
    try:
        data = image.read_bytes()
    except OSError as error:
        raise InputError(f"{image}: {error.strerror}; give a photograph") from error
    chosen = chosen_extensions(embedder.image_component)
    extension = chosen[0] if chosen else image.suffix.lstrip(".") or "jpg"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "query.tar"
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(f"query.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        shard = open_shard(path, image_component=embedder.image_component)
        (embedded,) = Engine(embedder, resolve_device("auto")).embed([shard])
    if not embedded.ids:
        bad = embedded.quarantined[0]
        raise InputError(f"{image}: cannot be embedded: {bad.reason} ({bad.detail})")
    return np.array(embedded.vectors[0])


def show(found: Sequence[Found], members: Mapping[tuple[str, str], str]) -> None:
    """Print the table."""
    table = Table("cosine", "id", "path")
    for one in found:
        table.add_row(f"{one.score:.4f}", one.id, f"{one.shard}.tar/{members.get(one.place, '')}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def contact_sheet(
    query: str,
    shown: str | None,
    found: Sequence[Found],
    members: Mapping[tuple[str, str], str],
    urls: Mapping[tuple[str, str], str],
) -> str:
    """The same as a page with pictures that needs no network."""

    def figure(url: str | None, text: str) -> str:
        picture = f'<img src="{url}" alt="">' if url else ""
        return f"<figure>{picture}{html.escape(text)}</figure>"

    said = [f"{one.score:.4f} {one.shard}.tar/{members.get(one.place, one.id)}" for one in found]
    figures = "".join(figure(urls.get(one.place), text) for one, text in zip(found, said, strict=True))
    head = f"<meta charset=utf-8><title>{html.escape(query)}</title><style>{STYLE}</style>"
    asked = f"<h1>{html.escape(query)}</h1>{figure(shown, '') if shown else ''}"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{asked}<h2>Nearest</h2><main>{figures}</main></body>"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; its exit status: 2 where the call or its input is wrong."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError, MalformedShard, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
