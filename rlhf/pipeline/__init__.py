"""The steps as they run from the command line: folders in, folders and a report out.

`pipeline` has their order, `supervised` and `ppo` the steps themselves, `evaluation` what is
measured afterwards; `workspace` is what all of them share, `data` and `models` what they read.
"""

from rlhf.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
