"""The GLU MLP, forward and forward with backward: every provider, in turns, over weights past the cache.

First of all everybody's result is compared with one in float64; who is wrong, or refuses, gets no time but its words.
"""

import ast
import linecache
import traceback
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.lib import timing
from gluprune.measure.records import Record
from gluprune.runtime.aligned import ALIGNMENT

FORWARD, BACKWARD = "mlp: forward", "mlp: forward and backward"

# Largest error over the largest magnitude. Gradients carry the rounding of several products.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def random_layers(count, H, I, dtype, device):
    """Weights of standard deviation 1 / sqrt(H), which keeps x and y of one size; equal ones, each in memory of its own."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((I, H), (I, H), (H, I))
    first = [torch.randn(shape, generator=generator, device=device).mul_(H**-0.5).to(dtype) for shape in shapes]
    return [first] + [[weight.clone() for weight in first] for _ in range(count - 1)]


def run(module, x, grad):
    """y, and with `grad` the gradients of x, gate, up and down as well."""
    if grad is None:
        with torch.no_grad():
            return (module(x),)
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], grad)


def reference(weights, x, grad):
    """What `run` returns, in float64."""
    inputs = [tensor.detach().double().requires_grad_(grad is not None) for tensor in (x, *weights)]
    x, gate, up, down = inputs
    y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad.double())) if grad is not None else (y,)


def error(results, expected):
    """The largest error of any result over the largest magnitude of what is expected of it; of an empty or NaN one infinity."""
    worst = 0.0
    for result, exact in zip(results, expected, strict=True):
        result = result[tuple(slice(size) for size in exact.shape)]  # without the padding, where somebody pads
        relative = ((result.double() - exact).abs().max() / exact.abs().max()).item()
        worst = max(worst, relative if relative == relative else float("inf"))  # noqa: PLR0124
    return worst


def words(raised):
    """Kind and message of an exception; of one without a message the statement that raised it."""
    return f"{type(raised).__name__}: {str(raised) or statement(traceback.extract_tb(raised.__traceback__)[-1])}"


def statement(frame):
    """The source of the statement that a frame is at, in one line; of generated code without a source its place."""
    tree = ast.parse("".join(linecache.getlines(frame.filename)))
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= frame.lineno <= n.end_lineno]
    if not around:
        return f"{frame.filename}, line {frame.lineno}"
    return " ".join(ast.unparse(max(around, key=lambda node: node.lineno)).split())


def measure(what, case, device, shapes, ceilings, providers, keep):
    """Keep records of all `providers` (name -> how to build) for one shape.

    Returns the words of those that nothing allows to refuse.
    """
    model, H, I, M = case
    dtype, method = shapes.dtype, timing.method(device)
    torch.compiler.reset()  # past a limit of recompilations nothing would be compiled any more
    layer_bytes = 3 * H * I * dtype.itemsize
    count = shapes.layers or timing.layers_past_the_cache(layer_bytes, timing.last_level_cache(device))
    layers = random_layers(count, H, I, dtype, device)
    training = what == BACKWARD
    x = torch.randn(1, M, H, device=device).to(dtype).requires_grad_(training)
    grad = torch.randn_like(x) if training else None
    expected = reference(layers[0], x, grad)

    passes, refusals = {}, {}
    for name, build in providers.items():
        try:
            modules = [build(weights).train(training).requires_grad_(training) for weights in layers]
            if (wrong := error(run(modules[0], x, grad), expected)) > TOLERANCE[dtype]:
                raise ArithmeticError(f"wrong by {wrong:.1e} of the largest value, allowed are {TOLERANCE[dtype]:.0e}")
            passes[name] = timing.prepare([partial(run, module, x, grad) for module in modules], device)
        except torch.AcceleratorError:
            raise  # the device is lost
        except Exception as raised:  # noqa: BLE001 - whatever a provider raises is its refusal
            refusals[name] = words(raised)
    times = timing.in_turns(passes, shapes.repeats)

    # Weights once, x and y once; with backward the weights twice and their gradients once, and dx and dy.
    nbytes = (3 if training else 1) * layer_bytes + (4 if training else 2) * M * H * dtype.itemsize
    flops = (18 if training else 6) * M * H * I
    details = {"nbytes": nbytes, "flops": flops, "floor": ceilings.floor(nbytes, flops), "method": method}
    shape = {"model": model, "H": H, "I": I, "M": M}
    for name in providers:
        if name in times:
            keep(Record.of(what, name, shape, dtype, "s", times[name], **details))
        elif name != "eager, padded" or I % ALIGNMENT:
            keep(Record.refused(what, name, shape, dtype, "s", refusals[name], method))
    return {name: refusals[name] for name in ("eager", "gluprune") if name in refusals}


def test_forward(benchmark, case, device, shapes, ceilings, providers, keep):
    assert benchmark.pedantic(measure, args=(FORWARD, case, device, shapes, ceilings, providers, keep), rounds=1) == {}


def test_backward(benchmark, training_case, device, shapes, ceilings, providers, keep):
    arguments = (BACKWARD, training_case, device, shapes, ceilings, providers, keep)
    assert benchmark.pedantic(measure, args=arguments, rounds=1) == {}
