"""`rlhf bench`: tables, the record, plots, and why a peer was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.bench.measure import read_records
from rlhf.bench.models import step_models
from rlhf.bench.ops import on_cpu, on_gpu
from rlhf.bench.plain_loop import full_logprobs
from rlhf.bench.show import bar_names, plot_ops
from rlhf.bench.subject import Subject
from rlhf.cli.main import main
from rlhf.models import response_logprobs

SMALL = "--model tiny --device cpu --prompt 8 --new_tokens 8 --repeats 1"


def bench(what: str, options: str, *more: str) -> int:
    return main(["bench", what, *SMALL.split(), *options.split(), *more])


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.bench.measure.PROBE_BYTES", 1 << 24)


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--peers hf,ours,deepspeed-he --batch 1,2 --lengths both"
    assert bench("generate", options, "--output", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "not measured: deepspeed-he: its injected kernels are CUDA only" in shown
    assert "hf: transformers generate, eager, dynamic cache" in shown
    (record,) = read_records(tmp_path / "generate.jsonl")
    assert record["machine"]["commit"]
    assert set(record["peers"]) == {"hf", "ours"}
    assert record["machine"]["read_GBps"] > 0
    rows = record["rows"]
    cases = {(row["batch"], row["lengths"], row["peer"]) for row in rows}
    assert cases == {
        (b, n, p) for b in (1, 2) for n in ("fixed", "natural") for p in ("hf", "ours")
    }
    for row in rows:
        if row["lengths"] == "fixed":
            assert row["tokens_per_s"] == pytest.approx(8 * row["batch"] / row["seconds"])
            assert row["ms_per_step"] == pytest.approx(1e3 * row["seconds"] / 8)
        assert row["percent_of_peak"] == pytest.approx(
            100 * row["GBps"] / record["machine"]["read_GBps"]
        )
    ratios = {(row["batch"], row["lengths"]): row["ratio"] for row in rows if row["peer"] == "hf"}
    assert set(ratios.values()) == {1.0}
    assert (tmp_path / "generate.png").stat().st_size > 5000


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--peers hf,ours,trl --batch 2 --lengths both"
    assert bench("step", options, "--output", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "not measured: trl: TRL has no PPO trainer any more" in shown
    assert "PPO iteration, 8 + 8 tokens; ratio to hf" in shown
    (record,) = read_records(tmp_path / "step.jsonl")
    cases = [(row["lengths"], row["peer"], row["ratio"]) for row in record["rows"]]
    assert [case[:2] for case in cases] == [
        (lengths, peer) for lengths in ("fixed", "natural") for peer in ("hf", "ours")
    ]
    assert [ratio for *_, ratio in cases[::2]] == [1.0, 1.0]
    assert len(set(bar_names(record["rows"]))) == 4
    for row in record["rows"]:
        assert set(row["phases"]) == {"rollout", "score", "update_actor", "update_critic"}
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"], rel=0.5)
        assert sum(row[f"share_{phase}"] for phase in row["phases"]) == pytest.approx(100)
    assert record["rows"][1]["logprob_gap_max"] < 1e-4
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_memory(tmp_path: Path) -> None:
    assert bench("memory", "--peers ours --batch 4", "--output", str(tmp_path)) == 0
    ((row,),) = [record["rows"] for record in read_records(tmp_path / "memory.jsonl")]
    assert row["cache_GB"] == 4 * 16 * 2 * 4 * 2 * 32 * 4 / 1e9
    assert row["peak_GB"] > row["model_GB"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the ops of the GPU are measured")
def test_ops(tmp_path: Path) -> None:
    options = ["--filter", "add_rms_norm B1- D288 and fp32", "--output", str(tmp_path)]
    assert main(["bench", "ops", *options]) == 0
    record = json.loads((tmp_path / "ops.json").read_text())
    (case,) = record["cases"]
    assert case["name"] == "add_rms_norm-B1-D288-fp32"
    assert case["ratio"] == pytest.approx(case["baseline_us"] / case["ours_us"])
    assert record["commit"]
    assert (tmp_path / "ops.png").stat().st_size > 5000


def test_ops_have_a_plot_on_either_device(tmp_path: Path) -> None:
    """A case that failed has no ratio, and none of the plot."""
    cases = [{"name": "relu-B1", "ratio": 0.8}, {"name": "relu-B8", "failed": "error 1"}]
    for number, gpu in enumerate((None, "NVIDIA H100")):
        record = {"gpu": gpu, "processor": "one", "commit": "abc", "cases": cases}
        plot_ops(record, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000


def test_the_words_of_a_filter_are_all_wanted_on_either_device() -> None:
    record = Path("/tmp/ops.json")
    assert on_cpu(["rms", "B1"], record)[-4:] == ["-k", "rms and B1", "--record", str(record)]
    assert on_gpu(["rms", "B1"], None) == ["-m", "benchmarks.gpu.ops", "-", "rms", "B1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("lora", [[], ["--lora", "4"]], ids=["full", "lora"])
def test_an_iteration_on_a_gpu(tmp_path: Path, lora: list[str]) -> None:
    """Rollout, scoring and update of small models, with the GPU's kernels and graphs."""
    options = "step --model tiny --device cuda --prompt 16 --new_tokens 16 --repeats 1 --batch 4"
    peers = ["--peers", "hf,ours", "--lengths", "both", "--output", str(tmp_path)]
    assert main(["bench", *options.split(), *peers, *lora]) == 0
    (record,) = read_records(tmp_path / "step.jsonl")
    assert record["notes"] == {}
    assert len(record["rows"]) == 4
    assert all(row["logprob_gap_max"] < 0.1 for row in record["rows"] if row["peer"] == "ours")


def test_nothing_measured_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("generate", "--peers deepspeed-he --batch 1") == 2
    assert "nothing was measured: deepspeed-he" in capsys.readouterr().err


def test_full_logits_give_the_log_probs_of_the_fused_path(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 850, (3, 12), generator=generator)
    prompts, responses = torch.tensor([4, 7, 2]), torch.tensor([5, 2, 9])
    full = full_logprobs(subject.model, input_ids, prompts, responses)
    fused, _ = response_logprobs(subject.model, input_ids, prompts, responses, temperature=1.0)
    torch.testing.assert_close(full, fused, atol=1e-4, rtol=1e-4)


def test_a_critic_must_read_the_actors_tokens(subject: Subject) -> None:
    with pytest.raises(ValueError, match="vocabulary of 32000, the actor one of 850"):
        step_models(subject, "15M", stop=())
