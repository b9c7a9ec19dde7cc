#!/usr/bin/env bash
# The whole experiment: dense networks, pruning, alignment, sparse training, tables and figures.
#   bash run_all.sh [PRESET]           run what is missing of a preset (quick: a few minutes, no download)
#   bash run_all.sh status [PRESET]    what has run, and how long the rest will take
#   bash run_all.sh test               the tests
#   bash run_all.sh --help [PRESET]    the settings and their values. The environment overrides each:
#                                      PAIRS="0 1" WIDTHS="1 4" OUT=runs/mine bash run_all.sh cifar10
# LAUNCH=slurm submits what is missing; DRY_RUN=1 prints the commands, in order, for any other queue.
presets="
quick     glyphs    mlp       0 1 2 3  1         0.9                3 6                        activation
cifar10   cifar10   resnet20  0 1 2    1 4 8 16  0.8 0.9 0.95 0.97  0 5 10 15 20 25 50 75 100  activation masked
cifar100  cifar100  resnet20  0 1 2    1 4 8 16  0.8 0.9 0.95 0.97  0 10 25 50 100             activation masked
vgg11     cifar10   vgg11     0 1 2    1         0.8 0.9            0 5 10 15 20 25 50         activation masked
svhn      svhn      resnet20  0 1 2    1         0.8 0.9 0.95 0.97  10 20                      activation masked
imagenet  imagenet  resnet50  0        1         0.8 0.9 0.95       10 25 50                   activation
" # name  DATASET   MODEL     PAIRS    WIDTHS    SPARSITY           REWIND                     METHODS
wide_rewind="0 10 25 50 100" # of cifar10 at widths 8 and 16, as in the paper, unless REWIND is set
n='[1-9][0-9]{0,8}' share='0?[.]0*[1-9][0-9]*' name='[[:alnum:]][[:alnum:]_.-]*' # patterns; |: may be empty
settings="
PAIRS           words  0|$n      whole numbers: pair p has source seed 2p and target seed 2p+1
WIDTHS          words  $n|$n[.][0-9]+|$share  numbers: each has a folder, OUT/w<width>
SPARSITY        words  $share    numbers between 0 and 1: shares of the weights to prune
REWIND          words  0|$n      whole numbers: epochs of dense runs that sparse training starts from
METHODS         words  |(activation|weight|masked)(@(0|$n))?|identity  any of activation, weight, masked, identity; weight@9: to B's epoch 9
CONTROLS        words  |shuffled|random-permutation|imp-target|signs  any of shuffled, random-permutation, imp-target, signs: more arms
ENSEMBLE        word   |[2-9]|[1-9]$n  2 or more: the networks of Table 1, one source and so many targets
TAG             word   |$name    a name of an edit: all but the dense networks anew, in OUT/w<width>/<tag>
DATASET         word   $name     a name that train_dense.py --dataset takes
SOURCE_DATASET  word   $name     a name: sources are trained and pruned on that data set (Table 16)
MODEL           word   $name     a name that train_dense.py --model takes
OUT             line   [^'%]+    a folder for the results, without ' and % in its name
DATA_DIR        line   [^'%]+    the folder of the data sets, without ' and % in its name
PARALLEL        word   auto|$n   auto or a number: networks at once on a device (not measured on a GPU)
SPREAD          word   |$n       a number: GPUs that share a network; otherwise each GPU has its own commands
LAUNCH          word   |slurm    slurm: an array job a stage, a command a task
SBATCH          flags  .*        flags of sbatch, as --gres=gpu:1 --time=12:00:00"
settings+=$(printf '\n%s_FLAGS flags .* more flags' DENSE IMP ALIGN SPARSE REPORT)
# ---------------------------------------------------------------- what is asked for
set -euf -o pipefail
cd "$(dirname "$0")"
refuse() { echo "run_all.sh: error: $1" >&2; exit 2; }
mode=${DRY_RUN:+dry}
case ${1-} in status | --help | -h) mode=$1; shift ;; esac
[ $# -le 1 ] || refuse "unexpected '$2': give one preset, and settings before the command"
preset=${1:-quick}
row=$(awk -v name="${preset/#test/quick}" '$1 == name' <<< "$presets" | sed 's/   */|/g')
[ -n "$row" ] || refuse "unknown preset '$preset': choose from $(awk '{ printf "%s ", $1 }' <<< "$presets")test"
d_OUT=runs/$preset d_DATA_DIR=data d_PARALLEL=1
IFS='|' read -r _ d_DATASET d_MODEL d_PAIRS d_WIDTHS d_SPARSITY d_REWIND d_METHODS <<< "$row"
case $preset in
  svhn) d_SOURCE_DATASET=cifar10 ;;
  quick)
    d_DENSE_FLAGS="--image-size 16 --epochs 12 --batch-size 64 --lr 0.05 --warmup 1"
    d_IMP_FLAGS="--epochs 2 --batch-size 64 --lr 0.02" d_SPARSE_FLAGS="--batch-size 64 --lr 0.02"
    d_REPORT_FLAGS="--only results accuracy interpolation masks methods --points 11 --images 1000" ;;
esac
if [ -n "${ENSEMBLE-}" ]; then # one cell, as in Table 1
  d_OUT+=-ensemble d_SPARSITY=0.9
  case $preset in quick) d_REPORT_FLAGS="--only results diversity" ;; svhn) d_REWIND=20 ;;
    cifar100) d_WIDTHS=4 d_REWIND=25 ;; *) d_WIDTHS=1 d_REWIND=25 ;; esac
fi
if [ "$preset" != cifar10 ] || [ -n "${REWIND-}${ENSEMBLE-}" ]; then wide_rewind=""; fi
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | sed -n '/^[0-9][0-9]*$/p' || :)
gpus=$(tr , '\n' <<< "${CUDA_VISIBLE_DEVICES-$gpus}" | sed '/^ *-1/d' | xargs)
gpu_count=$(wc -w <<< "$gpus") cores=$(getconf _NPROCESSORS_ONLN)
case $gpu_count$preset${SPREAD-}${LAUNCH-} in 0imagenet) ;; "0$preset") d_PARALLEL=auto ;; esac
shown="run_all.sh $preset:" help=$(sed -n '2,/^presets/s/^# \{0,1\}//p' run_all.sh)
while read -r name kind pattern meaning; do
  if [ "$name" = SOURCE_DATASET ]; then d_SOURCE_DATASET=${d_SOURCE_DATASET-$DATASET}; fi
  default=d_$name value=${!name-${!default-}}
  case $kind in word | flags) value=$(echo $value) ;; words) # each once
    pattern="($pattern)( ($pattern))*" value=$(echo $(printf '%s\n' $value | awk '!seen[$0]++')) ;; esac
  [[ $value =~ ^($pattern)$ ]] || refuse "$name='$value': give $meaning"
  printf -v "$name" %s "$value"
  shown+=" $name='$value'" help+=$(printf '\n  %-20s%-30s  %s' "$name" "'$value'" "$meaning")
done <<< "${settings:1}"
case $mode in -*) echo "$help"; exit ;; esac
case $TAG in dense | imp | align | sparse) refuse "TAG='$TAG' is the name of a folder: give another" ;; esac
[ -z "$SPREAD" ] || [ "$PARALLEL" = 1 ] || refuse "SPREAD='$SPREAD' excludes PARALLEL='$PARALLEL': choose one"
packages="torch torchvision numpy scipy tqdm pandas matplotlib pytest" python=python3
found="from importlib.util import find_spec; raise SystemExit(not all(map(find_spec, '$packages'.split())))"
if ! python3 -c "$found" 2> /dev/null; then python=.venv/bin/python; fi
if [ -z "$mode" ] && ! $python -c "$found" 2> /dev/null; then
  echo "setting up .venv from requirements.txt (once)"
  python3 -m venv --system-site-packages .venv # so that a torch of the machine's own stays
  $python -m pip install --quiet --requirement requirements.txt
fi
if [ "$preset" = test ]; then
  halves=$(printf "$python -m pytest -q tests --ignore-glob='*/test_%s*'\n" '[!a-l]' '[a-l]')
  if [ -n "$mode" ]; then echo "$halves"; exit; fi
  echo "two halves of the tests, side by side: each prints its result in the end" >&2
  tr '\n' '\0' <<< "$halves" | xargs -0 -n 1 -P 2 sh -c '
    text=$(eval "$0" 2>&1) && echo "$text" || { echo "$text"; exit 1; }'
  exit
fi
# ---------------------------------------------------------------- the commands of each stage at a width
pairs=$(printf '%s\n' $PAIRS | awk '{ print 2 * $1, 2 * $1 + 1 }') # lines "source target", of seeds
if [ -n "$ENSEMBLE" ]; then pairs=$(seq "$ENSEMBLE" | sed 's/^/0 /'); fi
rewinds() { case $w in 8 | 16) echo "${wide_rewind:-$REWIND}" ;; *) echo "$REWIND" ;; esac; }
train=$python data="--data-dir '$DATA_DIR'" tag=${TAG:+--tag $TAG} parallel="--parallel $PARALLEL"
commands=$((gpu_count > 1 ? gpu_count : 1)) # of one stage and data set, or one a network:
if [ "$PARALLEL" = 1 ]; then parallel="" commands=1000000; fi
together() { # lines "set seed" -> lines "set seed seed ...", a command each
  sort -k 2,2n -u | awk -v n="$commands" '{ key = $1 " " count[$1]++ % n; seeds[key] = seeds[key] " " $2 }
    END { for (key in seeds) print substr(key, 1, index(key, " ") - 1) seeds[key] }' | sort -k 2,2n
}
case ${SPREAD:+torchrun}$LAUNCH in
  torchrun) train+=" -m torch.distributed.run --standalone --nproc-per-node $SPREAD" ;;
  torchrunslurm) # on all nodes of a task, which meet on its first
    train="srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit $train -m torch.distributed.run"
    train+=" --nnodes \$SLURM_NNODES --nproc-per-node \$(($SPREAD / SLURM_NNODES)) --rdzv-backend c10d"
    train+=" --rdzv-id \$SLURM_JOB_ID --rdzv-endpoint \$(hostname):\$((20000 + SLURM_JOB_ID % 10000))" ;;
esac
cells=$SPARSITY # lines, a command each
if [ -n "$LAUNCH" ]; then cells=$(printf '%s\n' $SPARSITY); fi
reused=$([ "$SOURCE_DATASET" = "$DATASET" ] || echo 1) # then no LTH, and the source is no member
dense() {
  early=$(echo $(tr ' ' '\n' <<< "$METHODS" | sed -n 's/.*@//p')) # epochs of targets to match to
  awk -v a="$SOURCE_DATASET" -v b="$DATASET" '{ print a, $1; print b, $2 }' <<< "$pairs" | together |
    while read -r set seeds; do
    echo "$train train_dense.py --dataset $set --model $MODEL --width $w --seed $seeds --out '$R/dense'" \
      "$data --save-epochs $(rewinds) $early $DENSE_FLAGS $parallel"
  done
}
imp() {
  while read -r a b; do
    printf 'chain %s\n' "$a" ${ENSEMBLE:+$((b - 1 + ${reused:-0}))} $([[ $CONTROLS = *imp* ]] && echo "$b")
  done <<< "$pairs" | together | while read -r _ seeds; do
    echo "$train prune_imp.py --dense$(printf " '$R/dense/seed%s'" $seeds) --sparsity $SPARSITY $data" \
      "--out$(printf " '$T/imp/seed%s'" $seeds) $IMP_FLAGS $tag $parallel"
  done
}
align() {
  while read -r a b; do for m in $METHODS $([[ $CONTROLS = *random* ]] && echo random); do
    echo "$python align_mask.py --source '$R/dense/seed$a' --target '$R/dense/seed$b' $data $ALIGN_FLAGS" \
      "--masks '$T/imp/seed$a' --out '$T/align/$m/seed$a-seed$b' --method ${m/@/ --target-epoch } $tag"
  done; done <<< "$pairs"
}
arm() { # name, seed of the weights, masks, folder, more flags
  while read -r s; do
    echo "$train train_sparse.py --arm $1 --weights '$R/dense/seed$2' --masks '$T/$3' --out '$T/sparse/$4'" \
      "$data --sparsity $s --rewind $(rewinds) $SPARSE_FLAGS $tag $parallel ${5-}"
  done <<< "$cells"
}
sparse() {
  while read -r a b; do
    pair=seed$a-seed$b order=${ENSEMBLE:+$((b - 1))}
    [ -n "$reused" ] || arm lth "$a" "imp/seed$a" "lth/seed$a-seed$a${order:+/order$order}" "${order:+--seed $order}"
    for signs in "" $([[ $CONTROLS = *signs* ]] && echo --signs); do
      arm naive "$b" "imp/seed$a" "naive${signs#-}/$pair" "$signs"
      for m in $METHODS; do arm permuted "$b" "align/$m/$pair" "permuted${signs#-}/$m/$pair" "$signs"; done
    done
    for control in $CONTROLS; do case $control in
      shuffled) arm shuffled "$b" "imp/seed$a" "shuffled/$pair" ;;
      random*) arm random-permutation "$b" "align/random/$pair" "random-permutation/$pair" ;;
      imp*) arm imp-target "$b" "imp/seed$b" "imp-target/seed$b-seed$b" ;;
    esac; done
  done <<< "$pairs"
}
figures() { echo "$python -m analyze.results '$OUT'"; echo "$python -m analyze.report '$OUT' $data $REPORT_FLAGS"; }
# ---------------------------------------------------------------- run them
run() { # the commands of a stage: one at a time on each GPU; on a CPU those of stages 3 and 4 share its cores
  local at_once=1 slots="" lines; lines=$(cat)
  if [ "$mode" = dry ]; then echo "$lines"; return; fi
  case "$gpu_count $PARALLEL $1" in "0 auto align" | "0 auto sparse")
    at_once=$(wc -l <<< "$lines") at_once=$((at_once < cores ? at_once : cores))
    share=$(((cores + at_once - 1) / at_once)) lines=${lines//--parallel auto/--parallel $share}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS-$share} ;; esac
  if [ "$gpu_count" -gt 1 ] && [ -z "$SPREAD" ]; then at_once=$gpu_count slots=--process-slot-var=slot; fi
  tr '\n' '\0' <<< "$lines" | GPUS=$gpus xargs -0 -n 1 -P "$at_once" $slots sh -c '
    if [ -n "${slot-}" ]; then set -- $GPUS; shift "$slot"; export CUDA_VISIBLE_DEVICES=$1; fi
    eval "$0" || exit 255' || exit 2
}
submit() { # name, commands: an array job, a command a task, after the job before, however that ends
  local count; count=$(grep -c . <<< "$2") || return 0
  job=$(sbatch --parsable --requeue --open-mode=append --job-name="$1" --comment="$PWD $OUT" $SBATCH \
    --array="1-$count" --output="$OUT/slurm/%x_%A_%a.log" ${job:+--dependency=afterany:$job} << SCRIPT
#!/bin/bash
eval "\$(sed -n "\${SLURM_ARRAY_TASK_ID}p" << 'LINES'
$2
LINES
)"
SCRIPT
  )
  echo "$1: $count tasks, job $job"
}
stage() { for w in $WIDTHS; do R=$OUT/w$w T=$OUT/w$w${TAG:+/$TAG}; $1; done; }
status() { for name in dense imp align sparse; do stage $name; done | python3 -m analyze.status; }
echo "$shown" >&2
if [ "$mode" = status ]; then status; exit; fi
if [ "$LAUNCH$mode" = slurm ]; then
  for name in sbatch squeue; do command -v $name > /dev/null || refuse "LAUNCH='slurm': there is no $name here"; done
  job=$(squeue --me --noheader --format="%A %k" | awk -v of="$PWD $OUT" '{ j = $1; $1 = "" } $0 == " " of { print j }')
  [ -z "$job" ] || refuse "OUT='$OUT' has jobs in the queue ($(echo $job)): wait for them, or scancel them"
  mkdir -p "$OUT/slurm"
  missing=$(for name in dense imp align sparse; do stage $name; done | python3 -m analyze.status --missing)
  for script in train_dense prune_imp align_mask train_sparse; do
    submit $script "$(sed -n "/ $script.py /s/^/exec /p" <<< "$missing")"
  done
  submit analyses "$(figures | paste -sd ';')"
  exit
fi
for name in dense imp align sparse; do stage $name | run $name; [ -n "$mode" ] || status || :; done
if [ "$mode" = dry ]; then figures; exit; fi
eval "$(figures)"
echo "done in $SECONDS s: open $OUT/report.html"
