"""gndet's speed and memory beside those of other libraries, on the same work in turn: `gndet benchmark`."""
