"""What can go wrong, whose turn it is, and the exit code that says so.

StreamMergeError
  RecipeError       2  the request is wrong: unknown method, key or parameter, value out of range
  CheckpointError   2  a file is wrong: header, offsets, a missing shard or tensor, shapes that differ
  OutputExists      2  refusing to overwrite
  BudgetTooSmall    3  the request is right and does not fit; `least` is the smallest budget that would do
  MachineError      4  the disk is full or failed; what was done is kept for resume
  Interrupted     130  asked to stop (143 for SIGTERM); what was done is kept for resume

Every message is one line: what, where (file, tensor), what to do.
"""

from __future__ import annotations


class StreamMergeError(Exception):
    """Base of all errors that a user can cause or mend; `exit_code` is the process's."""

    exit_code = 2


class RecipeError(StreamMergeError):
    """The request is wrong."""


class CheckpointError(StreamMergeError):
    """A file is wrong."""


class OutputExists(StreamMergeError):
    """The output is there already."""


class BudgetTooSmall(StreamMergeError):
    """The work does not fit the budget. `least` (bytes) would do; None if no budget would."""

    exit_code = 3

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least


class MachineError(StreamMergeError):
    """The machine failed us: no space, I/O error."""

    exit_code = 4


class Interrupted(StreamMergeError):
    """Stopped on request; the work done so far is kept."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code
