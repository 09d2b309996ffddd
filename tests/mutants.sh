#!/bin/sh
# Mutation testing of the core functions: lists the changes that no test notices; at least 93 % have to be noticed.
# `mutmut show NAME` shows one.
core() { for name in $2; do echo "$1.x_${name}__mutmut_*"; done; }
OMP_NUM_THREADS=1 $PYTHON -m mutmut run \
    $(core lure "cross_entropies unlearn_ connection_sensitivity top_k_mask reinitialize_ connections gradient_of_sum
        chunks evaluating mega_batches cumulative_error_rate expected_calibration_error to_input augmented
        train_epoch_ batches learn_ evaluate lure_ generator_of draw_stream with_noise draw_pi totals") \
    $(core baselines "warm_start scratch_ shrink_and_perturb_ dash_ in_groups upcoming fire_ later_layer_forgetting_
        reset_classifier_ redraw_layers_ knowledge_evolution_ layers_of like trained fisher_ magnitude_ random_
        released_ fisher_information magnitudes random_scores keep_top_ loss_gradient") \
    $(core evaluate "reliability_bins pgd_attack predict accuracy corruption_accuracy load_labels load_images load_array
        weight_noise_accuracy add_noise_ restored")
$PYTHON -m mutmut results --all true | awk '
    /: not checked$/ { next } { n++ } / (killed|timeout)$/ { k++; next } { print }
    END { printf "%d of %d mutants killed, %.1f %%\n", k, n, 100 * k / (n + !n); exit !n || k < 0.93 * n }'
