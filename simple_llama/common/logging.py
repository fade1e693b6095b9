"""The program's one logger. `cluster.console` sets it up; until then Python shows only warnings, on stderr."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("simple_llama")
