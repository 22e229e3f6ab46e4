"""Rule 4 of the gate: makes facts of the CPU and the kernel that a restored process needs.

A process has chosen its code by the CPU that it started on (libc's string functions, crypto
libraries, JIT compilers), and keeps the size of the CPU state that a signal or libc's resolver
saves. Hence the new node must have every instruction set of the old, and the size of the state must
be equal. CRIU's own check asks for the same (criu-cpuinfo), but does not run by default. CRIU
allows further parts of the state as long as the size is equal; we do not: libc's resolver saves all
parts that the CPU has into room that it measured at the start.

`host_facts` reads /proc; the rest is pure. Lean. Sources: getauxval(3), proc_cpuinfo(5), CRIU's
criu/arch/x86/cpu.c for the rule.
"""

from __future__ import annotations

import os
import struct

from shim.contract import jsontext
from shim.contract.jsontext import canonical

_AT_PAGESZ, _AT_MINSIGSTKSZ = 6, 51
_AT_HWCAPS = (16, 26, 29, 30)
"""AT_HWCAP, AT_HWCAP2, AT_HWCAP3, AT_HWCAP4."""
_AUXV_ENTRY = struct.Struct("@LL")
_CPUINFO_BYTES = 64 * 1024
_FEATURE_LINES = ("flags", "Features")  # of x86, of arm64
_STATE = frozenset(
    ("xsave", "xsaveopt", "xsavec", "xsaves", "avx", "avx512f", "pku", "ospke", "mpx", "amx_tile",
     "apx_f", "user_shstk", "sve")
)  # fmt: skip
"""Features that are a part of the saved CPU state, or have a part in it."""
_FOR_THE_KERNEL = (
    # paging, interrupts, identification
    "vme de pse pse36 msr pae mce apic mtrr pge mca pat pcid nx pdpe1gb lm x2apic xtopology cpuid "
    "extd_apicid extapic cr8_legacy cmp_legacy topoext nodeid_msr amd_dcm ht hypervisor ss pbe "
    "tsc_deadline_timer tsc_adjust tsc_known_freq tsc_reliable constant_tsc nonstop_tsc art arat "
    "invpcid invpcid_single smep smap umip la57 wbnoinvd "
    # power, heat, faults
    "acpi tm tm2 est ida dtherm pln pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req hfi "
    "cpb hw_pstate cppc proc_feedback aperfmperf rapl epb overflow_recov succor smca wdt skinit "
    # measuring and resource control
    "arch_perfmon pebs bts dtes64 ds_cpl pdcm ibs perfctr_core perfctr_nb perfctr_llc perfmon_v2 "
    "bpext ptsc amd_lbr_v2 arch_lbr intel_pt cqm cqm_llc cqm_occup_llc cqm_mbm_total "
    "cqm_mbm_local rdt_a cat_l2 cat_l3 cdp_l2 cdp_l3 mba dca xtpr intel_ppin amd_ppin "
    # virtual machines, memory encryption
    "vmx smx svm svm_lock npt nrip_save lbrv tsc_scale vmcb_clean flushbyasid decodeassists "
    "pausefilter pfthreshold avic x2avic v_vmsave_vmload vgif v_spec_ctrl vnmi vmmcall "
    "tpr_shadow flexpriority ept ept_ad vpid sev sev_es sev_snp debug_swap tme pconfig "
    # answers to defects
    "pti ssbd ibrs ibpb stibp ibrs_enhanced virt_ssbd amd_stibp md_clear flush_l1d "
    "arch_capabilities split_lock_detect bus_lock_detect xsaveerptr"
)  # fmt: skip
_NOT_FOR_PROGRAMS = frozenset(_FOR_THE_KERNEL.split())
"""Names in /proc/cpuinfo that no program can notice. A name that is not here always counts."""


def host_facts(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> dict[str, str]:
    """Returns the facts of this node's processor and kernel, in canonical JSON. Raises OSError."""
    with open(f"{proc}/cpuinfo", "rb") as file:
        features = features_of(file.read(_CPUINFO_BYTES).decode(errors="replace"))
    with open(f"{proc}/self/auxv", "rb") as file:
        auxiliary = auxiliary_of(file.read())
    unified = os.path.exists(f"{cgroup}/cgroup.controllers")
    return facts_of(features, auxiliary, 2 if unified else 1)


def facts_of(features: list[str], auxiliary: dict[int, int], cgroup_version: int) -> dict[str, str]:
    """Returns the facts. An empty argument (no features, no auxiliary vector) makes no fact."""
    found: dict[str, object] = {"cgroup": cgroup_version}
    if features:
        found["cpu_features"] = sorted(set(features) - _NOT_FOR_PROGRAMS)
    if features and auxiliary:
        parts = sorted(_STATE.intersection(features))
        found["cpu_state"] = {"parts": parts, "frame_bytes": auxiliary.get(_AT_MINSIGSTKSZ, 0)}
    if auxiliary:
        # x86 repeats the features in its AT_HWCAP, heat and power included.
        first = 1 if "fpu" in features else 0
        found["cpu_hwcap"] = [auxiliary.get(name, 0) for name in _AT_HWCAPS[first:]]
        found["page_bytes"] = auxiliary.get(_AT_PAGESZ, 0)
    return {name: canonical(value) for name, value in found.items()}


def features_of(cpuinfo: str) -> list[str]:
    """Returns the features of the first processor: a kernel shows the same for all."""
    for line in cpuinfo.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() in _FEATURE_LINES:
            return value.split()
    return []


def auxiliary_of(auxv: bytes) -> dict[int, int]:
    """Returns type to value of an auxiliary vector."""
    whole = len(auxv) // _AUXV_ENTRY.size * _AUXV_ENTRY.size
    return dict(_AUXV_ENTRY.iter_unpack(auxv[:whole]))


def has_all(captured: str, wanted: str) -> bool:
    """Whether every item of the captured list is in the wanted list. Both are canonical JSON."""
    have, want = _loaded(captured), _loaded(wanted)
    return isinstance(have, list) and isinstance(want, list) and all(item in want for item in have)


def has_bits(captured: str, wanted: str) -> bool:
    """Whether every bit of the captured numbers is set in the wanted numbers."""
    have, want = _loaded(captured), _loaded(wanted)
    if not (isinstance(have, list) and isinstance(want, list) and len(have) == len(want)):
        return False
    if not all(isinstance(number, int) for number in have + want):
        return False
    return all(not bits & ~there for bits, there in zip(have, want, strict=True))


def is_not_older(version: str, than: str) -> bool:
    """Whether major.minor of `version` is not less than that of `than`; False when unreadable.

    `6.18.2-amd64` is 6.18: these two numbers say which features a release has.
    """
    have, want = _release(version), _release(than)
    return bool(have) and bool(want) and have >= want


def _release(version: str) -> tuple[int, ...]:
    """Returns major and minor of `6.18.2-amd64`, or of `Version: 4.2.1`; else an empty tuple."""
    numbers = version.split()[-1].split(".")[:2] if version.split() else []
    digits = [number.partition("-")[0].partition("+")[0] for number in numbers]
    right = len(digits) == 2 and all(each.isdecimal() and len(each) < 10 for each in digits)
    return tuple(map(int, digits)) if right else ()


def _loaded(text: str) -> object:
    try:
        found: object = jsontext.parse(text)
    except ValueError:
        return None
    return found
