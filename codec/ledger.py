"""Long work in small jobs: worker processes, and a file of what is done, so that a kill loses only what was under way."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from codec.files import write_atomically

Key = tuple[str, str, str]  # stage, system, recording


class Ledger:
    """A JSONL file of finished work: objects with "stage", "system" and "key" (of the recording, or "")."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[Key, dict] = {}
        whole = path.read_bytes() if path.exists() else b""
        keep = whole.rfind(b"\n") + 1  # a line that was cut off is done again
        for line in whole[:keep].splitlines():
            self._merge(json.loads(line))
        if keep < len(whole):
            write_atomically(path, whole[:keep])
        self.file = open(path, "a", encoding="utf-8")

    def add(self, row: dict) -> None:
        """Keep a row and write it."""
        self._merge(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def get(self, stage: str, system: str, key: str = "") -> dict | None:
        return self.rows.get((stage, system, key))

    def _merge(self, row: dict) -> None:
        """A later row replaces an earlier one; a measurement adds its metrics, unless it was made at another delay."""
        name = (row["stage"], row["system"], row["key"])
        old = self.rows.get(name, {})
        if row["stage"] == "measure" and old.get("delay") == row["delay"]:
            new = {*row["values"], *row["undefined"], *row["failed"]}
            for kind in ("values", "undefined", "failed", "how"):
                row = row | {kind: {key: value for key, value in old[kind].items() if key not in new} | row[kind]}
        self.rows[name] = row


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
Rows = Callable[..., list[dict]]


def run_jobs(
    function: Rows, split: Callable[..., list[tuple]], dead: Rows, jobs: list[tuple], ledger: Ledger, n_workers: int, title: str
) -> None:
    """`function(*job)` in processes of one thread; its rows go to the ledger as they come.

    Args:
        n_workers: 0: in this process, where a job that takes its process with it ends everything.
        split: `split(*job)` are the parts of a job that took its process with it, as a crash in a metric's C code does.
        dead: `dead(*part)` are the rows of a part that did so alone.
    Raises:
        what `function` raises; jobs that have not begun are left.
    """
    os.environ |= dict.fromkeys(THREADS, "1")  # of the workers: those of torch and NumPy would fight over the cores
    bar = tqdm(total=len(jobs), desc=title, unit="job", disable=not jobs)
    while jobs:
        left = _run_pool(function, jobs, n_workers, ledger, bar)
        for job in left[:n_workers]:  # a pool hands out jobs in order: it was one of these
            for part in split(*job):
                if _run_pool(function, [part], 1, ledger):
                    for row in dead(*part):
                        ledger.add(row)
            bar.update()
        jobs = left[n_workers:]
    bar.close()


def _run_pool(
    function: Callable, jobs: list[tuple], n_workers: int, ledger: Ledger, bar: tqdm | None = None
) -> list[tuple]:
    """Run jobs; those that were not done because a process died, in order."""
    if n_workers == 0:
        for job in jobs:
            for row in function(*job):
                ledger.add(row)
            if bar:
                bar.update()
        return []
    done: set[int] = set()
    context = get_context("spawn")  # forking a process whose torch has threads can hang
    with ProcessPoolExecutor(min(n_workers, len(jobs)), context) as pool:
        futures: dict[Future, int] = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                with contextlib.suppress(BrokenProcessPool):
                    for row in future.result():
                        ledger.add(row)
                    done.add(futures[future])
                    if bar:
                        bar.update()
        except BaseException:  # Ctrl-C, or what no later job would do better
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [job for number, job in enumerate(jobs) if number not in done]
