# own_flow.py
from prefect import flow
from prefect.futures import wait

from embedders import TimmImageEmbedder
from flows import finish, only_writer, plan_dataset
from tasks.embed import embed_shards
from tasks.index import index_shards
from tasks.manifest import Manifest
from tasks.merge import merge_shards


@flow
def own_flow(dataset: str, output: str, model_name: str, pretrained: bool = True) -> Manifest:
    """Index, embed and merge what an output lacks of a dataset."""
    with only_writer(output):
        plan = plan_dataset(dataset, output, TimmImageEmbedder(model_name, pretrained=pretrained))
        embedded = []
        for group in plan.groups_to_embed():
            indexed = index_shards.submit(group.shards, plan.id_col)
            embedded.append(embed_shards.submit(*group, wait_for=[indexed]))
        wait(embedded)  # a task whose shards failed raises ShardsFailed when asked for its result, and stops no other
        merged = [merge_shards.submit(*group) for group in plan.again().groups_to_merge()]
        return finish(plan, [*embedded, *merged])  # raises RunFailed, with a reason for each shard that failed
