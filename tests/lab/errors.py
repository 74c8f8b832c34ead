"""What can go wrong in the lab itself."""

from __future__ import annotations


class LabError(RuntimeError):
    """The lab couldn't do what it was asked; the text says what and shows the tool's own words."""
