"""Run `gndet train` and end with the parent process: the main program of a cell, with the arguments of `gndet`.

Without this a killed study would leave its training processes running.
"""

import ctypes
import runpy
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    runpy.run_module("gndet.cli", run_name="__main__", alter_sys=True)
