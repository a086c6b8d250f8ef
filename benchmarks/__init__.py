"""Compare the speed and memory of gndet with other libraries on the same work: `python -m benchmarks`."""
