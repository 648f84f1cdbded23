"""The `dop` command: finds its verbs, and turns every expected error into one line.

This module imports nothing outside of the standard library at the top: without the packages of
the extra `tune` it must still be able to say so. A verb is a module `dop/cli/<verb>.py`; it is
imported only when it is called or when help lists it, so it imports light things at its top.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dop.errors import DopError, MissingDependencyError

if TYPE_CHECKING:
    import typer

COMMANDS = ("tune", "replay", "explain", "report", "env")
"""Verbs that are one function of the module's name."""

GROUPS = ("log", "export", "engine")
"""Verbs with verbs of their own: the module's `app`."""

TUNE_PACKAGES = frozenset(
    {"tvm", "tvm_ffi", "lightgbm", "numpy", "orjson", "psutil", "rich", "typer"}
)
"""Import names of what the extra `tune` installs."""

EXIT_ERROR, EXIT_BUG, EXIT_INTERRUPTED, EXIT_PIPE = 2, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 2: wrong input or usage, one line on standard error says what and what to do.
    130: interrupted. 141: the reader of standard output went away. 1: a bug in Dop; one line,
    with the traceback if DOP_DEBUG is set.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted.", EXIT_INTERRUPTED, prefix="")
    except BrokenPipeError:
        _drop_output()
        return EXIT_PIPE
    except DopError as error:
        return _fail(str(error), EXIT_ERROR)
    except ModuleNotFoundError as error:
        return _missing(error)
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            _drop_output()
        return _fail(_system(error), EXIT_ERROR)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer has handled it
            return EXIT_PIPE
        return stop.code if isinstance(stop.code, int) else EXIT_BUG
    except Exception as error:
        if _is_usage(error):
            return _usage(error)
        return _bug(error)


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The typer application; with only the verb that is called, if `arguments` name one.

    Raises:
        ModuleNotFoundError: typer is not installed, or a package that a verb needs at its top.
    """
    import typer

    app = typer.Typer(
        name="dop",
        help="Finds, proves and ships the fastest SGMV for your GPU, model, adapters and traffic.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=_print_version),
    ) -> None:
        """Finds, proves and ships the fastest SGMV (the multi-LoRA operator)."""

    called = next((a for a in arguments if not a.startswith("-")), None)
    known = available()
    for verb in [called] if called in known else known:
        module = importlib.import_module(f"dop.cli.{verb}")
        if verb in GROUPS:
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(getattr(module, verb))
    return app


def available() -> list[str]:
    """Verbs whose modules are there."""
    return [v for v in (*COMMANDS, *GROUPS) if importlib.util.find_spec(f"dop.cli.{v}")]


def _run(arguments: list[str]) -> int:
    app = build_app(arguments)
    code = app(args=arguments, prog_name="dop", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _print_version(asked: bool) -> None:
    if asked:
        import typer

        from dop.collect_env import versions

        print(f"dop {versions().get('dop', 'of a checkout')}")
        raise typer.Exit


def _fail(message: str, code: int, *, prefix: str = "error: ") -> int:
    """Print one line on standard error; lines of the message are joined."""
    with contextlib.suppress(OSError):  # nobody may be listening; the exit code says it all
        print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)
    return code


def _drop_output() -> None:
    """Let what is left in standard output's buffer go nowhere: flushing failed once already."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _missing(error: ModuleNotFoundError) -> int:
    package = (error.name or "").partition(".")[0]
    if package in TUNE_PACKAGES:
        return _fail(
            str(
                MissingDependencyError(
                    f"the package {package!r} is not installed.",
                    "Install the tuner: pip install 'dop[tune]'",
                )
            ),
            EXIT_ERROR,
        )
    if package == "torch":
        return _fail("the package 'torch' is not installed. pip install torch", EXIT_ERROR)
    return _bug(error)


def _system(error: OSError | MemoryError) -> str:
    """What the operating system refused, and what to do."""
    if isinstance(error, MemoryError):
        return "out of memory. Close other programs, or give a smaller input."
    reason = error.strerror or str(error)
    name = f"{error.filename}: " if error.filename is not None else ""
    return f"{name}{reason}. Check the path, its permissions and the free space."


def _is_usage(error: Exception) -> bool:
    """Whether typer says that the command line is wrong (its exceptions moved between versions)."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _usage(error: Exception) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        return EXIT_ERROR  # the help has been printed
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dop"
    message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    return _fail(f"{message}. See `{command} --help`.", EXIT_ERROR)


def _bug(error: Exception) -> int:
    import typer

    if isinstance(error, typer.Abort):
        return _fail("interrupted.", EXIT_INTERRUPTED, prefix="")
    if os.environ.get("DOP_DEBUG"):
        traceback.print_exception(error)
    what = f"{type(error).__name__}: {error}"
    return _fail(
        f"a bug in Dop: {what[:300]}. Run again with DOP_DEBUG=1 and report what it prints.",
        EXIT_BUG,
    )


if __name__ == "__main__":
    sys.exit(main())
