"""One trial of a recovery study as one compiled program; the only part of the numeric core that a sweep uses."""

from moejax.sweep.trial.measures import METRICS, NUM_HELD_OUT, metric_names, recovery_metrics
from moejax.sweep.trial.prepare import (
    SMALLEST_PADDED,
    Hyperparameters,
    TrialSpec,
    prepare,
    static_spec,
    trial_memory_bytes,
)
from moejax.sweep.trial.settings import AlgorithmSettings, DataSettings, check_settings
from moejax.sweep.trial.trial import (
    SAMPLING_BLOCK,
    STATUS_REASONS,
    TrialData,
    TrialResult,
    draw_trial,
    measured,
    posed,
    run_trial,
    run_trials,
)

__all__ = [
    "METRICS",
    "NUM_HELD_OUT",
    "SAMPLING_BLOCK",
    "SMALLEST_PADDED",
    "STATUS_REASONS",
    "AlgorithmSettings",
    "DataSettings",
    "Hyperparameters",
    "TrialData",
    "TrialResult",
    "TrialSpec",
    "check_settings",
    "draw_trial",
    "measured",
    "metric_names",
    "posed",
    "prepare",
    "recovery_metrics",
    "run_trial",
    "run_trials",
    "static_spec",
    "trial_memory_bytes",
]
