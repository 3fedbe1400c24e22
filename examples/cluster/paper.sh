#!/bin/bash
# The paper suite on a cluster, with all rows of a table in one queue: `dvc repro` runs one row after the other, and a row
# has too few networks to quantise for many GPUs. Run it in the repository's root, with TFMQ_BENCH_ENGINE=ray, where Ray
# runs. It can be started again at any time: what is finished is skipped or found again.
set -euo pipefail
cd benchmarks/paper

# Downloads, calibration pools, references, and full precision.
dvc repro --glob 'calibrate@*' 'score_full_precision@*'

for table in published leaderboard ablation; do
  stages=$(python - "$table" <<'PYTHON'
import sys, yaml
table = sys.argv[1]
methods = yaml.safe_load(open("params.yaml"))["tables"][table]["methods"]
print(f"score_{table}", *(f"generate_{table}_{method}" for method in methods))
PYTHON
  )
  if dvc status -q $stages; then continue; fi
  python -m benchmarks generate --table "$table"
  python -m benchmarks score --table "$table"
  dvc commit --force $stages    # DVC takes over what it has not run itself
done
dvc repro tables
