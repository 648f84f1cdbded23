"""A tuning run in a process of its own, for tests that stop it: LOG DELAY_MS [--ctrl-c N]."""

from __future__ import annotations

import signal
import sys

import synthetic
from fake_measurer import FakeMeasurer

from dop.database.jsonl import Log
from dop.family import Family
from dop.scenario import named
from dop.tune import tune

SCENARIOS = (named("identical", 1), named("uniform", 32), named("distinct", 128))


def main() -> None:
    # A shell's background job is started with Ctrl-C ignored, and so would this be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path, delay_ms = sys.argv[1], float(sys.argv[2])
    space = synthetic.space()
    family = Family(synthetic.WORKLOAD, synthetic.SM_90, SCENARIOS)
    print("ready", flush=True)
    with FakeMeasurer(space, delay_s=delay_ms / 1000) as measurer, Log.open(path) as log:
        result = tune(
            [family],
            measurer=measurer,
            log=log,
            budget_s=60,
            trials=int(sys.argv[3]),
            build=lambda w, t: space,
        )
    print(result.stopped_by, result.progress.records, flush=True)


if __name__ == "__main__":
    main()
