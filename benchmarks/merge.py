"""Measure the merge beside plain pyarrow, indexes beside DALI's script, and a run that has nothing to do.

    python -m benchmarks.merge [--part merge|memory|join|index|plan|rerun] [--shards N] [--folder FOLDER]

Prints each figure beside the one it is compared with, from the same run on the same machine, and their ratio. Files are
written first and then read from memory, so that no disk is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import io
import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.throughput import run_alone
from embedders import TimmImageEmbedder
from embedders.recipe import Recipe, recipes_of
from tasks.dataset.card import finish_dataset
from tasks.dataset.description import describe, footer
from tasks.dataset.join import Backend, join_arrow, join_frames
from tasks.dataset.vectors import rows_per_group, vector_array
from tasks.keys import layer_key
from tasks.layers import LayerWriter, versions
from tasks.merge_options import MergedColumn, MergeOptions
from tasks.plan import make_plan, merged_key
from tasks.records import Column, LayerRecord, MergeRecord, read_layer_record, with_record
from tasks.shards import Shard, find_shards

ROWS, DIMENSIONS, SHARDS, WORKERS, ROUNDS = 10_000, 768, 100, 2, 5
MEMORY_ROWS, MEMORY_DIMENSIONS = (10_000, 100_000, 1_000_000), 64
JOIN_IDS = (10_000, 100_000, 1_000_000, 10_000_000)
COLUMN = "image_embedding"
ORDERS = ("the layer's order", "another order")
INDEXED_TARS, INDEXED_SAMPLES, IMAGE_BYTES = 8, 4096, 55_000


@dataclass(frozen=True)
class Figure:
    """A line of the table: what was measured, the goal, and the figure."""

    what: str
    asked: str
    measured: str


# --- merge ------------------------------------------------------------------------------------------------------------


def merge(folder: str, shards: int = SHARDS) -> list[Figure]:
    """Rows of 768 float32 through the merge, and the same bytes through plain pyarrow, by turns."""
    return [figure for order in ORDERS for figure in _merge(f"{folder}/{order.split()[0]}", shards, order)]


def _merge(folder: str, shards: int, order: str) -> list[Figure]:
    names = [f"{number:05}" for number in range(shards)]
    shuffle = order == ORDERS[1]
    context = multiprocessing.get_context("spawn")
    halves = [names[i::WORKERS] for i in range(WORKERS)]
    with ProcessPoolExecutor(WORKERS, context) as pool:
        list(
            pool.map(
                _write_inputs, [folder] * shards, names, [ROWS] * shards, [DIMENSIONS] * shards, [shuffle] * shards
            )
        )
        list(pool.map(_copy, [folder] * WORKERS, [half[:1] for half in halves]))  # imports done, files seen

        def copy_all() -> float:
            shutil.rmtree(f"{folder}/plain", ignore_errors=True)
            started = time.perf_counter()
            list(pool.map(_copy, [folder] * WORKERS, halves))
            return time.perf_counter() - started

        with _cluster(folder) as merge_all:
            rounds = [(copy_all(), *merge_all(names)) for _ in range(ROUNDS)]
    plain, seconds, peak, rows = (statistics.median(found) for found in zip(*rounds, strict=True))
    ratio = statistics.median(plain / seconds for plain, seconds, *_ in rounds)
    one_shard = ROWS * DIMENSIONS * 4
    speed = 2 * shards * one_shard / 1e9 / seconds
    return [
        Figure(
            f"merge of {rows:,} rows × {DIMENSIONS} in {order}, {shards} shards, {WORKERS} workers, by plain pyarrow "
            f"reading and writing the same bytes, median of {ROUNDS}",
            "≥ 0.80",
            f"{ratio:.2f} ({seconds:.1f} s, {speed:.2f} GB/s; pyarrow {plain:.1f} s)",
        ),
        Figure(f"memory that a worker took for it, in shards, {order}", "< 3", f"{peak / one_shard:.2f}"),
    ]


def _columns(name: str, rows: int) -> dict[str, Any]:
    keys = [f"{name}{row:06}" for row in range(rows)]
    captions = [f"a photograph of something that is number {key}" for key in keys]
    return {"key": keys, "url": [f"https://example.org/{key}.jpg" for key in keys], "caption": captions}


def _write_inputs(folder: str, name: str, rows: int, dimensions: int, shuffle: bool) -> Shard:
    """Write a shard's metadata and its embeddings in another order. Its tar is never read."""
    rng = np.random.default_rng(int(name))
    data = Path(folder, "data")
    data.mkdir(parents=True, exist_ok=True)
    (data / f"{name}.tar").write_bytes(b"\0" * 1024)
    table = pa.table(_columns(name, rows))
    pq.write_table(table.take(rng.permutation(rows)) if shuffle else table, data / f"{name}.parquet")
    shard = _shard(folder, name)
    with LayerWriter(shard, COLUMN) as writer:
        for start in range(0, rows, 1000):
            ids = table["key"].slice(start, 1000).combine_chunks()
            vectors = rng.standard_normal((len(ids), dimensions), np.float32)
            writer.add(np.arange(start, start + len(ids)), ids, {COLUMN: vectors})
        writer.flush()
        key = layer_key(shard, COLUMN, "e", "key")
        writer.finish(LayerRecord(key, COLUMN, "e", rows, rows, {}, rows, writer.columns), [])
    return shard


def _shard(folder: str, name: str) -> Shard:
    return Shard(name, f"{folder}/data", f"{folder}/out", 1024, "1024-1", "1-1")


def _options(dimensions: int = DIMENSIONS) -> MergeOptions:
    return MergeOptions("key", (COLUMN,), (MergedColumn(COLUMN, COLUMN, "float32", (dimensions,)),))


def _copy(folder: str, names: Sequence[str]) -> None:
    """Read and write the same bytes without a join or checksums, with the fastest settings."""
    pa.set_cpu_count(1)
    Path(folder, "plain").mkdir(parents=True, exist_ok=True)
    for name in names:
        metadata = pq.read_table(Path(folder, "data", f"{name}.parquet"))
        layer = pq.read_table(Path(folder, "out", "layers", COLUMN, f"{name}.parquet"))
        pq.write_table(
            metadata.append_column(COLUMN, layer.column(1)),
            Path(folder, "plain", f"{name}.parquet"),
            row_group_size=rows_per_group(4 * DIMENSIONS),
            compression={"key": "zstd", "url": "zstd", "caption": "zstd", f"{COLUMN}.list.element": "none"},
            use_dictionary=metadata.column_names,
            write_statistics=metadata.column_names,
        )


@contextlib.contextmanager
def _cluster(folder: str) -> Iterator[Callable[[Sequence[str]], tuple[float, int, int]]]:
    """Start workers; what is yielded merges shards on them.

    Yields:
        A function from the shards' names to the seconds, the most memory that a worker took beyond what it had before
        any shard, and the rows.
    """
    from distributed import Client, LocalCluster

    from tasks.merge import merge_shard

    def merge_on(folder: str, names: Sequence[str]) -> list[MergeRecord]:
        shards = [_shard(folder, name) for name in names]
        records = {}
        for shard in shards:
            record = read_layer_record(shard.target, shard.layer_file(COLUMN))
            assert record is not None
            records[shard.name] = {COLUMN: record}
        of_each = [records[shard.name] for shard in shards]
        futures = client.map(merge_shard, shards, of_each, options=_options(), pure=False)
        merged: list[MergeRecord] = client.gather(futures)
        return merged

    with (
        LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, memory_limit=0, dashboard_address=None, silence_logs=40
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(_one_core)
        small = [f"{number:05}" for number in range(4 * WORKERS)]
        for name in small:
            _write_inputs(f"{folder}/small", name, 10, DIMENSIONS, False)
        merge_on(f"{folder}/small", small)  # what is imported is no shard
        before = client.run(_reset_peak)

        def merge_all(names: Sequence[str]) -> tuple[float, int, int]:
            shutil.rmtree(f"{folder}/out/metadata", ignore_errors=True)  # a first run replaces no file
            client.run(_reset_peak)
            started = time.perf_counter()
            records = merge_on(folder, names)
            seconds = time.perf_counter() - started
            after = client.run(_peak)
            return seconds, max(after[it] - before[it] for it in after), sum(record.rows for record in records)

        yield merge_all


def _one_core() -> None:
    """Limit Arrow in a worker to the one core that is the worker's."""
    pa.set_cpu_count(1)


def _reset_peak() -> int:
    """Reset the process's peak of memory; return the bytes that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(folder: str, largest: int = MEMORY_ROWS[-1]) -> list[Figure]:
    """The memory that the merge of one shard takes, by its rows, in a fresh process."""
    figures = []
    for order in ORDERS:
        for rows in (rows for rows in MEMORY_ROWS if rows <= largest):
            place = f"{folder}/memory-{rows}-{order.split()[0]}"
            run_alone(_write_inputs, place, "00000", rows, MEMORY_DIMENSIONS, order == ORDERS[1])
            peak, anonymous, seconds = run_alone(_merge_alone, place)
            what = f"memory for the merge of a shard of {rows:,} rows × {MEMORY_DIMENSIONS} in {order}"
            ids = f"of {rows * MEMORY_DIMENSIONS * 4 / 1e6:.0f} MB of vectors"
            figures.append(
                Figure(
                    what, "flat", f"{peak / 1e6:.0f} MB, {anonymous / 1e6:.0f} MB at the end, {ids}, {seconds:.1f} s"
                )
            )
            shutil.rmtree(place)
    return figures


def _merge_alone(folder: str) -> tuple[int, int, float]:
    """The most memory that the merge of a shard took, what of it the process keeps, and the seconds."""
    from tasks.merge import merge_shard

    _one_core()
    _write_inputs(f"{folder}/small", "00000", 10, MEMORY_DIMENSIONS, False)
    for place in (f"{folder}/small", folder):  # the first one for what is imported
        shard = _shard(place, "00000")
        record = read_layer_record(shard.target, shard.layer_file(COLUMN))
        assert record is not None
        before, anonymous, started = _reset_peak(), _status("RssAnon"), time.perf_counter()
        merge_shard(shard, {COLUMN: record}, _options(MEMORY_DIMENSIONS))
        seconds = time.perf_counter() - started
    return _peak() - before, _status("RssAnon") - anonymous, seconds


# --- join -------------------------------------------------------------------------------------------------------------


def join(_folder: str, largest: int = JOIN_IDS[-1]) -> list[Figure]:
    """Ids joined by Arrow, and by a Dask DataFrame on pandas and, if there is a GPU with it, on cuDF."""
    figures = []
    for count in (count for count in JOIN_IDS if count <= largest):
        found = run_alone(_time_joins, count)
        seconds = ", ".join(
            f"{name} {value:.3f} s" if value >= 0 else f"{name} is missing" for name, value in found.items()
        )
        figures.append(Figure(f"the places of {count:,} ids in another order, median of {ROUNDS}", "", seconds))
    return figures


def _time_joins(count: int) -> dict[str, float]:
    """Seconds by what joined; -1 for what is not installed."""
    rng = np.random.default_rng(0)
    ids = pa.chunked_array([pa.array(np.char.mod("%09d", np.arange(count)))])
    layers = {COLUMN: ids.take(pa.array(rng.permutation(count)))}
    ways: dict[str, Callable[[], dict[str, np.ndarray]]] = {"Arrow": lambda: join_arrow(ids, layers)}
    backends: tuple[Backend, ...] = ("pandas", "cudf")
    for backend in backends:
        if importlib.util.find_spec(backend) is not None:
            ways[backend] = functools.partial(join_frames, ids, layers, backend)
    expected = join_arrow(ids, layers)[COLUMN]
    found = dict.fromkeys(("Arrow", *backends), -1.0)
    for name, way in ways.items():
        assert (way()[COLUMN] == expected).all(), name  # the first call is not timed: it imports, and opens the GPU
        found[name] = statistics.median(_seconds(way) for _ in range(ROUNDS))
    return found


def _seconds(way: Callable[[], Any]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


# --- index ------------------------------------------------------------------------------------------------------------


def index(folder: str, tars: int = INDEXED_TARS) -> list[Figure]:
    """Make the index files of tars with DALI's script and with ours, and measure how much of the tars is read."""
    paths = [Path(folder, "tars", f"{number:05}.tar") for number in range(tars)]
    paths[0].parent.mkdir(exist_ok=True)
    _write_tar(paths[0])
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    os.sync()
    seconds = [_time_indexing(folder), _time_wds2idx(paths)]
    samples = tars * INDEXED_SAMPLES
    return [
        Figure(
            f"index files of {tars} tars of {INDEXED_SAMPLES} samples, by DALI's wds2idx script",
            "≥ 10",
            f"{seconds[1] / seconds[0]:.1f} ({samples / seconds[0]:,.0f} samples/s to {samples / seconds[1]:,.0f})",
        ),
        Figure("share of a cold tar's pages read for its index", "headers only", f"{_share_read(folder):.3f}"),
    ]


def _write_tar(path: Path) -> None:
    image = np.random.default_rng(0).bytes(IMAGE_BYTES)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(INDEXED_SAMPLES):
            caption = json.dumps({"key": f"{number:09}", "caption": "a photograph"}).encode()
            for extension, data in (("jpg", image), ("txt", b"a photograph"), ("json", caption)):
                member = tarfile.TarInfo(f"{number:09}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _time_indexing(folder: str) -> float:
    """Return the seconds for the index files of all tars, in a process that has started, as a worker has."""
    from tasks.index import index_tar

    shards = find_shards(f"{folder}/tars", f"{folder}/indexed")
    index_tar(shards[0], shards[0].source.path(shards[0].tar), keep=False)
    started = time.perf_counter()
    for shard in shards:
        index_tar(shard, shard.source.path(shard.tar), keep=True)
    return time.perf_counter() - started


def _time_wds2idx(paths: Sequence[Path]) -> float:
    """Return the seconds of DALI's script, run on one tar after the other as its documentation says."""
    script = shutil.which("wds2idx", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}") or "wds2idx"
    started = time.perf_counter()
    for path in paths:
        command = [script, str(path), str(path.with_suffix(".idx"))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _share_read(folder: str) -> float:
    """Drop a tar from memory and index it; return the share of its pages that are in memory then."""
    from tasks.index import index_tar

    shard = find_shards(f"{folder}/tars", f"{folder}/indexed")[0]
    path = shard.source.path(shard.tar)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _resident(file.fileno(), shard.tar_bytes) > 0.01:
            return float("nan")  # this file system does not let go of it
        index_tar(shard, path, keep=False)
        return _resident(file.fileno(), shard.tar_bytes)


def _resident(descriptor: int, size: int) -> float:
    """Return the share of a file's pages that are in memory."""
    data = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
    start = ctypes.addressof(ctypes.c_char.from_buffer(data))
    ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages)
    return sum(byte & 1 for byte in pages) / len(pages)


# --- plan and rerun ---------------------------------------------------------------------------------------------------


def plan(folder: str, counts: Sequence[int] = (10_000, 100_000)) -> list[Figure]:
    """Plan an output in which every shard is done; measure the time and the memory."""
    figures = []
    for count, asked in zip(counts, ("< 10 s, < 500 MB", "< 90 s"), strict=False):
        if not Path(folder, f"finished-{count}/out/manifest.json").exists():
            make_finished(Path(folder, f"finished-{count}"), count)
        seconds, taken, peak, left = run_alone(_plan, f"{folder}/finished-{count}")
        memory = f"{taken / 1e6:.0f} MB on top of the {(peak - taken) / 1e6:.0f} MB of the imports"
        measured = f"{seconds:.1f} s, {memory}, {left} left to do"
        figures.append(Figure(f"plan over {count:,} finished shards", asked, measured))
    return figures


def make_finished(folder: Path, count: int) -> None:
    """Write a dataset and an output of nearly empty finished shards, with footers as long as real ones."""
    (recipe,) = recipes_of(_embedder())
    for name in ("data", f"out/layers/{COLUMN}", "out/metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    metadata, column = pa.table({"key": ["a"], "caption": ["x"]}), vector_array(np.zeros((1, 64), np.float32))
    tar, parquet = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as written:
        written.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    pq.write_table(metadata, parquet)
    for number in range(count):
        (folder / f"data/{number:06}.tar").write_bytes(tar.getvalue())
        (folder / f"data/{number:06}.parquet").write_bytes(parquet.getvalue())
    shards = find_shards(str(folder / "data"), str(folder / "out"))
    options = replace(_options(64), schema=metadata.schema, made_of={COLUMN: recipe.fingerprint})
    layer, merged = pa.table({"id": ["a"], COLUMN: column}), metadata.append_column(COLUMN, column)
    known = _finished_record(recipe)
    notes = footer(merged.schema, describe(options, {COLUMN: known}))
    for shard in shards:
        record = replace(known, key=layer_key(shard, COLUMN, recipe.digest, "key"))
        _write_small(layer, record, f"{shard.output}/{shard.layer_file(COLUMN)}")
        done = MergeRecord(merged_key(shard, {COLUMN: record}, options), 1, 0, 0)
        _write_small(merged.replace_schema_metadata(notes), done, f"{shard.output}/{shard.merged_file}")
    finish_dataset(make_plan(shards, [recipe], options))
    (folder / "out/manifest.json").write_text("{}\n")


def _finished_record(recipe: Recipe) -> LayerRecord:
    columns = {COLUMN: Column("float32", (64,))}
    made_of = dict(recipe.fingerprint)
    return LayerRecord("", COLUMN, recipe.digest, 1, 1, {}, 1, columns, made_of, decoder="exact", versions=versions())


def _write_small(table: pa.Table, record: LayerRecord | MergeRecord, path: str) -> None:
    pq.write_table(table.cast(with_record(table.schema, record)), path)


def _embedder() -> TimmImageEmbedder:
    return TimmImageEmbedder("test_vit.r160_in1k", pretrained=False)


def _plan(folder: str) -> tuple[float, int, int, int]:
    """Return what the command needs before its flow: seconds, memory, memory of the process, and shards to do."""
    from flows.config import EmbedConfig
    from flows.prepare import prepare

    recipes_of(_embedder())  # imports torch and timm, which any run needs
    before = _reset_peak()
    started = time.perf_counter()
    work = prepare(_config(EmbedConfig, folder))
    return time.perf_counter() - started, _peak() - before, _peak(), len(work.plan.to_embed) + len(work.plan.to_merge)


def _config(kind: Any, folder: str) -> Any:
    return kind(
        dataset=f"{folder}/data",
        output=f"{folder}/out",
        model_name="test_vit.r160_in1k",
        pretrained=False,
        device="cpu",
    )


def rerun(folder: str, count: int = 10_000) -> list[Figure]:
    """Run the command over an output in which every shard is done, with and without a Prefect server."""
    finished = Path(folder, f"finished-{count}")
    if not (finished / "out/manifest.json").exists():
        make_finished(finished, count)
    seconds = _time_command(finished)
    with_server = _time_command_with_a_server(finished)
    what = f"the whole command over {count:,} finished shards"
    return [
        Figure(what, "< 30 s", f"{seconds:.1f} s"),
        Figure(f"{what}, a server told", "< 30 s", f"{with_server:.1f} s"),
    ]


def _time_command(finished: Path) -> float:
    command = [sys.executable, "-m", "flows.embed", f"{finished}/data", "--output", f"{finished}/out", "--json"]
    command += ["--model-name", "test_vit.r160_in1k", "--no-pretrained", "--device", "cpu", "--quiet"]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    manifest = json.loads(done.stdout)
    assert manifest["shards_cached"] == manifest["shards"], manifest
    return seconds


def _time_command_with_a_server(finished: Path) -> float:
    from flows.server import prefect_server

    with tempfile.TemporaryDirectory(prefix="prefect-") as home:
        before = dict(os.environ)
        os.environ["PREFECT_HOME"] = home
        os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{home}/prefect.db"
        try:
            with prefect_server():
                return _time_command(finished)
        finally:
            os.environ.clear()
            os.environ.update(before)


PARTS = {"merge": merge, "memory": memory, "join": join, "index": index, "plan": plan, "rerun": rerun}


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", "--only", choices=PARTS, action="append", help="one of them; by default all")
    parser.add_argument("--shards", type=int, help="instead of what the part usually has")
    parser.add_argument("--folder", help="where files are made and stay, for another time; by default a temporary one")
    args = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-"))
        figures: list[Figure] = []
        for part in args.part or PARTS:
            counts: Any = [] if args.shards is None else [(args.shards,) if part == "plan" else args.shards]
            figures += PARTS[part](folder, *counts)  # type: ignore[operator]
    print("| what | asked | measured |\n|---|---|---|")
    for figure in figures:
        print(f"| {figure.what} | {figure.asked} | {figure.measured} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
