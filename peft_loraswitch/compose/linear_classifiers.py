"""Linear classifiers without an offset, which is what a router is: rows from the moments of the inputs. All in float64.

A classifier wants `w_e x + c_e` for class e, and a router has no c_e. On inputs whose mean m is not zero there is something
that comes near to a constant: of all linear functions, u x with u = S^-1 m (S the second moment of the inputs) is the best
approximation of 1, so that the rows are `w_e + c_e u`. Inputs behind a norm layer have such a mean, because a few features
are large in all of them; and the mean of many tokens' inputs is nearer to m than each is. Where m is zero, u is zero, and the
offsets are lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-280  # instead of a zero that is divided by


@dataclass
class Moments:
    """Sums over inputs x [d] and, if there are some, over values t [E] that belong to each.

    Attributes:
        count: number of inputs.
        x, xx: sums of x and of x x^T.
        t, tt, xt: sums of t, of t t^T and of x t^T.
    """

    count: int
    x: Tensor
    xx: Tensor
    t: Tensor
    tt: Tensor
    xt: Tensor

    @classmethod
    def of(cls, x: Tensor, t: Tensor | None = None) -> Moments:
        """Of inputs x [n, d] and values t [n, E], float64."""
        t = x.new_zeros(len(x), 0) if t is None else t
        return cls(len(x), x.sum(0), x.T @ x, t.sum(0), t.T @ t, x.T @ t)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def mean(self) -> Tensor:
        return self.x / self.count

    @property
    def covariance(self) -> Tensor:
        return self.xx / self.count - torch.outer(self.mean, self.mean)


def discriminant_rows(means: Tensor, within: Tensor, ridge: float) -> Tensor:
    """Rows [C, d] whose logits are those of the linear discriminant (Fisher 1936): classes of normal distribution with these
    means, one covariance, and equal frequency. Logit 0 is that of the mean of all means.

    Args:
        means: [C, d]; within: [d, d], the covariance within the classes.
        ridge: above 0; share of the covariance that is replaced by a multiple of the identity of equal trace. 1: the nearest
            mean wins.
    """
    centre = means.mean(0)
    off_centre = means - centre
    within = _ridged(within, ridge)
    rows = _solve(within, off_centre.T).T
    offsets = -((means + centre) * rows).sum(1) / 2
    second = within + off_centre.T @ off_centre / len(means) + torch.outer(centre, centre)
    return rows + torch.outer(offsets, _solve(second, centre[:, None])[:, 0])


def logistic_rows(start: Tensor, inputs: Tensor, classes: Tensor, within: Tensor, ridge: float) -> Tensor:
    """Rows [C, d], float32, that tell the classes of these very inputs apart best: multinomial logistic regression by L-BFGS.

    Minimised is the cross-entropy, each class counting alike however many inputs it has, plus `ridge / 2` times the variance of
    the rows' logits within the classes, summed, which keeps few inputs from being learned by heart.

    Args:
        start: [C, d], where to begin.
        inputs: float32 [n, d]; classes: int64 [n].
        within: [d, d], the covariance of inputs within the classes.
    """
    rows = start.float().clone().requires_grad_()
    within = within.to(rows.device, torch.float32)
    counts = torch.bincount(classes, minlength=len(start)).clamp(min=1)
    shares = (1.0 / (len(start) * counts.float()))[classes]
    optimizer = torch.optim.LBFGS([rows], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = torch.nn.functional.cross_entropy(inputs @ rows.T, classes, reduction="none")
        value = (entropy * shares).sum() + ridge / 2 * ((rows @ within) * rows).sum()
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(loss)
    return rows.detach()


def regression_rows(moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """Rows [E, d] whose logits follow the values t as well as linear functions can, and how well: squared correlations [E].

    Of each t, what all have in common is left out, and its mean and size do not count: over the inputs, the logits of every row
    have mean 0 and standard deviation 1.
    """
    mean, covariance = moments.mean, moments.covariance
    of_t = moments.t / moments.count
    spread = (moments.tt / moments.count - torch.outer(of_t, of_t)).diagonal().clamp(min=TINY).sqrt()
    # t in units of its spread, and then without the mean of all
    eye = torch.eye(len(spread), dtype=mean.dtype, device=mean.device)
    mix = (eye - 1 / len(spread)) / spread[:, None]
    cross = (moments.xt / moments.count - torch.outer(mean, of_t)) @ mix
    wanted = (mix.T @ (moments.tt / moments.count - torch.outer(of_t, of_t)) @ mix).diagonal()
    both = _solve(_ridged(covariance, ridge), torch.cat([cross, mean[:, None]], 1))
    rows, towards_mean = both[:, :-1], both[:, -1]
    rows = (rows - torch.outer(towards_mean, mean @ rows / (mean @ towards_mean).clamp(min=TINY))).T
    rows = rows / ((rows @ covariance) * rows).sum(1).clamp(min=TINY).sqrt()[:, None]
    # What is left of equal values is rounding, as large as that of what was subtracted, and follows anything.
    size = ((moments.tt / moments.count).diagonal() / spread.square()).max()
    told_apart = wanted > 1000 * torch.finfo(wanted.dtype).eps * size
    shares = (rows * cross.T).sum(1).square() / wanted.clamp(min=TINY)
    return rows, shares.where(told_apart, 0.0)


def _ridged(covariance: Tensor, ridge: float) -> Tensor:
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return (1 - ridge) * covariance + ridge * covariance.trace() / len(covariance) * eye


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right, of a symmetric positive definite one."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
