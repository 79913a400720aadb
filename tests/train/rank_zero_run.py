"""One rank before there is a process group: decides, compares options, fails as asked. Prints its decisions as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from jsonargparse import Namespace

from lit_gpt.errors import UserError
from lit_gpt.train import rank_zero, ranks
from lit_gpt.train.rank_zero import check_same_configuration, connect_ranks, decide_once, failures_reported


def decide(name: str, asked: dict[str, Any]) -> str:
    time.sleep(asked.get("sleep", 0))
    connection = rank_zero._connection
    while asked.get("end") and connection is not None and not connection.store.add(f"waiting/{name}", 0):
        time.sleep(0.1)  # the other rank waits for this one before it ends
    time.sleep(1 if asked.get("end") else 0)
    match asked.get("end"):
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "bad input":
            raise UserError("this cannot be")
        case "failure":
            raise OSError("no disk")
    return f"{name} of node {os.environ.get('NODE_RANK') or os.environ.get('GROUP_RANK')}"


def run(asked: dict[str, Any]) -> None:
    if asked.get("end") == "at once":
        return
    trainer = {"num_nodes": asked.get("num_nodes", 1), "devices": asked.get("devices", 1), "accelerator": "cpu"}
    connect_ranks(Namespace(strategy="ddp", **trainer))
    if "options" in asked:
        check_same_configuration("options", asked["options"])
        if not asked.get("group"):
            time.sleep(30)  # as a process group that waits for the other rank
    decided = [
        decide_once(name, lambda name=name: decide(name, asked), asked.get("seconds", 60))  # type: ignore[misc]
        for name in asked.get("decide", ())
    ]
    if asked.get("group"):
        import torch

        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    print(json.dumps(decided))


def main() -> int:
    asked = json.loads(sys.argv[1])
    ranks.ARRIVAL_SECONDS = asked.get("arrival", 60.0)
    try:
        with failures_reported():
            run(asked)
    except Exception as error:
        print(f"lit_gpt: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
