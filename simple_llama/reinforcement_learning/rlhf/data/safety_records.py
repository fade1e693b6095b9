"""PKU-SafeRLHF: two answers to a prompt, with labels which one is more helpful, which one safer, what is unsafe.

`prefer` says which of the two labels decides; with "both" a pair is kept where they agree. A pair whose preferred
answer is marked unsafe is dropped unless `keep_unsafe`. Texts lose the white space around them. The harm that either
answer does is the record's category.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.dataset.json_records import Record
from simple_llama.reinforcement_learning.rlhf.data.conversation import Conversation, Dropped, NeedsOption
from simple_llama.reinforcement_learning.rlhf.data.record_checks import Preferred, ReadOptions, typed, usable

_HARMS = ("response_0_harm_category", "response_1_harm_category")
PKU_OTHERS = (
    "better_response_id",
    "safer_response_id",
    "is_response_0_safe",
    "is_response_1_safe",
    *_HARMS,
)
_LABELS: dict[Preferred, tuple[str, ...]] = {
    "helpful": ("better_response_id",),
    "safe": ("safer_response_id",),
    "both": ("better_response_id", "safer_response_id"),
}


def from_pku(record: Record, options: ReadOptions) -> Conversation:
    """The pair in a PKU-SafeRLHF record, the better or the safer answer chosen."""
    if options.prefer is None:
        raise NeedsOption(
            f"{record.origin}: a PKU-SafeRLHF record; give --prefer helpful, --prefer safe, or --prefer both, which "
            "keeps the pairs whose more helpful answer is the safer one"
        )
    prompt = typed(record, "prompt", str).strip()
    answers = [typed(record, f"response_{side}", str).strip() for side in (0, 1)]
    is_safe = [typed(record, f"is_response_{side}_safe", bool) for side in (0, 1)]
    chosen, *other = [_label(record, key) for key in _LABELS[options.prefer]]
    if other and other != [chosen]:
        raise Dropped("whose more helpful answer is not the safer one")
    if not is_safe[chosen] and not options.keep_unsafe:
        raise Dropped("with an unsafe preferred answer")
    return usable(record, options, [prompt], [answers[chosen]], [answers[1 - chosen]])


def _label(record: Record, key: str) -> int:
    """Which of the two answers a label names."""
    found = typed(record, key, int)
    if found not in (0, 1):
        raise UserError(f"{record.origin}: {key}: expected 0 or 1, found {shown(found)}")
    return found


def category_of(fields: Mapping[str, Any]) -> object:
    """What a record of any form calls its category; of PKU-SafeRLHF the harms of either answer. None: nothing."""
    if "category" in fields:
        return fields["category"]
    found = [fields[key] for key in _HARMS if isinstance(fields.get(key), dict)]
    return sorted({name for harms in found for name, is_there in harms.items() if is_there is True}) if found else None
