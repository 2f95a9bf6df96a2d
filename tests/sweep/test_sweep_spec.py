"""The spec of a sweep: what it expands to, and that every mistake is one line with its place."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from moejax.reproduce.cell_functions import read_study
from moejax.sweep import trial as core
from moejax.sweep.plan.plan import make_plan
from moejax.sweep.plan.plugins import run_plugins
from moejax.sweep.spec.fields import DATA_FIELDS, FIELDS
from moejax.sweep.spec.parse import parse_spec, read_spec
from moejax.sweep.spec.positions import SpecError

GOOD = """name = "good"
methods = ["spectral", "joint_em"]
trials = 10
dim = 5
[grid]
noise_std = [0.1, 1]
num_samples = [1e3, 2000]
[[zip]]
activation = ["linear", "relu"]
num_experts = [2, 3]
[[exclude]]
activation = "relu"
noise_std = 1.0
method = "joint_em"
"""


def test_grid_zip_exclude_and_fixed_fields():
    spec = parse_spec(GOOD, "good.toml")
    cells = list(spec.settings())
    assert len(cells) == 2 * 2 * 2 * 2 - 2
    assert cells[0] == {
        "dim": 5,
        "noise_std": 0.1,
        "num_samples": 1000,
        "activation": "linear",
        "num_experts": 2,
        "method": "spectral",
    }
    assert isinstance(cells[0]["num_samples"], int)
    assert {(cell["activation"], cell["num_experts"]) for cell in cells} == {("linear", 2), ("relu", 3)}
    assert not [
        c for c in cells if (c["activation"], c["noise_std"], c["method"]) == ("relu", 1.0, "joint_em")
    ]
    assert spec.swept == ("noise_std", "num_samples", "activation", "num_experts")


def test_values_take_their_fields_types():
    spec = parse_spec(
        'methods = ["spectral"]\ntrials = 1\nexpert_norms = [1, 2.5]\nrecord = ["history"]\n'
        '[grid]\norder = [3, "default"]\nexpert_correlation = [-0.0, 0]',
        "x.toml",
    )
    assert spec.fixed == {"expert_norms": (1.0, 2.5), "record": ("history",)}
    assert spec.grid == {"order": (3, None), "expert_correlation": (0.0,)}
    assert str(spec.grid["expert_correlation"][0]) == "0.0"  # -0.0 would be another hash
    assert spec.name == "x"


def test_every_field_of_the_settings_is_a_field_of_a_spec():
    for name, field in FIELDS.items():
        value = '"default"' if field.default is None else field.default
        text = f'"{value}"' if isinstance(field.default, str) else str(value).lower()
        text = "[]" if field.default == () else text
        spec = parse_spec(f'methods = ["spectral"]\ntrials = 1\n{name} = {text}')
        assert spec.fixed == {name: field.default}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dim = 5", "dimm = 5", "good.toml:4: dimm: unknown field; did you mean dim?"),
        (
            "noise_std = [0.1, 1]",
            "noise = [0.1]",
            "good.toml:6: [grid] noise: unknown field; did you mean noise_std",
        ),
        ("noise_std = [0.1, 1]", "noise_std = []", "good.toml:6: [grid] noise_std: an empty list"),
        ("noise_std = [0.1, 1]", "noise_std = 0.1", "good.toml:6: [grid] noise_std: 0.1 must be a list"),
        (
            "noise_std = [0.1, 1]",
            'noise_std = [0.1, "a"]',
            'good.toml:6: [grid] noise_std: "a" is not accepted: expected a finite number',
        ),
        ("noise_std = [0.1, 1]", "noise_std = [nan]", "good.toml:6: [grid] noise_std: nan is not accepted"),
        (
            "[1e3, 2000]",
            "[1e3, 2000.5]",
            "[grid] num_samples: 2000.5 is not accepted: expected a whole number",
        ),
        ("dim = 5", "dim = true", "good.toml:4: dim: true is not accepted: expected a whole number"),
        ("num_experts = [2, 3]", "num_experts = [2]", "good.toml:8: [[zip]]: the lists must have one length"),
        ("num_experts = [2, 3]", "dim = [2, 3]", "good.toml:10: [[zip]] dim: set twice: here and at the top"),
        ("trials = 10", "trials = 0", "good.toml:3: trials: 0 is not accepted: expected 1 to"),
        ("trials = 10", "trials = 1.5", "good.toml:3: trials: 1.5 is not accepted: expected a whole number"),
        ("trials = 10", "", "good.toml: trials: missing"),
        ("trials = 10", "trials = 10\nseed = -1", "good.toml:4: seed: -1 is not accepted"),
        ("dim = 5", "dim = 5\npad_samples_to = 64", "good.toml:5: pad_samples_to: 64 must be a list"),
        ("dim = 5", "dim = 5\npad_samples_to = [0]", "good.toml:5: pad_samples_to: 0 is not accepted"),
        ('["spectral", "joint_em"]', '"spectral"', 'methods: "spectral" is not accepted: expected a list'),
        ('["spectral", "joint_em"]', "[]", "good.toml:2: methods: [] is not accepted"),
        ('name = "good"', 'name = "a/b"', 'good.toml:1: name: "a/b" is not accepted'),
        ('name = "good"', "name = good", "good.toml: not valid TOML"),
        ("[grid]", "[grids]", "good.toml:5: grids: unknown field; did you mean grid"),
        ("[[zip]]", "[zip]", "good.toml:8: [[zip]]: expected a list of tables"),
        (
            'activation = "relu"',
            'activatoin = "relu"',
            "[[exclude]] activatoin: unknown field; did you mean activation",
        ),
        ("dim = 5", 'dim = 5\nmethod = "spectral"', "good.toml:5: method: methods are listed at the top"),
        (
            "dim = 5",
            "dim = 5\nmax_trials = 5",
            "good.toml:5: max_trials: unknown field; it belongs in [precision]",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place(old, new, message):
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD.replace(old, new), "good.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("target = {metric = 'recovery_error', mcse = 0.1}", "max_trials: missing"),
        ("max_trials = 100", "[precision] target: expected target = "),
        ("target = {metric = 'recovery', mcse = 0.1}\nmax_trials = 9", "did you mean recovery_error"),
        ("target = {metric = 'recovery_error', mcse = 0}\nmax_trials = 9", "mcse = 0 is not accepted"),
        (
            "target = {metric = 'recovery_error', mcs = 0}\nmax_trials = 9",
            'unknown key "mcs"; did you mean mcse',
        ),
        ("target = {metric = 'recovery_error', mcse = 1}\nmax_trials = 1", "max_trials: 1 is not accepted"),
        (
            "target = {metric = 'gating_error', mcse = 1, statistic = 'success_rate'}\nmax_trials = 9",
            "no success rate",
        ),
        (
            "target = {metric = 'recovery_error', mcse = 1}\nmin_trials = 10\nmax_trials = 9",
            "min_trials: 10 is more than max_trials = 9",
        ),
        (
            "target = {metric = 'recovery_error', mcse = 1}\nmaxtrials = 9",
            "maxtrials: unknown key; did you mean max_",
        ),
    ],
)
def test_mistakes_in_precision(table, message):
    with pytest.raises(SpecError) as caught:
        parse_spec(f'methods = ["spectral"]\n[precision]\n{table}', "p.toml")
    assert message in str(caught.value)


def test_trials_and_precision_exclude_each_other():
    with pytest.raises(SpecError, match="either trials or"):
        parse_spec(GOOD + "[precision]\nmax_trials = 5", "good.toml")


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("trials=3", lambda spec: spec.trials == 3),
        ("name=other", lambda spec: spec.name == "other"),
        ("methods=spectral", lambda spec: spec.methods == ("spectral",)),
        ("methods=joint_em,spectral", lambda spec: spec.methods == ("joint_em", "spectral")),
        ("noise_std=0.7", lambda spec: spec.fixed["noise_std"] == 0.7 and "noise_std" not in spec.grid),
        ("dim=[10, 20]", lambda spec: spec.grid["dim"] == (10, 20) and "dim" not in spec.fixed),
        ("grid.dim=7", lambda spec: spec.grid["dim"] == (7,)),
        ("activation=relu", lambda spec: spec.fixed["activation"] == "relu"),
        ("expert_norms=[1, 2]", lambda spec: spec.fixed["expert_norms"] == (1.0, 2.0)),
        ("expert_norms=[[1, 2], 1]", lambda spec: spec.grid["expert_norms"] == ((1.0, 2.0), 1.0)),
        ("precision.max_trials=80", None),
    ],
)
def test_set_overrides_the_file(override, check):
    if check is None:
        with pytest.raises(SpecError, match="target"):
            parse_spec(GOOD, "good.toml", [override])
        return
    assert check(parse_spec(GOOD, "good.toml", [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trials", "--set trials: expected KEY=VALUE"),
        ("tirals=5", "--set tirals=5: unknown key; did you mean trials"),
        ("dim=abc", '--set: dim: "abc" is not accepted: expected a whole number'),
        ("grid.dims=5", "--set grid.dims=5: unknown key; did you mean dim"),
        ("method=spectral", "methods are a list"),
    ],
)
def test_a_bad_override_is_one_line(override, message):
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD, "good.toml", [override])
    assert message in str(caught.value)


def test_all_cells_excluded_is_said(tmp_path):

    spec = parse_spec('methods = ["spectral"]\ntrials = 1\ndim = 3\n[[exclude]]\ndim = 3', "e.toml")
    with pytest.raises(SpecError, match="every cell is excluded"):
        make_plan(spec)


def test_chunks_are_about_a_second_of_work_however_large_a_trial_is():

    text = """
methods = ["joint_em"]
trials = 64
[[zip]]
num_samples = [1000, 16384, 16384, 16384]
dim =         [10,   10,    20,    20]
num_experts = [3,    3,     6,     6]
num_starts =  [1,    1,     1,     8]
"""
    buckets = make_plan(parse_spec(text, "sizes.toml")).buckets
    assert [bucket.chunk_size for bucket in buckets] == [64, 64, 16, 2]


SPECS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.toml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_shipped_specs_are_sound_and_say_what_they_show_and_cost(path):
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Shows:" in comment
    assert "Costs:" in comment
    if "study" in tomllib.loads(path.read_text()):
        assert read_study(path, {}).name == path.stem
        with pytest.raises(SpecError, match=f"not a sweep: run it by moejax reproduce {path.stem}"):
            read_spec(path)
        return
    spec = read_spec(path)
    assert spec.name == path.stem
    run_plugins(spec.plugins)
    for values in spec.settings():
        data = core.DataSettings(**{name: values[name] for name in values if name in DATA_FIELDS})
        algorithm = core.AlgorithmSettings(**{n: v for n, v in values.items() if n not in DATA_FIELDS})
        core.check_settings(data, algorithm)


def test_plugins_of_a_spec_lie_beside_it():
    spec = parse_spec(GOOD.replace("dim", 'plugins = ["mine.py"]\ndim', 1), "folder/good.toml")
    assert spec.plugins == (Path("folder/mine.py"),)
    with pytest.raises(SpecError, match=r'plugins: "mine\.py" is not accepted'):
        parse_spec(GOOD.replace("dim", 'plugins = "mine.py"\ndim', 1), "good.toml")
    with pytest.raises(ValueError, match=r"plugin nowhere\.py: cannot be read"):
        run_plugins([Path("nowhere.py")])


def test_all_the_sweeps_are_there():
    expected = {
        "quickstart", "sample-size", "dimension", "noise", "non-linearity", "num-experts", "gating-scale",
        "input-distribution", "phase-diagram",
    }  # fmt: skip
    assert expected <= {path.stem for path in SPECS}


def test_sizes_that_are_padded_to_the_same_one_share_a_program():

    text = """
    methods = ["spectral"]
    trials = 2
    pad_samples_to = [9000, 2048]
    [grid]
    num_samples = [300, 2000, 2048, 2049, 9000, 9001]
    """
    buckets = make_plan(parse_spec(text)).buckets
    assert [bucket.static.padded_num_samples for bucket in buckets] == [2048, 9000, 16384]
    assert [len(bucket.cells) for bucket in buckets] == [3, 2, 1]
    plain = make_plan(parse_spec(text, overrides=("pad_samples_to=[]",)))
    assert [bucket.static.padded_num_samples for bucket in plain.buckets] == [512, 2048, 4096, 16384]
    assert [cell.result_hash for cell in plain.cells] == [
        cell.result_hash for cell in make_plan(parse_spec(text)).cells
    ]


HUGE = "1" + 400 * "0"
ENDLESS = 5000 * "9"
"""More digits than Python reads."""


@pytest.mark.parametrize(
    "value", [HUGE, f"-{HUGE}", ENDLESS, f"0x{5000 * 'f'}", "inf", "nan", "1e308", "2.5e15"]
)
@pytest.mark.parametrize("key", ["trials", "seed", "dim", "num_samples", "pad_samples_to", "max_trials"])
def test_a_number_no_count_can_be_is_one_line(key, value):
    """In the file and by --set alike."""
    text = 'methods = ["joint_em"]\n'
    if key == "max_trials":
        text += '[precision]\ntarget = {metric = "recovery_error", mcse = 0.1}\n'
    else:
        text += "trials = 3\n"
    line = f"[{value}]" if key == "pad_samples_to" else value
    name = f"precision.{key}" if key == "max_trials" else key
    for document, overrides in (
        (f"{text.replace('trials = 3', '')}{key} = {line}\n", ()),
        (text, (f"{name}={line}",)),
    ):
        if key == "seed" and value == "2.5e15":
            continue  # a seed may be that large
        is_field = overrides == () and key not in ("trials", "max_trials")
        written = text + f"{key} = {line}\n" if is_field else document
        with pytest.raises(SpecError) as caught:
            parse_spec(written, "huge.toml", overrides)
        assert key in str(caught.value) or "huge.toml" in str(caught.value) or "--set" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize("value", [HUGE, ENDLESS, "inf", "nan", "1e400"])
@pytest.mark.parametrize("key", ["noise_std", "gating_norm", "expert_norms", "precision.target.mcse"])
def test_a_number_no_float_can_be_is_one_line(key, value):
    text = GOOD.replace("noise_std = [0.1, 1]\n", "")
    if key.startswith("precision"):
        text = text.replace("trials = 10", "")
        text += '[precision]\nmax_trials = 10\ntarget = {metric = "recovery_error", mcse = 0.1}\n'
    for override in (f"{key}={value}", f"{key}=[{value}]"):
        with pytest.raises(SpecError) as caught:
            parse_spec(text, "huge.toml", [override])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize("levels", [40, 1000, 20_000])
@pytest.mark.parametrize("opened", ["[", "{a = "])
def test_nesting_is_one_line(opened, levels):
    closed = "]" if opened == "[" else "}"
    value = opened * levels + "1" + closed * levels
    for text, overrides in (
        (GOOD + f"noise_std = {value}\n", ()),
        (GOOD, (f"dim={value}",)),
        (GOOD, (f"dim={opened * levels}",)),
    ):
        with pytest.raises(SpecError) as caught:
            parse_spec(text, "deep.toml", overrides)
        assert len(str(caught.value)) <= 1000
    with pytest.raises(SpecError, match="within each other"):
        parse_spec(GOOD.replace("[grid]", f"[grid.{'.'.join(levels * 'a')}]\n[grid]", 1), "deep.toml")


def test_a_grid_that_nobody_could_run_is_refused_before_its_cells_are_listed():
    axes = "\n".join(
        f"{name} = [{', '.join(map(str, range(1, 200)))}]" for name in ("dim", "num_samples", "num_experts")
    )
    with pytest.raises(SpecError, match=r"grid: expected at most 1,000,000 cells, got 7880599"):
        parse_spec(f'methods = ["joint_em"]\ntrials = 1\n[grid]\n{axes}\n')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('name = "a\\u001b[31mb"', "expected a name that can be a folder's"),
        (f'name = "{300 * "a"}"', "expected a name that can be a folder's"),
        ('activation = "a\\nb"', "expected a name"),
        (
            '[precision]\ntarget = {metric = "recovery_error", mcse = 0.1, statistic = ["mean"]}\nmax_trials = 9',
            "statistic",
        ),
        ('[[exclude]]\nmethod = [["joint_em"]]', "expected names"),
        ("grid = 3", "expected a table"),
    ],
)
def test_values_of_other_kinds_are_one_line(line, message):
    text = 'methods = ["joint_em"]\n' + ("" if "precision" in line else "trials = 3\n") + line
    with pytest.raises(SpecError, match=message):
        parse_spec(text)


@pytest.mark.parametrize("override", ["grid.dim=3", "dim=[1, 2]"])
def test_set_replaces_a_grid_that_is_no_table(override):
    spec = parse_spec('methods = ["joint_em"]\ntrials = 3\ngrid = 3\n', "x.toml", [override])
    assert set(spec.grid) == {"dim"}


def test_set_replaces_a_precision_that_is_no_table():
    overrides = [
        "precision.max_trials=9",
        "precision.target.mcse=0.1",
        'precision.target.metric="recovery_error"',
    ]
    rule = parse_spec('methods = ["joint_em"]\nprecision = 3\n', "x.toml", overrides).precision
    assert (rule.max_trials, rule.mcse) == (9, 0.1)


def test_a_second_key_in_an_override_is_not_dropped_without_a_word():
    with pytest.raises(SpecError, match="dim"):
        parse_spec(GOOD, "good.toml", ["dim=5\nseed=3"])


def test_a_byte_order_mark_is_no_part_of_a_spec(tmp_path):
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_spec(tmp_path / "bom.toml").name == "good"
    (tmp_path / "study.toml").write_bytes(b"\xef\xbb\xbfstudy = true\n[grid]\na = [1, 2]\n")
    assert len(read_study(tmp_path / "study.toml", {}).cells) == 2


def test_a_method_that_nobody_knows_excludes_nothing_and_is_told():

    text = GOOD.replace('method = "joint_em"', 'method = "joint_me"')
    with pytest.raises(
        SpecError, match=r"\[\[exclude\]\] method: \"joint_me\" is no method; did you mean joint_em"
    ):
        make_plan(parse_spec(text, "good.toml"))
    only = parse_spec(GOOD, "good.toml", ["methods=spectral"])  # one that is not run here is no mistake
    assert make_plan(only).cells


PLUGINS = {
    "import sys\nsys.exit(3)": r"called exit \(3\)",
    "raise SystemExit": r"called exit \(None\)",
    "import argparse\nargparse.ArgumentParser().parse_args(['--x'])": r"called exit \(2\)",
    "raise ValueError('a\\nb' * 5000)": "raised ValueError: a ba ba",
    "1 / 0": "raised ZeroDivisionError",
    "x = " + 5000 * "(": "not valid Python",
    "x = '\x00'": "not valid Python",
    "x ==== 1": ":1: not valid Python",
    "# -*- coding: nonsense -*-": "cannot be read",
}


@pytest.mark.parametrize("source", PLUGINS, ids=lambda source: source[:20].encode("unicode_escape").decode())
def test_a_plugin_that_cannot_be_used_is_one_line(tmp_path, source, capsys):
    path = tmp_path / "plugin.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=PLUGINS[source]) as caught:
        run_plugins([path])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) <= 1000


def test_a_plugin_sees_no_arguments_of_ours_and_prints_to_stderr(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "argv", ["moejax", "sweep", "--dry-run"])
    path = tmp_path / "plugin.py"
    parse = "import argparse, sys\nassert argparse.ArgumentParser().parse_args() is not None\nassert len(sys.argv) == 1\n"
    path.write_bytes(b"\xef\xbb\xbf" + f"{parse}print('hello')\n".encode())
    run_plugins([path])
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "hello\n")
    assert sys.argv == ["moejax", "sweep", "--dry-run"]
    path.write_bytes("# -*- coding: latin-1 -*-\nNAME = 'é'\nassert len(NAME) == 1\n".encode("latin-1"))
    run_plugins([path])


def test_a_study_is_refused_in_one_line(tmp_path):
    path = tmp_path / "study.toml"
    for line, message in {
        "grid = 3": "expected a table",
        f"a = {1000 * '['}": "study.toml",
        f"[grid]\n{chr(10).join(f'a{n} = {list(range(200))}' for n in range(3))}": "at most 1,000,000 cells",
    }.items():
        path.write_text(f"study = true\n{line}\n")
        with pytest.raises(SpecError, match=message):
            read_study(path, {})


def test_a_damaged_cell_of_a_study_is_named(tmp_path):
    from moejax.reproduce.cell_functions import StudyUnit, run_study
    from moejax.sweep.plan.chunks import WorkerSettings

    part = tmp_path / "cell.parquet"
    unit = StudyUnit(tmp_path / "study.py", ({"a": 1},), (part,), True, WorkerSettings(True, None))
    part.write_bytes(b"PAR1 no more")
    with pytest.raises(
        ValueError, match=r"cell\.parquet: a finished cell cannot be read .*; remove the file"
    ) as caught:
        run_study([unit], pytest.fail)
    assert "\n" not in str(caught.value)


def test_a_billion_trials_are_not_listed_to_queue_them():
    from moejax.sweep.execution.work_queue import WorkQueue

    plan = make_plan(
        parse_spec('methods = ["joint_em"]\ntrials = 1e9\ndim = 3\nnum_experts = 2\nnum_samples = 100')
    )
    queue = WorkQueue(plan)
    queue.add(0, (trial for trial in range(plan.spec.trials)), plan.spec.trials)
    assert len(queue) == 10**9
    assert queue.take("w", idle=True).trials[0] == (0, 0)
