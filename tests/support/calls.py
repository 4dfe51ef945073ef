"""Count what a piece of code does, so that tests of its cost do not depend on the speed of the machine."""

from __future__ import annotations

import gc
import sys
from types import FrameType


class Calls:
    """How many functions were called since `with`: those written in Python, and those of C.

    Nothing is collected meanwhile: finalizers of other tests' garbage would be counted.
    """

    def __init__(self) -> None:
        self.python = self.c = 0

    def __enter__(self) -> Calls:
        gc.disable()
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.python += event == "call"
        self.c += event == "c_call"
