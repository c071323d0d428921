"""The decisions of a run of the strategy "measured", as another run's batches by hand."""

import copy

from ml_collections import ConfigDict

from bigbatch.config import saved_config
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket, checkpoint, continuing


def replay(config: ConfigDict, source: str) -> ConfigDict:
    """The config with the batches that another run has decided, by hand.

    Args:
        config: of the run to train, with the other run's recipe and limits.
        source: the workdir of the other run, at its end.

    Raises:
        Mistake: if there is no such run, it decides nothing, or it is not at its end.
    """
    with bucket.opened(source) as (folder, mirror):
        run = checkpoint.find_newest(folder, mirror).run
    if not run:
        raise Mistake(f"--replay={source}: there is no run.")
    strategy = saved_config(run).strategy
    if strategy != "measured":
        raise Mistake(
            f"--replay={source} holds a run of the strategy {strategy}, which decides nothing.")
    if run["examples_seen"] < run["phases"][-1]["end_example"]:
        raise Mistake(f"--replay={source}: this run is not at its end, so it may still decide.")
    replayed = copy.deepcopy(config)
    decisions = continuing.position_of(run).growth.decisions
    replayed.strategy = "by_hand" if decisions else "decay"
    replayed.by_hand = tuple((f"{example} examples", batch) for example, batch in decisions)
    return replayed
