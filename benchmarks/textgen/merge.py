"""Result files put together: runs of several GPUs or days, as tables, documents and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.textgen import results as report
from benchmarks.textgen.plot import plot
from benchmarks.textgen.results import CaseResult
from benchmarks.textgen.timing import Run, Stats
from benchmarks.textgen.workload import Case
from dop.errors import ConfigError, MissingDependencyError

SAME = ("engine", "model", "rank", "slots", "dtype", "device", "versions", "vllm_args")
"""What runs must have in common to stand in one table."""


@dataclass
class Group:
    """The cases of runs that can stand in one table, and what was measured."""

    header: dict[str, Any]
    results: list[CaseResult]

    @property
    def stem(self) -> str:
        """Name of its files: textgen-vllm-llama-3.1-8b-r16-nvidia-h200-2026-11-22."""
        about = self.header
        words = [
            about["engine"],
            about["model"],
            f"r{about['rank']}",
            about["device"].split(",")[0],
        ]
        plain = (re.sub(r"[^a-z0-9.]+", "-", str(word).lower()).strip("-") for word in words)
        arms = {arm for result in self.results for arm in result.runs}
        switches = sorted({s for arm in arms for s in arm.split("+")[1:]})
        plain_arms = any(arm.partition("+")[0] != "base" and "+" not in arm for arm in arms)
        marks = [] if plain_arms else switches  # such cases are another file's with other arms
        return "-".join(["textgen", *plain, *marks, about["date"].split(", ")[-1]])

    def document(self) -> dict[str, Any]:
        """For a file under benchmarks/results; `read` reads it back."""
        return {
            "benchmark": "textgen",
            **self.header,
            "summary": report.means(self.results),
            "rows": report.rows(self.results),
            "repeats": report.repeats(self.results),
        }


def read(path: Path) -> Group:
    """A results.jsonl (or its folder), or a document.

    Raises:
        ConfigError: it cannot be read.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    try:
        text = file.read_text()
        if file.suffix == ".json":
            header = json.loads(text)
            repeats = header.pop("repeats")
            for key in ("benchmark", "summary", "rows"):
                header.pop(key, None)
        else:
            lines = [json.loads(line) for line in text.splitlines()]
            header = {k: v for k, v in lines[0].items() if k != "kind"}
            repeats = [line for line in lines if line["kind"] == "repeat"]
        return Group(header, _results(repeats))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is no result of bench_textgen_lora ({error}).", "Give what --save-to wrote."
        ) from error


def _results(repeats: Sequence[dict[str, Any]]) -> list[CaseResult]:
    found: dict[str, CaseResult] = {}
    for line in repeats:
        batch, popularity, lengths = line["case"].removeprefix("b").split("/")
        case = Case(int(batch), popularity, lengths)
        result = found.setdefault(case.key, CaseResult(case, line["read_ms"]))
        result.runs.setdefault(line["arm"], []).append(_run(line))
    return list(found.values())


def _run(line: dict[str, Any]) -> Run:
    def stats(value: dict[str, float] | None) -> Stats | None:
        return Stats(**value) if value else None

    ttft = stats(line["ttft_ms"])
    assert ttft is not None
    plain = ("seconds", "tokens", "tokens_per_s", "step_ms", "decode_tokens_per_s")
    return Run(ttft_ms=ttft, tpot_ms=stats(line["tpot_ms"]), **{k: line[k] for k in plain})


def merge(groups: Sequence[Group]) -> list[Group]:
    """One group for what can stand in one table; repeats of the same case are put together.

    Raises:
        ConfigError: a case was measured with other arms in another file: no ratio of the two
            would be of one run.
    """
    found: dict[str, Group] = {}
    for group in groups:
        key = json.dumps([group.header.get(name) for name in SAME], sort_keys=True)
        into = found.setdefault(key, Group(dict(group.header), []))
        for name in ("date", "revision"):
            known = [v for v in str(into.header.get(name, "")).split(", ") if v]
            if (new := str(group.header.get(name, ""))) and new not in known:
                into.header[name] = ", ".join([*known, new])
        for result in group.results:
            _add(into, result)
    return list(found.values())


def _add(group: Group, new: CaseResult) -> None:
    for known in group.results:
        if known.case == new.case:
            if set(known.runs) != set(new.runs):
                raise ConfigError(
                    f"{new.case.key} was measured with {', '.join(known.runs)} in one file "
                    f"and {', '.join(new.runs)} in another.",
                    "Leave one of them out.",
                )
            for arm, runs in new.runs.items():
                known.runs[arm] += runs
            return
    group.results.append(CaseResult(new.case, new.read_ms, {a: [*r] for a, r in new.runs.items()}))


def show(paths: Sequence[Path], folder: Path | None) -> None:
    """Prints the tables of the merged files; writes STEM.json and STEM.svg of each to a folder.

    Raises:
        ConfigError: a file cannot be read or does not fit the others.
    """
    for group in merge([read(path) for path in paths]):
        group.results.sort(key=lambda r: (not r.decodes, r.case.lengths))  # stable
        print(f"{report.title(group.header)}\n\n{report.table(group.results)}\n")
        print("\n".join(report.summary(group.results)), end="\n\n")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            stem = folder / group.stem
            Path(f"{stem}.json").write_text(json.dumps(group.document(), indent=1) + "\n")
            print(f"written to {stem}.json")
            try:
                plot(Path(f"{stem}.svg"), report.title(group.header), group.results)
                print(f"written to {stem}.svg\n")
            except MissingDependencyError as error:
                print(f"no figure: {error}\n")
