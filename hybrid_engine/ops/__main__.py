"""`python -m hybrid_engine.ops`: which implementation runs for each op on each device."""

from rich.console import Console
from rich.table import Table

from hybrid_engine import ops

DEVICES = ("cpu", "cuda")


def main() -> None:
    table = Table(title="op x device x implementation")
    for column in ("op", *DEVICES):
        table.add_column(column)
    for name, op in sorted(ops.OPS.items()):
        table.add_row(name, *(op.implementation(device) for device in DEVICES))
    console = Console()
    console.print(table)
    if ops.NATIVE.library:
        console.print(f"CPU kernels: {ops.NATIVE.isa}, {ops.NATIVE.library}", soft_wrap=True)
    else:
        console.print(f"CPU kernels: none, {ops.NATIVE.reason}", soft_wrap=True)


if __name__ == "__main__":
    main()
