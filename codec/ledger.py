"""Long work in small jobs: worker processes, and a file of what is done, so that a kill loses only what was under way."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
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
            row = row | {kind: old[kind] | row[kind] for kind in ("values", "undefined", "failed")}
        self.rows[name] = row


Rows = Callable[..., list[dict]]


def run_jobs(function: Rows, dead: Rows, jobs: list[tuple], ledger: Ledger, n_workers: int, title: str) -> None:
    """`function(*job)` in processes of one torch thread; its rows go to the ledger as they come.

    Args:
        dead: `dead(*job)` are the rows of a job that takes its process with it, as a crash in a metric's C code does; it was
            tried twice, the second time alone.
    """
    bar = tqdm(total=len(jobs), desc=title, unit="job", disable=not jobs)
    while jobs:
        left = _run_pool(function, jobs, n_workers, ledger, bar)
        for job in left[:n_workers]:  # a pool hands out jobs in order: it was one of these
            if _run_pool(function, [job], 1, ledger, bar):
                for row in dead(*job):
                    ledger.add(row)
                bar.update()
        jobs = left[n_workers:]
    bar.close()


def _run_pool(function: Callable, jobs: list[tuple], n_workers: int, ledger: Ledger, bar: tqdm) -> list[tuple]:
    """Run jobs; those that were not done because a process died, in order."""
    done: set[int] = set()
    context = get_context("spawn")  # forking a process whose torch has threads can hang
    with ProcessPoolExecutor(min(n_workers, len(jobs)), context, torch.set_num_threads, (1,)) as pool:
        futures: dict[Future, int] = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            try:
                rows = future.result()
            except BrokenProcessPool:
                continue
            for row in rows:
                ledger.add(row)
            done.add(futures[future])
            bar.update()
    return [job for number, job in enumerate(jobs) if number not in done]
