"""The Python of README runs on the first layer of the embedded model. Its commands: tests/docs/test_snippets.py.

The Python takes some fifteen seconds: it is run as it stands, with the default recipe and a search for a target.
"""

from __future__ import annotations

import re
from pathlib import Path

import rana_fx
from rana_fx.evaluation.text import load_texts
from rana_fx.runtime.attachment import attached
from tests.cli.test_cli import TEXT, model  # noqa: F401 - a fixture
from tests.golden.interface import without_inductor

README = (Path(rana_fx.__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_python_of_readme_runs(model, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    # compiled code is tested elsewhere: graphs run eagerly
    monkeypatch.setattr("rana_fx.runtime.disabling._dense", lambda graph_module, _: graph_module.forward)
    # a search of few budgets
    monkeypatch.setattr("rana_fx.targets.STEP", 0.2)
    texts = [text[start : start + 100] for text in load_texts(TEXT)[:4] for start in range(0, 800, 100)]
    names = {"path": str(model), "texts": texts}
    assert len(SNIPPETS) == 2
    with without_inductor():
        for snippet in SNIPPETS:
            exec(snippet, names)
            assert attached(names["model"]).plan is names["plan"]
            rana_fx.detach(names["model"])
    assert names["dense"].shape[-1] == 4096
    assert (tmp_path / "plan" / "plan.json").exists()
    # the second one: a target, and what was measured
    assert names["plan"].curve.promise.limit == 0.02 and "promised KL divergence" in capsys.readouterr().out
