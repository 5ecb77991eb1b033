"""Skips and notes: two types in memory, stored as one list of pairs on disk."""

from __future__ import annotations

import rana_fx
from rana_fx.plan import Plan
from rana_fx.skips import Note, Skip, entry, stored, typed

ENTRIES = (Skip("a", "too narrow"), Note("b", "spans 3 of 8 directions"), Note("", "text was short"), Skip("c", "dense"))


def plan(skips):
    return Plan("rana", "bytes", 0.3, 0, 10, "M", {}, (), (), skips)


def test_a_note_is_marked_on_disk_alone():
    assert [stored(one) for one in ENTRIES] == [
        {"site": "a", "reason": "too narrow"},
        {"site": "*b", "reason": "spans 3 of 8 directions"},
        {"site": "*", "reason": "text was short"},
        {"site": "c", "reason": "dense"},
    ]
    assert tuple(entry(**stored(one)) for one in ENTRIES) == ENTRIES


def test_a_recipe_that_marks_skips_itself_makes_notes():
    assert typed(Skip("*b", "text")) == Note("b", "text") == typed(Note("b", "text"))
    assert typed(Skip("b", "text")) == Skip("b", "text")


def test_a_plan_reads_them_apart_and_stores_them_in_order(tmp_path):
    made = plan(ENTRIES)
    assert made.left == (ENTRIES[0], ENTRIES[3])
    assert made.notes() == made.remarks() == ("text was short",) and made.notes("b") == ("spans 3 of 8 directions",)
    assert made.notes("a") == ()
    made.save(tmp_path)
    loaded = rana_fx.load_plan(tmp_path)
    assert loaded.skips == ENTRIES and loaded.digest() == made.digest()
    assert plan(ENTRIES[::-1]).digest() != made.digest()
