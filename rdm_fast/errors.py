"""What can go wrong for a user, and the exit code that tells a scheduler which it was.

A `UserError` carries one sentence: what is wrong, which flag or file it concerns, and the way
out. `rdm_fast.cli.commands` prints it as a single `error:` line on rank zero and exits with its
code; no traceback is shown for it. Anything else that escapes is a bug of ours (code 70).
"""

from typing import ClassVar


class UserError(Exception):
    """One clear sentence for the user; `code` is the process's exit status (BSD sysexits)."""

    code: ClassVar[int] = 70


class UsageError(UserError, ValueError):
    """Invalid flag or combination of flags."""

    code = 2


class DataError(UserError):
    """A file is there but cannot be used: corrupt, of another architecture, too small."""

    code = 65


class InputMissing(UserError):
    """A data set or checkpoint is not where the flag says."""

    code = 66


class Unavailable(UserError):
    """A device, library or engine that was asked for by name is not there."""

    code = 69


class NonFinite(UserError):
    """The loss or a gradient stopped being finite."""

    code = 71


class Collapsed(UserError):
    """The projections collapsed, and the run was told to stop then."""

    code = 71


class CannotCreate(UserError):
    """The output folder is not ours, not writable, or locked by another run."""

    code = 73


class OutputFailed(UserError):
    """Writing failed repeatedly, for instance because the disk is full."""

    code = 74


class Interrupted(UserError):
    """Stopped by a signal after the state was saved; the same command continues."""

    code = 75


class RankLost(UserError):
    """Another rank hung or died."""

    code = 76


class ConfigMismatch(UserError):
    """The configuration contradicts the checkpoint."""

    code = 78
