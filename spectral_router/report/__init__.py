"""What a checkpoint tells of its routers, on the command line or as data.

In comes a file or folder of any format and size, of which names, shapes and then the gates alone are read; out go numbers of
each gate, a verdict in plain words, and a comparison with another checkpoint. No code of a file is run, nothing is downloaded.
"""

from .comparison import Comparison, compare_checkpoints
from .inspection import CheckpointReport, inspect_checkpoint

__all__ = ["CheckpointReport", "Comparison", "compare_checkpoints", "inspect_checkpoint"]
