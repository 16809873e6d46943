"""`python -m flows.report OUT`: write report.html, one page that shows what an output holds, without a network."""

from __future__ import annotations

import contextlib
import html
import json
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from cyclopts import App

from embedders.errors import InputError
from flows.errors import exit_status
from tasks.dataset.sampling import Sampled, sample_vectors
from tasks.dataset.thumbnails import Pictures
from tasks.manifest import MANIFEST, Manifest, read_manifest, read_quarantine
from tasks.records import LayerRecord, read_layer_records
from tasks.storage.folder import Folder, writing
from tasks.vector_checks import measure_vectors
from tasks.wording import counted

app = App(
    name="python -m flows.report",
    help="Write a page that shows what an output holds.",
    help_format="plaintext",
    version_flags=[],
)
REPORT = "report.html"
VECTORS = 6000
"""Vectors that are sampled."""
MAP_POINTS = 1200
QUERIES, NEIGHBOURS = 12, 6
DUPLICATES = 24
DUPLICATE_COSINE = 0.98
"""Pairs with a higher cosine count as near duplicates."""
QUARANTINED = 48
SECONDS_PER_BIN = 60
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em}h2{margin-top:2em;border-bottom:1px solid #ddd}td,th{padding:.15em 1em .15em 0;text-align:left;
vertical-align:top}.wrong{background:#fdd;border-left:6px solid #c00;padding:.6em 1em}.row{display:flex;gap:8px;
flex-wrap:wrap;margin:.4em 0}figure{margin:0;width:100px;font-size:11px;overflow-wrap:anywhere}
figure img{max-width:96px;max-height:96px;display:block}#hover{position:fixed;right:16px;bottom:16px;background:#fff;
border:1px solid #999;padding:6px;font-size:12px;display:none}"""
HOVER = """<script>const pictures=%s,hover=document.getElementById('hover'),map=document.getElementById('map');
map.on('plotly_hover',e=>{const p=e.points[0],u=pictures[p.pointIndex];hover.replaceChildren();
if(u){const i=new Image();i.src=u;hover.append(i)}hover.append(p.text);hover.style.display='block'});
map.on('plotly_unhover',()=>{hover.style.display='none'});</script>"""


def write_report(
    output: str,
    seed: int = 0,
    dataset: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    layer: str | None = None,
) -> str:
    """Write report.html into an output and return its path or URL.

    Apart from the footers, it reads only a few shards' vectors and some hundred images, however large the dataset is.

    Args:
        output: Folder or fsspec URL of the output.
        seed: Seed of the sample of vectors.
        dataset: Where the dataset is, if it is not where the manifest says.
        note: Called with a line if pictures are missing.
        layer: The layer to show; by default the first of the last run.

    Raises:
        InputError: The output has no manifest or no such layer, or cannot be written to.

    Example:
        >>> write_report("out")
        '/data/out/report.html'
    """
    try:
        import plotly.offline
    except ImportError as error:
        raise InputError("the report needs plotly: pip install plotly") from error
    folder = Folder(output)
    manifest = read_manifest(output, dataset, layer)
    generator = np.random.default_rng(seed)
    sampled = sample_vectors(folder, manifest.column, VECTORS, generator)
    pictures = Pictures.of_manifest(manifest) if manifest.dataset else None
    parts = [_facts(manifest, sampled), _layers(manifest), _throughput(folder, manifest.column)]
    if len(sampled.vectors) > 1 and np.isfinite(sampled.vectors).all():
        parts += [_spread(sampled), _map(sampled, pictures, generator), _alike(sampled, pictures, generator)]
    parts.append(_quarantine(folder, manifest.column, pictures, manifest.left_out))
    if pictures and pictures.missing:
        parts.insert(1, f"<p class=wrong>{_text(pictures.missing[0].upper() + pictures.missing[1:])}</p>")
        note(f"warning: {pictures.missing}")
    head = f"<meta charset=utf-8><title>{html.escape(manifest.model)}</title><style>{STYLE}</style>"
    page = f"<!doctype html><html lang=en><head>{head}<script>{plotly.offline.get_plotlyjs()}</script></head><body>"
    with writing(folder.place(REPORT), "make the output writable"):
        folder.write_text(REPORT, f"{page}{''.join(parts)}</body></html>\n")
    return folder.place(REPORT)


def _facts(manifest: Manifest, sampled: Sampled) -> str:
    wrong = list(manifest.wrong)
    if measure_vectors(sampled.vectors).get("nonfinite"):
        wrong.append("NaN or infinite vectors in the sample that this page was made from")
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.quarantined_by_reason.items())
    facts = {
        "samples": f"{manifest.samples:,} = {manifest.embedded:,} embedded + {manifest.quarantined:,} quarantined",
        "quarantined": reasons or "none",
        "ignored": f"{manifest.ignored:,} members that are part of no sample {', '.join(manifest.ignored_examples)}",
        "shards": manifest.told_shards,
        "rows": manifest.told_rows,
        "last run": f"{manifest.seconds:,.1f} s, {manifest.images_per_second:,.1f} images/s, start-up excluded",
        "dimensions": manifest.dimensions,
        **manifest.embedder,
        **({"precision": manifest.computed} if manifest.computed else {}),
        "decoded by": manifest.decoders,
        "versions": manifest.versions,
    }
    rows = "".join(f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in facts.items())
    links = " · ".join(f'<a href="{name}">{name}</a>' for name in (MANIFEST, "metadata/", "layers/", "quarantine/"))
    boxes = "".join(f"<p class=wrong>Error: {_text(what)}</p>" for what in wrong)
    boxes += "".join(f"<p class=wrong>Warning: {_text(what)}</p>" for what in manifest.warnings)
    failures = manifest.failures | manifest.failures_of_other_parts
    failed = "".join(f"<p class=wrong>Failed: {_text(f'{k}: {v}')}</p>" for k, v in failures.items())
    if manifest.over_limit:
        failed += f"<p class=wrong>Failed: {_text(manifest.over_limit)} (--max-quarantined)</p>"
    return f"<h1>{_text(manifest.model)}</h1>{boxes}{failed}<table>{rows}</table><p>{links}</p>"


def _layers(manifest: Manifest) -> str:
    """The account of each layer, if there are several."""
    if len(manifest.layers) < 2:
        return ""
    rows = "".join(
        f"<tr><th>{_text(name)}<td>{_text(layer.made_of.get('model') or layer.made_of.get('embedder') or '')}"
        f"<td>{layer.samples:,}<td>{layer.embedded:,}<td>{layer.quarantined:,}"
        f"<td>{_text({name: (it['dtype'], *it['shape']) for name, it in layer.columns.items()})}"
        for name, layer in manifest.layers.items()
    )
    head = "".join(f"<th>{name}" for name in ("layer", "model", "samples", "embedded", "quarantined", "columns"))
    return f"<h2>Layers</h2><table><tr>{head}{rows}</table>"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name} {it}" for name, it in value.items())
    return html.escape(str(value))


def _throughput(folder: Folder, layer: str) -> str:
    """Draw each worker's images per second over time, from the times in the footers."""
    files = Folder(folder.place(f"layers/{layer}"))
    records = [record for _, record in read_layer_records(files, files.list(".parquet")) if record.work]
    if not records:
        return ""
    began, ended = min(r.work["began"] for r in records), max(r.work["ended"] for r in records)
    bins = int(min(max((ended - began) / SECONDS_PER_BIN, 20), 200))
    edges = np.linspace(began, max(ended, began + 0.01), bins + 1)
    lines = {worker: np.zeros(bins) for worker in sorted({record.worker for record in records})}
    for record in records:
        lines[record.worker] += _rate(record, edges)
    traces = [
        {"type": "scatter", "mode": "lines", "name": worker, "x": (edges[:-1] - began).tolist(), "y": line.tolist()}
        for worker, line in lines.items()
    ]
    axes = {"xaxis": {"title": {"text": "seconds"}}, "yaxis": {"title": {"text": "images/s"}}}
    return "<h2>Throughput by worker</h2>" + _plot("throughput", traces, axes) + _stages(records)


STAGES = ("read", "decode", "model", "write")


def _stages(records: Sequence[LayerRecord]) -> str:
    """Show what each worker spent its time on. Stages run in parallel, so the others wait for the longest one."""
    rows = []
    for worker in sorted({record.worker for record in records}):
        works = [record.work for record in records if record.worker == worker]
        spent = [sum(work.get(stage, 0.0) for work in works) for stage in STAGES]
        if whole := sum(spent):
            cells = "".join(f"<td>{100 * seconds / whole:.0f} %" for seconds in spent)
            rows.append(f"<tr><th>{_text(worker)}{cells}")
    if not rows:
        return ""
    head = "".join(f"<th>{stage}" for stage in STAGES)
    return f"<h3>Where the time went</h3><table><tr><th>worker{head}{''.join(rows)}</table>"


def _rate(record: LayerRecord, edges: np.ndarray) -> np.ndarray:
    """Return a shard's images per second in each bin, as if it had been processed at a constant rate.

    Args:
        record: The shard's record.
        edges: Edges of the bins as times in seconds, (bins + 1,).

    Returns:
        (bins,) float64.
    """
    start, stop = record.work["began"], max(record.work["ended"], record.work["began"] + 0.01)
    inside = np.clip(np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1]), 0, None)
    return np.asarray(inside / (stop - start) * record.samples / np.diff(edges))


def _spread(sampled: Sampled) -> str:
    norms = np.linalg.norm(sampled.vectors, axis=1)
    deviations = np.sort(sampled.vectors.std(axis=0))[::-1]
    norm_plot = [{"type": "histogram", "x": norms.round(5).tolist(), "nbinsx": 50}]
    dead = int((deviations < 1e-6 * max(float(norms.max()), 1e-30)).sum())
    text = (
        f"<p>{counted(len(norms), 'sampled vector')}; constant: {dead} of {counted(len(deviations), 'dimension')}.</p>"
    )
    spread_plot = [{"type": "scatter", "mode": "lines", "y": deviations.astype(float).round(6).tolist()}]
    return (
        f"<h2>Norms and spread</h2>{text}"
        + _plot("norms", norm_plot, {"xaxis": {"title": {"text": "norm"}}})
        + _plot("spread", spread_plot, {"xaxis": {"title": {"text": "dimensions by standard deviation"}}})
    )


def _map(sampled: Sampled, pictures: Pictures | None, generator: np.random.Generator) -> str:
    """Draw the sampled vectors in two dimensions, with the image of the point under the pointer."""
    rows = generator.permutation(len(sampled.vectors))[:MAP_POINTS]
    points, how = _flattened(sampled.vectors, rows)
    places = [sampled.places[row] for row in rows]
    urls = pictures.of(places, 80) if pictures else {}
    labels = [f"{shard} {sample_id}" for shard, sample_id in places]
    trace = {"type": "scatter", "mode": "markers", "text": labels, "hoverinfo": "none", "marker": {"size": 6}}
    trace |= {"x": points[:, 0].astype(float).round(5).tolist()}
    trace |= {"y": points[:, -1].astype(float).round(5).tolist()}
    plot = _plot("map", [trace], {"hovermode": "closest", "height": 560})
    hover = HOVER % _json([urls.get(place) for place in places])
    return f"<h2>Map ({how})</h2>{plot}<div id=hover></div>{hover}"


def _flattened(vectors: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, str]:
    """Project vectors to two dimensions, by UMAP if it is installed, else by principal components.

    Args:
        vectors: (n, dimensions) float32.
        rows: Indices of those to project, (m,).

    Returns:
        The points, (m, 2), and the name of the method.
    """
    try:
        from umap import UMAP
    except ImportError:
        centred = vectors - vectors.mean(axis=0)
        _, axes = np.linalg.eigh(centred.T @ centred)
        return centred[rows] @ axes[:, -2:][:, ::-1], "principal components"
    neighbours = min(15, max(2, len(rows) - 1))
    projection = UMAP(n_neighbors=neighbours, metric="cosine", random_state=0)
    return np.asarray(projection.fit_transform(vectors[rows])), "UMAP"


def _alike(sampled: Sampled, pictures: Pictures | None, generator: np.random.Generator) -> str:
    """Show the nearest neighbours of some images, and pairs that are nearly the same."""
    unit = sampled.vectors / np.maximum(np.linalg.norm(sampled.vectors, axis=1, keepdims=True), 1e-30)
    queries = generator.permutation(len(unit))[:QUERIES]
    rows = []
    for query in queries.tolist():
        cosines = unit @ unit[query]
        cosines[query] = np.inf
        rows.append([(int(i), float(cosines[i])) for i in np.argsort(-cosines)[: NEIGHBOURS + 1]])
    pairs = _pairs(unit)
    shown = [sampled.places[i] for row in rows for i, _ in row] + [sampled.places[i] for p in pairs for i in p[1:]]
    urls = pictures.of(shown, 96) if pictures else {}

    def figure(i: int, label: str) -> str:
        return _figure(urls.get(sampled.places[i]), f"{label} {' '.join(sampled.places[i])}")

    def score(cosine: float) -> str:
        return "" if np.isinf(cosine) else f"{cosine:.3f}"

    near = "".join(f"<div class=row>{''.join(figure(i, score(c)) for i, c in row)}</div>" for row in rows)
    same = "".join(f"<div class=row>{figure(a, f'{c:.4f}')}{figure(b, '')}</div>" for c, a, b in pairs)
    return (
        f"<h2>Nearest neighbours in the sample</h2>{near}<h2>Near duplicates in the sample</h2>"
        f"{same or f'<p>No pair with a cosine above {DUPLICATE_COSINE}.</p>'}"
    )


def _pairs(unit: np.ndarray) -> list[tuple[float, int, int]]:
    """Return the pairs of rows with the highest cosines above DUPLICATE_COSINE; compute the product in blocks."""
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(unit), 512):
        cosines = unit[start : start + 512] @ unit[start:].T
        cosines[np.tril_indices(len(cosines), 0, cosines.shape[1])] = 0
        flat = np.flatnonzero(cosines.ravel() > DUPLICATE_COSINE)
        best = flat[np.argsort(-cosines.ravel()[flat])[:DUPLICATES]]
        a, b = np.unravel_index(best, cosines.shape)
        block = zip(cosines[a, b].tolist(), (a + start).tolist(), (b + start).tolist(), strict=True)
        found = sorted([*found, *block], reverse=True)[:DUPLICATES]
    return found


def _quarantine(folder: Folder, layer: str, pictures: Pictures | None, left_out: Collection[str]) -> str:
    rows = read_quarantine(folder, layer, QUARANTINED, left_out)
    if not rows:
        return ""
    urls = pictures.of([(row["shard"], row["id"]) for row in rows], 96) if pictures else {}
    figures = (
        _figure(urls.get((r["shard"], r["id"])), f"{r['reason']}: {r['shard']} {r['member']} ({r['detail']})")
        for r in rows
    )
    return f"<h2>Quarantined</h2><div class=row>{''.join(figures)}</div>"


def _figure(url: str | None, caption: str) -> str:
    image = f'<img src="{url}" alt="">' if url else ""
    return f"<figure>{image}{_text(caption)}</figure>"


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element."""
    return json.dumps(value).replace("</", "<\\/").replace("<!--", "<\\!--")


def _plot(name: str, traces: list[dict[str, Any]], layout: dict[str, Any]) -> str:
    layout = {"margin": {"t": 10, "r": 10}, "height": 300, "showlegend": len(traces) > 1, **layout}
    options = {"displaylogo": False, "responsive": True}
    arguments = ",".join(map(_json, (name, traces, layout, options)))
    return f"<div id={name}></div><script>Plotly.newPlot({arguments})</script>"


@app.default
def report(output: str, *, dataset: str | None = None, layer: str | None = None) -> None:
    """Write OUTPUT/report.html from the files of an output.

    Parameters
    ----------
    output
        The --output of a run of flows.embed.
    dataset
        The dataset's folder, if it has moved. The pictures are read from there.
    layer
        The layer of vectors to show, if the output has several. By default the first of the last run.
    """
    print(write_report(output, dataset=dataset, layer=layer, note=lambda text: print(text, file=sys.stderr)))


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status: 2 if the call or its input is wrong."""
    return exit_status(app, arguments)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
