"""A plan as tables for the terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.plan.memory import peak, usable
from rlhf.plan.search import Plan
from rlhf.plan.supervised import SupervisedPlan

SHOWN = 10  # layouts


def show_plan(plans: Sequence[Plan], console: Console) -> None:
    """Memory of the best layout by phase, its time and cost, and the other layouts."""
    best = plans[0]
    device, cluster = best.cluster.device, best.cluster
    console.print(
        f"[bold]PPO of {best.models.actor.name}[/bold] "
        f"({best.models.actor.parameters / 1e9:.2f} B parameters), critic "
        f"{best.models.critic.name}, on {cluster.gpus} x {device.name}; batch "
        f"{best.recipe.batch}, {best.recipe.prompt} + {best.recipe.response} tokens"
    )
    console.print(f"constants of {best.system.name}: {best.system.source}")
    if best.obstacle is None:
        console.print(_memory_table(best))
        console.print(_time_line(best))
    else:
        lora = "" if best.strategy.lora else "--lora, "
        console.print(f"nothing fits: try {lora}a shorter response, or more GPUs")
    console.print(_layout_table(plans))


def _memory_table(plan: Plan) -> Table:
    parts = dict.fromkeys(part for phase in plan.memory.values() for part in phase)
    room = usable(plan.cluster.device)
    table = Table(title=f"{plan.strategy}: GB on each GPU, of {room / 1e9:.0f} usable")
    table.add_column("")
    for phase in plan.memory:
        table.add_column(phase, justify="right")
    for part in parts:
        sizes = [plan.memory[phase].get(part, 0.0) for phase in plan.memory]
        if any(sizes):
            table.add_row(part, *(f"{size / 1e9:.2f}" if size else "" for size in sizes))
    table.add_section()
    totals = [sum(sizes.values()) for sizes in plan.memory.values()]
    table.add_row("total", *(f"{total / 1e9:.2f}" for total in totals))
    table.add_row("seconds", *(f"{seconds:.2f}" for seconds in plan.seconds.values()))
    return table


def _time_line(plan: Plan) -> str:
    strategy = plan.strategy
    return (
        f"{plan.step_seconds:.1f} s an iteration x {plan.recipe.iterations:.0f} = "
        f"{duration(plan.total_seconds)}, ${plan.dollars:,.0f}; a GPU generates "
        f"{strategy.rollout_batch} sequences at once and trains micro-batches of "
        f"{strategy.micro_batch}"
    )


def _layout_table(plans: Sequence[Plan]) -> Table:
    table = Table(title="Layouts, with the largest batches that fit")
    table.add_column("layout", no_wrap=True)
    for column in ("rollout", "micro", "GB"):
        table.add_column(column, justify="right")
    table.add_column("outcome")
    for plan in plans[:SHOWN]:
        table.add_row(
            str(plan.strategy),
            str(plan.strategy.rollout_batch),
            str(plan.strategy.micro_batch),
            f"{peak(plan.memory)[1] / 1e9:.1f}",
            plan.obstacle or f"{duration(plan.total_seconds)}, ${plan.dollars:,.0f}",
        )
    if len(plans) > SHOWN:
        table.caption = f"{len(plans) - SHOWN} slower or larger ones not shown"
    return table


def show_supervised(plan: SupervisedPlan, console: Console) -> None:
    memory = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in plan.memory.items() if size)
    console.print(
        f"[bold]{plan.step}[/bold] with {plan.strategy}, micro-batch {plan.strategy.micro_batch}: "
        f"{plan.step_seconds:.2f} s a step x {plan.steps:.0f} = {duration(plan.total_seconds)}, "
        f"${plan.dollars:,.0f}; GB on each GPU: {memory}"
    )


def duration(seconds: float) -> str:
    """In the unit that a person would say it in."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def plain(plan: Plan) -> dict[str, Any]:
    """A plan for JSON."""
    return {
        "model": plan.models.actor.name, "critic": plan.models.critic.name,
        "gpu": plan.cluster.device.name, "gpus": plan.cluster.gpus,
        "system": plan.system.name, "source": plan.system.source,
        "layout": str(plan.strategy), "rollout_batch": plan.strategy.rollout_batch,
        "micro_batch": plan.strategy.micro_batch, "obstacle": plan.obstacle,
        "memory_bytes": plan.memory, "seconds": plan.seconds,
        "iterations": plan.recipe.iterations, "total_hours": plan.total_seconds / 3600,
        "dollars": plan.dollars,
    }  # fmt: skip
