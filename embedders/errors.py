"""The errors a person sees: one line that says what, where and what to do."""


class InputError(Exception):
    """The call or its input is wrong. Nothing was written; the command line ends with status 2."""


class MalformedShard(Exception):
    """A tar that cannot be read as one. Trying again does not help: the shard fails by name, the others go on."""
