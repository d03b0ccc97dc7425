"""Losses against their definitions, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.training.classification.losses import (
    classification_loss,
    cross_entropy,
    label_smoothing_cross_entropy,
    smooth_labels,
    soft_target_cross_entropy,
)
from tests.support import assert_close, x64


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def problem(rng):
    size, classes = int(rng.integers(2, 9)), int(rng.integers(2, 12))
    return rng.normal(size=(size, classes)) * 3, rng.integers(0, classes, size)


def test_cross_entropy_is_the_mean_negative_log_likelihood(problem):
    logits, labels = problem
    expected = -log_softmax(logits)[np.arange(len(labels)), labels].mean()
    with x64():
        assert_close(cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), expected, 1e-12)


def test_smoothing_mixes_in_the_mean_over_all_classes(problem, rng):
    logits, labels = problem
    smoothing = float(rng.uniform(0.05, 0.6))
    likelihood = log_softmax(logits)
    own = likelihood[np.arange(len(labels)), labels]
    expected = -((1 - smoothing) * own + smoothing * likelihood.mean(-1)).mean()
    with x64():
        loss = label_smoothing_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        assert_close(loss, expected, 1e-12)


def test_soft_targets_are_used_as_given(problem, rng):
    logits, _ = problem
    targets = rng.uniform(size=logits.shape)  # rows that do not sum to one
    expected = -(targets * log_softmax(logits)).sum(-1).mean()
    with x64():
        loss = soft_target_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
        assert_close(loss, expected, 1e-12)


def test_gradient_is_softmax_minus_target(problem):
    logits, labels = problem
    targets = np.eye(logits.shape[1])[labels]
    expected = (np.exp(log_softmax(logits)) - targets) / len(labels)
    with x64():
        grad = jax.grad(cross_entropy)(jnp.asarray(logits), jnp.asarray(labels))
        assert_close(grad, expected, 1e-12)


def test_half_precision_logits_are_reduced_in_float32(problem):
    logits, labels = problem
    low = jnp.asarray(logits, jnp.bfloat16)
    loss = cross_entropy(low, jnp.asarray(labels))
    assert loss.dtype == jnp.float32
    expected = -log_softmax(np.asarray(low, np.float64))[np.arange(len(labels)), labels].mean()
    assert_close(loss, expected, 1e-6)


def test_the_loss_takes_labels_or_soft_targets(problem):
    logits, labels = (jnp.asarray(x) for x in problem)
    soft = smooth_labels(labels, logits.shape[1], 0.3)
    np.testing.assert_allclose(soft.sum(-1), 1.0, rtol=1e-6)
    smoothed = classification_loss(logits, labels, label_smoothing=0.3)
    np.testing.assert_allclose(classification_loss(logits, soft), smoothed, rtol=1e-5)
    plain = classification_loss(logits, labels)
    np.testing.assert_allclose(plain, cross_entropy(logits, labels), rtol=1e-6)
    assert abs(float(plain) - float(smoothed)) > 1e-4
