"""Check everything that needs a GPU: decoders, fidelity, the account, the whole flow, the merge on cuDF.

    python -m benchmarks.gpu_check [--checkpoint tf_efficientnet_lite0.safetensors] [--photos FOLDER]

It installs nothing and needs no network. The last lines are a table; the exit status is 1 if one of them says FAILED.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.throughput import _crop, load_photographs, run_alone
from tasks.hardware import count_gpus
from tasks.manifest import read_manifest

MODEL = "tf_efficientnet_lite0"
PHOTOGRAPHS = 160
BETWEEN = {"cuda": "vit_large_patch14_clip_224", "cpu": "test_vit"}
"""A model that one core cannot decode for exactly, and a dozen can."""
LIMITS = {"exact": 0.9995, "fast": 0.985}
"""The worst cosine to timm's float32 vector that passes, also with float16 weights."""


@dataclass(frozen=True)
class Check:
    """A line of the table: what was checked, whether it passed, and what was found."""

    what: str
    passed: bool
    found: str


# --- the GPU tests ----------------------------------------------------------------------------------------------------


def gpu_tests() -> list[Check]:
    """Run `pytest -m gpu` on the loaders and the sessions."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/embedders/test_loaders.py"]
    command += ["tests/embedders/test_timm.py", "tests/embedders/test_shared_loading.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return [Check("pytest -m gpu, loaders and sessions", done.returncode == 0, last.strip("= "))]


# --- fidelity ---------------------------------------------------------------------------------------------------------


def fidelity(device: str, checkpoint: str | None, photographs: str | None) -> list[Check]:
    """Compare the embedder's vectors and pixels, of each decoder in each precision, with timm's float32 pipeline."""
    images = load_photographs(photographs)
    jpegs = [_crop(number, images) for number in range(PHOTOGRAPHS)]
    pixels, vectors = timms_own(jpegs, device, checkpoint)
    checks = []
    for decode in ("exact", "fast") if device == "cuda" else ("exact",):
        for autocast in (False, True) if device == "cuda" else (False,):
            ours = embedded(jpegs, device, checkpoint, decode, autocast)
            cosines = (ours[1] * vectors).sum(axis=1)
            levels = np.abs(ours[0] - pixels)
            found = (
                f"cosine mean {cosines.mean():.6f}, 1st percentile {np.percentile(cosines, 1):.5f}, "
                f"worst {cosines.min():.5f}; pixels {levels.mean():.3f} of 255"
            )
            precision = "float16" if autocast else "float32"
            checks.append(Check(f"{decode}, {precision}, to timm's", cosines.min() > LIMITS[decode], found))
    return checks


def timms_own(jpegs: Sequence[bytes], device: str, checkpoint: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels in levels of 255 and the vectors of length 1 by Pillow and timm in float32."""
    import io

    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    model: Any = timm.create_model(MODEL, checkpoint_path=checkpoint or "").eval().to(device)
    config = resolve_data_config(model=model)
    transform = create_transform(**config)
    batch = torch.stack([transform(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(batch.to(device)), pre_logits=True)
        vectors = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
    return to_levels(batch, config), vectors


def embedded(
    jpegs: Sequence[bytes], device: str, checkpoint: str | None, decode: str, autocast: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same by TimmImageEmbedder."""
    from embedders import TimmImageEmbedder
    from embedders.loader import Encoded

    embedder = TimmImageEmbedder(
        MODEL,
        pretrained=checkpoint is not None,
        checkpoint=checkpoint,
        batch_size=64,
        decode=decode,
        loader="dali",
        autocast=autocast,
    )
    session = embedder.open(device)
    samples = [Encoded(i, np.frombuffer(jpeg, np.uint8)) for i, jpeg in enumerate(jpegs)]
    pixels: dict[Any, np.ndarray] = {}
    vectors: dict[Any, np.ndarray] = {}
    with torch.inference_mode():
        for (batch,) in session.loader.batches(samples):
            rows = session.model(batch.images).cpu().numpy()
            levels = to_levels(batch.images, embedder.data_config)
            pixels.update(zip(batch.tags, levels, strict=True))
            vectors.update(zip(batch.tags, rows, strict=True))
    session.close()
    order = range(len(jpegs))
    return np.stack([pixels[i] for i in order]), np.stack([vectors[i] for i in order])


def to_levels(batch: torch.Tensor, config: dict[str, Any]) -> np.ndarray:
    """Return normalised images as levels of 255, float32."""
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return np.asarray((batch.float().cpu() * std + mean) * 255)


# --- the flow ---------------------------------------------------------------------------------------------------------


def flow(device: str, checkpoint: str | None, dataset: str | None, folder: str) -> list[Check]:
    """Run embed_dataset on a dataset with damaged images, then again, then with null rows."""
    from embedders import TimmImageEmbedder
    from flows.demo_data import BROKEN, build_dataset
    from flows.embed import embed_dataset

    dataset = dataset or str(build_dataset(Path(folder, "dataset")))

    def run(**parameters: Any) -> Any:
        embedder = TimmImageEmbedder(MODEL, pretrained=checkpoint is not None, checkpoint=checkpoint)
        where = "gpu" if device == "cuda" else "cpu"
        return embed_dataset(dataset, f"{folder}/output", embedder, device=where, **parameters)

    first = run()
    context = has_cuda_context()
    good = 4 * 64 - len(BROKEN)
    account = f"{first.samples} = {first.embedded} + {first.quarantined} {first.quarantined_by_reason}"
    failures = f", {first.failures}" if first.failures else ""
    checks = [
        Check("the flow's account", (first.embedded, first.shards_failed) == (good, 0), account + failures),
        Check("the flow's parent opens no CUDA context", not context, "a context" if context else "none"),
        Check("merged rows", first.rows == good, f"{first.rows}, {first.seconds} s"),
    ]
    again = run()
    checks.append(Check("a second run does nothing", again.shards_cached == 4, f"{again.seconds} s"))
    null = run(on_error="null")
    checks.append(Check("rows with a null", null.rows == good + len(BROKEN), f"{null.rows} rows, {null.failures}"))
    return checks


def has_cuda_context() -> bool:
    """Return whether this process has a CUDA context on its first GPU, without opening one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    flags, active = ctypes.c_uint(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)):
        return False
    return bool(active.value)


def readers(folder: str) -> list[Check]:
    """Read the flow's files with cuDF and dask-cudf, and the vectors as one matrix."""
    import cudf
    import dask_cudf

    path = f"{folder}/output/metadata"
    frame = cudf.read_parquet(f"{path}/00001.parquet")
    column = frame["image_embedding"]
    matrix = column.list.leaves.to_cupy().reshape(len(frame), -1)
    norms = (matrix.astype("float64") ** 2).sum(axis=1) ** 0.5
    whole = dask_cudf.read_parquet(path)
    rows, nulls = len(whole), int(whole["image_embedding"].isnull().sum().compute())
    return [
        Check("cudf.read_parquet", float(abs(norms - 1).max()) < 1e-3, f"{column.dtype}, matrix {matrix.shape}"),
        Check("dask_cudf.read_parquet", (rows, nulls) == (256, 2), f"{rows} rows, {nulls} of them null"),
    ]


def merged_on_cudf(folder: str) -> list[Check]:
    """Merge the flow's shards again by each join, and compare the files."""
    import pyarrow.parquet as pq

    from tasks.merge import merge_shard
    from tasks.merge_options import MergeOptions
    from tasks.plan import Layer, merged_columns
    from tasks.records import read_layer_record
    from tasks.shards import find_shards

    manifest, name = read_manifest(f"{folder}/output"), "image_embedding"
    shards = find_shards(manifest.dataset, manifest.output)
    read = {shard.name: read_layer_record(shard.target, shard.layer_file(name)) for shard in shards}
    records = {shard: record for shard, record in read.items() if record is not None}
    columns = merged_columns([Layer(name, "", {}, True, records)])
    options = MergeOptions(manifest.id_col, (name,), tuple(columns))
    rows, same = 0, True
    for shard in shards:
        tables = []
        for join in ("arrow", "cudf"):
            merge_shard(shard, {name: records[shard.name]}, options, join)
            tables.append(pq.read_table(shard.target.path(shard.merged_file)))
        rows, same = rows + len(tables[0]), same and tables[0].equals(tables[1])
    return [
        Check("the merge on cuDF and by Arrow", same and rows > 0, f"{rows} rows, {'the same' if same else 'others'}")
    ]


def read_back(folder: str) -> list[Check]:
    """Read the flow's files with pandas, on a machine without a GPU."""
    import pandas as pd

    frame = pd.read_parquet(f"{folder}/output/metadata")
    nulls = int(frame["image_embedding"].isna().sum())
    return [Check("pandas.read_parquet", (len(frame), nulls) == (256, 2), f"{len(frame)} rows, {nulls} of them null")]


# --- one decision for two workers -------------------------------------------------------------------------------------


def one_decision(device: str, dataset: str | None, folder: str) -> list[Check]:
    """Embed with a worker of one core and one of all others, which would choose differently, and compare the decoders.

    They are external workers, for whose numerical libraries Dask's nanny would set one thread. Both use the first GPU.
    """
    from embedders import TimmImageEmbedder
    from embedders.recipe import recipes_of
    from flows.demo_data import build_dataset
    from tasks.decide import decide_here, kept_decision
    from tasks.embed import EmbedOptions, embed_group
    from tasks.merge_options import MergeOptions
    from tasks.plan import make_plan
    from tasks.shards import find_shards
    from tasks.worker.cores import share_of_cores

    shards = find_shards(dataset or str(build_dataset(Path(folder, "dataset"))), f"{folder}/decided")
    recipes, options = recipes_of(TimmImageEmbedder(BETWEEN[device], pretrained=False)), EmbedOptions("key", device)
    cores = sorted(os.sched_getaffinity(0))
    pinned = {"few": cores[:1], "many": cores[1:] or cores}
    with pinned_workers(pinned) as client:

        def on(worker: str, function: Callable[..., Any], *args: Any) -> Any:
            return client.submit(function, *args, workers=[worker], pure=False)

        shares = {name: on(name, share_of_cores).result() for name in pinned}
        own = {name: on(name, decide_here, shards, recipes, options).result() for name in pinned}
        parts = {"few": shards[:2], "many": shards[2:]}
        futures = [on(name, embed_group, parts[name], recipes, options, own["many"]) for name in pinned]
        done = [of_layer for future in futures for of_layer in future.result().values()]
        records = [record for of_layer in done for record in of_layer.values()]
    made = {(record.decoder, record.batch_size) for record in records}
    kept = kept_decision(make_plan(shards, recipes, MergeOptions("key")), recipes)
    alone = ", ".join(f"{len(pinned[name])} cores alone: {own[name]}" for name in pinned)
    differ = device == "cpu" or own["few"] != own["many"]
    expected = {name: len(mine) for name, mine in pinned.items()} if len(cores) > 1 else {"few": 1, "many": 1}
    return [
        Check("threads of external workers", shares == expected, f"{shares} of {len(cores)}"),
        Check("two workers would choose differently", differ, alone),
        Check("two workers, one decoder", len(made) == 1, f"{made} in {len(records)} shards"),
        Check("a resumed run keeps it", kept == own["many"], str(kept)),
    ]


@contextlib.contextmanager
def pinned_workers(cores: dict[str, list[int]]) -> Iterator[Any]:
    """Start a scheduler and, by hand, a worker on each of some lists of cores; yield a client."""
    from distributed import Client, LocalCluster

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
        contextlib.ExitStack() as stack,
    ):
        for name, mine in cores.items():
            command = ["taskset", "-c", ",".join(map(str, mine)), sys.executable, "-m", "distributed.cli.dask_worker"]
            command += [cluster.scheduler_address, "--no-nanny", "--no-dashboard", "--nthreads", "2", "--name", name]
            worker = stack.enter_context(subprocess.Popen(command, env=environment))
            stack.callback(worker.terminate)
        client.wait_for_workers(len(cores), 120)
        yield client


# --- the run ----------------------------------------------------------------------------------------------------------


def attempt(what: str, function: Callable[..., list[Check]], *args: Any) -> list[Check]:
    """Return the checks of a function that runs in a process of its own; a failed check if it raised."""
    result = run_alone(_with_traceback, function, args)
    checks = [Check(what, False, result["error"].strip().splitlines()[-1])] if isinstance(result, dict) else result
    for check in checks:
        print(f"{'ok' if check.passed else 'FAILED'}: {check.what}: {check.found}", flush=True)
    return checks


def _with_traceback(function: Callable[..., list[Check]], args: tuple[Any, ...]) -> list[Check]:
    try:
        return function(*args)
    except Exception:
        traceback.print_exc()
        raise


def main(arguments: Sequence[str]) -> int:
    """Run every check, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", help=f"trained weights of {MODEL}; random ones are a far weaker check")
    parser.add_argument("--photos", help="folder with photographs, instead of scikit-image's")
    parser.add_argument("--dataset", help="the demo's dataset, where the packages it is made from are missing")
    parser.add_argument("--only", default="tests,fidelity,flow,decision", help="of tests, fidelity, flow and decision")
    args = parser.parse_args(arguments)
    only = args.only.split(",")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    device = "cuda" if count_gpus() else "cpu"
    checkpoint = args.checkpoint and os.path.abspath(args.checkpoint)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        checks: list[Check] = []
        if device == "cuda" and "tests" in only:
            checks += attempt("pytest -m gpu, loaders and sessions", gpu_tests)
        if "fidelity" in only:
            checks += attempt("fidelity", fidelity, device, checkpoint, args.photos)
        if "flow" in only:
            checks += attempt("flow", flow, device, checkpoint, args.dataset, folder)
            checks += attempt("reading", readers if device == "cuda" else read_back, folder)
        if "flow" in only and device == "cuda":
            checks += attempt("the merge on cuDF", merged_on_cudf, folder)
        if "decision" in only:
            checks += attempt("one decision for two workers", one_decision, device, args.dataset, folder)
    print("\n| check | | found |\n|---|---|---|")
    for check in checks:
        print(f"| {check.what} | {'ok' if check.passed else 'FAILED'} | {check.found} |")
    return int(not all(check.passed for check in checks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
