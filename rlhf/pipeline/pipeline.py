"""The order of the steps, and the report at their end."""

from __future__ import annotations

from rich.console import Console

from rlhf import distributed
from rlhf.config import RunConfig
from rlhf.evaluation import RunReport, write_report
from rlhf.pipeline.ppo import train_ppo
from rlhf.pipeline.supervised import train_dpo, train_reward, train_sft
from rlhf.pipeline.workspace import Workspace


class Pipeline:
    """One run: each step reads what it needs from disk and leaves its model in `output_dir`."""

    def __init__(
        self, config: RunConfig, console: Console | None = None, *, resume: bool = False
    ) -> None:
        self._workspace = Workspace(config, console, resume=resume)

    @property
    def report(self) -> RunReport:
        """What the steps have found so far."""
        return self._workspace.report

    def run(self) -> RunReport:
        """All three steps, then the report."""
        self._workspace.progress.begin("sft", "reward", "ppo")
        for name, step in (("sft", self.sft), ("reward", self.reward)):
            if not self._workspace.restore(name):
                step()
        self.ppo()
        return self.finish()

    def sft(self) -> None:
        train_sft(self._workspace)

    def reward(self) -> None:
        train_reward(self._workspace)

    def ppo(self) -> None:
        train_ppo(self._workspace)

    def dpo(self) -> None:
        train_dpo(self._workspace)

    def finish(self, name: str = "report") -> RunReport:
        """Write and print the report on the steps that were run."""
        workspace, report = self._workspace, self.report
        report.seconds |= workspace.watch.seconds
        distributed.decided_by_first(
            lambda: write_report(report, workspace.folder, workspace.console, name=name)
        )
        if report.after and not report.dpo:  # now PPO too has nothing left to resume
            workspace.end("ppo")
        return report
