"""One program in several processes, each with its own devices."""

import logging
import os
import re

import jax

from qwenvl_jax.errors import InputError

HEARTBEAT = 30  # seconds without a sign of a process until the others end


def initialize() -> None:
    """Makes this process one of several that run the same program, each with its own devices; call it before all else.

    A TPU pod and Slurm say which one it is; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.
    When a process dies, exchanges with it fail in the others; where they hang instead, jax ends the others after
    HEARTBEAT seconds with a message that names it. Raises InputError where nothing says which process this is.
    """
    if jax.distributed.is_initialized():
        return
    numbers = {}
    for name, key in (("JAX_NUM_PROCESSES", "num_processes"), ("JAX_PROCESS_ID", "process_id")):
        if (value := os.environ.get(name)) is not None:
            if not value.isdecimal():
                raise InputError(f"{name} is {value!r}; it must be a number")
            numbers[key] = int(value)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is not None:
        if not re.fullmatch(r".+:\d+", address):
            raise InputError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be host:port of process 0")
        logging.getLogger(__name__).warning("waiting for all processes to come to %s", address)
    try:
        jax.distributed.initialize(
            **numbers, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=2 * HEARTBEAT
        )
    except jax.errors.JaxRuntimeError as e:
        raise InputError(f"the processes cannot come together at {address} ({e})") from e
    except ValueError as e:
        raise InputError(
            f"nothing says which of several processes this is ({e}); a TPU pod or Slurm does, elsewhere set "
            "JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from e
