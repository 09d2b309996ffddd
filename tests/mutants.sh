#!/bin/sh
# Mutation testing of the core functions: lists the changes that no test notices; at least 90 % have to be noticed.
# `mutmut show NAME` shows one.
core() { for name in $2; do echo "$1.x_${name}__mutmut_*"; done; }
OMP_NUM_THREADS=1 $PYTHON -m mutmut run \
    $(core lure "mega_batches connection_sensitivity top_k_mask reinitialize_ unlearn_ cumulative_error_rate
        expected_calibration_error to_input augmented train_epoch_ learn_ evaluate lure_ draw_stream
        for_method totals") \
    $(core baselines "warm_start scratch_ shrink_and_perturb_ dash_ fire_ later_layer_forgetting_ reset_classifier_
        redraw_layers_ knowledge_evolution_ fisher_ magnitude_ random_ fisher_information magnitudes random_scores
        connections keep_top_ loss_gradient") \
    $(core evaluate "reliability_bins pgd_attack predict accuracy corruption_accuracy load_array weight_noise_accuracy
        redrawing_accuracy")
$PYTHON -m mutmut results --all true | awk '
    /: not checked$/ { next } { n++ } / (killed|timeout)$/ { k++; next } { print }
    END { printf "%d of %d mutants killed, %.1f %%\n", k, n, 100 * k / (n + !n); exit !n || k < 0.9 * n }'
