"""The gallery: headings, questions, budgets and an opening with numbers of the claims."""

import json

import pandas as pd

from moejax.reproduce.experiment import load_experiments
from moejax.reproduce.gallery import budgets, write_gallery

EXPERIMENT = '''"""{question} More words."""

from moejax.reproduce import Experiment

EXPERIMENT = Experiment(part="{part}", place={place}, spec="sweeps/one.toml", figure=lambda table: None)
'''


def test_budgets_tell_what_varies_within_a_method():
    table = pd.DataFrame(
        {
            "method": ["a", "a", "a", "a", "b", "b"],
            "num_starts": [1, 1, 6, 6, 1, 1],
            "max_iterations": [100] * 6,
            "num_iterations": [10, 20, 90, 110, 7, 8],
        }
    )
    assert budgets(table).endswith("pilots: a 15 (1 start), 100 (6 starts); b 8.")
    assert budgets(table.drop(columns="num_iterations")) == ""


def results_of(root, name, text, numbers):
    folder = root / "results" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(
        json.dumps({"quick": False, "command": f"moejax reproduce {name}"}), encoding="utf-8"
    )
    claims = {"text": text, "numbers": {key: {"text": value} for key, value in numbers.items()}}
    (folder / "claims.json").write_text(json.dumps(claims), encoding="utf-8")
    (folder / "table.csv").write_text("x\n1\n", encoding="utf-8")


def test_the_gallery_is_in_the_order_of_its_headings_and_opens_with_numbers(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "one.toml").write_text("", encoding="utf-8")
    for name, part, place in (("late", "b. Second", 0), ("early", "a. First", 1), ("first", "a. First", 0)):
        source = EXPERIMENT.format(question=f"Is it {name}?", part=part, place=place)
        (tmp_path / "experiments" / f"{name}.py").write_text(source, encoding="utf-8")
        results_of(tmp_path, name, f"It is {name}.", {"share": f"5 {name}"})
    opening = tmp_path / "opening.md"
    opening.write_text("It has {early/share}.\n\nThis lacks {early/other}.\n", encoding="utf-8")
    write_gallery(tmp_path / "results", load_experiments(tmp_path), opening)
    text = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.startswith(("#", "*"))]
    assert lines == [
        "# Results",
        "## a. First",
        "### first",
        "*Is it first?*",
        "### early",
        "*Is it early?*",
        "## b. Second",
        "### late",
        "*Is it late?*",
    ]
    assert "It has 5 early." in text
    assert "This lacks" not in text
