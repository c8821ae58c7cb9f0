import json
import os
from pathlib import Path

import pytest

from codec.ledger import Ledger, run_jobs


def square(x: int, folder: Path) -> list[dict]:
    """A job that takes its process with it at 3, and counts how often it was begun."""
    with open(folder / f"{x}", "a") as file:
        file.write("x")
    if x == 3:
        os._exit(1)
    return [{"stage": "decode", "system": "s", "key": str(x), "n_bytes": x * x, "error": ""}]


def whole(*job) -> list[tuple]:
    return [job]


def died(x: int, folder: Path) -> list[dict]:
    return [{"stage": "decode", "system": "s", "key": str(x), "n_bytes": 0, "error": "the process died"}]


def test_a_job_that_kills_its_process_is_recorded_and_the_others_are_done(tmp_path):
    ledger = Ledger(tmp_path / "cache" / "done.jsonl")
    run_jobs(square, whole, died, [(x, tmp_path) for x in range(8)], ledger, 2, "test")
    again = Ledger(tmp_path / "cache" / "done.jsonl")
    rows = {key: again.get("decode", "s", str(key)) for key in range(8)}
    assert rows[3]["error"] == "the process died"
    assert all(rows[x]["n_bytes"] == x * x and not rows[x]["error"] for x in range(8) if x != 3)
    assert len((tmp_path / "3").read_text()) == 2  # tried twice, the second time alone


def test_a_line_cut_off_by_a_kill_is_done_again_and_what_stood_before_is_kept(tmp_path):
    path = tmp_path / "done.jsonl"
    ledger = Ledger(path)
    ledger.add({"stage": "delay", "system": "s", "key": "", "delay": 3})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"stage": "delay", "system": "t", "ke')
    again = Ledger(path)
    assert again.get("delay", "s")["delay"] == 3 and again.get("delay", "t") is None
    again.add({"stage": "delay", "system": "t", "key": "", "delay": 5})
    assert [json.loads(line)["delay"] for line in path.read_text().splitlines()] == [3, 5]


def test_new_metrics_join_those_of_before_unless_the_delay_is_another(tmp_path):
    ledger = Ledger(tmp_path / "done.jsonl")
    row = {"stage": "measure", "system": "s", "key": "k", "delay": 0, "values": {}, "undefined": {}, "failed": {}, "how": {}}
    ledger.add(row | {"values": {"a": 1.0}, "failed": {"c": "why"}})
    ledger.add(row | {"values": {"b": 2.0, "d": 4.0}})
    ledger.add(row | {"undefined": {"d": "silent"}, "how": {"d": "x"}})
    for each in (ledger, Ledger(tmp_path / "done.jsonl")):
        assert each.get("measure", "s", "k")["values"] == {"a": 1.0, "b": 2.0}
        assert each.get("measure", "s", "k")["failed"] == {"c": "why"}
        assert each.get("measure", "s", "k")["undefined"] == {"d": "silent"}
        assert each.get("measure", "s", "k")["how"] == {"d": "x"}
    ledger.add(row | {"delay": 7, "values": {"a": 9.0}})
    assert ledger.get("measure", "s", "k")["values"] == {"a": 9.0}


def raises(x: int, folder: Path) -> list[dict]:
    """A job that is wrong for every recording."""
    (folder / f"{x}").touch()
    raise ValueError("no such model")


def parts(x: int, folder: Path) -> list[tuple]:
    return [(x, folder), (10 * x, folder)]


def test_an_error_of_a_job_ends_the_work_at_once(tmp_path):
    with pytest.raises(ValueError, match="no such model"):
        jobs = [(x, tmp_path) for x in range(50)]
        run_jobs(raises, whole, died, jobs, Ledger(tmp_path / "done.jsonl"), 1, "test")
    assert len(list(tmp_path.glob("[0-9]*"))) < 10  # what the pool had taken up already


def test_of_a_job_that_dies_only_the_part_that_kills_is_lost(tmp_path):
    ledger = Ledger(tmp_path / "done.jsonl")
    run_jobs(square, parts, died, [(3, tmp_path)], ledger, 2, "test")
    assert ledger.get("decode", "s", "3")["error"] == "the process died"
    assert ledger.get("decode", "s", "30")["n_bytes"] == 900
