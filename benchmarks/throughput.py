"""Measure images per second of the whole flow, its two upper limits and two other programs, in one run.

    python -m benchmarks.throughput --model vit_base_patch32_clip_quickgelu_224.openai --shards 8 --no-pretrained

Each measurement runs in a process of its own, so none inherits another's GPU memory, threads or compiled code. The
shards are made first, from a few hundred different crops of photographs that repeat, with about 500x375 pixels and
55 kB as in a web crawl. They were just written, so they are read from memory, and no disk is measured.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from tasks.wording import counted

if TYPE_CHECKING:
    from embedders.timm import TimmImageEmbedder

DISTINCT = 400
"""Distinct crops. Repeating them does not change the speed, because decoders cache nothing."""
CROP = (500, 375)
NEMO_BATCH, NEMO_THREADS = 1024, 4
"""NeMo Curator 0.9's defaults for its TimmImageEmbedder."""
DAMAGED = 100
"""One of so many images is broken when damage is measured."""
COMMAND_SHARDS = 4
WARM_UP = 8
"""Batches before the clock starts, in measurements of one part."""


@dataclass(frozen=True)
class Setting:
    """The dataset, the model and the machine that the measurements use."""

    model: str
    shards: int
    samples: int
    seconds: float
    pretrained: bool
    device: str
    cores: int
    batch_size: int | None
    decode: str
    compile_model: bool | None
    folder: str

    def tars(self) -> list[str]:
        """Return the shards, sorted."""
        return sorted(str(path) for path in Path(self.folder, "shards").glob("*.tar"))[: self.shards]

    def embedder(self, **changes: Any) -> TimmImageEmbedder:
        """Return the embedder whose parts are measured."""
        from embedders import TimmImageEmbedder

        options: dict[str, Any] = {
            "pretrained": self.pretrained,
            "batch_size": self.batch_size or "auto",
            "decode": self.decode,
            "compile_model": self.compile_model,
        }
        return TimmImageEmbedder(self.model, **(options | changes))


# --- shards -----------------------------------------------------------------------------------------------------------


def make_shards(folder: Path, shards: int, samples: int, photographs: str | None, cores: int) -> None:
    """Write shards of jpg, txt and json with a metadata Parquet beside each; keep existing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in range(shards) if not (folder / f"{n:05}.parquet").exists()]
    if not missing:
        return
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        slices = [range(DISTINCT)[i::cores] for i in range(cores)]
        crops = list(itertools.chain(*pool.map(_render, slices, [photographs] * cores)))
        stored = folder / "crops.npy"
        np.save(stored, np.array(crops, dtype=object), allow_pickle=True)
        list(pool.map(_write_shard, [folder] * len(missing), missing, [samples] * len(missing)))
        stored.unlink()
    size = np.mean([len(c) for c in crops]) / 1000
    print(f"{counted(shards, 'shard')} of {samples}, {size:.0f} kB per image", file=sys.stderr)


def load_photographs(folder: str | None) -> list[Image.Image]:
    """Return the photographs of a folder, or those that scikit-image and scikit-learn ship."""
    if folder is not None:
        return [Image.open(path).convert("RGB") for path in sorted(Path(folder).iterdir())]
    from flows.demo_data import PHOTOGRAPHS, load_photograph

    return [load_photograph(package, name) for package, name in PHOTOGRAPHS]


def _render(numbers: Sequence[int], photographs: str | None) -> list[bytes]:
    """Return JPEGs of crops of photographs, which differ for every number."""
    images = load_photographs(photographs)
    return [_crop(number, images) for number in numbers]


def _crop(number: int, images: list[Image.Image]) -> bytes:
    rng = np.random.default_rng(number)
    image = images[number % len(images)]
    width, height = (round(side * rng.uniform(0.9, 1.1)) for side in (CROP if rng.random() < 0.75 else CROP[::-1]))
    scale = min(image.width / width, image.height / height) * rng.uniform(0.6, 1.0)
    w, h = int(width * scale), int(height * scale)
    left, top = int(rng.integers(image.width - w + 1)), int(rng.integers(image.height - h + 1))
    piece = image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    (ImageOps.mirror(piece) if rng.random() < 0.5 else piece).save(out, "JPEG", quality=int(rng.integers(85, 96)))
    return out.getvalue()


def _write_shard(folder: Path, shard: int, samples: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    crops = np.load(folder / "crops.npy", allow_pickle=True)
    keys = [f"{shard * samples + i:09}" for i in range(samples)]
    with tarfile.open(folder / f"{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, key in enumerate(keys):
            members = {"jpg": crops[(shard * 97 + i) % len(crops)], "txt": f"photograph {key}".encode()}
            members["json"] = json.dumps({"key": key, "caption": f"photograph {key}", "width": 500}).encode()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    table = pa.table({"key": keys, "caption": [f"photograph {key}" for key in keys]})
    pq.write_table(table, folder / f"{shard:05}.parquet")


# --- the clock --------------------------------------------------------------------------------------------------------


def clocked(counts: Iterable[int], seconds: float, finish: Callable[[], None], warm_up: int = WARM_UP) -> float:
    """Return the images per second of a stream of batches, given as their sizes.

    The first `warm_up` batches are not counted; the stream is left after `seconds`. `finish` waits for the device.
    """
    images, started = 0, 0.0
    for number, count in enumerate(counts):
        if number == warm_up:
            finish()
            images, started = 0, time.perf_counter()
        elif number > warm_up:
            images += count
            if time.perf_counter() - started > seconds:
                break
    finish()
    return images / (time.perf_counter() - started) if images else 0.0


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits until the device has finished its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


# --- what is measured: each returns images a second, or several numbers -----------------------------------------------


def decode_alone(setting: Setting, decode: str) -> float:
    """Measure DaliLoader without a model, from the bytes of mapped tars to normalised batches on the device."""
    sync = synchronizer(setting.device)
    embedder = setting.embedder(decode=decode, loader="dali")
    batches = embedder.batches(itertools.cycle(_open(setting.tars())), setting.device)
    return clocked((len(batch.rows) for batch in batches), setting.seconds, sync)


def decode_damaged(setting: Setting, decode: str) -> dict[str, float]:
    """Measure the same with one of DAMAGED images broken, and the share of images that goes to quarantine."""
    from embedders.loader import Encoded
    from embedders.timm_session import TimmSession

    session = TimmSession(setting.embedder(decode=decode, loader="dali"), setting.device)
    images = [data for shard in _open(setting.tars()[:4]) for _, data, _ in shard.encoded()]
    rng = np.random.default_rng(0)
    broken = itertools.cycle([_cut, _flipped, _blanked, _replaced])
    data = [next(broken)(image, rng) if i % DAMAGED == DAMAGED // 2 else image for i, image in enumerate(images)]
    samples = (Encoded(i, image) for i, image in enumerate(itertools.cycle(data)))
    counts = {"good": 0, "rejected": 0}

    def seen() -> Iterator[int]:
        for (batch,) in session.loader.batches(samples):
            counts["good"] += len(batch.tags)
            counts["rejected"] += len(batch.rejected)
            yield len(batch.tags) + len(batch.rejected)

    rate = clocked(seen(), setting.seconds, synchronizer(setting.device))
    return {"images_per_second": rate, "rejected_share": counts["rejected"] / sum(counts.values())}


def _cut(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut it like a download that ended early."""
    return image[: int(len(image) * rng.uniform(0.1, 0.95))]


def _flipped(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change ten bytes behind the header."""
    image = image.copy()
    image[rng.integers(700, len(image) - 2, 10)] ^= 0x55
    return image


def _blanked(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zero a part, like a bad block of a disk."""
    image = image.copy()
    start = int(rng.integers(700, len(image) - 4200))
    image[start : start + 4096] = 0
    return image


def _replaced(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replace it by a web page."""
    return np.frombuffer(b"<html><body>not found</body></html>", np.uint8)


def _open(tars: Iterable[str]) -> list[Any]:
    """Return shards as the flow's tasks open them: with ids and image headers read, and pages in memory."""
    from embedders.tar import map_tar, read_tar
    from embedders.webdataset import OpenShard, describe
    from tasks.worker.shared_engine import collect_garbage_seldom

    opened = []
    for tar in tars:
        data = map_tar(tar)
        opened.append(OpenShard(tar, data, describe(data, read_tar(data, tar), "key", headers=True), "key"))
        opened[-1].read_ahead()
    collect_garbage_seldom()  # as a worker does
    return opened


def model_alone(setting: Setting, compile_model: bool) -> float:
    """Measure the embedder's model on batches that are on the device, in float16 on a GPU."""
    from embedders.engine import keep_freed_memory

    keep_freed_memory()  # as the engine does
    session = setting.embedder(compile_model=compile_model).open(setting.device)
    model = session.model
    dtype = torch.float16 if setting.device == "cuda" else torch.float32
    shape = (session.batch_size, *session.embedder.data_config["input_size"])
    batches = [torch.randn(shape, device=setting.device, dtype=dtype) for _ in range(2)]
    with torch.inference_mode():
        counts = (len(model(batch)) for batch in itertools.cycle(batches))
        return clocked(counts, setting.seconds, synchronizer(setting.device), 2 if setting.device == "cpu" else WARM_UP)


def model_float8(setting: Setting) -> dict[str, float]:
    """Measure the model in float8, and the cosine of its vectors of photographs to those in float32."""
    session = setting.embedder(precision="float8").open(setting.device)
    model, size = session.model, session.batch_size
    batch = next(session.batches(_open(setting.tars()[:1]))).images.clone()
    with torch.inference_mode():
        vectors = model(batch)
        counts = (len(model(batch)) for _ in itertools.count())
        rate = clocked(counts, setting.seconds, synchronizer(setting.device))
        exact = setting.embedder(precision="float32", compile_model=False, batch_size=size)
        cosines = (vectors * exact.load_embedding_model(setting.device)(batch.float())).sum(dim=1)
    return {"images_per_second": rate, "cosine_mean": float(cosines.mean()), "cosine_worst": float(cosines.min())}


def one_process(setting: Setting) -> dict[str, Any]:
    """Measure the engine over all shards without Prefect, Dask and writing, and what its thread does, in seconds."""
    from benchmarks import trace
    from embedders import engine as engine_module
    from embedders.engine import Engine, Rows

    embedder = setting.embedder()
    trace.watch()
    session = embedder.open(setting.device)
    engine = Engine([session])
    spent = dict.fromkeys(("forward", "settle", "batches"), 0.0)
    engine_module._forward = _timed(engine_module._forward, spent, "forward")
    engine._arrived = _timed(engine._arrived, spent, "settle")  # type: ignore[method-assign]
    original = session.batches

    def batches(shards: Any) -> Iterator[Any]:
        return _timed_iterator(original(shards), spent, "batches")

    session.batches = batches  # type: ignore[method-assign]
    shards = _open(setting.tars())
    list(engine.embed(shards[:2]))  # builds the pipeline, and chooses the decoder
    trace.times()
    spent.update(dict.fromkeys(spent, 0.0))
    started = time.perf_counter()
    images = sum(len(found.samples) for found in engine.embed(shards) if isinstance(found, Rows))
    whole = time.perf_counter() - started
    device = trace.busy(trace.times())
    return {
        "images_per_second": images / whole,
        "decoder": session.decoder,
        "busy_share": device.share,
        "longest_gap": device.longest_gap,
        "whole": whole,
        **spent,
    }


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[name] += time.perf_counter() - started

    return call


def _timed_iterator(items: Iterator[Any], spent: dict[str, float], name: str) -> Iterator[Any]:
    following = _timed(lambda: next(items, None), spent, name)
    while (item := following()) is not None:
        yield item


def whole_flow(setting: Setting) -> dict[str, Any]:
    """Measure embed_dataset as a whole, and its steady part from the first embeddings file to the last.

    Busy share and gaps are of the device of the busiest worker, from its twentieth batch to its last.
    """
    from benchmarks import trace
    from flows.embed import embed_dataset

    with tempfile.TemporaryDirectory(dir=setting.folder) as output, tempfile.TemporaryDirectory() as traces:
        embedder = traced(setting.embedder(), Path(traces))
        device = "gpu" if setting.device == "cuda" else "cpu"
        started = time.time()
        manifest = embed_dataset(f"{setting.folder}/shards", output, embedder, device=device)
        wall = time.time() - started
        if manifest.embedded != manifest.samples or manifest.shards_failed:
            raise RuntimeError(f"not everything was embedded: {manifest}")
        written = sorted(path.stat().st_mtime for path in Path(output, "layers", "image_embedding").iterdir())
        merged = sorted(path.stat().st_mtime for path in Path(output, "metadata").iterdir())
        busy = [trace.busy(batches, skip=20) for batches in trace.load(Path(traces))]
        memory = max(trace.load_memory(Path(traces)), key=max, default=[(0.0, 0.0)])
    per_shard = manifest.samples / manifest.shards
    steady = per_shard * (len(written) - 1) / (written[-1] - written[0]) if len(written) > 1 else 0.0
    return {
        "whole": manifest.samples / wall,
        "steady": steady,
        "device": sum(worker.images_per_second for worker in busy),
        "busy_share": max((worker.share for worker in busy), default=0.0),
        "longest_gap": max((worker.longest_gap for worker in busy), default=0.0),
        "mean_gap": max((worker.mean_gap for worker in busy), default=0.0),
        "decoders": manifest.decoders,
        "memory_at_half_of_it_gb": memory[len(memory) // 2][0],
        "memory_at_its_end_gb": memory[-1][0],
        "mapped_files_gb": memory[-1][1],
        "seconds": wall,
        "until_first_file": written[0] - started,
        "first_to_last_file": written[-1] - written[0],
        "until_merged": merged[-1] - written[-1],
        "after_merge": started + wall - merged[-1],
    }


def command(setting: Setting) -> dict[str, float]:
    """Measure `python -m flows.embed` over the first shards, from its start to the first embeddings file."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        dataset, output = Path(folder, "dataset"), Path(folder, "output")
        dataset.mkdir()
        for tar in setting.tars()[:COMMAND_SHARDS]:
            for path in (Path(tar), Path(tar).with_suffix(".parquet")):
                (dataset / path.name).symlink_to(path)
        options = ["--device", "gpu" if setting.device == "cuda" else "cpu", "--model-name", setting.model]
        options += [] if setting.pretrained else ["--no-pretrained"]
        started = time.time()
        call = [sys.executable, "-m", "flows.embed", str(dataset), "--output", str(output), *options, "--json"]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        ended = time.time()
        first = min(path.stat().st_mtime for path in (output / "layers/image_embedding").iterdir())
    return {"until_first_file": first - started, "seconds": ended - started}


def traced(embedder: TimmImageEmbedder, folder: Path) -> TimmImageEmbedder:
    """Return the same embedder, whose worker notes when each batch ran."""
    from benchmarks import trace
    from embedders import TimmImageEmbedder

    class Traced(TimmImageEmbedder):
        def load_embedding_model(self, device: str) -> Any:
            trace.watch(folder)
            return super().load_embedding_model(device)

    embedder.__class__ = Traced
    return embedder


def plain_script(setting: Setting) -> float:
    """Measure a plain script: webdataset, a DataLoader with one worker per core, Pillow, timm's transform and model."""
    import timm
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model(setting.model, pretrained=setting.pretrained).eval().to(setting.device)
    transform = create_transform(**resolve_data_config(model=model))
    dtype = torch.float16 if setting.device == "cuda" else torch.float32
    model = model.to(dtype)
    batch_size = setting.embedder().input_batch(setting.device)
    loader = torch.utils.data.DataLoader(
        _Samples(setting.tars(), transform),
        batch_size=batch_size,
        num_workers=setting.cores,
        pin_memory=setting.device == "cuda",
        multiprocessing_context="spawn",
    )

    def counts() -> Iterator[int]:
        for images, _ in loader:
            yield len(model(images.to(setting.device, dtype, non_blocking=True)).float().cpu())

    with torch.inference_mode():
        # Each worker begins with a full queue: as many batches as they hold do not count.
        warm_up = 2 if setting.device == "cpu" else 3 * setting.cores
        return clocked(counts(), setting.seconds, synchronizer(setting.device), warm_up)


class _Samples(torch.utils.data.IterableDataset[tuple[torch.Tensor, str]]):
    """Yield (image, key) of shards, again and again, divided among the DataLoader's workers."""

    def __init__(self, tars: list[str], transform: Any) -> None:
        self.tars, self.transform = tars, transform

    def __iter__(self) -> Iterator[tuple[torch.Tensor, str]]:
        torch.set_num_threads(1)
        worker: Any = torch.utils.data.get_worker_info()
        mine = [tar for i, tar in enumerate(self.tars) if i % worker.num_workers == worker.id] or self.tars
        for tar in itertools.cycle(mine):
            for key, data in _read_samples(tar):
                yield self.transform(Image.open(io.BytesIO(data)).convert("RGB")), key


def _read_samples(tar: str) -> Iterator[tuple[str, bytes]]:
    """Yield (key, jpg) of a tar, read by the webdataset library if it is installed, else by tarfile."""
    try:
        import webdataset
    except ImportError:
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".jpg"):
                    yield member.name.removesuffix(".jpg"), members.extractfile(member).read()  # type: ignore[union-attr]
        return
    # The DataLoader's workers have each their own tars already.
    for sample in webdataset.WebDataset(tar, shardshuffle=False, workersplitter=None):
        yield sample["__key__"], sample["jpg"]


def pipeline_a_shard(setting: Setting) -> float:
    """Measure NeMo Curator 0.9's way: one DALI pipeline per shard, float32 weights under float16 autocast."""
    import timm

    model = timm.create_model(setting.model, pretrained=setting.pretrained).eval().to(setting.device)
    batch_size = NEMO_BATCH if setting.device == "cuda" else 32
    config = setting.embedder().data_config
    sync = synchronizer(setting.device)
    images, number, started = 0, 0, 0.0
    with torch.inference_mode(), torch.autocast(setting.device, torch.float16, enabled=setting.device == "cuda"):
        for number, tar in enumerate(itertools.cycle(setting.tars())):
            if number == 1:  # the first shard is the warm-up
                images, started = 0, time.perf_counter()
            if number > 1 and time.perf_counter() - started > setting.seconds:
                break
            for batch in _shard_batches(tar, config, batch_size, setting.device):
                vectors = torch.nn.functional.normalize(model(batch).float(), dim=-1).cpu()
                images += len(vectors)
        sync()
    return images / (time.perf_counter() - started)


def _shard_batches(tar: str, config: dict[str, Any], batch_size: int, device: str) -> Iterator[torch.Tensor]:
    """Yield the batches of one tar from a DALI pipeline of its own."""
    import nvidia.dali.types as dali_types
    from nvidia.dali import fn as dali_fn
    from nvidia.dali import pipeline_def

    from embedders.tar import map_tar, read_tar
    from embedders.tar_index import format_index

    types: Any = dali_types  # both are made at run time
    fn: Any = dali_fn
    index = Path(tar).with_suffix(".idx")
    if not index.exists():
        index.write_text(format_index(read_tar(map_tar(tar), tar), ""))
    on_gpu = device == "cuda"
    side = config["input_size"][-1]
    scale = [[255 * value for value in config[name]] for name in ("mean", "std")]

    device_id: Any = 0 if on_gpu else None

    @pipeline_def(batch_size=batch_size, num_threads=NEMO_THREADS, device_id=device_id)
    def pipeline() -> Any:
        data, text, meta = fn.readers.webdataset(
            paths=tar, index_paths=str(index), ext=["jpg", "txt", "json"], name="in"
        )
        image = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        image = fn.resize(image, resize_shorter=side, interp_type=types.INTERP_CUBIC)
        image = fn.crop_mirror_normalize(
            image, dtype=types.FLOAT, output_layout="CHW", crop=(side, side), mean=scale[0], std=scale[1]
        )
        return image, text, meta

    built: Any = pipeline()
    built.build()
    left = built.reader_meta("in")["epoch_size"]
    while left > 0:
        image, _, meta = built.run()
        [json.loads(bytes(meta.at(i))) for i in range(min(left, batch_size))]
        batch = torch.utils.dlpack.from_dlpack(image.as_tensor())[:left]
        left -= len(batch)
        yield batch


# --- the run ----------------------------------------------------------------------------------------------------------


def stages(setting: Setting) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return the function and arguments of each measurement, by its name."""
    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {"decode_exact": (decode_alone, ("exact",))}
    if setting.device == "cuda":
        found["decode_fast"] = decode_alone, ("fast",)
    found["decode_damaged"] = decode_damaged, ("fast" if setting.device == "cuda" else "exact",)
    found["model"] = model_alone, (False,)
    if setting.device == "cuda":
        found["model_compiled"] = model_alone, (True,)
        found["model_float8"] = model_float8, ()
    found["one_process"] = one_process, ()
    found["flow"] = whole_flow, ()
    found["command"] = command, ()
    found["plain_script"] = plain_script, ()
    found["pipeline_a_shard"] = pipeline_a_shard, ()
    return found


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """Return a function's result from a new process, or its error as text in a dict."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except (Exception, BrokenProcessPool) as error:
            return {"error": f"{type(error).__name__}: {error}"[:2000]}


def measure(setting: Setting, only: Sequence[str]) -> dict[str, Any]:
    """Return the results of the measurements asked for, by name."""
    results: dict[str, Any] = {}
    for name, (function, args) in stages(setting).items():
        if only and name not in only:
            continue
        results[name] = run_alone(function, setting, *args)
        print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    return results


LABELS = {
    "decode_exact": "decode and preprocess alone, exact (CPU)",
    "decode_fast": "decode and preprocess alone, fast (nvJPEG)",
    "decode_damaged": "the last one with 1 % of the images damaged",
    "model": "model alone, not compiled",
    "model_compiled": "model alone, torch.compile",
    "model_float8": "the same with linear layers in float8",
    "one_process": "engine in one process, no Prefect, no Dask, no writing",
    "flow": "the whole flow, steady part",
    "command": "the command",
    "plain_script": "peer: webdataset, DataLoader, Pillow",
    "pipeline_a_shard": "peer: one DALI pipeline a shard (NeMo Curator 0.9's way)",
}


def rate(results: dict[str, Any], name: str) -> float:
    """Return the images per second of a measurement; 0 if it has none."""
    value = results.get(name, 0.0)
    if isinstance(value, dict):
        value = value.get("steady", value.get("images_per_second", 0.0))
    return float(value)


def table(results: dict[str, Any]) -> str:
    """Return the measurements as Markdown; the last column is the flow's steady part divided by each."""
    flow = rate(results, "flow")
    lines = ["| what | images/s | flow / this |", "|---|---:|---:|"]
    for name, label in LABELS.items():
        if name in results and name != "command":
            value = rate(results, name)
            ratio = f"{flow / value:.2f}" if value and flow else "–"
            lines.append(f"| {label} | {value:,.1f} | {ratio} |")
            if name == "flow" and "whole" in results[name]:
                lines.append(f"| the whole flow, from the call to its return | {results[name]['whole']:,.1f} | – |")
    return "\n".join([*lines, "", *about_the_run(results)])


def about_the_run(results: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each other goal of the flow."""
    flow, call = results.get("flow", {}), results.get("command", {})
    if "busy_share" in flow:
        yield f"decoders {flow['decoders']}"
        yield f"the model ran for {flow['busy_share']:.3f} of the time"
        longest, mean = flow["longest_gap"] * 1000, flow["mean_gap"] * 1000
        yield f"between two batches: at most {longest:.0f} ms, {mean:.1f} on average"
        half, end = flow["memory_at_half_of_it_gb"], flow["memory_at_its_end_gb"]
        yield f"a worker's own memory: {half:.2f} GB at half of the run, {end:.2f} at its end"
    if "until_first_file" in call:
        yield f"from the command to the first embeddings file: {call['until_first_file']:.1f} s"


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were measured on."""
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    return {
        "gpu": gpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Setting]:
    """Parse the command line; return it and the setting it describes."""
    from tasks.hardware import available_cores, count_gpus

    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_large_patch14_clip_quickgelu_224.openai")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4096, help="samples per shard")
    parser.add_argument("--seconds", type=float, default=10, help="how long each part alone is measured")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights: as fast, and need no network")
    parser.add_argument("--batch-size", type=int, help="by default what the embedder chooses")
    parser.add_argument("--decode", default="auto", choices=("auto", "exact", "fast"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile at once")
    parser.add_argument("--photos", help="folder with photographs, instead of scikit-image's")
    parser.add_argument("--folder", help="where shards are made and kept; by default a temporary folder")
    parser.add_argument("--only", default="", help=f"measurements, separated by commas: {', '.join(LABELS)}")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(arguments)
    setting = Setting(
        model=args.model,
        shards=args.shards,
        samples=args.samples,
        seconds=args.seconds,
        pretrained=not args.no_pretrained,
        device="cuda" if count_gpus() else "cpu",
        cores=available_cores(),
        batch_size=args.batch_size,
        decode=args.decode,
        compile_model=args.compile,
        folder=args.folder or "",
    )
    return args, setting


def main(arguments: Sequence[str]) -> int:
    """Make the shards, measure, print the table; return the exit status."""
    args, setting = parse(arguments)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    temporary = None if args.folder else tempfile.mkdtemp(prefix="throughput-")
    setting = replace(setting, folder=str(args.folder or temporary))
    try:
        # One folder a shape of dataset: the flow embeds all that lies there.
        setting = replace(setting, folder=f"{setting.folder}/{setting.shards}x{setting.samples}")
        make_shards(Path(setting.folder, "shards"), setting.shards, setting.samples, args.photos, setting.cores)
        results = measure(setting, [name for name in args.only.split(",") if name])
    finally:
        if temporary:
            shutil.rmtree(temporary)
    print(f"\n{setting.model}, {counted(setting.shards, 'shard')} of {setting.samples}\n\n{table(results)}")
    if args.json:
        whole = {"setting": asdict(setting), "machine": run_alone(machine, setting.device), "results": results}
        Path(args.json).write_text(json.dumps(whole, indent=2) + "\n")
    return int(any(isinstance(value, dict) and "error" in value for value in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
