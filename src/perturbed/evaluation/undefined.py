"""The signal that a score does not exist."""

from __future__ import annotations


class Undefined(Exception):
    """A score that does not exist for a condition; the message says why and becomes the `reason` beside the NaN."""
