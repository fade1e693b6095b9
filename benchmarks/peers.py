"""TRL's DPOTrainer on our weights and our pairs: the only file that imports the peers (benchmarks/requirements.txt).

It is TRL's own code that is timed, as a single process without DDP or DeepSpeed (`train_folder`: under DDP where a
launcher started several): the real `train()`, which hands
control back after each optimizer step, and the real `_precompute_ref_logps`. Two things are taken out before the clock
starts: tokenization (pairs are token ids already; a subclass returns the dataset as it is, since TRL 1.16 accepts text
only), and for training the reference pass (log-probs come with the pairs).
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.workload import TOKENIZER, shares_prompt
from simple_llama.common.errors import UserError
from simple_llama.dataset.tokenizer import load_tokenizer
from simple_llama.interop.hf_config import config_json
from simple_llama.interop.hf_names import to_hf
from simple_llama.pretraining.weights import WeightsFile
from simple_llama.reinforcement_learning.rlhf.data.tokenized_pair import TokenizedPair

ATTENTIONS = {"cpu": ("sdpa", "eager"), "cuda": ("sdpa",)}  # that are tried; eager's scores of long chats fill a GPU
NEVER = 10**9
# by which accelerate would join a process group; cluster/distributed.py sets LOCAL_RANK also for a single process
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Numerics(NamedTuple):
    """How TRL computes."""

    weights: torch.dtype
    autocast: bool  # of GEMMs to bf16


SETTINGS = {
    "bf16": Numerics(torch.bfloat16, False),  # weights and optimizer in bf16, no fp32 masters
    "autocast": Numerics(torch.float32, True),  # TRL's default: bf16=True
    "fp32": Numerics(torch.float32, False),
}


@dataclass(frozen=True)
class TrlSettings:
    """What TRL's trainer is built with; what both trainers have in common comes from the bench."""

    numerics: str  # key of SETTINGS
    batch_size: int  # pairs a micro-batch
    accumulate: int  # micro-batches a step
    beta: float
    rate: float  # learning rate, constant
    betas: tuple[float, float]  # AdamW
    clip: float  # of the gradient norm
    precompute_batch: int = 8  # pairs a batch of the reference pass
    attention: str = "sdpa"  # one of ATTENTIONS
    lora_rank: int = 0  # of peft's adapters beside all seven layers of a block; 0: none
    lora_alpha: float = 32.0


class Peer:
    """A DPOTrainer, and the state that accelerate keeps for all trainers of a process in one place."""

    def __init__(
        self,
        start: WeightsFile,
        pairs: Sequence[TokenizedPair],
        ref_logps_B2: np.ndarray | None,
        settings: TrlSettings,
        device: torch.device,
        folder: str,
    ):
        """Builds it.

        Args:
            pairs: in the order in which `train()` takes them; a whole number of steps.
            ref_logps_B2: reference log-prob sums that come with the pairs; None where the trainer is to compute them.
            folder: for what the trainer writes (nothing, without checkpoints).
        """
        with plain_process():
            quiet()
            model = hf_model(start, SETTINGS[settings.numerics].weights).to(device)
            self.trainer = make_trainer(model, our_tokenizer(), pairs, ref_logps_B2, settings, device, folder)
        accelerator = self.trainer.accelerator
        assert accelerator.num_processes == 1 and "NO" in str(accelerator.distributed_type), accelerator.state
        self.shared_state = dict(shared_state())
        self.set_attention(settings.attention)

    def activate(self) -> None:
        """Makes accelerate's process-wide state (the autocast dtype) this trainer's again."""
        shared_state().clear()
        shared_state().update(self.shared_state)

    def set_attention(self, name: str) -> None:
        """Another implementation of attention, from the next forward on."""
        self.trainer.model.set_attn_implementation(name)

    def precompute(self, batch_size: int, pairs: int) -> np.ndarray:
        """TRL's reference pass over the first `pairs` pairs, its cache file included: log-prob sums (B, 2)."""
        self.activate()
        columns = ["ref_chosen_logps", "ref_rejected_logps"]
        dataset = self.trainer.train_dataset.select(range(pairs))
        trl_itself = super(type(self.trainer), self.trainer)  # past the subclass, which skips this while it is built
        found = trl_itself._precompute_ref_logps(dataset, "train", batch_size)
        return np.stack([np.asarray(found[name]) for name in columns], axis=1)

    def first_batch(self) -> dict[str, Any]:
        """The first micro-batch by the trainer's own loader and collator, on its device."""
        self.activate()
        return self.trainer._prepare_inputs(next(iter(self.trainer.get_train_dataloader())))


class SteppedPeer:
    """`train()` of a peer, one optimizer step a call.

    It runs in a thread of its own that waits at the end of each step; only one of the two threads ever computes. A call
    takes everything from the end of a step to the end of the next one: bookkeeping, fetching and collating the pairs,
    forward, backward, clip, AdamW, the scheduler, zero_grad.
    """

    def __init__(self, peer: Peer):
        self.peer = peer
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.stopping, self.ended = False, False
        self.error: BaseException | None = None
        peer.trainer.add_callback(hand_back(self))
        self.threads = torch.get_num_threads()
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def step(self) -> None:
        """One optimizer step; raises what the trainer raised, RuntimeError when its pairs are used up."""
        if not self.ended:
            self.peer.activate()
            self.go.release()
            self.done.acquire()
            if self.error is not None:
                error, self.error = self.error, None
                raise error
        if self.ended:  # also when this call found no step to make, only the end
            raise RuntimeError("the trainer has no step left")

    def close(self) -> None:
        """Ends `train()` and its thread."""
        self.stopping = True
        if not self.ended:
            self.go.release()
        self.thread.join()

    def wait(self) -> bool:
        """At the end of a step, in the trainer's thread: until the next step is wanted; whether none is."""
        self.done.release()
        self.go.acquire()
        return self.stopping

    def _train(self) -> None:
        torch.set_num_threads(self.threads)  # OpenMP's is one a thread
        self.go.acquire()
        try:
            if not self.stopping:
                with plain_process():
                    self.peer.trainer.train()
        except BaseException as error:  # noqa: BLE001 - handed to the other thread
            self.error = error
        self.ended = True
        self.done.release()


def hand_back(stepped: SteppedPeer) -> Any:
    """A callback that waits for the other thread at the end of each step."""
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

    class HandBack(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop |= stepped.wait()
            return control

    return HandBack()


def make_trainer(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[TokenizedPair],
    ref_logps_B2: np.ndarray | None,
    settings: TrlSettings,
    device: torch.device,
    folder: str,
) -> Any:
    """A DPOTrainer as its users have it, at its fastest: no logs, no checkpoints, no recomputation, fused AdamW."""
    import trl  # pyright: ignore[reportMissingImports]
    from transformers import PrinterCallback  # pyright: ignore[reportMissingImports]

    class PreparedDPOTrainer(trl.DPOTrainer):
        """Takes pairs that are token ids already, with their reference log-probs."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

    trainer = PreparedDPOTrainer(
        model=model,
        args=dpo_arguments(settings, device, folder),
        train_dataset=as_dataset(pairs, ref_logps_B2),
        processing_class=tokenizer,
        peft_config=lora_config(settings) if settings.lora_rank else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_folder(
    folder: str, pairs: Sequence[TokenizedPair], ref_logps_B2: np.ndarray, settings: TrlSettings, output: str
) -> tuple[list[float], list[float], float]:
    """A whole `train()` of the model in a Hugging Face folder on a CPU, by this process of those that were started.

    Returns when each step ended (s of the clock), the loss of each micro-batch of this process, and how long TRL's own
    reference pass over the pairs took before, 0 where there are several processes.
    """
    quiet()
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # pyright: ignore[reportMissingImports]

    ends: list[float] = []
    losses: list[torch.Tensor] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

    dtype = SETTINGS[settings.numerics].weights
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=settings.attention)
    model.config.use_cache = False
    tokenizer, cpu = AutoTokenizer.from_pretrained(folder), torch.device("cpu")
    several, passed = int(os.environ.get("WORLD_SIZE", "1")) > 1, 0.0
    with nullcontext() if several else plain_process():
        trainer = make_trainer(model, tokenizer, pairs, ref_logps_B2, settings, cpu, output)
        if not several:
            started, given = time.perf_counter(), trainer.train_dataset
            without = given.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
            trl_itself: Any = super(type(trainer), trainer)  # past the subclass, which skips this while it is built
            trl_itself._precompute_ref_logps(without, "train", settings.precompute_batch)
            passed = time.perf_counter() - started
        trainer.add_callback(Clock())
        compute_loss = trainer.compute_loss

        def recorded(*args: Any, **options: Any) -> Any:
            loss = compute_loss(*args, **options)
            losses.append(loss.detach())
            return loss

        trainer.compute_loss = recorded
        trainer.train()
    assert len(losses) == settings.accumulate * len(ends), (len(losses), len(ends))
    return ends, [float(loss) for loss in losses], passed


def our_tokenizer() -> Any:
    """SimpleLLaMA's tokenizer as transformers has tokenizers."""
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(TOKENIZER), pad_token="<PAD>")
    tokenizer.eos_token = "<EOA>"
    return tokenizer


def lora_config(settings: TrlSettings) -> Any:
    """peft's settings for adapters beside the layers that ours stand beside."""
    import peft  # pyright: ignore[reportMissingImports]

    return peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )


def dpo_arguments(settings: TrlSettings, device: torch.device, folder: str) -> Any:
    """TRL's own settings for `make_trainer`."""
    import trl  # pyright: ignore[reportMissingImports]

    return trl.DPOConfig(
        output_dir=folder,
        beta=settings.beta,
        learning_rate=settings.rate,
        lr_scheduler_type="constant",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=0.0,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=settings.precompute_batch,
        max_length=None,  # no truncation; no pair is longer than the model's limit
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=SETTINGS[settings.numerics].autocast,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,  # its default looks for some in every step
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        logging_strategy="no",
        logging_steps=NEVER,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
    )


def hf_model(start: WeightsFile, dtype: torch.dtype) -> Any:
    """LlamaForCausalLM with our weights in `dtype`; RoPE's frequencies stay fp32, as `from_pretrained` leaves them."""
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    config = {**config_json(start.architecture, torch.float32), "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(to_hf(start.state_dict, start.architecture), strict=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def as_dataset(pairs: Sequence[TokenizedPair], ref_logps_B2: np.ndarray | None) -> Any:
    """The pairs with the columns that TRL's own tokenization gives."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    assert all(shares_prompt(pair) for pair in pairs)
    columns: dict[str, list] = {
        "prompt_ids": [pair.prefix.tolist() for pair in pairs],
        "chosen_ids": [pair.chosen.tolist() for pair in pairs],
        "rejected_ids": [pair.rejected.tolist() for pair in pairs],
    }
    if ref_logps_B2 is not None:
        columns["ref_chosen_logps"], columns["ref_rejected_logps"] = ref_logps_B2.T.tolist()
    return Dataset.from_dict(columns)


def quiet() -> None:
    """No progress bars, no calls home, no advice; before the peers are first imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    import datasets  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"(trl|transformers|accelerate|datasets)\b")


def shared_state() -> dict[str, Any]:
    """Where accelerate keeps mixed precision and ranks for all trainers of the process."""
    from accelerate.state import AcceleratorState  # pyright: ignore[reportMissingImports]

    return AcceleratorState._shared_state


@contextmanager
def plain_process() -> Iterator[None]:
    """Within, no launcher's variables: what is built is a single process without DDP, DeepSpeed or FSDP."""
    if told := sorted(name for name in os.environ if name.startswith("ACCELERATE_")):
        raise UserError(f"environment: expected nothing that tells accelerate what to be, found {', '.join(told)}")
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden
