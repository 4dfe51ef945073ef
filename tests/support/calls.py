"""Count what a piece of code does, so that tests of its cost do not depend on the speed of the machine."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from types import FrameType


class Calls:
    """How many functions were called since `with`: those written in Python, and those of C; `names`: each of them by
    its name. `file`: count those written in this file only, and none of C.

    Nothing is collected meanwhile: finalizers of other tests' garbage would be counted.
    """

    def __init__(self, file: str | None = None) -> None:
        self.python = self.c = 0
        self.names: Counter[str] = Counter()
        self._file = file

    def __enter__(self) -> Calls:
        gc.disable()
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and self._file in (None, frame.f_code.co_filename):
            self.python += 1
            self.names[frame.f_code.co_name] += 1
        elif event == "c_call" and self._file is None:
            self.c += 1
            self.names[getattr(argument, "__name__", "")] += 1
