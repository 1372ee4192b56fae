"""What all services' metrics share: a registry, labels that stay few, and one exposition for several processes.

One process keeps its metrics in memory. Several processes of one pod (`SENTINEL_WORKERS` above 1) keep them in
mapped files of one folder, from which any of them answers a scrape for all. The reasons: docs/decisions/0005-metrics.md
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
OTHER: Final = "other"

_FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_LIVE_GAUGE: Final = re.compile(r"gauge_live\w*_(\d+)\.db")


def new_registry() -> CollectorRegistry:
    """A registry with the process's own figures (CPU, memory, open files) and no `_created` series."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped in the library
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@contextmanager
def metrics_of_several_processes(environ: MutableMapping[str, str]) -> Iterator[Path]:
    """For the parent of several processes: within it, those that are spawned share their metrics.

    The library reads the variable when it is imported, so the children have to be spawned, never forked.
    """
    folder = Path(tempfile.mkdtemp(prefix="sentinel-metrics-"))
    environ[_FOLDER_VARIABLE] = str(folder)
    try:
        yield folder
    finally:
        del environ[_FOLDER_VARIABLE]
        shutil.rmtree(folder, ignore_errors=True)


def exposition(registry: CollectorRegistry, environ: Mapping[str, str]) -> bytes:
    """The answer to a scrape, of type `CONTENT_TYPE`: of `registry`, or of all processes that share a folder.

    Counters of processes that have ended still count, as Prometheus expects; their `live...` gauges do not.
    """
    folder = environ.get(_FOLDER_VARIABLE)
    if not folder:
        return generate_latest(registry)
    for pid in _ended(Path(folder)):
        mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # untyped in the library
    together = CollectorRegistry()
    MultiProcessCollector(together, folder)  # type: ignore[no-untyped-call]  # untyped in the library
    return generate_latest(together)


class BoundedLabel:
    """A label's values: the known ones as they are, everything else `other`.

    What clients send must be `known` first (from a data file, or learnt from the upstream's own list): the first
    comers among random names would otherwise keep the real ones out.
    """

    def __init__(self, known: Iterable[str] = (), *, most: int = 200) -> None:
        self._known: set[str] = set()
        self._most = most
        self.learn(known)

    def learn(self, values: Iterable[str]) -> None:
        """Makes values known until there are `most`."""
        for value in values:
            if len(self._known) >= self._most:
                return
            self._known.add(value)

    def __call__(self, value: str) -> str:
        return value if value in self._known else OTHER


def _ended(folder: Path) -> set[int]:
    pids = {int(found[1]) for path in folder.iterdir() if (found := _LIVE_GAUGE.fullmatch(path.name))}
    return {pid for pid in pids if not _runs(pid)}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
