"""What can go wrong, told to a person: what happened, why it matters, one thing to do now.

PantheraError                 exit code
├── RecipeError               2    the recipe, the command line, or a name in them
├── MissingExtra              2    an optional package is not installed
├── DataError                 3    the data set
├── DeviceError               4    the device, or its memory
├── DivergedError             5    the loss or a gradient is not finite
├── StorageError              6    disk, folder, checkpoint
└── StoppedError              75   SIGTERM, with a checkpoint saved (130 for Ctrl-C)
"""

from __future__ import annotations


class PantheraError(Exception):
    """An error a person can act on. `str(error)` is the three lines they read."""

    exit_code = 1

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


class RecipeError(PantheraError):
    """The recipe, the command line, or a model name in them cannot be used."""

    exit_code = 2


class MissingExtra(PantheraError, ImportError):
    """An optional package is needed for what was asked."""

    exit_code = 2

    def __init__(self, package: str, *, needed_for: str, install: str) -> None:
        super().__init__(
            f"{package} is not installed",
            why=f"{needed_for} needs it, and it is not part of the basic installation",
            fix=f"pip install {install}",
        )


class DataError(PantheraError):
    """The data set cannot be read, or holds rows that cannot be used."""

    exit_code = 3


class DeviceError(PantheraError):
    """No such device, or what was asked does not fit into its memory."""

    exit_code = 4


class DivergedError(PantheraError):
    """The loss or a gradient is not finite; the weights were not updated."""

    exit_code = 5


class StorageError(PantheraError):
    """A folder or a checkpoint cannot be written, or cannot be trusted."""

    exit_code = 6


class StoppedError(PantheraError):
    """The run was asked to stop and has saved a checkpoint at a step boundary."""

    def __init__(self, what: str, *, why: str, fix: str, exit_code: int) -> None:
        super().__init__(what, why=why, fix=fix)
        self.exit_code = exit_code
