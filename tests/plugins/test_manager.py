"""Tests of the plugin manager: registration, entry points, failures and environment variables."""

import types
from importlib.metadata import EntryPoint

import pytest

from pilotfish.plugins import hookimpl
from pilotfish.plugins.config import ConfigError, Selection
from pilotfish.plugins.contracts import Drafter
from pilotfish.plugins.manager import PluginManager, disabled


def plugin(*classes: type) -> types.ModuleType:
    @hookimpl
    def register_drafters(register) -> None:
        for cls in classes:
            register(cls)

    module = types.ModuleType("a_plugin")
    module.__dict__["register_drafters"] = register_drafters
    return module


class Echo(Drafter):
    name = "echo"

    def __init__(self, options, engine) -> None: ...
    def start(self, request, prompt, tenant=None) -> None: ...
    def observe(self, request, tokens, candidates) -> None: ...
    def propose(self, requests, budget):
        return []

    def finish(self, request) -> None: ...


def test_class_is_registered_and_unregistered() -> None:
    manager = PluginManager()
    manager.register(plugin(Echo), "mine")
    assert manager.classes("drafter") == {"echo": Echo}
    assert manager.origin(Echo) == "mine"
    assert manager.resolve("drafter", Selection("echo"))[0] is Echo
    manager.unregister("mine")
    assert manager.classes("drafter") == {}


def test_built_in_plugins_load_through_entry_points() -> None:
    manager = PluginManager().load()
    assert "token_recycling" in manager.classes("drafter")
    assert manager.failures == []


def test_refuses_duplicate_and_missing_names() -> None:
    manager = PluginManager()
    manager.register(plugin(Echo), "mine")
    with pytest.raises(ValueError, match="registered already"):
        manager.register(plugin(Echo), "other")
    with pytest.raises(ValueError, match="the class attribute `name` is missing"):
        manager.register(plugin(type("Nameless", (), {})), "third")
    assert manager.classes("drafter") == {"echo": Echo}


def test_failed_registration_leaves_no_classes() -> None:
    manager = PluginManager()
    with pytest.raises(ValueError, match="registered already"):
        manager.register(plugin(Echo, Echo), "twice")
    assert manager.classes("drafter") == {}
    manager.register(plugin(Echo), "twice")


def test_broken_plugin_is_named_when_selected() -> None:
    manager = PluginManager().load([EntryPoint("broken", "no.such.module", "pilotfish")])
    assert [f.plugin for f in manager.failures] == ["broken"]
    with pytest.raises(ConfigError, match=r"'broken': unknown.*failed to load: broken \(ModuleNotFoundError"):
        manager.get("drafter", "broken")


def test_load_plugins_variable_is_an_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTFISH_LOAD_PLUGINS", "vllm, other")
    assert PluginManager().load().classes("drafter") == {}
    monkeypatch.setenv("PILOTFISH_LOAD_PLUGINS", "token_recycling")
    assert list(PluginManager().load().classes("drafter")) == ["token_recycling"]
    monkeypatch.setenv("PILOTFISH_LOAD_PLUGINS", "")
    assert PluginManager().load().classes("drafter") == {}


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_disable_variable_is_a_kill_switch(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("PILOTFISH_DISABLE", value)
    assert disabled() is expected


def test_unknown_name_error_suggests_the_nearest_name() -> None:
    manager = PluginManager()
    manager.register(plugin(Echo), "mine")
    with pytest.raises(ConfigError, match="did you mean 'echo'"):
        manager.get("drafter", "ecko")
