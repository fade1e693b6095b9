"""Whether TRL 1.16 trains from an exported store, live: docs/trl_store_columns.py against a tiny Llama.

    python -m benchmarks.trl_from_store                                       # makes model, pairs and export first
    python -m benchmarks.trl_from_store --model_path MODEL --data pairs.jsonl # needs TRL alone

Both ways round: with the columns as they are every pair's rewards at step 0 are within 1e-4 beta of 0; with 1 nat added
to each they are -beta within the same. And what TRL does by itself: it ignores the columns and builds a reference
model, and with `precompute_ref_log_probs` it ends with an error. All is in fp32; the model is the one of the store.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TOLERANCE = 1e-4  # of beta
_ROOT = Path(__file__).parents[1]


def made(folder: Path, pairs: int) -> tuple[str, str]:
    """A model, and its store's export, made by the launch scripts. Needs the package, and tests/."""
    sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]
    from tiny_hf import make_hf_job

    job = make_hf_job(folder, pairs)
    config, data = folder / "config.json", folder / "pairs_with_ref.jsonl"
    config.write_text(json.dumps({**job.settings, "val_share": 0.0}))
    for script, *words in (("precompute_ref.py",), ("store.py", "export", "--output", str(data))):
        command = [sys.executable, f"launch/{script}", *words, "--config", str(config)]
        subprocess.run(command, cwd=_ROOT, check=True)
    return str(job.model), str(data)


def rewards(trainer: Any) -> list[float]:
    """Both rewards of each pair before the weights change: the learning rate is 0, a step has one pair."""
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]
    return [entry[f"rewards/{side}"] for entry in logged for side in ("chosen", "rejected")]


def trainer_of(kind: Any, beta: float, model: str, pairs: Any, folder: str, precompute: bool) -> Any:
    """A trainer that looks at each pair once."""
    import transformers  # pyright: ignore[reportMissingImports]
    import trl  # pyright: ignore[reportMissingImports]

    arguments = trl.DPOConfig(
        folder,
        beta=beta,
        precompute_ref_log_probs=precompute,
        max_length=None,
        learning_rate=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = kind(model, args=arguments, train_dataset=pairs)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def check_trl(beta: float, model: str, data: str, folder: str) -> list[str]:
    """Lines of what was found. AssertionError where it is not what it has to be."""
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    from docs.trl_store_columns import StoreDPOTrainer

    pairs = load_dataset("json", data_files=data, split="train")
    shifted = pairs.map(lambda row: {name: row[name] + 1.0 for name in ("ref_chosen_logps", "ref_rejected_logps")})
    lines = [f"TRL {trl.__version__}, {len(pairs)} pairs, beta {beta}"]
    for name, some, expected in (("as exported", pairs, 0.0), ("shifted by 1 nat", shifted, -beta)):
        trainer = trainer_of(StoreDPOTrainer, beta, model, some, folder, True)
        assert trainer.ref_model is None, "a reference model was built"
        found = rewards(trainer)
        assert len(found) == 2 * len(pairs)
        off = max(abs(one - expected) for one in found)
        assert off <= _TOLERANCE * beta, (name, off)
        lines.append(f"columns {name}: rewards {expected:g} within {off / beta:.1e} beta, no reference model")
    plain = trainer_of(trl.DPOTrainer, beta, model, shifted, folder, False)
    found = rewards(plain)
    assert plain.ref_model is not None and max(map(abs, found)) <= _TOLERANCE * beta
    lines.append("TRL by itself, columns shifted: it builds a reference model, and ignores them")
    lines.append(
        f"TRL by itself, precomputing: {_error(lambda: trainer_of(trl.DPOTrainer, beta, model, pairs, folder, True))}"
    )
    return lines


def _error(work: Callable[[], object]) -> str:
    """What a call ends with."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 (whatever TRL raises is what is shown)
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    raise AssertionError("TRL reads such columns now: docs/trl_store_columns.py is needless")


def main() -> None:
    """Makes what is not given, then checks and prints. The standard library's parser: TRL brings none of ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="", help="a Hugging Face folder; left out: a tiny Llama is made")
    parser.add_argument("--data", default="", help="what `launch/store.py export` wrote of it")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--pairs", type=int, default=24, help="of the made data")
    check = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, data = check.model_path, check.data
        if not (model and data):
            model, data = made(Path(folder) / "job", check.pairs)
        print("\n".join(check_trl(check.beta, model, data, folder)))


if __name__ == "__main__":
    main()
