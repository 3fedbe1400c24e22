import json
import re
from dataclasses import dataclass
from math import ceil

import pytest
import torch
from torch.nn import functional as F

from tests.tfmq.oracle import described, each, read, regularizer, said, tensors
from tfmq.numerics.affine import Grid, fake_quantize
from tfmq.numerics.rounding import AdaRound, annealed_beta, initial_alpha, rectified_sigmoid
from tfmq.passes.reconstruction import reconstruction_loss

CASE = "03_adaround"
GRIDS = {"affine": Grid.unsigned, "sym": Grid.signed}
SETTING = r"(?P<w>\w+)\.b(?P<bits>\d+)\.(?P<grid>affine|sym)"


def ada_round(match):
    values = tensors(CASE)
    prefix = f"{match['w']}.b{match['bits']}.{match['grid']}"
    grid = GRIDS[match["grid"]](int(match["bits"]))
    return AdaRound(values[match["w"]], values[f"{prefix}.delta"], values[f"{prefix}.zero_point"], grid), prefix


def hard(rounding):
    return (rounding.codes() - rounding.zero_point) * rounding.scale


def assert_weights_close(weight, expected, scale):
    """Codes equal; soft codes to 1e-5 of a step."""
    assert ((weight - expected).abs() <= 1e-5 * scale + 1e-6 * expected.abs()).all()


@each(CASE, SETTING + r"\.tfmq\.alpha_init")
def test_start_equals_the_published_one(match):
    values = tensors(CASE)
    rounding, prefix = ada_round(match)
    torch.testing.assert_close(rounding.alpha.detach(), values[match[0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(initial_alpha(values[match["w"]], rounding.scale), rounding.alpha.detach())
    with torch.no_grad():
        soft = rounding()
    torch.testing.assert_close(rounding.h, values[f"{prefix}.tfmq.soft_init"], rtol=1e-5, atol=1e-6)
    assert_weights_close(soft, values[f"{prefix}.tfmq.w_soft_init"], rounding.scale)
    assert_weights_close(hard(rounding), values[f"{prefix}.tfmq.w_hard_init"], rounding.scale)
    nearest = fake_quantize(values[match["w"]], rounding.scale, rounding.zero_point, rounding.grid)
    assert_weights_close(nearest, values[f"{prefix}.tfmq.w_nearest"], rounding.scale)


@each(CASE, SETTING + r"\.tfmq\.w_hard_given")
def test_given_alphas_round_as_published(match):
    """The first alphas are 0, -0 and just above: all round up."""
    values = tensors(CASE)
    rounding, prefix = ada_round(match)
    rounding.alpha.data = values[f"{match['w']}.given_alpha"].clone()
    with torch.no_grad():
        soft = rounding()
    torch.testing.assert_close(rounding.h, values[f"{prefix}.tfmq.soft_given"], rtol=1e-5, atol=1e-7)
    assert_weights_close(soft, values[f"{prefix}.tfmq.w_soft_given"], rounding.scale)
    assert_weights_close(hard(rounding), values[match[0]], rounding.scale)


def test_soft_rounding_starts_at_the_weight_inside_the_grid():
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    rounding = AdaRound(weight, torch.tensor(0.3), torch.tensor(100.0), Grid.unsigned(8))
    torch.testing.assert_close(rounding().detach(), weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(hard(rounding), fake_quantize(weight, rounding.scale, rounding.zero_point, rounding.grid))


# -- loss -------------------------------------------------------------------------------------------------------------


@each(CASE, r"rec\.(?P<shape>\w+)\.p(?P<norm>[\d.]+)\.loss")
def test_reconstruction_loss_equals_the_published_one(match):
    values = tensors(CASE)
    prediction, target = values[f"rec.{match['shape']}.pred"], values[f"rec.{match['shape']}.target"]
    loss = reconstruction_loss(prediction, target, float(match["norm"]))
    torch.testing.assert_close(loss, values[match[0]], rtol=1e-5, atol=0)


@dataclass(frozen=True)
class Recorded:
    """The setting of the recorded loss terms: beta falls from ``start`` to ``end``."""

    norm: float
    weight: float
    iterations: int
    warmup: float
    start: float
    end: float

    @classmethod
    def read(cls):
        text = said(CASE, "layer.tfmq.round")
        iterations, warmup = read(text, "total # iterations, warm-up fraction #")
        ends = read(text, r"from # at k = \d+ to # at k")
        return cls(*read(text, "p=#"), *read(text, r"plus # \* sum over weights"), int(iterations), warmup, *ends)

    def beta(self, iteration):
        return annealed_beta(iteration, self.iterations, self.warmup, self.start, self.end)


@each(CASE, r"schedule\.curve")
def test_schedule_equals_the_published_one(match):
    """The raw curve is recorded; our None stands for its flat start, where the loss ignores it."""
    recorded, curve = Recorded.read(), tensors(CASE)[match[0]]
    found = [recorded.beta(k) for k in range(len(curve))]
    assert [k for k, beta in enumerate(found) if beta is None] == list(
        range(ceil(recorded.warmup * recorded.iterations))
    )
    found = torch.tensor([recorded.start if beta is None else beta for beta in found])
    torch.testing.assert_close(found, curve, rtol=1e-6, atol=0)


def predict(weight):
    """The recorded convolution's output with another weight."""
    values = tensors(CASE)
    x, target = values["layer.x"], values["layer.target"]
    sides = zip(target.shape[2:], x.shape[2:], weight.shape[2:], strict=True)
    padding = [(after - before + kernel - 1) // 2 for after, before, kernel in sides]
    return F.conv2d(x, weight, values["layer.bias"], padding=padding)


def layer_loss():
    """AdaRound of the recorded convolution at the given alphas, and a function that gives its two loss terms."""
    values, recorded = tensors(CASE), Recorded.read()
    (bits,) = read(said(CASE, "layer.delta"), "# bits")
    rounding = AdaRound(values["conv_w"], values["layer.delta"], values["layer.zero_point"], Grid.unsigned(int(bits)))
    rounding.alpha.data = values["conv_w.given_alpha"].clone()

    def terms(iteration):
        beta = recorded.beta(iteration)
        penalty = torch.zeros(()) if beta is None else recorded.weight * regularizer(rounding.h, beta)
        return reconstruction_loss(predict(rounding()), values["layer.target"], recorded.norm), penalty

    return rounding, terms


def test_loss_terms_of_a_layer_equal_the_published_ones():
    values = tensors(CASE)
    _, terms = layer_loss()
    iterations = values["schedule.k"].int().tolist()
    betas = torch.tensor([Recorded.read().beta(k) or 0.0 for k in iterations])
    torch.testing.assert_close(betas, values["layer.tfmq.b"], rtol=1e-6, atol=0)
    found = [terms(k) for k in iterations]
    reconstruction, penalty = (torch.stack(column).detach() for column in zip(*found, strict=True))
    torch.testing.assert_close(reconstruction, values["layer.tfmq.rec"], rtol=1e-5, atol=0)
    torch.testing.assert_close(penalty, values["layer.tfmq.round"], rtol=1e-5, atol=0)
    torch.testing.assert_close(reconstruction + penalty, values["layer.tfmq.total"], rtol=1e-5, atol=0)


@each(CASE, r"layer\.tfmq\.grad_alpha")
def test_gradients_of_the_total_loss_equal_the_published_ones(match):
    """At the iterations that its meaning lists."""
    recorded, gradients = Recorded.read(), tensors(CASE)[match[0]]
    iterations = json.loads(re.search(r"k = (\[.*?\])", said(CASE, match[0]))[1])
    for iteration, expected in zip(iterations, gradients, strict=True):
        rounding, terms = layer_loss()
        terms(iteration)[0].backward()
        beta = recorded.beta(iteration)
        if beta is not None:
            rounding.add_penalty_gradient(recorded.weight, beta)
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(rounding.alpha.grad, expected, rtol=1e-4, atol=atol)
        assert torch.equal(rounding.alpha.grad == 0, expected == 0)


@each(CASE, r"layer\.tfmq\.activation_stage_total")
def test_activation_stage_loss_equals_the_published_one(match):
    values = tensors(CASE)
    rounding, _ = layer_loss()
    (norm,) = read(said(CASE, match[0]), "p=#")
    loss = reconstruction_loss(predict(rounding().detach()), values["layer.target"], norm)
    torch.testing.assert_close(loss, values[match[0]], rtol=1e-5, atol=0)


def shares(project):
    """How a project's code weights each layer of the recorded block, by name; none is for layers that it leaves out.

    TFMQ-DM weights the halves of a split layer by their input channels and leaves out embedding projections and layers
    that are not reconstructed; Q-Diffusion leaves out the second half alone.
    """
    alphas = {name: values for name, values in tensors(CASE).items() if name.startswith("block.alpha.")}
    found = {}
    for name, alpha in alphas.items():
        meaning = described(CASE)["tensors"][name]["meaning"]
        second = "SECOND" in meaning
        share = 1.0
        if project == "tfmq" and ("embedding" in meaning or "not reconstructed" in meaning):
            share = 0.0
        elif project == "tfmq" and (second or "FIRST" in meaning):
            first = name.removesuffix("1") if second else name
            share = alpha.shape[1] / (alphas[first].shape[1] + alphas[f"{first}1"].shape[1])
        elif second:
            share = 0.0
        found[name] = share
    return found


@each(CASE, r"block\.(?P<project>tfmq|qdiff)\.round")
def test_rounding_term_of_a_block_equals_the_published_one(match):
    """The published weights of a block's layers, over ``regularizer`` of each."""
    values, recorded, prefix = tensors(CASE), Recorded.read(), match[0].removesuffix("round")
    reconstruction = reconstruction_loss(values["block.pred"], values["block.target"], recorded.norm)
    for row, iteration in enumerate(values["schedule.k"].int().tolist()):
        beta = recorded.beta(iteration)
        penalty = torch.zeros(())
        if beta is not None:
            for name, share in shares(match["project"]).items():
                penalty = penalty + share * regularizer(rectified_sigmoid(values[name]), beta)
        penalty = recorded.weight * penalty
        assert (beta or 0.0) == pytest.approx(values[f"{prefix}b"][row].item(), rel=1e-6)
        torch.testing.assert_close(reconstruction, values[f"{prefix}rec"][row], rtol=1e-5, atol=0)
        torch.testing.assert_close(penalty, values[match[0]][row], rtol=1e-5, atol=0)
        torch.testing.assert_close(reconstruction + penalty, values[f"{prefix}total"][row], rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_gradients_equal_those_of_autograd(beta):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 20, generator=generator)
    scale, zero_point, grid = torch.full((6, 1), 0.2), torch.full((6, 1), 5.0), Grid.unsigned(4)
    rounding = AdaRound(weight, scale, zero_point, grid)
    rounding.alpha.data = 4 * torch.randn(6, 20, generator=generator)
    alpha = rounding.alpha.detach().clone().requires_grad_()
    h = rectified_sigmoid(alpha)
    expected = (torch.clamp(torch.floor(weight / scale) + zero_point + h, *grid) - zero_point) * scale
    target = torch.randn(6, 20, generator=generator)
    (((expected - target) ** 2).sum() + 0.3 * regularizer(h, beta)).backward()
    found = rounding()
    torch.testing.assert_close(found, expected)
    ((found - target) ** 2).sum().backward()
    rounding.add_penalty_gradient(0.3, beta)
    torch.testing.assert_close(rounding.alpha.grad, alpha.grad, rtol=1e-4, atol=1e-5)
    assert (alpha.grad == 0).any() and (alpha.grad != 0).any()


@pytest.mark.parametrize(
    ("iteration", "iterations", "warmup", "expected"),
    [
        (1, 10, 0.2, None),
        (2, 10, 0.2, 20.0),
        (10, 10, 0.2, 2.0),
        (11, 10, 0.2, 2.0),
        (6, 10, 0.2, 11.0),
        (1, 5, 0.0, 16.4),
        (5, 5, 1.0, 2.0),
    ],
)
def test_schedule_ends(iteration, iterations, warmup, expected):
    beta = annealed_beta(iteration, iterations, warmup)
    assert beta is None if expected is None else beta == pytest.approx(expected)
