"""`python -m benchmarks.plan [--shards N]`: seconds and memory of planning a dataset of many shards.

The dataset is cheap to make: empty tars and small Parquets, hard links to a few files each. What an output holds of it
when all is done has a key per shard and is written file by file, so `--not-done` leaves that out. Each figure is of a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LINKS = 60_000
"""Names that are given to one file: ext4 has at most 65,000."""
DIMENSIONS = 4
STEPS = ("list", "not done", "done")
COLUMNS = ("url", "caption", "key", "status", "error_message", "width", "height", "original_width", "original_height")
"""Of metadata as img2dataset writes it."""


def recipe() -> Any:
    """Return a recipe whose fingerprint is as long as a timm model's."""
    from embedders import TimmImageEmbedder
    from embedders.recipe import Recipe

    embedder = TimmImageEmbedder("vit_base_patch32_clip_quickgelu_224.openai", pretrained=False)
    made_of = {"model": "vit_base_patch32_clip_quickgelu_224.openai", "code": {f"part{n}": "0" * 32 for n in range(12)}}
    return Recipe("image_embedding", embedder, made_of, "0" * 32, "0" * 32, ("image_embedding",))


def linked(template: Path, names: Iterator[Path]) -> None:
    """Give a file's content many names."""
    content = template.read_bytes()
    for number, name in enumerate(names):
        if number % LINKS == 0:
            source = template.with_name(f"{template.name}.{number // LINKS}")
            source.write_bytes(content)
            os.utime(source, (1e9, 1e9))
        os.link(source, name)


def make_dataset(folder: Path, shards: int) -> None:
    """Write tars without a sample, and a Parquet of 100 rows beside each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    (folder / "tar").touch()
    text = [f"{n:04}" for n in range(100)]
    columns: dict[str, Any] = dict.fromkeys(COLUMNS[:5], text) | {name: range(100) for name in COLUMNS[5:]}
    pq.write_table(pa.table(columns), folder / "parquet")
    for kind in ("tar", "parquet"):
        linked(folder / kind, (folder / "data" / f"{n:07}.{kind}" for n in range(shards)))


def make_output(folder: Path) -> None:
    """Write what a run leaves: an index, a layer file and a merged file of each shard."""
    from dataclasses import replace

    import pyarrow as pa
    import pyarrow.parquet as pq

    from embedders.samples import Component, Sample, TarIndex
    from embedders.tar_index import format_index
    from tasks.dataset.schema import SCHEMA, UNIFIED
    from tasks.keys import layer_key
    from tasks.layer_rows import column_type
    from tasks.layers import column_array, versions
    from tasks.merge_options import MergedColumn, MergeOptions
    from tasks.plan import merged_key
    from tasks.records import Column, LayerRecord, MergeRecord, with_record
    from tasks.shards import find_shards

    made, rows = recipe(), 4
    output, layer = folder / "out", made.layer
    shards = find_shards(str(folder / "data"), str(output))
    described = {layer: Column("float32", (DIMENSIONS,))}
    numbers = {"began": 1.7e9, "ended": 1.7e9, "read": 0.123, "decode": 1.234, "model": 2.345, "write": 0.456}
    record = LayerRecord(
        "0" * 32, layer, made.digest, rows, rows, {}, rows, described, made.fingerprint, decoder="exact",
        versions=versions(), statistics={layer: dict.fromkeys(("rows", "norm", "least", "most"), 0.987654)},
        work=numbers, worker="machine:12345", computed="float32 on a CPU",
    )  # fmt: skip
    column = MergedColumn(layer, layer, "float32", (DIMENSIONS,))
    metadata = pq.read_schema(folder / "parquet").remove_metadata()
    options = MergeOptions("key", (layer,), (column,), schema=metadata, made_of={layer: made.fingerprint})
    for kind in (f"layers/{layer}", "metadata", "index"):
        (output / kind).mkdir(parents=True)
    vectors = column_array(np.ones((rows, DIMENSIONS), np.float32))
    table = pa.table({"id": [str(n) for n in range(rows)], layer: vectors})
    merged = pq.read_table(folder / "parquet").slice(0, rows)
    merged = merged.append_column(pa.field(layer, column_type(column, options.form)), vectors)
    layer_file = Template(folder / "layer", table, with_record(table.schema, record))
    merged_file = Template(folder / "merged", merged, with_record(merged.schema, MergeRecord("0" * 32, rows, 0, 0)))
    samples = [Sample(f"{n}", (Component("jpg", 512 + 1024 * n, 9, f"{n}.jpg"),)) for n in range(rows)]
    (folder / "idx").write_text(format_index(TarIndex.of(samples), shards[0].tar_fingerprint))
    linked(folder / "idx", (output / shard.index_file for shard in shards))
    for shard in shards:
        key = layer_key(shard, layer, made.digest, "key")
        layer_file.write(output / shard.layer_file(layer), key)
        of = {layer: replace(record, key=key)}
        merged_file.write(output / shard.merged_file, merged_key(shard, of, options))
    notes = {UNIFIED: b"1"}
    pq.write_metadata(pa.schema([*metadata, pa.field(layer, merged.schema.field(layer).type)], notes), output / SCHEMA)


class Template:
    """A Parquet file with a record, to be written again and again with another key."""

    def __init__(self, path: Path, table: Any, schema: Any) -> None:
        import pyarrow.parquet as pq

        pq.write_table(table.cast(schema), path)
        self.content = path.read_bytes()
        self.place = self.content.rindex(b'"key": "') + len(b'"key": "')

    def write(self, path: Path, key: str) -> None:
        """Write it with a key of 32 digits. Its footer is left without a seal, which counts as whole."""
        content = self.content
        path.write_bytes(content[: self.place] + key.encode() + content[self.place + 32 :])


def measure(folder: Path, step: str) -> dict[str, float]:
    """Do one step in this process; its seconds, and the most memory in MB."""
    import functools

    from tasks.dataset.schema import held_schema
    from tasks.merge_options import MergeOptions
    from tasks.plan import plan_in_one_schema
    from tasks.shards import find_shards

    output = str(folder / ("out" if step == "done" else "new"))
    recipes = [recipe()]
    began, cpu = time.perf_counter(), time.process_time()
    shards = find_shards(str(folder / "data"), output)
    if step != "list":
        began, cpu = time.perf_counter(), time.process_time()
        plan = plan_in_one_schema(shards, recipes, MergeOptions("key"), functools.partial(held_schema, output))
        left = len(plan.to_embed), len(plan.to_merge)
        assert left == ((0, 0) if step == "done" else (len(shards), 0)), left
    seconds = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    return seconds | {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> int:
    """Make the dataset, measure each step in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--folder", help="keep the files here, and use those that are there")
    parser.add_argument("--not-done", action="store_true", help="leave out the plan in which all is done")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.folder), args.measure)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").exists():
            make_dataset(folder, args.shards)
        if not args.not_done and not (folder / "out").exists():
            make_output(folder)
        print(f"{args.shards:,} shards")
        for step in STEPS[: 2 if args.not_done else 3]:
            command = [sys.executable, "-m", "benchmarks.plan", "--folder", str(folder), "--measure", step]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            rate = args.shards / found["seconds"]
            print(
                f"  {step:8} {found['seconds']:7.2f} s, {rate:9,.0f} shards/s, {found['cpu']:7.2f} s of CPU, ", end=""
            )
            print(f"peak {found['mb']:,.0f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
