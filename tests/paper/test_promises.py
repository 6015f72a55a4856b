"""What README, the manual and the public docstrings promise or refuse, beside the tests that prove it.

A sentence that sounds like a promise has its tests in the table, names its test itself, or is known to be none.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from paper.reference import ROOT, SOURCE

PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((SOURCE / "manual").glob("*.rst")))}
WORDS = re.compile(
    r"\b(refus\w*|raise[sd]?|warn\w*|errors?|cannot|never|not supported|is not measured|NaN|told|skip\w*|exact\w*"
    r"|bit|nothing|untouched|stays? (?:what|as)|says? so|said|proves?|left out|checks every|no step|unbiased|only)\b",
    re.IGNORECASE,
)
# A statistic, not a fault.
STATISTIC = re.compile(r"standard error|relative_error", re.IGNORECASE)

BIT_FOR_BIT = "test_one_step_windows_are_the_plain_loop_bit_for_bit"
ACCUMULATION = "test_equal_micro_batches_are_the_usual_accumulation_loop_bit_for_bit"
MEAN = "test_any_windows_equal_single_large_batches test_replicated test_sharded"
NONFINITE = "test_a_nonfinite_window_is_skipped"
IN_TRAINERS = (
    "test_lightning.py::test_a_window_that_is_not_finite_moves_nothing "
    "test_transformers.py::test_a_window_that_is_not_finite_moves_nothing"
)
CHANGED = (
    "test_the_next_micro_batch_is_refused test_a_window_cannot_be_closed "
    "test_a_due_window_that_is_no_mean_any_more_is_refused test_an_optimizer_step_left_in_the_loop_is_refused "
    "test_a_write_to_an_open_windows_gradients_is_refused test_a_hook_on_what_was_accumulated_is_refused "
    "test_another_networks_loss_that_reaches_these_parameters_is_refused "
    "test_sharded_gradients_are_guarded_and_forgotten"
)
RANKS = "test_is_refused_by_name_on_every_rank test_parts_of_a_loop_and_checkpoints"
FSDP1 = "test_is_refused_by_name_on_every_rank test_construction_refuses_what_cannot_work"
RESUMED = "test_resumes_to_the_last_bit test_resumes_after_any_micro_batch_to_the_last_bit"
UNWRAPPED = "test_nothing_is_wrapped_and_checkpoints_are_those_of_the_plain_loop"
UNBOUNDED = "test_unbounded_when_the_signal_may_be_zero test_an_unbounded_interval_is_a_caution"
UNBIASED = "test_unbiased_for_any_sizes test_rows_equal_the_analysis_of_variance_of_the_cells"
ONE_CELL = "test_one_micro_batch_holds_no_evidence test_one_micro_batch_says_how_to_measure"
TWINS = "test_equals_the_sum_of_squared_deviations test_estimates_equal_the_exact_covariance"
FIXED = "TestOpenLoop::test_fixed test_rows_equal_the_analysis_of_variance_of_the_cells"
LISTENS_LESS = "test_is_the_same_to_the_bit_and_rows_are_those_of_the_windows_measured"
SETTLED = "test_settled_it_measures_one_window_in_four_at_most_and_finds_the_same_noise"
OF_A_RULE = "test_refuses_by_name_value_and_bound"

PROMISES: dict[str, dict[str, str]] = {
    "README.md": {
        "It wraps nothing": UNWRAPPED,
        "loader and checkpoints stay what they are": UNWRAPPED,
        "Exact for every window": MEAN,
        "`Fixed(1)` is the plain loop": f"{BIT_FOR_BIT} {ACCUMULATION}",
        "comes from finished windows only": "test_a_windows_size_does_not_depend_on_its_own_data",
        "Unbiased estimates with intervals": f"{UNBIASED} TestCoverage::test_of_the_truth",
        "an estimate that is worth nothing says so": UNBOUNDED,
        "Refused, not averaged": CHANGED,
        "gradients that something else changed within a window, and options it cannot keep exact": f"{CHANGED} {RANKS}",
        "Checkpoints go on to the last bit": RESUMED,
        "No step on gradients that are not finite": f"{NONFINITE} {IN_TRAINERS}",
        "a larger batch never suffices": "test_the_default_rule_says_so_and_grows",
        "FSDP1 is not supported": FSDP1,
    },
    "batch.rst": {
        "nothing is decided, and everything is measured": FIXED,
        "cannot tell the gradient's length from zero": UNBOUNDED,
        "moves the batch only with a ``guard``": "test_without_a_guard_the_tail_moves_nothing",
        "The pooled, unbiased moments stand beside both": f"{UNBIASED} test_history_is_the_documented_table",
    },
    "distributed.rst": {
        "a check in every window proves that they do": "test_a_rank_with_other_limits_is_found",
        "ranks end an epoch together and warn of what is left over": "test_replicated",
        "ranks only add cells to a window": "test_all_ranks_decide_alike_and_one_micro_batch_each_is_evidence",
        "there is one rank, and nothing of this happens": BIT_FOR_BIT,
        "is refused on several ranks": RANKS,
        "FSDP1 is not supported": FSDP1,
        "Refusals name the option and the way out": "test_is_refused_by_name_on_every_rank",
    },
    "history.rst": {
        "In rows of windows that were not measured": LISTENS_LESS,
        "this window's unbiased": UNBIASED,
        "``high`` is infinite where the data cannot tell": UNBOUNDED,
        "whether the step was left out": NONFINITE,
        "one that raises is left out with a warning": "test_the_training_goes_on_as_if_nobody_had_watched",
        "writes one page that needs nothing else": "test_nothing_is_asked_from_elsewhere",
    },
    "limits.rst": {
        "a rule that keeps gradients": RANKS,
        "FSDP1 is not supported": FSDP1,
    },
    "loop.rst": {
        "it wraps nothing": UNWRAPPED,
        "Exact for every window": f"{MEAN} test_token_weights_equal_one_mean_over_all_tokens",
        "``Fixed(1)`` is the plain loop": f"{BIT_FOR_BIT} {ACCUMULATION}",
        "comes from finished windows only": "test_a_windows_size_does_not_depend_on_its_own_data",
        "is skipped and recorded, in Lightning and Transformers too": f"{NONFINITE} {IN_TRAINERS}",
        "``skip_nonfinite=False`` steps as a plain loop does": "test_it_is_taken_when_told_so",
        "**Gradients that something else changed** within a window are refused": CHANGED,
        "with FSDP2 once they are synchronised": "test_sharded_gradients_are_guarded_and_forgotten",
        "only of a loader without a length": (
            "test_where_it_has_a_length_as_in_a_plain_loop test_a_generator_still_ends_its_last_window"
        ),
        "An iteration that an error left within a window is told": (
            "test_an_error_in_the_body_is_told_when_the_window_goes_on "
            "test_after_discard_window_there_is_nothing_to_tell"
        ),
        "also skips a step whose gradient is ten times longer": (
            "test_skips_a_step_ten_times_longer_than_usual_but_not_for_ever "
            "test_the_step_is_left_out_and_the_batch_doubles"
        ),
        "an overflowing window is skipped for parameters and statistics": (
            "test_an_overflowing_window_is_skipped_for_everything"
        ),
        "two networks may share one scaler": "TestOneScalerForTwoNetworks::test_both_normalised_then_both_stepped",
        "bfloat16 needs nothing": "test_norms_are_those_of_the_gradients_in_float32",
        "loads under ``weights_only=True``": f"{RESUMED} test_goes_on_within_an_epoch_and_within_a_window",
        "A load checks every value before it changes anything": (
            "test_any_other_value_is_refused_by_its_place_or_trains"
        ),
    },
    "meter.rst": {
        "in a loop that stays as it is": "TestUntouched::test_parameters_optimizer_and_random_numbers",
        "and changes nothing": "TestUntouched::test_parameters_optimizer_and_random_numbers",
        "are bit for bit the same": "TestUntouched::test_parameters_optimizer_and_random_numbers",
        "the rows are those of a controller with ``rule=Fixed(k)``": "test_equal_micro_batches",
        "a sharded model is refused": "test_is_refused_by_name_on_every_rank",
        "What cannot be measured is NaN in its row, and said once": (
            "test_what_cannot_be_measured_is_said_once test_the_first_clipping_after_none "
            "test_a_pass_that_failed_costs_its_window_only test_parts_of_one_gradient_are_no_micro_batches "
            "test_weights_for_some test_what_else_writes_to_gradients_is_said"
        ),
        "Gradients that were cleared without a step": "test_a_window_that_was_dropped_is_no_part_of_the_next",
    },
    "plan.rst": {
        "A run that cannot tell the gradient's length from zero": "test_refuses_a_run_without_evidence",
        "untouched to the last bit": "test_a_training_that_was_asked_in_between_is_the_one_that_was_not",
    },
    "questions.rst": {
        "only one window in two to four is measured": SETTLED,
        "Ranks only add cells to a window": "test_all_ranks_decide_alike_and_one_micro_batch_each_is_evidence",
        "(not LBFGS)": "test_an_optimizer_that_evaluates_the_loss_is_refused",
        "cannot tell the gradient's length from zero": UNBOUNDED,
        "the number would be worth nothing meanwhile": UNBOUNDED,
        "says nothing about noise": ONE_CELL,
        "recorded as ``nonfinite``, and forgotten": "test_an_overflowing_window_is_skipped_for_everything",
        "A shrink is taken only where": "test_shrink_lands_where_the_test_passes",
        "with the exact per-example covariance": TWINS,
        "others are refused by name": "test_layers_whose_examples_cannot_be_told_apart_are_refused",
        "nothing is decided, everything is measured": FIXED,
    },
    "rules.rst": {
        "as published it asks for no growth": (
            "test_the_published_one_asks_for_too_little_and_from_theta_1_for_nothing"
        ),
        "refused on several ranks": RANKS,
        "it never rests": "test_hovers_about_its_target_and_never_rests",
    },
    "schedules.rst": {
        "to the last bit": "test_after_every_window_it_is_the_plain_loop",
        "A skipped window counts": "test_beside_a_controller_the_schedule_ends_with_the_budget",
        "The default couples nothing": "TestCoupling::test_nothing_is_coupled_by_default",
    },
    "trainers.rst": {
        "steps on the exact mean": "test_lightning.py::test_parameters_are_those_of_true_large_batches",
    },
    "trust.rst": {
        "What a window that is not measured still has is exact": LISTENS_LESS,
        "the check for gradients that are not": "test_an_overflow_is_seen_and_skipped",
        "of its row are NaN (the pooled columns are not)": (
            f"{LISTENS_LESS} test_the_noise_of_layers_is_not_asked_of_a_window_nobody_listens_to"
        ),
        "is looked at in measured windows only": "test_windows_that_are_not_measured_take_no_norm_of_a_micro_batch",
        "is seen in ``tail_excess``": "test_an_exceedance_nobody_listened_to_is_one_all_the_same",
        "with the exact per-example covariance": TWINS,
    },
}

NO_PROMISES: dict[str, list[str]] = {
    "README.md": ["nothing here has run on a GPU yet", "| Why does", "| Only the measurement"],
    "batch.rst": ["Only measure", "whose error is as long"],
    "history.rst": ["the error is within θ", "watch on rank 0 only"],
    "meter.rst": ["A script that knows nothing of it"],
    "limits.rst": ["In pilots", "Nothing here has run on a GPU yet"],
    "questions.rst": ["Why is it NaN?", "How do I only watch"],
    "rules.rst": ["Adam feels bursts"],
    "schedules.rst": ["never reaches its end when the batch grows"],
    "studies.rst": [
        "a run of a rule counts only if",
        "of 96 networks only",
        "and its length alike",
        "**bursts** takes",
    ],
    "trust.rst": ["their rows are left out", "A short or a noisy run"],
}

# By the class or function and its method; a method of a base is the base's.
RAISES: dict[str, dict[str, str]] = {
    "AdaptiveAccumulation": {
        "under manual optimization": "test_what_else_decides_when_to_step_is_refused_by_name",
        "several optimizers": "test_several_optimizers_and_deepspeed_are_refused_by_name",
        "another callback": "test_a_second_callback_of_its_kind_is_refused_by_name",
    },
    "AdaptiveAccumulation.state_dict": {
        "Within a window of several ranks": "test_parts_of_a_loop_and_checkpoints",
        "between the backward pass that closes a window": "test_a_checkpoint_before_the_record_is_refused",
    },
    "AdaptiveAccumulationMixin": {
        "accumulation by the Trainer": "test_accumulation_by_the_trainer_is_refused",
        "``DataParallel`` or an optimizer that steps": "test_what_else_steps_or_splits_is_refused_by_name",
    },
    "AdaptiveAccumulationState.state": {"Within a window": "test_a_state_within_a_window_is_refused"},
    "AnyOf": {"fewer than two": "test_what_does_not_go_together_is_refused"},
    "BatchController": {
        "If nothing is trainable, ``population``": "test_construction_refuses_what_cannot_work",
        "``limits`` do not fit the rule": OF_A_RULE,
        "a layer has no ghost norms": "test_batch_norm_is_refused",
        "has not what ``metric``": "test_no_metric_without_a_second_moment",
        "``learning_rate`` needs": "test_an_optimizer_without_a_second_moment_is_refused",
        "steps with a closure": "test_an_optimizer_that_evaluates_the_loss_is_refused",
        "an argument is of another kind": (
            "test_another_kind_is_refused_at_once test_model_and_optimizer_have_an_order"
        ),
    },
    "SizedLoop.limits": {"those before stay": "TestLimits::test_wrong_ones_change_nothing"},
    "BatchController.step": {
        "If no step is due": "test_misuse_is_refused",
        "emptied or added to": "test_a_due_window_that_is_no_mean_any_more_is_refused",
    },
    "BatchController.record_step": {"If no step is due": "test_misuse_is_refused"},
    "BatchController.plan": {
        "hold no evidence": "test_a_controller_without_evidence_refuses",
        "an argument is out of range": "TestPlan::test_refuses_arguments",
    },
    "BatchController.layer_noise": {
        "If no step is due": "test_misuse_is_refused",
        "several micro-batches": "test_the_noise_of_single_layers_needs_one_micro_batch",
    },
    "BatchController.state_dict": {
        "After a failed backward pass": "test_a_failed_backward_can_be_discarded",
        "within a window of several ranks": "test_parts_of_a_loop_and_checkpoints",
        "in a due window with a ``scaler``": "test_refuses_to_save_a_due_window_with_a_scaler",
    },
    "BatchController.load_state_dict": {
        "a key is unknown or missing": (
            "test_refuses_a_state_that_is_not_its_own test_an_unknown_and_a_missing_key_are_refused_at_any_depth"
        ),
        "Nothing is changed then": "test_any_other_value_is_refused_by_its_place_or_trains",
        "of other parameters than those trained now": "test_refuses_a_window_of_another_model",
        "If a window is open": "test_refuses_to_load_within_a_window",
    },
    "CABS": {"not finite": OF_A_RULE},
    "CosineSimilarity": {"out of range": OF_A_RULE},
    "DiveBatch": {"not positive and finite": OF_A_RULE},
    "Fixed": {"a whole number": OF_A_RULE},
    "GhostProbe.attach": {
        "whose examples cannot be told apart": "test_layers_whose_examples_cannot_be_told_apart_are_refused",
        "that ``model`` does not have": "test_nothing_to_train_and_foreign_parameters_are_refused",
    },
    "GhostProbe.take_example_sq_norms": {
        "what its layers account for": "test_a_penalty_and_a_weight_never_called_are_refused"
    },
    "GhostProbe.layer_sq_norms": {"in the last micro-batch": "test_a_micro_batch_that_is_not_taken_is_forgotten"},
    "Goodput": {"out of range": OF_A_RULE},
    "Guard": {"out of range": OF_A_RULE},
    "History.watch": {
        "If ``logger`` is none": "test_what_is_no_logger_is_refused",
        "watching already": "test_nobody_watches_twice",
    },
    "History.to_parquet": {"pyarrow is not installed": "test_a_missing_package_is_named_with_its_extra"},
    "History.plot": {
        "matplotlib is not installed": "test_a_missing_package_is_named_with_its_extra",
        "no window yet": "test_no_window_is_refused",
    },
    "InnerProductTest": {"not positive and finite": OF_A_RULE},
    "LearningRate": {"out of range": "TestRefusals::test_an_argument_out_of_range"},
    "LearningRate.adjust": {"not positive and finite": "test_a_batch_that_is_none"},
    "Limits": {"out of range": OF_A_RULE},
    "Limits.resolve": {"holds no evidence of noise": OF_A_RULE},
    "NoiseMeter": {
        "If nothing is trainable": "TestWords::test_refuses_what_is_no_pair",
        "the model is sharded": "test_is_refused_by_name_on_every_rank",
        "an argument is out of range": "TestWords::test_refuses",
        "an argument is of another kind": "TestWords::test_refuses_what_is_no_pair",
    },
    "NoiseMeter.weight": {"of another kind": "TestWords::test_refuses_what_is_no_pair"},
    "NoiseScale": {"not positive and finite": OF_A_RULE},
    "NoiseTracker.update": {"must be left out, not averaged": "test_refuses_a_nonfinite_window"},
    "NormTest": {"not positive and finite": OF_A_RULE},
    "Pareto": {"not positive and finite": OF_A_RULE},
    "Plan.plot": {"matplotlib is not installed": "test_drawing_without_matplotlib_names_the_extra"},
    "ProgressLine": {
        "are not installed": "test_a_missing_package_names_the_extra",
        "``budget`` is not positive": "test_loggers.py::test_a_budget_out_of_range",
        "``package`` is another": "test_an_unknown_package",
    },
    "Ramp": {"given for another shape": OF_A_RULE},
    "RelativeStandardError": {"out of range": OF_A_RULE},
    "Replay": {"a whole number": OF_A_RULE},
    "Schedule": {"not increasing from 0": OF_A_RULE},
    "ScheduleDriver": {
        "not a torch scheduler": "test_a_wrapped_scheduler",
        "``ReduceLROnPlateau``": "test_a_scheduler_of_validations",
        "If ``unit`` or ``total_steps``": "test_a_unit_out_of_range test_a_total_out_of_range",
    },
    "ScheduleDriver.advance_to": {
        "negative or not finite": "test_examples_out_of_range",
        "further than that": "test_a_scheduler_that_someone_else_steps",
    },
    "ScheduleDriver.load_state_dict": {
        "unknown or missing": "test_a_missing_key_is_refused_by_name",
        "differs from this driver's": "test_a_state_that_does_not_fit_is_refused_by_name",
    },
    "Seesaw": {"there is no milestone": OF_A_RULE},
    "StandardError": {"not exactly one of": "test_a_wrong_argument_is_refused_by_name"},
    "TensorBoardLogger": {"tensorboard is not installed": "test_a_missing_package_names_the_extra"},
    "WindowLoop.grad_norm": {"If no step is due": "test_misuse_is_refused"},
    "WindowLoop.micro_batches": {
        "the controller is closed": "test_a_closed_controller_hears_saves_and_loads_nothing",
        "overwrote the one in hand": "test_and_refused_without_one",
        "a newer iteration": "test_two_iterations_at_once_are_refused",
    },
    "WindowLoop.loader_state_dict": {"with a ``state_dict()``": "test_a_loader_without_a_state_is_refused"},
    "WindowLoop.micro_batch": {"nested": "test_misuse_is_refused"},
    "WindowLoop.backward": {
        "``loss`` or ``weight`` is not": (
            "test_a_wrong_loss_is_refused test_a_wrong_weight_is_refused_and_loses_nothing"
        ),
        "If a step is due, the micro-batch had its backward, gradients are left": "test_misuse_is_refused",
        "does not hold the model's parameters": (
            "test_replaced_parameters_are_refused_while_the_optimizer_holds_the_old"
        ),
        "no gradient arrived": "test_a_loss_that_reaches_nothing_costs_no_good_micro_batch",
        "ranks disagree": "test_a_rank_with_other_limits_is_found",
        "or died": "test_a_rank_that_dies_is_named_within_the_timeout",
        "are incomplete": "test_a_failed_backward_can_be_discarded",
    },
    "WindowLoop.close_window": {
        "last backward pass failed": "test_a_failed_backward_can_be_discarded",
        "did not synchronise the ranks": "test_parts_of_a_loop_and_checkpoints",
        "gradients were changed": "test_a_window_cannot_be_closed",
    },
    "WindowLoop.withhold_nonfinite": {"If no step is due": "test_misuse_is_refused"},
    "controller_for": {
        "accumulates itself": "test_accumulation_of_its_own_is_refused",
        "DeepSpeed, Megatron-LM or XLA": "test_what_has_a_loop_of_its_own_is_refused",
    },
    "critical_batch": {
        "a function is none": "test_bad_input_costs_nothing",
        "nothing has been trained then": "test_bad_input_costs_nothing",
        "within a window": "test_an_open_window_is_refused",
        "ranks are several": "test_several_ranks_are_refused",
    },
    "integrated_noise": {"fewer than eight windows": "test_refuses_a_run_without_evidence"},
    "measured_seconds": {"cannot be told apart": "test_seconds_that_cannot_be_told_apart_are_refused"},
    "metric_scales": {"As :func:`second_moments`": "test_parameters_of_another_kind"},
    "plan": {
        "is no run": "test_refuses_what_is_no_run",
        "holds no evidence": "test_refuses_a_run_without_evidence",
        "out of range": "TestPlan::test_refuses_arguments",
    },
    "report": {
        "plotly is not installed": "test_a_missing_package_is_named_with_its_extra",
        "none of these": "test_wrong_arguments_are_named_and_nothing_is_written",
        "lacks a column": "test_wrong_arguments_are_named_and_nothing_is_written",
    },
    "required_batch": {"not positive": "test_required_batch_refuses"},
    "second_moments": {
        "of another kind": "test_no_metric_without_a_second_moment",
        "complex or none of its own": "test_parameters_of_another_kind",
    },
}


def sentences(text: str) -> Iterator[str]:
    """Its sentences and their halves, without programs, what is generated, and rows that name their test."""
    text = re.sub(r"^```.*?^```$|<!-- \w+: begin -->.*?<!-- \w+: end -->", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\.\. (?:code-block|literalinclude|figure|results)::.*?(?=^\S|\Z)", "", text, flags=re.M | re.S)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*\* |\|)|\n[=-]{3,}\n", text):
        if "\n     - ``test_" not in paragraph:
            yield from re.split(r"(?<=[.:;?!])\s+", " ".join(paragraph.split()))


def sounds_like_one(sentence: str) -> bool:
    return WORDS.search(STATISTIC.sub("", sentence)) is not None


@cache
def nodes() -> frozenset[str]:
    """Every test as ``file.py::Class::name``, in whatever folder the file is."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            prefix = f"{path.name}::{node.name}" if isinstance(node, ast.ClassDef) else path.name
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            found |= {f"{prefix}::{one.name}" for one in inner if isinstance(one, ast.FunctionDef)}
    return frozenset(found)


def require_tests(names: str) -> None:
    """Each names one test: by its own name, with its class or its file where that is not enough."""
    for name in names.split():
        parts = name.split("::")
        fits = [node for node in nodes() if set(parts) <= set(node.split("::")) and node.endswith(f"::{parts[-1]}")]
        assert len(fits) == 1, f"{name} is {fits or 'no test'}"


@pytest.mark.parametrize("page", PROMISES)
def test_every_promise_stands_and_has_its_tests(page):
    told = [" ".join(sentence.split()) for sentence in sentences(PAGES[page].read_text())]
    for fragment in (*PROMISES[page], *NO_PROMISES.get(page, ())):
        assert any(fragment in sentence for sentence in told), fragment
    for names in PROMISES[page].values():
        require_tests(names)


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_that_sounds_like_a_promise_is_left_out(page):
    known = (*PROMISES.get(page, ()), *NO_PROMISES.get(page, ()))
    missing = [
        sentence
        for sentence in sentences(PAGES[page].read_text())
        if sounds_like_one(sentence) and not any(fragment in sentence for fragment in known)
    ]
    assert not missing


# --- docstrings -------------------------------------------------------------------------------------------------------


@cache
def public() -> dict[str, str]:
    """Docstrings of what the reference shows, by ``Class.method`` or ``function``."""
    pages = "\n".join(path.read_text() for path in SOURCE.glob("*.rst"))
    # A controller is shown with what it inherits.
    names = {
        *re.findall(r"^\.\. auto(?:class|function):: [\w.]*\.(\w+)", pages, re.MULTILINE),
        "WindowLoop",
        "SizedLoop",
    }
    whole = set(re.findall(r"^\.\. automodule:: ([\w.]+)$(?!\n   :no-members:)", pages, re.MULTILINE))
    found = {}
    for path in (ROOT / "adaptbatch").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and (node.name in names or module in whole):
                inner = node.body if isinstance(node, ast.ClassDef) else []
                methods = [one for one in inner if isinstance(one, ast.FunctionDef) and one.name[0] != "_"]
                # A property's setter has none of its own.
                found |= {f"{node.name}.{one.name}": text for one in methods if (text := ast.get_docstring(one))}
                found[node.name] = ast.get_docstring(node) or ""
    return found


def raised(docstring: str) -> list[str]:
    """A text for each kind of error under ``Raises``."""
    section = re.search(r"^Raises:\n((?:    .*\n?)*)", docstring, re.MULTILINE)
    return [" ".join(one.split()) for one in re.split(r"^    (?=\w)", section[1], flags=re.M)[1:]] if section else []


@pytest.mark.parametrize("name", RAISES)
def test_every_error_that_is_announced_has_its_tests(name):
    texts = raised(public()[name])
    for fragment, tests in RAISES[name].items():
        assert any(fragment in text for text in texts), fragment
        require_tests(tests)
    assert all(any(fragment in text for fragment in RAISES[name]) for text in texts)


def test_no_error_that_is_announced_is_left_out():
    assert {name for name, docstring in public().items() if raised(docstring)} == set(RAISES)
