"""What runs inside the guest. `init.sh` and `agent.py` need nothing but the root; `node.py` needs the checkout's packages."""
