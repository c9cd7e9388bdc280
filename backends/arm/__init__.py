"""ARM: the rows of its instruction sets and chips."""
