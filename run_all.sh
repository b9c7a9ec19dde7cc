#!/usr/bin/env bash
# The whole experiment with one command: dense networks, pruning, alignment, sparse training, tables and figures.
#
#   bash run_all.sh [quick|cifar10|cifar100|vgg11|svhn|imagenet|test]
#
# quick (the default) needs no download, no GPU and a few minutes. All else are the paper's settings.
# Each setting below can be overridden by the environment:
#   PAIRS="0 1 2" WIDTHS="1 4" OUT=runs/mine DATA_DIR=/data bash run_all.sh cifar10
#   METHODS="activation weight masked" says how to match (activation is the paper's; activation@20 matches against the
#   target after 20 epochs: Table 15), and CONTROLS="shuffled random-permutation imp-target signs" adds control arms.
#   ENSEMBLE=5 makes the networks of Table 1 in runs/<preset>-ensemble instead: one source, five targets for naive and
#   permuted, five data orders for LTH, IMP from five seeds. Copy dense/ there to train no dense network again.
#   PARALLEL=auto trains the networks of a command side by side, which fills a GPU (--parallel of the stages).
#   On several GPUs (those of CUDA_VISIBLE_DEVICES, or all) each has a command of its own: JOBS is their number.
#   SPREAD=4 trains each network on four GPUs (torchrun) instead, one after the other: for ResNet50 on ImageNet.
#   SOURCE_DATASET=cifar10 trains and prunes the sources on another data set: are masks reused? (Table 16, preset svhn)
#   DRY_RUN=1 prints the commands, in order, so that they can be fed to a job queue.
# Called again, it does what is missing; a run that was cut off goes on from its last epoch.
set -euo pipefail
cd "$(dirname "$0")"
preset=${1:-quick}
if [ $# -gt 1 ]; then echo "run_all.sh: error: unexpected '$2': give one preset, and settings before the command (DRY_RUN=1 bash run_all.sh)" >&2; exit 2; fi

# ---------------------------------------------------------------- settings
gpus=$(echo "${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -x '[0-9]*')}" |
  tr , '\n' | grep -v '^ *-1' || true)
gpu_count=$(echo $gpus | wc -w)
# Pair p has source seed 2p and target seed 2p+1, so that pairs are independent.
dense_flags="" imp_flags="" align_flags="" sparse_flags="" interpolation_flags="" jobs=1 parallel="" methods="activation masked" controls=""
analyses="results report" source_dataset=""
pairs="0 1 2" widths="1" sparsity="0.8 0.9 0.95 0.97" rewind="0 5 10 15 20 25 50 75 100" model=resnet20
case $preset in
  quick)
    dataset=glyphs widths="2" sparsity="0.8 0.9" rewind="7"
    dense_flags="--image-size 16 --limit-train 3000 --epochs 9 --batch-size 64 --lr 0.05 --warmup 2"
    imp_flags="--epochs 1 --batch-size 64 --lr 0.02" sparse_flags="--batch-size 64 --lr 0.01"
    methods="activation" interpolation_flags="--points 5 --images 500" analyses="results accuracy interpolation masks methods"
    cores=$(getconf _NPROCESSORS_ONLN) jobs=$((cores < 4 ? cores : 4))
    if [ "$cores" -le 4 ] && [ "$gpu_count" = 0 ]; then parallel=auto; fi ;; # not measured on a GPU yet
  cifar10)  dataset=cifar10 widths="1 4 8 16" ;;
  cifar100) dataset=cifar100 widths="1 4 8 16" rewind="0 10 25 50 100" ;;
  vgg11)    dataset=cifar10 model=vgg11 sparsity="0.8 0.9" rewind="0 5 10 15 20 25 50" ;;
  svhn)     dataset=svhn source_dataset=cifar10 rewind="10 20" ;; # Table 16: masks of CIFAR-10 reused
  imagenet) dataset=imagenet model=resnet50 methods="activation" pairs="0" sparsity="0.8 0.9 0.95" rewind="10 25 50" ;;
  test)     dataset= ;;
  *) echo "run_all.sh: error: unknown preset '$preset': choose from quick, cifar10, cifar100, vgg11, svhn, imagenet, test" >&2; exit 2 ;;
esac
ENSEMBLE=${ENSEMBLE-} out=runs/$preset
if [ -n "$ENSEMBLE" ]; then
  case $ENSEMBLE in *[!0-9]* | 0 | 1) echo "run_all.sh: error: ENSEMBLE=$ENSEMBLE: give the number of members, 2 or more" >&2; exit 2 ;; esac
  out+=-ensemble sparsity=0.9
  case $preset in quick) analyses="results diversity" ;; cifar100) widths=4 rewind=25 ;; svhn) rewind=20 ;; *) widths=1 rewind=25 ;; esac # one cell, as in Table 1
fi
PAIRS=${PAIRS-$pairs} WIDTHS=${WIDTHS-$widths} SPARSITY=${SPARSITY-$sparsity}
DATASET=${DATASET-$dataset} SOURCE_DATASET=${SOURCE_DATASET-$source_dataset} MODEL=${MODEL-$model} OUT=${OUT-$out} DATA_DIR=${DATA_DIR-data}
DENSE_FLAGS=${DENSE_FLAGS-$dense_flags} IMP_FLAGS=${IMP_FLAGS-$imp_flags} SPARSE_FLAGS=${SPARSE_FLAGS-$sparse_flags}
ALIGN_FLAGS=${ALIGN_FLAGS-$align_flags} INTERPOLATION_FLAGS=${INTERPOLATION_FLAGS-$interpolation_flags}
REPORT_FLAGS=${REPORT_FLAGS-} METHODS=${METHODS-$methods} CONTROLS=${CONTROLS-$controls}
asked=${PARALLEL-} PARALLEL=${PARALLEL-$parallel} # then one command trains all dense networks, and one all chains;
if [ -n "$asked" ]; then jobs=1; fi                # where it was asked for, one the grid of an arm and pair, too
if [ "$gpu_count" -gt 1 ]; then jobs=$gpu_count; fi
SPREAD=${SPREAD-} # GPUs that share a network
if [ -n "$SPREAD" ]; then
  case "$SPREAD-$asked${JOBS-}" in 0* | *[!0-9]*-* | *-?*) echo "run_all.sh: error: SPREAD=$SPREAD: give the number of GPUs that share a network, without PARALLEL and JOBS" >&2; exit 2 ;; esac
  jobs=1 PARALLEL=
fi
JOBS=${JOBS-$jobs}  # processes side by side; on a CPU each then gets its share of the cores
DRY_RUN=${DRY_RUN-}
for name in $METHODS; do case $name in
  *@ | *@*[!0-9]* | identity@*) echo "run_all.sh: error: METHODS: '$name' is no method at an epoch of the target, as activation@20 is" >&2; exit 2 ;;
  activation | weight | masked | identity | activation@* | weight@* | masked@*) ;;
  *) echo "run_all.sh: error: unknown method '$name': choose from activation, weight, masked, identity" >&2; exit 2 ;;
esac; done
for name in $CONTROLS; do case $name in
  shuffled | random-permutation | imp-target | signs) ;;
  *) echo "run_all.sh: error: unknown control '$name': choose from shuffled, random-permutation, imp-target, signs" >&2; exit 2 ;;
esac; done

# ---------------------------------------------------------------- set-up
python=python3
packages="torch, torchvision, numpy, scipy, tqdm, pandas, matplotlib, pytest"
import_check="from common.vision import torchvision; import $packages"
if [ -n "$DRY_RUN" ]; then # names the interpreter that will be used, and sets nothing up
  "$python" -c "from importlib.util import find_spec; raise SystemExit(not all(map(find_spec, '$packages'.split(', '))))" 2>/dev/null || python=.venv/bin/python
  [ "$python" = python3 ] || [ -x $python ] || echo "run_all.sh: note: $python is not there yet: bash run_all.sh makes it" >&2
elif ! "$python" -c "$import_check" 2>/dev/null; then
  if ! .venv/bin/python -c "$import_check" 2>/dev/null; then
    echo "setting up .venv from requirements.txt (once)"
    "$python" -m venv .venv && .venv/bin/python -m pip install --quiet --requirement requirements.txt
  fi
  python=.venv/bin/python
fi
if [ "$preset" = test ]; then
  if [ -n "$DRY_RUN" ]; then echo "$python -m pytest -q tests"; exit; fi
  exec "$python" -m pytest -q tests
fi
if [ "$JOBS" -gt 1 ]; then
  cores=$(getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS-$((cores > JOBS ? cores / JOBS : 1))}
fi

# ---------------------------------------------------------------- the experiment
run() { # run the commands on standard input, one a line, JOBS at a time
  if [ -n "$DRY_RUN" ]; then cat
  elif [ "$gpu_count" -gt 1 ] && [ "$JOBS" -gt 1 ]; then # the command in slot n has the n-th GPU to itself
    tr '\n' '\0' | GPUS=$gpus xargs -0 -n 1 -P "$JOBS" --process-slot-var=slot sh -c '
      set -- $GPUS; shift $((slot % $#)); export CUDA_VISIBLE_DEVICES=$1; eval "$0" || exit 255'
  else tr '\n' '\0' | xargs -0 -n 1 -P "$JOBS" sh -c 'eval "$0" || exit 255'; fi
}
roots() { # width and folder of each width
  for w in $WIDTHS; do [ "$WIDTHS" = "$w" ] && echo "$w $OUT" || echo "$w $OUT/w$w"; done
}
pairs() { # source and target seed of each pair
  if [ -n "$ENSEMBLE" ]; then seq 1 "$ENSEMBLE" | sed 's/^/0 /'
  else for p in $PAIRS; do echo "$((2 * p)) $((2 * p + 1))"; done; fi
}
sources() { pairs | cut -d ' ' -f 1 | uniq; }
reused=0
if [ "${SOURCE_DATASET:-$DATASET}" != "$DATASET" ]; then reused=1; fi
pruned() { # seeds of the networks to prune
  if [ -n "$ENSEMBLE" ]; then seq 0 $((reused ? ENSEMBLE : ENSEMBLE - 1)); else sources; fi # a reused mask's network is no member
  if control imp-target; then pairs | cut -d ' ' -f 2; fi
}
networks() { # a line a dense network: its data set and seed
  { sources | sed "s/^/${SOURCE_DATASET:-$DATASET} /"; pairs | cut -d ' ' -f 2 | sed "s/^/$DATASET /"; } | sort -k 2,2n -u
}
together() { # networks that one command trains side by side: lines of one first word become one line, or one a GPU in use
  if [ -z "$PARALLEL" ]; then cat; else awk -v lines=$((gpu_count > 1 ? JOBS : 1)) '
    { of[$1] = of[$1] " " $2 }
    END { for (set in of) { count = split(of[set], seeds); for (line = 0; line < lines && line < count; line++) {
      printf "%s", set; for (i = line + 1; i <= count; i += lines) printf " %s", seeds[i]; print "" } } }'
  fi
}
beside=${PARALLEL:+--parallel $PARALLEL}
rewinds() { # of a width: the paper's grid is coarser for the widest networks
  case "$preset $1" in
    "cifar10 8" | "cifar10 16") echo "${REWIND-0 10 25 50 100}" ;;
    *) echo "${REWIND-$rewind}" ;;
  esac
}
control() { case " $CONTROLS " in *" $1 "*) ;; *) return 1 ;; esac; } # whether a control is asked for
early=$(for name in $METHODS; do case $name in *@*) printf ' %s' "${name#*@}" ;; esac; done) # epochs of targets
train=$python
if [ -n "$SPREAD" ]; then train+=" -m torch.distributed.run --standalone --nproc-per-node $SPREAD"; fi
start=$(date +%s)

roots | while read -r w R; do
  networks | together | while read -r set seeds; do
    echo "$train train_dense.py --dataset $set --data-dir '$DATA_DIR' --model $MODEL --width $w --seed $seeds --out '$R/dense' --save-epochs $(rewinds "$w")$early $DENSE_FLAGS $beside"
  done
done | run

roots | while read -r w R; do
  pruned | sort -nu | sed "s/^/chain /" | together | while read -r _ seeds; do
    folders() { for seed in $seeds; do printf "'%s' " "$R/$1/seed$seed"; done; }
    echo "$train prune_imp.py --dense $(folders dense)--data-dir '$DATA_DIR' --sparsity $SPARSITY --out $(folders imp)$IMP_FLAGS $beside"
  done
done | run

roots | while read -r w R; do
  pairs | while read -r a b; do
    for method in $METHODS $(control random-permutation && echo random); do
      at=${method#"${method%@*}"}
      echo "$python align_mask.py --source '$R/dense/seed$a' --target '$R/dense/seed$b' --masks '$R/imp/seed$a' --data-dir '$DATA_DIR' --method ${method%@*}${at:+ --target-epoch ${at#@}} --out '$R/align/$method/seed$a-seed$b' $ALIGN_FLAGS"
    done
  done
done | run

roots | while read -r w R; do
  grid="--data-dir '$DATA_DIR' --sparsity $SPARSITY --rewind $(rewinds "$w") $SPARSE_FLAGS"
  if [ -n "$asked" ] && [ "$(echo $SPARSITY $(rewinds "$w") | wc -w)" -gt 2 ]; then grid+=" $beside"; fi # a single run gets all threads
  sparse() { # arm, weights, masks, folder
    echo "$train train_sparse.py --arm $1 --weights '$R/dense/seed$2' --masks '$R/$3' --out '$R/sparse/$4' $grid ${5-}"
  }
  for a in $([ $reused = 1 ] || sources); do # where the source saw other images, LTH is no comparison
    lth() { sparse lth "$a" "imp/seed$a" "lth/seed$a-seed$a${1-}" "${2-}"; }
    if [ -z "$ENSEMBLE" ]; then lth; else for order in $(seq 0 $((ENSEMBLE - 1))); do lth "/order$order" "--seed $order"; done; fi
  done
  pairs | while read -r a b; do
    pair=seed$a-seed$b
    sparse naive "$b" "imp/seed$a" "naive/$pair"
    for method in $METHODS; do sparse permuted "$b" "align/$method/$pair" "permuted/$method/$pair"; done
    if control shuffled; then sparse shuffled "$b" "imp/seed$a" "shuffled/$pair"; fi
    if control random-permutation; then sparse random-permutation "$b" "align/random/$pair" "random-permutation/$pair"; fi
    if control imp-target; then sparse imp-target "$b" "imp/seed$b" "imp-target/seed$b-seed$b"; fi
    if control signs; then
      sparse naive "$b" "imp/seed$a" "naive-signs/$pair" --signs
      for method in $METHODS; do sparse permuted "$b" "align/$method/$pair" "permuted-signs/$method/$pair" --signs; done
    fi
  done
done | run

unset OMP_NUM_THREADS
JOBS=1
for name in $analyses; do case $name in
  results | accuracy | masks | methods) echo "$python -m analyze.$name '$OUT'" ;;
  interpolation) echo "$python -m analyze.$name '$OUT' --data-dir '$DATA_DIR' $INTERPOLATION_FLAGS" ;;
  diversity) echo "$python -m analyze.$name '$OUT' --data-dir '$DATA_DIR'" ;;
  report) echo "$python -m analyze.$name '$OUT' --data-dir '$DATA_DIR' $REPORT_FLAGS" ;;
esac; done | run
[ -n "$DRY_RUN" ] || echo "done in $(($(date +%s) - start)) s: its tables and figures/ are in $OUT"
