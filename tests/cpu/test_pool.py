"""Worker processes: what they answer; hangs, crashes and kills do not take the pool down."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dop.measure.pool import WorkerError, WorkerPool


def echo(config):
    """Handler of the test workers; a task is (what, argument)."""

    def handle(task):
        what, argument = task
        if what == "hang":
            time.sleep(1000)
        if what == "raise":
            raise ValueError(argument)
        if what == "signal":
            os.kill(os.getpid(), argument)
        if what == "print_and_exit":
            print(argument, flush=True)
            os._exit(5)
        if what == "items":
            for i in range(argument):
                time.sleep(0.1)
                yield i
            return
        if what == "nice":
            yield os.nice(0)
            return
        yield (config, argument)

    return handle


def broken(config):
    raise RuntimeError("no such device")


def run(pool, tasks, timeout_s=20.0):
    """Final event per task, and all items."""
    for number, task in enumerate(tasks):
        pool.submit(number, task, timeout_s)
    final, items = {}, {}
    while len(final) < len(tasks):
        for event in pool.step(1.0):
            if event.kind == "item":
                items.setdefault(event.task, []).append(event.value)
            else:
                final[event.task] = event
    return final, items


@pytest.fixture
def pool():
    with_workers = WorkerPool("test_pool:echo", "config", 1)
    yield with_workers
    with_workers.close()


def test_answers_in_two_workers_with_config_and_niceness():
    pool = WorkerPool("test_pool:echo", {"k": 1}, 2, nice=7)
    try:
        final, items = run(pool, [("nice", 0), *(("echo", n) for n in range(6))])
        assert {event.kind for event in final.values()} == {"end"}
        assert items[0] == [os.nice(0) + 7]
        assert [items[n] for n in range(1, 7)] == [[({"k": 1}, n - 1)] for n in range(1, 7)]
        assert len(pool.pids) == 2
        assert pool.rss_bytes() > 1 << 20
    finally:
        pool.close()


def test_every_kind_of_end_and_the_next_task_runs(pool):
    tasks = [
        ("raise", "oh no"),
        ("signal", signal.SIGSEGV),
        ("print_and_exit", "last words"),
        ("echo", 4),
    ]
    final, items = run(pool, tasks)
    assert final[0].kind == "error"
    assert "ValueError: oh no" in final[0].value
    assert (final[1].kind, final[1].signal) == ("died", signal.SIGSEGV)
    assert "SIGSEGV" in final[1].value
    assert final[2].kind == "died"
    assert "exit code 5 last words" in final[2].value
    assert items == {3: [("config", 4)]}


def test_a_hang_is_stopped_at_its_limit(pool):
    run(pool, [("echo", 0)])
    begin = time.monotonic()
    final, _ = run(pool, [("hang", 0)], timeout_s=0.3)
    assert final[0].kind == "timeout"
    assert 0.3 <= time.monotonic() - begin < 3
    assert run(pool, [("echo", 1)])[1] == {0: [("config", 1)]}


def test_each_item_renews_the_limit(pool):
    run(pool, [("echo", 0)])
    final, items = run(pool, [("items", 6)], timeout_s=0.4)
    assert final[0].kind == "end"
    assert items[0] == list(range(6))


def test_a_worker_killed_from_outside_is_replaced(pool):
    run(pool, [("echo", 0)])
    victim = pool.pids[0]
    pool.submit(0, ("hang", 0), 20.0)
    assert pool.step(0.2) == []
    os.kill(victim, signal.SIGKILL)
    events = pool.step(5.0)
    assert [(e.kind, e.signal) for e in events] == [("died", signal.SIGKILL)]
    run(pool, [("echo", 0)])
    assert pool.pids != [victim]


def test_an_idle_worker_that_dies_loses_no_task(pool):
    run(pool, [("echo", 0)])
    os.kill(pool.pids[0], signal.SIGKILL)
    time.sleep(0.1)
    final, items = run(pool, [("echo", 7)])
    assert final[0].kind == "end"
    assert items[0] == [("config", 7)]


def test_cancel_drops_what_is_queued_and_running(pool):
    pool.submit(0, ("hang", 0), 20.0)
    pool.submit(1, ("echo", 0), 20.0)
    while not pool.pids:
        pool.step(0.1)
    pool.step(1.0)
    assert pool.busy
    assert pool.backlog == 2
    pool.cancel()
    assert not pool.busy
    assert run(pool, [("echo", 2)])[1] == {0: [("config", 2)]}


ORPHANS = """
import sys
sys.path.insert(0, sys.argv[1])
from dop.measure.pool import WorkerPool
pool = WorkerPool("test_pool:echo", None, 1)
pool.submit(0, ("echo", 0), 20.0)
while pool.busy:
    pool.step(1.0)
pool.submit(1, ("hang", 0), 1000.0)
pool.step(0.1)
print(pool.pids[0], flush=True)
pool.step(1000.0)
"""


def test_workers_leave_when_their_parent_is_killed():
    command = [sys.executable, "-c", ORPHANS, os.path.dirname(__file__)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")


def test_workers_that_cannot_start_say_why():
    pool = WorkerPool("test_pool:broken", None, 1)
    try:
        with pytest.raises(WorkerError, match="no such device"):
            run(pool, [("echo", 0)])
    finally:
        pool.close()
