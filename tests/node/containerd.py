"""The node's containerd: configuration, CNI networks, start and stop."""

from typing import Final

import grpc

from tests.node.cri import Cri
from tests.node.enclosure import Enclosure
from tests.node.images import PAUSE, import_image, pause_image
from tests.node.units import Service, Unit

SOCKET: Final = "/run/containerd/containerd.sock"
UNIT: Final = Unit("containerd", ("/usr/bin/containerd",))
DROP_IN: Final = "/usr/share/quickthaw/containerd/config-v2.toml"
"""The lines that our package ships for a config.toml of version 2, which both suites have."""
POD_NETWORK_V4: Final = "10.88.0.0/16"
POD_NETWORK_V6: Final = "fd00:88::/64"

CONFIG: Final = f"""\
version = 2
imports = ["/etc/containerd/conf.d/*.toml"]

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # A machine may have no CAP_SYS_RESOURCE, and then runc may not lower a score.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.nri.v1.nri"]
  disable = false
  socket_path = "/var/run/nri/nri.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
"""

RUNTIME_TABLE: Final = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]'
CNI: Final = f"""\
{{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {{
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "hairpinMode": true,
      "ipam": {{
        "type": "host-local",
        "ranges": [[{{"subnet": "{POD_NETWORK_V4}"}}], [{{"subnet": "{POD_NETWORK_V6}"}}]],
        "routes": [{{"dst": "0.0.0.0/0"}}, {{"dst": "::/0"}}],
        "dataDir": "/run/cni/networks"
      }}
    }}
  ]
}}
"""


class Containerd:
    """containerd on a node. `cri` exists while containerd runs.

    With `swapping` the next start makes containerd call quickthaw-runc, which must be installed.
    """

    def __init__(self, node: Enclosure) -> None:
        self.service = Service(node, UNIT)
        self.swapping = False
        self._node = node
        self._cri: Cri | None = None

    def configure(self) -> None:
        """Write configuration and networks, as docs/operations.md tells an administrator to."""
        config = CONFIG
        imported = self._node.path("/etc/containerd/conf.d/quickthaw.toml")
        imported.parent.mkdir(exist_ok=True)
        imported.unlink(missing_ok=True)
        if self.swapping:
            drop_in = self._node.path(DROP_IN).read_text()
            if self._replaces_sections():
                config += drop_in[drop_in.index(RUNTIME_TABLE) :]
            else:
                imported.write_text(drop_in)
        self._node.write("/etc/containerd/config.toml", config)
        self._node.write("/etc/cni/net.d/10-pods.conflist", CNI)
        # Nobody else is on the bridge: waiting for duplicates would only delay each pod.
        self._node.write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")

    def _replaces_sections(self) -> bool:
        """Returns whether an import replaces sections: containerd 1 takes a plugin's section from
        the import alone, 2 merges the two.
        """
        return self._node.run(["containerd", "--version"]).split()[2].startswith("1.")

    def start(self) -> None:
        """Start containerd, wait for CRI and the network, and import the pause image.

        Raises ServiceFailed.
        """
        self.configure()
        self.service.start(ready=self._ready)
        if PAUSE not in self.cri.image_names():
            import_image(self._node, pause_image())

    def _ready(self) -> None:
        self._cri = Cri(self._node.path(SOCKET))
        self._cri.wait_ready()

    @property
    def cri(self) -> Cri:
        """Returns the CRI client. Raises RuntimeError when containerd was not started."""
        if self._cri is None:
            raise RuntimeError("containerd does not run")
        return self._cri

    def stop(self) -> None:
        """Send SIGTERM. Containers go on: their shims are processes of their own."""
        self._hang_up()
        self.service.stop()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._hang_up()
        self.service.kill()

    def _hang_up(self) -> None:
        # An open channel would try for ever to reach a containerd that is gone.
        if self._cri is not None:
            self._cri.close()
            self._cri = None

    def restart(self) -> None:
        """Restart containerd underneath running containers."""
        self.stop()
        self.start()

    def channel(self) -> grpc.Channel:
        """Returns a new channel to containerd's API. The caller closes the channel."""
        return grpc.insecure_channel(f"unix:{self._node.path(SOCKET)}")
