"""Measure decoding only the part that the crop keeps beside decoding all of an image, by DALI on the CPU.

    python -m benchmarks.roi [--photos FOLDER]

Decodes the same JPEGs in both ways by turns, and says whether the pixels are the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.throughput import _crop, load_photographs
from embedders.dali_operators import _axis
from embedders.image_headers import inspect
from embedders.preprocess import Preprocessing
from tasks.hardware import available_cores

IMAGES, BATCH, TURNS = 512, 32, 5
MARGIN = 2
"""Pixels beyond those that the filter touches, because chroma is smoothed over its neighbours."""


def kept(preprocessing: Preprocessing, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the part that the crop needs of n images starts and ends, as (y, x): float32 (n, 2) each."""
    resize_h, resize_w, top, left = preprocessing.geometries(heights, widths)
    support = preprocessing.interpolation.support
    y = _axis(heights, resize_h, top, preprocessing.height, support)
    x = _axis(widths, resize_w, left, preprocessing.width, support)
    start = np.stack([np.maximum(y.first - MARGIN, 0), np.maximum(x.first - MARGIN, 0)], axis=1)
    end = np.stack([np.minimum(y.last + MARGIN, heights), np.minimum(x.last + MARGIN, widths)], axis=1)
    return start.astype(np.float32), end.astype(np.float32)


def decoder(roi: bool) -> Any:
    """Return a pipeline that decodes all of an image, or from "start" to "end"."""
    import nvidia.dali.types as dali_types
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    types: Any = dali_types
    make: Any = Pipeline
    pipeline = make(batch_size=BATCH, num_threads=available_cores(), device_id=None, prefetch_queue_depth=1)
    common = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        if roi:
            start, end = (
                fn.cast(fn.external_source(name=name, dtype=types.FLOAT, ndim=1), dtype=types.INT32)
                for name in ("start", "end")
            )
            pipeline.set_outputs(fn.decoders.image_slice(encoded, start=start, end=end, axes=(0, 1), **common))
        else:
            pipeline.set_outputs(fn.decoders.image(encoded, **common))
    pipeline.build()
    return pipeline


def main(arguments: Sequence[str]) -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roi", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--photos", help="folder with photographs, instead of scikit-image's")
    photographs = load_photographs(parser.parse_args(arguments).photos)
    encoded = [np.frombuffer(_crop(number, photographs), np.uint8) for number in range(IMAGES)]
    headers = [inspect(image) for image in encoded]
    sizes = np.array([(header.height, header.width) for header in headers])
    preprocessing = Preprocessing.from_timm(
        {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}
        | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    )
    start, end = kept(preprocessing, sizes[:, 0], sizes[:, 1])
    pipelines = {roi: decoder(roi) for roi in (False, True)}

    def decode(roi: bool) -> list[np.ndarray]:
        found = []
        for first in range(0, IMAGES, BATCH):
            part = slice(first, first + BATCH)
            pipelines[roi].feed_input("encoded", encoded[part])
            if roi:
                pipelines[roi].feed_input("start", start[part])
                pipelines[roi].feed_input("end", end[part])
            (images,) = pipelines[roi].run()
            found += [np.array(images.at(i)) for i in range(BATCH)]
        return found

    pairs = zip(decode(False), decode(True), start.astype(int), end.astype(int), strict=True)
    same = sum(np.array_equal(whole[y0:y1, x0:x1], part) for whole, part, (y0, x0), (y1, x1) in pairs)
    seconds = dict.fromkeys(pipelines, 0.0)
    for _ in range(TURNS):
        for roi in pipelines:
            began = time.perf_counter()
            decode(roi)
            seconds[roi] += time.perf_counter() - began
    share = float(((end - start).prod(axis=1) / sizes.prod(axis=1)).mean())
    whole, part = (TURNS * IMAGES / seconds[roi] for roi in (False, True))
    print(f"kept of an image: {share:.2f}; {same} of {IMAGES} have the same pixels")
    print(f"images/s: whole {whole:,.0f}, only what is kept {part:,.0f}, ratio {part / whole:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
