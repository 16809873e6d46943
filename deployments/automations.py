"""`python -m deployments.automations`: set up what the Prefect server does by itself when a run dies or fails.

It looks only at runs of this project's flows that have the tag shard-embed, as its deployments have, so that it can be
used on a server that others use too. It marks a run as crashed if its heartbeats stop, for instance because its node
lost power. Flows send heartbeats if PREFECT_FLOWS_HEARTBEAT_FREQUENCY is set for the worker. With --notify URL, the
server posts each failed or crashed run there as JSON, in the form that chat services accept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

from flows.run_labels import PROJECT

HEARTBEAT = 30
"""Seconds between two heartbeats of a flow run, the shortest time that Prefect accepts."""
MISSED = 3
"""A run counts as dead once it has missed this many heartbeats."""
ENDED = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")]
OURS: list[Any] = [
    {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{PROJECT}"},
    {"prefect.resource.role": "flow", "prefect.resource.name": ["embed", "new-shards"]},
]
"""What an event is related to if it is of a run of this project: both of these."""
MESSAGE = """{"text": {{ (flow_run.name ~ ": " ~ flow_run.state.name ~ ". " ~ flow_run.state.message) | tojson }} }"""
ZOMBIES, FAILURES, BLOCK = "shard-embed: mark dead runs", "shard-embed: report failures", "shard-embed-notify"


def zombies() -> Automation:
    """Return the automation that marks a flow run as crashed once its heartbeats stop."""
    return Automation(
        name=ZOMBIES,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ENDED},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OURS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=MISSED * HEARTBEAT),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message="its process is gone; Retry does only what it left unfinished"
            )
        ],
    )


def failures(url: str) -> Automation:
    """Return the automation that posts every failed or crashed run to a URL."""
    block = Webhook(method="POST", url=url, allow_private_urls=True).save(BLOCK, overwrite=True)
    return Automation(
        name=FAILURES,
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OURS,
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=block, payload=MESSAGE)],
    )


def put(automation: Automation) -> None:
    """Create an automation on the server, or update the one of its name, which stays off if somebody put it off."""
    try:
        there: Any = Automation.read(name=automation.name)
    except ValueError:
        automation.create()
        return
    automation.id, automation.enabled = there.id, there.enabled
    automation.update()


def make(notify: str | None) -> None:
    """Create the automations on the configured server.

    Args:
        notify: URL to post failed and crashed runs to; None leaves that as it is.
    """
    put(zombies())
    if notify:
        put(failures(notify))


def main(arguments: Sequence[str]) -> int:
    """Create the automations and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.automations", description=__doc__.splitlines()[0])
    parser.add_argument("--notify", metavar="URL", help="post failed runs there as JSON")
    make(parser.parse_args(arguments).notify)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
