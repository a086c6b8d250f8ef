"""Speed and memory of gndet beside other libraries, on the same work in turn: `python -m benchmarks`."""
