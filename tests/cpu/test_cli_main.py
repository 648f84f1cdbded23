"""The command line's frame, its output helpers, and what it says about this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dop import collect_env
from dop.cli import main as cli
from dop.cli import output
from dop.errors import ConfigError, Failure
from dop.measure import hostinfo
from dop.scenario import named
from dop.target import Target


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dop.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Runs `dop report` with the given function in the verb's place; returns the exit code."""

    def call(function: Callable[[], Any]) -> int:
        def report() -> Any:
            return function()

        module = ModuleType("dop.cli.report")
        module.report = report  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "dop.cli.report", module)
        monkeypatch.setattr(cli, "available", lambda: ["report"])
        return cli.main(["report"])

    return call


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def test_version_and_help() -> None:
    assert cli.main(["--version"]) == 0
    done = run("--help")
    assert done.returncode == 0
    assert "env" in done.stdout
    assert run("-h").stdout == done.stdout


def test_help_is_light() -> None:
    code = (
        "import sys; from dop.cli.main import build_app; build_app();"
        "print([m for m in ('tvm', 'torch', 'lightgbm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "arguments", [["nope"], ["env", "--bad"], ["env", "extra"], ["--version=3"]]
)
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "--help" in lines[0]


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "Usage: dop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("a\ncause.", "An action."), 2, "error: a cause. An action."),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (PermissionError(13, "Permission denied", "x.log"), 2, "error: x.log: Permission denied."),
        (OSError(28, "No space left on device"), 2, "error: No space left on device."),
        (MemoryError(), 2, "error: out of memory."),
        (ModuleNotFoundError("No module named 'tvm'", name="tvm.ir"), 2, "pip install 'dop[tune]'"),
        (ModuleNotFoundError("No module named 'dop.x'", name="dop.x"), 1, "a bug in Dop"),
        (ZeroDivisionError("one\ntwo"), 1, "ZeroDivisionError: one two. Run again"),
    ],
)
def test_every_error_is_one_line(
    verb: Callable[[Callable[[], Any]], int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    monkeypatch.delenv("DOP_DEBUG", raising=False)
    assert verb(raising(error)) == code
    text = capfd.readouterr().err
    assert len(text.splitlines()) <= 1
    assert says in text


def test_exit_codes_of_commands(verb: Callable[[Callable[[], Any]], int]) -> None:
    import typer

    assert verb(lambda: None) == 0
    assert verb(lambda: 3) == 3
    assert verb(raising(typer.Exit(130))) == 130
    assert verb(raising(typer.Abort())) == 130
    assert verb(raising(SystemExit(4))) == 4


def test_debug_prints_the_traceback(
    verb: Callable[[Callable[[], Any]], int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOP_DEBUG", "1")
    assert verb(raising(ZeroDivisionError("x"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main(["env"]) == 2
    line = capsys.readouterr().err
    assert line == (
        "error: the package 'typer' is not installed. Install the tuner: pip install 'dop[tune]'\n"
    )


def test_closed_and_full_output() -> None:
    code = "import sys; from dop.cli.main import main; sys.exit(main(['env']))"
    reader = f'{sys.executable} -c "{code}" | true; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", reader], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("141", "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-c", code]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60)
        assert result.returncode == 2
        assert result.stderr.decode().startswith("error: No space left on device.")
        assert result.stderr.count(b"\n") == 1


def test_emit(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"s": named("uniform", 4), "bad": [float("nan"), float("inf")], "p": Path("a"),
            "f": Failure.TIMEOUT, "set": {2, 1}}  # fmt: skip
    output.emit(data, True, "not shown")
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "s": {"mix": "uniform", "segments": [2, 2], "bare_rows": 0, "weight": 1.0, "cold": False},
        "bad": [None, None],
        "p": "a",
        "f": "timeout",
        "set": [1, 2],
    }
    output.emit(data, False, "shown [as it is]")
    output.emit(data, False, lambda console: console.print("by function"))
    assert capsys.readouterr().out == "shown [as it is]\nby function\n"
    output.note("to\nstderr")
    assert capsys.readouterr() == ("", "to stderr\n")


def test_environment() -> None:
    done = run("env", "--json")
    found = json.loads(done.stdout)
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["cpu"]["threads"] >= 1
    text = subprocess.run(
        [sys.executable, "-m", "dop.collect_env"], capture_output=True, text=True, timeout=60
    ).stdout
    assert "versions.python" in text
    assert "cpu.model" in text


def test_collect_env_survives_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(hostinfo, "cpu_target", refuse)
    monkeypatch.setattr(collect_env, "versions", refuse)
    found = collect_env.collect()
    collect_env.revision.cache_clear()
    assert found["versions"] == {}
    assert found["gpus"] == []
    assert collect_env.lines(found)


def test_revision_is_that_of_the_checkout() -> None:
    collect_env.revision.cache_clear()
    top = Path(collect_env.__file__).parents[1]
    if not (top / ".git").exists():
        assert collect_env.revision() == ""
    else:
        assert len(collect_env.revision().removesuffix("-dirty")) == 12


AVX2 = "sse4_2 ssse3 popcnt avx avx2 fma f16c bmi1 bmi2 movbe"
AVX512 = AVX2 + " avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "stepping", "flags", "arch"),
    [
        ("AuthenticAMD", 25, 1, 1, AVX2, "znver3"),
        ("AuthenticAMD", 25, 17, 1, AVX512, "znver4"),
        ("AuthenticAMD", 23, 49, 0, AVX2, "znver2"),
        ("AuthenticAMD", 26, 2, 1, AVX512, "znver5"),
        ("GenuineIntel", 6, 85, 4, AVX512, "skylake-avx512"),
        ("GenuineIntel", 6, 85, 7, AVX512, "cascadelake"),
        ("GenuineIntel", 6, 143, 8, AVX512, "sapphirerapids"),
        ("GenuineIntel", 6, 143, 8, AVX2, "x86-64-v3"),  # a machine that hides AVX-512
        ("AuthenticAMD", 25, 1, 1, "sse4_2 ssse3 popcnt", "x86-64-v2"),
        ("GenuineIntel", 6, 9999, 0, AVX512, "x86-64-v4"),
        ("Unknown", 0, 0, 0, "", "x86-64"),
    ],
)
def test_cpu_names(
    vendor: str, family: int, model: int, stepping: int, flags: str, arch: str
) -> None:
    text = (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        f"stepping\t: {stepping}\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: other\n"
    )
    got, features = hostinfo.cpu_arch(hostinfo.parse_cpuinfo(text), "x86_64")
    assert got == arch
    assert ("+avx2" in features.split(",")) == ("avx2" in flags.split())
    assert ("+avx512f" in features.split(",")) == ("avx512f" in flags.split())


def test_other_machines_have_a_name() -> None:
    assert hostinfo.cpu_arch({"CPU part": "0xd4f"}, "aarch64") == ("neoverse-v2", "")
    assert hostinfo.cpu_arch({}, "riscv64") == ("generic", "")
    assert hostinfo.cpu_arch({"cpu family": "x"}, "x86_64")[0] == "x86-64"


def test_this_machine_is_a_target() -> None:
    target = hostinfo.find_target("cpu", threads=3)
    assert (target.kind, target.units) == ("cpu", 3)
    assert target.vector_bytes in (16, 32, 64)
    assert target.l2_bytes >= 1 << 16
    assert hostinfo.usable_cores() >= 1
    with pytest.raises(ConfigError):
        hostinfo.find_target("tpu")


ATTRIBUTES = {1: 1024, 12: 65536, 16: 132, 38: 50 << 20, 75: 9, 76: 0, 97: 232448}


class FakeDriver:
    """Answers as the driver library does, through the pointers it is given."""

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0 if index == 0 else 101

    def cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: Any) -> int:
        value._obj.value = ATTRIBUTES[number]
        return 0


def test_gpu_as_the_driver_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostinfo, "_driver", FakeDriver)
    expected = Target("cuda", "sm_90a", "NVIDIA H200", 132, 1024, 232448, 65536, 50 << 20, 16)
    assert hostinfo.find_target() == expected
    assert hostinfo.cuda_target(1) is None
    monkeypatch.setattr(hostinfo, "_driver", lambda: None)
    assert hostinfo.find_target().kind == "cpu"
    with pytest.raises(ConfigError, match="no usable CUDA device"):
        hostinfo.find_target("cuda")
    assert hostinfo.cuda_arch(8, 0) == "sm_80"
    assert hostinfo.cuda_arch(10, 0) == "sm_100a"
