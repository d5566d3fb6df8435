"""GPUs and the machines that they come in: data-sheet figures, the ceilings of every estimate."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9
GIB = float(2**30)
TFLOPS = 1e12


@dataclass(frozen=True)
class Device:
    """One GPU, and its share of the node that it stands in. All rates are peaks of a data sheet."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    flops: dict[str, float]  # dtype -> FLOP/s, dense
    gpus_per_node: int  # GPUs that its fast link joins
    link: float  # bytes/s to the others in the node, one direction
    network: float  # bytes/s to other nodes, one direction
    host_memory: float  # bytes of the node's memory for each GPU
    pcie: float  # bytes/s to the host, one direction
    dollars: float  # an hour, on demand

    def peak(self, dtype: str) -> float:
        """FLOP/s at a dtype. Raises ValueError where the device has no such arithmetic."""
        if dtype not in self.flops:
            raise ValueError(
                f"{self.name} has no {dtype} units: use one of {', '.join(self.flops)}"
            )
        return self.flops[dtype]


def _device(
    name: str, memory_gib: float, bandwidth_gb: float, half: float, single: float, *,
    bf16: bool = True, gpus_per_node: int = 8, link_gb: float = 300, network_gb: float = 25,
    host_gib: float = 112, pcie_gb: float = 25, dollars: float,
) -> Device:  # fmt: skip
    flops = {"float16": half * TFLOPS, "float32": single * TFLOPS}
    if bf16:
        flops["bfloat16"] = half * TFLOPS
    return Device(
        name, memory_gib * GIB, bandwidth_gb * GB, flops, gpus_per_node, link_gb * GB,
        network_gb * GB, host_gib * GIB, pcie_gb * GB, dollars,
    )  # fmt: skip


# Memory, bandwidth and FLOP/s: NVIDIA's data sheets. Links: NVLink in one direction, or PCIe; the
# network: InfiniBand at one adapter a GPU. Dollars: the price behind the published table for A100
# (32 an hour for eight A100-80); the others are list prices of 2023 to 2025, to be overridden.
DEVICES = {
    device.name.lower(): device
    for device in (
        _device("V100-32", 32, 900, 125, 15.7, bf16=False, link_gb=150, network_gb=12.5,
                host_gib=84, pcie_gb=12, dollars=2.75),
        _device("A6000", 48, 768, 154.8, 38.7, gpus_per_node=1, link_gb=25, network_gb=12.5,
                host_gib=220, dollars=0.8),
        _device("A100-40", 40, 1555, 312, 19.5, dollars=3.4),
        _device("A100-80", 80, 2039, 312, 19.5, host_gib=220, dollars=4.0),
        _device("H100", 80, 3350, 989.4, 66.9, link_gb=450, network_gb=50, host_gib=250,
                pcie_gb=50, dollars=4.0),
        _device("H200", 141 * GB / GIB, 4800, 989.4, 66.9, link_gb=450, network_gb=50,
                host_gib=250, pcie_gb=50, dollars=5.0),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """A device of the table, in any case of its letters."""
    if (device := DEVICES.get(name.lower())) is None:
        known = ", ".join(device.name for device in DEVICES.values())
        raise ValueError(f"no GPU {name!r} in the table; it has {known}")
    return device
