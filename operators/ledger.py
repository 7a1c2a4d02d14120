"""The account of rows: rows in + rows created = rows kept + rejected + quarantined (+ forgotten), checked at commit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class LedgerError(RuntimeError):
    """Rows were lost or invented: a defect of the stage, never of the data."""


@dataclass
class Ledger:
    """Counts of rows. `rejected` is keyed by `operator:reason`; `quarantined` rows could not be read or crashed their reader;
    `forgotten` rows were taken down (`danlu forget`), after the stage had written them or when it read them again."""

    rows_in: int = 0
    created: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    quarantined: int = 0
    forgotten: int = 0

    def add(self, other: Ledger) -> None:
        self.rows_in += other.rows_in
        self.created += other.created
        self.kept += other.kept
        self.rejected.update(other.rejected)
        self.quarantined += other.quarantined
        self.forgotten += other.forgotten

    def check(self, where: str) -> None:
        """Raises LedgerError, with both sides of the equation, when the account does not balance."""
        left, right = self.rows_in + self.created, self.kept + self.rejected.total() + self.quarantined + self.forgotten
        if left != right:
            forgotten = f" + forgotten {self.forgotten}" if self.forgotten else ""
            raise LedgerError(
                f"{where}: the ledger does not balance: in {self.rows_in} + created {self.created} = {left}, but "
                f"kept {self.kept} + rejected {self.rejected.total()} + quarantined {self.quarantined}{forgotten} = {right}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "in": self.rows_in,
            "created": self.created,
            "kept": self.kept,
            "rejected": dict(sorted(self.rejected.items())),
            "quarantined": self.quarantined,
            **({"forgotten": self.forgotten} if self.forgotten else {}),  # what was never taken down has no such account
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        return cls(
            data["in"], data["created"], data["kept"], Counter(data["rejected"]), data["quarantined"], data.get("forgotten", 0)
        )


@dataclass(frozen=True)
class Equation:
    """A balance other than rows, such as `tokens in = tokens packed + tokens cut`: both sides as named terms."""

    name: str
    left: dict[str, int]
    right: dict[str, int]

    def check(self, where: str) -> None:
        """Raises LedgerError when the sides differ."""
        if sum(self.left.values()) != sum(self.right.values()):
            raise LedgerError(f"{where}: {self.name} does not balance: {self.left} against {self.right}")


def merge_stats(into: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Add the statistics of one unit to a total: numbers add, mappings merge, lists extend up to 16 items (examples)."""
    for key, value in other.items():
        if isinstance(value, Mapping):
            merge_stats(into.setdefault(key, {}), value)
        elif isinstance(value, list):
            into[key] = (into.get(key, []) + value)[:16]
        elif isinstance(value, int | float):
            into[key] = into.get(key, 0) + value
        else:
            into[key] = value
    return into
