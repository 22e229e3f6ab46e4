"""Processes of a container that the runtime does not know."""

import os
import time

from shim.kernel import procfs, survivors

ID = "f" * 64


def test_cgroup_names_of_every_driver_belong_to_the_container() -> None:
    for path in (
        f"/kubepods/besteffort/pod7a6f/{ID}",
        f"/kubepods.slice/kubepods-pod7a6f.slice/cri-containerd-{ID}.scope",
        f"/kubepods/pod7a6f/{ID}/of-its-own",
        f"/{ID}",
        f"/kubepods-pod7a6f.slice:cri-containerd:{ID}",
    ):
        assert survivors.is_named(path, ID), path


def test_other_cgroup_names_do_not_belong_to_the_container() -> None:
    for path in (f"/kubepods/{ID}x", f"/kubepods/x{ID}", f"/kubepods/cri-{ID}.slice", "/", ""):
        assert not survivors.is_named(path, ID), path


def test_too_short_or_unknown_cgroup_name_kills_no_process() -> None:
    own = procfs.cgroups("self")[0][1].rpartition("/")[2]
    assert survivors.kill(own[:31], until=time.monotonic() + 5) == []
    assert survivors.kill(ID, until=time.monotonic() + 5) == []
    assert os.getpid() not in survivors.members(own)
