"""How every command starts and ends: settings, ranks, one message for a mistake, a traceback for a bug."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable

from simple_llama.common.distributed import Ranks, close_ranks, init_ranks
from simple_llama.common.errors import UserError
from simple_llama.common.logging import get_logger
from simple_llama.reinforcement_learning.rlhf.dpo_config import DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.dry_run import describe
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs

MISTAKE = 2  # exit status when a person can put it right


def run_command(work: Callable[[DPOConfig, Inputs, Ranks], object], description: str | None) -> None:
    """Parses the command line, joins the ranks, reads the inputs, then calls `work` or, with --dry_run, describes it.

    Ends the process non-zero on any error.
    """
    config, ranks = None, None
    try:
        config = parse_config(description=description)
        ranks = init_ranks(config.device, config.timeout_s)
        get_logger(None, ranks)
        inputs = load_inputs(config, ranks)
        if not config.dry_run:
            work(config, inputs, ranks)
        elif ranks.is_main:
            print(describe(config, inputs, ranks.world_size))
        close_ranks()
        leave(0, ranks)
    except UserError as error:
        if config is not None and config.debug:
            raise
        where = f" (rank {ranks.rank} on {socket.gethostname()})" if ranks and ranks.world_size > 1 else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        leave(MISTAKE, ranks)


def leave(status: int, ranks: Ranks | None) -> None:
    """Ends this process: one of several ranks at once, since everything is written and said.

    A gloo rank was seen to abort in C++ destructors on its way out ("terminate called without an active exception",
    status -6), which a launcher takes for a failure of the whole job.
    """
    if ranks is None or ranks.world_size == 1:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
