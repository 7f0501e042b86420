"""What a user did wrong: where it is and what to do about it."""

from __future__ import annotations

__all__ = ["GalrayError", "GalrayWarning"]


class GalrayError(Exception):
    """A mistake that the user can mend.

    The command line prints it in one or two lines and exits with code 2; programming errors stay
    ordinary exceptions.

    Arguments:
        what: What went wrong, naming the file, row, key or value.
        remedy: What to do about it.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)  # both in args, so that it survives pickling between processes
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  remedy: {self.remedy}" if self.remedy else self.what


class GalrayWarning(UserWarning):
    """Something that is legal but that the user should know: an ignored setting, a weak result."""
