"""What can go wrong while computing, and whose fault it is.

BlocksError             the computation failed here
├── Unsupported         the installed transformers is not as known here; names what differs
├── CheckpointError     a folder of weights cannot be served; names file or tensor
└── StepError           a step no stack could compute as it was sent: the sender's fault

1. Importing this module imports neither torch nor transformers.
2. A message is one sentence that a person can act on.
"""


class BlocksError(Exception):
    """The computation failed, and the sender of the step is not to blame."""


class Unsupported(BlocksError):
    """The installed transformers is not as known here; the message names what differs."""


class CheckpointError(BlocksError):
    """A folder holds no usable model; the message names the file or tensor and a next step."""


class StepError(BlocksError):
    """A step cannot be computed as sent: wrong shape, dtype, position or payload."""
