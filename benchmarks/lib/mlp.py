"""Benchmarks of GLU MLPs: random layers, the float64 reference, errors, and records of all providers for one shape."""

from __future__ import annotations

import ast
import linecache
import math
import traceback
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.lib import timing
from benchmarks.lib.providers import ROUNDED
from csrc_triton.layout import PAD
from gluprune.measure.records import Record
from gluprune.runtime.rounding import dequantize, quantize

FORWARD, BACKWARD = "mlp: forward", "mlp: forward and backward"

# Largest error over the largest magnitude. Gradients carry the rounding of several products.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def random_layers(count, H, I, dtype, device):
    """Return `count` layers with the same weights in separate memory, with standard deviation 1 / sqrt(H)."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((I, H), (I, H), (H, I))
    first = [torch.randn(shape, generator=generator, device=device).mul_(H**-0.5).to(dtype) for shape in shapes]
    return [first] + [[weight.clone() for weight in first] for _ in range(count - 1)]


def run(module, x, grad):
    """Return y and, if `grad` is given, the gradients of x, gate, up and down."""
    if grad is None:
        with torch.no_grad():
            return (module(x),)
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], grad)


def reference(weights, x, grad):
    """Return the results of `run`, computed in float64."""
    inputs = [tensor.detach().double().requires_grad_(grad is not None) for tensor in (x, *weights)]
    x, gate, up, down = inputs
    y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad.double())) if grad is not None else (y,)


def error(results, expected):
    """Return the largest error of any result relative to its largest expected magnitude; infinity for NaN."""
    worst = 0.0
    for result, exact in zip(results, expected, strict=True):
        unpadded = result[tuple(slice(size) for size in exact.shape)]
        relative = ((unpadded.double() - exact).abs().max() / exact.abs().max()).item()
        worst = max(worst, float("inf") if math.isnan(relative) else relative)
    return worst


def exception_text(raised):
    """Return the type and message of an exception or, without a message, the statement that raised it."""
    return f"{type(raised).__name__}: {str(raised) or statement(traceback.extract_tb(raised.__traceback__)[-1])}"


def statement(frame):
    """Return the source of a frame's current statement on one line, or its position if there is no source."""
    tree = ast.parse("".join(linecache.getlines(frame.filename)))
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= frame.lineno <= n.end_lineno]
    if not around:
        return f"{frame.filename}, line {frame.lineno}"
    return " ".join(ast.unparse(max(around, key=lambda node: node.lineno)).split())


def measure(what, case, device, *, shapes, ceilings, providers, keep):
    """Keep records of all `providers` (name -> build function) for one shape.

    Before timing, the results of every provider for two inputs in turns are compared with float64. For a provider that
    raises or is wrong, the record contains the exception instead of a time.

    Args:
        what: `FORWARD` or `BACKWARD`.
        case: Model, H, I and M.
        device: Device to run on.
        shapes: The `ShapeSet`.
        ceilings: The ceilings of the machine.
        providers: The providers to measure.
        keep: Called with each record.

    Returns:
        The exceptions of the providers that must support every shape.
    """
    model, H, I, M = case
    dtype, method = shapes.dtype, timing.method(device)
    torch.compiler.reset()  # beyond the limit of recompilations nothing would be compiled
    is_rounded = {name: name in ROUNDED for name in providers}
    layer_bytes = {False: 3 * H * I * dtype.itemsize, True: 3 * H * I}
    smallest = layer_bytes[any(is_rounded.values())]
    count = shapes.layers or timing.layers_past_the_cache(smallest, timing.last_level_cache(device))
    layers = random_layers(count, H, I, dtype, device)
    training = what == BACKWARD
    inputs = [torch.randn(1, M, H, device=device).to(dtype).requires_grad_(training) for _ in range(2)]
    grad = torch.randn(1, M, H, device=device).to(dtype) if training else None
    expected = {False: [reference(layers[0], x, grad) for x in inputs]}
    if any(is_rounded.values()):
        rounded = [dequantize(*quantize(weight)) for weight in layers[0]]
        expected[True] = [reference(rounded, x, grad) for x in inputs]

    passes, exceptions = {}, {}
    for name, build in providers.items():
        try:
            modules = [build(weights).train(training).requires_grad_(training) for weights in layers]
            # The second call may keep launches for the third, which must read the new tokens.
            for number in (0, 1, 0):
                wrong = error(run(modules[0], inputs[number], grad), expected[is_rounded[name]][number])
                if wrong > TOLERANCE[dtype]:
                    allowed = f"allowed are {TOLERANCE[dtype]:.0e}"
                    raise ArithmeticError(f"wrong by {wrong:.1e} of the largest value, {allowed}")
            passes[name] = timing.prepare([partial(run, module, inputs[0], grad) for module in modules], device)
        except torch.AcceleratorError:
            raise  # the device is lost
        except Exception as raised:  # any exception of a provider is recorded
            exceptions[name] = exception_text(raised)
    times = timing.in_turns(passes, shapes.repeats)

    # Weights once, x and y once; with backward the weights twice and their gradients once, and dx and dy.
    flops = (18 if training else 6) * M * H * I
    shape = {"model": model, "H": H, "I": I, "M": M}
    for name in providers:
        nbytes = (3 if training else 1) * layer_bytes[is_rounded[name]] + (
            4 if training else 2
        ) * M * H * dtype.itemsize
        details = {"nbytes": nbytes, "flops": flops, "floor": ceilings.floor(nbytes, flops), "method": method}
        if name in times:
            keep(Record.of(what, name, shape, dtype, unit="s", values=times[name], **details))
        elif name != "eager, padded" or I % PAD:
            keep(Record.missing(what, name, shape, dtype, unit="s", reason=exceptions[name], method=method))
    return {name: exceptions[name] for name in ("eager", "gluprune") if name in exceptions}
