"""Every optimizer's name gives the steps that it says: against torch's plain loops, and Prodigy against its formulas."""

import argparse
import functools
import math

import pytest
import torch

import train_cogvideox_lora as script

SHAPES = [(64, 100), (4096, 3), (8, 16)]  # bitsandbytes keeps the states of the last one, below 4096 numbers, in fp32
STEPS = 12


def flags(**changed):
    """The trainer's flags with changes; the decay is large enough to be seen, and to tell Adam from AdamW."""
    args = script.build_parser().parse_args(["--pretrained_model_name_or_path", "none"])
    return argparse.Namespace(**vars(args) | {"adam_weight_decay": 0.1} | changed)


def start(dtype=torch.float32):
    """Parameters of several shapes, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(parameters, number):
    """The gradients of a bowl around 1 that is a hundred times as steep in some directions, with noise, at a step."""
    generator = torch.Generator().manual_seed(1000 + number)
    return [
        torch.linspace(0.1, 10, p.numel()).view_as(p) * (p.detach() - 1) + 0.1 * torch.randn(p.shape, generator=generator)
        for p in parameters
    ]


def walk(make, dtype=torch.float32):
    """How far `make(parameters)`'s optimizer moved each of all numbers in a few steps."""
    parameters = start(dtype)
    optimizer = make(parameters)
    for number in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(parameters, number), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return torch.cat([(after - before).detach().flatten() for before, after in zip(start(dtype), parameters, strict=True)])


def walk_of(learning_rate, dtype=torch.float32, **changed):
    """As `walk`, of the trainer's optimizer with these flags."""
    args = flags(**changed)
    return walk(lambda parameters: script.make_optimizer(args, parameters, learning_rate), dtype)


def difference(ours, plain):
    """The size of the difference of two walks, as a share of the plain one."""
    return ((ours - plain).norm() / plain.norm()).item()


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
@pytest.mark.parametrize("foreach", [False, True])
def test_adam_walks_as_the_plain_loop_does(name, kind, foreach):
    args = flags(optimizer=name)
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    plain = walk(lambda parameters: kind(parameters, lr=1e-2, foreach=foreach, **settings))
    assert difference(walk_of(1e-2, optimizer=name), plain) < 1e-5
    for learning_rate, changed in (
        (1.1e-2, {}),
        (1e-2, {"adam_beta2": 0.9}),
        (1e-2, {"adam_weight_decay": 0.0}),
        (1e-2, {"adam_beta1": 0.8}),
    ):
        assert difference(walk_of(learning_rate, optimizer=name, **changed), plain) > 3e-4
    assert difference(walk_of(1e-2, optimizer={"adamw": "adam", "adam": "adamw"}[name]), plain) > 3e-4


@pytest.mark.parametrize("name", ["adamw8bit", "adam8bit"])
def test_states_of_8_bits_walk_as_those_of_32_do_but_for_their_rounding(name):
    """bitsandbytes decays the weights directly under both names: its Adam is AdamW."""
    pytest.importorskip("bitsandbytes")
    plain, fewer = walk_of(1e-2, optimizer="adamw"), walk_of(1e-2, optimizer=name)
    assert 1e-4 < difference(fewer, plain) < 0.03
    assert difference(walk_of(1.1e-2, optimizer=name), plain) > 0.06
    assert difference(walk_of(1e-2, optimizer="adam"), plain) > 0.06
    small = math.prod(SHAPES[-1])
    assert difference(fewer[-small:], plain[-small:]) < 1e-5


class PlainProdigy:
    """Prodigy (Mishchenko & Defazio, 2023, algorithm 4, with a decoupled decay) over all numbers at once, in float64."""

    def __init__(self, parameters, args, learning_rate):
        self.parameters, self.args, self.learning_rate = parameters, args, learning_rate
        self.first = self.numbers()
        self.mean = self.square = self.sum = torch.zeros_like(self.first)
        self.estimate = self.best = self.smallest = 1e-6
        self.numerator, self.count = 0.0, 0

    def numbers(self):
        return torch.cat([p.detach().double().flatten() for p in self.parameters])

    def step(self):
        args, size, now = self.args, self.estimate, self.numbers()
        gradient = torch.cat([p.grad.double().flatten() for p in self.parameters])
        beta1, beta2, beta3 = args.adam_beta1, args.adam_beta2, args.prodigy_beta3 or math.sqrt(args.adam_beta2)
        self.count += 1
        correction = math.sqrt(1 - beta2**self.count) / (1 - beta1**self.count) if args.prodigy_use_bias_correction else 1
        rate = size * self.learning_rate * correction
        self.mean = beta1 * self.mean + (1 - beta1) * size * gradient
        self.square = beta2 * self.square + (1 - beta2) * (size * gradient) ** 2
        scale = size / self.smallest
        self.numerator = beta3 * self.numerator + scale * rate * gradient.dot(self.first - now).item()
        self.sum = beta3 * self.sum + scale * (size if args.prodigy_safeguard_warmup else rate) * gradient
        # As published, the estimate may only grow, and at its first growth to any size.
        found = self.numerator / self.sum.abs().sum().item()
        self.best = max(self.best, found)
        self.estimate = self.best if self.estimate == self.smallest else max(self.estimate, found)
        now = now * (1 - args.adam_weight_decay * rate) - rate * self.mean / (self.square.sqrt() + size * args.adam_epsilon)
        for parameter, part in zip(self.parameters, now.split([p.numel() for p in self.parameters]), strict=True):
            parameter.data.copy_(part.view_as(parameter))


@pytest.mark.parametrize("changed", [{}, {"prodigy_beta3": 0.5}, {"prodigy_use_bias_correction": False, "prodigy_safeguard_warmup": False}])
def test_prodigy_walks_as_its_formulas_say(changed):
    pytest.importorskip("prodigyopt")
    args = flags(optimizer="prodigy", **changed)
    # In float64: Prodigy's first steps of 1e-6 are not much more than the rounding of numbers near 1 in fp32.
    ours = functools.partial(walk_of, dtype=torch.float64, optimizer="prodigy")
    plain = walk(lambda parameters: PlainProdigy(parameters, args, 1.0), torch.float64)
    assert difference(ours(1.0, **changed), plain) < 1e-5
    assert difference(ours(0.9, **changed), plain) > 0.02
    assert plain.abs().max() > 4 * STEPS * 1e-6  # the estimate left its start


def test_prodigy_prints_nothing_that_is_not_for_the_user(capsys):
    script.make_optimizer(flags(optimizer="prodigy", prodigy_decouple=True), start(), 1.0)
    assert capsys.readouterr() == ("", "")
