"""Figures, bars and lists that summarise_peers makes of measured rows; the plot of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot_sgmv, summarise_peers
from benchmarks.peers.results import default_path, layer_rows, show, summary, table, write
from benchmarks.peers.summary import bars, by, cases_of, layer_sum, read_rows, worst
from dop.errors import ConfigError

LAYERS = ("qkv", "o", "gate_up", "down")
Row = dict[str, Any]


def row(key: str, peer: str, us: float | None, **more: Any) -> Row:
    kind, tokens, mix, layer, rank, _ = key.split(":")
    return {
        "key": key,
        "peer": peer,
        "layer": layer,
        "kind": kind,
        "T": int(tokens[1:]),
        "assign": mix,
        "rank": int(rank[1:]),
        "both_us": us,
        "floor_bytes": 4_000_000,
        "err": 0.004,
        **more,
    }


def batch(head: str, tail: str, **us: float) -> list[Row]:
    """The four groups of slices of one batch, each contender with the same time in all."""
    return [row(f"{head}:{layer}:{tail}", peer, t) for layer in LAYERS for peer, t in us.items()]


ROWS = [
    *batch("decode:T1:distinct", "r16:tight", extra=4.0, vllm=12.0, v2=8.0),
    *batch("decode:T64:distinct", "r16:tight", extra=20.0, vllm=200.0, v2=30.0),
    *batch("decode:T128:distinct", "r64:tight", extra=2.0, vllm=100.0, v2=4.0),
    *batch("prefill:T2048:uniform", "r16:tight", extra=50.0, vllm=100.0, v2=55.0),
    *batch("decode:T64:identical", "r16:server", extra=50.0, vllm=5.0, v2=5.0),
]


def test_figures() -> None:
    found = {f.name: f for f in bars(cases_of(ROWS, copy_gbps=4000.0).values())}
    mean = found["decode, best peer of each case: geometric mean"]
    assert mean.value == pytest.approx((2.0 * 1.5 * 2.0) ** (1 / 3))
    assert (mean.cases, mean.met) == (12, True)
    assert found["decode, best peer of each case: minimum"].value == 1.5
    assert found["decode, vLLM: geometric mean"].value == pytest.approx((3 * 10 * 50) ** (1 / 3))
    prefill = found["prefill, best peer of each case: geometric mean"]
    assert (round(prefill.value or 0, 3), prefill.met) == (1.1, False)
    assert found["prefill, best peer of each case: minimum"].met is True
    assert found["layer, T=1, rank 16"].value == 16.0
    assert found["layer, T=64 distinct, rank 16"].value == 80.0
    share = found["copy bandwidth, T=128 distinct, rank 64"]  # floor 1 us of 2 us
    assert (share.value, share.met) == (50.0, False)
    assert found["error over the best peer's, worst"].value == 1.0


def test_what_was_not_measured_is_no_figure() -> None:
    found = bars(cases_of(ROWS[:1]).values())
    assert all(figure.value is None and figure.met is None for figure in found[:2])
    sums = {f.name: f.value for f in bars(cases_of([ROWS[0], ROWS[3]]).values())}
    assert sums["layer, T=64 distinct, rank 16"] is None


def test_a_layer_needs_every_part() -> None:
    rows = [r for r in ROWS if not (r["layer"] == "down" and r["peer"] == "extra")]
    assert layer_sum(cases_of(rows).values(), 16, 1, "distinct") == (None, 0.0)


def test_a_failure_of_the_operator_is_a_missed_bar() -> None:
    failed = row("decode:T1:distinct:o:r16:tight", "extra", None, error="wrong result")
    rows = [r for r in ROWS if (r["key"], r["peer"]) != (failed["key"], "extra")] + [failed]
    found = {f.name: f for f in bars(cases_of(rows).values())}
    assert found["decode, best peer of each case: minimum"].value == 0.0
    assert found["decode, best peer of each case: geometric mean"].met is False


def test_a_wrong_peer_is_no_peer() -> None:
    key = "decode:T1:distinct:o:r16:tight"
    rows = [
        row(key, "dop", 4.0),
        row(key, "v2", 1.0, error="wrong result: relative error 1"),
        row(key, "vllm", 6.0),
    ]
    case = cases_of(rows)[key]
    assert case.best_peer == ("vllm", 6.0)
    assert case.speedup == 1.5
    assert case.failed == {"v2": "wrong result: relative error 1"}


def test_error_beside_the_best_peers() -> None:
    key = "decode:T1:distinct:o:r16:tight"
    rows = [
        row(key, "extra", 1, err=0.006),
        row(key, "a", 1, err=0.004),
        row(key, "b", 1, err=0.003),
    ]
    assert cases_of(rows)[key].error_ratio == pytest.approx(2.0)
    assert bars(cases_of(rows).values())[-1].met is False


def test_worst_and_groups() -> None:
    cases = list(cases_of(ROWS, 4000.0).values())
    assert [c.kind for c in worst(cases, 8)] == ["decode"] * 4 + ["prefill"] * 4
    assert worst(cases, 1)[0].server
    rows = {name: (count, round(mean, 3)) for name, count, mean, _, _ in by(cases, "tokens")}
    assert rows == {
        "decode tokens 1": (4, 2.0),
        "decode tokens 64": (4, 1.5),
        "decode tokens 128": (4, 2.0),
        "prefill tokens 2048": (4, 1.1),
    }


# ------------------------------------------------------------------------------ files


def test_documents_and_lines(tmp_path: Path) -> None:
    document = tmp_path / "peers.json"
    document.write_text(json.dumps({"env": {"copy_gbps": 4000.0}, "rows": ROWS}))
    lines = tmp_path / "rows.jsonl"
    cut = json.dumps(ROWS[-1])[:30]  # a run that was ended while it wrote
    lines.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n" + cut)
    assert read_rows(document) == ({"copy_gbps": 4000.0}, ROWS)
    assert read_rows(lines) == ({}, ROWS)
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(ROWS[0]) + "\n")
    assert read_rows(one) == ({}, ROWS[:1])


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"rows": []}', "3", '{"rows": [3]}'])
def test_files_without_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no rows"):
        read_rows(path)
    assert summarise_peers.main([str(path)]) == 2


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summarise_peers.main([str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_rows_with_odd_keys_are_passed_over() -> None:
    assert cases_of([{"key": "what", "peer": "v2"}, {"key": "a:b:c:d:e:f", "peer": "v2"}]) == {}


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peers.json"
    env = {"device": "GPU", "torch": "2", "triton": "3", "dtype": "bf16", "copy_gbps": 4000.0}
    failed = row("decode:T8:distinct:o:r16:tight", "csgmv", None, error="out of memory")
    path.write_text(json.dumps({"env": env, "rows": [*ROWS, failed]}))
    assert summarise_peers.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "GPU, torch 2" in text
    assert "csgmv failed 1 times (decode:T8:distinct:o:r16:tight: out of memory)" in text
    assert "1 cases lack the operator or every peer" in text
    line = next(
        x for x in text.splitlines() if x.startswith("prefill, best peer of each case: geo")
    )
    assert line.split()[-7:] == ["1.10", "x", ">=", "1.2", "x", "4", "MISSED"]
    assert summarise_peers.main([str(path), "--strict"]) == 1


def test_strict_passes_when_every_bar_holds(tmp_path: Path) -> None:
    rows = [
        *batch("decode:T1:distinct", "r16:tight", dop=4.0, vllm=20.0, v2=8.0),
        *batch("decode:T64:distinct", "r16:tight", dop=18.0, vllm=200.0, v2=36.0),
        *batch("decode:T128:distinct", "r64:tight", dop=1.2, vllm=100.0, v2=4.0),
        *batch("prefill:T2048:uniform", "r16:tight", dop=50.0, vllm=100.0, v2=65.0),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert summarise_peers.main([str(path), "--strict", "--copy-gbps", "4000"]) == 0
    assert summarise_peers.main([str(path), "--strict"]) == 1  # no floors: a bar was not run


def test_several_files_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "decode:T1:distinct:o:r16:tight"
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("\n".join(json.dumps(row(key, p, us)) for p, us in (("dop", 4), ("v2", 2))))
    second.write_text("\n".join(json.dumps(row(key, p, us)) for p, us in (("dop", 4), ("vllm", 6))))
    assert summarise_peers.main([str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(c["us"], c["speedup"]) for c in found["worst"]] == [({"dop": 4.0, "vllm": 6.0}, 1.5)]
    assert {bar["name"]: bar["value"] for bar in found["bars"]}["layer, T=1, rank 16"] == 4.0


def test_a_newer_operator_beside_earlier_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, other = "decode:T1:distinct:o:r16:tight", "decode:T1:distinct:qkv:r16:tight"
    earlier, newer = tmp_path / "a", tmp_path / "b"
    rows = [row(key, p, us) for p, us in (("extra", 4), ("v2", 6), ("vllm", 9))]
    earlier.write_text("\n".join(map(json.dumps, [*rows, row(other, "v2", 1)])))
    newer.write_text("\n".join(json.dumps(row(key, p, us)) for p, us in (("extra", 2), ("v2", 1))))
    assert summarise_peers.main([str(earlier), "--operator", str(newer), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["worst"]
    assert found["us"] == {"extra": 2.0, "v2": 6.0, "vllm": 9.0}
    assert found["speedup"] == 3.0


# ------------------------------------------------------------------------------ tables, plot


def test_summary_of_a_run() -> None:
    found = summary([r | {"peer": r["peer"].replace("extra", "dop")} for r in ROWS])
    assert found["prefill_best_peer"] == {"geomean": pytest.approx(1.1), "min": 1.1, "cases": 4}
    assert found["decode_vllm"]["min"] == pytest.approx(0.1)


def test_table_adds_up_whole_layers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = "decode:T1:distinct:o:r16:tight"
    rows = [r | {"floor_us": 1.0} for r in ROWS if r["key"] != one or r["peer"] != "v2"]
    heads, lines = table(rows, LAYERS)
    assert heads == ["rank", "tokens", "adapters", "floor", "extra", "vllm", "v2", "speed"]
    assert lines[0]["extra"] == "16.0"
    assert lines[0]["v2"] == "-"  # one part is missing
    assert lines[0]["speed"] == "3.00x"
    show(heads, lines, "the title")
    assert "the title" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show(heads, lines, "the title")
    plain = capsys.readouterr().out.splitlines()
    assert plain[0] == "the title"
    assert plain[2].split() == ["16", "1", "distinct", "4.0", "16.0", "48.0", "-", "3.00x"]


def test_results_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "out.json"
    write(path, {"model": "m", "rows": ROWS})
    assert json.loads(path.read_text()) == {"model": "m", "rows": ROWS}
    assert len(path.read_text().splitlines()) == len(ROWS) + 5
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]
    assert default_path("NVIDIA H200").name.startswith("sgmv-nvidia-h200-2")


def test_layers_of_the_plot() -> None:
    lost = {"key": "decode:T1:distinct:o:r16:tight", "peer": "v2", "error": "the process ended"}
    found = plot_sgmv.panels({"rows": [*ROWS, lost]}, 16)
    assert {mix: [c.tokens for c in cases] for mix, cases in found.items()} == {
        "distinct": [1, 64],
        "uniform": [1, 2048],
    }
    assert layer_rows(ROWS, LAYERS)[0].us == {"extra": 16.0, "vllm": 48.0, "v2": 32.0}
    with pytest.raises(ConfigError, match="ranks \\[16, 64\\]"):
        plot_sgmv.panels({"rows": ROWS}, 32)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "sgmv.json"
    env = {"device": "GPU", "dtype": "bf16", "copy_gbps": 4000.0}
    results.write_text(json.dumps({"model": "m", "date": "d", "env": env, "rows": ROWS}))
    out = tmp_path / "plot.svg"
    assert plot_sgmv.main([str(results), "-o", str(out)]) == 0
    text = out.read_text()
    assert "SGLang triton_v2" in text
    assert "m, rank 16, bf16" in text
    results.write_text("[]")
    assert plot_sgmv.main([str(results), "-o", str(out)]) == 2


def test_committed_results_are_read_packed(tmp_path):
    packed = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("peers-*.json.gz"))
    assert packed
    for path in packed:
        _, rows = read_rows(path)
        assert {"vllm", "v2", "extra"} <= {row["peer"] for row in rows}
    damaged = tmp_path / "x.json.gz"
    damaged.write_bytes(packed[0].read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(damaged)
