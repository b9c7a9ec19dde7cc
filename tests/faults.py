"""Mutation tests: insert deliberate faults into a copy of the project; a named test must fail.

    python tests/faults.py                          all faults, ten minutes on one core
    python tests/faults.py transposed "off by one"  faults with one of these in their description

Prints `caught` or `MISSED` for each fault. Exits with code 1 if a fault was missed, or broke the
code so that no test ran. tests/test_faults.py checks that all texts still occur in the code.
"""

import os
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot  # noqa: F401
import pandas  # noqa: F401
import pytest
import scipy.optimize  # noqa: F401
import torch.export  # noqa: F401

ROOT = Path(__file__).parents[1]

# Description | file. Then > the test, as file::name, - a text in the file (parts of lines, or
# several lines), and + its replacement.
FAULTS = """
inverted permutation | common/align/permutation.py
>permutation::test_permute_by_hand
-place.positions[permutation[place.axis]]
+place.positions[permutation[place.axis].argsort()]

permuted along the wrong axis | common/align/permutation.py
>permutation::test_permute_by_hand
-rows.index_select(dim, column)
+rows.index_select(0, column)

BatchNorm buffers not moved | common/align/permutation.py
>axes::test_every_tensor_of_our_models_moves_with_the_others
-if place.axis in permutation]
+if place.axis in permutation and "running" not in name]

a changed function is not noticed | common/align/permutation.py
>axes::test_a_grouped_convolution_moves_in_blocks
-if not difference < tolerance:
+if False:

parts of an axis with different roles are exchanged | common/align/labels.py
>axes::test_axes_of_building_blocks
-self.tie(label, label, tag)
+self.tie(label, label)

transposed assignment | common/align/matching.py
>matching::test_assignment_by_hand
-linear_sum_assignment(similarity.numpy(),
+linear_sum_assignment(similarity.numpy().T,

the least similar channels are matched | common/align/matching.py
>matching::test_assignment_by_hand
-maximize=True
+maximize=False

signs are not permuted | align_mask.py
>stages::test_every_method_permutes_masks_and_signs_by_the_saved_permutation
-for part in ("mask", "signs"):
+for part in ("mask",):

`masked` matches the whole source | align_mask.py
>stages::test_every_method_permutes_masks_and_signs_by_the_saved_permutation
-masking.apply(w_a, mask), match_activations()
+w_a, match_activations()

the early target is matched at its last epoch | align_mask.py
>stages::test_early_matching_uses_the_targets_early_weights
-args.target_epoch, *data)
+None, *data)

all pairs share one random permutation | align_mask.py
>align::test_each_pair_has_a_random_permutation_of_its_own
-derived_seed(args.seed, pair)
+args.seed

the smallest weights are kept | common/masking.py
>masking::test_magnitude_pruning_by_hand
-largest=False
+largest=True

pruned weights come back | common/masking.py
>masking::test_magnitude_pruning_by_hand
-magnitude[~flat] = -1
+magnitude[~flat] += 0

shortcuts are pruned | common/masking.py
>models::test_resnet50_prunes_all_but_the_shortcuts
-{"shortcut", "downsample"}
+set()

total sparsity leaves out the shortcuts | common/masking.py
>masking::test_sparsity_total_counts_the_shortcuts
-in model.named_modules() if isinstance(item[1], LAYERS)]
+in model.named_modules() if isinstance(item[1], LAYERS) and "shortcut" not in item[0]]

fan-in of columns | common/masking.py
>masking::test_apply_signs_fan_in_by_hand
-kept.flatten(1).sum(1)
+kept.transpose(0, 1).flatten(1).sum(1)

the shuffled mask is the mask | common/masking.py
>stages::test_control_arms_train_the_right_weights_under_the_right_mask
-kept.flatten()[torch.randperm(kept.numel(), generator=generator)].view(kept.shape)
+kept.clone()

a sparsity is missed by one weight | common/masking.py
>masking::test_keep_count_meets_the_sparsity_to_one_weight
-count = round(total * (1 - sparsity))
+count = int(total * (1 - sparsity)) + 1

masks of another network are accepted | common/masking.py
>refusals::test_later_stages_refuse
-if any((positive != (weights[name] > 0)).any() for
+if any(False for

a chain continues from dense weights | prune_imp.py
>stages::test_imp_prunes_20_percent_per_round_and_branches_off_to_each_sparsity
-{"state_dict": cpu_state(model), "mask": mask, "round": number}
+{"state_dict": weights, "mask": mask, "round": number}

signs of the initial weights | prune_imp.py
>stages::test_imp_prunes_20_percent_per_round_and_branches_off_to_each_sparsity
-masking.signs(weights, names)
+masking.signs(checkpoint.load_dense(folder, 0)["state_dict"], names)

rewinding forgets to rewind | prune_imp.py
>stages::test_imp_with_rewinding_trains_from_epoch_k_on_the_dense_schedule
-rewound["state_dict"] if rewound else weights
+weights

rewinding starts at the first learning rate | prune_imp.py
>stages::test_imp_with_rewinding_trains_from_epoch_k_on_the_dense_schedule
-rates[rewind or 0 :]
+rates[: len(rates) - (rewind or 0)]

rounds repeat a data order | prune_imp.py
>stages::test_imp_prunes_20_percent_per_round_and_branches_off_to_each_sparsity
-start["epoch"] + chain["round"] * epochs
+start["epoch"]

stages share their seeds | common/data/batches.py
>stages::test_no_stage_sees_the_batches_of_another
-derived_seed(seed, number) if number else seed
+seed

mask before the step only | common/training.py
>training::test_masked_steps_by_hand
-        optimiser.step()
-        masker.apply()
+        masker.apply()
+        optimiser.step()

mask at the start only | common/training.py
>training::test_masked_steps_by_hand
-        optimiser.step()
-        masker.apply()
+        optimiser.step()

a leak is not checked | common/training.py
>training::test_a_leaking_mask_stops_training
-            masker.check()
+            pass

gradients add up | common/training.py
>training::test_masked_steps_by_hand
-        optimiser.zero_grad(set_to_none=True)
-        loss.backward()
+        loss.backward()

learning rates off by one epoch | common/training.py
>training::test_schedules_by_hand
-math.pi * epoch / epochs
+math.pi * (epoch + 1) / epochs

learning rates by absolute epoch | common/training.py
>stages::test_sparse_runs_train_the_given_weights_under_the_given_mask
-rates[epoch - first_epoch]
+rates[min(epoch, len(rates) - 1)]

weights are saved one epoch early | common/training.py
>stages::test_dense_runs_save_the_initialisation_the_requested_epochs_and_the_last
-at_epoch(epoch + 1)
+at_epoch(epoch)

evaluation in training mode | common/training.py
>training::test_evaluation_by_hand
-    model.eval()
+    model.train()

divergence is not detected | common/training.py
>learning::test_a_sparse_run_that_diverges_is_a_result
-.isfinite():
+.isnan().all():

no momentum in stage 1 | train_dense.py
>stages::test_dense_runs_save_the_initialisation_the_requested_epochs_and_the_last
-lr=0.0, momentum=momentum
+lr=0.0, momentum=0.0

no weight decay in stage 4 | train_sparse.py
>stages::test_sparse_runs_train_the_given_weights_under_the_given_mask
-weight_decay=decay
+weight_decay=0.0

stage 4 starts from the last weights | train_sparse.py
>stages::test_sparse_runs_train_the_given_weights_under_the_given_mask
-checkpoint.load_dense(args.weights, k)
+checkpoint.load_dense(args.weights)

stage 4 trains T epochs | train_sparse.py
>stages::test_sparse_runs_train_the_given_weights_under_the_given_mask
-arguments["epochs"] - rewind, warmup
+arguments["epochs"], warmup

signs are not transferred | train_sparse.py
>stages::test_control_arms_train_the_right_weights_under_the_right_mask
-    if signs:
+    if False:

the last short batch is trained on | common/data/batches.py
>data::test_training_drops_the_last_short_batch_and_evaluation_never_does
-return images // batch_size
+return -(-images // batch_size)

evaluation drops the last batch | common/data/resident.py
>data::test_training_drops_the_last_short_batch_and_evaluation_never_does
-batches[distributed.RANK ::
+batches[distributed.RANK : -1 :

every epoch is the same | common/data/resident.py
>data::test_batches_depend_only_on_seed_and_epoch
-manual_seed(derived_seed(seed, epoch))
+manual_seed(derived_seed(seed, 0))

crops are transposed | common/data/resident.py
>data::test_a_batch_is_cropped_and_flipped_as_planned
-windows[indices, :, y[indices], x[indices]]
+windows[indices, :, x[indices], y[indices]]

normalised the wrong way round | common/data/batches.py
>data::test_normalisation_by_hand
-.sub_(mean).div_(std)
+.div_(std).sub_(mean)

momenta are lost on resuming | common/runtime/resume.py
>training::test_an_interrupted_run_ends_with_the_same_numbers
-self.optimiser.state_dict()["state"]
+{}

pickles are executed | common/checkpoint.py
>checkpoint::test_objects_are_never_loaded
-weights_only=True
+weights_only=False

files are written in place | common/checkpoint.py
>checkpoint::test_a_full_disk_leaves_the_old_file_and_no_other
-os.replace(temporary, path)
+path.write_bytes(temporary.read_bytes())

a file is renamed before it is synchronised | common/checkpoint.py
>checkpoint::test_a_file_is_synchronised_before_its_rename_and_the_folder_after_it
-os.fsync(file.fileno())
+pass

a changed checkpoint is accepted | common/checkpoint.py
>refusals::test_later_stages_refuse
-if dense["sha256"] != kept[str(epoch)]:
+if False:

another experiment is resumed | common/runs.py
>runs::test_another_experiment_in_a_folder_is_refused
-        if changed:
+        if False:

two processes work in one folder | common/runs.py
>checkpoint::test_a_folder_in_which_another_process_works_is_left_alone
-fcntl.LOCK_EX | fcntl.LOCK_NB
+fcntl.LOCK_SH | fcntl.LOCK_NB

result.json is written first | common/runs.py
>checkpoint::test_result_json_is_written_last
-    checkpoint.save_csv(rows, folder / "log.csv")
-    seconds
+    checkpoint.save_json({}, folder / "result.json")
+    checkpoint.save_csv(rows, folder / "log.csv")
+    seconds

an arm that contradicts its files is accepted | common/arms.py
>refusals::test_later_stages_refuse
-if arm not in arms:
+if False:

processes share the first slice | common/runtime/distributed.py
>distributed::test_two_ranks_train_the_same_networks_as_one_process
-slice(RANK * local, (RANK + 1) * local)
+slice(0, local)

every process writes | common/checkpoint.py
>distributed::test_only_rank_zero_writes_and_deletes
-if RANK:
+if False:

REPAIR of BatchNorm on test images | analyze/lib/lines.py
>analyze::test_repair_at_the_endpoints_changes_nothing_and_interpolation_meets_them
-update_bn(train(), model)
+update_bn(test(), model)

REPAIR by rescaling on test images | analyze/lib/lines.py
>analyze::test_repair_at_the_endpoints_changes_nothing_and_interpolation_meets_them
-torch.cat([batch for batch, _ in train()])
+torch.cat([batch for batch, _ in test()])

the barrier is the largest loss | analyze/lib/lines.py
>networks::test_barriers_by_hand
-(values - line).max(
+values.max(

pairs share seeds | run_all.sh
>run_all::test_a_dry_run_prints_the_commands_in_order
-$((2 * pair)) $((2 * pair + 1))
+$((pair)) $((pair + 1))

permuted runs use the unpermuted masks | run_all.sh
>run_all::test_a_dry_run_prints_the_commands_in_order
-arm permuted "$target" "align/$method/$pair"
+arm permuted "$target" "imp/seed$source"
"""


class Fault(NamedTuple):
    description: str
    file: str
    test: str
    old: str
    new: str


def faults() -> list[Fault]:
    result = []
    for block in FAULTS.strip().split("\n\n"):
        head, *lines = block.splitlines()
        test, *texts = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in ">-+")
        path = f"tests/test_{test.replace('::', '.py::')}"
        result.append(Fault(*head.split(" | "), path, *texts))
    return result


def run_tests(folder: Path, *tests: str) -> int:
    """Run tests in a copy of the project; return pytest's exit code, 1 if a test failed."""

    def child() -> None:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.dont_write_bytecode = True
        os._exit(pytest.main(["-qx", "-p", "no:cacheprovider", *tests]))

    process = get_context("fork").Process(target=child)  # has the packages imported already
    process.start()
    process.join()
    return process.exitcode


def main() -> None:
    words, caught = sys.argv[1:] or [""], 0
    selected = [fault for fault in faults() if any(word in fault.description for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy, ignored = Path(folder) / "copy", {".git", ".venv", "data", "runs"}
        shutil.copytree(ROOT, copy, ignore=lambda path, _: ignored if Path(path) == ROOT else ())
        if run_tests(copy, *{fault.test for fault in selected}):
            sys.exit("the tests fail without any fault")
        for fault in selected:
            start, path = time.perf_counter(), copy / fault.file
            text = path.read_text()
            if text.count(fault.old) != 1:
                sys.exit(
                    f"{fault.description}: {text.count(fault.old)} times in {path}: {fault.old}"
                )
            path.write_text(text.replace(fault.old, fault.new))
            code = run_tests(copy, fault.test)
            path.write_text(text)
            caught += code == 1
            outcome = {0: "MISSED", 1: "caught"}.get(code, f"BROKEN: pytest ended with {code}")
            seconds = time.perf_counter() - start
            print(f"{seconds:4.0f} s  {fault.description}: {outcome}", flush=True)
    print(f"{caught} of {len(selected)} were caught")
    sys.exit(caught < len(selected))


if __name__ == "__main__":
    main()
