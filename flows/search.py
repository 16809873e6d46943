"""`python -m flows.search OUT --image photo.jpg`: the images of a dataset that are most like one."""

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
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.engine import Engine
from embedders.errors import InputError, MalformedShard, one_line
from embedders.samples import chosen_extensions
from embedders.webdataset import open_shard
from embedders.weights import RANDOM, cached_hub, is_of_hub
from flows.config import load_embedder
from flows.errors import explain
from tasks.dataset.nearest import Found, find_vector, nearest, read_rows
from tasks.dataset.sampling import Pictures, data_url
from tasks.embed import resolve_device
from tasks.keys import digest
from tasks.manifest import Manifest, read_manifest
from tasks.storage.folder import Folder, parted, writing

SHEET = "search.html"
SIDE = 240
COLUMNS = 4
"""Of the metadata, shown by default."""
LONGEST = 80
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
    sheet: str | None = None,
) -> list[Found]:
    """Print the nearest images with their cosines, paths and metadata, and write them as a page with pictures.

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
    column
        A column of the metadata to show; give it again for another one. The first four by default.
    checkpoint
        The weights file, if the dataset was embedded with one that is not where it was.
    embedder
        The custom embedder as module:Class, if the dataset was embedded with one.
    dataset
        The dataset's folder, if it is not where it was.
    sheet
        The page to write. By default a new one in the output: search.html, then search-2.html.
    """
    if (image is None) == (id is None):
        raise InputError("give either --image FILE or --id ID")
    if count < 1:
        raise InputError(f"--count: give at least 1, not {count}")
    folder = Folder(output)
    manifest = read_manifest(output, dataset)
    if image is not None:
        shown = data_url(read_photograph(image), SIDE)
        query, wanted = embed_query(image, manifest, checkpoint, embedder), digest(manifest.embedder)
    else:
        assert id is not None
        query, wanted, shown = find_vector(folder, id), None, None
    found = nearest(folder, query, count, wanted)
    rows = read_rows([Folder(manifest.metadata), Folder(folder.place("merged"))], found, manifest.id_col)
    component, limit = (manifest.embedder.get(name) for name in ("image_component", "max_pixels"))
    pictures = Pictures(manifest.dataset, output, component, limit)
    places = [one.place for one in found]
    lines = _lines(found, pictures.members(places), rows, _columns(rows, column))
    show(lines)
    urls = pictures.of(places, SIDE)
    page = contact_sheet(str(image or id), shown, lines, [urls.get(place) for place in places])
    print(f"pictures: {write_sheet(folder, sheet, page)}", file=sys.stderr)
    if pictures.missing:
        print(f"warning: {pictures.missing}", file=sys.stderr)
    return found


def write_sheet(output: Folder, sheet: str | None, page: str) -> str:
    """Write the page; where it is now.

    :param sheet: where to; None for a name in the output that is not taken.
    :raises InputError: it cannot be written there.
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
    """The bytes of a file on a disk or in a store.

    :raises InputError: there is no such file.
    """
    folder, name = parted(image)
    try:
        return folder.read_range(name, 0, folder.info(name).size)
    except OSError as error:
        raise InputError(f"{image}: {error.strerror or one_line(error)}; give a photograph") from error


def embed_query(image: str, manifest: Manifest, checkpoint: str | None, custom: str | None) -> np.ndarray:
    """The vector of a photograph by the embedder of a dataset; a hub is asked only for what is not on this machine.

    :raises InputError: the embedder cannot be had, or this is no image.
    """
    try:
        with cached_hub():
            embedder = rebuild(manifest, checkpoint, custom)
    except InputError:
        return embed_image(image, rebuild(manifest, checkpoint, custom))
    with cached_hub():
        return embed_image(image, embedder)


def rebuild(manifest: Manifest, checkpoint: str | None, custom: str | None) -> ImageEmbedder:
    """The embedder that a dataset was made with, from what its manifest says.

    :param checkpoint: the weights file, instead of the one that the manifest names.
    :param custom: the embedder, as module:Class.
    :raises InputError: it cannot be had from there, or is not the same any more.
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
    if digest(now) != digest(dict(made_by)):
        different = sorted(name for name in {*now, *made_by} if now.get(name) != made_by.get(name))
        way = "its vectors cannot be compared"
        if "weights" in different:
            other = f"{checkpoint} is another file by now" if checkpoint else "its weights have changed"
            way = f"{other}; give the --checkpoint it was made with"
        raise InputError(f"the embedder is not the dataset's ({', '.join(different)}); {way}")
    return made


def _recorded_checkpoint(manifest: Manifest) -> str | None:
    """The weights file that the manifest names; None where the weights are the model's own.

    :raises InputError: the dataset was embedded with one that is not there, or that the manifest does not name.
    """
    path, weights = manifest.checkpoint, str(manifest.embedder["weights"])
    if path:
        if not Path(path).is_file():
            raise InputError(f"the dataset was embedded with {path}, which is not there any more; give --checkpoint")
        return path
    if weights.startswith("sha256:") and is_of_hub(manifest.embedder["model"]):
        raise InputError(f"the dataset was embedded with a weights file ({weights[:19]}…); give it with --checkpoint")
    return None


def embed_image(image: str | Path, embedder: ImageEmbedder) -> np.ndarray:
    """The vector of a photograph, (dimensions,) float32: as the only sample of a shard, it goes the dataset's way.

    :raises InputError: no such file, or no image.
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
        (embedded,) = Engine(embedder, resolve_device("auto")).embed([shard])
    if not embedded.ids:
        bad = embedded.quarantined[0]
        raise InputError(f"{image}: cannot be embedded: {bad.reason} ({bad.detail})")
    return np.array(embedded.vectors[0])


def _columns(rows: Mapping[tuple[str, str], Mapping[str, Any]], asked: Sequence[str]) -> Sequence[str]:
    """The columns to show.

    :raises InputError: one that was asked for is not there.
    """
    known = list(dict.fromkeys(name for row in rows.values() for name in row))
    unknown = [name for name in asked if name not in known]
    if unknown:
        there = f"there are {', '.join(known)}" if known else "the images found have none"
        raise InputError(f"--column: no column {', '.join(unknown)}; {there}")
    return asked or known[:COLUMNS]


def _lines(
    found: Sequence[Found],
    members: Mapping[tuple[str, str], str],
    rows: Mapping[tuple[str, str], Mapping[str, Any]],
    columns: Sequence[str],
) -> list[dict[str, str]]:
    """What is said of each image that was found, by heading."""
    lines = []
    for one in found:
        line = {"cosine": f"{one.score:.4f}", "id": one.id, "path": f"{one.shard}.tar/{members.get(one.place, '')}"}
        values = {name: rows.get(one.place, {}).get(name) for name in columns}
        said = {name: "" if value is None else " ".join(str(value).split()) for name, value in values.items()}
        lines.append(line | {f"{name} (metadata)" if name in line else name: value for name, value in said.items()})
    return lines


def show(lines: Sequence[Mapping[str, str]]) -> None:
    """Print the table."""
    table = Table()
    for name in lines[0]:
        table.add_column(Text(name), no_wrap=name in {"cosine", "id"}, overflow="fold")
    for line in lines:
        table.add_row(*(Text(value if len(value) <= LONGEST else f"{value[:LONGEST]}…") for value in line.values()))
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def contact_sheet(query: str, shown: str | None, lines: Sequence[Mapping[str, str]], urls: Sequence[str | None]) -> str:
    """The same as a page with pictures that needs no network.

    :param shown: the picture of the query; `urls` those of the lines.
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
    """Run the command line; its exit status: 2 where the call or its input is wrong."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError, MalformedShard, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
