"""The slots of a Ray cluster: of Ray's core alone, whose actors are started where the devices are."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import UserError
from lightning_glue.execution.joining import Files, describe
from lightning_glue.execution.place import Division, Place
from lightning_glue.utils.processes import PARENT
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from lightning_glue.execution.ray_group import RayGroup

_FORWARDED = ("MLFLOW_", "LIGHTNING_GLUE_", "AWS_")  # variables whose names begin so
_FORWARDED_NAMES = ("GLUE_DIR", "ROBERTA_BPE_DIR", "PYTHONPATH")
_OBJECT_STORE = 80 << 20  # bytes, nearly the least that Ray takes: no object of ours is larger than a message
_OWN_CLUSTER = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every port on loopback alone, as Ray does on those
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}
_TOKEN_HELP = "`ray get-auth-token --generate`, copy ~/.ray/auth_token to every node, export RAY_AUTH_MODE=token"


class RayEngine:
    """Connected to a cluster while it is entered.

    Args:
        address: ``host:port`` or ``auto``; None: a cluster of this machine alone.

    Attributes:
        environment: variables that go with every slot.
        placed: the node that each slot is on or goes to, by the slot's number.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self.environment: dict[str, str] = {}
        self.placed: dict[int, str] = {}
        self._choosing = threading.Lock()

    def __str__(self) -> str:
        return "the Ray cluster"

    def __enter__(self) -> RayEngine:
        # Before Ray is imported: it reads them once.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.address is None:
            os.environ.update(_OWN_CLUSTER)
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
        elif os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
            raise UserError(f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']!r}: anybody could run code; {_TOKEN_HELP}")
        self._connect()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name != PARENT and (name in _FORWARDED_NAMES or name.startswith(_FORWARDED))
        }
        return self

    def _connect(self) -> None:
        import ray

        given: dict[str, Any] = {"address": self.address}
        if self.address is None:
            given = {
                "address": "local",
                "object_store_memory": _OBJECT_STORE,
                "_node_ip_address": "127.0.0.1",
                "include_dashboard": False,
            }
        elif "://" in self.address:
            raise UserError(f"--address {self.address}; expected host:port of a cluster that this machine is a node of")
        before = signal.getsignal(signal.SIGTERM)
        try:
            # What a node that leaves prints there, some 20 lines on standard output, is said by its slots in one line.
            ray._private.worker.print_to_stdstream = lambda *_, **__: None
            ray.init(**given, log_to_driver=False, configure_logging=False)
        except ray.exceptions.AuthenticationError as error:
            raise UserError(f"Ray at {self.address}: {first_line(error)} {_TOKEN_HELP}") from None
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"Ray at {self.address or 'this machine'} cannot be used: {first_line(error)}; the command runs on a "
                "node of the cluster (`ray start --address=host:6379`), `ray status` there says what it has"
            ) from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own prints a stack

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are there."""
        import ray

        return [node for node in ray.nodes() if node["Alive"]]

    def is_alive(self, node_id: str) -> bool:
        return any(node["NodeID"] == node_id for node in self.nodes())

    def node_name(self, node_id: str) -> str:
        found = [node for node in self.nodes() if node["NodeID"] == node_id]
        return f"{found[0]['NodeManagerHostname']} ({found[0]['NodeManagerAddress']})" if found else node_id

    def gpus(self) -> int:
        return sum(int(node["Resources"].get("GPU", 0)) for node in self.nodes())

    def groups(self, how: Division, objective: str, folder: Path, files: Files | None = None) -> Sequence[RayGroup]:
        """See :class:`~lightning_glue.execution.engines.Engine`; more than there is room for wait until there is."""
        from lightning_glue.execution.ray_group import RayGroup
        from lightning_glue.execution.ray_session import Alike, Share

        alike = Alike(files, describe(files) | {"RAY_AUTH_MODE": "token"})
        resources = [node["Resources"] for node in self.nodes()]
        processes = how.gpus_per_trial if how.gpus else how.procs
        if how.gpus:
            if how.gpus_per_trial > 1 and how.trials_per_gpu > 1:
                raise UserError("--trials-per-gpu with --gpus-per-trial: Ray shares out single GPUs; leave one out")
            rooms = [int(each.get("GPU", 0)) // how.gpus_per_trial * how.trials_per_gpu for each in resources]
            most = how.gpus // how.gpus_per_trial * how.trials_per_gpu
            takes = {"GPU": how.gpus_per_trial / how.trials_per_gpu}
        else:
            rooms = [int(each.get("CPU", 0) >= how.procs) for each in resources]
            most, takes = sum(rooms), {"CPU": float(how.procs)}
        if not sum(rooms):
            what = f"{how.gpus_per_trial} GPUs" if how.gpus else f"{how.procs} CPUs"
            raise UserError(f"no node of the Ray cluster has {what} for a trial; `ray status` says what it has")
        count = how.workers or min(most, sum(rooms))
        fitting = sum(room > 0 for room in rooms)
        share = Share(takes, how.gpus_per_trial if how.gpus else 0, max(1, -(-count // fitting)))
        places = [Place(number, processes, (), 0) for number in range(count)]
        return [
            RayGroup(self, place, share, alike, objective, folder / f"worker-{place.number}.log") for place in places
        ]

    def choose_node(self, number: int, kind: str) -> str | None:
        """Where slot ``number`` is to go: the node with the fewest slots for its CPUs or GPUs (``kind``).

        Ray takes another node where that has no room.
        """
        sizes = {node["NodeID"]: node["Resources"].get(kind, 0) for node in self.nodes()}
        with self._choosing:  # the slots of a search start at the same time
            taken = Counter(self.placed.values())
            fitting = [node_id for node_id, size in sizes.items() if size]
            chosen = min(fitting, key=lambda node_id: taken[node_id] / sizes[node_id], default=None)
            if chosen:
                self.placed[number] = chosen
        return chosen
