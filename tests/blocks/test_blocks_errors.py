"""Errors can be caught without loading what raises them."""

import subprocess
import sys

from blocks.errors import BlocksError, CheckpointError, StepError


def test_importing_the_errors_imports_nothing_heavy() -> None:
    program = "import sys, blocks.errors; print({'torch', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert shown.stdout.strip() == b"set()"


def test_every_error_is_a_blocks_error() -> None:
    assert issubclass(CheckpointError, BlocksError)
    assert issubclass(StepError, BlocksError)
