"""Inductor's cache key contains the plan and the user's pass, which also runs (sources: test_sources.py)."""

from __future__ import annotations

from types import SimpleNamespace

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from rana_fx import _backend
from rana_fx._backend import _PostGrad


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


def test_another_plan_is_another_key():
    assert made("a").uuid() == made("a").uuid() != made("b").uuid()


def test_the_users_pass_runs_and_is_part_of_the_key(monkeypatch):
    users = Users("one")
    assert made("a", users).uuid() == made("a", Users("one")).uuid() != made("a", Users("two")).uuid()
    assert made("a", Users(None)).uuid() is None
    graph = fx.Graph()
    monkeypatch.setattr(_backend, "run_post_grad", lambda result, graph: None)
    made("a", users)(graph)
    assert users.graphs == [graph]
