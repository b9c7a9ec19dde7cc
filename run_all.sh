#!/usr/bin/env bash
# The whole experiment: dense networks, pruning, alignment, sparse training, tables and figures.
#   bash run_all.sh [PRESET]           run what is missing of a preset (quick: a few minutes, no download)
#   bash run_all.sh status [PRESET]    what has run, and how long the rest will take
#   bash run_all.sh test               the tests
#   bash run_all.sh --help [PRESET]    the settings and their values. The environment overrides each:
#                                      PAIRS="0 1" WIDTHS="1 4" OUT=runs/mine bash run_all.sh cifar10
# LAUNCH=slurm submits what is missing; DRY_RUN=1 prints the commands, in order, for any other queue.
presets="
preset   DATASET  MODEL    PAIRS   WIDTHS   SPARSITY          REWIND                    METHODS
quick    glyphs   mlp      0,1,2,3 1        0.9               3,6                       activation
cifar10  cifar10  resnet20 0,1,2   1,4,8,16 0.8,0.9,0.95,0.97 0,5,10,15,20,25,50,75,100 activation,masked
cifar100 cifar100 resnet20 0,1,2   1,4,8,16 0.8,0.9,0.95,0.97 0,10,25,50,100            activation,masked
vgg11    cifar10  vgg11    0,1,2   1        0.8,0.9           0,5,10,15,20,25,50        activation,masked
svhn     svhn     resnet20 0,1,2   1        0.8,0.9,0.95,0.97 10,20                     activation,masked
imagenet imagenet resnet50 0       1        0.8,0.9,0.95      10,25,50                  activation"
n='[1-9][0-9]{0,8}' share='0[.][0-9]*[1-9]' name='[[:alnum:]][[:alnum:]_.-]*' # patterns; |: may be empty
methods='activation|weight|masked' controls='shuffled|random-permutation|imp-target|signs'
settings="
PAIRS           words  0|$n      whole numbers: pair p has source seed 2p and target seed 2p+1
WIDTHS          words  $n|$n[.][0-9]*[1-9]|$share  numbers, as 0.5 or 4: each has a folder, OUT/w<width>
SPARSITY        words  $share    numbers between 0 and 1, as 0.9: shares of the weights to prune
REWIND          words  0|$n      whole numbers: epochs of dense runs that sparse training starts from
METHODS         words  |($methods)(@(0|$n))?|identity  any of $methods|identity; weight@9: to B's epoch 9
CONTROLS        words  |$controls  more arms, any of $controls
ENSEMBLE        word   |[2-9]|[1-9]$n  2 or more: the networks of Table 1, one source and so many targets
TAG             word   |$name    letters, digits, _ . -: all but dense networks anew, in OUT/w<width>/<tag>
DATASET         word   $name     a name that train_dense.py --dataset takes
SOURCE_DATASET  word   $name     a name: sources are trained and pruned on that data set (Table 16)
MODEL           word   $name     a name that train_dense.py --model takes
OUT             line   [^'%]+    a folder for the results, without ' and % in its name
DATA_DIR        line   [^'%]+    the folder of the data sets, without ' and % in its name
PARALLEL        word   auto|$n   auto or a number: networks at once on a device (not measured on a GPU)
SPREAD          word   |$n       a number: GPUs that share a network; otherwise each GPU has its own commands
LAUNCH          word   |slurm    slurm: an array job a stage, a command a task
SBATCH          word   .*        flags of sbatch, as --gres=gpu:1 --time=12:00:00"
settings+=$(printf '\n%s_FLAGS word .* more flags' DENSE IMP ALIGN SPARSE REPORT)
# ---------------------------------------------------------------- what is asked for
set -euf -o pipefail
cd "$(dirname "$0")"
refuse() { echo "run_all.sh: error: $1" >&2; exit 2; }
default() { # NAME=value ..., of settings that neither the environment nor an earlier call gave
  for default; do name=${default%%=*}; [ -n "${!name+given}" ] || printf -v "$name" %s "${default#*=}"; done
}
mode=${DRY_RUN:+dry}
case ${1-} in status | --help | -h) mode=$1; shift ;; esac
[ $# -le 1 ] || refuse "unexpected '$2': status or --help come first, then one preset; settings stand ahead"
preset=${1:-quick} known=$(awk 'NR > 2 { print $1 }' <<< "$presets" | xargs)
columns=$(awk -v preset="${preset/#test/quick}" 'NR == 2 { split($0, names) } NR > 2 && $1 == preset {
  for (i = 2; i <= NF; i++) print names[i] "=" $i }' <<< "$presets")
[ "$mode $preset" != "status test" ] || refuse "the tests have no status"
[ -n "$columns" ] || refuse "unknown preset '$preset': choose from $known test; status or --help go first"
case ${ENSEMBLE:+ensemble-}$preset in
  ensemble-quick) default REWIND="3 6" REPORT_FLAGS="--only results diversity" ;;
  ensemble-svhn) default REWIND=20 ;;
  ensemble-cifar100) default WIDTHS=4 ;;
  cifar10) [ -n "${REWIND+given}" ] || wide_rewind="0 10 25 50 100" ;; # at widths 8 and 16, as in the paper
esac
[ -z "${ENSEMBLE-}" ] || default WIDTHS=1 SPARSITY=0.9 REWIND=25 OUT="runs/$preset-ensemble" # as in Table 1
case $preset in
  svhn) default SOURCE_DATASET=cifar10 ;;
  quick) default DENSE_FLAGS="--image-size 16 --epochs 12 --batch-size 64 --lr 0.05" \
    IMP_FLAGS="--epochs 2 --batch-size 64 --lr 0.02" SPARSE_FLAGS="--batch-size 64 --lr 0.02" \
    REPORT_FLAGS="--only results accuracy interpolation masks methods --points 11 --images 1000" ;;
esac
for column in $columns; do default "${column//,/ }"; done
gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')} || :
gpus=$(echo $(tr , '\n' <<< "$gpus" | sed '/^ *-1/,$d; /^ *NoDevFiles/d')) gpu_count=$(wc -w <<< "$gpus")
[ -n "$gpus${SPREAD-}${LAUNCH-}" ] || [ "$preset" = imagenet ] || default PARALLEL=auto
default OUT="runs/$preset" DATA_DIR=data PARALLEL=1 SOURCE_DATASET="$DATASET"
shown="run_all.sh $preset:" help=$(sed -n '2,/^[^#]/s/^# \{0,1\}//p' run_all.sh)
while read -r name kind pattern meaning; do
  value=${!name-} several="" one=${name%S}
  [ "$one" = "$name" ] || [ -z "${!one+given}" ] || refuse "$one='${!one}': the setting is called $name"
  case $kind in word) value=$(echo $value) ;; words) # each once
    several=" (several with blanks between)"
    pattern="($pattern)( ($pattern))*" value=$(echo $(printf '%s\n' $value | awk '!seen[$0]++')) ;; esac
  [[ $value =~ ^($pattern)$ ]] || refuse "$name='$value': give $meaning$several"
  printf -v "$name" %s "$value"
  shown+=${value:+" $name='$value'"} help+=$(printf '\n  %-20s%-30s  %s' "$name" "'$value'" "$meaning")
done <<< "${settings:1}"
case $mode in -*) echo "$help"; exit ;; esac
case $TAG in dense | imp | align | sparse) refuse "TAG='$TAG' is the name of a folder: give another" ;; esac
[ -z "$SPREAD" ] || [ "$PARALLEL" = 1 ] || refuse "SPREAD='$SPREAD' excludes PARALLEL='$PARALLEL': choose one"
[ "$preset" != test ] || shown="the tests, in two halves, each of which prints when it has ended"
echo "$shown" >&2
python=python3 packages=$(sed -n 's/^\([a-z]\{1,\}\).*/\1/p' requirements.txt)
found="import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
python3 -c "$found" $packages 2> /dev/null || python=.venv/bin/python
if [ -z "$mode" ] && ! $python -c "$found" $packages 2> /dev/null; then
  echo "setting up .venv from requirements.txt (once)"
  python3 -m venv --system-site-packages .venv # so that a torch of the machine's own stays
  $python -m pip install --quiet --requirement requirements.txt
fi
# ---------------------------------------------------------------- what a command of each stage looks like
train=$python data="--data-dir '$DATA_DIR'" tag=${TAG:+--tag $TAG} parallel="--parallel $PARALLEL"
[ "$PARALLEL" != 1 ] || parallel=""
case ${SPREAD:+torchrun}$LAUNCH in
  torchrun) train+=" -m torch.distributed.run --standalone --nproc-per-node $SPREAD" ;;
  torchrunslurm) # on all nodes of a task, which meet on its first
    train="srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit $train -m torch.distributed.run"
    train+=" --nnodes \$SLURM_NNODES --nproc-per-node \$(($SPREAD / SLURM_NNODES)) --rdzv-backend c10d"
    train+=" --rdzv-id \$SLURM_JOB_ID --rdzv-endpoint \$(hostname):\$((20000 + SLURM_JOB_ID % 10000))" ;;
esac
dense() { # data set, seeds
  echo "$train train_dense.py --dataset $1 --model $MODEL --width $w --seed ${*:2} --out '$R/dense' $data" \
    "--save-epochs $rewind" $(printf '%s\n' $METHODS | sed -n 's/.*@//p') "$DENSE_FLAGS $parallel"
}
prune() { # "of", seeds
  echo "$train prune_imp.py --dense$(printf " '$R/dense/seed%s'" "${@:2}") --sparsity $SPARSITY $data" \
    "--out$(printf " '$T/imp/seed%s'" "${@:2}") $IMP_FLAGS $tag $parallel"
}
align() { # method
  echo "$python align_mask.py --source '$R/dense/seed$a' --target '$R/dense/seed$b' $data $ALIGN_FLAGS" \
    "--masks '$T/imp/seed$a' --out '$T/align/$1/$pair' --method ${1/@/ --target-epoch } $tag"
}
arm() { # name, seed of the weights, masks, folder, more flags
  for sparsity in "${sparsities[@]}"; do
    echo "$train train_sparse.py --arm $1 --weights '$R/dense/seed$2' --masks '$T/$3' --out '$T/sparse/$4'" \
      "$data --sparsity $sparsity --rewind $rewind $SPARSE_FLAGS $tag $parallel ${5-}"
  done
}
sparsities=("$SPARSITY"); [ -z "$LAUNCH" ] || sparsities=($SPARSITY) # a command for all, or one each
# ---------------------------------------------------------------- the commands
together() { # command, for lines "set seed": called for "set seed seed ..."
  local n=1000000; [ "$PARALLEL" = 1 ] || n=$((gpu_count > 1 ? gpu_count : 1)) # at most so many a set
  sort -k 2,2n -u | awk -v n=$n '{ key = $1 " " count[$1]++ % n; seeds[key] = seeds[key] " " $2 }
    END { for (key in seeds) { split(key, set); print set[1] seeds[key] } }' | sort -k 2,2n |
    while read -r line; do $1 $line; done
}
commands() { # of all stages, in any order
  for w in $WIDTHS; do
    R=$OUT/w$w T=$OUT/w$w${TAG:+/$TAG} rewind=$REWIND networks=() pruned=()
    case $w in 8 | 16) rewind=${wide_rewind:-$REWIND} ;; esac
    while read -r a b; do
      pair=seed$a-seed$b order=${ENSEMBLE:+$((b - 1))} member=${ENSEMBLE:+$b}
      if [ "$SOURCE_DATASET" = "$DATASET" ]; then
        arm lth "$a" "imp/seed$a" "lth/seed$a-seed$a${order:+/order$order}" "${order:+--seed $order}"
        member=$order # of an ensemble of pruned networks: the source is one
      fi
      networks+=("$SOURCE_DATASET $a" "$DATASET $b") pruned+=("of $a" "of ${member:-$a}")
      for method in $METHODS; do align "$method"; done
      for signs in "" $([[ $CONTROLS = *signs* ]] && echo --signs); do
        arm naive "$b" "imp/seed$a" "naive${signs#-}/$pair" "$signs"
        for m in $METHODS; do arm permuted "$b" "align/$m/$pair" "permuted${signs#-}/$m/$pair" "$signs"; done
      done
      for control in $CONTROLS; do case $control in
        shuffled) arm shuffled "$b" "imp/seed$a" "shuffled/$pair" ;;
        random-permutation) align random; arm $control "$b" "align/random/$pair" "$control/$pair" ;;
        imp-target) pruned+=("of $b"); arm imp-target "$b" "imp/seed$b" "imp-target/seed$b-seed$b" ;;
      esac; done
    done <<< "$pairs"
    printf '%s\n' "${networks[@]}" | together dense
    printf '%s\n' "${pruned[@]}" | together prune
  done
  echo "$python -m analyze.results '$OUT'"
  echo "$python -m analyze.report '$OUT' $data $REPORT_FLAGS"
}
tests() { # in two halves; tail waits for the end of each
  printf "$python -m pytest -q tests --ignore-glob='*/test_%s*' | tail -n 9999\n" '[!a-o]' '[a-o]'
}
pairs=$(for p in $PAIRS; do echo "$((2 * p)) $((2 * p + 1))"; done) # lines "source target", of seeds
[ -z "$ENSEMBLE" ] || pairs=$(seq "$ENSEMBLE" | sed 's/^/0 /')
stages="train_dense.py prune_imp.py align_mask.py train_sparse.py analyze.results analyze.report pytest"
lines=$([ "$preset" = test ] && tests || commands) # in the order of the stages:
lines=$(for stage in $stages; do grep " $stage " <<< "$lines" || :; done)
# ---------------------------------------------------------------- print, submit or run them
run() ( # a stage's commands: one at a time on each GPU; on a CPU they share its cores
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
submit() { # a stage and its commands: an array job, a command a task, after the job before, however that ends
  local name=${1%.py} count; count=$(wc -l <<< "$2")
  job=$(awk 'BEGIN { print "#!/bin/bash\ncase $SLURM_ARRAY_TASK_ID in" } { print NR ") exec", $0, ";;" }
    END { print "esac" }' <<< "$2" | sbatch --parsable --requeue --open-mode=append --job-name="$name" \
    $SBATCH --comment="$PWD $OUT" --output="$OUT/slurm/%x_%A_%a.log" --array="1-$count" \
    ${job:+--dependency=afterany:$job})
  echo "$name: $count tasks, job $job"
}
case $mode$LAUNCH in
  dry*) echo "$lines"; exit ;;
  status*) python3 -m analyze.status <<< "$lines"; exit ;;
  slurm)
    queue=$(squeue --me --noheader --format="%A %k" 2>&1) || refuse "LAUNCH='slurm': ${queue##*$'\n'}"
    job=$(awk -v of="$PWD $OUT" '{ job = $1; sub("[0-9]* ", "") } $0 == of { print job }' <<< "$queue")
    [ -z "$job" ] || refuse "OUT='$OUT' has jobs in the queue ($(echo $job)): wait for them, or scancel them"
    lines=$(python3 -m analyze.status --missing <<< "$lines")
    mkdir -p "$OUT/slurm" ;;
  *) # a second call would end the first where both want the same run
    if [ "$preset" != test ] && command -v flock > /dev/null; then
      mkdir -p "$OUT" 2> /dev/null && [ -w "$OUT" ] || refuse "cannot write OUT='$OUT': choose another"
      exec 9> "$OUT/.lock"
      # 1: somebody has it; anything else: a file system without locks
      flock -n 9 || [ $? != 1 ] || refuse "OUT='$OUT' is in work by another call of run_all.sh"
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
done; exit 0 # read with the loop: an edit of this file leaves what runs alone
