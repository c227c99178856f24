"""A run directory: where each file is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from privgrad.privacy.ledger import has_begun


@dataclass(frozen=True)
class Layout:
    """The files of one run, by what they are."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def plan(self) -> Path:
        return self.directory / "plan.json"

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger.jsonl"

    @property
    def model(self) -> Path:
        return self.directory / "model.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint" / "latest.safetensors"

    @property
    def metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def certificate(self) -> Path:
        return self.directory / "certificate.json"

    @property
    def markdown(self) -> Path:
        return self.directory / "certificate.md"

    @property
    def page(self) -> Path:
        return self.directory / "certificate.html"

    @property
    def results(self) -> tuple[Path, ...]:
        """What only a finished run holds."""
        return self.model, self.certificate, self.markdown, self.page

    @property
    def begun(self) -> bool:
        """True where a run has begun: its ledger has a first line, and can be resumed. Otherwise nothing was charged here."""
        return has_begun(self.ledger)
