"""Checks that apply to every plugin and need no engine; the plugins are those of `default_plugins`."""

import types

import pytest
from default_plugins import ALL_PLUGINS, ENGINE_PLUGINS, PluginCase

from pilotfish.integrations.vllm.engine import log, selection
from pilotfish.plugins import hookimpl
from pilotfish.plugins.config import ROOT, ConfigError, PilotfishConfig, Selection
from pilotfish.plugins.contracts import Engine
from pilotfish.plugins.manager import HOOKS, PluginManager, disabled, plugins

every_plugin = pytest.mark.parametrize("case", ALL_PLUGINS, ids=str)
every_engine_plugin = pytest.mark.parametrize("case", ENGINE_PLUGINS, ids=str)


def test_the_matrix_has_every_plugin() -> None:
    registered = {
        (kind, name)
        for kind in HOOKS
        if kind != "encoder"  # encoders have no options
        for name, cls in plugins().classes(kind).items()
        if cls.__module__.startswith("pilotfish.")
    }
    assert {(case.kind, case.name) for case in ALL_PLUGINS} == registered


@every_plugin
def test_valid_options_are_accepted(case: PluginCase) -> None:
    cls, options = plugins().resolve(case.kind, Selection(case.name, case.options))
    assert cls.name == case.name  # type: ignore[attr-defined]
    assert all(getattr(options, name) is not None for name in case.options)


@every_plugin
def test_an_unknown_option_is_refused_with_the_nearest_one(case: PluginCase) -> None:
    option, nearest = case.misspelt
    with pytest.raises(ConfigError, match=rf"^pilotfish\.{case.kind}\.{option}: unknown") as refused:
        plugins().resolve(case.kind, Selection(case.name, {option: 1}))
    assert "\n" not in str(refused.value)
    assert not nearest or f"did you mean '{nearest}'?" in str(refused.value)


@every_plugin
def test_a_value_of_a_wrong_type_is_refused(case: PluginCase) -> None:
    if case.wrong_type is None:
        pytest.skip("the plugin has no options")
    option, value = case.wrong_type
    with pytest.raises(ConfigError, match=rf"^pilotfish\.{case.kind}\.{option}: expected .*, got ") as refused:
        plugins().resolve(case.kind, Selection(case.name, {option: value}))
    assert "\n" not in str(refused.value)


@every_plugin
def test_a_misspelt_name_is_refused_with_the_nearest_one(case: PluginCase) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{case.name}'"):
        plugins().resolve(case.kind, Selection(case.name + "x", {}))


@every_plugin
def test_a_third_party_registers_a_subclass(case: PluginCase) -> None:
    cls = type("ThirdParty", (plugins().get(case.kind, case.name),), {"name": "third_party"})

    def register_it(register) -> None:
        register(cls)

    register_it.__name__ = HOOKS[case.kind]
    module = types.ModuleType("third_party")
    setattr(module, HOOKS[case.kind], hookimpl(register_it))
    manager = PluginManager().load()
    manager.register(module, "third_party_package")
    found, _ = manager.resolve(case.kind, Selection("third_party", case.options))
    assert found is cls
    assert manager.origin(cls) == "third_party_package"
    manager.unregister("third_party_package")
    assert "third_party" not in manager.classes(case.kind)
    assert case.name in manager.classes(case.kind)


@every_engine_plugin
def test_the_start_up_report_names_plugin_options_and_engine(case: PluginCase) -> None:
    cls, options = plugins().resolve(case.kind, Selection(case.name, case.options))
    engine = Engine("some-model", 1000, 512, 8, layers=2)
    report = log.start_up_table(
        case.kind, selection.Attachment(cls, options, engine, PilotfishConfig()), "somewhere in the engine"
    )
    assert report.startswith(f"pilotfish: {case.kind} {case.name} selected\n")
    for part in (case.name, str(options), "some-model, 2 layers", "somewhere in the engine"):
        assert part in report


@every_engine_plugin
def test_the_environment_variable_disables_it(case: PluginCase, monkeypatch: pytest.MonkeyPatch) -> None:
    selected = {ROOT: {case.kind: {"name": case.name, **case.options}}}
    assert list(selection.read_config(selected).selected()) == [case.kind]
    assert not selection.is_selected({}), "without a configuration nothing is selected"
    monkeypatch.setenv("PILOTFISH_DISABLE", "1")
    assert disabled()
    assert not selection.read_config(selected).selected()
