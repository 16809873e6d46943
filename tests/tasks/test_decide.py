"""All workers of a run, and of the run that resumes it, decode alike; whatever each of them would measure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from embedders import TimmImageEmbedder
from embedders.decision import Decision
from embedders.recipe import recipes_of
from tasks.decide import Undecided, agreed, decide_here, kept_decision
from tasks.embed import EmbedOptions, Records, embed_group
from tasks.records import LayerRecord
from tasks.run_part import RunPart
from tasks.shards import Shard, find_shards
from tasks.storage.folder import Folder
from tests.layers import LAYER, Nothing, layer_record, plan_of
from tests.measuring import MEASURED, Measuring, loaded

from .conftest import MakeShard

OPTIONS = EmbedOptions("key", "cpu")
FAST, EXACT = Decision("fast", 64), Decision("exact", 16)


def measure(found: Decision) -> None:
    """Have this process measure this."""
    os.environ[MEASURED] = f"{found.decoder} {found.batch_size}"


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[Client, str, str]]:
    """A client, and two workers, processes of their own: the first would measure FAST, the other EXACT."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(2, 60)
        one, other = client.scheduler_info()["workers"]
        for worker, measured in {one: FAST, other: EXACT}.items():
            client.run(measure, measured, workers=[worker])
        yield client, one, other


@pytest.fixture
def notes(tmp_path: Path) -> str:
    (tmp_path / "notes").mkdir()
    return str(tmp_path / "notes")


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Shard]:
    return [make_shard(f"{number}") for number in range(4)]


def decisions(records: Sequence[LayerRecord]) -> set[tuple[str, int]]:
    return {(record.decoder, record.batch_size) for record in records}


def all_of(records: Records) -> list[LayerRecord]:
    return [record for of_layer in records.values() for record in of_layer.values()]


def test_two_workers_that_measure_differently_give_one_decoder(
    workers: tuple[Client, str, str], shards: list[Shard], notes: str
) -> None:
    client, one, other = workers
    recipes = recipes_of(Measuring(notes))

    def embed(shards: Sequence[Shard], worker: str, decision: Any) -> Any:
        return client.submit(embed_group, shards, recipes, OPTIONS, decision, workers=[worker], pure=False)

    apart = [embed(shards[:1], one, None), embed(shards[1:2], other, None)]
    assert [decisions(all_of(future.result(60))) for future in apart] == [{("fast", 0)}, {("exact", 0)}]
    for shard in shards[:2]:
        shard.target.remove(shard.layer_file(LAYER))

    decided = client.submit(decide_here, shards, recipes, OPTIONS, workers=[other], pure=False)
    futures = [embed(shards[:2], one, decided), embed(shards[2:], other, decided)]
    assert decided.result(60) == EXACT
    records = [record for future in futures for record in all_of(future.result(60))]
    assert decisions(records) == {("exact", 16)}
    assert len({record.worker for record in records}) == 2


def test_the_engine_that_decides_is_the_one_that_embeds(
    workers: tuple[Client, str, str], shards: list[Shard], notes: str
) -> None:
    client, one, other = workers
    recipes = recipes_of(Measuring(notes))
    decided = client.submit(decide_here, shards, recipes, OPTIONS, workers=[one], pure=False)
    assert decided.result(60) == FAST
    assert not Folder(shards[0].output).has(shards[0].layer_file(LAYER))  # nothing is written
    for group in (shards[:1], shards[1:2]):
        client.submit(embed_group, group, recipes, OPTIONS, decided, workers=[one], pure=False).result(60)
    assert loaded(notes) == [1]
    client.submit(embed_group, shards[2:], recipes, OPTIONS, decided, workers=[other], pure=False).result(60)
    assert loaded(notes) == [1, 1]
    again = client.submit(embed_group, shards, recipes, OPTIONS, EXACT, workers=[one], pure=False)
    assert decisions(all_of(again.result(60))) == {("fast", 64)}  # all were done
    assert loaded(notes) == [1, 2]  # an engine of another decision is another one


def test_a_resumed_run_keeps_the_decision(workers: tuple[Client, str, str], shards: list[Shard], notes: str) -> None:
    client, one, other = workers
    recipes = recipes_of(Measuring(notes))
    assert kept_decision(plan_of(shards, Measuring(notes)), recipes) is None
    decided = client.submit(decide_here, shards, recipes, OPTIONS, workers=[one], pure=False)
    client.submit(embed_group, shards[:2], recipes, OPTIONS, decided, workers=[one], pure=False).result(60)

    plan = plan_of(shards, Measuring(notes))
    kept = kept_decision(plan, recipes)
    assert kept == FAST
    rest = client.submit(embed_group, plan.to_embed, recipes, OPTIONS, kept, workers=[other], pure=False).result(60)
    assert len(rest) == 2
    assert decisions([*plan_of(shards, Measuring(notes)).main.records.values()]) == {("fast", 64)}


def test_the_most_common_decision_of_the_asked_layers_is_kept() -> None:
    class Of:
        def __init__(self, name: str, *records: LayerRecord) -> None:
            self.name, self.records = name, {str(n): record for n, record in enumerate(records)}

    def made(decoder: str, size: int) -> LayerRecord:
        return layer_record(3, decoder=decoder, batch_size=size)

    class Done:
        layers = (
            Of("a", made("exact", 16), made("fast", 64), made("fast", 64), *[made("exact", 0)] * 9),
            Of("b", made("fast", 64)),
            Of("c", *[made("exact", 16)] * 9),
        )

    recipes = [recipe for name in ("a", "b") for recipe in recipes_of(Nothing(image_embedding_column=name))]
    assert kept_decision(Done(), recipes) == FAST  # type: ignore[arg-type]
    assert kept_decision(Done(), recipes[:0]) is None  # type: ignore[arg-type]


def test_a_cpu_decides_nothing_and_records_nothing(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    shards, recipes = [make_shard("0"), make_shard("1")], recipes_of(tiny)
    assert decide_here(shards, recipes, OPTIONS) is None
    assert decisions(all_of(embed_group(shards[:1], recipes, OPTIONS))) == {("exact", 0)}
    assert decisions(all_of(embed_group(shards[1:], recipes, OPTIONS, FAST))) == {("exact", 0)}
    assert kept_decision(plan_of(shards, tiny), recipes) is None


def test_damaged_and_empty_shards_are_passed_over(
    make_shard: MakeShard, notes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEASURED, "exact 16")
    shards = [make_shard("0"), make_shard("1", keys=(), d__jpg=b""), make_shard("2"), make_shard("3")]
    (tmp_path / "data/0.tar").write_bytes((tmp_path / "data/0.tar").read_bytes()[:1500])
    recipes = recipes_of(Measuring(notes))
    assert decide_here(shards, recipes, OPTIONS) == EXACT
    with pytest.raises(Undecided, match="1: it has no images"):
        decide_here(shards[:2], recipes, OPTIONS)
    with pytest.raises(Undecided, match="no shard"):
        decide_here([], recipes, OPTIONS)


def test_of_a_store_one_tar_is_fetched_and_not_kept(
    make_shard: MakeShard, notes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEASURED, "exact 16")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    fetched: list[str] = []
    store = Folder("memory://decide/data")
    for name in ("0", "1"):
        make_shard(name)
        store.fs.put_file(tmp_path / f"data/{name}.tar", f"/decide/data/{name}.tar")
    download = Folder.download

    def noted(self: Folder, name: str, local: str) -> None:
        fetched.append(name)
        download(self, name, local)

    monkeypatch.setattr(Folder, "download", noted)
    shards = find_shards("memory://decide/data", "memory://decide/out")
    assert decide_here(shards, recipes_of(Measuring(notes)), OPTIONS) == EXACT
    assert fetched == ["0.tar"]
    assert list((tmp_path / "scratch").rglob("*.tar")) == []
    assert Folder("memory://decide/out").list("") == []


def test_parts_of_a_run_take_what_the_first_one_measured(shards: list[Shard], notes: str) -> None:
    recipes = recipes_of(Measuring(notes))
    plans = [replace(plan_of(shards, Measuring(notes)), part=RunPart(number, 2)) for number in range(2)]
    assert agreed(FAST, plans[0], recipes) == FAST
    assert agreed(EXACT, plans[1], recipes) == FAST
    assert agreed(EXACT, plans[1], recipes_of(Nothing())) == EXACT
