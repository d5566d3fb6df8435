"""DeepSpeed's checkpoints on another number of ranks: by way of its universal format."""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from rlhf import distributed

PATTERN = "*zero_pp_rank_*_optim_states.pt"


def ranks_of(folder: Path) -> int | None:
    """The ranks that an optimizer's state is divided among; None where each has it whole."""
    return len(list(folder.glob(PATTERN))) or None


@contextlib.contextmanager
def universal(folder: Path, *, zero_stage: int) -> Iterator[Path]:
    """The checkpoint in the universal format, for as long as the block lasts."""
    converted = folder.with_name(f"{folder.name}.universal")
    distributed.decided_by_first(lambda: _convert(folder, converted, zero_stage=zero_stage))
    try:
        yield converted
    finally:
        distributed.barrier()
        if distributed.is_first():
            shutil.rmtree(converted, ignore_errors=True)


def _convert(folder: Path, converted: Path, *, zero_stage: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(converted, ignore_errors=True)
    options = Namespace(
        input_folder=str(folder),
        output_folder=str(converted),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=zero_stage < 3,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
