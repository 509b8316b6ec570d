"""The arithmetic of a step of IVON, and checks of its numbers."""

import math

from keras import ops

from keras_spectral._internal.checks import check_number

HESSIANS = ("price", "gradsq")


def ivon_curvature(gradient, noise, options):
    """One sample of f; its mean over the samples of a step counts."""
    if options.hess_approx == "gradsq":
        return ops.square(gradient)
    return noise * gradient


def ivon_update(gradient, curvature, mean, momentum, hessian, bias, options):
    """New momentum, new h and the step before the learning rate."""
    b1, b2 = options.beta_1, options.beta_2
    decay = options.prior_precision
    momentum = b1 * momentum + (1 - b1) * gradient
    estimate = options.ess * curvature
    if options.hess_approx == "price":
        estimate = (hessian + decay) * estimate
    correction = ops.square(hessian - estimate) / (2 * (hessian + decay))
    hessian = b2 * hessian + (1 - b2) * estimate + (1 - b2) ** 2 * correction
    move = (momentum / bias + decay * mean) / (hessian + decay)
    if options.clip_radius < math.inf:
        move = ops.clip(move, -options.clip_radius, options.clip_radius)
    return momentum, hessian, move


def check_rate(given):
    """A learning rate that Keras takes: a float, or what makes one."""
    if callable(given) or isinstance(given, dict):
        return given
    check_number(given, "learning_rate", 0)
    return float(given)


def check_positive(value, name):
    check_number(value, name, 0)
    if not value:
        raise ValueError(f"Received {name}=0. Expected a number above 0.")
