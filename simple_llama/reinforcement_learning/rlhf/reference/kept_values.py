"""What a training state keeps of the reference's values, so that a resumed run notices when they are others."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np

from simple_llama.common.errors import UserError
from simple_llama.common.files import shown
from simple_llama.reinforcement_learning.rlhf.reference.ref_store import RefStore
from simple_llama.reinforcement_learning.rlhf.reference.shards import RECORD, as_records

_KEPT = 256  # records
_ENTRIES = {"digest", "records"}


@dataclass(frozen=True)
class KeptValues:
    """A digest of all values that a run looks up, and some of those it was begun with."""

    digest: str  # hex, as `RefStore.content_digest`
    records: np.ndarray  # (n,) of RECORD, drawn over the data, the same ones for the same pairs

    @classmethod
    def of(cls, store: RefStore, keys: np.ndarray, content: str) -> KeptValues:
        """The values of pairs with these keys. `content`: the store's content digest of them, which takes a while."""
        drawn = np.sort(np.random.default_rng(0).choice(len(keys), min(_KEPT, len(keys)), replace=False))
        return cls(content, as_records(keys[drawn], store.lookup(keys[drawn])))

    @classmethod
    def from_json(cls, found: Any, place: str) -> KeptValues:
        """From an entry of `to_json`. UserError, naming the place, where it is none."""
        try:
            data = base64.b64decode(found["records"], validate=True)
            if isinstance(found["digest"], str) and len(data) % RECORD.itemsize == 0 and found.keys() == _ENTRIES:
                return cls(found["digest"], np.frombuffer(data, RECORD))
        except (TypeError, KeyError, AttributeError, ValueError, binascii.Error):
            pass
        raise UserError(f"{place}: reference_values: expected a digest and records, found {shown(found)}")

    def to_json(self) -> dict[str, str]:
        """As an entry of a JSON file."""
        return {"digest": self.digest, "records": base64.b64encode(self.records.tobytes()).decode()}
