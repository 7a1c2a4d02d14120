"""How a takedown becomes whole: all new files are written first, then one record of what is to be put in their place.

Until that record is there nothing has changed; from then on it is carried out, by whoever opens the run next (`danlu forget`,
`danlu run`, `danlu clean`), again from its start if need be: every step may be repeated. The takedown is recorded as done
(operators.tombstones) only after the last old file is gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cluster import storage
from operators import tombstones

STAGING = ".forget"
_PENDING = "pending.json"


def pending(run_directory: str) -> dict[str, Any] | None:
    """The takedown that was begun and is not finished, if there is one."""
    path = _path(run_directory)
    return dict(json.loads(storage.read_bytes(path))) if storage.exists(path) else None


def commit(run_directory: str, record: dict[str, Any]) -> None:
    """From here on the takedown goes through, whatever happens to this process."""
    storage.write_bytes(_path(run_directory), json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def finish(run_directory: str, check: Callable[[], None]) -> dict[str, Any] | None:
    """Carry out the pending takedown; its record, None where there is none. The caller holds the run.

    `check` is called before every step and raises where the run was lost to another holder.
    """
    record = pending(run_directory)
    if record is None:
        check()
        storage.delete(storage.join(run_directory, STAGING))  # of one that never came to its record
        return None
    for staged, target in record["swaps"]:
        check()
        _put(storage.join(run_directory, staged), storage.join(run_directory, target))
    for relative in [*record["resets"], *record["deletes"]]:
        check()
        for first in ("manifest.json", "units") if relative in record["resets"] else ():
            storage.delete(
                storage.join(run_directory, relative, first)
            )  # what a kill leaves is unfinished, not finished with holes
        storage.delete(storage.join(run_directory, relative))
    check()
    done = {**record["takedown"], "files_rewritten": len(record["swaps"]), "files_deleted": len(record["deletes"])}
    path = storage.join(run_directory, tombstones.FOLDER, f"{record['number']:08d}.json")
    storage.write_bytes(path, json.dumps(done, indent=1, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"))
    storage.delete(_path(run_directory))
    storage.delete(storage.join(run_directory, STAGING))
    return done


def _put(staged: str, target: str) -> None:
    """A local file is moved, so that one that is not there any more has arrived; an object is copied each time."""
    if storage.is_remote(staged):
        storage.copy(staged, target)
    elif storage.exists(staged):
        storage.publish(str(storage.local_path(staged)), target)


def _path(run_directory: str) -> str:
    return storage.join(run_directory, tombstones.FOLDER, _PENDING)
