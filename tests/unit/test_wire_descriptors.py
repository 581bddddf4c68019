"""USB descriptors: whole, cut anywhere, and from devices that lie about their length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.wire import descriptors
from nodeagent.wire.descriptors import Setting, take_descriptors
from tests import machines

# A Security Key by Yubico and a hub with two alternate settings, as umockdev's recordings have them.
KEY = bytes.fromhex(
    "12010002000000405010200112050102000109022900010100800f"
    "0904000002030000000921100100012222000705040340000207058403400002"
)
HUB = bytes.fromhex(
    "1201100209000240da0b115404010102000109022900010100e000"
    "0904000001090001000705810301000c0904000101090002000705810301000c"
)
# A Realtek RTL8153 with two configurations: its maker's protocol, and Ethernet with two settings of the data interface.
HEAD = bytes.fromhex("12010003000000 09da0b53810030010206 02".replace(" ", ""))
VENDOR = bytes.fromhex("09021200010100a024" + "0904000000ffff0000")
ETHERNET = bytes.fromhex("09022400020200a024" + "090400000002060000" + "09040100000a000000" + "09040101000a000000")


def triples(data: bytes, value: int = 1) -> list[str]:
    return [setting.triple for setting in take_descriptors(data).settings(value)]


def test_whole() -> None:
    key = take_descriptors(KEY)
    assert (key.bcd_usb, key.vendor, key.product, key.cls, key.max_configurations) == (0x0200, 0x1050, 0x0120, 0, 1)
    assert key.settings(1) == (Setting(0, 0, 3, 0, 0),)
    assert take_descriptors(HUB).settings(1) == (Setting(0, 0, 9, 0, 1), Setting(0, 1, 9, 0, 2))


def test_only_the_configuration_that_is_asked_for() -> None:
    data = HEAD + VENDOR + ETHERNET
    assert triples(data, 1) == ["ff:ff:00"]
    assert triples(data, 2) == ["02:06:00", "0a:00:00", "0a:00:00"]
    assert triples(data, 3) == triples(data, 0) == []
    assert take_descriptors(data).max_configurations == 2


@pytest.mark.parametrize("data", [KEY, HUB, HEAD + VENDOR + ETHERNET])
def test_cut_anywhere(data: bytes) -> None:
    """What is taken of the front is the beginning of what is taken of the whole."""
    whole = {value: triples(data, value) for value in (1, 2)}
    for end in range(len(data)):
        try:
            taken = {value: triples(data[:end], value) for value in (1, 2)}
        except ValueError:
            continue
        for value, settings in whole.items():
            assert taken[value] == settings[: len(taken[value])]


def test_trailing_bytes_are_not_looked_at() -> None:
    assert triples(KEY + bytes.fromhex("0904010000080650 00".replace(" ", ""))) == ["03:00:00"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param("0904000000080650 00 ff21 01", ["08:06:50"], id="longer than what is left"),
        pytest.param("0904000000080650 00 0021 0904010000030101 00", ["08:06:50"], id="of no length"),
        pytest.param("0904000000080650 00 01 0904010000030101 00", ["08:06:50"], id="shorter than its own head"),
        pytest.param("0804000000080650 0904010000030101 00", ["03:01:01"], id="interface too short to be one"),
        pytest.param("0b04000000080650 00aabb", ["08:06:50"], id="interface longer than usual"),
        pytest.param("0904000000080650 00 0904000000030101 00", ["08:06:50"], id="a setting for the second time"),
        pytest.param("0904050000080650 00 0904fe0000030101 00", ["08:06:50", "03:01:01"], id="numbers from anywhere"),
        pytest.param("0902ff0001020080 32 0904000000080650 00", ["08:06:50"], id="a configuration inside of one"),
        pytest.param("0824 000000000000 0705810200020 0 0904000000080650 00", ["08:06:50"], id="others passed over"),
        pytest.param("", [], id="nothing"),
    ],
)
def test_lies_are_cut_where_the_kernel_cuts_them(body: str, expected: list[str]) -> None:
    inside = bytes.fromhex(body.replace(" ", ""))
    for total in (9 + len(inside), 0xFFFF):
        head = bytes((9, 2, total & 0xFF, total >> 8, 1, 1, 0, 0x80, 50))
        assert triples(KEY[:18] + head + inside) == expected


def test_a_configuration_that_was_cut_short_ends_where_the_next_begins() -> None:
    """The bytes behind the bad descriptor are not in the file, but the total length in it is still the device's."""
    lying = VENDOR[:2] + (0x0400).to_bytes(2, "little") + VENDOR[4:]
    data = HEAD + lying + ETHERNET
    assert triples(data, 1) == ["ff:ff:00"]
    assert triples(data, 2) == ["02:06:00", "0a:00:00", "0a:00:00"]


def test_a_total_length_of_less_than_its_head() -> None:
    assert triples(KEY[:20] + b"\0\0" + KEY[22:]) == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(KEY[:17], id="cut device"),
        pytest.param(KEY[:18], id="no configuration"),
        pytest.param(KEY[18:], id="no device"),
        pytest.param(KEY[:26], id="cut configuration head"),
        pytest.param(KEY[:18] + b"\x08" + KEY[19:], id="configuration head too short"),
        pytest.param(KEY[:18] + b"\xff" + KEY[19:], id="configuration head longer than the file"),
        pytest.param(HEAD + VENDOR, id="one configuration of two"),
        pytest.param(KEY + bytes(descriptors.MAX_BYTES), id="longer than the kernel shows"),
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ValueError, match="descriptors"):
        take_descriptors(data)


def test_as_many_as_the_kernel_takes() -> None:
    interfaces = b"".join(bytes((9, 4, n, 0, 0, 8, 6, 0x50, 0)) for n in range(200))
    head = bytes((9, 2, 0xFF, 0xFF, 1, 1, 0, 0x80, 50))
    assert len(triples(KEY[:18] + head + interfaces)) == descriptors.MAX_INTERFACES
    settings = b"".join(bytes((9, 4, 0, n, 0, 8, 6, 0x50, 0)) for n in range(256))
    assert len(triples(KEY[:18] + head + settings)) == descriptors.MAX_ALTERNATES
    many = KEY[:17] + b"\xff" + VENDOR * 255
    assert len(take_descriptors(many).configurations) == descriptors.MAX_CONFIGURATIONS


@given(st.binary(max_size=400))
def test_never_anything_but_value_error(untrusted: bytes) -> None:
    for data in (untrusted, KEY[:18] + untrusted, HEAD + VENDOR + untrusted):
        try:
            taken = take_descriptors(data)
        except ValueError:
            continue
        assert len(taken.configurations) <= descriptors.MAX_CONFIGURATIONS


@pytest.mark.parametrize("machine", machines.NAMES)
def test_recorded_ones_agree_with_the_attributes(machine: str) -> None:
    """Beside `descriptors` sysfs shows the same facts one by one."""
    tree = machines.tree(machine)
    for directory, files in tree.items():
        if "idVendor" not in files:
            continue
        taken = take_descriptors(bytes.fromhex(files["descriptors"].removeprefix("hex:")))
        assert files["idVendor"] == f"{taken.vendor:04x}" and files["idProduct"] == f"{taken.product:04x}"
        assert files["bDeviceClass"] == f"{taken.cls:02x}"
        assert files["bNumConfigurations"] == str(taken.max_configurations)
        assert files["version"].strip() == f"{taken.bcd_usb >> 8:x}.{taken.bcd_usb & 0xFF:02x}"
        active = taken.settings(int(files["bConfigurationValue"] or 0))
        name = directory.rpartition("/")[2]
        bus = f"{name.removeprefix('usb')}-0" if name.startswith("usb") else name
        shown = {d: f for d, f in tree.items() if d.startswith(f"{directory}/{bus}:") and "bInterfaceNumber" in f}
        assert len(shown) == len({setting.number for setting in active}), directory
        for interface in shown.values():
            ids = (
                "bInterfaceNumber",
                "bAlternateSetting",
                "bInterfaceClass",
                "bInterfaceSubClass",
                "bInterfaceProtocol",
            )
            assert Setting(*(int(interface[i], 10 if i == "bAlternateSetting" else 16) for i in ids)) in active
