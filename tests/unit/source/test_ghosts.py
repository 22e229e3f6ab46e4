"""Which deleted files CRIU may make again where other containers can write."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from shim.contract.errors import NotCapturable
from shim.criu import images
from shim.oci.spec import Spec
from shim.source import ghosts

if TYPE_CHECKING:
    from pathlib import Path

    from shim.source.source import Source


EMPTY = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir"


class Pod:
    """The parts of a source that `check` reads."""

    container = "c"
    spec = Spec(
        {
            "mounts": [
                {"destination": "/dev/shm/", "type": "bind", "source": "/a", "options": ["rbind"]},
                {
                    "destination": "/data",
                    "type": "bind",
                    "source": f"{EMPTY}/b",
                    "options": ["rbind"],
                },
                {
                    "destination": "/data/in",
                    "type": "bind",
                    "source": f"{EMPTY}/c",
                    "options": ["rbind"],
                },
                {"destination": "/host", "type": "bind", "source": "/srv", "options": ["rbind"]},
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
            ]
        }
    )


@pytest.mark.parametrize(
    ("path", "mode", "why"),
    [
        ("/dev/shm/x", 0o100600, ""),
        ("/dev/shm/x", 0o100755, ""),
        ("/dev/shm/x", 0o104755, "4755"),
        ("/dev/shm/x", 0o100666, "0666"),
        ("/dev/shm/x", 0o010600, "not a regular file"),
        ("/dev/shm/d/x", 0o100600, "in a directory below /dev/shm"),
        ("/data/in/x", 0o100600, ""),
        ("/data/in/d/x", 0o100600, "in a directory below /data/in"),
        ("/data/d/x", 0o100600, "in a directory below /data"),
        ("/host/x", 0o100600, "can be another pod's, too"),
        ("/run/d/x", 0o104666, ""),
        ("/srv/d/x", 0o104666, ""),
        ("/database/d/x", 0o104666, ""),
    ],
)
def test_only_deleted_files_that_nobody_can_redirect_are_captured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, mode: int, why: str
) -> None:
    monkeypatch.setattr(images, "ghosts", lambda _: [images.Ghost(path, mode)])
    source = cast("Source", Pod)
    if not why:
        ghosts.check(source, tmp_path)
        return
    with pytest.raises(NotCapturable, match=why):
        ghosts.check(source, tmp_path)
