"""Checks on the result: vectors that are wrong as a whole, seen from what each shard's footer says of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tasks.records import LayerRecord

ALIKE = 1e-6
"""Variance by mean square below which vectors are all alike: any two have a cosine above 0.999999."""
ENOUGH = 8
"""Vectors from which on it is said that they are alike: three copies of an image are no broken model."""
NORM_TOLERANCE = 1e-3


class VectorStatistics:
    """Statistics of vectors that come a few at a time, for the record of a layer.

    Means and variances are joined as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979).
    """

    def __init__(self) -> None:
        self._nonfinite = self._count = 0
        self._norm_min, self._norm_max, self._square = np.inf, 0.0, 0.0
        self._mean: Any = 0.0
        self._spread: Any = 0.0

    def add(self, vectors: np.ndarray) -> None:
        """Count vectors, (n, dimensions) float32."""
        finite = np.isfinite(vectors).all(axis=1)
        self._nonfinite += len(vectors) - int(finite.sum())
        rows = vectors if finite.all() else vectors[finite]
        if not rows.size:
            return
        squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        self._norm_min = min(self._norm_min, float(np.sqrt(squares.min())))
        self._norm_max = max(self._norm_max, float(np.sqrt(squares.max())))
        mean, count = rows.mean(axis=0, dtype=np.float64), self._count + len(rows)
        apart = mean - self._mean
        self._spread = self._spread + rows.var(axis=0, dtype=np.float64) * len(rows)
        self._spread += apart * apart * (self._count * len(rows) / count)
        self._mean = self._mean + apart * (len(rows) / count)
        self._square += (float(squares.mean()) - self._square) * (len(rows) / count)
        self._count = count

    def result(self) -> dict[str, float]:
        """Return what a footer keeps.

        Returns:
            `nonfinite`, the vectors with a NaN or an infinity; of the others `norm_min` and `norm_max`, `square`, the
            mean of their squared norms, `variance`, summed over the dimensions, and `constant`, the dimensions without
            any. Empty where there was no vector.
        """
        measured = {"nonfinite": float(self._nonfinite)}
        if not self._count:
            return measured if self._nonfinite else {}
        variances = self._spread / self._count
        return measured | {
            "norm_min": self._norm_min,
            "norm_max": self._norm_max,
            "square": self._square,
            "variance": float(variances.sum()),
            "constant": float((variances <= ALIKE * ALIKE * max(self._square, 1e-300)).sum()),
        }


def measure_vectors(vectors: np.ndarray) -> dict[str, float]:
    """Return the statistics of vectors, (n, dimensions) float32; see `VectorStatistics.result`."""
    statistics = VectorStatistics()
    statistics.add(vectors)
    return statistics.result()


def check_vectors(records: Mapping[str, LayerRecord], embedder: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the vectors of a layer, a line each; empty where nothing is.

    Args:
        records: The layer's record for each shard.
        embedder: The fingerprint that the layer was made with; its `normalized` says whether norms must be 1.
    """
    measured = {name: record.vectors for name, record in records.items() if record.vectors}
    samples = sum(record.samples for record in records.values())
    found = []
    refused = sum(record.quarantined.get("not_embedded", 0) for record in records.values())
    if refused and not any(record.embedded for record in records.values()):
        found.append(f"the model gave no usable vector for any of {samples:,} images; try --no-autocast")
    if broken := [name for name, it in measured.items() if it["nonfinite"]]:
        found.append(f"NaN or infinite vectors in {_named(broken)}; remove these files in layers/ and run again")
    whole = {name: it for name, it in measured.items() if "square" in it}
    if zero := [name for name, it in whole.items() if it["norm_max"] == 0]:
        found.append(f"all vectors are zero in {_named(zero)}; check the model and its weights")
    if embedder.get("normalized"):
        off = {name: it for name, it in whole.items() if _off(it["norm_min"]) or _off(it["norm_max"])}
        if off := {name: it for name, it in off.items() if name not in zero}:
            low, high = min(it["norm_min"] for it in off.values()), max(it["norm_max"] for it in off.values())
            found.append(f"norms from {low:.4g} to {high:.4g} where each should be 1, in {_named(off)}")
    counts = {name: records[name].embedded for name in whole}
    total = sum(counts.values())
    variance = sum(whole[name]["variance"] * count for name, count in counts.items())
    square = sum(whole[name]["square"] * count for name, count in counts.items())
    if total >= ENOUGH and square > 0 and max(counts.values()) > 1 and variance <= ALIKE * square:
        found.append(f"all vectors of a shard are alike (zero variance) in {_named(whole)}; check model and weights")
    return found


def _off(norm: float) -> bool:
    return not abs(norm - 1) <= NORM_TOLERANCE


def _named(names: Iterable[str]) -> str:
    """ "3 shards (00000, 00001, …)" """
    listed = sorted(names)
    return f"{len(listed)} shard{'s' * (len(listed) > 1)} ({', '.join(listed[:3])}{', …' * (len(listed) > 3)})"
