"""Moved modules are imported under their old names, with a warning that gives the new name; no module exists twice."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest

from rana_fx._moved import MOVED, RENAMED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_name_warns_and_gives_the_new_modules_content(old):
    sys.modules.pop(f"rana_fx.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"rana_fx\.{old} moved to rana_fx\.{MOVED[old]}; the old name goes"):
        alias = importlib.import_module(f"rana_fx.{old}")
    new = importlib.import_module(f"rana_fx.{MOVED[old]}")
    names = [name for name in vars(new) if not name.startswith("__") and f"{old}.{name}" not in RENAMED]
    assert names
    assert all(getattr(alias, name) is getattr(new, name) for name in names)


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_renamed_attributes_are_found_under_their_old_names(old):
    module, _, name = old.rpartition(".")
    new_module, _, new_name = RENAMED[old].rpartition(".")
    sys.modules.pop(f"rana_fx.{module}", None)
    with pytest.warns(DeprecationWarning):
        alias = importlib.import_module(f"rana_fx.{module}")
    assert getattr(alias, name) is getattr(importlib.import_module(f"rana_fx.{new_module}"), new_name)


def test_what_is_gone_says_where_to_look():
    with pytest.warns(DeprecationWarning):
        sys.modules.pop("rana_fx.sites", None)
        alias = importlib.import_module("rana_fx.sites")
    with pytest.raises(AttributeError, match=r"rana_fx\.sites\.nothing is gone: rana_fx\.sites is rana_fx\.graph\.linears now"):
        alias.nothing  # noqa: B018


def test_names_that_never_were_are_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rana_fx.nothing_of_this_name")


@pytest.mark.filterwarnings("ignore:rana_fx.attachment moved:DeprecationWarning")
def test_pickles_by_an_old_name_load():
    """A model pickled before the move names rana_fx.attachment.Factors."""
    found = pickle.loads(b"crana_fx.attachment\nFactors\n.")
    from rana_fx.runtime.attachment import Factors

    assert found is Factors
