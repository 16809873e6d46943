"""The errors a person sees: one line that says what, where and what to do."""


class InputError(Exception):
    """The call or its input is wrong. Nothing was written; the command line ends with status 2."""


class MalformedShard(Exception):
    """A tar that cannot be read as one. Trying again does not help: the shard fails by name, the others go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on whatever device: Python, numpy, Pillow and torch say so differently."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported for a name
        return True
    # torch's allocator for CPUs raises a plain RuntimeError
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
