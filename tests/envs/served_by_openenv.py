"""An environment on the real package `openenv-core`; a program of its own: it prints its port."""

import socket
from typing import Any

import uvicorn
from openenv.core.env_server.http_server import HTTPEnvServer
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, ConcurrencyConfig, Observation, State
from pydantic import ConfigDict


class SayAction(Action):
    """What is said."""

    message: str


class SayObservation(Observation):
    """What is heard."""

    echoed_message: str
    solved: bool = False
    error: str = ""
    progress: float | None = None


class DeclaredObservation(SayObservation):
    """The same; its author says what its fields mean."""

    model_config = ConfigDict(
        json_schema_extra={
            "x-spa-jax": {
                "instruction": "Say the digit.",
                "success": "solved",
                "grounded": "!error",
                "reward_scale": 0.1,
            }
        }
    )


class EchoEnvironment(Environment):
    """Repeats what it is told; the task is to say the seed's last digit, in at most 30 steps."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State(episode_id="", step_count=0)

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, **_: Any
    ) -> SayObservation:
        self._digit = str((seed or 0) % 10)
        self._state = State(episode_id=f"seed {seed}", step_count=0)
        return SayObservation(echoed_message=f"say {self._digit}")

    def step(self, action: SayAction, timeout_s: float | None = None, **_: Any) -> SayObservation:
        self._state.step_count += 1
        if action.message == "crash":
            raise RuntimeError("told to")
        solved = action.message == self._digit
        return SayObservation(
            echoed_message=action.message,
            solved=solved,
            reward=10.0 if solved else -1.0,
            done=solved or self._state.step_count >= 30,
            error="" if action.message.isdecimal() else "not a digit",
            progress=None if action.message == "hm" else float(solved),
        )

    @property
    def state(self) -> State:
        return self._state


def main() -> None:
    """Serves two sessions until it is killed."""
    import fastapi

    app = fastapi.FastAPI()
    limits = ConcurrencyConfig(max_concurrent_envs=2)
    for observation, into in ((SayObservation, app), (DeclaredObservation, fastapi.FastAPI())):
        server = HTTPEnvServer(EchoEnvironment, SayAction, observation, concurrency_config=limits)
        server.register_routes(into)
        if into is not app:
            app.mount("/declared", into)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # who reads the port finds it open
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
