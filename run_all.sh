#!/usr/bin/env bash
# Run the whole experiment: dense training, pruning, alignment, sparse training, tables and figures.
#   bash run_all.sh [PRESET]         run what is missing (quick, the default: minutes, no download)
#   bash run_all.sh status [PRESET]  show what has run and estimate the remaining time
#   bash run_all.sh test             run the tests
#   bash run_all.sh --help [PRESET]  show all settings; the environment overrides them:
#                                    PAIRS="0 1" WIDTHS="1 4" OUT=runs/mine bash run_all.sh cifar10
# LAUNCH=slurm submits what is missing; DRY_RUN=1 prints the commands in order, for other queues.
presets="
preset   DATASET  MODEL    PAIRS   WIDTHS   SPARSITY          REWIND                    METHODS
quick    glyphs   mlp      0,1,2,3 1        0.9               3,6                       activation
cifar10  cifar10  resnet20 0,1,2   1,4,8,16 0.8,0.9,0.95,0.97 0,5,10,15,20,25,50,75,100 activation,masked
cifar100 cifar100 resnet20 0,1,2   1,4,8,16 0.8,0.9,0.95,0.97 0,10,25,50,100            activation,masked
vgg11    cifar10  vgg11    0,1,2   1        0.8,0.9           0,5,10,15,20,25,50        activation,masked
svhn     svhn     resnet20 0,1,2   1        0.8,0.9,0.95,0.97 10,20                     activation,masked
imagenet imagenet resnet50 0       1        0.8,0.9,0.95      10,25,50                  activation"
# Patterns of the values; one that starts with | allows an empty value.
int='[1-9][0-9]{0,8}' fraction='0[.][0-9]*[1-9]' name='[[:alnum:]][[:alnum:]_.-]*'
number="$int|$int[.][0-9]*[1-9]|$fraction"
controls='shuffled|random-permutation|imp-target|signs' methods='activation|weight|masked'
method="($methods)(@(0|$int))?|identity"
settings="
PAIRS          words 0|$int      integers: pair p has source seed 2p and target seed 2p+1
WIDTHS         words $number     numbers, e.g. 0.5 or 4, not 4.0: each width has its folder, OUT/w<width>
SPARSITY       words $fraction   numbers between 0 and 1, e.g. 0.9, not 0.90: fractions of weights to prune
REWIND         words 0|$int      integers: rewind epochs, from which sparse training starts
METHODS        words |$method    any of $methods|identity; weight@9 matches B at epoch 9
CONTROLS       words |$controls  control arms, any of $controls
ENSEMBLE       word  |[2-9]|[1-9]$int  an integer >= 2: the targets of one source, as in Table 1
TAG            word  |$name      letters, digits, _ . -: stages 2 to 4 again, in OUT/w<width>/<tag>
DATASET        word  $name       a value of train_dense.py --dataset
SOURCE_DATASET word  $name       a value of train_dense.py --dataset, for the sources (Table 16)
MODEL          word  $name       a value of train_dense.py --model
OUT            line  [^'%]+      a folder for the results, without ' and % in its name
DATA_DIR       line  [^'%]+      the folder of the data sets, without ' and % in its name
PARALLEL       word  auto|$int   auto or an integer: networks in parallel per device (GPU: unmeasured)
SPREAD         word  |$int       an integer: GPUs per network; otherwise each GPU has own commands
LAUNCH         word  |slurm      slurm: an array job per stage, a task per command
SBATCH         word  .*          flags of sbatch, e.g. --gres=gpu:1 --time=12:00:00"
settings+=$(printf '\n%s_FLAGS word .* more flags' DENSE IMP ALIGN SPARSE REPORT)
# ---------------------------------------------------------------- read and check the settings
set -euf -o pipefail
cd "$(dirname "$0")"
refuse() { echo "run_all.sh: error: $1" >&2; exit 2; }
default() { # NAME=value ...: set those that neither the environment nor an earlier call has set
  for default; do
    name=${default%%=*}
    [ -n "${!name+set}" ] || printf -v "$name" %s "${default#*=}"
  done
}
mode=${DRY_RUN:+dry}
case ${1-} in status | --help | -h) mode=$1; shift ;; esac
[ $# -le 1 ] || refuse "unexpected argument '$2': give status or --help first, then one preset;\
 settings go before 'bash run_all.sh'"
preset=${1:-quick} preset_names=$(awk 'NR > 2 { print $1 }' <<< "$presets" | xargs)
columns=$(awk -v preset="${preset/#test/quick}" '
  NR == 2 { split($0, names) }
  NR > 2 && $1 == preset { for (i = 2; i <= NF; i++) print names[i] "=" $i }' <<< "$presets")
[ "$mode $preset" != "status test" ] || refuse "the tests have no status"
[ -n "$columns" ] || refuse "unknown preset '$preset': choose from $preset_names test;\
 status or --help goes before it"
case ${ENSEMBLE:+ensemble-}$preset in
  ensemble-quick) default REWIND="3 6" REPORT_FLAGS="--only results diversity" ;;
  ensemble-svhn) default REWIND=20 ;;
  ensemble-cifar100) default WIDTHS=4 ;;
  cifar10) # at widths 8 and 16, the paper has fewer rewind epochs
    [ -n "${REWIND+set}" ] || wide_rewind="0 10 25 50 100" ;;
esac
# Table 1
[ -z "${ENSEMBLE:+${PAIRS+set}}" ] || refuse "ENSEMBLE='$ENSEMBLE' has its own seeds: leave out PAIRS"
[ -z "${ENSEMBLE-}" ] || default WIDTHS=1 SPARSITY=0.9 REWIND=25 OUT="runs/$preset-ensemble"
case $preset in
  svhn) default SOURCE_DATASET=cifar10 ;;
  quick) default DENSE_FLAGS="--image-size 16 --epochs 12 --batch-size 64 --lr 0.05" \
    IMP_FLAGS="--epochs 2 --batch-size 64 --lr 0.02" SPARSE_FLAGS="--batch-size 64 --lr 0.02" \
    REPORT_FLAGS="--only results accuracy interpolation masks methods --points 11 --images 1000" ;;
esac
for column in $columns; do default "${column//,/ }"; done
gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')} || :
gpus=$(echo $(tr , '\n' <<< "$gpus" | sed '/^ *-1/,$d; /^ *NoDevFiles/d'))
gpu_count=$(wc -w <<< "$gpus")
[ -n "$gpus${SPREAD-}${LAUNCH-}" ] || [ "$preset" = imagenet ] || default PARALLEL=auto
default OUT="runs/$preset" DATA_DIR=data PARALLEL=1 SOURCE_DATASET="$DATASET"
summary="run_all.sh $preset:" help=$(sed -n '2,/^[^#]/s/^# \{0,1\}//p' run_all.sh)
while read -r name kind pattern meaning; do
  value=${!name-} separator="" other=${name%S}
  [ "$other" != "$name" ] || [ "$kind" != words ] || other=${name/%Y/IE}S
  [ "$other" = "$name" ] || [ -z "${!other+set}" ] || refuse "$other='${!other}': the setting is called $name"
  case $kind in
    word) value=$(echo $value) ;;
    words) # without repetitions
      value=$(echo $(printf '%s\n' $value | awk '!seen[$0]++'))
      pattern="($pattern)( ($pattern))*" separator=" (separated by spaces)" ;;
  esac
  [[ $value =~ ^($pattern)$ ]] || refuse "$name='$value': give $meaning$separator"
  printf -v "$name" %s "$value"
  summary+=${value:+" $name='$value'"}
  help+=$(printf '\n  %-20s%-30s  %s' "$name" "'$value'" "$meaning")
done <<< "${settings:1}"
case $mode in -*) echo "$help"; exit ;; esac
case $TAG in
  dense | imp | align | sparse) refuse "TAG='$TAG' is the folder of a stage: choose another" ;;
esac
[ -z "$SPREAD" ] || [ "$PARALLEL" = 1 ] || refuse "SPREAD='$SPREAD' excludes PARALLEL='$PARALLEL': choose one"
[ "$preset" != test ] || summary="the tests run in two halves; each prints its output at its end"
echo "$summary" >&2
python=python3 packages=$(sed -n 's/^\([a-z]\{1,\}\).*/\1/p' requirements.txt)
has_packages="import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))"
python3 -c "$has_packages" $packages 2> /dev/null || python=.venv/bin/python
if [ -z "$mode" ] && ! $python -c "$has_packages" $packages 2> /dev/null; then
  echo "setting up .venv from requirements.txt (once)"
  python3 -m venv --system-site-packages .venv # keeps an installed torch
  $python -m pip install --quiet --requirement requirements.txt
fi
# ---------------------------------------------------------------- the command of each stage
launcher=$python data="--data-dir '$DATA_DIR'" tag=${TAG:+--tag $TAG} parallel=""
[ "$PARALLEL" = 1 ] || parallel="--parallel $PARALLEL"
case ${SPREAD:+torchrun}$LAUNCH in
  torchrun) launcher+=" -m torch.distributed.run --standalone --nproc-per-node $SPREAD" ;;
  torchrunslurm) # a torchrun on each node of the task; the first node hosts the rendezvous
    launcher="srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit $launcher"
    launcher+=" -m torch.distributed.run --nnodes \$SLURM_NNODES"
    launcher+=" --nproc-per-node \$(($SPREAD / SLURM_NNODES)) --rdzv-backend c10d"
    launcher+=" --rdzv-id \$SLURM_JOB_ID"
    launcher+=" --rdzv-endpoint \$(hostname):\$((20000 + SLURM_JOB_ID % 10000))" ;;
esac
dense() { # data set, seeds
  echo "$launcher train_dense.py --dataset $1 --model $MODEL --width $width --seed ${*:2}" \
    "--out '$root/dense' $data --save-epochs $rewind" \
    $(printf '%s\n' $METHODS | sed -n 's/.*@//p') "$DENSE_FLAGS $parallel"
}
prune() { # "of", seeds
  echo "$launcher prune_imp.py --dense$(printf " '$root/dense/seed%s'" "${@:2}")" \
    "--sparsity $SPARSITY $data --out$(printf " '$tag_root/imp/seed%s'" "${@:2}")" "$IMP_FLAGS $tag $parallel"
}
align() { # method
  echo "$python align_mask.py --source '$root/dense/seed$source'" \
    "--target '$root/dense/seed$target' $data $ALIGN_FLAGS --masks '$tag_root/imp/seed$source'" \
    "--out '$tag_root/align/$1/$pair' --method ${1/@/ --target-epoch } $tag"
}
arm() { # name, seed of the weights, masks, folder, more flags
  for sparsity in "${sparsities[@]}"; do
    echo "$launcher train_sparse.py --arm $1 --weights '$root/dense/seed$2'" \
      "--masks '$tag_root/$3' --out '$tag_root/sparse/$4' $data --sparsity $sparsity" \
      "--rewind $rewind $SPARSE_FLAGS $tag $parallel ${5-}"
  done
}
# One command for all sparsities; with a queue, a command for each.
sparsities=("$SPARSITY"); [ -z "$LAUNCH" ] || sparsities=($SPARSITY)
# ---------------------------------------------------------------- all commands
grouped() { # function, for lines "key seed": call it with "key seed seed ..."
  local groups=1000000 # per key: at most so many; by default one for each seed
  [ "$PARALLEL" = 1 ] || groups=$((gpu_count > 1 ? gpu_count : 1))
  sort -k 2,2n -u | awk -v groups=$groups '
    { group = $1 " " count[$1]++ % groups; seeds[group] = seeds[group] " " $2 }
    END { for (group in seeds) { split(group, key); print key[1] seeds[group] } }' | sort -k 2,2n |
    while read -r line; do $1 $line; done
}
commands() { # of all stages, in any order
  for width in $WIDTHS; do
    root=$OUT/w$width tag_root=$OUT/w$width${TAG:+/$TAG} rewind=$REWIND networks=() pruned=()
    case $width in 8 | 16) rewind=${wide_rewind:-$REWIND} ;; esac
    while read -r source target; do
      pair=seed$source-seed$target order=${ENSEMBLE:+$((target - 1))} member=${ENSEMBLE:+$target}
      # The first order is the default one; earlier versions had it in a folder of its own.
      [ "$order" != "$source" ] || [ -d "$tag_root/sparse/lth/seed0-seed0/order0" ] || order=""
      if [ "$SOURCE_DATASET" = "$DATASET" ]; then
        arm lth "$source" "imp/seed$source" "lth/seed$source-seed$source${order:+/order$order}" \
          "${order:+--seed $order}"
        member=${member:+$((target - 1))} # the ensemble of pruned networks includes the source
      fi
      networks+=("$SOURCE_DATASET $source" "$DATASET $target")
      pruned+=("of $source" "of ${member:-$source}")
      for method in $METHODS; do align "$method"; done
      for signs in "" $([[ $CONTROLS = *signs* ]] && echo --signs); do
        arm naive "$target" "imp/seed$source" "naive${signs#-}/$pair" "$signs"
        for method in $METHODS; do
          arm permuted "$target" "align/$method/$pair" "permuted${signs#-}/$method/$pair" "$signs"
        done
      done
      for control in $CONTROLS; do case $control in
        shuffled) arm shuffled "$target" "imp/seed$source" "shuffled/$pair" ;;
        random-permutation)
          align random
          arm $control "$target" "align/random/$pair" "$control/$pair" ;;
        imp-target)
          pruned+=("of $target")
          arm imp-target "$target" "imp/seed$target" "imp-target/seed$target-seed$target" ;;
      esac; done
    done <<< "$pairs"
    printf '%s\n' "${networks[@]}" | grouped dense
    printf '%s\n' "${pruned[@]}" | grouped prune
  done
  echo "$python -m analyze.results '$OUT'"
  echo "$python -m analyze.report '$OUT' $data $REPORT_FLAGS"
}
tests() { # in two halves; tail holds back the output of each until its end
  printf "$python -m pytest -q tests --ignore-glob='*/test_%s*' | tail -n 9999\n" '[!a-o]' '[a-o]'
}
# Lines "source target" of seeds.
pairs=$(for pair in $PAIRS; do echo "$((2 * pair)) $((2 * pair + 1))"; done)
[ -z "$ENSEMBLE" ] || pairs=$(seq "$ENSEMBLE" | sed 's/^/0 /')
stages="train_dense.py prune_imp.py align_mask.py train_sparse.py"
stages+=" analyze.results analyze.report pytest"
lines=$([ "$preset" = test ] && tests || commands)
lines=$(for stage in $stages; do grep " $stage " <<< "$lines" || :; done) # sorted by stage
# ---------------------------------------------------------------- print, submit or run them
run() ( # the commands of a stage: one at a time on each GPU; on a CPU they share the cores
  lines=$1 count=$(wc -l <<< "$1") cores=$(getconf _NPROCESSORS_ONLN) at_once=1 slots=""
  if [ "$gpu_count" -gt 1 ] && [ -z "$SPREAD" ]; then
    at_once=$gpu_count slots=--process-slot-var=slot
  elif [ "$gpu_count $PARALLEL" = "0 auto" ] && [ "$count" -gt 1 ]; then
    at_once=$((count < cores ? count : cores)) share=$(((cores + at_once - 1) / at_once))
    lines=${lines//--parallel auto/--parallel $share}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS-$share}
  fi
  tr '\n' '\0' <<< "$lines" | GPUS=$gpus xargs -0 -n 1 -P "$at_once" $slots bash -o pipefail -c '
    if [ -n "${slot-}" ]; then set -- $GPUS; shift "$slot"; export CUDA_VISIBLE_DEVICES=$1; fi
    eval "$0" || exit 255' || exit 2
)
submit() { # a stage and its commands: array jobs, as large as SLURM allows by default, which start
  # after the jobs of the stage before have ended
  local name=${1%.py} jobs="" job tasks
  while mapfile -t -n 1000 tasks && [ ${#tasks[@]} -gt 0 ]; do
    job=$(printf '%s\n' "${tasks[@]}" | awk 'BEGIN { print "#!/bin/bash\ncase $SLURM_ARRAY_TASK_ID in" }
      { print NR ") exec", $0, ";;" }
      END { print "esac" }' |
      sbatch --parsable --requeue --open-mode=append --job-name="$name" $SBATCH \
        --comment="$PWD $OUT" --output="$OUT/slurm/%x_%A_%a.log" --array="1-${#tasks[@]}" \
        ${previous:+--dependency=afterany$previous})
    jobs+=:$job
    echo "$name: ${#tasks[@]} tasks, job $job"
  done <<< "$2"
  previous=$jobs
}
case $mode$LAUNCH in
  dry*) echo "$lines"; exit ;;
  status*) python3 -m analyze.status <<< "$lines"; exit ;;
esac
[ "$preset" = test ] || { mkdir -p "$OUT" 2> /dev/null && [ -w "$OUT" ]; } ||
  refuse "cannot write OUT='$OUT': choose another"
case $LAUNCH in
  slurm)
    queue=$(squeue --me --noheader --format="%A %k" 2>&1) || refuse "LAUNCH='slurm': ${queue##*$'\n'}"
    job=$(awk -v comment="$PWD $OUT" '
      { job = $1; sub("[0-9]* ", "") }
      $0 == comment { print job }' <<< "$queue")
    [ -z "$job" ] || refuse "OUT='$OUT' has jobs in the queue ($(echo $job)): wait for them, or scancel them"
    lines=$(python3 -m analyze.status --missing <<< "$lines")
    mkdir -p "$OUT/slurm" ;;
  *) # a stage fails on a run that another process is training
    if [ "$preset" != test ] && command -v flock > /dev/null; then
      exec 9> "$OUT/.lock"
      # flock exits with 1 if the lock is taken, with another code on file systems without locks.
      flock -n 9 || [ $? != 1 ] || refuse "OUT='$OUT' is in use by another run_all.sh"
    fi ;;
esac
for stage in $stages; do
  commands=$(grep " $stage " <<< "$lines") || continue
  if [ -n "$LAUNCH" ]; then submit "$stage" "$commands"; continue; fi
  run "$commands"
  case $stage in
    *.py) python3 -m analyze.status <<< "$lines" || : ;;
    analyze.report) echo "done in $SECONDS s: open $OUT/report.html" ;;
  esac
done; exit 0 # read together with the loop, so that an edit of this file does not disturb the run
