"""Methods outside the package: finding them, their options, and every mistake on one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megatron_dwm.config import Config, PolicyConfig, UserError
from megatron_dwm.config.effect import warnings_of_effect
from megatron_dwm.config.load import config_text, load, load_config
from megatron_dwm.config.methods import METHODS, Registered
from megatron_dwm.weighting import check_method, method_class, with_options
from megatron_dwm.weighting.method import CONTRACT_VERSION

METHOD = f"""
from dataclasses import dataclass
from megatron_dwm.plugin import Method, Schedule

@dataclass(frozen=True, kw_only=True)
class Options:
    alpha: float = 0.5
    names: tuple[str, ...] = ("a",)
    count: int | None = None
    \"\"\"how many\"\"\"

    def __post_init__(self):
        if self.alpha < 0:
            raise ValueError(f"alpha: expected 0 or more, got {{self.alpha}}")

class Mine(Method):
    contract_version = {CONTRACT_VERSION}
    options = Options

    @classmethod
    def parts(cls, config):
        return frozenset({{"groups"}})

    def weights(self, batch, outputs, counters):
        raise NotImplementedError
"""
OTHERS = f"""
class Without(Mine):
    options = None

class Silent(Mine):
    contract_version = None

class Newer(Mine):
    contract_version = {CONTRACT_VERSION + 1}

class Unfinished(Method):
    contract_version = {CONTRACT_VERSION}

class Odd(Mine):
    options = dict

class Misspelled(Mine):
    @classmethod
    def parts(cls, config):
        return frozenset({{"grups"}})

class StateAlone(Mine):
    def state_dict(self):
        return {{}}

class Learns(Mine):
    @classmethod
    def parts(cls, config):
        return frozenset({{"groups", "target", "hypergradients"}})

    @classmethod
    def schedule(cls, config):
        return Schedule(steps=9, update_steps=range(1, 9))

class Aimless(Learns):
    @classmethod
    def parts(cls, config):
        return frozenset({{"groups"}})

class Reads(Learns):
    @classmethod
    def parts(cls, config):
        return frozenset({{"groups", "target"}})

class Own(Learns):
    own_updates = True

class Pools(Mine):
    @classmethod
    def pool_batches(cls, config):
        return 2

class NoClass:
    pass

nothing = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the module `mine_of_plugins`; nothing of it stays imported."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine_of_plugins.py").write_text(METHOD + OTHERS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    from megatron_dwm.weighting.plugin_checks import plugin_class

    plugin_class.cache_clear()


def _with(*arguments: str, name: str = "mine_of_plugins:Mine") -> Config:
    return with_options(load_config(["--policy.name", name, *arguments]))


def test_a_module_of_the_working_directory_is_found_first(folder: Path) -> None:
    assert method_class(_with()).__name__ == "Mine"
    assert sys.path[0] == str(folder)
    (folder / "colorsys.py").write_text(METHOD)  # also in the standard library, not imported here
    sys.modules.pop("colorsys", None)
    assert method_class(_with(name="colorsys:Mine")).__module__ == "colorsys"


def test_options_are_of_the_types_that_the_method_declares(folder: Path) -> None:
    config = _with("--policy.options.alpha", "1e-3", "--policy.options.names", "[x, y]")
    own = method_class(config).own_options(config)
    assert (own.alpha, own.names, own.count) == (0.001, ("x", "y"), None)
    # Written out with their defaults, so that a changed default changes no resumed run.
    assert config.policy.options == {"alpha": 0.001, "names": ["x", "y"], "count": None}
    (folder / "run.yaml").write_text(config_text(config))
    again = load_config([str(folder / "run.yaml")])
    assert with_options(again) == again == config


def test_the_last_setting_of_an_option_counts(folder: Path) -> None:
    file = folder / "run.yaml"
    file.write_text("policy: {name: 'mine_of_plugins:Mine', options: {alpha: 2, count: 5}}")
    config = with_options(load_config([str(file), "--policy.options.alpha=3"]))
    assert config.policy.options == {"alpha": 3.0, "names": ["a"], "count": 5}
    loaded = load(["--policy.options.count", "9", "--config", str(file)])
    assert loaded.config.policy.options == {"alpha": 2, "count": 5}
    assert loaded.given.file == {"policy.name", "policy.options"}


def test_options_of_a_built_in_method_are_refused(folder: Path) -> None:
    def judged(*arguments: str) -> list[str]:
        loaded = load(list(arguments))
        return warnings_of_effect(loaded.config, loaded.given, frozenset())

    why = "^policy.options: has no effect: policy.name is uniform, and it needs policy.name package"
    with pytest.raises(UserError, match=why):
        judged("--policy.options.alpha", "3")
    file = folder / "run.yaml"
    file.write_text("policy: {name: uniform, options: {alpha: 2}}")
    with pytest.raises(UserError, match=why):
        judged(str(file))
    # One file for a method and its baseline, which the command line names.
    file.write_text("policy: {name: 'mine_of_plugins:Mine', options: {alpha: 2}}")
    [line] = judged(str(file), "--policy.name", "uniform")
    assert line.startswith("policy.options: set in the configuration file, has no effect")
    baseline = with_options(load_config([str(file), "--policy.name", "uniform"]))
    assert baseline.policy.options == {}
    file.write_text(config_text(baseline))
    assert judged(str(file)) == []


OF_OPTIONS = [
    ("--policy.options.alfa 3", r"^policy.options.alfa: policy mine_of_plugins:Mine has no such "),
    ("--policy.options.alfa 3", r"option; it knows alpha, names, count$"),
    ("--policy.options.alpha text", r"^policy.options.alpha: Expected a float. Got value: text$"),
    ("--policy.options.count 1.5", r"^policy.options.count: Expected a int.*1.5"),
    ("--policy.options.alpha -1", r"^policy.options: alpha: expected 0 or more, got -1.0$"),
    ("--policy.options.a.b 3", r"^policy.options.a.b: expected policy.options.NAME with a name"),
    ("--policy.options 3", r"policy.options: .*dict"),
]


@pytest.mark.parametrize(("arguments", "says"), OF_OPTIONS)
def test_a_wrong_option_is_one_line(arguments: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_method(
            load_config(["--policy.name", "mine_of_plugins:Mine", *arguments.split()]), 2, 1
        )
    assert "\n" not in str(caught.value)


def test_a_method_without_options_takes_none() -> None:
    assert _with(name="mine_of_plugins:Without").policy.options == {}
    with pytest.raises(UserError, match="policy.options.a: .* has no such option; it has none"):
        _with("--policy.options.a", "1", name="mine_of_plugins:Without")


OF_CLASSES = [
    ("missing_of_plugins:X", r"found no module missing_of_plugins; install it, start in the"),
    ("mine_of_plugins.sub:X", r"found no module mine_of_plugins.sub"),
    ("mine_of_plugins:Gone", r"mine_of_plugins.py has no Gone; its classes are Options, Mine, "),
    ("mine_of_plugins:NoClass", r"expected a class that inherits from megatron_dwm.plugin.Method"),
    ("mine_of_plugins:nothing", r"inherits from megatron_dwm.plugin.Method, got 3"),
    ("mine_of_plugins:Silent", rf"states no contract_version; add .* = {CONTRACT_VERSION}$"),
    (
        "mine_of_plugins:Newer",
        rf"contract_version {CONTRACT_VERSION + 1}, and this megatron_dwm has",
    ),
    ("mine_of_plugins:Unfinished", r"the class does not define weights"),
    ("mine_of_plugins:StateAlone", r"defines state_dict alone; a resumed run needs both"),
    ("mine_of_plugins:Odd", r"options: expected a dataclass, got <class 'dict'>"),
    ("megatron_dwm.weighting.dwm:Dwm", r"is the built-in method dwm; write policy.name dwm"),
    ("megatron_dwm.plugin:RuleBased", r"a base class of the package; inherit from it"),
    ("uniform:Mine", r"uniform is the name of a built-in method; call the module otherwise"),
]


@pytest.mark.parametrize(("name", "says"), OF_CLASSES)
def test_a_class_that_cannot_be_used_is_one_line(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        method_class(load_config(["--policy.name", name]))
    assert str(caught.value).startswith(f"policy.name {name}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Aimless", "its schedule has updates, but its parts lack target, which updates read"),
        ("Learns", "its schedule has updates, and the class does not define update"),
        ("Reads", "its schedule has updates, and the class does not define read_target"),
        ("Own", "its schedule has updates, and the class does not define own_update"),
        ("Pools", "pool_batches is above 1, and the class does not inherit from ChoosesFromPool"),
    ],
)
def test_what_a_class_cannot_do_is_one_line(name: str, says: str) -> None:
    """Else the run would end at the first one, which may be hours later."""
    config = load_config(["--policy.name", f"mine_of_plugins:{name}"])
    with pytest.raises(UserError, match=re.escape(f"mine_of_plugins:{name}: {says} (docs/")):
        check_method(config, num_layers=2, world_size=1)


def test_an_unknown_name_lists_the_known_ones() -> None:
    for name in ("unifrm", "a:b:c", "a.b", "a:", "1a:B", "a/b.py:C"):
        with pytest.raises(UserError, match="policy.name: expected one of .'uniform', .*, or pack"):
            load_config(["--policy.name", name])
        with pytest.raises(UserError, match="expected one of"):
            method_class(Config(policy=PolicyConfig(name=name)))


def test_an_unknown_part_is_one_line() -> None:
    loaded = load(["--policy.name", "mine_of_plugins:Misspelled"])
    parts = method_class(loaded.config).parts(loaded.config)
    with pytest.raises(UserError, match="unknown one, 'grups'; there are target, passages, "):
        warnings_of_effect(loaded.config, loaded.given, parts)


FAILING = {
    "import_error": ("import os\nimport not_installed_here\n", 2, "ModuleNotFoundError: No module"),
    "syntax": ("x = 1\nif x\n", 2, "SyntaxError: "),
    "deeper": ("def f():\n    return 1 / 0\n\nf()\n", 2, "ZeroDivisionError: division by zero"),
    "library": ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError: "),
    "leaves": ("import sys\nsys.exit(4)\n", 2, "SystemExit: 4"),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_exception_in_the_import_names_the_line(folder: Path, name: str) -> None:
    text, line, error = FAILING[name]
    file = folder / f"fails_{name}.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        method_class(load_config(["--policy.name", f"fails_{name}:X"]))
    message = str(caught.value)
    assert f"importing fails_{name} failed at {file} line {line}: {error}" in message
    assert "\n" not in message


def test_an_exception_in_a_package_names_its_deepest_line(folder: Path) -> None:
    package = folder / "package_of_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text("from package_of_plugins import helper\n")
    (package / "helper.py").write_text("\n\nopen('/nowhere/at all')\n")
    with pytest.raises(UserError, match=r"package_of_plugins/helper.py line 3: FileNotFoundError"):
        method_class(load_config(["--policy.name", "package_of_plugins.method:X"]))


def test_nobody_takes_a_built_in_name() -> None:
    with pytest.raises(TypeError):
        METHODS["uniform"] = Registered("mine", "mine_of_plugins:Mine")  # type: ignore[index]


def test_help_shows_the_options_of_the_method_that_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_dwm.config.load import exit_on_help

    with pytest.raises(SystemExit) as ended:
        exit_on_help("x", ["--policy.name", "mine_of_plugins:Mine", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--policy.options.count" in text and "how many" in text
    with pytest.raises(SystemExit):
        exit_on_help("x", ["--help"])
    assert "policy.options.count" not in capsys.readouterr().out
