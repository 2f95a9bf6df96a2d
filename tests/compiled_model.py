"""Functions of the model that tests call on arrays, each compiled as one program.

JAX compiles every single operation that it runs outside a program, for every shape, and most of the suite's time is compilation.
"""

import contextlib
import functools

import jax

from moejax.model import instances, metrics, mixture

make_params = jax.jit(mixture.make_params)
regauge = jax.jit(mixture.regauge)
permute_experts = jax.jit(mixture.permute_experts)
sample = jax.jit(mixture.sample, static_argnames=("activation", "num_samples"))
sample_labels = jax.jit(mixture.sample_labels, static_argnames="activation")
log_likelihood = jax.jit(mixture.log_likelihood, static_argnames="activation")
log_likelihood_per_sample = jax.jit(mixture.log_likelihood_per_sample, static_argnames="activation")
responsibilities = jax.jit(mixture.responsibilities, static_argnames="activation")
predict = jax.jit(mixture.predict, static_argnames="activation")
random_params = jax.jit(instances.random_params, static_argnames="dim")
align = jax.jit(metrics.align, static_argnames="even")
match_experts = jax.jit(metrics.match_experts, static_argnames="even")
recovery_error = jax.jit(metrics.recovery_error, static_argnames="even")
gating_error = jax.jit(metrics.gating_error)


def results_on_the_host(program):
    """The program with results as NumPy arrays, which a test may index and add without compiling anything."""

    @functools.wraps(program)
    def called(*arguments, **options):
        return jax.device_get(program(*arguments, **options))

    return called


@contextlib.contextmanager
def compilations():
    """Counts the programs that XLA is asked for."""
    events = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
