"""The base of every error that a user can cause and mend."""

from __future__ import annotations


class GearshiftError(Exception):
    """Something the user gave does not fit.

    The message says what was given, what was expected and what to do; the command line prints it
    without a traceback. Our own broken invariants are assertions, never this.
    """


class OutputExistsError(GearshiftError):
    """The output path is already there and overwriting was not asked for."""


class FileFormatError(GearshiftError):
    """A file could not be read as what it claims to be."""


class CheckpointError(GearshiftError):
    """A model directory is missing, incomplete or damaged."""
