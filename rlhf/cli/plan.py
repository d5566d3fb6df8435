"""`rlhf plan`: memory, time and cost before a GPU is rented."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf.plan import Cluster, Models, ModelShape, Plan, Recipe, System


def plan_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Memory on each GPU, layouts that fit, time and cost; nothing is downloaded.",
        usage="rlhf plan --model MODEL --gpus N --gpu KIND [--FIELD VALUE ...]",
    )
    add = parser.add_argument
    add(
        "--model",
        type=str,
        default="opt-1.3b",
        help="Actor: name, folder or file, or several.",
    )
    add("--critic", type=str | None, help="The same for critic and reward; default: the actor's.")
    add("--gpus", type=int, default=1, help="Number of GPUs.")
    add("--gpu", type=str | None, help="V100-32, A6000, A100-40, A100-80, H100 or H200.")
    add("--step", type=Literal["all", "sft", "reward", "ppo"], default="ppo", help="What to plan.")
    add("--prompt", type=int, default=256, help="Tokens of a prompt.")
    add("--response", type=int, default=256, help="Tokens of a response.")
    add("--batch", type=int, default=1024, help="Sequences of an iteration, over all GPUs.")
    add("--samples", type=int, default=264_292, help="Prompts of PPO, pairs of the reward model.")
    add("--sft_samples", type=int | None, help="Demonstrations; default: half of samples.")
    add("--epochs", type=int, default=1, help="PPO epochs over an iteration's experience.")
    add("--lora", type=int | None, help="Rank of adapters on the actor; default: full training.")
    add("--dtype", type=Literal["bfloat16", "float16", "float32"], default="bfloat16",
        help="Of the weights.")  # fmt: skip
    add("--price", type=float | None, help="Dollars of a GPU-hour; default: the table's.")
    add("--system", type=str, default="hybrid-rlhf", help="hybrid-rlhf or deepspeed-chat.")
    add("--records", type=str | None, help="File of `rlhf bench step`: its constants and device.")
    add("--output", type=str | None, help="JSON file for the plans.")
    add("--scaling", type=str | None, help="Folder for the study up to 1024 GPUs, with a plot.")
    add("--debug", action="store_true", help="Show a traceback on errors.")
    return parser


def plan(options: Namespace) -> None:
    """Print the plans; write what was asked for."""
    from rich.console import Console

    from rlhf.plan import SYSTEMS, Cluster, find_device, find_shape
    from rlhf.plan.calibrate import from_file
    from rlhf.plan.scaling import study, write_study
    from rlhf.plan.show import plain

    if options.system not in SYSTEMS:
        raise ValueError(f"no system {options.system!r}: use one of {', '.join(SYSTEMS)}")
    console, system = Console(), SYSTEMS[options.system]
    if options.records:
        system, device = from_file(Path(options.records), system)
        if options.gpu:  # another device, with the shares that were measured
            device = find_device(options.gpu)
    else:
        device = find_device(options.gpu or "A100-80")
    if options.price is not None:
        device = replace(device, dollars=options.price)
    cluster = Cluster(device, options.gpus)
    actors = [find_shape(name) for name in options.model.split(",")]
    plans = [p for actor in actors for p in _plan_one(actor, cluster, system, options, console)]
    if options.output:
        Path(options.output).write_text(json.dumps([plain(p) for p in plans], indent=1) + "\n")
        console.print(f"written: {options.output}")
    if options.scaling:
        cases = [_models(actor, options) for actor in actors]
        studies = [study(models, _recipe(options), device, system) for models in cases]
        for path in write_study(studies, Path(options.scaling)):
            console.print(f"written: {path}")


def _plan_one(
    actor: ModelShape, cluster: Cluster, system: System, options: Namespace, console: Console
) -> list[Plan]:
    """Print the steps of one model; the layouts of PPO, best first."""
    from rlhf.plan import search
    from rlhf.plan.show import show_plan, show_supervised
    from rlhf.plan.supervised import supervised

    known = cluster.device.flops
    dtype = options.dtype if options.dtype in known else next(iter(known))
    recipe, models = _recipe(options), _models(actor, options)
    if options.step in ("all", "sft"):
        samples = options.sft_samples or max(1, options.samples // 2)
        once = replace(recipe, samples=samples, epochs=1)
        show_supervised(
            supervised("sft", actor, once, cluster, system, lora=options.lora, dtype=dtype), console
        )
    if options.step in ("all", "reward"):
        pairs = replace(recipe, samples=2 * options.samples, epochs=1)
        show_supervised(
            supervised("reward", models.critic, pairs, cluster, system, dtype=dtype), console
        )
    if options.step not in ("all", "ppo"):
        return []
    plans = search(models, recipe, cluster, system, lora=options.lora, dtype=dtype)
    show_plan(plans, console)
    return plans


def _models(actor: ModelShape, options: Namespace) -> Models:
    from rlhf.plan import Models, find_shape

    return Models(actor, find_shape(options.critic) if options.critic else actor)


def _recipe(options: Namespace) -> Recipe:
    from rlhf.plan import Recipe

    return Recipe(options.prompt, options.response, options.batch, options.samples, options.epochs)
