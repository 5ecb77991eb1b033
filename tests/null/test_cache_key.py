"""What Inductor's cache key contains: the plan, every file of passes and kernels, and the pass of the user."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from rana_fx._backend import _PostGrad
from rana_fx.kernels import reference
from rana_fx.passes import runner


def made(digest, inner=None):
    plan = SimpleNamespace(digest=lambda: digest)
    return _PostGrad(SimpleNamespace(matches=SimpleNamespace(attachments=[SimpleNamespace(plan=plan)])), inner)


class Users(CustomGraphPass):
    def __init__(self, key):
        self.key, self.graphs = key, []

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        return self.key


def test_every_source_is_hashed(monkeypatch):
    hashed = []
    monkeypatch.setattr(runner, "get_hash_for_files", lambda files: hashed.extend(files) or b"key")
    assert runner.sources_hash.__wrapped__() == b"key"
    folders = [Path(module.__file__).resolve().parent for module in (runner, reference)]
    sources = {str(path) for folder in folders for path in folder.rglob("*.py")}
    assert len(sources) > 30 and set(hashed) == sources


def test_another_plan_is_another_key():
    assert made("a").uuid() == made("a").uuid() != made("b").uuid()


def test_the_users_pass_runs_and_is_part_of_the_key():
    users = Users("one")
    assert made("a", users).uuid() == made("a", Users("one")).uuid() != made("a", Users("two")).uuid()
    assert made("a", Users(None)).uuid() is None
    graph = fx.Graph()
    made("a", users)(graph)
    assert users.graphs == [graph]
