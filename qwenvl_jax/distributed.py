"""Starts one of several processes that run the same program, each on its own devices."""

import logging
import os
import re

import jax

from qwenvl_jax.errors import InputError

HEARTBEAT = 30  # seconds of silence after which jax counts a process as dead


def initialize() -> None:
    """Connects this process to the others; call it before any other use of jax.

    A TPU pod or Slurm gives the process's number. Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID do. If a process dies, the others' collectives fail; if they hang instead, jax ends the others after
    HEARTBEAT seconds with a message that names the dead one. Raises InputError if nothing gives the process's number.
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
        logging.getLogger(__name__).warning("waiting for all processes to connect to %s", address)
    try:
        jax.distributed.initialize(
            **numbers, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=2 * HEARTBEAT
        )
    except jax.errors.JaxRuntimeError as e:
        raise InputError(f"the processes cannot connect to {address} ({e}); check that process 0 runs there") from e
    except ValueError as e:
        raise InputError(
            f"this process has no number ({e}); on a TPU pod or under Slurm it gets one, elsewhere set "
            "JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from e
