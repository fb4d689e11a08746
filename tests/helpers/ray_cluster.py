"""A Ray cluster of several nodes on this machine, each with a loopback address of its own."""

from __future__ import annotations

import os
import secrets
from typing import Any

STORE = 80 << 20  # bytes of an object store
QUICKER = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


class RayNodes:
    """A head without CPUs, where drivers run, and ``count`` nodes with ``cpus`` each.

    Their processes inherit this one's environment. Ray must not have been imported before the first: it reads the
    environment then.
    """

    def __init__(self, count: int, cpus: int = 2) -> None:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
        os.environ |= {
            "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }  # fmt: skip
        from ray.cluster_utils import Cluster

        self.count = 0
        head = self._arguments(0) | {"include_dashboard": False, "_system_config": QUICKER}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add(cpus, wait=False) for _ in range(count)]
        self.cluster.wait_for_nodes()

    def _arguments(self, cpus: int) -> dict[str, Any]:
        self.count += 1
        return {"num_cpus": cpus, "object_store_memory": STORE, "node_ip_address": f"127.0.0.{self.count + 1}"}

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, cpus: int, *, wait: bool = True) -> Any:
        return self.cluster.add_node(wait, **self._arguments(cpus))

    def named(self, name: str) -> Any:
        """The node of that name, which ends with its address in brackets."""
        return next(node for node in self.nodes if f"({node.node_ip_address})" in name)

    def kill(self, node: Any) -> None:
        """As if its machine had lost its power, but for the actors, which end by themselves at once."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        self.cluster.shutdown()
