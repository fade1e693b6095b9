#!/usr/bin/env bash
# The whole job on real preferences: a 35 M parameter model, 1,500 HH-RLHF pairs, two ranks on a CPU. About half an hour.
#
#     benchmarks/hh_run.sh HH.jsonl.gz TOKENIZER.json FOLDER
#
# Writes everything to FOLDER. At the end: one rank and two ranks in fp32 on 64 pairs, which must agree.
set -euo pipefail
data=$1 tokenizer=$2 folder=$3
cd "$(dirname "$0")/.."
python=.venv/bin/python
launch=(.venv/bin/deepspeed --hostfile "$folder/hostfile" --no_ssh_check --master_addr 127.0.0.1)
common=(--model_path "$folder/start.pth" --tokenize_path "$tokenizer" --max_seq_len 1024
        --ref_cache_dir "$folder/ref_cache" --ckpt_dir "$folder/checkpoints" --log_dir "$folder/runs"
        --device cpu --epochs 1 --max_lr 1e-4 --min_lr 1e-5 --beta 0.1 --warmup_iterations 5)
mkdir -p "$folder"
echo 'localhost slots=2' >"$folder/hostfile"

[ -e "$folder/hh.jsonl" ] || $python launch/prepare_data.py --inputs "$data" --output "$folder/hh.jsonl"
if [ ! -e "$folder/start.pth" ]; then
    $python benchmarks/start_model.py --data "$folder/hh.jsonl" --tokenizer "$tokenizer" --out "$folder/start.pth" \
        --n_embd 512 --n_layers 8 --n_heads 8 --max_seq_len 1024 --val_share 0.1 --steps 60 --max_lr 1e-3
fi
main=("${common[@]}" --rlhf_dataset_path "$folder/hh.jsonl" --val_share 0.1 --batch_size 8 --grad_accum_steps 2)
"${launch[@]}" launch/precompute_ref.py "${main[@]}"
"${launch[@]}" launch/train_dpo.py "${main[@]}" --run_name hh --eval_interval 22 --sample_tokens 48

head -n 64 "$folder/hh.jsonl" >"$folder/hh64.jsonl"
exact=("${common[@]}" --rlhf_dataset_path "$folder/hh64.jsonl" --val_share 0 --n_samples 0 --eval_interval 0
       --deepspeed_config ds_configs/zero2_fp32.json)
"${launch[@]}" launch/precompute_ref.py "${exact[@]}"
"${launch[@]}" launch/train_dpo.py "${exact[@]}" --run_name two_ranks --batch_size 4 --grad_accum_steps 2
$python launch/train_dpo.py "${exact[@]}" --run_name one_rank --batch_size 4 --grad_accum_steps 4
$python - "$folder" <<'PYTHON'
import json, sys
curves = []
for run in ("two_ranks", "one_rank"):
    with open(f"{sys.argv[1]}/runs/{run}/metrics.jsonl") as file:
        curves.append([line["loss"] for line in map(json.loads, file) if "loss" in line])
print("losses of two ranks:", curves[0], "\nlosses of one rank: ", curves[1])
print("largest difference: ", max(abs(a - b) for a, b in zip(*curves, strict=True)))
PYTHON
