"""The configuration: every key has a default, nothing unknown or impossible goes through, and every refusal is one line."""

from __future__ import annotations

import copy
import functools
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from privgrad.cli import build
from privgrad.cli import run as privgrad
from privgrad.cli.config import (
    DEFAULT_EPSILON,
    DEFAULT_STEPS,
    DEFAULTS,
    assign,
    complete,
    read_config,
    without_none,
)
from privgrad.data.settings import DataSettings, read_settings
from privgrad.data.source import load
from privgrad.errors import PrivgradError
from privgrad.mechanism.clipping import FlatClipping
from privgrad.mechanism.kinds import KINDS
from privgrad.nn.models import build_model
from privgrad.training.averaging import ExponentialAverage
from privgrad.training.run import differences

SMALL = ["--model", "logistic_regression", "--set", "plan.noise.multiplier=1.0", "--set", "plan.steps=2"]


@pytest.fixture(autouse=True)
def data_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the digits takes longer than all that is tested here."""
    monkeypatch.setattr(build, "load", _load)


_load = functools.cache(load)


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A run directory that cannot be made: a configuration that passes every check still trains nothing."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error with which a command refuses, with exit code 2."""
    code = privgrad([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert code == 2, output
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("privgrad: ")
    return line.removeprefix("privgrad: ")


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Defaults.


def test_every_key_of_the_design_has_a_default() -> None:
    assert {section: set(values) for section, values in complete({}).items()} == {
        "data": {"source", "test", "test_source", "test_share", "cache", "images", "npz", "table", "features"},
        "public": {"source", "count", "seed"},
        "model": {"name", "arguments"},
        "privacy": {"epsilon", "delta", "adjacency", "accountant", "disclose"},
        "plan": {"steps", "epochs", *KINDS},
        "optimizer": {"name", "lr"},
        "training": {"seed", "views", "evaluations", "averaging"},
        "run": {"device", "memory", "engine", "workers"},
    }


def test_the_defaults_promise_what_the_design_says() -> None:
    config = complete({})
    assert config["privacy"] == {
        "epsilon": None,
        "delta": 1e-5,
        "adjacency": "zero_out",
        "accountant": "pld",
        "disclose": [],
    }
    assert DEFAULT_EPSILON == 3.0, "where neither epsilon nor a multiplier is given"
    assert (config["data"]["source"], config["data"]["test"]) == ("digits", "held-out")
    assert read_settings(config["data"]) == DataSettings(), "the configuration and the readers have the same defaults"
    stages = {name: config["plan"][name] for name in KINDS}
    kinds = {name: stage["kind"] for name, stage in stages.items() if stage is not None}
    assert kinds == {"protects": "example", "sampling": "poisson", "clipping": "flat", "noise": "gaussian"}
    assert "insecure_seed" not in config["plan"]["noise"]
    assert set(config["run"].values()) == {"auto", 0}


def test_the_defaults_build_a_plan_and_a_run() -> None:
    config = complete({})
    source = build.build_data(config)
    plan = build.build_plan(config, source.size, calibrated=False)
    assert plan.steps == DEFAULT_STEPS
    assert plan.sampling.dataset_size == source.size
    model = build_model(config["model"]["name"], source.input_shape, source.classes, config["model"]["arguments"])
    optimizer, schedule = build.build_optimizer(config, model)
    assert type(optimizer).__name__ == "SGD"
    assert schedule is None
    assert build.build_averaging(config) == ExponentialAverage(config["training"]["averaging"]["decay"])


def test_the_defaults_cannot_be_changed_through_a_configuration() -> None:
    before = copy.deepcopy(DEFAULTS)
    config = complete({"optimizer": {"momentum": 0.9}, "plan": {"clipping": {"max_norm": 3.0}}})
    config["plan"]["sampling"]["expected_batch_size"] = 1
    config["model"]["arguments"]["hidden"] = [3]
    assert before == DEFAULTS


def test_what_is_given_goes_over_the_defaults_and_the_rest_stays() -> None:
    config = complete({"privacy": {"delta": 1e-6}, "training": {"seed": 7}})
    assert config["privacy"] == {**DEFAULTS["privacy"], "delta": 1e-6}
    assert config["training"] == {**DEFAULTS["training"], "seed": 7}
    assert config["plan"] == DEFAULTS["plan"]


def test_a_stage_of_the_same_kind_keeps_the_numbers_that_are_not_given() -> None:
    assert complete({"plan": {"noise": {"multiplier": 2.0}}})["plan"]["noise"] == {
        "kind": "gaussian",
        "multiplier": 2.0,
    }
    assert complete({"plan": {"clipping": {"kind": "flat"}}})["plan"]["clipping"] == {"kind": "flat", "max_norm": 1.0}


def test_a_sampling_rate_takes_the_place_of_the_batch_size() -> None:
    given = {"plan": {"sampling": {"rate": 0.1, "divisor": 100.0}}}
    assert complete(given)["plan"]["sampling"] == {"kind": "poisson", "rate": 0.1, "divisor": 100.0}


# Unknown names.


@pytest.mark.parametrize(
    ("text", "unknown", "hint"),
    [
        ("[pla]\nsteps = 3", "[pla]", "'plan'"),
        ("[optimiser]\nlr = 1.0", "[optimiser]", "'optimizer'"),
        ("steps = 3", "[steps]", "known: data, model"),
        ("[plan]\nstep = 3", "plan.step", "'steps'"),
        ("[privacy]\nepsilons = 3.0", "privacy.epsilons", "'epsilon'"),
        ("[run]\nworker = 1", "run.worker", "'workers'"),
        ("[training]\nsead = 1", "training.sead", "'seed'"),
        ("[data]\nsorce = 'digits'", "data.sorce", "'source'"),
        ("[model]\nargument = {}", "model.argument", "'arguments'"),
        ("[plan.nose]\nmultiplier = 1.0", "plan.nose", "'noise'"),
        ("[plan.noise]\nmultiplyer = 1.0", "plan.noise.multiplyer", "'multiplier'"),
        ("[plan.clipping]\nmaxnorm = 1.0", "plan.clipping.maxnorm", "'max_norm'"),
        ("[plan.sampling]\nbatch_size = 64", "plan.sampling.batch_size", "expected_batch_size"),
        ("[plan.clipping]\nkind = 'flatt'", "plan.clipping.kind is 'flatt'", "'flat'"),
        ("[plan.sampling]\nkind = 'poison'", "plan.sampling.kind is 'poison'", "'poisson'"),
        ("[plan.noise]\nkind = 'laplace'", "plan.noise.kind is 'laplace'", "known: gaussian"),
        ("[plan.protects]\nkind = 'exemple'", "plan.protects.kind is 'exemple'", "'example'"),
        ("[plan.groups]\nkind = 'randon'", "plan.groups.kind is 'randon'", "'random'"),
        ("[plan.groups]\ncount = 16", "plan.groups", "known: random"),
        ("[plan.groups]\nkind = 'random'\nnumber = 16", "plan.groups.number", "known: count"),
        ("[plan.groups]\nkind = 'random'", "groups.count is not given", "how many groups"),
        ("[plan.thresholds]\nkind = 'publik'", "plan.thresholds.kind is 'publik'", "'public'"),
        ("[plan.thresholds]\nkind = 'public'", "needs public data", "[public] source"),
        ("[plan.noise]\nallocation = 'perlayer'", "noise.allocation is 'perlayer'", "'per_layer'"),
        ("[plan.clipping]\nkind = 'layerwise'\nblocks = 'tensors'", "clipping.blocks is 'tensors'", "'tensor'"),
        ("[plan.mixing]\nkind = 'model_mix'", "plan.mixing.kind is 'model_mix'", "'modelmix'"),
        ("[privacy]\nadjacency = 'zeroout'", "'zeroout'", "'zero_out'"),
        ("[privacy]\naccountant = 'pdl'", "'pdl'", "'pld'"),
        ("[data]\nsource = 'digitz'", "data.source is 'digitz'", "'digits'"),
        ("[data]\ntest = 'heldout'", "data.test is 'heldout'", "'held-out'"),
        ("[model]\nname = 'mpl'", "model.name is 'mpl'", "'mlp'"),
        ("[optimizer]\nname = 'sdg'", "optimizer.name is 'sdg'", "'sgd'"),
        ("[optimizer]\nlearning_rate = 0.1", "learning_rate", "SGD"),
        ("[optimizer.schedule]\nname = 'cosineannealinglrs'", "optimizer.schedule.name", "'cosineannealinglr'"),
        ("[run]\nengine = 'vmapp'", "run.engine is 'vmapp'", "'vmap'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(
    tmp_path: Path, nowhere: Path, capsys: pytest.CaptureFixture[str], text: str, unknown: str, hint: str
) -> None:
    path = written(tmp_path / "config.toml", text)
    line = refused(capsys, "train", path, *SMALL[2:], "--out", nowhere)
    assert unknown in line
    assert hint in line


@pytest.mark.parametrize(
    "text",
    [
        "plan = 3",
        "plan = []",
        "[[plan]]\nsteps = 1",
        "[plan]\nnoise = 3",
        "[plan]\nclipping = 'flat'",
        "[plan]\nprotects = []",
        "[model]\narguments = 3",
    ],
)
def test_a_value_in_the_place_of_a_table_is_refused(
    tmp_path: Path, nowhere: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = written(tmp_path / "config.toml", text)
    assert "expected a table" in refused(capsys, "train", path, "--out", nowhere)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "{}", "--epsilon", "3"),
        ("train", "{}", "--delta", "1e-6"),
        ("epsilon", "{}", "--delta", "1e-6"),
        ("calibrate", "{}"),
    ],
)
def test_an_option_over_a_section_that_is_no_table_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    path = written(tmp_path / "config.toml", "privacy = 3")
    assert "expected a table" in refused(capsys, *(argument.format(path) for argument in arguments))


# Files.


def test_a_missing_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train", tmp_path / "none.toml")
    assert "none.toml cannot be read: No such file or directory" in line


def test_a_directory_in_the_place_of_a_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be read" in refused(capsys, "train", tmp_path)


@pytest.mark.parametrize("content", [b"[plan\nsteps = 3", b"steps 3", b"\xff\xfe\x00", b"a = 1\na = 2", b"x = \x00"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    assert "config.toml is not valid TOML" in refused(capsys, "train", tmp_path / "config.toml")


# --set.


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("plan.steps=300", {"plan": {"steps": 300}}),
        (" plan.steps = 300 ", {"plan": {"steps": 300}}),
        ("privacy.delta=1e-6", {"privacy": {"delta": 1e-6}}),
        ("privacy.epsilon=3", {"privacy": {"epsilon": 3}}),
        ("privacy.epsilon=-1.5", {"privacy": {"epsilon": -1.5}}),
        ("optimizer.nesterov=true", {"optimizer": {"nesterov": True}}),
        ("optimizer.nesterov=True", {"optimizer": {"nesterov": "True"}}),
        ("optimizer.betas=[0.9, 0.99]", {"optimizer": {"betas": [0.9, 0.99]}}),
        ("model.name=lenet5", {"model": {"name": "lenet5"}}),
        ("model.name='lenet5'", {"model": {"name": "lenet5"}}),
        ('model.name="lenet5"', {"model": {"name": "lenet5"}}),
        ("model.name='5'", {"model": {"name": "5"}}),
        ("model.name=package.module:factory", {"model": {"name": "package.module:factory"}}),
        ("model.arguments.hidden=[32]", {"model": {"arguments": {"hidden": [32]}}}),
        ("plan.noise.multiplier=1.1", {"plan": {"noise": {"multiplier": 1.1}}}),
        (
            "plan.noise={ kind = 'gaussian', multiplier = 2.0 }",
            {"plan": {"noise": {"kind": "gaussian", "multiplier": 2.0}}},
        ),
        ("data.source=a=b", {"data": {"source": "a=b"}}),
        ("data.source=", {"data": {"source": ""}}),
        ("data.source=two words", {"data": {"source": "two words"}}),
    ],
)
def test_set_reads_numbers_text_tables_and_dotted_keys(setting: str, given: dict[str, Any]) -> None:
    found: dict[str, Any] = {}
    assert assign(found, setting) is None
    assert found == given


@pytest.mark.parametrize(
    "setting", ["", "=", "plan", "plan.steps", "plan.steps 3", "steps=3", "=3", ".steps=3", "plan.=3", "plan..steps=3"]
)
def test_set_refuses_what_it_does_not_understand(capsys: pytest.CaptureFixture[str], setting: str) -> None:
    line = refused(capsys, "train", "--set", setting)
    assert "is not understood; expected section.key=value, such as plan.steps=300" in line


def test_set_refuses_a_key_below_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "config.toml", "[plan]\nsteps = 3")
    assert "steps is not a table" in refused(capsys, "train", path, "--set", "plan.steps.more=1")


def test_set_goes_over_the_file_and_the_last_one_counts(tmp_path: Path) -> None:
    given = read_config(written(tmp_path / "config.toml", "[plan]\nsteps = 3\n[privacy]\ndelta = 1e-6"))
    for setting in ("plan.steps=4", "plan.steps=5"):
        assign(given, setting)
    assert given == {"plan": {"steps": 5}, "privacy": {"delta": 1e-6}}


def test_another_kind_drops_the_old_kinds_keys_and_says_so() -> None:
    given: dict[str, Any] = {"plan": {"clipping": {"kind": "flat", "max_norm": 2.0}}}
    note = assign(given, "plan.clipping.kind=layerwise")
    assert given == {"plan": {"clipping": {"kind": "layerwise"}}}
    assert note is not None
    assert "dropped" in note
    assert "max_norm" in note


def test_the_same_kind_drops_nothing() -> None:
    given: dict[str, Any] = {"plan": {"clipping": {"kind": "flat", "max_norm": 2.0}}}
    assert assign(given, "plan.clipping.kind=flat") is None
    assert given == {"plan": {"clipping": {"kind": "flat", "max_norm": 2.0}}}


def test_dropped_keys_are_told_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused later says one line only."""
    monkeypatch.setitem(KINDS["clipping"], "other", type("Other", (FlatClipping,), {}))
    path = written(tmp_path / "config.toml", "[plan.clipping]\nkind = 'flat'\nmax_norm = 2.0")
    assert privgrad(["train", str(path), "--set", "plan.clipping.kind=other", "--set", "run.device=abacus"]) == 2
    note, refusal = capsys.readouterr().err.splitlines()
    assert "dropped the other kind's max_norm" in note
    assert "run.device" in refusal
    assert privgrad(["train", str(path), "--set", "plan.clipping.kind=layered"]) == 2
    (refusal,) = capsys.readouterr().err.splitlines()
    assert "plan.clipping.kind is 'layered'" in refusal


# What excludes each other.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epsilon", "3", *SMALL],
        ["--set", "privacy.epsilon=3", *SMALL],
    ],
)
def test_epsilon_and_multiplier_together_are_refused(
    nowhere: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    line = refused(capsys, "train", *arguments, "--out", nowhere)
    assert "both privacy.epsilon and plan.noise.multiplier are given" in line
    assert "leave one out" in line


def test_epsilon_and_multiplier_together_are_refused_without_data_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "config.toml", "[privacy]\nepsilon = 3.0\n[plan.noise]\nmultiplier = 1.0")
    for command in ("epsilon", "calibrate"):
        assert "both privacy.epsilon and plan.noise.multiplier" in refused(capsys, command, path)


def test_steps_and_epochs_together_are_refused(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train", *SMALL, "--set", "plan.epochs=2", "--out", nowhere)
    assert "both plan.steps and plan.epochs are given; leave one out" in line


@pytest.mark.parametrize(("epochs", "steps"), [(1, 6), (2.5, 14), (0.001, 1)])
def test_epochs_become_steps_once(epochs: float, steps: int) -> None:
    plan = {"epochs": epochs, "noise": {"multiplier": 1.0}, "sampling": {"expected_batch_size": 256}}
    config = complete({"plan": plan})
    assert build.build_plan(config, 1437).steps == steps


def test_a_batch_size_and_a_rate_together_are_refused(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--set", "plan.sampling.rate=0.1", "--set", "plan.sampling.expected_batch_size=64"]
    assert "sampling needs either" in refused(capsys, "train", *SMALL, *both, "--out", nowhere)


def test_add_remove_with_a_size_from_the_data_is_refused(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train", *SMALL, "--set", "privacy.adjacency=add_remove", "--out", nowhere)
    assert "the size of the data set is private" in line
    assert "sampling.rate and sampling.divisor" in line


# Ranges.


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        *(
            (f"privacy.delta={value}", "delta is")
            for value in ("0", "1", "2", "-1e-5", "nan", "inf", "'small'", "true")
        ),
        *(
            (f"plan.noise.multiplier={value}", "noise.multiplier is")
            for value in ("-1", "nan", "inf", "'much'", "true")
        ),
        *((f"plan.sampling.rate={value}", "sampling.rate is") for value in ("0", "1.5", "-0.1", "nan", "inf", "'x'")),
        *(
            (f"plan.sampling.expected_batch_size={value}", "expected_batch_size")
            for value in ("0", "-1", "nan", "2000")
        ),
        *((f"plan.clipping.max_norm={value}", "clipping.max_norm is") for value in ("0", "-1", "nan", "inf")),
        *((f"plan.steps={value}", "plan.steps is") for value in ("0", "-1", "1.5", "nan", "'ten'", "true")),
        *((f"plan.noise.insecure_seed={value}", "noise.insecure_seed is") for value in ("-1", "1.5", "'x'", "true")),
        *((f"training.seed={value}", "training.seed is") for value in ("-1", "1.5", "'x'")),
        *((f"training.evaluations={value}", "training.evaluations is") for value in ("0", "-1", "1.5")),
        *((f"run.workers={value}", "run.workers is") for value in ("-1", "0.5", "'two'")),
        *((f"run.memory={value}", "run.memory") for value in ("0", "-1", "'lots'")),
        ("plan.sampling.dataset_size=1000", "made for 1000 records and the data set has 1437"),
        pytest.param(
            "plan.noise.insecure_seed='secret'",
            "without its seed",
        ),
        pytest.param(
            "training.averaging={ kind = 'ema', decay = 1.0 }",
            "training.averaging.decay is 1.0",
        ),
    ],
)
def test_a_number_out_of_range_is_refused_with_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, says: str
) -> None:
    line = refused(capsys, "train", *SMALL, "--set", setting, "--out", tmp_path / "run")
    assert says in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "-inf"])
def test_an_epsilon_out_of_range_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    line = refused(capsys, "train", "--epsilon", value, "--out", tmp_path / "run")
    assert "epsilon is" in line
    assert "expected a finite number above 0" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "value", ["'emma'", "true", "{ decay = 0.9 }", "{ kind = 'sma' }", "{ kind = 'ema', rate = 1 }"]
)
def test_another_averaging_is_refused_with_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    line = refused(capsys, "train", *SMALL, "--set", f"training.averaging={value}", "--out", tmp_path / "run")
    assert line.startswith("training.averaging is ")
    assert "{ kind = 'ema', decay = 0.95 }, or 'none'" in line


@pytest.mark.parametrize("value", ["'three'", "true", "[]"])
def test_an_epsilon_that_is_no_number_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    line = refused(capsys, "train", "--set", f"privacy.epsilon={value}", "--out", tmp_path / "run")
    assert "privacy.epsilon is" in line


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "'two'"])
def test_epochs_out_of_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    line = refused(capsys, "train", *SMALL[:4], "--set", f"plan.epochs={value}", "--out", tmp_path / "run")
    assert "plan.epochs is" in line


WRONG = (
    "[]",
    "{}",
    "'abc'",
    "true",
    "nan",
    "inf",
    "-1",
    "[-1]",
    "[[1]]",
    "1e400",
    "2020-01-01",
    "99999999999999999999",
    "'a:b'",
)


def keys() -> list[Any]:
    """Every key that there is, and those that only some kinds and classes have."""
    known = [f"{section}.{key}" for section, values in DEFAULTS.items() for key in values]
    inner = [
        "plan.protects.kind",
        "plan.sampling.kind",
        "plan.sampling.expected_batch_size",
        "plan.sampling.dataset_size",
        "plan.sampling.rate",
        "plan.sampling.divisor",
        "plan.clipping.kind",
        "plan.clipping.max_norm",
        "plan.noise.kind",
        "plan.noise.multiplier",
        "plan.noise.side_share",
        "plan.noise.insecure_seed",
        "model.arguments.hidden",
        "optimizer.momentum",
        "optimizer.schedule",
        "optimizer.schedule.name",
        "training.averaging.kind",
        "training.averaging.decay",
    ]
    return [*known, *inner]


@pytest.mark.parametrize("key", keys())
def test_no_value_of_any_key_gives_a_traceback(nowhere: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    for value in WRONG:
        if (key, value) == ("plan.noise", "{}"):
            continue  # takes the multiplier away: right, and calibrated at length
        model = [] if key.startswith("model") else SMALL[:2]
        refused(capsys, "train", *model, *SMALL[2:], "--set", f"{key}={value}", "--out", nowhere)


# There and back.


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"privacy": {"epsilon": 3}},
        {"plan": {"sampling": {"rate": 0.1, "divisor": 100.0}, "noise": {"multiplier": 1.5, "insecure_seed": 7}}},
        {"plan": {"epochs": 2.5}, "training": {"averaging": "none"}},
        {"model": {"name": "mlp", "arguments": {"hidden": [3, 4]}}},
        {"optimizer": {"name": "Adam", "betas": [0.5, 0.9], "schedule": {"name": "CosineAnnealingLR", "T_max": 3}}},
    ],
    ids=["nothing", "epsilon", "rate and noise", "epochs", "model", "optimizer"],
)
def test_a_configuration_written_and_read_is_the_same(given: dict[str, Any]) -> None:
    config = complete(given)
    assert complete(tomllib.loads(tomli_w.dumps(without_none(config)))) == config


def test_differences_name_the_keys_in_order() -> None:
    changed = complete({"plan": {"steps": 4}, "optimizer": {"lr": 0.5, "momentum": 0.9}})
    assert differences(without_none(complete({})), without_none(changed)) == [
        "optimizer.lr was 1.2 and is 0.5",
        "optimizer.momentum was not given and is 0.9",
        "plan.steps was not given and is 4",
    ]
    assert differences(changed, changed) == []


def test_a_sections_table_may_be_written_inline(tmp_path: Path) -> None:
    inline = read_config(written(tmp_path / "inline.toml", "plan = { noise = { multiplier = 2.0 }, steps = 5 }"))
    sections = read_config(written(tmp_path / "sections.toml", "[plan]\nsteps = 5\n[plan.noise]\nmultiplier = 2.0"))
    assert complete(inline) == complete(sections)


def test_read_config_leaves_the_tables_as_they_are(tmp_path: Path) -> None:
    assert read_config(written(tmp_path / "config.toml", "[plan]\nsteps = 5")) == {"plan": {"steps": 5}}
    with pytest.raises(PrivgradError):
        read_config(tmp_path)


@pytest.mark.parametrize("setting", ["optimizer.differentiable={ a = 1 }", "optimizer.weight_decay='x'"])
def test_an_optimizer_that_cannot_step_is_refused_before_anything_is_charged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, setting: str
) -> None:
    line = refused(capsys, "train", *SMALL, "--set", setting, "--out", tmp_path / "run")
    assert line.startswith("optimizer: ")
    assert not (tmp_path / "run").exists()
