"""Lists every parser of outside input, by the name of its corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.fuzz import container, files, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        wire.mux_frames, wire.ttrpc_frames, wire.nri_calls, wire.control_requests,
        files.tickets, files.manifests, files.signatures, files.keys, files.listings,
        files.records, files.verified_marks, files.hook_states, files.journals, files.outcomes,
        files.criu_logs, files.kubeconfigs, files.memory_layouts,
        files.working_sets, container.snapshot_facts, files.patches,
        container.criu_images, container.oci_specs, container.pod_annotations,
        container.log_expressions, container.overlays, container.open_files,
        container.ipc_objects, container.mount_points, container.sysv_lists, files.volume_facts,
        files.pod_records, container.proc_files,
    )
}  # fmt: skip
