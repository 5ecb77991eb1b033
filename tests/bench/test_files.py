"""Files of benches: links and FIFOs stay what they are."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest

from bench.common.record import append, start
from bench.common.result_store import ResultStore, whole_rows


def test_rows_go_through_links(tmp_path):
    (tmp_path / "real.jsonl").write_text("old\n")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    start(tmp_path / "link.jsonl")
    append(tmp_path / "link.jsonl", {"a": 1})
    with (tmp_path / "real.jsonl").open("a") as file:
        file.write('{"cut')
    assert whole_rows(tmp_path / "link.jsonl") == [{"a": 1}]
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "real.jsonl").read_text() == '{"a": 1}\n'


def test_rows_go_into_a_fifo(tmp_path):
    path, got = tmp_path / "fifo", []
    os.mkfifo(path)
    start(path)
    ledger = ResultStore(path, {"commit": "c"})
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    ledger.add("stage", {"seed": 1}, {"loss": 2.0})
    reader.join()
    assert json.loads(got[0])["loss"] == 2.0 and stat.S_ISFIFO(path.stat().st_mode)


def test_a_folder_is_refused_at_once(tmp_path):
    with pytest.raises(IsADirectoryError):
        start(tmp_path)


def test_a_figure_goes_through_a_link(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from bench.common.figure import save_figure

    figure, _ = plt.subplots()
    (tmp_path / "link.png").symlink_to("real.png")
    save_figure(figure, tmp_path / "link.png", dpi=20)
    plt.close(figure)
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")
