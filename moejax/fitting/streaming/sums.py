"""Sums over the rows of a partition, made by compiled programs batch by batch and added in double precision on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.fitting.data_units import DataUnits
from moejax.fitting.family_labels import require_support
from moejax.fitting.streaming.source import Batch, Source, batch_size
from moejax.likelihood.blocks import sample_blocks
from moejax.likelihood.derivatives import Curvature, likelihood_curvature
from moejax.likelihood.information import score_outer_products
from moejax.likelihood.sharding import placement_of_rows, sum_over_devices
from moejax.model.activations import ActivationLike
from moejax.model.families import FamilyLike, channel_of
from moejax.model.family import Family
from moejax.model.mixture import HostParams, NoiseModel

_ONE_AT_A_TIME = threading.Lock()
"""Two programs that both run on several devices, started at once, could wait for each other."""


class Sums(NamedTuple):
    """Sums over rows at one point, in the units of the fit, without the ridge."""

    curvature: Curvature
    """The log-likelihood and its derivatives."""
    score_products: Any
    """(P, P) sum of w^2 s s' of the scores s; None if it is not asked for."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The static choices of a program that sums over a batch."""

    activation: ActivationLike
    """By its name where it has one, so that another process finds the same function."""
    noise: NoiseModel
    fit_intercept: bool
    averaged: bool
    """The derivatives of g are averaged over a width."""
    score_products: bool
    family: FamilyLike = "gaussian"
    """By its name, as the activation."""


def _sums_of(wanted: Wanted, shared: Any, x: jax.Array, y: jax.Array, weights: jax.Array) -> Sums:
    params, width = shared
    fn = channel_of(wanted.family, wanted.activation)
    with jax.default_matmul_precision("highest"):
        blocks = sample_blocks(x, y, weights, fit_intercept=wanted.fit_intercept)
        curvature = likelihood_curvature(
            params,
            blocks,
            fn=fn,
            noise=wanted.noise,
            fit_intercept=wanted.fit_intercept,
            width=width if wanted.averaged else None,
        )
        if not wanted.score_products:
            return Sums(curvature, None)
        products = score_outer_products(
            params, x, y, weights**2, fn, noise=wanted.noise, fit_intercept=wanted.fit_intercept
        )
        return Sums(curvature, products)


@functools.lru_cache(maxsize=32)
def batch_program(wanted: Wanted, devices: tuple[Any, ...]) -> Callable[..., Sums]:
    """The program ((params, width), x, y, weights) -> `Sums` of a batch, whose rows lie on these devices in equal parts."""
    return sum_over_devices(functools.partial(_sums_of, wanted), devices)


@dataclasses.dataclass(frozen=True, eq=False)
class LikelihoodTask:
    """The sums of one partition, and the sum of two.

    Args:
        units: the maps to the units of the fit.
        weight_factor: a weight of the fit over the user's.
        params: the point, in the units of the fit.
        width: half-width over which the derivatives of g are averaged.
        wanted: what is summed.
        precision: of the programs, "float32" or "float64"; the sums of the batches are added in double precision.
    """

    units: DataUnits
    weight_factor: float
    params: HostParams
    width: float
    wanted: Wanted
    precision: str

    def __call__(
        self, source: Source, index: int, partition: Any, on_rows: Callable[[int], None]
    ) -> Sums | None:
        """The sums of a partition; None if it has no row."""
        devices = tuple(jax.local_devices())
        rows_at_once = batch_size(len(source.input_names), len(devices))
        total = None
        for batch in source.batches(partition, rows_at_once):
            if len(batch.y):
                total = self.merge(total, self._of_batch(batch, rows_at_once, devices))
            on_rows(len(batch.y) + batch.skipped)
        return total

    def _of_batch(self, batch: Batch, rows_at_once: int, devices: tuple[Any, ...]) -> Sums:
        inputs, labels = self.units
        channel = channel_of(self.wanted.family, self.wanted.activation)
        if isinstance(channel, Family):
            require_support(batch.y, batch.weights, channel, varied=False)
        z = inputs(batch.x)
        more = rows_at_once - len(z)
        with jax.enable_x64(self.precision == "float64"):
            dtype = np.dtype(self.precision)
            arrays = [
                np.pad(np.asarray(a, dtype), [(0, more)] + [(0, 0)] * (a.ndim - 1))
                for a in (z, labels(batch.y), batch.weights * self.weight_factor)
            ]
            shared = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), (self.params, self.width))
            one_at_a_time = _ONE_AT_A_TIME if len(devices) > 1 else contextlib.nullcontext()
            with one_at_a_time:
                placed = jax.device_put(arrays, placement_of_rows(devices))
                sums = batch_program(self.wanted, devices)(shared, *placed)
                return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), sums)

    def merge(self, first: Sums | None, second: Sums | None) -> Sums | None:
        """The sums over the rows of both."""
        if first is None or second is None:
            return second if first is None else first
        return jax.tree.map(np.add, first, second)
