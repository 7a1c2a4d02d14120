"""What a stage is given to work with. Stages of every room take this context and write one shard directory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from cluster import storage
from operators import shards
from operators.config import Settings, SettingsError
from operators.ledger import Equation, Ledger


class Progress(Protocol):
    """Told how far a stage is. `note` is a short phrase such as `units` or `replies`."""

    def __call__(self, done: int, total: int, note: str) -> None: ...


class Measured(Protocol):
    """Told what a stage measures while it runs, for those who watch: `tokens_per_second`; with `step` a point of a curve."""

    def __call__(self, numbers: dict[str, Any], step: int | None = None) -> None: ...


class Cancelled(RuntimeError):
    """The user stopped the run; whatever was committed stays."""


@dataclass
class StageContext:
    """Where a stage reads, writes and reports.

    `inputs` maps the names of input stages to their finished shard directories. `services` hands out what stages share
    (a generation engine, a group of training workers), by key.
    """

    stage: str
    kind: str
    directory: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    limit: int | None = None
    workers: int = 2
    cache_directory: str = ""  # for things made once per machine, such as converted model weights
    base_directory: str = "."  # what relative paths of the recipe are relative to
    progress: Progress = lambda done, total, note: None
    measured: Measured = lambda numbers, step=None: None
    log: Callable[[str], None] = lambda line: None
    event: Callable[[str, dict[str, Any]], None] = lambda message, facts: None  # for the run's log: what happened, plain values
    cancelled: threading.Event = field(default_factory=threading.Event)
    services: dict[str, Any] = field(default_factory=dict)
    status: Callable[[str], str] = lambda name: "done"  # of an input stage: running, done, failed or pending

    def path(self, written: str) -> str:
        """A path of the recipe as an absolute path or URI."""
        return storage.absolute(written, self.base_directory)

    def model_of(self, stage: str) -> str:
        """The path of the model that an input stage made."""
        directory = self.inputs[stage]
        files = shards.load_manifest(directory).files
        if "model" not in files:
            raise SettingsError(f"stage {self.stage}: stage {stage!r} makes no model (it makes {sorted(files)})")
        return shards.output(directory, files["model"])

    def follow(self, names: Sequence[str]) -> Iterator[shards.Part | None]:
        """Parts of input stages in order; None where the next one is not committed yet (see shards.follow).

        Raises Cancelled when an input stops or fails before its end, or the user stops the run.
        """
        ordinal = 0
        for name in names:

            def waiting(name: str = name) -> None:
                self.check_cancelled()
                if self.status(name) in ("failed", "pending"):
                    raise Cancelled(f"stage {self.stage}: its input {name!r} did not finish")

            for part in shards.follow(self.inputs[name], waiting, ordinal):
                if part is not None:
                    ordinal = part.first_ordinal + part.rows
                yield part

    def check_cancelled(self) -> None:
        """Raises Cancelled once the user has asked to stop."""
        if self.cancelled.is_set():
            raise Cancelled(f"stage {self.stage} was stopped")

    def finish(
        self,
        *,
        ledger: Ledger | None = None,
        stats: dict[str, Any] | None = None,
        equations: Sequence[Equation] = (),
        view: list[dict[str, Any]] | None = None,
        files: dict[str, Any] | None = None,
        timings: dict[str, Any] | None = None,
    ) -> shards.Manifest:
        """Write the manifest (see shards.finish)."""
        return shards.finish(
            self.directory, stage=self.stage, kind=self.kind, fingerprint=self.fingerprint, config=self.config,
            inputs={name: shards.relative_to_run(self.directory, path) for name, path in self.inputs.items()},
            ledger=ledger, stats=stats, equations=equations, view=view, files=files, timings=timings,
        )  # fmt: skip


class Stage(Settings):
    """Base of what a recipe's stage may be: a typed configuration with a `run`. The docstring is its documentation.

    Subclasses set `kind: Literal["..."]`, bump `version` whenever the same settings give another result, and declare
    which shared resource they want: `cpu` (Ray tasks), `generate` (the vLLM engine), `train` (the training
    worker group).
    """

    version: ClassVar[int] = 1
    resource: ClassVar[str] = "cpu"
    # Settings that cannot change the result, so not in the fingerprint; `a.b` is one within another.
    operational: ClassVar[frozenset[str]] = frozenset()

    follows: ClassVar[bool] = False  # reads its inputs by `context.follow`, so it may start while they are still running

    kind: str

    def validate_deep(self) -> None:
        """Checks that need more than the settings' types (importing an operator, say). Raises SettingsError."""

    def preflight(self, base_directory: str) -> None:
        """A quick look at the input before anything starts. Raises SettingsError, FileNotFoundError."""

    def input_names(self) -> list[str]:
        """The stages whose directories this one reads."""
        return []

    def needs_ray(self) -> bool:
        """False for a stage that runs in the driver alone; where all stages left to do are such, no Ray is started."""
        return True

    def files(self) -> list[str]:
        """Paths or globs outside the run that the result depends on, as written in the recipe."""
        return []

    def files_at(self, base_directory: str) -> list[str]:
        """As `files`, for a stage whose files name further files, which can only be found from where paths are relative to."""
        return self.files()

    def refusal(self, directory: str) -> str | None:
        """Why what this stage has made may not be used, if so: it counts as failed then, and what it made stays.

        Asked whenever the stage has ended or is found finished, so an operational setting (a bound, say) can decide it.
        """
        return None

    def run(self, context: StageContext) -> None:
        """Write `context.directory` and end with `context.finish(...)`. Called again after a crash, it goes on."""
        raise NotImplementedError
