"""How every command starts and ends: settings, ranks, one message for a mistake, a traceback for a bug.

Exit status: 0 done, 1 a bug (traceback), 2 a mistake that a person can put right, 3 a rank, host or link was lost or
hung, 75 stopped on request after a save, 130 ended by a second Ctrl-C. The last line of a job that is done is FINISHED.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from simple_llama.cluster import stopping, watchdog
from simple_llama.cluster.console import set_up_log
from simple_llama.cluster.distributed import Ranks, barrier, close_ranks, fail_together, init_ranks, leave
from simple_llama.cluster.start_phases import PHASES
from simple_llama.cluster.supervisor import FINISHED
from simple_llama.common.errors import UserError
from simple_llama.common.logging import LOGGER
from simple_llama.ops.machine import prepare_gemms
from simple_llama.reinforcement_learning.rlhf.dpo_config import CommandConfig, DPOConfig, parse_config
from simple_llama.reinforcement_learning.rlhf.dry_run import describe
from simple_llama.reinforcement_learning.rlhf.inputs import Inputs, load_inputs
from simple_llama.reinforcement_learning.rlhf.run.run_folder import check_folders, say_settings

BUG, MISTAKE, INTERRUPTED = 1, 2, 130  # exit status; with watchdog.LOST and stopping.STOPPED these are all

SomeConfig = TypeVar("SomeConfig", bound=CommandConfig)


def run_command(work: Callable[[DPOConfig, Inputs, Ranks], object], description: str | None) -> None:
    """Of a DPO run: parses the command line, joins the ranks, reads the inputs, then calls `work` or, with --dry_run,
    describes it.

    Ends the process, non-zero on any error.
    """
    run_any(partial(_read_and_do, work), partial(parse_config, description=description))


def run_any(work: Callable[[SomeConfig, Ranks], object], parse: Callable[[], SomeConfig]) -> None:
    """Of any command: gets the settings, joins the ranks, calls `work` on each.

    Ends the process, non-zero on any error.

    Args:
        parse: makes the settings of this process's command line. UserError for bad ones; a rank that hears the same
            error as the first one of its host does not repeat it.
    """
    config, ranks = None, None
    prepare_gemms()
    try:
        config = _parse(parse)
        PHASES.ended("imports")
        ranks = init_ranks(config.device, config.start_timeout_s)
        PHASES.ended("joining")
        stopping.install(
            ranks.world_size
        )  # not before: while torch waits for the others in C++, a handler in Python would wait too
        _do(work, config, ranks)
        leave(0)
    except stopping.Stopped as stop:
        _say_stopped(stop, ranks, config)
        leave(stopping.STOPPED)
    except UserError as error:
        watchdog.fail(str(error))
        if config is not None and config.debug:
            raise
        if not error.is_said:
            _say(f"error{_where(ranks, error.sharers)}: {error}")
        leave(MISTAKE)
    except KeyboardInterrupt:
        watchdog.fail("interrupted")
        _say(f"interrupted{_where(ranks)}")
        leave(INTERRUPTED)
    except Exception as error:
        watchdog.await_verdict()  # a peer that was killed looks like a bug in the collective that waits for it
        watchdog.fail(f"{type(error).__name__}: {error}")
        if ranks is None or ranks.world_size == 1:
            raise
        traceback.print_exc()
        leave(BUG)
    finally:
        stopping.uninstall()


def _do(work: Callable[[SomeConfig, Ranks], object], config: SomeConfig, ranks: Ranks) -> None:
    """The command itself, between the joining of the ranks and their parting (collective)."""
    set_up_log(None, ranks)
    LOGGER.info("%s", ranks)
    watchdog.start(ranks, config)
    work(config, ranks)
    barrier(ranks)  # all ranks have done all: only now may one of them leave
    LOGGER.info(FINISHED)
    watchdog.close()
    close_ranks()


def _read_and_do(work: Callable[[DPOConfig, Inputs, Ranks], object], config: DPOConfig, ranks: Ranks) -> None:
    """The inputs of a DPO run, then its work or a description (collective)."""
    with fail_together(ranks):
        if config.resume:
            say_settings(config)
        check_folders(config, config.ref_cache_dir)
    inputs = load_inputs(config, ranks, ref_cache_dir=config.ref_cache_dir, settled=config.dry_run)
    PHASES.ended("data")
    stopping.agree(ranks, at_once=True)
    if not config.dry_run:
        work(config, inputs, ranks)
        return
    report = describe(config, inputs, ranks)
    if ranks.is_main:
        print(report)


def _say_stopped(stop: stopping.Stopped, ranks: Ranks | None, config: CommandConfig | None) -> None:
    """That the work was stopped on request, by one rank for all, which stop together."""
    if ranks is None or ranks.is_main:
        where = _where(ranks, ranks.world_size if ranks else 1)
        again = "--resume goes on from what is saved" if isinstance(config, DPOConfig) else "what is computed is kept"
        _say(f"stopped{where}: {stop}; {again}")
    with contextlib.suppress(RuntimeError):  # a rank that was lost on the way here
        if ranks:
            barrier(ranks)  # one of them may still tidy up
    watchdog.close()


def _parse(parse: Callable[[], SomeConfig]) -> SomeConfig:
    """The settings of this rank. What is wrong with them, or their help, is said by the first rank of a host alone
    where one launcher gave all of them the same command line."""
    launched = {"CROSS_SIZE", "TORCHELASTIC_RUN_ID"} & os.environ.keys()  # by DeepSpeed or torchrun
    if not launched or os.environ.get("LOCAL_RANK", "0") == "0":
        return parse()
    unheard = io.StringIO()
    try:
        with contextlib.redirect_stderr(unheard), contextlib.redirect_stdout(unheard):
            return parse()
    except UserError as error:
        error.is_said = True
        raise


def _where(ranks: Ranks | None, sharers: int = 1) -> str:
    """Which of several ranks speaks, and for how many."""
    if ranks is None or ranks.world_size == 1:
        return ""
    if sharers == ranks.world_size:
        return f" (all {sharers} ranks)"
    others = f" and {sharers - 1} more" if sharers > 1 else ""
    return f" (rank {ranks.rank} on {socket.gethostname()}{others})"


def _say(message: str) -> None:
    """One message on stderr, if somebody still reads it."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
