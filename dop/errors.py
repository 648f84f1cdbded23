"""The errors Dop raises on purpose: each names the cause and what to do next."""

from __future__ import annotations

from enum import IntEnum


class DopError(Exception):
    """Base of every error a user can cause or meet.

    Args:
        cause: one sentence, what is wrong and where.
        action: one sentence, what to do about it.
    """

    def __init__(self, cause: str, action: str = "") -> None:
        self.cause = cause
        self.action = action
        super().__init__(f"{cause} {action}".strip())


class ConfigError(DopError):
    """A model config, adapter folder, traffic file or option that cannot be used."""


class LogError(DopError):
    """A tuning log that cannot be opened, read or written."""


class TraceError(DopError):
    """A step or trace that is malformed or does not apply to its workload."""


class BuildError(DopError):
    """A trace whose program the code generator or the compiler refused."""


class ConstraintError(DopError):
    """A candidate that breaks a hardware limit; found before anything is built."""


class ExportError(DopError):
    """An export that cannot be made from the given log."""


class MissingDependencyError(DopError):
    """An optional package that the command needs is not installed."""


class ShapeError(DopError):
    """A tensor whose shape, strides or alignment an operator cannot take."""


class DtypeError(DopError):
    """A tensor whose element type an operator cannot take."""


class DeviceError(DopError):
    """Tensors on devices that do not go together, or a device that cannot be used."""


class AdapterIdError(DopError):
    """An adapter id or rank out of range; found in checked mode only."""


class MissingKernelError(DopError):
    """No ready kernel serves a call, and building one is not allowed or not possible."""


class Failure(IntEnum):
    """Failure class of a measurement; the value is `error_no` in the log."""

    NONE = 0
    CONSTRAINT = 1
    """Refused before the build: breaks a hardware or alignment limit."""
    BUILD = 2
    """The trace did not apply or TVM refused the program."""
    COMPILE = 3
    """The compiler refused the generated source."""
    LAUNCH = 4
    """The kernel could not be launched, crashed the worker or faulted."""
    TIMEOUT = 5
    """Build or run outlasted its limit."""
    CORRECTNESS = 6
    """The result was wrong, or an element was not written."""
    UNKNOWN = 7
    """Anything else; the message says what."""
