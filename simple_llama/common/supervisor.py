"""Runs a launcher command to an honest end; `launch/supervise.py` is its command. Starts no torch.

DeepSpeed's launcher, by itself, waits for ever for a host that hangs or is cut off, returns 0 when its own child was
killed, and leaves ranks running when it is killed. Here every start ends, the status is 0 only after the job itself
said that it finished, and nothing that was started stays behind.
"""

from __future__ import annotations

FINISHED = "job finished on all ranks"
