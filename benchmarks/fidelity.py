"""Measure how close each way of loading comes to timm's own vectors, on photographs, with the same model.

    python -m benchmarks.fidelity [--dataset FOLDER] [--checkpoint FILE] [--model NAME …] [--json FILE]

The yardstick is timm's own pipeline: Pillow, timm's transform, float32. Beside this project's loaders stands the
conversion that NeMo Curator 0.9 makes of timm's transform (`resize_shorter`, DALI's own centre crop). The demo's
photographs are portrait and landscape, small and large, 4:4:4, 4:2:2 and 4:2:0, baseline and progressive.
tf_efficientnet_lite0 has trained weights; other models get random ones, which say nothing of trained features but
show that the transform is right.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from embedders import TimmImageEmbedder
from embedders.dali_loader import DaliLoader
from embedders.dali_operators import Decode
from embedders.loader import Encoded, Loader, ModelInput
from embedders.preprocess import Preprocessing
from embedders.reference_loader import ReferenceLoader
from embedders.webdataset import open_shard

TRAINED = "tf_efficientnet_lite0"
FAMILIES = ("vit_base_patch32_clip_224.openai", "convnext_atto.d2_in1k", "regnety_016.tv2_in1k")
BATCH = 64


@dataclass(frozen=True)
class Fidelity:
    """One way of loading compared with timm. `pixels` is the mean absolute difference in levels of 255."""

    model: str
    loader: str
    dtype: str
    images: int
    pixels: float
    mean: float
    percentile_1: float
    worst: float


def photographs(dataset: Path) -> list[np.ndarray]:
    """Return every image of a WebDataset folder that Pillow can read completely, as encoded bytes."""
    found = []
    for tar in sorted(dataset.glob("*.tar")):
        shard = open_shard(tar)
        for i, image in enumerate(shard.images):
            if image is None or i in shard.unusable:
                continue
            data = shard.bytes_of(image)
            try:
                Image.open(io.BytesIO(data.tobytes())).load()
            except OSError:
                continue
            found.append(data)
    return found


def ways(embedder: TimmImageEmbedder, device: str) -> Iterator[tuple[str, torch.dtype, Callable[[], Loader]]]:
    """Yield the name of each loader to compare, the model's dtype, and a function that makes the loader."""
    preprocessing = embedder.preprocessing
    transform = preprocessing.transform()
    exact = [ModelInput(transform, preprocessing, torch.float32)]
    common: dict[str, Any] = {"batch_size": BATCH, "num_threads": 2, "device": device}
    decodes = [Decode.EXACT, Decode.FAST] if device == "cuda" else [Decode.EXACT]
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if device == "cuda" else [torch.float32]
    mode = preprocessing.mode
    yield (
        "reference",
        torch.float32,
        lambda: ReferenceLoader(exact, mode=mode, **common),
    )
    for decode in decodes:
        for dtype in dtypes:
            yield (
                f"DALI, {decode}",
                dtype,
                lambda d=decode, t=dtype: DaliLoader(  # type: ignore[misc]
                    [ModelInput(transform, preprocessing, t)], decode=d, **common
                ),
            )
    yield "NeMo Curator 0.9's", torch.float32, lambda: NemoLoader(preprocessing, device)


class NemoLoader:
    """Apply timm's transform as NeMo Curator 0.9 does in DALI: one resize of the shorter side, DALI's own centre."""

    def __init__(self, preprocessing: Preprocessing, device: str) -> None:
        self.preprocessing = preprocessing
        self.device = device

    def batches(self, samples: Any) -> Iterator[Any]:
        """Yield batches of images with their tags."""
        from embedders.loader import LoadedBatch

        chunk = list(samples)
        for start in range(0, len(chunk), BATCH):
            part = chunk[start : start + BATCH]
            yield (LoadedBatch(self._load([s.data for s in part]), [s.tag for s in part]),)

    def _load(self, images: list[np.ndarray]) -> torch.Tensor:
        import nvidia.dali

        dali: Any = nvidia.dali  # its stubs know neither lists of numbers nor how to iterate
        fn, types = dali.fn, dali.types
        p = self.preprocessing
        interpolation = types.INTERP_CUBIC if p.interpolation == "bicubic" else types.INTERP_LINEAR
        gpu = self.device == "cuda"

        @dali.pipeline_def(batch_size=len(images), num_threads=2, device_id=0 if gpu else None)
        def pipeline() -> Any:
            encoded = fn.external_source(source=lambda: images, batch=True)
            decoded = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
            resized = fn.resize(decoded, resize_shorter=min(p.resize_size), interp_type=interpolation)
            return fn.crop_mirror_normalize(
                resized,
                dtype=types.FLOAT,
                output_layout="CHW",
                crop=(p.height, p.width),
                mean=[255 * m for m in p.mean],
                std=[255 * s for s in p.std],
            )

        built = pipeline()
        built.build()
        (out,) = built.run()
        return torch.from_numpy(np.stack([np.asarray(row) for row in (out.as_cpu() if gpu else out)])).to(self.device)

    def close(self) -> None:
        """Do nothing; the loader keeps nothing."""


def load(loader: Loader, images: list[np.ndarray]) -> torch.Tensor:
    """Load all images with a loader; return them in order, on the CPU."""
    rows: dict[Any, torch.Tensor] = {}
    for (batch,) in loader.batches(Encoded(i, data) for i, data in enumerate(images)):
        rows.update(zip(batch.tags, batch.images.float().cpu().clone(), strict=True))
    loader.close()
    return torch.stack([rows[i] for i in range(len(images))])


def embed(model: torch.nn.Module, images: torch.Tensor, device: str, dtype: torch.dtype) -> np.ndarray:
    """Return a model's normalised vectors, (n, dimensions) float64, of (n, channels, height, width) images."""
    model = model.to(device=device, dtype=dtype)
    with torch.inference_mode():
        parts = [model(part.to(device, dtype)).float().cpu() for part in images.split(BATCH)]
    vectors = torch.cat(parts).double()
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


def measure(embedder: TimmImageEmbedder, images: list[np.ndarray], device: str) -> Iterator[Fidelity]:
    """Compare every way of loading with timm's own pipeline on the CPU, for one model."""
    transform: Any = embedder.preprocessing.transform()
    mode = embedder.preprocessing.mode
    pixels = torch.stack([transform(Image.open(io.BytesIO(d.tobytes())).convert(mode)) for d in images])
    expected = embed(embedder.create_model().eval(), pixels, "cpu", torch.float32)
    levels = 255 * torch.tensor(embedder.preprocessing.std).view(-1, 1, 1)
    for name, dtype, make in ways(embedder, device):
        loaded = load(make(), images)
        cosine = (embed(embedder.create_model().eval(), loaded, device, dtype) * expected).sum(1)
        difference = float(((loaded - pixels).abs() * levels).mean())
        yield Fidelity(
            embedder.model_name,
            name,
            str(dtype).removeprefix("torch."),
            len(images),
            difference,
            float(cosine.mean()),
            float(np.percentile(cosine, 1)),
            float(cosine.min()),
        )


def embedders(names: list[str], checkpoint: Path) -> Iterator[TimmImageEmbedder]:
    """Yield the model with trained weights, then others with random weights."""
    yield TimmImageEmbedder(TRAINED, checkpoint=checkpoint)
    for name in names:
        yield TimmImageEmbedder(name, pretrained=False)


def table(rows: list[Fidelity]) -> Table:
    """Return the rows as a table for a terminal."""
    out = Table(title="against timm's own pipeline (Pillow, float32)", title_justify="left")
    for column in ("model", "loader", "dtype", "images", "pixels (of 255)", "cosine: mean", "1st percentile", "worst"):
        out.add_column(column)
    for r in rows:
        figures = [f"{value:.6f}" for value in (r.mean, r.percentile_1, r.worst)]
        out.add_row(r.model, r.loader, r.dtype, str(r.images), f"{r.pixels:.4f}", *figures)
    return out


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="WebDataset folder; by default the demo's photographs are made")
    parser.add_argument("--checkpoint", type=Path, help=f"trained weights of {TRAINED}; by default the demo's")
    parser.add_argument("--model", nargs="*", default=list(FAMILIES), help="models to add, with random weights")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        from flows.demo_data import build_dataset, trained_weights

        dataset = args.dataset or build_dataset(Path(scratch) / "data")
        checkpoint = args.checkpoint or trained_weights(Path(scratch) / "weights.safetensors")
        images = photographs(dataset)
        rows = []
        for embedder in embedders(args.model, checkpoint):
            print(f"{embedder.model_name} …", file=sys.stderr)
            rows += list(measure(embedder, images, device))
    Console(width=140).print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
