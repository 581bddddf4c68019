#!/bin/sh
# Process 1 of the guest, after the initramfs has mounted the root and the shares. Nothing here is kept: the root is an
# overlay in memory.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

cgroup=v2 shell=
for word in $(cat /proc/cmdline); do
    case $word in lab.cgroup=*) cgroup=${word#*=} ;; lab.shell) shell=yes ;; esac
done
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t mqueue mqueue /dev/mqueue
mount -t securityfs securityfs /sys/kernel/security
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
if [ "$cgroup" = v1 ]; then
    mount -t tmpfs tmpfs /sys/fs/cgroup
    for controller in $(awk '!/^#/ && $4 { print $1 }' /proc/cgroups); do
        mkdir "/sys/fs/cgroup/$controller"
        mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller"
    done
else
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
ip link set lo up
hostname guest
# The checkout and its packages as if they were installed: the daemon's zygote takes no PYTHONPATH from anybody.
mkdir -p /usr/lib/python3/dist-packages
printf '/repo\n/site\n' >/usr/lib/python3/dist-packages/lab.pth

/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add --type=subsystems
udevadm trigger --action=add --type=devices
python3 /repo/tests/vm/guest/agent.py &
if [ $shell ]; then
    udevadm settle
    cd /root
    setsid -c sh -i </dev/console >/dev/console 2>&1
else
    wait $!
fi
echo o >/proc/sysrq-trigger
while :; do :; done
