"""What earlier searches found is tried first: which of it, in what order, and from which packs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from export_logs import defaults, record, write_log
from fake_measurer import FakeMeasurer
from pack_samples import H200, WORKLOAD, fake_generate, pack_at
from pack_samples import TRACES as SAMPLES
from pack_samples import trace as sample

from dop import packs
from dop.cli.main import main
from dop.cli.request import Request
from dop.database.jsonl import Log, read_log
from dop.errors import TraceError
from dop.export.library import export_library
from dop.export.pack import PackFile, write_pack
from dop.export.select import select
from dop.export.traces import TRACES
from dop.export.transfer import translated
from dop.family import Family
from dop.measurement import Measurement
from dop.packs.priors import known_kernels
from dop.prior import Prior, in_order
from dop.progress import Note
from dop.recorded import alike_trace
from dop.scenario import Scenario, named
from dop.space.generate import build_space
from dop.space.sketch import Candidate
from dop.target import SM_90
from dop.tune import tune
from dop.workload import Workload

SPACE = synthetic.space()
SCENARIOS = (named("identical", 1), named("uniform", 32), named("distinct", 128))
FAMILY = Family(synthetic.WORKLOAD, SM_90, SCENARIOS)
HERE, OTHER = SM_90.device_name, "NVIDIA H200"
H100 = replace(SM_90, device_name="NVIDIA H100 80GB HBM3")
COUNT = len(SPACE.defaults())


def candidates(count: int) -> list[Candidate]:
    """Points of the space that are no defaults and work on the made-up device."""
    sketch, found = SPACE.sketches[0], []
    for tile in (64, 128, 256, 512):
        for split in (1, 2, 4, 8):
            values = sketch.default() | {"shrink.tile": tile, "shrink.split_k": split}
            values |= {"tokens.tile": 2, "expand.warps": 2, "shrink.stages": 1}
            found.append(Candidate.of(sketch, values))
    assert len(found) >= count
    return found[:count]


def prior(
    candidate: Candidate,
    scenario: Scenario = SCENARIOS[1],
    seconds: float = 1e-5,
    device: str = HERE,
    workload: Workload = synthetic.WORKLOAD,
    origin: str = "a pack",
) -> Prior:
    name, trace = candidate.sketch.name, candidate.trace
    return Prior(workload, scenario, device, name, trace, seconds, origin)


def traces(path: Path, workload: Workload = synthetic.WORKLOAD) -> list[str]:
    """Keys of what was measured for a workload, in order, each once."""
    entries = read_log(path).entries
    return list(dict.fromkeys(e.trace_key for e in entries if e.workload_key == workload.key))


def run(path: Path, priors: list[Prior], trials: int = COUNT + 12, **options):
    families = options.pop("families", [FAMILY])
    with FakeMeasurer(SPACE) as measurer, Log.open(path) as log:
        return tune(
            families,
            measurer=measurer,
            log=log,
            trials=trials,
            budget_s=60,
            build=options.pop("build", lambda w, t: SPACE),
            priors=priors,
            **options,
        )


class TestOrder:
    """`in_order` alone."""

    def order(self, priors: list[Prior], scenarios=SCENARIOS) -> list[Candidate]:
        return [p.trace for p, _ in in_order(priors, scenarios, HERE)]

    def test_this_device_comes_first_and_origins_do_not_mix(self):
        a, b, c, d, e = candidates(5)
        known = [
            prior(a, seconds=1e-6, device=OTHER, origin="another card"),
            prior(b, seconds=3e-5, origin="new"),
            prior(c, seconds=4e-5, origin="new"),
            prior(d, seconds=2e-5, origin="old"),  # of a day when all was faster
            prior(e, seconds=5e-5, origin="new"),  # the third of its batch
        ]
        assert self.order(known) == [x.trace for x in (b, d, c, a)]

    def test_what_serves_most_of_the_traffic_comes_first(self):
        a, b = candidates(2)
        heavy = (SCENARIOS[0], replace(SCENARIOS[1], weight=5.0), SCENARIOS[2])
        known = [prior(a, SCENARIOS[0]), prior(b, SCENARIOS[1]), prior(a, SCENARIOS[2])]
        assert self.order(known) == [a.trace, b.trace]
        assert self.order(known, heavy) == [b.trace, a.trace]

    def test_a_cold_batch_takes_what_was_fastest_in_a_cold_one_and_else_its_twins(self):
        warm, cold = candidates(2)
        batch = named("uniform", 64)
        known = [prior(warm, batch), prior(cold, replace(batch, cold=True))]
        for tokens in (64, 128):
            asked = named("uniform", tokens)
            assert self.order(known, (asked,)) == [warm.trace]
            assert self.order(known, (replace(asked, cold=True),)) == [cold.trace]
            assert self.order(known[:1], (replace(asked, cold=True),)) == [warm.trace]

    def test_a_batch_of_which_nothing_is_known_takes_the_nearest_ones(self):
        near, far, shaped = candidates(3)
        known = [
            prior(near, named("uniform", 64)),
            prior(far, named("uniform", 2048)),
            prior(shaped, named("identical", 32)),
        ]
        assert self.order(known, (named("uniform", 128),)) == [near.trace]
        assert self.order(known, (named("identical", 16),)) == [shaped.trace]
        assert in_order(known, (named("uniform", 128),), HERE)[0][1].tokens == 128


class TestTuning:
    """`tune` with priors, on the made-up device."""

    def test_they_come_right_behind_the_defaults_and_in_order(self, tmp_path):
        found = candidates(6)
        known = [
            prior(c, s, (1 + i) * 1e-6)
            for s in SCENARIOS
            for i, c in enumerate(found[:2] if s is SCENARIOS[0] else found[2:4])
        ]
        notes: list[str] = []
        result = run(
            tmp_path / "log.jsonl",
            known,
            on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
        )
        # Two batches have found[2] as their fastest, one has found[0].
        expected = [found[i].trace.key for i in (2, 0, 3, 1)]
        assert traces(tmp_path / "log.jsonl")[COUNT : COUNT + 4] == expected
        assert result.begun_with == {"a pack": 4}
        assert any("4 of a pack" in note for note in notes)
        without = run(tmp_path / "without.jsonl", [])
        assert not set(expected) & set(traces(tmp_path / "without.jsonl"))
        assert not without.begun_with

    def test_there_is_a_limit(self, tmp_path):
        many = candidates(16)
        known = [
            prior(c, named("uniform", 2 << (i // 2)), (1 + i) * 1e-6) for i, c in enumerate(many)
        ]
        known += [prior(c, named("identical", 1 << (i // 2))) for i, c in enumerate(many[::-1])]
        wide = replace(FAMILY, scenarios=tuple(named("uniform", 2 << i) for i in range(8)))
        result = run(tmp_path / "log.jsonl", known, 2, families=[wide])
        assert sum(result.begun_with.values()) == 16
        more = [
            prior(Candidate.of(c.sketch, c.values | {"expand.pad": pad}), s)
            for pad in (0, 4, 8)
            for c, s in zip(many, [named("uniform", 2 << (i // 2)) for i in range(16)], strict=True)
        ]
        more += [replace(p, device_name=OTHER, origin="b") for p in known]
        assert sum(run(tmp_path / "b.jsonl", more, 2, families=[wide]).begun_with.values()) == 16

    def test_the_same_device_before_others_and_none_twice(self, tmp_path):
        mine, shared, theirs = candidates(3)
        known = [
            prior(theirs, seconds=1e-9, device=OTHER, origin="theirs"),
            prior(shared, seconds=2e-9, device=OTHER, origin="theirs"),
            prior(shared, seconds=1e-5, origin="mine"),
            prior(mine, seconds=2e-5, origin="mine"),
        ]
        result = run(tmp_path / "log.jsonl", known)
        expected = [c.trace.key for c in (shared, mine, theirs)]
        assert traces(tmp_path / "log.jsonl")[COUNT : COUNT + 3] == expected
        assert result.begun_with == {"mine": 2, "theirs": 1}

    def test_a_second_run_proposes_nothing_again(self, tmp_path):
        path = tmp_path / "log.jsonl"
        known = [
            prior(c, s, 1e-6 * (1 + i)) for i, c in enumerate(candidates(2)) for s in SCENARIOS
        ]
        run(path, known, COUNT + 1)  # stopped behind the first of them
        second = run(path, known, 8)
        assert second.begun_with == {"a pack": 1}
        third = run(path, known, 8)
        assert not third.begun_with
        pairs = Counter((e.trace_key, e.scenario_key) for e in read_log(path).entries)
        assert max(pairs.values()) == 1

    def test_without_its_own_the_nearest_workload_serves(self, tmp_path):
        found = candidates(4)
        rank = replace(synthetic.WORKLOAD, rank=32)
        wide = replace(synthetic.WORKLOAD, in_features=14336)
        typed = replace(synthetic.WORKLOAD, out_features=(2048, 2048))
        known = [
            prior(found[0], workload=typed, origin="slices"),
            prior(found[1], workload=wide, origin="widths"),
            prior(found[2], workload=rank, origin="rank"),
        ]
        built: list[str] = []

        def build(workload: Workload, target):
            built.append(workload.key)
            return SPACE

        path = tmp_path / "log.jsonl"
        result = run(path, known, build=build)
        assert traces(path)[COUNT : COUNT + 3] == [found[i].trace.key for i in (2, 1, 0)]
        assert result.begun_with == {"rank": 1, "widths": 1, "slices": 1}
        assert set(built) == {w.key for w in (synthetic.WORKLOAD, rank, wide, typed)}
        # With its own, the others are left alone.
        own = run(tmp_path / "own.jsonl", [*known, prior(found[3])], build=build)
        assert own.begun_with == {"a pack": 1}

    def test_of_the_nearest_this_device_comes_first(self, tmp_path):
        found = candidates(3)
        rank = replace(synthetic.WORKLOAD, rank=32)
        wide = replace(synthetic.WORKLOAD, in_features=14336)
        known = [
            prior(found[0], workload=rank, device=OTHER, origin="rank there"),
            prior(found[1], workload=wide, origin="widths"),
            prior(found[2], workload=rank, origin="rank"),
        ]
        path = tmp_path / "log.jsonl"
        run(path, known)
        assert traces(path)[COUNT : COUNT + 3] == [found[i].trace.key for i in (2, 1, 0)]

    def test_what_breaks_a_limit_here_is_changed_until_it_does_not(self, tmp_path):
        there, here = SPACE, synthetic.space(1)
        tight = replace(
            here.sketches[0],
            domains=tuple(
                d if d.name != "expand.warps" else replace(d, choices=(1, 2), default=1)
                for d in here.sketches[0].domains
            ),
        )
        here = replace(here, sketches=(tight,))
        far = replace(synthetic.WORKLOAD, in_features=8192)
        wide = Candidate.of(there.sketches[0], candidates(1)[0].values | {"expand.warps": 8})
        path = tmp_path / "log.jsonl"
        with FakeMeasurer(here) as measurer, Log.open(path) as log:
            tune(
                [FAMILY],
                measurer=measurer,
                log=log,
                trials=2,
                budget_s=60,
                build=lambda w, t: there if w == far else here,
                priors=[prior(wide, workload=far)],
            )
        first = here.match(read_log(path).entries[-1].trace())
        assert first.values == wide.values | {"expand.warps": 2}

    def test_unlike_traces_and_foreign_structures_are_passed_over(self, tmp_path):
        strange = replace(prior(candidates(1)[0]), trace=SAMPLES["b"], sketch="gone")
        result = run(tmp_path / "log.jsonl", [strange])
        assert not result.begun_with
        assert result.progress.trials == COUNT + 12

    def test_the_same_priors_give_the_same_search(self, tmp_path):
        other = replace(FAMILY, workload=synthetic.WIDER)
        known = [prior(c, s) for c, s in zip(candidates(3), SCENARIOS, strict=True)]
        paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        for path in paths:
            # Which family is next depends on the clock.
            run(path, known, 60, families=[FAMILY, other], clock=lambda: 0.0)
        a, b = ([(e.workload_key, e.trace_key) for e in read_log(p).entries] for p in paths)
        assert a == b
        assert {c.trace.key for c in candidates(3)} <= {t for w, t in a if w == other.workload.key}

    def test_beside_a_matmul_the_call_alone_counts_as_its_own(self, tmp_path):
        beside = replace(FAMILY, workload=replace(FAMILY.workload, beside=True))
        alone, own = candidates(2)
        path = tmp_path / "log.jsonl"
        run(path, [prior(alone)], families=[beside])
        assert traces(path, beside.workload)[COUNT] == alone.trace.key
        tuned_so = prior(own, workload=beside.workload, origin="beside")
        result = run(tmp_path / "b.jsonl", [prior(alone), tuned_so], families=[beside])
        assert result.begun_with == {"beside": 1}


@pytest.fixture
def own_shipped(tmp_path, monkeypatch):
    """Shipped packs of this test's own."""
    monkeypatch.setattr(packs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(packs.PATH_VARIABLE, raising=False)
    (tmp_path / "shipped").mkdir()
    return tmp_path / "shipped"


def use(monkeypatch, *folders: Path) -> None:
    monkeypatch.setenv(packs.PATH_VARIABLE, os.pathsep.join(map(str, folders)))


def quietly(kind: str = "cuda", dtype: str = "bfloat16") -> list[Prior]:
    warnings: list[str] = []
    found = known_kernels(kind, dtype, warnings.append)
    assert not warnings
    return found


class TestReading:
    """`known_kernels`: folders and packs to priors."""

    def test_folders_of_the_variable_come_before_what_is_shipped(
        self, own_shipped, tmp_path, monkeypatch
    ):
        pack_at(own_shipped / "h200" / "a.doppack", monkeypatch)
        pack_at(tmp_path / "mine" / "z.doppack", monkeypatch, target=H100)
        use(monkeypatch, tmp_path / "mine", own_shipped)  # named twice, read once
        found = quietly()
        origins = list(dict.fromkeys((p.origin, p.device_name) for p in found))
        mine, theirs = tmp_path / "mine" / "z.doppack", own_shipped / "h200" / "a.doppack"
        assert [o for o, _ in origins] in ([str(mine), str(theirs)], [str(mine), "h200/a.doppack"])
        assert [d for _, d in origins] == [H100.device_name, OTHER]
        fastest = min(
            (p for p in found if p.scenario.key == "T8/identical/1"), key=lambda p: p.seconds
        )
        assert (fastest.trace, fastest.sketch, fastest.workload) == (
            SAMPLES["b"],
            "made/up",
            replace(WORKLOAD, name=fastest.workload.name),
        )
        assert fastest.seconds == pytest.approx(10e-6)

    def test_of_one_folder_the_newer_packs_come_first(self, own_shipped, monkeypatch):
        for name, day in (("a", 0), ("b", 2), ("c", 1)):
            path = own_shipped / f"{name}.doppack"
            records = [
                record(WORKLOAD, named("identical", 8), sample(2), 1e-5, target=H200,
                       timestamp=1_800_000_000 + 86_400 * day)
            ]  # fmt: skip
            write_log(path.with_suffix(".jsonl"), records)
            pack_at(path, monkeypatch)
        assert list(dict.fromkeys(p.origin for p in quietly())) == [
            "b.doppack",
            "c.doppack",
            "a.doppack",
        ]

    def test_the_16_bit_types_know_of_each_other(self, own_shipped, monkeypatch):
        pack_at(own_shipped / "both.doppack", monkeypatch)
        both = quietly(dtype="float16")
        assert {p.workload.dtype for p in both} == {"float16"}
        assert translated(SAMPLES["b"], "bfloat16", "float16") in {p.trace for p in both}
        assert SAMPLES["b"] not in {p.trace for p in both}
        assert len(both) == len(quietly())  # what was transferred does not count twice
        pack_at(own_shipped / "both.doppack", monkeypatch, dtypes=("float16",))
        back = quietly(dtype="bfloat16")
        assert SAMPLES["b"] in {p.trace for p in back}
        assert quietly(dtype="float32") == []

    def test_libraries_count_each_for_its_kind_of_device(self, own_shipped, tmp_path, monkeypatch):
        packed = pack_at(tmp_path / "p.doppack", monkeypatch)
        export_library(
            select(packed.path.with_suffix(".jsonl")), tmp_path / "libs" / "mine", fake_generate
        )
        use(monkeypatch, tmp_path / "libs")
        assert {p.origin for p in quietly()} == {str(tmp_path / "libs" / "mine")}
        assert quietly("cpu", "float32") == []
        index = json.loads((tmp_path / "libs" / "mine" / "index.json").read_text())
        index |= {"kind": "cpu"}
        (tmp_path / "libs" / "mine" / "index.json").write_text(json.dumps(index))
        assert quietly() == []
        assert quietly("cpu", "bfloat16")

    def test_what_cannot_be_read_is_a_warning_and_the_rest_is_used(
        self, own_shipped, tmp_path, monkeypatch
    ):
        folder = tmp_path / "mine"
        good = pack_at(folder / "good.doppack", monkeypatch)
        (folder / "nonsense.doppack").write_bytes(b"PK nonsense")
        data = good.path.read_bytes()
        (folder / "cut.doppack").write_bytes(data[: len(data) // 2])
        pack = PackFile(good.path)
        index = {**json.loads(pack._member("index.json"))}
        files = {name: pack.read(name) for name in pack.index.files}
        spoiled = {**files, TRACES: b'{"steps": [["??"]], "traces": {}}'}
        write_pack(folder / "spoiled.doppack", index, spoiled)
        files.pop(TRACES)
        write_pack(folder / "older.doppack", index, files)
        odd = json.loads(json.dumps(index))
        odd["table"]["workloads"][WORKLOAD.key]["scenarios"][0]["scenario"] = "T8/odd/8"
        write_pack(folder / "odd.doppack", odd, {**files, TRACES: pack.read(TRACES)})
        use(monkeypatch, folder, tmp_path / "none")
        warnings: list[str] = []
        found = known_kernels("cuda", "bfloat16", warnings.append)
        assert {p.origin for p in found} == {str(good.path)}
        assert len(warnings) == 6
        for word in ("nonsense", "cut", "spoiled", "no traces", "odd", "no folder"):
            assert any(word in line and line.startswith("warning: ") for line in warnings), word


class QuickMeasurer:
    """A time per trace and batch, at once."""

    overlaps = False

    def measure(self, jobs):
        for job in jobs:
            for scenario in job.scenarios:
                digest = hashlib.sha256((job.trace.key + scenario.key).encode()).digest()
                seconds = (10 + digest[0]) * 1e-6
                yield job, scenario, Measurement((seconds,), accuracy=1e-6, floor_s=5e-6)

    def close(self) -> None: ...

    def __enter__(self) -> QuickMeasurer:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def h100(monkeypatch):
    """`dop tune` on an H100 that answers at once."""
    monkeypatch.setattr("dop.measure.hostinfo.find_target", lambda device: H100)
    monkeypatch.setattr("dop.cli.tune._measurer", lambda target: QuickMeasurer())
    monkeypatch.delenv(packs.PATH_VARIABLE, raising=False)


class TestShipped:
    """What the packs in the package know."""

    FAMILIES = Request("Llama-3.1-8B").families(H100)

    def tuned(self, tmp_path: Path, capsys, *options: str, layer: str = "o") -> tuple[dict, str]:
        log = tmp_path / "log.jsonl"
        arguments = ["--layers", layer, "--tokens", "8,64", "--trials", "32", "--log", str(log)]
        assert main(["tune", "--model", "Llama-3.1-8B", *arguments, "--json", *options]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err

    def test_today_s_spaces_know_almost_all_of_their_kernels(self):
        known = {(p.workload.key, p.trace): p for p in quietly()}
        spaces = {k: build_space(Workload.parse(k), H100) for k in {key for key, _ in known}}
        outcomes: Counter[str] = Counter()
        for (key, trace), one in known.items():
            try:
                spaces[key].match(trace)
                outcomes["exact"] += 1
            except TraceError:
                found = alike_trace(spaces[key], trace, one.sketch)
                outcomes["lost" if found is None else "alike"] += 1
        assert outcomes["exact"] > 0.9 * len(known) > 1000, outcomes
        assert outcomes["lost"] < 0.02 * len(known), outcomes

    def test_the_own_pack_comes_first_and_can_be_left_out(self, h100, tmp_path, capsys):
        found, told = self.tuned(tmp_path, capsys)
        first = next(iter(found["packs"]))
        assert first == "h100/llama-3.1-8b.doppack"
        here = [name.startswith("h100/") for name in found["packs"]]
        assert here == sorted(here, reverse=True)  # other devices' behind all of this one's
        assert f"{found['packs'][first]} of {first}" in told
        (workload,) = {t["workload"] for t in found["tasks"]}
        pack = PackFile(packs.SHIPPED / "h100" / "llama-3.1-8b.doppack")
        table = pack.index.table.workloads[workload]
        best = {f.scenario_key: f.best_trace_key for f in table.fits}
        count = len(defaults(Workload.parse(workload), H100))
        keys = traces(tmp_path / "log.jsonl", Workload.parse(workload))
        behind = keys[count : count + found["packs"][first]]
        assert {best[t["scenario"]] for t in found["tasks"]} <= {*behind, *keys[:count]}
        again, told = self.tuned(tmp_path, capsys)
        assert again["packs"] == {}
        assert "earlier searches" not in told
        (tmp_path / "log.jsonl").unlink()
        nothing, told = self.tuned(tmp_path, capsys, "--no-packs")
        assert nothing["packs"] == {}
        assert "earlier searches" not in told

    def test_without_it_the_nearest_models_serve(self, h100, tmp_path, monkeypatch, capsys):
        ignored = shutil.ignore_patterns("*.py", "__pycache__", "llama-3.1-8b*")
        shutil.copytree(packs.SHIPPED, tmp_path / "shipped", ignore=ignored)
        monkeypatch.setattr(packs, "SHIPPED", tmp_path / "shipped")
        down, _ = self.tuned(tmp_path, capsys, layer="down")
        assert next(iter(down["packs"])) == "h100/qwen3-8b.doppack"  # 12,288 wide, not 11,008
        qkv, _ = self.tuned(tmp_path, capsys, layer="qkv")  # Qwen3-8B's is the same
        assert next(iter(qkv["packs"])) == "h100/qwen3-8b.doppack"
        monkeypatch.setattr(packs, "SHIPPED", tmp_path / "shipped" / "h200")
        (tmp_path / "log.jsonl").unlink()
        other, _ = self.tuned(tmp_path, capsys, layer="qkv")
        assert other["packs"].keys() == {"qwen3-8b.doppack"}

    def test_another_rank_of_the_same_layer_is_the_nearest(self, h100, tmp_path, capsys):
        found, _ = self.tuned(tmp_path, capsys, "--ranks", "24", layer="gate_up")
        assert next(iter(found["packs"])) == "h100/llama-3.1-8b.doppack"
        assert sum(found["packs"].values()) == 8

    def test_a_broken_pack_does_not_end_the_run(self, h100, tmp_path, monkeypatch, capsys):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "bad.doppack").write_bytes(b"PK")
        use(monkeypatch, tmp_path / "mine")
        found, told = self.tuned(tmp_path, capsys)
        assert told.count("warning: ") == 1
        assert "bad.doppack" in told
        assert found["packs"]
