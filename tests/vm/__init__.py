"""A real Debian kernel under QEMU, for what no fake can show: real USB devices, the real udev, a real cgroup tree.

    rootfs initramfs     what is booted: a root from mmdebstrap, kept in a cache, and 5 MB that mount it over 9p
    lab                  one Vm: boot, run commands, put and get files, plug and unplug
    lines qmp            JSON lines to the guest's agent, and to QEMU
    gadgets qemu_usb     USB devices: gadgets of the guest's own kernel on dummy_hcd, and QEMU's
    card                 a scripted smart card for QEMU's reader
    node wire            the daemon with its stand-in kubelet and runtime in the guest, driven from here
    guest/               what runs inside

By hand: `python -m tests.vm shell` (see CONTRIBUTING.md).
"""
