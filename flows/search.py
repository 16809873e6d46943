"""`python -m flows.search OUT --image photo.jpg`: find the images of a dataset that are most like one."""

from __future__ import annotations

import html
import io
import itertools
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any

import numpy as np
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.engine import Engine, Rows
from embedders.errors import InputError, one_line
from embedders.fingerprint import digest
from embedders.samples import chosen_extensions
from embedders.webdataset import open_shard
from embedders.weights import RANDOM, cached_hub, is_of_hub
from flows.config import load_embedder
from flows.errors import exit_status
from tasks.dataset.nearest import Found, find_vector, nearest, read_rows
from tasks.dataset.thumbnails import Pictures, data_url
from tasks.embed import resolve_device
from tasks.manifest import Manifest, read_manifest
from tasks.storage.folder import Folder, parted, writing

SHEET = "search.html"
SIDE = 240
"""Longer side of a picture, in pixels."""
COLUMNS = 4
"""Columns of the metadata that are shown by default."""
VALUE_LENGTH = 80
"""Characters of a value in the table."""
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
    image: str | None = None,
    id: str | None = None,
    count: int = 12,
    column: Annotated[tuple[str, ...], Parameter(consume_multiple=False, negative=())] = (),
    checkpoint: str | None = None,
    embedder: str | None = None,
    dataset: str | None = None,
    layer: str | None = None,
    sheet: str | None = None,
) -> list[Found]:
    """Print the nearest images with their cosines, paths and metadata, and write a page with their pictures.

    Parameters
    ----------
    output
        The --output of a run of flows.embed.
    image
        A photograph to search for; it is embedded as the dataset was.
    id
        Or the id of a sample of the dataset.
    count
        How many images to show.
    column
        A column of the metadata to show; repeat it for more. The first four by default.
    checkpoint
        The weights file, if the dataset was embedded with one that has moved.
    embedder
        The custom embedder as module:Class, if the dataset was embedded with one.
    dataset
        The dataset's folder, if it has moved.
    layer
        The layer of vectors to search, if the output has several. By default the first of the last run.
    sheet
        The page to write. By default a new one in the output: search.html, then search-2.html.
    """
    if (image is None) == (id is None):
        raise InputError("give either --image FILE or --id ID")
    if count < 1:
        raise InputError(f"--count: give at least 1, not {count}")
    folder, manifest = Folder(output), read_manifest(output, dataset, layer)
    if image is not None:
        shown = data_url(read_photograph(image), SIDE)
        query, wanted = embed_query(image, manifest, checkpoint, embedder), digest(manifest.embedder)
    else:
        assert id is not None
        query, wanted, shown = find_vector(folder, manifest.column, id), None, None
    found = nearest(folder, manifest.column, query, count, wanted)
    rows = read_rows([Folder(manifest.metadata), Folder(folder.place("merged"))], found, manifest.id_col)
    pictures = Pictures.of_manifest(manifest)
    places = [one.place for one in found]
    lines = _lines(found, pictures.members(places), rows, _columns(rows, column))
    show(lines)
    page = contact_sheet(str(image or id), shown, lines, list(map(pictures.of(places, SIDE).get, places)))
    print(f"pictures: {write_sheet(folder, sheet, page)}", file=sys.stderr)
    if pictures.missing:
        print(f"warning: {pictures.missing}", file=sys.stderr)
    return found


def write_sheet(output: Folder, sheet: str | None, page: str) -> str:
    """Write the page and return its path or URL.

    Args:
        output: The output's folder.
        sheet: Where to write; None for an unused name in the output.
        page: The page, as HTML.

    Raises:
        InputError: It cannot be written there.
    """
    if sheet is not None:
        folder, name = parted(sheet)
    else:
        names = itertools.chain([SHEET], (f"search-{number}.html" for number in itertools.count(2)))
        folder, name = output, next(name for name in names if not output.has(name))
    with writing(sheet or output.place(name), "give another --sheet FILE"):
        folder.write_text(name, page)
    return sheet or output.place(name)


def read_photograph(image: str) -> bytes:
    """Return the bytes of a file on a disk or in a store.

    Raises:
        InputError: There is no such file.
    """
    folder, name = parted(image)
    try:
        return folder.read_range(name, 0, folder.info(name).size)
    except OSError as error:
        raise InputError(f"{image}: {error.strerror or one_line(error)}; give a photograph") from error


def embed_query(image: str, manifest: Manifest, checkpoint: str | None, custom: str | None) -> np.ndarray:
    """Return the vector of a photograph by a dataset's embedder; download weights only if this machine lacks them.

    Args:
        image: Path or URL of the photograph.
        manifest: The manifest of the dataset's output.
        checkpoint: The weights file, instead of the one that the manifest names.
        custom: The embedder as module:Class.

    Returns:
        (dimensions,) float32.

    Raises:
        InputError: The embedder is not available, or the file is no image.
    """
    try:
        with cached_hub():
            embedder = rebuild(manifest, checkpoint, custom)
    except InputError:
        return embed_image(image, rebuild(manifest, checkpoint, custom))
    with cached_hub():
        return embed_image(image, embedder)


def rebuild(manifest: Manifest, checkpoint: str | None, custom: str | None) -> ImageEmbedder:
    """Rebuild the embedder that a dataset was made with from its manifest.

    Args:
        manifest: The manifest of the dataset's output.
        checkpoint: The weights file, instead of the one that the manifest names.
        custom: The embedder as module:Class.

    Raises:
        InputError: The embedder is not available, or no longer the same.
    """
    made_by = manifest.embedder
    if custom is not None:
        made = load_embedder(custom)
    elif made_by.get("embedder") != "TimmImageEmbedder" or not made_by.get("model"):
        raise InputError(f"the dataset was embedded by {made_by.get('embedder')}; give it with --embedder module:Class")
    else:
        checkpoint = checkpoint or _recorded_checkpoint(manifest)
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
    now = made.fingerprint()
    if custom is None and made_by["precision"] == "float8":
        now["precision"] = "float8"  # its vectors can be compared with float16's
    if digest(now) != digest(dict(made_by)):
        different = sorted(name for name in {*now, *made_by} if now.get(name) != made_by.get(name))
        way = "its vectors are not comparable"
        if "weights" in different:
            other = f"{checkpoint} is another file now" if checkpoint else "its weights have changed"
            way = f"{other}; give the --checkpoint it was made with"
        raise InputError(f"the embedder is not the dataset's ({', '.join(different)}); {way}")
    return made


def _recorded_checkpoint(manifest: Manifest) -> str | None:
    """Return the weights file that the manifest names; None if the weights are the model's own.

    Raises:
        InputError: The dataset was embedded with a file that is gone, or that the manifest does not name.
    """
    path, weights = manifest.checkpoint, str(manifest.embedder["weights"])
    if path:
        if not Path(path).is_file():
            raise InputError(f"the dataset was embedded with {path}, which no longer exists; give --checkpoint")
        return path
    if weights.startswith("sha256:") and is_of_hub(manifest.embedder["model"]):
        raise InputError(f"the dataset was embedded with a weights file ({weights[:19]}…); give it with --checkpoint")
    return None


def embed_image(image: str | Path, embedder: ImageEmbedder) -> np.ndarray:
    """Embed a photograph as a dataset's images are embedded: as the only sample of a shard.

    Args:
        image: Path or URL of the photograph.
        embedder: The dataset's embedder.

    Returns:
        (dimensions,) float32.

    Raises:
        InputError: There is no such file, or it is no image.
    """
    data = read_photograph(str(image))
    chosen = chosen_extensions(embedder.image_component)
    extension = chosen[0] if chosen else PurePath(image).suffix.lstrip(".") or "jpg"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "query.tar"
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(f"query.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        shard = open_shard(path, image_component=embedder.image_component)
        session = embedder.open(resolve_device("auto"))
        results = list(Engine([session]).embed([shard]))
    for found in results:
        if isinstance(found, Rows):
            return np.array(found.columns[embedder.image_embedding_column][0])
        if found.quarantined[0]:
            bad = found.quarantined[0][0]
            raise InputError(f"{image}: cannot be embedded: {bad.reason} ({bad.detail})")
    raise InputError(f"{image}: the embedder gave no vector for it")


def _columns(rows: Mapping[tuple[str, str], Mapping[str, Any]], asked: Sequence[str]) -> Sequence[str]:
    """Return the columns to show: those asked for, or the first few.

    Raises:
        InputError: A column that was asked for does not exist.
    """
    known = list(dict.fromkeys(name for row in rows.values() for name in row))
    unknown = [name for name in asked if name not in known]
    if unknown:
        existing = f"there are {', '.join(known)}" if known else "the images found have none"
        raise InputError(f"--column: no column {', '.join(unknown)}; {existing}")
    return asked or known[:COLUMNS]


def _lines(
    found: Sequence[Found],
    members: Mapping[tuple[str, str], str],
    rows: Mapping[tuple[str, str], Mapping[str, Any]],
    columns: Sequence[str],
) -> list[dict[str, str]]:
    """Return the cells of the table for each image found, by heading."""
    lines = []
    for one in found:
        line = {"cosine": f"{one.score:.4f}", "id": one.id, "path": f"{one.shard}.tar/{members.get(one.place, '')}"}
        values = {name: rows.get(one.place, {}).get(name) for name in columns}
        for name, value in values.items():
            heading = f"{name} (metadata)" if name in line else name
            line[heading] = "" if value is None else " ".join(str(value).split())
        lines.append(line)
    return lines


def _shortened(value: str) -> str:
    return value if len(value) <= VALUE_LENGTH else f"{value[:VALUE_LENGTH]}…"


def show(lines: Sequence[Mapping[str, str]]) -> None:
    """Print the table."""
    table = Table()
    for name in lines[0]:
        table.add_column(Text(name), no_wrap=name in {"cosine", "id"}, overflow="fold")
    for line in lines:
        table.add_row(*(Text(_shortened(value)) for value in line.values()))
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def contact_sheet(query: str, shown: str | None, lines: Sequence[Mapping[str, str]], urls: Sequence[str | None]) -> str:
    """Return the table as an HTML page with pictures that needs no network.

    Args:
        query: What was searched for: a path, a URL or an id.
        shown: Its picture as a data URL, if there is one.
        lines: The cells of each image found, by heading.
        urls: Their pictures as data URLs; None for one that cannot be shown.
    """

    def figure(url: str | None, *texts: str) -> str:
        picture = f'<img src="{url}" alt="">' if url else ""
        return f"<figure>{picture}{'<br>'.join(html.escape(text) for text in texts if text)}</figure>"

    figures = "".join(
        figure(url, f"{line['cosine']} {line['path']}", *list(line.values())[3:])
        for line, url in zip(lines, urls, strict=True)
    )
    head = f"<meta charset=utf-8><title>{html.escape(query)}</title><style>{STYLE}</style>"
    asked = f"<h1>{html.escape(query)}</h1>{figure(shown) if shown else ''}"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{asked}<h2>Nearest</h2><main>{figures}</main></body>"


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status: 2 if the call or its input is wrong."""
    return exit_status(app, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
