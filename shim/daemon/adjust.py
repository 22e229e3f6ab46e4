"""Gives an opted-in container, cold or restored, a control directory, hooks and CRIU's options.

Both get the same, so that the specs of a captured and of a restored container are alike.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from protos import nri_pb2
from shim.contract.paths import (
    CONTAINERS,
    CONTROL,
    CONTROL_IN_CONTAINER,
    GPU_LIBRARIES,
    GPU_LIBRARY,
    HOOK,
)
from shim.criu import options
from shim.kernel import mounts

if TYPE_CHECKING:
    from collections.abc import Sequence

HOOK_S: Final = 20
"""Seconds. A container must not wait for ever for a hook; runc then fails its create."""
_CONTROL_OPTIONS: Final = "mode=1777,size=1m,nr_inodes=64"
"""The container writes to this tmpfs, and must not be able to fill the node's /run."""


def prepare(container: str) -> None:
    """Make the container's directories. Raises OSError after removing everything it has made."""
    private, control = f"{CONTAINERS}/{container}", f"{CONTROL}/{container}"
    with contextlib.ExitStack() as undo:
        os.mkdir(private, 0o700)
        undo.callback(os.rmdir, private)
        os.mkdir(control, 0o700)
        undo.callback(os.rmdir, control)
        flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
        mounts.mount("tmpfs", control, "tmpfs", flags, _CONTROL_OPTIONS)
        undo.callback(mounts.unmount, control, detach=True)
        options.write(options.path_of(container))
        undo.pop_all()


def adjustment(container: str) -> nri_pb2.ContainerAdjustment:
    """Returns our additions to the container's spec, which containerd makes."""
    return nri_pb2.ContainerAdjustment(
        annotations={options.ANNOTATION: options.path_of(container)},
        mounts=[
            nri_pb2.Mount(
                destination=CONTROL_IN_CONTAINER,
                type="bind",
                source=f"{CONTROL}/{container}",
                options=["bind", "rprivate", "rw", "nosuid", "nodev", "noexec"],
            )
        ],
        hooks=nri_pb2.Hooks(
            prestart=[_hook("prestart", container)], poststop=[_hook("poststop", container)]
        ),
    )


_PRELOAD: Final = "LD_PRELOAD"


def with_library(
    adjusted: nri_pb2.ContainerAdjustment, environment: Sequence[str]
) -> nri_pb2.ContainerAdjustment:
    """The same, and the library of the way `direct`, before what the container preloads itself.

    environment: the container's, as NAME=VALUE.
    """
    own = [each.partition("=")[2] for each in environment if each.startswith(f"{_PRELOAD}=")]
    preloaded = " ".join([f"{GPU_LIBRARIES}/{GPU_LIBRARY}", *own[-1:]])
    adjusted.env.append(nri_pb2.KeyValue(key=_PRELOAD, value=preloaded))
    options = ["bind", "rprivate", "ro", "nosuid", "nodev"]
    adjusted.mounts.append(
        nri_pb2.Mount(destination=GPU_LIBRARIES, type="bind", source=GPU_LIBRARIES, options=options)
    )
    return adjusted


def _hook(name: str, container: str) -> nri_pb2.Hook:
    args = ["quickthaw-hook", name, container]
    return nri_pb2.Hook(path=HOOK, args=args, timeout=nri_pb2.OptionalInt(value=HOOK_S))
