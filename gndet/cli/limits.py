"""Words for a limit of the machine that a command reaches anywhere: memory, threads."""

from gndet.errors import in_one_line, out_of_memory

MEMORY = {  # what lowers the memory that a verb needs, besides the size of its input
    "train": "lower train.images_per_gpu, evaluation.images_per_gpu, data.workers or data.max_edge",
    "evaluate": "lower evaluation.images_per_gpu, data.shortest_edge_test or data.workers",
    "predict": "lower evaluation.images_per_gpu, data.shortest_edge_test or data.workers",
    "export": "choose a smaller data.shortest_edge_test or, for a detector, --size",
    "check": "end other programs or, with a config, check fewer images (data.train.limit=1000 data.val.limit=1000)",
}
OTHERWISE = "end other programs, or use a machine with more memory"


def limit_reached(verb: str, error: BaseException) -> str:
    """Return which limit of the machine an error means, and what to do; "" for another error."""
    reason = in_one_line(error)
    if out_of_memory(error):
        return f"out of memory ({reason}): {MEMORY.get(verb, OTHERWISE)}"
    if "can't start new thread" in reason:
        return f"{reason}: raise the limit of processes (ulimit -u), or lower data.workers"
    return ""
