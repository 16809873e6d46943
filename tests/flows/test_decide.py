"""The decision as a task of a flow, whose future the embedding tasks take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from prefect import flow

from embedders.recipe import recipes_of
from tasks.decide import decide
from tasks.embed import EmbedOptions, embed_shards
from tasks.existing_cluster import task_runner
from tasks.shards import find_shards
from tests.measuring import MEASURED, Measuring, loaded

from ..tasks.conftest import write_tar


def test_the_decision_goes_to_the_embedding_tasks_as_a_future(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEASURED, "fast 64")
    for name in ("0", "1"):
        write_tar(tmp_path / f"data/{name}.tar", {"a.jpg": b"an image", "b.jpg": b"another"})
    (tmp_path / "notes").mkdir()
    shards = find_shards(str(tmp_path / "data"), str(tmp_path / "out"))
    recipes, options = recipes_of(Measuring(str(tmp_path / "notes"))), EmbedOptions("key", "cpu")

    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster:

        @flow(task_runner=task_runner(cluster.scheduler_address), persist_result=False)  # type: ignore[arg-type]
        def run() -> list[tuple[str, int]]:
            decided: Any = decide.submit(shards, recipes, options)
            futures: list[Any] = [embed_shards.submit([it], recipes, options, it.name, decided) for it in shards]
            done = [of_layer for future in futures for of_layer in future.result().values()]
            return [(record.decoder, record.batch_size) for of_layer in done for record in of_layer.values()]

        assert run() == [("fast", 64)] * 2
    assert loaded(tmp_path / "notes") == [1]


def test_a_decision_that_cannot_be_made_stops_no_run(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "data/0.tar", {"a.jpg": b""})
    (tmp_path / "notes").mkdir()
    shards = find_shards(str(tmp_path / "data"), str(tmp_path / "out"))

    caplog.set_level("INFO")  # whatever an earlier test has left

    @flow(persist_result=False)
    def run() -> object:
        return decide(shards, recipes_of(Measuring(str(tmp_path / "notes"))), EmbedOptions("key", "cpu"))

    assert run() is None
    assert "undecided, so each worker decides for itself: 0: it has no images" in caplog.text
