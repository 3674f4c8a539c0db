"""Where the race checker hooks in: `checker` is None unless somebody checks (`rlx.checking`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlx_driver._checker import Checker

__all__ = ["checker"]

checker: Checker | None = None
