"""HID report descriptors: whole, cut anywhere, and hostile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.wire import hid

# CTAP 2.1, 11.2.8: the report descriptor of a FIDO key.
FIDO = bytes.fromhex("06d0f10901a1010920150026ff007508954081020921150026ff00750895409102c0")
# HID 1.11, appendix E.10: a boot mouse, with a physical collection inside the application one.
MOUSE = bytes.fromhex(
    "05010902a1010901a100050919012903150025019503750181029501750581010501093009311581257f750895028106c0c0".replace(
        " ", ""
    )
)


@pytest.mark.parametrize(
    ("descriptor", "usages"),
    [
        pytest.param(FIDO, (0xF1D0_0001,), id="fido"),
        pytest.param(MOUSE, (0x0001_0002,), id="mouse: only the outermost collection counts"),
        pytest.param(MOUSE + FIDO, (0x0001_0002, 0xF1D0_0001), id="two collections, one interface"),
        pytest.param(FIDO + FIDO, (0xF1D0_0001,), id="each once"),
        pytest.param(bytes.fromhex("0b0100d0f1a101c0"), (0xF1D0_0001,), id="usage with its own page"),
        pytest.param(bytes.fromhex("0501a406d0f1b40906a101c0"), (0x0001_0006,), id="push and pop"),
        pytest.param(bytes.fromhex("0501fe02ffaabb0902a101c0"), (0x0001_0002,), id="long item passed over"),
        pytest.param(
            bytes.fromhex("05010902090609 07a101c0".replace(" ", "")), (0x0001_0002,), id="first usage counts"
        ),
        pytest.param(bytes.fromhex("0501a101c0"), (), id="collection without usage"),
        pytest.param(b"", (), id="empty"),
    ],
)
def test_usages(descriptor: bytes, usages: tuple[int, ...]) -> None:
    assert hid.usages(descriptor) == usages


@pytest.mark.parametrize(
    "descriptor",
    [
        pytest.param(b"\xc0", id="end without collection"),
        pytest.param(b"\xb4", id="pop without push"),
        pytest.param(b"\xa4" * 17, id="pushes without end"),
        pytest.param(b"\xfe", id="cut long item"),
        pytest.param(b"\xfe\x05\x00\x01", id="long item longer than the rest"),
        pytest.param(b"\x06\xd0", id="cut short item"),
        pytest.param(bytes(4097), id="longer than the kernel allows"),
    ],
)
def test_malformed(descriptor: bytes) -> None:
    with pytest.raises(ValueError, match="report descriptor"):
        hid.usages(descriptor)


def test_cut_anywhere() -> None:
    for end in range(len(FIDO)):
        try:
            assert hid.usages(FIDO[:end]) in ((), (0xF1D0_0001,))
        except ValueError:
            pass


def test_many_collections_are_bounded() -> None:
    many = b"".join(bytes((0x09, n, 0xA1, 0x01, 0xC0)) for n in range(1, 100))
    assert hid.usages(many) == tuple(range(1, hid.MAX_USAGES + 1))


@given(st.binary(max_size=300))
def test_never_anything_but_value_error(untrusted: bytes) -> None:
    try:
        usages = hid.usages(untrusted)
    except ValueError:
        return
    assert len(usages) <= hid.MAX_USAGES
    assert all(0 <= usage < 1 << 32 for usage in usages)
