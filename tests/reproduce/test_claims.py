"""Every number in a sentence of README.md and results/README.md names the file it comes from, and is what that file says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from moejax.reproduce.claims import Number, read_results, render
from moejax.reproduce.experiment import load_experiments

ROOT = Path(__file__).parents[2]
CLAIMS = sorted((ROOT / "results").glob("*/claims.json"))

NOT_MEASURED = [
    r"\b[258]0,000\b",  # sizes of the study of time
    r"\b10\^[68]\b",
    r"https?://\S+",
    r"`[^`]*`",  # code and commands
    r"\]\([^)]*\)",  # targets of links
    r"!\[[^\]]*\]",  # pictures' names
    r"Python 3\.\d+( or later)?",
    r"\b(ICML|arXiv|JASA) ?\d+",
    r"(?<![\d.])(19|20)\d\d\b",  # years
    r"\border[- ]\d( or \d)?",
    r"\b[dkRnσ](/d)? = [\d.]+(, [\d.]+)*( (and|or|to) [\d.]+)?",  # settings
    r"‖w‖ = [\d.]+",
    r"\b1/n\b|\bE\[l²\]",
    r"float(32|64)",
    r"error below 0\.02|error < 0\.02|error of 0\.02",  # what success means
    r"\bnorm \d+",
    r"starts? of norm \d+",
    r"\b\d+ (samples|random starts|x \d+-fold)",
    r"best of \d+",
    r"\b\d+ (inputs|experts)|[Ff]rom \d+ to \d+ experts",
    r"norms from [\d.]+ to [\d.]+|cosine of [\d.]+",
]
"""What is no result: settings of an experiment, definitions, names."""


def sentences(text: str) -> list[str]:
    """Sentences of a Markdown page; code blocks, indented code, tables and headings apart."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n|\n(?=- )", text)
    blocks = [block for block in blocks if not re.match(r"( {4}|#|\||!\[)", block.strip("\n"))]
    joined = [" ".join(block.split()) for block in blocks]
    # a link that follows a sentence belongs to it
    return [
        part
        for block in joined
        for part in re.split(r"(?<=[.!?])\s+(?=[A-Z`*])|(?<=\))\s+(?=[A-Z])", block)
        if part
    ]


def measured(sentence: str) -> str:
    """What is left of a sentence without settings, names and code."""
    for pattern in NOT_MEASURED:
        sentence = re.sub(pattern, " ", sentence)
    return sentence


def cited(sentence: str, page: Path) -> list[Path]:
    targets = re.findall(r"\]\(([^)]+claims\.json)\)", sentence)
    return [(page.parent / target).resolve() for target in targets]


def pages() -> list[Path]:
    return [page for page in (ROOT / "README.md", ROOT / "results" / "README.md") if page.is_file()]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_number_names_its_file_and_is_what_the_file_says(page):
    for sentence in sentences(page.read_text(encoding="utf-8")):
        if sentence.startswith("Budget,"):
            check_budget(sentence, page)
            continue
        rest = measured(sentence)
        numbers = re.findall(r"\d[\d.,]*(?:e-?\d+)?", rest)
        if not numbers:
            continue
        files = cited(sentence, page)
        assert files, f"{page.name}: no file is named for the numbers {numbers} in: {sentence}"
        said = " ".join(
            number["text"] for file in files for number in json.loads(file.read_text())["numbers"].values()
        )
        known = set(re.findall(r"\d[\d.,]*(?:e-?\d+)?", said))
        for number in numbers:
            assert number.rstrip(".,") in known, f"{page.name}: {number} is not in {files}: {sentence}"


def check_budget(sentence: str, page: Path) -> None:
    """Mean passes, recomputed from the table that the sentence names."""
    (target,) = re.findall(r"\]\(([^)]+table\.csv)\)", sentence)
    table = pd.read_csv(page.parent / target)
    columns = {"expert step": "expert_steps", "iteration": "max_iterations", "start": "num_starts"}
    assert f"(up to {table['trial'].nunique()} in a cell)" in sentence
    told = sentence.split(": ", 1)[1].split(". [", maxsplit=1)[0].split("; ")
    assert [part.split()[0] for part in told] == list(dict.fromkeys(table["method"].dropna()))
    for part in told:
        method, rest = part.split(" ", 1)
        counted = 0
        for mean, words in re.findall(r"(\d+)(?: \(([^)]*)\))?", rest):
            rows = table[table["method"] == method]
            for setting in filter(None, words.split(", ")):
                column = next(name for word, name in columns.items() if word in setting)
                rows = rows[rows[column] == int(re.findall(r"\d+", setting)[0])]
            assert f"{rows['num_iterations'].mean():.0f}" == mean, sentence
            counted += len(rows)
        assert counted == (table["method"] == method).sum(), part


def test_claims_are_what_their_tables_say():
    """Recomputed from the committed files by pandas and scipy alone."""
    for path in CLAIMS:
        check_claims(path)


def check_claims(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, number in content["numbers"].items():
        rows = pd.read_csv(path.parent / number["file"])
        rows = rows.query(number["rows"]) if number["rows"] else rows
        assert len(rows), name
        values = rows[number["column"]].dropna()
        if number["statistic"] == "success_rate":
            value = (rows[number["column"]] < 0.02).mean()
            mcse = np.sqrt(value * (1 - value) / len(rows))
        elif number["statistic"] == "mean":
            value, mcse = values.mean(), values.sem()
        elif number["statistic"] == "median":
            value = values.median()
            mcse = scipy.stats.mstats.mjci(values.to_numpy(), [0.5])[0]  # Maritz and Jarrett
        elif number["statistic"] == "count":
            value, mcse = len(rows), np.nan
        elif number["statistic"] == "value":
            (value,) = values
            mcse = np.nan if number["error"] is None else rows[number["error"]].iloc[0]
        else:
            value, mcse = getattr(values, {"minimum": "min", "maximum": "max"}[number["statistic"]])(), np.nan
        assert number["value"] == pytest.approx(value, rel=1e-9), name
        if number["mcse"] is not None:
            assert number["mcse"] == pytest.approx(mcse, rel=0.1), name  # mjci approximates the same weights
        assert number["text"] in content["text"], name


def test_sentences_are_those_of_the_experiments():
    """The committed page is what `moejax reproduce` would write from the committed tables."""
    for path in CLAIMS:
        check_sentence(path)


def check_sentence(path: Path) -> None:
    (experiment,) = [e for e in load_experiments(ROOT) if e.name == path.parent.name]
    tables = read_results(path.parent)
    sentence, _ = render(experiment.declared.shows, experiment.declared.numbers, tables)
    assert json.loads(path.read_text(encoding="utf-8"))["text"] == sentence
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert sentence in page
    assert experiment.declared.shows_not in page
    summary = experiment.declared.summary
    if summary is not None:
        again = summary(tables["table.csv"])
        pd.testing.assert_frame_equal(tables["summary.csv"], again, rtol=1e-5, check_dtype=False)


def test_the_check_would_notice():
    assert re.findall(r"\d", measured("It is 3 times faster with k = 5.")) == ["3"]
    assert measured("In 2019 it took 0.2098 s.").split() == ["In", "it", "took", "0.2098", "s."]
    assert not re.search(r"\d", measured("With k = 3 and d = 10 see `n=4` (ICML 2019), order 4."))
    first, second, third = sentences("One has 2. Two has 3. [a](b/claims.json) Three.")
    assert (first, third) == ("One has 2.", "Three.")
    assert cited(first, ROOT / "README.md") == []
    assert cited(second, ROOT / "README.md") == [ROOT / "b" / "claims.json"]


@pytest.mark.parametrize(
    ("succeeded", "trials", "text"),
    [(30, 30, "100 %"), (18, 40, "45 ± 8 %"), (3597, 3600, "99.917 ± 0.048 %"), (2, 300, "0.67 ± 0.47 %")],
)
def test_a_share_is_told_with_an_error_that_is_not_rounded_to_nothing(succeeded, trials, text):
    table = pd.DataFrame({"share": np.arange(trials) < succeeded}).astype(float)
    number = Number("share >= 0", "share", "mean")
    assert render("{a}", {"a": number}, {"table.csv": table})[0] == text
