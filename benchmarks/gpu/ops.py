"""Every op on the GPU against plain PyTorch: `python -m benchmarks.gpu.ops RECORD.json [WORD...]`.

RECORD.json may be -, for none; only cases whose names have all the words are run. One whose result
is off is not timed. Times are device times of calls replayed in a CUDA graph, in rounds that
alternate with the baseline; the record says what got slower. Exits with 1 if a case failed, with 3
where there is no GPU.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cases, cases_model, cases_training, logprobs
from benchmarks.gpu.case import Case, Place
from benchmarks.gpu.timing import alternate, copy_bandwidth
from hybrid_engine import ops
from rlhf.bench.measure import machine


def measure(case: Case, copy_gbps: float) -> dict[str, Any]:
    """The record of one case; without times if its result is off."""
    record: dict[str, Any] = {"name": case.name, "kernel": case.op.implementation("cuda")}
    if record["kernel"] == "reference":
        return {**record, "failed": "no kernel for CUDA"}
    error, allowed = case.check()
    if not error <= allowed:
        return {**record, "failed": f"error {error:.3g}, allowed {allowed:.3g}"}
    (ours, spread), (plain, _) = alternate(
        lambda: case.ours(*case.args), lambda: case.plain(*case.args)
    )
    record |= {"ours_us": ours * 1e6, "spread_us": spread * 1e6, "plain_us": plain * 1e6}
    record["ratio"] = plain / ours
    if case.bytes:
        record["GBps"] = case.bytes / ours / 1e9
    if case.large:
        record["percent_of_copy"] = 100 * record["GBps"] / copy_gbps
    if case.flops:
        record["TFLOPs"] = case.flops / ours / 1e12
    return record


def line(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"{record['name']:<36}FAILED: {record['failed']}"
    rate = f"{record['TFLOPs']:.0f} TFLOP/s" if "TFLOPs" in record else f"{record['GBps']:.0f} GB/s"
    share = f"{record['percent_of_copy']:.0f} %" if "percent_of_copy" in record else ""
    return (
        f"{record['name']:<36}{record['ours_us']:>10.1f} +-{record['spread_us']:>6.2f}"
        f"{record['plain_us']:>11.1f}{record['ratio']:>8.2f}{rate:>16}{share:>8}"
    )


def run(path: Path | None, words: list[str]) -> bool:
    """Measure the cases that have all the words, write the record, say whether all went well."""
    header = machine(copy_GBps=round(copy_bandwidth(), 1))
    result: dict[str, Any] = {**header, "cases": []}
    print("  ".join(f"{key}={value}" for key, value in header.items()))
    columns = ("case", "ours us", "+-", "torch us", "ratio", "rate", "of copy")
    print("{:<36}{:>10}{:>9}{:>11}{:>8}{:>16}{:>8}".format(*columns))
    for family in (*cases.FAMILIES, *cases_model.FAMILIES, *cases_training.FAMILIES):
        try:
            for case in family(Place()):
                if not all(word in case.name for word in words):
                    continue
                record = measure(case, result["copy_GBps"])
                result["cases"].append(record)
                print(line(record), flush=True)
        except Exception:  # one family must not cost the figures of the others
            result["cases"].append({"name": family.__name__, "failed": traceback.format_exc()})
            print(traceback.format_exc(), flush=True)
        torch.cuda.empty_cache()
        write(result, path)
    summarise(result)
    if not words:
        result["linear_logprob"] = logprobs.measure(Place())
        for name, record in result["linear_logprob"].items():
            print(f"linear_logprob, {name}: {record}")
    write(result, path)
    print(json.dumps(result))
    records = [*result["cases"], *result.get("linear_logprob", {}).values()]
    return not any("failed" in record for record in records)


def summarise(result: dict[str, Any]) -> None:
    timed = [record for record in result["cases"] if "ratio" in record]
    if timed:
        logarithms = [math.log(record["ratio"]) for record in timed]
        result["geometric_mean"] = math.exp(sum(logarithms) / len(timed))
        print(f"geometric mean {result['geometric_mean']:.2f} over {len(timed)} cases")
    slower = [
        f"{record['name']} ({record['ratio']:.2f})" for record in timed if record["ratio"] < 1
    ]
    print(f"slower than torch: {', '.join(slower) or 'none'}")


def write(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(result))


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured", file=sys.stderr)
        return 3
    if ops.NATIVE.cuda_library is None:
        print(f"no CUDA kernels: {ops.NATIVE.cuda_reason}", file=sys.stderr)
        return 1
    path, *words = sys.argv[1:]
    return 0 if run(None if path == "-" else Path(path), words) else 1


if __name__ == "__main__":
    sys.exit(main())
