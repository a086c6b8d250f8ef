"""The main program of a training of a norm study, with the arguments of `gndet`; its name says so in `ps`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("gndet.cli", run_name="__main__", alter_sys=True)
