from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_samples import SPLIT_K, json_values, record, records, traces

from dop.database import wire
from dop.database.record import Record
from dop.errors import DopError, Failure, LogError
from dop.measurement import Measurement
from dop.space.step import FuseStep, Param, PragmaStep, SplitStep
from dop.space.trace import Trace


@settings(max_examples=80)
@given(records)
def test_round_trip(made: Record) -> None:
    line = wire.dump(made)
    assert b"\n" not in line
    assert wire.parse(line) == made
    assert wire.dump(wire.parse(line)) == line
    quick = wire.parse_entry(line).measurement()
    assert quick == dataclasses.replace(made.measurement, resources={})


@given(traces)
def test_the_light_view_has_the_key_of_the_trace(trace: Trace) -> None:
    assert wire.parse_entry(wire.dump(record(trace=trace))).trace_key == trace.key


def test_the_key_is_right_where_a_text_looks_like_the_steps() -> None:
    made = record(sketch='],[[],[["CI",0]]],"r":[', workload_key="],[[],[")
    assert wire.parse_entry(wire.dump(made)).trace_key == SPLIT_K.key


def test_the_form_is_the_auto_schedulers() -> None:
    data = json.loads(wire.dump(record()))
    assert list(data) == ["i", "r", "v", "dop"]
    head, state = data["i"]
    assert head == [
        "sgmv/float16/r16/4096->4096+1024+1024",
        "cuda -arch=sm_90a",
        [132, 16, 64, 232448, 65536, 1024, 8, 32],
        "",
        0,
        [],
    ]
    assert state == [[], SPLIT_K.to_json()]
    assert data["r"][1:] == [0, 0.5, 1_700_000_000]
    assert data["v"] == "v0.6"
    assert set(data["dop"]) == {
        "schema",
        "scenario",
        "device",
        "versions",
        "accuracy",
        "failure",
        "message",
        "resources",
        "seed",
        "revision",
        "sketch",
        "predicted_s",
        "floor_s",
    }


def test_a_failure_has_no_time_even_if_the_line_gives_one() -> None:
    data = json.loads(wire.dump(record(failure=Failure.TIMEOUT)))
    assert data["r"][:2] == [[], 5]
    data["r"][0] = [1e10]
    assert wire.parse_entry(orjson.dumps(data)).median_s == math.inf


def test_not_a_number_survives() -> None:
    failed = Measurement((), Failure.CORRECTNESS, "nan", accuracy=math.nan)
    back = wire.parse(wire.dump(dataclasses.replace(record(), measurement=failed)))
    assert back.measurement.accuracy is not None
    assert math.isnan(back.measurement.accuracy)


def test_unknown_keys_are_ignored() -> None:
    data = json.loads(wire.dump(record()))
    data["dop"]["weather"] = {"rain": True}
    data["future"] = 1
    data["r"].append("more")
    assert wire.parse(orjson.dumps(data)) == record()


def test_a_newer_schema_is_not_misread() -> None:
    data = json.loads(wire.dump(record()))
    data["dop"]["schema"] = 2
    with pytest.raises(wire.NewerSchemaError):
        wire.parse_entry(orjson.dumps(data))


@pytest.mark.parametrize(
    ("path", "value", "cause"),
    [
        (("dop",), None, "dop"),
        (("dop", "schema"), "1", "schema"),
        (("dop", "scenario"), 3, "scenario"),
        (("dop", "failure"), "timeout", "disagree"),
        (("dop", "accuracy"), "good", "accuracy"),
        (("dop", "versions"), {"tvm": 1}, "versions"),
        (("r", 0), [], "times"),
        (("r", 0), [0.0], "positive"),
        (("r", 0), ["nan"], "positive"),
        (("r", 0), [None], "missing"),
        (("r", 1), 99, "error_no"),
        (("r", 3), -1, "timestamp"),
        (("i", 0, 0), None, "workload"),
        (("i", 1, 1), "steps", "steps"),
        (("i", 1), [], "i[1]"),
    ],
)
def test_wrong_fields_are_named(path: tuple[object, ...], value: object, cause: str) -> None:
    data = json.loads(wire.dump(record()))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(LogError) as caught:
        wire.parse(orjson.dumps(data))
    assert cause in caught.value.cause


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_line_is_a_record_or_an_error_of_ours(line: bytes) -> None:
    with pytest.raises(LogError):
        wire.parse(line)


@given(st.data())
def test_a_record_with_any_part_replaced_is_read_or_refused(data: st.DataObject) -> None:
    line = json.loads(wire.dump(record()))
    paths = [(k,) for k in line] + [("i", 0), ("i", 1), *(("dop", k) for k in line["dop"])]
    paths += [("i", 0, n) for n in range(6)] + [("i", 1, n) for n in (0, 1)]
    paths += [("r", n) for n in range(4)]
    path = data.draw(st.sampled_from(paths))
    inner = line
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = data.draw(json_values)
    try:
        made = wire.parse(json.dumps(line).encode("utf-8", "surrogatepass"))
    except DopError:
        return
    assert isinstance(made, Record)


def test_what_cannot_be_read_back_is_not_written() -> None:
    for trace in (
        Trace((SplitStep(0, 0, None, (Param("a.b"),)),)),
        Trace((SplitStep(-1, 0, None, (2,)),)),
        Trace((FuseStep(0, (3, 1)),)),
        Trace((PragmaStep(0, 2**31, "unroll", 1),)),
    ):
        with pytest.raises(LogError):
            wire.dump(record(trace=trace))
    with pytest.raises(LogError, match="64 bits"):
        wire.dump(record(seed=2**70))


def test_text_that_is_not_unicode_is_written_printably() -> None:
    bad = "ptxas: \udcff"
    line = wire.dump(record(failure=Failure.COMPILE, message=bad))
    assert wire.parse(line).measurement.message == "ptxas: ?"


def test_reading_never_executes_anything() -> None:
    attack = '__import__("os").abort()'
    line = wire.dump(record(sketch=attack, workload_key=attack, scenario_key=attack))
    script = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('exec', 'compile', 'os.system', 'subprocess.Popen', 'import', 'open'):\n"
        "        if armed: print(event); sys.stdout.flush(); import os; os._exit(3)\n"
        "armed = False\n"
        "from dop.database import wire\n"
        "line = sys.stdin.buffer.read()\n"
        "wire.parse(line)\n"
        "sys.addaudithook(hook)\n"
        "armed = True\n"
        "wire.parse(line)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=line, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_database_needs_neither_tvm_nor_torch() -> None:
    script = (
        "import sys, dop.database.query, dop.database.explain, dop.cli.log\n"
        "heavy = {'tvm', 'torch', 'numpy', 'rich.table'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_damage_within_the_steps_is_found_though_equal_steps_are_read_once() -> None:
    shared = wire.Shared()
    good = wire.dump(record())
    assert wire.parse_entry(good, 1, shared).trace_key in shared.steps
    assert wire.parse_entry(good, 2, shared).record() == record()
    for damage in (b'["CI",3', b'["CI",\x003]', b'["CI",3]\xff', b'["CI",03]', b""):
        with pytest.raises(LogError, match="not JSON"):
            wire.parse_entry(good.replace(b'["CI",3]', damage), 3, shared)
    other = wire.parse_entry(good.replace(b'["CI",3]', b'["CI",1]'), 4, shared).record()
    assert other.trace != record().trace
    assert other == wire.parse(json.dumps(json.loads(other_line(other))).encode())


def other_line(made: Record) -> str:
    return wire.dump(made).decode()
