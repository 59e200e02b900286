"""A framework for tests/test_benchmarks.py: a case's stride says what happens.

Every request is written to the file that FAKE_LOG names.
"""

import os
import time

from benchmarks.phases import Phases

CRASHES, HANGS, FULL, UNSUPPORTED, CRASHES_LATER, SLOW = 101, 103, 107, 109, 113, 127


class Session:
    def __init__(self, name):
        self.name = name
        if name == "tokamax":
            raise ImportError("no such GPU library")
        print("libraries print on the standard output")
        self.prepared = set()
        self.phases = Phases()

    def _log(self, do, *cases):
        words = [do, self.name, *(case.length for case in cases[:1])]
        with open(os.environ["FAKE_LOG"], "a") as log:
            print(*words, *(case.stride for case in cases), file=log)

    def compile(self, cases, seconds):
        self._log("compile", *cases)

    def prepare(self, case):
        self._log("prepare", case)
        if self.name == "s2_jax":
            if case.stride == CRASHES:
                print("Segmentation fault, or so", file=os.sys.stderr)
                os._exit(11)
            if case.stride == HANGS:
                time.sleep(60)
            if case.stride == FULL:
                raise MemoryError("RESOURCE_EXHAUSTED: Out of memory\nand a long story")
            if case.stride == UNSUPPORTED:
                raise NotImplementedError("this stride")
            if case.stride == SLOW:
                time.sleep(0.5)
        self.prepared.add(case)
        self.phases.add("layout", 0.5)
        mode = {"bytes": 3 * case.io_bytes("forward"), "trace_lower_s": 0.5, "compile_s": 0.25}
        return {"layout_s": 0.125, "forward": mode, "train": mode}

    def round(self, case):
        self._log("round", case)
        assert case in self.prepared, "the worker is not the one that prepared this"
        if case.stride == CRASHES_LATER and self.name == "s2_jax":
            os._exit(12)
        if case.stride == SLOW:
            time.sleep(0.02)
        self.phases.add("timing", 0.25)
        seconds = 0.002 if self.name == "flash2" else 0.001
        return {
            mode: {"seconds": seconds * n, "clock": "wall"}
            for mode, n in (("forward", 1), ("train", 4))
        }

    def forget_inputs(self):
        self._log("forget")

    def clear(self):
        self._log("clear")
