"""The `rlhf` command: parse, run, and turn user errors into one line and exit code 2."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import typing
from collections.abc import Sequence

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt

from rlhf.cli import ranks
from rlhf.cli.bench import bench, bench_parser
from rlhf.cli.deepspeed_chat import as_lists
from rlhf.cli.evaluate import eval_parser, evaluate
from rlhf.cli.plan import plan, plan_parser
from rlhf.config import ComparisonConfig, RunConfig

STEPS = {
    "run": "all three steps: SFT, reward model, PPO, and the report",
    "sft": "step 1, supervised fine-tuning",
    "reward": "step 2, the reward model",
    "dpo": "instead of reward model and PPO: learn from preference pairs directly",
    "ppo": "step 3, PPO, on the models in output_dir or the given ones",
}


def build_parser() -> ArgumentParser:
    """The command line; every field of RunConfig is an option of every step."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="rlhf", description="RLHF from one command.")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, description in STEPS.items():
        step = ArgumentParser(
            description=description, usage=f"rlhf {name} [--config FILE] [--FIELD VALUE ...]"
        )
        step.add_argument("--config", action=ActionConfigFile, help="YAML file with these options")
        step.add_argument("--debug", action="store_true", help="Show a traceback on errors.")
        step.add_argument("--resume", action="store_true", help="Go on from the last checkpoint.")
        step.add_argument("--nproc", type=PositiveInt, default=1, help="Processes to start here.")
        step.add_class_arguments(RunConfig)
        commands.add_subcommand(name, step, help=description)
    commands.add_subcommand("chat", _chat_parser(), help="talk to a model")
    commands.add_subcommand("eval", eval_parser(), help="measure a policy, or compare two")
    commands.add_subcommand("plan", plan_parser(), help="memory, time and cost on given GPUs")
    commands.add_subcommand("bench", bench_parser(), help="measure speed and memory, with peers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    _set_environment()
    parser = build_parser()
    words = ranks.without_local_rank(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(as_lists(words))
    command = arguments.command
    options = arguments[command]
    try:
        return _dispatch(command, parser, arguments, words)
    except KeyboardInterrupt:
        print("rlhf: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        several = ranks.are_joined()
        if not several or ranks.speaks(error):
            if options.debug or not (_is_user_error(error) or ranks.is_lost_peer(error)):
                if not several:
                    raise
                traceback.print_exc()
            else:
                print(f"rlhf {command}: error: {error}", file=sys.stderr)
        if several:
            ranks.quit_at_once(2)
        return 2


def _dispatch(
    command: str, parser: ArgumentParser, arguments: Namespace, words: Sequence[str]
) -> int:
    if command == "chat":
        from rlhf.cli.chat import chat

        options = arguments.chat
        chat(
            options.folder,
            prompt=options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
        return 0
    if command == "eval":
        _check_sections(ComparisonConfig, arguments.eval)
        evaluate(parser.instantiate(arguments)[command])
        return 0
    if command == "plan":
        plan(arguments.plan)
        return 0
    if command == "bench":
        bench(arguments.bench)
        return 0
    _check_sections(RunConfig, arguments[command])
    options = parser.instantiate(arguments)[command]
    config = _run_config(options)
    if options.nproc > 1 and not ranks.is_launched():
        return ranks.spawn(words, options.nproc)
    ranks.join()
    from rlhf.pipeline import Pipeline

    pipeline = Pipeline(config, resume=options.resume)
    getattr(pipeline, command)()
    if command != "run":
        pipeline.finish(command)
    ranks.leave()
    return 0


def _run_config(options: Namespace) -> RunConfig:
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: options[name] for name in names})


def _check_sections(kind: type, given: Namespace, prefix: str = "") -> None:
    """A YAML may hold anything where a section belongs: raise ValueError for all but a section."""
    for name, type_ in typing.get_type_hints(kind).items():
        if not dataclasses.is_dataclass(type_):
            continue
        if not isinstance(given[name], Namespace):
            raise ValueError(
                f"{prefix}{name}: expected a section with options of its own, got "
                f"{given[name]!r}; leave it out for the defaults"
            )
        _check_sections(typing.cast(type, type_), given[name], f"{prefix}{name}.")


def _chat_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Talk to a model, streaming.", usage="rlhf chat FOLDER [--FIELD VALUE ...]"
    )
    parser.add_argument("folder", type=str, help="Folder of the model, such as OUTPUT_DIR/actor.")
    parser.add_argument("--prompt", type=str | None, help="Answer this and exit.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Longest answer.")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest.")
    parser.add_argument("--seed", type=int, default=0, help="Of sampling.")
    parser.add_argument("--debug", action="store_true", help="Show a traceback on errors.")
    return parser


def _is_user_error(error: Exception) -> bool:
    """Bad input, a missing file, a full disk, no compiler: what a message can mend."""
    if isinstance(error, ValueError | OSError):
        return True
    return type(error).__name__ == "BuildError"


def _set_environment() -> None:
    """What libraries read when they are imported, unless the user has set it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # A waiting OpenMP thread spins for some microseconds, then sleeps. Without spinning small
        # models train 1.5x slower on two idle cores, and with more 5x slower beside others' work.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is told in one line
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


if __name__ == "__main__":
    sys.exit(main())
