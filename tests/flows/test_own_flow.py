"""A flow of a user's own, on Prefect's default task runner and on Dask, leaves what `flows.embed` leaves."""

from __future__ import annotations

import ast
import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.futures import wait

from embedders import TimmImageEmbedder
from embedders.errors import InputError
from examples.own_flow import own_flow
from flows import finish, only_writer, plan_dataset
from flows.outcome import RunFailed
from flows.report import main as report
from flows.search import main as search
from tasks.embed import embed_shards
from tasks.manifest import Manifest, read_manifest
from tasks.merge import merge_shards
from tasks.records import layer_record, merge_record, read_footers
from tasks.storage.folder import Folder
from tests.servers import s3_server

from .conftest import ROOT, TINY, embed, img2dataset

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
TIMES = {"seconds", "seconds_to_first", "images_per_second", "shards_cached"}
"""Fields of a manifest that are of the run, and not of what the output holds."""


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(img2dataset(tmp_path / "data", shards=3))


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def run(data: str, out: str, **options: Any) -> Manifest:
    return own_flow.with_options(**options)(data, out, TINY, pretrained=False)


def files(output: str) -> dict[str, int]:
    """When each file of an output was written, but for those that every run may write."""
    return {
        str(path.relative_to(output)): path.stat().st_mtime_ns
        for path in Path(output).rglob("*")
        if path.is_file() and path.name not in {"manifest.json", "report.html"}
    }


def keys(output: str) -> dict[str, str]:
    """The key of each layer file and of each merged file."""
    found = {}
    readers: dict[str, Any] = {"layers/image_embedding": layer_record, "metadata": merge_record}
    for kind, record in readers.items():
        folder = Folder(f"{output}/{kind}")
        for name, footer in read_footers(folder, folder.list(".parquet")):
            found[f"{kind}/{name}"] = record(footer).key
    return found


def task_names() -> list[str]:
    """The names of the task runs of the newest flow run."""

    async def read() -> list[str]:
        async with get_client() as client:
            flow_run = max(await client.read_flow_runs(), key=lambda run: str(run.created))
            only = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
            return sorted(run.name for run in await client.read_task_runs(flow_run_filter=only))

    return asyncio.run(read())


def dask() -> dict[str, Any]:
    from prefect_dask import DaskTaskRunner

    return {"task_runner": DaskTaskRunner(cluster_kwargs={"n_workers": 1, "dashboard_address": None})}


@pytest.mark.parametrize("runner", [dict, dask])
def test_it_leaves_what_the_flow_leaves(
    server: str, data: str, out: str, tmp_path: Path, runner: Callable[[], dict[str, Any]]
) -> None:
    made = run(data, out, **runner())
    assert {name.partition(" ")[0] for name in task_names()} == {"embed", "index", "merge"}
    assert (made.embedded, made.rows, made.shards_cached, made.shards_failed) == (24, 24, 0, 0)
    assert 0 < made.seconds_to_first <= made.seconds
    assert read_manifest(out).embedded == 24

    embed(Path(data), tmp_path / "flow")
    flows_own = read_manifest(str(tmp_path / "flow")).model_dump(exclude=TIMES | {"output", "metadata"})
    assert made.model_dump(exclude=TIMES | {"output", "metadata"}) == flows_own
    assert len(keys(out)) == 6
    assert keys(out) == keys(str(tmp_path / "flow"))
    assert files(out).keys() == files(str(tmp_path / "flow")).keys()

    before = files(out)
    after = embed(Path(data), Path(out))
    assert after.shards_cached == 3
    assert after.model_dump(exclude=TIMES) == made.model_dump(exclude=TIMES)
    assert files(out) == before


def test_a_second_run_does_what_is_missing(server: str, data: str, out: str) -> None:
    run(data, out)
    before = files(out)
    assert run(data, out).shards_cached == 3
    assert task_names() == []
    assert files(out) == before
    (Path(out) / "layers/image_embedding/00001.parquet").unlink()
    (Path(out) / "metadata/00002.parquet").unlink()
    assert run(data, out).shards_cached == 2
    assert task_names() == ["embed 00001", "index 00001", "merge 00002"]  # a layer of the same key needs no new merge
    changed = {name for name, time in files(out).items() if before[name] != time}
    assert changed == {"layers/image_embedding/00001.parquet", "metadata/00002.parquet", "unmatched/00002.parquet"}


def test_search_and_report_take_it(
    server: str, data: str, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, out)
    assert (Path(out) / "README.md").read_text().count(TINY)
    assert (Path(out) / "report.html").exists()
    capsys.readouterr()
    assert search([out, "--id", "000010000", "--sheet", str(tmp_path / "sheet.html")]) == 0
    assert "00001.tar/000010000.jpg" in capsys.readouterr().out
    assert report([out]) == 0


def test_a_failed_shard_is_named_and_stops_no_other(server: str, data: str, out: str, tmp_path: Path) -> None:
    whole = Path(data) / "00001.tar"
    shutil.copy(whole, tmp_path / "kept.tar")
    whole.write_bytes(b"<html>" * 500)
    with pytest.raises(RunFailed, match=r"1 of 3 shards failed \(00001: .*another run of own-flow") as failed:
        run(data, out)
    assert failed.value.manifest.failures.keys() == {"00001"}
    assert "another run" in read_manifest(out).finish_with
    assert [path.name for path in sorted((Path(out) / "metadata").iterdir())] == ["00000.parquet", "00002.parquet"]
    shutil.copy(tmp_path / "kept.tar", whole)
    assert run(data, out).shards_cached == 2
    assert task_names() == ["embed 00001", "index 00001", "merge 00001"]


def test_a_second_run_at_the_same_time_is_refused(server: str, data: str, out: str) -> None:
    with only_writer(out):
        with pytest.raises(InputError, match="another run writes here: 'a script'"):
            run(data, out)
        with pytest.raises(InputError, match="another run writes here"):
            embed(Path(data), Path(out))
    assert run(data, out).embedded == 24


def test_what_was_left_half_written_is_cleared_away(data: str, out: str) -> None:
    left = Path(out) / "metadata/.00000.parquet.0123456789abcdef0123456789abcdef.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    with only_writer(out):
        assert not left.exists()


def test_a_wrong_call_is_said_in_one_line_and_writes_nothing(data: str, out: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        plan_dataset(f"{data}/nowhere", out, TimmImageEmbedder(TINY, pretrained=False))
    plan_dataset(data, out, TimmImageEmbedder(TINY, pretrained=False))
    assert not Path(out).exists()


@task
def crashes(group: Any) -> None:
    raise RuntimeError("the driver has gone")


def test_shards_that_no_task_has_done_or_reported_are_failures(server: str, data: str, out: str) -> None:
    @flow
    def careless() -> Manifest:
        plan = plan_dataset(data, out, TimmImageEmbedder(TINY, pretrained=False))
        first, second, third = plan.groups_to_embed(workers=3)
        futures: list[Any] = [embed_shards.submit(*first), embed_shards.submit(*second), crashes.submit(third)]
        wait(futures)
        merging, *_ = plan.again().groups_to_merge()
        only = {"00000": merging.records["00000"]}
        futures.append(merge_shards.submit(merging.shards[:1], only, merging.options, span="the first"))
        return finish(plan, futures)

    with pytest.raises(RunFailed, match="2 of 3 shards failed"):
        careless()
    assert "merge the first" in task_names()
    manifest = read_manifest(out)
    why = "its task ended and left no whole output; RuntimeError: the driver has gone"
    assert manifest.failures == {"00001": why, "00002": why}


def test_several_layers_and_files_of_an_even_size(server: str, data: str, out: str) -> None:
    @flow
    def two_models() -> Manifest:
        embedders = [
            TimmImageEmbedder(TINY, pretrained=False, image_embedding_column=name, image_component=component)
            for name, component in (("first", None), ("second", "jpg"))
        ]
        plan = plan_dataset(data, out, embedders, rows_per_file=10, on_error="null")
        futures: list[Any] = [embed_shards.submit(*group) for group in plan.groups_to_embed(workers=1)]
        wait(futures)
        futures += [merge_shards.submit(*group) for group in plan.again().groups_to_merge()]
        return finish(plan, futures)

    manifest = two_models()
    assert manifest.layers.keys() == {"first", "second"}
    assert "write part-00000.parquet–part-00002.parquet" not in task_names()  # a task of its own for so few
    parts = sorted((Path(out) / "metadata").iterdir())
    assert [pq.read_metadata(part).num_rows for part in parts] == [10, 10, 10, 6]
    assert {"first", "second"} <= set(pq.read_schema(parts[0]).names)


def test_the_example_is_short() -> None:
    source = (ROOT / "examples/own_flow.py").read_text()
    (function,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert function.end_lineno is not None
    assert function.end_lineno - function.lineno < 20
    assert f"```python\n{source}```" in (ROOT / "docs/prefect.md").read_text()


def test_dataset_and_output_may_lie_in_a_store(
    server: str, data: str, out: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with s3_server() as url:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        store.mkdir("own-flow")
        store.put(f"{data}/*", "own-flow/data/")
        made = run("s3://own-flow/data", "s3://own-flow/out")
        assert (made.embedded, made.rows, made.shards_failed) == (24, 24, 0)
        assert run("s3://own-flow/data", "s3://own-flow/out").shards_cached == 3
        assert not [record for record in caplog.records if record.levelname == "WARNING" and "0000" in record.message]
    s3fs.S3FileSystem.clear_instance_cache()
