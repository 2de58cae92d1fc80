"""How an environment is served: its data, and the limits of its sessions."""

import dataclasses

from spa_jax.settings import MAY, Checked, setting


@dataclasses.dataclass(frozen=True)
class ServerConfig(Checked):
    """An environment server.

    Attributes:
      data_dir: the environment's data, such as ALFWorld's json_2.1.1, its parent, or a folder
        that holds splits.
      env: the environment's name, one of `envs.benchmarks.BENCHMARKS`.
      prompt: the instruction of a session that does not choose one itself.
    """

    data_dir: str
    env: str = "alfworld"
    prompt: str = "paper"
    max_sessions: int = setting(
        0,
        "Sessions at once, each with a process of its own; 0: as many as the memory that is free "
        "at the start has room for.",
        minimum=0,
        group=MAY,
    )
    games_per_worker: int = setting(
        0, "Games after which a process is replaced; 0: as suits the environment.", minimum=0
    )
    worker_memory_mb: int = setting(
        0,
        "Memory (without mapped files) above which a process is ended, and its episode with it; "
        "0: as suits the environment.",
        minimum=0,
    )
    reset_deadline_s: float = setting(120.0, "Seconds that a reset may take.", above=0)
    step_deadline_s: float = setting(60.0, "Seconds that a step may take.", above=0)
    idle_timeout_s: float = setting(
        1800.0, "Seconds without a message after which a session ends; 0: never.", minimum=0
    )
    first_message_s: float = setting(
        30.0,
        "Seconds that a connection may take for a request, and a session for each message before "
        "its first reset.",
        above=0,
    )
    max_waiting: int = setting(
        256,
        "Connections without a session; with more, the one that has waited longest is closed.",
        minimum=1,
    )
    max_message_kb: int = setting(1024, "The longest message that is read, in KiB.", minimum=1)
    messages_per_s: float = setting(
        1000.0, "Messages a second of a session; more are slowed down; 0: any number.", minimum=0
    )
    drain_s: float = setting(
        5.0, "Seconds that calls in progress have when the server is told to stop.", minimum=0
    )
