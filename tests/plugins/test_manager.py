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


def test_a_class_registered_inline_is_found_and_forgotten() -> None:
    manager = PluginManager()
    manager.register(plugin(Echo), "mine")
    assert manager.classes("drafter") == {"echo": Echo}
    assert manager.origin(Echo) == "mine"
    assert manager.resolve("drafter", Selection("echo"))[0] is Echo
    manager.unregister("mine")
    assert manager.classes("drafter") == {}


def test_builtins_come_through_entry_points() -> None:
    manager = PluginManager().load()
    assert "token_recycling" in manager.classes("drafter")
    assert manager.failures == []


def test_names_are_unique_and_present() -> None:
    manager = PluginManager()
    manager.register(plugin(Echo), "mine")
    with pytest.raises(ValueError, match="registered already"):
        manager.register(plugin(Echo), "other")
    with pytest.raises(ValueError, match="has no name"):
        manager.register(plugin(type("Nameless", (), {})), "third")
    assert manager.classes("drafter") == {"echo": Echo}


def test_nothing_of_a_failed_plugin_stays() -> None:
    manager = PluginManager()
    with pytest.raises(ValueError, match="registered already"):
        manager.register(plugin(Echo, Echo), "twice")
    assert manager.classes("drafter") == {}
    manager.register(plugin(Echo), "twice")


def test_a_broken_plugin_is_kept_and_named_when_it_was_chosen() -> None:
    manager = PluginManager().load([EntryPoint("broken", "no.such.module", "pilotfish")])
    assert [f.plugin for f in manager.failures] == ["broken"]
    with pytest.raises(ConfigError, match=r"'broken': unknown.*failed to load: broken \(ModuleNotFoundError"):
        manager.get("drafter", "broken")


def test_allow_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTFISH_LOAD_PLUGINS", "vllm, other")
    assert PluginManager().load().classes("drafter") == {}
    monkeypatch.setenv("PILOTFISH_LOAD_PLUGINS", "token_recycling")
    assert list(PluginManager().load().classes("drafter")) == ["token_recycling"]
    monkeypatch.setenv("PILOTFISH_LOAD_PLUGINS", "")
    assert PluginManager().load().classes("drafter") == {}


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_kill_switch(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("PILOTFISH_DISABLE", value)
    assert disabled() is expected


def test_unknown_names_get_the_nearest_one() -> None:
    manager = PluginManager()
    manager.register(plugin(Echo), "mine")
    with pytest.raises(ConfigError, match="did you mean 'echo'"):
        manager.get("drafter", "ecko")
