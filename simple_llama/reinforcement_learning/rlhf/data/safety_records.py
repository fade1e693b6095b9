"""PKU-SafeRLHF: two answers to a prompt, with labels which one is more helpful, which one safer, what is unsafe.

`prefer` says which of the two labels decides. A pair whose preferred answer is marked unsafe is dropped unless
`keep_unsafe`. Texts lose the white space around them.
"""

from __future__ import annotations

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped, NeedsOption
from simple_llama.reinforcement_learning.rlhf.data.record_checks import ReadOptions, typed, usable

_LABELS = {"helpfulness": "better_response_id", "safety": "safer_response_id"}


def from_pku(record: Record, options: ReadOptions) -> Conversation:
    """The pair in a PKU-SafeRLHF record, the better or the safer answer chosen."""
    if options.prefer is None:
        raise NeedsOption(f"{record.origin}: a PKU-SafeRLHF record; give --prefer helpfulness or --prefer safety")
    prompt = typed(record, "prompt", str).strip()
    answers = [typed(record, f"response_{side}", str).strip() for side in (0, 1)]
    is_safe = [typed(record, f"is_response_{side}_safe", bool) for side in (0, 1)]
    label = _LABELS[options.prefer]
    chosen = typed(record, label, int)
    if chosen not in (0, 1):
        raise UserError(f"{record.origin}: {label}: expected 0 or 1, found {shown(chosen)}")
    if not is_safe[chosen] and not options.keep_unsafe:
        raise Dropped("with an unsafe preferred answer")
    return usable(record, options, [prompt], [answers[chosen]], [answers[1 - chosen]])
