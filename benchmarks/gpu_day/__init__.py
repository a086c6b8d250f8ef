"""Measure everything that gndet claims about a GPU, in one call of at most 8 minutes, on a machine without a network.

    python -m benchmarks.gpu_day prepare --bccd FOLDER --nuclei FOLDER   # at home: fills .gpu/, which travels along
    python3 -m benchmarks.gpu_day run                                    # on the machine with the GPU
    GPU_DAY_CPU=1 python -m benchmarks.gpu_day run                       # at home: every line, at small sizes

Every part is a process with a limit of its own: a part that fails or runs out of time loses itself alone.
"""
