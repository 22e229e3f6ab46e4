"""Flags of areas are read as the kernel prints them, also beside odd names of files."""

import ctypes
import mmap
import os

import pytest

from shim.kernel import smaps
from shim.kernel.smaps import FlaggedArea

TEXT = b"""7f00-8f00 rw-p 00000000 00:00 0    [anon: VmFlags: wf]
Size:                 60 kB
VmFlags: rd wr mr mw me ac wf
9f00-af00 r--p 00000000 08:01 77   /a/\\012VmFlags: dp
Size:                 60 kB
VmFlags: rd mr\x20
"""


def test_flags_of_each_area() -> None:
    assert smaps.parsed(TEXT) == [
        FlaggedArea(0x7F00, 0x8F00, frozenset({"rd", "wr", "mr", "mw", "me", "ac", "wf"})),
        FlaggedArea(0x9F00, 0xAF00, frozenset({"rd", "mr"})),
    ]


def test_flags_without_an_area_are_refused() -> None:
    with pytest.raises(ValueError, match="without an area"):
        smaps.parsed(b"VmFlags: rd\n")


def test_own_areas_have_the_advice_that_they_got() -> None:
    with mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page.madvise(18)  # MADV_WIPEONFORK
        byte = ctypes.c_char.from_buffer(page)
        place = ctypes.addressof(byte)
        (found,) = [each for each in smaps.areas(os.getpid()) if each.start <= place < each.end]
        del byte
    assert smaps.WIPE_ON_FORK in found.flags
