"""`python benchmarks/slow_link.py DESCRIPTOR SECONDS`: one end of a link between two network namespaces, with a delay.

Makes a TUN device in the namespace of this process.  Its packets go to the socket DESCRIPTOR, at whose other end the
same program runs in the other namespace.  (The kernel's own `tc qdisc add dev DEVICE root netem delay 50ms` does this
too, but many kernels are built without it.)  Runs until its standard input is closed.
"""

import fcntl
import os
import queue
import socket
import struct
import sys
import threading
import time
from contextlib import suppress

DEVICE = "wire"
MTU = 60000  # bytes per packet: few packets, so that forwarding them costs little
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # <linux/if_tun.h>


def forward(descriptor: int, delay_s: float) -> None:
    """Hand the packets of a TUN device of this namespace to the socket `descriptor`, late, and those from it back."""
    device, other = os.open("/dev/net/tun", os.O_RDWR), socket.socket(fileno=descriptor)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    on_the_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def take() -> None:
        while True:
            with suppress(OSError):  # the device is not up yet
                packet = os.read(device, MTU)
                on_the_way.put((time.monotonic() + delay_s, packet))

    def send() -> None:
        while True:
            due, packet = on_the_way.get()
            time.sleep(max(due - time.monotonic(), 0.0))
            other.send(packet)

    def receive() -> None:
        while packet := other.recv(MTU):
            with suppress(OSError):  # the device is not up yet
                os.write(device, packet)

    for work in (take, send, receive):
        threading.Thread(target=work, daemon=True).start()
    print(flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    forward(int(sys.argv[1]), float(sys.argv[2]))
