"""CRIU's images get the new pod's addresses and host name."""

import os
from pathlib import Path

import pytest

from shim.criu.fixedwidth import address_words, encode_word
from shim.network import readdress


def test_addresses_are_replaced_by_addresses_of_the_same_family() -> None:
    assert readdress.replacements(["10.0.0.1", "fd00::1"], ["10.0.0.2", "10.0.0.3"]) == {
        "10.0.0.1": "10.0.0.2"
    }
    assert address_words("1.2.3.4") == [0x04030201]


def test_addresses_are_overwritten_in_place() -> None:
    old = encode_word(address_words("10.0.0.1")[0])
    new = encode_word(address_words("10.0.0.2")[0])
    patched = readdress.readdressed(
        b"head" + old + b"tail", [("10.0.0.1", [4])], {"10.0.0.1": "10.0.0.2"}
    )
    assert patched == b"head" + new + b"tail"


def test_uts_image_gets_the_new_host_name() -> None:
    def image(entry: bytes) -> bytes:
        return b"01234567" + len(entry).to_bytes(4, "little") + entry

    changed = readdress.renamed(image(b"\x0a\x03old\x12\x06(none)"), "longer")
    assert changed == image(b"\x0a\x06longer\x12\x06(none)")
    with pytest.raises(ValueError, match="no host name"):
        readdress.renamed(image(b"\x12\x06(none)"), "any")
    with pytest.raises(ValueError, match="no host name"):
        readdress.renamed(image(b"\x0a\x03old"), "x" * 65)


def test_a_view_links_big_images_relatively(tmp_path: Path) -> None:
    own = tmp_path / "store" / "criu"
    own.mkdir(parents=True)
    (own / "pages-1.img").write_bytes(b"pages")
    (own / "files.img").write_bytes(b"captured")
    view = str(tmp_path / "view")
    readdress.view_of(str(own), view, ["pages-1.img"], {"files.img": b"patched"})
    assert Path(view, "files.img").read_bytes() == b"patched"
    assert os.readlink(f"{view}/pages-1.img") == "../store/criu/pages-1.img"
    assert Path(view, "pages-1.img").read_bytes() == b"pages"
    assert (own / "files.img").read_bytes() == b"captured", "the snapshot stays"
