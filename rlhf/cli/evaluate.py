"""`rlhf eval`: measure a policy, or compare two."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from rlhf.config import ComparisonConfig


def eval_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Reward, KL, length, true quality and win rate on held-out prompts.",
        usage="rlhf eval --policy MODEL [--against MODEL] --reward_path MODEL [--FIELD VALUE ...]",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options")
    parser.add_argument("--debug", action="store_true", help="Show a traceback on errors.")
    parser.add_class_arguments(ComparisonConfig)
    return parser


def evaluate(options: Namespace) -> None:
    """Compare, and write the report into `output_dir`."""
    from rich.console import Console

    from rlhf.evaluation import compare, write_comparison

    names = ComparisonConfig.__dataclass_fields__
    config = ComparisonConfig(**{name: options[name] for name in names})
    write_comparison(compare(config), Path(config.output_dir), Console(), samples=config.samples)
