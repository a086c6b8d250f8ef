"""`gndet train` that ends with the process that started it: `python -m ...norm_study.child train CONFIG ...`.

A study that is killed would else leave trainings behind, which nobody waits for.
"""

import ctypes
import runpy
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    runpy.run_module("gndet.cli", run_name="__main__", alter_sys=True)
