"""`dop tune` with made-up times in a process of its own: DELAY_MS, then its arguments."""

from __future__ import annotations

import signal
import sys

import synthetic
from fake_measurer import FakeMeasurer

import dop.cli.tune
import dop.tune
from dop.cli.main import main

if __name__ == "__main__":
    # A shell's background job is started with Ctrl-C ignored, and so would this be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    space = synthetic.space()
    delay_s = float(sys.argv[1]) / 1000
    dop.cli.tune._measurer = lambda target: FakeMeasurer(space, delay_s=delay_s)
    dop.tune._build_space = lambda workload, target: space
    sys.exit(main(["tune", *sys.argv[2:]]))
