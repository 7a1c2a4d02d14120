"""What happened in a run, as a table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from pipelines.report.accounts import accounts
from pipelines.report.excerpts import sentence, visible
from pipelines.report.figures import duration, number
from pipelines.report.lineage import outcome
from pipelines.report.spending import cost
from pipelines.report.training import summaries
from pipelines.report.view import RunView, StageView, load_run

_STYLES = {
    "done": "",
    "reused": "dim",
    "failed": "bold red",
    "missing": "bold red",
    "running": "yellow",
    "interrupted": "yellow",
    "pending": "dim",
}


def summary_table(run_directory: str) -> Table:
    """Stage, kind, rows in (with created ones), kept, rejected, quarantined, seconds and a note, a row a stage.

    Print it with `rich.print` or `Console().print`; it is plain text where the output is no terminal. Raises
    FileNotFoundError when the directory holds no run.json.
    """
    run = load_run(run_directory)
    rows = {account.stage.name: account for account in accounts(run)}
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("stage", "kind"):
        table.add_column(title, no_wrap=True)
    taken = [account for account in rows.values() if account.forgotten]  # no column where nothing was taken down
    for title in ("in", "kept", "rejected", "quarantined", *(["forgotten"] if taken else []), "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold", ratio=1)
    for stage in run.stages:
        account = rows.get(stage.name)
        counts = (
            ["–"] * (5 if taken else 4)
            if account is None
            else [number(n) for n in (account.left, account.kept, account.rejected, account.quarantined)]
            + ([number(account.forgotten)] if taken else [])
        )
        time = duration(stage.seconds) if stage.state in ("done", "failed", "running", "interrupted") else "–"
        cells = [stage.name, stage.kind, *counts, time, _note(stage, run)]
        table.add_row(*(Text(visible(cell), style=_STYLES.get(stage.state, "")) for cell in cells))
    return table


def _note(stage: StageView, run: RunView) -> str:
    """What came out, and the state where it is not simply `done`."""
    pieces = []
    if stage.state != "done":
        pieces.append(str(sentence(f"status.{stage.state}", 0)) if stage.state in _STYLES else stage.state)
    if stage.problem:
        pieces.append(stage.problem.strip().splitlines()[-1][:160])
    made = outcome(stage)
    if made is not None and made[0] != "lineage.rows":
        pieces.append(str(sentence(made[0], 0, n=number(made[1]))))
    if calls := stage.count("calls"):
        pieces.append(str(sentence("spending.brief", 0, n=number(calls), tokens=number(stage.count("completion_tokens")))))
        if price := cost(stage.timings):
            pieces.append(price)
    for row in summaries(run):
        if row.stage is stage and row.first_loss is not None:
            pieces.append(f"loss {number(row.first_loss)} → {number(row.last_loss)}")
    return ", ".join(pieces)
