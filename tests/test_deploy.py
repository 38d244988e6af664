"""What `deploy/` holds: commands that exist, ports that are the server's, what is shut."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml  # type: ignore[import-untyped]
from test_documents import blocks, parse

from homefire.__main__ import app
from homefire.server.operator_home import FEDERATION
from homefire.server.server_config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
SERVER, DEVICE = DEPLOY / "homefire-server.service", DEPLOY / "homefire-device.service"
INSTANCE = DEPLOY / "homefire-device@.service"
LONGEST_END = 15.0  # seconds; see `homefire.server.supervisor.Child.end`

Unit = dict[str, list[str]]


def read_unit(path: Path) -> Unit:
    """A unit's options; one that comes again adds to what was there, as systemd reads it."""
    found: Unit = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    return content


def service() -> dict[str, Any]:
    (only,) = compose()["services"].values()
    return dict(only)


def dockerfile() -> str:
    return (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def commands() -> dict[str, list[str]]:
    """The arguments of every homefire in these files, by where they stand."""
    found = {"compose command": service()["command"]}
    _, *check = service()["healthcheck"]["test"]
    found["compose healthcheck"] = check[1:]
    (default,) = re.findall(r"^CMD (.*)$", dockerfile(), re.MULTILINE)
    found["Dockerfile"] = re.findall(r'"([^"]*)"', default)
    for path in UNITS:
        (line,) = read_unit(path)["ExecStart"]
        (arguments,) = re.findall(r"/homefire ([^']*)", line)
        found[path.name] = shlex.split(arguments)
    return found


@pytest.mark.parametrize("where", commands())
def test_commands_are_understood(where: str) -> None:
    parse(typer.main.get_command(app), commands()[where])


def test_the_commands_serve_and_join() -> None:
    found = commands()
    assert found["compose command"] == found["Dockerfile"] == ["server", "run"]
    assert found[SERVER.name] == ["server", "run"]
    assert found["compose healthcheck"] == ["server", "status", "--json", "--check"]
    assert service()["healthcheck"]["test"][:2] == ["CMD", "homefire"]
    for path in (DEVICE, INSTANCE):
        assert found[path.name][:3] == ["device", "join", "--yes"]  # nobody is there to be asked


def test_ports_are_those_that_the_server_listens_on_for_devices() -> None:
    config = ServerConfig(names=("x",), **{})
    public = [each.rpartition(":")[2] for each in (config.fleet, config.registry)]
    assert service()["ports"] == [f"{port}:{port}" for port in public]
    (exposed,) = re.findall(r"^EXPOSE (.*)$", dockerfile(), re.MULTILINE)
    assert exposed.split() == public
    for port in (config.private, config.operator):
        for path in DEPLOY.iterdir():
            if path.suffix != ".md":
                assert str(port) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_every_unit_is_shut(path: Path) -> None:
    unit = read_unit(path)
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["LimitCORE"] == ["0"]
    assert unit["UMask"] == ["0077"]
    assert unit["RestrictAddressFamilies"] == ["AF_INET AF_INET6 AF_UNIX"]
    assert unit["SystemCallFilter"][0] == "@system-service"
    assert unit["Restart"] == ["on-failure"]
    assert unit["KillMode"] == ["mixed"]  # the command ends its processes itself
    assert int(unit["TimeoutStopSec"][0]) >= 60
    assert "StartLimitBurst" in unit


@pytest.mark.parametrize("path", [SERVER, INSTANCE], ids=lambda path: path.name)
def test_what_runs_without_a_person_has_an_account_of_its_own(path: Path) -> None:
    unit = read_unit(path)
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == [""]
    for name in ("ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces", "RemoveIPC"):
        assert unit[name] == ["yes"], name
    assert unit["ProtectProc"] == ["invisible"]
    assert unit["StateDirectoryMode"] == ["0700"]
    assert unit["User"] == unit["Group"] != ["root"]
    folder = f"/var/lib/{unit['StateDirectory'][0]}/"
    assert any(folder in each for each in unit["Environment"])


def test_the_server_has_time_to_end_its_processes() -> None:
    processes = 3
    assert int(read_unit(SERVER)["TimeoutStopSec"][0]) > processes * LONGEST_END
    assert int(service()["stop_grace_period"].removesuffix("s")) > processes * LONGEST_END


def test_no_secret_is_in_a_units_environment() -> None:
    for path in UNITS:
        assert "PASSPHRASE" not in " ".join(read_unit(path).get("Environment", [])), path


# What the README tells people to type


def typed() -> list[str]:
    """The lines of its blocks, in their order."""
    return [line for block in blocks(DEPLOY / "README.md") for line in block.splitlines()]


def typed_for_compose() -> list[list[str]]:
    """The words of every `docker compose`, each named with the file that lies here."""
    lines = [shlex.split(line) for line in typed() if line.startswith("docker ")]
    for words in lines:
        assert words[:4] == ["docker", "compose", "--file", "deploy/compose.yaml"]
    return [words[4:] for words in lines]


def test_what_is_typed_for_the_container_is_understood() -> None:
    (name,) = compose()["services"]
    found = [words[words.index(name) + 1 :] for words in typed_for_compose() if name in words]
    found = [words[1:] if words[0] == "homefire" else words for words in found]
    ours = [words for words in found if words[0] in ("server", "models")]
    assert [words[:2] for words in ours] == [
        *(["models", "get"], ["server", "init"], ["server", "enroll"]),
    ]
    for words in ours:
        parse(typer.main.get_command(app), words)


def test_the_container_starts_with_the_operators_settings() -> None:
    (folder,) = re.findall(r"\bHOMEFIRE_SERVER_HOME=(\S+)", dockerfile())
    verbs = [" ".join(words) for words in typed_for_compose()]
    (init,) = (at for at, words in enumerate(verbs) if " server init " in words)
    (put,) = (at for at, words in enumerate(verbs) if f"cat > {folder}/{FEDERATION}" in words)
    (up,) = (at for at, words in enumerate(verbs) if words.startswith("up "))
    assert init < put < up
    assert "--users" in verbs[init]
    assert "--entrypoint sh" in verbs[put]
    assert "-T" in verbs[put].split()  # without it what is piped in is a terminal's


@pytest.mark.parametrize("path", [SERVER, INSTANCE], ids=lambda path: path.name)
def test_the_accounts_shell_has_the_units_environment(path: Path) -> None:
    unit = read_unit(path)
    (account,) = unit["User"]
    (line,) = (line for line in typed() if line.startswith(f"sudo -u {account} env "))
    theirs = dict(each.split("=", 1) for each in shlex.split(line)[4:-1])
    units = " ".join(unit["Environment"]).replace("%i", "cellar").split()
    for name, value in (each.split("=", 1) for each in units):
        if name != "HF_HUB_OFFLINE":  # models are fetched there
            assert theirs[name] == value, name
    program = unit["ExecStart"][0].split("/homefire ")[0].rpartition("exec ")[2]
    assert theirs["PATH"] == f"{program}:$PATH"


def test_a_device_is_started_after_it_is_enrolled() -> None:
    starts = [at for at, line in enumerate(typed()) if "enable --now homefire-device" in line]
    assert len(starts) == 2
    for before, start in zip([0, starts[0]], starts, strict=True):
        lines = typed()[before:start]
        verbs = [line.split()[1:3] for line in lines if line.startswith("homefire ")]
        wanted = [["models", "get"], *(["device", verb] for verb in ("init", "import", "enroll"))]
        assert [verb for verb in verbs if verb in wanted][-len(wanted) :] == wanted
        assert any("[gguf]" in line for line in lines)  # for the model that is fetched


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_reads_every_unit(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    # It looks whether the program is there.
    text = re.sub(r"(/opt/homefire|%h/\.local)/bin/homefire", "/bin/true", text)
    (tmp_path / path.name).write_text(text, encoding="utf-8")
    done = subprocess.run(  # noqa: S603 - our own command
        ["systemd-analyze", "verify", tmp_path / path.name],  # noqa: S607
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_container_is_shut() -> None:
    found = service()
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["init"] is True  # somebody must reap
    assert found["user"] == "10001:10001"
    assert found["restart"] == "on-failure:5"
    assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & set(found)
    assert {each.partition(":")[0] for each in found["volumes"]} == set(compose()["volumes"])


def test_the_image_runs_as_nobody_special_and_writes_its_volumes_alone() -> None:
    text = dockerfile()
    (user,) = re.findall(r"^USER (.*)$", text, re.MULTILINE)
    assert user == service()["user"]
    (volumes,) = re.findall(r"^VOLUME (.*)$", text, re.MULTILINE)
    mounted = [each.partition(":")[2] for each in service()["volumes"]]
    assert re.findall(r'"([^"]*)"', volumes) == mounted
    for name in ("HOMEFIRE_SERVER_HOME", "HOMEFIRE_CACHE"):
        (value,) = re.findall(rf"\b{name}=(\S+)", text)
        assert any(value == folder or value.startswith(f"{folder}/") for folder in mounted), name


def test_the_image_has_what_a_server_needs_and_no_tools() -> None:
    _, build, final = dockerfile().split("\nFROM ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (named,) = re.findall(r"\.whl\)\[([a-z,-]+)\]", build)
    # Dequantising the alias of the template needs gguf.
    assert set(named.split(",")) == {"server", "gguf"} <= set(project["optional-dependencies"])
    assert "--constraint constraints.txt" in build
    assert "pip" not in final and "COPY --from=build /opt/homefire /opt/homefire" in final
    copied = re.findall(r"^COPY (.*) \S+$", build, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
        assert f"!{name}" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()


def test_images_are_plain_names() -> None:
    for name in re.findall(r"^FROM (\S+)", dockerfile(), re.MULTILINE):
        assert re.fullmatch(r"python:3\.\d+-slim", name)


def test_nothing_of_it_is_in_the_wheel_or_in_flowers_bundle() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert not [name for name in project["setuptools"]["packages"] if "deploy" in name]
    assert not [pattern for pattern in project["flwr"]["app"]["fab-include"] if "deploy" in pattern]
