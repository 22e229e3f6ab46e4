"""The sources of the packages agree with the code. `make packages` builds the packages."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from shim.contract import paths
from shim.contract.errors import BadConfig

TOP = Path(__file__).parents[2]
PACKAGING = TOP / "packaging"
UNIT = (PACKAGING / "systemd" / "quickthawd.service").read_text()
QUICKTHAW_RUNC = f"{paths.PREFIX}/bin/quickthaw-runc"

# Each of these settings gives a unit a mount namespace of its own: systemd.exec(5).
OWN_MOUNTS = {
    "BindPaths", "BindReadOnlyPaths", "ExecPaths", "InaccessiblePaths", "MountAPIVFS", "MountFlags",
    "MountImages", "NoExecPaths", "PrivateDevices", "PrivateMounts", "PrivateTmp", "PrivateUsers",
    "ProcSubset", "ProtectControlGroups", "ProtectHome", "ProtectHostname", "ProtectKernelLogs",
    "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem",
    "ReadOnlyPaths", "ReadWritePaths", "RootDirectory", "RootImage", "TemporaryFileSystem",
}  # fmt: skip


def script(name: str) -> ModuleType:
    """Loads a program of packaging/, which is a folder and no package."""
    spec = importlib.util.spec_from_file_location(f"packaging_{name}", PACKAGING / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, flags=re.MULTILINE)


def test_lock_pins_every_requirement_of_setup_cfg() -> None:
    script("vendor").refuse_stale_lock()


def test_lock_names_a_digest_for_every_wheel() -> None:
    blocks = re.split(r"\n(?=\S)", (PACKAGING / "wheels.lock").read_text().strip())[1:]
    assert blocks
    for block in blocks:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( \\\n    --hash=sha256:[0-9a-f]{64})+", block)


@pytest.mark.parametrize(
    ("wheel", "directory"),
    [
        ("rich-15.0.0-py3-none-any.whl", "pure"),
        ("protobuf-7.36.2-cp310-abi3-manylinux2014_x86_64.whl", "pure"),
        ("grpcio-1.85.1-cp314-cp314-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", "cp314"),
    ],
)
def test_wheel_that_serves_every_python_is_shipped_once(wheel: str, directory: str) -> None:
    assert script("vendor").directory_of(Path(wheel), "3.14") == directory


def test_wheel_is_pinned_under_its_name_in_setup_cfg() -> None:
    assert script("vendor").pin_of(Path("Foo_bar-1.2-py3-none-any.whl")) == "foo-bar==1.2"


def test_only_code_is_shipped() -> None:
    places = [place for _, place, _ in script("build").staged()]
    assert len(places) == len(set(places))
    assert "shim/contract/paths.py" in places
    assert not [place for place in places if re.search(r"\.proto$|\.pyi?c$|test|generate", place)]


@pytest.mark.parametrize(
    ("launcher", "module"),
    [
        ("front", "shim.front.main"),
        ("quickthaw", "shim.cli.main"),
        ("hook", "hook.__main__"),
        ("quickthawd", "shim.daemon.main"),
    ],
)
def test_launcher_imports_a_single_main_and_keeps_the_standard_library_first(
    launcher: str, module: str
) -> None:
    text = (PACKAGING / "launchers" / launcher).read_text()
    tree = ast.parse(text)
    imports = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert imports == [module]
    assert re.search(r"sys\.path( \+=|\.append)", text)
    assert "insert" not in text
    assert (launcher in ("front", "hook")) != text.startswith(
        f"#!{paths.PREFIX}/bin/python3 -ISE\n"
    )
    assert ("vendor" in text) == (launcher != "front")


def test_swap_path_never_sees_third_party_code() -> None:
    assert "vendor" not in (PACKAGING / "launchers" / "front").read_text()


def test_unit_shares_the_mounts_of_the_node() -> None:
    names = set(re.findall(r"^(\w+)=", UNIT, flags=re.MULTILINE))
    assert not names & OWN_MOUNTS, "a snapshot mounted by the daemon would not be the node's"


def test_unit_spares_processes_and_mounts_of_pods() -> None:
    assert settings("KillMode") == ["process"]
    assert settings("RuntimeDirectoryPreserve") == ["yes"]
    assert settings("RuntimeDirectoryMode") == settings("StateDirectoryMode") == ["0700"]


def test_systemd_does_not_try_a_wrong_configuration_again() -> None:
    assert settings("RestartPreventExitStatus") == [str(BadConfig.exit_code)]


def test_tmpfiles_make_every_directory_for_root_alone() -> None:
    lines = (PACKAGING / "tmpfiles" / "quickthaw.conf").read_text().splitlines()
    made = {line.split()[1]: line.split()[2:5] for line in lines if not line.startswith("#")}
    assert set(made) == {
        paths.RUN, paths.TICKETS, paths.SWAPPED, paths.CONTAINERS, paths.CONTROL, paths.OUTCOMES,
            paths.LOGS,
        paths.STORE, paths.SNAPSHOTS,
        f"{paths.STORE}/{paths.STORE_STAGING}", f"{paths.STORE}/{paths.STORE_QUARANTINE}",
    }  # fmt: skip
    assert all(owner == ["0700", "root", "root"] for owner in made.values())


@pytest.mark.parametrize(
    ("version", "plugin"),
    [(2, "io.containerd.grpc.v1.cri"), (3, "io.containerd.cri.v1.runtime")],
)
def test_drop_in_names_our_runtime_and_switches_nri_on(version: int, plugin: str) -> None:
    drop_in = tomllib.loads((PACKAGING / "containerd" / f"config-v{version}.toml").read_text())
    assert drop_in == {
        "version": version,
        "plugins": {
            "io.containerd.nri.v1.nri": {"disable": False},
            plugin: {
                "containerd": {
                    "runtimes": {
                        "runc": {
                            "runtime_type": "io.containerd.runc.v2",
                            "options": {"BinaryName": QUICKTHAW_RUNC},
                        }
                    }
                }
            },
        },
    }


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("postinst", "upgrade"),
        ("prerm", "2"),
        ("prerm", "failed-upgrade"),
        ("postrm", "upgrade"),
        ("postrm", "1"),
    ],
)
def test_maintainer_script_leaves_the_machine_alone_at_other_steps(
    name: str, argument: str
) -> None:
    subprocess.run(["/bin/sh", PACKAGING / "scripts" / name, argument], check=True, timeout=10)


def test_vendor_explains_its_use() -> None:
    command = [sys.executable, str(PACKAGING / "vendor.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert result.returncode == 1
    assert "vendor.py lock" in result.stderr
